"""The arrows of the house: which file imports which, and which packages."""

import ast
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CONCEPTS = {"schedules", "networks", "losses", "samplers"}
OURS = CONCEPTS | {"evaluate", "train", "papers"}
PACKAGES = set(sys.stdlib_module_names) | {"torch", "numpy", "PIL", "matplotlib"}
PAPERS = [path.stem for path in sorted(ROOT.glob("papers/*.py"))]
FILES = {                                      # file: what it may import
    **{name: {"torch", "math", "dataclasses"} for name in CONCEPTS},
    "evaluate": CONCEPTS | PACKAGES,
    "train": CONCEPTS | {"evaluate"} | PACKAGES - {"PIL", "matplotlib"},
    **{f"papers/{name}": OURS | PACKAGES for name in PAPERS}}
every_file = pytest.mark.parametrize("name", FILES)


def tree(name):
    return ast.parse((ROOT / f"{name}.py").read_text())


def imported(node):
    """The modules that a part of a file imports, by their full names."""
    names = set()
    for inner in ast.walk(node):
        if isinstance(inner, ast.Import):
            names |= {alias.name for alias in inner.names}
        elif isinstance(inner, ast.ImportFrom):
            assert inner.level == 0, "an import relative to a package"
            names |= {inner.module} if inner.module != "papers" else {
                f"papers.{alias.name}" for alias in inner.names}
    return names


@every_file
def test_arrows_between_files(name):
    names = imported(tree(name))
    assert {full.split(".")[0] for full in names} <= FILES[name]
    assert {full for full in names if full.startswith("papers")} <= {"papers.plot"}


@every_file
def test_matplotlib_is_imported_where_it_is_used_and_may_be_missing(name):
    """Each such import stands in a `try`; the next test allows none at the top of a file."""
    whole = tree(name)
    guarded = [inner for part in ast.walk(whole) if isinstance(part, ast.Try)
               for inner in ast.walk(part)]
    for node in ast.walk(whole):
        if isinstance(node, (ast.Import, ast.ImportFrom)) and "matplotlib" in ast.unparse(node):
            assert node in guarded


@every_file
def test_the_top_of_a_file_only_defines(name):
    """So an import does no work: it prints, writes and sets nothing."""
    kinds = ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef, ast.Assign
    first, *others = tree(name).body
    assert ast.get_docstring(ast.Module([first], [])), "a file begins with what it is"
    for node in others:
        script = isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'"
        assert isinstance(node, kinds) or script, ast.unparse(node)


def test_third_party_imports_are_in_requirements():
    lines = (ROOT / "requirements.txt").read_text().split()
    listed = {re.split(r"[<>=]", line)[0] for line in lines}
    found = {full.split(".")[0] for pattern in ("*.py", "papers/*.py", "tests/*.py")
             for path in ROOT.glob(pattern) for full in imported(ast.parse(path.read_text()))}
    local = OURS | {path.stem for path in ROOT.glob("tests/*.py")}
    packages = found - local - set(sys.stdlib_module_names) - {"matplotlib"}
    assert {"pillow" if name == "PIL" else name for name in packages} == listed


@every_file
def test_style_limits(name):
    """At most 100 columns, and 60 lines a function; train.run is the script itself."""
    text = (ROOT / f"{name}.py").read_text()
    assert [line for line in text.splitlines() if len(line) > 100] == []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef) and (name, node.name) != ("train", "run"):
            assert node.end_lineno - node.lineno < 60, node.name
