"""Files that were cut or emptied, or had a bit flipped, are refused or say what they said; pickles run nothing."""

from __future__ import annotations

import json
import os
import pickle
import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from command import data_flags, refusal

from datasets.base import voc_palette
from models import build_model
from tools import identity
from tools.cam_files import load_cams, save_cams
from tools.checkpoint import load_checkpoint, save_checkpoint
from tools.errors import UserError
from tools.files import load_mask, save_mask
from tools.proposals import load_proposals, save_proposals

MADE_BY = {"script": "inference.py", "version": "1", "settings": {"scales": [1.0, 2.0], "crf_t": 10}, "folders": {}}
MADE_BY |= {"files": {"weights": {"file": "a.pth", "sha256": "0123456789abcdef"}}, "inputs": {"labels": {"a": "cat"}}}
GENERATOR = np.random.default_rng(0)


def damaged(whole: bytes, chance: random.Random) -> Iterator[bytes]:
    yield b""
    for _ in range(40):
        yield whole[: chance.randrange(len(whole))]
    for _ in range(250):
        data = bytearray(whole)
        data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
        yield bytes(data)


def cams(path: Path):
    save_cams(path, np.array([0, 2, 5]), GENERATOR.random((2, 6, 8)), GENERATOR.random((2, 23, 31)))
    return load_cams


def mask(path: Path):
    save_mask(path, GENERATOR.integers(0, 5, (23, 31)), voc_palette())
    return load_mask


def proposals(path: Path):
    save_proposals(path, GENERATOR.random((6, 23, 31)) > 0.8, (23, 31))
    return lambda path: load_proposals(path, (23, 31))


def checkpoint(path: Path):
    torch.manual_seed(0)
    model = build_model("classifier", architecture="test_resnet", num_classes=3)
    save_checkpoint(path, config=model.config, model=model.state_dict(), classes=["background", "a", "b"], epoch=1)

    def read(path: Path) -> dict:
        content = load_checkpoint(path)
        return {**content, "model": {name: tensor.numpy() for name, tensor in content["model"].items()}}

    return read


KINDS = {"a.npz": cams, "a.png": mask, "a.json": proposals, "a.pth": checkpoint}


@pytest.mark.parametrize("name", KINDS)
def test_damage_is_noticed_or_does_no_harm(tmp_path, name):
    path, noticed = tmp_path / name, 0
    read = KINDS[name](path)
    whole, expected = path.read_bytes(), pickle.dumps(read(path))
    for number, data in enumerate(damaged(whole, random.Random(name))):
        path.write_bytes(data)
        try:
            assert pickle.dumps(read(path)) == expected, number
        except UserError as error:
            noticed += 1
            assert "\n" not in str(error) and str(error).startswith(f"{path}: ")
    assert noticed > 150


def test_damaged_settings_lose_no_product(tmp_path):
    """They are refused, or still say the same."""
    identity.claim_folder(tmp_path, MADE_BY)
    record, product = tmp_path / "settings.json", tmp_path / "a.png"
    product.write_bytes(b"x")
    whole, noticed = record.read_bytes(), 0
    for data in damaged(whole, random.Random(0)):
        record.write_bytes(data)
        try:
            identity.claim_folder(tmp_path, MADE_BY)
        except UserError as error:
            noticed += 1
            assert "\n" not in str(error) and "--overwrite" in str(error)
        assert product.exists()
    assert noticed > 150


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("exploded",)


@pytest.mark.parametrize("name", ["a.npz", "a.npy", "b.npy", "a.pth"])
def test_pickles_run_nothing(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    content = {"keys": Bomb(), "cam": np.ones(1), "hr_cam": np.ones(1)}
    if name == "a.npz":
        np.savez(name, **{key: np.array([value], dtype=object) for key, value in content.items()})
    elif name == "a.npy":
        np.save(name, np.array(content, dtype=object), allow_pickle=True)
    elif name == "b.npy":  # within the storage of a tensor
        Path(name).write_bytes(storage_bomb())
    else:
        torch.save({"config": {}, "model": Bomb(), "classes": [], "epoch": 1}, name)
    with pytest.raises(UserError, match="not a readable"):
        (load_checkpoint if name == "a.pth" else load_cams)(name)
    assert not Path("exploded").exists()


def storage_bomb() -> bytes:
    class Storage:
        def __reduce__(self):
            torch.save(Bomb(), "storage.pt", _use_new_zipfile_serialization=False)
            return torch.storage._load_from_bytes, (Path("storage.pt").read_bytes(),)

    np.save("bomb.npy", np.array({"keys": Storage()}, dtype=object), allow_pickle=True)
    return Path("bomb.npy").read_bytes()


def test_peers_keep_arrays_and_tensors(tmp_path):
    content = {"keys": np.array([0, 3]), "cam": torch.rand(1, 2, 3), "hr_cam": np.random.rand(1, 8, 12).astype("f4")}
    np.save(tmp_path / "a.npy", content)
    for value, expected in zip(load_cams(tmp_path / "a.npy"), content.values(), strict=True):
        np.testing.assert_array_equal(value, np.asarray(expected))
    content["keys"] = [np.int64(0), np.int64(3)]
    np.save(tmp_path / "a.npy", content)
    assert load_cams(tmp_path / "a.npy")[0].tolist() == [0, 3]


@pytest.mark.parametrize("damage", [b"", b"{", b"[1]", b"\xff"])
def test_damaged_scores_are_one_line(folder_root, tmp_path, monkeypatch, capsys, damage):
    monkeypatch.chdir(tmp_path)
    Path("s.json").write_bytes(damage)
    flags = [*data_flags(folder_root), "--domain", "train", "--output_dir", "report", "--summary", "cams=s.json"]
    assert "s.json: " in refusal(capsys, "report", *flags)
    Path("s.json").write_text(json.dumps({"miou": "high"}))
    assert "s.json: " in refusal(capsys, "report", *flags)
