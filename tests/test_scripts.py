"""The whole chain on four tiny images, each stage as a user runs it; what the files hold is tested where it is made."""

from __future__ import annotations

import contextlib
import functools
import io
import json
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from command import DECODER, TRAINING, data_flags, refusal, run
from conftest import OBJECTS, SIZES, SPLITS
from PIL import Image

import inference
from datasets import build_source
from models import load_model
from tools import options
from tools.cam import multi_scale_logits
from tools.cam_files import load_cams
from tools.files import load_mask
from tools.identity import file_fingerprint
from tools.maps import normalize

MODELS, PREDICTIONS = Path("experiments/models"), Path("experiments/predictions")
REFINED = PREDICTIONS / "csrm@train" / "sam-regions-max_iou_imp2"
RELABEL = ["--save_cams", "false", "--save_masks", "--pseudos_from", "masks"]
RESTORE = ["--restore", MODELS / "prior.pth"]
VIEWS = ["--scales", "1,2", "--crf_t", "2", "--device", "cpu"]


@pytest.fixture(scope="module")
def chain(folder_root, tmp_path_factory):
    """Run everything once; yields what was printed, by stage. The working directory holds `experiments/`."""
    data, printed = data_flags(folder_root), {"root": folder_root}

    def stage(name: str, script: str, *flags: object) -> None:
        with contextlib.redirect_stdout(io.StringIO()) as output:
            run(script, *data, *flags)
        printed[name] = output.getvalue()

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("chain"))
        stage("prior", "train_classifier", "--tag", "prior", *TRAINING)
        stage("prior cams", "inference", "--tag", "prior", "--domain", "train", *VIEWS)
        stage("csrm", "train_csrm", "--tag", "csrm", *TRAINING, *DECODER, *RESTORE, "--warmup_epochs", "0",
              "--domain_valid", "val")  # fmt: skip
        stage("cams", "inference", "--tag", "csrm", "--domain", "train", *VIEWS, "--save_masks")
        stage("background", "inference", "--tag", "csrm", "--domain", "val", *VIEWS, "--save_masks",
              "--pseudos_from", "masks")  # fmt: skip
        pseudos = PREDICTIONS / "csrm@train" / "pseudos-t0.4-c2"
        stage("refined", "refine_sam", "--tag", "csrm", "--domain", "train", "--pseudo_dir", pseudos,
              "--proposals", "regions", "--num_workers", "0")  # fmt: skip
        stage("deeplab", "train_segmentation", "--tag", "deeplab", *TRAINING, *DECODER, "--masks_dir", REFINED,
              "--domain_valid", "val")  # fmt: skip
        stage("predict", "train_segmentation", "--tag", "deeplab", "--predict", "--domain", "val", *VIEWS)
        stage("relabelled", "inference", "--tag", "deeplab", "--domain", "train", *VIEWS, *RELABEL)
        for name, mode, folder, domain in (
            ("cams", "cams", "csrm@train/cams", "train"),
            ("maps", "cams", "csrm@train/masks", "train"),
            ("refined", "png", REFINED.relative_to(PREDICTIONS), "train"),
            ("final", "png", "deeplab@val/masks", "val"),
        ):
            stage(f"evaluate {name}", "evaluate", "--pred_dir", PREDICTIONS / folder, "--mode", mode,
                  "--domain", domain, "--output", f"{name}.json", "--num_workers", "0")  # fmt: skip
        yield printed


def test_every_stage_says_where_its_results_are_and_what_comes_next(chain):
    assert "experiments/models/prior.pth" in chain["prior"] and "python inference.py --tag prior" in chain["prior"]
    assert "--pseudo_dir experiments/predictions/csrm@train/pseudos-t0.4-c2" in chain["cams"]
    assert "restored" in chain["csrm"] and "valid/miou_cam" in chain["csrm"] and "valid/miou_seg" in chain["csrm"]
    assert "--masks_dir experiments/predictions/csrm@train/sam-regions-max_iou_imp2" in chain["refined"]
    assert "--pred_dir experiments/predictions/deeplab@val/masks" in chain["predict"]


@pytest.mark.parametrize("folder", ["prior@train/cams", "csrm@train/cams", "csrm@train/masks"])
def test_cam_files_of_every_image(chain, folder):
    for image_id in SPLITS["train"]:
        keys, cam, hr_cam = load_cams(PREDICTIONS / folder / f"{image_id}.npz")
        assert keys.tolist() == [0, *(["cat", "dog"].index(name) + 1 for name in OBJECTS[image_id])]
        assert hr_cam.shape == (len(keys) - 1, *SIZES[image_id])
        assert cam.shape[1:] == tuple(-(-side // 4) for side in SIZES[image_id])
        assert hr_cam.min() >= 0 and hr_cam.max() <= 1 and hr_cam.dtype == np.float16


@pytest.mark.parametrize("folder", ["prior@train/pseudos-t0.4-c2", "csrm@train/sam-regions-max_iou_imp2"])
def test_pseudo_masks_hold_only_the_image_label(chain, folder):
    for image_id in SPLITS["train"]:
        mask = load_mask(PREDICTIONS / folder / f"{image_id}.png")
        allowed = [0, *(["cat", "dog"].index(name) + 1 for name in OBJECTS[image_id])]
        assert mask.shape == SIZES[image_id] and np.isin(mask, allowed).all()


def test_the_last_model_labels_its_training_images_anew(chain):
    """p_fg = 1 - p_bg over all classes, shared by the classes of the image in proportion."""
    folder = PREDICTIONS / "deeplab@train"
    model, checkpoint = load_model(MODELS / "deeplab.pth", torch.device("cpu"), kinds=["segmentation"])
    source = build_source("folder", chain["root"])
    for image_id in SPLITS["train"]:
        keys, _, maps = load_cams(folder / "masks" / f"{image_id}.npz")
        photograph = source.photograph(image_id)
        height, width = size = SIZES[image_id]
        if max(size) < 32:  # the smallest size of the training
            larger = round(height * 32 / max(size)), round(width * 32 / max(size))
            photograph = F.interpolate(photograph, larger, mode="bilinear", antialias=True)
        image = normalize(photograph)
        with torch.inference_mode():
            forward = lambda views: model(views)["seg_logits"]  # noqa: E731
            logits = multi_scale_logits(forward, image, options.Views((1, 2), hflip=True, long_side=(32, 48)))
        p = logits.softmax(dim=1)
        expected = (1 - p[:, :1]) * p[:, keys[1:]] / p[:, keys[1:]].sum(dim=1, keepdim=True)
        expected = F.interpolate(expected, size, mode="bilinear", align_corners=True)[0]
        np.testing.assert_allclose(maps, expected, atol=2e-3)
        mask = load_mask(folder / "pseudos-masks-c2" / f"{image_id}.png")
        assert np.isin(mask, keys).all() and mask.shape == SIZES[image_id]
    assert checkpoint["config"]["kind"] == "segmentation"


def test_a_segmentation_model_has_no_cams(chain, capsys):
    line = refusal(capsys, "inference", "--tag", "deeplab", "--domain", "train", *data_flags(chain["root"]))
    assert "a segmentation model has no CAMs. Pass --save_cams false --pseudos_from masks." in line


def test_an_image_without_classes_gets_empty_maps_and_a_mask_of_background(chain):
    folder = PREDICTIONS / "csrm@val"
    for maps in ("cams", "masks"):
        keys, cam, hr_cam = load_cams(folder / maps / "d.npz")
        assert keys.tolist() == [0] and hr_cam.shape == (0, *SIZES["d"]) and cam.shape[0] == 0
    assert not load_mask(folder / "pseudos-masks-c2" / "d.png").any()


def test_the_last_model_predicts_a_mask_of_each_image_of_val(chain):
    folder = PREDICTIONS / "deeplab@val" / "masks"
    assert sorted(path.stem for path in folder.glob("*.png")) == SPLITS["val"]
    assert all(load_mask(folder / f"{i}.png").shape == SIZES[i] for i in SPLITS["val"])


def test_the_last_model_segments_a_folder_of_photographs(chain, tmp_path, capsys):
    for path in ("a.png", "b/c.JPG"):
        (tmp_path / "holiday" / path).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((30, 2000 if "b" in path else 40, 3), 90, np.uint8)).save(tmp_path / "holiday" / path)
    command = ["train_segmentation", "--tag", "deeplab", "--predict", "--images", tmp_path / "holiday", *VIEWS]
    for name in ("d.heic", "Thumbs.db"):
        (tmp_path / "holiday" / name).touch()
    run(*command)
    assert f"1 files have a type that cannot be read. The first: {tmp_path}/holiday/d.heic" in capsys.readouterr().out
    folder = PREDICTIONS / "deeplab@holiday"
    assert load_mask(folder / "masks" / "a.png").shape == (30, 40)
    assert not (folder / "overlays").exists()
    written = (folder / "masks" / "b" / "c.png").stat().st_mtime_ns
    run(*command, "--save_overlays")  # of masks that are there already
    assert (folder / "masks" / "b" / "c.png").stat().st_mtime_ns == written
    assert Image.open(folder / "overlays" / "b" / "c.jpg").width == 1280
    assert Image.open(folder / "overlays" / "a.jpg").width > 40  # its legend is wider
    (tmp_path / "holiday").rename(tmp_path / "old")
    assert "no readable folder of images" in refusal(capsys, *command)
    elsewhere = tmp_path / "elsewhere" / "holiday"
    shutil.copytree(tmp_path / "old", elsewhere)
    assert f"made with --images {tmp_path}/holiday, not {elsewhere}" in refusal(capsys, *command, "--images", elsewhere)


@pytest.mark.parametrize("name", ["cams", "maps", "refined", "final"])
def test_scores_of_every_stage(chain, name):
    scores = json.loads(Path(f"{name}.json").read_text())
    assert list(scores["iou"]) == ["background", "cat", "dog"] and 0 <= scores["miou"] <= 100
    assert (scores["threshold"] is None) == (name in ("refined", "final"))
    script, number = {"refined": ("refine_sam.py", 3), "final": ("train_segmentation.py", 2)}.get(
        name, ("inference.py", 3)
    )
    made_by = scores["made_by"]
    assert made_by["script"] == script and scores["identity"]["inputs"]["masks"]["images"] == number
    assert f"Predictions: {script} (version 1.0.0" in chain[f"evaluate {name}"]
    if name == "cams":
        weights = made_by["files"]["weights"]
        assert weights == {"file": str(MODELS / "csrm.pth"), "sha256": file_fingerprint(MODELS / "csrm.pth")}
        assert f"--weights {MODELS / 'csrm.pth'} (content {weights['sha256'][:8]})" in chain["evaluate cams"]


def test_finished_checkpoints_drop_what_only_a_resumed_run_needs(chain):
    checkpoint = torch.load(MODELS / "csrm.pth", weights_only=True)
    assert {"model", "teacher", "config", "classes", "args", "version"} <= checkpoint.keys()
    assert checkpoint.keys().isdisjoint({"optimizer", "schedule", "scaler", "memory_bank"})
    assert checkpoint["classes"] == ["background", "cat", "dog"] and checkpoint["step"] == 1


@pytest.mark.parametrize(
    "script, flags",
    [
        ("train_classifier", ["--tag", "prior", *TRAINING]),
        ("train_csrm", ["--tag", "csrm", *TRAINING, *DECODER, "--warmup_epochs", "0", *RESTORE]),
        ("inference", ["--tag", "csrm", "--domain", "train", *VIEWS, "--save_masks"]),
        ("train_segmentation", ["--tag", "deeplab", *TRAINING, *DECODER, "--masks_dir", REFINED]),
        ("train_segmentation", ["--tag", "deeplab", "--predict", "--domain", "val", *VIEWS]),
    ],
)
def test_started_again_a_finished_stage_changes_no_file(chain, folder_root, script, flags):
    before = {path: path.stat().st_mtime_ns for path in Path("experiments").rglob("*") if path.is_file()}
    run(script, *data_flags(folder_root), *flags)
    assert {path: path.stat().st_mtime_ns for path in Path("experiments").rglob("*") if path.is_file()} == before


def test_inference_makes_missing_files_again_with_the_same_bytes(chain, folder_root):
    root = PREDICTIONS / "csrm@train"
    files = [root / "cams" / "b.npz", root / "masks" / "c.npz", root / "pseudos-t0.4-c2" / "a.png"]
    before = [path.read_bytes() for path in files]
    for path in files:
        path.unlink()
    run("inference", *data_flags(folder_root), "--tag", "csrm", "--domain", "train", *VIEWS, "--save_masks")
    assert [path.read_bytes() for path in files] == before


def test_the_segmentation_branch_is_read_as_it_was_trained(chain, folder_root, folder):
    """With a network that is .45 sure of background, and gives the rest to the classes in equal parts."""
    checkpoint = torch.load(MODELS / "csrm.pth", weights_only=True)
    number = len(checkpoint["classes"])
    probabilities = torch.tensor([0.45] + [0.55 / (number - 1)] * (number - 1))
    checkpoint["teacher"]["segmentation.4.weight"].zero_()
    checkpoint["teacher"]["segmentation.4.bias"].copy_(probabilities.log())
    for reading in ("present", "foreground"):
        checkpoint["args"]["teacher_labels"] = reading
        torch.save(checkpoint, f"{reading}.pth")
        flags = ["--tag", reading, "--weights", f"{reading}.pth", "--domain", "train", "--pseudos_from", "masks"]
        run("inference", *data_flags(folder_root), *flags, *VIEWS, "--save_masks")
    for image_id in SPLITS["train"]:
        keys, _, maps = load_cams(PREDICTIONS / "foreground@train" / "masks" / f"{image_id}.npz")
        np.testing.assert_allclose(maps, 0.55 / max(1, len(keys) - 1), atol=1e-3)
        renormalised = 0.55 / (number - 1) / (0.45 + 0.55 * (len(keys) - 1) / (number - 1))
        maps = load_cams(PREDICTIONS / "present@train" / "masks" / f"{image_id}.npz")[2]
        np.testing.assert_allclose(maps, renormalised, atol=1e-3)
        mask = load_mask(PREDICTIONS / "foreground@train" / "pseudos-masks-c2" / f"{image_id}.png")
        assert (mask > 0).all() == (len(keys) > 1)
        assert not load_mask(PREDICTIONS / "present@train" / "pseudos-masks-c2" / f"{image_id}.png").any()


def test_the_threshold_on_relative_maps_is_that_of_the_network(chain, folder_root, monkeypatch):
    seen = []
    monkeypatch.setattr(inference, "object_threshold", lambda maps, graded: seen.append(graded) or 0.5)
    checkpoint = torch.load(MODELS / "csrm.pth", weights_only=True)
    checkpoint["args"]["teacher_labels"] = "relative"
    torch.save(checkpoint, "csrm-relative.pth")
    for weights, expected in (("csrm-relative.pth", True), (MODELS / "deeplab.pth", False)):
        seen.clear()
        flags = ["--tag", f"graded-{expected}", "--weights", weights, "--save_cams", "false", "--pseudos_from", "masks"]
        run("inference", *data_flags(folder_root), *flags, "--domain", "train", *VIEWS)
        assert set(seen) == {expected}


def test_the_maps_of_a_segmentation_branch_pixel_by_pixel():
    """A class the network is sure of, an unsure one, and one that is nowhere; two groups of pixels, far apart."""
    maps = np.array([[[0.8, 0.7, 0.1, 0.1]], [[0.0, 0.1, 0.05, 0.2]], [[0.0, 0.0, 0.0, 0.0]]], np.float32)
    labels = functools.partial(inference.segmentation_labels, graded=True)
    np.testing.assert_array_equal(labels(maps, "present"), [[1, 1, 0, 0]])
    np.testing.assert_array_equal(labels(maps, "foreground"), [[1, 1, 0, 0]])
    # Relative to the maxima .8 and .2: (1, 0), (.875, .5), (.125, .25), (.125, 1).
    np.testing.assert_array_equal(labels(maps, "relative"), [[1, 1, 0, 2]])
    all_object = np.array([[[0.53, 0.71, 0.79, 0.80]]], np.float32)  # .65 of .8 is .52
    np.testing.assert_array_equal(labels(all_object, "relative"), [[1, 1, 1, 1]])
    soft = np.array([[[0.8, 0.8, 0.8, 0.3, 0.25, 0.1, 0.1, 0.1, 0.1, 0.1]]], np.float32)  # .3 of .8 is .24
    np.testing.assert_array_equal(labels(soft, "relative"), [[1, 1, 1, 1, 1, 0, 0, 0, 0, 0]])
    assert labels(soft, "relative", graded=False)[0, 4] == 0  # Otsu's parts .8 from .3
    np.testing.assert_array_equal(labels(np.zeros((1, 2, 2), np.float32), "relative"), np.zeros((2, 2)))
    for reading in options.READINGS:
        assert not labels(np.zeros((0, 3, 2), np.float16), reading).any()


def test_a_prior_that_sees_nothing_is_noticed(chain, folder_root, capsys):
    assert "Warning" not in chain["prior cams"]
    checkpoint = torch.load(MODELS / "prior.pth", weights_only=True)
    checkpoint["model"]["classifier.weight"].zero_()
    torch.save(checkpoint, "blind.pth")
    flags = [*data_flags(folder_root), "--tag", "blind", "--weights", "blind.pth", "--domain", "train", *VIEWS]
    run("inference", *flags)
    number = len(SPLITS["train"])
    assert f"Warning: the CAMs of {number} of {number} images are empty; blind.pth" in capsys.readouterr().out


def test_predictions_of_other_settings_are_not_taken_for_done(chain, folder_root, capsys):
    flags = [*data_flags(folder_root), "--tag", "csrm", "--domain", "train", *VIEWS]
    assert "cams: made with --hflip True, not False. Choose" in refusal(capsys, "inference", *flags, "--hflip", "false")
    other = [*data_flags(folder_root), "--tag", "csrm", "--domain", "train", "--weights", MODELS / "prior.pth", *VIEWS]
    assert "cams: made with --weights experiments/models/csrm.pth (content " in refusal(capsys, "inference", *other)


def test_images_in_class_folders_go_through_all_stages(folder_root, tmp_path, monkeypatch):
    """Their ids hold a slash, so their files lie in folders too."""
    monkeypatch.chdir(tmp_path)
    data = Path("sorted")
    for image_id, folder, suffix in (("a", "red cat", ".jpg"), ("b", "red cat", ".png"), ("c", "dog", ".jpeg")):
        for kind, ending in (("images", suffix), ("masks", ".png")):
            (data / kind / folder).mkdir(parents=True, exist_ok=True)
            shutil.copy(folder_root / kind / f"{image_id}{ending}", data / kind / folder / f"{image_id}{ending}")
    flags = data_flags(data)
    run("train_classifier", *flags, "--tag", "p", *TRAINING)
    run("inference", *flags, "--tag", "p", "--domain", "train", *VIEWS)
    maps = PREDICTIONS / "p@train"
    assert (maps / "cams" / "red cat" / "a.npz").exists()
    run("refine_sam", *flags, "--tag", "p", "--domain", "train", "--pseudo_dir", maps / "pseudos-t0.4-c2",
        "--proposals", "regions", "--num_workers", "0")  # fmt: skip
    run("train_segmentation", *flags, "--tag", "d", *TRAINING, *DECODER,
        "--masks_dir", maps / "sam-regions-max_iou_imp2")  # fmt: skip
    run("train_segmentation", *flags, "--tag", "d", "--predict", "--domain", "train", *VIEWS)
    run("evaluate", *flags, "--domain", "train", "--pred_dir", PREDICTIONS / "d@train" / "masks", "--output", "s.json",
        "--num_workers", "0")  # fmt: skip
    assert list(json.loads(Path("s.json").read_text())["iou"]) == ["background", "dog", "red cat"]


@pytest.mark.parametrize("split, scored", [("val", True), ("val2014", True), ("other", False)])
def test_every_next_command_can_be_pasted(folder_root, tmp_path, monkeypatch, capsys, split, scored):
    """From the prior to the scores; `other` has no val split, and no masks: its training images are predicted."""
    monkeypatch.chdir(tmp_path)
    data = shutil.copytree(folder_root, tmp_path / "my data")
    (data / "splits" / "val.txt").rename(data / "splits" / f"{split}.txt")
    if not scored:
        shutil.rmtree(data / "masks")
    light = {"refine_sam.py": ["--num_workers", "0"], "inference.py": VIEWS, "evaluate.py": ["--num_workers", "0"]}
    light["train_segmentation.py"] = [*TRAINING, *DECODER, *VIEWS]
    run("train_classifier", *data_flags(data), "--tag", "a b", *TRAINING)
    called = []
    while lines := [line for line in capsys.readouterr().out.splitlines() if line.startswith("Next: ")]:
        python, script, *flags = shlex.split(lines[0].removeprefix("Next: "), comments=True)
        assert python == "python"
        called.append(script)
        run(script.removesuffix(".py"), *light[script], *flags)
    stages = ["inference.py", "refine_sam.py", "train_segmentation.py", "train_segmentation.py"]
    assert called == [*stages, *["evaluate.py"] * scored]
    assert (PREDICTIONS / f"a b-deeplab@{split if scored else 'train'}" / "masks").is_dir()


@pytest.mark.parametrize("architecture", ["test_vit", "test_mambaout"])
def test_the_chain_on_networks_that_cannot_be_dilated(folder_root, tmp_path, monkeypatch, architecture):
    monkeypatch.chdir(tmp_path)
    training = [*data_flags(folder_root), *TRAINING, "--architecture", architecture, "--domain_valid", "val"]
    run("train_classifier", "--tag", "prior", *training)
    run("train_csrm", "--tag", "csrm", *training, *DECODER, "--restore", MODELS / "prior.pth", "--warmup_epochs", "0")
    run("inference", "--tag", "csrm", *data_flags(folder_root), "--domain", "train", *VIEWS, "--save_masks")
    run("train_segmentation", "--tag", "deeplab", *training, *DECODER, "--restore", MODELS / "csrm.pth")
    run("train_segmentation", "--tag", "deeplab", *data_flags(folder_root), "--predict", "--domain", "val", *VIEWS)
    for image_id in SPLITS["train"]:
        assert load_mask(PREDICTIONS / "csrm@train" / "pseudos-t0.4-c2" / f"{image_id}.png").shape == SIZES[image_id]
    assert all((PREDICTIONS / "deeplab@val" / "masks" / f"{i}.png").exists() for i in SPLITS["val"])
