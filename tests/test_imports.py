"""The arrows of the house: which file imports which, and which packages."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CONCEPTS = {"schedules", "networks", "losses", "samplers"}
OURS = CONCEPTS | {"evaluate", "train", "papers"}
PAPERS = [path.stem for path in sorted(ROOT.glob("papers/*.py"))]
FILES = {                    # file: what it imports of ours, and may import of other packages
    **{name: (set(), {"torch"}) for name in CONCEPTS},
    "evaluate": (CONCEPTS, {"torch", "numpy", "PIL", "matplotlib"}),
    "train": (CONCEPTS | {"evaluate"}, {"torch", "numpy"}),
    **{f"papers/{name}": (OURS, {"torch", "numpy", "PIL", "matplotlib"}) for name in PAPERS}}


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


@pytest.mark.parametrize("name", FILES)
def test_arrows_between_files(name):
    ours, packages = FILES[name]
    names = imported(tree(name))
    top = {full.split(".")[0] for full in names}
    assert top & OURS <= ours
    if name == "evaluate":
        assert top & OURS == CONCEPTS
    assert top - OURS - set(sys.stdlib_module_names) <= packages
    if name in CONCEPTS:
        assert top <= {"torch", "math", "dataclasses"}
    assert {full for full in names if full.startswith("papers")} <= {"papers.plot"}


@pytest.mark.parametrize("name", FILES)
def test_matplotlib_is_imported_where_it_is_used_and_may_be_missing(name):
    """Each such import stands in a function, within a `try`."""
    whole = tree(name)
    guarded = [inner for function in ast.walk(whole) if isinstance(function, ast.FunctionDef)
               for inner in ast.walk(function) if isinstance(inner, ast.Try)]
    kept = [node for node in ast.walk(whole) if isinstance(node, (ast.Import, ast.ImportFrom))
            and any(full.startswith("matplotlib") for full in imported(node))]
    assert all(any(node in ast.walk(part) for part in guarded) for node in kept)


@pytest.mark.parametrize("name", FILES)
def test_the_top_of_a_file_only_defines(name):
    """Imports, functions, classes, constants, and what runs where the file is the script."""
    kinds = ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef, ast.Assign
    first, *others = tree(name).body
    assert ast.get_docstring(ast.Module([first], [])), "a file begins with what it is"
    for node in others:
        script = isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'"
        assert isinstance(node, kinds) or script, ast.unparse(node)


def test_an_import_does_no_work(tmp_path):
    """It prints and writes nothing, and leaves torch's types, threads and numbers alone."""
    modules = ", ".join(name.replace("/", ".") for name in FILES)
    code = f"""if True:
        import sys, torch
        def state():
            return (torch.initial_seed(), torch.get_rng_state().tolist(), torch.get_num_threads(),
                    torch.get_default_dtype(), torch.is_grad_enabled())
        torch.manual_seed(1)
        before = state()
        import {modules}
        assert before == state() and "matplotlib" not in sys.modules"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True,
                          text=True, env={"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"})
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert list(tmp_path.iterdir()) == []


def test_third_party_imports_are_in_requirements():
    lines = (ROOT / "requirements.txt").read_text().split()
    listed = {re.split(r"[<>=]", line)[0] for line in lines}
    found = {full.split(".")[0] for pattern in ("*.py", "papers/*.py", "tests/*.py")
             for path in ROOT.glob(pattern) for full in imported(ast.parse(path.read_text()))}
    local = OURS | {path.stem for path in ROOT.glob("tests/*.py")}
    packages = found - local - set(sys.stdlib_module_names) - {"matplotlib"}
    assert {"pillow" if name == "PIL" else name for name in packages} <= listed
    assert listed == {"torch", "numpy", "pillow", "pytest"}


@pytest.mark.parametrize("name", FILES)
def test_style_limits(name):
    """At most 100 columns, and 60 lines a function; train.run is the script itself."""
    text = (ROOT / f"{name}.py").read_text()
    assert [line for line in text.splitlines() if len(line) > 100] == []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef) and (name, node.name) != ("train", "run"):
            assert node.end_lineno - node.lineno < 60, node.name
