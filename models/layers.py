"""Layers that CSRM and DeepLabV3+ add to a backbone.

    trunk = Trunk(backbone, config)
    seg_logits = SegmentationBranch(trunk.channels, config)(trunk(*backbone(images), images.shape[-2:]))

They start from Kaiming-normal weights and are normalised in groups, because small batches of mixed crops make poor
batch statistics.
"""

import functools

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.ops import Conv2dNormActivation

from models.backbone import LOW_LEVEL_STRIDE, Backbone
from models.config import DecoderConfig
from tools.errors import UserError
from tools.maps import cells

GROUPS = 4
"""Groups of the GroupNorm in new layers."""

LOW_LEVEL_CHANNELS = 48
"""Width of the projected stage-1 features (DeepLabV3+, section 4.1)."""


def normalization(channels: int, use_gn: bool) -> nn.Module:
    """GroupNorm with 4 groups, or batch norm (UserError: the groups cannot be of equal size)."""
    if use_gn and channels % GROUPS:
        raise UserError(
            f"--decoder_channels {channels}: not a multiple of {GROUPS}, the groups of GroupNorm. Change it."
        )
    return nn.GroupNorm(GROUPS, channels) if use_gn else nn.BatchNorm2d(channels)


def conv_norm_relu(inputs: int, outputs: int, kernel_size: int, *, dilation: int = 1, use_gn: bool) -> nn.Sequential:
    """Convolution that keeps the size, normalisation, ReLU; `inputs` and `outputs` are channels."""
    norm = functools.partial(normalization, use_gn=use_gn)
    return Conv2dNormActivation(inputs, outputs, kernel_size, norm_layer=norm, dilation=dilation)


def init_kaiming(module: nn.Module) -> None:
    """Kaiming-normal weights and zero biases in every convolution of `module` (He et al., ICCV 2015)."""
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


class ASPP(nn.Module):
    """Atrous spatial pyramid pooling (DeepLabV3, section 3.3): 1x1, three dilated 3x3 and the image mean, projected.

    The dilations 6, 12, 18 are for output stride 16, double for 8 and half for 32. With batch norm (`use_gn=False`) the
    image-mean branch cannot train on a batch of one.
    """

    def __init__(self, in_channels: int, config: DecoderConfig, *, output_stride: int) -> None:
        super().__init__()
        conv, channels = functools.partial(conv_norm_relu, use_gn=config.use_gn), config.decoder_channels
        kinds = [(1, 1), *((3, rate * 16 // output_stride) for rate in (6, 12, 18))]  # size of the kernel, dilation
        self.branches = nn.ModuleList([conv(in_channels, channels, size, dilation=rate) for size, rate in kinds])
        self.image_mean = nn.Sequential(nn.AdaptiveAvgPool2d(1), conv(in_channels, channels, 1))
        self.project = nn.Sequential(conv(5 * channels, channels, 1), nn.Dropout(config.dropout))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B,`in_channels`,h,w] -> [B,`decoder_channels`,h,w]."""
        parts = [branch(x) for branch in self.branches]
        parts.append(self.image_mean(x).expand_as(parts[0]))
        return self.project(torch.cat(parts, dim=1))


class Trunk(nn.Module):
    """ASPP features enlarged to stride 4 beside projected stage-1 features (DeepLabV3+, figure 2).

    Stage-1 features of plain transformers are coarser than stride 4: they are enlarged too, after the projection.
    """

    def __init__(self, backbone: Backbone, config: DecoderConfig) -> None:
        super().__init__()
        self.channels = config.decoder_channels + LOW_LEVEL_CHANNELS
        self.aspp = ASPP(backbone.channels, config, output_stride=backbone.output_stride)
        self.low = conv_norm_relu(backbone.low_channels, LOW_LEVEL_CHANNELS, 1, use_gn=config.use_gn)
        init_kaiming(self)

    def forward(self, low: torch.Tensor, high: torch.Tensor, image_size: torch.Size) -> torch.Tensor:
        """Stage-1 and last-stage features of images of size (H, W), float [B,C,h,w] each -> [B,`channels`,H/4,W/4]."""
        size = cells(image_size, LOW_LEVEL_STRIDE)
        return torch.cat([_enlarge(self.aspp(high), size), _enlarge(self.low(low), size)], dim=1)


def _enlarge(maps: torch.Tensor, size: list[int]) -> torch.Tensor:
    if list(maps.shape[2:]) == size:
        return maps
    return F.interpolate(maps, size=size, mode="bilinear", align_corners=True)


class SegmentationBranch(nn.Sequential):
    """Two 3x3 convolutions, each followed by dropout .1, and the 1x1 that gives the class logits."""

    def __init__(self, in_channels: int, config: DecoderConfig) -> None:
        channels = config.decoder_channels
        super().__init__(
            conv_norm_relu(in_channels, channels, 3, use_gn=config.use_gn),
            nn.Dropout(0.1),
            conv_norm_relu(channels, channels, 3, use_gn=config.use_gn),
            nn.Dropout(0.1),
            nn.Conv2d(channels, config.num_classes, 1),
        )
        init_kaiming(self)
