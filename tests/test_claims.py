"""Claims between processes: one at a time gets a file, and the dead hold nothing."""

from __future__ import annotations

import errno
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tools import claims
from tools.claims import claim, remove_leftovers
from tools.files import atomic_write

HOLDER = """
import sys, time
from pathlib import Path
from tools.claims import claim
path = Path(sys.argv[1])
with claim(path.parent, path) as mine:
    print(mine, flush=True)
    sys.stdin.readline()
"""


@pytest.fixture
def holder(tmp_path):
    """Start another process that claims a file; returns it when it has answered, with that answer."""
    started = []

    def start(name):
        command = [sys.executable, "-c", HOLDER, str(tmp_path / name)]
        pipe = subprocess.PIPE
        process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, cwd=Path(__file__).parents[1])
        started.append(process)
        return process, process.stdout.readline().strip() == "True"

    yield start
    for process in started:
        process.kill()
        process.communicate()


def test_a_claim_is_for_one_process_and_one_file(tmp_path, holder):
    process, mine = holder("a.json")
    assert mine
    with claim(tmp_path, tmp_path / "a.json") as ours, claim(tmp_path, tmp_path / "b.json") as other:
        assert (ours, other) == (False, True)
        assert not holder("b.json")[1]
    process.communicate("\n")  # it ends its block
    with claim(tmp_path, tmp_path / "a.json") as ours:
        assert ours
    assert holder("b.json")[1]  # ours ended with its block


def test_a_killed_process_holds_nothing(tmp_path, holder):
    process, _ = holder("a.json")
    process.send_signal(signal.SIGKILL)
    process.wait()
    with claim(tmp_path, tmp_path / "a.json") as ours:
        assert ours


def test_a_claim_ends_with_an_error(tmp_path, holder):
    with pytest.raises(ZeroDivisionError), claim(tmp_path, tmp_path / "a.json"):
        raise ZeroDivisionError
    assert holder("a.json")[1]


def test_without_locks_all_is_granted_with_a_warning(tmp_path, monkeypatch):
    def no_locks(*args):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(claims.fcntl, "lockf", no_locks)
    with pytest.warns(UserWarning, match="no locks on this file system"), claim(tmp_path, tmp_path / "a.json") as mine:
        assert mine


def test_leftovers_of_the_dead_are_removed_and_those_of_the_living_stay(tmp_path, holder):
    paths, leftovers = [tmp_path / "a.b.json", tmp_path / "class" / "a.json", tmp_path / "c.json"], []
    for path in (*paths, tmp_path / "settings.json"):
        with atomic_write(path) as temporary:
            leftovers.append(temporary)
    for leftover in leftovers:  # as if the writers had been killed
        leftover.touch()
    holder("c.json")
    remove_leftovers(tmp_path, paths)
    assert [leftover.exists() for leftover in leftovers] == [False, False, True, True]
    assert all(path.exists() for path in paths)
