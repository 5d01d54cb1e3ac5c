"""Random photographs with masks in the `folder` layout, for benchmarks that need a dataset on disk."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.dense_crf import random_photograph, smooth_noise
from datasets.base import voc_palette
from tools.files import save_mask

SIZE = (375, 500)
"""Height and width: those of most photographs in VOC."""

CLASSES = 20


def write_photographs(root: Path, count: int) -> Path:
    """Write `count` JPEG files of random photographs, each with two classes and a mask."""
    for name in ("images", "masks"):
        (root / name).mkdir(parents=True)
    rows = []
    for index in range(count):
        generator = np.random.default_rng(index)
        Image.fromarray(random_photograph(generator, SIZE)).save(root / "images" / f"{index:04}.jpg", quality=90)
        classes = np.append(0, 1 + generator.choice(CLASSES, 2, replace=False))
        save_mask(
            root / "masks" / f"{index:04}.png",
            classes[smooth_noise(generator, SIZE, 3, 90).argmax(axis=-1)],
            voc_palette(),
        )
        rows.append(f"{index:04},{classes[1]};{classes[2]}\n")
    (root / "classes.txt").write_text("\n".join(["background", *map(str, range(1, CLASSES + 1))]) + "\n")
    (root / "labels.csv").write_text("id,labels\n" + "".join(rows))
    return root
