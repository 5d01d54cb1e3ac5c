"""Speed and memory of the COCO conversion, on an annotation file of any size.

    python -m benchmarks.coco14                                  # like COCO's: 7 objects per image, 42 points each
    python -m benchmarks.coco14 --num_images 2000 --points 2200  # a json of COCO's size, 471 MB, in a few minutes

Writes a synthetic `instances_train2014.json` of 640x480 images to a temporary folder and converts it. Prints images per
second, reading included; processor time, which other jobs on the machine change less; and the peak memory of this
process and of the largest worker.
"""

from __future__ import annotations

import argparse
import json
import resource
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from datasets.prepare import coco14
from tools import cli, options

HEIGHT, WIDTH, CLASSES = 480, 640, 80


def make_parser() -> cli.Parser:
    """The command line of this benchmark."""
    parser = cli.Parser(__doc__)
    group = parser.add_argument_group("benchmark")
    group.add_argument("--num_images", type=cli.positive_int, default=3000, help="images in the json")
    group.add_argument("--objects", type=cli.positive_int, default=7, help="objects per image")
    group.add_argument("--points", type=cli.positive_int, default=42, help="points of an object's outline")
    group.add_argument("--folder", type=Path, help="where to put the temporary files (default: the system's place)")
    options.add_workers(group)
    return parser


def main(args: argparse.Namespace) -> None:
    """Time one conversion."""
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        annotations = Path(folder) / "annotations"
        annotations.mkdir()
        write_json(annotations / "instances_train2014.json", args.num_images, args.objects, args.points)
        write_json(annotations / "instances_val2014.json", 1, 1, 5)
        size = (annotations / "instances_train2014.json").stat().st_size
        before = peak_mb(resource.RUSAGE_SELF)
        start, cpu_start = time.perf_counter(), cpu_seconds()
        coco14.convert(Path(folder), args.num_workers)
        seconds, cpu = time.perf_counter() - start, cpu_seconds() - cpu_start
    print(f"json of {size / 1e6:.0f} MB, {args.num_images} images, {args.num_workers} workers")
    print(
        f"{args.num_images / seconds:.0f} images/s, {1000 * cpu / args.num_images:.1f} ms of processor time per image"
    )
    print(f"peak memory: {before:.0f} MB before, {peak_mb(resource.RUSAGE_SELF):.0f} MB after", end="")
    print(f", {peak_mb(resource.RUSAGE_CHILDREN):.0f} MB in the largest worker")


def write_json(path: Path, num_images: int, objects: int, points: int) -> None:
    """An annotation file, written piece by piece: random outlines, image by image."""
    image = {
        "height": HEIGHT,
        "width": WIDTH,
        "license": 1,
        "coco_url": "http://images.cocodataset.org/train2014/x.jpg",
    }
    images = ({"id": i, "file_name": f"COCO_{path.stem[10:]}_{i:012d}.jpg"} | image for i in range(num_images))
    categories = ({"id": index + 1, "name": f"class {index}", "supercategory": "x"} for index in range(CLASSES))
    with path.open("w", encoding="utf-8") as file:
        for opening, items in (
            ('{"info": {}, "images": [', images),
            ('], "annotations": [', outlines(num_images, objects, points)),
            ('], "categories": [', categories),
        ):
            file.write(opening)
            for index, item in enumerate(items):
                file.write(", " * (index > 0) + json.dumps(item))
        file.write("]}")


def outlines(num_images: int, objects: int, points: int) -> Iterator[dict]:
    """Annotations of star-shaped objects."""
    rng = np.random.default_rng(0)
    for index in range(num_images * objects):
        angles = np.sort(rng.uniform(0, 2 * np.pi, points))
        radii = rng.uniform(8, 120) * rng.uniform(0.7, 1, points)
        outline = np.stack([np.cos(angles), np.sin(angles)], 1) * radii[:, None] + rng.uniform((0, 0), (WIDTH, HEIGHT))
        yield {
            "segmentation": [outline.clip(0, (WIDTH, HEIGHT)).round(2).ravel().tolist()],
            "area": 1.0,
            "iscrowd": 0,
            "image_id": index // objects,
            "bbox": [0.0, 0.0, 1.0, 1.0],
            "category_id": int(rng.integers(CLASSES)) + 1,
            "id": index,
        }


def cpu_seconds() -> float:
    """Processor time of this process and its finished workers."""
    usages = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def peak_mb(who: int) -> float:
    """Peak resident memory in MB."""
    return resource.getrusage(who).ru_maxrss / 1000


if __name__ == "__main__":
    cli.run(main, make_parser().parse_args())
