"""Images per second of inference.py and of train_segmentation.py --predict, here and as an earlier revision had them.

    python -m benchmarks.prediction --revision 9108ef5 --data_dir voc-animals --domain val --num_images 50

A CSRM with random weights predicts the first images of the split: four scales, mirrored, with dense CRF. The revisions
take turns; of each, the best of --repeats counts, start included. A last line says whether all files are equal.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from datasets import build_source
from models import build_model
from tools import cli
from tools.checkpoint import save_checkpoint
from tools.errors import UserError

HERE = Path(__file__).resolve().parent.parent
COMMANDS = ("inference.py", "train_segmentation.py --predict")


def make_parser() -> cli.Parser:
    """The command line of this benchmark."""
    parser = cli.Parser(__doc__)
    parser.add_argument("--revision", required=True, help="the one to compare with, as git names it")
    parser.add_argument("--data_dir", type=Path, required=True, help="a data set of kind `folder`")
    parser.add_argument("--domain", default="train", help="split")
    parser.add_argument("--num_images", type=cli.positive_int, default=30, help="images of it")
    parser.add_argument("--architecture", default="mobilenetv2_100", help="a timm network")
    parser.add_argument("--image_size", type=cli.positive_int, default=225, help="long side at scale 1")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--repeats", type=cli.positive_int, default=2, help="runs of each")
    return parser


def main(args: argparse.Namespace) -> None:
    """Time both revisions in turn and print images/s and their ratio."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(args, folder)
        codes = {args.revision: folder / "code", "here": HERE}
        for command in COMMANDS:
            seconds = {revision: [] for revision in codes}
            for _ in range(args.repeats):
                for revision, code in codes.items():
                    seconds[revision].append(timed(code, folder / "data", folder / "work" / revision, command, args))
            rates = {revision: args.num_images / min(times) for revision, times in seconds.items()}
            shown = "  ".join(f"{revision} {rate:.2f}" for revision, rate in rates.items())
            print(f"{command}: images/s {shown}  ratio {rates['here'] / rates[args.revision]:.2f}")
        files = [path for path in (folder / "work" / "here").rglob("*.*") if path.suffix in (".npz", ".png")]
        theirs = [folder / "work" / args.revision / path.relative_to(folder / "work" / "here") for path in files]
        same = sum(a.read_bytes() == b.read_bytes() for a, b in zip(files, theirs, strict=True))
        print(f"{same} of {len(files)} files are equal")


def prepare(args: argparse.Namespace, folder: Path) -> None:
    """The other revision's code, the first images of the split as a data set of their own, the network."""
    archive = ["git", "archive", "--output", str(folder / "code.tar"), args.revision]
    if subprocess.run(archive, cwd=HERE, capture_output=True).returncode:
        raise UserError(f"--revision {args.revision}: git does not know it. Name a commit or a tag.")
    shutil.unpack_archive(folder / "code.tar", folder / "code")
    source = build_source("folder", args.data_dir)
    data = folder / "data"
    (data / "splits").mkdir(parents=True)
    for part in ("images", "classes.txt", "labels.csv"):
        (data / part).symlink_to((args.data_dir / part).resolve())
    (data / "splits" / "train.txt").write_text("\n".join(source.ids(args.domain)[: args.num_images]) + "\n")
    model = build_model("csrm", architecture=args.architecture, num_classes=source.info.num_classes)
    state = {"config": model.config, "model": model.state_dict(), "classes": list(source.info.classes), "epoch": 1}
    for revision in (args.revision, "here"):
        path = folder / "work" / revision / "experiments" / "models" / "csrm.pth"
        save_checkpoint(path, **state, max_epoch=1, args={"image_size": args.image_size})


def timed(code: Path, data: Path, work: Path, command: str, args: argparse.Namespace) -> float:
    """Seconds of one run, from nothing."""
    shutil.rmtree(work / "experiments" / "predictions", ignore_errors=True)
    flags = [
        "--tag",
        "csrm",
        "--dataset",
        "folder",
        "--data_dir",
        str(data),
        "--domain",
        "train",
        "--device",
        args.device,
    ]
    script, *rest = command.split()
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, str(code / script), *rest, *flags], cwd=work, env=os.environ, capture_output=True, text=True
    )
    if done.returncode:
        raise UserError(f"{command}: {done.stderr.strip()[-300:]}")
    return time.perf_counter() - start


if __name__ == "__main__":
    cli.run(main, make_parser().parse_args())
