"""Entry scripts run inside the test process, with the command line a user would type.

run("inference", "--tag", "prior")                                  # raises what the script raises
line = refusal(capsys, "inference", "--tag", "nonesuch")            # it must refuse, in this one line
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest

from tools import cli

TRAINING = [
    *("--device", "cpu", "--num_workers", "0", "--architecture", "test_resnet", "--backbone_weights", "none"),
    *("--image_size", "48", "--min_image_size", "32", "--max_image_size", "64", "--batch_size", "2"),
    *("--max_epoch", "1", "--max_steps", "1", "--domain_train", "train"),
]
"""Flags of a run that takes a second."""

DECODER = ["--decoder_channels", "8"]


def data_flags(root: Path) -> list[str]:
    """The flags that name a dataset in the `folder` layout."""
    return ["--dataset", "folder", "--data_dir", str(root)]


def parse(script: str, *flags: object):
    """The script's namespace for these flags."""
    return importlib.import_module(script).make_parser().parse_args([str(flag) for flag in flags])


def run(script: str, *flags: object) -> None:
    """What `python SCRIPT.py FLAGS` does."""
    module = importlib.import_module(script)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [f"{script}.py", *(str(flag) for flag in flags)])
        cli.run(module.main, module.make_parser().parse_args())


def refusal(capsys: pytest.CaptureFixture, script: str, *flags: object) -> str:
    """The one line with which the script refuses: checks exit code 2 and that nothing but progress bars precedes it."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        run(script, *flags)
    assert stop.value.code == 2
    *before, line, end = capsys.readouterr().err.split("\n")
    assert end == "" and f"{script}.py: error: " in line, line
    assert all("it/s" in text or "/step" in text or "/image" in text or "?" in text for text in before), before
    return line
