"""Images per second of inference.py and of train_segmentation.py --predict, here and as an earlier revision had them.

    python -m benchmarks.prediction --revision 9108ef5 --data_dir voc-animals --domain val --num_images 50

A CSRM (MobileNetV2, random weights) predicts the first images of the split at 225 pixels: four scales, mirrored, with
dense CRF. The revisions take turns; the best of --repeats runs counts, start of the program included. Other programs
disturb processor time less than the clock. A line of each script says how many files are equal.
"""

import argparse
import os
import shutil
import tempfile
import time
from pathlib import Path

import numpy as np

from benchmarks.measuring import HERE, checkout, run
from datasets import build_source
from models import build_model
from tools import cli
from tools.checkpoint import save_checkpoint


def make_parser() -> cli.Parser:
    parser = cli.Parser(__doc__)
    add = parser.add_argument
    add("--revision", required=True, help="the one to compare with, as git names it")
    add("--data_dir", type=Path, required=True, help="a data set of kind `folder`")
    add("--domain", default="train", help="split")
    add("--num_images", type=cli.positive_int, default=30, help="images of it")
    add("--device", default="cpu", help="cpu or cuda")
    add("--repeats", type=cli.positive_int, default=2, help="runs of each")
    return parser


def main(args: argparse.Namespace) -> None:
    """Time both revisions in turn and print images/s and their ratio."""
    with tempfile.TemporaryDirectory() as folder:
        codes = [checkout(args.revision, Path(folder, "code")), HERE]
        data, *works = (Path(folder, name) for name in ("data", "before", "here"))
        prepare(args, data, works)
        flags = f"--tag csrm --dataset folder --data_dir {data} --domain train --device {args.device}"
        for command in ("inference.py", "train_segmentation.py --predict"):
            commands = [f"{code}/{command} {flags}" for code in codes]
            runs = [[seconds(*each) for each in zip(works, commands, strict=True)] for _ in range(args.repeats)]
            before, here = args.num_images / np.min(runs, axis=0)
            for unit, b, h in zip(("images/s", "images/s of processor time"), before, here, strict=True):
                print(f"{command}: {unit} {args.revision} {b:.2f}  here {h:.2f}  ratio {h / b:.2f}")
            files = [path.relative_to(works[1]) for path in works[1].rglob("*@*/*/*.*[gz]")]
            same = sum(len({(work / file).read_bytes() for work in works}) == 1 for file in files)
            print(f"{command}: {same} of {len(files)} files are equal")


def seconds(folder: Path, command: str) -> tuple[float, float]:
    """How long a command takes to make all predictions, and how much processor time."""
    shutil.rmtree(folder / "experiments" / "predictions", ignore_errors=True)
    start, used = time.perf_counter(), os.times().children_user
    run(folder, command)
    return time.perf_counter() - start, os.times().children_user - used


def prepare(args: argparse.Namespace, data: Path, works: list[Path]) -> None:
    """The first images of the split as a data set of their own; one network for both revisions."""
    source = build_source("folder", args.data_dir)
    (data / "splits").mkdir(parents=True)
    for part in ("images", "classes.txt", "labels.csv"):
        (data / part).symlink_to((args.data_dir / part).resolve())
    (data / "splits" / "train.txt").write_text("\n".join(source.ids(args.domain)[: args.num_images]) + "\n")
    model = build_model("csrm", architecture="mobilenetv2_100", num_classes=source.info.num_classes)
    state = {"config": model.config, "model": model.state_dict(), "classes": list(source.info.classes), "epoch": 1}
    for work in works:
        save_checkpoint(work / "experiments/models/csrm.pth", **state, max_epoch=1, args={"image_size": 225})


if __name__ == "__main__":
    cli.run(main, make_parser().parse_args())
