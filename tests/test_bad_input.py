"""What people get wrong costs one sentence that says what to do: status 2, nothing written or lost.

A case is (what makes its files, or None; the command; a part of the sentence).  Every command runs
in a folder with images.npz, points.npy and a run of each: "images", and "points", whose last step
is still to come.  Payloads make a folder if they are unpickled, which would be seen.
"""

import errno
import os
import pickle
import shlex
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

import evaluate
import train
from networks import Denoiser
from test_data import encoded, idx, noise, pngs, write_folder, write_tar, write_zip

TINY = "--width 8 --blocks 1 --batch 4 --ref-batch 8 --warmup 0 --sample-steps 1 --eval-every 0"


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    folder = tmp_path_factory.mktemp("template")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        np.save("points.npy", np.random.default_rng(0).standard_normal((20, 2)).astype("f4"))
        np.savez("images.npz", images=noise(20, 8, 8, 3), labels=np.arange(20) % 2)
        for argv in [f"--data points.npy --steps 2 --checkpoint-every 1 --out points {TINY}",
                     f"--data images.npz --steps 1 --cond --mult 1 --out images {TINY}"]:
            assert train.main(argv.split()) == 0
        Path("points/checkpoint-0000002.pt").unlink()
    return folder


@pytest.fixture
def folder(template, tmp_path, monkeypatch):
    shutil.copytree(template, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")


def tree():
    return {str(p): p.read_bytes() if p.is_file() else None for p in sorted(Path().rglob("*"))}


def command(line):
    tool, *argv = shlex.split(line)
    return dict(train=train, evaluate=evaluate)[tool].main(argv)


class Hostile:
    def __reduce__(self):
        return os.mkdir, ("owned",)


# ---- What makes the files ------------------------------------------------------------------------

def put(path, content):
    """A file of bytes or an array; or a .zip, .tgz, .npz or folder of a dict."""
    if isinstance(content, np.ndarray):
        np.save(path, content)
    elif isinstance(content, bytes):
        Path(path).parent.mkdir(exist_ok=True)
        Path(path).write_bytes(content)
    elif path.endswith(".npz"):
        np.savez(path, **content)
    else:
        {".zip": write_zip, ".tgz": write_tar}.get(Path(path).suffix, write_folder)(path, content)


def checkpoint(**changes):
    """Changes the checkpoint of points."""
    torch.save(torch.load(CHECKPOINT, weights_only=True) | changes, CHECKPOINT)


# ---- Cases ---------------------------------------------------------------------------------------

GRAY = noise(4, 4, 4)
PNGS = pngs(GRAY)
HOSTILE = np.array([Hostile()] * 4, dtype=object)
CHECKPOINT = "points/checkpoint-0000001.pt"
TRAIN = f"train --steps 1 --out new {TINY} --data"
NEW, RESUME = f"{TRAIN} points.npy", "train --resume points"
SAMPLE, FID = "evaluate sample points --num 4 --steps 1", "evaluate fid points --num 8 --steps 1"
INCEPTION = "evaluate fid images --num 4 --steps 1"

# More of train.py's options are in test_train.py.
OPTIONS = {name: (None, *case) for name, case in {
    "Inception for points": (f"{NEW} --fid-every 1 --fid-features inception", "pixels for points"),
    "more steps than levels": (f"{NEW} --schedule ddpm --sample-steps 1001", "choose fewer"),
    "a folder of downloads in a file": ("train --data cifar10 --data-dir points.npy", "--data-dir"),
    "an unset variable, data": (f"{NEW} --data ''", "no file, folder or data set ''"),
    "an unset variable, run": ("train --resume ''", "'' does not exist"),
    "sample nowhere": ("evaluate sample nowhere", "'nowhere' does not exist"),
    "sample a folder of something else": ("evaluate sample .", "has no checkpoint"),
    "sample into what is no picture": (f"{SAMPLE} --out x.gif", ".png"),
    "sample with a choice out of range": (f"{SAMPLE} --sampler ddim --eta 2", "within [0, 1]"),
    "sample with beta in ddim": (f"{SAMPLE} --sampler ddim --variance beta", "ddpm"),
    "sample by a head that is none": (f"{SAMPLE} --sampler ddpm --variance npr", "--head npr"),
    "sample with guidance": ("evaluate sample images --guidance 2", "--label-dropout"),
    "sample a class that is none": ("evaluate sample images --class cat", "choose one of 0, 1"),
    "sample a class of a run without": (f"{SAMPLE} --class 1", "leave the option out"),
    "sample weights that are none": (f"{SAMPLE} --weights 77", "raw, ema and 20000"),
    "fid of other shapes": (f"{FID} --ref images.npz", "shape (3, 8, 8)"),
}.items()}

FILES = {          # name: (file, its content, a part of the sentence)
    "a kind unknown": ("x.txt", b"text", ".png .jpg .jpeg"),
    "an empty folder": ("x", {"a.txt": b"text"}, "end in .png .jpg"),
    "three images": ("x.zip", pngs(GRAY[:3]), "at least 4"),
    "images not square": ("x.npy", noise(4, 4, 6), "image 0 of x.npy is 6x4"),
    "a tar of something else": ("x.tgz", {"a.txt": b"text"}, "has no data_batch_1.bin"),
    "half a picture": ("x", PNGS | {"1.png": PNGS["1.png"][:45]}, "x/1.png"),
    "a picture of a kind unknown": ("x", PNGS | {"1.png": encoded(GRAY[1], "PCX")}, "x/1.png"),
    "mixed sizes": ("x.zip", PNGS | {"1.png": encoded(noise(5, 5))}, "x.zip/1.png is 5x5"),
    "images beside folders": ("x", PNGS | {"cat/1.png": PNGS["1.png"]}, "sub-folder"),
    "labels of one image": ("x.zip", PNGS | {"dataset.json": b'{"labels": [["0.png", 0]]}'},
                            "disagree about 1.png"),
    "labels in words": ("x.npz", dict(images=GRAY, labels=list("abab")), "whole numbers"),
    "labels below 0": ("x.npz", dict(images=GRAY, labels=[0, 1, 0, -1]), "whole numbers"),
    "labels too few": ("x.npz", dict(images=GRAY, labels=[0, 1]), "one label for each"),
    "hostile images": ("x.npz", dict(images=HOSTILE), "x.npz"),
    "images from 0 to 1": ("x.npy", GRAY / 255, "uint8"),
    "points that are NaN": ("x.npy", np.full((4, 2), np.nan), "NaN"),
    "an idx too short": ("x-idx3-ubyte", idx(GRAY)[:-1], "that it is whole"),
}
DATA = {name: (partial(put, file, content), f"{TRAIN} {file}", part)
        for name, (file, content, part) in FILES.items()} | {
    "data that has changed": (partial(put, "points.npy", GRAY), "evaluate levels points",
                              "other data"),
    "statistics for images": (partial(np.savez, "x.npz", mu=GRAY[0, 0], sigma=GRAY[0]),
                              f"{FID} --ref x.npz", "holds mu, sigma, not 'images'"),
}

RUNS = {
    "a hostile checkpoint": (partial(checkpoint, beta=Hostile()), RESUME, "damaged"),
    "a checkpoint of something else": (partial(torch.save, [1, 2], CHECKPOINT), SAMPLE,
                                       "move it away"),
    "averages of another half-life": (partial(checkpoint, ema={"7": {}}), RESUME, "name another"),
    "weights of another network": (partial(checkpoint, model={"a": torch.ones(1)}),
                                   f"{SAMPLE} --weights raw", "not of this network"),
    "options of another program": (partial(checkpoint, options={"lr": 1}), SAMPLE,
                                   "the options of points"),
    "an optimizer of another network": (partial(checkpoint, optimizer={}), RESUME, "optimizer"),
    "no checkpoint": (partial(os.remove, CHECKPOINT), RESUME, "has no checkpoint"),
    "a damaged log": (partial(put, "points/log.jsonl", b"text}\n"), RESUME, "log.jsonl"),
    "half of Inception": (partial(put, f"data/{evaluate.INCEPTION}", b"PK\3\4"), INCEPTION,
                          "remove it"),
}
CASES = OPTIONS | DATA | RUNS


@pytest.mark.parametrize("name", CASES)
def test_bad_input_costs_one_sentence(name, folder, capsys, recwarn):
    make, line, part = CASES[name]
    if make:
        make()
    before = tree()
    status = command(line)
    error = capsys.readouterr().err
    assert status == 2 and error.count("\n") == 1 and len(error) > 30, error
    assert error.startswith(("train.py: ", "evaluate.py: ")) and part in error, error
    assert " object at 0x" not in error, error
    assert not [w for w in recwarn if issubclass(w.category, (UserWarning, RuntimeWarning))]
    assert tree() == before and not Path("owned").exists()


def test_the_hostile_payload_would_be_seen(folder):
    pickle.loads(pickle.dumps(Hostile()))
    assert Path("owned").is_dir()


@pytest.mark.parametrize("line, file", [
    (f"{SAMPLE} --out x.png", "x.png"), (f"{SAMPLE} --out x.npz", "x.npz"),
    (NEW, "new/options.json")])
def test_a_full_disk_is_told_and_nothing_half_written_is_left(line, file, folder, monkeypatch,
                                                              capsys):
    def full(_):
        if Path(f"{file}.part").exists():
            raise OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(os, "fsync", full)
    assert command(line) == 2
    error = capsys.readouterr().err
    assert f"cannot use {file}: " in error and "No space left" in error and "make room" in error
    assert error.count("\n") == 1 and not Path(file).exists() and not Path(f"{file}.part").exists()


@pytest.mark.parametrize("line", [NEW, SAMPLE])
def test_lack_of_memory_is_told(line, folder, monkeypatch, capsys):
    def exhausted(*given, **more):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nGPU 0 ..")
    monkeypatch.setattr(Denoiser, "forward", exhausted)
    assert command(line) == 2
    error = capsys.readouterr().err
    assert "out of memory; " in error and error.count("\n") == 1


def test_class_names_beyond_the_terminals_letters_end_no_command(tmp_path):
    """Training on them, its report, a picture of one class, and the sentence for a wrong one."""
    for name in ("ключ", "猫"):
        write_folder(tmp_path / "pets" / name, pngs(noise(4, 8, 8, 3)))
    program = f"""if True:
        import sys, evaluate, train
        line = "--data pets --cond --mult 1 --steps 1 --out run {TINY}"
        assert train.main(line.split()) == 0
        sys.stdout.reconfigure(errors="strict")    # as it was; train.main has changed it
        line = "sample run --num 2 --steps 1 --class "
        assert evaluate.main([*line.split(), "猫"]) == 0
        assert evaluate.main([*line.split(), "犬"]) == 2"""
    root = str(Path(train.__file__).parent)
    env = os.environ | {"PYTHONIOENCODING": "ascii", "PYTHONPATH": root}
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, env=env,
                          capture_output=True, encoding="ascii")
    assert done.returncode == 0, done.stderr
    assert "2 classes: ????, ?" in done.stdout and "class ?" in done.stdout
    assert done.stderr == "evaluate.py: --class ?: choose one of ????, ?\n"
