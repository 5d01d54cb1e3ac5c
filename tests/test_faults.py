"""The table of faults fits the code: `python tests/faults.py` is run by hand, minutes long."""

from __future__ import annotations

import re

import faults
import pytest
from faults import FAULTS, ROOT


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.what)
def test_what_a_fault_changes_is_there_once_and_its_test_exists(fault):
    assert (ROOT / fault.file).read_text(encoding="utf-8").count(fault.old) == 1
    file, name = fault.test.split("::")
    assert re.search(rf"^def {name}\(", (ROOT / "tests" / file).read_text(encoding="utf-8"), re.MULTILINE)


def test_a_fault_whose_line_is_gone_is_refused_before_any_test_runs(monkeypatch):
    monkeypatch.setattr(faults, "FAULTS", (FAULTS[0], FAULTS[1]._replace(old="a line that is gone")))
    monkeypatch.setattr(faults, "run_tests", lambda *_, **__: pytest.fail("tests ran"))
    with pytest.raises(SystemExit, match=f"this fault changes: {FAULTS[1].what}"):
        faults.main([2])
