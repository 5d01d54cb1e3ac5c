"""What a network is made of: one frozen dataclass per kind, and every default once.

    config = CSRMConfig(architecture="resnest101e", num_classes=21, batch_norm="fix", trainable_stem=False)

Each kind has the fields of the one before it and its own: backbone, network, decoder, CSRM. A checkpoint keeps them as
a plain dict (`model.config`).
"""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class BackboneConfig:
    """The backbone."""

    architecture: str  # name of a timm model
    output_stride: int = 16  # wanted: 16 (last stage dilated) or 8 (last two); `Backbone.output_stride` is what it got
    batch_norm: str = "normal"  # "fix": statistics, scales and shifts stay as loaded; other normalisation is trained
    dilate_stage4: bool = True  # False: last stage undilated at stride 1, as public ResNet CAM priors were trained
    trainable_stem: bool = True  # train the layers before stage 1 (transformers: patch and position embedding)
    trainable_stage4: bool = True  # train the last stage
    trainable_backbone: bool = True  # train anything at all; False overrides the two above

    def __post_init__(self) -> None:
        assert self.output_stride in (8, 16), f"output_stride must be 8 or 16, got {self.output_stride}"
        assert self.batch_norm in ("fix", "normal"), f"batch_norm must be 'fix' or 'normal', got {self.batch_norm!r}"


@dataclass(frozen=True, kw_only=True)
class NetworkConfig(BackboneConfig):
    """A network: all there is to the CAM prior."""

    num_classes: int  # K+1, background included; there are K CAMs


@dataclass(frozen=True, kw_only=True)
class DecoderConfig(NetworkConfig):
    """A network with ASPP and decoder: DeepLabV3+."""

    decoder_channels: int = 256  # width of the ASPP and of every branch; in CSRM also D, of the representations
    use_gn: bool = True  # GroupNorm (4 groups) in new layers; False: batch norm
    dropout: float = 0.5  # probability after the ASPP


@dataclass(frozen=True, kw_only=True)
class CSRMConfig(DecoderConfig):
    """CSRM, which may have two more heads."""

    use_rep_head: bool = True  # add the representation branch
    use_sal_head: bool = False  # add a saliency head
