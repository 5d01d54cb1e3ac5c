"""Products know what made them: whatever else would be made now is refused in one line, or made anew on request."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from command import DECODER, TRAINING, data_flags, parse, refusal, run
from conftest import SPLITS
from PIL import Image

import inference
from datasets import build_source
from tools import identity
from tools.cam_files import load_cams
from tools.errors import UserError
from tools.files import load_image, load_mask, save_mask

MODEL = Path("experiments/models/t.pth")
CAMS = Path("experiments/predictions/t@train/cams")
INPUTS = {"photographs": {"a": 10, "b": 20}, "labels": {"a": "cat", "b": ""}}
TRAIN = {
    "train_classifier": TRAINING,
    "train_csrm": [*TRAINING, *DECODER, "--warmup_epochs", 0],
    "train_segmentation": [*TRAINING, *DECODER],
}
SEGMENTATION = ["--tag", "t", *TRAIN["train_segmentation"]]
INFERENCE = ["--tag", "t", "--domain", "train", "--device", "cpu", "--scales", 1, "--crf_t", 0]


def described(flags=None, **inputs):
    return identity.describe("a.py", flags or {}, inputs=INPUTS | inputs)


# -- what counts, in words -----------------------------------------------------------------------------------------


def test_the_first_difference_in_words(tmp_path):
    for name in ("one", "two"):
        (tmp_path / f"{name}.pth").write_text(name)
    one, two = tmp_path / "one.pth", tmp_path / "two.pth"
    (tmp_path / "copy.pth").write_text("one")
    before = described({"lr": 0.1, "scales": [1.0], "restore": one, "masks_dir": tmp_path, "gone": 3})
    same = {"lr": 0.1, "scales": (1.0,), "restore": tmp_path / "copy.pth", "masks_dir": Path("b"), "new": 1, "tag": "x"}
    assert identity.difference(before, described(same)) == ""
    assert identity.difference(before, described(same | {"lr": 0.2})) == "--lr 0.1, not 0.2"
    shown = [f"{path} (content {identity.file_fingerprint(path)[:8]})" for path in (one, two)]
    assert identity.difference(before, described(same | {"restore": two})) == f"--restore {shown[0]}, not {shown[1]}"
    for other in (None, tmp_path / "gone.pth"):
        assert identity.difference(before, described(same | {"restore": other})) == f"--restore {shown[0]}, not {other}"
    assert identity.difference({}, described()) == "a version of the code that did not note what it read"
    assert identity.difference(before, described(same) | {"script": "b.py"}) == "a.py, not b.py"
    assert identity.difference(before, described(same) | {"version": "2"}) == ""


def test_inputs_of_single_images_and_of_all():
    other = described(labels={"a": "cat", "b": "dog"})
    assert identity.difference(described(), other) == "other labels of 1 images, the first is b ('', not 'dog')"
    assert identity.difference(described(), described(labels={"c": "dog"})) == "", "a list may grow"
    whole = [identity.digest(each) for each in (described(), other, described(labels={"a": "cat"}))]
    assert identity.difference(whole[0], identity.digest(described())) == ""
    assert "other labels, or in another order: (2 images, content " in identity.difference(whole[0], whole[1])
    assert "other labels, or in another order" in identity.difference(whole[0], whole[2]), "and where it has grown"
    assert identity.difference(described(), described(masks={"a": "1"})) == "no masks"
    assert identity.difference(described(masks={"a": "1"}), described()) == "masks, not without"
    turned = {kind: dict(reversed(each.items())) for kind, each in INPUTS.items()}
    assert identity.difference(whole[0], identity.digest(described(**turned))), "training sees the order of the list"


def test_fingerprints_are_of_the_content(tmp_path):
    for name, data in (("a", b"x"), ("b", b"x"), ("c", b"yy")):
        (tmp_path / name).write_bytes(data)
    paths = {name: tmp_path / name for name in "abcd"}
    assert identity.sizes(paths) == {"a": 1, "b": 1, "c": 2, "d": -1}
    contents = identity.contents(paths)
    assert contents["a"] == contents["b"] == "2d711642b726b044" != contents["c"] and contents["d"] == ""
    assert identity.file_fingerprint(tmp_path / "a") == "2d711642b726b044"  # echo -n x | sha256sum
    weights = np.random.default_rng(0).bytes(2_500_000)  # of several reads
    (tmp_path / "a").write_bytes(weights)
    assert identity.file_fingerprint(tmp_path / "a") == hashlib.sha256(weights).hexdigest()[:16]


def test_words_for_weights_are_no_files(tmp_path, monkeypatch):
    """Also beside a file of that name."""
    monkeypatch.chdir(tmp_path)
    for word in ("imagenet", "none"):
        (tmp_path / word).touch()
        assert described({"backbone_weights": word})["settings"] == {"backbone_weights": word}


def test_only_these_flags_are_harmless():
    """A flag added to a script counts, unless it is put on a list here."""
    lists = {"inference": ("HARMLESS", "PSEUDO_MASKS"), "train_segmentation": ("PREDICTION",)}
    assert set(identity.HARMLESS) == {
        *("tag", "device", "num_workers", "compile", "domain_valid", "overwrite", "on_error", "dataset", "data_dir")
    }
    for script in ("train_classifier", "train_csrm", "train_segmentation", "inference"):
        module = __import__(script)
        flags = vars(parse(script, "--tag", "t"))
        for names in lists.get(script, ()):
            assert set(getattr(module, names)) <= flags.keys()
        counting = flags.keys() - {*identity.HARMLESS}
        settings = identity.describe(script, flags, inputs={})["settings"]
        paths = {"masks_dir", "weights", "images", "restore", "oc_weights", "corrected_dir", "c2s_labels"}
        assert counting - settings.keys() <= paths


# -- training ------------------------------------------------------------------------------------------------------


@pytest.fixture
def data(folder_copy, folder):
    folder("run")
    return folder_copy


def add_an_image(data):
    (data / "splits" / "train.txt").write_text("a\nb\nc\nd\n")


def change_a_label(data):
    (data / "labels.csv").write_text((data / "labels.csv").read_text().replace("c,dog", "c,cat"))


def change_a_photograph(data):
    shutil.copy(data / "images" / "d.webp", data / "images" / "c.jpeg")


@pytest.mark.parametrize("change, words", [
    (add_an_image, "other photographs, or in another order: --data_dir {0} (3 images, content "),
    (change_a_label, "other labels, or in another order: --data_dir {0} (3 images, content "),
    (change_a_photograph, "other photographs, or in another order: --data_dir"),
])  # fmt: skip
def test_a_run_is_its_data(data, capsys, change, words):
    flags = [*data_flags(data), "--tag", "t", *TRAINING]
    run("train_classifier", *flags)
    before = MODEL.read_bytes()
    change(data)
    assert words.format(data) in refusal(capsys, "train_classifier", *flags)
    assert MODEL.read_bytes() == before


@pytest.mark.parametrize("name", ["c.BMP", "c.tif", "c.tiff"])
def test_a_run_is_its_uncompressed_photographs(data, capsys, name):
    """All of one camera have one size in bytes."""
    path, pixels = data / "images" / name, load_image(data / "images" / "c.jpeg")
    (data / "images" / "c.jpeg").unlink()
    Image.fromarray(pixels).save(path)
    before, flags = path.stat().st_size, [*data_flags(data), "--tag", "t", *TRAINING]
    run("train_classifier", *flags)
    Image.fromarray(pixels[::-1]).save(path)
    assert path.stat().st_size == before
    assert "t.pth: made with other photographs, or in another order: " in refusal(capsys, "train_classifier", *flags)


def test_a_run_is_its_masks(data, capsys, tmp_path):
    """Other masks of the same size in bytes, in the same folder or in another one."""
    flags = [*data_flags(data), *SEGMENTATION, "--masks_dir"]
    masks, copied = data / "masks", tmp_path / "copied"
    run("train_segmentation", *flags, masks)
    shutil.copytree(masks, copied)
    run("train_segmentation", *flags, copied)
    assert "already trained" in capsys.readouterr().out
    path = copied / "a.png"
    mask, size = load_mask(path), path.stat().st_size
    save_mask(path, np.where(mask == 1, 2, mask), np.zeros((256, 3), np.uint8))
    save_mask(masks / "b.png", load_mask(masks / "b.png"), np.zeros((256, 3), np.uint8))
    assert path.stat().st_size == size
    line = refusal(capsys, "train_segmentation", *flags, copied)
    assert f"t.pth: made with other masks, or in another order: --masks_dir {masks} (3 images, content " in line
    assert f", not --masks_dir {copied} (3 images, content " in line
    run("train_segmentation", *flags, copied, "--overwrite")
    anew = MODEL.read_bytes()
    run("train_segmentation", *flags, copied, "--overwrite")
    assert "already trained" in capsys.readouterr().out and MODEL.read_bytes() == anew
    MODEL.unlink()
    run("train_segmentation", *flags, copied)
    assert MODEL.read_bytes() == anew, "nothing of the old run is in the new one"


def test_a_run_of_csrm_is_its_masks_and_image_labels(data, capsys):
    flags = [*data_flags(data), "--tag", "t", *TRAIN["train_csrm"], "--c2s_labels", data / "masks"]
    run("train_csrm", *flags)
    path = data / "masks" / "c.png"
    before, mask = path.read_bytes(), load_mask(path)
    save_mask(path, np.where(mask == 2, 1, mask), np.zeros((256, 3), np.uint8))
    assert "made with other masks, or in another order" in refusal(capsys, "train_csrm", *flags)
    path.write_bytes(before)
    change_a_label(data)
    assert "made with other labels, or in another order" in refusal(capsys, "train_csrm", *flags)


@pytest.mark.parametrize("script", TRAIN)
def test_a_run_is_its_flags_and_weights(data, capsys, script):
    run("train_classifier", *data_flags(data), "--tag", "p", *TRAINING)
    prior = Path("experiments/models/p.pth")
    flags = [*data_flags(data), "--tag", "t", *TRAIN[script]]
    run(script, *flags)
    harmless = ["--num_workers", 1, "--domain_valid", "val", "--data_dir", f"{data}/../{data.name}"]
    run(script, *flags, *harmless)
    assert "already trained" in capsys.readouterr().out
    line = refusal(capsys, script, *flags, "--restore", prior)
    assert f"t.pth: made with --restore None, not {prior} (content {identity.file_fingerprint(prior)[:8]})" in line
    for flag in ("wd", "label_smoothing", "lr_alpha_bias", *(["w_u", "c2s_fg"] if script == "train_csrm" else [])):
        assert f"t.pth: made with --{flag} " in refusal(capsys, script, *flags, f"--{flag}", 0.25)


# -- folders -------------------------------------------------------------------------------------------------------


def claim(folder, ids, flags, **options):
    inputs = {"photographs": dict.fromkeys(ids, 10)}
    identity.claim_folder(folder, identity.describe("a.py", flags, inputs=inputs), **options)


def test_the_record_of_two_processes_has_the_same_bytes_whichever_comes_first(tmp_path):
    for name, shares in (("one", ("ac", "bd")), ("two", ("bd", "ac"))):
        for ids in shares:
            claim(tmp_path / name, ids, {"lr": 0.1})
    assert (tmp_path / "one" / "settings.json").read_bytes() == (tmp_path / "two" / "settings.json").read_bytes()


def test_the_record_keeps_what_made_the_first_files(tmp_path, monkeypatch):
    """A later version of the code, which has one more flag, adds an image."""
    for version, ids, flags in (("1", "a", {"lr": 0.1}), ("2", "b", {"lr": 0.1, "new": 3})):
        monkeypatch.setattr(identity, "code_version", lambda version=version: version)
        claim(tmp_path, ids, flags)
        (tmp_path / f"{ids}.png").write_text("mask")
    record = identity.read_record(tmp_path / "settings.json")
    assert (record["version"], record["settings"], [*record["inputs"]["photographs"]]) == ("1", {"lr": 0.1}, ["a", "b"])


def test_overwrite_deletes_the_files_of_images_that_are_no_longer_listed(tmp_path):
    """Who reads the folder would take them for files of the new settings. A file that no run has made stays."""
    claim(tmp_path, "ab", {"lr": 0.1})
    for name in ("a.png", "b.png", "mine.png"):
        (tmp_path / name).write_text("mask")
    claim(tmp_path, "a", {"lr": 0.2}, overwrite=True)
    assert [path.name for path in tmp_path.glob("*.png")] == ["mine.png"]


@pytest.mark.parametrize("spelling", ["absolute", "link", "../here/out"])
def test_no_folder_is_read_and_written_however_it_is_spelt(tmp_path, monkeypatch, spelling):
    (tmp_path / "here" / "out").mkdir(parents=True)
    (tmp_path / "here" / "link").symlink_to(tmp_path / "here" / "out")
    monkeypatch.chdir(tmp_path / "here")
    read = Path.cwd() / "out" if spelling == "absolute" else Path(spelling)
    with pytest.raises(UserError, match="read and written by this command"):
        claim(Path("out"), "a", {"pseudo_dir": read})


def infer(data, *flags):
    run("inference", *data_flags(data), *INFERENCE, *flags)


@pytest.mark.parametrize(
    ("changed", "flags"),
    [
        (["maps", "pseudo masks"], ["--scales", 0.5]),
        (["maps", "pseudo masks"], ["--hflip", "false"]),
        (["pseudo masks"], ["--pseudos_from", "masks"]),
        (["pseudo masks"], ["--threshold", 0.3]),
        (["pseudo masks"], ["--crf_t", 3]),
        (["pseudo masks"], ["--crf_gt_prob", 0.9]),
        (["pseudo masks"], ["--crf_backend", "pydensecrf"]),
        ([], ["--cam_format", "npy", "--save_cams", "false", "--save_masks", "--save_pseudos", "false", "--seed", 3]),
    ],
)
def test_what_each_flag_of_inference_changes(folder_root, tmp_path, changed, flags):
    source, weights = build_source("folder", folder_root), tmp_path / "model.pth"
    weights.touch()
    parsed = [parse("inference", "--tag", "t", *given) for given in ([], flags)]
    made_by = [inference.identities(args, source, SPLITS["train"], weights) for args in parsed]
    kinds = zip(("maps", "pseudo masks"), *made_by, strict=True)
    assert [name for name, *both in kinds if identity.difference(*both)] == changed
    weights.write_bytes(b"of another training")
    anew = inference.identities(parsed[0], source, SPLITS["train"], weights)
    assert all(identity.difference(*both).startswith("--weights ") for both in zip(made_by[0], anew, strict=True))


def keys(image_id):
    return load_cams(CAMS / f"{image_id}.npz")[0].tolist()


def test_maps_of_another_label_are_refused_or_made_anew(data, capsys):
    run("train_classifier", *data_flags(data), "--tag", "t", *TRAINING)
    infer(data)
    change_a_label(data)
    line = refusal(capsys, "inference", *data_flags(data), *INFERENCE)
    assert f"{CAMS}: made with other labels of 1 images, the first is c ('dog', not 'cat')." in line
    assert keys("c") == [0, 2]
    (CAMS / "mine.txt").write_text("notes")
    infer(data, "--overwrite")
    assert keys("c") == [0, 1] and (CAMS / "mine.txt").exists()
    stamps = [(CAMS / f"{i}.npz").stat().st_mtime_ns for i in SPLITS["train"]]
    infer(data, "--overwrite")
    assert stamps == [(CAMS / f"{i}.npz").stat().st_mtime_ns for i in SPLITS["train"]]


def test_a_list_that_grows_is_continued_and_what_is_not_made_may_be_mended(data, capsys):
    run("train_classifier", *data_flags(data), "--tag", "t", *TRAINING)
    infer(data)
    stamp = (CAMS / "a.npz").stat().st_mtime_ns
    (CAMS / "c.npz").unlink()
    shutil.rmtree(CAMS.parent / "pseudos-t0.4-c0")
    change_a_label(data)
    add_an_image(data)
    infer(data)
    assert "4 images of 'train', 0 done already" in capsys.readouterr().out
    assert keys("c") == [0, 1] and keys("d") == [0] and (CAMS / "a.npz").stat().st_mtime_ns == stamp
    assert json.loads((CAMS / "settings.json").read_text())["inputs"]["labels"] == {
        "a": "cat",
        "b": "cat;dog",
        "c": "cat",
        "d": "",
    }


def test_classes_of_models_and_folders():
    identity.compare_classes(MODEL, ["cat", "dog"], ("cat", "dog"))
    for others in (["dog", "cat"], ["cat"]):
        with pytest.raises(UserError, match=rf"t\.pth: made of the classes \[cat, dog\].* has \[{', '.join(others)}\]"):
            identity.compare_classes(MODEL, ["cat", "dog"], others)


WRONG_TYPES = [b'{"files": []}', b'{"files": {"weights": 3}}', b'{"settings": null}', b'{"inputs": {"labels": 3}}']


@pytest.mark.parametrize("damage", [b"", b'{"settings": ', b"[]", b"\xff\xfe", *WRONG_TYPES])
def test_a_damaged_record_is_one_line(data, capsys, damage):
    run("train_classifier", *data_flags(data), "--tag", "t", *TRAINING)
    infer(data)
    before = (CAMS / "a.npz").read_bytes()
    (CAMS / "settings.json").write_bytes(damage)
    line = refusal(capsys, "inference", *data_flags(data), *INFERENCE)
    remedy = f"Choose another --tag (with --weights {MODEL}), or pass --overwrite to make it anew."
    assert f"{CAMS}: its settings.json is damaged. {remedy}" in line
    infer(data, "--overwrite")
    assert (CAMS / "a.npz").read_bytes() == before
    (CAMS / "settings.json").unlink()
    assert "holds files, but no settings.json" in refusal(capsys, "inference", *data_flags(data), *INFERENCE)
    (CAMS / "settings.json").write_text('{"scales": [1.0]}')
    assert "made with a version of the code that" in refusal(capsys, "inference", *data_flags(data), *INFERENCE)


def test_pseudo_masks_are_not_made_of_another_models_maps(data):
    """Its files lie in cams/ and masks/, but this run does not ask for these folders."""
    flags = [*data_flags(data), "--tag", "t", *TRAIN["train_csrm"]]
    run("train_csrm", *flags)
    infer(data, "--save_masks")
    run("train_csrm", *flags, "--seed", 7, "--lr", 3, "--overwrite")
    ways = [["--save_cams", "false", "--threshold", 0.31], ["--save_cams", "false", "--pseudos_from", "masks"]]
    for way in ways:
        infer(data, *way)
    folder, other = CAMS.parent, CAMS.parents[1] / "other@train"
    for way in ways:
        run("inference", *data_flags(data), *INFERENCE, "--tag", "other", "--weights", MODEL, *way)
    for name in ("pseudos-t0.31-c0", "pseudos-masks-c0"):
        masks = [[load_mask(place / name / f"{i}.png") for i in SPLITS["train"]] for place in (folder, other)]
        assert all(map(np.array_equal, *masks)), name


def test_files_of_another_suffix_are_of_the_same_record(data, capsys):
    run("train_classifier", *data_flags(data), "--tag", "t", *TRAINING)
    infer(data)
    change_a_label(data)
    line = refusal(capsys, "inference", *data_flags(data), *INFERENCE, "--cam_format", "npy")
    assert f"{CAMS}: made with other labels of 1 images, the first is c ('dog', not 'cat')." in line
    infer(data, "--cam_format", "npy", "--overwrite")
    assert not list(CAMS.glob("*.npz")) and load_cams(CAMS / "c.npy")[0].tolist() == [0, 1]


def test_an_empty_file_beside_a_whole_one_of_another_suffix_is_made_again(data):
    """A power cut leaves it."""
    run("train_classifier", *data_flags(data), "--tag", "t", *TRAINING)
    for form in ("npz", "npy"):
        infer(data, "--cam_format", form)
    for path in (CAMS / "a.npy", CAMS / "b.npz"):
        whole = path.read_bytes()
        path.write_bytes(b"")
        infer(data, "--cam_format", path.suffix[1:])
        assert path.read_bytes() == whole


def test_a_file_that_the_record_does_not_list_is_not_taken(data, capsys):
    run("train_classifier", *data_flags(data), "--tag", "t", *TRAINING)
    infer(data)
    shutil.copy(CAMS / "c.npz", CAMS / "d.npz")
    add_an_image(data)
    line = refusal(capsys, "inference", *data_flags(data), *INFERENCE)
    assert f"{CAMS}: holds files that its settings.json does not list, the first is d. Choose another --tag" in line
    infer(data, "--overwrite")
    assert keys("d") == [0]


def test_two_computed_thresholds_do_not_mix(data, capsys, monkeypatch):
    run("train_classifier", *data_flags(data), "--tag", "t", *TRAINING)
    monkeypatch.setattr("inference.auto_threshold", lambda cams_of, ids, skip: 0.1 * len(ids))
    infer(data, "--threshold", "auto")
    add_an_image(data)
    line = refusal(capsys, "inference", *data_flags(data), *INFERENCE, "--threshold", "auto")
    assert "pseudos-tauto-c0: made with --threshold 0.30000000000000004, not 0.4." in line


def test_a_threshold_that_nothing_uses_is_not_compared(data):
    run("train_csrm", *data_flags(data), "--tag", "t", *TRAIN["train_csrm"])
    for threshold in (0.3, 0.5):
        infer(data, "--pseudos_from", "masks", "--threshold", threshold)


def test_labels_of_cam_files_depend_on_the_sizes_of_the_training(data, capsys):
    """Smaller photographs are enlarged to --min_image_size for the dense CRF."""
    run("train_classifier", *data_flags(data), "--tag", "t", *TRAINING)
    infer(data)
    flags = [*data_flags(data), "--tag", "c", *TRAIN["train_csrm"], "--c2s_labels", CAMS]
    flags += ["--c2s_bg", 0.2, "--c2s_fg", 0.4]
    run("train_csrm", *flags)
    sizes = ["--min_image_size", 200, "--image_size", 320, "--max_image_size", 400]
    line = refusal(capsys, "train_csrm", *flags, *sizes)
    assert "experiments/labels/c: made with --long_side [32, 48], not [200, 320]." in line


def test_masks_and_maps_of_classes_in_another_order(data, capsys):
    """Whatever reads them, as indices of the classes."""
    run("train_classifier", *data_flags(data), "--tag", "t", *TRAINING)
    infer(data)
    regions = ["--domain", "train", "--proposals", "regions", "--num_workers", 0]
    masks, refined = CAMS.parent / "pseudos-t0.4-c0", CAMS.parent / "sam-regions-max_iou_imp2"
    run("refine_sam", *data_flags(data), "--tag", "t", *regions, "--pseudo_dir", masks)
    (data / "classes.txt").write_text("background\ndog\ncat\n")
    for folder, script, *flags in (
        (masks, "refine_sam", "--tag", "o", *regions, "--pseudo_dir", masks),
        (refined, "train_segmentation", *SEGMENTATION, "--masks_dir", refined),
        (CAMS, "train_csrm", "--tag", "c", *TRAIN["train_csrm"], "--c2s_labels", CAMS),
        (masks, "train_csrm", "--tag", "c", *TRAIN["train_csrm"], "--c2s_labels", masks),
        (CAMS, "evaluate", "--mode", "cams", "--domain", "train", "--pred_dir", CAMS, "--num_workers", 0),
        (refined, "evaluate", "--domain", "train", "--pred_dir", refined, "--num_workers", 0),
    ):
        line = refusal(capsys, script, *data_flags(data), *flags)
        assert f"{folder}: made of the classes [cat, dog], but the dataset has [dog, cat]." in line


@pytest.mark.parametrize("kind", ["photographs", "labels"])
def test_masks_and_maps_of_other_photographs_or_labels_of_the_same_names(data, capsys, kind):
    """As of two datasets that both have a 0001.jpg of one camera; or before a label was corrected."""
    run("train_classifier", *data_flags(data), "--tag", "t", *TRAINING)
    infer(data)
    masks = CAMS.parent / "pseudos-t0.4-c0"
    refining = ["--domain", "train", "--proposals", "regions", "--num_workers", 0, "--pseudo_dir", masks]
    run("refine_sam", *data_flags(data), "--tag", "t", *refining)
    refined = CAMS.parent / "sam-regions-max_iou_imp2"
    scoring = ["evaluate", *data_flags(data), "--domain", "train", "--pred_dir", masks, "--num_workers", 0]
    if kind == "labels":
        change_a_label(data)
        run(*scoring)
    else:
        with Image.open(data / "images" / "c.jpeg") as image:
            image.transpose(Image.Transpose.FLIP_TOP_BOTTOM).save(data / "images" / "c.jpeg", quality=50)
        assert f"{masks}: made of other photographs of 1 images, the first is c (" in refusal(capsys, *scoring)
    for folder, script, *flags in (
        (masks, "refine_sam", "--tag", "o", *refining),
        (masks, "train_segmentation", *SEGMENTATION, "--masks_dir", masks),
        (masks if kind == "labels" else refined, "train_segmentation", *SEGMENTATION, "--masks_dir", refined),
        (CAMS, "train_csrm", "--tag", "c", *TRAIN["train_csrm"], "--c2s_labels", CAMS),
    ):
        line = refusal(capsys, script, *data_flags(data), *flags)
        assert f"{folder}: made of other {kind} of 1 images, the first is c (" in line
    (masks / "c.png").unlink()  # left out, as its photograph was damaged: that may be replaced
    corrected = ["--corrected_dir", shutil.copytree(data / "masks", "corrected")]
    run("train_segmentation", *data_flags(data), *SEGMENTATION, "--tag", "s", "--masks_dir", masks, *corrected)


@pytest.mark.parametrize("anew", ["weights", "masks", "masks by another path"])
def test_what_was_made_from_a_stage_that_was_done_anew_is_named_and_left_off_the_page(data, capsys, anew):
    """However many stages lie between; until these are done again, too."""
    masks, refined = CAMS.parent / "pseudos-t0.4-c0", CAMS.parent / "sam-regions-max_iou_imp2"
    final, scores = Path("experiments/predictions/s@val/masks"), ["--output", "s.json", "--num_workers", 0]
    refine = ["--tag", "t", "--domain", "train", "--proposals", "regions", "--num_workers", 0]
    refine += ["--pseudo_dir", masks.absolute() if anew == "masks by another path" else masks]
    learn = [*SEGMENTATION, "--tag", "s", "--masks_dir", refined]
    predict = [*SEGMENTATION, "--tag", "s", "--predict", "--domain", "val", "--scales", 1]
    columns = [f"Mask={masks}", f"Refined={refined}", f"Final={final}"]
    page = ["--domain", "train", "val", "--num_workers", 0, "--output_dir", "page", "--summary", "s=s.json"]

    def printed(script, *flags):
        capsys.readouterr()
        run(script, *data_flags(data), *flags)
        return capsys.readouterr().out

    def rest(*overwrite):
        """The later stages, and what is left off the page then."""
        for script, flags in (("train_segmentation", learn), ("train_segmentation", predict)):
            printed(script, *flags, *overwrite)
        printed("evaluate", "--domain", "val", "--pred_dir", final, *scores)
        return re.findall(
            "(.*) (?:is left out|were made from .*Left out)", printed("report", *page, "--columns", *columns)
        )

    run("train_classifier", *data_flags(data), "--tag", "t", *TRAINING)
    infer(data)
    run("refine_sam", *data_flags(data), *refine)
    assert rest() == []
    if anew == "weights":
        run("train_classifier", *data_flags(data), "--tag", "t", *TRAINING, "--seed", 1, "--overwrite")
    infer(data, "--overwrite", "--hflip", "false")
    changed = f"{MODEL if anew == 'weights' else masks}, which has changed since, so that the stages after it must run"
    assert f"Warning: the files of {refined} were made from {changed}" in printed("train_segmentation", *learn)
    assert rest() == [f"s.json: its predictions, {final},", "Column 'Refined'", "Column 'Final'"]
    assert "Warning" not in printed("refine_sam", *refine, "--overwrite")
    assert "Warning" not in printed("train_segmentation", *learn, "--overwrite")
    assert rest("--overwrite") == []


def test_segmentations_of_classes_in_another_order(data, capsys):
    run("train_segmentation", *data_flags(data), *SEGMENTATION)
    run("train_segmentation", *data_flags(data), *SEGMENTATION, "--predict", "--domain", "val", "--scales", 1)
    (data / "classes.txt").write_text("background\ndog\ncat\n")
    flags = ["--domain", "val", "--pred_dir", "experiments/predictions/t@val/masks", "--num_workers", 0]
    assert "made of the classes [cat, dog], but" in refusal(capsys, "evaluate", *data_flags(data), *flags)
    anew = [*SEGMENTATION, "--predict", "--domain", "train"]
    assert f"{MODEL}: made of the classes [cat, dog], but" in refusal(
        capsys, "train_segmentation", *data_flags(data), *anew
    )


def test_an_unfinished_model_is_named(data, capsys):
    run("train_classifier", *data_flags(data), "--tag", "t", *TRAINING)
    infer(data)
    assert "Warning" not in capsys.readouterr().out
    checkpoint = torch.load(MODEL, weights_only=True)
    torch.save({**checkpoint, "max_epoch": 3}, "unfinished.pth")
    infer(data, "--tag", "o", "--weights", "unfinished.pth")
    text = "Warning: unfinished.pth: after epoch 1 of 3. Its training has stopped, or is going on."
    assert text in capsys.readouterr().out.splitlines()
    run("train_csrm", *data_flags(data), "--tag", "c", *TRAIN["train_csrm"], "--restore", "unfinished.pth")
    assert text in capsys.readouterr().out.splitlines()


def test_a_photograph_called_settings(data, capsys):
    """Its proposals would be the file of the identity."""
    (data / "images" / "a.jpg").rename(data / "images" / "settings.jpg")
    (data / "masks" / "a.png").rename(data / "masks" / "settings.png")
    for name in ("labels.csv", "splits/train.txt"):
        (data / name).write_text((data / name).read_text().replace("\na", "\nsettings").replace("a\n", "settings\n", 1))
    flags = ["--tag", "t", "--domain", "train", "--proposals", "regions", "--num_workers", 0]
    line = refusal(capsys, "refine_sam", *data_flags(data), *flags, "--pseudo_dir", data / "masks")
    assert f"{data}/images/settings.jpg: settings.json is taken in each folder. Rename the photograph." in line


def test_another_folder_is_chosen_as_the_line_says(data, capsys):
    """A script that reads a model does not find one by another --tag alone."""
    run("train_segmentation", *data_flags(data), *SEGMENTATION)
    again = ["--tag", "o", "--weights", MODEL]
    maps = ["--save_cams", "false", "--pseudos_from", "masks"]
    for script, flags in (("inference", [*INFERENCE, *maps]), ("train_segmentation", [*INFERENCE, "--predict"])):
        flags = [*data_flags(data), *flags, "--num_workers", 0]
        run(script, *flags)
        line = refusal(capsys, script, *flags, "--scales", 2)
        assert f"Choose another --tag (with --weights {MODEL}), or pass --overwrite" in line
        run(script, *flags, "--scales", 2, *again)


def test_another_folder_of_proposals_or_of_refined_masks(data, capsys):
    flags = [*data_flags(data), "--tag", "t", "--domain", "train", "--proposals", "regions", "--num_workers", 0]
    flags += ["--pseudo_dir", data / "masks"]
    run("refine_sam", *flags)
    proposals = Path("experiments/predictions/t@train/proposals-regions")
    line = refusal(capsys, "refine_sam", *flags, "--inside_threshold", 0.7)
    assert f"Choose another --tag (with --proposals_dir {proposals}), or pass --overwrite" in line
    run("refine_sam", *flags, "--inside_threshold", 0.7, "--tag", "o", "--proposals_dir", proposals)
    assert "Proposals: 3 images, 3 done already" in capsys.readouterr().out
    shared = [*flags, "--tag", "s", "--proposals_dir", proposals]
    line = refusal(capsys, "refine_sam", *shared, "--region_max_size", 0.1)
    assert "Choose another --proposals_dir (or --stage merge --proposals files, to take what it holds), or pass" in line
    (proposals / "settings.json").unlink()
    line = refusal(capsys, "refine_sam", *shared, "--overwrite")
    assert "what made them. Choose another --proposals_dir (or --stage merge --proposals files, to take" in line
    assert line.endswith(", or move these files away.")
    run("refine_sam", *shared, "--stage", "merge", "--proposals", "files")


def test_refined_masks_of_other_pseudo_masks(data, capsys):
    flags = [*data_flags(data), "--tag", "t", "--domain", "train", "--proposals", "regions", "--num_workers", 0]
    flags += ["--pseudo_dir", data / "masks"]
    run("refine_sam", *flags)
    refined = Path("experiments/predictions/t@train/sam-regions-max_iou_imp2")
    assert set(np.unique(load_mask(refined / "c.png"))) == {0, 2}
    mask = load_mask(data / "masks" / "c.png")
    save_mask(data / "masks" / "c.png", np.where(mask == 2, 1, mask), np.zeros((256, 3), np.uint8))
    line = refusal(capsys, "refine_sam", *flags)
    assert f"{refined}: made with other pseudo masks of 1 images, the first is c (" in line
    run("refine_sam", *flags, "--overwrite")
    assert set(np.unique(load_mask(refined / "c.png"))) == {0, 1}


@pytest.mark.parametrize(
    ("flag", "place", "fault"),
    [
        ("--proposals_dir", "masks", "holds files, but no settings.json that says what made them."),
        ("--pseudo_dir", "experiments/predictions/t@train/sam-regions-max_iou_imp2", "read and written by this"),
    ],
)
def test_overwrite_deletes_no_input(data, capsys, flag, place, fault):
    """Neither files that somebody else made, nor those that are to be refined."""
    flags = [*data_flags(data), "--tag", "t", "--domain", "train", "--proposals", "regions", "--num_workers", 0]
    flags += ["--pseudo_dir", data / "masks"]
    run("refine_sam", *flags)
    folder = data / "masks" if place == "masks" else Path(place)
    before = {path: path.read_bytes() for path in folder.iterdir()}
    assert fault in refusal(capsys, "refine_sam", *flags, flag, folder, "--overwrite")
    assert {path: path.read_bytes() for path in folder.iterdir()} == before
