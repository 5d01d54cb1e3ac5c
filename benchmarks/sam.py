"""Speed and memory of `tools.proposals.generator` against SamAutomaticMaskGenerator, same model and images in one run.

    python -m benchmarks.sam                                                     # CPU, a tiny network: under a minute
    python -m benchmarks.sam --device cuda --num_images 32 --model_type vit_h

One row per generator: images per second, from the image in memory to its RLEs; peak memory (of the GPU; on a CPU, of
the process so far, so the stock generator comes last); masks per image; and the share of masks that have a partner with
an IoU above .95 among those of the stock generator. The weights are random: networks cost the same with any, but
what follows them depends on the number of masks.
"""

import argparse
import functools
import time
from collections.abc import Callable

import torch
from pycocotools import mask as coco_rle
from segment_anything import SamAutomaticMaskGenerator, sam_model_registry

from benchmarks.measuring import peak_memory, print_row
from tests.tiny_sam import SHARPENED_THRESHOLDS, build_tiny_sam, sharpen, synthetic_image
from tools import cli, devices, options
from tools.proposals.generator import MaskGenerator, MaskOptions

BATCHES = {"points_per_batch": 128, "images_per_batch": 2}  # of ours; the stock generator has 64 and 1


def make_parser() -> cli.Parser:
    parser = cli.Parser(__doc__)
    add, types = parser.add_argument, ["tiny", *options.SAM_TYPES]
    add("--device", default="cpu", help="cpu, cuda or cuda:N")
    add("--model_type", choices=types, default="tiny", help="of the network")
    add("--num_images", type=cli.positive_int, default=2, help="images")
    add("--points_per_side", type=cli.positive_int, help="prompts per side (default: 32; tiny: 20)")
    options.add_shared(parser, "mixed_precision")
    cli.add_switch(parser, "--compile", False, "also time ours with compiled networks")
    return parser


def main(args: argparse.Namespace) -> None:
    device, size = devices.select_device(args.device), BATCHES["images_per_batch"]
    images = [synthetic_image(seed, 375, 500) for seed in range(args.num_images)]
    rows = {name: measure(generate, images, size, device) for name, generate in build_generators(args, device).items()}
    print(f"{args.device}, {len(images)} images, up to {size} at a time")
    print_row("", "images/s", "peak GB", "masks", "agree")
    for name, (rate, memory, masks) in rows.items():
        print_row(name, rate, memory / 1e9, sum(map(len, masks)) / len(masks), agreement(masks, rows["stock"][2]))


def build_generators(args: argparse.Namespace, device: torch.device) -> dict[str, Callable]:
    """The rows of the table: functions from images to the COCO RLEs of each."""
    torch.manual_seed(0)
    network = {"tiny": build_tiny_sam, **sam_model_registry}[args.model_type]()
    model = sharpen(network).to(device).eval()
    prompts = args.points_per_side or (20 if args.model_type == "tiny" else 32)
    flags = {"points_per_side": prompts, **SHARPENED_THRESHOLDS}
    dtype = devices.autocast_dtype(args.mixed_precision, device)
    ours = functools.partial(MaskGenerator, model, MaskOptions(**flags), **BATCHES)
    generators: dict[str, Callable] = {"ours, float32": ours()}
    if dtype:
        generators[f"ours, {dtype}".replace("torch.", "")] = ours(dtype=dtype)
    if args.compile:
        generators["ours, compiled"] = ours(dtype=dtype, compile=True)
    stock = SamAutomaticMaskGenerator(model, output_mode="coco_rle", **flags)
    return {**generators, "stock": lambda images: [[m["segmentation"] for m in stock.generate(i)] for i in images]}


def measure(generate: Callable, images: list, size: int, device: torch.device) -> tuple[float, int, list[list[dict]]]:
    """Images per second, peak memory in bytes, and the masks."""
    generate(images[:size])  # kernels are chosen and compiled, memory is reserved
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    start = time.perf_counter()
    masks = [found for index in range(0, len(images), size) for found in generate(images[index : index + size])]
    rate = len(images) / (time.perf_counter() - start)  # masks come as text: the device has finished
    return rate, peak_memory(device), masks


def agreement(found: list[list[dict]], expected: list[list[dict]]) -> float:
    """The share of masks, of both sides together, that have a partner with an IoU above .95 on the other side."""
    ious = [coco_rle.iou(*pair, [0] * len(pair[1])) for pair in zip(found, expected, strict=True) if all(pair)]
    matched = sum((iou.max(axis=axis) > 0.95).sum() for iou in ious for axis in (0, 1))
    return matched / max(sum(map(len, [*found, *expected])), 1)


if __name__ == "__main__":
    cli.run(main, make_parser().parse_args())
