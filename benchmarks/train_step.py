"""Where the time of a training step goes, and how near it comes to what the processor can do.

    python -m benchmarks.train_step                                     # CSRM; on a CPU the network of `make demo`
    python -m benchmarks.train_step --script classifier --method puzzle --mode fix
    python -m benchmarks.train_step --architecture resnest101e --batch_size 32 --image_size 512 --count

All other flags are those of the script. Operations and bytes of the networks are counted on tensors without memory;
--count stops there, and runs on any machine. Then the script runs on random photographs: by phase (marked with
`record_function` in the training code), for which the clock waits for a GPU; undisturbed, for the speed; and on a GPU
under PyTorch's profiler, for the share of the time without a kernel. docs/performance.md explains the rows.
"""

import argparse
import contextlib
import importlib
import io
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity
from torch.utils.flop_counter import FlopCounterMode

import models
import train_classifier
from benchmarks import measuring
from benchmarks.measuring import PHASES, print_row
from tools import cli, devices, options
from tools.training import Trainer

DATA = "--tag t --dataset folder --domain_train train --backbone_weights none"
SMALL = " --architecture test_resnet --batch_size 4 --image_size 97"


def make_parser() -> cli.Parser:
    """The flags that the script does not have."""
    parser = cli.Parser(__doc__)
    add, scripts = parser.add_argument, ["classifier", "csrm", "segmentation"]
    add("--script", choices=scripts, default="csrm", help="train_SCRIPT.py")
    add("--device", default="auto", help="auto (the GPU if there is one), cpu, cuda or cuda:N")
    add("--steps", type=cli.positive_int, default=3, help="steps to time, after as many to warm up")
    cli.add_switch(parser, "--count", False, "only count what the networks of a step compute and move")
    return parser


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    """This benchmark's flags and the script's."""
    own, flags = make_parser().parse_known_args(words)
    defaults = DATA + " --warmup_epochs 0" * (own.script == "csrm")
    if own.device == "cpu" or not torch.cuda.is_available():
        defaults += SMALL + " --decoder_channels 64" * (own.script != "classifier")
    parser = importlib.import_module(f"train_{own.script}").make_parser()
    args = parser.parse_args([*defaults.split(), *(flag for flag in flags if flag != "--")])
    args.min_image_size = args.max_image_size = args.image_size
    return argparse.Namespace(**{**vars(args), **vars(own)})


def main(args: argparse.Namespace) -> None:
    device = devices.select_device(args.device)
    images = args.batch_size * (2 if args.script == "csrm" else 1)  # both halves
    print(f"{args.script}, {args.architecture}, {args.image_size} pixels, {images} images per step, {device}")
    flops, size, kept = count(args, images)
    print_row("TFLOP", f"{flops / 1e12:.4f} per step in convolutions and products of the networks")
    print_row("GB", f"{size / 1e9:.2f} per step read and written by the networks in float32; half in bf16")
    print_row("kept", f"{kept / 1e9:.2f} GB for the backward pass in float32, weights included; half in bf16")
    if args.count:
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        measuring.write_photographs(folder / "data", 2 * args.batch_size)
        phases, _ = train(args, folder, measuring.phase_seconds(device))
        (seconds,) = train(args, folder)
        step = {name: phases[name] / args.steps for name in (*PHASES, "other") if name in phases}
        step["all"] = sum(step.values())
        print_row("phase", "ms/step", "share")
        for name, spent in step.items():
            print_row(name, 1000 * spent, f"{spent / step['all']:.1%}")
        rates = [images / spent for spent in (seconds / args.steps, step["all"] - step["loading"])]
        print_row("images/s", "{:.1f} with loading, {:.1f} without".format(*rates))
        print_floor(device, flops, size, seconds / args.steps)
        print_row("peak memory", f"{measuring.peak_memory(device) / 1e9:.2f} GB")
        if device.type == "cuda":
            profile, _ = train(args, folder, torch.profiler.profile(activities=[ProfilerActivity.CUDA]))
            ranges = (event.time_range for event in profile.events() if event.device_type == DeviceType.CUDA)
            print_row("GPU idle", f"{idle_share([(kernel.start, kernel.end) for kernel in ranges]):.1%}")


def count(args: argparse.Namespace, images: int) -> tuple[int, int, int]:
    """Of the networks in a step, for 20 classes: operations, bytes that move, bytes kept for the backward pass."""
    counter, sizes, kept = FlopCounterMode(display=False), measuring.ByteCounter(), {}
    if args.script == "classifier":
        train_classifier.complete(args)
    with torch.device("meta"):
        network = models.build_model(args.script, num_classes=21, **options.network_arguments(args))
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


def train(args: argparse.Namespace, folder: Path, *measures: contextlib.AbstractContextManager) -> list:
    """Run the script for two epochs of `--steps` steps.

    Returns:
        Of the second epoch: what entering each of `measures` gave, and the seconds it took.
    """
    original, found = Trainer.batches, []

    def measured(trainer: Trainer, epoch: int, batches: Iterator) -> Iterator:
        with contextlib.ExitStack() as stack:
            found[:] = [stack.enter_context(measure) for measure in measures] if epoch else []
            start = measuring.clock(trainer.device)
            yield from original(trainer, epoch, batches)
        found.append(measuring.clock(trainer.device) - start)

    run = {"tag": f"run{time.perf_counter_ns()}", "data_dir": folder / "data", "max_steps": args.steps, "max_epoch": 2}
    with (
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
        mock.patch.object(options, "EXPERIMENTS", folder),
        mock.patch.object(Trainer, "batches", measured),
    ):
        importlib.import_module(f"train_{args.script}").main(argparse.Namespace(**{**vars(args), **run}))
    return found


def idle_share(kernels: list[tuple[float, float]]) -> float:
    """The part of the time from the first kernel's start to the last one's end in which none of [(start, end)] ran."""
    starts, ends = np.array(sorted(kernels)).T
    ends = np.maximum.accumulate(ends)
    return (starts[1:] - ends[:-1]).clip(min=0).sum() / (ends[-1] - starts[0])


def print_floor(device: torch.device, flops: int, size: int, step: float) -> None:
    """The least time that FLOPs and bytes need, beside the `step` seconds it takes."""
    dtype = devices.autocast_dtype("auto", device) or torch.float32
    peak, copied = measuring.matrix_peak(device, dtype), measuring.bandwidth(device)
    rate, by_flops, by_bytes = flops / step, 1000 * flops / peak, 1000 * size * dtype.itemsize / 4 / copied
    print_row("TFLOP/s", f"{rate / 1e12:.4f}, {rate / peak:.1%} of the {peak / 1e12:.4f} of a matrix product ({dtype})")
    print_row("floor", f"{by_flops:.0f} ms by TFLOP, {by_bytes:.0f} ms by GB; a step takes {1000 * step:.0f} ms")
    print_row("copy", f"{copied / 1e9:.1f} GB/s")


if __name__ == "__main__":
    cli.run(main, parse())
