"""Restoring our checkpoints, public priors and timm files under all their names; reports of what did not fit."""

from __future__ import annotations

import argparse
import re
import zipfile
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

from models import Backbone, build_model
from models.config import BackboneConfig
from models.hub import export_safetensors
from models.restore import restore
from tools.errors import UserError
from tools.weights import common_prefix, load_weights


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


def test_a_timm_file_may_have_a_prefix_before_names_that_timm_changes(tmp_path):
    whole = timm.create_model("test_convnext").state_dict()
    torch.save({f"encoder.{name}": value for name, value in whole.items()}, tmp_path / "weights.pth")
    assert restore(backbone_of("test_convnext"), tmp_path / "weights.pth").missing == []


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
        load_weights(tmp_path / name)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", [[1, 2], {}, {"model": {}}, {"epoch": 3}, torch.zeros(3)])
def test_files_without_weights_are_refused(tmp_path, content):
    torch.save(content, tmp_path / "file.pth")
    with pytest.raises(UserError, match=r"file\.pth: holds no weights"):
        load_weights(tmp_path / "file.pth")


def test_a_pickled_object_is_refused_unopened(tmp_path):
    torch.save(nn.Conv2d(1, 1, 1), tmp_path / "module.pth")
    with pytest.raises(UserError, match="not a readable file of weights"):
        load_weights(tmp_path / "module.pth")


def test_missing_files_name_the_file_or_the_flag(tmp_path):
    with pytest.raises(UserError, match=r"none\.pth: no such file"):
        load_weights(tmp_path / "none.pth")
    with pytest.raises(UserError, match="--backbone_weights imagnet: no such file"):
        backbone_of("test_resnet", weights="imagnet")


# -- files of other people -------------------------------------------------------------------------------------------
def beside(**extra):
    return lambda prior: {"model": public_state_dict(prior), **extra}


def prefixed(prefix: str):
    return lambda prior: {prefix + name: value for name, value in prior.state_dict().items()}


FOREIGN = {
    "a namespace": beside(args=argparse.Namespace(lr=0.1, out=Path("x"), seed=np.int64(1))),
    "numpy numbers": beside(best=np.float64(71), history=np.arange(3.0), name=np.str_("a")),
    "an optimiser": beside(optimizer={"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": [{"lr": 0.1}]}),
    "a tensor": beside(best=torch.tensor(71.0)),
    "model_state_dict": lambda prior: {"model_state_dict": public_state_dict(prior), "epoch": 3},
    "net": lambda prior: {"net": prior.state_dict(), "acc": 91.5},
    "two wrappers": lambda prior: {"model": {"state_dict": public_state_dict(prior)}},
    "an unknown wrapper": lambda prior: {"student_weights": public_state_dict(prior), "epoch": 3},
    "compiled": prefixed("_orig_mod."),
    "compiled, data parallel": prefixed("module._orig_mod."),
    "lightning": lambda prior: {"state_dict": {f"model.{k}": v for k, v in prior.state_dict().items()}},
    "compiled inside": lambda prior: {k.replace("net.", "net._orig_mod."): v for k, v in prior.state_dict().items()},
    "sharded inside": lambda prior: {
        k.replace("layer4.", "layer4._fsdp_wrapped_module."): v for k, v in prior.state_dict().items()
    },
    "checkpointed inside": lambda prior: {
        k.replace("layer4.", "layer4._checkpoint_wrapped_module."): v for k, v in prior.state_dict().items()
    },
    "an encoder": lambda prior: {
        k.replace("backbone.net.", "encoder_q."): v for k, v in prior.state_dict().items()
    } | {"queue": torch.ones(3, 4)},
    "parts": lambda prior: {"encoder": prior.backbone.net.state_dict(), "classifier": prior.classifier.state_dict()},
}  # fmt: skip


@pytest.mark.parametrize("kind", FOREIGN)
def test_checkpoints_of_others_are_read_whole(tmp_path, kind):
    prior, model = build("classifier", 0), build("csrm", 1)
    torch.save(FOREIGN[kind](prior), tmp_path / "prior.pth")
    report = restore(model, tmp_path / "prior.pth")
    assert same(model.backbone, prior.backbone) and same(model.classifier, prior.classifier)
    assert {name.partition(".")[0] for name in report.missing} == {"trunk", "segmentation", "representation"}


@pytest.mark.parametrize("entries", ["teacher model model_ema", "model state_dict ema", "state_dict params_ema"])
def test_of_several_entries_with_weights_ours_come_first(tmp_path, entries):
    """Whatever their order in the file."""
    content = {name: {"a": torch.full((2,), index)} for index, name in enumerate(entries.split())}
    torch.save(dict(reversed(content.items())), tmp_path / "file.pth")
    assert load_weights(tmp_path / "file.pth").tensors["a"].tolist() == [0, 0]


def test_a_numpy_number_of_an_older_numpy_is_no_obstacle(tmp_path):
    """NumPy 1 calls `numpy._core` `numpy.core`."""
    prior = build("classifier", 0)
    torch.save({"model": prior.state_dict(), "best": np.float64(71)}, tmp_path / "new.pth")
    with zipfile.ZipFile(tmp_path / "new.pth") as new, zipfile.ZipFile(tmp_path / "old.pth", "w") as old:
        for name in new.namelist():
            old.writestr(name, new.read(name).replace(b"numpy._core.multiarray", b"numpy.core.multiarray"))
    assert load_weights(tmp_path / "old.pth").tensors.keys() == prior.state_dict().keys()


class Bomb:
    def __reduce__(self):
        return (print, ("the bomb went off",))


@pytest.mark.parametrize("content", [Bomb(), {"model": {"a": torch.zeros(1)}, "extra": Bomb()}])
def test_code_in_a_file_is_never_run(tmp_path, capsys, content):
    torch.save(content, tmp_path / "file.pth")
    with pytest.raises(UserError, match=r"file\.pth: not a readable file of weights: it holds Python .*print"):
        load_weights(tmp_path / "file.pth")
    assert capsys.readouterr().out == ""


def test_what_stands_in_for_an_object_keeps_nothing(tmp_path):
    torch.save({"args": argparse.Namespace(lr=1), "a": torch.ones(2)}, tmp_path / "file.pth")
    assert list(load_weights(tmp_path / "file.pth").tensors) == ["a"]
    assert "argparse.Namespace" not in map(str, torch.serialization.get_safe_globals())


@pytest.mark.parametrize("kept", [1, 30, 71])
def test_a_file_that_gives_little_of_the_backbone_is_an_error_and_changes_nothing(tmp_path, kept):
    prior, model = build("classifier", 0), build("csrm", 1)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    names = [name for name in prior.state_dict() if not name.endswith("num_batches_tracked")]
    state = {name: prior.state_dict()[name] for name in names[:kept]}
    torch.save(state | {f"layer9.{i}.weight": torch.zeros(3, 3) for i in range(50)}, tmp_path / "little.pth")
    with pytest.raises(UserError, match=rf"little\.pth: gives {kept} of the 75 tensors of the backbone"):
        restore(model, tmp_path / "little.pth")
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_weights_that_are_not_finite_are_an_error(tmp_path):
    prior = build("classifier", 0)
    prior.classifier.weight.data[0, 0] = float("nan")
    torch.save(prior.state_dict(), tmp_path / "nan.pth")
    with pytest.raises(UserError, match=r"nan\.pth: 1 tensors hold values that are not finite"):
        restore(build("csrm", 1), tmp_path / "nan.pth")


def test_integers_do_not_pass_for_weights(tmp_path):
    prior, model = build("classifier", 0), build("csrm", 1)
    state = prior.state_dict() | {"classifier.weight": torch.ones(3, 96, 1, 1, dtype=torch.int8)}
    torch.save(state, tmp_path / "quantised.pth")
    assert "classifier.weight" in restore(model, tmp_path / "quantised.pth").mismatched


def test_the_prefix_before_most_names_is_the_shortest_of_several():
    """A file may have a network and a second one of the same names, such as a moving average."""
    names = ["average.conv.weight", "average.conv.bias", "conv.weight", "conv.bias", "head.fc.weight"]
    assert common_prefix(names, {"conv.weight", "conv.bias"}) == ""
    assert common_prefix([f"net.{name}" for name in names], {"conv.weight", "conv.bias"}) == "net."
    assert common_prefix(names[:1] + names[4:], {"conv.weight", "conv.bias", "fc.weight", "fc.bias"}) == "head."
    assert common_prefix(names, {"fc.bias"}) == ""


# -- the order of classes ----------------------------------------------------------------------------------------------
ANIMALS = ("background", "cat", "dog", "cow")


def restore_classes(tmp_path, kind: str, ours: tuple[str, ...]):
    source, model = build(kind, 0), build(kind, 1, num_classes=len(ours))
    initial = build(kind, 1, num_classes=len(ours))
    torch.save(wrap_checkpoint(source.state_dict()) | {"classes": list(ANIMALS)}, tmp_path / "prior.pth")
    return source, model, initial, restore(model, tmp_path / "prior.pth", ours)


@pytest.mark.parametrize("ours", [ANIMALS, (*ANIMALS[:1], "dog", "cow", "cat"), ("background", "cow", "cat")])
def test_outputs_go_to_the_class_of_their_name(tmp_path, ours):
    source, model, _, report = restore_classes(tmp_path, "csrm", ours)
    for index, name in enumerate(ours):
        there = ANIMALS.index(name)
        assert torch.equal(model.segmentation[4].weight[index], source.segmentation[4].weight[there])
        assert torch.equal(model.segmentation[4].bias[index], source.segmentation[4].bias[there])
        if index:
            assert torch.equal(model.classifier.weight[index - 1], source.classifier.weight[there - 1])
    assert report.new_classes == report.missing == [] and not report.nameless
    assert ("outputs are matched by class; the file's are cat, dog, cow" in str(report)) == (ours != ANIMALS)


def test_an_export_names_its_classes_in_its_config(tmp_path, capsys):
    source, model, nameless = build("classifier", 0), build("classifier", 1), build("classifier", 1)
    checkpoint = wrap_checkpoint(source.state_dict()) | {"config": source.config, "classes": list(ANIMALS), "args": {}}
    export_safetensors(source, checkpoint, tmp_path)
    report = restore(model, tmp_path / "model.safetensors", ("background", "cow", "cat", "dog"))
    assert torch.equal(model.classifier.weight, source.classifier.weight[[2, 0, 1]])
    assert same(model.backbone, source.backbone) and report.unused == [] and not report.nameless
    assert "outputs are matched by class; the file's are cat, dog, cow" in capsys.readouterr().out
    (tmp_path / "config.json").write_text('{"architectures": ["ResNet"], "num_classes": 3}')  # as others publish it
    assert restore(nameless, tmp_path / "model.safetensors", ANIMALS).nameless and same(nameless, source)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json: not a readable JSON file"):
        load_weights(tmp_path / "model.safetensors")


def test_the_outputs_of_a_class_the_file_has_not_keep_their_initial_values(tmp_path, capsys):
    source, model, initial, report = restore_classes(tmp_path, "classifier", ("background", "zebra", "dog"))
    assert torch.equal(model.classifier.weight[0], initial.classifier.weight[0])
    assert torch.equal(model.classifier.weight[1], source.classifier.weight[1])
    assert report.new_classes == ["zebra"] and "classifier.weight" in report.restored
    assert "keep their initial values, as the file has no such class: zebra\n" in capsys.readouterr().out


def test_outputs_of_other_classes_throughout_are_not_taken(tmp_path, capsys):
    _, model, initial, report = restore_classes(tmp_path, "csrm", ("background", "zebra", "giraffe", "gnu"))
    assert torch.equal(model.classifier.weight, initial.classifier.weight)
    assert torch.equal(model.segmentation[4].bias, initial.segmentation[4].bias)
    assert {"classifier.weight", "segmentation.4.weight", "segmentation.4.bias"} <= set(report.missing)
    assert "as the file has no such class: zebra, giraffe, gnu" in capsys.readouterr().out


def test_outputs_that_do_not_fit_the_files_own_classes_are_not_taken(tmp_path):
    """A program that has no background names as many classes as it has outputs."""
    prior, model, initial = build("classifier", 0), build("csrm", 1), build("csrm", 1)
    torch.save({"model": public_state_dict(prior), "classes": list(ANIMALS[1:])}, tmp_path / "a.pth")
    report = restore(model, tmp_path / "a.pth", ("background", "dog", "cow", "cat"))
    assert torch.equal(model.classifier.weight, initial.classifier.weight) and "classifier.weight" in report.missing


def test_a_file_that_does_not_name_its_classes_is_said_to(tmp_path, capsys):
    torch.save(public_state_dict(build("classifier", 0)), tmp_path / "prior.pth")
    assert restore(build("csrm", 1), tmp_path / "prior.pth", ANIMALS).nameless
    assert "classes: the file does not name its own, so they are taken to be ours" in capsys.readouterr().out
