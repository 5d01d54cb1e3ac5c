"""Trained models as files that other programs read, and as repositories of the Hugging Face hub.

    export_safetensors(model, checkpoint, Path("exported/birds"))    # model.safetensors, config.json
    export_hub(model, checkpoint, Path("exported/birds"), push="me/birds")
    model, checkpoint = load_model(download("me/birds"), device, kinds=["segmentation"])

config.json holds the checkpoint without its tensors and without what only a resumed run needs.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import nn

from tools.errors import UserError, require
from tools.files import atomic_write, save_json, save_text
from tools.metrics import load_scores

FILES = ["model.safetensors", "config.json", "README.md"]


def describe(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """What config.json holds: the network, its classes, how it was trained. No path of this machine is among it."""
    known = ("image_size", "min_image_size", "teacher_labels", "dataset", "tag")  # prediction reads the first three
    return {
        "config": dict(checkpoint["config"]),
        "classes": list(checkpoint["classes"]),
        "epoch": checkpoint["epoch"],
        "args": {name: checkpoint["args"][name] for name in known if name in checkpoint["args"]},
        "version": checkpoint.get("version"),
    }


def export_safetensors(model: nn.Module, checkpoint: Mapping[str, Any], folder: Path) -> None:
    """Write model.safetensors and config.json. `models.load_model(folder / "model.safetensors", ...)` reads both."""
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    with atomic_write(folder / "model.safetensors") as temporary:
        save_file(state, temporary)
    save_json(folder / "config.json", describe(checkpoint))


def export_hub(
    model: nn.Module, checkpoint: Mapping[str, Any], folder: Path, scores: Path | None = None, push: str | None = None
) -> str | None:
    """Write the files of a hub repository, and upload them to `push`, OWNER/NAME, if given.

    Returns:
        Its address.

    Raises:
        UserError: `scores` cannot be read; huggingface_hub is missing; or the upload fails.
    """
    card = model_card(checkpoint, load_scores(scores) if scores else None, push)
    export_safetensors(model, checkpoint, folder)
    save_text(folder / "README.md", card)
    if push is None:
        return None
    hub = require("huggingface_hub", "huggingface_hub")
    try:
        api = hub.HfApi()
        address = api.create_repo(push, exist_ok=True)
        api.upload_folder(repo_id=push, folder_path=folder, allow_patterns=FILES)
    except (OSError, ValueError) as error:  # what the hub refuses, and names that are none
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"--push {push}: {reason} Log in with `hf auth login`; {folder} is complete.") from error
    return str(address)


def download(repository: str, revision: str | None = None) -> Path:
    """Fetch OWNER/NAME from the hub; returns the file that `load_model` and `--weights` take.

    Raises:
        UserError: huggingface_hub is missing, or there is no such repository.
    """
    hub = require("huggingface_hub", "huggingface_hub")
    try:
        folder = hub.snapshot_download(repository, revision=revision, allow_patterns=FILES)
    except (OSError, ValueError) as error:
        raise UserError(f"{repository}: could not be downloaded. Check the name and the network.") from error
    return Path(folder) / "model.safetensors"


def model_card(checkpoint: Mapping[str, Any], scores: Mapping[str, Any] | None, name: str | None) -> str:
    """README.md of a hub repository: classes, data, scores in per cent if given, a note on the licence."""
    content = describe(checkpoint)
    config, known = content["config"], content["args"]
    what, output = {
        "classifier": ("A CAM prior (an image classifier)", "dict of class_logits [B,K] and cams [B,K,h,w]"),
        "csrm": ("CSRM's teacher", "dict; seg_logits [B,K+1,H/4,W/4], background first, and cams [B,K,h,w]"),
        "segmentation": ("DeepLabV3+", "dict of seg_logits [B,K+1,H/4,W/4], background first"),
    }[config["kind"]]
    table = ""
    if scores:
        absent = scores.get("absent", [])
        rows = [f"| {cls} | {'–' if cls in absent else f'{value:.1f}'} |" for cls, value in scores["iou"].items()]
        rows.append(f"| **mean**{' (– counts as 0)' if absent else ''} | {scores['miou']:.1f} |")
        of = f"{scores['images']} images of the split '{scores['domain']}'" if "domain" in scores else "unknown images"
        cut = "" if scores["threshold"] is None else f", CAMs cut at {scores['threshold']:g}"
        table = f"\n## Scores\n\nOf {of}{cut}.\n\n| class | IoU, % |\n|---|---|\n" + "\n".join(rows) + "\n"
    return f"""---
library_name: pytorch
pipeline_tag: image-segmentation
tags: [semantic-segmentation, weakly-supervised, csrm]
---
# {name or known.get("tag", "model")}

{what}, trained with image-level class labels as in CSRM (David, Pedrini and Dias, VISAPP 2025).

* Network: `{config["architecture"]}` backbone, output stride {config["output_stride"]}, {content["epoch"]} epochs, \
images of {known.get("image_size", "unknown numbers of")} pixels
* Data: {known.get("dataset", "not recorded")}
* Classes: {", ".join(content["classes"])}

## Use

With the code of CSRM:

    from models import load_model
    from models.hub import download
    model, checkpoint = load_model(download("{name or "OWNER/NAME"}"), "cpu", kinds=["{config["kind"]}"])

Input: float32 [B,3,H,W], RGB, ImageNet mean and deviation. Output: {output}.
{table}
## Licence

No licence is granted by this card. The weights derive from the photographs and labels they were trained on and from the
weights the backbone started from (ImageNet weights of timm have terms of their own). Check both before you publish or
sell, then name a licence at the top of this file.
"""
