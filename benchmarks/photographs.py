"""Random photographs, alone or with masks in the `folder` layout, for benchmarks on machines without a data set."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from datasets.base import voc_palette
from datasets.folder import write_lists
from tools.files import save_mask

SIZE = (375, 500)
"""Height and width: those of most photographs in VOC."""

CLASSES = 20


def random_photograph(generator: np.random.Generator, size: tuple[int, int]) -> np.ndarray:
    """uint8 [H,W,3]: smooth noise of several grains."""
    layers = [smooth_noise(generator, size, 3, cell) * cell**0.5 for cell in (3, 12, 60, 200)]
    return (128 + 9 * sum(layers)).clip(0, 255).astype(np.uint8)


def smooth_noise(generator: np.random.Generator, size: tuple[int, int], channels: int, cell: int) -> np.ndarray:
    """Normal noise on a grid of `cell` pixels, interpolated to float [H,W,channels]."""
    coarse = generator.standard_normal((size[0] // cell + 2, size[1] // cell + 2, channels)).astype(np.float32)
    planes = [cv2.resize(plane, size[::-1], interpolation=cv2.INTER_CUBIC) for plane in np.moveaxis(coarse, -1, 0)]
    return np.stack(planes, axis=-1)


def write_photographs(root: Path, count: int) -> Path:
    """Write `count` JPEG files of random photographs, each with two classes and a mask."""
    (root / "images").mkdir(parents=True)
    names, labels = ["background", *map(str, range(1, CLASSES + 1))], {}
    for index in range(count):
        generator = np.random.default_rng(index)
        Image.fromarray(random_photograph(generator, SIZE)).save(root / "images" / f"{index:04}.jpg", quality=90)
        classes = np.append(0, 1 + generator.choice(CLASSES, 2, replace=False))
        blobs = smooth_noise(generator, SIZE, 3, 90).argmax(axis=-1)
        save_mask(root / "masks" / f"{index:04}.png", classes[blobs], voc_palette())
        labels[f"{index:04}"] = [names[c] for c in classes[1:]]
    write_lists(root, names, labels, {})
    return root
