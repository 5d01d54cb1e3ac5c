"""A trained model for other programs: ONNX, safetensors, or a repository of the Hugging Face hub.

    python -m models.export --tag deeplab --output exported/birds --format onnx
    python -m models.export --tag deeplab --output exported/birds --format safetensors
    python -m models.export --tag deeplab --output exported/birds --format hub --scores val.json --push me/birds

Writes into the folder --output:

    onnx          model.onnx, for images of any size; checked with onnxruntime before it is kept
    safetensors   model.safetensors and config.json; `--weights FOLDER/model.safetensors` takes them in every script
    hub           the same two and README.md, a model card; --push uploads the folder

Of CSRM the teacher is exported, and in ONNX its segmentation branch. docs/export.md says what the graph takes and
gives.
"""

import argparse
import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from models import KINDS, load_model, segmentation_forward
from models.hub import describe, export_hub, export_safetensors
from tools import cli, options
from tools.errors import UserError, require
from tools.files import atomic_write
from tools.maps import normalize, resize_maps

ONNX = "onnx onnxruntime"  # packages
OPSET = 18
CHECKED_SIZES = ((1, 97, 131), (2, 64, 50), (1, 113, 81))
"""Batch, height and width of the images on which PyTorch and onnxruntime must agree."""
EQUAL_PIXELS = 0.999
"""Share of pixels that must get the same class from both."""


@dataclass(frozen=True)
class OnnxOptions:
    """What the graph takes and gives."""

    uint8: bool = True  # images are uint8 RGB and normalised in the graph; else float32, normalised by the caller
    argmax: bool = True  # the output is "masks", uint8 [B,H,W]; else "logits", float32 [B,K+1,H,W]


def make_parser() -> cli.Parser:
    """The command line."""
    parser = cli.Parser(__doc__)
    group = parser.add_argument_group("export")
    group.add_argument("--tag", required=True, help="name of the run whose model is exported")
    group.add_argument("--weights", type=Path, help="checkpoint (default: experiments/models/TAG.pth)")
    group.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder to write to")
    group.add_argument("--format", choices=["onnx", "safetensors", "hub"], default="onnx", help="what to write")
    group = parser.add_argument_group("--format onnx")
    text = "float32: normalised by the caller"
    group.add_argument("--input", choices=["uint8", "float32"], default="uint8", help=text)
    cli.add_switch(group, "--argmax", True, "give class indices; false: logits. Classifiers give logits and CAMs")
    group = parser.add_argument_group("--format hub")
    group.add_argument("--scores", type=Path, metavar="FILE", help="evaluate.py's JSON, for the model card")
    group.add_argument("--push", metavar="OWNER/NAME", help="upload to this repository (log in with `hf auth login`)")
    return parser


class Exported(nn.Module):
    """The network as the graph has it: images in, masks or maps of the images' size out."""

    def __init__(self, model: nn.Module, graph: OnnxOptions) -> None:
        super().__init__()
        self.model, self.graph = model, graph
        self.outputs = ["masks" if graph.argmax else "logits"]
        if model.config["kind"] == "classifier":
            self.outputs = ["class_logits", "cams"]

    def forward(self, images: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """uint8 or float32 [B,3,H,W] -> the tensors that `outputs` names."""
        views = normalize(images) if self.graph.uint8 else images
        size = images.shape[-2:]
        if self.model.config["kind"] == "classifier":
            result = self.model(views)
            return result["class_logits"], resize_maps(result["cams"], size)
        logits = resize_maps(segmentation_forward(self.model)(views), size)
        return logits.argmax(dim=1).to(torch.uint8) if self.graph.argmax else logits


def export_onnx(
    model: nn.Module, checkpoint: Mapping[str, Any], path: Path, graph: OnnxOptions = OnnxOptions()
) -> float:
    """Write the network as an ONNX file with dynamic batch, height and width, if onnxruntime agrees with PyTorch.

    Args:
        model: in eval mode, on the CPU.
        checkpoint: the file's metadata keep its class names and image size.

    Returns:
        The share of equal pixels, in [0, 1], on the worst of `CHECKED_SIZES`.

    Raises:
        UserError: onnx or onnxruntime is missing; the network has an operation that ONNX lacks; or both disagree.
    """
    onnx, _ = require("onnx", ONNX), require("onnxruntime", ONNX)
    network = Exported(model, graph).eval().requires_grad_(False).to(memory_format=torch.contiguous_format)
    with atomic_write(path) as temporary:
        _write_graph(network, temporary)
        content = onnx.load(temporary)
        onnx.helper.set_model_props(content, {key: json.dumps(value) for key, value in describe(checkpoint).items()})
        onnx.save(content, temporary)
        share = compare(network, temporary)
        if share < EQUAL_PIXELS:
            raise UserError(
                f"{path}: not written, onnxruntime gives {100 - 100 * share:.2f} % of the pixels another class than "
                "PyTorch. Use --format safetensors."
            )
    return share


def _write_graph(network: Exported, path: Path) -> None:
    sizes = {0: "batch", 2: "height", 3: "width"}
    masks = {0: "batch", 1: "height", 2: "width"}
    shapes = {"masks": masks, "logits": sizes, "cams": sizes, "class_logits": {0: "batch"}}
    dynamic = {"images": sizes, **{name: shapes[name] for name in network.outputs}}
    names = {"input_names": ["images"], "output_names": network.outputs, "dynamic_axes": dynamic}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the tracer: sizes that it takes for constants; `compare` finds them
            # The exporter by tracing: the newer one needs minutes for a ResNeSt, and onnxscript.
            torch.onnx.export(
                network, (example(network.graph, 2, 97, 131),), str(path), dynamo=False, opset_version=OPSET, **names
            )
    except torch.onnx.errors.UnsupportedOperatorError as error:
        raise UserError(
            f"--format onnx: {network.model.config['architecture']} cannot be exported "
            f"({str(error).splitlines()[0]}). Use --format safetensors."
        ) from error


def example(graph: OnnxOptions, batch: int, height: int, width: int) -> torch.Tensor:
    """Smooth random images, as the graph takes them."""
    coarse = torch.rand(batch, 3, height // 8 + 1, width // 8 + 1, generator=torch.Generator().manual_seed(0))
    images = resize_maps(255 * coarse, (height, width)).to(torch.uint8)
    return images if graph.uint8 else normalize(images)


@torch.inference_mode()
def compare(network: Exported, path: Path) -> float:
    """Share of pixels with the same class in PyTorch and onnxruntime, on the worst of `CHECKED_SIZES`.

    The class is the largest of a pixel's logits. 0 where an output has another shape.
    """
    session = require("onnxruntime", ONNX).InferenceSession(str(path), providers=["CPUExecutionProvider"])
    shares = []
    for size in CHECKED_SIZES:
        images = example(network.graph, *size)
        ours = network(images)
        ours = [ours] if isinstance(ours, torch.Tensor) else list(ours)
        theirs = [torch.from_numpy(output) for output in session.run(None, {"images": images.numpy()})]
        shares += [_equal(a, b) for a, b in zip(ours, theirs, strict=True)]
    return min(shares)


def _equal(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    if ours.shape != theirs.shape:
        return 0.0
    if ours.is_floating_point():
        ours, theirs = ours.argmax(dim=1), theirs.argmax(dim=1)
    return (ours == theirs).double().mean().item()


def check_flags(args: argparse.Namespace) -> None:
    """Refuse flags of another format, which would do nothing (UserError: there is one)."""
    if args.format != "onnx" and (args.input != "uint8" or not args.argmax):
        raise UserError(f"--input / --argmax: of --format onnx only. Drop them, or drop --format {args.format}.")
    if args.format != "hub" and (args.scores or args.push):
        raise UserError(f"--scores / --push: of --format hub only. Drop them, or drop --format {args.format}.")


def main(args: argparse.Namespace) -> None:
    """Export one model."""
    check_flags(args)
    weights = args.weights or options.model_path(args.tag)
    model, checkpoint = load_model(weights, torch.device("cpu"), kinds=sorted(KINDS))
    if args.format == "onnx":
        graph = OnnxOptions(uint8=args.input == "uint8", argmax=args.argmax)
        share = export_onnx(model, checkpoint, args.output / "model.onnx", graph)
        print(f"{args.output / 'model.onnx'}: onnxruntime and PyTorch agree on {100 * share:.2f} % of the pixels")
    elif args.format == "safetensors":
        export_safetensors(model, checkpoint, args.output)
        print(f"{args.output / 'model.safetensors'} and config.json. Use: --weights {args.output}/model.safetensors")
    else:
        address = export_hub(model, checkpoint, args.output, scores=args.scores, push=args.push)
        uploaded = f"; uploaded to {address}" if address else ""
        print(f"{args.output}: model.safetensors, config.json, README.md{uploaded}")


if __name__ == "__main__":
    cli.run(main, make_parser().parse_args())
