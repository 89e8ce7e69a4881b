"""What README.md and papers/README.md say is so: commands, defaults, files, names and snippets."""

import importlib
import re
import shlex
import sys
from pathlib import Path

import pytest
import torch

import benchmark
import evaluate
import schedules
import train
from test_evaluate import options_of

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
MAP = (ROOT / "papers" / "README.md").read_text()
COMMANDS = [line.split("  #")[0].strip() for line in README.splitlines()
            if re.match(r"    (python|pip|torchrun) ", line)]
INLINE = re.findall(r"`((?:python|torchrun) [^`]+)`", README + MAP)
SNIPPETS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def rows(text, header):
    """The cells of the table whose header line starts so."""
    table = text[text.index(header):].split("\n\n")[0]
    return [[cell.strip() for cell in line.strip("|").split("|")]
            for line in table.splitlines()[2:]]


def test_the_two_commands_come_first():
    assert COMMANDS[0] == "pip install -r requirements.txt && python train.py"
    assert COMMANDS[1] == "pip install -r requirements.txt && python -m pytest"


@pytest.mark.parametrize("command", sorted({*COMMANDS, *INLINE}))
def test_commands_parse(command):
    for part in command.replace("torchrun --nproc-per-node 8 ", "python ").split(" && "):
        words = shlex.split(part)
        if words[:2] == ["python", "train.py"]:
            if words[2:] != ["--help"]:
                train.parser().parse_args(words[2:])
        elif words[:2] == ["python", "evaluate.py"]:
            evaluate.parser().parse_args(words[2:])
        elif words[:2] == ["python", "-m"] and words[2].startswith("papers."):
            assert words[3] in importlib.import_module(words[2]).COMMANDS
        elif words[:2] == ["python", "tests/benchmark.py"]:
            assert set(words[2:]) <= {"--quick", "--only", *benchmark.PARTS}
        else:
            assert part in ("pip install -r requirements.txt", "python -m pytest",
                            "python tests/exercises.py"), part


def test_documented_defaults_are_the_options():
    for option, default, _ in rows(README, "| option | default |"):
        field = train.CHOSEN[option.strip("`-").replace("-", "_")]
        assert default.replace("`", "") == train.default_text(field)


def test_the_table_of_files_is_the_files():
    table = rows(README, "| file | what it is")
    assert {name.strip("`/") for name, *_ in table} == {
        path.name for path in ROOT.glob("*.py")} | {"papers", "tests"}
    for name, _, start in table:
        name, start = name.strip("`"), start.strip("`")
        assert (ROOT / name / start).exists() if name.endswith("/") else hasattr(
            importlib.import_module(name.removesuffix(".py")), start)


def test_snippets_run(tmp_path, monkeypatch):
    """In a folder with a short run under the name that the README's commands use."""
    monkeypatch.chdir(tmp_path)
    train.run(train.Options(steps=2, eval_every=0, out="runs/000-digits-stf-edm"), brief=True)
    for number, snippet in enumerate(SNIPPETS):
        torch.manual_seed(0)
        exec(compile(snippet, f"snippet {number} of README.md", "exec"), {"__name__": "readme"})


def test_the_diff_adds_a_sampler_of_second_order_with_one_call_a_step(tmp_path, monkeypatch):
    """Its hunks replace text that is there once; Gaussian data has an exact solution."""
    for file, hunks in re.findall(r"^--- a/(\w+\.py)\n\+\+\+ b/\1\n(.*?)(?=^--- a/|^```)",
                                  README, re.DOTALL | re.MULTILINE):
        text = (ROOT / file).read_text()
        for hunk in re.split(r"^@@.*\n", hunks, flags=re.MULTILINE)[1:]:
            lines = hunk.splitlines(keepends=True)
            before = "".join(line[1:] for line in lines if line[0] in " -")
            after = "".join(line[1:] for line in lines if line[0] in " +")
            if after not in text:                            # a reader may have applied it
                assert text.count(before) == 1, before
                text = text.replace(before, after)
        (tmp_path / file).write_text(text)
        monkeypatch.delitem(sys.modules, file.removesuffix(".py"))
    monkeypatch.syspath_prepend(tmp_path)
    samplers, patched = map(importlib.import_module, ("samplers", "evaluate"))

    def denoise(x, sigma, *labels):                          # data N(0, .25)
        return x * 0.25 / (0.25 + sigma ** 2)
    x, error = torch.full((1, 1), 80.0).double(), []
    for N in (20, 40, 80):
        sigma = schedules.EDM(sigma_min=0.1).time_steps(N)[:-1]
        exact = x * ((0.25 + sigma[-1] ** 2) / (0.25 + sigma[0] ** 2)).sqrt()
        error.append((samplers.dpm_solver(denoise, x, sigma) - exact).abs())
    assert 3.2 < error[0] / error[1] < 5 and 3.4 < error[1] / error[2] < 4.6
    x = patched.generate(denoise, options_of(), range(2000), "dpm-solver", 20, batch=2000)
    assert abs(x.std() - 0.5) < 0.03


# ---- The map of the papers -----------------------------------------------------------------------

ROWS = [row for part in MAP.split("\n\n") if "| item |" in part for row in rows(part, "| item |")]


@pytest.mark.parametrize("row", ROWS, ids=[f"{i} {row[0]}" for i, row in enumerate(ROWS)])
def test_a_row_of_the_map_names_what_exists(row):
    """Functions, the test that fails without them, a command; or why there are none."""
    item, claim, functions, test, command, seen = row
    if functions == "-":
        assert test == command == "-" and seen.startswith("not here: "), row
        return
    for module, name in re.findall(r"`([\w.]+)\.(\w+)`", functions):
        assert hasattr(importlib.import_module(module), name), name
    tests = re.findall(r"`(test_\w+\.py)(?:::(\w+))?`", test)
    assert tests, row
    for file, name in tests:
        text = (ROOT / "tests" / file).read_text()
        assert not name or f"def {name}(" in text, name
    assert command == "-" or command.startswith("`python "), row
    assert seen


NUMBERED = {"EDM": dict(eq=8, fig=15, tab=8, Alg=3), "STF": dict(eq=8, fig=5, tab=2, Thm=2, Alg=1),
            "SA": dict(fig=4, tab=4, Thm=2, Alg=2), "DB": dict(eq=13, fig=17, tab=4),
            "TCV": dict(fig=6, tab=3)}


@pytest.mark.parametrize("paper", NUMBERED)
def test_the_map_has_every_numbered_item_of_a_paper(paper):
    cells = " ".join(row[0] for row in ROWS if row[0].startswith(f"{paper} "))
    for kind, count in NUMBERED[paper].items():
        items = " ".join(re.findall(rf"{kind}\. ([\dabc, -]+)", cells))
        found = {k for first, last in re.findall(r"(\d+)[abc]*(?:-(\d+))?", items)
                 for k in range(int(first), int(last or first) + 1)}
        assert found >= {*range(1, count + 1)}, (kind, sorted({*range(1, count + 1)} - found))


@pytest.mark.parametrize("paper", ["stf", "sa", "debias", "edm", "taylor"])
def test_every_command_of_a_paper_is_in_the_map_with_its_results(paper):
    for name in importlib.import_module(f"papers.{paper}").COMMANDS:
        assert f"`python -m papers.{paper} {name}" in MAP, name
        assert list((ROOT / "papers" / "results").glob(f"{paper}-{name}*.csv")), name


# ---- The rest ------------------------------------------------------------------------------------

def test_pictures_and_linked_files_are_there_and_small():
    for text, folder in ((README, ROOT), (MAP, ROOT / "papers")):
        for path in re.findall(r"!\[[^]]*\]\(([^)]+)\)", text):
            assert 1000 < (folder / path).stat().st_size < 300_000, path
        for path in re.findall(r"\]\(([^)]+)\)", text):
            assert path.startswith("https://") or (folder / path).exists(), path
    for name in re.findall(r"`((?:tests/)?\w+\.(?:py|txt))`", README):
        assert (ROOT / name).exists() or (ROOT / "tests" / name).exists(), name
