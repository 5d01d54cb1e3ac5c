"""Photographs and masks as people have them: read for what they are, or refused in one line."""

from __future__ import annotations

import io
import random
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image, ImageDraw, ImageOps, TiffImagePlugin

from datasets.base import voc_palette
from tools.errors import UserError
from tools.files import file_orientation, load_image, load_mask, mask_colours, orientation, upright_size

NOISE = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
INDICES = np.random.default_rng(1).integers(0, 3, (9, 13), dtype=np.uint8)
END = b"\xff\xd9"


def smooth(size: tuple[int, int] = (160, 120)) -> Image.Image:
    """Something that JPEG keeps well and in which every row differs."""
    picture = Image.linear_gradient("L").resize(size).convert("RGB")
    draw = ImageDraw.Draw(picture)
    for i in range(12):
        draw.ellipse((11 * i, 7 * i, 11 * i + 40, 7 * i + 30), fill=(20 * i, 255 - 20 * i, 90))
    return picture


def jpeg(picture: Image.Image, **options) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", **{"quality": 90, **options})
    return buffer.getvalue()


def read(folder: Path, data: bytes, load=load_image) -> np.ndarray:
    path = folder / "a.jpg"
    path.write_bytes(data)
    return load(path)


def refused(path: Path, load=load_image, **options) -> str:
    with pytest.raises(UserError) as error:
        load(path, **options)
    text = str(error.value)
    assert text.startswith(f"{path}: ") and "\n" not in text
    return text


# -- photographs: JPEG -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("options", [{}, {"subsampling": 0}, {"progressive": True}, {"restart_marker_rows": 1}])
def test_a_jpeg_is_decoded_as_pillow_does(tmp_path, mode, options):
    data = jpeg(smooth((161, 119)).convert(mode), **options)
    np.testing.assert_array_equal(read(tmp_path, data), np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))


def test_a_jpeg_of_four_inks_is_decoded_by_pillow(tmp_path):
    data = jpeg(smooth().convert("CMYK"))  # with Adobe's marker, so the inks are stored inverted
    np.testing.assert_array_equal(read(tmp_path, data), np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))


@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("at", [0.2, 0.5, 0.9])
@pytest.mark.parametrize(
    "damage",
    [
        lambda data, at: data[:at],
        lambda data, at: data[:at] + END,
        lambda data, at: data[:at] + bytes(len(data) - at),
        lambda data, at: data[:at] + bytes(len(data) - at) + END,
        lambda data, at: data[:at] + b"\xff" * (len(data) - at),
    ],
    ids=["cut", "cut and closed", "zeros", "zeros and closed", "ones"],
)
def test_a_jpeg_of_which_a_part_is_lost_is_refused(tmp_path, damage, at, progressive):
    data = jpeg(smooth((320, 240)), progressive=progressive)
    start = data.index(b"\xff\xda") + 14
    (tmp_path / "a.jpg").write_bytes(damage(data, start + int(at * (len(data) - start))))
    assert "not a readable image (" in refused(tmp_path / "a.jpg")


@pytest.mark.parametrize(
    "oddity",
    [
        lambda data: data.removesuffix(END),
        lambda data: data + bytes(500),
        lambda data: data.removesuffix(END) + b"\x01\x02\x03" + END,
        lambda data: data[:2] + b"\xff\xe2\x00\x10ICC_PROFILE\0\x07" + b"\x03" + data[2:],
    ],
    ids=["no end marker", "zeros after the end", "stray bytes", "bad profile"],
)
def test_a_jpeg_that_is_whole_but_odd_is_read(tmp_path, oddity):
    data = jpeg(smooth())
    np.testing.assert_array_equal(read(tmp_path, oddity(data)), read(tmp_path, data))


# -- photographs: EXIF -------------------------------------------------------------------------------------------------
def exif_block(entries: list[tuple[int, int, int, bytes]]) -> bytes:
    """An EXIF segment, little-endian, of (tag, type, count, value)."""
    directory, body = struct.pack("<H", len(entries)), b""
    for tag, kind, count, value in sorted(entries):
        if len(value) > 4:
            place = 8 + 2 + 12 * len(entries) + 4 + len(body)
            body, value = body + value, struct.pack("<L", place)
        directory += struct.pack("<HHL", tag, kind, count) + value.ljust(4, b"\0")
    content = b"Exif\0\0II*\0" + struct.pack("<L", 8) + directory + bytes(4) + body
    return b"\xff\xe1" + struct.pack(">H", len(content) + 2) + content


ORIENTED = (0x0112, 3, 1, b"\6\0")
ODD = {
    "unit as a fraction": (0x0128, 5, 1, struct.pack("<LL", 2, 1)),
    "version as a float": (0x9000, 11, 1, struct.pack("<f", 2.2)),
    "software as a fraction": (0x0131, 5, 1, struct.pack("<LL", 1, 3)),
    "bias by zero": (0x9204, 10, 1, struct.pack("<ll", -2, 0)),
    "resolution as a byte": (0x011A, 1, 1, b"\xff"),
    "resolution by zero": (0x011A, 5, 1, bytes(8)),
}


@pytest.mark.parametrize("odd", ODD)
def test_only_the_orientation_of_an_exif_block_matters(tmp_path, odd):
    data = jpeg(smooth())
    flat = read(tmp_path, data)
    turned = read(tmp_path, data[:2] + exif_block([ORIENTED, ODD[odd]]) + data[2:])
    np.testing.assert_array_equal(turned, np.rot90(flat, -1))
    assert upright_size(tmp_path / "a.jpg") == (160, 120)


def test_no_exif_block_makes_a_photograph_unreadable(tmp_path):
    """Random entries of all types; what is found of the orientation is the same for the picture and for its size."""
    draw = random.Random(0)
    data = jpeg(smooth((24, 16)))
    sizes = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8}
    tags = [0x100, 0x103, 0x112, 0x11A, 0x11B, 0x128, 0x131, 0x8298, 0x8769, 0x8825, 0x9000, 0xA005, 700, 0x927C]
    for _ in range(200):
        entries = [ORIENTED] * (draw.random() < 0.8)
        for tag in draw.sample(tags, 3):
            kind, count = draw.choice(list(sizes)), draw.choice([1, 1, 2, 4])
            value = bytes(draw.choice([0, 1, 6, 255, draw.randrange(256)]) for _ in range(sizes[kind] * count))
            entries += [(tag, kind, count, value)] * (tag != 0x112 or not entries)
        image = read(tmp_path, data[:2] + exif_block(entries) + data[2:])
        assert image.shape[:2] == upright_size(tmp_path / "a.jpg")
        if ORIENTED in entries:
            assert image.shape[:2] == (24, 16)


@pytest.mark.parametrize("value", range(1, 9))
@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif"])
@pytest.mark.parametrize("size", [(20, 30), (20, 20)])
def test_every_orientation_in_every_container(tmp_path, suffix, value, size):
    exif = Image.Exif()
    exif[0x0112] = value
    picture, path = Image.fromarray(NOISE[: size[0], : size[1]]), tmp_path / f"a.{suffix}"
    picture.save(path, exif=exif, **{"webp": {"lossless": True}, "jpg": {"quality": 95}}.get(suffix, {}))
    image = load_image(path)
    assert image.shape[:2] == upright_size(path)
    with Image.open(path) as stored:
        expected = np.asarray(ImageOps.exif_transpose(stored).convert("RGB"))
    np.testing.assert_array_equal(image, expected)


XMP = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'


def with_xmp(suffix: str, picture: Image.Image) -> bytes:
    """A file that is turned by its XMP block. In a "late png" the block follows the pixels, as ExifTool writes it."""
    if suffix == "jpg":
        block = b"http://ns.adobe.com/xap/1.0/\0" + XMP
        data = jpeg(picture)
        return data[:2] + b"\xff\xe1" + struct.pack(">H", len(block) + 2) + block + data[2:]
    buffer, tags = io.BytesIO(), TiffImagePlugin.ImageFileDirectory_v2()
    tags[700] = XMP
    kind = {"webp": "WebP", "tif": "TIFF"}.get(suffix, "PNG")
    picture.save(buffer, kind, **{"WebP": {"lossless": True, "xmp": XMP}, "TIFF": {"tiffinfo": tags}}.get(kind, {}))
    data, place = buffer.getvalue(), {"png": 33, "late png": -12}.get(suffix)  # after IHDR, before IEND
    chunk = png_chunk(b"iTXt", b"XML:com.adobe.xmp" + bytes(5) + XMP)
    return data[:place] + chunk + data[place:] if kind == "PNG" else data


@pytest.mark.parametrize("suffix", ["jpg", "png", "late png", "webp", "tif"])
def test_an_orientation_in_xmp_does_not_count(tmp_path, suffix):
    path, picture = tmp_path / "a", smooth()
    path.write_bytes(with_xmp(suffix, picture))
    expected = read(tmp_path, jpeg(picture)) if suffix == "jpg" else np.asarray(picture)
    np.testing.assert_array_equal(load_image(path), expected)
    assert upright_size(path) == (120, 160) and file_orientation(path) == 1


# -- photographs: TIFF, stacks, damage ---------------------------------------------------------------------------------
@pytest.mark.parametrize("compression", [None, "zlib"])
@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("kind", ["minisblack", "miniswhite"])
def test_grey_tiffs_whichever_end_is_white(tmp_path, kind, bits, compression):
    grey = NOISE[..., 0].astype(f"u{bits // 8}") * (257 if bits == 16 else 1)
    stored = grey if kind == "minisblack" else 2**bits - 1 - grey
    tifffile.imwrite(tmp_path / "a.tif", stored.astype(grey.dtype), photometric=kind, compression=compression)
    np.testing.assert_array_equal(load_image(tmp_path / "a.tif"), np.repeat(NOISE[..., :1], 3, axis=2))


@pytest.mark.parametrize("compression", [None, "zlib"])
@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("planes", ["contig", "separate"])
def test_colour_tiffs_however_their_planes_lie(tmp_path, planes, bits, compression):
    colour = NOISE.astype(f"u{bits // 8}") * (257 if bits == 16 else 1)
    stored = colour if planes == "contig" else colour.transpose(2, 0, 1)
    options = {"photometric": "rgb", "planarconfig": planes, "compression": compression}
    tifffile.imwrite(tmp_path / "a.tif", stored, **options)
    if (planes, bits) == ("separate", 16):  # Pillow scrambles them
        assert "a TIFF of 16 bits in separate planes. Save it interleaved" in refused(tmp_path / "a.tif")
    else:
        np.testing.assert_array_equal(load_image(tmp_path / "a.tif"), NOISE)


def test_white_of_a_tiff_of_12_bits_is_4095(tmp_path):
    """Written out: two pixels share three bytes."""
    pixels, tags = bytes([0xFF, 0xF0, 0x00, 0x80, 0x00, 0x10]), b""
    values = {256: 2, 257: 2, 258: 12, 259: 1, 262: 1, 273: 8, 277: 1, 278: 2, 279: 6}
    for tag, value in values.items():
        tags += struct.pack("<HHLL", tag, 4, 1, value)
    header = b"II*\0" + struct.pack("<L", 14) + pixels
    (tmp_path / "a.tif").write_bytes(header + struct.pack("<H", len(values)) + tags + bytes(4))
    np.testing.assert_array_equal(load_image(tmp_path / "a.tif")[..., 0], [[255, 0], [round(2048 / 4095 * 255), 1]])


@pytest.mark.parametrize("kind", ["i1", "i2", "i4", "u4", "f4"])
def test_numbers_without_a_known_range_are_refused(tmp_path, kind):
    tifffile.imwrite(tmp_path / "a.tif", NOISE[..., 0].astype(kind))
    assert "signed or 32-bit numbers have no known range of grey" in refused(tmp_path / "a.tif")


@pytest.mark.parametrize("suffix", ["tif", "png", "webp"])
def test_stacks_and_animations_are_refused(tmp_path, suffix):
    first, *others = (Image.fromarray(np.roll(NOISE, i)) for i in range(3))
    first.save(tmp_path / f"a.{suffix}", save_all=True, append_images=others)
    assert "holds 3 pictures. Save the one that is meant" in refused(tmp_path / f"a.{suffix}")


def test_a_preview_in_a_tiff_and_the_other_pictures_of_a_phone_do_not_count(tmp_path):
    with tifffile.TiffWriter(tmp_path / "a.tif") as file:
        file.write(NOISE, photometric="rgb")
        file.write(NOISE[::2, ::2].copy(), photometric="rgb", subfiletype=1)
    np.testing.assert_array_equal(load_image(tmp_path / "a.tif"), NOISE)
    assert upright_size(tmp_path / "a.tif") == (20, 30)
    smooth().save(tmp_path / "a.jpg", "MPO", save_all=True, append_images=[smooth((40, 30))], quality=90)
    with Image.open(tmp_path / "a.jpg") as image:
        assert image.format == "MPO" and image.n_frames == 2
    np.testing.assert_array_equal(load_image(tmp_path / "a.jpg"), read(tmp_path, jpeg(smooth())))


@pytest.mark.parametrize("value", [1, 3, 6])
@pytest.mark.parametrize("compression", [None, "zlib"])
def test_previews_may_come_before_the_photograph(tmp_path, compression, value):
    path, tags = tmp_path / "a.tif", [(0x0112, "H", 1, value, False)]
    with tifffile.TiffWriter(path) as file:
        for picture, kind in ((NOISE[::2, ::2], 1), (NOISE[::4, ::4], 3), (NOISE, 2)):  # 2: a page of several
            options = {"photometric": "rgb", "compression": compression, "subfiletype": kind}
            file.write(picture.copy(), **options, extratags=[] if kind & 1 else tags)
    upright = np.rot90(NOISE, {1: 0, 3: 2, 6: -1}[value])
    np.testing.assert_array_equal(load_image(path), upright)
    assert upright_size(path) == upright.shape[:2] and file_orientation(path) == value


def test_a_tiff_of_previews_only_is_refused(tmp_path):
    path = tmp_path / "a.tif"
    with tifffile.TiffWriter(path) as file:
        file.write(NOISE, photometric="rgb", subfiletype=1)
    np.testing.assert_array_equal(load_image(path), NOISE)  # a single picture leaves no choice
    with tifffile.TiffWriter(path) as file:
        for step in (1, 2):
            file.write(NOISE[::step, ::step].copy(), photometric="rgb", subfiletype=1)
    for load in (load_image, upright_size, file_orientation):
        assert "a.tif: holds 2 previews and no photograph. Replace it by the photograph." in refused(path, load)


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "tif", "gif", "bmp"])
def test_damaged_pictures_of_every_kind_end_in_one_line(tmp_path, suffix):
    """Whatever a decoder raises, it is a UserError (or the damage did no harm)."""
    draw = random.Random(0)
    smooth((40, 30)).convert("P" if suffix in ("gif", "bmp") else "RGB").save(tmp_path / f"whole.{suffix}")
    whole = (tmp_path / f"whole.{suffix}").read_bytes()
    path, unreadable = tmp_path / f"a.{suffix}", 0
    for _ in range(60):
        data = bytearray(whole)
        for _ in range(draw.choice([1, 4, 20])):
            data[draw.randrange(min(len(data), draw.choice([60, 600, 10**9])))] = draw.randrange(256)
        path.write_bytes(data[: draw.choice([None, None, draw.randrange(len(data))])])
        for load in (load_image, load_mask, upright_size):
            try:
                load(path)
            except UserError as error:
                unreadable += 1
                assert str(error).startswith(f"{path}: ") and "\n" not in str(error)
    assert unreadable > 20


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "an empty file"),
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "HEIC: convert it to JPEG"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "a pointer of Git LFS: run git lfs pull"),
        (b"\n <!DOCTYPE html>", "a web page: download it again"),
        (b"nothing", "of no known format"),
    ],
)
def test_what_is_no_picture_is_called_what_it_is(tmp_path, data, reason):
    (tmp_path / "a.jpg").write_bytes(data)
    assert f"not a readable image ({reason}). Replace or remove it." in refused(tmp_path / "a.jpg")


@pytest.mark.parametrize("kind", ["f4 colour", "four channels"])
def test_tiffs_that_pillow_does_not_know_are_named(tmp_path, kind):
    if kind == "f4 colour":
        tifffile.imwrite(tmp_path / "a.tif", NOISE.astype("f4") / 255, photometric="rgb")
    else:
        tifffile.imwrite(tmp_path / "a.tif", np.dstack([NOISE, NOISE]), photometric="minisblack", planarconfig="contig")
    assert "(a TIFF of floating-point numbers or unusual channels: save RGB" in refused(tmp_path / "a.tif")


def test_a_photograph_of_200_megapixels_is_not_taken_for_an_attack(tmp_path):
    data = jpeg(smooth())
    size = data.index(b"\xff\xc0") + 5
    (tmp_path / "a.jpg").write_bytes(data[:size] + struct.pack(">HH", 12240, 16320) + data[size + 4 :])
    assert upright_size(tmp_path / "a.jpg") == (12240, 16320)


# -- masks -------------------------------------------------------------------------------------------------------------
def save_16_bits(path: Path, mask: np.ndarray) -> None:
    Image.fromarray(mask.astype(np.uint16)).save(path)


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_palette_masks_of_every_depth(tmp_path, bits):
    mask = INDICES % min(3, 2**bits)
    image = Image.fromarray(mask, "P")
    image.putpalette(voc_palette()[: 2**bits].tobytes())
    image.save(tmp_path / "a.png", bits=bits)
    assert (tmp_path / "a.png").read_bytes()[24] == bits
    np.testing.assert_array_equal(load_mask(tmp_path / "a.png", voc_palette(), 3), mask)


def test_grey_masks_of_1_8_and_16_bits(tmp_path):
    for mode, mask in (("1", INDICES > 0), ("L", INDICES)):
        Image.fromarray(mask).save(tmp_path / "a.png")
        with Image.open(tmp_path / "a.png") as image:
            assert image.mode == mode
        np.testing.assert_array_equal(load_mask(tmp_path / "a.png"), mask.astype(np.uint8))
    save_16_bits(tmp_path / "a.png", INDICES)
    mask = load_mask(tmp_path / "a.png")
    np.testing.assert_array_equal(mask, INDICES)
    assert mask.dtype == np.uint8
    save_16_bits(tmp_path / "a.png", INDICES.astype(np.uint16) * 257)
    assert "16 bits, and the value 514. Class indices end at 255" in refused(tmp_path / "a.png", load_mask)


def png_chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">L", len(content)) + name + content + struct.pack(">L", zlib.crc32(name + content))


@pytest.mark.parametrize("bits", [2, 4])
def test_grey_masks_of_2_and_4_bits_are_refused_unless_empty(tmp_path, bits):
    """An optimiser makes 4 bits of 0 and 17, another program of 0 and 1."""
    header = png_chunk(b"IHDR", struct.pack(">LLBBBBB", 2, 1, bits, 0, 0, 0, 0))
    for row in (0x11, 0x00):
        pixels = png_chunk(b"IDAT", zlib.compress(bytes([0, row])))
        (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + header + pixels + png_chunk(b"IEND", b""))
        if row:
            text = refused(tmp_path / "a.png", load_mask)
            assert f"grey of {bits} bits, which programs read as different indices. Save it with 8." in text
    np.testing.assert_array_equal(load_mask(tmp_path / "a.png"), np.zeros((1, 2)))


@pytest.mark.parametrize("kind", ["JPEG", "TIFF", "BMP", "GIF", "WEBP"])
def test_masks_that_are_no_png_are_refused_by_their_content(tmp_path, kind):
    Image.fromarray(INDICES).save(tmp_path / "a.png", format=kind)
    text = refused(tmp_path / "a.png", load_mask)
    assert f"a.png: holds {kind} data. " in text and "as PNG" in text
    assert ("JPEG changes class indices" in text) == (kind == "JPEG")


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA"])
def test_masks_in_colour_are_refused_with_what_to_do(tmp_path, mode):
    Image.fromarray(INDICES).convert(mode).save(tmp_path / "a.png")
    assert f"holds {mode} colours, but masks hold class indices. They are greys" in refused(
        tmp_path / "a.png", load_mask
    )
    if mode != "LA":
        Image.fromarray(voc_palette()[INDICES]).convert(mode).save(tmp_path / "a.png")
        assert "Replace each colour by the index of its class" in refused(tmp_path / "a.png", load_mask)


def test_animated_and_turned_masks_are_refused(tmp_path):
    mask, exif = Image.fromarray(INDICES), Image.Exif()
    mask.save(tmp_path / "a.png", save_all=True, append_images=[Image.fromarray(np.roll(INDICES, 1))])
    assert "holds 2 pictures" in refused(tmp_path / "a.png", load_mask)
    exif[0x0112] = 3
    mask.save(tmp_path / "a.png", exif=exif)
    assert "carries the EXIF orientation 3. Turn it upright" in refused(tmp_path / "a.png", load_mask)


def save_palette(path: Path, mask: np.ndarray, colours) -> None:
    image = Image.fromarray(mask.astype(np.uint8), "P")
    image.putpalette(np.asarray(colours, np.uint8).tobytes())
    image.save(path)


VOC, GREY = voc_palette().tolist(), [[i, i, i] for i in range(256)]


def test_a_colour_that_is_a_grey_too_stands_for_its_class(tmp_path):
    """VOC's colour of class 7 is the grey of class 128."""
    save_palette(tmp_path / "a.png", np.array([[7]], np.uint8), VOC)
    assert load_mask(tmp_path / "a.png", voc_palette(), 200).tolist() == [[7]]


BLACK, WHITE, RED, BLUE = [0, 0, 0], [255] * 3, [250, 10, 20], [20, 10, 250]


@pytest.mark.parametrize(
    ("colours", "sound"),
    [
        (VOC, True),
        ([VOC[0], VOC[2], VOC[1]], False),
        ([VOC[2], VOC[0], VOC[1]], False),
        ([VOC[0], VOC[2], VOC[255]], False),  # classes 0 and 2, and ignored pixels, packed
        ([VOC[0], VOC[3], VOC[1]], True),  # class 3 is none of the three: colours of the user's own
        ([BLACK, RED, BLUE], True),
        ([VOC[0], VOC[2], BLUE], True),
        ([VOC[0], VOC[2], VOC[2]], True),  # two indices of one colour
        (GREY, True),
        ([GREY[0], GREY[2], GREY[1]], False),
        ([GREY[0], GREY[2], WHITE], False),
        ([BLACK, WHITE, [128] * 3], True),
        ([BLACK, [127] * 3, WHITE], True),
    ],
)
def test_a_palette_that_was_sorted_is_refused(tmp_path, colours, sound):
    path = tmp_path / "a.png"
    save_palette(path, INDICES, colours)
    if sound:
        np.testing.assert_array_equal(load_mask(path, voc_palette(), 3), INDICES)
    else:
        assert "Its palette was sorted" in refused(path, load_mask, palette=voc_palette(), num_classes=3)
    np.testing.assert_array_equal(load_mask(path), INDICES)  # who does not know the colours cannot tell
    np.testing.assert_array_equal(mask_colours(path)[: len(colours)], colours)


def test_a_mask_of_one_class_with_a_palette_of_one_colour(tmp_path):
    save_palette(tmp_path / "a.png", np.zeros((3, 4)), [VOC[2]])
    assert "index 0 has the colour of class 2" in refused(
        tmp_path / "a.png", load_mask, palette=voc_palette(), num_classes=3
    )
    save_palette(tmp_path / "a.png", np.ones((3, 4)), [BLACK, WHITE])
    assert load_mask(tmp_path / "a.png", voc_palette(), 3).all()


def test_the_orientation_of_what_says_nothing_is_upright():
    assert orientation(Image.new("RGB", (2, 2))) == 1
