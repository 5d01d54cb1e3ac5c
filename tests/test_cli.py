"""Command lines: help, spellings of flags, and the one line that answers every mistake."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from command import DECODER, TRAINING, data_flags, parse, refusal, run
from PIL import Image

from models import build_model
from tools import cli, devices, options, parallel, training
from tools.checkpoint import save_checkpoint
from tools.errors import UserError

SCRIPTS = ["train_classifier", "train_csrm", "inference", "refine_sam", "train_segmentation", "evaluate"]
CLASSES = ["background", "cat", "dog"]


@pytest.fixture(autouse=True)
def in_tmp_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def write_checkpoint(tag: str, kind: str, classes: list[str] = CLASSES, **network) -> Path:
    width = {} if kind == "classifier" else {"decoder_channels": 8}
    model = build_model(kind, architecture="test_resnet", num_classes=len(classes), **width, **network)
    path = options.model_path(tag)
    save_checkpoint(
        path,
        config=model.config,
        model=model.state_dict(),
        classes=classes,
        epoch=1,
        args={"image_size": 64, "min_image_size": 32},
    )
    return path


# -- help and spellings --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_is_a_manual(script, capsys):
    with pytest.raises(SystemExit) as stop:
        run(script, "--help")
    text = capsys.readouterr().out
    assert stop.value.code == 0
    assert f"python {script}.py --" in text, "an example"
    assert text.count("(default: ") > 5 and "\ndata:\n" in text
    assert "None" not in text and "==SUPPRESS==" not in text
    flags = [line.split()[0].rstrip(",") for line in text.splitlines() if line.startswith("  --")]
    for line in text.split("\noptions:")[1].split("\n  --")[1:]:
        assert len(line.split()) > 2, f"--{line.strip()} has no help"
    assert len(flags) == len(set(flags))


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_flag_is_in_a_group_of_its_own(script, capsys):
    parser = __import__(script).make_parser()
    ungrouped = next(group for group in parser._action_groups if group.title == "options")
    assert [action.dest for action in ungrouped._group_actions] == ["help"]


def test_both_spellings_of_a_flag():
    first = parse("train_csrm", "--tag", "a-b", "--max-epoch", 3, "--lr-alpha-scratch=2", "--use-sal-head")
    second = parse("train_csrm", "--tag", "a-b", "--max_epoch", 3, "--lr_alpha_scratch=2", "--use_sal_head")
    assert first == second
    assert (first.tag, first.max_epoch, first.lr_alpha_scratch, first.use_sal_head) == ("a-b", 3, 2.0, True)


def test_only_names_are_respelt():
    assert parse("evaluate", "--pred-dir=a--b/c-d").pred_dir == Path("a--b/c-d")


@pytest.mark.parametrize(
    "flags, expected",
    [([], True), (["--hflip"], True), (["--hflip", "false"], False)]
    + [([f"--hflip={text}"], True) for text in ("true", "yes", "on", "1", "True", "YES")]
    + [([f"--hflip={text}"], False) for text in ("false", "no", "off", "0", "False", "NO")],
)
def test_switches(flags, expected):
    assert parse("inference", "--tag", "t", *flags).hflip is expected


@pytest.mark.parametrize("flag", ["summary", "columns", "tags"])
def test_lists_given_twice_are_joined(flag):
    args = parse("report", "--output_dir", "page", f"--{flag}", "A=a", "B=b", f"--{flag}", "C=c")
    assert getattr(args, flag) == ["A=a", "B=b", "C=c"]


def test_a_flag_is_not_abbreviated(capsys):
    assert "--max_ep" in refusal(capsys, "train_classifier", "--tag", "t", "--max_ep", 3)


# -- values --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flag", ["batch_size", "max_epoch", "max_steps", "accumulate_steps", "image_size"])
@pytest.mark.parametrize("value", ["0", "-1", "1.5", "two"])
def test_counts_are_whole_and_positive(capsys, flag, value):
    assert f"--{flag}: '{value}' is not a whole number" in refusal(
        capsys, "train_csrm", "--tag", "t", f"--{flag}", value
    )


@pytest.mark.parametrize(
    "flag, value, reason",
    [
        ("lr", "0", "not above 0"),
        ("lr", "-0.1", "not above 0"),
        ("lr", "nan", "not finite"),
        ("lr", "fast", "not a number"),
        ("wd", "-1", "below 0"),
        ("grad_max_norm", "-1", "below 0"),
        ("w_u", "-1", "below 0"),
        ("momentum", "1.5", "not between 0 and 1"),
        ("label_smoothing", "-0.1", "not between 0 and 1"),
        ("cutmix_prob", "nan", "not finite"),
        ("crf_t", "-1", "not a whole number of at least 0"),
        ("seed", "-1", "not a whole number of at least 0"),
        ("use_gn", "maybe", "neither true nor false"),
        ("optimizer", "adam", "invalid choice"),
    ],
)
def test_numbers_out_of_range(capsys, flag, value, reason):
    line = refusal(capsys, "train_csrm", "--tag", "t", f"--{flag}", value)
    assert f"--{flag}" in line and reason in line


@pytest.mark.parametrize(
    "script, flag, least, most",
    [
        ("train_csrm", "wd", "0", None),
        ("train_csrm", "crf_t", "0", None),
        ("train_csrm", "batch_size", "1", None),
        ("train_csrm", "momentum", "0", "1"),
        ("inference", "threshold", "0", "1"),
    ],
)
def test_bounds_of_numbers_are_allowed(script, flag, least, most):
    for text in filter(None, (least, most)):
        assert getattr(parse(script, "--tag", "t", f"--{flag}", text), flag) == float(text)


@pytest.mark.parametrize(
    "script, flag, text", [("train_csrm", "crf_gt_prob", "0"), ("train_csrm", "crf_gt_prob", "1")]
    + [("inference", "threshold", text) for text in ("-0.1", "1.1", "nan", "Auto")],
)  # fmt: skip
def test_numbers_beyond_their_bounds(capsys, script, flag, text):
    assert f"--{flag}: " in refusal(capsys, script, "--tag", "t", f"--{flag}={text}")


@pytest.mark.parametrize("scales", ["", "1,,2", "0,1", "1,-2", "1,inf", "one"])
def test_scales_are_positive_numbers(capsys, scales):
    assert "--scales" in refusal(capsys, "inference", "--tag", "t", "--scales", scales)


def test_flags_that_contradict_each_other(capsys, folder_root):
    flags = [*data_flags(folder_root), "--tag", "t", *TRAINING]
    assert "--min_image_size 90: above" in refusal(capsys, "train_classifier", *flags, "--min_image_size", 90)
    assert "--nesterov: needs --momentum" in refusal(capsys, "train_classifier", *flags, "--momentum", 0)
    for flag in ("--images=a", "--weights=a", "--max_images=1", "--tile=9", "--save_overlays", "--save_confidence"):
        refused = refusal(capsys, "train_segmentation", *flags, flag)
        assert f"{flag.partition('=')[0]}: without effect on a training. Pass --predict" in refused
    assert "--batch_size 4: 3 images" in refusal(
        capsys, "train_classifier", *data_flags(folder_root), "--tag", "t", "--domain_train", "train",
        *("--architecture", "test_resnet", "--backbone_weights", "none", "--batch_size", 4),
    )  # fmt: skip


# -- devices -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["tpu", "cuda:x", "cuda:-1", "cuda:999", "", "meta"])
def test_devices_that_are_none(name):
    with pytest.raises(UserError, match=f"^--device {name}: "):
        devices.select_device(name)


def test_cuda_where_there_is_none(capsys, folder_root, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    line = refusal(capsys, "train_classifier", "--tag", "t", *data_flags(folder_root), *TRAINING, "--device", "cuda")
    assert "--device cuda: PyTorch sees 0 GPUs" in line


@pytest.mark.parametrize("name", ["cpu", "cuda", "cuda:0", "cuda:1"])
def test_a_device_is_that_of_its_name(monkeypatch, name):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert devices.select_device(name) == torch.device(name)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    if name == "cuda:1":
        with pytest.raises(UserError, match="^--device cuda:1: PyTorch sees 1 GPUs"):
            devices.select_device(name)


@pytest.mark.parametrize("available, expected", [(False, "cpu"), (True, "cuda")])
def test_the_automatic_device(monkeypatch, available, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: int(available))
    assert devices.select_device("auto").type == expected


@pytest.mark.parametrize(
    "build, found, warned", [(None, "/bin/nvidia-smi", True), (None, None, False), ("12.8", "/", False)]
)
def test_a_gpu_that_pytorch_is_not_built_for(monkeypatch, capsys, build, found, warned):
    """As after an installation on a machine without one. Where the CPU is asked for, nothing is said."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", build)
    monkeypatch.setattr(shutil, "which", lambda name: found if name == "nvidia-smi" else None)
    line = "Warning: a GPU is here, but PyTorch's build is for CPUs. "
    line += "Replace it: rm -r .venv; TORCH_INDEX= make .venv/installed"
    assert devices.select_device("cpu").type == "cpu" and capsys.readouterr().out == ""
    assert devices.select_device("auto").type == "cpu"
    assert capsys.readouterr().out == (line + "\n") * warned


def test_mixed_precision_follows_the_device():
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    assert devices.autocast_dtype("auto", gpu) is torch.bfloat16 and devices.autocast_dtype("auto", cpu) is None
    assert devices.autocast_dtype("fp16", gpu) is torch.float16 and devices.autocast_dtype("off", gpu) is None


# -- data ----------------------------------------------------------------------------------------------------------


def break_labels(root: Path) -> None:
    (root / "labels.csv").write_text("id,labels\na,cat\nb,cat;unicorn\nc,dog\nd,\n")


def forget_a_label(root: Path) -> None:
    (root / "labels.csv").write_text("id,labels\na,cat\nc,dog\nd,\n")


def break_an_image(root: Path) -> None:
    (root / "images" / "a.jpg").write_bytes((root / "images" / "a.jpg").read_bytes()[:200])


def empty_a_split(root: Path) -> None:
    (root / "splits" / "train.txt").write_text("\n")


def list_an_unknown_id(root: Path) -> None:
    (root / "splits" / "train.txt").write_text("a\nzebra\n")


def lose_the_classes(root: Path) -> None:
    (root / "classes.txt").unlink()


DATA_MISTAKES = [
    (break_labels, "labels.csv, line 3: unknown class 'unicorn'"),
    (forget_a_label, "labels.csv: no row for id 'b'"),
    (break_an_image, "a.jpg: not a readable image"),
    (empty_a_split, "train.txt: an empty list"),
    (list_an_unknown_id, "the first is 'zebra'"),
    (lose_the_classes, "classes.txt: no such file"),
    (shutil.rmtree, "no such folder"),
]


@pytest.mark.parametrize("mistake, answer", DATA_MISTAKES, ids=lambda value: getattr(value, "__name__", ""))
@pytest.mark.parametrize("script", ["train_classifier", "train_csrm"])
def test_mistakes_in_the_data(capsys, folder_copy, mistake, answer, script):
    mistake(folder_copy)
    decoder = [] if script == "train_classifier" else DECODER
    flags = [*data_flags(folder_copy), "--tag", "t", *TRAINING, *decoder, "--batch_size", 3 if decoder == [] else 2]
    assert answer in refusal(capsys, script, *flags, "--max_steps", 3)


@pytest.mark.parametrize("mistake, answer", DATA_MISTAKES, ids=lambda value: getattr(value, "__name__", ""))
def test_mistakes_in_the_data_at_inference(capsys, folder_copy, mistake, answer):
    write_checkpoint("t", "classifier")
    mistake(folder_copy)
    flags = [*data_flags(folder_copy), "--tag", "t", "--domain", "train", "--scales", 1, "--device", "cpu"]
    assert answer in refusal(capsys, "inference", *flags)


@pytest.mark.parametrize("script", ["train_classifier", "train_csrm", "train_segmentation"])
def test_unknown_domains_are_refused_before_training(capsys, folder_root, script):
    flags = [*data_flags(folder_root), "--tag", "t", *TRAINING]
    assert "no domain 'test'. Choose one of: train, val" in refusal(capsys, script, *flags, "--domain_train", "test")
    assert "no domain 'test'" in refusal(capsys, script, *flags, "--domain_valid", "test")


@pytest.mark.parametrize("script", ["train_classifier", "train_csrm"])
def test_validation_without_masks_or_labels_is_refused_before_training(capsys, folder_copy, script):
    table = folder_copy / "labels.csv"
    table.write_text(table.read_text().replace("d,\n", ""))  # of val only
    flags = [*data_flags(folder_copy), "--tag", "t", *TRAINING, "--domain_valid", "val"]
    assert f"{table}: no row for id 'd'." in refusal(capsys, script, *flags)
    assert not Path("experiments/logs/t").exists()
    shutil.rmtree(folder_copy / "masks")
    assert "this dataset has no masks" in refusal(capsys, script, *flags)


def test_mistakes_in_the_masks(capsys, folder_copy):
    flags = [*data_flags(folder_copy), "--tag", "t", *TRAINING, *DECODER, "--max_steps", 3]
    masks = folder_copy / "masks"
    train = lambda *extra: refusal(capsys, "train_segmentation", *flags, *extra)  # noqa: E731
    assert "nowhere: no such folder" in train("--masks_dir", "nowhere")
    Image.fromarray(np.zeros((9, 7), np.uint8)).save(masks / "a.png")
    assert "a.png: 7x9 pixels, but its image is 40x24 pixels" in train()
    Image.fromarray(np.full((24, 40), 3, np.uint8)).save(masks / "a.png")
    assert "a.png: holds the value 3" in train()
    Image.new("RGB", (40, 24)).save(masks / "a.png")
    assert "a.png: holds RGB colours" in train()
    (masks / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    assert "a.png: not a readable mask" in train()
    (masks / "a.png").unlink()
    assert "a.png: no such mask (1 of 3 are missing)" in train()
    assert "a.png: no such mask" in refusal(capsys, "train_csrm", *flags, "--c2s_mode", "gt")


# -- folders -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("blocked", ["experiments", "experiments/models", "experiments/logs", "experiments/logs/t"])
def test_training_into_a_folder_that_cannot_be_written(capsys, folder_root, blocked):
    """A file stands where the folder should be: the superuser may write everywhere else."""
    Path(blocked).parent.mkdir(parents=True, exist_ok=True)
    Path(blocked).touch()
    line = refusal(capsys, "train_classifier", *data_flags(folder_root), "--tag", "t", *TRAINING)
    assert "could not be written" in line and blocked in line


@pytest.mark.parametrize("script", ["inference", "train_segmentation"])
def test_predicting_into_a_folder_that_cannot_be_written(capsys, folder_root, script):
    write_checkpoint("t", "csrm")
    Path("experiments/predictions").touch()
    flags = ["--predict"] if script == "train_segmentation" else []
    line = refusal(capsys, script, *data_flags(folder_root), "--tag", "t", "--domain", "val", *flags)
    assert "could not be written" in line and "experiments/predictions" in line


# -- checkpoints ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("script", ["inference", "train_segmentation"])
def test_checkpoints_that_cannot_be_used(capsys, folder_root, script):
    predict = ["--predict"] if script == "train_segmentation" else []
    flags = [*data_flags(folder_root), "--tag", "t", "--domain", "val", *predict]
    assert "experiments/models/t.pth: no such checkpoint" in refusal(capsys, script, *flags)
    path = write_checkpoint("t", "csrm", ["background", "cat", "horse"])
    assert "made of the classes [cat, horse], but the dataset has [cat, dog]" in refusal(capsys, script, *flags)
    path.write_bytes(path.read_bytes()[:5000])
    assert "t.pth: not a readable checkpoint" in refusal(capsys, script, *flags)
    torch.save(build_model("csrm", architecture="test_resnet", num_classes=3).state_dict(), path)
    assert "t.pth: bare weights" in refusal(capsys, script, *flags)
    wrong = write_checkpoint("wrong", "classifier" if predict else "segmentation")
    line = refusal(capsys, script, *flags, "--weights", wrong)
    assert ("wrong.pth: a classifier model" if predict else "a segmentation model has no CAMs") in line


def test_a_classifier_has_no_segmentation_branch(capsys, folder_root):
    write_checkpoint("t", "classifier")
    flags = [*data_flags(folder_root), "--tag", "t", "--domain", "val"]
    assert "--save_masks" in refusal(capsys, "inference", *flags, "--save_masks")
    assert "--pseudos_from masks" in refusal(capsys, "inference", *flags, "--pseudos_from", "masks")


def test_a_tag_that_is_taken(capsys, folder_root):
    flags = [*data_flags(folder_root), "--tag", "t", *TRAINING, "--max_epoch", 2]
    run("train_classifier", *flags)
    again = lambda *extra: refusal(capsys, "train_classifier", *flags, *extra)  # noqa: E731
    line = again("--architecture=mobilenetv2_035")
    assert "t.pth: made with --architecture test_resnet, not mobilenetv2_035. Choose another --tag, or pass" in line
    assert "made with --dilated False, not True" in again("--dilated")
    assert "made with --max_epoch 2, not 3" in again("--max_epoch", 3)
    assert "made with --lr 0.1, not 0.2" in again("--lr", 0.2)
    line = refusal(capsys, "train_csrm", *flags, *DECODER)
    assert "made with train_classifier.py, not train_csrm.py" in line


@pytest.mark.parametrize("script", ["train_classifier", "train_csrm", "train_segmentation", "inference"])
def test_a_tag_that_names_the_checkpoint_before_the_last(capsys, script):
    """Training `t.previous` would replace `experiments/models/t.previous.pth`, which is run t's."""
    assert parse(script, "--tag", "t.previous.v2").tag == "t.previous.v2"
    for tag in ("t.previous", ".previous"):
        text = f"argument --tag: '{tag}' ends in .previous, as the checkpoint before the last does; choose another name"
        assert text in refusal(capsys, script, "--tag", tag)


@pytest.mark.parametrize("script, flag", [
    ("train_segmentation", "--images"), ("evaluate", "--pred_dir"), ("inference", "--tag"), ("refine_sam", "--tag"),
])  # fmt: skip
def test_a_variable_that_is_not_set_is_no_name(capsys, script, flag):
    assert f"argument {flag}: empty. Is a variable not set?" in refusal(capsys, script, flag, "")


def test_starting_from_weights_that_are_none(capsys, folder_root):
    flags = [*data_flags(folder_root), "--tag", "t", *TRAINING, *DECODER]
    assert "none.pth: no such file" in refusal(capsys, "train_csrm", *flags, "--restore", "none.pth")
    Path("page.pth").write_text("<html>404</html>")
    assert "page.pth: not a readable file" in refusal(capsys, "train_csrm", *flags, "--restore", "page.pth")
    torch.save({"weight": torch.zeros(3)}, "foreign.pth")
    assert "foreign.pth: none of its 1 tensors" in refusal(capsys, "train_csrm", *flags, "--restore", "foreign.pth")
    assert "--backbone_weights nowhere.pth: no such file" in refusal(
        capsys, "train_csrm", *flags, "--backbone_weights", "nowhere.pth"
    )
    assert "--architecture resnet5O" in refusal(capsys, "train_csrm", *flags, "--architecture", "resnet5O")


@pytest.mark.parametrize("script, flags, answer", [
    ("train_csrm", ["--contra_low_rank", 8, "--contra_high_rank", 6], "--contra_low_rank 8: above --contra_high_rank"),
    ("train_csrm", ["--w_c", 0, "--w_c2s", 0], "--w_c 0 --w_c2s 0: there is nothing to learn before self-training."),
    ("train_csrm", ["--w_c", 0, "--w_c2s", 0, "--warmup_epochs", 0, "--self_training", "auto"], "nothing to learn"),
    ("train_csrm", ["--c2s_labels", "cams", "--c2s_mode", "mp"], "--c2s_mode mp: without effect, as --c2s_labels are"),
    ("train_segmentation", ["--batch_size", 1, *DECODER, "--architecture", "resnest14d"],
     "--batch_size 1: the batch norm of this network needs more. Raise it, or pass --mode fix."),
])  # fmt: skip
def test_flags_that_cannot_work_together(capsys, folder_root, script, flags, answer):
    assert answer in refusal(capsys, script, *data_flags(folder_root), "--tag", "a", *TRAINING, *flags)


@pytest.mark.parametrize("value", [0, 1])
def test_a_label_is_neither_certain_nor_impossible(capsys, value):
    line = refusal(capsys, "inference", "--tag", "a", "--crf_gt_prob", value)
    assert f"--crf_gt_prob: {value} is not above 0 and below 1" in line


def test_a_restored_classifier_is_not_a_new_layer(folder_root, monkeypatch):
    update, rates = training.Update, []

    def watched(model, *args, **kwargs):
        made = update(model, *args, **kwargs)
        (own,) = (g for g in made.optimizer.param_groups if any(p is model.classifier.weight for p in g["params"]))
        rates.append(own["initial_lr"])
        return made

    monkeypatch.setattr(training, "Update", watched)
    flags = [*data_flags(folder_root), *TRAINING, "--lr", 0.01]
    run("train_classifier", *flags, "--tag", "a")
    run("train_classifier", *flags, "--tag", "b", "--restore", options.model_path("a"))
    assert rates == [0.1, 0.01]


# -- running -------------------------------------------------------------------------------------------------------


def test_our_own_faults_keep_their_traceback(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py"])
    with pytest.raises(ZeroDivisionError):
        cli.run(lambda args: 1 / 0, cli.Parser("A test.").parse_args([]))


def test_a_full_gpu_is_answered_with_the_flags_that_help(capsys, monkeypatch):
    def main(args):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(sys, "argv", ["train.py"])
    parser = cli.Parser("A test.")
    for flag in ("--image_size", "--batch_size", "--accumulate_steps"):
        parser.add_argument(flag)
    with pytest.raises(SystemExit) as stop:
        cli.run(main, parser.parse_args([]))
    assert stop.value.code == 2
    message = "Lower --batch_size or --image_size, and raise --accumulate_steps for the same batch.\n"
    assert capsys.readouterr().err == f"train.py: error: the GPU's memory is full. {message}"


@pytest.mark.parametrize("length", [1, 10**6], ids=["at the end", "at once"])
def test_a_reader_that_has_had_enough(length):
    """As `| head`: no traceback."""
    code = f"from tools import cli; cli.run(lambda args: print('x' * {length}), cli.Parser('A test.').parse_args([]))"
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen([sys.executable, "-c", code], cwd=Path(cli.__file__).parents[1], **pipes)
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait() == 1


def test_work_is_done_also_where_stdout_is_closed(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)  # as Python has it after `>&-`
    cli.run(lambda args: print("done"), cli.Parser("A test.").parse_args([]))


def test_a_mistake_found_under_a_progress_bar_has_a_line_of_its_own(capsys, monkeypatch):
    def main(args):
        for _ in parallel.progress([1, 2], desc="working", unit="image"):
            raise UserError("file.png: unreadable.")

    monkeypatch.setattr(sys, "argv", ["train.py"])
    with pytest.raises(SystemExit):
        cli.run(main, cli.Parser("A test.").parse_args([]))
    assert capsys.readouterr().err.splitlines()[-1] == "train.py: error: file.png: unreadable."
