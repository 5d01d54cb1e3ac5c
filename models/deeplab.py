"""DeepLabV3+, the segmentation model trained on the pseudo masks.

    seg_logits = build_model("segmentation", architecture="resnest269e", num_classes=21)(images)["seg_logits"]

It shares its ASPP and decoder with CSRM, but knows nothing of image labels.
"""

import torch
from torch import nn

from models.backbone import Backbone
from models.config import DecoderConfig
from models.layers import SegmentationBranch, Trunk


class DeepLabV3Plus(nn.Module):
    """Encoder, ASPP and decoder (Chen et al., ECCV 2018)."""

    def __init__(self, backbone: Backbone, config: DecoderConfig) -> None:
        super().__init__()
        self.backbone = backbone
        self.trunk = Trunk(backbone, config)
        self.segmentation = SegmentationBranch(self.trunk.channels, config)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        """ImageNet-normalised float32 [B,3,H,W] -> "seg_logits" [B,K+1,H/4,W/4]."""
        return {"seg_logits": self.segmentation(self.trunk(*self.backbone(x), x.shape[-2:]))}
