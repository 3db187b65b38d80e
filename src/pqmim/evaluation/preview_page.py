"""Page of previews: each picture beside its preview, its BlurHash and its ThumbHash. It needs no network."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from string import Template

import numpy as np
from PIL import Image

from pqmim import preview
from pqmim.evaluation.pages import data_uri, page_part
from pqmim.evaluation.pixel_metrics import Pixels, psnr_rgb
from pqmim.evaluation.tiny_hashes import blurhash_of, picture_of_blurhash, picture_of_thumbhash, thumbhash_of
from pqmim.image_io import ImageLike, load_picture, to_pillow

SHOWN_SIDE = 384
"""Longer side of the pictures on the page, pixels; smaller originals are shown as they are."""
BLURHASH_WAVES = (4, 3)
WEBP_QUALITY = 88


@dataclass(frozen=True)
class Shown:
    """A picture on the page.

    Attributes:
        label: what it was made with.
        num_bytes: that it was made of.
        pixels: (H, W, 3 or 4) uint8, of the size of the original on the page.
    """

    label: str
    num_bytes: int
    pixels: Pixels


@dataclass(frozen=True)
class Row:
    """All that the page shows of one picture; `original` is (H, W, 3 or 4) uint8."""

    name: str
    original: Pixels
    shown: tuple[Shown, ...]


def make_row(name: str, image: ImageLike, data: bytes, *, model: preview.Model | None = None) -> Row:
    """Decode a preview and make the others.

    Args:
        image: the original.
        data: its preview.
        model: as `preview.decode` takes it.

    Raises:
        ImageError, LimitError: the original cannot be read.
    """
    original = to_pillow(load_picture(image))
    side = min(SHOWN_SIDE, max(original.size))
    original.thumbnail((side, side), Image.Resampling.LANCZOS)
    width, height = original.size
    decoded = preview.decode(data, side, model=model).resize(original.size, Image.Resampling.LANCZOS)
    blurhash, thumbhash = blurhash_of(original, *BLURHASH_WAVES), thumbhash_of(original)
    shown = (
        Shown("pqmim", len(data), np.asarray(decoded)),
        Shown("BlurHash", len(blurhash), picture_of_blurhash(blurhash, width, height)),
        Shown("ThumbHash", len(thumbhash), picture_of_thumbhash(thumbhash, width, height)),
    )
    return Row(name, np.asarray(original), shown)


def preview_page(rows: Sequence[Row], title: str, *, max_bytes: int) -> str:
    """Return the page as HTML.

    Args:
        max_bytes: that the previews were allowed.
    """
    note = (
        f"All are shown in the size of the first, at most {SHOWN_SIDE} pixels; PSNR is over RGB in that size, over "
        "white where there is alpha. Bytes of a BlurHash are its characters, those of a ThumbHash and of a preview are "
        f"bytes, which take a third more as base64. The pictures are embedded as WebP of quality {WEBP_QUALITY}."
    )
    return Template(page_part("previews.html")).substitute(
        title=escape(title),
        style=page_part("page.css"),
        facts=escape(f"Previews of at most {max_bytes:,} bytes, and what else pages show while a picture loads"),
        sections="\n".join(_section(row) for row in rows),
        note=escape(note),
    )


def _section(row: Row) -> str:
    figures = [_figure(row.original, f"{row.name}, original", "original")]
    for each in row.shown:
        psnr = psnr_rgb(_over_white(row.original), _over_white(each.pixels))
        caption = f"{each.label}: {each.num_bytes:,}\u00a0B, {psnr:.2f}\u00a0dB"
        figures.append(_figure(each.pixels, f"{row.name}, {each.label}", caption))
    head = f'<div class="head"><h2>{escape(row.name)}</h2></div>'
    return f'<section>\n{head}\n<div class="row">\n{"".join(figures)}</div>\n</section>'


def _figure(pixels: Pixels, text: str, caption: str) -> str:
    height, width = pixels.shape[:2]
    return (
        f'<figure><img src="{data_uri(pixels, WEBP_QUALITY)}" width="{width}" height="{height}" alt="{escape(text)}">'
        f"<figcaption>{escape(caption)}</figcaption></figure>\n"
    )


def _over_white(pixels: Pixels) -> Pixels:
    """(H, W, 3 or 4) -> (H, W, 3)."""
    if pixels.shape[2] == 3:
        return pixels
    alpha = pixels[:, :, 3:] / 255
    return np.asarray(np.rint(pixels[:, :, :3] * alpha + 255 * (1 - alpha)), np.uint8)
