"""Exported models give what PyTorch gives: ONNX at odd sizes, safetensors bit for bit, a hub that is a folder."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path

import command
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import SPLITS
from PIL import Image

from models import build_model, export, hub, load_model
from tools.checkpoint import save_checkpoint
from tools.errors import UserError

CLASSES = ("background", "cat", "dog")
CPU = torch.device("cpu")
MEAN = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
DEVIATION = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)


def checkpoint_of(folder: Path, kind: str, architecture: str = "test_resnet") -> Path:
    torch.manual_seed(0)
    width = {} if kind == "classifier" else {"decoder_channels": 8}
    model = build_model(kind, architecture=architecture, num_classes=3, **width)
    args = {"image_size": 97, "min_image_size": 33, "teacher_labels": "foreground", "dataset": "folder"}
    args |= {"tag": "pets", "masks_dir": "/home/someone/masks"}
    content = {"config": model.config, "classes": CLASSES, "epoch": 3, "args": args, "model": model.state_dict()}
    if kind == "csrm":  # the student's weights must not be what is exported
        content |= {"teacher": model.state_dict(), "model": {k: v * 0 for k, v in model.state_dict().items()}}
    save_checkpoint(folder / f"{kind}.pth", **content)
    return folder / f"{kind}.pth"


def same(first: torch.nn.Module, second: torch.nn.Module) -> bool:
    pairs = zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def run(weights: Path, output: Path, *flags: str) -> None:
    given = ["--tag", "pets", "--weights", str(weights), "--output", str(output), *flags]
    export.main(export.make_parser().parse_args(given))


def photographs(batch: int, height: int, width: int) -> torch.Tensor:
    """Blobs, so that neighbouring pixels mostly have one class."""
    coarse = 255 * torch.rand(batch, 3, 5, 6, generator=torch.Generator().manual_seed(1))
    return F.interpolate(coarse, (height, width), mode="bicubic").clamp(0, 255).to(torch.uint8)


@torch.no_grad()
def by_hand(weights: Path, images: torch.Tensor) -> dict[str, torch.Tensor]:
    """What PyTorch gives for uint8 images, written out: class logits, CAMs and segmentation logits of image size."""
    model, _ = load_model(weights, CPU, ["classifier", "csrm", "segmentation"])
    outputs = model((images.float() / 255 - MEAN) / DEVIATION)
    return {
        name: F.interpolate(maps, images.shape[2:], mode="bilinear", align_corners=True) if maps.ndim == 4 else maps
        for name, maps in outputs.items()
    }


@pytest.fixture
def onnxruntime():
    pytest.importorskip("onnx")
    return pytest.importorskip("onnxruntime")


@pytest.mark.parametrize(
    "kind, given, argmax", [("segmentation", "uint8", "true"), ("csrm", "float32", "false"), ("csrm", "uint8", "true")]
)
def test_onnx_gives_the_classes_of_pytorch_at_odd_sizes(tmp_path, onnxruntime, capsys, kind, given, argmax):
    weights = checkpoint_of(tmp_path, kind)
    run(weights, tmp_path / "out", "--input", given, "--argmax", argmax)
    assert "agree on 100.00 %" in capsys.readouterr().out
    session = onnxruntime.InferenceSession(str(tmp_path / "out/model.onnx"), providers=["CPUExecutionProvider"])
    for size in ((1, 75, 102), (3, 33, 47), (1, 129, 65)):
        images = photographs(*size)
        logits = by_hand(weights, images)["seg_logits"]
        fed = images if given == "uint8" else (images.float() / 255 - MEAN) / DEVIATION
        (output,) = session.run(None, {"images": fed.numpy()})
        classes = output if argmax == "true" else output.argmax(axis=1)
        assert output.dtype == (np.uint8 if argmax == "true" else np.float32)
        assert (classes == logits.argmax(dim=1).numpy()).mean() >= 0.999
        assert len(np.unique(classes)) > 1, "not a comparison of one class"
        if argmax == "false":
            np.testing.assert_allclose(output, logits.numpy(), rtol=1e-3, atol=1e-3)


def test_onnx_of_a_classifier_gives_logits_and_cams(tmp_path, onnxruntime):
    weights, images = checkpoint_of(tmp_path, "classifier"), photographs(2, 75, 50)
    run(weights, tmp_path / "out")
    session = onnxruntime.InferenceSession(str(tmp_path / "out/model.onnx"), providers=["CPUExecutionProvider"])
    outputs = session.run(["class_logits", "cams"], {"images": images.numpy()})
    expected = by_hand(weights, images)
    np.testing.assert_allclose(outputs[0], expected["class_logits"].numpy(), rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(outputs[1], expected["cams"].numpy(), rtol=1e-3, atol=1e-3)
    metadata = {name: json.loads(value) for name, value in session.get_modelmeta().custom_metadata_map.items()}
    assert metadata["classes"] == list(CLASSES) and metadata["args"]["image_size"] == 97


@pytest.mark.parametrize(
    "size, seen, turn", [((230, 150), (97, 65), 1), ((24, 15), (33, 17), 1), ((24, 15), (33, 17), 6)]
)
def test_the_example_of_the_docs_runs(tmp_path, onnxruntime, monkeypatch, size, seen, turn):
    """Also for a photograph that is smaller than those of the training, and for one that its EXIF block turns."""
    text = (Path(__file__).parents[1] / "docs/export.md").read_text(encoding="utf-8")
    example = re.search(r"```python\n(.+?)```", text, re.DOTALL)[1]
    weights = checkpoint_of(tmp_path, "segmentation")
    run(weights, tmp_path)
    photo, exif = Image.fromarray(photographs(1, *size[::-1])[0].permute(1, 2, 0).numpy()), Image.Exif()
    exif[0x112] = turn
    stored = photo.transpose(Image.Transpose.ROTATE_90) if turn == 6 else photo  # counter-clockwise, what 6 undoes
    stored.save(tmp_path / "photo.png", exif=exif)
    monkeypatch.chdir(tmp_path)
    exec(example.replace("photo.jpg", "photo.png"), {})
    view = torch.from_numpy(np.array(photo.resize(seen))).permute(2, 0, 1)[None]
    small = by_hand(weights, view)["seg_logits"].argmax(dim=1)[0].numpy().astype(np.uint8)
    expected = np.asarray(Image.fromarray(small).resize(size, Image.Resampling.NEAREST))
    mask = np.asarray(Image.open("mask.png"))
    assert mask.shape == size[::-1] and (mask == expected).mean() >= 0.999


def test_a_graph_that_disagrees_at_one_size_is_not_written(tmp_path, onnxruntime, monkeypatch):
    weights, shares = checkpoint_of(tmp_path, "segmentation"), iter([1.0, 0.985, 1.0])
    monkeypatch.setattr(export, "_equal", lambda ours, theirs: next(shares))
    with pytest.raises(UserError, match=r"model\.onnx: not written, onnxruntime gives 1\.50 % of the pixels") as error:
        run(weights, tmp_path / "out")
    assert "\n" not in str(error.value) and not list((tmp_path / "out").iterdir())


def test_an_output_of_another_shape_is_not_equal():
    assert export._equal(torch.zeros(1, 4, 4), torch.zeros(1, 4, 5)) == 0
    assert export._equal(torch.tensor([[[1, 2, 0, 0]]]), torch.tensor([[[1, 2, 0, 1]]])) == 0.75


def test_a_network_that_cannot_be_exported_is_one_line(tmp_path, onnxruntime):
    weights = checkpoint_of(tmp_path, "segmentation", "test_vit")
    with pytest.raises(UserError, match="test_vit cannot be exported .*Use --format safetensors") as error:
        run(weights, tmp_path / "out")
    assert "\n" not in str(error.value) and not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize("package", ["onnx", "onnxruntime"])
def test_a_missing_package_is_one_line_with_its_command(tmp_path, monkeypatch, package):
    weights = checkpoint_of(tmp_path, "segmentation")
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match="pip install onnx onnxruntime$"):
        run(weights, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["classifier", "csrm", "segmentation"])
def test_safetensors_are_a_checkpoint(tmp_path, kind):
    weights = checkpoint_of(tmp_path, kind)
    run(weights, tmp_path / "out", "--format", "safetensors")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"model.safetensors", "config.json"}
    before, _ = load_model(weights, CPU, [kind])
    after, checkpoint = load_model(tmp_path / "out/model.safetensors", CPU, [kind])
    assert before.state_dict().keys() == after.state_dict().keys() and before.config == after.config
    assert all(
        torch.equal(a, b) for a, b in zip(before.state_dict().values(), after.state_dict().values(), strict=True)
    )
    assert checkpoint["classes"] == list(CLASSES) and checkpoint["args"]["image_size"] == 97
    assert "/home" not in (tmp_path / "out/config.json").read_text()


PREDICT = {
    "classifier": ["inference"],
    "csrm": ["inference", "--save_masks", "--pseudos_from", "masks"],
    "segmentation": ["train_segmentation", "--predict", "--save_confidence"],
}
PREDICT_FLAGS = ["--tag", "t", "--domain", "train", "--scales", 1, "--crf_t", 1, "--device", "cpu", "--num_workers", 0]


@pytest.mark.parametrize("kind", PREDICT)
def test_an_export_predicts_what_the_checkpoint_does(tmp_path, folder, folder_root, kind):
    weights, made = checkpoint_of(tmp_path, kind), []
    run(weights, tmp_path / "out", "--format", "safetensors")
    for name, file in (("before", weights), ("after", tmp_path / "out/model.safetensors")):
        folder(name)
        script, *flags = PREDICT[kind]
        command.run(script, *command.data_flags(folder_root), *PREDICT_FLAGS, *flags, "--weights", file)
        files = (path for path in Path("experiments").rglob("*") if path.stem in SPLITS["train"])
        made.append({path: path.read_bytes() for path in files})
    assert made[0] == made[1] and len(made[0]) == len(SPLITS["train"]) * (3 if kind == "csrm" else 2)


@pytest.mark.parametrize("kind", PREDICT)
def test_an_export_of_an_earlier_version_is_refused_in_one_line(tmp_path, folder, folder_root, capsys, kind):
    run(checkpoint_of(tmp_path, kind), tmp_path / "out", "--format", "safetensors")
    config = json.loads((tmp_path / "out/config.json").read_text())
    config["args"] = {name: config["args"][name] for name in ("image_size", "dataset", "tag")}
    (tmp_path / "out/config.json").write_text(json.dumps(config))
    folder("predict")
    script, *flags = PREDICT[kind]
    flags = [*command.data_flags(folder_root), *PREDICT_FLAGS, *flags, "--weights", tmp_path / "out/model.safetensors"]
    line = command.refusal(capsys, script, *flags)
    assert f"--weights {flags[-1]}: does not say --min_image_size of its training. Export it again." in line


@pytest.mark.parametrize("damage, message", [("config.json", "config.json: missing"), ("model", "not a readable")])
def test_half_an_export_is_refused_in_one_line(tmp_path, damage, message):
    run(checkpoint_of(tmp_path, "classifier"), tmp_path, "--format", "safetensors")
    if damage == "model":
        (tmp_path / "model.safetensors").write_bytes((tmp_path / "model.safetensors").read_bytes()[:1000])
    else:
        (tmp_path / damage).unlink()
    with pytest.raises(UserError, match=message) as error:
        load_model(tmp_path / "model.safetensors", CPU, ["classifier"])
    assert "\n" not in str(error.value)


@pytest.fixture
def folder_as_hub(tmp_path, monkeypatch) -> Path:
    """The hub's API, with repositories that are folders: nothing of this is sent anywhere."""
    huggingface_hub = pytest.importorskip("huggingface_hub")
    root = tmp_path / "hub"

    class Api:
        def create_repo(self, repo_id, *, exist_ok):
            if repo_id.startswith("them/"):
                raise OSError("403 Forbidden: not yours.\nRequest ID: 1")
            (root / repo_id).mkdir(parents=True, exist_ok=exist_ok)
            return f"https://hub/{repo_id}"

        def upload_folder(self, *, repo_id, folder_path, allow_patterns):
            for name in allow_patterns:
                shutil.copy(Path(folder_path) / name, root / repo_id)

    def snapshot_download(repo_id, *, revision, allow_patterns):
        place = root / (repo_id if revision is None else f"{repo_id}@{revision}")
        if not place.is_dir():
            raise OSError("404")
        return str(place)

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return root


def test_what_is_pushed_can_be_downloaded(tmp_path, folder_as_hub, capsys):
    weights, out = checkpoint_of(tmp_path, "csrm"), tmp_path / "out"
    scores = {"miou": 61.25, "miou_foreground": 42.54, "threshold": None, "iou": {"background": 80.0, "cat": 42.54}}
    (tmp_path / "val.json").write_text(json.dumps(scores))
    run(weights, out, "--format", "hub", "--push", "me/pets", "--scores", str(tmp_path / "val.json"))
    assert "uploaded to https://hub/me/pets" in capsys.readouterr().out
    assert {path.name for path in (folder_as_hub / "me/pets").iterdir()} == set(hub.FILES)
    before, after = (load_model(path, CPU, ["csrm"])[0] for path in (weights, hub.download("me/pets")))
    assert all(
        torch.equal(a, b) for a, b in zip(before.state_dict().values(), after.state_dict().values(), strict=True)
    )
    card = (folder_as_hub / "me/pets/README.md").read_text()
    for line in ("# me/pets", "* Classes: background, cat, dog", "| cat | 42.5 |", "| **mean** | 61.2 |", "## Licence"):
        assert f"\n{line}\n" in card
    assert card.startswith("---\n") and "`test_resnet`" in card and "folder" in card
    assert "output stride 16, 3 epochs, images of 97 pixels" in card
    shutil.copytree(folder_as_hub / "me/pets", folder_as_hub / "me/pets@v1")
    assert hub.download("me/pets", "v1") == folder_as_hub / "me/pets@v1/model.safetensors"
    names = {}
    exec(
        "\n".join(line.strip() for line in card.splitlines() if line.startswith("    ")), names
    )  # what it tells to type
    assert names["model"].config == load_model(weights, CPU, ["csrm"])[0].config


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--format", "hub", "--push", "them/pets"], r"--push them/pets: 403 Forbidden: not yours\. Log in"),
        (
            ["--format", "hub", "--scores", "none.json"],
            "none.json: no such JSON file. Write it with evaluate.py --output.",
        ),
        (["--format", "safetensors", "--push", "me/pets"], "--scores / --push: of --format hub only"),
        (["--format", "hub", "--argmax", "false"], "--input / --argmax: of --format onnx only"),
    ],
)
def test_mistakes_are_answered_in_one_line(tmp_path, folder_as_hub, flags, message):
    with pytest.raises(UserError, match=message) as error:
        run(checkpoint_of(tmp_path, "classifier"), tmp_path / "out", *flags)
    assert "\n" not in str(error.value)


def test_a_repository_that_does_not_exist_is_one_line(folder_as_hub):
    with pytest.raises(UserError, match="me/none: could not be downloaded"):
        hub.download("me/none")


def test_the_card_says_what_the_scores_are_of(tmp_path):
    """Those of CAMs on training images are not those of masks on new ones, and a class that never occurs has none."""
    scores = {"miou": 40.0, "miou_foreground": 20.0, "iou": {"background": 80.0, "cat": 40.0, "dog": 0.0}}
    scores |= {"threshold": 0.25, "domain": "train", "images": 12, "absent": ["dog"]}
    (tmp_path / "cams.json").write_text(json.dumps(scores))
    run(checkpoint_of(tmp_path, "csrm"), tmp_path / "out", "--format", "hub", "--scores", str(tmp_path / "cams.json"))
    card = (tmp_path / "out/README.md").read_text()
    for line in ("Of 12 images of the split 'train', CAMs cut at 0.25.", "| cat | 40.0 |", "| dog | – |"):
        assert f"\n{line}\n" in card
    assert "\n| **mean** (– counts as 0) | 40.0 |\n" in card


def test_without_scores_the_card_has_no_table(tmp_path, folder_as_hub):
    run(checkpoint_of(tmp_path, "segmentation"), tmp_path / "out", "--format", "hub")
    card = (tmp_path / "out/README.md").read_text()
    assert "Scores" not in card and not folder_as_hub.exists()
    assert 'download("OWNER/NAME")' in card  # nobody knows yet where it will be
