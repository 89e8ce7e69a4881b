"""papers.py: the frame of the figures, and the weights over t."""

import argparse
import csv
import sys

import pytest

import evaluate
import papers


def read(path):
    names, *rows = csv.reader(open(path))
    return [dict(zip(names, row)) for row in rows]


def test_weights_and_their_shares(tmp_path, capsys):
    """DB: on linear betas 1/sqrt(SNR) runs from .01 to 157, mean 17.8; the last tenth has 57 %."""
    assert evaluate.main(["weights", "--out", str(tmp_path)]) == 0
    rows = read(tmp_path / "weights.csv")
    assert [int(row["t"]) for row in rows] == list(range(1, 1001))
    debias = [float(row["eps:debias"]) for row in rows]
    assert debias[0] == pytest.approx(0.01, rel=1e-3) and debias[-1] == pytest.approx(157, abs=1)
    assert sum(debias) / 1000 == pytest.approx(17.8, abs=0.05)
    assert 1 - float(rows[899]["share:debias"]) == pytest.approx(0.57, abs=0.005)
    assert float(rows[499]["share:constant"]) == pytest.approx(0.5)
    for row in rows[::100]:
        sigma = float(row["sigma"])
        for name in ("p2", "min-snr", "inverse-snr", "debias", "edm"):
            assert float(row[f"eps:{name}"]) == pytest.approx(
                float(row[f"x0:{name}"]) * sigma ** 2, rel=1e-4)
    assert all(float(value) == 1 for name, value in rows[-1].items() if name.startswith("share"))
    out = capsys.readouterr().out
    assert "weights.csv has all 1000 rows" in out and out.count("\n       1000") == 3


def test_without_matplotlib_there_is_a_line_that_says_so(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert evaluate.main(["weights", "--out", str(tmp_path)]) == 0
    assert "matplotlib is not installed" in capsys.readouterr().out
    assert [p.name for p in tmp_path.iterdir()] == ["weights.csv"]


def test_with_matplotlib_there_is_a_small_picture(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    papers.show(argparse.Namespace(out=str(tmp_path), command="x"), ["a", "b"], [[1, 2.0], [3, 4.0]],
                [dict(y=["b"], ylabel="b")])
    assert 1000 < (tmp_path / "x.png").stat().st_size < 100_000


@pytest.mark.parametrize("name", evaluate.FIGURES)
def test_every_figure_has_help(name, capsys):
    with pytest.raises(SystemExit):
        evaluate.main([name, "--help"])
    assert evaluate.FIGURES[name][1][:20] in capsys.readouterr().out.replace("\n", " ")
