"""What is read back of a training: curves, time, settings, health; and the runners' list of commands."""

from __future__ import annotations

import json
import time

import pytest
from torch.utils.tensorboard import SummaryWriter

from tools.errors import UserError
from tools.history import SETTINGS, Command, log_files, read_commands, read_logs, read_run


def log(folder, values, *, start=1, seconds=10.0):
    """A log of one start of a training: `values` at the ends of its epochs, `seconds` apart."""
    writer = SummaryWriter(folder)
    now = time.time()
    for epoch, value in enumerate(values, start):
        writer.add_scalar("loss", value, epoch, walltime=now + seconds * (1 + epoch - start))
        writer.add_scalar("valid/miou_cam", 10 * value, epoch, walltime=now + seconds * (1 + epoch - start))
    writer.add_scalar("early", 1.0, start, walltime=now + seconds)
    writer.close()


def test_curves_and_time_of_a_resumed_run(tmp_path):
    log(tmp_path, [5.0, 4.0, 9.0])
    time.sleep(1.1)  # event files are named by the second
    log(tmp_path, [3.0, 2.0], start=3)
    curves, seconds, _ = read_logs(tmp_path)
    assert curves["loss"] == [(1, 5.0), (2, 4.0), (3, 3.0), (4, 2.0)]
    assert curves["valid/miou_cam"] == [(1, 50.0), (2, 40.0), (3, 30.0), (4, 20.0)]
    assert seconds == pytest.approx(50, abs=1)


def test_log_files_are_in_the_order_of_the_starts(tmp_path):
    """Whatever the order in which the file system lists them."""
    for second in (4, 1, 6, 3, 5, 2):
        (tmp_path / f"events.out.tfevents.170000000{second}.host").touch()
    assert [path.suffixes[2][-1] for path in log_files(tmp_path)] == [*"123456"]


def test_a_run_of_which_nothing_is_left(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = read_run("nothing")
    assert (run.curves, run.seconds, run.settings, run.health) == ({}, None, {}, None)


def test_settings_are_those_of_the_last_start_and_health_lies_beside_the_weights(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for lr in (0.2, 0.1):
        writer = SummaryWriter(tmp_path / "experiments" / "logs" / "a", filename_suffix=f".{1 - lr}")
        writer.add_text(SETTINGS, json.dumps({"lr": lr, "scales": [0.5, 1]}))
        writer.close()
    models = tmp_path / "experiments" / "models"
    models.mkdir()
    (models / "a.health.json").write_text(json.dumps({"kept": [0.1, 0.2]}))
    run = read_run("a")
    assert run.settings == {"lr": 0.1, "scales": [0.5, 1]} and run.health == {"kept": [0.1, 0.2]}
    assert run.curves == {} and run.seconds is None
    (models / "a.health.json").write_text("{")
    with pytest.raises(UserError, match=r"a\.health\.json: not a readable JSON file"):
        read_run("a")


def test_commands(tmp_path):
    path = tmp_path / "commands.tsv"
    assert read_commands(path) == []
    path.write_text('2026-11-26T00:40:01Z\t75\t0\tpython a.py --x "1 2"\n2026-11-26T00:41:16Z\t3\t2\tpython b.py\n')
    assert read_commands(path) == [
        Command("2026-11-26T00:40:01Z", 75.0, 0, 'python a.py --x "1 2"'),
        Command("2026-11-26T00:41:16Z", 3.0, 2, "python b.py"),
    ]
    path.write_text("something else\n")
    with pytest.raises(UserError, match=r"commands\.tsv: not a readable list of commands"):
        read_commands(path)
