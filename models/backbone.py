"""Any convolutional timm network as a dilated feature extractor.

    backbone = Backbone("resnet50", weights="imagenet", output_stride=16)
    low, high = backbone(images)    # [B,256,H/4,W/4], [B,2048,H/16,W/16]

Freezing is part of the network: what `batch_norm="fix"` and the `trainable_*` switches freeze has no gradients, and
`.train()` leaves it in eval mode, so that its running statistics do not move.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from pathlib import Path

import timm
import torch
from timm.models.resnest import ResNestBottleneck
from torch import nn

from models.restore import restore
from tools.errors import UserError

LOW_LEVEL_STRIDE = 4
"""Stride of the features the decoders take from stage 1."""


class Backbone(nn.Module):
    """Stage-1 features at stride 4 and last-stage features at the output stride of a timm network.

    Args:
        architecture: name of a timm model with feature maps that can be dilated.
        weights: "imagenet" (downloaded by timm), "none", or a file with a state dict.
        output_stride: 16 (the last stage is dilated) or 8 (the last two are).
        batch_norm: "fix" keeps running statistics, scales and shifts as loaded; "normal" trains them.
        trainable_stem: train the layers before stage 1.
        trainable_stage4: train the last stage.
        trainable_backbone: train anything at all; False overrides the two above.

    Raises:
        UserError: timm does not know the architecture, or it has no feature maps at stride 4 and at the output stride,
            or the weights cannot be had.
    """

    def __init__(
        self,
        architecture: str,
        *,
        weights: str = "none",
        output_stride: int = 16,
        batch_norm: str = "normal",
        trainable_stem: bool = True,
        trainable_stage4: bool = True,
        trainable_backbone: bool = True,
    ) -> None:
        super().__init__()
        assert output_stride in (8, 16), f"output_stride must be 8 or 16, got {output_stride}"
        assert batch_norm in ("fix", "normal"), f"batch_norm must be 'fix' or 'normal', got {batch_norm!r}"
        self.net = _create(architecture, output_stride)
        reductions, channels = self.net.feature_info.reduction(), self.net.feature_info.channels()
        self._low = reductions.index(LOW_LEVEL_STRIDE)
        self.low_channels, self.channels = channels[self._low], channels[-1]
        self.output_stride, self.batch_norm = output_stride, batch_norm
        self._trainable = (trainable_stem, trainable_stage4, trainable_backbone)
        if weights == "imagenet":
            self.net.load_state_dict(_download(architecture, output_stride).state_dict())
        elif weights != "none":
            if not Path(weights).is_file():
                raise UserError(f"--backbone_weights {weights}: no such file. Pass a file, 'imagenet' or 'none'.")
            restore(self, weights)
        for module in self._frozen():
            module.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute both feature maps.

        Args:
            x: float32 [B,3,H,W], ImageNet-normalised.

        Returns:
            Stage 1 [B,`low_channels`,H/4,W/4] and the last stage [B,`channels`,H/`output_stride`,W/`output_stride`].
        """
        features = self.net(x)
        return features[self._low], features[-1]

    def train(self, mode: bool = True) -> Backbone:
        super().train(mode)
        for module in self._frozen():
            module.eval()
        return self

    def _frozen(self) -> Iterator[nn.Module]:
        """Modules that never train. Found anew each time: SyncBatchNorm conversion replaces modules."""
        stem, stage4, backbone = self._trainable
        layers, ends = self._layers()
        if not backbone:
            yield self.net
        if not stem:
            yield from layers[: ends[self._low - 1] + 1 if self._low else ends[0]]
        if not stage4:
            yield from layers[ends[-2] + 1 :]
        if self.batch_norm == "fix":
            yield from (m for m in self.net.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm))

    def _layers(self) -> tuple[list[nn.Module], list[int]]:
        """The network as a chain of layers, and the index of the layer that each feature map comes out of."""
        outputs = self.net.feature_info.module_name()
        nested = {name.partition(".")[0] for name in outputs}
        layers: dict[str, nn.Module] = {}
        for name, module in self.net.named_children():
            inside = module.named_children() if name in nested and name not in outputs else [("", module)]
            layers.update({f"{name}.{child}".rstrip("."): layer for child, layer in inside})
        # timm renames `stages.0` to `stages_0` when it takes features from a network.
        names = [name.replace("_", ".") for name in layers]
        return list(layers.values()), [names.index(name.replace("_", ".")) for name in outputs]


def _create(architecture: str, output_stride: int) -> nn.Module:
    if not timm.is_model(architecture):
        close = difflib.get_close_matches(architecture, timm.list_models(), n=3, cutoff=0.5)
        remedy = f"Did you mean {', '.join(close)}?" if close else "timm.list_models() lists those it knows."
        raise UserError(f"--architecture {architecture}: timm has no such model. {remedy}")
    refusal = UserError(
        f"--architecture {architecture}: no feature maps at strides {LOW_LEVEL_STRIDE} and {output_stride}. "
        "Choose a convolutional network such as resnet50, resnest101e or mobilenetv2_100."
    )
    try:
        net = timm.create_model(architecture, features_only=True, output_stride=output_stride)
    except (AssertionError, RuntimeError, TypeError, ValueError) as error:  # how timm says no depends on the model
        raise refusal from error
    reductions = net.feature_info.reduction()
    if LOW_LEVEL_STRIDE not in reductions or reductions[-1] != output_stride:
        raise refusal
    _keep_resnest_pooling(net)
    return net


def _download(architecture: str, output_stride: int) -> nn.Module:
    try:
        return timm.create_model(architecture, pretrained=True, features_only=True, output_stride=output_stride)
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
