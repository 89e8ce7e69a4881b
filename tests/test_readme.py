"""What README.md says is so: its commands parse, its defaults, files, names and snippets exist."""

import importlib
import re
import shlex
from pathlib import Path

import pytest

import evaluate
import train

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
COMMANDS = [line.split("#")[0].strip() for line in README.splitlines()
            if re.match(r"    (python|pip) ", line)]
SNIPPETS = re.findall(r"```python\n(.*?)```", README, re.S)


def rows(header):
    """The cells of the table whose header line starts so."""
    lines = README[README.index(header):].splitlines()[2:]
    table = []
    for line in lines:
        if not line.startswith("|"):
            return table
        table.append([cell.strip() for cell in line.strip("|").split("|")])


def test_the_two_commands_come_first():
    assert COMMANDS[0] == "pip install -r requirements.txt && python train.py"
    assert COMMANDS[1] == "pip install -r requirements.txt && python -m pytest"


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_parse(command):
    for part in command.split(" && "):
        words = shlex.split(part)
        if words[:2] == ["python", "train.py"]:
            train.parser().parse_args(words[2:])
        elif words[:2] == ["python", "evaluate.py"]:
            evaluate.parser().parse_args(words[2:])
        else:
            assert part in ("pip install -r requirements.txt", "python -m pytest")


def test_documented_defaults_are_the_parsers():
    for option, default, _ in rows("| option | default |"):
        value = train.OPTIONS[option.strip("`-")][1]
        shown = [value] if not isinstance(value, tuple) else [
            f"{kind} {v}" for kind, v in zip(train.KINDS, value)]
        assert default.replace("`", "") == ", ".join(map(str, shown))


def test_the_file_map_is_the_files():
    listed = {row[0].strip("`/") for row in rows("| file | what it is")}
    assert listed == {p.name for p in ROOT.glob("*.py")} | {"tests"}
    for name, what, start in rows("| file | what it is"):
        assert start == "`test_losses.py`" or hasattr(
            importlib.import_module(name.strip("`").removesuffix(".py")), start.strip("`"))


def test_the_map_names_functions_and_tests_that_exist():
    table = rows("| equation | function | test |")
    assert len(table) >= 9
    named = set()
    for _, functions, test in table:
        assert (ROOT / "tests" / test.strip("`")).exists()
        for module, name in re.findall(r"`(\w+)\.(\w+)`", functions):
            assert hasattr(importlib.import_module(module), name)
            assert name in (ROOT / "tests" / test.strip("`")).read_text()
            named.add(name)
    assert {"stf_target", "heun", "Denoiser", "IDDPM"} <= named


@pytest.mark.parametrize("snippet", SNIPPETS, ids=["stf in a foreign loop", "foreign network"])
def test_snippets_run(snippet):
    exec(compile(snippet, "README.md", "exec"), {})


def test_the_picture_is_there_and_small():
    for path in re.findall(r"!\[[^]]*\]\(([^)]+)\)", README):
        assert 1000 < (ROOT / path).stat().st_size < 100_000


def test_named_files_exist():
    for name in re.findall(r"`((?:tests/)?\w+\.(?:py|txt))`", README):
        assert (ROOT / name).exists() or (ROOT / "tests" / name).exists(), name
