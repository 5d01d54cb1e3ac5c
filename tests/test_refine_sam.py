"""The script end to end on a folder of images: what it writes, that it resumes, and what it says to mistakes."""

from __future__ import annotations

import functools
import itertools
import json
import multiprocessing
import os
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import refine_sam
from datasets import build_source
from datasets.base import DatasetInfo, voc_palette
from tests.test_proposals import disc_image
from tests.tiny_sam import build_tiny_sam
from tools import options
from tools.errors import UserError
from tools.files import load_mask, save_mask
from tools.merging import merge_masks
from tools.proposals import load_proposals

IDS = ("a", "b", "c")


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A `folder` dataset of three images and a square pseudo mask for each, in the working directory."""
    image, disc = disc_image()
    for index, image_id in enumerate(IDS):
        (tmp_path / "data" / "images").mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.roll(image, 5 * index, axis=1)).save(tmp_path / "data" / "images" / f"{image_id}.png")
        blob = np.zeros(disc.shape, np.uint8)
        blob[36:60, 36 + 5 * index : 60 + 5 * index] = 1
        save_mask(tmp_path / "pseudos" / f"{image_id}.png", blob, voc_palette())
    (tmp_path / "data" / "splits").mkdir()
    (tmp_path / "data" / "splits" / "train.txt").write_text("\n".join(IDS))
    (tmp_path / "data" / "labels.csv").write_text("id,labels\n" + "".join(f"{i},ball\n" for i in IDS))
    (tmp_path / "data" / "classes.txt").write_text("background\nball\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


COMMON = ["--tag", "t", "--dataset", "folder", "--data_dir", "data", "--domain", "train", "--proposals", "regions"]


def run(*flags):
    parser = refine_sam.make_parser()
    refine_sam.main(parser.parse_args([*COMMON, "--num_workers", "0", "--pseudo_dir", "pseudos", *flags]))


def outputs(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.glob("[!.]*"))}


def test_both_stages_make_the_masks_that_the_rule_gives(project, capsys):
    run()
    for image_id in IDS:
        refined = load_mask(refined_folder() / f"{image_id}.png")
        masks = load_proposals(proposals_folder() / f"{image_id}.json", (96, 96))
        np.testing.assert_array_equal(refined, merge_masks(load_mask(f"pseudos/{image_id}.png"), masks))
    text = capsys.readouterr().out
    assert "3 images, 0 done already" in text and "ball" in text and "pixels changed" in text and "Next:" in text


def test_refined_masks_follow_the_object(project):
    run()
    disc = disc_image()[1]
    before, after = load_mask("pseudos/a.png") == 1, load_mask(refined_folder() / "a.png") == 1
    iou = [(mask & disc).sum() / (mask | disc).sum() for mask in (before, after)]
    assert iou[1] > iou[0] + 0.05 and iou[1] > 0.9


def test_what_changed_is_counted_from_before_to_after(project):
    run()
    info = build_source("folder", "data").info
    folders = refine_sam.Folders(proposals_folder(), Path("pseudos"), refined_folder())
    counts = refine_sam.merge_file(refine_sam.Rule("max_iou", "class", 0.5, 0.85, False), info, folders, "a")
    before, after = load_mask("pseudos/a.png"), load_mask(refined_folder() / "a.png")
    assert counts.tolist() == [[((before == i) & (after == j)).sum() for j in (0, 1, 255)] for i in (0, 1, 255)]
    assert counts[0, 1] != counts[1, 0]


def test_the_table_of_changes(capsys):
    """Of 100 pixels, 70, 25 and 5 before, and 65, 35 and 0 after. What changes is in per cent of before."""
    changes = np.array([[60, 10, 0], [5, 20, 0], [0, 5, 0]])
    refine_sam.print_changes(DatasetInfo(("background", "ball")), changes)
    *lines, last = capsys.readouterr().out.splitlines()
    rows = {line.split()[0]: [float(text) for text in line.split()[1:]] for line in lines[1:]}
    assert rows == {"background": [70, 65, 7.14, 14.29], "ball": [25, 35, 60, 20], "ignore": [5, 0, 0, 100]}
    assert last == "20.00 % of the pixels changed"


def test_the_table_is_of_the_shares_of_all_processes(project, monkeypatch):
    tables = []
    monkeypatch.setattr(refine_sam.distributed, "sum_of_shares", lambda own: own + np.ones_like(own))
    monkeypatch.setattr(refine_sam, "print_changes", lambda info, changes: tables.append(changes))
    run()
    assert tables[0].sum() == len(IDS) * 96**2 + 9


def test_proposals_are_made_of_upright_rgb_and_of_regions_as_the_flags_say(project):
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    Image.fromarray(pixels).save("data/images/a.png")
    seen = []
    make = lambda image_ids, images: seen.extend(images) or [np.zeros((0, 5, 7), bool)]  # noqa: E731
    refine_sam.propose_batch(make, build_source("folder", "data"), Path("made"), ["a"])
    np.testing.assert_array_equal(seen, [pixels])
    flags = ["--region_max_size", "0.3", "--region_min_contrast", "2"]
    backend = refine_sam.select_backend(refine_sam.make_parser().parse_args([*COMMON, *flags]))
    assert (backend.build().max_size, backend.build().min_contrast) == (0.3, 2)
    assert backend.settings.items() >= {"region_max_size": 0.3, "region_min_contrast": 2}.items()


def test_a_second_run_makes_only_what_is_missing(project, capsys):
    run()
    proposals, refined = outputs(proposals_folder()), outputs(refined_folder())
    (proposals_folder() / "b.json").unlink()
    (refined_folder() / "b.png").unlink()
    kept = (proposals_folder() / "a.json").stat().st_mtime_ns
    first_report = capsys.readouterr().out.split("writing")[-1]
    run()
    text = capsys.readouterr().out
    assert text.count("3 images, 2 done already") == 2
    assert text.split("writing")[-1] == first_report
    assert (proposals_folder() / "a.json").stat().st_mtime_ns == kept
    assert (outputs(proposals_folder()), outputs(refined_folder())) == (proposals, refined)


def test_stages_shards_and_processes_give_the_same_bytes(project):
    run()
    expected = outputs(proposals_folder()), outputs(refined_folder())
    shutil.rmtree("experiments")
    run("--stage", "propose", "--shard", "1/2")
    assert {p.stem for p in proposals_folder().glob("?.json")} == {"b"}
    run("--stage", "propose", "--shard", "0/2", "--num_workers", "2")
    run("--stage", "merge")
    assert (outputs(proposals_folder()), outputs(refined_folder())) == expected


def test_sam_from_a_checkpoint(project, monkeypatch):
    import segment_anything

    monkeypatch.setitem(segment_anything.sam_model_registry, "vit_b", build_tiny_sam)
    torch.save(build_tiny_sam().state_dict(), "sam.pth")
    flags = ["--proposals", "sam", "--checkpoint", "sam.pth", "--model-type", "vit_b", "--device", "cpu"]
    with pytest.raises(UserError, match=r"other.pth: no such checkpoint"):
        run(*flags, "--checkpoint", "other.pth")  # which leaves nothing that the next run would differ from
    torch.save({"pos": torch.zeros(1)}, "other.pth")
    with pytest.raises(UserError, match=r"other.pth: not the weights"):
        run(*flags, "--checkpoint", "other.pth")
    flags += ["--points-per-side", "2", "--pred-iou-thresh", "0", "--stability-score-thresh", "0"]
    run(*flags)
    assert load_mask("experiments/predictions/t@train/sam-sam-max_iou_imp2/a.png").shape == (96, 96)
    settings = json.loads((proposals_folder("sam") / "settings.json").read_text())
    assert settings["settings"]["points_per_side"] == 2 and settings["files"]["checkpoint"]["file"] == "sam.pth"
    # As if they had been made on a GPU: the same flags take them.
    monkeypatch.setattr(refine_sam.devices, "autocast_dtype", lambda *args: torch.bfloat16)
    run(*flags)
    with pytest.raises(UserError, match=r"made with --mixed_precision auto, not bf16\."):
        run(*flags, "--mixed_precision", "bf16")
    with pytest.raises(UserError, match=r"made with --checkpoint sam.pth \(content \w+\), not other.pth"):
        run("--stage", "merge", *flags, "--checkpoint", "other.pth")
    Path("sam.pth").unlink()  # as on a machine without the weights
    run("--stage", "merge", *flags, "--mixed_precision", "bf16")
    with pytest.raises(UserError, match=r"made with --points_per_side 2, not 3\. Pass the flags"):
        run("--stage", "merge", *flags, "--points-per-side", "3")


def test_other_settings_do_not_mix_in_one_folder(project):
    run()
    with pytest.raises(UserError, match=r"made with --inside_threshold 0.5, not 0.7\."):
        run("--inside_threshold", "0.7")
    run("--mode", "max_iou", "--order", "largest_overlap")
    assert (refined_folder("regions-max_iou-largest_overlap") / "c.png").exists()


def test_proposals_of_other_flags_or_photographs_are_not_merged(project):
    run("--stage", "propose", "--region_max_size", "0.3")
    with pytest.raises(UserError, match=r"proposals-regions: made with --region_max_size 0.3, not 0.15\."):
        run("--stage", "merge")
    with pytest.raises(UserError, match=r"made with --proposals regions, not sam\."):
        run("--stage", "merge", "--proposals", "sam", "--proposals_dir", str(proposals_folder()))
    assert not refined_folder().exists()
    run("--stage", "merge", "--region_max_size", "0.3")
    with open("data/images/a.png", "ab") as photograph:
        photograph.write(b"edited")
    with pytest.raises(UserError, match=r"made with other photographs of 1 images, the first is a"):
        run("--stage", "merge", "--region_max_size", "0.3")
    run("--stage", "merge", "--proposals", "files", "--proposals_dir", str(proposals_folder()))
    assert (refined_folder("files-max_iou_imp2") / "a.png").exists()


def test_ignored_pixels_are_kept_on_request(project):
    blank = np.full((96, 96), 255, np.uint8)
    save_mask("pseudos/a.png", blank, voc_palette())
    run("--keep_ignore")
    np.testing.assert_array_equal(load_mask(refined_folder() / "a.png"), blank)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--checkpoint", "none.pth", "--proposals", "sam", "--device", "cpu"], "none.pth: no such checkpoint"),
        (["--proposals", "sam"], "--checkpoint: missing"),
        (["--stage", "merge"], "a.json is missing"),
        (["--pseudo_dir", "nowhere"], "nowhere: a.png is missing"),
        (["--domain", "test"], "test"),
        (["--region_max_size", "0"], "--region_max_size 0.0: not above 0.002"),
    ],
)
def test_mistakes_are_one_line(project, flags, message):
    with pytest.raises(UserError, match=message) as error:
        run(*flags)
    assert "\n" not in str(error.value)


def test_masks_of_another_size_or_dataset_are_named(project):
    save_mask("pseudos/b.png", np.zeros((9, 9), np.uint8), voc_palette())
    with pytest.raises(UserError, match=r"b.json: 96x96 pixels, but its image is 9x9"):
        run()
    save_mask("pseudos/b.png", np.full((96, 96), 7, np.uint8), voc_palette())
    with pytest.raises(UserError, match=r"b.png: holds the value 7"):
        run()


WRONG_VALUES = [*(("--shard", text, "I/N") for text in ("4/4", "1", "a/2", "-1/2", "1/0"))]
WRONG_VALUES += [("--region_min_contrast", "nan", "not finite"), ("--region_min_contrast", "-5", "below 0")]


@pytest.mark.parametrize(("flag", "text", "fault"), WRONG_VALUES)
def test_a_wrong_value_exits_with_2(flag, text, fault, capsys):
    with pytest.raises(SystemExit) as stop:
        refine_sam.make_parser().parse_args(["--tag", "t", f"{flag}={text}"])
    assert stop.value.code == 2 and fault in capsys.readouterr().err


def proposals_folder(backend="regions"):
    return options.predictions_dir("t", "train") / f"proposals-{backend}"


def refined_folder(name="regions-max_iou_imp2"):
    return options.predictions_dir("t", "train") / f"sam-{name}"


def test_killed_at_any_write_the_next_run_ends_with_the_same_bytes(project):
    run()
    expected = outputs(proposals_folder()), outputs(refined_folder())
    writes = sum(map(len, expected))
    assert writes == 8
    for number in range(1, writes + 1):
        shutil.rmtree("experiments")
        killed = in_a_fork(die_at_write, number)
        killed.join()
        assert killed.exitcode == -signal.SIGKILL
        for folder, before in zip((proposals_folder(), refined_folder()), expected, strict=True):
            visible = {path.name: path.read_bytes() for path in folder.glob("[!.]*")}
            assert visible.items() <= before.items()  # complete, or not there
        run()  # what the killed one was writing stays, under a name of its own, and hurts nobody
        assert (outputs(proposals_folder()), outputs(refined_folder())) == expected


def test_shards_at_one_time_and_one_that_was_killed_make_the_same_bytes(project):
    copies = [f"copy{index}" for index in range(12)]
    for copy in copies:
        shutil.copy("data/images/a.png", f"data/images/{copy}.png")
        shutil.copy("pseudos/a.png", f"pseudos/{copy}.png")
    Path("data/splits/train.txt").write_text("\n".join([*IDS, *copies]))
    run()
    expected = outputs(proposals_folder()), outputs(refined_folder())
    shutil.rmtree("experiments")
    killed, *others = (in_a_fork(log_writes, f"{index}/3") for index in range(3))
    wait_for(lambda: len(made("0/3")) >= 3)
    killed.kill()
    for process in (killed, *others):
        process.join()
    assert [process.exitcode for process in (killed, *others)] == [-signal.SIGKILL, 0, 0]
    assert all(len(made(f"{index}/3")) == 2 * 5 for index in (1, 2))
    log_writes("0/3")
    assert (outputs(proposals_folder()), outputs(refined_folder())) == expected
    written = list(itertools.chain.from_iterable(made(f"{index}/3") for index in range(3)))
    assert len(set(written)) == 2 * 15 and len(written) <= 2 * 15 + 1  # what the killed one had begun is made again


def test_images_in_folders(project):
    run()
    expected = (refined_folder() / "a.png").read_bytes()
    shutil.rmtree("experiments")
    for folder in ("data/images", "pseudos"):
        Path(folder, "balls").mkdir()
        Path(folder, "a.png").rename(Path(folder, "balls", "a.png"))
    Path("data/splits/train.txt").write_text("balls/a\nb\n")
    Path("data/labels.csv").write_text("id,labels\nballs/a,ball\nb,ball\n")
    run("--num_workers", "2")
    assert (refined_folder() / "balls" / "a.png").read_bytes() == expected
    assert [path.name for path in (refined_folder() / "balls").iterdir()] == ["a.png"]


def test_torchrun_ranks_share_the_images(project, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setattr(refine_sam.distributed, "start", lambda *args: None)
    run("--stage", "propose")
    assert {path.stem for path in proposals_folder().glob("?.json")} == {"b"}
    run("--stage", "propose", "--shard", "2/3")  # the flag counts for more
    assert {path.stem for path in proposals_folder().glob("?.json")} == {"b", "c"}


def test_workers_end_with_a_killed_script(project):
    copies = [f"copy{index}" for index in range(60)]
    for copy in copies:
        shutil.copy("data/images/a.png", f"data/images/{copy}.png")
    Path("data/splits/train.txt").write_text("\n".join(copies))
    script = in_a_fork(run, "--stage", "propose", "--num_workers", "2")
    wait_for(lambda: list(proposals_folder().glob("copy*.json")))
    workers = Path(f"/proc/{script.pid}/task/{script.pid}/children").read_text().split()
    script.kill()
    script.join()
    assert len(workers) == 2
    wait_for(lambda: not any(is_running(worker) for worker in workers))
    run("--stage", "propose", "--num_workers", "2")
    content = outputs(proposals_folder())
    assert content.keys() == {"settings.json", *(f"{copy}.json" for copy in copies)}
    assert len(set(content.values())) == 2


def test_masks_from_files_and_shared_proposals(project):
    run("--stage", "propose", "--proposals_dir", "shared")
    flags = ["--proposals", "files", "--mask_files", "shared", "--proposals_dir", "copied"]
    run(*flags)
    assert Path("shared/a.json").read_bytes() == Path("copied/a.json").read_bytes()
    run("--stage", "merge", "--proposals_dir", "shared")
    (ours, copied) = (load_mask(refined_folder(f"{name}-max_iou_imp2") / "a.png") for name in ("regions", "files"))
    np.testing.assert_array_equal(ours, copied)
    for place, kind in (("shared", "mask files"), ("copied", "proposals")):
        with open(f"{place}/b.json", "a") as file:
            file.write(" ")
        with pytest.raises(UserError, match=f"made with other {kind} of 1 images, the first is b"):
            run(*flags, *(["--stage", "merge"] if kind == "proposals" else []))


def in_a_fork(work, *args):
    process = multiprocessing.get_context("fork").Process(target=work, args=args)
    process.start()
    return process


def die_at_write(number):
    """Run the script, and be killed when its `number`-th file is complete but does not have its name yet."""
    replace, calls = os.replace, itertools.count(1)

    def deadly(*args):
        if next(calls) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        replace(*args)

    os.replace = deadly
    run()


def log_writes(shard):
    """Run the script on a shard, slowly, and write down what it makes."""

    def logged(write, path, *args):
        time.sleep(0.02)
        with open(log_of(shard), "a") as log:
            log.write(f"{path}\n")
        write(path, *args)

    with pytest.MonkeyPatch.context() as patch:
        for name in ("save_proposals", "save_mask"):
            patch.setattr(refine_sam, name, functools.partial(logged, getattr(refine_sam, name)))
        run("--shard", shard)


def log_of(shard):
    return Path(f"{shard[0]}.log")


def made(shard):
    return log_of(shard).read_text().splitlines() if log_of(shard).exists() else []


def wait_for(condition, seconds=20):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def is_running(pid):
    """Whether a process lives; one that has ended and that nobody has waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
