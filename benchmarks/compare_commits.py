"""Do two revisions compute the same? The check of a change that claims to have no effect.

    python -m benchmarks.compare_commits main          # the revision `main` against the files here, committed or not
    python -m benchmarks.compare_commits v1.0 main     # two revisions

Each runs all stages on the generated data set, on one thread, a minute of processor time: 20 steps of each training
script (an epoch each, so that the losses of every step are logged), inference, refinement with image regions,
evaluation. A line per product (losses, networks, CAM files, masks, scores) says whether it is equal, and shows the
first value that differs. Exit code 1 if any does.
"""

import argparse
import hashlib
import json
import sys
import tempfile
from pathlib import Path

import torch

from benchmarks.measuring import HERE, checkout, run
from tools import cli
from tools.history import read_logs

ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
STEPS = "--max_epoch 20 --max_steps 1 --batch_size 4 --image_size 65 --min_image_size 49 --max_image_size 97"
NETWORK = "--architecture test_resnet --backbone_weights none --trainable_stem --device cpu --num_workers 0 --lr 0.01"
TRAIN, VIEWS = f"{STEPS} {NETWORK} --domain_train train", "--scales 1,1.5 --device cpu"
MAPS = "experiments/predictions/csrm@train"
CHAIN = (
    f"train_classifier.py --tag prior {TRAIN}",
    f"train_classifier.py --tag pnoc {TRAIN} --method pnoc --oc_weights experiments/models/prior.pth",
    f"train_csrm.py --tag csrm {TRAIN} --decoder_channels 16 --restore experiments/models/prior.pth",
    f"inference.py --tag csrm --domain train {VIEWS} --save_masks --threshold 0.3",
    f"evaluate.py --domain train --mode cams --pred_dir {MAPS}/cams --output cams.json --num_workers 0",
    f"refine_sam.py --tag csrm --domain train --proposals regions --pseudo_dir {MAPS}/pseudos-* --num_workers 0",
    f"train_segmentation.py --tag seg {TRAIN} --decoder_channels 16 --masks_dir {MAPS}/sam-*",
    f"train_segmentation.py --tag seg --predict --domain val {VIEWS}",
    "evaluate.py --domain val --pred_dir experiments/predictions/seg@val/masks --output seg.json --num_workers 0",
)


def make_parser() -> cli.Parser:
    parser = cli.Parser(__doc__)
    parser.add_argument("revisions", nargs="+", metavar="REV", help="one or two, as git names them")
    return parser


def main(args: argparse.Namespace) -> None:
    """Run both, print what is equal, and say by the exit code whether all is."""
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder, "data")
        run(HERE, f"-m datasets.prepare.shapes --num_train 16 --num_val 8 --size 96 --data_dir {data}", **ONE_THREAD)
        first, second = (products(revision, Path(folder), data) for revision in (*args.revisions, None)[:2])
    differing = [name for name in sorted({*first, *second}) if first.get(name) != second.get(name)]
    for group in sorted({name.rpartition("/")[0] for name in (*first, *second)}):
        wrong = [name for name in differing if name.rpartition("/")[0] == group]
        print(f"differs  {wrong[0]}: {first.get(wrong[0])}, {second.get(wrong[0])}" if wrong else f"equal    {group}")
    sys.exit(bool(differing))


def products(revision: str | None, folder: Path, data: Path) -> dict[str, object]:
    """What a revision (None: the files here) makes of the data: numbers, or hashes, by name."""
    work = Path(tempfile.mkdtemp(dir=folder))
    code = checkout(revision, work / "code") if revision else HERE
    for command in CHAIN:
        words = [str(next(work.glob(word))) if "*" in word else word for word in command.split()]
        run(work, f"{code}/{' '.join(words)} --dataset shapes --data_dir {data}", **ONE_THREAD)
    found: dict[str, object] = {}
    for path in (path for kind in ("pth", "npz", "png") for path in work.glob(f"experiments/**/*.{kind}")):
        found[str(path.relative_to(work))] = digest(path)
    for path in work.glob("*.json"):
        scores = json.loads(path.read_text())
        found |= {f"scores of {path.stem}/{name}": scores[name] for name in ("miou", "miou_foreground", "iou")}
    for path in work.glob("experiments/logs/*"):
        for name, points in read_logs(path)[0].items():
            tag = name.replace("/", " ")
            found |= {f"losses of {path.name}/step {step:2} {tag}": value for step, value in points}
    return found


def digest(path: Path) -> str:
    """SHA-256, 12 digits: of a checkpoint's networks, of the bytes of other files."""
    if path.suffix != ".pth":
        return hashlib.sha256(path.read_bytes()).hexdigest()[:12]
    content = torch.load(path, weights_only=True)
    networks = [(key, t.numpy().tobytes()) for part in ("model", "teacher") for key, t in content.get(part, {}).items()]
    return hashlib.sha256(repr(networks).encode()).hexdigest()[:12]


if __name__ == "__main__":
    cli.run(main, make_parser().parse_args())
