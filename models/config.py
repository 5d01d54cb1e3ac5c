"""What a network is made of: one frozen dataclass per kind, and every default once.

    config = CSRMConfig(architecture="resnest101e", num_classes=21, batch_norm="fix", trainable_stem=False)

Each kind has the fields of the one before it and its own: backbone, network, decoder, CSRM. A checkpoint keeps them as
a plain dict (`model.config`).
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class BackboneConfig:
    """The backbone.

    Attributes:
        architecture: name of a timm model.
        output_stride: asked for: 16 (the last stage is dilated) or 8 (the last two are). `Backbone.output_stride` says
            what was obtained.
        batch_norm: "fix" keeps running statistics, scales and shifts as loaded; "normal" trains them. Other kinds of
            normalisation keep no statistics and are trained like any layer.
        dilate_stage4: False leaves the last stage undilated at stride 1, as public ResNet CAM priors were trained.
        trainable_stem: train the layers before stage 1 (transformers: patch and position embedding).
        trainable_stage4: train the last stage.
        trainable_backbone: train anything at all; False overrides the two above.
    """

    architecture: str
    output_stride: int = 16
    batch_norm: str = "normal"
    dilate_stage4: bool = True
    trainable_stem: bool = True
    trainable_stage4: bool = True
    trainable_backbone: bool = True

    def __post_init__(self) -> None:
        assert self.output_stride in (8, 16), f"output_stride must be 8 or 16, got {self.output_stride}"
        assert self.batch_norm in ("fix", "normal"), f"batch_norm must be 'fix' or 'normal', got {self.batch_norm!r}"


@dataclass(frozen=True, kw_only=True)
class NetworkConfig(BackboneConfig):
    """A network: all there is to the CAM prior.

    Attributes:
        num_classes: of a segmentation map, background included (K+1). There are K CAMs.
    """

    num_classes: int


@dataclass(frozen=True, kw_only=True)
class DecoderConfig(NetworkConfig):
    """A network with ASPP and decoder: DeepLabV3+.

    Attributes:
        decoder_channels: width of the ASPP and of every branch; in CSRM also the length D of the representations.
        use_gn: GroupNorm (4 groups) in new layers; False: batch norm.
        dropout: probability after the ASPP.
    """

    decoder_channels: int = 256
    use_gn: bool = True
    dropout: float = 0.5


@dataclass(frozen=True, kw_only=True)
class CSRMConfig(DecoderConfig):
    """CSRM, which may have two more heads.

    Attributes:
        use_rep_head: add the representation branch.
        use_sal_head: add a saliency head.
    """

    use_rep_head: bool = True
    use_sal_head: bool = False
