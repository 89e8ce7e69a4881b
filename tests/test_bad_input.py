"""Bad input of every kind: status 2, one sentence that says what to do, nothing written or lost.

Each case is (what makes its files or None, the command, a part of the sentence).  Every command
runs in a folder that holds images.npz, points.npy, a run of each ("images", and "points", which has
steps to go) and stats.npz.  Payloads make a folder if they are unpickled, which would be seen.
"""

import gzip
import io
import json
import os
import pickle
import shutil
import struct
import tarfile
import warnings
import zipfile
import zlib
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import evaluate
import train

TINY = "--width 8 --blocks 1 --batch 4 --ref-batch 8 --warmup 0 --sample-steps 1 --eval-every 0"


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    folder, rng = tmp_path_factory.mktemp("template"), np.random.default_rng(0)
    here = os.getcwd()
    os.chdir(folder)
    try:
        np.save("points.npy", rng.standard_normal((20, 2)).astype("f4"))
        np.savez("images.npz", images=rng.integers(0, 256, (20, 8, 8, 3), dtype=np.uint8),
                 labels=np.arange(20) % 2)
        for argv in [f"--data points.npy --steps 2 --checkpoint-every 1 --out points {TINY}",
                     f"--data images.npz --steps 1 --cond --mult 1 --out images {TINY}"]:
            assert train.main(argv.split()) == 0
        Path("points/checkpoint-0000002.pt").unlink()
        assert evaluate.main("fid points --num 8 --steps 1 --save-stats stats.npz".split()) == 0
    finally:
        os.chdir(here)
    return folder


@pytest.fixture
def folder(template, tmp_path, monkeypatch):
    shutil.copytree(template, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")


def tree():
    return {str(p): p.read_bytes() if p.is_file() else None for p in sorted(Path().rglob("*"))}


class Hostile:
    def __reduce__(self):
        return os.mkdir, ("owned",)


HOSTILE = np.array([Hostile()] * 3, dtype=object)


def test_the_payload_would_be_seen_and_what_is_whole_is_taken(folder, capsys):
    pickle.loads(pickle.dumps(Hostile()))
    assert Path("owned").is_dir()
    write("whole.zip", zipped(PNGS)), write("whole.npy", claims("(3, 4, 4)", bytes(48)))
    write("whole.tar", tar({"data_batch_1.bin": bytes(6146)}))
    write("whole-idx3-ubyte", idx(3, 4, 4) + bytes(48))
    for line in ["fid points --num 8 --steps 1 --ref stats.npz", "sample images --num 2 --steps 1"]:
        assert evaluate.main(line.split()) == 0
    for data in ("whole.zip", "whole.tar", "whole-idx3-ubyte", "whole.npy"):
        assert train.main(f"--data {data} --dry-run {TINY} --mult 1".split()) == 0
    assert train.main(["--resume", "points"]) == 0


# ---- What makes the files ------------------------------------------------------------------------

def write(name, content):
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    Path(name).write_bytes(content)


def cut(name, keep=0.5):
    write(name, Path(name).read_bytes()[:int(keep * Path(name).stat().st_size)])


def png(*size):
    file = io.BytesIO()
    Image.new("RGB", size or (4, 4), "red").save(file, "PNG")
    return file.getvalue()


def png_claims(width, height):
    """A tiny PNG whose header promises a large picture, under a right checksum."""
    head = struct.pack(">II", width, height)
    start = png()[12:16] + head + png()[24:29]
    return png()[:12] + start + struct.pack(">I", zlib.crc32(start)) + png()[33:]


PNGS, GRAY = {"a.png": png(), "b.png": png()}, np.zeros((3, 4, 4), np.uint8)


def zipped(members, size=None, flag=None):
    """A zip; its directory then promises members of so many bytes, or tells of encryption."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    content = bytearray(file.getvalue())
    for i in range(len(content)):
        if content[i:i + 4] == b"PK\1\2":
            content[i + 24:i + 28] = struct.pack("<I", size) if size else content[i + 24:i + 28]
            content[i + 8:i + 10] = struct.pack("<H", flag) if flag else content[i + 8:i + 10]
    return bytes(content)


def beside(content):
    return zipped({"a.png": png(), "b.png": content})


def labelled(text):
    return zipped(PNGS | {"dataset.json": b'{"labels":' + text.encode()})


def npz(**arrays):
    file = io.BytesIO()
    np.savez(file, **arrays)
    return file.getvalue()


def npy(x):
    file = io.BytesIO()
    np.save(file, x)
    return file.getvalue()


def claims(shape, content=b"", kind="|u1"):
    """An .npy whose header says so."""
    head = f"{{'descr': '{kind}', 'fortran_order': False, 'shape': {shape}}}\n".encode()
    return b"\x93NUMPY\1\0" + struct.pack("<H", len(head)) + head + content


def tar(members, mode="w"):
    """A tar of files, or of links where a member's content is a path."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode=mode) as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            if isinstance(content, str):
                info.type, info.linkname, content = tarfile.SYMTYPE, content, b""
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return file.getvalue()


def tar_claims(size):
    """A tar whose only member's header promises so many bytes, under a right checksum."""
    content = bytearray(tar({"data_batch_1.bin": bytes(3073)}))
    content[124:136], content[148:156] = b"%011o\0" % size, b" " * 8
    content[148:156] = b"%06o\0 " % sum(content[:512])
    return bytes(content)


def idx(*shape):
    return struct.pack(f">{len(shape) + 1}i", 0x800 + len(shape), *shape)


def saved(value, protocol=2):
    file = io.BytesIO()
    torch.save(value, file, pickle_protocol=protocol)
    return file.getvalue()


def checkpoint(**changes):
    """Changes points' checkpoint: name=value, or name=GONE to leave the name out."""
    state = torch.load(CHECKPOINT, weights_only=True) | changes
    write(CHECKPOINT, saved({k: v for k, v in state.items() if v is not GONE}))


def weights(change):
    """Changes every tensor of all weights in points' checkpoint."""
    state = torch.load(CHECKPOINT, weights_only=True)
    checkpoint(model={k: change(v) for k, v in state["model"].items()},
               ema={n: {k: change(v) for k, v in e.items()} for n, e in state["ema"].items()})


def optimizer(change):
    state = torch.load(CHECKPOINT, weights_only=True)["optimizer"]
    change(state)
    checkpoint(optimizer=state)


def options(run="points", **changes):
    """Changes options.json alone; _ in a name stands for -."""
    path = Path(run, "options.json")
    stored = json.loads(path.read_text()) | {k.replace("_", "-"): v for k, v in changes.items()}
    path.write_text(json.dumps(stored, indent=1) + "\n")


def without(name):
    path = Path("points/options.json")
    stored = json.loads(path.read_text())
    del stored[name]
    path.write_text(json.dumps(stored))


def statistics(**changes):
    with np.load("stats.npz") as file:
        write("stats.npz", npz(**dict(file) | changes))


def folder_at(name):
    Path(name).unlink(missing_ok=True)
    os.mkdir(name)


# ---- Cases ---------------------------------------------------------------------------------------

CHECKPOINT, GONE = "points/checkpoint-0000001.pt", object()
TRAIN = f"train --steps 1 --out new {TINY} --data"
NEW, IMAGES = f"{TRAIN} points.npy", f"{TRAIN} images.npz"
RESUME, SAMPLE = "train --resume points", "evaluate sample points --num 4 --steps 1"
STATS = "evaluate fid points --num 8 --steps 1 --ref stats.npz"
INCEPTION = "evaluate fid images --num 4 --steps 1 --inception x.pth"

OPTIONS = {name: (None, *case) for name, case in {
    "an option that is none": (f"{NEW} --los dsm", "--los"),
    "a word too much": (f"{NEW} more", "more"),
    "two lines": ([*NEW.split(), "a\nb"], "a?b"),
    "a name that rules the terminal": (["train", "--resume", "a\x1b[2J"], "a?[2J"),
    "no value": (f"{NEW} --batch", "--batch: expected one"),
    "not a whole number": (f"{NEW} --batch 1e3", "--batch: invalid int"),
    "not finite": (f"{NEW} --lr nan", "nan"),
    "infinite": (f"{NEW} --P-mean inf", "within [-10, 10]"),
    "two averages alike": (f"{NEW} --ema 5,5", "--ema"),
    "an average of nothing": (f"{NEW} --ema 0", "--ema"),
    "an average of more than all": (f"{NEW} --ema 0.1,0.2801", "--ema"),
    "two widths alike": (f"{NEW} --ema 0.1,0.10", "--ema"),
    "all rows held out": (f"{NEW} --holdout 1", "nothing to train on"),
    "amp": (f"{NEW} --amp fp7", "bf16"),
    "micro-batch 0": (f"{NEW} --micro-batch 0", "--micro-batch"),
    "a covariance of one": (f"{NEW} --fid-num 1", "at least 2"),
    "no weights of Inception": (f"{IMAGES} --mult 1 --fid-every 1 --fid-features inception "
                                "--inception missing.pth", "missing.pth"),
    "Inception for points": (f"{NEW} --fid-every 1 --fid-features inception", "pixels for points"),
    "a preset that is none": ("train --preset imagenet", "ffhq64"),
    "a preset without its data": ("train --preset ffhq64", "needs your --data"),
    "a preset of images for points": ("train --preset ffhq64 --data points.npy", "--size"),
    "more steps than the ladder": (f"{NEW} --schedule ddpm --sample-steps 1001", "choose fewer"),
    "more memory than there is": (f"{NEW} --width 10000000000", "--width"),
    "no end of blocks": (f"{NEW} --blocks 100000000000000000000", "choose another"),
    "a width that is odd": (f"{NEW} --width 7", "even"),
    "more levels than pixels": (f"{IMAGES} --mult 1,1,1,1,1", "divisible"),
    "a mixed-up arch": (f"{NEW} --arch adm", "--arch mlp is for points"),
    "a seed below 0": (f"{NEW} --seed -1", "--seed"),
    "no such GPU": (f"{NEW} --device cuda:99", "--device"),
    "a folder in use": (f"{NEW} --out points", "not empty"),
    "a folder in a file": (f"{NEW} --out points.npy/run", "--out"),
    "a folder with a NUL": ([*NEW.split(), "--out", "a\0b"], "--out"),
    "a cache in a file": ("train --data cifar10 --data-dir points.npy", "--data-dir"),
    "compare nothing": (f"{NEW} --compare ,", "--loss"),
    "compare what is none": (f"{NEW} --compare dsm,gan", "'gan'"),
    "compare with half an option": (f"{NEW} --compare dsm:batch", "--batch"),
    "compare on different data": (f"{NEW} --compare dsm:data=ring", "no option of one objective"),
    "compare into two folders": (f"{NEW} --compare dsm:out=x", "no option of one objective"),
    "compare a resumed run": ("train --resume points --compare dsm", "leave --resume out"),
    "compare by weight": (f"{NEW} --compare dsm --equal joules", "joules"),
    "an unset variable, data": ([*NEW.split(), "--data", ""], "data is empty"),
    "an unset variable, run": ([*NEW.split(), "--resume", ""], "resume is empty"),
    "an unset variable, folder": (["evaluate", "weights", "--out="], "out is empty"),
    "resume what is a file": ("train --resume points.npy", "points.npy/options.json"),
    "resume nothing": ("train --resume", "no run under runs/"),
    "resume what is done": ("train --resume images", "larger number"),
    "resume with another rate": (f"{RESUME} --lr 1", "cannot change --lr"),
    "init from nothing": (f"{NEW} --init nowhere", "nowhere"),
    "init with another width": ("train --init points --width 16", "cannot change --width"),
    "init from other data's run": ("train --init images --data points.npy", "no labels"),
    "a head without its run": ("train --init nowhere --head npr", "nowhere"),
    "no command": ("evaluate", "COMMAND"),
    "a command that is none": ("evaluate paint points", "gradvar"),
    "sample nothing": ("evaluate sample nowhere", "no checkpoint"),
    "sample data": ("evaluate sample points.npy", "name another"),
    "sample into what is no picture": (f"{SAMPLE} --out x.gif", "--out"),
    "sample a class that is none": ("evaluate sample images --class cat", "choose one of 0, 1"),
    "sample with a choice of others": (f"{SAMPLE} --sampler heun --rtol 0.1", "rk45"),
    "sample weights that are none": (f"{SAMPLE} --weights 77", "choose raw, ema, one of 20000,"),
    "a width of a run without": (f"{SAMPLE} --weights 0.1", "averaged no width"),
    "a width that is none": (f"{SAMPLE} --weights 0.3", "averaged no width"),
    "fid of nothing": ("evaluate fid nowhere --ref points.npy", "'nowhere'"),
    "fid of one": ("evaluate fid points.npy --ref points.npy --num 1", "within [2, 20]"),
    "fid with nothing": ("evaluate fid points.npy --ref nowhere.npz", "nowhere.npz"),
    "fid without reference": ("evaluate fid points.npy", "--ref"),
    "fid of other shapes": ("evaluate fid points --num 4 --ref images.npz", "[3, 8, 8]"),
    "fid of images through a sampler": ("evaluate fid points.npy --ref points.npy --sampler ddim",
                                        "belongs to a RUN"),
    "fid into what are no statistics": ("evaluate fid points --num 8 --save-stats x.csv", ".npz"),
    "nfe of nothing": ("evaluate nfe nowhere", "no checkpoint"),
    "nfe of too many": ("evaluate nfe points --num 11", "half of the data"),
    "nfe in no steps": ("evaluate nfe points --steps 2 0", "--steps"),
    "nfe into a file": ("evaluate nfe points --num 4 --out points.npy", "--out"),
    "weights into a file's folder": ("evaluate weights --out points.npy/x", "--out"),
    "variance of nothing": ("evaluate variance --data nowhere", "'nowhere'"),
    "variance of points cropped": ("evaluate variance --data points.npy --size 4", "--size"),
    "variance at no noise": ("evaluate variance --data points.npy --levels 1 0", "above 0"),
    "ess of no references": ("evaluate ess --data points.npy --n 0", "--n"),
    "data of one row": ("evaluate data points.npy --num 1", "larger --num"),
    "data left out": ("evaluate data", "SET"),
    "denoise a run's data and others": ("evaluate denoise points --data ring", "--data"),
    "denoise nothing": ("evaluate denoise nowhere", "no checkpoint"),
    "mse of a picture too large": ("evaluate mse --data images.npz --size 5000", "4096"),
    "trajectories beyond numbers": ("evaluate trajectories --levels 1e300", "not finite"),
    "gap on no device": ("evaluate gap points --device abacus", "--device"),
    "gap into a file": ("evaluate gap points --num 2 --out points.npy", "--out"),
    "gradvar of an order 3": ("evaluate gradvar --data points.npy --orders 3", "[0, 2]"),
    "gradvar of a run and a set": ("evaluate gradvar points --data checkerboard", "leave it out"),
    "gradvar of references too few": ("evaluate gradvar --data points.npy --n 1", "larger --n"),
}.items()}

FILES = {          # name: (file, its bytes, a part of the sentence); the readers take turns
    "a kind unknown": ("x.txt", b"text", "known kind"),
    "a pickle": ("x.pkl", pickle.dumps(Hostile()), "known kind"),
    "a file no image": ("x.zip", beside(b"text"), "x.zip/b.png"),
    "half a picture": ("x.zip", beside(png()[:45]), "x.zip/b.png"),
    "a picture of 3.6 billion pixels": ("x.zip", beside(png_claims(60_000, 60_000)), "bomb"),
    "a picture of 144 million pixels": ("x.zip", beside(png_claims(12_000, 12_000)), "b.png"),
    "a picture of nothing": ("x.zip", beside(png_claims(0, 4)), "x.zip/b.png"),
    "a zip that climbs": ("x.zip", zipped({"../../a.png": png(), "../b.png": png()}), "least two"),
    "a zip from the root": ("x.zip", zipped({"/tmp/a.png": png(), "/b.png": b"-"}), "replace it"),
    "a zip with lines in its names": ("x.zip", zipped({"a\nb\x1b.png": b"-", "c.png": png()}),
                                      "a?b?.png"),
    "a zip of 2 GB": ("x.zip", zipped(PNGS, size=2 ** 31 - 1), "2,147,483,647 bytes"),
    "a zip that promises too little": ("x.zip", zipped(PNGS, size=10), "a.png"),
    "a zip under a password": ("x.zip", zipped(PNGS, flag=1), "password"),
    "half a zip": ("x.zip", zipped(PNGS)[:200], "x.zip"),
    "a dataset.json of 2 GB": ("x.zip", zipped(PNGS | {"dataset.json": b"{}"}, size=2 ** 31 - 1),
                               "dataset.json"),
    "labels nested without end": ("x.zip", labelled("[" * 100_000), "dataset.json"),
    "a label of 5000 digits": ("x.zip", labelled('[["a.png", %s], ["b.png", 0]]}' % ("9" * 5000)),
                               "dataset.json"),
    "a label that is text": ("x.zip", labelled('[["a.png", "cat"], ["b.png", "dog"]]}'),
                             "whole numbers"),
    "labels of files that climb": ("x.zip", labelled('[["../a.png", 0], ["b.png", 1]]}'),
                                   "disagree"),
    "labels below 0": ("x.npz", npz(images=GRAY, labels=np.array([0, 1, -1])), "whole numbers"),
    "labels too few": ("x.npz", npz(images=GRAY, labels=np.array([0, 1])), "one label for each"),
    "hostile points": ("x.npy", npy(HOSTILE), "x.npy"),
    "hostile images": ("x.npz", npz(images=HOSTILE), "x.npz"),
    "hostile labels": ("x.npz", npz(images=GRAY, labels=HOSTILE), "x.npz"),
    "a pickle in an npz": ("x.npz", zipped({"images.npy": pickle.dumps(Hostile())}), "x.npz"),
    "a pickle for an npz": ("x.npz", pickle.dumps(Hostile()), "x.npz"),
    "a header of objects": ("x.npy", claims("(3,)", pickle.dumps(Hostile()), "|O"), "x.npy"),
    "a header that is a program": ("x.npy", claims("__import__('os').mkdir('owned')"), "x.npy"),
    "an npy of 16 TB": ("x.npy", claims("(1000000000000, 4, 4)", bytes(99)), "x.npy"),
    "an npz of 16 TB": ("x.npz", zipped({"images.npy": claims("(1000000000000, 4, 4)")}), "x.npz"),
    "an npz of 8 GB": ("x.npz", zipped({"images.npy": npy(GRAY), "labels.npy": b""},
                                       size=2 ** 32 - 2), "bytes are more"),
    "an npy of -3 rows": ("x.npy", claims("(-3, 4)", bytes(99)), "x.npy"),
    "half an npy": ("x.npy", npy(GRAY)[:-9], "x.npy"),
    "points beyond float32": ("x.npy", npy(np.full((3, 2), 1e300)), "infinite"),
    "complex points": ("x.npy", npy(np.ones((3, 2), complex)), "store uint8"),
    "points of words": ("x.npy", npy(np.array([["a", "b"]] * 3)), "store uint8"),
    "images of 5 channels": ("x.npy", npy(np.zeros((3, 5, 4, 4), np.uint8)), "store uint8"),
    "a tar that climbs": ("x.tar", tar({"../data_batch_1.bin": bytes(99)}), "3073"),
    "a tar of links": ("x.tar", tar({"data_batch_1.bin": "/etc/passwd"}), "neither data_batch"),
    "a tar of 8 GB": ("x.tar", tar_claims(8 ** 11 - 1), "cifar-10-binary.tar.gz"),
    "half a tar.gz": ("x.tgz", tar({"data_batch_1.bin": bytes(3073)}, "w:gz")[:99], "x.tgz"),
    "a label of CIFAR-10 above 9": ("x.bin", b"\x0a" * 6146, "0 to 9"),
    "an idx of 10^28 bytes": ("x-idx3-ubyte", idx(*[2 ** 31 - 1] * 3), "bytes are more"),
    "half an idx.gz": ("x-idx3-ubyte.gz", gzip.compress(idx(3, 4, 4) + bytes(48))[:-12], "idx3"),
    "an idx too short": ("x-idx3-ubyte", idx(3, 4, 4) + bytes(47), "48 bytes"),
}
READERS = (f"{TRAIN} ", "evaluate data ", "evaluate ess --data ", "evaluate variance --data ")
DATA = {name: (partial(write, file, content), READERS[i % 4] + file, part)
        for i, (name, (file, content, part)) in enumerate(FILES.items())} | {
    "a name of no set": (None, f"{TRAIN} cifar-100", "digits"),
    "a checkpoint for data": (None, f"{TRAIN} {CHECKPOINT}", "known kind"),
    "an empty folder": (partial(os.mkdir, "x"), "evaluate data x", "at least two"),
    "a folder with a file no image": (lambda: [write(f"x/{n}.png", png()[:n]) for n in (99, 9)],
                                      f"{TRAIN} x", "x/9.png"),
    "a folder of a link to nothing": (lambda: (os.mkdir("x"), os.symlink("/none", "x/a.png")),
                                      f"{TRAIN} x", "x/a.png"),
    "idx labels too few": (lambda: (write("x-images-idx3-ubyte", idx(3, 4, 4) + bytes(48)),
                                    write("x-labels-idx1-ubyte", idx(2) + bytes(2))),
                           f"{TRAIN} x-images-idx3-ubyte", "one label for each"),
    "data that has changed": (partial(np.save, "points.npy", GRAY), RESUME, "other data"),
    "data that is gone": (partial(os.remove, "points.npy"), "evaluate gap points", "'points.npy'"),
    "data of a run that is cut": (partial(cut, "points.npy"), RESUME, "points.npy"),
}

RUNS = {
    "an empty checkpoint": (partial(write, CHECKPOINT, b""), SAMPLE, "move it away"),
    "half a checkpoint": (lambda: cut(CHECKPOINT), RESUME, "move it away"),
    "a checkpoint of text": (partial(write, CHECKPOINT, b"text"), "evaluate mse points", "damaged"),
    "a checkpoint of zeros": (partial(write, CHECKPOINT, bytes(999)), RESUME, "damaged"),
    "a checkpoint that is a folder": (lambda: folder_at(CHECKPOINT), SAMPLE, "damaged"),
    "a hostile checkpoint": (partial(write, CHECKPOINT, saved({"options": Hostile()})), RESUME,
                             "damaged"),
    "a hostile tensor": (lambda: checkpoint(beta=Hostile()), SAMPLE, "damaged"),
    "a pickle for a checkpoint": (partial(write, CHECKPOINT, pickle.dumps(Hostile())), SAMPLE,
                                  "damaged"),
    "a hostile best checkpoint": (partial(write, "points/best.pt", saved(Hostile(), 4)),
                                  "evaluate fid points/best.pt --num 8", "best.pt is damaged"),
    "a hostile run to start from": (partial(write, CHECKPOINT, saved([Hostile()])),
                                    "train --init points --head npr --out new", "damaged"),
    "a checkpoint that is a list": (partial(write, CHECKPOINT, saved([1, 2])), RESUME, "damaged"),
    "a step that is text": (lambda: checkpoint(step="1"), RESUME, "damaged"),
    "no step": (lambda: checkpoint(step=GONE), SAMPLE, "damaged"),
    "no averages": (lambda: checkpoint(ema=GONE), RESUME, "damaged"),
    "averages that are a list": (lambda: checkpoint(ema=[1]), SAMPLE, "damaged"),
    "averages of no half-life": (lambda: checkpoint(ema={}), SAMPLE, "--weights"),
    "averages of another half-life": (lambda: checkpoint(ema={"7": {}}), RESUME, "name another"),
    "weights of other shapes": (lambda: weights(lambda w: w[..., None]), RESUME, "not of this"),
    "weights that are text": (lambda: weights(str), SAMPLE, "not of this"),
    "weights without names": (lambda: checkpoint(model={1: torch.ones(1)}),
                              f"{SAMPLE} --weights raw", "not of this"),
    "options that are a list": (lambda: checkpoint(options=[1]), SAMPLE, "damaged"),
    "options without a network": (lambda: checkpoint(options={}), SAMPLE, "the options of points"),
    "skipped steps that are a number": (lambda: checkpoint(skipped=3), RESUME, "damaged"),
    "a best that is text": (lambda: checkpoint(best="good"), RESUME, "damaged"),
    "no scaler": (lambda: checkpoint(scaler=GONE), RESUME, "damaged"),
    "no optimizer": (lambda: checkpoint(optimizer={}), RESUME, "optimizer"),
    "an optimizer of two groups": (lambda: optimizer(lambda o: o["param_groups"].append(
        o["param_groups"][0])), RESUME, "optimizer"),
    "an optimizer of other shapes": (lambda: optimizer(lambda o: o["state"][0].update(
        exp_avg=torch.ones(3))), RESUME, "optimizer"),
    "options.json of text": (partial(write, "points/options.json", b"text"), RESUME, "cannot use"),
    "all held out in options.json": (lambda: options(holdout=1), RESUME, "holdout"),
    "options.json that is empty": (partial(write, "points/options.json", b""),
                                   "train --init points --head npr", "options.json"),
    "half of options.json": (lambda: cut("points/options.json"), RESUME, "options.json"),
    "options.json in no encoding": (partial(write, "points/options.json", b"\xff\xfe"), RESUME,
                                    "options.json"),
    "options.json that is a list": (partial(write, "points/options.json", b"[]"), RESUME,
                                    "options.json"),
    "options.json that is a folder": (lambda: folder_at("points/options.json"), RESUME,
                                      "options.json"),
    "options.json without a seed": (lambda: without("seed"), RESUME, "'seed'"),
    "options.json without classes": (lambda: without("classes"), RESUME, "'classes'"),
    "steps in words": (lambda: options(steps="many"), RESUME, "steps in"),
    "a batch of 0": (lambda: options(batch=0), RESUME, "batch in"),
    "a path that is a number": (lambda: options(data=5), RESUME, "data is 5"),
    "a path that is nothing": (lambda: options(data=None), RESUME, "data is None"),
    "averages that are a number": (lambda: options(ema=2000), RESUME, "ema is 2000"),
    "classes that are a number": (lambda: options(classes=5), RESUME, "other data"),
    "a shape of nothing": (lambda: options(shape=[]), RESUME, "other data"),
    "a yes for True": (lambda: options("images", cond="yes"), "train --init images", "cond is yes"),
    "a loss that is none": (lambda: options(loss="gan"), RESUME, "loss is gan"),
    "a schedule that is none": (lambda: options(schedule="cosine"), "train --init points",
                                "mend it"),
    "a log of text": (partial(write, "points/log.jsonl", b"text}\n"), RESUME, "log.jsonl"),
    "a log without steps": (partial(write, "points/log.jsonl", b'{"loss": 1}\n'), RESUME, "'step'"),
    "a log in no encoding": (partial(write, "points/log.jsonl", b'{"step": 1}\n\xff}\n'), RESUME,
                             "log.jsonl"),
    "a log of steps in words": (partial(write, "points/log.jsonl", b'{"step": "1"}\n'), RESUME,
                                "log.jsonl"),
    "a log that is a folder": (lambda: folder_at("points/log.jsonl"), RESUME, "log.jsonl"),
    "moments cut short": (partial(write, "points/analytic-ema-0000001.json", b"{"),
                          f"{SAMPLE} --sampler ddpm --variance analytic", "delete it"),
    "moments in words": (partial(write, "points/analytic-ema-0000001.json",
                                       b'{"levels": "ab", "moments": [1]}'),
                         f"{SAMPLE} --sampler ddpm --variance analytic", "delete it"),
}

MEASURES = {
    "hostile statistics": (lambda: statistics(mean=HOSTILE), STATS, "stats.npz"),
    "a pickle for statistics": (lambda: write("stats.npz", pickle.dumps(Hostile())), STATS,
                                "--save-stats"),
    "half of the statistics": (lambda: cut("stats.npz"), STATS, "stats.npz"),
    "statistics without a count": (lambda: write("stats.npz", npz(cov=np.eye(2), mean=np.ones(2))),
                                   STATS, "stats.npz"),
    "statistics of other features": (lambda: statistics(features="inception 0"), STATS,
                                     "inception 0"),
    "a mean of other size": (lambda: statistics(mean=np.ones(3)), STATS, "stats.npz"),
    "a covariance of other size": (lambda: statistics(cov=np.eye(3)), STATS, "stats.npz"),
    "a covariance that is a line": (lambda: statistics(cov=np.ones(2)), STATS, "stats.npz"),
    "a covariance of NaN": (lambda: statistics(cov=np.full((2, 2), np.nan)), STATS, "stats.npz"),
    "a mean of words": (lambda: statistics(mean=np.array(["a", "b"])), STATS, "stats.npz"),
    "a count in words": (lambda: statistics(n="many"), STATS, "stats.npz"),
    "statistics that are a folder": (lambda: folder_at("stats.npz"), STATS, "stats.npz"),
    "hostile weights of Inception": (lambda: write("x.pth", saved({"a": Hostile()}, 4)), INCEPTION,
                                     evaluate.INCEPTION_URL),
    "weights of another network": (lambda: write("x.pth", saved({"a": torch.ones(1)})), INCEPTION,
                                   evaluate.INCEPTION_URL),
    "half of the weights": (lambda: (write("x.pth", saved({"a": torch.ones(99)})), cut("x.pth")),
                            INCEPTION, evaluate.INCEPTION_URL),
    "a picture where the table goes": (lambda: os.makedirs("plots/weights.csv"), "evaluate weights",
                                       "--out"),
}
CASES = {f"{kind}: {name}": case for kind, cases in dict(
    options=OPTIONS, data=DATA, runs=RUNS, measures=MEASURES).items()
    for name, case in cases.items()}


@pytest.mark.parametrize("name", CASES)
def test_bad_input_costs_one_sentence(name, folder, capsys):
    make, line, part = CASES[name]
    if make:
        make()
    before = tree()
    tool, *argv = line.split() if isinstance(line, str) else line
    with warnings.catch_warnings(record=True) as said:        # they, too, would stand on stderr
        warnings.simplefilter("always")
        status = dict(train=train, evaluate=evaluate)[tool].main(argv)
    error = capsys.readouterr().err
    assert status == 2 and error.startswith(f"{tool}.py: ") and error.count("\n") == 1, error
    assert part in error and "Traceback" not in error and len(error) > 30, error
    assert not [w.message for w in said if issubclass(w.category, (UserWarning, RuntimeWarning))]
    assert tree() == before and not Path("owned").exists()


def test_every_command_and_kind_has_its_cases():
    lines = [line.split() if isinstance(line, str) else line for _, line, _ in CASES.values()]
    asked = {line[1] for line in lines if line[0] == "evaluate" and len(line) > 1}
    assert asked >= {"sample", "fid", "nfe", *evaluate.FIGURES} and len(CASES) >= 60
