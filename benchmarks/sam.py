"""Speed and memory of `tools.proposals.generator` against SamAutomaticMaskGenerator, same model and images in one run.

    python -m benchmarks.sam                                                     # CPU, a tiny network: under a minute
    python -m benchmarks.sam --device cuda --num_images 32 --checkpoint sam_vit_h_4b8939.pth --images photographs/
    python -m benchmarks.sam --device cuda --num_images 32 --model_type vit_h    # random weights

One row per generator: images per second; peak memory (of the GPU; on a CPU, of the process so far, so the stock
generator comes last); masks per image; and the share of masks that have a partner with an IoU above .95 among those of
the stock generator. Time runs from the image in memory to its RLEs. With random weights the networks cost what they
always cost; the steps after them depend on how many masks are kept.
"""

from __future__ import annotations

import argparse
import functools
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from pycocotools import mask as coco_rle
from segment_anything import SamAutomaticMaskGenerator, sam_model_registry
from segment_anything.modeling import Sam

from benchmarks.measuring import peak_memory
from tests.tiny_sam import SHARPENED_THRESHOLDS, build_tiny_sam, sharpen, synthetic_image
from tools import cli, devices, options
from tools.files import load_image
from tools.proposals import load_sam
from tools.proposals.generator import MaskGenerator, MaskOptions

Masks = list[list[dict]]
"""COCO RLEs of each image."""


def make_parser() -> cli.Parser:
    """The command line of this benchmark."""
    parser = cli.Parser(__doc__)
    add, types = parser.add_argument, ["tiny", *options.SAM_TYPES]
    add("--device", default="cpu", help="cpu, cuda or cuda:N")
    add("--checkpoint", type=Path, help="SAM's public weights; without them, random ones")
    add("--model_type", choices=types, help="default: tiny, or vit_h with a checkpoint")
    add("--images", type=Path, help="folder of photographs (.jpg); synthetic 375x500 images without it")
    add("--num_images", type=cli.positive_int, default=2, help="images")
    add("--points_per_side", type=cli.positive_int, help="prompts per side (default: 32; tiny: 20)")
    add("--points_per_batch", type=cli.positive_int, default=128, help="ours; the stock generator has 64")
    add("--images_per_batch", type=cli.positive_int, default=2, help="ours; the stock generator has 1")
    add(
        "--mixed_precision",
        choices=["auto", "bf16", "fp16", "off"],
        default="auto",
        help="auto: bf16 on GPUs, else off",
    )
    cli.add_switch(parser, "--compile", False, "also time ours with compiled networks")
    return parser


def main(args: argparse.Namespace) -> None:
    """Time both generators on the same images."""
    args.model_type = args.model_type or ("vit_h" if args.checkpoint else "tiny")
    args.points_per_side = args.points_per_side or (20 if args.model_type == "tiny" else 32)
    device, size = devices.select_device(args.device), args.images_per_batch
    images = [synthetic_image(seed, 375, 500) for seed in range(args.num_images)]
    if args.images:
        images = [load_image(path) for path in sorted(args.images.glob("*.jpg"))[: args.num_images]]
    generators = build_generators(args, build_model(args, device), devices.autocast_dtype(args.mixed_precision, device))
    print(f"{args.device}, {len(images)} images, up to {size} at a time")
    rows = {name: measure(generate, images, size, device) for name, generate in generators.items()}
    print(f"{'':<16} {'images/s':>9} {'peak GB':>8} {'masks':>7} {'agree':>7}")
    for name, (rate, memory, masks) in rows.items():
        count, agree = np.mean([len(found) for found in masks]), agreement(masks, rows["stock"][2])
        print(f"{name:<16} {rate:9.3f} {memory / 1e9:8.2f} {count:7.1f} {agree:7.3f}")


def build_model(args: argparse.Namespace, device: torch.device) -> Sam:
    """The network that the flags name, on its device."""
    if args.checkpoint:
        return load_sam(args.checkpoint, args.model_type, device)
    torch.manual_seed(0)
    return sharpen({"tiny": build_tiny_sam, **sam_model_registry}[args.model_type]()).to(device).eval()


def build_generators(args: argparse.Namespace, model: Sam, dtype: torch.dtype | None) -> dict[str, Callable]:
    """The rows of the table: functions from images to their masks."""
    flags = {"points_per_side": args.points_per_side, **({} if args.checkpoint else SHARPENED_THRESHOLDS)}
    batches = {"points_per_batch": args.points_per_batch, "images_per_batch": args.images_per_batch}
    ours = functools.partial(MaskGenerator, model, MaskOptions(**flags), **batches)
    generators: dict[str, Callable] = {"ours, float32": ours()}
    if dtype:
        generators[f"ours, {dtype}".replace("torch.", "")] = ours(dtype=dtype)
    if args.compile:
        generators["ours, compiled"] = ours(dtype=dtype, compile=True)
    stock = SamAutomaticMaskGenerator(model, output_mode="coco_rle", **flags)
    return {**generators, "stock": lambda images: [[m["segmentation"] for m in stock.generate(i)] for i in images]}


def measure(generate: Callable, images: list, batch: int, device: torch.device) -> tuple[float, int, Masks]:
    """Images per second, peak memory in bytes, and the masks."""
    generate(images[:batch])  # kernels are chosen and compiled, memory is reserved
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    start = time.perf_counter()
    masks = [found for index in range(0, len(images), batch) for found in generate(images[index : index + batch])]
    rate = len(images) / (time.perf_counter() - start)  # masks come as text: the device has finished
    return rate, peak_memory(device), masks


def agreement(found: Masks, expected: Masks) -> float:
    """The share of masks, of both sides together, that have a partner with an IoU above .95 on the other side."""
    matched = total = 0
    for ours, theirs in zip(found, expected, strict=True):
        total += len(ours) + len(theirs)
        if ours and theirs:
            iou = coco_rle.iou(ours, theirs, [0] * len(theirs))
            matched += (iou.max(axis=0) > 0.95).sum() + (iou.max(axis=1) > 0.95).sum()
    return matched / max(total, 1)


if __name__ == "__main__":
    cli.run(main, make_parser().parse_args())
