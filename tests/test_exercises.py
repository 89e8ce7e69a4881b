"""exercises.py: what it tells a student is so."""

import inspect
import re
import subprocess
import sys

import pytest

import exercises


def run(command):
    """The output of the script, which changes no file."""
    root = exercises.TESTS.parent
    before = {path: path.read_bytes() for path in [*root.glob("*.py"), *root.glob("*/*.py")]}
    out = subprocess.run([sys.executable, exercises.__file__, *command.split()],
                         capture_output=True, text=True, check=True).stdout
    assert all(path.read_bytes() == content for path, content in before.items())
    return out


@pytest.mark.parametrize("e", exercises.BUGS + exercises.CHANGES, ids=lambda e: e["name"])
def test_the_line_to_change_is_a_whole_line(e):
    lines = inspect.getsource(getattr(e["file"], e["name"])).splitlines()
    assert e["old"] in [line.split("  # ")[0].strip() for line in lines]


def first_words(text):
    return " ".join(text.split()[:5])


@pytest.mark.parametrize("number", [1, 2, 3])
def test_the_named_test_fails_and_the_others_pass(number):
    e = exercises.BUGS[number - 1]
    out = run(f"bug {number} {e['fails']}")
    assert f"\nRight. {first_words(e['why'])}" in out
    for k in "abcd":
        assert f"  {k}  {'FAILED' if k == e['fails'] else 'passed'}  {e[k]}\n" in out


def test_a_wrong_answer_gets_a_hint_before_the_solution():
    e, out = exercises.BUGS[0], run("bug 1 a")
    assert f"  a  passed  {e['a']}\n" in out and "FAILED" not in out
    assert f"\nNo, (a) passes. A hint: {first_words(e['hint'])}" in out
    assert first_words(e["why"]) not in " ".join(out.split()) and "bug 1, then a, b, c or d" in out


def test_each_change_does_what_its_answer_says():
    def columns(number):
        table = run(f"change {number} --answer").split("after\n")[1].split("\n\n")[0]
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
    assert first_words(e["why"]) not in " ".join(out.split()) and "change 3 --answer" in out


@pytest.mark.parametrize("argv", ["bug 9", "bug 0", "foo", "change 1 c", "bug 1 a --answer"])
def test_bad_input_is_one_sentence(argv, capsys):
    with pytest.raises(SystemExit) as stop:
        exercises.main(argv.split())
    assert stop.value.code == 2 and capsys.readouterr().err.count("\n") == 1
