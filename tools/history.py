"""A training run, as the report shows it: its curves, how long it took, its settings, its health. Without PyTorch.

    run = read_run("csrm")
    run.curves["loss"]         # [(1, 2.31), (2, 1.87), ...]: epoch and value
    run.seconds                # from the first to the last epoch's end, over all times it was started

Commands that the runners gave, and how long they took, are in `commands.tsv` beside the report: start, seconds,
exit code, command.
"""

import csv
import json
from dataclasses import dataclass, field
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tools import options
from tools.files import read_json, reading

SETTINGS = "settings"
"""The text in a TensorBoard log that holds the flags of the run, as JSON."""

SIGNALS = ("class_logit", "vanished", "agreement", "reliable", "kept", "confident", "s2c_to_c2s")
"""The signals of a run's health; `tools.health` says what they are."""

SHARES = SIGNALS[1:-1]
"""Those in per cent; of the other two, one is a logit and one a ratio."""


@dataclass(frozen=True)
class Run:
    """A training run."""

    tag: str  # its name
    # scalar of the TensorBoard log -> (epoch, value), ascending
    curves: dict[str, list[tuple[float, float]]] = field(default_factory=dict)
    seconds: float | None = None  # time spent in it; None if nothing was logged
    settings: dict[str, object] = field(default_factory=dict)  # its flags
    # `tools.health.Health.report`, of models/TAG.health.json; None if there is none
    health: dict[str, object] | None = None


@dataclass(frozen=True)
class Command:
    """A command of a runner: when it started (ISO 8601), how long it took, how it ended."""

    start: str
    seconds: float
    code: int
    text: str


def read_run(tag: str) -> Run:
    """What is there of a run; of its files, each may be missing (UserError: one of them is damaged)."""
    curves, seconds, settings = read_logs(options.EXPERIMENTS / "logs" / tag)
    health = options.model_path(tag).with_suffix(".health.json")
    signals = read_json(health, "Delete it; training writes it again.") if health.exists() else None
    return Run(tag, curves, seconds, settings, signals)


def read_logs(folder: Path) -> tuple[dict[str, list[tuple[float, float]]], float | None, dict[str, object]]:
    """The scalars of a log folder, the seconds its event files span, and the flags of the last start.

    A resumed run replaces what it repeats.
    """
    spans, curves, settings = [], {}, {}
    for path in log_files(folder):
        events = EventAccumulator(str(path), size_guidance={"scalars": 0}).Reload()
        if (tag := f"{SETTINGS}/text_summary") in events.Tags()["tensors"]:
            settings = json.loads(events.Tensors(tag)[-1].tensor_proto.string_val[0])
        scalars = {name: events.Scalars(name) for name in events.Tags()["scalars"]}
        if not scalars:
            continue
        spans.append(max(values[-1].wall_time for values in scalars.values()) - events.FirstEventTimestamp())
        for name, values in scalars.items():
            curves.setdefault(name, {}).update((value.step, value.value) for value in values)
    return {name: sorted(values.items()) for name, values in curves.items()}, sum(spans) if spans else None, settings


def log_files(folder: Path) -> list[Path]:
    """The event files of a log folder, one for each start of the training, the first one first."""
    return sorted(folder.glob("events.out.tfevents.*"))


def read_commands(path: Path) -> list[Command]:
    """The rows of `commands.tsv`; none if there is no such file (UserError: not such a file)."""
    if not path.exists():
        return []
    remedy = "Delete it; the runners write it again."
    with reading(path, "list of commands", remedy), path.open(newline="", encoding="utf-8") as file:
        rows = csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
        return [Command(start, float(seconds), int(code), text) for start, seconds, code, text in rows]
