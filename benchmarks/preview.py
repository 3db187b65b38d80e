"""Previews of 30 to 200 bytes beside BlurHash, ThumbHash and WebP: quality, a picture of it, time to decode.

    python benchmarks/preview.py KODAK -o results/preview_kodak [--strip docs/images/preview.jpg] [--speed]

Bytes are counted twice: as bytes, as a database column has them, and as text inside a page or JSON: a data URL for
WebP, base64 for previews; a BlurHash is a text, and of a ThumbHash the bytes are counted. WebP gets its best chance:
the picture is scaled down 1 to 64 times, coded at every second quality (method 6), and scaled up again to a size that
the file does not say; of all that fit the one with the best PSNR counts. All are compared in the size of the original,
scaled up by Lanczos. Needs `pip install 'pqmim[eval]'`.

Writes OUT/preview.json and OUT/preview.md; rows in OUT/measurements.jsonl are not measured again. `--speed` writes
OUT/speed.json and OUT/speed.md.
"""

from __future__ import annotations

import io
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from measurements import Bench, Photo, Row, make_parser, mean, number, read_photos, table, write
from panels import Panel, draw_sheet
from PIL import Image

from pqmim import preview
from pqmim.bitstream import parse
from pqmim.codec import Codec, load_codec
from pqmim.evaluation.metrics import compute_metric, missing_metric
from pqmim.evaluation.pixel_metrics import Pixels, psnr_rgb
from pqmim.evaluation.tiny_hashes import blurhash_of, picture_of_blurhash, picture_of_thumbhash, thumbhash_of

BUDGETS = (30, 60, 100, 200)
"""Bytes, or characters of a text."""
METRIC_KEYS = ("ms-ssim-rgb", "psnr-rgb", "ssimulacra2")
WEBP_SCALES = (64, 48, 32, 24, 16, 12, 8, 6, 4, 3, 2, 1)
WEBP_QUALITIES = range(0, 96, 2)
URL_START = len("data:image/webp;base64,")
STRIP_PICTURES = ("kodim05", "kodim15", "kodim20", "kodim23")
STRIP_WIDTH = 200
"""Pixels of one picture of the strip."""
SPEED_REPEATS = 50


@dataclass(frozen=True)
class Contender:
    """What makes files of a picture.

    Attributes:
        budgets: that it aims at; 0 = it has a size of its own.
        make: (picture, budget) -> the size that counts and the picture in the original's size; None if none fits.
    """

    name: str
    budgets: tuple[int, ...]
    make: Callable[[Image.Image, int], tuple[int, Pixels] | None]


def text_size(num_bytes: int) -> int:
    """Characters of some bytes in base64."""
    return 4 * -(-num_bytes // 3)


def pqmim_preview(codec: Codec, is_text: bool, image: Image.Image, budget: int) -> tuple[int, Pixels]:
    """A preview, as bytes or as a text of no more characters."""
    data = preview.encode(image, budget // 4 * 3 if is_text else budget, model=codec)
    return text_size(len(data)) if is_text else len(data), scaled_up(preview_picture(codec, data), image.size)


def preview_picture(codec: Codec, data: bytes) -> Image.Image:
    """The picture of a preview in the size in which it was coded."""
    container = parse(data)
    return preview.decode(data, max(container.width, container.height), model=codec)


def webp(is_url: bool, image: Image.Image, budget: int) -> tuple[int, Pixels] | None:
    """The best WebP within some bytes, or characters of its data URL."""
    original = np.asarray(image)
    best: tuple[float, int, Pixels] | None = None
    for data in webp_files(image, budget, is_url=is_url):
        with Image.open(io.BytesIO(data)) as decoded:
            pixels = scaled_up(decoded.convert("RGB"), image.size)
        psnr = psnr_rgb(original, pixels)
        if best is None or psnr > best[0]:
            best = psnr, URL_START + text_size(len(data)) if is_url else len(data), pixels
    return None if best is None else best[1:]


def webp_files(image: Image.Image, budget: int, *, is_url: bool) -> Iterator[bytes]:
    """For each scale the largest file that fits."""
    room = (budget - URL_START) // 4 * 3 if is_url else budget
    for scale in WEBP_SCALES:
        size = (max(1, round(image.width / scale)), max(1, round(image.height / scale)))
        small = image.resize(size, Image.Resampling.LANCZOS)
        best = b""
        for quality in WEBP_QUALITIES:
            file = io.BytesIO()
            small.save(file, "WEBP", quality=quality, method=6)
            if len(file.getvalue()) > 1.3 * room:  # sizes are not quite monotonic
                break
            if len(best) < len(file.getvalue()) <= room:
                best = file.getvalue()
        if best:
            yield best


def blurhash(image: Image.Image, budget: int) -> tuple[int, Pixels]:
    """BlurHash of 4 x 3 waves."""
    text = blurhash_of(image)
    return len(text), picture_of_blurhash(text, *image.size)


def thumbhash(image: Image.Image, budget: int) -> tuple[int, Pixels]:
    """ThumbHash."""
    data = thumbhash_of(image)
    return len(data), picture_of_thumbhash(data, *image.size)[:, :, :3]


def scaled_up(image: Image.Image, size: tuple[int, int]) -> Pixels:
    """(H, W, 3) uint8 of a size (width, height)."""
    return np.asarray(image.resize(size, Image.Resampling.LANCZOS))


def contenders(codec: Codec) -> list[Contender]:
    """All that are measured."""
    return [
        Contender("pqmim", BUDGETS, partial(pqmim_preview, codec, False)),
        Contender("pqmim, base64", BUDGETS, partial(pqmim_preview, codec, True)),
        Contender("WebP", BUDGETS, partial(webp, False)),
        Contender("WebP, data URL", BUDGETS, partial(webp, True)),
        Contender("BlurHash 4 x 3", (0,), blurhash),
        Contender("ThumbHash", (0,), thumbhash),
    ]


def measured(photo: Photo, contender: Contender, budget: int, metrics: Sequence[str]) -> Row:
    """Size and quality of one file; a size of None if there is none so small."""
    row: Row = {"contender": contender.name, "budget": budget, "bytes": None}
    made = contender.make(Image.fromarray(photo.pixels), budget)
    if made is None:
        return row
    size, pixels = made
    return row | {"bytes": size} | {key: compute_metric(key, photo.pixels, pixels) for key in metrics}


def tables(rows: Sequence[Row], metrics: Sequence[str]) -> str:
    """One table of means: a line for each budget and contender."""
    groups: dict[tuple[int, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["budget"], row["contender"]), []).append(row)
    lines = []
    for (budget, name), members in groups.items():
        made = [row for row in members if row["bytes"] is not None]
        cells = [str(budget) if budget else "", name, f"{len(made)} of {len(members)}"]
        is_for_all = len(made) == len(members)
        cells.append(number(mean(made, "bytes"), ".1f") if is_for_all else "")
        for key, form in zip(METRIC_KEYS, (".3f", ".2f", ".1f"), strict=True):
            cells.append(number(mean(made, key), form) if is_for_all and key in metrics else "")
        lines.append(cells)
    return table(("at most", "", "pictures", "size (mean)", "MS-SSIM", "PSNR (dB)", "SSIMULACRA2"), lines)


def strip(photos: Sequence[Photo], codec: Codec, file: Path) -> None:
    """Write originals and what is made of them side by side."""
    chosen = [photo for photo in photos if Path(photo.name).stem in STRIP_PICTURES] or list(photos[:4])
    rows: list[list[Panel]] = []
    for photo in chosen:
        image = Image.fromarray(photo.pixels)
        size = (STRIP_WIDTH, round(STRIP_WIDTH * image.height / image.width))
        made = [(f"BlurHash, {blurhash(image, 0)[0]} B", blurhash(image, 0)[1])]
        made.append((f"ThumbHash, {thumbhash(image, 0)[0]} B", thumbhash(image, 0)[1]))
        for budget in BUDGETS:
            num_bytes, pixels = pqmim_preview(codec, False, image, budget)
            made.append((f"pqmim, {num_bytes} B", pixels))
        url = webp(True, image, BUDGETS[-1])
        if url is not None:
            made.append((f"WebP, URL of {url[0]}", url[1]))
        panels = [("original", photo.pixels), *made]
        rows.append([(text, Image.fromarray(pixels).resize(size, Image.Resampling.LANCZOS)) for text, pixels in panels])
    file.parent.mkdir(parents=True, exist_ok=True)
    draw_sheet(rows, caption=22, font_size=13, gap=5).save(file, quality=88, optimize=True)
    print(f"{file}: {file.stat().st_size:,} bytes")


def measure_speed(photos: Sequence[Photo], model: str, decoder: str | None, output: Path) -> None:
    """Milliseconds to decode a preview at 96 x 64, and to make it, on one thread with the model loaded."""
    codec = load_codec(model, decoder, device="cpu", threads=preview.THREADS)
    rows: list[Row] = []
    for photo in photos:
        for budget in BUDGETS:
            start = time.process_time()
            data = preview.encode(photo.pixels, budget, model=codec)
            encoding = time.process_time() - start
            preview.decode(data, model=codec)  # the first one plans the grid
            wall, processor = [], []
            for _ in range(SPEED_REPEATS):
                started, start = time.perf_counter(), time.process_time()
                preview.decode(data, model=codec)
                wall.append(1000 * (time.perf_counter() - started))
                processor.append(1000 * (time.process_time() - start))
            times = {"wall": statistics.median(wall), "processor": statistics.median(processor), "least": min(wall)}
            rows.append({"image": photo.name, "budget": budget, "encode": 1000 * encoding, **times})
    lines = []
    for budget in BUDGETS:
        members = [row for row in rows if row["budget"] == budget]
        cells = [number(mean(members, key), ".1f") for key in ("wall", "processor", "least", "encode")]
        lines.append([str(budget), *cells])
    header = ("bytes", "decode, ms", "of them processor", "fastest", "encode, ms of processor")
    text = f"Means over {len(photos)} pictures of the median of {SPEED_REPEATS} runs.\n\n" + table(header, lines)
    write(output, "speed", rows, text)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure what is not measured yet and write the tables."""
    parser = make_parser(__doc__)
    parser.add_argument("--strip", type=Path, metavar="FILE.jpg", help="write pictures side by side")
    parser.add_argument("--speed", action="store_true", help="time decoding and encoding of the first four pictures")
    parser.add_argument("--metrics", nargs="+", choices=METRIC_KEYS, default=METRIC_KEYS, help="others are left out")
    options = parser.parse_args(arguments)

    metrics = [key for key in options.metrics if missing_metric(key) is None]
    photos = read_photos(options.dataset, options.images)
    bench = Bench(options.model, options.output, options.device, options.decoder)
    rows: list[Row] = []
    for contender in contenders(bench.codec):
        for photo in photos:
            for budget in contender.budgets:
                what = f"{contender.name} {budget} {' '.join(metrics)}"
                rows.append(bench.row(photo, what, partial(measured, photo, contender, budget, metrics)))
        print(contender.name, file=sys.stderr, flush=True)
    rows.sort(key=lambda row: row["budget"] or BUDGETS[-1] + 1)
    write(options.output, "preview", rows, tables(rows, metrics))
    if options.strip is not None:
        strip(photos, bench.codec, options.strip)
    if options.speed:
        measure_speed(photos[:4], options.model, options.decoder, options.output)


if __name__ == "__main__":
    main()
