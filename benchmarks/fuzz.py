"""Any bytes at all: what reads files may refuse them by an error of its own, and do nothing else.

    python benchmarks/fuzz.py [--minutes M] [--target parse salvage load_picture] [--keep FOLDER]

Bytes are changed over and over, from small files of many formats on, and given to `bitstream.parse`,
`bitstream.salvage` (also with the checksum made to fit, without which few bytes of a file are ever looked at) and
`image_io.load_picture`. A finding is whatever is raised that is no `PqmimError`, a message of more than one line, or a
call that takes longer than ten seconds. Each finding is printed once, with its bytes; the exit code is 1 if there are
any. --keep writes the bytes into a folder.

With the package atheris (`pip install 'pqmim[fuzz]'`) the changes are led by the code that they reach; without it they
are blind.
"""

from __future__ import annotations

import argparse
import binascii
import importlib
import importlib.util
import io
import os
import random
import struct
import sys
import tempfile
import time
import traceback
import warnings
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

HAS_ATHERIS = importlib.util.find_spec("atheris") is not None
if HAS_ATHERIS:
    import atheris

    with atheris.instrument_imports(include=["pqmim", "PIL"], enable_loader_override=False):
        from PIL import Image, ImageCms

        import pqmim.image_io
        from pqmim import bitstream
        from pqmim.errors import PqmimError
else:
    from PIL import Image, ImageCms

    import pqmim.image_io
    from pqmim import bitstream
    from pqmim.errors import PqmimError

MAX_PIXELS = 1_000_000
MAX_SECONDS = 10.0
MAX_BYTES = 4096
GOLDEN = Path(pqmim.image_io.__file__).parent / "golden"


def load_picture(data: bytes) -> None:
    """As users do, with a limit that keeps the machine free."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pqmim.image_io.load_picture(data, max_pixels=MAX_PIXELS)


def parse(data: bytes) -> None:
    """The container as it is, and with the checksum made to fit."""
    for variant in variants(data):
        call(bitstream.parse, variant)


def salvage(data: bytes) -> None:
    """As `parse`."""
    for variant in variants(data):
        call(bitstream.salvage, variant)


def call(function: Callable[[bytes], object], data: bytes) -> None:
    """Call a function, and let it refuse."""
    try:
        function(data)
    except PqmimError as error:
        if "\n" in str(error) or not str(error):
            raise AssertionError("a message that is not one line") from error


def variants(data: bytes) -> Iterator[bytes]:
    """The bytes as they are, and with the checksum of either form of a .pqm file (see docs/format.md)."""
    yield data
    yield data + zlib.crc32(data).to_bytes(4, "big")
    yield data + (binascii.crc_hqx(data, 0xFFFF) ^ 0xFFFF).to_bytes(2, "big")


TARGETS = {function.__name__: function for function in (parse, salvage, load_picture)}


def seeds() -> list[bytes]:
    """Small files of many formats."""
    image = Image.linear_gradient("L").resize((20, 14)).convert("RGB")
    grey = image.convert("L")
    icc = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    files = [path.read_bytes() for path in sorted(GOLDEN.glob("*.pqm")) if path.stat().st_size < MAX_BYTES]
    options: list[tuple[Image.Image, str, dict[str, object]]] = [
        *(
            (image, name, {})
            for name in ("PNG", "JPEG", "WEBP", "TIFF", "JPEG2000", "AVIF", "GIF", "BMP", "PPM", "SGI")
        ),
        *((image, name, {}) for name in ("PCX", "TGA", "ICO", "DDS", "QOI")),
        (image.convert("1"), "XBM", {}),
        (image, "WEBP", {"lossless": True, "exif": exif()}),
        (image, "JPEG", {"exif": exif(), "progressive": True}),
        (image.convert("CMYK"), "JPEG", {}),
        (image, "PNG", {"exif": exif()}),
        (image, "WEBP", {"icc_profile": icc}),
        (grey, "TIFF", {"icc_profile": icc}),
        (image.quantize(16), "PNG", {"transparency": 3}),
        (image.convert("RGBA"), "PNG", {}),
        (image, "TIFF", {"compression": "tiff_lzw"}),
        (image, "TIFF", {"compression": "jpeg"}),
        (image.convert("1"), "TIFF", {"compression": "group4"}),
        (grey.convert("I;16"), "TIFF", {"compression": "tiff_adobe_deflate"}),
        (grey.convert("I;16"), "PNG", {}),
        (grey.convert("F"), "TIFF", {}),
        (image, "AVIF", {"exif": exif()}),
    ]
    for package, name in (("pillow_heif", "HEIF"), ("pillow_jxl", "JXL")):
        if importlib.util.find_spec(package) is not None:
            module = importlib.import_module(package)
            if name == "HEIF":
                module.register_heif_opener()
            options += [(image, name, {}), (image.convert("RGBA"), name, {"exif": exif()})]
    for source, name, settings in options:
        file = io.BytesIO()
        source.save(file, format=name, **settings)
        files.append(file.getvalue())
    files += [
        wide_png(chunks) for chunks in ([(b"cICP", b"\x09\x10\0\1")], [(b"gAMA", b"\0\1\x86\xa0"), (b"tRNS", bytes(6))])
    ]
    files += [
        b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(60),
        b"\xff\x0a" + bytes(60),
        b"II*\0\x10\0\0\0CR\2\0" + bytes(60),
    ]
    return files


def exif() -> bytes:
    """An EXIF block with an orientation."""
    return b"Exif\0\0II*\0\x08\0\0\0\1\0" + struct.pack("<HHII", 0x0112, 3, 1, 6) + bytes(4)


def wide_png(chunks: list[tuple[bytes, bytes]]) -> bytes:
    """A PNG of 16 bits, 3 x 2 pixels."""
    parts = [(b"IHDR", struct.pack(">IIBBBBB", 3, 2, 16, 2, 0, 0, 0)), *chunks]
    parts += [(b"IDAT", zlib.compress((b"\0" + bytes(range(18))) * 2)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        for kind, content in parts
    )


@dataclass
class Fuzzer:
    """Calls the targets, counts, keeps what they did wrong.

    Attributes:
        targets: names of TARGETS.
        keep: folder for the bytes of findings.
    """

    targets: list[str]
    keep: Path | None
    num_executions: int = 0
    findings: dict[str, bytes] = field(default_factory=dict)

    def try_bytes(self, data: bytes) -> None:
        """Call each target once."""
        for name in self.targets:
            start = time.monotonic()
            try:
                call(TARGETS[name], data)
            except BaseException as error:
                if isinstance(error, (KeyboardInterrupt, SystemExit)):
                    raise
                last = traceback.extract_tb(error.__traceback__)[-1]
                self.find(f"{name}: {type(error).__name__} at {last.filename}:{last.lineno}: {error}", data)
            self.num_executions += 1
            seconds = time.monotonic() - start
            if seconds > MAX_SECONDS:
                self.find(f"{name}: slow", data)

    def find(self, description: str, data: bytes) -> None:
        """Print and keep a finding that is new; the same place counts once."""
        place = description.split(": ")[:2]
        if ": ".join(place) in self.findings:
            return
        self.findings[": ".join(place)] = data
        print(f"FINDING {description}\n  {len(data)} bytes: {data[:200].hex()}", flush=True)
        if self.keep is not None:
            self.keep.mkdir(parents=True, exist_ok=True)
            (self.keep / f"{zlib.crc32(data):08x}.bin").write_bytes(data)

    def report(self, seconds: float) -> int:
        """Print what was done; return the exit code."""
        engine = "atheris" if HAS_ATHERIS else "blind changes"
        print(
            f"{self.num_executions:,} executions of {', '.join(self.targets)} in {seconds / 60:.1f} minutes "
            f"({engine}), {len(self.findings)} findings",
            flush=True,
        )
        return 1 if self.findings else 0


def changed(data: bytes, rng: random.Random) -> bytes:
    """Change a few bytes, blindly."""
    result = bytearray(data)
    for _ in range(rng.randint(1, 5)):
        at = rng.randrange(len(result) + 1)
        kind = rng.randrange(4)
        if kind == 0 and at < len(result):
            result[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            result[at : at + 4] = rng.choice(
                (b"\xff" * 4, bytes(4), b"\x7f\xff\xff\xff", b"\0\0\0\x80", rng.randbytes(4))
            )
        elif kind == 2:
            del result[at : at + rng.randint(1, 40)]
        else:
            result[at:at] = rng.randbytes(rng.randint(1, 8))
    return bytes(result[:MAX_BYTES])


def fuzz_blindly(fuzzer: Fuzzer, seconds: float) -> int:
    """Change seeds, and what came of them, until the time is over."""
    rng = random.Random(0)
    pool = seeds()
    start = time.monotonic()
    while time.monotonic() - start < seconds:
        data = changed(rng.choice(pool), rng)
        fuzzer.try_bytes(data)
        if rng.random() < 0.01:
            pool.append(data)
    return fuzzer.report(time.monotonic() - start)


def fuzz_with_atheris(fuzzer: Fuzzer, seconds: float) -> None:
    """Let atheris lead until the time is over; does not return, as libFuzzer ends the process."""
    start = time.monotonic()

    def one_input(data: bytes) -> None:
        fuzzer.try_bytes(data)
        if time.monotonic() - start > seconds:
            sys.stdout.flush()
            os._exit(fuzzer.report(time.monotonic() - start))

    with tempfile.TemporaryDirectory() as corpus:
        for i, data in enumerate(seeds()):
            (Path(corpus) / f"{i:03}").write_bytes(data)
        settings = [f"-max_len={MAX_BYTES}", "-rss_limit_mb=3000", "-timeout=60", "-verbosity=0", "-seed=1"]
        atheris.Setup([sys.argv[0], *settings, corpus], one_input)
        atheris.Fuzz()


def main() -> int:
    """Read the command line and fuzz."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=5.0, help="how long (default: 5)")
    parser.add_argument("--target", nargs="+", choices=TARGETS, default=list(TARGETS), help="what is called")
    parser.add_argument("--keep", type=Path, help="folder for the bytes of findings")
    arguments = parser.parse_args()
    fuzzer = Fuzzer(arguments.target, arguments.keep)
    for data in seeds():
        fuzzer.try_bytes(data)
    if not HAS_ATHERIS:
        return fuzz_blindly(fuzzer, 60 * arguments.minutes)
    fuzz_with_atheris(fuzzer, 60 * arguments.minutes)
    return 0


if __name__ == "__main__":
    sys.exit(main())
