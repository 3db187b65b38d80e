"""Gallery: the same files with fewer and fewer of their tokens, on one HTML page that needs no network.

From left to right the decoder is told less and has to fill more, up to a picture of which nothing was sent.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from html import escape
from string import Template

import numpy as np
from numpy.typing import NDArray

from pqmim import bitstream
from pqmim.codec import Codec
from pqmim.evaluation.pages import data_uri, page_part
from pqmim.evaluation.pixel_metrics import psnr_rgb
from pqmim.image_io import ImageLike, load_picture
from pqmim.options import MAX_PIXELS, EncodeOptions, Fill, FillOptions

SHOWN_FILLS = (Fill.LIKELY, Fill.SAMPLE)
WEBP_QUALITY = 88
MIN_SHOWN_WIDTH, MAX_SHOWN_WIDTH = 150, 384
"""Narrowest and widest that a picture is on the page, CSS pixels; between them all columns fit into the window."""


@dataclass(frozen=True)
class GalleryOptions:
    """What the gallery shows.

    Attributes:
        keeps: shares of the tokens that are kept, 0 to 1, in the order of the columns.
        quality: of the files, 0 to 100.
        filling: how tokens are drawn; its `fill` is of no effect.
        max_pixels: larger images are refused.
    """

    keeps: tuple[float, ...] = (1.0, 0.8, 0.6, 0.4, 0.2, 0.0)
    quality: float = 50.0
    filling: FillOptions = field(default_factory=FillOptions)
    max_pixels: int = MAX_PIXELS

    def __post_init__(self) -> None:
        if not self.keeps:
            raise ValueError("keeps must have at least one share")
        for keep in self.keeps:
            if not 0 <= keep <= 1:
                raise ValueError(f"keeps must be 0 to 1, not {keep:g}")


@dataclass(frozen=True)
class KeptTokens:
    """A file with a share of its tokens, and what becomes of it.

    Attributes:
        num_bytes: of the file.
        known_share: of the tokens, as the decoder found it.
        pictures: (H, W, 3) uint8 for each of SHOWN_FILLS; only one if there was nothing to fill.
    """

    num_bytes: int
    known_share: float
    pictures: tuple[NDArray[np.uint8], ...]


@dataclass(frozen=True)
class Strip:
    """All that the page shows of one image; `original` is (H, W, 3) uint8."""

    name: str
    original: NDArray[np.uint8]
    kept: tuple[KeptTokens, ...]


def make_strip(codec: Codec, name: str, image: ImageLike, options: GalleryOptions) -> Strip:
    """Encode an image with each share of its tokens and decode it with each fill.

    Raises:
        ImageError: it cannot be read.
        LimitError: it has too many pixels.
    """
    original = load_picture(image, max_pixels=options.max_pixels).rgb
    return Strip(name, original, tuple(_kept_tokens(codec, original, keep, options) for keep in options.keeps))


def _kept_tokens(codec: Codec, original: NDArray[np.uint8], keep: float, options: GalleryOptions) -> KeptTokens:
    if keep > 0:
        encoding = EncodeOptions(keep=keep, max_pixels=options.max_pixels)
        data = codec.encode(original, quality=options.quality, options=encoding)
    else:
        complete = codec.encode(original, quality=options.quality)
        data = bitstream.truncate(complete, bitstream.smallest_size(complete))
    decoded = []
    for fill in SHOWN_FILLS:
        filling = replace(options.filling, fill=fill)
        decoded.append(codec.decode_with_report(data, options=filling, max_pixels=options.max_pixels))
        if decoded[-1].invented_share == 0:
            break
    return KeptTokens(len(data), 1 - decoded[0].invented_share, tuple(np.asarray(each.image) for each in decoded))


def gallery_page(strips: Sequence[Strip], title: str, options: GalleryOptions, *, model: str) -> str:
    """Return the page as HTML.

    Args:
        model: name for the line below the title.
    """
    filling = options.filling
    facts = f"Model {model}, quality {options.quality:g}; sampled with seed {filling.seed}"
    if filling.temperature != 1:
        facts += f", temperature {filling.temperature:g}"
    note = (
        "Kept tokens are the first ones in coding order. What was not kept is filled: likely takes the expectation, "
        "sample draws detail that nobody sent. Bytes are those of the whole file, PSNR is over RGB. The pictures are "
        f"embedded as WebP of quality {WEBP_QUALITY}; PSNR is that of the decoded ones."
    )
    return Template(page_part("gallery.html")).substitute(
        title=escape(title),
        style=page_part("page.css"),
        facts=escape(facts),
        sections="\n".join(_section(strip) for strip in strips),
        note=escape(note),
    )


def _section(strip: Strip) -> str:
    """One image: a column for each share, a row for each fill; a complete file has one picture for all rows."""
    height, width = strip.original.shape[:2]
    rows = len(SHOWN_FILLS)
    heads = ["<td></td>", '<th scope="col">original</th>']
    heads += [f'<th scope="col">{_percent(kept.known_share)} of the tokens</th>' for kept in strip.kept]
    lines = [f"<tr>{''.join(heads)}</tr>"]
    for row, fill in enumerate(SHOWN_FILLS):
        cells = [f'<th scope="row">{fill.value}</th>']
        if row == 0:
            cells.append(_cell(strip.original, f"{width} x {height}", f"{strip.name}, original", rows))
        for kept in strip.kept:
            if row < len(kept.pictures):
                pixels = kept.pictures[row]
                bpp = 8 * kept.num_bytes / (width * height)
                caption = (
                    f"{kept.num_bytes:,}\u00a0B, {bpp:.3f}\u00a0bpp, {psnr_rgb(strip.original, pixels):.2f}\u00a0dB"
                )
                text = f"{strip.name}, {_percent(kept.known_share)} of the tokens, {fill.value}"
                cells.append(_cell(pixels, caption, text, rows if len(kept.pictures) == 1 else 1))
        lines.append(f"<tr>{''.join(cells)}</tr>")
    table = "\n".join(lines)
    least = (len(strip.kept) + 1) * MIN_SHOWN_WIDTH
    return (
        f'<section>\n<div class="head"><h2>{escape(strip.name)}</h2></div>\n'
        f'<div class="scroll"><table class="strip" style="min-width: {least}px">\n{table}\n</table></div>\n</section>'
    )


def _cell(pixels: NDArray[np.uint8], caption: str, text: str, rows: int) -> str:
    height, width = pixels.shape[:2]
    return (
        f'<td rowspan="{rows}"><figure style="max-width: {min(width, MAX_SHOWN_WIDTH)}px">'
        f'<img src="{data_uri(pixels, WEBP_QUALITY)}" width="{width}" height="{height}" alt="{escape(text)}">'
        f"<figcaption>{escape(caption)}</figcaption></figure></td>"
    )


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %"
