"""Prediction of anybody's photographs: what is written, of what, and what it says."""

from __future__ import annotations

import csv
import shutil
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from command import data_flags, refusal, run
from PIL import Image

import inference
from datasets.base import DatasetInfo
from datasets.folder import Photographs
from models import build_model, load_model, segmentation_forward
from tools import options
from tools.cam import enlarged_argmax, multi_scale_logits, values_at
from tools.checkpoint import save_checkpoint
from tools.crf import CAM_SETTINGS, mean_field, unary_from_labels
from tools.drawing import save_overlay
from tools.errors import UserError
from tools.files import load_mask
from tools.maps import normalize, resize_maps
from tools.pseudo_labels import RelativeReading
from train_segmentation import Segmentation, probabilities, refined, segment

CLASSES = ["background", "cat", "dog"]
PREDICTIONS = Path("experiments/predictions")
PREDICT = ["train_segmentation", "--predict", "--device", "cpu", "--scales", "1", "--crf_t", "2", "--num_workers", "0"]
VIEWS = options.Views(scales=(1.0,), hflip=True, long_side=(0, 64))
SIZES = {"a": (40, 56), "b/c": (91, 33)}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Checkpoints of a DeepLabV3+ and of a CSRM that sees what its teacher sees, but whose student is blind."""
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    for kind in ("segmentation", "csrm"):
        model = build_model(kind, architecture="test_resnet", num_classes=3, decoder_channels=8)
        weights = {"model": model.state_dict()}
        if kind == "csrm":
            weights |= {"teacher": model.state_dict(), "model": {k: v * 0 for k, v in model.state_dict().items()}}
        save_checkpoint(
            folder / f"{kind}.pth",
            config=model.config,
            **weights,
            classes=CLASSES,
            epoch=1,
            args={"image_size": 64, "min_image_size": 0},
        )
    return folder


@pytest.fixture
def holiday(tmp_path, monkeypatch):
    """Two photographs, one in a folder inside; the working directory is empty."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    for seed, (name, size) in enumerate(SIZES.items()):
        path = tmp_path / "holiday" / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(noise(size, seed)).save(path)
    return tmp_path / "holiday"


def noise(size, seed=0):
    small = np.random.default_rng(seed).integers(0, 256, (5, 5, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(small).resize(size[::-1], Image.Resampling.BILINEAR))


def photograph(size, seed=0):
    return torch.tensor(noise(size, seed)).permute(2, 0, 1)[None]


def how(**changes):
    return Segmentation(**{"views": VIEWS, "crf": options.CRF(iterations=2), **changes})


# -- files ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["segmentation", "csrm"])
def test_files_of_each_photograph(models, holiday, kind):
    weights = models / f"{kind}.pth"
    run(*PREDICT, "--tag", "m", "--weights", weights, "--images", holiday, "--save_overlays", "--save_confidence")
    model, _ = load_model(weights, torch.device("cpu"), kinds=[kind])
    folder = PREDICTIONS / "m@holiday"
    for seed, (image_id, size) in enumerate(SIZES.items()):
        with torch.inference_mode():
            picture = photograph(size, seed)
            network = probabilities(model, picture, VIEWS)
            (final,) = refined(picture, network, how())
        mask, confidence = final.argmax(dim=0).numpy(), Image.open(folder / "confidence" / f"{image_id}.png")
        assert np.array_equal(load_mask(folder / "masks" / f"{image_id}.png"), mask)
        assert confidence.mode == "L" and confidence.size == size[::-1]
        expected = np.take_along_axis(network[0].numpy(), mask[None], axis=0)[0] * 255
        assert np.abs(np.asarray(confidence) - expected).max() <= 0.5 + 1e-3
        assert np.ptp(expected) > 0  # not the blind student's
        save_overlay(Path("expected.jpg"), noise(size, seed), mask, DatasetInfo(tuple(CLASSES)))
        assert (folder / "overlays" / f"{image_id}.jpg").read_bytes() == Path("expected.jpg").read_bytes()


def test_areas_of_every_class(models, holiday):
    run(*PREDICT, "--tag", "m", "--weights", models / "segmentation.pth", "--images", holiday)
    with open(PREDICTIONS / "m@holiday" / "areas.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["id"], row["class"]) for row in rows] == [(i, name) for i in SIZES for name in CLASSES]
    for row in rows:
        mask = load_mask(PREDICTIONS / "m@holiday" / "masks" / f"{row['id']}.png")
        pixels = (mask == CLASSES.index(row["class"])).sum()
        assert int(row["pixels"]) == pixels
        assert float(row["per_cent"]) == pytest.approx(100 * pixels / mask.size, abs=1e-4)


def test_what_is_asked_for_later_is_added(models, holiday):
    command = [*PREDICT, "--tag", "m", "--weights", models / "segmentation.pth", "--images", holiday]
    run(*command)
    masks = PREDICTIONS / "m@holiday" / "masks"
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in masks.rglob("*.png")}
    run(*command, "--save_confidence", "--save_overlays")
    assert {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in masks.rglob("*.png")} == before
    assert (masks.parent / "confidence/b/c.png").exists() and (masks.parent / "overlays/b/c.jpg").exists()


def test_of_a_split_no_areas_are_written(models, folder_root, holiday):
    run(*PREDICT, "--tag", "m", "--weights", models / "segmentation.pth", *data_flags(folder_root), "--domain", "val")
    assert [path.name for path in (PREDICTIONS / "m@val").iterdir()] == ["masks"]


# -- what --images may be ------------------------------------------------------------------------------------------


def test_a_single_photograph_and_a_list_give_the_masks_of_the_folder(models, holiday):
    command = [*PREDICT, "--tag", "m", "--weights", models / "segmentation.pth", "--images"]
    (holiday.parent / "list.txt").write_text("holiday/b/c.png\n\nholiday/a.png\n")
    run(*command, holiday)
    run(*command, holiday / "a.png")
    run(*command, holiday.parent / "list.txt")
    read = lambda name: (PREDICTIONS / name).read_bytes()  # noqa: E731
    assert read("m@a/masks/a.png") == read("m@list/masks/holiday/a.png") == read("m@holiday/masks/a.png")
    assert read("m@list/masks/holiday/b/c.png") == read("m@holiday/masks/b/c.png")
    assert len(list((PREDICTIONS / "m@a/masks").rglob("*.png"))) == 1


def test_ids_of_listed_photographs(holiday, tmp_path):
    (tmp_path / "lists").mkdir()
    shutil.copy(holiday / "a.png", tmp_path / "lists" / "x.y.png")
    (tmp_path / "lists" / "some.TXT").write_text(f"x.y.png\n../holiday/a.png\n{holiday}/b/c.png\n")
    source = Photographs(tmp_path / "lists" / "some.TXT", CLASSES)
    assert source.ids("train") == ["a", "c", "x.y"]
    assert source.image_path("a").resolve() == (holiday / "a.png").resolve()


@pytest.mark.parametrize(("listed", "stored"), [("NFC", "NFD"), ("NFD", "NFC"), ("NFD", "NFD")])
def test_a_list_may_be_in_another_unicode_form_than_the_files(holiday, tmp_path, listed, stored):
    name, place = (unicodedata.normalize(form, "café/né.png") for form in (listed, stored))
    (tmp_path / place).parent.mkdir()
    shutil.copy(holiday / "a.png", tmp_path / place)
    (tmp_path / "list.txt").write_text(f"{name}\n")
    source = Photographs(tmp_path / "list.txt", CLASSES)
    assert source.ids("train") == [unicodedata.normalize("NFC", "café/né")]
    np.testing.assert_array_equal(source.image(source.ids("train")[0]), noise(SIZES["a"]))
    assert Photographs(tmp_path / place, CLASSES).ids("train") == [unicodedata.normalize("NFC", "né")]


@pytest.mark.parametrize(
    "lines, message",
    [
        ("holiday/a.png\nholiday/z.png\n", "list.txt: no file 'holiday/z.png'. Write one photograph per line"),
        ("\n", "list.txt: an empty list"),
        ("holiday/a.png\nholiday/a.png\n", "'holiday/a.png' has the same id as"),
        ("holiday\n", "no file 'holiday'"),
    ],
)
def test_lists_that_are_refused(holiday, tmp_path, lines, message):
    (tmp_path / "list.txt").write_text(lines)
    with pytest.raises(UserError, match=message):
        Photographs(tmp_path / "list.txt", CLASSES)


@pytest.mark.parametrize(
    "name, message",
    [
        ("nowhere", "no readable folder of images (No such file or directory)"),
        ("nowhere.jpg", "no readable folder of images (No such file or directory)"),
        ("text.jpg", "text.jpg: not a readable image (of no known format). Replace or remove it."),
        ("empty.jpg", "empty.jpg: not a readable image (an empty file)"),
    ],
)
def test_what_cannot_be_read_is_named(models, holiday, capsys, name, message):
    (holiday / "text.jpg").write_text("words")
    (holiday / "empty.jpg").touch()
    line = refusal(capsys, *PREDICT, "--tag", "m", "--weights", models / "segmentation.pth", "--images", holiday / name)
    assert message in line


@pytest.mark.parametrize("name", ["caf\udce9.png", "caf\udce9", "caf\udce9.txt"])
def test_a_name_that_is_not_utf8_is_refused_before_anything_is_predicted(models, holiday, capsys, name):
    """A photograph, a folder, a list. The name would be that of the folder of predictions."""
    (holiday / "caf\udce9").mkdir()
    for copy in ("caf\udce9.png", "caf\udce9/a.png"):
        shutil.copy(holiday / "a.png", holiday / copy)
    (holiday / "caf\udce9.txt").write_text("a.png\n")
    line = refusal(capsys, *PREDICT, "--tag", "m", "--weights", models / "segmentation.pth", "--images", holiday / name)
    told = rf"holiday/{name}: the name is not UTF-8 (old zip files unpack so). Rename it."
    assert told.encode(errors="backslashreplace") in line.encode(errors="backslashreplace")
    assert not PREDICTIONS.exists()


def test_one_that_cannot_be_read_is_left_out_of_the_areas(models, holiday):
    (holiday / "b" / "text.jpg").write_text("words")
    with pytest.raises(SystemExit) as stop:
        weights = ["--weights", models / "segmentation.pth"]
        run(*PREDICT, "--tag", "m", *weights, "--images", holiday, "--on_error", "skip", "--save_confidence")
    assert stop.value.code == 3
    with open(PREDICTIONS / "m@holiday" / "areas.csv", newline="") as file:
        assert {row["id"] for row in csv.DictReader(file)} == set(SIZES)


# -- relative to each class's maximum ------------------------------------------------------------------------------


@pytest.fixture
def sure_model(models):
    """Its logits are spread so far that some classes are sure somewhere, and others nowhere."""
    model, _ = load_model(models / "segmentation.pth", torch.device("cpu"), kinds=["segmentation"])
    torch.nn.init.normal_(model.segmentation[-1].weight, std=1.5, generator=torch.Generator().manual_seed(3))
    return model


@pytest.mark.parametrize("iterations", [0, 3])
@pytest.mark.parametrize("size", [(40, 56), (91, 33)])
def test_sure_classes_are_read_like_the_classes_of_a_label(sure_model, iterations, size):
    """The other side is inference.py's way to pseudo masks, told which classes the photograph holds."""
    picture, settings = photograph(size), how(crf=options.CRF(iterations, gt_prob=0.97), reading="relative")
    with torch.inference_mode():
        logits = multi_scale_logits(segmentation_forward(sure_model), normalize(picture), VIEWS)
    label = (logits.softmax(dim=1).amax(dim=(2, 3))[0, 1:] > 0.5).float()
    keys, _, maps = inference.segmentation_maps(logits, label, size, "relative")
    labels = inference.segmentation_labels(maps, "relative", graded=False)
    unary = unary_from_labels(torch.from_numpy(labels)[None], len(keys), 0.97)
    expected = keys[mean_field(picture, unary, CAM_SETTINGS, iterations).argmax(dim=1)[0].numpy()]
    mask, _ = segment(sure_model, picture, settings)
    assert len(keys) > 1 and len(np.unique(expected)) > 1
    assert (mask == expected).mean() > 0.999  # ties
    assert (mask == segment(sure_model, picture, how(crf=settings.crf))[0]).mean() < 0.99


def test_a_photograph_without_a_sure_class_is_background(model):
    torch.nn.init.zeros_(model.segmentation[-1].weight)
    mask, confidence = segment(model, photograph((40, 56)), how(reading="relative", confidence=True))
    assert not mask.any() and confidence.any()


@pytest.mark.parametrize("iterations", [0, 2])
def test_maxima_are_those_of_the_whole_photograph(sure_model, iterations):
    """The threshold and the maxima of tiles alone would differ from tile to tile."""
    settings = how(crf=options.CRF(iterations=iterations), tile=64, reading="relative", confidence=True)
    size, picture = (131, 90), photograph((131, 90))
    with torch.inference_mode():
        network = plain_mean(size, lambda place: probabilities(sure_model, picture[place], VIEWS))
        reading = RelativeReading.of(network[..., ::4, ::4])
        assert len(reading.keys) > 1
        final = plain_mean(size, lambda place: refined(picture[place], network[place], settings, reading))
    mask, confidence = segment(sure_model, picture, settings)
    assert (mask == reading.keys[final[0].argmax(dim=0)].numpy()).mean() > 0.999
    expected = 255 * values_at(network, torch.from_numpy(mask).long())
    assert np.abs(confidence - expected.numpy()).max() <= 0.5 + 1e-3


# -- tiles ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def model(models):
    return load_model(models / "segmentation.pth", torch.device("cpu"), kinds=["segmentation"])[0]


def test_a_photograph_no_longer_than_a_tile_is_not_cut(models, holiday):
    command = [*PREDICT, "--weights", models / "segmentation.pth", "--images", holiday, "--save_confidence", "--tag"]
    run(*command, "whole")
    run(*command, "tiles", "--tile", max(max(size) for size in SIZES.values()))
    for kind in ("masks", "confidence"):
        for image_id in SIZES:
            whole, tiles = (PREDICTIONS / f"{tag}@holiday/{kind}/{image_id}.png" for tag in ("whole", "tiles"))
            assert whole.read_bytes() == tiles.read_bytes()


@pytest.mark.parametrize("size", [(64, 65), (33, 100), (131, 90)])
def test_network_and_dense_crf_look_at_tiles(model, size):
    """Both means over the tiles are weighted by the product of distances to a tile's ends."""
    picture, settings = photograph(size), how(tile=64, confidence=True)
    with torch.inference_mode():
        network = plain_mean(size, lambda place: probabilities(model, picture[place], VIEWS))
        final = plain_mean(size, lambda place: refined(picture[place], network[place], how()))
    mask, confidence = segment(model, picture, settings)
    assert (mask == final[0].argmax(dim=0).numpy()).mean() > 0.999  # ties
    assert mask.dtype == confidence.dtype == np.uint8
    expected = 255 * values_at(network, torch.from_numpy(mask).long())
    assert np.abs(confidence - expected.numpy()).max() <= 0.5 + 1e-3


def plain_mean(size, predict):
    """Tiles of 64 pixels, one after the other, into a map of the whole."""
    total, weights = 0, torch.zeros(size)
    sides = [min(64, side) for side in size]
    ramps = [torch.tensor([min(i + 1, n - i) for i in range(n)], dtype=torch.float32) for n in sides]
    for top in starts(size[0], sides[0]):
        for left in starts(size[1], sides[1]):
            place = (..., slice(top, top + sides[0]), slice(left, left + sides[1]))
            weight = ramps[0][:, None] * ramps[1]
            total = total + F.pad(weight * predict(place), padding(place, size))
            weights[place] += weight
    return total / weights


def padding(place, size):
    """What `F.pad` adds to a tile to make it the whole."""
    rows, columns = place[1:]
    return columns.start, size[1] - columns.stop, rows.start, size[0] - rows.stop


def starts(length, side):
    number = 1 + -(-(length - side) // (side - side // 4))
    return [0] if number == 1 else [(length - side) * i // (number - 1) for i in range(number)]


def test_tiles_longer_than_the_working_size_are_reduced_and_brought_back(model, monkeypatch):
    monkeypatch.setattr("tools.cam.WORKING_SIDE", 48)
    settings = how(views=options.Views(scales=(1.0,), hflip=False, long_side=(0, 40)), tile=64, confidence=True)
    assert probabilities(model, photograph((64, 60)), settings.views).shape[-2:] == (48, 45)
    assert segment(model, photograph((70, 60)), settings)[0].shape == (70, 60)


def test_masks_with_other_tiles_are_not_taken_for_done(models, holiday, capsys):
    command = [*PREDICT, "--tag", "m", "--weights", models / "segmentation.pth", "--images", holiday]
    run(*command)
    assert "made with --tile None, not 64" in refusal(capsys, *command, "--tile", "64")
    assert "made with --reading argmax, not relative" in refusal(capsys, *command, "--reading", "relative")


def test_nor_are_those_with_other_views_weights_or_photographs(models, holiday, capsys):
    """The other photographs are in a folder of the same name."""
    command = [*PREDICT, "--tag", "m", "--weights", models / "segmentation.pth", "--images", holiday]
    run(*command)
    assert "made with --scales [1.0], not [0.5]" in refusal(capsys, *command, "--scales", "0.5")
    assert "made with --hflip True, not False" in refusal(capsys, *command, "--hflip", "false")
    assert "made with --crf_t 2, not 3" in refusal(capsys, *command, "--crf_t", "3")
    assert "made with --crf_backend torch, not pyd" in refusal(capsys, *command, "--crf_backend", "pydensecrf")
    assert "made with --weights " in refusal(capsys, *command, "--weights", models / "csrm.pth")
    other = shutil.copytree(holiday, holiday.parent / "other" / "holiday")
    assert f"made with --images {holiday}, not {other}." in refusal(capsys, *command, "--images", other)
    shutil.copy(holiday / "b" / "c.png", holiday / "a.png")
    assert "made with other photographs of 1 images, the first is a (" in refusal(capsys, *command)


@pytest.mark.parametrize("size", [(7, 9), (15, 22)])
def test_values_at_an_index_are_those_of_the_enlarged_maps(size):
    maps = torch.rand(1, 4, 7, 9, generator=torch.Generator().manual_seed(0))
    index = enlarged_argmax(maps, size)
    enlarged = resize_maps(maps, size)[0]
    assert torch.equal(values_at(maps, index), enlarged.gather(0, index[None])[0])


def test_overwriting_removes_what_shows_the_old_masks(holiday, models):
    """Overlays and confidences that are not asked for again; and a photograph may be called settings."""
    (holiday / "a.png").rename(holiday / "settings.png")
    command = [*PREDICT, "--tag", "m", "--weights", models / "segmentation.pth", "--images", holiday]
    run(*command, "--save_overlays", "--save_confidence", "--reading", "relative")
    folder = PREDICTIONS / "m@holiday"
    before = (folder / "masks" / "settings.png").read_bytes()
    run(*command, "--reading", "argmax", "--overwrite")
    assert not [*folder.glob("overlays/**/*.jpg"), *folder.glob("confidence/**/*.png")]
    assert (folder / "masks" / "settings.png").read_bytes() != before
