"""The runners: which commands their variables lead to, with a Python that only notes how it was called."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tools.history import read_commands

ROOT = Path(__file__).parent.parent
REFINE = 'source runners/config/env.sh; mkdir -p "${MASKS:-$REFINED}"'
LAUNCHER = r"-m torch.distributed.run --nproc_per_node (\d) --max_restarts 0 --standalone"


def commands(
    folder: Path, runner: str = "1-csrm", *, refined: bool = True, **environment: str | None
) -> tuple[list[str], subprocess.CompletedProcess]:
    """Run the runner in `folder`; returns "[torchrun N] script.py [tag] [method] [oc_weights] [restore]" of each.

    A variable that is None is not set. Stage 4 finds a folder of masks, if stage 3 has `refined` them.
    """
    if not (folder / "runners").exists():
        shutil.copytree(ROOT / "runners", folder / "runners")
        python = folder / "bin" / "python3"
        python.parent.mkdir()
        python.write_text('#!/bin/sh\necho "$@" >> calls.txt\n')
        python.chmod(0o755)
    (folder / "calls.txt").unlink(missing_ok=True)
    environment = {"DATASET": "voc12", "DOMAIN_EVAL": "", **environment}
    environment = {name: value for name, value in environment.items() if value is not None}
    environment["PATH"] = f"{folder / 'bin'}:{os.environ['PATH']}"
    options = {"cwd": folder, "env": environment, "capture_output": True, "text": True}
    if runner == "4-segmentation" and refined:
        subprocess.run(["bash", "-c", REFINE], **options)
    process = subprocess.run(["bash", f"runners/{runner}.sh"], **options)
    calls = (folder / "calls.txt").read_text().splitlines() if (folder / "calls.txt").exists() else []
    flags = "tag", "method", "oc_weights", "restore"
    calls = [re.sub(LAUNCHER, r"torchrun \1", call) for call in calls]
    scripts = [re.match(r"(torchrun \d )?\S+", call)[0] for call in calls]
    shown = [[m[1] for flag in flags if (m := re.search(rf"--{flag} (\S+)", call))] for call in calls]
    return [" ".join([script, *found]) for script, found in zip(scripts, shown, strict=True)], process


def models(name: str) -> str:
    return f"experiments/models/{name}.pth"


@pytest.mark.parametrize("prior", ["", "vanilla", "puzzle"])
def test_a_prior_is_trained_and_csrm_starts_from_it(tmp_path, prior):
    name = "voc12-puzzle" if prior == "puzzle" else "voc12"
    called, _ = commands(tmp_path, PRIOR=prior)
    assert called == [
        f"train_classifier.py {name}-prior {prior or 'vanilla'}",
        f"inference.py {name}-prior",
        f"train_csrm.py {name}-csrm {models(f'{name}-prior')}",
        f"inference.py {name}-csrm",
        "report.py",
    ]


@pytest.mark.parametrize("prior", ["poc", "pnoc"])
def test_the_ordinary_classifier_is_the_vanilla_prior_of_the_same_experiment(tmp_path, prior):
    called, _ = commands(tmp_path, PRIOR=prior, SEED="3")
    assert called[:3] == [
        "train_classifier.py voc12-seed3-prior vanilla",
        f"train_classifier.py voc12-seed3-{prior}-prior {prior} {models('voc12-seed3-prior')}",
        f"inference.py voc12-seed3-{prior}-prior",
    ]
    called, _ = commands(tmp_path, PRIOR=prior, NAME="birds", OC_WEIGHTS="weights/own.pth")
    assert called[0] == f"train_classifier.py birds-{prior}-prior {prior} weights/own.pth"


def test_several_gpus_share_all_but_the_report(tmp_path):
    called, _ = commands(tmp_path, GPUS="4", DOMAIN_EVAL="train")
    assert called == [
        "torchrun 4 train_classifier.py voc12-prior vanilla",
        "torchrun 4 inference.py voc12-prior",
        "torchrun 4 evaluate.py",
        f"torchrun 4 train_csrm.py voc12-csrm {models('voc12-prior')}",
        "torchrun 4 inference.py voc12-csrm",
        "torchrun 4 evaluate.py",
        "torchrun 4 evaluate.py",
        "report.py",
    ]
    assert commands(tmp_path, "3-sam-refinement", GPUS="2")[0] == ["torchrun 2 refine_sam.py voc12-csrm", "report.py"]


@pytest.mark.parametrize("node", ["0", "1"])
def test_several_machines_meet_anew_for_each_command_and_the_first_reports(tmp_path, node):
    _, process = commands(tmp_path, NODES="2", SLURM_NODEID=node, MASTER_ADDR="host", RESTARTS="3", PRIOR="runners")
    assert process.returncode == 2 and "PRIOR=runners: no such file" in process.stderr
    (tmp_path / "prior.pth").touch()
    environment = {"NODES": "2", "SLURM_NODEID": node, "MASTER_ADDR": "host", "RESTARTS": "3", "GPUS": "4"}
    commands(tmp_path, PRIOR="prior.pth", **environment)
    calls = (tmp_path / "calls.txt").read_text().splitlines()
    for index, (call, script) in enumerate(zip(calls, ("train_csrm.py", "inference.py"), strict=False), start=1):
        assert call.startswith(
            "-m torch.distributed.run --nproc_per_node 4 --max_restarts 3 --nnodes 2 --rdzv_backend c10d "
            f"--rdzv_id voc12-{index} --rdzv_endpoint host:{29400 + index} "
            f"--rdzv_conf is_host={1 - int(node)},read_timeout=600 {script} "
        )
    assert [call.split()[0] for call in calls[2:]] == ["report.py"] * (node == "0")
    assert (tmp_path / "experiments/reports/voc12/commands.tsv").exists() == (node == "0")
    (tmp_path / "bin" / "python3").write_text("#!/bin/sh\nexit 7\n")
    _, process = commands(tmp_path, PRIOR="prior.pth", **environment)
    line = f"train_csrm.py: exit code 7 on machine {node} of 2. To continue, start the runner again on all of them.\n"
    assert process.returncode == 7 and process.stderr == line
    assert commands(tmp_path, "0-setup", **environment)[1].returncode == 2 * (node == "0"), "there is no Makefile"


def test_machines_that_do_not_know_each_other(tmp_path):
    called, process = commands(tmp_path, NODES="2")
    assert called == [] and process.returncode and "MASTER_ADDR: set it to the host name of machine 0" in process.stderr


@pytest.mark.parametrize("runner", ["0-setup", "1-csrm", "3-sam-refinement", "4-segmentation"])
def test_a_copy_of_a_runner_works_in_the_repository_that_it_was_submitted_from(tmp_path, runner):
    """As sbatch makes one. Where it is no copy, a job around it (salloc, Jupyter) changes nothing."""
    (tmp_path / "csrm").mkdir()
    called, _ = commands(tmp_path / "csrm", runner, SLURM_SUBMIT_DIR="/tmp")
    assert called or runner == "0-setup"
    spool = tmp_path / "spool" / "slurm_script"
    spool.parent.mkdir()
    shutil.copy(ROOT / "runners" / f"{runner}.sh", spool)
    environment = {"PATH": f"{tmp_path / 'csrm' / 'bin'}:{os.environ['PATH']}", "DOMAIN_EVAL": ""}
    for there, said in ((tmp_path / "csrm", "== Stage"), (tmp_path, "")):
        (tmp_path / "csrm" / "calls.txt").unlink(missing_ok=True)
        environment["SLURM_SUBMIT_DIR"] = str(there)
        process = subprocess.run(["bash", spool], cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert said in process.stdout and (tmp_path / "csrm" / "calls.txt").exists() == bool(said and called)
    line = f"{tmp_path}/runners/config/env.sh: no such file. Start from the repository's root.\n"
    assert (process.returncode, process.stderr) == (2, line)


def test_a_decimal_comma_changes_no_name(tmp_path):
    """As in German: there `printf %g 0.30` is no number for bash, or 0,3."""
    (tmp_path / "locales").mkdir()
    command = ["localedef", "-i", "de_DE", "-f", "UTF-8", tmp_path / "locales" / "de_DE.UTF-8"]
    if not shutil.which("localedef") or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("localedef, or what it makes this locale of, is not installed")
    german = {"LC_ALL": "de_DE.UTF-8", "LOCPATH": str(tmp_path / "locales")}
    shown = subprocess.run(["bash", "-c", "printf %g 0,5"], env=german, capture_output=True, text=True)
    assert shown.stdout == "0,5"
    _, process = commands(tmp_path, THRESHOLD="0.30", **german)
    assert process.returncode == 0, process.stderr
    assert "voc12-csrm@train_aug/pseudos-t0.3-c10\n" in process.stdout


def test_the_demo_says_how_far_it_is(tmp_path):
    """After 71 % of its time, and 76: counted since stage 0."""
    _, process = commands(tmp_path, DATASET="shapes")
    assert "== Stage 1 of 4: CAM prior (1), CSRM and its pseudo masks (2) ==" in process.stdout
    report = tmp_path / "experiments" / "demo"
    rows = [(500, "an old run"), (13, "datasets.verify"), (300, "train_csrm.py"), (77, "inference.py")]
    (report / "commands.tsv").write_text("".join(f"2026\t{seconds}\t0\tpython {name}\n" for seconds, name in rows))
    _, process = commands(tmp_path, "3-sam-refinement", DATASET="shapes")
    assert "\n71 % done; about 3 min to go\n" in process.stdout  # 390 * 29 / 71 = 159 s
    assert "76 % done; about 2 min to go" in commands(tmp_path, "4-segmentation", DATASET="shapes")[1].stdout
    assert " % done" not in commands(tmp_path, "3-sam-refinement")[1].stdout, "of other data nobody knows it"


def test_a_file_is_restored_and_a_misspelt_method_is_refused(tmp_path):
    (tmp_path / "prior.pth").touch()
    called, _ = commands(tmp_path, PRIOR="prior.pth")
    assert called == ["train_csrm.py voc12-csrm prior.pth", "inference.py voc12-csrm", "report.py"]
    called, process = commands(tmp_path, PRIOR="puzle")
    assert called == [] and process.returncode == 2
    assert process.stderr == "PRIOR=puzle: no such file. Choose vanilla, puzzle, poc, pnoc or a file of weights.\n"


def test_the_report_shows_what_there_is_after_every_stage(tmp_path):
    predictions = "experiments/predictions/voc12"
    for name in ("csrm@train_aug/cams", "csrm@train_aug/pseudos-t0.4-c10", "deeplab@train_aug/masks"):
        (tmp_path / f"{predictions}-{name}").mkdir(parents=True)
    (tmp_path / "experiments/logs/voc12-csrm").mkdir(parents=True)
    (tmp_path / "experiments/reports/voc12").mkdir(parents=True)
    (tmp_path / "experiments/reports/voc12/pseudo.json").touch()
    columns = (
        f"CSRM CAM={predictions}-csrm@train_aug/cams:0.4 Pseudo mask={predictions}-csrm@train_aug/pseudos-t0.4-c10"
    )
    last = f" DeepLabV3+={predictions}-deeplab@train_aug/masks"
    refined = f"{predictions}-csrm@train_aug/sam-regions-max_iou_imp2"
    for runner, more, reviewed in (
        ("1-csrm", "", "Pseudo mask"),
        ("3-sam-refinement", "", "Pseudo mask"),
        ("4-segmentation", f" Refined={refined}", "Refined"),
    ):
        called, process = commands(tmp_path, runner, DOMAIN_SCORE="", WORKERS="3")
        assert process.returncode == 0 and "evaluate.py" not in called
        assert (tmp_path / "calls.txt").read_text().splitlines()[-1] == (
            "report.py --domain train_aug --output_dir experiments/reports/voc12 --num_workers 3 --summary "
            f"pseudo=experiments/reports/voc12/pseudo.json --tags voc12-csrm --columns {columns}{more}{last} "
            f"--review {reviewed} --dataset voc12 --data_dir data/voc12"
        )
    commands(tmp_path, "3-sam-refinement")
    assert "--review Refined --dataset" in (tmp_path / "calls.txt").read_text()


def test_the_report_shows_a_prior_only_if_csrm_has_started_from_it(tmp_path):
    """Not one that was trained under the same name before PRIOR=FILE was chosen; FILE may be that one, too."""
    (tmp_path / "experiments/models").mkdir(parents=True)
    (tmp_path / "other.pth").touch()
    (tmp_path / models("voc12-prior")).touch()
    for path in ("predictions/voc12-prior@train_aug/cams", "logs/voc12-prior", "reports/voc12"):
        (tmp_path / "experiments" / path).mkdir(parents=True)
    (tmp_path / "experiments/reports/voc12/prior_cam.json").touch()
    for prior, shown in (("", 3), ("other.pth", 0), (models("voc12-prior"), 3)):
        for runner in ("1-csrm", "4-segmentation"):
            _, process = commands(tmp_path, runner, DOMAIN_SCORE="", PRIOR=prior)
            page = (tmp_path / "calls.txt").read_text().splitlines()[-1]
            parts = ("prior_cam=", "--tags voc12-prior ", "CAM prior=experiments/predictions/voc12-prior@train_aug/")
            assert process.returncode == 0 and sum(part in page for part in parts) == shown, page


def test_what_a_refusal_of_a_script_means_for_the_runner(tmp_path):
    commands(tmp_path)
    python = tmp_path / "bin" / "python3"
    line = "In a runner --tag comes from NAME, other flags from other variables (SETUP.md)."
    for runner, code, told in (("1-csrm", 2, True), ("1-csrm", 3, False), ("0-setup", 2, False)):
        python.write_text(f"#!/bin/sh\nexit {code}\n")
        _, process = commands(tmp_path, runner)
        assert process.returncode == code and (line in process.stderr) == told, process.stderr
    python.write_text("#!/bin/sh\nif [ $1 = evaluate.py ]; then exit 2; fi\n")
    _, process = commands(tmp_path, DOMAIN_EVAL="train")
    without = "To go on without scores, where masks are missing: export DOMAIN_EVAL= DOMAIN_SCORE="
    assert (process.returncode, process.stderr) == (2, f"{without}\n")


@pytest.mark.parametrize("runner", ["0-setup", "1-csrm", "3-sam-refinement", "4-segmentation"])
def test_flags_of_a_runner_are_refused(tmp_path, runner):
    commands(tmp_path)
    command = ["bash", f"runners/{runner}.sh", "--overwrite"]
    process = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    line = "--overwrite: the runners take variables, no flags (SETUP.md). Instead of --tag or --overwrite: export "
    line += "NAME=another\n"
    assert (process.returncode, process.stdout, process.stderr) == (2, "", line)


def test_commands_are_listed_with_their_time_and_exit_code(tmp_path):
    commands(tmp_path, DATA_DIR="my data", PRIOR="puzle")
    commands(tmp_path, "3-sam-refinement", DATA_DIR="my data")
    (tmp_path / "bin" / "python3").write_text("#!/bin/sh\nexit 7\n")
    _, process = commands(tmp_path, "3-sam-refinement")
    assert process.returncode == 7
    refined, report, failed = read_commands(tmp_path / "experiments/reports/voc12/commands.tsv")
    assert refined.code == 0 and 0 <= refined.seconds < 9 and refined.start.endswith("Z")
    assert refined.text.startswith("python3 refine_sam.py --tag voc12-csrm") and r"my\ data" in refined.text
    assert report.text.startswith("python3 report.py") and failed.code == 7


def test_paths_with_blanks_are_passed_in_one_piece(tmp_path):
    commands(tmp_path)
    (tmp_path / "bin" / "python3").write_text("#!/bin/sh\nprintf '[%s]' \"$@\" >> calls.txt\necho >> calls.txt\n")
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "python").symlink_to(tmp_path / "bin" / "python3")
    (tmp_path / "Makefile").write_text(".venv/installed:\n")
    (tmp_path / "my prior.pth").touch()
    paths = {name: f"my {name.lower()}" for name in ("DATA_DIR", "SAM_CHECKPOINT", "MASKS", "OC_WEIGHTS", "REPORT")}
    paths |= {"DATASET": "folder", "DOMAIN_EVAL": "train", "DOMAIN_SCORE": ""}
    called = ""
    for runner, prior in (("0-setup", ""), ("1-csrm", "my prior.pth"), ("1-csrm", "poc"), ("3-sam-refinement", ""),
                          ("4-segmentation", "")):  # fmt: skip
        _, process = commands(tmp_path, runner, PRIOR=prior, **paths)
        if runner != "4-segmentation":  # the line can be pasted
            assert r"Next: DATASET=folder DATA_DIR=my\ data_dir ./runners/" in process.stdout
        called += (tmp_path / "calls.txt").read_text()
    pieces = set(called.replace("]\n", "").strip("[").split("]["))
    expected = {"my data_dir", "my sam_checkpoint", "my masks", "my oc_weights", "my prior.pth"}
    assert expected <= pieces and not any(piece.startswith("my") and " " not in piece for piece in pieces)
    assert "[--scored][train][--dataset]" in called


@pytest.mark.parametrize("runner", ["0-setup", "1-csrm", "3-sam-refinement", "4-segmentation"])
def test_names_with_blanks_are_refused_before_anything_is_made(tmp_path, runner):
    """They are parts of lists of flags, which are split at blanks."""
    for variable in ("NAME", "DOMAIN_TRAIN", "DOMAIN_EVAL", "DOMAIN_TEST", "DOMAIN_SCORE"):
        called, process = commands(tmp_path, runner, **{variable: "my birds"})
        line = f"{variable}=my birds: blanks are not possible in it. Choose a name without.\n"
        assert (called, process.returncode, process.stderr, process.stdout) == ([], 2, line, "")


def test_corrected_masks_make_a_second_model(tmp_path):
    called, _ = commands(tmp_path, "4-segmentation", DOMAIN_SCORE="val", CORRECTED="my/corrected")
    train, predict, score, *_ = (tmp_path / "calls.txt").read_text().splitlines()
    assert called[0] == "train_segmentation.py voc12-deeplab-corrected" and "--corrected_dir my/corrected" in train
    assert "--predict" in predict and "--corrected_dir" not in predict
    assert "deeplab-corrected@val/masks" in score and "/segmentation_val_corrected.json" in score


def test_masks_are_corrected_again_in_another_folder(tmp_path):
    """Which makes another model, whose score stands beside those of the first ones."""
    report = "experiments/reports/voc12/segmentation_val"
    named = [
        *(("corrected", "_corrected"), ("my/corrected/", "_corrected"), ("corr", "_corrected-corr")),
        *(("my corr-2", "_corrected-my corr-2"), ("", "")),
    ]
    for folder, suffix in named:
        commands(tmp_path, "4-segmentation", DOMAIN_SCORE="val", CORRECTED=folder)
        train, predict, score, *_ = (tmp_path / "calls.txt").read_text().splitlines()
        tag = f"--tag voc12-deeplab{suffix.replace('_', '-')} "
        assert tag in train and tag in predict and f"--output {report}{suffix}.json " in score
        (tmp_path / f"{report}{suffix}.json").touch()
    commands(tmp_path, "3-sam-refinement")
    page = (tmp_path / "calls.txt").read_text().splitlines()[-1]
    suffixes = ["", "_corrected", "_corrected-corr", "_corrected-my corr-2"]
    assert " ".join(f"segmentation_val{suffix}={report}{suffix}.json" for suffix in suffixes) + " --tags" in page


@pytest.mark.parametrize("proposals", ["regions", "files"])
def test_a_second_round_learns_what_the_first_model_says_of_its_own_photographs(tmp_path, proposals):
    """It goes on from the first model's weights. Image regions would harm its masks; other proposals refine them."""
    called, process = commands(tmp_path, "4-segmentation", ROUNDS="2", DOMAIN_EVAL="train", PROPOSALS=proposals)
    assert process.returncode == 0, process.stderr
    calls = (tmp_path / "calls.txt").read_text().splitlines()
    refine = [call for call in calls if call.startswith("refine_sam.py ")]
    first, relabel, score, second, predict, final, sheet, report = (call for call in calls if call not in refine)
    assert [call.split()[0] for call in (first, relabel, score, second, predict, final, sheet, report)] == [
        *("train_segmentation.py", "inference.py", "evaluate.py", "train_segmentation.py"),
        *("train_segmentation.py", "evaluate.py", "train_segmentation.py", "report.py"),
    ]
    variant = "" if proposals == "regions" else f"-{proposals}"
    first_tag = f"voc12-deeplab{variant}-round1"
    folder, final_tag = f"experiments/predictions/{first_tag}@train_aug", f"voc12-deeplab{variant}-rounds2"
    merged, learnt = f"sam-{proposals}-max_iou_imp2", f"{folder}/pseudos-masks-c10"
    assert f"--tag {first_tag} " in first and "--restore" not in first
    assert f"--masks_dir experiments/predictions/voc12-csrm@train_aug/{merged} " in first
    assert f"--tag {first_tag} --domain train_aug --save_cams false --pseudos_from masks" in relabel
    assert "--crf_gt_prob 0.9 " in relabel
    assert f"--pred_dir {learnt} " in score and "/relabelled_1.json" in score
    if refine:
        assert calls.index(refine[0]) == 3 and f"--pseudo_dir {learnt} " in refine[0]
        assert f"--proposals_dir experiments/predictions/voc12-csrm@train_aug/proposals-{proposals}" in refine[0]
        learnt = f"{folder}/{merged}"
    assert len(refine) == (proposals != "regions")
    assert f"--tag {final_tag} --domain_train train_aug --masks_dir {learnt} " in second
    assert re.findall(r"--restore (\S+)", second)[-1] == f"experiments/models/{first_tag}.pth"
    assert f"--tag {final_tag} --predict" in predict and f"voc12{variant}-rounds2/segmentation_val.json" in final


@pytest.mark.parametrize("rounds, tags", [
    ({}, ["folder-deeplab-round1", "folder-deeplab"]),
    ({"ROUNDS": "1"}, ["folder-deeplab-rounds1"]),
    ({"ROUNDS": "3"}, ["folder-deeplab-round1", "folder-deeplab-round2", "folder-deeplab-rounds3"]),
])  # fmt: skip
def test_a_folder_has_two_rounds_and_its_last_model_the_plain_name(tmp_path, rounds, tags):
    (tmp_path / "birds" / "images" / "robin").mkdir(parents=True)
    flags = {"DATASET": "folder", "DATA_DIR": "birds", "DEVICE": "cpu", "PROPOSALS": "regions"}
    commands(tmp_path, "4-segmentation", **flags, **rounds)
    calls = (tmp_path / "calls.txt").read_text()
    assert re.findall(r"train_segmentation.py --tag (\S+) --domain_train", calls) == tags
    assert calls.count("--predict") == calls.count("--reading relative") == 2  # of other photographs, and of the sheet


def test_corrections_concern_the_final_model_only(tmp_path):
    """So that no earlier round is trained again."""
    (tmp_path / "birds" / "images" / "robin").mkdir(parents=True)
    flags = {
        "DATASET": "folder",
        "DATA_DIR": "birds",
        "DEVICE": "cpu",
        "PROPOSALS": "regions",
        "CORRECTED": "corrected",
    }
    commands(tmp_path, "4-segmentation", **flags)
    trainings = [call for call in (tmp_path / "calls.txt").read_text().splitlines() if "--masks_dir" in call]
    assert [re.search(r"--tag (\S+)", call)[1] for call in trainings] == [
        "folder-deeplab-round1",
        "folder-deeplab-corrected",
    ]
    assert ["--corrected_dir corrected" in call for call in trainings] == [False, True]
    folder = "experiments/predictions/folder-deeplab-round1@train/pseudos-masks-c10"
    assert f"--masks_dir {folder} " in trainings[1]


def test_the_page_reviews_the_masks_that_the_final_model_learns(tmp_path):
    (tmp_path / "birds" / "images" / "robin").mkdir(parents=True)
    flags = {"DATASET": "folder", "DATA_DIR": "birds", "DEVICE": "cpu", "PROPOSALS": "regions"}
    for masks, name in (
        ("csrm@train/sam-regions-max_iou_imp2", "Refined"),
        ("deeplab-round1@train/pseudos-masks-c10", "Relabelled"),
    ):
        folder = f"experiments/predictions/folder-{masks}"
        (tmp_path / folder).mkdir(parents=True)
        commands(tmp_path, "4-segmentation", **flags)
        page = (tmp_path / "calls.txt").read_text().splitlines()[-1]
        assert f" {name}={folder} " in page and page.endswith("--dataset folder --data_dir birds")
        assert f"--review {name} " in page


def test_the_page_reviews_the_masks_that_are_given_instead(tmp_path):
    """The user's own, unless a further round makes others of them."""
    refined = "experiments/predictions/voc12-csrm@train_aug/sam-regions-max_iou_imp2"
    relabelled = "experiments/predictions/voc12-deeplab-hand-round1@train_aug/pseudos-masks-c10"
    for path in ("my hand", "hand", refined, relabelled):
        (tmp_path / path).mkdir(parents=True)
    for flags, columns in (
        ({"MASKS": "my hand"}, f"Refined={refined} Learnt=my hand --review Learnt "),
        (
            {"MASKS": "hand", "ROUNDS": "2"},
            f"Refined={refined} Learnt=hand Relabelled={relabelled} --review Relabelled ",
        ),
        ({"MASKS": ""}, f"Refined={refined} --review Refined "),
    ):
        commands(tmp_path, "4-segmentation", **flags)
        assert f" --columns {columns}" in (tmp_path / "calls.txt").read_text().splitlines()[-1]


@pytest.mark.parametrize("masks", [True, False])
@pytest.mark.parametrize("has_val", [True, False])
def test_a_folder_without_a_val_split_is_segmented_itself(tmp_path, masks, has_val):
    for name in ("train", "val") if has_val else ("robin", "wren"):
        (tmp_path / "birds" / "images" / name).mkdir(parents=True)
    if masks:
        (tmp_path / "birds" / "masks").mkdir()
    flags = {"DATASET": "folder", "DATA_DIR": "birds", "DEVICE": "cpu"}
    for name in ("DOMAIN_EVAL", "DOMAIN_SCORE"):
        flags[name] = "train" if masks and name == "DOMAIN_EVAL" else ""
    del flags["DOMAIN_SCORE"]
    commands(tmp_path, "4-segmentation", **flags)
    calls = (tmp_path / "calls.txt").read_text()
    domain = "val" if has_val else "train"
    assert re.findall(r"--predict --domain (\S+)", calls) == [domain, "train"]
    assert (f"--domain {domain} --pred_dir experiments/predictions/folder-deeplab@{domain}/masks" in calls) == masks


@pytest.mark.parametrize("paths, domain", [
    (["splits/train.txt", "splits/val.txt"], "val"),
    (["splits/train.txt"], "train"),
    (["splits/train.txt", "images/train/robin/a.jpg", "images/val/robin/b.jpg"], "train"),
    (["splits/notes", "images/robin/a.jpg"], "train"),
    (["splits/._val", "images/train/robin/a.jpg", "images/val/robin/b.jpg"], "val"),
    (["images/val/a.jpg", "images/robin/b.jpg"], "train"),
    (["images/train/a.jpg", "images/robin/b.jpg"], "train"),
])  # fmt: skip
def test_a_val_split_is_a_list_or_a_folder_beside_that_of_training(tmp_path, paths, domain):
    """Where there are lists, folders are none; and `val` among other folders is a class."""
    for path in paths:
        (tmp_path / "birds" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "birds" / path).touch()
    commands(tmp_path, "4-segmentation", DATASET="folder", DATA_DIR="birds", DEVICE="cpu")
    predicted = re.findall(r"--predict --domain (\S+)", (tmp_path / "calls.txt").read_text())
    assert predicted == [domain, "train"], "the second one is the sheet of the page"


@pytest.mark.parametrize("dataset", ["folder", "shapes", "coco14", "deepglobe"])
def test_the_prior_of_another_training_split_is_scored_on_that(tmp_path, dataset):
    (tmp_path / "birds" / "masks").mkdir(parents=True)
    commands(tmp_path, DATASET=dataset, DATA_DIR="birds", DOMAIN_TRAIN="train100", DOMAIN_EVAL=None)
    calls = (tmp_path / "calls.txt").read_text().splitlines()
    assert [call.split()[2] for call in calls if call.startswith("evaluate.py")] == ["train100"] * 3


@pytest.mark.parametrize(
    "dataset, val", [("voc12", "val"), ("coco14", "val2014"), ("shapes", "val"), ("deepglobe", "val")]
)
def test_another_test_split_is_scored_only_where_that_is_wanted(tmp_path, dataset, val):
    """Its masks are at the challenge's server, perhaps; those of the usual one are there."""
    for test, score, scored in (
        (None, None, [val]),
        (val, None, [val]),
        ("test", None, []),
        ("test", "test", ["test"]),
    ):
        commands(tmp_path, "4-segmentation", DATASET=dataset, DOMAIN_TEST=test, DOMAIN_SCORE=score)
        calls = (tmp_path / "calls.txt").read_text().splitlines()
        assert [call.split()[2] for call in calls if call.startswith("evaluate.py")] == scored


def test_a_checkpoint_that_is_not_named_is_no_flag(tmp_path):
    """So that refine_sam.py says what it misses, not that it misses a file called `.`."""
    for proposals, checkpoint, flags in (
        ("sam", "", "--proposals sam --mode max_iou_imp2 --model_type vit_b "),
        ("", "my sam", "--proposals sam --mode max_iou_imp2 --checkpoint my sam --model_type vit_b "),
        ("sam3", "my/sam", "--proposals sam3 --mode max_iou_imp2 --checkpoint my/sam --model_type vit_b "),
        ("regions", "my/sam", "--proposals regions --mode max_iou_imp2 --dataset "),
    ):
        commands(tmp_path, "3-sam-refinement", PROPOSALS=proposals, SAM_CHECKPOINT=checkpoint, SAM_TYPE="vit_b")
        assert flags in (tmp_path / "calls.txt").read_text().splitlines()[0]


def test_helper_processes_are_as_many_as_cores_however_many_threads_each_has(tmp_path):
    """nproc counts OpenMP's threads where they are limited."""
    commands(tmp_path)
    nproc = tmp_path / "bin" / "nproc"
    nproc.write_text("#!/bin/sh\necho ${OMP_NUM_THREADS:-${OMP_THREAD_LIMIT:-7}}\n")
    nproc.chmod(0o755)
    commands(tmp_path, OMP_NUM_THREADS="1", OMP_THREAD_LIMIT="2")
    calls = (tmp_path / "calls.txt").read_text().splitlines()
    assert all(" --num_workers 7 " in call for call in calls) and len(calls) == 5


@pytest.mark.parametrize("flags", [{}, {"MASKS": "my hand"}])
def test_masks_that_are_not_there_are_missed_before_the_training(tmp_path, flags):
    called, process = commands(tmp_path, "4-segmentation", refined=False, **flags)
    folder = flags.get("MASKS", "experiments/predictions/voc12-csrm@train_aug/sam-regions-max_iou_imp2")
    line = f"{folder}: no such folder of masks. Run ./runners/3-sam-refinement.sh first, or set MASKS to another.\n"
    assert (called, process.returncode, process.stderr) == ([], 2, line)


@pytest.mark.parametrize("variable", ["ROUNDS", "GPUS", "NODES", "THRESHOLD"])
def test_numbers_that_are_none_are_refused(tmp_path, variable):
    values = ("abc", "0,3") if variable == "THRESHOLD" else ("abc", "0", "-1", "1.5", "2 3", "08")
    needed = "auto, or a number such as 0.3" if variable == "THRESHOLD" else "a whole number from 1"
    for value in values:
        called, process = commands(tmp_path, "4-segmentation", refined=False, **{variable: value})
        line = f"{variable}={value}: must be {needed}.\n"
        assert (called, process.returncode, process.stderr, process.stdout) == ([], 2, line, "")


@pytest.mark.parametrize("flags, report", [
    ({}, "demo"),
    ({"SEED": "1"}, "demo-seed1"),
    ({"PRIOR": "puzzle"}, "demo-puzzle"),
    ({"NAME": "x"}, "reports/x"),
    ({"NAME": "shapes2"}, "reports/shapes2"),
])  # fmt: skip
def test_the_demo_has_a_page_of_its_own_and_experiments_with_its_data_another(tmp_path, flags, report):
    commands(tmp_path, DATASET="shapes", **flags)
    assert f" --output_dir experiments/{report} " in (tmp_path / "calls.txt").read_text()


@pytest.mark.parametrize("preset, network", [("", "mobilenetv2_100"), ("standard", "resnet50")])
def test_the_size_of_a_run_on_your_own_photographs_follows_the_machine(tmp_path, preset, network):
    """DEVICE=cpu means the small one; every schedule counts steps."""
    (tmp_path / "birds" / "images").mkdir(parents=True)
    flags = {"DATASET": "folder", "DATA_DIR": "birds", "DEVICE": "cpu", "PRESET": preset}
    for runner in ("1-csrm", "4-segmentation"):
        commands(tmp_path, runner, **flags)
        for call in (tmp_path / "calls.txt").read_text().splitlines():
            if call.startswith("train_") and "--predict" not in call:
                assert f"--architecture {network} " in call and "--max_steps" in call and "--max_epoch" in call
    _, process = commands(tmp_path, DATASET="folder", DATA_DIR="birds", PRESET="huge")
    assert process.returncode == 2 and "PRESET=huge: choose small or standard" in process.stderr


@pytest.mark.parametrize("prior, has_cams", [("vanilla", True), ("pnoc", True), ("prior.pth", False)])
def test_csrm_learns_the_cams_of_a_prior_that_is_trained_here(tmp_path, prior, has_cams):
    (tmp_path / "prior.pth").touch()
    for preset in ("small", "standard"):
        commands(tmp_path, DATASET="folder", DATA_DIR="birds", PRESET=preset, PRIOR=prior)
        calls = (tmp_path / "calls.txt").read_text().splitlines()
        (csrm,) = (call for call in calls if call.startswith("train_csrm.py"))
        made = [call for call in calls if call.startswith("inference.py") and "--save_pseudos false" in call]
        name = "folder-pnoc-prior" if prior == "pnoc" else "folder-prior"
        assert (f"--c2s_labels experiments/predictions/{name}@train/cams " in csrm) == has_cams == bool(made)
        assert "--self_training auto" in csrm


def test_the_final_model_of_a_small_run_starts_from_csrm_if_there_is_one(tmp_path):
    flags = {"DATASET": "folder", "DATA_DIR": "birds", "DEVICE": "cpu", "MASKS": "masks"}
    for name, start in (("other", []), ("csrm", [models("csrm-csrm")])):
        path = tmp_path / models("csrm-csrm")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        called, _ = commands(tmp_path, "4-segmentation", NAME=name, **flags)
        assert called[0].split() == ["train_segmentation.py", f"{name}-deeplab-masks", *start]


def folders(folder: Path, **environment: str) -> dict[str, str]:
    """What stages 3 and 4 read and write: "pseudo", "refined tag", "masks", "tag", "report"."""
    commands(folder, "3-sam-refinement", **environment)
    refine = (folder / "calls.txt").read_text()
    commands(folder, "4-segmentation", DOMAIN_SCORE="", **environment)
    train = (folder / "calls.txt").read_text()
    flags = {"pseudo": (refine, "pseudo_dir"), "refined tag": (refine, "tag"), "tag": (train, "tag")}
    flags |= {"masks": (train, "masks_dir"), "report": (train, "output_dir")}
    return {name: re.search(rf"--{flag} (\S+)", text)[1] for name, (text, flag) in flags.items()}


def test_what_distinguishes_experiments_is_in_their_names(tmp_path):
    """An ablation over any of these trains another model on other masks, and reports it elsewhere."""
    plain = folders(tmp_path)
    assert plain["tag"] == "voc12-deeplab" and plain["report"] == "experiments/reports/voc12"
    assert plain == folders(tmp_path, THRESHOLD="0.40", CRF_T="10", MERGE_MODE="max_iou_imp2", PROPOSALS="regions")
    variants = [plain] + [
        folders(tmp_path, **{name: value})
        for name, value in (
            *(("MERGE_MODE", "max_iou"), ("PROPOSALS", "files"), ("PSEUDOS_FROM", "masks"), ("THRESHOLD", "0.3")),
            *(("THRESHOLD", "auto"), ("CRF_T", "0"), ("SAM_CHECKPOINT", "sam.pth"), ("MASKS", "my/masks-b")),
        )
    ]
    for what in ("tag", "masks", "report"):
        assert len({each[what] for each in variants}) == len(variants), what
    for name, value in (("PSEUDOS_FROM", "masks"), ("THRESHOLD", "0.3"), ("CRF_T", "0")):
        other = folders(tmp_path, **{name: value})
        assert other["pseudo"] != plain["pseudo"] and other["refined tag"] != plain["refined tag"]
        assert other["masks"].startswith(f"experiments/predictions/{other['refined tag']}@train_aug/sam-")
    shapes = folders(tmp_path, DATASET="shapes")
    assert (shapes["tag"], shapes["report"]) == ("shapes-deeplab", "experiments/demo")
    assert folders(tmp_path, DATASET="shapes", THRESHOLD="0.4")["tag"] == "shapes-deeplab", "masks have no threshold"
