"""evaluate.py on a small folder dataset: numbers against plain loops, and every mistake answered in one line."""

from __future__ import annotations

import csv
import json
import sys

import numpy as np
import pytest
from PIL import Image

import evaluate
from datasets.base import voc_palette
from tools import cli
from tools.cam_files import cam_labels, load_cams, save_cams
from tools.errors import UserError
from tools.files import save_mask

IDS = ["a", "b", "c", "d"]
CLASSES = ["background", "cat", "dog", "owl"]


def plain_iou(pairs, c):
    truth = np.concatenate([m.ravel() for m, _ in pairs])
    guess = np.concatenate([p.ravel() for _, p in pairs])[truth != 255]
    truth = truth[truth != 255]
    union = ((truth == c) | (guess == c)).sum()
    return 100 * ((truth == c) & (guess == c)).sum() / union if union else 0.0


def plain_false_positives(pairs, c):
    """Per cent of the union."""
    wrong = sum(((m != c) & (m != 255) & (p == c)).sum() for m, p in pairs)
    union = sum((((m == c) | (p == c)) & (m != 255)).sum() for m, p in pairs)
    return 100 * wrong / union if union else 0.0


@pytest.fixture
def data(tmp_path):
    """Four images of odd sizes with masks of classes 0-2; 'owl' never occurs."""
    rng = np.random.default_rng(0)
    root = tmp_path / "data"
    (root / "images").mkdir(parents=True)
    (root / "splits").mkdir()
    (root / "classes.txt").write_text("\n".join(CLASSES))
    (root / "labels.csv").write_text("id,labels\n" + "".join(f"{i},cat;dog\n" for i in IDS))
    (root / "splits" / "train.txt").write_text("\n".join(IDS))
    for index, i in enumerate(IDS):
        size = (9 + index, 13)
        Image.fromarray(rng.integers(0, 255, (*size, 3), np.uint8)).save(root / "images" / f"{i}.png")
        save_mask(root / "masks" / f"{i}.png", rng.choice([0, 1, 2, 255], size), voc_palette())
    return root


def read(path):
    return np.asarray(Image.open(path))


@pytest.fixture
def masks(data, tmp_path):
    """Predicted masks: noise over the ground truth, some pixels undecided."""
    rng = np.random.default_rng(1)
    for i in IDS:
        mask = read(data / "masks" / f"{i}.png")
        noise = rng.choice([0, 1, 2, 255], mask.shape)
        prediction = np.where((rng.random(mask.shape) < 0.5) | (mask == 255), noise, mask)
        save_mask(tmp_path / "masks" / f"{i}.png", prediction, voc_palette())
    return tmp_path / "masks"


@pytest.fixture
def cams(data, tmp_path):
    """CAM files; the last image has no class at all."""
    rng = np.random.default_rng(2)
    for i in IDS:
        size = read(data / "masks" / f"{i}.png").shape
        classes = [] if i == IDS[-1] else [1, 2]
        hr_cam = rng.random((len(classes), *size), np.float32)
        save_cams(tmp_path / "cams" / f"{i}.npz", np.array([0, *classes]), hr_cam[:, ::4, ::4], hr_cam)
    return tmp_path / "cams"


def run(data, pred_dir, *flags, workers=0):
    arguments = ["--dataset", "folder", "--data_dir", str(data), "--pred_dir", str(pred_dir)]
    evaluate.main(evaluate.make_parser().parse_args([*arguments, "--num_workers", str(workers), *map(str, flags)]))


def test_masks_table_json_and_csv(data, masks, tmp_path, capsys):
    output = tmp_path / "out" / "scores.json"
    run(data, masks, "--output", output)
    pairs = [(read(data / "masks" / f"{i}.png"), read(masks / f"{i}.png")) for i in IDS]
    expected = [plain_iou(pairs, c) for c in range(4)]
    result = json.loads(output.read_text())
    assert list(result["iou"]) == CLASSES
    np.testing.assert_allclose(list(result["iou"].values()), expected)
    assert result["miou"] == pytest.approx(np.mean(expected))
    assert result["miou_foreground"] == pytest.approx(np.mean(expected[1:]))
    assert result["threshold"] is None and result["curve"] == [] and result["images"] == 4
    rows = list(csv.DictReader(output.with_suffix(".csv").open()))
    assert [row["class"] for row in rows] == CLASSES
    assert float(rows[1]["iou"]) == pytest.approx(expected[1], abs=1e-4)
    wrong = [plain_false_positives(pairs, c) for c in range(4)]
    missed = [100 - iou - fp if iou + fp else 0 for iou, fp in zip(expected, wrong, strict=True)]
    for name, values in (("false_positive", wrong), ("false_negative", missed)):
        np.testing.assert_allclose(list(result[name].values()), values)
        np.testing.assert_allclose([float(row[name]) for row in rows], values, atol=1e-4)
    text = capsys.readouterr().out
    assert "counted as 0 in the means: owl." in text and f"mIoU {result['miou']:.2f}" in text
    columns = [[*values, np.mean(values)] for values in (expected, wrong, missed)]
    for name, *numbers in zip([*CLASSES, "mean"], *columns, strict=True):
        assert f"\n{name:<10}  " + "  ".join(f"{number:6.2f}" for number in numbers) in text


def test_cams_sweep_finds_the_best_threshold(data, cams, tmp_path, capsys):
    output = tmp_path / "scores.json"
    run(data, cams, "--mode", "cams", "--output", output)
    expected = {}
    for t in [round(0.05 * k, 2) for k in range(1, 17)]:
        pairs = []
        for i in IDS:
            keys, _, hr_cam = load_cams(cams / f"{i}.npz")
            pairs.append((read(data / "masks" / f"{i}.png"), keys[cam_labels(hr_cam, t)]))
        expected[t] = np.mean([plain_iou(pairs, c) for c in range(4)])
    result = json.loads(output.read_text())
    for name in CLASSES:
        curve = {point["threshold"]: point["iou"][name] for point in result["curve"]}
        assert result["best_per_class"][name] == {"threshold": max(curve, key=curve.get), "iou": max(curve.values())}
    text = capsys.readouterr().out
    assert "best IoU, at threshold" in text and text.count("<- best") == text.count("default of inference.py") == 1
    assert [p["threshold"] for p in result["curve"]] == list(expected)
    np.testing.assert_allclose([p["miou"] for p in result["curve"]], list(expected.values()))
    assert result["threshold"] == max(expected, key=expected.get)
    assert result["miou"] == pytest.approx(max(expected.values()))
    rows = list(csv.DictReader(output.with_suffix(".csv").open()))
    assert len(rows) == 16 * 4
    for t, miou in expected.items():
        of_t = [row for row in rows if float(row["threshold"]) == t]
        errors = [np.mean([float(row[f"false_{sign}"]) for row in of_t]) for sign in ("positive", "negative")]
        assert f"\n{t:9.3g}  {miou:6.2f}  {errors[0]:6.2f}  {errors[1]:6.2f}" in text
    assert f"\ncat         {result['iou']['cat']:6.2f}  " in text


def test_single_threshold(data, cams, tmp_path):
    output = tmp_path / "scores.json"
    run(data, cams, "--mode", "cams", "--threshold", 0.4, "--output", output)
    result = json.loads(output.read_text())
    assert result["threshold"] == 0.4 and len(result["curve"]) == 1 and result["best_per_class"] == {}


def test_pickled_cams_are_read_on_request(data, cams, tmp_path):
    for i in IDS:
        save_cams(tmp_path / "pickled" / f"{i}.npy", *load_cams(cams / f"{i}.npz"))
    run(data, cams, "--mode", "cams", "--output", tmp_path / "npz.json")
    run(data, tmp_path / "pickled", "--mode", "cams", "--cam_format", "npy", "--output", tmp_path / "npy.json")
    results = [json.loads((tmp_path / f"{kind}.json").read_text())["curve"] for kind in ("npz", "npy")]
    assert results[0] == results[1]
    with pytest.raises(UserError, match=r"a\.npz is missing \(4 of 4.* or check .*--cam_format"):
        run(data, tmp_path / "pickled", "--mode", "cams")


def test_worker_processes_and_chunks_change_nothing(data, masks, tmp_path, monkeypatch):
    run(data, masks, "--output", tmp_path / "one.json")
    monkeypatch.setattr(evaluate, "IDS_PER_JOB", 3)
    run(data, masks, "--output", tmp_path / "two.json", workers=2)
    assert (tmp_path / "one.json").read_text() == (tmp_path / "two.json").read_text()


def test_masks_dir_replaces_the_ground_truth(data, masks, tmp_path):
    run(data, masks, "--masks_dir", masks, "--output", tmp_path / "self.json")
    iou = json.loads((tmp_path / "self.json").read_text())["iou"]
    assert iou == {"background": 100, "cat": 100, "dog": 100, "owl": 0}


def test_a_settings_file_of_another_program_is_moved_away(data, masks, tmp_path):
    (masks / "settings.json").write_text("[]")
    with pytest.raises(UserError, match="Make .*masks again; or, if this file is another program's, move it away"):
        run(data, masks)
    (masks / "settings.json").rename(tmp_path / "settings.json")
    run(data, masks)


def test_missing_predictions_are_counted_and_named(data, masks):
    (masks / "b.png").unlink()
    (masks / "d.png").unlink()
    with pytest.raises(UserError, match=r"b\.png is missing \(2 of 4 are\)"):
        run(data, masks)
    with pytest.raises(UserError, match="nowhere: a.png is missing"):
        run(data, masks / "nowhere")


@pytest.mark.parametrize("workers", [0, 2])
def test_corrupt_prediction_is_named(data, masks, workers):
    whole = (masks / "c.png").read_bytes()
    (masks / "c.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"^[^\n]*c\.png: not a readable mask[^\n]*$"):
        run(data, masks, workers=workers)


def test_wrong_size_and_foreign_class_are_named(data, masks):
    size = read(masks / "a.png").shape
    save_mask(masks / "a.png", np.full(size, 4), voc_palette())
    with pytest.raises(UserError, match=r"a\.png: holds the value 4, but masks of this dataset hold 0\.\.3"):
        run(data, masks)
    save_mask(masks / "a.png", np.zeros((5, 5)), voc_palette())
    with pytest.raises(UserError, match=r"a\.png: 5x5 pixels, but its image is 13x9"):
        run(data, masks)


@pytest.mark.parametrize(
    "keys, value, message",
    [
        *[([0, 1], 0.5, "for 2 CAMs"), ([0, 1, 4], 0.5, "one class from 1 to 3"), ([0, 1, 2], np.nan, "not finite")],
        *[([0, 1, 2], np.inf, "not finite"), ([0, 1, 2], -np.inf, "not finite"), ([0, 1, 2], 255, "from 0 to 255")],
    ],
)
def test_faulty_cam_files_are_named(data, cams, keys, value, message):
    hr_cam = np.full((2, *read(data / "masks" / "a.png").shape), value, np.float32)
    save_cams(cams / "a.npz", np.array(keys), hr_cam, hr_cam)
    with pytest.raises(UserError, match=rf"a\.npz: .*{message}"):
        run(data, cams, "--mode", "cams")


def test_truncated_cam_file_is_named(data, cams):
    (cams / "b.npz").write_bytes((cams / "b.npz").read_bytes()[:200])
    with pytest.raises(UserError, match=r"b\.npz: not a readable CAM file"):
        run(data, cams, "--mode", "cams")


def test_domain_without_ground_truth(data, masks):
    (data / "masks" / "c.png").unlink()
    with pytest.raises(UserError, match=r"c\.png: no such mask \(1 of 4"):
        run(data, masks)
    for mask in (data / "masks").iterdir():
        mask.unlink()
    (data / "masks").rmdir()
    with pytest.raises(UserError, match=r"this dataset has no masks"):
        run(data, masks)


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--threshold", "0.3"], "--threshold: masks have no threshold"),
        (["--mode", "cams", "--min_th", "0.5", "--max_th", "0.4"], "an empty sweep"),
        (["--mode", "cams", "--step_th", "0"], "an empty sweep"),
        (["--output", "scores.txt"], "must end in .json"),
    ],
)
def test_contradicting_flags(data, masks, flags, message):
    with pytest.raises(UserError, match=message):
        run(data, masks, *flags)


def test_command_line_ends_with_one_line_and_code_2(data, masks, monkeypatch, capsys):
    (masks / "a.png").unlink()
    flags = ["--dataset", "folder", "--data-dir", data, "--pred-dir", masks]
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, flags)])
    with pytest.raises(SystemExit) as stop:
        cli.run(evaluate.main, evaluate.make_parser().parse_args())
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1 and "a.png is missing" in error
