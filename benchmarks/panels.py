"""Pictures side by side, each with a caption above it."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

Panel = tuple[str, Image.Image]
"""Caption, which may have several lines, and picture."""


def draw_sheet(rows: Sequence[Sequence[Panel]], *, caption: int, font_size: int, gap: int) -> Image.Image:
    """Draw rows of pictures.

    Args:
        rows: all pictures of one width, those of a row of one height.
        caption: pixels above each picture for its caption.
        font_size: pixels.
        gap: between the pictures, pixels.
    """
    width = rows[0][0][1].width
    heights = [caption + row[0][1].height for row in rows]
    size = (max(len(row) for row in rows) * (width + gap) - gap, sum(heights) + gap * (len(rows) - 1))
    sheet = Image.new("RGB", size, "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=font_size)
    top = 0
    for row, height in zip(rows, heights, strict=True):
        for column, (text, picture) in enumerate(row):
            left = column * (width + gap)
            draw.multiline_text((left + 3, top + 3), text, fill="black", font=font, spacing=3)
            sheet.paste(picture, (left, top + caption))
        top += height + gap
    return sheet
