"""Benchmarks: every second is counted once; both run and print what docs/performance.md says they do."""

from __future__ import annotations

import re
import sys

import pytest
import torch
from command import parse
from torch.profiler import record_function

from benchmarks import data_loading, dense_crf, measuring, prediction, sam, train_step
from tools import cli


def parsed(module, words: list[str] | None = None):
    return module.parse(words) if module is train_step else module.make_parser().parse_args(words)


def output_of(module, capsys: pytest.CaptureFixture, *flags: object) -> str:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["benchmark", *map(str, flags)])
        cli.run(module.main, parsed(module))
    return capsys.readouterr().out


def test_a_phase_within_another_is_counted_to_itself(monkeypatch):
    seconds = iter([100, 101, 103, 107, 115, 131, 163, 227])
    monkeypatch.setattr(measuring.time, "perf_counter", lambda: next(seconds))
    with measuring.phase_seconds(torch.device("cpu")) as spent, record_function("teacher"):  # noqa: SIM117
        with record_function("losses"), record_function("no phase"):
            pass
    assert spent == {"other": 1 + 64, "teacher": 2 + 32, "losses": 4 + 8 + 16}


@pytest.mark.parametrize("script, flags", [("segmentation", []), ("csrm", ["--", "--crf-t", 1])])
def test_a_step_in_phases(capsys, script, flags):
    sizes = ["--batch_size", 2, "--image_size", 33, "--steps", 1, "--num_workers", 0, "--device", "cpu"]
    text = output_of(train_step, capsys, "--script", script, *sizes, "--decoder_channels", 8, *flags)
    rows = dict(re.findall(r"^(.+?) {2,}(.+)$", text, re.MULTILINE))
    expected = {"loading", "student", "losses", "backward", "optimiser", "other", "all"}
    expected |= {"augmentation", "teacher", "CAM labels", "EMA"} if script == "csrm" else set()
    others = {"phase", "images/s", "TFLOP", "TFLOP/s", "GB", "kept", "floor", "copy", "peak memory"}
    assert rows.keys() - others == expected
    milliseconds = {name: float(row.split()[0]) for name, row in rows.items() if name in expected}
    assert sum(milliseconds.values()) == pytest.approx(2 * milliseconds["all"], abs=1)
    assert float(rows["TFLOP"].split()[0]) > 0 and float(rows["GB"].split()[0]) > 0


@pytest.mark.parametrize("script", ["classifier", "csrm", "segmentation"])
def test_operations_are_counted_without_running_them(capsys, script):
    flops, kept = [], []
    for batch_size in (2, 4):
        flags = ["--script", script, "--count", "--image_size", 65, "--batch_size", batch_size]
        flags += ["--decoder_channels", 64] if script != "classifier" else []
        text = output_of(train_step, capsys, *flags, "--architecture", "resnet50")
        flops.append(float(re.search(r"TFLOP +(\S+)", text)[1]))
        kept.append(float(re.search(r"kept +(\S+) GB", text)[1]))
    assert 0 < flops[1] == pytest.approx(2 * flops[0], abs=0.02)
    assert 0 < kept[0] < kept[1] < 2 * kept[0] + 0.2  # the weights only once


def test_bytes_of_operations():
    """Views move nothing; an operation in place reads and writes; a sum reads its input and writes one number."""
    x = torch.zeros(10, 20)
    with measuring.ByteCounter() as sizes:
        x.t()[3:].view(17, 10).add_(x.t()[3:]).sum()
    assert sizes.total == 4 * (3 * 170 + 170 + 1)


def test_idle_is_where_no_kernel_runs():
    kernels = [(12.0, 13.0), (0.0, 4.0), (1.0, 2.0), (3.0, 6.0), (9.0, 10.0)]
    assert train_step.idle_share(kernels) == pytest.approx((3 + 2) / 13)


def test_the_speed_of_the_loader(capsys):
    text = output_of(data_loading, capsys, "--num_images", 4, "--batch_size", 2, "--image_size", 32, "--workers", "0,1")
    assert [line.split()[0] for line in text.splitlines()[2:]] == ["0", "1"]


def test_the_dense_crf_against_its_reference(capsys, monkeypatch):
    pytest.importorskip("pydensecrf")
    monkeypatch.setattr(dense_crf, "SIZES", ((24, 32),))
    text = output_of(dense_crf, capsys, "--num_images", 1, "--workers", 1)
    rows = [line.split() for line in text.splitlines()[2:]]
    assert [row[:3] for row in rows] == [
        ["24x32", str(labels), str(unaries)] for labels in (3, 21) for unaries in (1, 2)
    ]
    assert all(float(row[5]) > 0 for row in rows)


def test_masks_of_sam_agree_with_the_stock_generator(capsys):
    text = output_of(sam, capsys, "--num_images", 1, "--points_per_side", 4)
    rows = {line[:16].strip(): line[16:].split() for line in text.splitlines()[2:]}
    assert rows.keys() == {"ours, float32", "stock"} and float(rows["ours, float32"][3]) == 1


VOC = "--architecture resnest101e --image_size 512 --batch_size 32"
COCO = "--architecture resnest269e --image_size 640 --batch_size 16"
ON_A_GPU = [
    (dense_crf, "--device cuda --num_images 64"),
    (train_step, f"--device cuda {VOC}"),
    (train_step, f"--device cuda {VOC} -- --compile"),
    (train_step, f"--device cuda {COCO} -- --accumulate_steps 2 --mixed_precision fp16"),
    (data_loading, "--workers 1,4,8,16"),
    (sam, "--device cuda --num_images 32 --model_type vit_h --compile"),
    (prediction, "--revision HEAD --data_dir data --domain val --num_images 200 --device cuda"),
]


@pytest.mark.parametrize("module, flags", ON_A_GPU)
def test_what_a_lent_gpu_is_asked_for(module, flags):
    """The commands are understood; those above run them with tiny sizes."""
    parsed(module, flags.split())


DATA = "--dataset folder --data_dir data --domain_train train --image_size 321 --architecture tf_efficientnet_lite0"
RUN = "--tag t --device cuda --batch_size 32 --max_epoch 15 --max_steps 46 --backbone_weights weights.pth"
PSEUDO = "--tag t --domain train --save_masks --pseudos_from masks --device cuda"
ARMS = ["--self_training off", "--self_training on", "--teacher_labels foreground --self_training auto"]


@pytest.mark.parametrize("arm", ARMS)
def test_the_experiment_a_lent_gpu_is_asked_for(arm):
    """Does CSRM's self-training help? And twenty losses in two precisions."""
    parse("train_csrm", *f"{RUN} {DATA} --warmup_epochs 8 --restore prior.pth {arm}".split())
    parse("inference", *PSEUDO.split())
    parse("train_csrm", *f"{RUN} {DATA} --max_epoch 20 --max_steps 1 --mixed_precision fp16".split())
