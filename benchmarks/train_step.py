"""Where the time of a training step goes, and how near it comes to what the processor can do.

    python -m benchmarks.train_step                                     # CSRM; network and sizes that suit the device
    python -m benchmarks.train_step --script segmentation --architecture resnest269e --batch_size 16
    python -m benchmarks.train_step --script classifier -- --method puzzle --mode fix      # flags of the script
    python -m benchmarks.train_step --architecture resnest101e --batch_size 32 --image_size 512 --count

Runs the training script itself on random photographs, three times: to count operations and bytes in one step; by phase
(marked with `record_function` in the training code), for which a GPU must wait; and undisturbed, for the speed. On a
GPU once more, under PyTorch's profiler, to see how long no kernel ran. docs/performance.md explains the rows.
With --count nothing is run: what the networks would compute and move is counted, on any machine.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import torch
from torch.autograd import DeviceType
from torch.utils.flop_counter import FlopCounterMode

import models
import train_classifier
from benchmarks.measuring import PHASES, ByteCounter, bandwidth, matrix_peak, peak_memory, phase_seconds
from benchmarks.photographs import write_photographs
from tools import cli, devices, options
from tools.training import Trainer

SCRIPTS = ("classifier", "csrm", "segmentation")
DEFAULTS = {  # on a CPU, the network of `make demo`
    "cpu": {"architecture": "test_resnet", "decoder_channels": 64, "batch_size": 4, "image_size": 97},
    "cuda": {"architecture": "resnest101e", "decoder_channels": 256, "batch_size": 16, "image_size": 512},
}


def make_parser() -> cli.Parser:
    """The command line of this benchmark."""
    parser = cli.Parser(__doc__)
    group = parser.add_argument_group("benchmark")
    group.add_argument("--script", choices=SCRIPTS, default="csrm", help="train_SCRIPT.py")
    group.add_argument("--device", default="auto", help="auto (the GPU if there is one), cpu, cuda or cuda:N")
    group.add_argument("--architecture", help="a timm network (default: test_resnet on a CPU, resnest101e on a GPU)")
    group.add_argument("--batch_size", type=cli.positive_int, help="images per loader (default: 4 or 16)")
    group.add_argument("--image_size", type=cli.positive_int, help="side of the crop (default: 97 or 512)")
    group.add_argument("--decoder_channels", type=cli.positive_int, help="width of the decoder (default: 64 or 256)")
    group.add_argument("--steps", type=cli.positive_int, default=3, help="steps to time, after as many to warm up")
    options.add_workers(group)
    cli.add_switch(group, "--count", False, "only count operations and bytes of the networks in a step, for 20 classes")
    group.add_argument("flags", nargs="*", metavar="-- FLAGS", help="further flags of the script")
    return parser


def idle_share(kernels: list[tuple[float, float]]) -> float:
    """The part of the time from the first kernel's start to the last one's end in which none of [(start, end)] ran."""
    first, _ = min(kernels)
    busy, until = 0.0, first
    for start, end in sorted(kernels):
        busy += max(0.0, end - max(start, until))
        until = max(until, end)
    return 1 - busy / (until - first)


def train(
    args: argparse.Namespace, folder: Path, *measures: contextlib.AbstractContextManager, epochs: int = 2
) -> None:
    """Run the script for some epochs of `--steps` steps (or one of a single step), the last within `measures`."""
    steps = args.steps if epochs > 1 else 1
    flags = [
        "--tag",
        f"run{time.perf_counter_ns()}",
        "--data_dir",
        folder / "data",
        "--max_steps",
        steps,
        "--max_epoch",
        epochs,
    ]
    original = Trainer.batches

    def measured(trainer: Trainer, epoch: int, batches: Iterator) -> Iterator:
        with contextlib.ExitStack() as stack:
            for measure in measures if epoch == epochs - 1 else ():
                stack.enter_context(measure)
            yield from original(trainer, epoch, batches)

    with (
        mock.patch.object(options, "EXPERIMENTS", folder),
        mock.patch.object(Trainer, "batches", measured),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        importlib.import_module(f"train_{args.script}").main(script_arguments(args, *flags))


@contextlib.contextmanager
def clocked(device: torch.device, total: dict[str, float], *, phases: bool) -> Iterator[None]:
    """Put the seconds of the block into `total`, by phase or as a whole."""
    start = time.perf_counter()
    with phase_seconds(device) if phases else contextlib.nullcontext({}) as spent:
        yield
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    total.update(spent or {"all": time.perf_counter() - start})


def script_arguments(args: argparse.Namespace, *flags: object) -> argparse.Namespace:
    """The arguments of the script for `flags` and what this benchmark's own flags say of it."""
    flags += ("--dataset", "folder", "--domain_train", "train")
    flags += ("--device", args.device, "--num_workers", args.num_workers, "--batch_size", args.batch_size)
    flags += ("--architecture", args.architecture, "--backbone_weights", "none")
    for size in ("image_size", "min_image_size", "max_image_size"):
        flags += (f"--{size}", args.image_size)
    if args.script == "csrm":
        flags += ("--warmup_epochs", 0)
    if args.script != "classifier":
        flags += ("--decoder_channels", args.decoder_channels)
    parser = importlib.import_module(f"train_{args.script}").make_parser()
    return parser.parse_args([*map(str, flags), *args.flags])


def images_per_step(args: argparse.Namespace) -> int:
    """Of both halves, in CSRM."""
    return args.batch_size * (2 if args.script == "csrm" else 1)


@contextlib.contextmanager
def kept_for_backward() -> Iterator[dict[int, torch.UntypedStorage]]:
    """What the operations in the block keep for the backward pass, by address of its memory: each only once."""
    kept: dict[int, torch.UntypedStorage] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        yield kept


def print_count(args: argparse.Namespace) -> None:
    """Print what the networks of a step compute and move, counted on tensors without memory."""
    counter, sizes = FlopCounterMode(display=False), ByteCounter()
    images = images_per_step(args)
    arguments = script_arguments(args, "--tag", "count")
    if args.script == "classifier":
        train_classifier.complete(arguments)
    with torch.device("meta"):
        network = models.build_model(args.script, num_classes=21, **options.network_arguments(arguments))
        views = torch.empty(images, 3, args.image_size, args.image_size)
    with counter, sizes:
        if args.script == "csrm":  # the teacher, before and after mixing
            with torch.no_grad():
                network.eval()(views, representations=False)
                network(views)
        with kept_for_backward() as kept:
            outputs = network.train()(views)
        sum(output.float().sum() for output in outputs.values()).backward()
    print(f"{args.script}, {args.architecture}, {args.image_size} pixels, {images} images per step")
    print(f"TFLOP         {counter.get_total_flops() / 1e12:.2f} per step in convolutions and products")
    print(f"GB            {sizes.total / 1e9:.0f} per step read and written by operations in float32; half in bf16")
    kept_gb = sum(storage.nbytes() for storage in kept.values()) / 1e9
    print(f"memory        {kept_gb:.2f} GB kept for the backward pass in float32, weights included; half in bf16")


def print_report(
    args: argparse.Namespace, device: torch.device, phases: dict[str, float], seconds: float, flops: int, size: int
) -> None:
    """Print phases (seconds in an epoch); speeds, from the seconds of an untouched epoch; FLOPs and bytes of a step."""
    images = images_per_step(args)
    speed = images * args.steps / seconds
    total = sum(phases.values())
    print(f"{args.script}, {args.architecture}, {args.image_size} pixels, {images} images per step, {device}")
    print(f"{'phase':<13} {'ms/step':>9} {'share':>7}")
    for name in (*PHASES, "other"):
        if name in phases:
            print(f"{name:<13} {1000 * phases[name] / args.steps:9.1f} {phases[name] / total:7.1%}")
    print(f"{'all':<13} {1000 * total / args.steps:9.1f}")
    computing = images * args.steps / (total - phases["loading"])
    print(f"images/s      {speed:.1f} with loading, {computing:.1f} without")
    dtype = devices.autocast_dtype("auto", device) or torch.float32
    achieved, peak = flops / images * speed / 1e12, matrix_peak(device, dtype) / 1e12
    print(f"TFLOP         {flops / 1e12:.4f} per step in convolutions and products")
    print(f"TFLOP/s       {achieved:.4f}, {achieved / peak:.1%} of the {peak:.4f} of a product of matrices ({dtype})")
    copied = bandwidth(device)
    print(
        f"GB            {size / 1e9:.2f} per step read and written by operations; a copy does {copied / 1e9:.1f} GB/s"
    )
    by_flops, by_bytes, step = (1000 * t for t in (flops / peak / 1e12, size / copied, seconds / args.steps))
    print(f"floor         {by_flops:.0f} ms by TFLOP, {by_bytes:.0f} ms by GB; a step takes {step:.0f} ms")
    print(f"peak memory   {peak_memory(device) / 1e9:.2f} GB")


def main(args: argparse.Namespace) -> None:
    """Measure, and print the report."""
    device = devices.select_device(args.device)
    for name, value in DEFAULTS[device.type].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.count:
        print_count(args)
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_photographs(folder / "data", 2 * args.batch_size)
        counter, sizes, phases, whole = FlopCounterMode(display=False), ByteCounter(), {}, {}
        train(args, folder, counter, sizes, epochs=1)
        train(args, folder, clocked(device, phases, phases=True))
        train(args, folder, clocked(device, whole, phases=False))
        print_report(args, device, phases, whole["all"], counter.get_total_flops(), sizes.total)
        if device.type == "cuda":
            profile = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA])
            train(args, folder, profile)
            ranges = (event.time_range for event in profile.events() if event.device_type == DeviceType.CUDA)
            print(f"GPU idle      {idle_share([(kernel.start, kernel.end) for kernel in ranges]):.1%}")


if __name__ == "__main__":
    cli.run(main, make_parser().parse_args())
