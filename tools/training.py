"""The loop around a training step: epochs, resume, mixed precision, updates, logs, checkpoints.

    trainer = Trainer(model, options.training(args), classes, device=device, steps_per_epoch=46)
    for epoch in trainer.epochs():
        for batch in trainer.batches(epoch, loader):
            with trainer.autocast():
                losses = train_step(model, batch)    # dict of scalars; "loss" is the one to minimise
            trainer.step(losses)                     # backward, clip, optimiser, schedule

A run killed at any moment and started again with the same command continues after its last finished epoch and ends with
the same weights: every epoch seeds all generators from (seed, epoch). Started by torchrun, several processes train
together (`tools.distributed`); a run may go on with another number of them. The first one logs and saves.
"""

from __future__ import annotations

import contextlib
import math
import random
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from tools import distributed, identity, options, parallel
from tools.checkpoint import load_checkpoint, save_checkpoint
from tools.devices import autocast_dtype
from tools.errors import UserError
from tools.files import check_writable
from tools.optim import Update

RESUME_ONLY = ("optimizer", "schedule", "scaler", "memory_bank", "opponent", "health")
"""Entries dropped from the checkpoint of a finished run."""


class Trainer:
    """Drives the training of one model.

    Args:
        model: trained in place; has `config` and `scratch_modules()`.
        run: the options of the run.
        classes: their names, background first; they go into the checkpoint.
        device: where the model lies.
        steps_per_epoch: batches per epoch.
        loaders: how many loaders of `run.batch_size` images a batch comes from; for the speed reported.
        companions: what else is kept in the checkpoint, by name: modules such as the teacher, or what has a
            `state_dict` and a `load_state_dict` like one.
    """

    def __init__(
        self,
        model: nn.Module,
        run: options.Training,
        classes: Sequence[str],
        *,
        device: torch.device,
        steps_per_epoch: int,
        loaders: int = 1,
        companions: dict[str, Any] | None = None,
    ) -> None:
        self.model, self.run, self.classes, self.device = model, run, tuple(classes), device
        self.steps_per_epoch, self.images_per_step = steps_per_epoch, loaders * run.batch_size
        self.companions = companions or {}
        if run.compile:  # the teacher too
            for module in (model, *self.companions.values()):
                if isinstance(module, nn.Module):
                    module.compile()
        distributed.share_model(model)
        self.dtype = autocast_dtype(run.mixed_precision, device)
        self.updates_per_epoch = -(-steps_per_epoch // run.optimization.accumulate_steps)
        self.max_updates = self.updates_per_epoch * run.max_epoch
        self.update = Update(model, run.optimization, updates=self.max_updates, dtype=self.dtype)
        self.path = options.model_path(run.tag)
        self.updates = self.batch = 0  # optimiser steps of the run, batches of the epoch
        self.sums: dict[str, torch.Tensor] = {}

    # -- epochs ---------------------------------------------------------------------------------------------------
    def epochs(self) -> Iterator[int]:
        """Yield the index of each epoch still to do, with all generators seeded; save after each."""
        check_writable(self.path.parent)
        first = self._resume()
        if distributed.all_reduce_sum(torch.tensor(first, device=self.device)) != first * parallel.world_size():
            raise UserError(f"{self.path}: not the same file in all processes. Run them in one shared folder.")
        if first == self.run.max_epoch:
            print(f"{self.path}: already trained; nothing to do. Choose another --tag, or delete it to train again.")
            return
        logs = check_writable(options.EXPERIMENTS / "logs" / self.run.tag)
        self.writer = SummaryWriter(logs, purge_step=first + 1) if parallel.is_main() else None
        for epoch in range(first, self.run.max_epoch):
            seed_everything(self.run.seed, epoch + 1, parallel.rank())
            self.model.train()
            yield epoch
            if parallel.is_main():
                self._save(epoch + 1)
        if self.writer:
            self.writer.close()
        print(f"Model: {self.path}")

    def batches(self, epoch: int, batches: Iterable) -> Iterator:
        """Yield the batches of an epoch under a progress bar; then log the mean losses and the speed."""
        self.sums, self.batch, start = {}, 0, time.perf_counter()
        title = f"epoch {epoch + 1}/{self.run.max_epoch}"
        bar = parallel.progress(batches, desc=title, unit="step", total=self.steps_per_epoch)
        every = max(1, self.steps_per_epoch // 20)
        for batch in bar:
            yield batch
            if self.batch % every == 0:  # reading a loss waits for the device: seldom
                bar.set_postfix(loss=f"{self.means()['loss']:.3f}", refresh=False)
        distributed.broadcast(self.model.buffers())
        rate = self.batch / (time.perf_counter() - start)
        means = self.means()
        self.log(epoch, means)
        text = "  ".join(f"{name} {value:.4f}" for name, value in means.items())
        speed = f"{rate:.2f} steps/s  {rate * self.images_per_step:.1f} images/s"
        tqdm.write(f"{title}  {text}  lr {self.update.schedule.get_last_lr()[0]:.2e}  {speed}")

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
                f"--lr {self.run.optimization.lr:g}: training diverged ({values}). Lower it, or pass "
                "--mixed_precision off, and start under another --tag."
            )
        return means

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
    def _save(self, epoch: int) -> None:
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
        }
        if epoch == self.run.max_epoch:
            content = {name: value for name, value in content.items() if name not in RESUME_ONLY}
        save_checkpoint(self.path, **content)

    def _resume(self) -> int:
        if not self.path.exists():
            return 0
        checkpoint = load_checkpoint(self.path)
        other = identity.difference(checkpoint.get("identity", {}), identity.digest(self.run.made_by))
        if other and self.run.overwrite:
            print(f"{self.path}: made with {other}. Training anew, as --overwrite says.")
            return 0
        if other:
            raise UserError(f"{self.path}: made with {other}. Choose another --tag, or pass --overwrite to train anew.")
        if checkpoint["epoch"] == self.run.max_epoch:
            return self.run.max_epoch
        self.model.load_state_dict(checkpoint["model"])
        for name, companion in self.companions.items():
            companion.load_state_dict(checkpoint[name])
        self.update.load_state_dict(checkpoint)
        self.updates = checkpoint["step"]
        print(f"{self.path}: continuing after epoch {checkpoint['epoch']} of {self.run.max_epoch}.")
        return checkpoint["epoch"]


def seed_everything(seed: int, epochs_begun: int = 0, rank: int = 0) -> None:
    """Seed Python, NumPy and PyTorch (all devices): from the run's seed before the network is built, then per epoch.

    Python and NumPy are seeded alike in all processes: they decide what concerns a whole step, as whether it mixes.
    PyTorch, which draws what concerns single images, pixels and neurons, is seeded with the process's rank too.
    """
    value = int(np.random.SeedSequence([seed, epochs_begun]).generate_state(1)[0])
    random.seed(value)
    np.random.seed(value)
    own = [seed, epochs_begun, rank] if rank else [seed, epochs_begun]
    torch.manual_seed(int(np.random.SeedSequence(own).generate_state(1)[0]))
