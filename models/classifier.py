"""The CAM prior: an image classifier whose last layer is a 1x1 convolution, so that its logits come with their maps.

    output = build_model("classifier", architecture="resnet50", num_classes=21)(images)
    output["class_logits"], output["cams"]    # [B,20], [B,20,H/16,W/16]

The class logits are the spatial means of the maps, so image labels are enough to train both.
"""

import torch
from torch import nn

from models.backbone import Backbone
from models.config import NetworkConfig
from models.layers import init_kaiming


class Classifier(nn.Module):
    """Class activation maps as logits, and their means as class logits."""

    def __init__(self, backbone: Backbone, config: NetworkConfig) -> None:
        super().__init__()
        self.backbone = backbone
        self.classifier = nn.Conv2d(backbone.channels, config.num_classes - 1, 1, bias=False)
        init_kaiming(self.classifier)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        """Classify ImageNet-normalised float32 [B,3,H,W].

        Returns:
            "class_logits" [B,K], and "cams" [B,K,h,w] at the output stride: signed logits, before any ReLU.
        """
        return self.classify(self.backbone(x)[1])

    def classify(self, features: torch.Tensor) -> dict[str, torch.Tensor]:
        """The same from last-stage features [B,C,h,w]."""
        cams = self.classifier(features)
        return {"class_logits": cams.mean(dim=(2, 3)), "cams": cams}
