"""exercises.py: what it tells a student is so."""

import inspect
import re
import shutil
import subprocess
import sys

import pytest

import exercises


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Runs the script on a copy of the repository, of which no file may change: its output."""
    copy, root = tmp_path_factory.mktemp("copy"), exercises.TESTS.parent
    for folder in ("", "tests", "papers"):
        (copy / folder).mkdir(exist_ok=True)
        for path in (root / folder).glob("*.py"):
            shutil.copy(path, copy / folder)
    before = {path: path.read_bytes() for path in copy.rglob("*.py")}
    yield lambda *argv: subprocess.run([sys.executable, "tests/exercises.py", *map(str, argv)],
                                       cwd=copy, capture_output=True, text=True, check=True).stdout
    assert {path: path.read_bytes() for path in copy.rglob("*.py")} == before


@pytest.mark.parametrize("e", exercises.BUGS + exercises.CHANGES, ids=lambda e: e["name"])
def test_the_line_to_change_is_there_once_and_is_a_whole_line(e):
    source = inspect.getsource(getattr(e["file"], e["name"]))
    assert source.count(e["old"]) == 1 and e["new"] not in source
    assert e["old"] in [line.split("  # ")[0].strip() for line in source.splitlines()]


def first_words(text):
    return " ".join(text.split()[:5])


@pytest.mark.parametrize("number", [1, 2, 3])
def test_the_named_test_fails_and_the_others_pass(number, run):
    e = exercises.BUGS[number - 1]
    out = run("bug", number, e["fails"])
    assert f"\nRight. {first_words(e['why'])}" in out
    for k in "abcd":
        assert f"  {k}  {'FAILED' if k == e['fails'] else 'passed'}  {e[k]}\n" in out


def test_a_wrong_answer_gets_a_hint_before_the_solution(run):
    e, out = exercises.BUGS[0], run("bug", 1, "a")
    assert f"  a  passed  {e['a']}\n" in out and "FAILED" not in out
    assert f"\nNo, (a) passes. A hint: {first_words(e['hint'])}" in out
    assert first_words(e["why"]) not in out and "bug 1, then a, b, c or d" in out


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
    quoted = re.findall(r"0\.\d+", exercises.CHANGES[2]["why"])
    assert [float(q) for q in quoted] == [after[0], before[0], after[2]]


def test_a_change_shows_its_numbers_and_question_but_no_answer(capsys):
    exercises.main(["change", "3"])
    out, e = capsys.readouterr().out, exercises.CHANGES[2]
    assert "now\n  t = 10 " in out and first_words(e["ask"]) in out
    assert first_words(e["why"]) not in out and "change 3 --answer" in out


@pytest.mark.parametrize("argv", ["bug 9", "bug 0", "bug 1 z", "foo", "change 1 c",
                                  "bug 1 a --answer"])
def test_bad_input_is_one_sentence(argv, capsys):
    with pytest.raises(SystemExit) as stop:
        exercises.main(argv.split())
    assert stop.value.code == 2 and capsys.readouterr().err.count("\n") == 1
