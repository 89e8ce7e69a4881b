"""Data sets: every reader against files made here, every refusal as one sentence, offline."""

import gzip
import hashlib
import http.server
import io
import json
import os
import pickle
import re
import struct
import tarfile
import threading
import zipfile
from unittest import mock

import numpy as np
import pytest
from PIL import Image

import datasets
from datasets import BadInput, load_data


def noise(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def png(x, mode=None, kind="PNG"):
    """The bytes of an image file of x, (H, W) or (H, W, 3)."""
    file, image = io.BytesIO(), Image.fromarray(x)
    (image.convert(mode) if mode else image).save(file, kind)
    return file.getvalue()


def write_zip(path, files, labels=()):
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
        if labels != ():
            archive.writestr("dataset.json", json.dumps({"labels": labels}))
    return path


def write_folder(path, files):
    for name, data in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(data)
    return path


def write_tar(path, files, mode="w:gz"):
    with tarfile.open(path, mode) as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def records(labels, x):
    return b"".join(bytes([k]) + image.tobytes() for k, image in zip(labels, x))


def idx(x):
    return struct.pack(f">{1 + x.ndim}i", 0x800 + x.ndim, *x.shape) + x.tobytes()


# ---- Built-in sets -------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def drawn():
    return datasets.digits(2000, seed=0)


def test_digits_are_deterministic_balanced_and_of_the_documented_shape(drawn):
    x, labels = drawn
    assert x.shape == (2000, 3, 16, 16) and x.dtype == np.uint8 and labels.dtype == np.int64
    assert (np.bincount(labels) == 200).all()
    again, fresh = datasets.digits(50, seed=7), datasets.digits(50, seed=8)
    assert (again[0] == datasets.digits(50, seed=7)[0]).all()
    assert (again[0] != fresh[0]).any() and (again[1] != fresh[1]).any()


def test_digits_fill_the_frame_without_leaving_it_and_stand_out(drawn):
    """Ink is recovered through the two colours: it must be whole, tall and in contrast."""
    x = drawn[0].astype(float).mean(1)                                           # (n, 16, 16)
    low, high = x.min((1, 2), keepdims=True), x.max((1, 2), keepdims=True)
    assert (high - low).mean() > 110 and (high - low).min() > 60
    ink = (x - low) / (high - low) > 0.4
    height = ink.any(2).sum(1)
    assert height.min() >= 9 and 11 < height.mean() < 15
    border = np.concatenate([ink[:, 0], ink[:, -1], ink[:, :, 0], ink[:, :, -1]], 1)
    assert border.mean() < 0.03                    # strokes touch it, none runs out over it
    assert 0.1 < ink.mean() < 0.4


def test_digits_are_legible_to_nearest_neighbours(drawn):
    """1-NN on normalised gray images, trained on 2000: 98 % of 500 fresh digits; chance 10 %."""
    def features(x):
        x = x.astype(float).mean(1).reshape(len(x), -1)
        x = x - x.mean(1, keepdims=True)
        return x / np.linalg.norm(x, axis=1, keepdims=True)
    fresh, truth = datasets.digits(500, seed=1)
    nearest = (features(fresh) @ features(drawn[0]).T).argmax(1)
    assert (drawn[1][nearest] == truth).mean() > 0.94


def test_load_data_digits_with_size(tmp_path, monkeypatch):
    few = datasets.digits(20)
    monkeypatch.setattr(datasets, "digits", lambda: few)
    whole, small = load_data("digits", tmp_path), load_data("digits", tmp_path, size=8)
    assert whole.x.shape == (20, 3, 16, 16) and (whole.x == few[0]).all()
    assert small.x.shape == (20, 3, 8, 8) and (small.labels == whole.labels).all()
    assert abs(small.x.mean() - whole.x.mean()) < 3
    assert whole.classes == list("0123456789") and whole.name == "digits"
    assert re.fullmatch("[0-9a-f]{12}", whole.fingerprint)
    assert whole.fingerprint != small.fingerprint
    assert whole.source == ("20 RGB images 16x16 from the built-in set digits, "
                            "10 classes: 0, 1, 2, 3, 4, 5, 6, 7, 8, 9")


@pytest.mark.parametrize("name", datasets.POINT_SETS)
def test_point_sets_have_mean_0_and_deviation_half(name):
    a, b = load_data(name), load_data(name)
    assert a.x.shape == (20_000, 64 if name.endswith("64d") else 2) and a.x.dtype == np.float32
    assert (a.x == b.x).all() and a.fingerprint == b.fingerprint
    assert np.abs(a.x.mean(0)).max() < 0.015 and np.abs(a.x.std(0) - 0.5).max() < 0.01


@pytest.mark.parametrize("name", ["two-gaussians", "two-gaussians-64d"])
def test_two_gaussians_are_the_documented_mixture(name):
    data = load_data(name)
    for k, mean in ((0, -0.48), (1, 0.48)):
        part = data.x[data.labels == k]
        assert len(part) == 10_000 and np.abs(part.mean(0) - mean).max() < 0.006
        assert np.abs(part.std(0) - 0.14).max() < 0.005
        assert np.abs(np.corrcoef(part.T) - np.eye(part.shape[1])).max() < 0.05
    assert data.classes == ["0", "1"]


def test_ring_is_eight_gaussians_on_a_circle():
    data, radius = load_data("ring"), (2 * (0.25 - 0.0049)) ** 0.5
    for k in range(8):
        part, angle = data.x[data.labels == k], k * np.pi / 4
        mean = radius * np.array([np.cos(angle), np.sin(angle)])
        assert len(part) == 2500 and np.abs(part.mean(0) - mean).max() < 0.006
        assert np.abs(np.cov(part.T) - 0.0049 * np.eye(2)).max() < 0.0006
    assert data.classes == list("01234567")


def test_checkerboard_has_one_colour_and_swiss_roll_is_a_spiral():
    board = load_data("checkerboard")
    square = np.floor(board.x * 4 / 3 ** 0.5).astype(int)              # -2 .. 1 in each direction
    assert square.min() == -2 and square.max() == 1 and (square.sum(1) % 2 == 0).all()
    assert len(np.unique(square, axis=0)) == 8 and board.labels is None and board.classes == []
    x = load_data("swiss-roll").x
    radius, angle = np.hypot(*x.T), np.arctan2(x[:, 1], x[:, 0])
    right = np.sort(radius[np.abs(angle) < 0.1])   # one ray meets the spiral in separate bands
    assert (np.diff(right) > 0.1).sum() == 1


# ---- Folders and zips ----------------------------------------------------------------------------

def test_folder_with_a_class_in_each_sub_folder(tmp_path):
    x = noise(5, 6, 6, 3)
    names = ["dog/2.png", "cat/b.png", "cat/a.PNG", "dog/deep/1.png", "ant/0.bmp"]
    files = {n: png(y, kind=n[-3:].upper()) for n, y in zip(names, x)}
    files |= dict.fromkeys(("notes.txt", "dog/read.me", "cat/._a.png", ".git/x.png"), b"no image")
    files = {n.replace("ant", "../elsewhere"): d for n, d in files.items()}
    folder = write_folder(tmp_path / "my pets!", files)
    (folder / "ant").symlink_to(tmp_path / "elsewhere")
    data = load_data(str(folder))
    assert data.classes == ["ant", "cat", "dog"] and data.labels.tolist() == [0, 1, 1, 2, 2]
    assert data.labels.dtype == np.int64 and data.name == "my-pets"
    assert (data.x == x[[4, 2, 1, 0, 3]].transpose(0, 3, 1, 2)).all()
    assert data.x.dtype == np.uint8 and data.x.flags.c_contiguous and data.x.flags.writeable


def test_folder_of_images_has_no_labels_and_the_first_decides_the_colours(tmp_path):
    gray, rgb = noise(2, 4, 4), noise(4, 4, 3)
    flat = write_folder(tmp_path / "gray", {"0.png": png(gray[0]), "1.png": png(rgb),
                                            "2.png": png(gray[1]), "3.png": png(rgb, "P")})
    data = load_data(str(flat))
    assert data.labels is None and data.classes == [] and data.x.shape == (4, 1, 4, 4)
    assert (data.x[[0, 2], 0] == gray).all()
    assert (data.x[1, 0] == np.asarray(Image.fromarray(rgb).convert("L"))).all()
    data = load_data(str(write_folder(tmp_path / "rgb", {"0.png": png(rgb), "1.png": png(gray[0]),
                                                         "2.png": png(rgb, "RGBA")})))
    assert data.x.shape == (3, 3, 4, 4) and (data.x[1] == gray[0]).all()
    assert (data.x[[0, 2]] == rgb.transpose(2, 0, 1)).all()


def test_16_bit_and_1_bit_gray_images(tmp_path):
    deep, bits = noise(4, 4).astype(np.uint16) * 255, np.eye(4, dtype=np.uint8) * 255
    for order in ((0, 1), (1, 0)):                 # either may be the first, which decides
        files = {f"{order[0]}.png": png(deep), f"{order[1]}.png": png(bits, "1")}
        data = load_data(str(write_folder(tmp_path / "d", files)))
        assert (data.x[order, 0] == [deep // 256, bits]).all() and data.x.shape == (2, 1, 4, 4)


def test_zip_in_edm_layout(tmp_path):
    x = noise(3, 5, 5, 3)
    files = {f"0000{i}/img{i}.png": png(x[i]) for i in (2, 0, 1)} | {"readme.txt": b"-"}
    labels = [[n.replace("/", "\\"), k] for n, k in
              zip(["00000/img0.png", "00002/img2.png", "00001/img1.png"], [4, 0, 2])]
    data = load_data(str(write_zip(tmp_path / "set-5x5.zip", files, labels)))
    assert (data.x == x.transpose(0, 3, 1, 2)).all() and data.labels.tolist() == [4, 2, 0]
    assert data.classes == list("01234") and data.name == "set-5x5"
    for unlabelled in ((), None):
        data = load_data(str(write_zip(tmp_path / "u.zip", files, unlabelled)))
        assert data.labels is None and data.classes == []
    unpacked = write_folder(tmp_path / "unpacked", {n: files[n] for n in files} | {
        "dataset.json": json.dumps({"labels": labels}).encode()})
    assert load_data(str(unpacked)).labels.tolist() == [4, 2, 0]       # not one class per folder


def test_size_crops_the_central_square_then_averages(tmp_path):
    """A 20x12 image whose central 12x12 is four flat quarters, at size 6, is those quarters."""
    x = np.full((12, 20, 3), 255, np.uint8)
    for i, gray in enumerate((10, 60, 110, 160)):
        x[6 * (i // 2):6 * (i // 2) + 6, 4 + 6 * (i % 2):10 + 6 * (i % 2)] = gray
    small = x[::2, 4:16:2]                         # already 6x6
    files = {"0.png": png(x), "1.png": png(x.transpose(1, 0, 2)), "2.png": png(small)}
    data = load_data(str(write_folder(tmp_path / "f", files)), size=6)
    corners = data.x[:, 0][:, [0, 0, -1, -1], [0, -1, 0, -1]].astype(int)
    assert data.x.shape == (3, 3, 6, 6)
    assert np.abs(corners - [[10, 60, 110, 160], [10, 110, 60, 160], [10, 60, 110, 160]]).max() < 6
    assert (data.x[2] == small.transpose(2, 0, 1)).all()
    np.save(tmp_path / "a.npy", np.stack([x, x]))
    assert (load_data(str(tmp_path / "a.npy"), size=6).x == data.x[:1]).all()  # arrays the same
    np.save(tmp_path / "fine.npy", noise(9, 64, 64))   # averages of 8x8: an 8th of the deviation
    assert 74 / 8 * 0.8 < load_data(str(tmp_path / "fine.npy"), size=8).x.std() < 74 / 8 * 1.5


def test_large_set_is_decoded_once_into_a_cache_file(tmp_path, monkeypatch):
    x = noise(3, 4, 4, 3)
    folder = write_folder(tmp_path / "f", {f"{i}.png": png(x[i]) for i in range(3)})
    plain = load_data(str(folder), tmp_path / "data")
    assert not (tmp_path / "data").exists()        # small sets leave nothing behind
    monkeypatch.setattr(datasets, "IN_MEMORY_BYTES", 30)
    first = load_data(str(folder), tmp_path / "data")
    files = list((tmp_path / "data" / "cache").iterdir())
    assert [f.name for f in files] == [f"f-{first.fingerprint}.npy"]
    assert isinstance(first.x, np.memmap) and (first.x == plain.x).all()
    assert first.fingerprint == plain.fingerprint
    spoiled = load_data(str(folder), tmp_path / "data").x
    spoiled[:] = 0                                 # torch wants it writable; the file stays
    with monkeypatch.context() as patch:
        patch.setattr(datasets, "decode", None)    # decoding again would fail
        again = load_data(str(folder), tmp_path / "data")
    assert (again.x == plain.x).all() and again.source == first.source
    (folder / "1.png").write_bytes(png(x[0]))
    os.utime(folder / "1.png", (1, 1))
    changed = load_data(str(folder), tmp_path / "data")
    assert changed.fingerprint != first.fingerprint
    assert (changed.x == plain.x[[0, 0, 2]]).all() and (first.x == plain.x).all()
    assert load_data(str(folder), tmp_path / "data", 2).fingerprint != changed.fingerprint
    (folder / "2.png").write_bytes(b"damaged")
    with pytest.raises(BadInput, match="2.png"):
        load_data(str(folder), tmp_path / "data")
    assert len(list((tmp_path / "data" / "cache").iterdir())) == 3   # nothing half done is left
    for file in (tmp_path / "data" / "cache").iterdir():
        file.write_bytes(b"damaged")
    with pytest.raises(BadInput, match="delete it"):
        datasets.gather(2, None, None, f"f-{first.fingerprint}", tmp_path / "data")


def test_a_full_disk_is_refused_before_decoding(tmp_path, monkeypatch):
    folder = write_folder(tmp_path / "f", {f"{i}.png": png(noise(4, 4)) for i in range(3)})
    monkeypatch.setattr(datasets, "IN_MEMORY_BYTES", 10)
    monkeypatch.setattr(datasets.shutil, "disk_usage", lambda path: mock.Mock(free=1000))
    with pytest.raises(BadInput, match="no room .* --data-dir with 48 bytes"):
        load_data(str(folder), tmp_path / "data")
    (tmp_path / "file").write_bytes(b"")           # a data_dir that cannot be a folder
    with pytest.raises(BadInput, match="cannot use .*cache"):
        load_data(str(folder), tmp_path / "file")


# ---- Array files ---------------------------------------------------------------------------------

def test_npy_and_npz_layouts(tmp_path):
    x, path = noise(3, 5, 5, 3), tmp_path / "a.npy"
    for stored, wanted in ((x, x.transpose(0, 3, 1, 2)), (x.transpose(0, 3, 1, 2),) * 2,
                           (x[..., 0], x[:, None, :, :, 0]), (x[..., :1], x[:, None, :, :, 0])):
        np.save(path, stored)
        data = load_data(str(path))
        assert (data.x == wanted).all() and data.x.shape == wanted.shape
        assert data.labels is None and data.x.flags.c_contiguous and data.x.flags.writeable
    np.savez(tmp_path / "b.npz", images=x, labels=np.array([2, 0, 1], np.uint8))
    data = load_data(str(tmp_path / "b.npz"))
    assert (data.x == x.transpose(0, 3, 1, 2)).all() and data.labels.tolist() == [2, 0, 1]
    assert data.labels.dtype == np.int64 and data.classes == ["0", "1", "2"]
    np.savez_compressed(tmp_path / "b.npz", images=x)
    assert load_data(str(tmp_path / "b.npz")).labels is None
    points = np.random.default_rng(0).normal(size=(7, 3))
    np.save(path, points)
    data = load_data(str(path))
    assert data.x.dtype == np.float32 and (data.x == points.astype(np.float32)).all()
    assert data.source.startswith("7 points in 3 dimensions from ")


def test_large_npy_stays_on_disk(tmp_path, monkeypatch):
    x = noise(4, 6, 6, 3)
    np.save(tmp_path / "a.npy", x)
    monkeypatch.setattr(datasets, "IN_MEMORY_BYTES", 100)
    data = load_data(str(tmp_path / "a.npy"), tmp_path / "data")
    assert isinstance(data.x, np.memmap) and (data.x == x.transpose(0, 3, 1, 2)).all()
    assert not (tmp_path / "data").exists()
    np.save(tmp_path / "a.npy", x[::-1])
    os.utime(tmp_path / "a.npy", (1, 1))
    assert load_data(str(tmp_path / "a.npy"), tmp_path).fingerprint != data.fingerprint
    small = load_data(str(tmp_path / "a.npy"), tmp_path / "data", size=6)
    assert os.listdir(tmp_path / "data" / "cache") == [f"a-{small.fingerprint}.npy"]
    assert (small.x == x[::-1].transpose(0, 3, 1, 2)).all()
    np.savez(tmp_path / "b.npz", images=x)         # which cannot be mapped
    with pytest.raises(BadInput, match="numpy.save"):
        load_data(str(tmp_path / "b.npz"))


def test_cifar10_tar_folder_and_bin(tmp_path):
    x, labels = noise(6, 3, 32, 32), [3, 9, 0, 1, 1, 2]
    names = "airplane automobile bird cat deer dog frog horse ship truck".split()
    files = {f"data_batch_{i + 1}.bin": records([labels[i]], [x[i]]) for i in (3, 1, 0, 2)}
    files |= {"test_batch.bin": records(labels[4:], x[4:]), "other.txt": b"-",
              "batches.meta.txt": ("\n".join(names) + "\n\n").encode()}
    inside = {f"cifar-10-batches-bin/{n}": d for n, d in files.items()}
    write_folder(tmp_path / "here", inside)
    (tmp_path / "there").mkdir()
    write_tar(tmp_path / "there" / "cifar-10-binary-part.tar.gz", inside)
    same = [load_data("cifar10", tmp_path / "here"), load_data("cifar10", tmp_path / "there"),
            load_data(str(tmp_path / "here")),
            load_data(str(tmp_path / "here" / "cifar-10-batches-bin")),
            load_data(str(tmp_path / "there" / "cifar-10-binary-part.tar.gz"))]
    for data in same:
        assert (data.x == x[:4]).all() and data.labels.tolist() == labels[:4]
        assert data.classes == names and data.fingerprint == same[0].fingerprint
    assert [d.name for d in same] == ["cifar10", "cifar10", "here", "cifar-10-batches-bin",
                                      "cifar-10-binary-part"]
    write_tar(tmp_path / "there" / "cifar-10-binary.tar.gz", {n: d for n, d in inside.items()
                                                             if n.endswith("test_batch.bin")})
    data = load_data("cifar10", tmp_path / "there")   # the official name goes first
    assert (data.x == x[4:]).all() and data.classes == list("0123456789")
    one = load_data(str(tmp_path / "here" / "cifar-10-batches-bin" / "test_batch.bin"))
    assert (one.x == x[4:]).all() and one.labels.tolist() == [1, 2] and one.classes == names


def test_mnist_idx_files(tmp_path):
    x, labels = noise(4, 28, 28), np.array([7, 0, 2, 2], np.uint8)
    (tmp_path / "t10k-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(x)))
    bare = load_data(str(tmp_path / "t10k-images-idx3-ubyte.gz"))
    assert bare.labels is None and (bare.x == x[:, None]).all() and bare.x.flags.writeable
    (tmp_path / "t10k-labels-idx1-ubyte").write_bytes(idx(labels))     # plain beside a .gz
    for data in (load_data("mnist", tmp_path), load_data(str(tmp_path))):
        assert (data.x == x[:, None]).all() and data.labels.tolist() == [7, 0, 2, 2]
        assert data.classes == list("01234567")
    (tmp_path / "train-images-idx3-ubyte").write_bytes(idx(x[:3, ::-1]))
    (tmp_path / "train-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(labels[1:])))
    data = load_data("mnist", tmp_path)            # training before test
    assert (data.x[:, 0] == x[:3, ::-1]).all() and data.labels.tolist() == [0, 2, 2]
    assert data.name == "mnist" and "gray images 28x28" in data.source


# ---- Refusals ------------------------------------------------------------------------------------

class Trap:
    def __reduce__(self):
        return os.mkdir, ("unpickled",)


X = noise(3, 4, 4)
PNGS = {f"{i}.png": png(X[i]) for i in range(3)}
TRAP = np.array([Trap()] * 3, dtype=object)


def savez(path, **arrays):
    np.savez(path, **arrays)


BAD = {     # file name: (what makes it, what the sentence must name)
    "one.zip": (lambda p: write_zip(p, {"0.png": PNGS["0.png"]}), "at least two"),
    "none.zip": (lambda p: write_zip(p, {"a.txt": b""}), "at least two"),
    "not.zip": (lambda p: p.write_bytes(b"no zip at all"), "not.zip"),
    "empty-folder": (lambda p: p.mkdir(), "at least two"),
    "mixed": (lambda p: write_folder(p, PNGS | {"cat/0.png": PNGS["0.png"]}), "sub-folder"),
    "half.zip": (lambda p: write_zip(p, PNGS | {"1.png": png(noise(64, 64))[:900]}), "1.png"),
    "text.zip": (lambda p: write_zip(p, PNGS | {"2.png": b"text"}), "2.png"),
    "crc.zip": (lambda p: p.write_bytes(write_zip(p, PNGS).read_bytes().replace(
        PNGS["1.png"], PNGS["1.png"][:-20] + b"?" * 20)), "1.png"),
    "pcx.zip": (lambda p: write_zip(p, PNGS | {"0.png": png(noise(4, 4), kind="PCX")}), "0.png"),
    "odd.zip": (lambda p: write_zip(p, PNGS | {"1.png": png(noise(5, 5))}), "1.png is 5x5.*--size"),
    "wide.zip": (lambda p: write_zip(p, {"0.png": png(noise(4, 6)), "1.png": png(noise(4, 6))}),
                 "0.png is 6x4.*--size"),
    "missing.zip": (lambda p: write_zip(p, PNGS, [["0.png", 0], ["2.png", 1]]), "1.png"),
    "extra.zip": (lambda p: write_zip(p, PNGS, [[n, 0] for n in (*PNGS, "4.png")]), "4.png"),
    "negative.zip": (lambda p: write_zip(p, PNGS, [[n, -1] for n in PNGS]), "whole numbers"),
    "float.zip": (lambda p: write_zip(p, PNGS, [[n, 0.5] for n in PNGS]), "whole numbers"),
    "null.zip": (lambda p: write_zip(p, PNGS, [[n, None] for n in PNGS]), "whole numbers"),
    "vector.zip": (lambda p: write_zip(p, PNGS, [[n, [0, 1]] for n in PNGS]), "one label for each"),
    "ragged.zip": (lambda p: write_zip(p, PNGS, [[n, [0] * i] for i, n in enumerate(PNGS)]),
                   "dataset.json"),
    "huge.zip": (lambda p: write_zip(p, PNGS, [[n, 10 ** 9] for n in PNGS]), "0 to 99999"),
    "giant.zip": (lambda p: write_zip(p, PNGS, [[n, 10 ** 40] for n in PNGS]), "whole numbers"),
    "flat.zip": (lambda p: write_zip(p, PNGS, [0, 1, 2]), "dataset.json"),
    "json.zip": (lambda p: write_zip(p, PNGS | {"dataset.json": b"{"}), "dataset.json"),
    "key.zip": (lambda p: write_zip(p, PNGS | {"dataset.json": b"[]"}), "dataset.json"),
    "short.npz": (lambda p: savez(p, images=X, labels=np.arange(2)), "3 images .* labels"),
    "float-labels.npz": (lambda p: savez(p, images=X, labels=np.ones(3)), "whole numbers"),
    "minus.npz": (lambda p: savez(p, images=X, labels=np.array([0, 1, -1])), "whole numbers"),
    "names.npz": (lambda p: savez(p, pictures=X), "images"),
    "trap.npz": (lambda p: savez(p, images=X, labels=TRAP), "trap.npz"),
    "trap.npy": (lambda p: np.save(p, TRAP), "trap.npy"),
    "pickle.npz": (lambda p: p.write_bytes(pickle.dumps(Trap())), "pickle.npz"),
    "pickle.npy": (lambda p: p.write_bytes(pickle.dumps(Trap())), "pickle.npy"),
    "cut.npy": (lambda p: (np.save(p, X), p.write_bytes(p.read_bytes()[:-9])), "cut.npy"),
    "empty.npy": (lambda p: p.write_bytes(b""), "empty.npy"),
    "nothing.npy": (lambda p: np.save(p, X[:0]), "at least two"),
    "flat.npy": (lambda p: np.save(p, X[:, :, 0]), "uint8"),
    "float.npy": (lambda p: np.save(p, X / 255), "uint8"),
    "void.npy": (lambda p: np.save(p, X[:, :0, :0]), "uint8"),
    "no-points.npy": (lambda p: np.save(p, np.ones((3, 0))), "uint8"),
    "scalar.npy": (lambda p: np.save(p, np.float32(1)), "uint8"),
    "rgba.npy": (lambda p: np.save(p, noise(3, 4, 4, 4)), "4 channels"),
    "wide.npy": (lambda p: np.save(p, noise(3, 4, 6, 3)), "image 0 .*--size"),
    "nan.npy": (lambda p: np.save(p, np.full((3, 2), np.nan)), "NaN"),
    "cut.bin": (lambda p: p.write_bytes(b"\0" * 3000), "3073"),
    "label.bin": (lambda p: p.write_bytes(b"\x0a" * 6146), "0 to 9"),
    "zero.bin": (lambda p: p.write_bytes(b""), "at least two"),
    "not.tar.gz": (lambda p: p.write_bytes(b"no tar at all"), "not.tar.gz"),
    "other.tar": (lambda p: write_tar(p, {"a.txt": b"-"}, "w"), "data_batch"),
    "cut.tgz": (lambda p: p.write_bytes(write_tar(p, {"data_batch_1.bin": noise(3073).tobytes()})
                                        .read_bytes()[:2000]), "cut.tgz"),
    "a-idx3-ubyte": (lambda p: p.write_bytes(idx(X)[:-1]), "header"),
    "b-idx3-ubyte": (lambda p: p.write_bytes(idx(X) + b"1"), "header"),
    "c-idx3-ubyte": (lambda p: p.write_bytes(idx(X[0])), "idx3"),
    "d-idx3-ubyte": (lambda p: p.write_bytes(b"123"), "d-idx3"),
    "e-idx3-ubyte": (lambda p: p.write_bytes(struct.pack(">4i", 0x803, *[1 << 30] * 3)), "more"),
    "f-idx3-ubyte.gz": (lambda p: p.write_bytes(gzip.compress(idx(X))[:-12]), "f-idx3"),
    "g-idx3-ubyte.gz": (lambda p: p.write_bytes(idx(X)), "g-idx3"),
    "h-idx3-ubyte": (lambda p: p.write_bytes(b"\0\0\x0d\3" + idx(X)[4:]), "does not start"),
    "i-idx3-ubyte": (lambda p: p.write_bytes(struct.pack(">4i", 0x803, -1, 4, 4)), "not start"),
    "notes.txt": (lambda p: p.write_bytes(b"text"), "known kind"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_files_are_refused_in_one_sentence(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make, says = BAD[name]
    make(tmp_path / name)
    with pytest.raises(BadInput, match=says) as refusal:
        load_data(str(tmp_path / name))
    text = str(refusal.value)
    assert "\n" not in text and not text.endswith(".") and ";" in text and name in text
    assert not os.path.exists("unpickled")


def test_bad_names_and_sizes_are_refused(tmp_path):
    for name in ("cifar-10", "", "no/such/file.zip", "x" * 5000, "nul\0"):
        with pytest.raises(BadInput, match="digits, two-gaussians.* cifar10, mnist"):
            load_data(name, tmp_path)
    for size in (0, -8, 10 ** 6):
        with pytest.raises(BadInput, match="--size"):
            load_data("digits", tmp_path, size)
    with pytest.raises(BadInput, match="leave out --size"):
        load_data("swiss-roll", tmp_path, 8)


def test_a_folder_that_cannot_be_read_is_not_taken_for_an_empty_one(tmp_path, monkeypatch):
    write_folder(tmp_path / "f", PNGS)
    monkeypatch.setattr(os, "scandir", mock.Mock(side_effect=PermissionError("not for you")))
    with pytest.raises(BadInput, match="not for you"):
        load_data(str(tmp_path / "f"))


def test_members_that_are_too_large_are_refused(tmp_path, monkeypatch):
    write_zip(tmp_path / "a.zip", PNGS)
    write_folder(tmp_path / "f", PNGS)
    write_tar(tmp_path / "a.tar.gz", {"data_batch_1.bin": records([1, 2], noise(2, 3, 32, 32))})
    monkeypatch.setattr(datasets, "MEMBER_BYTES", 50)
    for name, says in (("a.zip", "0.png"), ("f", "0.png"), ("a.tar.gz", "a.tar.gz")):
        with pytest.raises(BadInput, match=f"{says}: [0-9,]+ bytes are more than the 50"):
            load_data(str(tmp_path / name))


def test_decompression_bomb_is_refused(tmp_path, monkeypatch):
    write_zip(tmp_path / "a.zip", PNGS)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 7)
    with pytest.raises(BadInput, match="0.png: .*bomb"):
        load_data(str(tmp_path / "a.zip"))


def test_progress_is_shown_on_a_terminal_only(monkeypatch, tmp_path):
    np.save(tmp_path / "a.npy", noise(1000, 4, 4))
    for terminal in (False, True):
        screen = io.StringIO()
        screen.isatty = lambda terminal=terminal: terminal
        monkeypatch.setattr("sys.stderr", screen)
        load_data(str(tmp_path / "a.npy"), tmp_path, size=2)
        assert screen.getvalue().endswith("1,000 of 1,000\n" if terminal else "")
        assert bool(screen.getvalue()) == terminal
    np.save(tmp_path / "a.npy", noise(10, 4, 4))   # a small set shows nothing
    monkeypatch.setattr("sys.stderr", mock.Mock())
    load_data(str(tmp_path / "a.npy"), tmp_path, size=2)
    assert not datasets.sys.stderr.write.called


# ---- Downloads -----------------------------------------------------------------------------------

CONTENT = noise(300_000).tobytes()
MD5 = hashlib.md5(CONTENT).hexdigest()


class Handler(http.server.BaseHTTPRequestHandler):
    """/good serves ranges, /whole ignores them, /wrong is another file, /cut breaks off, .."""

    def do_GET(self):
        self.server.log.append((self.path, self.headers.get("Range")))
        kind = self.path.split("/")[1]
        if kind == "noise":
            return self.wfile.write(b"this is not http\r\n\r\n")
        data = CONTENT[::-1] if kind == "wrong" else CONTENT
        start = int((self.headers.get("Range") or "bytes=0-")[6:-1]) if kind != "whole" else 0
        if kind == "gone" or start >= len(data):
            return self.send_error(404 if kind == "gone" else 416)
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(data) - start))
        self.end_headers()
        self.wfile.write(data[start:start + 100_000] if kind == "cut" else data[start:])

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.log, server.url = [], f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def fetched(server, kinds, path, part=None):
    """Downloads from those kinds of mirrors; the requests that took."""
    if part is not None:
        path.parent.mkdir(exist_ok=True)
        path.with_name(path.name + ".part").write_bytes(part)
    server.log.clear()
    assert datasets.download([f"{server.url}/{k}" for k in kinds], path, MD5) == path
    assert path.read_bytes() == CONTENT and os.listdir(path.parent) == [path.name]
    path.unlink()
    return server.log


def test_download_whole_and_not_again(server, tmp_path):
    assert fetched(server, ["good"], tmp_path / "new" / "file") == [("/good", None)]
    (tmp_path / "there").write_bytes(b"")
    assert datasets.download(["http://127.0.0.1:1/"], tmp_path / "there", MD5).exists()


def test_download_resumes_its_part(server, tmp_path):
    path, half = tmp_path / "d" / "file", CONTENT[:150_000]
    assert fetched(server, ["good"], path, half) == [("/good", "bytes=150000-")]
    assert fetched(server, ["whole"], path, half) == [("/whole", "bytes=150000-")]   # restarts
    assert fetched(server, ["good"], path, CONTENT) == [("/good", "bytes=300000-")]  # complete
    wrong_part = fetched(server, ["good"], path, b"?" * 150_000)
    assert wrong_part == [("/good", "bytes=150000-"), ("/good", None)]
    too_long = fetched(server, ["good"], path, CONTENT + b"?")
    assert too_long == [("/good", "bytes=300001-"), ("/good", None)]


def test_download_goes_on_to_the_next_mirror(server, tmp_path):
    path = tmp_path / "d" / "file"
    assert fetched(server, ["wrong", "good"], path) == [("/wrong", None), ("/good", None)]
    assert fetched(server, ["gone", "good"], path) == [("/gone", None), ("/good", None)]
    assert fetched(server, ["noise", "good"], path) == [("/noise", None), ("/good", None)]
    parts = [("/cut", None), ("/cut", "bytes=100000-"), ("/cut", "bytes=200000-")]
    assert fetched(server, ["cut"] * 3, path) == parts                 # each goes on where one ends


def test_download_that_fails_everywhere_says_what_to_do(server, tmp_path):
    path = tmp_path / "d" / "file.gz"
    urls = [f"{server.url}/gone", f"{server.url}/wrong", "http://127.0.0.1:1/x", "nonsense"]
    with pytest.raises(BadInput) as refusal:
        datasets.download(urls, path, MD5)
    text = str(refusal.value)
    for part in ("file.gz", str(path.parent), "404", "md5", "refused", "nonsense"):
        assert part in text
    assert "\n" not in text and os.listdir(path.parent) == []
    with pytest.raises(BadInput, match="stopped after 100,000 of 300,000"):
        datasets.download([f"{server.url}/cut"], path, MD5)
    assert (tmp_path / "d" / "file.gz.part").read_bytes() == CONTENT[:100_000]
    (tmp_path / "f").write_bytes(b"")
    with pytest.raises(BadInput, match="another --data-dir"):
        datasets.download(urls, tmp_path / "f" / "file.gz", MD5)


def test_download_keeps_what_an_interruption_leaves(server, tmp_path, monkeypatch):
    def interrupt(what, done, total):
        raise KeyboardInterrupt
    monkeypatch.setattr(datasets, "progress", interrupt)
    with pytest.raises(KeyboardInterrupt):
        datasets.download([f"{server.url}/good"], tmp_path / "file", MD5)
    monkeypatch.undo()
    have = (tmp_path / "file.part").stat().st_size
    assert 0 < have < len(CONTENT) and not (tmp_path / "file").exists()
    datasets.download([f"{server.url}/good"], tmp_path / "file", MD5)
    assert (tmp_path / "file").read_bytes() == CONTENT
    assert server.log[-1] == ("/good", f"bytes={have}-")


def test_named_sets_are_downloaded_when_missing(tmp_path, monkeypatch):
    """Through file: URLs, which know no ranges and no status."""
    mirror, x = tmp_path / "mirror", noise(2, 28, 28)
    write_folder(mirror, {"train-images-idx3-ubyte.gz": gzip.compress(idx(x)),
                          "train-labels-idx1-ubyte.gz": gzip.compress(idx(np.uint8([5, 0])))})
    cifar = write_tar(mirror / "cifar.tar.gz", {"c/data_batch_1.bin": records([1, 2], np.stack(
        [noise(3, 32, 32)] * 2))})
    sums = {p.name: hashlib.md5(p.read_bytes()).hexdigest() for p in mirror.iterdir()}
    assert set(datasets.MNIST_MD5) < set(sums)
    monkeypatch.setattr(datasets, "MNIST_MD5", {n: sums[n] for n in datasets.MNIST_MD5})
    monkeypatch.setattr(datasets, "MNIST_URLS", (f"{tmp_path.as_uri()}/no/", f"{mirror.as_uri()}/"))
    monkeypatch.setattr(datasets, "CIFAR_URLS", (cifar.as_uri(),))
    with pytest.raises(BadInput, match="cifar-10-binary.tar.gz .*md5 sum"):
        load_data("cifar10", tmp_path / "data")
    monkeypatch.setattr(datasets, "CIFAR_MD5", sums["cifar.tar.gz"])
    for _ in range(2):                             # the second time without the mirrors
        assert load_data("mnist", tmp_path / "data").labels.tolist() == [5, 0]
        assert load_data("cifar10", tmp_path / "data").labels.tolist() == [1, 2]
        monkeypatch.setattr(datasets, "urllib", None)
