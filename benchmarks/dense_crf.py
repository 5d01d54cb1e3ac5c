"""Speed and memory of `tools.crf` against pydensecrf, on the same images in one run.

    python -m benchmarks.dense_crf                                # CPU: both with a process of one thread per core
    python -m benchmarks.dense_crf --device cuda --num_images 64  # one GPU against pydensecrf on all cores
    python -m benchmarks.dense_crf --images folder/with/photographs

A row per problem: seconds per image of both, their ratio, and the peak memory of ours (of one process, or of the GPU).
Two unaries are what CSRM solves in training (a strict and a loose threshold); pydensecrf builds its lattices for each.
The time includes the lattices, but neither reading the images nor making the unaries. Medians over images.
On a GPU also the floor: the seconds per image that the bytes take which the operations read and write, if none is fused
with the next, at the speed of a copy; they are counted on the CPU, on the first image.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import os
import resource
import time
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import torch
from torch import Tensor

from benchmarks.measuring import ByteCounter, bandwidth, peak_memory, seconds
from benchmarks.photographs import random_photograph, smooth_noise
from tools import cli, devices
from tools.crf import mean_field, unary_from_labels
from tools.files import load_image

SIZES = ((375, 500), (512, 512))
LABELS = (3, 21)
UNARIES = (1, 2)


class Case(NamedTuple):
    """One image to solve, made where it is needed: unaries of 21 labels are too big to send around."""

    seed: int
    size: tuple[int, int]
    labels: int
    unaries: int
    photograph: Path | None

    def load(self) -> tuple[Tensor, Tensor]:
        """Image uint8 [1,3,H,W] and hard-label unaries float32 [1,U,C,H,W]."""
        generator = np.random.default_rng(self.seed)
        blobs = smooth_noise(generator, self.size, self.labels, cell=90).argmax(axis=-1)
        labels = torch.from_numpy(np.stack([blobs, np.roll(blobs, 9, axis=1)])[: self.unaries])
        if self.photograph:
            image = cv2.resize(load_image(self.photograph), self.size[::-1], interpolation=cv2.INTER_AREA)
        else:
            image = random_photograph(generator, self.size)
        image = torch.from_numpy(image).permute(2, 0, 1)[None].contiguous()
        return image, unary_from_labels(labels, self.labels)[None]


def solve_on_core(task: tuple[Case, str]) -> tuple[float, int]:
    """Seconds on one thread of this process, and bytes by which the peak of its memory grew."""
    case, backend = task
    torch.set_num_threads(1)
    devices.select_device("cpu")  # as the scripts do
    image, unary = case.load()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    mean_field(image, unary, backend=backend)
    elapsed = time.perf_counter() - start
    return elapsed, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024


def measure_cores(cases: list[Case], backend: str, workers: int) -> tuple[float, int]:
    """Seconds per image with all `workers` busy, and the peak memory of one."""
    with multiprocessing.get_context("fork").Pool(workers) as pool:
        elapsed, memory = zip(*pool.map(solve_on_core, [(case, backend) for case in cases], chunksize=1), strict=True)
    return float(np.median(elapsed)) / workers, max(memory)


def measure_gpu(cases: list[Case], device: torch.device) -> tuple[float, int]:
    """Seconds per image and peak memory of one call for all images, after a first call."""
    images, unaries = (torch.cat(parts).to(device) for parts in zip(*(case.load() for case in cases), strict=True))
    mean_field(images, unaries)
    torch.cuda.reset_peak_memory_stats(device)
    return seconds(device, lambda: mean_field(images, unaries)) / len(cases), peak_memory(device)


def make_parser() -> cli.Parser:
    """The command line of this benchmark."""
    parser = cli.Parser(__doc__)
    add, cores = parser.add_argument, os.cpu_count()
    add("--device", default="cpu", help="where tools.crf runs: cpu, cuda, cuda:1 ...")
    add("--images", type=Path, help="folder of photographs (.jpg); synthetic images without it")
    add("--num_images", type=cli.positive_int, default=8, help="images per problem")
    add("--workers", type=cli.positive_int, default=cores, help="processes (one thread each) on the CPU")
    return parser


def main(args: argparse.Namespace) -> None:
    """Print a row per problem."""
    device = devices.select_device(args.device)
    photographs = sorted(args.images.glob("*.jpg"))[: args.num_images] if args.images else [None] * args.num_images
    on_gpu = device.type == "cuda"
    copied = bandwidth(device) if on_gpu else None
    print(f"device {args.device}, {args.workers} processes, {len(photographs)} images, 10 iterations")
    header = f"{'size':>9} {'labels':>7} {'unaries':>8} {'torch s':>9} {'pydensecrf s':>13} {'ratio':>7} {'peak GB':>8}"
    print(header + (f" {'GB/image':>9} {'floor s':>9}" if on_gpu else ""))
    for size, labels, unaries in itertools.product(SIZES, LABELS, UNARIES):
        cases = [Case(seed, size, labels, unaries, path) for seed, path in enumerate(photographs)]
        reference, _ = measure_cores(cases, "pydensecrf", args.workers)
        ours, memory = measure_gpu(cases, device) if on_gpu else measure_cores(cases, "torch", args.workers)
        row = f"{ours:9.4f} {reference:13.4f} {reference / ours:7.2f} {memory / 1e9:8.2f}"
        if on_gpu:
            with ByteCounter() as moved:
                mean_field(*cases[0].load())
            row += f" {moved.total / 1e9:9.2f} {moved.total / copied:9.4f}"
        print(f"{size[0]:>5}x{size[1]} {labels:7d} {unaries:8d} {row}", flush=True)


if __name__ == "__main__":
    cli.run(main, make_parser().parse_args())
