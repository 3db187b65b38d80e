"""BlurHash and ThumbHash against what the packages blurhash-python 1.2.2 and thumbhash-python 1.0.1 give."""

from __future__ import annotations

import numpy as np
import pytest
from pictures import synthetic_photo
from PIL import Image

from pqmim.evaluation.tiny_hashes import blurhash_of, picture_of_blurhash, picture_of_thumbhash, thumbhash_of

BLURHASH = "LRNImLvIa7xG_+obfijZWCfibFfP"


@pytest.fixture
def image() -> Image.Image:
    return Image.fromarray(synthetic_photo(24, 40))


@pytest.mark.parametrize(
    ("waves", "text"),
    [
        ((4, 3), BLURHASH),
        ((1, 1), "00NImL"),
        (
            (9, 9),
            "|RNImLvIa7xGe?xGjJxZe?_+obfijZfjjZfjjZbFWCfibFfPa|fQa}fjja$%f9f8a}a#fkfRj@fjnij?a|j"
            "tj?jabFa}a}%1jcjsj[a#j@j?j[f8nPjsfkf7bGa}jbfPju$*jcf8a{a|jtfQbGa|nPfibFj?fPjZjsfQfj",
        ),
    ],
)
def test_blurhash(image: Image.Image, waves: tuple[int, int], text: str) -> None:
    assert blurhash_of(image, *waves) == text
    assert len(text) == 4 + 2 * waves[0] * waves[1]


def test_picture_of_blurhash() -> None:
    pixels = picture_of_blurhash(BLURHASH, 6, 4)
    assert pixels.shape == (4, 6, 3)
    assert pixels[[0, 1, 3], [0, 2, 5]].tolist() == [[234, 98, 160], [217, 133, 139], [178, 187, 100]]


@pytest.mark.parametrize(
    ("has_alpha", "is_upright", "data", "size", "pixels"),
    [
        (
            False,
            False,
            "a859063c8c6c77777087788777777089c7f978",
            (32, 18),
            [[216, 63, 148, 255], [222, 112, 156, 255], [198, 163, 148, 255]],
        ),
        (
            False,
            True,
            "a859063c0c70c7876777877778777980f7c798",
            (18, 32),
            [[216, 63, 148, 255], [219, 118, 170, 255], [192, 169, 170, 255]],
        ),
        (
            True,
            False,
            "a859822b881a6c777088877089c7f97776778088787787",
            (32, 19),
            [[221, 109, 156, 125], [214, 126, 146, 149], [196, 154, 136, 174]],
        ),
        (
            True,
            True,
            "a859822b081a707c6878787980f7c79780878677877778",
            (19, 32),
            [[221, 109, 156, 125], [209, 125, 152, 159], [188, 152, 146, 183]],
        ),
    ],
)
def test_thumbhash(
    image: Image.Image, has_alpha: bool, is_upright: bool, data: str, size: tuple[int, int], pixels: list[list[int]]
) -> None:
    if has_alpha:
        image.putalpha(Image.fromarray(synthetic_photo(24, 40, seed=1)[:, :, 0]))
    if is_upright:
        image = image.transpose(Image.Transpose.TRANSPOSE)
    assert thumbhash_of(image).hex() == data
    decoded = picture_of_thumbhash(bytes.fromhex(data), *size)
    assert decoded.shape == (size[1], size[0], 4)
    assert decoded[[0, 5, 10], [0, 7, 12]].tolist() == pixels


@pytest.mark.parametrize("size", [(40, 30), (500, 400)])
def test_one_color(size: tuple[int, int]) -> None:
    image = Image.new("RGB", size, (200, 100, 50))
    for pixels in (
        picture_of_blurhash(blurhash_of(image), 7, 5),
        picture_of_thumbhash(thumbhash_of(image), 7, 5)[:, :, :3],
    ):
        assert np.abs(pixels.astype(int) - (200, 100, 50)).max() <= 16
