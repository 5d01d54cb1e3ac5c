"""Speed and memory of `tools.crf` against pydensecrf, on the same images in one run.

    python -m benchmarks.dense_crf                                # CPU: both with a process of one thread per core
    python -m benchmarks.dense_crf --device cuda --num_images 64  # one GPU against pydensecrf on all cores
    python -m benchmarks.dense_crf --images folder/with/photographs

A row per problem: seconds per image of both, with the lattices, and their ratio. Two unaries are what CSRM
solves in training; pydensecrf builds its lattices for each. Medians over images. On a GPU also the floor: the seconds
that a copy takes of the bytes which the operations move, if none is fused with the next; they are counted on the CPU.
"""

import argparse
import functools
import itertools
import multiprocessing
import os
from pathlib import Path

import cv2
import numpy as np
import torch
from torch import Tensor

from benchmarks import measuring
from benchmarks.measuring import print_row
from tools import cli, devices
from tools.crf import mean_field, unary_from_labels
from tools.files import load_image

SIZES = ((375, 500), (512, 512))


def make_parser() -> cli.Parser:
    parser = cli.Parser(__doc__)
    add = parser.add_argument
    add("--device", default="cpu", help="where tools.crf runs: cpu, cuda, cuda:1 ...")
    add("--images", type=Path, help="folder of photographs (.jpg); synthetic images without it")
    add("--num_images", type=cli.positive_int, default=8, help="images per problem")
    add("--workers", type=cli.positive_int, default=os.cpu_count(), help="processes (one thread each) on the CPU")
    return parser


def main(args: argparse.Namespace) -> None:
    device = devices.select_device(args.device)
    photographs = sorted(args.images.glob("*.jpg"))[: args.num_images] if args.images else [None] * args.num_images
    on_gpu = device.type == "cuda"
    print(f"device {args.device}, {args.workers} processes, {len(photographs)} images, 10 iterations")
    floors = ("GB/image", "floor s") if on_gpu else ()
    print_row("size", "labels", "unaries", "torch s", "pydensecrf s", "ratio", *floors)
    for size, labels, unaries in itertools.product(SIZES, (3, 21), (1, 2)):
        cases = [(seed, size, labels, unaries, path) for seed, path in enumerate(photographs)]
        reference = measure_cores(cases, "pydensecrf", args.workers)
        ours = measure_gpu(cases, device) if on_gpu else measure_cores(cases, "torch", args.workers)
        floor = floor_of(cases[0], device) if on_gpu else ()
        print_row("{}x{}".format(*size), labels, unaries, ours, reference, reference / ours, *floor)


def load(seed: int, size: tuple[int, int], labels: int, unaries: int, photograph: Path | None) -> tuple[Tensor, Tensor]:
    """Image uint8 [1,3,H,W] and hard-label unaries float32 [1,U,C,H,W]; not made before: those of 21 labels are big."""
    generator = np.random.default_rng(seed)
    blobs = measuring.smooth_noise(generator, size, labels, cell=90).argmax(axis=-1)
    maps = torch.from_numpy(np.stack([blobs, np.roll(blobs, 9, axis=1)])[:unaries])
    image = measuring.random_photograph(generator, size)
    if photograph:
        image = cv2.resize(load_image(photograph), size[::-1], interpolation=cv2.INTER_AREA)
    return torch.from_numpy(image).permute(2, 0, 1)[None].contiguous(), unary_from_labels(maps, labels)[None]


def measure_cores(cases: list[tuple], backend: str, workers: int) -> float:
    """Seconds per image with all `workers` busy."""
    with multiprocessing.get_context("fork").Pool(workers) as pool:
        return float(np.median(pool.map(functools.partial(solve_on_core, backend), cases, chunksize=1))) / workers


def solve_on_core(backend: str, case: tuple) -> float:
    """Seconds on one thread of this process."""
    torch.set_num_threads(1)
    cpu = devices.select_device("cpu")  # as the scripts do
    image, unary = load(*case)
    return measuring.seconds(cpu, lambda: mean_field(image, unary, backend=backend))


def measure_gpu(cases: list[tuple], device: torch.device) -> float:
    """Seconds per image of one call for all images, after a first call."""
    images, unaries = (torch.cat(parts).to(device) for parts in zip(*(load(*case) for case in cases), strict=True))
    mean_field(images, unaries)
    return measuring.seconds(device, lambda: mean_field(images, unaries)) / len(cases)


def floor_of(case: tuple, device: torch.device) -> tuple[float, float]:
    """Gigabytes that the operations move, and the seconds that a copy of them takes."""
    with measuring.ByteCounter() as moved:
        mean_field(*load(*case))
    return moved.total / 1e9, moved.total / measuring.bandwidth(device)


if __name__ == "__main__":
    cli.run(main, make_parser().parse_args())
