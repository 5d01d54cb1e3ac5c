"""Stage 0: the CAM prior, an image classifier whose 1x1 head on the last feature map gives class activation maps.

    python train_classifier.py --tag prior --dataset voc12 --data_dir data/voc12 --domain_train train_aug

Reads photographs and image-level labels only. Writes experiments/models/TAG.pth and TensorBoard curves in
experiments/logs/TAG. Started again, it continues at its last checkpoint. --method puzzle, poc and pnoc make
the maps cover more of the objects (docs/method.md); the last two need a trained vanilla classifier:

    python train_classifier.py --tag better --method pnoc --oc_weights experiments/models/prior.pth

--domain_valid reports, after each epoch, the mean IoU of the CAMs and how well the classes are recognised on a split
with masks; the last checkpoint is kept in any case. `inference.py --tag TAG` turns the checkpoint into CAMs;
`train_csrm.py --restore experiments/models/TAG.pth` starts CSRM from it. Several GPUs: SETUP.md.
"""

import argparse
import random
from pathlib import Path
from typing import Any

from tools import cli, options
from tools.errors import UserError

AUGMENTATIONS = ("randaugment", "colorjitter", "cutmix", "mixup")


def make_parser() -> cli.Parser:
    """The script's flags."""
    parser = cli.Parser(__doc__)
    options.add_common(parser)
    data = options.add_dataset(parser, **options.TRAINING_DOMAINS)
    samplers = ["uniform", "balanced"]
    data.add_argument("--sampler", choices=samplers, default="uniform", help="balanced: each class equally often")
    add_method(parser)
    group = options.add_network(parser, architecture="resnest101e", mode="normal")
    group.add_argument("--restore", type=Path, help="checkpoint or public state dict to start from")
    parser.set_defaults(mode=None, trainable_stem=None)  # normal and true, but not for pnoc: see `complete`
    add, some = options.add_images(parser).add_argument, ",".join(AUGMENTATIONS)
    text = f"besides scale, crop, flip: none, or some of {some}"
    add("--augment", type=augmentations, default="randaugment", metavar="LIST", help=text)
    add("--cutmix_prob", type=cli.fraction, default=0.5, help="probability that a step mixes (cutmix, mixup)")
    options.add_optimization(parser, lr=0.1, wd=1e-4, batch_size=32, max_epoch=15, alpha_bias=2.0)
    return parser


def add_method(parser: cli.Parser) -> None:
    """What the classifier learns besides the image labels."""
    add = parser.add_argument_group("method").add_argument
    kinds = "kind of CAM prior; pnoc: --mode is fix and --trainable_stem false if not given, else normal and true"
    weight = "puzzle, poc, pnoc: final weight of the difference between an image's CAMs and its tiles' (too high for "
    weight += "small images, the CAMs vanish)"
    add("--method", choices=options.PRIOR_METHODS, default="vanilla", help=kinds)
    add("--oc_weights", type=Path, metavar="FILE", help="poc, pnoc: a trained vanilla classifier of this architecture")
    add("--w_re", type=cli.non_negative, default=4.0, help=weight)
    add("--ema", type=cli.fraction, default=0.0, help="decay of a moving average of the weights that is kept; 0: none")


def augmentations(text: str) -> list[str]:
    """The value of --augment."""
    names = [] if text == "none" else text.split(",")
    for name in names:
        if name not in AUGMENTATIONS:
            raise argparse.ArgumentTypeError(f"'{name}' is none of {', '.join(AUGMENTATIONS)}")
    return names


if __name__ == "__main__":
    ARGS = make_parser().parse_args()  # before PyTorch is imported: --help and mistakes answer at once

import torch
from torch import nn
from torchvision.transforms import v2

from datasets import DatasetInfo, DataSource, build_source
from datasets.dataset import ImageDataset
from datasets.loaders import Loader, build_loader, class_balance
from datasets.transforms import PhotometricAugmentation, train_geometry
from models import build_model
from models.restore import restore
from tools import distributed, identity
from tools.devices import select_device
from tools.ema import Teacher, ema_decay
from tools.maps import normalize
from tools.priors import Opponent, PriorCriterion, Sample, random_class
from tools.training import Trainer, seed_everything
from tools.validation import check_domain, validate

MIXES = {"cutmix": v2.CutMix, "mixup": v2.MixUp}


def complete(args: argparse.Namespace) -> None:
    """Fill in the defaults that depend on the method: P-NOC was published with frozen batch norm and stem.

    Raises:
        UserError: --oc_weights without a method that uses it, or the other way round.
    """
    frozen = args.method == "pnoc"
    if args.mode is None:
        args.mode = "fix" if frozen else "normal"
    if args.trainable_stem is None:
        args.trainable_stem = not frozen
    if args.method != "vanilla" and args.image_size % 32 > 1:
        print(
            f"Warning: --image_size {args.image_size}: the cells of the tiles' maps lie between those of the whole "
            f"image's. Better 32n or 32n + 1, such as {args.image_size // 32 * 32}."
        )
    plays = args.method in ("poc", "pnoc")
    if plays and args.oc_weights is None:
        raise UserError(
            f"--method {args.method}: needs a trained classifier. Train one with --method vanilla, and pass its "
            "checkpoint with --oc_weights FILE."
        )
    if args.oc_weights is not None and not plays:
        raise UserError(f"--oc_weights: --method {args.method} has no use for it. Drop it, or choose poc or pnoc.")


def build_training_loader(source: DataSource, args: argparse.Namespace) -> Loader:
    """The loader of the training images."""
    geometry = train_geometry(*options.image_sizes(args), randaugment="randaugment" in args.augment)
    dataset = ImageDataset(source, source.ids(args.domain_train), geometry)
    weights = class_balance(dataset.labels) if args.sampler == "balanced" else None
    return build_loader(dataset, args.batch_size, weights=weights, **options.loader_arguments(args))


def load_ordinary(args: argparse.Namespace, info: DatasetInfo) -> nn.Module:
    """The ordinary classifier of poc and pnoc: --oc_weights with frozen batch norm; for poc, with everything frozen.

    Raises:
        UserError: the file is not a classifier of this architecture and these classes.
    """
    fixed = {"weights": "none", "batch_norm": "fix"}
    model = build_model("classifier", num_classes=info.num_classes, **{**options.network_arguments(args), **fixed})
    report = restore(model, args.oc_weights, info.classes)
    if report.missing or report.mismatched or report.new_classes:
        raise UserError(
            f"--oc_weights {args.oc_weights}: not a trained {args.architecture} with these "
            f"{info.num_foreground} classes. Train one with --method vanilla."
        )
    return model.eval() if args.method == "pnoc" else model.eval().requires_grad_(False)


def augmented(images: torch.Tensor, labels: torch.Tensor, names: list[str], mix_prob: float) -> Sample:
    """What happens to a batch on the device: colours, normalisation, mixing.

    Args:
        images, labels: uint8 [B,3,H,W] and float32 [B,K]; mixed labels lie in [0,1].
        names: of `AUGMENTATIONS`; randaugment is the loader's and does nothing here.
        mix_prob: probability that the batch is mixed, by one of the mixes named.
    """
    if "colorjitter" in names:
        images = PhotometricAugmentation(blur_prob=0)(images)
    images, mixes = normalize(images), [MIXES[name] for name in names if name in MIXES]
    if mixes and random.random() < mix_prob:
        images, labels = random.choice(mixes)()(images, labels)
    return Sample(images, labels, hidden=random_class(labels))


def main(args: argparse.Namespace) -> None:
    """Train, epoch by epoch, and say what to do next."""
    complete(args)
    device = select_device(args.device)
    distributed.start(options.EXPERIMENTS, device)
    source = build_source(args.dataset, options.data_dir(args))
    check_domain(source, args.domain_valid)
    loader = build_training_loader(source, args)
    seed_everything(args.seed)
    model = build_model("classifier", num_classes=source.info.num_classes, **options.network_arguments(args)).to(device)
    if args.restore:
        restore(model, args.restore, source.info.classes)
    ordinary = load_ordinary(args, source.info).to(device) if args.oc_weights else None
    criterion = PriorCriterion(args.method, label_smoothing=args.label_smoothing, w_re=args.w_re, ordinary=ordinary)
    companions: dict[str, Any] = {}
    if args.ema:
        average = Teacher(model)
        companions["teacher"] = average.module  # under the name by which inference.py and --restore prefer it
    inputs = source.fingerprints(source.ids(args.domain_train), labels=True)
    run = options.training(args, identity.describe("train_classifier.py", vars(args), inputs=inputs))
    trainer = Trainer(
        model, run, source.info.classes, device=device, steps_per_epoch=len(loader), companions=companions
    )
    if args.method == "pnoc":
        training = {"label_smoothing": args.label_smoothing, "updates": trainer.max_updates, "dtype": trainer.dtype}
        trainer.companions["opponent"] = opponent = Opponent(ordinary, run.optimization, **training)
    for epoch in trainer.epochs():
        loader.set_epoch(epoch, trainer.batch)
        for batch in trainer.batches(epoch, loader):
            images, labels = (batch[name].to(device, non_blocking=True) for name in ("image", "label"))
            sample = augmented(images, labels, args.augment, args.cutmix_prob)
            progress = trainer.updates / trainer.max_updates
            with trainer.autocast():
                losses = criterion(model, sample, progress)
            stepped = trainer.step(losses)
            if args.method == "pnoc":
                trainer.record({"opponent": opponent.learn(sample, progress, autocast=trainer.autocast())})
                if stepped:
                    opponent.update.step()
            if args.ema and stepped:
                average.update(model, ema_decay(trainer.updates, args.ema))
        if args.domain_valid:
            network = average.module if args.ema else model
            trainer.log(epoch, validate(network, source, args.domain_valid, device, options.long_side(vars(args))))
    print(options.next_step(args, "inference.py", "--tag", args.tag, "--domain", args.domain_train, note="its CAMs"))


if __name__ == "__main__":
    cli.run(main, ARGS)
