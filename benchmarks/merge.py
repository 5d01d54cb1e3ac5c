"""Merging speed: ours against the literal rule on a folder of PNG masks, per core, reading included on both sides.

    python -m benchmarks.merge --num_masks 100 --height 375 --width 500

Each side reads the masks from its own storage: ours one RLE file per image, the literal rule (as SEPL's released tool
applies it) one PNG per mask, decoded once per class. Prints CPU milliseconds per image and their ratio, after checking
that both agree: for the merging alone, and with the pseudo mask read and the result written, which cost both the same.
"""

from __future__ import annotations

import argparse
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # one core on both sides; read when numpy is imported
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from datasets.base import voc_palette
from tools import cli
from tools.files import load_mask, save_mask
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
    group.add_argument("--num_images", type=cli.positive_int, default=8, help="different images, one after the other")
    group.add_argument("--repeats", type=cli.positive_int, default=5, help="passes; the fastest is reported")
    return parser


@dataclass(frozen=True)
class Image:
    """One pseudo mask and its proposals, in memory and in the storage of both sides."""

    pseudo_mask: np.ndarray
    folder: Path
    pngs: list[Path]

    def literal(self, pseudo_mask: np.ndarray) -> np.ndarray:
        """Merge from one PNG per mask."""
        return literal(pseudo_mask, self.pngs)

    def ours(self, pseudo_mask: np.ndarray) -> np.ndarray:
        """Merge from one RLE file."""
        return merge_masks(pseudo_mask, load_proposals(self.folder / "proposals.json", pseudo_mask.shape))


def main(args: argparse.Namespace) -> None:
    """Time both on synthetic images with two classes."""
    cv2.setNumThreads(1)
    with tempfile.TemporaryDirectory() as folder:
        images = [write_image(args, Path(folder) / str(seed), seed) for seed in range(args.num_images)]
        for image in images:
            assert np.array_equal(image.ours(image.pseudo_mask), image.literal(image.pseudo_mask)), "the rules disagree"
        print(f"{args.num_masks} masks, 2 classes, {args.height}x{args.width}: CPU ms per image, one core")
        print(f"{'':<44} {'literal, PNGs':>14} {'ours, RLE':>10} {'ratio':>7}")
        report("masks read and merged", images, args.repeats, lambda merge, image: merge(image, image.pseudo_mask))
        report("pseudo mask read, result written as well", images, args.repeats, whole)


def write_image(args: argparse.Namespace, folder: Path, seed: int) -> Image:
    """Make one image and write its pseudo mask, its PNG masks and its RLE file."""
    pseudo_mask, masks = synthetic_image(args.num_masks, args.height, args.width, seed)
    save_mask(folder / "pseudo.png", pseudo_mask, voc_palette())
    save_proposals(folder / "proposals.json", masks)
    pngs = [folder / f"{index}.png" for index in range(len(masks))]
    for png, mask in zip(pngs, masks, strict=True):
        cv2.imwrite(str(png), mask * np.uint8(255))
    return Image(pseudo_mask, folder, pngs)


def report(title: str, images: list[Image], repeats: int, work: Callable[[Callable, Image], object]) -> None:
    """Print the CPU time of `work` per image on both sides, and the ratio. Other programs only make a pass slower."""
    slow, fast = (
        min(cpu_ms(lambda: [work(merge, image) for image in images]) for _ in range(passes)) / len(images)  # noqa: B023
        for merge, passes in ((Image.literal, repeats), (Image.ours, 20 * repeats))  # still the shorter of the two
    )
    print(f"{title:<44} {slow:14.2f} {fast:10.2f} {slow / fast:7.1f}")


def whole(merge: Callable, image: Image) -> None:
    """What `refine_sam.py --stage merge` does for an image, but for its report."""
    refined = merge(image, load_mask(image.folder / "pseudo.png"))
    save_mask(image.folder / "refined.png", refined, voc_palette())


def synthetic_image(count: int, height: int, width: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """A pseudo mask with two discs as classes, and ellipses of all sizes as proposals."""
    rng = np.random.default_rng(seed)
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


def cpu_ms(function: Callable[[], object]) -> float:
    """CPU time of a call in milliseconds: unlike the clock, it does not count what other programs do."""
    start = time.process_time()
    function()
    return 1000 * (time.process_time() - start)


if __name__ == "__main__":
    cli.run(main, make_parser().parse_args())
