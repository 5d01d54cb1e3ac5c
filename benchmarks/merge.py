"""Merging speed: ours against the literal rule on a folder of PNG masks, per core, reading included on both sides.

    python -m benchmarks.merge --num_masks 100 --height 375 --width 500

Each side reads the masks from its own storage: ours one RLE file per image, the literal rule (SEPL's released tool) one
PNG per mask, decoded once per class. Prints milliseconds per image and the ratio, after checking that both agree.
"""

from __future__ import annotations

import argparse
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # one core on both sides; read when numpy is imported
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np

from tools import cli
from tools.merging import merge_masks
from tools.proposals import load_proposals, save_proposals

RECALL = 0.85


def make_parser() -> cli.Parser:
    """The command line of this benchmark."""
    parser = cli.Parser(__doc__)
    group = parser.add_argument_group("benchmark")
    group.add_argument("--num_masks", type=cli.positive_int, default=100, help="masks in the image")
    group.add_argument("--height", type=cli.positive_int, default=375, help="pixels")
    group.add_argument("--width", type=cli.positive_int, default=500, help="pixels")
    group.add_argument("--repeats", type=cli.positive_int, default=10, help="the median of this many is reported")
    return parser


def main(args: argparse.Namespace) -> None:
    """Time both on one synthetic image with two classes."""
    cv2.setNumThreads(1)
    pseudo_mask, masks = synthetic_image(args.num_masks, args.height, args.width)
    with tempfile.TemporaryDirectory() as folder:
        save_proposals(Path(folder) / "image.json", masks)
        for index, mask in enumerate(masks):
            cv2.imwrite(f"{folder}/{index}.png", mask * np.uint8(255))
        files = sorted(Path(folder).glob("*.png"))
        assert np.array_equal(ours(pseudo_mask, folder), literal(pseudo_mask, files)), "the two rules disagree"
        fast = median_ms(lambda: ours(pseudo_mask, folder), args.repeats)
        slow = median_ms(lambda: literal(pseudo_mask, files), args.repeats)
    print(f"{args.num_masks} masks, 2 classes, {args.height}x{args.width}, one core, reading included")
    print(f"literal rule on PNG files {slow:8.1f} ms per image\nours on one RLE file      {fast:8.1f} ms per image")
    print(f"ratio                     {slow / fast:8.1f}")


def synthetic_image(count: int, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """A pseudo mask with two discs as classes, and ellipses of all sizes as proposals."""
    rng = np.random.default_rng(0)
    rows, columns = np.mgrid[:height, :width]
    centres = rng.random((count, 2)) * (height, width)
    radii = np.geomspace(0.03, 0.35, count)[:, None] * (height, width) * rng.uniform(0.6, 1.4, (count, 2))
    masks = [
        ((rows - y) / a) ** 2 + ((columns - x) / b) ** 2 < 1 for (y, x), (a, b) in zip(centres, radii, strict=True)
    ]
    pseudo_mask = np.zeros((height, width), np.uint8)
    pseudo_mask[(rows - height / 3) ** 2 + (columns - width / 3) ** 2 < (height / 4) ** 2] = 1
    pseudo_mask[(rows - height / 1.6) ** 2 + (columns - width / 1.4) ** 2 < (height / 4) ** 2] = 2
    return pseudo_mask, np.stack(masks)


def ours(pseudo_mask: np.ndarray, folder: str) -> np.ndarray:
    """Read the RLE file, merge."""
    return merge_masks(pseudo_mask, load_proposals(Path(folder) / "image.json"))


def literal(pseudo_mask: np.ndarray, files: list[Path]) -> np.ndarray:
    """The rule of `merge_masks` as it reads: for every class, for every mask file not yet used."""
    refined = np.zeros_like(pseudo_mask)
    used: set[Path] = set()
    for class_index in np.unique(pseudo_mask[pseudo_mask > 0]):
        region = pseudo_mask == class_index
        union, covered, taken = np.zeros_like(region), np.zeros_like(region), set()
        for file in files:
            if file in used:
                continue
            mask = cv2.imread(str(file), cv2.IMREAD_GRAYSCALE) > 0
            overlap = np.sum(mask & region)
            covered |= mask
            if overlap > 0.5 * np.sum(mask) or overlap >= RECALL * np.sum(region):
                union |= mask
                taken.add(file)
        used |= taken
        refined[union | (region & ~covered)] = class_index
    return refined


def median_ms(function: Callable[[], object], repeats: int) -> float:
    """Median time of a call in milliseconds."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return 1000 * float(np.median(times))


if __name__ == "__main__":
    cli.run(main, make_parser())
