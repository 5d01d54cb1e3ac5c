"""--on_error skip, in each script that has it: a truncated photograph in the middle of the others."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import shutil
import socket
import time
from pathlib import Path

import numpy as np
import pytest
import segment_anything
import torch
from command import data_flags, refusal, run
from conftest import SPLITS
from test_cli import write_checkpoint

from datasets.base import voc_palette
from tests.tiny_sam import build_tiny_sam
from tools import distributed
from tools.errors import FileError, Incomplete, UserError
from tools.files import load_image, save_mask
from tools.left_out import LeftOut

OUTPUT = Path("experiments/predictions/t@train")
SAM = ["--proposals", "sam", "--checkpoint", "sam.pth", "--model_type", "vit_b", "--points_per_side", 2]
COMMANDS = {
    "inference": ["--scales", 1, "--crf_t", 1, "--num_workers", 0],
    "inference threads": ["--scales", 1, "--crf_t", 1, "--num_workers", 2, "--cam_format", "npy"],
    "refine_sam": ["--pseudo_dir", "pseudos", "--proposals", "regions", "--num_workers", 0],
    "refine_sam processes": ["--pseudo_dir", "pseudos", "--proposals", "regions", "--num_workers", 2],
    "refine_sam batches": ["--pseudo_dir", "pseudos", *SAM, "--images_per_batch", 3, "--num_workers", 0],
    "train_segmentation": ["--predict", "--save_overlays", "--scales", 1, "--crf_t", 1, "--num_workers", 0],
}


@pytest.fixture
def project(folder_copy, tmp_path, monkeypatch):
    """Images a, b, c with what the three scripts need."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    write_checkpoint("t", "csrm")
    monkeypatch.setitem(segment_anything.sam_model_registry, "vit_b", build_tiny_sam)
    torch.save(build_tiny_sam().state_dict(), "sam.pth")
    for image_id in SPLITS["train"]:
        blob = np.zeros(load_image(next((folder_copy / "images").glob(f"{image_id}.*"))).shape[:2], np.uint8)
        blob[3:9, 2:9] = 1
        save_mask(Path("pseudos", f"{image_id}.png"), blob, voc_palette())
    return folder_copy


def products() -> dict[Path, bytes]:
    """Everything of single images; what is said about a folder, and the list, are told apart by their names."""
    files = (path for path in OUTPUT.rglob("*") if path.is_file() and path.stem in SPLITS["train"])
    return {path.relative_to(OUTPUT): path.read_bytes() for path in files}


def incomplete(capsys, *command) -> str:
    """The last line of a command that ends with exit code 3."""
    with pytest.raises(SystemExit) as stop:
        run(*command)
    assert stop.value.code == 3
    return capsys.readouterr().err.rstrip("\n").split("\n")[-1]


@pytest.mark.parametrize("name", COMMANDS)
def test_the_others_are_as_ever_and_the_mended_one_is_added(project, capsys, name):
    script = name.split()[0]
    command = [script, "--tag", "t", *data_flags(project), "--domain", "train", "--device", "cpu", *COMMANDS[name]]
    run(*command)
    whole, b = products(), project / "images" / "b.png"
    shutil.rmtree(OUTPUT)
    content = b.read_bytes()
    b.write_bytes(content[:900])
    assert f"{b}: not a readable image" in refusal(capsys, *command)
    report = OUTPUT / f"left-out-{script}.json"
    assert incomplete(capsys, *command, "--on_error", "skip") == (
        f"{script}.py: 1 of 3 images are left out: {report} says which and why. Correct or replace their files, and "
        "run the same command again."
    )
    assert len(whole) == 6 and products() == {path: data for path, data in whole.items() if path.stem != "b"}
    reasons = json.loads(report.read_text())
    assert list(reasons) == ["b"] and reasons["b"].startswith(f"{b}: not a readable image (")
    b.write_bytes(content)
    run(*command, "--on_error", "skip")
    assert not report.exists() and products() == whole


def test_a_threshold_is_computed_from_the_others(project, capsys):
    """With the mended photograph it is another, and the two may not mix."""
    flags = ["--tag", "t", *data_flags(project), "--domain", "train", "--device", "cpu", *COMMANDS["inference"]]
    b = project / "images" / "b.png"
    content = b.read_bytes()
    b.write_bytes(content[:900])
    command = ["inference", *flags, "--threshold", "auto", "--on_error", "skip"]
    assert "1 of 3 images are left out" in incomplete(capsys, *command)
    assert len(list(OUTPUT.glob("pseudos-tauto-c1/[abc].png"))) == 2
    b.write_bytes(content)
    assert "pseudos-tauto-c1: made with --threshold 0." in refusal(capsys, *command)
    run(*command, "--overwrite")
    assert len(list(OUTPUT.glob("pseudos-tauto-c1/[abc].png"))) == 3


def test_merging_leaves_out_what_has_no_pseudo_mask_but_not_everything(project, capsys):
    command = ["refine_sam", "--tag", "t", *data_flags(project), "--domain", "train", *COMMANDS["refine_sam"]]
    Path("pseudos/b.png").unlink()
    assert "pseudos: b.png is missing (1 of 3 are)" in refusal(capsys, *command)
    incomplete(capsys, *command, "--on_error", "skip")
    reasons = json.loads((OUTPUT / "left-out-refine_sam.json").read_text())
    assert reasons == {"b": "pseudos/b.png: no such mask."}
    shutil.rmtree("pseudos")
    assert "pseudos: a.png is missing (3 of 3 are)" in refusal(capsys, *command, "--on_error", "skip")


def test_what_concerns_all_images_stops_all_the_same(tmp_path):
    def full(image_id):
        raise UserError("disk full")

    with pytest.raises(UserError, match="disk full"):
        list(LeftOut(tmp_path, "x", skip=True).results(full, "ab", "test"))


def work(image_id: str) -> str:
    if image_id in "bc":
        raise FileError(f"{image_id}: damaged")
    return image_id


def test_each_part_keeps_its_own_lines_of_the_list(tmp_path):
    """Parts of the images, at any time; images that are no longer on the list of ids go."""

    def part(index: int, damaged: bool, ids: str = "abcd") -> dict[str, str]:
        left_out = LeftOut(tmp_path, "x", skip=True)
        share = ids[index::2]
        results = list(left_out.results(work if damaged else str, share, "test"))
        assert results == [i for i in share if not damaged or i in "ad"]
        with pytest.raises(Incomplete) if damaged else contextlib.nullcontext():
            left_out.finish(ids, share)
        return json.loads(left_out.path.read_text()) if left_out.path.exists() else {}

    assert part(0, True) == {"c": "c: damaged"}
    assert part(1, True) == {"c": "c: damaged", "b": "b: damaged"}
    assert part(0, False) == {"b": "b: damaged"}
    assert part(0, False, "acd") == {}


@pytest.mark.parametrize("content", ["", "{"])
def test_a_damaged_list_is_named_and_all_images_are_done(project, capsys, content):
    """A power cut leaves it empty."""
    command = ["refine_sam", "--tag", "t", *data_flags(project), "--domain", "train", *COMMANDS["refine_sam"]]
    run(*command)
    whole, path = products(), OUTPUT / "left-out-refine_sam.json"
    shutil.rmtree(OUTPUT)
    OUTPUT.mkdir()
    path.write_text(content)
    line = refusal(capsys, *command)
    assert f"{path}: not a readable JSON file" in line and "Delete it, and run the same command again." in line
    assert products() == whole
    path.unlink()
    run(*command)
    assert not path.exists() and products() == whole


def wait_for_the_other(rank: int, port: int, folder: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        values = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "localhost", "MASTER_PORT": port}
        for name, value in values.items():
            patch.setenv(name, str(value))
        patch.chdir(folder)
        distributed.start(Path("experiments"))
        if rank == 1:
            time.sleep(1)
            (folder / "late").touch()
        distributed.wait_for_shares()
        assert (folder / "late").exists()


def test_processes_of_torchrun_end_together(tmp_path):
    """It ends all when one ends with an error, exit code 3 included."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("fork")
    first, last = (context.Process(target=wait_for_the_other, args=(rank, port, tmp_path)) for rank in range(2))
    first.start()
    first.join(timeout=1)
    assert first.is_alive()
    last.start()
    for process in (first, last):
        process.join(timeout=20)
    assert [first.exitcode, last.exitcode] == [0, 0]
