"""The arrows of the house: which file may import which, and which packages."""

import ast
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
OURS = {"schedules", "networks", "losses", "samplers", "averages", "datasets", "runs", "objectives",
        "papers", "gradients", "evaluate", "train"}
CONCEPTS = {"schedules", "networks", "losses", "samplers"}
ALLOWED = {                                          # file: (of ours, third-party)
    "schedules": (set(), {"torch"}),
    "networks": (set(), {"torch"}),
    "losses": (set(), {"torch"}),
    "samplers": (set(), {"torch"}),
    "averages": (set(), {"torch", "numpy"}),
    "datasets": (set(), {"torch", "numpy", "PIL"}),
    "runs": (CONCEPTS | {"averages", "datasets"}, {"torch", "numpy", "PIL"}),
    "objectives": (CONCEPTS | {"datasets", "runs"}, {"torch"}),
    "papers": (CONCEPTS | {"datasets", "runs"}, {"torch", "numpy", "PIL"}),
    "gradients": (CONCEPTS | {"datasets", "runs", "papers"}, {"torch"}),
    "evaluate": (CONCEPTS | {"datasets", "runs", "papers", "gradients"}, {"torch", "numpy"}),
    "train": (CONCEPTS | {"averages", "datasets", "runs", "objectives", "papers", "evaluate"},
              {"torch"}),
}
CONCEPT_STDLIB = {"math", "dataclasses"}


def imported(path):
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize("name", ALLOWED)
def test_arrows_between_files(name):
    ours, third = ALLOWED[name]
    found = imported(ROOT / f"{name}.py")
    assert found & OURS <= ours
    outside = found - OURS - set(sys.stdlib_module_names)
    assert outside <= third | ({"matplotlib"} if name == "papers" else set())   # where installed
    if name in CONCEPTS:
        assert found - OURS - third <= CONCEPT_STDLIB


def test_third_party_imports_are_in_requirements():
    lines = (ROOT / "requirements.txt").read_text().split()
    listed = {re.split(r"[<>=]", line)[0] for line in lines}
    found = set().union(*(imported(p) for p in [*ROOT.glob("*.py"), *ROOT.glob("tests/*.py")]))
    local = OURS | {p.stem for p in ROOT.glob("tests/*.py")}
    packages = found - local - set(sys.stdlib_module_names) - {"matplotlib"}
    assert {"pillow" if p == "PIL" else p for p in packages} <= listed
    assert listed == {"torch", "numpy", "pillow", "pytest"}


@pytest.mark.parametrize("name", sorted(OURS))
def test_style_limits(name):
    """<= 100 columns; functions of at most 60 lines, samplers and losses 40 (rk45 60)."""
    text = (ROOT / f"{name}.py").read_text()
    assert max(map(len, text.splitlines())) <= 100
    tree, limit = ast.parse(text), 40 if name in ("samplers", "losses") else 60
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            most = 60 if node.name == "rk45" else limit
            assert node.end_lineno - node.lineno < most, node.name
    assert text.count("\n") <= (900 if name == "evaluate" else 600)
