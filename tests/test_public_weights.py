"""Public CAM priors: state dicts with the published names, restored as they are, give the published features.

The names, shapes and blocks are written out here from the papers (ResNet: He et al., CVPR 2016, stride in the 3x3;
ResNeSt: Zhang et al., 2020, average pooling after the split attention), so nothing is compared with timm but by number.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from models import build_model
from models.restore import restore
from tools.errors import UserError

RESNETS = {"resnet50": (3, 4, 6, 3), "resnet101": (3, 4, 23, 3)}
RESNESTS = {  # blocks per stage, width of the stem
    "resnest50d": ((3, 4, 6, 3), 32),
    "resnest101e": ((3, 4, 23, 3), 64),
    "resnest200e": ((3, 24, 36, 3), 64),
    "resnest269e": ((3, 30, 48, 8), 64),
}
TINY = {"resnet26": lambda: resnet_shapes((2, 2, 2, 2)), "resnest26d": lambda: resnest_shapes((2, 2, 2, 2), 32)}


def batch_norm(name: str, channels: int) -> dict[str, tuple]:
    vectors = {f"{name}.{entry}": (channels,) for entry in ("weight", "bias", "running_mean", "running_var")}
    return {**vectors, f"{name}.num_batches_tracked": ()}


def stages(blocks, in_channels: int, block, shortcut: int) -> dict[str, tuple]:
    """The four stages; `block(name, in_channels, width)` names a block, `shortcut` is the index of its projection."""
    shapes: dict[str, tuple] = {}
    for stage, count in enumerate(blocks):
        width = 64 * 2**stage
        for index in range(count):
            name = f"layer{stage + 1}.{index}"
            shapes |= block(name, in_channels, width)
            if index == 0:
                shapes[f"{name}.downsample.{shortcut}.weight"] = (4 * width, in_channels, 1, 1)
                shapes |= batch_norm(f"{name}.downsample.{shortcut + 1}", 4 * width)
            in_channels = 4 * width
    return shapes


def resnet_shapes(blocks) -> dict[str, tuple]:
    def block(name, in_channels, width):
        sizes = ((width, in_channels, 1, 1), (width, width, 3, 3), (4 * width, width, 1, 1))
        convs = {f"{name}.conv{i + 1}.weight": size for i, size in enumerate(sizes)}
        norms = [batch_norm(f"{name}.bn{i + 1}", size[0]) for i, size in enumerate(sizes)]
        return {**convs, **norms[0], **norms[1], **norms[2]}

    return {"conv1.weight": (64, 3, 7, 7), **batch_norm("bn1", 64), **stages(blocks, 64, block, 0)}


def resnest_shapes(blocks, stem: int) -> dict[str, tuple]:
    def block(name, in_channels, width):
        inner = max(width // 2, 32)
        return {
            f"{name}.conv1.weight": (width, in_channels, 1, 1),
            **batch_norm(f"{name}.bn1", width),
            f"{name}.conv2.conv.weight": (2 * width, width // 2, 3, 3),
            **batch_norm(f"{name}.conv2.bn0", 2 * width),
            f"{name}.conv2.fc1.weight": (inner, width, 1, 1),
            f"{name}.conv2.fc1.bias": (inner,),
            **batch_norm(f"{name}.conv2.bn1", inner),
            f"{name}.conv2.fc2.weight": (2 * width, inner, 1, 1),
            f"{name}.conv2.fc2.bias": (2 * width,),
            f"{name}.conv3.weight": (4 * width, width, 1, 1),
            **batch_norm(f"{name}.bn3", 4 * width),
        }

    deep_stem = {"conv1.0.weight": (stem, 3, 3, 3), "conv1.3.weight": (stem, stem, 3, 3)}
    deep_stem |= {
        "conv1.6.weight": (2 * stem, stem, 3, 3),
        **batch_norm("conv1.1", stem),
        **batch_norm("conv1.4", stem),
    }
    return {**deep_stem, **batch_norm("bn1", 2 * stem), **stages(blocks, 2 * stem, block, 1)}


def published(shapes: dict[str, tuple], prefix: str, classes: int = 3, device: str = "cpu") -> dict[str, Tensor]:
    """A prior as it is published: the backbone under `prefix`, and the classifier. Values keep activations moderate."""
    generator = torch.Generator().manual_seed(0)

    def tensor(name: str, shape: tuple) -> Tensor:
        if device == "meta":
            return torch.empty(shape, device=device)
        if name.endswith("num_batches_tracked"):
            return torch.tensor(7)
        if len(shape) == 1:
            low = -0.1 if name.endswith(("bias", "running_mean")) else 0.7
            return low + torch.rand(shape, generator=generator) * (0.2 if low < 0 else 0.6)
        return torch.randn(shape, generator=generator) * (2 / max(1, torch.Size(shape[1:]).numel())) ** 0.5

    state = {f"{prefix}.{name}": tensor(name, shape) for name, shape in shapes.items()}
    return {**state, "classifier.weight": tensor("classifier.weight", (classes, 2048, 1, 1))}


def with_stage_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """As a module that keeps its layers a second time, by stage, saves itself: other names of the same tensors."""
    number = {"conv1": "stage1.0", "bn1": "stage1.1", **{f"layer{i}": f"stage{i + 1}.0" for i in range(1, 5)}}
    for name, tensor in list(state.items()):
        layer, _, rest = name.removeprefix("model.").partition(".")
        if layer in number:
            state[f"{number[layer]}.{rest}"] = tensor
    return state


def build(architecture: str, **arguments):
    torch.manual_seed(0)
    return build_model("classifier", architecture=architecture, num_classes=4, **arguments).eval()


@pytest.mark.parametrize("architecture", [*RESNETS, *RESNESTS])
def test_every_published_name_and_shape_is_ours(architecture):
    """On the meta device: ResNeSt-269 has 110 million weights."""
    if architecture in RESNETS:
        shapes = resnet_shapes(RESNETS[architecture])
    else:
        shapes = resnest_shapes(*RESNESTS[architecture])
    with torch.device("meta"):
        model = build(architecture)
    ours = {name: tuple(t.shape) for name, t in model.backbone.net.state_dict().items()}
    assert ours == shapes
    if architecture == "resnest101e":
        assert len(shapes) == 933


@pytest.mark.parametrize("prefix", ["backbone", "model"])
@pytest.mark.parametrize("architecture", TINY)
def test_published_priors_are_restored_whole(tmp_path, capsys, architecture, prefix):
    shapes = TINY[architecture]()
    state = published(shapes, prefix)
    torch.save(with_stage_names(state) if prefix == "model" else state, tmp_path / "prior.pth")
    model = build(architecture)
    report = restore(model, tmp_path / "prior.pth")
    assert report.missing == [] and report.mismatched == {} and report.unused == []
    assert all(torch.equal(model.state_dict()[f"backbone.net.{n}"], state[f"{prefix}.{n}"]) for n in list(shapes)[::40])
    assert f"restored {len(report.restored)} of {len(report.restored)} tensors" in capsys.readouterr().out


@pytest.mark.parametrize(
    "theirs, ours",
    [
        ("resnet101", "resnet50"),
        ("resnest200e", "resnest101e"),
        ("resnest269e", "resnest200e"),
        ("resnet50", "resnet101"),
    ],
)
def test_a_prior_of_another_depth_is_refused_although_its_blocks_fit(tmp_path, theirs, ours):
    shapes = resnet_shapes(RESNETS[theirs]) if theirs in RESNETS else resnest_shapes(*RESNESTS[theirs])
    state = {name: torch.zeros(()).expand(shape) for name, shape in shapes.items()}
    torch.save({f"model.{name}": tensor for name, tensor in state.items()}, tmp_path / "prior.pth")
    with torch.device("meta"):
        model = build(ours)
    with pytest.raises(UserError, match=r"prior\.pth: .* of (a deeper|another) network\. Check --architecture"):
        restore(model, tmp_path / "prior.pth")


# -- the published stage 4, written out ------------------------------------------------------------------------------
def norm(x: Tensor, state: dict[str, Tensor], name: str) -> Tensor:
    mean, var, weight, bias = (
        state[f"{name}.{entry}"][:, None, None] for entry in ("running_mean", "running_var", "weight", "bias")
    )
    return (x - mean) / (var + 1e-5).sqrt() * weight + bias


def split_attention(x: Tensor, state: dict[str, Tensor], name: str, dilation: int) -> Tensor:
    """Radix 2, cardinality 1: a softmax over the two halves of the channels, from their pooled sum."""
    x = F.conv2d(x, state[f"{name}.conv.weight"], padding=dilation, dilation=dilation, groups=2)
    halves = norm(x, state, f"{name}.bn0").relu().chunk(2, dim=1)
    pooled = (halves[0] + halves[1]).mean(dim=(2, 3), keepdim=True)
    hidden = F.conv2d(pooled, state[f"{name}.fc1.weight"], state[f"{name}.fc1.bias"])
    logits = F.conv2d(norm(hidden, state, f"{name}.bn1").relu(), state[f"{name}.fc2.weight"], state[f"{name}.fc2.bias"])
    weights = torch.stack(logits.chunk(2, dim=1)).softmax(dim=0)
    return weights[0] * halves[0] + weights[1] * halves[1]


def published_resnest_block(x: Tensor, state: dict[str, Tensor], name: str, first: bool) -> Tensor:
    out = norm(F.conv2d(x, state[f"{name}.conv1.weight"]), state, f"{name}.bn1").relu()
    out = split_attention(out, state, f"{name}.conv2", dilation=1 if first else 2)
    shortcut = x
    if first:  # the pooling of a strided block stays at stride 1; the shortcut's has a window of one pixel
        out = F.avg_pool2d(out, 3, stride=1, padding=1)
        shortcut = norm(F.conv2d(x, state[f"{name}.downsample.1.weight"]), state, f"{name}.downsample.2")
    return (norm(F.conv2d(out, state[f"{name}.conv3.weight"]), state, f"{name}.bn3") + shortcut).relu()


def published_resnet_block(x: Tensor, state: dict[str, Tensor], name: str, first: bool) -> Tensor:
    """Of the CAM networks after IRN: stage 4 at stride 1 and without dilation."""
    out = norm(F.conv2d(x, state[f"{name}.conv1.weight"]), state, f"{name}.bn1").relu()
    out = norm(F.conv2d(out, state[f"{name}.conv2.weight"], padding=1), state, f"{name}.bn2").relu()
    shortcut = x
    if first:
        shortcut = norm(F.conv2d(x, state[f"{name}.downsample.0.weight"]), state, f"{name}.downsample.1")
    return (norm(F.conv2d(out, state[f"{name}.conv3.weight"]), state, f"{name}.bn3") + shortcut).relu()


@pytest.mark.parametrize(
    "architecture, block, arguments",
    [("resnest26d", published_resnest_block, {}), ("resnet26", published_resnet_block, {"dilate_stage4": False})],
)
@torch.no_grad()
def test_stage_4_computes_what_the_published_network_does(tmp_path, architecture, block, arguments):
    shapes = TINY[architecture]()
    state = published(shapes, "backbone")
    torch.save(state, tmp_path / "prior.pth")
    model = build(architecture, **arguments)
    restore(model, tmp_path / "prior.pth")
    stage3 = []
    model.backbone.net.layer3.register_forward_hook(lambda module, inputs, output: stage3.append(output))
    x = torch.randn(1, 3, 97, 65, generator=torch.Generator().manual_seed(1))
    outputs = model(x)
    features = stage3[0]
    for index, first in enumerate((True, False)):
        features = block(features, state, f"backbone.layer4.{index}", first)
    torch.testing.assert_close(model.backbone(x)[1], features, rtol=1e-3, atol=1e-4)
    cams = F.conv2d(features, state["classifier.weight"])
    torch.testing.assert_close(outputs["cams"], cams, rtol=1e-3, atol=1e-3)
    assert features.std() > 0.1, "not a comparison of zeros"
