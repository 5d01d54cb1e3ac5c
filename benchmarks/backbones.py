"""Which timm networks work as backbones: the rows of the table in docs/backbones.md.

    python -m benchmarks.backbones
    python -m benchmarks.backbones --architectures convnextv2_nano,pvt_v2_b0

Every network is built as a CAM classifier of 20 classes with random weights, and sees one batch of an awkward size,
forwards and backwards: the CAM must have ceil(side / output stride) cells, and every weight a finite gradient. FLOPs
are those of one forward pass, two per multiplication and addition, counted without computing anything.
"""

import argparse
import contextlib
import functools
import io

import torch
from torch.utils.flop_counter import FlopCounterMode

from models import build_model
from tools import cli
from tools.errors import UserError

ARCHITECTURES = (
    "resnet50,resnet101,resnest50d,resnest101e,resnest269e,res2net50_26w_4s,efficientnet_b0,tf_efficientnetv2_s,"
    "mobilenetv2_100,mobilenetv3_large_100,convnext_tiny,swin_tiny_patch4_window7_224,swinv2_tiny_window8_256,pvt_v2_b2,"
    "vit_small_patch16_224,vit_small_patch14_dinov2,vit_small_patch16_dinov3"
)


def make_parser() -> cli.Parser:
    parser = cli.Parser(__doc__)
    parser.add_argument("--architectures", default=ARCHITECTURES, metavar="LIST", help="timm's names, comma-separated")
    return parser


def main(args: argparse.Namespace) -> None:
    print("| network | parameters, M | GFLOPs, 512x512 | output stride (`--dilated`) | CAM of 97x131 |")
    print("|---|---|---|---|---|")
    for architecture in args.architectures.split(","):
        try:
            with contextlib.redirect_stdout(io.StringIO()):  # the note on networks that cannot be dilated
                line = row(architecture)
        except UserError as error:
            line = f"| `{architecture}` | refused: {str(error).partition(': ')[2]} | | | |"
        print(line, flush=True)


def row(architecture: str) -> str:
    """The table's row of one network, after a forward and a backward pass that prove it right."""
    build = functools.partial(build_model, "classifier", architecture=architecture, num_classes=21)
    model = build().train()
    outputs = model(torch.randn(2, 3, 97, 131))
    outputs["class_logits"].square().sum().backward()
    rows, columns = (-(-side // model.backbone.output_stride) for side in (97, 131))
    assert outputs["cams"].shape == (2, 20, rows, columns), f"CAM {tuple(outputs['cams'].shape)}, not {rows}x{columns}"
    wrong = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert not wrong, f"no finite gradient: {wrong}"
    plan, dilated = build().eval().to("meta"), build(output_stride=8)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        plan(torch.zeros(1, 3, 512, 512, device="meta"))
    parameters, flops = sum(p.numel() for p in model.backbone.parameters()), counter.get_total_flops()
    strides = f"{model.backbone.output_stride} ({dilated.backbone.output_stride})"
    return f"| `{architecture}` | {parameters / 1e6:.1f} | {flops / 1e9:.1f} | {strides} | {rows}x{columns} |"


if __name__ == "__main__":
    cli.run(main, make_parser().parse_args())
