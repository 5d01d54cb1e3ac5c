"""Three floors: `tools` imports nothing of ours, `datasets` and `models` import `tools`, scripts import everything."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPTS = ("evaluate", "inference", "refine_sam", "report", "train_classifier", "train_csrm", "train_segmentation")
BELOW = {"tools": {"tools"}, "datasets": {"tools", "datasets"}, "models": {"tools", "models"}}
CALLED_ELSEWHERE = {
    "tools.crf": [
        "CAM_SETTINGS",
        "SEGMENTATION_SETTINGS",
        "mean_field",
        "unary_from_labels",
        "unary_from_probabilities",
    ],
    "tools.files": ["load_image"],
    "tools.losses": ["unsupervised_loss"],
    "tools.merging": ["merge_masks"],
    "tools.pseudo_labels": ["reliable_cam_labels"],
}


def imports(path: Path) -> set[str]:
    """Modules that a file imports, by full name, wherever in it; `from a import b` gives a and a.b."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def modules() -> dict[str, Path]:
    """Every module of the three packages by its full name."""
    paths = [path for floor in BELOW for path in (ROOT / floor).rglob("*.py")]
    names = [path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".") for path in paths]
    return {name.removesuffix(".__init__"): path for name, path in zip(names, paths, strict=True)}


def test_no_floor_imports_from_above():
    ours = {*BELOW, *SCRIPTS, "benchmarks", "tests"}
    for name, path in modules().items():
        floors = {imported.partition(".")[0] for imported in imports(path)} & ours
        assert floors <= BELOW[name.partition(".")[0]], f"{name} imports {floors}"


def test_no_circle():
    known = modules()
    below = {name: imports(path) & known.keys() - {name} for name, path in known.items()}
    while below:
        leaves = {name for name, needs in below.items() if not needs & below.keys()}
        assert leaves, f"these import one another: {sorted(below)}"
        below = {name: needs for name, needs in below.items() if name not in leaves}


def test_no_function_is_long():
    for path in (*modules().values(), *(ROOT / f"{script}.py" for script in SCRIPTS)):
        functions = (node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef))
        assert not [node.name for node in functions if node.end_lineno - node.lineno >= 50], path


def test_names_that_other_programs_call_stay_where_they_are():
    for module, names in CALLED_ELSEWHERE.items():
        assert not [name for name in names if not hasattr(importlib.import_module(module), name)], module


@pytest.mark.parametrize("script", SCRIPTS)
def test_flags_are_read_before_pytorch_is_imported(script):
    code = (
        f"import runpy, sys; sys.argv = ['{script}.py', '--help']; runpy.run_path('{script}.py', run_name='__main__')"
    )
    check = f"import atexit, sys; atexit.register(lambda: print('torch' in sys.modules, file=sys.stderr)); {code}"
    done = subprocess.run([sys.executable, "-c", check], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and done.stdout.startswith("usage:") and done.stderr == "False\n", done.stderr


@pytest.mark.parametrize("script", ["evaluate", "report"])
def test_scores_and_report_do_without_pytorch(script):
    """Whose import takes longer than the evaluation of a small split."""
    jobs = "parallel.thread_map(str, range(9), 3)"  # as fingerprints of many files are taken
    code = f"import sys, {script}; from tools import parallel; print(*{jobs}, 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout == "0 1 2 3 4 5 6 7 8 False\n", done.stderr
