"""The flags that scripts share, what they become, and where the files of a run lie.

    parser = cli.Parser(__doc__)
    options.add_common(parser)
    options.add_optimization(parser, lr=0.1, ...)
    args = parser.parse_args()
    trainer = Trainer(model, options.training(args), ...)    # below main, nobody sees `args`
    model_path(args.tag)                                     # experiments/models/TAG.pth

Nothing here imports PyTorch, so that --help answers at once.
"""

import argparse
import dataclasses
import os
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from tools import cli, parallel
from tools.errors import UserError

Options = TypeVar("Options")

EXPERIMENTS = Path("experiments")
"""Everything runs produce lies below this folder, in the working directory."""

IGNORE_INDEX = 255
"""Value of mask pixels that are neither trained on nor evaluated."""

PSEUDO_MASK_THRESHOLD = 0.4
"""Background threshold at which pseudo masks are made, unless inference.py is told another."""

DATASETS = ("voc12", "coco14", "folder", "shapes", "deepglobe")
OPTIMIZERS = ("sgd", "momentum", "adamw", "lion")
CRF_BACKENDS = ("torch", "pydensecrf")
READINGS = ("present", "foreground", "relative")
PREDICTION_READINGS = ("argmax", "relative")
SELF_TRAINING = ("auto", "on", "off")
PRIOR_METHODS = ("vanilla", "puzzle", "poc", "pnoc")
SAMS = ("sam", "sam2", "sam3")
SAM_TYPES = ("vit_h", "vit_l", "vit_b")
MERGE_MODES = ("max_iou", "max_iou_imp", "max_iou_imp2")
MERGE_ORDERS = ("class", "largest_overlap")

TRAINING_DOMAINS = {
    "domain_train": ("train_aug", "split to train on"),
    "domain_valid": ("", "split with masks to report on after each epoch; empty: none"),
}
"""Flags of `add_dataset` for the training scripts."""


@dataclass(frozen=True)
class CRF:
    """The dense CRF of pseudo labels and pseudo masks (`tools.crf`)."""

    iterations: int = 10  # mean-field updates; 0: no CRF
    gt_prob: float = 0.7  # confidence in the labels it refines, in (0, 1)
    backend: str = "torch"  # one of `CRF_BACKENDS`


@dataclass(frozen=True)
class Views:
    """The views of an image that are averaged at test time."""

    scales: tuple[float, ...]  # relative to the image with its long side in the range `long_side`
    hflip: bool  # each scale mirrored, too
    long_side: tuple[float, float]  # pixels; --min_image_size and --image_size of the training


@dataclass(frozen=True)
class Optimization:
    """How gradients change weights (`tools.optim.Update`)."""

    optimizer: str  # one of `OPTIMIZERS`
    # learning rate of pretrained weights; times `lr_alpha_scratch` for new layers, times `lr_alpha_bias` for biases
    lr: float
    wd: float  # weight decay of weights; biases have none
    momentum: float = 0.9  # of sgd
    nesterov: bool = True
    lr_alpha_scratch: float = 10.0
    lr_alpha_bias: float = 1.0
    lr_poly_power: float = 0.9  # of the decay of the learning rate to 0; 0: it is constant
    grad_max_norm: float = 1.0  # the gradient's norm is clipped at this; 0: never
    accumulate_steps: int = 1  # batches per update


@dataclass(frozen=True)
class Training:
    """A run of `tools.training.Trainer`."""

    tag: str  # name of the run
    seed: int  # of all random numbers
    max_epoch: int  # epochs
    mixed_precision: str  # auto, bf16, fp16 or off
    compile: bool  # whether torch.compile fuses the networks
    optimization: Optimization  # of the weights
    flags: dict[str, object]  # the whole command line by name, plain values; kept in the checkpoint
    # the identity of the run (`tools.identity`); a checkpoint of another one is not gone on with
    made_by: dict[str, object]
    overwrite: bool = False  # start again if the checkpoint is another run's


SHARED = {
    "device": {"default": "auto", "help": "auto (the GPU if there is one), cpu, cuda or cuda:N (not with torchrun)"},
    "num_workers": {
        "type": cli.count,
        "default": min(8, os.cpu_count() or 1),
        "help": "helpers on this machine: processes that load, or images predicted at a time; 0: none",
    },
    "overwrite": {
        **cli.switch(False),
        "help": "replace what was made with other flags or data; what the same command made is kept and continued",
    },
    "on_error": {
        "choices": ["stop", "skip"],
        "default": "stop",
        "help": "if a file of an image cannot be used: stop, or skip the image, list it in left-out-SCRIPT.json, "
        "exit code 3",
    },
    "mixed_precision": {
        "choices": ["auto", "bf16", "fp16", "off"],
        "default": "auto",
        "help": "auto: bf16 on GPUs, off on CPUs",
    },
    "scales": {"type": cli.numbers, "default": [0.5, 1.0, 1.5, 2.0], "help": "image scales, comma-separated"},
    "hflip": {**cli.switch(True), "help": "also use mirrored images"},
    "crf_t": {"type": cli.count, "default": 10, "help": "mean-field iterations of the dense CRF; 0: no CRF"},
    "crf_gt_prob": {"type": cli.probability, "default": 0.7, "help": "confidence of the hard-label unary"},
    "crf_backend": {"choices": CRF_BACKENDS, "default": "torch", "help": "pydensecrf: one image at a time, on the CPU"},
}
"""Flags that scripts take one by one."""


def add_shared(group: argparse._ActionsContainer, *names: str) -> None:
    """Add some flags of `SHARED`."""
    for name in names:
        group.add_argument(f"--{name}", **SHARED[name])


def tag(text: str) -> str:
    """The type of --tag. Training TAG.previous would replace the checkpoint that `tools.checkpoint` keeps of TAG."""
    if not text:
        raise argparse.ArgumentTypeError("empty. Is a variable not set?")
    if text.endswith(".previous"):
        raise argparse.ArgumentTypeError(
            f"'{text}' ends in .previous, as the checkpoint before the last does; choose another name"
        )
    return text


def add_common(parser: cli.Parser) -> None:
    """--tag --seed --device --num_workers --overwrite."""
    group = parser.add_argument_group("run")
    group.add_argument("--tag", type=tag, required=True, help="name of this run; its files are called after it")
    group.add_argument("--seed", type=cli.count, default=0, help="seed of all random numbers")
    add_shared(group, "device", "num_workers", "overwrite")


def add_dataset(parser: cli.Parser, **domains: tuple[str, str]) -> argparse._ArgumentGroup:
    """--dataset --data_dir and one flag per entry of `domains` (flag name -> default, help); returns the group."""
    group = parser.add_argument_group("data")
    group.add_argument("--dataset", default="voc12", choices=DATASETS, help="kind of dataset")
    group.add_argument("--data_dir", type=Path, help="its folder (default: data/DATASET)")
    for name, (default, text) in domains.items():
        group.add_argument(f"--{name}", default=default, help=text)
    return group


def add_images(parser: cli.Parser) -> argparse._ArgumentGroup:
    """--image_size --min_image_size --max_image_size; returns the group, for the script's own additions."""
    group = parser.add_argument_group("training images (pixels)")
    add = group.add_argument
    add("--image_size", type=cli.positive_int, default=512, help="side of the training crop")
    text = "smallest size of the random scaling; shorter photographs are enlarged to it"
    add("--min_image_size", type=cli.positive_int, default=320, help=text)
    add("--max_image_size", type=cli.positive_int, default=640, help="largest size of the random scaling")
    return group


def add_network(parser: cli.Parser, *, architecture: str, mode: str) -> argparse._ArgumentGroup:
    """The backbone's flags; returns the group, for the script's own additions."""
    group = parser.add_argument_group("network")
    batch_norm = "batch norm of the backbone: frozen (statistics, scales, shifts) or trained; other normalisation is "
    batch_norm += "always trained"
    group.add_argument("--architecture", default=architecture, help="a timm network, by name (docs/backbones.md)")
    group.add_argument("--backbone_weights", default="imagenet", help="imagenet (timm's own), none, or a file")
    group.add_argument("--mode", choices=["fix", "normal"], default=mode, help=batch_norm)
    cli.add_switch(group, "--dilated", False, "output stride 8 instead of 16, where the network can be dilated")
    cli.add_switch(group, "--dilate_stage4", True, "dilate the last stage; false: for public ResNet priors (SETUP.md)")
    cli.add_switch(group, "--trainable_stem", mode == "normal", "train the first convolutions (or embeddings) too")
    cli.add_switch(group, "--trainable_stage4", True, "train the last stage of the backbone")
    cli.add_switch(group, "--trainable_backbone", True, "train the backbone at all")
    return group


def add_decoder(group: argparse._ArgumentGroup) -> None:
    """Flags of the ASPP and decoder shared by CSRM and DeepLabV3+."""
    cli.add_switch(group, "--use_gn", True, "GroupNorm (4 groups) in new layers; false: batch norm")
    group.add_argument("--dropout", type=cli.fraction, default=0.5, help="dropout after the ASPP")
    text = "width of the ASPP and the branches"
    group.add_argument("--decoder_channels", type=cli.positive_int, default=256, help=text)


def add_optimization(
    parser: cli.Parser, *, lr: float, wd: float, batch_size: int, max_epoch: int, alpha_bias: float
) -> None:
    """Optimiser, schedule and precision."""
    group = parser.add_argument_group("optimisation")
    add = group.add_argument
    add("--batch_size", type=cli.positive_int, default=batch_size, help="images per loader and step, over all GPUs")
    add("--max_epoch", type=cli.positive_int, default=max_epoch, help="epochs")
    add("--max_steps", type=cli.positive_int, help="steps per epoch (default: one pass over the images)")
    add("--accumulate_steps", type=cli.positive_int, default=1, help="steps per optimiser update")
    add_shared(group, "mixed_precision")
    cli.add_switch(group, "--compile", False, "have torch.compile fuse the networks: slow first steps, fast later ones")
    add("--optimizer", choices=OPTIMIZERS, default="sgd", help="momentum: without Nesterov")
    add("--lr", type=cli.positive, default=lr, help="learning rate of pretrained weights")
    add("--wd", type=cli.non_negative, default=wd, help="weight decay (never on biases)")
    add("--momentum", type=cli.fraction, default=0.9, help="momentum of sgd and momentum")
    cli.add_switch(group, "--nesterov", True, "Nesterov momentum in sgd")
    add("--lr_poly_power", type=cli.non_negative, default=0.9, help="power of the polynomial decay to zero")
    add("--lr_alpha_scratch", type=cli.positive, default=10.0, help="learning rate multiplier of new layers")
    add("--lr_alpha_bias", type=cli.positive, default=alpha_bias, help="learning rate multiplier of biases")
    add("--grad_max_norm", type=cli.non_negative, default=1.0, help="gradient norm is clipped at this; 0: never")
    add("--label_smoothing", type=cli.fraction, default=0.1, help="label smoothing; of CSRM not in L_u and L_contra")


def network_arguments(args: argparse.Namespace) -> dict[str, object]:
    """The flags of `add_network` and `add_decoder` (those the script has) as arguments of `models.build_model`."""
    names = ("architecture", "dilate_stage4", "trainable_stem", "trainable_stage4", "trainable_backbone")
    decoder = ("use_gn", "dropout", "decoder_channels")
    given = {name: getattr(args, name) for name in (*names, *decoder) if hasattr(args, name)}
    stride = 8 if args.dilated else 16
    weights = args.backbone_weights
    if weights == "imagenet" and model_path(args.tag).exists() and not args.overwrite:
        weights = "none"  # the checkpoint replaces them, and perhaps they cannot be downloaded any more
    return {**given, "weights": weights, "batch_norm": args.mode, "output_stride": stride}


def loader_arguments(args: argparse.Namespace) -> dict[str, object]:
    """The training loaders' flags as arguments of `datasets.build_loader`."""
    return {
        "num_workers": parallel.own_workers(args.num_workers),
        "seed": args.seed,
        "steps_per_epoch": args.max_steps,
        "rank": parallel.rank(),
        "world_size": parallel.world_size(),
    }


def crf(args: argparse.Namespace) -> CRF:
    """--crf_t, --crf_gt_prob and --crf_backend."""
    return CRF(iterations=args.crf_t, gt_prob=args.crf_gt_prob, backend=args.crf_backend)


def views(args: argparse.Namespace, training: Mapping[str, Any]) -> Views:
    """--scales and --hflip, for a model with these flags of its training.

    Raises:
        UserError: they lack one; exports of earlier versions do.
    """
    if "min_image_size" not in training:
        raise UserError(f"--weights {args.weights}: does not say --min_image_size of its training. Export it again.")
    return Views(scales=tuple(args.scales), hflip=args.hflip, long_side=long_side(training))


def long_side(training: Mapping[str, Any]) -> tuple[int, int]:
    """The range, pixels, into which training brings the long side of photographs, from its flags."""
    return training["min_image_size"], training["image_size"]


def training(args: argparse.Namespace, made_by: dict[str, object]) -> Training:
    """The flags of `add_common` and `add_optimization`, and the identity of the run."""
    flags = {name: plain(value) for name, value in vars(args).items() if name != "overwrite"}
    return from_flags(Training, args, made_by=made_by, optimization=from_flags(Optimization, args), flags=flags)


def from_flags(kind: type[Options], args: argparse.Namespace, **given: object) -> Options:
    """Options of a `kind` of dataclass: the fields `given`; the others are the flags of the same name."""
    names = {field.name for field in dataclasses.fields(kind)} - given.keys()
    return kind(**given, **{name: getattr(args, name) for name in names})


def plain(value: object) -> object:
    """The value of a flag as JSON gives it back."""
    if isinstance(value, (list, tuple)):
        return [plain(each) for each in value]
    return value if isinstance(value, (int, float, str, bool, type(None))) else str(value)


def image_sizes(args: argparse.Namespace) -> tuple[int, int, int]:
    """--image_size, --min_image_size and --max_image_size (UserError: the smallest size is above the largest)."""
    low, high = args.min_image_size, args.max_image_size
    if low > high:
        raise UserError(f"--min_image_size {low}: above --max_image_size {high}. Lower it, or raise the other.")
    return args.image_size, low, high


def next_step(args: argparse.Namespace, script: str, *flags: object, note: str = "") -> str:
    """The line that names the next command, on the same dataset. It can be pasted as it is."""
    data = ["--dataset", args.dataset, *(["--data_dir", args.data_dir] if args.data_dir else [])]
    return f"Next: {shlex.join(['python', script, *map(str, (*flags, *data))])}" + (f"   # {note}" if note else "")


def data_dir(args: argparse.Namespace) -> Path:
    """The dataset's folder: --data_dir, or data/DATASET."""
    return args.data_dir or Path("data") / args.dataset


def model_path(tag: str) -> Path:
    """Where the checkpoint of run `tag` lies."""
    return EXPERIMENTS / "models" / f"{tag}.pth"


def predictions_dir(tag: str, domain: str) -> Path:
    """Where predictions of run `tag` on `domain` lie."""
    return EXPERIMENTS / "predictions" / f"{tag}@{domain}"
