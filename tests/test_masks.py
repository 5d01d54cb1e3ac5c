"""What all masks of a dataset show together; and what verify accepts, evaluate reads rightly."""

from __future__ import annotations

import contextlib
from pathlib import Path

import numpy as np
import pytest
from command import TRAINING, data_flags, refusal, run
from PIL import Image

from datasets import build_source
from datasets.verify import verify
from datasets.verify_masks import check_agreement
from tools.errors import UserError
from tools.files import load_image


def dataset(root: Path, masks: list[np.ndarray], labels: list[str], classes=("cat", "dog"), **options) -> Path:
    """A `folder` of grey photographs 0, 1, ... of the masks' sizes; masks are saved as they are."""
    for name in ("images", "masks"):
        (root / name).mkdir(parents=True)
    (root / "classes.txt").write_text("\n".join(["background", *classes]) + "\n")
    (root / "labels.csv").write_text("id,labels\n" + "".join(f"{i},{names}\n" for i, names in enumerate(labels)))
    for i, mask in enumerate(masks):
        Image.new("RGB", mask.shape[::-1], (i, 90, 90)).save(root / "images" / f"{i}.png", **options)
        Image.fromarray(mask.astype(np.uint8)).save(root / "masks" / f"{i}.png")
    return root


def square(value: int, size: tuple[int, int] = (20, 30)) -> np.ndarray:
    mask = np.zeros(size, np.uint8)
    mask[3:12, 5:14] = value
    return mask


def findings(root: Path) -> dict[str, list[str]]:
    return {kind: texts for kind, texts in verify(build_source("folder", root), {}, 0)[1].items() if texts}


ONLY = "255 is ignored: if it is the object, save it as the index of its class (1)."


def test_masks_in_which_255_is_the_object_are_refused_everywhere(tmp_path, monkeypatch, capsys):
    root = dataset(tmp_path / "data", [square(255)] * 4, ["cat"] * 4)
    monkeypatch.chdir(tmp_path)
    found = findings(root)
    assert found["mask"] == [f"{root}/masks: none of 4 masks shows a class, they hold 0 and 255. {ONLY}"]
    assert found["unlabelled"][0] == f"{root}/masks/0.png: holds only 0 and 255, unlike the image label"
    flags, masks = data_flags(root), str(root / "masks")
    refine = ["--tag", "t", "--domain", "train", "--proposals", "regions", "--pseudo_dir", masks, "--num_workers", 0]
    for script, *others in (
        ("datasets.verify", "--num_workers", 0),
        ("evaluate", "--domain", "train", "--pred_dir", masks, "--num_workers", 0),
        ("train_segmentation", "--tag", "t", *TRAINING),
        ("train_csrm", "--tag", "t", *TRAINING, "--c2s_mode", "gt"),
        ("train_classifier", "--tag", "t", *TRAINING, "--domain_valid", "train"),
        ("refine_sam", *refine),
    ):
        line = refusal(capsys, script, *flags, *others)
        assert ONLY in line or script == "datasets.verify", line
    assert not list((tmp_path / "experiments").rglob("*.pth"))


def test_masks_without_any_class_are_refused(tmp_path):
    root = dataset(tmp_path / "data", [square(0)] * 2, ["cat", "dog"])
    assert "none of 2 masks shows a class, they hold only 0." in findings(root)["mask"][0]
    with pytest.raises(UserError, match="they hold only 0"):
        build_source("folder", root).check_masks(["0", "1"])


def test_one_mask_with_a_class_among_empty_ones_will_do(tmp_path):
    root = dataset(tmp_path / "data", [square(0), square(255), square(2)], ["", "", "dog"], classes=("dog", "cat"))
    build_source("folder", root).check_masks(["0", "1", "2"])
    assert "mask" not in findings(root)


def test_a_class_that_labels_name_and_no_mask_shows_is_warned_of(tmp_path):
    root = dataset(tmp_path / "data", [square(1)] * 7 + [square(255)] * 3, ["cat;dog"] * 7 + ["dog"] * 3)
    found = findings(root)
    assert found["unlabelled"][-1] == "no mask shows 'dog', but 10 image labels name it" and "mask" not in found
    assert found["unlabelled"][0].endswith("7.png: holds only 0 and 255, unlike the image label")


@pytest.mark.parametrize(("wrong", "right", "refused"), [(2, 0, False), (3, 6, True), (3, 7, False), (6, 0, True)])
def test_a_third_of_masks_without_any_class_of_their_labels_is_an_error(tmp_path, wrong, right, refused):
    """The classes in another order, indices from 0 without background, or the numbers of objects."""
    masks = [square(2)] * wrong + [square(1)] * right
    root = dataset(tmp_path / "data", [*masks, square(0)], ["cat"] * len(masks) + [""])
    text = (
        f"{root}/masks/0.png: one of {wrong} masks (of {wrong + right}) that show none of the classes that their image "
        "labels name. A pixel's value is the place of its class in the list of classes, background 0: change the "
        "order of the list, or the masks"
    )
    found = findings(root)
    assert found.get("mask", []) == [text] * refused and len(found["unlabelled"]) == wrong + (wrong >= 3) * (right == 0)


@pytest.mark.parametrize(("value", "labels", "refused"), [(1, "cat;dog", False), (0, "cat", False), (1, "dog", True)])
def test_masks_to_be_learnt_show_a_class_of_their_labels_or_none(tmp_path, value, labels, refused):
    source = build_source("folder", dataset(tmp_path / "data", [square(value)] * 3, [labels] * 3))
    with pytest.raises(UserError, match=r"0\.png: one of 3 masks \(of 3\)") if refused else contextlib.nullcontext():
        check_agreement(source, ["0", "1", "2"])


@pytest.mark.parametrize(("factor", "blended"), [(1, False), (2, True), (4, True)])
def test_masks_that_were_resized_with_blending_are_an_error(tmp_path, factor, blended):
    """Between 0 and 2 there is 1 along the edges, which is another class."""
    small = Image.fromarray(np.ascontiguousarray(square(2)[::factor, ::factor]))
    mask = np.asarray(small.resize((60, 40), Image.Resampling.BILINEAR if factor > 1 else Image.Resampling.NEAREST))
    assert (1 in mask) == blended
    found = findings(dataset(tmp_path / "data", [mask] * 3, ["dog"] * 3))
    assert [text.split("data/masks/")[1] for text in found.get("mask", [])] == [
        "0.png: one of 3 masks (of 3) that show, along edges only, classes that their image labels lack. They were "
        "resized with blending, or saved as JPEG: make them again, with nearest neighbour"
    ] * blended


@pytest.mark.parametrize(("edge", "label"), [(1, "dog"), (2, "cat")])
def test_an_edge_may_be_of_any_class(tmp_path, edge, label):
    mask = square(3 - edge)
    mask[3, 5:14] = edge
    (text,) = findings(dataset(tmp_path / "data", [mask] * 3, [label] * 3))["mask"]
    assert "0.png: one of 3 masks (of 3) that show, along edges only, classes" in text


def test_an_object_that_the_labels_lack_is_no_edge(tmp_path):
    masks = [square(2)] * 3
    for mask in masks:
        mask[13:18, 20:25] = 1
    found = findings(dataset(tmp_path / "data", masks, ["dog"] * 3))
    assert "mask" not in found and len(found["unlabelled"]) == 3


def test_predictions_in_which_255_is_the_object_are_warned_of(tmp_path, capsys):
    root = dataset(tmp_path / "data", [square(1)] * 2, ["cat"] * 2)
    other = dataset(tmp_path / "other", [square(255)] * 2, ["cat"] * 2)
    for masks, warned in ((other / "masks", True), (root / "masks", False)):
        run("evaluate", *data_flags(root), "--domain", "train", "--pred_dir", masks, "--num_workers", 0)
        assert ("Warning: the predictions hold only 0 and 255" in capsys.readouterr().out) == warned


@pytest.mark.parametrize(
    ("orientation", "size", "mask_size", "finding"),
    [
        (6, (20, 30), (20, 30), "EXIF orientation 6 turns the photograph, but not the mask: turn the mask, too"),
        (6, (20, 30), (30, 20), None),
        (5, (20, 30), (30, 20), None),
        (6, (20, 20), (20, 20), "one of 1 photographs that EXIF turns"),
        (3, (20, 30), (20, 30), "one of 1 photographs that EXIF turns"),
        (4, (20, 30), (20, 30), "one of 1 photographs that EXIF turns"),
        (1, (20, 30), (20, 30), None),
        (1, (20, 30), (30, 20), "It lies on its side: turn it."),
        (8, (20, 30), (10, 15), "Save both at one size."),
    ],
)
def test_masks_of_photographs_that_exif_turns(tmp_path, orientation, size, mask_size, finding):
    exif = Image.Exif()
    exif[0x0112] = orientation
    root = dataset(tmp_path / "data", [square(1, size)], ["cat"], classes=("cat",), exif=exif)
    Image.fromarray(square(1, mask_size)).save(root / "masks" / "0.png")
    found = findings(root)
    assert "is in every training label" in found.pop("unused")[0]
    texts = found.pop("mask", []) + found.pop("turned", [])
    assert (finding in texts[0] and len(texts) == 1) if finding else texts == []
    assert found == {} and load_image(root / "images" / "0.png").shape[:2] in (size, size[::-1])


def save_palette(path: Path, mask: np.ndarray, colours: list[tuple[int, int, int]]) -> None:
    image = Image.fromarray(mask, "P")
    image.putpalette(np.asarray(colours, np.uint8).tobytes())
    image.save(path)


def test_palettes_in_which_a_colour_wanders_are_an_error(tmp_path):
    """Colours of nobody's map: one mask does not tell, two do."""
    black, orange, azure = (0, 0, 0), (250, 120, 0), (0, 120, 250)
    root = dataset(tmp_path / "data", [square(1), square(1)], ["cat", "dog"])
    save_palette(root / "masks" / "0.png", square(1), [black, orange])
    save_palette(root / "masks" / "1.png", square(1), [black, azure])
    assert "mask" not in findings(root)
    both = square(2)
    both[4:6, 6:9] = 1
    save_palette(root / "masks" / "0.png", both, [black, azure, azure])  # tells nothing
    assert "mask" not in findings(root)
    save_palette(root / "masks" / "0.png", square(2), [black, orange, azure])
    (text,) = findings(root)["mask"]
    assert f"{root}/masks/1.png: index 1 has the colour that index 2 has in 0.png. An optimiser" in text
