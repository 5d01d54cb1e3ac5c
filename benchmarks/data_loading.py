"""Images per second that the loader alone delivers, by number of workers.

    python -m benchmarks.data_loading
    python -m benchmarks.data_loading --workers 4,8,16

Reading, decoding, scaling, cropping and collating, as in CSRM's labeled half, of random photographs of VOC's size.
Training on a GPU needs at least as many images per second as benchmarks.train_step reports without loading.
"""

import argparse
import os
import tempfile
import time
from pathlib import Path

from benchmarks.measuring import print_row, write_photographs
from datasets import build_source
from datasets.dataset import ImageDataset
from datasets.loaders import build_loader
from datasets.transforms import train_geometry
from tools import cli, options


def make_parser() -> cli.Parser:
    parser = cli.Parser(__doc__)
    add, workers = parser.add_argument, ",".join(map(str, sorted({0, 1, os.cpu_count() or 1})))
    add("--workers", default=workers, metavar="LIST", help="numbers of workers to try, comma-separated")
    add("--batch_size", type=cli.positive_int, default=16, help="images per batch")
    add("--num_images", type=cli.positive_int, default=128, help="images to time, after as many to warm up")
    options.add_images(parser)
    return parser


def main(args: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as folder:
        source = build_source("folder", write_photographs(Path(folder) / "data", args.num_images))
        dataset = ImageDataset(source, source.ids("train"), train_geometry(*options.image_sizes(args)))
        print(f"{args.image_size} pixels, batches of {args.batch_size}, {os.cpu_count()} cores")
        print_row("workers", "images/s")
        for workers in args.workers.split(","):
            print_row(workers, images_per_second(dataset, args, cli.count(workers)))


def images_per_second(dataset: ImageDataset, args: argparse.Namespace, num_workers: int) -> float:
    """Speed of the second epoch: in the first, workers start and files come into the system's memory."""
    steps = -(-args.num_images // args.batch_size)
    loader = build_loader(dataset, args.batch_size, num_workers=num_workers, seed=0, steps_per_epoch=steps)
    for epoch in range(2):
        loader.set_epoch(epoch)
        start = time.perf_counter()
        batches = sum(1 for _ in loader)
    return batches * args.batch_size / (time.perf_counter() - start)


if __name__ == "__main__":
    cli.run(main, make_parser().parse_args())
