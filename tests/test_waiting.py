"""Training steps on a GPU that does not exist: PyTorch's fake tensors know shapes and devices, but no values.

So a step runs to its end only if it never asks the host for a value, and mixes no tensors of two devices. What is left
to note down are copies between host and GPU, and shapes that depend on values: for both, a real step would wait.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import train_classifier
import train_csrm
import train_segmentation
from datasets import transforms
from models import build_model
from tools import cli, crf, maps, options
from tools.crf import sums as bags
from tools.ema import Teacher
from tools.options import PRIOR_METHODS
from tools.priors import PriorCriterion

ROOT = Path(train_csrm.__file__).parent
GPU = torch.device("cuda")
NETWORK = ["--architecture", "test_resnet", "--backbone_weights", "none", "--image_size", "97", "--batch_size", "2"]
aten = torch.ops.aten


class Waits(TorchDispatchMode):
    """Files of the project in which a GPU would be waited for."""

    def __init__(self) -> None:
        super().__init__()
        self.places: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is aten.nonzero.default:  # as many as half of the values
            self.note()
            return args[0].new_empty(args[0].numel() // 2, args[0].ndim, dtype=torch.long)
        result = func(*args, **kwargs)
        if func in (aten._to_copy.default, aten.copy_.default):
            devices = {leaf.device.type for leaf in tree_leaves((args, result)) if isinstance(leaf, torch.Tensor)}
            if len(devices) > 1 and not kwargs.get("non_blocking"):
                self.note()
        return result

    def note(self) -> None:
        frame = sys._getframe()
        while frame := frame.f_back:
            path = Path(frame.f_code.co_filename)
            if path.is_relative_to(ROOT) and path.relative_to(ROOT).parts[0] not in ("tests", ".venv"):
                self.places.append(path.relative_to(ROOT).as_posix())
                return


@pytest.fixture(autouse=True)
def _patches(monkeypatch):
    """What a GPU that does not exist cannot do."""
    monkeypatch.setattr(bags, "_kernel", lambda device: bags._embedding_bag)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2**33, 2**33))
    monkeypatch.setattr(torch.Tensor, "backward", backward)
    monkeypatch.setattr(torch, "randperm", np.arange)  # on the CPU, where values are real


@contextlib.contextmanager
def fake_gpu() -> Iterator[Waits]:
    """Tensors made in here are fake; says where a GPU would be waited for."""
    constants = (maps._imagenet_statistics, crf._grid_kernel)
    with warnings.catch_warnings(), FakeTensorMode():
        warnings.filterwarnings("ignore", message=".*CUDA is not available")
        for constant in constants:
            constant.cache_clear()
        maps.normalize(images(1))  # copies the mean colour to the GPU, once and for all
        with Waits() as waits:
            yield waits
    for constant in constants:
        constant.cache_clear()


def can_pretend() -> bool:
    """Whether this PyTorch can copy to a GPU that does not exist; 2.8 cannot."""
    with FakeTensorMode(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            torch.empty(1).to(GPU, non_blocking=True)
        except RuntimeError:
            return False
    return True


pytestmark = pytest.mark.skipif(not can_pretend(), reason="an older PyTorch, which needs a GPU here")


def backward(loss: torch.Tensor) -> None:
    """Gradients of fake tensors on a GPU need a real one: give those that the loss depends on a zero."""
    todo, seen = [loss.grad_fn], set()
    while todo:
        if (node := todo.pop()) is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            node.variable.grad = torch.zeros_like(node.variable)
        todo += [following for following, _ in node.next_functions]


def move(module: nn.Module) -> nn.Module:
    """Replace the weights and buffers of a module, in place, by fake ones on the GPU."""
    for part in module.modules():
        for name, value in part._parameters.items():
            if value is not None:
                fake = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=GPU)
                part._parameters[name] = nn.Parameter(fake, value.requires_grad)
        for name, value in part._buffers.items():
            if value is not None:
                part._buffers[name] = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=GPU)
    return module


def images(count: int) -> torch.Tensor:
    return torch.empty(count, 3, 97, 97, dtype=torch.uint8, device=GPU)


def build(kind: str, parser: cli.Parser, *flags: str) -> tuple[argparse.Namespace, nn.Module]:
    """Arguments of a script, and its network on the CPU."""
    args = parser.parse_args(["--tag", "t", *NETWORK, *flags])
    return args, build_model(kind, num_classes=21, **options.network_arguments(args))


@pytest.mark.parametrize("epoch", [0, 3])
@pytest.mark.parametrize(
    "flags",
    [
        ["--augment", "classmix"],
        ["--augment", "cutmix"],
        ["--augment", "none", "--w_contra", "0"],
        ["--c2s_mode", "mp", "--use_sal_head", "true"],
    ],
    ids=" ".join,
)
def test_csrm(flags, epoch):
    args, student = build("csrm", train_csrm.make_parser(), "--decoder_channels", "32", "--cutmix_prob", "1", *flags)
    teacher, labels = Teacher(student), train_csrm.label_options(args, (args.c2s_bg, args.c2s_fg))
    criterion = train_csrm.Criterion(train_csrm.loss_options(args), num_classes=21, dim=32)
    with fake_gpu() as waits:
        for module in (student, teacher, criterion):
            move(module)
        views = torch.cat([transforms.PhotometricAugmentation()(images(2)), images(2)])
        batch = train_csrm.Batch(views, torch.empty(4, 20, device=GPU), max_classes=2, masks=None)
        losses = train_csrm.train_step(batch, student, teacher, criterion, labels, epoch)
        losses["loss"].backward()
        teacher.update(student, 0.9)
    assert len(losses) == (3 if epoch == 0 else 6 if args.w_contra else 5)
    assert all(loss.shape == () and loss.device.type == "cuda" for loss in losses.values())
    # Only for the number of vertices of a lattice: once over positions, once over positions and colours.
    assert waits.places == ([] if args.c2s_mode == "mp" else ["tools/crf/lattice.py"] * 2)


@pytest.mark.parametrize("method", PRIOR_METHODS)
def test_classifier(method):
    """Without torchvision's mixes, which draw on the CPU, where values are real."""
    _, model = build("classifier", train_classifier.make_parser(), "--mode", "fix")
    _, ordinary = build("classifier", train_classifier.make_parser(), "--mode", "fix")
    opposed = method in ("poc", "pnoc")
    criterion = PriorCriterion(method, label_smoothing=0.1, w_re=4, ordinary=ordinary if opposed else None)
    with fake_gpu() as waits:
        move(model), move(ordinary)
        sample = train_classifier.augmented(images(4), torch.empty(4, 20, device=GPU), ["colorjitter"], 0)
        losses = criterion(model, sample, progress=0.5)
        losses["loss"].backward()
    assert losses["loss"].device.type == "cuda"
    assert not waits.places


def test_segmentation():
    _, model = build("segmentation", train_segmentation.make_parser(), "--decoder_channels", "32")
    with fake_gpu() as waits:
        move(model)
        batch = {"image": images(2).cpu(), "mask": torch.empty(2, 97, 97, dtype=torch.long)}
        waits.places.clear()
        loss = train_segmentation.train_step(model, batch, GPU, label_smoothing=0.1)["loss"]
        loss.backward()
    assert loss.device.type == "cuda"
    assert not waits.places


def test_a_wait_is_seen():
    with fake_gpu() as waits:
        crf.unary_from_labels(torch.empty(1, 4, 4, dtype=torch.long, device=GPU), torch.tensor([3]), channels=3)
    assert waits.places == ["tools/crf/__init__.py"]
