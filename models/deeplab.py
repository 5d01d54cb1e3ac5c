"""DeepLabV3+, the segmentation model trained on the pseudo masks.

    seg_logits = build_model("segmentation", architecture="resnest269e", num_classes=21)(images)["seg_logits"]

It shares its ASPP and decoder with CSRM, but knows nothing of image labels.
"""

from __future__ import annotations

import torch
from torch import nn

from models.backbone import Backbone
from models.layers import SegmentationBranch, Trunk


class DeepLabV3Plus(nn.Module):
    """Encoder, ASPP and decoder (Chen et al., ECCV 2018).

    Args:
        backbone: features.
        num_classes: background included (K+1).
        decoder_channels: width of the ASPP and of the decoder.
        use_gn: GroupNorm (4 groups) in new layers; False: batch norm.
        dropout: probability after the ASPP.
    """

    def __init__(
        self,
        backbone: Backbone,
        *,
        num_classes: int,
        decoder_channels: int = 256,
        use_gn: bool = True,
        dropout: float = 0.5,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.trunk = Trunk(backbone, decoder_channels=decoder_channels, dropout=dropout, use_gn=use_gn)
        self.segmentation = SegmentationBranch(
            self.trunk.channels, num_classes, channels=decoder_channels, use_gn=use_gn
        )

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        """Segment images.

        Args:
            x: float32 [B,3,H,W], ImageNet-normalised.

        Returns:
            "seg_logits" [B,K+1,H/4,W/4].
        """
        return {"seg_logits": self.segmentation(self.trunk(*self.backbone(x), x.shape[-2:]))}

    def scratch_modules(self) -> list[nn.Module]:
        """The layers that are not part of the backbone."""
        return [self.trunk, self.segmentation]
