"""The loop around a training step: epochs, resume, mixed precision, updates, logs, checkpoints.

    trainer = Trainer(model, options.training(args), classes, device=device, steps_per_epoch=46)
    for epoch in trainer.epochs():
        for batch in trainer.batches(epoch, loader):
            with trainer.autocast():
                losses = train_step(model, batch)    # dict of scalars; "loss" is the one to minimise
            trainer.step(losses)                     # backward, clip, optimiser, schedule

A run killed at any moment and started again with the same command continues at its last checkpoint, made after an epoch
or after at most `STEPS_PER_SAVE` steps, and ends with the same weights: there, all generators are seeded from (seed,
epoch, step). Started by torchrun, several processes train together (`tools.distributed`); a run may go on with another
number of them. The first one logs and saves.
"""

import contextlib
import json
import math
import random
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from tools import distributed, identity, options, parallel
from tools.checkpoint import load_checkpoint, previous_path, save_checkpoint
from tools.devices import autocast_dtype
from tools.errors import UserError
from tools.files import check_writable, locked
from tools.history import SETTINGS, log_files
from tools.optim import Update

SECONDS_TO_END = 15
"""How long a run waits for another one of its name: helper processes of a killed one take seconds to end."""

STEPS_TO_TELL = 10
"""After so many steps, the first one left out, a run says how long it will take."""

STEPS_PER_SAVE = 500
"""Within an epoch, at most so many steps are lost."""

RESUME_ONLY = ("optimizer", "schedule", "scaler", "memory_bank", "opponent", "health", "batch", "sums")
"""Entries dropped from the checkpoint of a finished run."""


@dataclass(eq=False, repr=False)
class Trainer:
    """Drives the training of one model."""

    model: nn.Module  # on `device`, trained in place; has `config` and `pretrained` (`models.build_model`)
    run: options.Training
    classes: Sequence[str]  # their names, background first; they go into the checkpoint
    _: KW_ONLY
    device: torch.device
    steps_per_epoch: int  # batches per epoch
    # what else is kept in the checkpoint, by name: modules such as the teacher, or what has a `state_dict` and a
    # `load_state_dict` like one; if it has a `share`, that makes it alike in all processes
    companions: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        model, run = self.model, self.run
        if run.compile:  # the teacher too
            for module in (model, *self.companions.values()):
                if isinstance(module, nn.Module):
                    module.compile()
        distributed.share_model(model)
        self.dtype = autocast_dtype(run.mixed_precision, self.device)
        self.updates_per_epoch = -(-self.steps_per_epoch // run.optimization.accumulate_steps)
        self.max_updates = self.updates_per_epoch * run.max_epoch
        self.update = Update(model, run.optimization, updates=self.max_updates, dtype=self.dtype)
        self.path = options.model_path(run.tag)
        accumulated = run.optimization.accumulate_steps
        self.steps_per_save = max(1, STEPS_PER_SAVE // accumulated) * accumulated
        self.updates = self.batch = 0  # optimiser steps of the run, batches of the epoch
        self.sums: dict[str, torch.Tensor] = {}
        # of the batches since the losses were last looked at
        self.ids: list[list[str]] = []
        self.losses: list[torch.Tensor] = []

    # -- epochs ---------------------------------------------------------------------------------------------------
    def epochs(self) -> Iterator[int]:
        """Yield the index of each epoch still to do, with all generators seeded; save after each.

        `batch` is the number of its batches that are done already.

        Raises:
            UserError: the checkpoint is of another run, or another process is training it.
        """
        check_writable(self.path.parent)
        logs = check_writable(options.EXPERIMENTS / "logs" / self.run.tag)
        with contextlib.ExitStack() as stack:
            if parallel.is_main() and not stack.enter_context(locked(logs, SECONDS_TO_END)):
                raise UserError(f"--tag {self.run.tag}: another process is training it. Wait, or choose another --tag.")
            first = self._resume()
            done = first * self.steps_per_epoch + self.batch
            if distributed.all_reduce_sum(torch.tensor(done, device=self.device)) != done * parallel.world_size():
                raise UserError(f"{self.path}: not the same file in all processes. Run them in one shared folder.")
            if first == self.run.max_epoch:
                print(f"{self.path}: already trained; nothing to do. For another training choose another --tag.")
                return
            self.writer = self._open_log(logs, first) if parallel.is_main() else None
            steps = self.run.max_epoch * self.steps_per_epoch
            self.bar = stack.enter_context(
                parallel.progress((), desc="training", unit="step", total=steps, initial=done)
            )
            self.clock = Clock(steps - done)
            for epoch in range(first, self.run.max_epoch):
                self._seed(epoch)
                self.model.train()
                yield epoch
                self.batch, self.sums = 0, {}
                self._save(epoch + 1)
            if self.writer:
                self.writer.close()
        print(f"Model: {self.path}")

    def _open_log(self, folder: Path, first: int) -> SummaryWriter:
        """Start a file of the log. In the first epoch it deletes what is there: the log of a training before."""
        if first == 0:
            for path in log_files(folder):
                path.unlink()
        writer = SummaryWriter(folder, purge_step=first + 1)
        writer.add_text(SETTINGS, json.dumps(self.run.flags))
        return writer

    def _seed(self, epoch: int) -> None:
        seed_everything(self.run.seed, epoch + 1, parallel.rank(), self.batch)

    def batches(self, epoch: int, batches: Iterable) -> Iterator:
        """Yield the batches of an epoch, move the progress bar; then log the mean losses and the speed.

        Within a long epoch, save and seed all generators every `steps_per_save` batches.

        Args:
            batches: those still to do, as `batch` says.
        """
        start, done_before = time.perf_counter(), self.batch
        title = f"epoch {epoch + 1}/{self.run.max_epoch}"
        self.bar.set_description(title, refresh=False)
        every = max(1, self.steps_per_epoch // 20)
        for batch in batches:
            ids = list(batch["id"] if isinstance(batch, dict) else batch.ids)
            self.ids.append(ids)
            yield batch
            self.clock.tick()
            if self.batch % every == 0:  # reading a loss waits for the device: seldom
                self.bar.set_postfix(loss=f"{self.means()['loss']:.3f}", refresh=False)
                self.clock.tell()
            self.bar.update()
            if self.batch % self.steps_per_save == 0 and self.batch < self.steps_per_epoch:
                self._save_within(epoch)
        self._share_statistics()
        rate = (self.batch - done_before) / (time.perf_counter() - start)
        means = self.means()
        self.log(epoch, means)
        text = "  ".join(f"{name} {value:.4f}" for name, value in means.items())
        speed = f"{rate:.2f} steps/s  {rate * len(ids) * parallel.world_size():.1f} images/s"
        tqdm.write(f"{title}  {text}  lr {self.update.schedule.get_last_lr()[0]:.2e}  {speed}")

    def _share_statistics(self) -> None:
        """Give all processes the first one's running statistics: on CPUs, each has those of its own images."""
        for network in (self.model, self.companions.get("teacher")):
            if network is not None:
                distributed.broadcast(network.buffers())

    def means(self) -> dict[str, float]:
        """Mean of each loss over the batches of the epoch so far, of all processes.

        Raises:
            UserError: one is not finite. Asked here, where the losses have come to the host, not in every step.
        """
        batches = max(1, self.batch) * parallel.world_size()
        sums = {name: distributed.all_reduce_sum(total) for name, total in self.sums.items()}
        means = {name: total.item() / batches for name, total in sums.items()}
        if not all(math.isfinite(mean) for mean in means.values()):
            values = ", ".join(f"{name} {mean:g}" for name, mean in means.items())
            raise UserError(
                f"--lr {self.run.optimization.lr:g}: training diverged ({values}{self._where()}). Lower it, or pass "
                "--mixed_precision off, and start under another --tag."
            )
        self.ids.clear()
        self.losses.clear()
        return means

    def _where(self) -> str:
        """Step and images of the first loss that was not finite; "" if it was another process's."""
        for step, (ids, loss) in enumerate(zip(self.ids, self.losses, strict=True), self.batch - len(self.ids) + 1):
            if not loss.isfinite():
                return f"; first in step {step} of the epoch, images {', '.join(ids)}"
        return ""

    def log(self, epoch: int, values: dict[str, float]) -> None:
        """Write scalars to TensorBoard at the end of an epoch."""
        if self.writer:
            for name, value in values.items():
                self.writer.add_scalar(name, value, epoch + 1)

    # -- one step -------------------------------------------------------------------------------------------------
    def autocast(self) -> contextlib.AbstractContextManager:
        """Automatic mixed precision for the forward passes."""
        return torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype is not None)

    def step(self, losses: dict[str, torch.Tensor]) -> bool:
        """Backpropagate `losses["loss"]`; change the weights every `accumulate_steps` batches and after the last one.

        Args:
            losses: scalars of this process's share of a batch; all are reported.

        Returns:
            Whether the weights changed.
        """
        self.record(losses)
        self.batch += 1
        self.losses.append(losses["loss"].detach())  # `Update.step` leaves out the update if it is not finite
        self.update.backward(losses["loss"])
        if self.batch % self.run.optimization.accumulate_steps and self.batch != self.steps_per_epoch:
            return False
        self.update.step()
        self.updates += 1
        return True

    def record(self, losses: dict[str, torch.Tensor]) -> None:
        """Add the losses of a batch to the means that the end of the epoch reports."""
        for name, value in losses.items():
            self.sums[name] = self.sums.get(name, 0) + value.detach()

    # -- checkpoints ----------------------------------------------------------------------------------------------
    def _save_within(self, epoch: int) -> None:
        """Make all processes equal, save, and seed as a run does that is resumed here."""
        self.means()
        self._share_statistics()
        self.sums = {n: distributed.all_reduce_sum(total) / parallel.world_size() for n, total in self.sums.items()}
        for companion in self.companions.values():
            if hasattr(companion, "share"):
                companion.share()
        self._save(epoch)
        self._seed(epoch)

    def _save(self, epoch: int) -> None:
        if not parallel.is_main():
            return
        content = {
            "config": self.model.config,
            "model": self.model.state_dict(),
            **{name: companion.state_dict() for name, companion in self.companions.items()},
            **self.update.state_dict(),
            "classes": list(self.classes),
            "args": self.run.flags,
            "identity": identity.digest(self.run.made_by),
            "epoch": epoch,
            "max_epoch": self.run.max_epoch,
            "step": self.updates,
            "batch": self.batch,
            "sums": self.sums,
        }
        if epoch == self.run.max_epoch:
            content = {name: value for name, value in content.items() if name not in RESUME_ONLY}
        save_checkpoint(self.path, **content)

    def _resume(self) -> int:
        if not self.path.exists():
            return 0
        checkpoint, fault = self._examine()
        if fault and self.run.overwrite:
            print(f"{self.path}: {fault}. Training anew, as --overwrite says.")
            return 0
        if fault:
            raise UserError(f"{self.path}: {fault}. Choose another --tag, or pass --overwrite to train anew.")
        if checkpoint["epoch"] == self.run.max_epoch:
            return self.run.max_epoch
        self.model.load_state_dict(checkpoint["model"])
        for name, companion in self.companions.items():
            companion.load_state_dict(checkpoint[name])
        self.update.load_state_dict(checkpoint)
        self.updates, self.batch = checkpoint["step"], checkpoint["batch"]
        self.sums = {name: total.to(self.device) for name, total in checkpoint["sums"].items()}
        within = f" and step {self.batch} of the next" if self.batch else ""
        print(f"{self.path}: continuing after epoch {checkpoint['epoch']} of {self.run.max_epoch}{within}.")
        return checkpoint["epoch"]

    def _examine(self) -> tuple[dict[str, Any], str]:
        """The checkpoint, {} if it cannot be read; and why this run cannot go on from it, "" if it can."""
        try:
            checkpoint = self._load()
        except UserError:
            return {}, "not a readable checkpoint"
        other = identity.difference(checkpoint.get("identity", {}), identity.digest(self.run.made_by))
        theirs, ours = [*checkpoint["classes"]], [*self.classes]
        if not other and theirs != ours:  # the identity has each image's classes by name, not the order of all
            other = f"the classes [{', '.join(theirs[1:])}], not [{', '.join(ours[1:])}]"
        return checkpoint, f"made with {other}" if other else ""

    def _load(self) -> dict[str, Any]:
        previous = previous_path(self.path)
        try:
            return load_checkpoint(self.path)
        except UserError:
            if not previous.exists():
                raise
        checkpoint = load_checkpoint(previous)
        print(f"Warning: {self.path} is damaged; going on from the one before it, {previous}.")
        return checkpoint


class Clock:
    """Says once, after `STEPS_TO_TELL` steps or soon after, how long the `steps` of a run will take."""

    def __init__(self, steps: int) -> None:
        self.steps, self.done, self.start = steps, 0, 0.0

    def tick(self) -> None:
        """A step is done."""
        self.done += 1
        if self.done == 1:
            self.start = time.perf_counter()

    def tell(self) -> None:
        """Say it, if it is time: where the device has just been waited for, and once."""
        if self.start and self.done > STEPS_TO_TELL:
            rest = (self.steps - self.done) * (time.perf_counter() - self.start) / (self.done - 1)
            tqdm.write(f"{self.steps - self.done} steps to go, at this speed in {tqdm.format_interval(rest)}")
            self.start = 0.0


def seed_everything(seed: int, epochs_begun: int = 0, rank: int = 0, step: int = 0) -> None:
    """Seed Python, NumPy and PyTorch (all devices): from the run's seed before the network is built, then per epoch,
    and within a long one per step at which a checkpoint is made.

    Python and NumPy are seeded alike in all processes: they decide what concerns a whole step, as whether it mixes.
    PyTorch, which draws what concerns single images, pixels and neurons, is seeded with the process's rank too.
    """
    shared, own = (int(np.random.SeedSequence([seed, epochs_begun, r, step]).generate_state(1)[0]) for r in (0, rank))
    random.seed(shared)
    np.random.seed(shared)
    torch.manual_seed(own)
