"""Networks: shapes at awkward sizes, strides, what is frozen, what is new, and rebuilding from the config."""

from __future__ import annotations

import copy
import json
import math

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from timm.layers import convert_sync_batchnorm
from torch import nn

from benchmarks import backbones
from models import Backbone, build_model
from models.config import BackboneConfig, DecoderConfig
from models.layers import ASPP
from tools.cam import multi_scale_cams
from tools.errors import UserError
from tools.optim import parameter_groups
from tools.options import Optimization, Views

KINDS = ("classifier", "csrm", "segmentation")
FAMILIES = ("test_resnet", "mobilenetv2_035", "test_convnext", "test_byobnet")  # four ways in which timm takes features
FIXED_STRIDE = {"test_vit": (16, 16), "test_mambaout": (4, 32), "pvt_v2_b0": (4, 32)}  # (low-level, output) stride


def build(kind: str, architecture: str = "test_resnet", **arguments) -> nn.Module:
    torch.manual_seed(0)
    width = {} if kind == "classifier" else {"decoder_channels": 8}
    return build_model(kind, **{"architecture": architecture, "num_classes": 4, **width, **arguments})


def backbone_of(architecture: str, weights: str = "none", **options) -> Backbone:
    return Backbone(BackboneConfig(architecture=architecture, **options), weights)


def images(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def convolutions(module: nn.Module) -> list[nn.Conv2d]:
    return [layer for layer in module.modules() if isinstance(layer, nn.Conv2d)]


def backward(model: nn.Module, x: torch.Tensor) -> None:
    sum(output.square().mean() for output in model(x).values()).backward()


@pytest.mark.parametrize("batch, height, width", [(1, 97, 131), (2, 64, 64), (1, 33, 160)])
def test_csrm_output_shapes(batch, height, width):
    outputs = build("csrm", use_sal_head=True).train()(images(batch, 3, height, width))
    coarse, fine = [(batch, c, math.ceil(height / s), math.ceil(width / s)) for c, s in ((3, 16), (4, 4))]
    assert outputs["class_logits"].shape == (batch, 3)
    assert outputs["cams"].shape == coarse
    assert outputs["seg_logits"].shape == fine
    assert outputs["representations"].shape == (batch, 8, *fine[2:])
    assert outputs["saliency"].shape == (batch, 1, *fine[2:])


@pytest.mark.parametrize("kind, names", [("classifier", {"class_logits", "cams"}), ("segmentation", {"seg_logits"})])
def test_outputs_of_the_other_networks(kind, names):
    outputs = build(kind).train()(images(1, 3, 49, 35))
    assert set(outputs) == names
    assert all(output.isfinite().all() for output in outputs.values())


def test_csrm_computes_only_what_is_asked_for():
    model, x = build("csrm").eval(), images(1, 3, 48, 48)
    everything = model(x)
    without_representations = model(x, representations=False)
    assert set(everything) == {"class_logits", "cams", "seg_logits", "representations"}
    assert set(without_representations) == set(everything) - {"representations"}
    assert set(model(x, segmented=0)) == {"class_logits", "cams"}
    assert set(build("csrm", use_rep_head=False)(x)) == {"class_logits", "cams", "seg_logits"}
    torch.testing.assert_close(without_representations["seg_logits"], everything["seg_logits"])


def test_csrm_segments_the_first_images_only():
    model, x = build("csrm").eval(), images(3, 3, 48, 48)
    everything, first = model(x), model(x, segmented=2)
    for name, maps in everything.items():
        wanted = maps[:2] if name in ("seg_logits", "representations") else maps
        torch.testing.assert_close(first[name], wanted)


@pytest.mark.parametrize("kind", ["classifier", "csrm"])
def test_class_logits_are_the_means_of_the_cams(kind):
    model, x = build(kind).eval(), images(2, 3, 50, 70)
    outputs = model(x)
    torch.testing.assert_close(outputs["class_logits"], outputs["cams"].flatten(2).mean(2))
    model.classifier.weight.data.neg_()
    torch.testing.assert_close(model(x)["cams"], -outputs["cams"])  # signed, and without a bias


# -- backbone -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("output_stride", [8, 16])
@pytest.mark.parametrize("architecture", FAMILIES)
def test_backbone_strides_and_channels(architecture, output_stride):
    backbone = backbone_of(architecture, output_stride=output_stride)
    low, high = backbone(images(1, 3, 64, 96))
    assert low.shape == (1, backbone.low_channels, 16, 24)
    assert high.shape == (1, backbone.channels, 64 // output_stride, 96 // output_stride)


def test_dilation_replaces_the_stride_of_the_last_stage_and_nothing_else():
    torch.manual_seed(0)
    plain = timm.create_model("test_resnet", features_only=True)
    dilated = backbone_of("test_resnet", output_stride=16)
    dilated.net.load_state_dict(plain.state_dict())
    x = images(1, 3, 64, 64)
    torch.testing.assert_close(dilated.eval()(x)[0], plain.eval()(x)[1])
    assert {conv.dilation for conv in convolutions(dilated.net.layer4) if conv.kernel_size == (3, 3)} <= {
        (1, 1),
        (2, 2),
    }
    assert all(conv.stride == (1, 1) for conv in convolutions(dilated.net.layer4))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("architecture", [*FAMILIES, *FIXED_STRIDE])
def test_every_trainable_parameter_gets_a_gradient(kind, architecture):
    """But for the head that timm before 1.0.31 leaves to MambaOut."""
    model = build(kind, architecture).train()
    backward(model, images(2, 3, 64, 64))
    without = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert [name for name in without if not name.startswith("backbone.net.head.")] == []


@pytest.mark.parametrize("architecture", FAMILIES)
def test_frozen_parts_get_no_gradient_and_keep_their_statistics(architecture):
    model = build("csrm", architecture, batch_norm="fix", trainable_stem=False)
    model = copy.deepcopy(model).eval().train()  # as the teacher is made, and as validation leaves it
    before = copy.deepcopy(model.backbone.state_dict())
    backward(model, images(2, 3, 64, 64))
    assert not any(norm.training for norm in model.modules() if isinstance(norm, nn.BatchNorm2d))
    assert all(torch.equal(before[name], value) for name, value in model.backbone.state_dict().items())
    norms = [p for m in model.backbone.modules() if isinstance(m, nn.BatchNorm2d) for p in m.parameters()]
    first, last = convolutions(model.backbone)[0], convolutions(model.backbone)[-1]
    assert first.weight.grad is None and all(p.grad is None for p in norms)
    assert last.weight.grad is not None
    assert model.trunk.training and model.trunk.aspp.project[1].training  # dropout of the new layers stays on


def test_frozen_statistics_do_not_move_in_a_new_network_either():
    """Before anybody has called `.train()`."""
    backbone = backbone_of("test_resnet", batch_norm="fix", trainable_stem=False)
    before = copy.deepcopy(backbone.state_dict())
    backbone(images(2, 3, 64, 64))
    assert all(torch.equal(before[name], value) for name, value in backbone.state_dict().items())


def test_frozen_batch_norm_stays_frozen_where_processes_share_it():
    backbone = convert_sync_batchnorm(backbone_of("test_resnet", batch_norm="fix")).train()
    norms = [m for m in backbone.modules() if isinstance(m, nn.SyncBatchNorm)]
    assert norms and not any(norm.training for norm in norms)


def test_batch_norm_is_trained_where_it_is_asked_for():
    backbone = backbone_of("test_resnet", trainable_stem=False).train()
    before = copy.deepcopy(backbone.state_dict())
    backbone(images(2, 3, 64, 64))
    moved = {name for name, value in backbone.state_dict().items() if not torch.equal(before[name], value)}
    assert any(name.startswith("net.layer1") and name.endswith("running_mean") for name in moved)
    assert not any(name.startswith(("net.conv1", "net.bn1")) for name in moved)  # the frozen stem's stay


@pytest.mark.parametrize(
    "switch, frozen", [("trainable_stem", "conv1 bn1"), ("trainable_stage4", "layer4"), ("trainable_backbone", "*")]
)
def test_switches_freeze_their_part(switch, frozen):
    backbone = backbone_of("test_resnet", **{switch: False})
    expected = {name for name, _ in backbone.net.named_children() if name in frozen.split() or frozen == "*"}
    of = {trainable: set() for trainable in (True, False)}
    for name, parameter in backbone.net.named_parameters():
        of[parameter.requires_grad].add(name.partition(".")[0])
    assert of[False] == expected & (of[True] | of[False]) and of[True].isdisjoint(of[False])


def test_stage_4_can_be_left_undilated():
    layers = backbone_of("test_resnet", dilate_stage4=False).net.layer4
    assert {(conv.dilation, conv.stride) for conv in convolutions(layers)} == {((1, 1), (1, 1))}
    assert backbone_of("test_convnext", dilate_stage4=False)(images(1, 3, 64, 64))[1].shape[2:] == (4, 4)


def test_stage_4_alone_is_undilated_where_stage_3_is_dilated_too():
    with torch.device("meta"):
        plain, undilated = (
            backbone_of("resnet18", output_stride=8, dilate_stage4=dilated).net for dilated in (True, False)
        )
    assert str(undilated.layer3) == str(plain.layer3) and "dilation=(2, 2)" in str(plain.layer3)
    assert {conv.dilation for conv in convolutions(undilated.layer4)} == {(1, 1)}


def test_mobilenet_stem_ends_where_stage_1_begins():
    backbone = backbone_of("mobilenetv2_035", trainable_stem=False)
    frozen = {name for name, p in backbone.net.named_parameters() if not p.requires_grad}
    assert {".".join(name.split(".")[: 2 if "blocks" in name else 1]) for name in frozen} == {
        "conv_stem",
        "bn1",
        "blocks.0",
    }


@pytest.mark.parametrize("architecture, pooling", [("resnest14d", "avd_last"), ("resnest50d_1s4x24d", "avd_first")])
@pytest.mark.parametrize("output_stride, dilated", [(16, ("layer4",)), (8, ("layer3", "layer4"))])
def test_resnest_keeps_the_pooling_of_its_authors(architecture, pooling, output_stride, dilated):
    with torch.device("meta"):
        net = backbone_of(architecture, output_stride=output_stride).net
        untouched = timm.create_model(architecture, features_only=True, output_stride=output_stride)
    for name in ("layer1", "layer2", "layer3", "layer4"):
        ours, theirs = getattr(net, name), getattr(untouched, name)
        if name in dilated:
            assert str(getattr(ours[0], pooling)) == "AvgPool2d(kernel_size=3, stride=1, padding=1)"
            assert isinstance(ours[0].downsample[0], nn.Identity)
            ours, theirs = ours[1:], theirs[1:]
        assert str(ours) == str(theirs)
    assert net.state_dict().keys() == untouched.state_dict().keys()


@pytest.mark.parametrize(
    "architecture, message",
    [
        ("resnet51", "resnet50"),
        ("zzz", "no such model"),
        ("vit_relpos_small_patch16_224", "no known way to feature maps"),
        ("maxvit_pico_rw_256", "no known way to feature maps"),
        ("mvitv2_tiny", "no known way to feature maps"),
        ("mixer_s32_224", "no known way to feature maps"),
        ("bat_resnext26ts.ch_in1k", "no known way to feature maps"),
        ("beit_base_patch16_224", "no known way to feature maps"),
        (
            "mobilevitv2_050",
            "no known way to feature maps",
        ),  # not of the size that timm says
        ("convit_tiny", "no known way to feature maps"),
    ],
)
def test_unsuitable_architectures_are_refused_in_one_line(architecture, message):
    with pytest.raises(UserError, match=message) as error:
        backbone_of(architecture)
    assert str(error.value).startswith(f"--architecture {architecture}:") and "\n" not in str(error.value)


def test_a_timm_that_is_too_old_for_a_network_is_named(monkeypatch):
    monkeypatch.delattr(timm.models.pvt_v2.PyramidVisionTransformerV2, "forward_intermediates")
    with pytest.raises(UserError, match=r"pvt_v2_b0: timm .* is too old .*pip install -U timm"):
        backbone_of("pvt_v2_b0")


@pytest.mark.parametrize("error", [OSError("no route to host"), RuntimeError("no pretrained weights exist")])
def test_a_failed_download_names_the_remedy(monkeypatch, error):
    create = timm.create_model

    def offline(*args, pretrained=False, **arguments):
        if pretrained:
            raise error
        return create(*args, **arguments)

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(UserError, match="--backbone_weights FILE, or none"):
        backbone_of("test_resnet", weights="imagenet")


# -- networks that cannot be dilated, and transformers --------------------------------------------------------------
@pytest.mark.parametrize("height, width", [(97, 131), (64, 96), (33, 50)])
@pytest.mark.parametrize("architecture, strides", FIXED_STRIDE.items())
def test_images_of_any_size_on_networks_of_fixed_stride(architecture, strides, height, width):
    model = build("csrm", architecture).eval()
    assert (model.backbone.low_stride, model.backbone.output_stride) == strides
    outputs = model(images(1, 3, height, width))
    coarse, fine = [tuple(math.ceil(side / s) for side in (height, width)) for s in (strides[1], 4)]
    assert outputs["cams"].shape[2:] == coarse and outputs["seg_logits"].shape[2:] == fine
    assert all(output.isfinite().all() for output in outputs.values())


def test_swin_takes_any_size_and_freezes_its_stages():
    backbone = backbone_of("swin_tiny_patch4_window7_224", trainable_stem=False, trainable_stage4=False).train()
    low, high = backbone(images(1, 3, 97, 50))
    assert low.shape == (1, 96, 25, 13) and high.shape == (1, 768, 4, 2)
    frozen = {".".join(name.split(".")[:2]) for name, p in backbone.net.named_parameters() if not p.requires_grad}
    assert frozen == {"patch_embed.proj", "patch_embed.norm", "layers.3", "norm.weight", "norm.bias"}


def test_the_output_stride_is_the_one_obtained_and_a_note_says_so(capsys):
    assert backbone_of("test_mambaout").output_stride == 32
    assert capsys.readouterr().out == "test_mambaout: cannot be dilated; output stride 32 instead of 16.\n"
    backbone_of("test_vit"), backbone_of("test_convnext")
    assert capsys.readouterr().out == ""
    model = build("csrm", "test_mambaout")
    assert model.config["output_stride"] == 16  # what was asked for rebuilds the network
    assert [branch[0].dilation[0] for branch in model.trunk.aspp.branches] == [1, 3, 6, 9]


def test_a_plain_transformer_gives_its_normalised_patch_tokens():
    torch.manual_seed(0)
    whole = timm.create_model("test_vit", dynamic_img_size=True).eval()
    backbone = backbone_of("test_vit").eval()
    backbone.net.load_state_dict(whole.state_dict(), strict=False)
    x = images(2, 3, 48, 80)
    tokens = whole.forward_features(x)[:, whole.num_prefix_tokens :]
    torch.testing.assert_close(backbone(x)[1], tokens.transpose(1, 2).unflatten(2, (3, 5)))


def test_low_features_of_a_plain_transformer_are_those_of_the_block_a_quarter_up():
    """Normalised patch tokens, as the last ones."""
    backbone = backbone_of("test_vit").eval()
    x, blocks = images(1, 3, 48, 80), backbone.net.blocks
    tokens = []
    blocks[len(blocks) // 4].register_forward_hook(lambda module, inputs, output: tokens.append(output))
    low, _ = backbone(x)
    expected = backbone.net.norm(tokens[0])[:, backbone.net.num_prefix_tokens :]
    torch.testing.assert_close(low, expected.transpose(1, 2).unflatten(2, (3, 5)))


def test_convnext_is_what_timm_gives_where_no_side_is_rounded_up():
    torch.manual_seed(0)
    plain = timm.create_model("test_convnext", features_only=True, output_stride=16).eval()
    backbone = backbone_of("test_convnext").eval()
    backbone.net.load_state_dict(plain.state_dict())
    x = images(1, 3, 64, 96)
    for ours, theirs in zip(backbone(x), (plain(x)[0], plain(x)[-1]), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("architecture", ["test_vit", "test_convnext"])
def test_patches_are_centred_where_strided_convolutions_look(architecture):
    """A network that returns the means of its 4x4 and 16x16 patches, shown an image of its own pixel coordinates."""
    backbone = backbone_of(architecture)
    column = torch.arange(97.0).expand(1, 3, 97, 97)
    patches = backbone._padded(column).unfold(3, 16, 16).mean(dim=4)[0, 0, 0]
    torch.testing.assert_close(patches[1:-1], torch.arange(16.0, 96, 16), atol=0.6, rtol=0)
    if backbone.low_stride == 4:
        small = backbone._cropped(backbone._padded(column).unfold(3, 4, 4).mean(dim=4).repeat(1, 1, 4, 1), (97, 97))
        torch.testing.assert_close(small[0, 0, 0, 1:-1], torch.arange(4.0, 96, 4), atol=2, rtol=0)


def test_sides_are_rounded_up_with_the_pixels_of_the_border():
    """97 and 93 pixels are 15 and 3 short of 16n: 7 and 1 come first, so one cell and none are cut at stride 4."""
    backbone, x = backbone_of("test_convnext"), images(1, 3, 97, 93)
    padded = backbone._padded(x)
    np.testing.assert_array_equal(padded, np.pad(x, ((0, 0), (0, 0), (7, 8), (1, 2)), mode="edge"))
    cells = padded[..., ::4, ::4]
    assert torch.equal(backbone._cropped(cells, (97, 93)), cells[..., 1:26, :24])


def test_layer_norm_is_trained_whatever_the_mode():
    backbone = backbone_of("test_vit", batch_norm="fix")
    assert all(p.requires_grad for p in backbone.parameters())


def test_the_stem_of_a_plain_transformer_is_its_embedding():
    backbone = backbone_of("test_vit", trainable_stem=False).train()
    frozen = {name for name, p in backbone.net.named_parameters() if not p.requires_grad}
    assert frozen == {"cls_token", "pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias"}
    assert not any(p.requires_grad for p in backbone_of("test_vit", trainable_backbone=False).parameters())


@pytest.mark.parametrize(
    "architecture, switch, message",
    [
        ("test_vit", "trainable_stage4", "--trainable_stage4 false: test_vit has no stages"),
        ("twins_pcpvt_small", "trainable_stem", "twins_pcpvt_small is no chain of stages"),
        ("test_mambaout", "dilate_stage4", "--dilate_stage4 false: test_mambaout is not dilated"),
    ],
)
def test_switches_for_what_is_not_there_are_refused(architecture, switch, message):
    with pytest.raises(UserError, match=message):
        backbone_of(architecture, **{switch: False})


def test_a_network_without_stages_can_be_frozen_as_a_whole():
    backbone = backbone_of("twins_pcpvt_small", trainable_backbone=False, trainable_stem=False).train()
    assert not any(p.requires_grad for p in backbone.parameters()) and not backbone.net.training


def test_multi_scale_cams_of_a_plain_transformer():
    model, x = build("classifier", "test_vit").eval(), images(1, 3, 50, 71)
    label = torch.tensor([1.0, 0.0, 1.0])
    with torch.inference_mode():
        keys, cam, hr_cam = multi_scale_cams(
            lambda views: model(views)["cams"], x, label, Views((0.5, 1, 2), hflip=True, long_side=(0, 71))
        )
    assert keys.tolist() == [0, 1, 3] and cam.shape == (2, 13, 18) and hr_cam.shape == (2, 50, 71)


def test_the_table_of_backbones_is_made_of_what_the_networks_do(capsys):
    flags = ["--architectures", "test_vit,pvt_v2_b0,mixer_s32_224"]
    backbones.main(backbones.make_parser().parse_args(flags))
    _, _, vit, pyramid, refused = capsys.readouterr().out.splitlines()
    assert vit.startswith("| `test_vit` | 0.3 | ") and vit.endswith("| 16 (16) | 7x9 |")
    assert "| 32 (32) | 4x5 |" in pyramid and "refused: no known way" in refused


# -- new layers -----------------------------------------------------------------------------------------------------
def test_published_sizes_of_the_new_layers():
    model = build_model("csrm", architecture="test_resnet", num_classes=21)
    assert model.trunk.channels == 304 and model.classifier.out_channels == 20
    assert model.segmentation[0][0].weight.shape == (256, 304, 3, 3)
    assert model.segmentation[-1].weight.shape == (21, 256, 1, 1)
    assert model.representation[-1].weight.shape == (256, 256, 1, 1)
    assert [branch[0].dilation[0] for branch in model.trunk.aspp.branches] == [1, 6, 12, 18]
    assert [m.p for m in model.modules() if isinstance(m, nn.Dropout)] == [0.5, 0.1, 0.1]


@torch.no_grad()
def test_the_new_layers_are_those_of_the_papers_written_out():
    """ASPP, decoder and the three heads of CSRM, from their weights."""
    model, x = build("csrm", use_sal_head=True).eval(), images(2, 3, 70, 50)
    for parameter in model.parameters():
        parameter += 0.1 * torch.randn_like(parameter)  # no shift is 0, and no scale is 1
    state, (low, high) = model.state_dict(), model.backbone(x)

    def layer(maps, name, size, dilation=1):
        weight = state[f"{name}.0.weight"]
        assert weight.shape[2:] == (size, size)
        maps = F.conv2d(maps, weight, padding=dilation * (size // 2), dilation=dilation)
        return F.group_norm(maps, 4, state[f"{name}.1.weight"], state[f"{name}.1.bias"]).relu()

    def head(maps, name):
        return F.conv2d(maps, state[f"{name}.weight"], state[f"{name}.bias"])

    parts = [layer(high, "trunk.aspp.branches.0", 1)]
    parts += [layer(high, f"trunk.aspp.branches.{i}", 3, dilation=6 * i) for i in (1, 2, 3)]
    mean = layer(high.mean(dim=(2, 3), keepdim=True), "trunk.aspp.image_mean.1", 1)
    aspp = layer(torch.cat([*parts, mean.expand_as(parts[0])], dim=1), "trunk.aspp.project.0", 1)
    aspp = F.interpolate(aspp, (18, 13), mode="bilinear", align_corners=True)
    trunk = torch.cat([aspp, layer(low, "trunk.low", 1)], dim=1)
    outputs = model(x)
    decoded = layer(layer(trunk, "segmentation.0", 3), "segmentation.2", 3)
    torch.testing.assert_close(outputs["seg_logits"], head(decoded, "segmentation.4"))
    representations = head(layer(trunk, "representation.0", 3), "representation.1")
    torch.testing.assert_close(outputs["representations"], representations)
    torch.testing.assert_close(outputs["saliency"], head(trunk, "saliency"))


def test_aspp_dilations_double_at_output_stride_8():
    model = build("segmentation", output_stride=8)
    assert [branch[0].dilation[0] for branch in model.trunk.aspp.branches] == [1, 12, 24, 36]


@pytest.mark.parametrize("kind", ["csrm", "segmentation"])
@pytest.mark.parametrize("use_gn", [True, False])
def test_normalisation_of_new_layers(kind, use_gn):
    new = [layer for name, layer in build(kind, use_gn=use_gn).named_modules() if not name.startswith("backbone")]
    groups = [layer.num_groups for layer in new if isinstance(layer, nn.GroupNorm)]
    batch_norms = [layer for layer in new if isinstance(layer, nn.BatchNorm2d)]
    assert (set(groups) == {4} and not batch_norms) if use_gn else (not groups and batch_norms)


def test_a_width_that_groups_cannot_share_is_refused():
    with pytest.raises(UserError, match="--decoder_channels 30: not a multiple of 4"):
        build("csrm", decoder_channels=30)


def test_new_convolutions_start_kaiming_normal():
    model = build("csrm", decoder_channels=64, use_sal_head=True)
    for conv in (c for part in model.children() if part is not model.backbone for c in convolutions(part)):
        fan_in = conv.weight[0].numel()
        assert conv.weight.std().item() == pytest.approx(math.sqrt(2 / fan_in), rel=6 / math.sqrt(conv.weight.numel()))
        assert conv.bias is None or not conv.bias.any()


def test_aspp_image_mean_reaches_every_pixel():
    torch.manual_seed(0)
    aspp = ASPP(8, DecoderConfig(architecture="", num_classes=2, decoder_channels=8), output_stride=16).eval()
    x = images(1, 8, 40, 40).requires_grad_()
    aspp(x)[0, :, 0, 0].sum().backward()
    assert (x.grad[0, :, 39, 39] != 0).any()  # beyond the reach of dilation 18


@pytest.mark.parametrize("kind", KINDS)
def test_new_layers_are_all_but_the_backbone(kind):
    model = build(kind, **({"use_sal_head": True} if kind == "csrm" else {}))
    groups = parameter_groups(model, Optimization("sgd", 1.0, 0.0))
    scratch = [id(p) for group in groups if group["name"].startswith("scratch") for p in group["params"]]
    assert len(scratch) == len(set(scratch))
    assert set(scratch) == {id(p) for name, p in model.named_parameters() if not name.startswith("backbone.")}
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))


def test_a_restored_classifier_is_no_new_layer():
    model = build("csrm")
    model.pretrained.add("classifier")
    rates = {id(p): g["lr"] for g in parameter_groups(model, Optimization("sgd", 1.0, 0.0)) for p in g["params"]}
    assert rates[id(model.classifier.weight)] == 1 and rates[id(model.segmentation[-1].weight)] == 10


# -- config ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", KINDS)
def test_config_rebuilds_the_network(kind):
    model = build(kind, batch_norm="fix", trainable_stem=False, output_stride=8).eval()
    again = build_model(**json.loads(json.dumps(model.config))).eval()
    again.load_state_dict(model.state_dict())
    assert again.config == model.config
    x = images(1, 3, 40, 40)
    for name, output in model(x).items():
        torch.testing.assert_close(again(x)[name], output, rtol=0, atol=0)
    assert [p.requires_grad for p in again.parameters()] == [p.requires_grad for p in model.parameters()]


def test_a_config_of_an_earlier_version_still_builds():
    written = {
        "kind": "csrm",
        "weights": "none",
        "architecture": "test_resnet",
        "output_stride": 16,
        "batch_norm": "fix",
    }
    written |= {"dilate_stage4": True, "trainable_stem": False, "trainable_stage4": True, "trainable_backbone": True}
    written |= {"num_classes": 4, "decoder_channels": 8, "use_gn": True, "dropout": 0.5, "use_rep_head": True}
    written |= {"use_sal_head": False}
    assert list(build_model(**written).config.items()) == list(written.items())  # the same bytes in a checkpoint


@pytest.mark.parametrize(
    "kind, option", [("classifier", "decoder_channels"), ("segmentation", "use_rep_head"), ("csrm", "x")]
)
def test_an_option_that_a_network_does_not_have_is_a_type_error(kind, option):
    with pytest.raises(TypeError, match=f"unexpected keyword argument '{option}'"):
        build(kind, **{option: 1})
