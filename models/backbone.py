"""Any timm network with feature maps as a feature extractor: convolutional, dilated where it can be, or a transformer.

    backbone = Backbone("resnet50", weights="imagenet", output_stride=16)
    low, high = backbone(images)    # [B,256,H/4,W/4], [B,2048,H/16,W/16]

Freezing is part of the network: what `batch_norm="fix"` and the `trainable_*` switches freeze has no gradients, and
`.train()` leaves it in eval mode, so that its running statistics do not move. docs/backbones.md says what was tried.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from timm.models.resnest import ResNestBottleneck
from torch import nn

from models.restore import restore
from tools.errors import UserError

LOW_LEVEL_STRIDE = 4
"""Stride of the features the decoders take from stage 1."""

WAYS = (
    {"num_classes": 0, "dynamic_img_size": True},
    {"num_classes": 0, "strict_img_size": False},
    {"num_classes": 0},
    {"features_only": True},
)
"""How timm is asked for a network that it cannot dilate, in this order: any image size comes first."""

_REFUSALS = (AssertionError, AttributeError, RuntimeError, TypeError, ValueError)
"""How timm says no; it depends on the model."""


class Backbone(nn.Module):
    """Stage-1 features at stride 4 and last-stage features of a timm network, for images of any size.

    Networks that cannot be dilated (Swin, PVT) keep their own stride. Plain transformers have one stride throughout:
    their "stage-1" features are those of a block a quarter of the way up, which `Trunk` enlarges.

    Args:
        architecture: name of a timm model.
        weights: "imagenet" (downloaded by timm), "none", or a file with a state dict.
        output_stride: asked for: 16 (the last stage is dilated) or 8 (the last two are). The attribute of this name
            says what was obtained.
        batch_norm: "fix" keeps running statistics, scales and shifts as loaded; "normal" trains them. Other kinds of
            normalisation keep no statistics and are trained like any layer.
        dilate_stage4: False leaves the last stage undilated at stride 1, as public ResNet CAM priors were trained.
        trainable_stem: train the layers before stage 1 (transformers: patch and position embedding).
        trainable_stage4: train the last stage.
        trainable_backbone: train anything at all; False overrides the two above.

    Raises:
        UserError: timm does not know the architecture, or it has no feature maps, or takes images of one size only; the
            weights cannot be had; or a part is to be frozen that it does not have.
    """

    def __init__(
        self,
        architecture: str,
        *,
        weights: str = "none",
        output_stride: int = 16,
        batch_norm: str = "normal",
        dilate_stage4: bool = True,
        trainable_stem: bool = True,
        trainable_stage4: bool = True,
        trainable_backbone: bool = True,
    ) -> None:
        super().__init__()
        assert output_stride in (8, 16), f"output_stride must be 8 or 16, got {output_stride}"
        assert batch_norm in ("fix", "normal"), f"batch_norm must be 'fix' or 'normal', got {batch_norm!r}"
        self.architecture = architecture
        self.net, way = _create(architecture, output_stride)
        self._choose_features()
        if self.output_stride != output_stride:
            print(f"{architecture}: cannot be dilated; output stride {self.output_stride} instead of {output_stride}.")
        self.batch_norm = batch_norm
        self._trainable = (trainable_stem, trainable_stage4, trainable_backbone)
        if self._single_stride and not trainable_stage4:
            raise UserError(f"--trainable_stage4 false: {architecture} has no stages. Drop it.")
        if not dilate_stage4:
            if "output_stride" not in way:
                raise UserError(f"--dilate_stage4 false: {architecture} is not dilated. Drop it.")
            self._undilate_stage4()
        if weights == "imagenet":
            self.net.load_state_dict(_download(architecture, way).state_dict())
        elif weights != "none":
            if not Path(weights).is_file():
                raise UserError(f"--backbone_weights {weights}: no such file. Pass a file, 'imagenet' or 'none'.")
            restore(self, weights)
        for frozen in self._frozen():
            frozen.requires_grad_(False)

    def _undilate_stage4(self) -> None:
        layers, ends = self._layers()
        stage = (module for layer in layers[ends[-2] + 1 :] for module in layer.modules())
        for conv in (module for module in stage if isinstance(module, nn.Conv2d)):
            conv.padding = tuple(p // d for p, d in zip(conv.padding, conv.dilation, strict=True))
            conv.dilation = (1, 1)

    def _choose_features(self) -> None:
        """Pick the two feature maps, and find out with two tiny images whether sides must be rounded up.

        Raises:
            UserError: the network gives none of the right size.
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
                raise _refusal(self.architecture)

    @torch.no_grad()
    def _fits(self) -> bool:
        """Whether an image with sides that are no multiples of the stride gives maps of ceil(side / stride)."""
        size = [2 * self.output_stride + 1, 3 * self.output_stride + 1]
        training = self.training
        self.net.eval()
        try:
            maps = self(torch.zeros(1, 3, *size))
        except _REFUSALS:
            return False
        finally:
            self.net.train(training)
        expected = [(1, self.low_channels, *_cells(size, self.low_stride)), (1, self.channels, 3, 4)]
        return [tuple(map_.shape) for map_ in maps] == expected

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute both feature maps.

        Args:
            x: float32 [B,3,H,W], ImageNet-normalised.

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
        extra = [-side % self.output_stride for side in x.shape[:1:-1]]  # width, height: the order of F.pad
        return F.pad(x, [part for total in extra for part in (total // 2, total - total // 2)], mode="replicate")

    def _cropped(self, low: torch.Tensor, size: torch.Size) -> torch.Tensor:
        """Stage-1 features without those of the padding alone."""
        for dim, side, cells in zip((-2, -1), size, _cells(size, self.low_stride), strict=True):
            low = low.narrow(dim, -side % self.output_stride // 2 // self.low_stride, cells)
        return low

    def train(self, mode: bool = True) -> Backbone:
        super().train(mode)
        for frozen in self._frozen():
            if isinstance(frozen, nn.Module):
                frozen.eval()
        return self

    def _frozen(self) -> Iterator[nn.Module | nn.Parameter]:
        """What never trains. Found anew each time: SyncBatchNorm conversion replaces modules."""
        stem, stage4, backbone = self._trainable
        if not backbone:
            yield self.net
            return
        layers, ends = ([], []) if stem and stage4 else self._layers()
        if not stem:
            yield from layers[: ends[self._first - 1] + 1 if self._first else ends[0]]
            yield from self.net.parameters(recurse=False)  # position embedding and tokens
        if not stage4:
            yield from layers[ends[-2] + 1 :]
        if self.batch_norm == "fix":
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
        names = [name.replace("_", ".") for name in layers]
        try:
            return list(layers.values()), [names.index(name.replace("_", ".")) for name in self._outputs]
        except ValueError as error:
            raise UserError(
                f"--trainable_stem / --trainable_stage4 false: {self.architecture} is no chain of stages. "
                "Pass true, or --trainable_backbone false."
            ) from error


def _cells(size: list[int] | torch.Size, stride: int) -> list[int]:
    return [-(-side // stride) for side in size]


def _create(architecture: str, output_stride: int) -> tuple[nn.Module, dict]:
    """The network, dilated if it can be, and the arguments that timm made it of."""
    if not timm.is_model(architecture):
        close = difflib.get_close_matches(architecture, timm.list_models(), n=3, cutoff=0.5)
        remedy = f"Did you mean {', '.join(close)}?" if close else "timm.list_models() lists those it knows."
        raise UserError(f"--architecture {architecture}: timm has no such model. {remedy}")
    dilated = {"features_only": True, "output_stride": output_stride}
    for way in (dilated, *WAYS):
        try:
            net = _build(architecture, way)
        except _REFUSALS:
            continue
        if way is not dilated or net.feature_info.reduction()[-1] == output_stride:
            return net, way
    raise _refusal(architecture)


def _refusal(architecture: str) -> UserError:
    return UserError(
        f"--architecture {architecture}: no feature maps for images of any size. Choose another, such as "
        "resnet50, resnest101e, convnext_tiny or vit_small_patch16_224 (docs/backbones.md)."
    )


def _build(architecture: str, way: dict, pretrained: bool = False) -> nn.Module:
    net = timm.create_model(architecture, pretrained=pretrained, **way)
    if not way.get("features_only"):
        # Without its head, which takes no part in the loss; the last normalisation stays.
        net.prune_intermediate_layers(1, prune_norm=False, prune_head=True)
    _keep_resnest_pooling(net)
    return net


def _download(architecture: str, way: dict) -> nn.Module:
    try:
        return _build(architecture, way, pretrained=True)
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"--backbone_weights imagenet: timm could not download ImageNet weights of {architecture}. "
            "Pass a file with --backbone_weights FILE, or none."
        ) from error


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
