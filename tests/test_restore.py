"""Restoring our checkpoints, public priors and timm files under all their names; reports of what did not fit."""

from __future__ import annotations

import re

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

from models import Backbone, build_model
from models.config import BackboneConfig
from models.restore import load_state_dict, restore
from tools.errors import UserError


def build(kind: str, seed: int, architecture: str = "test_resnet", num_classes: int = 4) -> nn.Module:
    torch.manual_seed(seed)
    width = {} if kind == "classifier" else {"decoder_channels": 8}
    return build_model(kind, architecture=architecture, num_classes=num_classes, **width)


def backbone_of(architecture: str, weights: str = "none") -> Backbone:
    return Backbone(BackboneConfig(architecture=architecture), weights)


def same(first: nn.Module, second: nn.Module) -> bool:
    pairs = zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def public_state_dict(model: nn.Module) -> dict[str, torch.Tensor]:
    """The names of Puzzle-CAM and P-NOC checkpoints: `backbone.*`, `classifier.weight`."""
    return {name.replace("backbone.net.", "backbone."): value for name, value in model.state_dict().items()}


def wrap_checkpoint(state):
    return {"model": state, "config": {"kind": "classifier"}, "classes": ["background", "a"], "epoch": 3}


@pytest.mark.parametrize(
    "published",
    [
        lambda prior: wrap_checkpoint(prior.state_dict()),
        public_state_dict,
        lambda prior: {"state_dict": {f"module.{k}": v for k, v in public_state_dict(prior).items()}},
    ],
    ids=["our checkpoint", "public prior", "public prior, data parallel"],
)
def test_a_cam_prior_gives_csrm_its_backbone_and_classifier(tmp_path, capsys, published):
    prior, model = build("classifier", 0), build("csrm", 1)
    trunk = {name: value.clone() for name, value in model.trunk.state_dict().items()}
    torch.save(published(prior), tmp_path / "prior.pth")
    report = restore(model, tmp_path / "prior.pth")
    assert same(model.backbone, prior.backbone) and same(model.classifier, prior.classifier)
    assert all(torch.equal(trunk[name], value) for name, value in model.trunk.state_dict().items())
    assert report.unused == [] and report.mismatched == {}
    assert {name.partition(".")[0] for name in report.missing} == {"trunk", "segmentation", "representation"}
    printed = capsys.readouterr().out
    assert "classifier 1" in printed and "keep their initial values: trunk" in printed


@pytest.mark.parametrize("architecture", ["test_resnet", "mobilenetv2_035", "test_convnext", "test_vit", "pvt_v2_b0"])
@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_a_timm_file_gives_the_whole_backbone(tmp_path, architecture, suffix):
    """test_convnext: timm calls a stage `stages.0` in the network and `stages_0` in its features."""
    torch.manual_seed(0)
    whole = timm.create_model(architecture)
    half = {k: v.half() if v.is_floating_point() else v for k, v in whole.state_dict().items()}  # a smaller file
    file = tmp_path / f"weights.{suffix}"
    torch.save(half, file) if suffix == "pth" else save_file(half, file)
    backbone = backbone_of(architecture, weights=str(file))
    torch.testing.assert_close(
        backbone.state_dict()[next(iter(backbone.state_dict()))], next(iter(half.values())).float()
    )
    report = restore(backbone_of(architecture), file)
    assert report.missing == [] and report.mismatched == {}
    assert any(name.startswith(("fc.", "classifier.", "head.")) for name in report.unused)
    assert all(p.dtype == torch.float32 for p in backbone.parameters())


def test_a_csrm_checkpoint_serves_as_backbone_weights(tmp_path):
    model = build("csrm", 0)
    torch.save(wrap_checkpoint(model.state_dict()), tmp_path / "csrm.pth")
    assert same(backbone_of("test_resnet", weights=str(tmp_path / "csrm.pth")), model.backbone)


def test_a_classifier_of_other_classes_keeps_its_initial_value_and_says_so(tmp_path, capsys):
    prior, model = build("classifier", 0, num_classes=21), build("csrm", 1)
    initial = model.classifier.weight.clone()
    torch.save(public_state_dict(prior), tmp_path / "prior.pth")
    report = restore(model, tmp_path / "prior.pth")
    assert report.mismatched == {"classifier.weight": ((20, 96, 1, 1), (3, 96, 1, 1))}
    assert torch.equal(model.classifier.weight, initial) and same(model.backbone, prior.backbone)
    assert "classifier.weight, [20, 96, 1, 1] in the file but [3, 96, 1, 1] in the model" in capsys.readouterr().out


def test_the_report_counts_every_tensor_once(tmp_path):
    prior, model = build("classifier", 0, num_classes=21), build("csrm", 1)
    torch.save({**public_state_dict(prior), "extra.weight": torch.zeros(2)}, tmp_path / "prior.pth")
    report = restore(model, tmp_path / "prior.pth")
    ours = {name for name in model.state_dict() if not name.endswith("num_batches_tracked")}
    assert sorted([*report.restored, *report.missing, *report.mismatched]) == sorted(ours)
    assert report.unused == ["extra.weight"]
    assert int(re.search(r"restored (\d+) of", str(report))[1]) == len(report.restored)


def test_weights_that_fit_nowhere_are_an_error_and_change_nothing(tmp_path):
    other, model = build("classifier", 0, "mobilenetv2_035"), build("classifier", 1)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = {name: value for name, value in other.state_dict().items() if "bn1" not in name}
    torch.save(state, tmp_path / "other.pth")
    with pytest.raises(UserError, match=r"other\.pth: none of its \d+ tensors fits") as error:
        restore(model, tmp_path / "other.pth")
    assert "\n" not in str(error.value)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize("name", ["text.pth", "empty.pth", "cut.pth", "bad.safetensors"])
def test_unreadable_files_are_answered_in_one_line(tmp_path, name):
    torch.save(build("classifier", 0).state_dict(), tmp_path / "whole.pth")
    content = {"text.pth": b"<html>404</html>", "empty.pth": b"", "bad.safetensors": b"\xff" * 20}
    (tmp_path / name).write_bytes(content.get(name, (tmp_path / "whole.pth").read_bytes()[:5000]))
    with pytest.raises(UserError, match=f"{name}: not a readable file of weights") as error:
        load_state_dict(tmp_path / name)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", [[1, 2], {}, {"model": {}}, {"epoch": 3}, torch.zeros(3)])
def test_files_without_weights_are_refused(tmp_path, content):
    torch.save(content, tmp_path / "file.pth")
    with pytest.raises(UserError, match=r"file\.pth: holds no weights"):
        load_state_dict(tmp_path / "file.pth")


def test_a_pickled_object_is_refused_unopened(tmp_path):
    torch.save(nn.Conv2d(1, 1, 1), tmp_path / "module.pth")
    with pytest.raises(UserError, match="not a readable file of weights"):
        load_state_dict(tmp_path / "module.pth")


def test_missing_files_name_the_file_or_the_flag(tmp_path):
    with pytest.raises(UserError, match=r"none\.pth: no such file"):
        load_state_dict(tmp_path / "none.pth")
    with pytest.raises(UserError, match="--backbone_weights imagnet: no such file"):
        backbone_of("test_resnet", weights="imagnet")
