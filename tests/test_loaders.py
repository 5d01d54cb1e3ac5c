"""Loaders: determinism, the endless row of passes, errors out of workers."""

from __future__ import annotations

import socket
import time
from collections import Counter
from collections.abc import Callable
from multiprocessing import current_process
from multiprocessing.connection import Client
from multiprocessing.resource_sharer import DupFd
from pathlib import Path

import pytest
import torch
from torch.utils.data import Dataset

from datasets import build_source
from datasets.dataset import ImageDataset
from datasets.loaders import EpochSampler, build_loader
from datasets.transforms import train_geometry
from tools.errors import UserError


class Noise(Dataset):
    """Its items say which index was asked for, and what their random number was."""

    def __init__(self, length: int, bad: int = -1) -> None:
        self.length, self.bad = length, bad

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict:
        if index == self.bad:
            raise UserError(f"image {index}: broken.")
        return {"index": index, "noise": torch.rand(())}


def load(dataset: Dataset, epochs=(0,), *, batch_size=4, seed=0, num_workers=0, **options):
    """(index, noise) of all items of the epochs, in order."""
    loader = build_loader(dataset, batch_size, num_workers=num_workers, seed=seed, **options)
    items = []
    for epoch in epochs:
        loader.set_epoch(epoch)
        batches = list(loader)
        assert len(batches) == len(loader)
        items += [pair for b in batches for pair in zip(b["index"].tolist(), b["noise"].tolist(), strict=True)]
    return items


def indices(items: list) -> list[int]:
    return [index for index, _ in items]


def test_workers_change_nothing():
    reference = load(Noise(20), (0, 1))
    assert load(Noise(20), (0, 1), num_workers=1) == reference
    assert load(Noise(20), (0, 1), num_workers=2) == reference
    assert len({noise for _, noise in reference}) == 40


def test_a_resumed_run_sees_what_the_unbroken_one_would():
    assert load(Noise(20), (3,), steps_per_epoch=3) == load(Noise(20), range(4), steps_per_epoch=3)[-12:]


@pytest.mark.parametrize("world_size", [1, 2])
def test_an_epoch_goes_on_behind_the_batches_that_are_done(world_size):
    for rank in range(world_size):
        loader = build_loader(Noise(20), 4, num_workers=0, seed=0, rank=rank, world_size=world_size)
        epochs = []
        for steps_done in (0, 2):
            loader.set_epoch(1, steps_done)
            epochs.append([(*b["index"].tolist(), *b["noise"].tolist()) for b in loader])
        assert len(epochs[0]) == 5 and epochs[1] == epochs[0][2:]


@pytest.mark.parametrize("other", [{"seed": 1}, {"epochs": (1,)}], ids=["seeds", "passes"])
def test_two_seeds_and_two_passes_have_independent_orders(other):
    first, second = load(Noise(100)), load(Noise(100), **other)
    assert sorted(indices(first)) == sorted(indices(second)) == list(range(100))
    assert sum(a == b for a, b in zip(indices(first), indices(second), strict=True)) < 10
    assert not {noise for _, noise in first} & {noise for _, noise in second}


@pytest.mark.parametrize("steps", [1, 2, 3, 7])
def test_steps_per_epoch_cycle_through_the_set_evenly(steps: int):
    epochs = 5
    counts = Counter(indices(load(Noise(10), range(epochs), steps_per_epoch=steps)))
    assert sum(counts.values()) == 4 * steps * epochs
    assert max(counts.values()) - min(counts[index] for index in range(10)) <= 1


def test_a_set_smaller_than_a_batch_can_fill_it():
    assert Counter(indices(load(Noise(3), steps_per_epoch=2, batch_size=6))) == {0: 4, 1: 4, 2: 4}


def test_there_is_no_smaller_last_batch():
    assert len(set(indices(load(Noise(10))))) == 8


def test_processes_share_the_epoch_among_them():
    alone = [list(EpochSampler(10, 12, seed=3))[rank::2] for rank in range(2)]
    shared = [EpochSampler(10, 12, seed=3, rank=rank, world_size=2) for rank in range(2)]
    assert [list(sampler) for sampler in shared] == alone
    assert [len(sampler) for sampler in shared] == [6, 6]
    assert len(load(Noise(20), batch_size=6, rank=1, world_size=2)) == 9


def test_iterating_leaves_the_global_generator_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    load(Noise(8))
    assert torch.equal(torch.rand(3), expected)


def error_of(action: Callable[[], object]) -> str:
    """The UserError's text. Not pytest.raises: that keeps the frames, and with them the workers, alive."""
    try:
        action()
    except UserError as error:
        return str(error)
    return "no error"


@pytest.mark.parametrize("num_workers", [0, 2])
def test_user_error_reaches_the_caller_as_one_line(num_workers: int):
    assert error_of(lambda: load(Noise(8, bad=5), num_workers=num_workers)) == "image 5: broken."


def test_unreadable_image_is_named_from_a_worker(folder_copy: Path):
    (folder_copy / "images" / "b.png").write_bytes(b"not an image")
    source = build_source("folder", folder_copy)
    dataset = ImageDataset(source, source.ids("train"), train_geometry(16, 12, 20))
    message = error_of(lambda: list(build_loader(dataset, 3, num_workers=1, seed=0)))
    assert message.startswith(str(folder_copy / "images" / "b.png")) and "\n" not in message


def test_batches_of_images(folder_root: Path):
    source = build_source("folder", folder_root)
    dataset = ImageDataset(source, source.ids("train"), train_geometry(16, 12, 20), with_masks=True)
    (batch,) = build_loader(dataset, 3, num_workers=0, seed=0)
    assert sorted(batch["id"]) == ["a", "b", "c"]
    assert batch["image"].shape == (3, 3, 16, 16) and batch["image"].dtype == torch.uint8
    assert batch["label"].shape == (3, 2) and batch["label"].dtype == torch.float32
    assert batch["mask"].shape == (3, 16, 16) and batch["mask"].dtype == torch.int64


@pytest.mark.parametrize(("length", "steps"), [(3, None), (0, None), (0, 1)])
def test_no_batch_at_all_is_the_users_mistake(length: int, steps: int | None):
    with pytest.raises(UserError, match=f"--batch_size 4: {length} images"):
        load(Noise(length), steps_per_epoch=steps)


class Handed(Dataset):
    """Asked for its one item, it starts the thread that hands a worker's tensors over, and disturbs it."""

    def __init__(self, disturb: Callable[[str], None]) -> None:
        self.disturb = disturb

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> dict:
        address, _ = DupFd(0)._id  # as PyTorch hands over the file of a tensor's memory
        self.disturb(address)
        time.sleep(0.5)
        return {"index": index, "noise": torch.zeros(())}


def go_away(address: str) -> None:
    """As a process does that ends before it has shown who it is."""
    with socket.socket(socket.AF_UNIX) as caller:
        caller.connect(address)


def ask_for_nonsense(address: str) -> None:
    with Client(address, authkey=current_process().authkey) as caller:
        caller.send(0)


@pytest.mark.parametrize("disturb, printed", [(go_away, False), (ask_for_nonsense, True)])
def test_a_main_process_that_ends_leaves_no_traceback_of_its_workers(capfd, disturb, printed: bool):
    load(Handed(disturb), batch_size=1, num_workers=1)
    assert ("Traceback" in capfd.readouterr().err) == printed
