"""What README.md says is so: its commands parse, its defaults, files, names and snippets exist."""

import importlib
import re
import shlex
from pathlib import Path

import pytest

import benchmark
import evaluate
import exercises
import train

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
COMMANDS = [line.split("#")[0].strip() for line in README.splitlines()
            if re.match(r"    (python|pip) ", line)]
INLINE = re.findall(r"`((?:python|torchrun) [^`]+|(?:train|evaluate)\.py [^`]+)`", README)
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


def parses(line):
    line = re.sub("^torchrun --nproc-per-node 8|^(?=train|evaluate)", "python ", line)
    for part in line.split(" && "):
        words = shlex.split(part)
        if words == ["python", "train.py", "--help"]:
            continue
        if words[:2] == ["python", "train.py"]:
            train.parser().parse_args(words[2:])
        elif words[:2] == ["python", "evaluate.py"]:
            evaluate.parser().parse_args(words[2:])
        elif words[:2] == ["python", "tests/benchmark.py"] and words[2:]:
            assert words[2] == "--only" and words[3] in benchmark.PARTS
        elif words[:2] == ["python", "tests/exercises.py"] and words[2:]:
            assert exercises.EXERCISES[words[2]][int(words[3]) - 1]
        else:
            assert part in ("pip install -r requirements.txt", "python -m pytest",
                            "python tests/benchmark.py", "python tests/exercises.py")


@pytest.mark.parametrize("command", [*COMMANDS, *INLINE])
def test_commands_parse(command):
    parses(command)


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


MAP = rows("| paper | what | function | test | command |")
NUMBERED = {"EDM": dict(eq=8, fig=15, tab=8, Alg=3), "STF": dict(eq=8, fig=5, tab=2, Thm=2, Alg=1),
            "SA": dict(fig=4, tab=4, Thm=2, Alg=2), "DB": dict(eq=13, fig=17, tab=4),
            "TCV": dict(eq=34, fig=6, tab=3)}


@pytest.mark.parametrize("row", MAP, ids=[f"{row[0]} {row[1]}" for row in MAP])
def test_a_row_of_the_map_names_what_exists(row):
    """Functions, their test, a command that parses; or why there are none."""
    _, _, functions, test, command, differs = row
    if functions == "-":
        assert test == command == "-" and differs.startswith("not here: ")
        return
    file, name = re.fullmatch(r"`(test_\w+\.py)(?:::(\w+))?`", test).groups()
    text = (ROOT / "tests" / file).read_text()
    assert name is None or f"def {name}(" in text
    for module, function in re.findall(r"`(\w+)\.(\w+)`", functions):
        assert hasattr(importlib.import_module(module), function)
        assert re.search(rf"\b{function}\b", text)
    if command != "-":
        parses("python " + command.strip("`"))


@pytest.mark.parametrize("paper", NUMBERED)
def test_the_map_has_every_numbered_item_of_a_paper(paper):
    cells = [row[0] for row in MAP if row[0].startswith(f"{paper} ")]
    for kind, count in NUMBERED[paper].items():
        items = " ".join(re.findall(rf"{kind}\. ([\dabc, -]+)", " ".join(cells)))
        found = {k for first, last in re.findall(r"(\d+)[abc]*(?:-(\d+))?", items)
                 for k in range(int(first), int(last or first) + 1)}
        assert found >= {*range(1, count + 1)}, kind


@pytest.mark.parametrize("snippet", SNIPPETS, ids=["stf in a foreign loop", "foreign network"])
def test_snippets_run(snippet):
    exec(compile(snippet, "README.md", "exec"), {})


def test_the_picture_is_there_and_small():
    for path in re.findall(r"!\[[^]]*\]\(([^)]+)\)", README):
        assert 1000 < (ROOT / path).stat().st_size < 100_000
    for path in re.findall(r"\]\(([^)]+)\)", README):
        assert (ROOT / path).exists(), path


def test_every_picture_has_the_command_that_makes_it():
    text = (ROOT / "figures" / "README.md").read_text()
    assert set(re.findall(r"\]\(([\w-]+\.png)\)", text)) == {
        p.name for p in (ROOT / "figures").glob("*.png")}
    for command in re.findall(r"`(python [^`]+)`", text):
        parses(command)


def test_it_is_short_enough_to_read_and_has_no_blanks_left():
    assert not re.search(r"@\w+@|TODO|XXX", README)
    assert len(README.splitlines()) <= 250


def test_named_files_exist():
    for name in re.findall(r"`((?:tests/)?\w+\.(?:py|txt))`", README):
        assert (ROOT / name).exists() or (ROOT / "tests" / name).exists(), name
