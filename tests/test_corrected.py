"""Stage 4 on a mixture: corrected masks replace pseudo masks and are drawn more often."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from command import DECODER, TRAINING, data_flags, parse, refusal, run
from conftest import SIZES

import train_segmentation
from datasets import build_source
from datasets.base import voc_palette
from tools.errors import UserError
from tools.files import save_mask


@pytest.fixture
def folders(tmp_path):
    """Pseudo masks of class 1 of a, b, c; a corrected one of class 2 of b, and one of an image of another split."""
    for image_id in "abc":
        save_mask(tmp_path / "pseudo" / f"{image_id}.png", np.full(SIZES[image_id], 1), voc_palette())
    for image_id in "bd":
        save_mask(tmp_path / "corrected" / f"{image_id}.png", np.full(SIZES[image_id], 2), voc_palette())
    (tmp_path / "none").mkdir()
    return tmp_path


def training_set(root, folders, *extra):
    flags = [*data_flags(root), "--tag", "t", *TRAINING, "--masks_dir", folders / "pseudo", *extra]
    args = parse("train_segmentation", *flags)
    return train_segmentation.training_data(build_source("folder", root, args.masks_dir), args)[0]


def drawn(dataset):
    """(id, class painted) of every item; the border of a padded crop is 255."""
    torch.manual_seed(0)
    items = [dataset[i] for i in range(len(dataset))]
    return sorted((item["id"], *np.setdiff1d(item["mask"], [255]).tolist()) for item in items)


def test_corrected_masks_replace_pseudo_masks_and_come_more_often(folder_root, folders):
    assert drawn(training_set(folder_root, folders)) == [("a", 1), ("b", 1), ("c", 1)]
    mixture = training_set(folder_root, folders, "--corrected_dir", folders / "corrected", "--corrected_weight", 2)
    assert drawn(mixture) == [("a", 1), ("b", 2), ("b", 2), ("c", 1)]


def test_masks_that_are_replaced_need_not_be_there_nor_agree_with_the_image_labels(folder_copy, folders):
    (folder_copy / "labels.csv").write_text("id,labels\na,dog\nb,dog\nc,dog\n")  # the pseudo masks are of class 1
    with pytest.raises(UserError, match="show none of the classes that their image labels name"):
        training_set(folder_copy, folders)
    mixture = training_set(folder_copy, folders, "--corrected_dir", folders / "corrected", "--corrected_weight", 1)
    (folders / "pseudo" / "b.png").unlink()
    again = training_set(folder_copy, folders, "--corrected_dir", folders / "corrected", "--corrected_weight", 1)
    assert drawn(mixture) == drawn(again) == [("a", 1), ("b", 2), ("c", 1)]


def test_all_masks_may_be_corrected(folder_root, folders):
    save_mask(folders / "corrected" / "a.png", np.full(SIZES["a"], 2), voc_palette())
    save_mask(folders / "corrected" / "c.png", np.full(SIZES["c"], 2), voc_palette())
    mixture = training_set(folder_root, folders, "--corrected_dir", folders / "corrected", "--corrected_weight", 1)
    assert drawn(mixture) == [("a", 2), ("b", 2), ("c", 2)]


def test_a_folder_without_a_mask_of_the_split_is_refused(folder_root, folders):
    with pytest.raises(UserError, match=r"--corrected_dir .*none: no mask \(ID.png\) of an image of 'train'"):
        training_set(folder_root, folders, "--corrected_dir", folders / "none")


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("b_mask.png", "b_mask.png: no ID.png of a photograph (one of 2 files)"),
        ("b.jpg.png", "b.jpg.png: no ID.png of a photograph: write ids without suffix (b) (one of 2 files)"),
        ("cat/b.png", "cat/b.png: no ID.png of a photograph: write ids without the folders above (b) (one of 2 files)"),
        ("a.JPG", "a.JPG: no ID.png of a photograph: masks are PNG (one of 2 files)"),
    ],
)
@pytest.mark.parametrize("folder", ["corrected", "none"])
def test_a_corrected_mask_of_no_photograph_is_named_before_anything_is_learnt(
    folder_root, folders, tmp_path, monkeypatch, capsys, folder, name, told
):
    monkeypatch.chdir(tmp_path)
    for stray in (name, f"z/z{Path(name).suffix}"):
        save_mask(folders / folder / stray, np.full(SIZES["b"], 2), voc_palette())
    flags = [*data_flags(folder_root), *TRAINING, *DECODER, "--masks_dir", folders / "pseudo", "--tag", "t"]
    line = refusal(capsys, "train_segmentation", *flags, "--corrected_dir", folders / folder)
    assert f"--corrected_dir: {folders / folder}/{told}. Rename or remove it." in line


def test_the_only_corrected_mask_may_be_empty(folder_root, folders):
    """Somebody has erased a false object."""
    save_mask(folders / "corrected" / "b.png", np.zeros(SIZES["b"]), voc_palette())
    mixture = training_set(folder_root, folders, "--corrected_dir", folders / "corrected", "--corrected_weight", 1)
    assert drawn(mixture) == [("a", 1), ("b", 0), ("c", 1)]


def test_notes_beside_corrected_masks_do_no_harm(folder_root, folders):
    (folders / "corrected" / "notes.txt").touch()
    mixture = training_set(folder_root, folders, "--corrected_dir", folders / "corrected", "--corrected_weight", 1)
    assert drawn(mixture) == [("a", 1), ("b", 2), ("c", 1)]


def test_a_second_model_needs_its_own_tag(folder_root, folders, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    flags = [*data_flags(folder_root), *TRAINING, *DECODER, "--masks_dir", folders / "pseudo"]
    run("train_segmentation", *flags, "--tag", "first")
    corrected = ["--corrected_dir", folders / "corrected"]
    assert "first.pth: made with no corrected masks" in refusal(
        capsys, "train_segmentation", *flags, "--tag", "first", *corrected
    )
    run("train_segmentation", *flags, "--tag", "second", *corrected)
    assert "1 of 3 masks are corrected; each of them counts 3 times" in capsys.readouterr().out
    again = ["train_segmentation", *flags, "--tag", "second", *corrected]
    assert "made with --corrected_weight 3, not 4" in refusal(capsys, *again, "--corrected_weight", 4)
    save_mask(folders / "corrected" / "b.png", np.full(SIZES["b"], 1), voc_palette())
    assert "made with other corrected masks, or in another order" in refusal(capsys, *again)
