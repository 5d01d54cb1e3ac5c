"""CSRM: one backbone, three branches that supervise one another.

    model = build_model("csrm", architecture="resnest101e", num_classes=21, batch_norm="fix", trainable_stem=False)
    output = model(images)
    output = model(images, segmented=0)    # CAMs only: no more work than the classifier

The classification branch reads the last stage directly; the others share an ASPP trunk at stride 4.
"""

import torch
from torch import nn

from models.backbone import Backbone
from models.classifier import Classifier
from models.config import CSRMConfig
from models.layers import SegmentationBranch, Trunk, conv_norm_relu, init_kaiming


class CSRM(Classifier):
    """Classification, segmentation and representation branches (David, Pedrini & Dias, VISAPP 2025).

    The classification branch is the `Classifier`, so that a CAM prior can be restored into it.
    """

    def __init__(self, backbone: Backbone, config: CSRMConfig) -> None:
        super().__init__(backbone, config)
        width = config.decoder_channels
        self.trunk = Trunk(backbone, config)
        self.segmentation = SegmentationBranch(self.trunk.channels, config)
        self.representation = self.saliency = None
        if config.use_rep_head:
            self.representation = nn.Sequential(
                conv_norm_relu(self.trunk.channels, width, 3, use_gn=config.use_gn), nn.Conv2d(width, width, 1)
            )
            init_kaiming(self.representation)
        if config.use_sal_head:
            self.saliency = nn.Conv2d(self.trunk.channels, 1, 1)
            init_kaiming(self.saliency)

    def forward(
        self, x: torch.Tensor, *, segmented: int | None = None, representations: bool = True
    ) -> dict[str, torch.Tensor]:
        """Run the branches on ImageNet-normalised float32 [B,3,H,W].

        Args:
            segmented: n, how many of the images, from the first, all branches see: by default all, so n = B. The other
                images go through the branch of the CAMs alone.
            representations: whether the representation branch runs.

        Returns:
            "class_logits" [B,K]; "cams" [B,K,h,w], signed logits at the output stride; and, unless n is 0, at stride 4
            "seg_logits" [n,K+1,H/4,W/4] and, if the network has these heads, "representations" [n,D,H/4,W/4] (not
            normalised) and "saliency" [n,1,H/4,W/4] (logits).
        """
        low, high = self.backbone(x)
        output = self.classify(high)
        if segmented == 0:
            return output
        trunk = self.trunk(low[:segmented], high[:segmented], x.shape[-2:])
        output["seg_logits"] = self.segmentation(trunk)
        if representations and self.representation is not None:
            output["representations"] = self.representation(trunk)
        if self.saliency is not None:
            output["saliency"] = self.saliency(trunk)
        return output
