"""The stage table, summary.json, the picture sheet, the page and the review queue."""

from __future__ import annotations

import csv
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import evaluate
import report
from datasets import build_source
from datasets.base import DatasetInfo, voc_palette
from tools import identity
from tools.cam_files import save_cams
from tools.drawing import legend, save_overlay, with_legend
from tools.errors import UserError
from tools.files import save_json, save_mask

CLASSES = ["background", "cat", "dog"]
LABELS = {"a": "cat", "b": "cat", "c": "dog", "d": ""}
SIZE = (12, 16)


@pytest.fixture
def data(tmp_path):
    root = tmp_path / "data"
    (root / "images").mkdir(parents=True)
    (root / "splits").mkdir()
    (root / "classes.txt").write_text("\n".join(CLASSES))
    (root / "labels.csv").write_text("id,labels\n" + "".join(f"{i},{names}\n" for i, names in LABELS.items()))
    (root / "splits" / "train.txt").write_text("a\nb\nc\n")
    (root / "splits" / "test.txt").write_text("d\n")
    for i in LABELS:
        Image.fromarray(np.full((*SIZE, 3), 100, np.uint8)).save(root / "images" / f"{i}.png")
    for i in "abc":
        save_mask(root / "masks" / f"{i}.png", np.full(SIZE, 1 + (i == "c")), voc_palette())
    return root


def scores_file(path, **changes):
    save_json(
        path,
        {"miou": 61.238, "miou_foreground": 58.0, "threshold": 0.25, "iou": {}, "domain": "train", "images": 3}
        | changes,
    )
    return path


def made_by(threshold):
    """The identity of masks, as `claim_folder` keeps it."""
    inputs = {"labels": {"a": "cat", "b": "cat", "c": "dog"}}
    return identity.describe("inference.py", {"threshold": threshold}, inputs=inputs)


def run(data, output, *flags):
    arguments = ["--dataset", "folder", "--data_dir", str(data), "--output_dir", str(output), "--num_workers", "0"]
    arguments += map(str, flags)
    report.main(report.make_parser().parse_args(arguments))


def test_summary_and_table(data, tmp_path, capsys):
    prior = scores_file(tmp_path / "prior.json")
    final = scores_file(tmp_path / "final.json", miou=70.0, threshold=None, domain="val")
    run(data, tmp_path / "out", "--summary", f"prior_cam={prior}", f"segmentation_val={final}")
    written = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert written == {"prior_cam": 61.24, "segmentation_val": 70.0}
    lines = capsys.readouterr().out.splitlines()
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    assert table[0] == ["stage", "split", "images", "mIoU", "foreground", "threshold"]
    assert table[2] == ["prior_cam", "train", "3", "61.24", "58.00", "0.25"]
    assert table[3] == ["segmentation_val", "val", "3", "70.00", "58.00", "-"]
    assert len({len(line) for line in lines if line.startswith("|")}) == 1
    assert not (tmp_path / "out" / "gallery.png").exists()
    assert "61.2" in (tmp_path / "out" / "report.html").read_text()


def test_overlay_paints_classes_and_keeps_the_background_grey():
    image = np.full((1, 3, 3), [200, 50, 10], np.uint8)
    painted = report.overlay(image, np.array([[0, 1, 255]], np.uint8), voc_palette()).astype(int)
    assert np.ptp(painted[0, 0]) <= 1  # grey
    assert painted[0, 1, 0] > painted[0, 1, 1] + 50  # class 1 of the VOC palette is dark red
    assert painted[0, 2].min() > 200  # ignored: nearly white
    paper = 0.55 * (0.299 * 200 + 0.587 * 50 + 0.114 * 10) + 70
    assert painted[0, 0, 0] == int(paper)
    assert painted[0, 1].tolist() == [int(0.72 * 128 + 0.28 * paper), *[int(0.28 * paper)] * 2]


def test_each_row_of_an_overlay_has_its_own_classes():
    mask = (np.arange(700)[:, None] // 100).astype(np.uint8).repeat(3, axis=1)
    painted = report.overlay(np.full((700, 3, 3), 90, np.uint8), mask, voc_palette())
    for value in range(7):
        here = report.overlay(np.full((1, 1, 3), 90, np.uint8), np.full((1, 1), value, np.uint8), voc_palette())
        assert (painted[mask == value] == here).all()


def test_pick_images_shows_every_class_first(data):
    source = build_source("folder", data)
    assert report.pick_images(source, ["a", "b", "c"], 2) == ["a", "c"]
    assert report.pick_images(source, ["d", "a", "b", "c"], 9) == ["a", "c", "b", "d"]


def test_columns_read_masks_and_cams_from_several_folders(tmp_path):
    save_mask(tmp_path / "train" / "a.png", np.ones(SIZE), voc_palette())
    hr_cam = np.full((1, *SIZE), 0.5, np.float32)
    save_cams(tmp_path / "cams" / "b.npz", np.array([0, 2]), hr_cam, hr_cam)
    texts = [f"Mine={tmp_path / 'train'}", f"Mine={tmp_path / 'cams'}:0.45", f"Strict={tmp_path / 'cams'}:.6"]
    mine, strict = report.parse_columns(texts)
    assert mine.title == "Mine" and strict.title == "Strict"
    place = (SIZE, DatasetInfo(("background", "cat", "dog")))
    assert np.all(mine.mask("a", *place) == 1) and np.all(mine.mask("b", *place) == 2)
    assert mine.mask("c", *place) is None and np.all(strict.mask("b", *place) == 0)


def test_masks_of_a_turned_photograph_are_those_of_the_upright_one(data, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(np.full((16, 12, 3), 100, np.uint8)).save(data / "images" / "d.png", exif=exif)
    save_mask(tmp_path / "pseudo" / "d.png", np.ones(SIZE), voc_palette())
    run(data, tmp_path / "out", "--domain", "test", "--columns", f"Mine={tmp_path / 'pseudo'}")
    save_mask(tmp_path / "pseudo" / "d.png", np.ones(SIZE[::-1]), voc_palette())
    with pytest.raises(UserError, match=r"d\.png: 12x16 pixels, but its image is 16x12"):
        run(data, tmp_path / "out", "--domain", "test", "--columns", f"Mine={tmp_path / 'pseudo'}")


def test_a_column_without_any_image_is_named(data, tmp_path, capsys):
    """As of the folder above."""
    run(data, tmp_path / "report", "--columns", f"Mask={data / 'masks'}", f"Truth={data}")
    warnings = [line for line in capsys.readouterr().out.splitlines() if line.startswith("Warning")]
    assert warnings == [f"Warning: column 'Truth': no image's ID.png or ID.npz is in {data}."]


@pytest.mark.parametrize("change", ["classes", "photograph"])
def test_columns_of_other_classes_or_photographs_are_left_out(data, tmp_path, capsys, change):
    """Those of an experiment that had the same name, and other data with the same ids."""
    source = build_source("folder", data)
    inputs = source.fingerprints(list("abc"))
    save_json(tmp_path / "old/settings.json", identity.describe("a.py", {"classes": ["cat", "dog"]}, inputs=inputs))
    for name in ("old", "new"):
        squares(tmp_path / name, a=16, b=12, c=4)
    if change == "classes":
        (data / "classes.txt").write_text("\n".join([*CLASSES, "fox"]))
    else:
        Image.fromarray(np.arange(12 * 16 * 3, dtype=np.uint8).reshape(*SIZE, 3)).save(data / "images" / "b.png")
    run(data, tmp_path / "out", "--columns", f"Old={tmp_path / 'old'}", f"New={tmp_path / 'new'}", "--review", "Old")
    printed = capsys.readouterr().out
    why = "the classes [cat, dog], but" if change == "classes" else "other photographs of 1 images, the first is b ("
    assert f"Column 'Old' is left out. {tmp_path / 'old'}: made of {why}" in printed
    assert "Review queue of 'New'" in printed and "Old" not in (tmp_path / "out" / "report.html").read_text()
    run(data, tmp_path / "out", "--columns", f"Old={tmp_path / 'old'}")
    assert "Picture sheet" not in capsys.readouterr().out


def test_images_that_every_column_has_are_preferred(tmp_path):
    for folder, names in (("one", "abc"), ("two", "bc")):
        for name in names:
            save_mask(tmp_path / folder / f"{name}.png", np.zeros(SIZE), voc_palette())
    columns = report.parse_columns([f"1={tmp_path / 'one'}", f"2={tmp_path / 'two'}"])
    assert report.complete(["a", "b", "c", "d"], columns) == ["b", "c"]
    assert report.complete(["a", "d"], columns) == ["a", "d"]


def test_gallery_has_a_row_per_image_and_grey_cells_where_nothing_is(data, tmp_path):
    save_mask(tmp_path / "one" / "a.png", np.full(SIZE, 2), voc_palette())
    save_mask(tmp_path / "two" / "d.png", np.full(SIZE, 2), voc_palette())
    columns = [f"A name={tmp_path / 'one'}", f"Other={tmp_path / 'two'}"]
    run(data, tmp_path, "--domain", "train", "test", "--num_images", 2, "--columns", *columns)
    sheet = np.asarray(Image.open(tmp_path / "gallery.png"))
    assert sheet.shape[1] == 4 * report.CELL and sheet.shape[0] > 3 * report.CELL * SIZE[0] / SIZE[1]
    cell = report.CELL * SIZE[0] / SIZE[1]
    missing = [(sheet[:, int((index + 0.5) * report.CELL)] == report.EMPTY).all(axis=1).sum() for index in range(4)]
    # The photographs a, c, d; ground truth of a and c; "A name" of a; "Other" of d.
    assert missing == pytest.approx([0, cell, 2 * cell, 2 * cell], abs=0.1 * cell)


def test_without_any_ground_truth_there_is_no_column_for_it(data, tmp_path):
    save_mask(tmp_path / "one" / "d.png", np.full(SIZE, 2), voc_palette())
    run(data, tmp_path, "--domain", "test", "--summary", "--columns", f"Mine={tmp_path / 'one'}")
    sheet = np.asarray(Image.open(tmp_path / "gallery.png").convert("RGB"))
    assert sheet.shape[1] == 2 * report.CELL
    assert (sheet == report.EMPTY).all(axis=2).mean() < 0.01 and not (tmp_path / "summary.json").exists()


def test_each_heading_stands_at_the_first_row_of_its_block(data, monkeypatch):
    """Though the splits share an image; and a title is no formula."""
    rows = {}
    label = lambda axes, text, **options: rows.update({text: axes.get_subplotspec().rowspan.start})  # noqa: E731
    monkeypatch.setattr("matplotlib.axes.Axes.set_ylabel", label)
    columns = [report.Column("cost $a_$ b", ((data / "masks", 0.4),))]
    report.gallery(build_source("folder", data), {"train": ["a", "b"], "val": ["a", "d"]}, columns)
    assert rows == {"train": 0, "val": 2}


def test_images_without_a_label_are_shown(data, tmp_path):
    """As those of a test split."""
    lines = (data / "labels.csv").read_text().splitlines()
    (data / "labels.csv").write_text("\n".join(line for line in lines if not line.startswith("d,")) + "\n")
    save_mask(tmp_path / "one" / "d.png", np.full(SIZE, 2), voc_palette())
    run(data, tmp_path, "--domain", "test", "--columns", f"Mine={tmp_path / 'one'}")
    assert (tmp_path / "gallery.png").exists() and "Mine" in (tmp_path / "report.html").read_text()


def test_gallery_of_a_one_pixel_image_without_columns(data):
    Image.fromarray(np.zeros((1, 1, 3), np.uint8)).save(data / "images" / "a.png")
    save_mask(data / "masks" / "a.png", np.array([[255]]), voc_palette())
    assert report.gallery(build_source("folder", data), {"train": ["a"]}, []).mode == "RGB"


def test_legend_wraps_and_lists_only_classes_that_occur(data):
    names = ["background", *(f"a class with a long name {i}" for i in range(1, 60))]
    (data / "classes.txt").write_text("\n".join(names))
    heights = {}
    for count in (2, 4, 40):
        mask = np.arange(SIZE[0] * SIZE[1]).reshape(SIZE) % count
        save_mask(data / "masks" / "a.png", mask, voc_palette())
        heights[count] = report.gallery(build_source("folder", data), {"train": ["a"]}, []).height
    assert heights[2] < heights[4] < heights[40]


def test_a_legend_gives_each_colour_its_name():
    both = np.asarray(legend(DatasetInfo(("background", "cat", "bird")), [0, 1, 2], 1000))
    place = 0
    for index, name in ((1, "cat"), (2, "bird")):
        (columns,) = np.nonzero((both == voc_palette()[index]).all(axis=2).any(axis=0))
        one = np.asarray(legend(DatasetInfo(("background", name)), [1], 1000))
        (first,) = np.nonzero((one == voc_palette()[1]).all(axis=2).any(axis=0))
        text = slice(first.max() + 2, first.max() + 30)
        assert columns.min() > place and len(columns) == len(first)
        place = columns.max()
        assert np.array_equal(both[:, place + 2 : place + 30], one[:, text])


def test_the_legend_of_an_overlay_is_that_of_its_mask(tmp_path):
    info = DatasetInfo(("background", *(f"class {n}" for n in range(1, 40))))
    image, mask = np.full((*SIZE, 3), 90, np.uint8), np.zeros(SIZE, np.uint8)
    mask[3:], mask[6:] = 7, 255
    save_overlay(tmp_path / "a.jpg", image, mask, info)
    expected = with_legend(Image.fromarray(report.overlay(image, mask, info.palette)), info, [0, 7, 255])
    written = Image.open(tmp_path / "a.jpg")
    assert written.size == expected.size
    assert np.abs(np.asarray(written, float) - np.asarray(expected, float)).mean() < 3


def test_ignored_pixels_are_white_in_the_legend_too():
    """As `overlay` paints them: its palette has a colour for them."""
    picture = np.asarray(legend(DatasetInfo(("background", "cat")), [0, 255], 300))
    assert not (picture == voc_palette()[255]).all(axis=2).any() and (picture < 255).any()


@pytest.mark.parametrize("width", [200, 300, 417])
def test_lines_of_a_legend_end_before_the_picture_does(width):
    info = DatasetInfo(("background", *(f"class {n}" for n in range(1, 20))))
    picture = np.asarray(legend(info, range(20), width))
    assert picture.shape[1] == width and (picture[:, -10:] == 255).all()


def test_no_name_in_a_legend_is_cut_off():
    """Not below a photograph that is narrower than the name."""
    info = DatasetInfo(("background", "yellow-bellied sapsucker"))
    wide, narrow = (np.asarray(legend(info, [0, 1], width)) for width in (1000, 100))
    assert np.array_equal(narrow, wide[:, : narrow.shape[1]]) and (wide[:, narrow.shape[1] :] == 255).all()
    assert with_legend(Image.new("RGB", (100, 80)), info, [0, 1]).size == (narrow.shape[1], 80 + len(narrow))


@pytest.mark.parametrize("mask", [np.zeros((3, 3)), np.full(SIZE, 7)])
def test_gallery_names_masks_that_are_not_of_this_dataset(data, tmp_path, mask):
    save_mask(tmp_path / "pred" / "a.png", mask, voc_palette())
    with pytest.raises(UserError, match="pred/a.png: (3x3 pixels, but|holds the value 7)"):
        run(data, tmp_path, "--columns", f"X={tmp_path / 'pred'}")


def squares(folder, **widths):
    """Masks whose left columns, as many as said, are of class 1."""
    for name, width in widths.items():
        mask = np.zeros(SIZE, np.uint8)
        mask[:, :width] = 1
        save_mask(folder / f"{name}.png", mask, voc_palette())


def test_the_queue_is_by_doubt_and_the_page_by_iou(data, tmp_path):
    squares(tmp_path / "refined", a=16, b=12, c=4)  # truth: a and b all class 1, c all class 2
    squares(tmp_path / "other", a=8, b=12)
    columns = [f"Refined={tmp_path / 'refined'}", f"Other={tmp_path / 'other'}"]
    flags = ["--review", "Refined", "--columns", *columns]
    run(data, tmp_path / "out", *flags)
    with open(tmp_path / "out" / "review.csv", newline="") as file:
        rows = {row["id"]: row for row in csv.DictReader(file)}
    assert list(rows) == ["c", "a", "b"]
    # c: its class, dog, is missing. a: the other mask covers half, so the IoU is 1/2 for class 1 and 0 for background.
    assert [float(rows[i]["doubt"]) for i in "cab"] == [0.5, 0.375, 0.0]
    assert [rows[i]["IoU Refined"] for i in "abc"] == ["100.0", "37.5", "0.0"]  # b: 12/16 and 0 for the background
    assert [rows[i]["IoU Other"] for i in "abc"] == ["25.0", "37.5", ""]
    page = (tmp_path / "out" / "report.html").read_text()
    assert re.findall(r"<figcaption><b>(\w)</b> (\w+)<br>", page) == [
        ("b", "cat"),
        ("a", "cat"),
    ]  # every column has these
    assert re.findall(r'data-iou="([^"]*)"', page) == ["0.3750", "1.0000"] and "2 of 3 images" in page
    shown = re.findall(r"(Refined|Other): IoU (\d+)", page)
    assert shown == [("Refined", "38"), ("Other", "38"), ("Refined", "100"), ("Other", "25")]


def test_without_ground_truth_the_page_too_is_by_doubt(data, tmp_path):
    for mask in (data / "masks").glob("*.png"):
        mask.unlink()
    squares(tmp_path / "refined", a=16, b=12, c=4)
    squares(tmp_path / "other", a=8, b=12, c=4)
    columns = [f"Other={tmp_path / 'other'}", f"Refined={tmp_path / 'refined'}"]
    run(data, tmp_path / "out", "--page_images", 2, "--columns", *columns)
    page = (tmp_path / "out" / "report.html").read_text()
    assert re.findall(r"<figcaption><b>(\w)</b>", page) == ["c", "a"]  # the first, and one from the rest
    assert "2 of 3 images" in page and "IoU" not in re.search(r'<select id="order">.*?</select>', page)[0]


def test_cam_files_are_heat_maps_on_the_page(data, tmp_path):
    hr_cam = np.full((1, *SIZE), 0.5, np.float32)
    save_cams(tmp_path / "cams" / "a.npz", np.array([0, 1]), hr_cam, hr_cam)
    run(data, tmp_path / "out", "--columns", f"CAM={tmp_path / 'cams'}:0.4")
    page = (tmp_path / "out" / "report.html").read_text()
    assert re.findall(r'view-2" src="data:image/(\w+).*?alt="([^"]*)"', page) == [("jpeg", "CAM of a: cat 100 %")]


def test_scores_of_predictions_that_are_gone_or_have_changed_are_left_out(data, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    files = {}
    for name in ("kept", "gone", "anew", "record_gone", "foreign"):
        squares(Path(name), a=16, b=12, c=4)
        if name != "foreign":
            save_json(Path(name, "settings.json"), made_by(0.3))
        flags = ["--dataset", "folder", "--data_dir", data, "--pred_dir", name, "--output", f"{name}.json"]
        evaluate.main(evaluate.make_parser().parse_args([*map(str, flags), "--num_workers", "0"]))
        files[name] = f"{name}={name}.json"
    scores_file(Path("by_hand.json"))
    scores_file(Path("older.json"), pred_dir="kept")  # of a version that did not note what made them
    expected = {name: round(json.loads(Path(f"{name}.json").read_text())["miou"], 2) for name in ("kept", "foreign")}
    shutil.rmtree("gone")
    save_json(Path("anew", "settings.json"), made_by(0.4))
    Path("record_gone", "settings.json").unlink()
    capsys.readouterr()
    run(data, tmp_path / "out", "--summary", *files.values(), "by_hand=by_hand.json", "older=older.json")
    assert json.loads(Path("out/summary.json").read_text()) == {**expected, "by_hand": 61.24, "older": 61.24}
    printed = capsys.readouterr().out.splitlines()
    rows = [line.split("|")[1].strip() for line in printed if line.startswith("|")][2:]
    assert rows == ["kept", "foreign", "by_hand", "older"]
    remedy = "Left out; run its stage and evaluate.py again."
    assert [line for line in printed if "Left out" in line] == [
        f"gone.json: its predictions, gone, no longer exist. {remedy}",
        f"anew.json: its predictions, anew, have changed since. {remedy}",
        f"record_gone.json: its predictions, record_gone, have changed since. {remedy}",
    ]
    page = Path("out/report.html").read_text()
    assert "record_gone" not in page and "anew" not in page and "by_hand" in page
    run(data, tmp_path / "out", "--summary", files["gone"])
    assert json.loads(Path("out/summary.json").read_text()) == {}, "not the scores of the last time"


def test_scores_against_other_masks_are_named(data, tmp_path, monkeypatch, capsys):
    """Somebody has corrected the ground truth between two evaluations."""
    monkeypatch.chdir(tmp_path)
    squares(Path("masks"), a=16, b=12, c=4)
    flags = ["--dataset", "folder", "--data_dir", str(data), "--pred_dir", "masks", "--num_workers", "0", "--output"]
    for name in ("first", "second", "third"):
        evaluate.main(evaluate.make_parser().parse_args([*flags, f"{name}.json"]))
        if name == "first":
            save_mask(data / "masks" / "a.png", np.full(SIZE, 2), voc_palette())
    capsys.readouterr()
    run(data, tmp_path / "out", "--summary", *(f"{name}={name}.json" for name in ("first", "second", "third")))
    assert [line for line in capsys.readouterr().out.splitlines() if "Warning" in line] == [
        "Warning: first: of 'train', but of other photographs or true masks than third, so not to be compared. "
        "Run evaluate.py again."
    ]


def test_thinning_keeps_the_first_half_and_spreads_the_other():
    assert report.thin_out(list(range(5)), 5) == [0, 1, 2, 3, 4]
    assert report.thin_out(list(range(100)), 6) == [0, 1, 2, 3, 51, 99]
    assert report.thin_out(list(range(9)), 1) == [0]


@pytest.mark.parametrize("content", ["", "[]", '{"miou": 3}'])
def test_files_that_are_not_scores(data, tmp_path, content):
    (tmp_path / "bad.json").write_text(content)
    with pytest.raises(UserError, match=r"bad\.json: not"):
        run(data, tmp_path, "--summary", f"x={tmp_path / 'bad.json'}")


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--summary", "x=nowhere.json"], "nowhere.json: no such JSON file"),
        (["--summary", "prior.json"], "not of the form NAME=PATH"),
        (["--columns", "X=nowhere:0.3"], "nowhere: no such folder"),
        (["--columns", "X=.:40"], "--columns X=.:40: the threshold must be between 0 and 1"),  # all would be background
        (["--columns", "X=.", "Y=.", "--review", "Z"], "--review Z: no such column. Choose one of: X, Y"),
    ],
)
def test_mistakes_are_named(data, tmp_path, flags, message):
    with pytest.raises(UserError, match=message):
        run(data, tmp_path, *flags)
