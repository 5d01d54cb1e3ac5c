"""What is in a dataset: its classes, and how many images each split has. Finds a wrong folder before training does.

python -m datasets train val --dataset voc12 --data_dir data/voc12
"""

from __future__ import annotations

import argparse

from datasets import build_source
from tools import cli


def main(args: argparse.Namespace) -> None:
    """Open the dataset and the splits asked for; print what is there."""
    source = build_source(args.dataset, cli.data_dir(args))
    print(f"{cli.data_dir(args)}: {source.info.num_foreground} classes: {', '.join(source.info.classes[1:])}")
    for domain in args.domains or source.domains():
        print(f"  {domain}: {len(source.ids(domain))} images")


if __name__ == "__main__":
    parser = cli.Parser(__doc__)
    parser.add_argument("domains", nargs="*", help="splits to look at (default: all)")
    cli.add_dataset(parser)
    cli.run(main, parser)
