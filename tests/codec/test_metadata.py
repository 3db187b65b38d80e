"""Metadata: kept if asked for, packed as the page says, bounded, and true of the pictures they are written into."""

from __future__ import annotations

import io
import json
import re
import struct
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from cli_tools import Pqmim, opened
from file_makers import exif_block, file_of, ifd, linear_profile, tiff_file, with_png_chunk
from hypothesis import given
from hypothesis import strategies as st
from pictures import synthetic_photo
from PIL import Image, ImageCms
from test_color import ADOBE_XYZ, P3_XYZ, SRGB_CURVES, SRGB_XYZ, gamma_tag, profile

from pqmim import bitstream
from pqmim.codec import Codec, load_codec
from pqmim.errors import DamagedFileError, ImageError, TargetError, UnsupportedFileError
from pqmim.image_files.tags import exif_of_upright, orientation_in_xmp, orientation_of, xmp_of_upright
from pqmim.image_io import load_metadata, load_picture
from pqmim.metadata import EXIF_PREFIX, MAX_BYTES, MAX_RATIO, Metadata, in_profile, pack, unpack
from pqmim.options import EncodeOptions

pytest_plugins = ["cli_fixtures"]

P3 = profile(P3_XYZ, SRGB_CURVES["parametric"], description="P3")
GREY = profile(None, gamma_tag(2.2), description="grey", space=b"GRAY")
XMP = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6" dc:title="\xc3\xa4"/></x:xmpmeta>'
EXIF = exif_block(3, [6], tags={0x010F: (2, b"A maker\0"), 0x0132: (2, b"2026:11:27 10:00:00\0")}).removeprefix(
    EXIF_PREFIX
)
ALL = Metadata(exif=EXIF, icc=P3, xmp=XMP)
KEEP = EncodeOptions(keep_metadata=True)


@pytest.fixture(scope="module")
def codec(tiny_model: Path) -> Codec:
    return load_codec(tiny_model, device="cpu")


@pytest.fixture(scope="module")
def picture() -> Image.Image:
    return Image.fromarray(synthetic_photo(48, 64))


def levels_apart(a: object, b: object) -> np.ndarray:
    return np.abs(np.asarray(a).astype(int) - np.asarray(b))


# -- the section ----------------------------------------------------------------------------------------------------


def read_as_the_page_says(section: bytes) -> list[tuple[int, bytes]]:
    """Items of a section, by a reader that shares nothing with the first."""
    data = io.BytesIO(zlib.decompress(section))
    items = []
    while kind := data.read(1):
        length = shift = 0
        while True:
            (group,) = data.read(1)
            length |= (group & 127) << shift
            shift += 7
            if not group & 128:
                break
        items.append((kind[0], data.read(length)))
    return items


contents = st.none() | st.binary(min_size=1, max_size=300)


@given(contents, contents, contents)
def test_sections_come_back(exif: bytes | None, icc: bytes | None, xmp: bytes | None) -> None:
    metadata = Metadata(exif, icc, xmp)
    section = pack(metadata)
    assert bool(section) == bool(metadata)
    if metadata:
        assert unpack(section) == metadata
        kinds = [(1, exif), (2, icc), (3, xmp)]
        assert read_as_the_page_says(section) == [(kind, content) for kind, content in kinds if content]


def test_the_example_of_the_page() -> None:
    section = bytes.fromhex("78DA6366B5A9C82DB0030005AB01D8")
    assert unpack(section) == Metadata(xmp=b"<xmp>")
    assert zlib.decompress(section) == bytes.fromhex("03053C786D703E")


def test_what_is_very_compressible_is_kept_within_the_limit() -> None:
    for size in (100, 100_000, MAX_BYTES - 5):
        metadata = Metadata(exif=bytes(size))
        section = pack(metadata)
        assert MAX_RATIO * len(section) >= size
        assert unpack(section) == metadata
    assert len(pack(Metadata(xmp=b"<x>" + b" " * 4000))) < 600


def test_too_much_is_refused() -> None:
    with pytest.raises(ImageError, match=r"^4,194,305 bytes of metadata cannot be kept; the limit is 4,194,304$"):
        pack(Metadata(exif=bytes(MAX_BYTES - 4)))
    with pytest.raises(ImageError, match="cannot be kept"):
        pack(Metadata(icc=np.random.default_rng(0).bytes(MAX_BYTES - 5)))  # deflate makes it longer


@pytest.mark.parametrize(
    ("items", "cause"),
    [
        ("", "no items"),
        ("01", "cut or too long"),
        ("01 80", "cut or too long"),
        ("01 80 80 80 80 00", "cut or too long"),
        ("01 00", "empty or cut"),
        ("01 02 FF", "empty or cut"),
        ("01 FF FF FF 7F 00", "empty or cut"),
        ("02 01 FF 01 01 FF", "not in order"),
        ("03 01 FF 03 01 FF", "not in order"),
        ("01 01 FF 00", "cut or too long"),
    ],
)
def test_items_that_do_not_fit(items: str, cause: str) -> None:
    with pytest.raises(DamagedFileError, match=cause):
        unpack(zlib.compress(bytes.fromhex(items)))


def test_sections_that_do_not_inflate() -> None:
    good = pack(ALL)
    for bad in (
        b"x",
        good[:-1],
        good + b"\0",
        good + good,
        good[:40] + b"\xff\xff" + good[42:],
        zlib.compress(b"")[:-1],
    ):
        with pytest.raises(DamagedFileError, match="metadata section") as caught:
            unpack(bad)
        assert "\n" not in str(caught.value)
    with pytest.raises(UnsupportedFileError, match="kind of metadata 4"):
        unpack(zlib.compress(b"\4\1x"))


def test_a_small_section_costs_little() -> None:
    bomb = zlib.compress(bytes(50_000_000), 9)
    with pytest.raises(DamagedFileError, match=f"inflates to more than {64 * len(bomb):,} bytes"):
        unpack(bomb)
    long = zlib.compress(np.random.default_rng(0).bytes(MAX_BYTES + 1), 0)
    with pytest.raises(DamagedFileError, match="inflates to more than 4,194,304 bytes"):
        unpack(long)


# -- what an image has ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP", "AVIF"])
def test_metadata_of_each_format(picture: Image.Image, image_format: str) -> None:
    options = {} if image_format == "PNG" else {"xmp": XMP}
    exif = EXIF if image_format != "AVIF" else exif_of_upright(EXIF, is_srgb=False)
    data = file_of(picture, image_format, exif=EXIF_PREFIX + exif, icc_profile=P3, **options)
    if image_format == "PNG":
        data = with_png_chunk(data, b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + XMP)
    found = load_metadata(data)
    assert (found.icc, found.xmp) == (P3, XMP)
    assert found.exif is not None
    if image_format == "AVIF":  # Pillow's writer makes a block of its own
        assert b"A maker" in found.exif
    else:
        assert found.exif == EXIF
    assert load_metadata(io.BytesIO(data)) == found
    with Image.open(io.BytesIO(data)) as image:
        assert load_metadata(image) == found


def test_metadata_behind_the_pixels_of_a_png(picture: Image.Image) -> None:
    data = file_of(picture, "PNG")
    chunk = with_png_chunk(data, b"eXIf", EXIF)[33 : 33 + 12 + len(EXIF)]
    assert load_metadata(data[:-12] + chunk + data[-12:]).exif == EXIF


def test_metadata_of_a_tiff() -> None:
    xmp = XMP.replace(b' tiff:Orientation="6"', b"")  # which Pillow takes out when it turns a TIFF
    tags = {0x010E: (2, b"a caption\0"), 0x8298: (2, b"someone\0"), 700: (1, xmp), 34675: (7, P3)}
    samples = np.zeros((4, 4, 3), np.uint8)
    found = load_metadata(tiff_file(samples, 8, photometric=2, tags=tags))
    assert (found.icc, found.xmp) == (P3, xmp)
    exif = Image.Exif()
    exif.load(found.exif or b"")
    assert dict(exif) == {0x010E: "a caption", 0x8298: "someone"}
    assert load_metadata(tiff_file(samples, 8, photometric=2)) == Metadata()


def test_images_without_metadata(codec: Codec, picture: Image.Image) -> None:
    assert load_metadata(np.asarray(picture)) == load_metadata(picture) == Metadata()
    assert codec.encode(picture, options=KEEP) == codec.encode(picture)


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")  # its words about broken EXIF
def test_broken_metadata_do_not_break_a_picture(codec: Codec, picture: Image.Image) -> None:
    for exif in (b"II", b"nonsense of some length", EXIF[:30]):
        data = codec.encode(file_of(picture, "JPEG", exif=EXIF_PREFIX + exif), options=KEEP)
        assert codec.metadata(data) == Metadata(exif=exif)


# -- there and back -------------------------------------------------------------------------------------------------


def test_nothing_is_kept_unless_asked_for(codec: Codec, picture: Image.Image) -> None:
    source = file_of(picture, "JPEG", exif=EXIF_PREFIX + EXIF, icc_profile=P3, xmp=XMP)
    data = codec.encode(source)
    assert bitstream.parse(data).metadata is None
    assert codec.metadata(data) == codec.decode_with_report(data).metadata == Metadata()
    kept = codec.encode(source, options=KEEP)
    assert codec.metadata(kept) == codec.decode_with_report(kept).metadata == ALL
    assert (codec.decode_tokens(kept) == codec.decode_tokens(data)).all()
    assert (levels_apart(codec.decode(kept), codec.decode(data)) == 0).all()
    assert "icc_profile" not in codec.decode(kept).info
    assert codec.encode(io.BytesIO(source), options=KEEP) == kept


def test_a_pipe_is_read_once(codec: Codec, picture: Image.Image) -> None:
    class Pipe(io.BytesIO):
        def seek(self, *_: object) -> int:
            raise io.UnsupportedOperation

    source = file_of(picture, "JPEG", xmp=XMP)
    assert codec.metadata(codec.encode(Pipe(source), options=KEEP)) == Metadata(xmp=XMP)


def test_targets_count_metadata(codec: Codec, picture: Image.Image) -> None:
    source = file_of(picture, "JPEG", exif=EXIF_PREFIX + EXIF, icc_profile=P3, xmp=XMP)
    whole = codec.encode(source, options=KEEP)
    smallest = bitstream.smallest_size(whole, keep_metadata=True)
    for target in (smallest, smallest + 3, len(whole)):
        data = codec.encode(source, target_bytes=target, options=KEEP)
        assert len(data) <= target
        assert codec.metadata(data) == ALL
        assert codec.decode(data).size in ((64, 48), (48, 64))
    with pytest.warns(UserWarning, match=f"have no room in {smallest - 1} bytes; .* has {smallest}: they are not kept"):
        data = codec.encode(source, target_bytes=smallest - 1, options=KEEP)
    assert data == codec.encode(source, target_bytes=smallest - 1)
    with pytest.raises(TargetError, match=f"the smallest file with them has {smallest}"):
        codec.encode(source, target_bytes=smallest - 1, options=replace(KEEP, strict=True))


def test_truncate_drops_metadata_first(codec: Codec, picture: Image.Image) -> None:
    source = file_of(picture, "JPEG", xmp=XMP)
    kept, plain = codec.encode(source, options=KEEP), codec.encode(source)
    assert bitstream.truncate(kept, len(kept) - 1) == plain


def test_profiles_that_are_of_no_use(codec: Codec, picture: Image.Image) -> None:
    lab = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    for image, icc in ((picture, lab), (picture, GREY), (picture, b"no profile")):
        with pytest.warns(UserWarning, match="ICC profile") as caught:
            data = codec.encode(file_of(image, "PNG", icc_profile=icc), options=KEEP)
        assert str(caught[-1].message) == "the ICC profile is of no use for an sRGB picture and is not kept"
        assert codec.metadata(data) == Metadata()
    grey = codec.encode(file_of(picture.convert("L"), "PNG", icc_profile=GREY), options=KEEP)
    assert codec.metadata(grey) == Metadata(icc=GREY)


# -- pictures in their profile --------------------------------------------------------------------------------------


@pytest.mark.parametrize("icc", [P3, profile(ADOBE_XYZ, gamma_tag(563 / 256))], ids=["P3", "Adobe RGB"])
@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
def test_colors_in_a_profile_are_the_same_colors(picture: Image.Image, icc: bytes, mode: str) -> None:
    picture = picture.convert(mode)
    converted = in_profile(picture, icc)
    assert converted is not None
    assert converted.mode == mode
    assert levels_apart(converted, picture).max() > 5
    read = load_picture(file_of(converted, "PNG", icc_profile=icc))
    apart = levels_apart(read.rgb, picture.convert("RGB"))
    assert apart.max() <= 2
    assert apart.mean() < 0.5


def test_grey_and_srgb_profiles(picture: Image.Image) -> None:
    grey = picture.convert("L").convert("RGB")
    converted = in_profile(grey, GREY)
    assert converted is not None
    assert converted.mode == "L"
    assert levels_apart(load_picture(file_of(converted, "PNG", icc_profile=GREY)).rgb, grey).max() <= 2
    assert in_profile(grey, GREY, is_grey_allowed=False) is None
    assert in_profile(picture, profile(SRGB_XYZ, SRGB_CURVES["1024 points"])) is picture


def test_profiles_that_do_not_work(picture: Image.Image) -> None:
    lab = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    narrow = profile(0.5 * SRGB_XYZ + 0.16, SRGB_CURVES["parametric"])
    dark = Image.fromarray(np.random.default_rng(0).integers(0, 30, (32, 32, 3), dtype=np.uint8))
    vivid = Image.fromarray(np.eye(3, dtype=np.uint8)[np.newaxis] * np.uint8(255))
    for image, icc in ((picture, lab), (picture, b"x"), (picture, P3[:200]), (vivid, narrow), (dark, linear_profile())):
        assert in_profile(image, icc) is None


# -- what becomes of EXIF and XMP -----------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize(("kind", "values"), [(3, [6]), (1, [8]), (4, [3]), (2, b"6\0"), (5, [6, 1])])
def test_orientation_becomes_upright(order: str, kind: int, values: list[int] | bytes) -> None:
    exif = exif_block(kind, values, order, tags={0x010F: (2, b"A maker\0")}).removeprefix(EXIF_PREFIX)
    assert orientation_of(exif) != 1
    upright = exif_of_upright(exif, is_srgb=False)
    assert orientation_of(upright) == 1
    assert len(upright) == len(exif)
    assert sum(a != b for a, b in zip(exif, upright, strict=True)) == 1


def test_only_a_thumbnail_that_lies_on_its_side_is_taken_out() -> None:
    for orientation, following in ((6, 0), (1, 60)):
        exif = b"II*\0\x08\0\0\0" + ifd({0x0112: (3, [orientation])}, 8, "<", following=60) + bytes(50)
        upright = exif_of_upright(exif, is_srgb=False)
        assert struct.unpack_from("<I", upright, 8 + 2 + 12) == (following,)
        assert orientation_of(upright) == 1


@pytest.mark.parametrize(("color_space", "index"), [(2, b"R03\0"), (65535, b"R03\0")])
def test_exif_of_a_picture_that_became_srgb(color_space: int, index: bytes, picture: Image.Image) -> None:
    details_at, interoperability_at = 26, 26 + 2 + 24 + 4
    exif = b"MM\0*\0\0\0\x08" + ifd({0x8769: (4, [details_at])}, 8, ">")
    exif += ifd({0xA001: (3, [color_space]), 0xA005: (4, [interoperability_at])}, details_at, ">")
    exif += ifd({1: (2, index)}, interoperability_at, ">")
    right = np.asarray(picture)
    for is_srgb in (False, True):
        data = file_of(picture, "PNG", exif=exif_of_upright(exif, is_srgb=is_srgb))
        assert (load_picture(data).rgb == right).all() == is_srgb
    assert b"R98" in exif_of_upright(exif, is_srgb=True)


@given(st.binary(max_size=80), st.booleans())
def test_any_bytes_as_exif(garbage: bytes, is_srgb: bool) -> None:
    for exif in (garbage, b"II*\0\x08\0\0\0" + garbage, b"MM\0*\0\0\0\x08" + garbage):
        assert len(exif_of_upright(exif, is_srgb=is_srgb)) == len(exif)


def test_orientation_in_xmp_becomes_upright() -> None:
    upright = xmp_of_upright(XMP)
    assert (orientation_in_xmp(XMP), orientation_in_xmp(upright)) == (6, 1)
    assert upright == XMP.replace(b'"6"', b'"1"')
    assert xmp_of_upright(b"<tiff:Orientation>8</tiff:Orientation>") == b"<tiff:Orientation>1</tiff:Orientation>"
    assert xmp_of_upright(b"<none/>") == b"<none/>"


# -- the command line -----------------------------------------------------------------------------------------------


@pytest.fixture
def photo_file(pqmim: Pqmim, picture: Image.Image) -> Path:
    """A JPEG that is stored lying on its side, in Display P3, with everything."""
    file = Path("photo.jpg")
    picture.save(file, quality=95, exif=EXIF_PREFIX + EXIF, icc_profile=P3, xmp=XMP)
    return file


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.webp", "a.avif"])
def test_round_trip_on_the_command_line(pqmim: Pqmim, photo_file: Path, name: str) -> None:
    assert pqmim("encode", str(photo_file), "-o", "plain.pqm", "-q", "80").exit_code == 0
    result = pqmim("encode", str(photo_file), "-o", "kept.pqm", "-q", "80", "--keep-metadata")
    assert (result.exit_code, result.stderr) == (0, "")
    assert pqmim("decode", "plain.pqm", "-o", "plain.png").exit_code == 0
    result = pqmim("decode", "kept.pqm", "-o", name)
    assert (result.exit_code, result.stderr) == (0, "")
    image = opened(name)
    assert image.size == (48, 64)
    assert image.info["icc_profile"] == P3
    assert image.info["xmp"] == xmp_of_upright(XMP)
    exif = image.getexif()
    assert exif.get(0x0112, 1) == 1
    assert exif[0x010F] == "A maker"
    if name != "a.avif":
        assert image.info["exif"].removeprefix(EXIF_PREFIX) == exif_of_upright(EXIF, is_srgb=False)

    assert pqmim("decode", "plain.pqm", "-o", f"plain-{name}").exit_code == 0
    plain, right = load_picture(f"plain-{name}").rgb, opened("plain.png")
    apart = levels_apart(load_picture(name).rgb, right)
    if name == "a.png":
        assert apart.max() <= 2
    # The others lose something in any color space; a level of P3 is up to 1.23 levels of sRGB (red in light).
    assert apart.mean() < 1.23 * levels_apart(plain, right).mean() + 0.5
    again = load_metadata(name)
    assert (again.icc, again.xmp) == (P3, xmp_of_upright(XMP))


def test_info_tells_what_is_kept(pqmim: Pqmim, photo_file: Path) -> None:
    assert pqmim("encode", str(photo_file), "--keep-metadata").exit_code == 0
    section = bitstream.parse(Path("photo.pqm").read_bytes()).metadata
    assert section is not None
    sizes = f"(EXIF {len(EXIF)}, ICC {len(P3)}, XMP {len(XMP)})"
    assert f"  metadata {len(section)} B {sizes}" in pqmim("info", "photo.pqm").stdout
    record = json.loads(pqmim("info", "photo.pqm", "--json").stdout)
    assert record["metadata_bytes"] == len(section)
    assert record["metadata"] == {"exif": len(EXIF), "icc": len(P3), "xmp": len(XMP)}
    assert pqmim("encode", str(photo_file), "-f").exit_code == 0
    record = json.loads(pqmim("info", "photo.pqm", "--json").stdout)
    assert (record["metadata_bytes"], record["metadata"]) == (0, {})


def test_damaged_metadata_on_the_command_line(pqmim: Pqmim, photo_file: Path) -> None:
    assert pqmim("encode", str(photo_file), "-o", "a.pqm", "--keep-metadata").exit_code == 0
    container = bitstream.parse(Path("a.pqm").read_bytes())
    Path("a.pqm").write_bytes(bitstream.pack(replace(container, metadata=None)))
    Path("b.pqm").write_bytes(bitstream.pack(replace(container, metadata=b"no zlib")))
    assert pqmim("decode", "a.pqm").exit_code == 0
    for command in ("decode", "info"):
        result = pqmim(command, "b.pqm")
        assert result.exit_code == 1
        assert result.stderr.startswith("pqmim: b.pqm: the metadata section cannot be inflated: ")
        assert result.stderr.count("\n") == 1
    result = pqmim("decode", "b.pqm", "--salvage")
    assert result.exit_code == 0
    assert result.stderr.startswith("pqmim: b.pqm: warning: the metadata section cannot be inflated: ")
    assert (levels_apart(opened("b.png"), opened("a.png")) == 0).all()


def with_metadata(pqmim: Pqmim, codec: Codec, metadata: Metadata) -> None:
    """Make a.pqm, a partial file whose metadata are these, whatever its picture had."""
    Image.new("RGB", (40, 24), (200, 30, 60)).save("a.png")
    assert pqmim("encode", "a.png", "-f", "--keep", "0.5").exit_code == 0
    container = bitstream.parse(Path("a.pqm").read_bytes())
    assert container.is_partial
    container = replace(container, metadata=pack(metadata), model_id=codec.model_id)
    Path("a.pqm").write_bytes(bitstream.pack(container))


def test_a_filled_picture_says_so_beside_its_own_description(pqmim: Pqmim, codec: Codec) -> None:
    exif = exif_block(3, [6], tags={0x010E: (2, b"my caption\0")}).removeprefix(EXIF_PREFIX)
    with_metadata(pqmim, codec, Metadata(exif=exif))
    for name in ("b.jpg", "b.webp", "b.avif"):
        result = pqmim("decode", "a.pqm", "-o", name)
        assert (result.exit_code, result.stderr) == (0, "")
        description = opened(name).getexif()[0x010E]
        assert description.startswith("my caption; pqmim: ")
        assert description.endswith(" were filled (likely)")
    assert pqmim("decode", "a.pqm", "-o", "b.png").exit_code == 0
    assert opened("b.png").getexif()[0x010E] == "my caption"
    assert opened("b.png").info["Comment"].startswith("pqmim: ")


@pytest.mark.parametrize(
    ("metadata", "name", "warning"),
    [
        (
            Metadata(icc=b"no profile"),
            "b.png",
            "the colors cannot be converted to the ICC profile: the picture is sRGB",
        ),
        (Metadata(icc=GREY), "b.webp", "the colors cannot be converted to the ICC profile: the picture is sRGB"),
        (Metadata(exif=EXIF + bytes(66_000)), "b.jpg", r"EXIF of 66,\d+ bytes has no room in a JPEG and is left out"),
        (Metadata(xmp=b"x" * 65_505), "b.jpg", "XMP of 65,505 bytes has no room in a JPEG and is left out"),
        (Metadata(exif=b"II*\0 broken"), "b.avif", "EXIF"),  # Pillow's words
        (Metadata(exif=b"nonsense"), "b.webp", "the EXIF is broken and is left out"),
        (Metadata(xmp=b"\xff\xfe<\0"), "b.png", "the XMP is not UTF-8 and cannot be written to a PNG"),
    ],
)
def test_what_a_picture_cannot_have_is_left_out(
    pqmim: Pqmim, codec: Codec, metadata: Metadata, name: str, warning: str
) -> None:
    with_metadata(pqmim, codec, metadata)
    result = pqmim("decode", "a.pqm", "-o", name)
    assert result.exit_code == 0, result.stderr
    (line,) = result.stderr.splitlines()
    assert line.startswith("pqmim: a.pqm: warning: ")
    found = load_metadata(name)
    assert (found.icc, found.xmp) == (None, None)
    assert re.search(warning, line)
    assert opened(name).mode == "RGB"


def test_limits_of_a_jpeg(pqmim: Pqmim, codec: Codec) -> None:
    xmp = b"x" * 65_504
    with_metadata(pqmim, codec, Metadata(xmp=xmp))
    result = pqmim("decode", "a.pqm", "-o", "b.jpg")
    assert (result.exit_code, result.stderr) == (0, "")
    assert opened("b.jpg").info["xmp"] == xmp
