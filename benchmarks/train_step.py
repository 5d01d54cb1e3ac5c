"""Where the time of a training step goes, and how near it comes to what the processor can do.

    python -m benchmarks.train_step                                     # CSRM; network and sizes that suit the device
    python -m benchmarks.train_step --script segmentation --architecture resnest269e --batch_size 16
    python -m benchmarks.train_step --script classifier -- --method puzzle --mode fix      # flags of the script
    python -m benchmarks.train_step --architecture resnest101e --batch_size 32 --image_size 512 --count

Operations and bytes of the networks are counted on tensors without memory; --count stops there, and runs on any
machine. Then the training script runs on random photographs: by phase (marked with `record_function` in the training
code), for which the clock waits for a GPU; undisturbed, for the speed; and on a GPU under PyTorch's profiler, for the
share of the time without a kernel. docs/performance.md explains the rows.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import tempfile
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from unittest import mock

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity
from torch.utils.flop_counter import FlopCounterMode

import models
import train_classifier
from benchmarks.measuring import PHASES, ByteCounter, bandwidth, matrix_peak, peak_memory, phase_seconds
from benchmarks.photographs import write_photographs
from tools import cli, devices, options
from tools.training import Trainer

DEFAULTS = {  # on a CPU, the network of `make demo`
    "cpu": {"architecture": "test_resnet", "decoder_channels": 64, "batch_size": 4, "image_size": 97},
    "cuda": {"architecture": "resnest101e", "decoder_channels": 256, "batch_size": 16, "image_size": 512},
}


def make_parser() -> cli.Parser:
    """The command line of this benchmark."""
    parser = cli.Parser(__doc__)
    add, scripts = parser.add_argument, ["classifier", "csrm", "segmentation"]
    add("--script", choices=scripts, default="csrm", help="train_SCRIPT.py")
    add("--device", default="auto", help="auto (the GPU if there is one), cpu, cuda or cuda:N")
    add("--architecture", help="a timm network (default: test_resnet on a CPU, resnest101e on a GPU)")
    add("--batch_size", type=cli.positive_int, help="images per loader (default: 4 or 16)")
    add("--image_size", type=cli.positive_int, help="side of the crop (default: 97 or 512)")
    add("--decoder_channels", type=cli.positive_int, help="width of the decoder (default: 64 or 256)")
    add("--steps", type=cli.positive_int, default=3, help="steps to time, after as many to warm up")
    options.add_workers(parser)
    cli.add_switch(parser, "--count", False, "only count what the networks of a step compute and move")
    add("flags", nargs="*", metavar="-- FLAGS", help="further flags of the script")
    return parser


def main(args: argparse.Namespace) -> None:
    """Count, measure, and print the report."""
    device = devices.select_device(args.device)
    for name, value in DEFAULTS[device.type].items():
        setattr(args, name, getattr(args, name) or value)
    images = args.batch_size * (2 if args.script == "csrm" else 1)  # both halves
    print(f"{args.script}, {args.architecture}, {args.image_size} pixels, {images} images per step, {device}")
    flops, size, kept = count(args, images)
    print(f"TFLOP         {flops / 1e12:.4f} per step in convolutions and products of the networks")
    print(f"GB            {size / 1e9:.2f} per step read and written by the networks in float32; half in bf16")
    print(f"kept          {kept / 1e9:.2f} GB for the backward pass in float32, weights included; half in bf16")
    if args.count:
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_photographs(folder / "data", 2 * args.batch_size)
        phases, _ = train(args, folder, phase_seconds(device))
        (seconds,) = train(args, folder)
        total = sum(phases.values())
        print(f"{'phase':<13} {'ms/step':>9} {'share':>7}")
        for name in (name for name in (*PHASES, "other") if name in phases):
            print(f"{name:<13} {1000 * phases[name] / args.steps:9.1f} {phases[name] / total:7.1%}")
        print(f"{'all':<13} {1000 * total / args.steps:9.1f}")
        rates = [images * args.steps / time for time in (seconds, total - phases["loading"])]
        print("images/s      {:.1f} with loading, {:.1f} without".format(*rates))
        print_floor(device, flops, size, seconds / args.steps)
        print(f"peak memory   {peak_memory(device) / 1e9:.2f} GB")
        if device.type == "cuda":
            profile, _ = train(args, folder, torch.profiler.profile(activities=[ProfilerActivity.CUDA]))
            ranges = (event.time_range for event in profile.events() if event.device_type == DeviceType.CUDA)
            print(f"GPU idle      {idle_share([(kernel.start, kernel.end) for kernel in ranges]):.1%}")


def count(args: argparse.Namespace, images: int) -> tuple[int, int, int]:
    """Of the networks in a step, for 20 classes: operations, bytes that move, bytes kept for the backward pass."""
    counter, sizes, kept = FlopCounterMode(display=False), ByteCounter(), {}
    arguments = script_arguments(args, "--tag count")
    if args.script == "classifier":
        train_classifier.complete(arguments)
    with torch.device("meta"):
        network = models.build_model(args.script, num_classes=21, **options.network_arguments(arguments))
        views = torch.empty(images, 3, args.image_size, args.image_size)

    def keep(tensor: torch.Tensor) -> torch.Tensor:  # each memory counts once
        kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
        return tensor

    with counter, sizes:
        if args.script == "csrm":  # the teacher, before and after mixing
            with torch.no_grad():
                network.eval()(views, representations=False)
                network(views)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            outputs = network.train()(views)
        sum(output.float().sum() for output in outputs.values()).backward()
    return counter.get_total_flops(), sizes.total, sum(storage.nbytes() for storage in kept.values())


def train(args: argparse.Namespace, folder: Path, *measures: AbstractContextManager) -> list:
    """Run the script for two epochs of `--steps` steps.

    Returns:
        Of the second epoch: what entering each of `measures` gave, and the seconds it took.
    """
    original, found = Trainer.batches, []

    def measured(trainer: Trainer, epoch: int, batches: Iterator) -> Iterator:
        with ExitStack() as stack:
            found[:] = [stack.enter_context(measure) for measure in measures] if epoch else []
            start = time.perf_counter()
            yield from original(trainer, epoch, batches)
            if trainer.device.type == "cuda":
                torch.cuda.synchronize(trainer.device)
        found.append(time.perf_counter() - start)

    flags = f"--tag run{time.perf_counter_ns()} --data_dir {folder / 'data'} --max_steps {args.steps} --max_epoch 2"
    quiet = contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO())
    patches = mock.patch.object(options, "EXPERIMENTS", folder), mock.patch.object(Trainer, "batches", measured)
    with ExitStack() as stack:
        for context in (*quiet, *patches):
            stack.enter_context(context)
        importlib.import_module(f"train_{args.script}").main(script_arguments(args, flags))
    return found


def script_arguments(args: argparse.Namespace, flags: str) -> argparse.Namespace:
    """The arguments of the script for `flags` and what this benchmark's own flags say of it."""
    flags += f" --dataset folder --domain_train train --device {args.device} --num_workers {args.num_workers}"
    flags += f" --batch_size {args.batch_size} --architecture {args.architecture} --backbone_weights none"
    flags += "".join(f" --{name} {args.image_size}" for name in ("image_size", "min_image_size", "max_image_size"))
    flags += " --warmup_epochs 0" if args.script == "csrm" else ""
    flags += "" if args.script == "classifier" else f" --decoder_channels {args.decoder_channels}"
    return importlib.import_module(f"train_{args.script}").make_parser().parse_args([*flags.split(), *args.flags])


def idle_share(kernels: list[tuple[float, float]]) -> float:
    """The part of the time from the first kernel's start to the last one's end in which none of [(start, end)] ran."""
    first, _ = min(kernels)
    busy, until = 0.0, first
    for start, end in sorted(kernels):
        busy += max(0.0, end - max(start, until))
        until = max(until, end)
    return 1 - busy / (until - first)


def print_floor(device: torch.device, flops: int, size: int, step: float) -> None:
    """The least time that FLOPs and bytes need, beside the `step` seconds it takes."""
    dtype = devices.autocast_dtype("auto", device) or torch.float32
    peak, copied = matrix_peak(device, dtype), bandwidth(device)
    rate, by_flops, by_bytes = flops / step, 1000 * flops / peak, 1000 * size * dtype.itemsize / 4 / copied
    print(f"TFLOP/s       {rate / 1e12:.4f}, {rate / peak:.1%} of the {peak / 1e12:.4f} of a matrix product ({dtype})")
    print(f"floor         {by_flops:.0f} ms by TFLOP, {by_bytes:.0f} ms by GB; a step takes {1000 * step:.0f} ms")
    print(f"copy          {copied / 1e9:.1f} GB/s")


if __name__ == "__main__":
    cli.run(main, make_parser().parse_args())
