"""What people get wrong costs one sentence that says what to do: status 2, nothing written or lost.

A case is (what makes its files, or None; the command; a part of the sentence).  Every command runs
in a folder with images.npz, points.npy and a run of each: "images", and "points", whose last step
is still to come.  Payloads make a folder if they are unpickled, which would be seen.
"""

import errno
import io
import os
import pickle
import shlex
import shutil
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

import evaluate
import train
from networks import Denoiser
from test_data import encoded, idx, noise, pngs, write

TINY = "--width 8 --blocks 1 --batch 4 --ref-batch 8 --warmup 0 --sample-steps 1 --eval-every 0"


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    folder = tmp_path_factory.mktemp("template")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        np.save("points.npy", np.random.default_rng(0).standard_normal((20, 2)).astype("f4"))
        np.savez("images.npz", images=noise(20, 8, 8, 3), labels=np.arange(20) % 2)
        for argv in [f"--data points.npy --steps 3 --checkpoint-every 1 --out points {TINY}",
                     f"--data images.npz --steps 1 --cond --mult 1 --out images {TINY}"]:
            assert train.main(argv.split()) == 0
        Path("points/checkpoint-0000003.pt").unlink()
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
    """A file of bytes or an array; or a .zip, .tar.gz, .npz or folder of a dict."""
    if isinstance(content, np.ndarray):
        np.save(path, content)
    elif isinstance(content, bytes):
        write("", {path: content})
    elif path.endswith(".npz"):
        np.savez(path, **content)
    else:
        write(path, content)


def checkpoint(**changes):
    """Changes the checkpoint of points."""
    torch.save(torch.load(CHECKPOINT, weights_only=True) | changes, CHECKPOINT)


# ---- Cases ---------------------------------------------------------------------------------------

GRAY = noise(4, 4, 4)
PNGS = pngs(GRAY)
HOSTILE = np.array([Hostile()] * 4, dtype=object)
CHECKPOINT = "points/checkpoint-0000002.pt"
TRAIN = f"train --steps 1 --out new {TINY} --data"
IMAGES, POINTS, RESUME = f"{TRAIN} images.npz", f"{TRAIN} points.npy", "train --resume points"
SAMPLE, FID = "evaluate sample points --num 4 --steps 1", "evaluate fid points --num 8 --steps 1"

OPTIONS = {                    # beside those of IMAGES: a part of the sentence
    "--los dsm": "--los", "--loss gan": "--loss", "--data nothing.zip": "nothing.zip",
    "--data ''": "no file, folder or data set ''",
    "--batch 9": "whose rows are among the references",      # and --ref-batch 8
    "--batch 0": "--batch 0 is not within [1, 65536]", "--steps many": "--steps",
    "--lr nan": "--lr", "--beta2 1": "--beta2", "--width 5": "--width",
    "--width 2048 --batch 65536 --ref-batch 65536": "choose a --micro-batch of at most",
    "--mult 1,x": "--mult", "--mult 0,1": "--mult", "--attend 2 --mult 1,1": "--attend",
    "--mult 1,1,1,1,1": "choose another --size, --width or --mult", "--arch mlp": "--arch mlp",
    "--label-dropout 0.1": "--label-dropout needs --cond", "--device abacus": "--device abacus",
    "--holdout 1": "--holdout 1", "--data ring --holdout 9": "on new rows",
    "--out images": "images is not empty",
    "--out images.npz": "choose another --out", "--init nowhere": "nowhere",
    "--head sn": "--head needs --init",
    "--head sn --init images --weight debias": "--weight and --ref-batch: a head has its own",
    "--loss dsm --K 3": "--K belongs to --loss sa",
    "--order 1": "--order belongs to --loss taylor",
    "--schedule ddpm --P-mean 0": "--P-mean belongs to --schedule edm",
    "--sample-steps 501": "not within [1, 500]",
    "--loss taylor --precondition x0": "--precondition x0", "--preset imagenet": "--preset",
    "--preset ffhq64 --data two-gaussians": "--size",
    "--data points.npy --cond": "--cond: points has no labels",
    "--data points.npy --fid-every 1 --fid-features inception": "pixels for points",
    "--data cifar10 --data-dir points.npy": "--data-dir",
} | {f"--data points.npy {option}": option.split()[0] for option in (
    "--augment 0.1", "--xflip", "--size 8", "--arch unet", "--label-dropout 0.1 --cond",
    "--dropout 0.1", "--mult 1,2", "--attend 8")}

COMMANDS = {
    "train --resume": "there is no run under runs/", "train --resume ''": "'' does not exist",
    "train --resume nowhere": "'nowhere' does not exist",
    "train --resume images.npz": "name the folder",
    "train --resume nowhere --preset mnist": "leave out --preset",
    f"{RESUME} --lr 1": "--lr 1.0 (was 0.005)", f"{RESUME} --out other": "--out other",
    f"{RESUME} --steps 1": "--steps", f"{RESUME} --micro-batch 0": "--micro-batch",
    f"{RESUME} --data ring": "other data", f"{RESUME} --device abacus": "--device",
    "train --resume images": "has taken 1 steps",
    "evaluate sample nowhere": "'nowhere' does not exist",
    "evaluate sample .": "has no checkpoint", f"{SAMPLE} --out x.gif": ".png",
    f"{SAMPLE} --sampler ddim --variance beta": "ddpm",
    f"{SAMPLE} --sampler ddpm --variance npr": "--head npr",
    f"{SAMPLE} --sampler edm-stochastic --S_noise 2": "need --S_churn",
    "evaluate sample images --guidance 2": "--label-dropout",
    "evaluate sample images --class cat": "choose one of 0, 1",
    f"{SAMPLE} --class 1": "leave the option out", f"{SAMPLE} --weights 77": "raw, ema and 20000",
    f"{FID} --ref images.npz": "shape (3, 8, 8)",
    "evaluate fid images --ref points.npy": "choose images"}

FILES = {          # name: (file, its content, a part of the sentence)
    "a kind unknown": ("x.txt", b"text", ".png .jpg .jpeg"),
    "an empty folder": ("x", {"a.txt": b"text"}, "end in .png .jpg"),
    "a zip cut short": ("x.zip", b"PK\3\4 not a zip", "x.zip"),
    "three images": ("x.zip", pngs(GRAY[:3]), "at least 4"),
    "images not square": ("x.npy", noise(4, 4, 6), "image 0 of x.npy is 6x4"),
    "a tar of something else": ("x.tar.gz", {"a.txt": b"text"}, "has no data_batch_1.bin"),
    "a tar of Python's own": ("x.tar.gz", {"data_batch_1": b"text"}, "has no data_batch_1.bin"),
    "text called .npy": ("x.npy", b"words and words", "magic string is not correct"),
    "text called .npz": ("x.npz", b"text", "no .npz file"),
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
    "other classes than those of --init": (
        partial(np.savez, "x.npz", images=noise(6, 8, 8, 3), labels=[0, 1, 2] * 2),
        f"{TRAIN} x.npz --init images", "has the classes 0, 1, and the data have 0, 1, 2"),
    "a hostile checkpoint": (partial(checkpoint, beta=Hostile()), RESUME, "damaged"),
    "half a checkpoint": (partial(put, CHECKPOINT, b"PK\3\4"), RESUME, f"{CHECKPOINT} is damaged"),
    "a checkpoint of something else": (partial(torch.save, [1, 2], CHECKPOINT), SAMPLE,
                                       "move it away"),
    "weights of another network": (partial(checkpoint, model={"a": torch.ones(1)}),
                                   f"{SAMPLE} --weights raw", "not of this network"),
    "options of another program": (partial(checkpoint, options={"lr": 1}), SAMPLE,
                                   "the options of points"),
    "no checkpoint": (partial(os.remove, CHECKPOINT), RESUME, "has no checkpoint"),
    "a damaged log": (partial(put, "points/log.jsonl", b"text}\n"), RESUME, "log.jsonl"),
    "half of Inception": (partial(put, f"data/{evaluate.INCEPTION}", b"PK\3\4"),
                          "evaluate fid images --num 4 --steps 1", "remove it"),
}
CASES = ({options: (None, f"{IMAGES} {options}", part) for options, part in OPTIONS.items()}
         | {line: (None, line, part) for line, part in COMMANDS.items()} | DATA | RUNS)


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
    (POINTS, "new/options.json")])
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


FULL = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nGPU 0 has ..")
MAPPED = RuntimeError("CUDA error: an illegal memory access was encountered")


@pytest.mark.parametrize("line, where, name, error", [
    (POINTS, Denoiser, "forward", FULL), (SAMPLE, Denoiser, "forward", FULL),
    (f"{TRAIN} images.npz --size 4", evaluate, "decode", MemoryError()),
    (SAMPLE, Denoiser, "forward", MAPPED)], ids=repr)
def test_lack_of_memory_is_told_and_another_fault_not_taken_for_it(line, where, name, error, folder,
                                                                   monkeypatch, capsys):
    def failing(*given, **more):
        raise error
    monkeypatch.setattr(where, name, failing)
    if error is MAPPED:
        with pytest.raises(RuntimeError, match="illegal"):
            command(line)
        return
    assert command(line) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert ("needs more memory than there is" if where is evaluate else "out of memory; ") in told


def test_class_names_beyond_the_terminals_letters_end_no_command(folder, monkeypatch):
    """Training on them, its report, a picture of one class, and the sentence for a wrong one."""
    def shown(line, status):
        streams = []
        for name in ("stdout", "stderr"):
            stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii", write_through=True)
            monkeypatch.setattr(sys, name, stream)
            streams.append(stream)
        assert command(line) == status
        return [stream.buffer.getvalue().decode() for stream in streams]
    for name in ("ключ", "猫"):
        write(f"pets/{name}", pngs(noise(4, 8, 8, 3)))
    out, _ = shown(f"train --data pets --cond --mult 1 --steps 1 --out run {TINY}", 0)
    assert "2 classes: ????, ?" in out
    out, _ = shown("evaluate sample run --num 2 --steps 1 --class 猫", 0)
    assert "class ?" in out
    out, error = shown("evaluate sample run --num 2 --steps 1 --class 犬", 2)
    assert error == "evaluate.py: --class ?: choose one of ????, ?\n"
