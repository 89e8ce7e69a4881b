"""exercises.py: what it tells a student is so."""

import inspect
import shutil
import subprocess
import sys

import pytest

import exercises


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Runs the script on a copy of the repository, of which no file may change: its output."""
    copy = tmp_path_factory.mktemp("copy")
    shutil.copytree(exercises.TESTS, copy / "tests")
    for path in exercises.TESTS.parent.glob("*.py"):
        shutil.copy(path, copy)
    before = {path: path.read_bytes() for path in copy.rglob("*.py")}
    yield lambda *argv: subprocess.run([sys.executable, "tests/exercises.py", *map(str, argv)],
                                       cwd=copy, capture_output=True, text=True, check=True).stdout
    assert {path: path.read_bytes() for path in copy.rglob("*.py")} == before


@pytest.mark.parametrize("e", exercises.BUGS + exercises.CHANGES, ids=lambda e: e["name"])
def test_the_line_to_change_is_there_once_and_is_a_whole_line(e):
    source = inspect.getsource(getattr(e["file"], e["name"]))
    assert source.count(e["old"]) == 1 and e["new"] not in source
    assert e["old"] in [line.split("  # ")[0].strip() for line in source.splitlines()]


@pytest.mark.parametrize("number, letter", [(1, "a"), (2, "d"), (3, "b")])
def test_the_named_test_fails_and_the_others_pass(number, letter, run):
    e, out = exercises.BUGS[number - 1], run("bug", number, letter)
    assert ("\nRight. " if letter == e["fails"] else f"\nNo, ({letter}) passes. ") in out
    for k in "abcd":
        assert f"  {k}  {'FAILED' if k == e['fails'] else 'passed'}  {e[k]}\n" in out


def test_each_change_does_what_its_answer_says(run):
    def columns(number):
        table = run("change", number, "--answer").split("after\n")[1].split("\n\n")[0]
        return zip(*(map(float, line.split()[-2:]) for line in table.splitlines()))

    before, after = columns(1)                                  # sigma .03 ... 10, n = 16 and 256
    ratios = [a / b for a, b in zip(after, before)]
    assert ratios[:2] == [1, 1] and ratios[-2:] == pytest.approx([16, 256], rel=0.2)
    before, after = columns(2)                                            # 64, 256, 1024 steps
    assert all(a > 100 * b for a, b in zip(after, before))
    assert all(column[1] / column[2] == pytest.approx(16, rel=0.2) for column in (before, after))
    before, after = columns(3)                                                  # t = 10, 100, 500
    assert min(before) > 0.95 < after[2] and max(after[:2]) < 0.8


@pytest.mark.parametrize("argv", ["bug 9", "bug 0", "bug 1 z", "foo", "change 1 c"])
def test_bad_input_is_one_sentence(argv, capsys):
    with pytest.raises(SystemExit) as stop:
        exercises.main(argv.split())
    assert stop.value.code == 2 and capsys.readouterr().err.count("\n") == 1
