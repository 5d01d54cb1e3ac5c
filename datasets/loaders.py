"""Batches in an order, and with augmentations, that depend on the seed and the epoch only.

    loader = build_loader(dataset, 32, num_workers=8, seed=0, steps_per_epoch=46)
    for epoch in range(start, epochs):
        loader.set_epoch(epoch)
        for batch in loader:
            ...

The number of workers changes nothing, and a run resumed at an epoch sees what it would have seen without the break:
every draw carries its own seed, made from (seed, epoch, position in the epoch).
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from tools.cli import STOPPING
from tools.errors import UserError

ORDER_STREAM, ITEM_STREAM = 0, 1  # keep the two uses of one seed independent


class Draw(NamedTuple):
    """One item to load: its index, and the seed of its augmentation."""

    index: int
    seed: int


def build_loader(
    dataset: Dataset,
    batch_size: int,
    *,
    num_workers: int,
    seed: int,
    steps_per_epoch: int | None = None,
    weights: np.ndarray | None = None,
    rank: int = 0,
    world_size: int = 1,
) -> Loader:
    """Make a deterministic loader: full batches, in an order that is independent of those of other seeds.

    Args:
        batch_size: images per batch, over all processes; a multiple of `world_size`.
        num_workers: processes that load; 0 loads in this one.
        steps_per_epoch: batches per epoch; None: one pass over the dataset, without a smaller last batch.
        weights: chance of each image to be drawn, float [N] that adds up to 1 (`class_balance`); None: each image
            equally often.
        rank, world_size: this process loads every `world_size`-th draw, from draw `rank` on.

    Raises:
        UserError: the dataset is empty, or too small for a single full batch; or the batch cannot be shared evenly.
    """
    if batch_size % world_size:
        raise UserError(
            f"--batch_size {batch_size}: cannot be shared by {world_size} processes. Use a multiple of that."
        )
    steps = len(dataset) // batch_size if steps_per_epoch is None else steps_per_epoch
    if len(dataset) == 0 or steps == 0:
        raise UserError(f"--batch_size {batch_size}: {len(dataset)} images do not fill one batch. Lower it.")
    sampler = EpochSampler(len(dataset), steps * batch_size, seed, weights, rank, world_size)
    return Loader(
        _SeededItems(dataset),
        batch_size // world_size,
        sampler=sampler,
        num_workers=num_workers,
        collate_fn=_collate,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=_leave_ending_to_main,
        persistent_workers=num_workers > 0,
        generator=torch.Generator(),  # its own, so that iterating leaves the global one alone
    )


@dataclass(eq=False)
class EpochSampler(Sampler[Draw]):
    """An endless row of passes over the dataset, each in its own order; of n draws (over all processes) in an epoch.

    Epoch e takes the draws e*n .. (e+1)*n - 1 of that row. So every image is seen equally often in the long run, also
    where an epoch is shorter or longer than a pass. A pass is a permutation; with `weights`, it is as many independent
    draws. Further arguments: `build_loader`.
    """

    num_items: int
    num_draws: int
    seed: int
    weights: np.ndarray | None = None
    rank: int = 0
    world_size: int = 1
    epoch: int = 0
    skipped: int = 0  # draws of the epoch that are done

    def __post_init__(self) -> None:
        assert self.weights is None or self.weights.shape == (self.num_items,), "expected a weight per item"
        assert 0 <= self.rank < self.world_size, f"expected 0 <= rank < world_size, got {self.rank}, {self.world_size}"

    def __len__(self) -> int:
        return len(range(self.rank, self.num_draws, self.world_size))

    def __iter__(self) -> Iterator[Draw]:
        seeds = np.random.default_rng((self.seed, ITEM_STREAM, self.epoch)).integers(2**63, size=self.num_draws)
        mine = slice(self.rank + self.skipped, None, self.world_size)
        yield from map(Draw, self._order()[mine].tolist(), seeds[mine].tolist())

    def _order(self) -> np.ndarray:
        """Indices of this epoch, over all processes: int64 [num_draws]."""
        first = self.epoch * self.num_draws
        first_pass, last_pass = first // self.num_items, (first + self.num_draws - 1) // self.num_items
        row = np.concatenate([self._pass(number) for number in range(first_pass, last_pass + 1)])
        skipped = first - first_pass * self.num_items
        return row[skipped : skipped + self.num_draws]

    def _pass(self, number: int) -> np.ndarray:
        generator = np.random.default_rng((self.seed, ORDER_STREAM, number))
        if self.weights is not None:
            return generator.choice(self.num_items, self.num_items, p=self.weights)
        return generator.permutation(self.num_items)


def class_balance(labels: torch.Tensor) -> np.ndarray:
    """The chances with which every class is drawn equally often: a class at random, then one of its images.

    Args:
        labels: float [N,K], multi-hot. Images without a class are together one class more.

    Returns:
        float64 [N] that adds up to 1.
    """
    members = np.column_stack([labels.numpy() > 0, (labels <= 0).all(dim=1).numpy()]).astype(np.float64)
    members = members[:, members.any(axis=0)]
    return (members / members.sum(axis=0)).mean(axis=1)


class Loader(DataLoader):
    """Iterates over the batches of one epoch, the one named last by `set_epoch`.

    Two things more than torch's DataLoader: items are seeded one by one, and a UserError met in a worker reaches the
    caller as it was raised, in one line, where DataLoader would wrap it in the worker's traceback.
    """

    def set_epoch(self, epoch: int, steps_done: int = 0) -> None:
        """Choose the epoch (0-based) that the next iteration gives, without its first `steps_done` batches."""
        self.sampler.epoch = epoch
        self.sampler.skipped = steps_done * self.batch_size * self.sampler.world_size

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for batch in super().__iter__():
            if isinstance(batch, UserError):
                # A copy: raising a local makes a reference cycle through this frame, and then the workers, left to
                # the garbage collector, take seconds to stop.
                raise UserError(*batch.args)
            yield batch


class _SeededItems(Dataset):
    """Items by `Draw`; a UserError is returned, not raised, so that it passes from worker to caller unwrapped."""

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset

    def __getitem__(self, draw: Draw) -> Any:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(draw.seed)  # the CPU's only: torch.manual_seed would reset the GPU's
            try:
                return self.dataset[draw.index]
            except UserError as error:
                return error


def _leave_ending_to_main(worker: int) -> None:
    """In a worker: signals, which often go to all processes at once, are the main process's to answer.

    A worker ends with the main process. Nor does its thread that hands tensors over complain then.
    """
    for number in STOPPING:
        signal.signal(number, signal.SIG_IGN)

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if not issubclass(kind, (ConnectionError, EOFError)):
            sys.__excepthook__(kind, error, trace)

    sys.excepthook = hook


def _collate(items: list[Any]) -> Any:
    """torch's batch of the items; or the first error among them."""
    errors = (item for item in items if isinstance(item, UserError))
    return next(errors, None) or default_collate(items)
