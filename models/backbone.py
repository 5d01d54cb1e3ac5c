"""Any timm network with feature maps as a feature extractor: convolutional, dilated where it can be, or a transformer.

    backbone = Backbone(BackboneConfig(architecture="resnet50", output_stride=16), weights="imagenet")
    low, high = backbone(images)    # [B,256,H/4,W/4], [B,2048,H/16,W/16]

Freezing is part of the network: what `batch_norm="fix"` and the `trainable_*` switches freeze has no gradients, and is
always in eval mode, also after `.train()`, so that its running statistics do not move. docs/backbones.md says what was
tried.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from timm.models import is_model_in_modules
from timm.models.resnest import ResNestBottleneck
from torch import nn

from models.config import BackboneConfig
from models.restore import restore
from tools.errors import UserError
from tools.maps import cells

LOW_LEVEL_STRIDE = 4
"""Stride of the features the decoders take from stage 1."""


@dataclass(frozen=True)
class Rule:
    """How timm networks of some families become a backbone."""

    families: str  # modules of `timm.models`, separated by blanks
    dilates: bool = False  # timm can replace strides by dilation (`output_stride`)
    # what timm must be told besides, so that images may have any size
    arguments: dict[str, Any] = field(default_factory=dict)


RULES = (
    Rule(  # convolutions
        "byobnet convnext cspnet cspnext efficientnet hardcorenas inception_next mobilenetv3 mobilevit nfnet regnet "
        "res2net resnest resnet resnetv2 rexnet sknet xception_aligned",
        dilates=True,
    ),
    Rule(  # convolutions that timm cannot dilate, pyramids of attention, some transformers
        "convmixer cpubone csatv2 davit deepseek_vit densenet dla dpn edgenext efficientvim efficientvit_mit "
        "efficientvit_msra fasternet fastvit focalnet ghostnet hgnet hrnet iformer lcnetv2 lowformer mambaout "
        "metaformer mobilenetv5 naflexvit nasnet nextvit pnasnet pvt_v2 qwen3_vit rdnet repghost repvit selecsls "
        "senet sequencer shvit starnet swiftformer tiny_vit tresnet twins vgg vovnet xception xcit"
    ),
    Rule("deit eva vision_transformer vision_transformer_hybrid vitamin", arguments={"dynamic_img_size": True}),
    Rule("swin_transformer swin_transformer_v2 swin_transformer_v2_cr", arguments={"strict_img_size": False}),
)
"""Families not named here take images of one size only, have no feature maps, or were not tried."""


class Backbone(nn.Module):
    """Stage-1 features at stride 4 and last-stage features of a timm network, for images of any size.

    Networks that cannot be dilated (Swin, PVT) keep their own stride. Plain transformers have one stride throughout:
    their "stage-1" features are those of a block a quarter of the way up, which `Trunk` enlarges.

    Args:
        weights: "imagenet" (downloaded by timm), "none", or a file with a state dict.

    Raises:
        UserError: timm does not know the architecture, or no rule says how to take feature maps of images of any size
            from it; the weights cannot be had; or a part is to be frozen that it does not have.
    """

    def __init__(self, config: BackboneConfig, weights: str = "none") -> None:
        super().__init__()
        self.config = config
        rule = _rule(config.architecture)
        self.net = _create(config, rule, pretrained=weights == "imagenet")
        self._choose_features()
        self._check_switches(rule)
        if rule.dilates and not config.dilate_stage4:
            self._undilate_stage4()
        if weights not in ("imagenet", "none"):
            if not Path(weights).is_file():
                raise UserError(f"--backbone_weights {weights}: no such file. Pass a file, 'imagenet' or 'none'.")
            restore(self, weights)
        for frozen in self._frozen():
            frozen.requires_grad_(False)
        self.train()

    def _check_switches(self, rule: Rule) -> None:
        name, wanted = self.config.architecture, self.config.output_stride
        if self.output_stride != wanted:
            print(f"{name}: cannot be dilated; output stride {self.output_stride} instead of {wanted}.")
        if self._single_stride and not self.config.trainable_stage4:
            raise UserError(f"--trainable_stage4 false: {name} has no stages. Drop it.")
        if not rule.dilates and not self.config.dilate_stage4:
            raise UserError(f"--dilate_stage4 false: {name} is not dilated. Drop it.")

    def _undilate_stage4(self) -> None:
        layers, ends = self._layers()
        stage = (module for layer in layers[ends[-2] + 1 :] for module in layer.modules())
        for conv in (module for module in stage if isinstance(module, nn.Conv2d)):
            conv.padding = tuple(p // d for p, d in zip(conv.padding, conv.dilation, strict=True))
            conv.dilation = (1, 1)

    def _choose_features(self) -> None:
        """Pick the two feature maps, and find out with a tiny image whether sides must be rounded up.

        Raises:
            UserError: they are not of the size that timm says, or the network takes images of one size only.
        """
        info = self.net.feature_info
        stages = info if isinstance(info, list) else info.get_dicts()
        strides = [stage["reduction"] for stage in stages]
        self._outputs = [stage["module"] for stage in stages]
        self._first = next((i for i, stride in enumerate(strides) if stride >= LOW_LEVEL_STRIDE), len(strides) - 1)
        self._single_stride = len(set(strides)) == 1
        self._low = len(strides) // 4 if self._single_stride else self._first
        self.low_stride, self.output_stride = strides[self._low], strides[-1]
        self.low_channels, self.channels = stages[self._low]["num_chs"], stages[-1]["num_chs"]
        self._rounds_up = False
        if not self._fits():
            self._rounds_up = True
            if not self._fits():
                raise _refusal(self.config.architecture)

    @torch.no_grad()
    def _fits(self) -> bool:
        """Whether an image with sides that are no multiples of the stride gives maps of ceil(side / stride)."""
        size = [2 * self.output_stride + 1, 3 * self.output_stride + 1]
        self.net.eval()
        try:
            maps = self(torch.zeros(1, 3, *size))
        except (AssertionError, RuntimeError):  # it refuses such an image
            return False
        finally:
            self.net.train()
        expected = [(1, self.low_channels, *cells(size, self.low_stride)), (1, self.channels, 3, 4)]
        return [tuple(map_.shape) for map_ in maps] == expected

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute both feature maps of ImageNet-normalised float32 [B,3,H,W].

        Returns:
            Stage 1 [B,`low_channels`,H/`low_stride`,W/`low_stride`] and the last stage
            [B,`channels`,H/`output_stride`,W/`output_stride`], sizes rounded up.
        """
        size = x.shape[-2:]
        if self._rounds_up:
            x = self._padded(x)
        if isinstance(self.net.feature_info, list):
            indices = [self._low, len(self._outputs) - 1]
            low, high = self.net.forward_intermediates(x, indices, norm=True, intermediates_only=True)
        else:
            features = self.net(x)
            low, high = features[self._low], features[-1]
        if self._rounds_up:
            low = self._cropped(low, size)
        return low, high

    def _padded(self, x: torch.Tensor) -> torch.Tensor:
        """Repeat the border until the sides are multiples of the output stride.

        Half on either side: of an image with sides of 16n + 1 pixels the patches of 16 are then centred at the pixels
        0, 16, 32, ..., where a padded convolution of stride 16 looks too.
        """
        extra = self._extra(x.shape[:1:-1])  # width, height: the order of F.pad
        return F.pad(x, [part for total in extra for part in (total // 2, total - total // 2)], mode="replicate")

    def _cropped(self, low: torch.Tensor, size: torch.Size) -> torch.Tensor:
        """Stage-1 features without those of the padding alone."""
        starts = [total // 2 // self.low_stride for total in self._extra(size)]
        for dim, start, length in zip((-2, -1), starts, cells(size, self.low_stride), strict=True):
            low = low.narrow(dim, start, length)
        return low

    def _extra(self, size: torch.Size) -> list[int]:
        """How many pixels are missing to the next multiple of the output stride."""
        stride = self.output_stride
        return [count * stride - side for side, count in zip(size, cells(size, stride), strict=True)]

    def train(self, mode: bool = True) -> Backbone:
        super().train(mode)
        for frozen in self._frozen():
            if isinstance(frozen, nn.Module):
                frozen.eval()
        return self

    def _frozen(self) -> Iterator[nn.Module | nn.Parameter]:
        """What never trains. Not kept, because SyncBatchNorm conversion replaces modules."""
        config = self.config
        if not config.trainable_backbone:
            yield self.net
            return
        layers, ends = ([], []) if config.trainable_stem and config.trainable_stage4 else self._layers()
        if not config.trainable_stem:
            yield from layers[: ends[self._first - 1] + 1 if self._first else ends[0]]
            yield from self.net.parameters(recurse=False)  # position embedding and tokens
        if not config.trainable_stage4:
            yield from layers[ends[-2] + 1 :]
        if config.batch_norm == "fix":
            yield from (m for m in self.net.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm))

    def _layers(self) -> tuple[list[nn.Module], list[int]]:
        """The network as a chain of layers, and the index of the layer that each feature map comes out of.

        Raises:
            UserError: it is no chain (HRNet).
        """
        nested = {name.partition(".")[0] for name in self._outputs}
        layers: dict[str, nn.Module] = {}
        for name, module in self.net.named_children():
            inside = module.named_children() if name in nested and name not in self._outputs else [("", module)]
            layers.update({f"{name}.{child}".rstrip("."): layer for child, layer in inside})
        # timm renames `stages.0` to `stages_0` when it takes features from a network.
        index = {name.replace("_", "."): i for i, name in enumerate(layers)}
        outputs = [name.replace("_", ".") for name in self._outputs]
        if not index.keys() >= set(outputs):
            raise UserError(
                f"--trainable_stem / --trainable_stage4 false: {self.config.architecture} is no chain of stages. "
                "Pass true, or --trainable_backbone false."
            )
        return list(layers.values()), [index[name] for name in outputs]


def _rule(architecture: str) -> Rule:
    if not timm.is_model(architecture):
        close = difflib.get_close_matches(architecture, timm.list_models(), n=3, cutoff=0.5)
        remedy = f"Did you mean {', '.join(close)}?" if close else "timm.list_models() lists those it knows."
        raise UserError(f"--architecture {architecture}: timm has no such model. {remedy}")
    for rule in RULES:
        if is_model_in_modules(architecture, rule.families.split()):
            return rule
    raise _refusal(architecture)


def _refusal(architecture: str) -> UserError:
    return UserError(
        f"--architecture {architecture}: no known way to feature maps for images of any size. Choose another, such as "
        "resnet50, resnest101e, convnext_tiny or vit_small_patch16_224 (docs/backbones.md)."
    )


def _create(config: BackboneConfig, rule: Rule, pretrained: bool) -> nn.Module:
    """The network as timm makes it: of those that dilate a list of stages, of others the whole without its head."""
    if rule.dilates:
        arguments = {"features_only": True, "output_stride": config.output_stride}
    else:
        arguments = {"num_classes": 0, **rule.arguments}
    try:
        net = timm.create_model(config.architecture, pretrained=pretrained, **arguments)
    except (OSError, RuntimeError) as error:
        if not pretrained:
            raise
        raise UserError(
            f"--backbone_weights imagenet: timm could not download ImageNet weights of {config.architecture}. "
            "Pass a file with --backbone_weights FILE, or none."
        ) from error
    if not rule.dilates:
        if not hasattr(net, "forward_intermediates"):
            raise UserError(
                f"--architecture {config.architecture}: timm {timm.__version__} is too old to give its feature maps. "
                "Run `pip install -U timm`, or choose another."
            )
        # The head takes no part in the loss; the last normalisation stays.
        net.prune_intermediate_layers(1, prune_norm=False, prune_head=True)
    _keep_resnest_pooling(net)
    return net


def _keep_resnest_pooling(net: nn.Module) -> None:
    """Dilate ResNeSts as their authors do: the average pooling of a strided block stays, at stride 1.

    timm drops that pooling together with the stride, and puts a 2x2 pooling into the shortcut instead. Public priors
    (Puzzle-CAM, P-NOC) were trained on the authors' form.
    """
    stages = [getattr(net, f"layer{i}", [None])[0] for i in (2, 3, 4)]
    if not isinstance(stages[0], ResNestBottleneck):
        return
    position = "avd_last" if stages[0].avd_last is not None else "avd_first"
    for block in stages[1:]:
        if getattr(block, position) is None:
            setattr(block, position, nn.AvgPool2d(3, stride=1, padding=1))
            block.downsample[0] = nn.Identity()
