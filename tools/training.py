"""The loop around a training step: epochs, resume, mixed precision, clipping, schedule, logs, checkpoints.

    trainer = Trainer(model, args, info, steps_per_epoch=46)
    for epoch in trainer.epochs():
        for batch in trainer.progress(epoch, loader):
            losses = trainer.losses(step, batch)    # dict of scalars; "loss" is the one to minimise
            trainer.update(losses)

A run killed at any moment and started again with the same command continues after its last finished epoch and ends with
the same weights: every epoch seeds all generators from (seed, epoch). Started by torchrun, several processes train
together (`tools.distributed`); a run may go on with another number of them. The first one logs and saves.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import random
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from tools import distributed, options, parallel
from tools.checkpoint import check_classes, load_checkpoint, save_checkpoint
from tools.devices import autocast_dtype
from tools.errors import UserError
from tools.files import check_writable
from tools.optim import build_optimizer, poly_schedule

SAME_FLAGS = (
    *("seed", "batch_size", "max_epoch", "max_steps", "accumulate_steps", "optimizer", "lr", "wd"),
    *("image_size", "min_image_size", "max_image_size", "method", "w_re", "ema", "sampler"),
)
"""Flags that a resumed run must share with its beginning, as far as the script has them."""

RESUME_ONLY = ("optimizer", "schedule", "scaler", "memory_bank", "opponent")
"""Entries dropped from the checkpoint of a finished run."""


class Trainer:
    """Drives the training of one model.

    Args:
        model: trained in place; has `config` and `scratch_modules()`.
        args: the script's flags (see `options.add_common`, `options.add_optimization`).
        classes: their names, background first; they go into the checkpoint.
        device: where the model lies.
        steps_per_epoch: batches per epoch.
        loaders: how many loaders of `--batch_size` images a batch comes from; for the speed reported.
        partial: whether a step may leave some weights without gradient.
        companions: what else is kept in the checkpoint, by name: modules such as the teacher, or what has a
            `state_dict` and a `load_state_dict` like one.
    """

    def __init__(
        self,
        model: nn.Module,
        args: argparse.Namespace,
        classes: Sequence[str],
        *,
        device: torch.device,
        steps_per_epoch: int,
        loaders: int = 1,
        partial: bool = False,
        companions: dict[str, Any] | None = None,
    ) -> None:
        self.model, self.args, self.classes, self.device = model, args, tuple(classes), device
        self.steps_per_epoch, self.images_per_step = steps_per_epoch, loaders * args.batch_size
        self.companions = companions or {}
        if args.compile:  # the teacher too
            for module in (model, *self.companions.values()):
                if isinstance(module, nn.Module):
                    module.compile()
        self.replica = distributed.Replica(model, partial=partial)
        self.optimizer = build_optimizer(model, **options.optimizer_arguments(args))
        self.updates_per_epoch = -(-steps_per_epoch // args.accumulate_steps)
        self.schedule = poly_schedule(self.optimizer, self.updates_per_epoch * args.max_epoch, args.lr_poly_power)
        self.dtype = autocast_dtype(args.mixed_precision, device)
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.dtype == torch.float16)
        self.path = options.model_path(args.tag)
        self.step = self.batch = 0
        self.sums: dict[str, torch.Tensor] = {}

    # -- epochs ---------------------------------------------------------------------------------------------------
    def epochs(self) -> Iterator[int]:
        """Yield the index of each epoch still to do, with all generators seeded; save after each."""
        check_writable(self.path.parent)
        first = self._resume()
        if distributed.all_reduce_sum(torch.tensor(first, device=self.device)) != first * parallel.world_size():
            raise UserError(f"{self.path}: not the same file in all processes. Run them in one shared folder.")
        if first == self.args.max_epoch:
            print(f"{self.path}: already trained; nothing to do. Choose another --tag, or delete it to train again.")
            return
        logs = check_writable(options.EXPERIMENTS / "logs" / self.args.tag)
        self.writer = SummaryWriter(logs, purge_step=first + 1) if parallel.is_main() else None
        for epoch in range(first, self.args.max_epoch):
            seed_everything(self.args.seed, epoch + 1, parallel.rank())
            self.model.train()
            yield epoch
            if parallel.is_main():
                self._save(epoch + 1)
        if self.writer:
            self.writer.close()
        print(f"Model: {self.path}")

    def fit(self, loader: Any, step: Callable[[dict], dict[str, torch.Tensor]]) -> Iterator[int]:
        """The loop of a script with one loader: `step` turns a batch into losses. Yields each epoch at its end."""
        for epoch in self.epochs():
            loader.set_epoch(epoch)
            for batch in self.progress(epoch, loader):
                self.update(self.losses(step, batch))
            yield epoch

    def progress(self, epoch: int, batches: Iterable) -> Iterator:
        """Yield the batches of an epoch under a progress bar; then log the mean losses and the speed."""
        self.sums, self.batch, start = {}, 0, time.perf_counter()
        title = f"epoch {epoch + 1}/{self.args.max_epoch}"
        bar = parallel.progress(batches, desc=title, unit="step", total=self.steps_per_epoch)
        every = max(1, self.steps_per_epoch // 20)
        for batch in bar:
            yield batch
            if self.batch % every == 0:  # reading a loss waits for the device: seldom
                bar.set_postfix(loss=f"{self.means()['loss']:.3f}", refresh=False)
        rate = self.batch / (time.perf_counter() - start)
        means = self.means()
        self.log(epoch, means)
        text = "  ".join(f"{name} {value:.4f}" for name, value in means.items())
        speed = f"{rate:.2f} steps/s  {rate * self.images_per_step:.1f} images/s"
        tqdm.write(f"{title}  {text}  lr {self.schedule.get_last_lr()[0]:.2e}  {speed}")

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
                f"--lr {self.args.lr:g}: training diverged ({values}). Lower it, or pass --mixed_precision off, "
                "and start under another --tag."
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

    def losses(self, step: Callable[..., dict[str, torch.Tensor]], *args: Any) -> dict[str, torch.Tensor]:
        """What `step(*args)` gives in mixed precision: the losses of a batch, or of this process's share of one."""
        with self.autocast():
            return self.replica(step, *args, average=self._updates_after(self.batch + 1))

    def _updates_after(self, batch: int) -> bool:
        """Whether the weights change after this batch of the epoch (counted from 1)."""
        return batch % self.args.accumulate_steps == 0 or batch == self.steps_per_epoch

    def record(self, losses: dict[str, torch.Tensor]) -> None:
        """Add the losses of a batch to the means that the end of the epoch reports."""
        for name, value in losses.items():
            self.sums[name] = self.sums.get(name, 0) + value.detach()

    def update(self, losses: dict[str, torch.Tensor]) -> bool:
        """Backpropagate `losses["loss"]`; every `accumulate_steps` batches, clip and step the optimiser.

        Returns:
            Whether the weights changed.
        """
        self.record(losses)
        self.batch += 1
        self.scaler.scale(losses["loss"] / self.args.accumulate_steps).backward()
        if not self._updates_after(self.batch):
            return False
        if self.args.grad_max_norm:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), self.args.grad_max_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.schedule.step()
        self.step += 1
        return True

    # -- checkpoints ----------------------------------------------------------------------------------------------
    def _save(self, epoch: int) -> None:
        content = {
            "config": self.model.config,
            "model": self.model.state_dict(),
            **{name: companion.state_dict() for name, companion in self.companions.items()},
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "scaler": self.scaler.state_dict(),
            "classes": list(self.classes),
            "args": {name: _plain(value) for name, value in vars(self.args).items()},
            "epoch": epoch,
            "max_epoch": self.args.max_epoch,
            "step": self.step,
        }
        if epoch == self.args.max_epoch:
            content = {name: value for name, value in content.items() if name not in RESUME_ONLY}
        save_checkpoint(self.path, **content)

    def _resume(self) -> int:
        if not self.path.exists():
            return 0
        checkpoint = load_checkpoint(self.path)
        check_classes(checkpoint, self.classes, self.path)
        self._check_same_run(checkpoint)
        if checkpoint["epoch"] == self.args.max_epoch:
            return self.args.max_epoch
        self.model.load_state_dict(checkpoint["model"])
        for name, companion in self.companions.items():
            companion.load_state_dict(checkpoint[name])
        self.optimizer.load_state_dict(checkpoint["optimizer"])
        self.scaler.load_state_dict(checkpoint["scaler"])
        self.schedule.load_state_dict(checkpoint["schedule"])
        self.step = checkpoint["step"]
        print(f"{self.path}: continuing after epoch {checkpoint['epoch']} of {self.args.max_epoch}.")
        return checkpoint["epoch"]

    def _check_same_run(self, checkpoint: dict) -> None:
        flags = {flag: getattr(self.args, flag) for flag in SAME_FLAGS if hasattr(self.args, flag)}
        ours = {**self.model.config, **flags}
        theirs = {**checkpoint["args"], **checkpoint["config"]}
        for name, value in ours.items():
            if theirs.get(name, value) != value:  # what theirs lacks did not exist when it was made
                raise UserError(
                    f"{self.path}: made with {name} {theirs[name]}, not {value}. "
                    "Choose another --tag, or delete the file to train again."
                )


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


def _plain(value: object) -> object:
    return value if isinstance(value, (int, float, str, bool, list, type(None))) else str(value)
