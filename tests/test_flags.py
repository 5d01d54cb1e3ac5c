"""The public flags: those in tests/flags.txt must stay. `python tests/test_flags.py` prints today's list."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))  # when run as a script

SCRIPTS = (
    *("train_classifier", "train_csrm", "inference", "refine_sam", "train_segmentation", "evaluate", "report"),
    *("datasets.prepare.__main__", "datasets.prepare.shapes", "datasets.verify", "datasets.exchange.__main__"),
)
LIST = Path(__file__).parent / "flags.txt"


def flags() -> list[str]:
    """`SCRIPT FLAG`, a line each; arguments without a flag by their name."""
    rows = []
    for script in SCRIPTS:
        actions = importlib.import_module(script).make_parser()._actions
        rows += [f"{script} {name}" for action in actions for name in action.option_strings or [action.dest]]
    return sorted(row for row in rows if not row.endswith((" -h", " --help")))


def test_no_public_flag_is_gone():
    gone = set(LIST.read_text().splitlines()) - set(flags())
    assert not gone, "users have these in their scripts; if they must go, SETUP.md and README.md say what replaces them"


if __name__ == "__main__":
    print("\n".join(flags()))
