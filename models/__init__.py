"""The three networks, rebuilt from the configuration kept in a checkpoint.

    model = build_model("csrm", architecture="resnest101e", num_classes=21, weights="imagenet", batch_norm="fix")
    same_network = build_model(**model.config)    # the weights come from model.state_dict()
    model, checkpoint = load_model("experiments/models/a.pth", device, kinds=["classifier", "csrm"])

Every model takes float32 [B,3,H,W] (ImageNet-normalised) and returns a dict of tensors. Its set `pretrained` has the
names of the parts that do not start from random weights.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from models.backbone import Backbone
from models.classifier import Classifier
from models.config import CSRMConfig, DecoderConfig, NetworkConfig
from models.csrm import CSRM
from models.deeplab import DeepLabV3Plus
from tools.checkpoint import load_checkpoint, warn_unfinished
from tools.errors import UserError

KINDS: dict[str, tuple[type[nn.Module], type[NetworkConfig]]] = {
    "classifier": (Classifier, NetworkConfig),
    "csrm": (CSRM, CSRMConfig),
    "segmentation": (DeepLabV3Plus, DecoderConfig),
}
"""The networks and their configurations."""


def build_model(kind: str, *, weights: str = "none", **options: Any) -> nn.Module:
    """Build a network.

    Args:
        kind: "classifier", "csrm" or "segmentation".
        weights: of the backbone: "imagenet", "none" or a file; see `Backbone`.
        options: fields of the kind's configuration (`models.config`); `architecture` and `num_classes` are required.

    Returns:
        The network. Its `config` (plain values, defaults filled in) rebuilds it with `build_model(**config)`; `weights`
        is "none" there, because the trained weights are kept beside the config.

    Raises:
        UserError: see `Backbone`.
        TypeError: an option that this kind of network does not have.
    """
    assert kind in KINDS, f"kind must be one of {sorted(KINDS)}, got {kind!r}"
    network, config_type = KINDS[kind]
    config = config_type(**options)
    model = network(Backbone(config, weights), config)
    model.config = {"kind": kind, "weights": "none", **asdict(config)}
    model.pretrained = {"backbone"}
    # Convolutions follow the layout of their weights; this one is a quarter faster on CPUs and what tensor cores want.
    return model.to(memory_format=torch.channels_last)


def load_model(path: str | Path, device: torch.device, kinds: Sequence[str]) -> tuple[nn.Module, dict[str, Any]]:
    """Rebuild the model of a checkpoint, in eval mode on `device`; of CSRM, the teacher. Returns the checkpoint, too.

    Args:
        kinds: the keys of `models.KINDS` that are accepted.

    Raises:
        UserError: see `load_checkpoint`; or a model of another kind; or weights that do not fit the architecture.
    """
    checkpoint = load_checkpoint(path)
    kind = checkpoint["config"]["kind"]
    if kind not in kinds:
        raise UserError(f"{path}: a {kind} model, but this needs one of: {', '.join(kinds)}. Pass another checkpoint.")
    model = build_model(**checkpoint["config"])
    try:
        model.load_state_dict(checkpoint.get("teacher", checkpoint["model"]))
    except RuntimeError as error:
        raise UserError(
            f"{path}: its weights do not fit its architecture. The file is damaged; train again."
        ) from error
    warn_unfinished(path, checkpoint)
    return model.to(device).eval(), checkpoint


def cam_forward(model: nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
    """A classifier or CSRM as a function from images to CAM logits. The other branches of CSRM are not computed."""
    options = {"segmented": 0} if model.config["kind"] == "csrm" else {}
    return lambda views: model(views, **options)["cams"]


def segmentation_forward(model: nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
    """A CSRM or DeepLabV3+ as a function from images to segmentation logits, in CSRM without representations."""
    options = {"representations": False} if model.config["kind"] == "csrm" else {}
    return lambda views: model(views, **options)["seg_logits"]
