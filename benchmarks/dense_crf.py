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
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch
from torch import Tensor

from benchmarks.measuring import ByteCounter, bandwidth, peak_memory, seconds
from tools import cli, devices
from tools.crf import mean_field, unary_from_labels
from tools.files import load_image

SIZES = ((375, 500), (512, 512))
LABELS = (3, 21)
UNARIES = (1, 2)


@dataclass(frozen=True)
class Case:
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
        unary = unary_from_labels(labels, self.labels)[None]
        return torch.from_numpy(self._image(generator)).permute(2, 0, 1)[None].contiguous(), unary

    def _image(self, generator: np.random.Generator) -> np.ndarray:
        if self.photograph:
            return cv2.resize(load_image(self.photograph), self.size[::-1], interpolation=cv2.INTER_AREA)
        return random_photograph(generator, self.size)


def random_photograph(generator: np.random.Generator, size: tuple[int, int]) -> np.ndarray:
    """uint8 [H,W,3]: smooth noise of several grains."""
    layers = [smooth_noise(generator, size, 3, cell) * cell**0.5 for cell in (3, 12, 60, 200)]
    return (128 + 9 * sum(layers)).clip(0, 255).astype(np.uint8)


def smooth_noise(generator: np.random.Generator, size: tuple[int, int], channels: int, cell: int) -> np.ndarray:
    """Normal noise on a grid of `cell` pixels, interpolated to float [H,W,channels]."""
    coarse = generator.standard_normal((size[0] // cell + 2, size[1] // cell + 2, channels)).astype(np.float32)
    planes = [cv2.resize(plane, size[::-1], interpolation=cv2.INTER_CUBIC) for plane in np.moveaxis(coarse, -1, 0)]
    return np.stack(planes, axis=-1)


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


def gigabytes(case: Case) -> float:
    """What the operations on one image read and write."""
    with ByteCounter() as counter:
        mean_field(*case.load())
    return counter.total / 1e9


def make_parser() -> cli.Parser:
    """The command line of this benchmark."""
    parser = cli.Parser(__doc__)
    group = parser.add_argument_group("benchmark")
    group.add_argument("--device", default="cpu", help="where tools.crf runs: cpu, cuda, cuda:1 ...")
    group.add_argument("--images", type=Path, help="folder of photographs (.jpg); synthetic images without it")
    group.add_argument("--num_images", type=cli.positive_int, default=8, help="images per problem")
    group.add_argument(
        "--workers", type=cli.positive_int, default=os.cpu_count(), help="processes (one thread each) on the CPU"
    )
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
        if on_gpu:
            ours, memory = measure_gpu(cases, device)
        else:
            ours, memory = measure_cores(cases, "torch", args.workers)
        row = f"{ours:9.4f} {reference:13.4f} {reference / ours:7.2f} {memory / 1e9:8.2f}"
        if on_gpu:
            size_gb = gigabytes(cases[0])
            row += f" {size_gb:9.2f} {1e9 * size_gb / copied:9.4f}"
        print(f"{size[0]:>5}x{size[1]} {labels:7d} {unaries:8d} {row}", flush=True)


if __name__ == "__main__":
    cli.run(main, make_parser().parse_args())
