"""Command lines of the entry scripts: shared flags, help that reads as a manual, mistakes answered in one line.

    parser = cli.Parser(__doc__)
    cli.add_common(parser)
    cli.add_dataset(parser)
    ...
    if __name__ == "__main__":
        cli.run(main, make_parser())

Flags are declared `--like_this`; `--like-this` is accepted too. Switches take an optional value: `--hflip` is
`--hflip true`, and `--hflip false` turns off what is on by default.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import io
import math
import os
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from tqdm import tqdm

from datasets import DATASETS
from tools import distributed
from tools.crf import BACKENDS
from tools.errors import UserError
from tools.optim import OPTIMIZERS

EXPERIMENTS = Path("experiments")
"""Everything runs produce lies below this folder, in the working directory."""

MEMORY_FLAGS = ("batch_size", "image_size", "scales", "images_per_batch", "points_per_batch")
"""Flags with lower values of which a script needs less memory."""


class _ManualFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Keeps the layout of the module docstring and shows every default."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=34, width=116)

    def _get_help_string(self, action: argparse.Action) -> str:
        hidden = action.default is None or action.default == ""
        return action.help if hidden else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """`argparse` with both spellings of a flag, the docstring as the manual, and one-line errors (exit code 2)."""

    def __init__(self, description: str) -> None:
        super().__init__(description=description, formatter_class=_ManualFormatter, allow_abbrev=False)

    def parse_known_args(self, args=None, namespace=None):
        tokens = sys.argv[1:] if args is None else args
        return super().parse_known_args([_underscored(token) for token in tokens], namespace)

    def error(self, message: str) -> None:
        line = f"{self.prog}: error: {message} (see {self.prog} --help)\n"
        self.exit(2, line if distributed.is_main() else None)  # all processes were given the same flags


def _underscored(token: str) -> str:
    if not token.startswith("--"):
        return token
    name, equals, value = token[2:].partition("=")
    return f"--{name.replace('-', '_')}{equals}{value}"


def run(main: Callable[[argparse.Namespace], None], parser: Parser) -> None:
    """Parse the command line and call `main`; a `UserError` becomes one line on stderr and exit code 2.

    Of several processes (`tools.distributed`) only the first prints to stdout.
    """
    args = parser.parse_args()
    quiet = contextlib.nullcontext() if distributed.is_main() else contextlib.redirect_stdout(io.StringIO())
    try:
        with quiet:
            main(args)
            sys.stdout.flush()
        distributed.stop()
        return
    except UserError as error:
        status, message = 2, f"error: {error}"
    except torch.OutOfMemoryError:
        flags = " or ".join(f"--{name}" for name in MEMORY_FLAGS if hasattr(args, name))
        hint = ", and raise --accumulate_steps for the same batch" if hasattr(args, "accumulate_steps") else ""
        status, message = 2, f"error: the GPU's memory is full. Lower {flags}{hint}."
    except BrokenPipeError:  # `| head` has read enough; what is still in the buffer has nowhere to go
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except KeyboardInterrupt:
        status, message = 130, "interrupted. Run the same command again to continue."
    except RuntimeError as error:
        if not distributed.is_lost_peer(error):
            raise
        status, message = 1, "error: another process has ended or hangs. Its own error says why; run again to continue."
    # Out here the exception is gone, and with it the frames that kept a progress bar's line open.
    # Another process does not know whether the first has one open.
    start = "" if distributed.is_main() else "\n"
    name = f"{parser.prog} (process {distributed.rank()})" if distributed.world_size() > 1 else parser.prog
    parser.exit(status, f"{start}{name}: {message}\n")


def boolean(text: str) -> bool:
    """The value of a switch: true/false, yes/no, on/off, 1/0."""
    if text.lower() in ("true", "yes", "on", "1"):
        return True
    if text.lower() in ("false", "no", "off", "0"):
        return False
    raise argparse.ArgumentTypeError(f"'{text}' is neither true nor false")


def add_switch(group: argparse._ActionsContainer, name: str, default: bool, text: str) -> None:
    """A flag that reads `--name`, `--name true` or `--name false`."""
    group.add_argument(name, type=boolean, nargs="?", const=True, default=default, metavar="BOOL", help=text)


def number(text: str) -> float:
    """A finite number."""
    try:
        value = float(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"'{text}' is not a number") from error
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"'{text}' is not finite")
    return value


def positive(text: str) -> float:
    """A number above 0."""
    value = number(text)
    if value <= 0:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return value


def non_negative(text: str) -> float:
    """A number of at least 0."""
    value = number(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text} is below 0")
    return value


def fraction(text: str) -> float:
    """A number in [0, 1]."""
    value = number(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 1")
    return value


def numbers(text: str) -> list[float]:
    """A comma-separated list of positive numbers, such as `0.5,1,1.5,2`."""
    return [positive(part) for part in text.split(",")]


def positive_int(text: str) -> int:
    """A whole number of at least 1."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"'{text}' is not a whole number of at least 1")
    return int(text)


def count(text: str) -> int:
    """A whole number of at least 0."""
    if not text.isdigit():
        raise argparse.ArgumentTypeError(f"'{text}' is not a whole number of at least 0")
    return int(text)


def add_common(parser: Parser) -> None:
    """--tag --seed --device --num_workers."""
    group = parser.add_argument_group("run")
    group.add_argument("--tag", required=True, help="name of this run; its files are called after it")
    group.add_argument("--seed", type=count, default=0, help="seed of all random numbers")
    group.add_argument(
        "--device", default="auto", help="auto (the GPU if there is one), cpu, cuda or cuda:N (not with torchrun)"
    )
    add_workers(group)


def add_workers(group: argparse._ActionsContainer) -> None:
    """--num_workers."""
    default = min(8, os.cpu_count() or 1)
    group.add_argument("--num_workers", type=count, default=default, help="helper processes on this machine; 0: none")


def add_dataset(parser: Parser, **domains: tuple[str, str]) -> argparse._ArgumentGroup:
    """--dataset --data_dir and one flag per entry of `domains` (flag name -> default, help); returns the group."""
    group = parser.add_argument_group("data")
    group.add_argument("--dataset", default="voc12", choices=DATASETS, help="kind of dataset")
    group.add_argument("--data_dir", type=Path, help="its folder (default: data/DATASET)")
    for name, (default, text) in domains.items():
        group.add_argument(f"--{name}", default=default, help=text)
    return group


def add_images(parser: Parser, *, size: int = 512, low: int = 320, high: int = 640) -> argparse._ArgumentGroup:
    """--image_size --min_image_size --max_image_size; returns the group, for the script's own additions."""
    group = parser.add_argument_group("training images (pixels)")
    group.add_argument("--image_size", type=positive_int, default=size, help="side of the training crop")
    group.add_argument("--min_image_size", type=positive_int, default=low, help="smallest size of the random scaling")
    group.add_argument("--max_image_size", type=positive_int, default=high, help="largest size of the random scaling")
    return group


def add_network(parser: Parser, *, architecture: str, mode: str) -> argparse._ArgumentGroup:
    """The backbone's flags; returns the group, for the script's own additions."""
    group = parser.add_argument_group("network")
    group.add_argument("--architecture", default=architecture, help="a timm network, by name (docs/backbones.md)")
    group.add_argument("--backbone_weights", default="imagenet", help="imagenet (timm's own), none, or a file")
    group.add_argument(
        "--mode",
        choices=["fix", "normal"],
        default=mode,
        help="batch norm of the backbone: statistics, scales and shifts frozen, or trained; other normalisation "
        "(ConvNeXt, transformers) is always trained",
    )
    add_switch(group, "--dilated", False, "output stride 8 instead of 16, where the network can be dilated")
    add_switch(group, "--dilate_stage4", True, "dilate the last stage; false: for public ResNet CAM priors (SETUP.md)")
    add_switch(group, "--trainable_stem", mode == "normal", "train the first convolutions (or embeddings) too")
    add_switch(group, "--trainable_stage4", True, "train the last stage of the backbone")
    add_switch(group, "--trainable_backbone", True, "train the backbone at all")
    return group


def add_decoder(group: argparse._ArgumentGroup) -> None:
    """Flags of the ASPP and decoder shared by CSRM and DeepLabV3+."""
    add_switch(group, "--use_gn", True, "GroupNorm (4 groups) in new layers; false: batch norm")
    group.add_argument("--dropout", type=fraction, default=0.5, help="dropout after the ASPP")
    group.add_argument("--decoder_channels", type=positive_int, default=256, help="width of the ASPP and the branches")


def add_optimization(
    parser: Parser, *, lr: float, wd: float, batch_size: int, max_epoch: int, alpha_bias: float
) -> None:
    """Optimiser, schedule and precision."""
    group = parser.add_argument_group("optimisation")
    group.add_argument(
        "--batch_size", type=positive_int, default=batch_size, help="images per loader and step, over all GPUs"
    )
    group.add_argument("--max_epoch", type=positive_int, default=max_epoch, help="epochs")
    group.add_argument("--max_steps", type=positive_int, help="steps per epoch (default: one pass over the images)")
    group.add_argument("--accumulate_steps", type=positive_int, default=1, help="steps per optimiser update")
    group.add_argument(
        "--mixed_precision",
        choices=["auto", "bf16", "fp16", "off"],
        default="auto",
        help="auto: bf16 on GPUs, off on CPUs",
    )
    add_switch(group, "--compile", False, "have torch.compile fuse the networks: slow first steps, faster later ones")
    group.add_argument("--optimizer", choices=OPTIMIZERS, default="sgd", help="momentum: without Nesterov")
    group.add_argument("--lr", type=positive, default=lr, help="learning rate of pretrained weights")
    group.add_argument("--wd", type=non_negative, default=wd, help="weight decay (never on biases)")
    group.add_argument("--momentum", type=fraction, default=0.9, help="momentum of sgd and momentum")
    add_switch(group, "--nesterov", True, "Nesterov momentum in sgd")
    group.add_argument("--lr_poly_power", type=non_negative, default=0.9, help="power of the polynomial decay to zero")
    group.add_argument("--lr_alpha_scratch", type=positive, default=10.0, help="learning rate multiplier of new layers")
    group.add_argument("--lr_alpha_bias", type=positive, default=alpha_bias, help="learning rate multiplier of biases")
    group.add_argument(
        "--grad_max_norm", type=non_negative, default=1.0, help="gradient norm is clipped at this; 0: never"
    )
    group.add_argument("--label_smoothing", type=fraction, default=0.1, help="label smoothing of every loss")


def add_views(group: argparse._ActionsContainer) -> None:
    """--scales --hflip: the views of an image that are averaged at test time."""
    group.add_argument("--scales", type=numbers, default=[0.5, 1.0, 1.5, 2.0], help="image scales, comma-separated")
    add_switch(group, "--hflip", True, "also use mirrored images")


def add_crf(group: argparse._ActionsContainer) -> None:
    """Dense CRF flags of pseudo labels and pseudo masks."""
    group.add_argument("--crf_t", type=count, default=10, help="mean-field iterations of the dense CRF; 0: no CRF")
    group.add_argument("--crf_gt_prob", type=fraction, default=0.7, help="confidence of the hard-label unary")
    add_crf_backend(group)


def add_crf_backend(group: argparse._ActionsContainer) -> None:
    """--crf_backend."""
    group.add_argument(
        "--crf_backend", choices=BACKENDS, default="torch", help="pydensecrf: one image at a time, on the CPU"
    )


def progress(items: Iterable, *, desc: str, unit: str, total: int | None = None, **options: object) -> tqdm:
    """A progress bar with rate and ETA; into a log file it writes a line a minute instead of redrawing.

    Of several processes only the first shows one.
    """
    interval = 0.5 if sys.stderr.isatty() else 60
    intervals = {"mininterval": interval, "maxinterval": interval, "disable": not distributed.is_main()}
    return tqdm(items, desc=desc, unit=unit, total=total, smoothing=0.1, **intervals, **options)


def network_arguments(args: argparse.Namespace) -> dict[str, object]:
    """The flags of `add_network` and `add_decoder` (those the script has) as arguments of `models.build_model`."""
    renamed = {"architecture": "architecture", "backbone_weights": "weights", "mode": "batch_norm"}
    freezing = ("trainable_stem", "trainable_stage4", "trainable_backbone")
    kept = ("dilate_stage4", *freezing, "use_gn", "dropout", "decoder_channels")
    arguments = {**renamed, **{name: name for name in kept}}
    given = {argument: getattr(args, flag) for flag, argument in arguments.items() if hasattr(args, flag)}
    return {**given, "output_stride": 8 if args.dilated else 16}


def loader_arguments(args: argparse.Namespace) -> dict[str, object]:
    """The training loaders' flags as arguments of `datasets.build_loader`."""
    return {
        "shuffle": True,
        "drop_last": True,
        "num_workers": -(-args.num_workers // distributed.local_world_size()),
        "seed": args.seed,
        "steps_per_epoch": args.max_steps,
        "rank": distributed.rank(),
        "world_size": distributed.world_size(),
    }


def optimizer_arguments(args: argparse.Namespace) -> dict[str, object]:
    """The flags of the optimiser as arguments of `tools.optim.build_optimizer`."""
    return {
        "name": args.optimizer,
        "lr": args.lr,
        "weight_decay": args.wd,
        "momentum": args.momentum,
        "nesterov": args.nesterov,
        "alpha_scratch": args.lr_alpha_scratch,
        "alpha_bias": args.lr_alpha_bias,
    }


def image_sizes(args: argparse.Namespace) -> tuple[int, int, int]:
    """--image_size, --min_image_size and --max_image_size.

    Raises:
        UserError: the smallest size is above the largest.
    """
    low, high = args.min_image_size, args.max_image_size
    if low > high:
        raise UserError(f"--min_image_size {low}: above --max_image_size {high}. Lower it, or raise the other.")
    return args.image_size, low, high


def data_dir(args: argparse.Namespace) -> Path:
    """The dataset's folder: --data_dir, or data/DATASET."""
    return args.data_dir or Path("data") / args.dataset


def select_device(name: str) -> torch.device:
    """Resolve --device, and prepare the process for it. Processes of torchrun get a GPU each, by their local rank.

    Raises:
        UserError: not one of auto, cpu, cuda and cuda:N, or a GPU that PyTorch does not see, or one for all processes.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    match = re.fullmatch(r"cpu|cuda(?::(\d+))?", name)
    if not match:
        raise UserError(f"--device {name}: not a device. Use auto, cpu, cuda or cuda:N.")
    index = int(match[1] or 0)
    if name != "cpu" and distributed.world_size() > 1:
        if match[1]:
            raise UserError(f"--device {name}: torchrun gives each of its processes a GPU. Use --device cuda.")
        index = distributed.local_rank()
        name = f"cuda:{index}"
    if name != "cpu" and index >= torch.cuda.device_count():
        raise UserError(
            f"--device {name}: PyTorch sees {torch.cuda.device_count()} GPUs. Use --device cpu or another index."
        )
    if name == "cpu":
        _keep_freed_memory()
    return torch.device(name)


def _keep_freed_memory() -> None:
    """Have glibc reuse the memory of freed tensors instead of returning it to the system after every operation.

    Getting it back, zeroed page by page, takes a quarter to a half of the time of a training step on a CPU.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # absent from other C libraries
    if mallopt is not None:
        no_limit, trim_threshold, mmap_max = -1, -1, -4
        mallopt(trim_threshold, no_limit)
        mallopt(mmap_max, 0)


def autocast_dtype(mixed_precision: str, device: torch.device) -> torch.dtype | None:
    """The dtype of automatic mixed precision, None for full precision."""
    if mixed_precision == "auto":
        mixed_precision = "bf16" if device.type == "cuda" else "off"
    return {"bf16": torch.bfloat16, "fp16": torch.float16, "off": None}[mixed_precision]


def model_path(tag: str) -> Path:
    """Where the checkpoint of run `tag` lies."""
    return EXPERIMENTS / "models" / f"{tag}.pth"


def predictions_dir(tag: str, domain: str) -> Path:
    """Where predictions of run `tag` on `domain` lie."""
    return EXPERIMENTS / "predictions" / f"{tag}@{domain}"
