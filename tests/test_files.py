"""Files: complete or absent, never half written; and every unreadable one answered in one line."""

from __future__ import annotations

import json
import os
import stat

import cv2
import numpy as np
import pytest
from PIL import Image

from datasets.base import voc_palette
from tools.errors import UserError
from tools.files import (
    atomic_write,
    check_present,
    check_writable,
    file_of,
    load_image,
    load_mask,
    read_lines,
    save_json,
    save_mask,
)

PHOTOGRAPH = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)


@pytest.mark.parametrize("name", ["file.txt", "x" * 251 + ".txt", "鳥" * 83 + ".txt"])
def test_a_file_appears_when_it_is_complete(tmp_path, name):
    path = tmp_path / "new" / "folder" / name
    with atomic_write(path) as temporary:
        temporary.write_text("all of it")
        assert not path.exists() and temporary.suffix == ".txt"
    assert path.read_text() == "all of it" and os.listdir(path.parent) == [name]
    assert stat.S_IMODE(path.stat().st_mode) == 0o644


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt, SystemExit])
def test_a_write_cut_short_leaves_the_old_file(tmp_path, error):
    path = tmp_path / "file.txt"
    path.write_text("old")
    with pytest.raises(error), atomic_write(path) as temporary:
        temporary.write_text("new, but not all")
        raise error
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["file.txt"]


def test_a_full_disk_is_answered_in_one_line(tmp_path):
    with (
        pytest.raises(UserError, match=r"file\.txt: could not be written \(No space left"),
        atomic_write(tmp_path / "file.txt"),
    ):
        raise OSError(28, "No space left on device")
    assert os.listdir(tmp_path) == []


def test_a_file_system_that_refuses_modes(tmp_path, monkeypatch):
    def refuse(*_):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr("pathlib.Path.chmod", refuse)
    save_json(tmp_path / "a.json", 1)
    assert (tmp_path / "a.json").read_text() == "1\n"


def test_a_file_where_the_folder_should_be(tmp_path):
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UserError, match="could not be written"):
            check_writable(folder)
        with pytest.raises(UserError, match="could not be written"), atomic_write(folder / "a.txt"):
            pass


def test_a_writable_folder_is_made_and_left_empty(tmp_path):
    assert check_writable(tmp_path / "a" / "b") == tmp_path / "a" / "b"
    assert os.listdir(tmp_path / "a" / "b") == []


def test_lines(tmp_path):
    path = tmp_path / "ids.txt"
    path.write_bytes("\ufeff a \r\n\r\nb\n".encode())
    assert read_lines(path) == ["a", "b"]
    path.write_bytes(b"\xff\xfe\x00")
    (tmp_path / "table.csv").write_bytes(b"PK\3\4\xff")
    with pytest.raises(UserError, match=r"table\.csv: not UTF-8 text\. Unpack a zip; save a spreadsheet as CSV\."):
        read_lines(tmp_path / "table.csv")
    for bad, reason in ((path, "not UTF-8"), (tmp_path / "none", "no such file"), (tmp_path, "cannot be read")):
        with pytest.raises(UserError, match=reason):
            read_lines(bad)


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P", "CMYK", "1"])
def test_photographs_of_every_mode_come_as_rgb(tmp_path, mode):
    path = tmp_path / ("a.jpg" if mode == "CMYK" else "a.png")
    Image.fromarray(PHOTOGRAPH).convert(mode).save(path)
    image = load_image(path)
    assert image.shape == (5, 7, 3) and image.dtype == np.uint8
    assert np.array_equal(image, PHOTOGRAPH) == (mode in ("RGB", "RGBA"))


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_photographs_of_16_bits_keep_their_range(tmp_path, suffix):
    grey = np.linspace(0, 65535, 35).round().astype(np.uint16).reshape(5, 7)
    Image.fromarray(grey).save(tmp_path / f"a.{suffix}")
    image = load_image(tmp_path / f"a.{suffix}")
    assert image.dtype == np.uint8 and image.min() == 0 and image.max() == 255
    np.testing.assert_array_equal(image, np.repeat(np.round(grey / 257)[..., None], 3, axis=2))


def test_colour_of_16_bits_comes_as_8(tmp_path):
    cv2.imwrite(str(tmp_path / "a.png"), PHOTOGRAPH[..., ::-1].astype(np.uint16) * 257)
    np.testing.assert_array_equal(load_image(tmp_path / "a.png"), PHOTOGRAPH)


@pytest.mark.parametrize("kind", [np.float32, np.int32])
def test_photographs_of_32_bits_are_refused(tmp_path, kind):
    Image.fromarray(PHOTOGRAPH[..., 0].astype(kind)).save(tmp_path / "a.tif")
    with pytest.raises(UserError, match="a.tif: signed or 32-bit numbers have no known range of grey"):
        load_image(tmp_path / "a.tif")


def test_photographs_stand_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # taken with the camera turned by a quarter
    Image.fromarray(PHOTOGRAPH).save(tmp_path / "a.png", exif=exif)
    np.testing.assert_array_equal(load_image(tmp_path / "a.png"), np.rot90(PHOTOGRAPH, -1))


@pytest.mark.parametrize("load, what", [(load_image, "image"), (load_mask, "mask")])
@pytest.mark.parametrize("damage", ["text", "empty", "cut", "broken chunk", "bomb"])
def test_unreadable_pictures(tmp_path, monkeypatch, load, what, damage):
    path = tmp_path / "a.png"
    noise = np.random.default_rng(0).integers(0, 256, (64, 64), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    whole = path.read_bytes()
    content = {"text": b"no picture", "empty": b"", "cut": whole[:2000], "broken chunk": whole[:20] + whole[30:]}
    path.write_bytes(content.get(damage, whole))
    if damage == "bomb":
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(UserError, match=f"a.png: not a readable {what}") as error:
        load(path)
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match=f"none.png: no such {what}"):
        load(tmp_path / "none.png")


def test_masks_keep_their_indices_and_show_their_colours(tmp_path):
    mask = np.arange(256, dtype=np.uint8).reshape(8, 32)
    save_mask(tmp_path / "a.png", mask, voc_palette())
    np.testing.assert_array_equal(load_mask(tmp_path / "a.png"), mask)
    np.testing.assert_array_equal(load_image(tmp_path / "a.png"), voc_palette()[mask])


def test_masks_in_colour_are_refused(tmp_path):
    Image.fromarray(PHOTOGRAPH).save(tmp_path / "a.png")
    with pytest.raises(UserError, match="holds RGB colours, but masks hold class indices. Replace each"):
        load_mask(tmp_path / "a.png")


def test_json(tmp_path):
    save_json(tmp_path / "a.json", {"miou": 50.0, "iou": {"cat": 1}})
    assert json.loads((tmp_path / "a.json").read_text()) == {"miou": 50.0, "iou": {"cat": 1}}


def test_files_that_a_mac_has_renamed_are_found_unless_there_is_one_of_the_very_name(tmp_path):
    name, renamed = "é", "e\u0301"
    assert file_of(tmp_path, name, ".png") == tmp_path / f"{name}.png"
    (tmp_path / f"{renamed}.png").touch()
    assert file_of(tmp_path, name, ".png") == tmp_path / f"{renamed}.png"
    (tmp_path / f"{name}.png").touch()
    assert file_of(tmp_path, name, ".png") == tmp_path / f"{name}.png"


def test_all_files_must_be_there_or_some(tmp_path):
    (tmp_path / "b.npz").touch()
    check_present(tmp_path, ["b"], ".npz", "Make it.")
    check_present(tmp_path, ["a", "b"], ".npz", "Make it.", some=True)
    for ids, some, missing in ((["a", "b"], False, "1 of 2"), (["a", "c"], True, "2 of 2")):
        with pytest.raises(UserError, match=rf"a\.npz is missing \({missing} are\)\. Make it\."):
            check_present(tmp_path, ids, ".npz", "Make it.", some=some)
