"""Checkpoints: a model comes back as it was, from the file alone; anything else is refused in one line."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from models import build_model, load_model
from tools.checkpoint import VERSION, load_checkpoint, save_checkpoint
from tools.errors import UserError

CPU = torch.device("cpu")
CLASSES = ["background", "cat", "dog"]
KINDS = ["classifier", "csrm", "segmentation"]


def build(kind: str, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    width = {} if kind == "classifier" else {"decoder_channels": 8, "dropout": 0.2}
    return build_model(kind, architecture="test_resnet", num_classes=3, batch_norm="fix", trainable_stem=False, **width)


def save(path, model: nn.Module, **more) -> None:
    save_checkpoint(path, config=model.config, model=model.state_dict(), classes=CLASSES, epoch=1, **more)


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_comes_back_from_the_file_alone(tmp_path, kind):
    model = build(kind).eval()
    save(tmp_path / "a.pth", model)
    loaded, checkpoint = load_model(tmp_path / "a.pth", CPU, KINDS)
    assert loaded.config == model.config and not loaded.training
    assert checkpoint["version"] == VERSION and checkpoint["classes"] == CLASSES
    images = torch.randn(1, 3, 33, 40)
    with torch.no_grad():
        for name, value in model(images).items():
            torch.testing.assert_close(loaded(images)[name], value)


def test_of_csrm_the_teacher_is_used(tmp_path):
    student, teacher = build("csrm", 0), build("csrm", 1)
    save(tmp_path / "a.pth", student, teacher=teacher.state_dict())
    loaded, _ = load_model(tmp_path / "a.pth", CPU, ["csrm"])
    assert torch.equal(loaded.classifier.weight, teacher.classifier.weight)


def test_the_checkpoint_before_stays_under_another_name(tmp_path):
    for epoch in (1, 2, 3):
        save_checkpoint(tmp_path / "a.v2.pth", epoch=epoch)
    left = {path.name: torch.load(path, weights_only=True)["epoch"] for path in tmp_path.iterdir()}
    assert left == {"a.v2.pth": 3, "a.v2.previous.pth": 2}


def test_equal_content_gives_equal_bytes(tmp_path):
    for name in ("a.pth", "b.pth"):
        save(tmp_path / name, build("csrm"))
    assert (tmp_path / "a.pth").read_bytes() == (tmp_path / "b.pth").read_bytes()


@pytest.mark.parametrize("kind, wanted", [("segmentation", ["classifier", "csrm"]), ("classifier", ["segmentation"])])
def test_a_model_of_another_kind_is_refused(tmp_path, kind, wanted):
    save(tmp_path / "a.pth", build(kind))
    with pytest.raises(UserError, match=rf"a\.pth: a {kind} model, but this needs one of: {', '.join(wanted)}\."):
        load_model(tmp_path / "a.pth", CPU, wanted)


def test_weights_of_another_shape_are_refused(tmp_path):
    model = build("csrm")
    config = {**model.config, "decoder_channels": 16}
    save_checkpoint(tmp_path / "a.pth", config=config, model=model.state_dict(), classes=CLASSES, epoch=1)
    with pytest.raises(UserError, match=r"a\.pth: its weights do not fit its architecture") as error:
        load_model(tmp_path / "a.pth", CPU, KINDS)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("damage", ["text", "empty", "cut", "middle", "folder"])
def test_unreadable_files(tmp_path, damage):
    path = tmp_path / "a.pth"
    save(path, build("classifier"))
    whole = path.read_bytes()
    middle = whole[: len(whole) // 2] + whole[len(whole) // 2 + 100 :]
    if damage == "folder":
        path = tmp_path
    else:
        path.write_bytes({"text": b"<html>404</html>", "empty": b"", "cut": whole[:5000], "middle": middle}[damage])
    with pytest.raises(UserError, match="not a readable checkpoint") as error:
        load_checkpoint(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", [[1], {}, {"config": {}}, {"weight": torch.zeros(2)}], ids=str)
def test_files_of_others(tmp_path, content):
    torch.save(content, tmp_path / "a.pth")
    with pytest.raises(UserError, match=r"a\.pth: bare weights, not a checkpoint of this project"):
        load_checkpoint(tmp_path / "a.pth")


def test_code_in_a_file_is_never_run(tmp_path):
    torch.save({"config": print, "model": {}, "classes": [], "epoch": 1}, tmp_path / "a.pth")
    with pytest.raises(UserError, match="not a readable checkpoint"):
        load_checkpoint(tmp_path / "a.pth")
