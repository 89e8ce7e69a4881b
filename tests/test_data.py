"""Data sets: every reader against files made here, odd images, downloads from a local server."""

import gzip
import hashlib
import io
import itertools
import json
import os
import re
import shutil
import socket
import struct
import time
import zipfile
import zlib
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image

import evaluate
from evaluate import BadInput, load_data

pytestmark = pytest.mark.usefixtures("folder")


def noise(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def encoded(x, kind="PNG", **options):
    """The bytes of an image file of x: an array (H, W[, C]) or a PIL image."""
    file = io.BytesIO()
    image = Image.fromarray(x) if isinstance(x, np.ndarray) else x
    image.save(file, kind, **options)
    return file.getvalue()


def pngs(x):
    """{file name: bytes} of images (N, H, W[, C]), named in order."""
    return {f"{i}.png": encoded(image) for i, image in enumerate(x)}


def write(path, files):
    """Makes a folder of these files, {name: content}; or a .zip or .tar.gz of that folder."""
    folder, _, ending = str(path).partition(".")
    for name, content in files.items():
        file = Path(folder, name)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
    if ending:
        shutil.make_archive(folder, {"zip": "zip", "tar.gz": "gztar"}[ending], folder)
    return str(path)


def records(labels, x):
    """CIFAR-10's binary layout of images (N, 3, 32, 32)."""
    return b"".join(bytes([label]) + image.tobytes() for label, image in zip(labels, x))


def idx(x):
    return struct.pack(f">{1 + x.ndim}i", 0x800 + x.ndim, *x.shape) + x.tobytes()


def channels_first(x):
    return x.transpose(0, 3, 1, 2)


# ---- Sets that are drawn -------------------------------------------------------------------------

@pytest.fixture(scope="module")
def digits():
    return load_data("digits")


def test_digits_are_the_same_each_time_and_balanced(digits):
    assert digits.x.shape == (10_000, 3, 16, 16) and digits.x.dtype == np.uint8
    assert digits.labels.dtype == np.int64 and (np.bincount(digits.labels) == 1000).all()
    assert digits.name == "digits" and re.fullmatch("[0-9a-f]{12}", digits.fingerprint)
    assert digits.source == ("10,000 RGB images 16x16 from the built-in set digits, "
                             "10 classes: 0, 1, 2, 3, 4, 5, 6, 7, 8, 9")
    some, again = load_data("digits", fresh=50), load_data("digits", fresh=50)
    assert some.fingerprint == again.fingerprint != digits.fingerprint


def test_digits_are_whole_in_contrast_and_legible_to_nearest_neighbours(digits):
    """The ink is seen through the two colours; the nearest of 2000 digits tells what one is."""
    def ink(x):
        x = x.astype(float).mean(1)                                              # (n, 16, 16)
        low, high = x.min((1, 2), keepdims=True), x.max((1, 2), keepdims=True)
        assert (high - low).min() > 80
        return torch.from_numpy((x - low) / (high - low))
    some, fresh = ink(digits.x[:2000]), load_data("digits", fresh=500)
    stroke = some > 0.4
    border = torch.cat([stroke[:, 0], stroke[:, -1], stroke[:, :, 0], stroke[:, :, -1]], 1)
    assert stroke.any(2).sum(1).min() >= 9 and border.float().mean() < 0.03
    nearest = torch.cdist(ink(fresh.x).flatten(1), some.flatten(1)).argmin(1)
    assert (digits.labels[nearest.numpy()] == fresh.labels).mean() > 0.94


ANGLES = np.arange(8)[:, None] * np.pi / 4
RING = (2 * (0.25 - 0.0049)) ** 0.5 * np.hstack([np.cos(ANGLES), np.sin(ANGLES)])


@pytest.mark.parametrize("name, means, deviation", [
    ("two-gaussians", [[-0.48] * 2, [0.48] * 2], 0.14),
    ("two-gaussians-64d", [[-0.48] * 64, [0.48] * 64], 0.14), ("ring", RING, 0.07)])
def test_mixtures_are_the_documented_ones_of_deviation_half_their_labels_the_components(
        name, means, deviation):
    data = load_data(name)
    assert data.x.dtype == np.float32 and data.classes == [str(k) for k in range(len(means))]
    assert np.abs(data.x.mean(0)).max() < 0.015 and np.abs(data.x.std(0) - 0.5).max() < 0.01
    for k, mean in enumerate(means):
        part = data.x[data.labels == k]
        error = (np.cov(part.T) - deviation ** 2 * np.eye(len(mean))) / deviation ** 2
        assert len(part) == 20_000 / len(means) and np.abs(part.mean(0) - mean).max() < 0.006
        assert np.abs(error).max() < 0.1
    assert load_data(name).fingerprint == data.fingerprint


# ---- Folders and zips ----------------------------------------------------------------------------

def test_a_sub_folder_is_a_class_in_folders_and_zips(capsys):
    x = noise(4, 6, 6, 3)
    names = "cat/a.PNG", "cat/b.png", "dog/2.png", "dog/deep/1.png"
    files = dict(zip(names, pngs(x).values())) | {
        "notes.txt": b"-", "dog/read.me": b"-", "cat/._a.png": b"-", ".git/x.png": b"-"}
    around = {f"Neuer Ordner/pets/{name}": content for name, content in files.items()}
    for path in (write("my pets!", files), write("inside.zip", files), write("far.zip", around)):
        data = load_data(path)
        assert re.search(f"left out  of {path}: 2, such as .*dog/read.me; images end in .png",
                         capsys.readouterr().out)
        assert data.classes == ["cat", "dog"] and data.labels.tolist() == [0, 0, 1, 1]
        assert (data.x == channels_first(x)).all() and data.labels.dtype == np.int64
        assert data.x.dtype == np.uint8 and data.x.flags.c_contiguous and data.x.flags.writeable
    flat = load_data(write("flat.zip", pngs(x)))
    assert flat.labels is None and flat.classes == []
    assert load_data("my pets!").name == "my-pets"


def test_zip_in_edm_layout():
    x = noise(4, 5, 5, 3)
    files = {f"0000{i}/img{i}.png": encoded(x[i]) for i in (2, 0, 3, 1)}
    labels = [["00000\\img0.png", 4], ["00002/img2.png", 0], ["00001/img1.png", 2],
              ["00003/img3.png", 2]]
    files["dataset.json"] = json.dumps({"labels": labels}).encode()
    around = {f"top/{name}": content for name, content in files.items()}
    back = {name.replace("/", "\\"): content for name, content in around.items()}
    with zipfile.ZipFile("dot.zip", "w") as dot:
        for name, content in around.items():
            dot.writestr(f"./{name}", content)
    for path in (write("set-5x5.zip", files), write("unpacked", files), write("inside", around),
                 write("back.zip", back), "dot.zip"):
        data = load_data(path)
        assert (data.x == channels_first(x)).all() and data.labels.tolist() == [2, 1, 0, 1]
        assert data.classes == ["0", "2", "4"]
    files["dataset.json"] = b'{"labels": null}'
    assert load_data(write("unlabelled.zip", files)).labels is None


@pytest.mark.parametrize("link, target", [("a/up", ".."), ("0", "a")])
def test_links_to_folders_are_followed_and_no_folder_is_read_twice(link, target):
    write("x", {f"{k}/{i}.png": encoded(noise(4, 4, seed=i)) for k in "ab" for i in (1, 2)})
    write("elsewhere", {"1.bmp": encoded(noise(4, 4), "BMP")})
    Path("x/c").symlink_to("../elsewhere")
    Path("x", link).symlink_to(target)
    data = load_data("x")
    assert data.classes == ["a", "b", "c"] and data.labels.tolist() == [0, 0, 1, 1, 2]


def test_a_folder_that_cannot_be_read_is_not_taken_for_an_empty_one(monkeypatch):
    write("f", pngs(noise(4, 4, 4)))
    monkeypatch.setattr(Path, "iterdir", mock.Mock(side_effect=PermissionError("not for you")))
    with pytest.raises(BadInput, match="not for you"):
        load_data("f")


def test_a_changed_pixel_or_label_changes_the_fingerprint():
    """Another place does not: test_cifar10_tar."""
    x, labels, marks = noise(4, 6, 6), np.arange(4), set()
    changed = x.copy()
    changed[3, 2, 2] ^= 1
    for images, classes in ((x, labels), (changed, labels), (x, labels[::-1])):
        np.savez("x.npz", images=images, labels=classes)
        marks.add(load_data("x.npz").fingerprint)
    assert len(marks) == 3


# ---- Odd images ----------------------------------------------------------------------------------

def loaded(content):
    """The image (C, H, W) of a file beside three colour images of 8x8."""
    write("odd", pngs(noise(4, 8, 8, 3)) | {"0.png": content})
    return load_data("odd").x[0]


@pytest.mark.parametrize("place", [0, 3])
def test_any_colour_image_makes_the_set_rgb(place):
    gray, colour = noise(4, 4, 4), noise(4, 4, 3, seed=1)
    files = pngs(gray) | {"1.png": encoded(np.dstack([gray[1], np.full((4, 4), 255, np.uint8)]))}
    assert load_data(write("gray", files)).x.shape == (4, 1, 4, 4)
    data = load_data(write("mixed", files | {f"{place}.png": encoded(colour)}))
    assert data.x.shape == (4, 3, 4, 4) and "RGB" in data.source
    for i in range(4):
        assert (data.x[i] == (colour.transpose(2, 0, 1) if i == place else gray[i])).all()


def test_one_bit_and_palette_images_are_taken():
    bits = np.eye(8, dtype=np.uint8) * 255
    assert (loaded(encoded(Image.fromarray(bits).convert("1"))) == bits).all()
    few = noise(8, 8, 3) // 128 * 255                                  # eight colours
    assert (loaded(encoded(Image.fromarray(few).quantize(8))) == few.transpose(2, 0, 1)).all()


def test_images_stand_upright_by_their_exif_orientation():
    """Orientation 6: the file holds the picture turned; a quarter turn clockwise shows it."""
    x, exif = noise(8, 8, 3), Image.Exif()
    exif[0x0112] = 6
    assert (loaded(encoded(x, exif=exif)) == np.rot90(x, -1).transpose(2, 0, 1)).all()


def test_transparent_parts_are_white_whatever_is_under_them():
    rgb, alpha = noise(8, 8, 3), np.repeat([[255] * 4 + [0] * 4], 8, 0).astype(np.uint8)
    index = rgb[:, :, 0] // 128
    palette = Image.fromarray(index).convert("L")
    palette.putpalette([9, 1, 2, 200, 100, 0])
    colour = np.reshape([200, 100, 0], (3, 1, 1))
    for content, clear, want in [
            (encoded(np.dstack([rgb, alpha])), alpha == 0, rgb.transpose(2, 0, 1)),
            (encoded(np.dstack([rgb[:, :, 0], alpha])), alpha == 0, rgb[:, :, 0]),
            (encoded(palette, transparency=0), index == 0, colour)]:
        assert (loaded(content) == np.where(clear, 255, want)).all()


def png_of_16_bits():
    """RGB, which Pillow cannot write: 16x8 pixels of 8 bits, renamed to 8x8 of 16."""
    png = bytearray(encoded(noise(8, 16, 3)))
    png[19], png[24] = 8, 16                                           # the width, the bits
    png[29:33] = struct.pack(">I", zlib.crc32(png[12:29]))
    return bytes(png)


def test_deep_images_are_refused_not_cut_to_8_bits():
    gray = noise(8, 8).astype(np.int32) * 255
    for content in (png_of_16_bits(), encoded(gray, "TIFF"),
                    encoded(gray.astype(np.float32), "TIFF")):
        with pytest.raises(BadInput, match="odd/0.* more than 8 bits.*; "):
            loaded(content)


def test_several_pictures_in_a_file_are_refused_but_a_phones_is_taken():
    first, *more = (Image.fromarray(x // 64 * 64) for x in noise(3, 8, 8, 3))
    with pytest.raises(BadInput, match="odd/0.* holds 3 pictures; "):
        loaded(encoded(first, "GIF", save_all=True, append_images=more))
    phone = encoded(first, "MPO", save_all=True, append_images=more)
    assert abs(loaded(phone).mean() - np.asarray(first).mean()) < 10


# ---- Sizes ---------------------------------------------------------------------------------------

def test_size_crops_the_central_square_then_averages():
    wide = noise(12, 20, 3)
    square = wide[:, 4:16]
    images = [wide, wide.transpose(1, 0, 2), square, square]
    data = load_data(write("f", pngs(images)), size=12)
    for x, want in zip(data.x, [square, square.transpose(1, 0, 2), square, square]):
        assert (x == want.transpose(2, 0, 1)).all()
    np.save("a.npy", np.stack([wide] * 4))
    assert (load_data("a.npy", size=12).x == data.x[0]).all()
    np.save("fine.npy", noise(9, 64, 64))          # averages of 8x8: an eighth of the deviation
    assert 74 / 8 * 0.8 < load_data("fine.npy", size=8).x.std() < 74 / 8 * 1.5


# ---- Array files, CIFAR-10, MNIST ----------------------------------------------------------------

def test_npy_and_npz_layouts():
    x = noise(4, 5, 5, 3)
    for stored, want in ((x, channels_first(x)), (channels_first(x), channels_first(x)),
                         (x[..., 0], x[:, None, :, :, 0]), (x[..., :1], x[:, None, :, :, 0])):
        np.save("a.npy", stored)
        data = load_data("a.npy")
        assert data.x.shape == want.shape and (data.x == want).all() and data.labels is None
        assert data.x.flags.c_contiguous and data.x.flags.writeable
    np.savez_compressed("b.npz", images=x, labels=np.array([2, 0, 1, 2], np.uint8))
    data = load_data("b.npz")
    assert (data.x == channels_first(x)).all() and data.labels.tolist() == [2, 0, 1, 2]
    np.savez("b.npz", images=x)
    assert load_data("b.npz").labels is None
    points = np.random.default_rng(0).normal(size=(7, 3))
    np.save("a.npy", points)
    data = load_data("a.npy")
    assert data.x.dtype == np.float32 and (data.x == points.astype(np.float32)).all()
    assert data.source == "7 points in 3 dimensions from a.npy"


def test_large_npy_stays_on_disk(monkeypatch):
    x = noise(4, 3, 6, 6)
    np.save("a.npy", x)
    monkeypatch.setattr(evaluate, "LARGE_FILE", 100)
    data = load_data("a.npy")
    assert isinstance(data.x, np.memmap) and (data.x == x).all()
    data.x[:] = 0                                  # torch wants it writable; the file stays
    assert (load_data("a.npy").x == x).all()


def test_cifar10_tar():
    x, labels = noise(8, 3, 32, 32), [3, 9, 0, 1, 1, 2, 1, 1]
    names = "airplane automobile bird cat deer dog frog horse ship truck".split()
    files = {f"data_batch_{i + 1}.bin": records([labels[i]], [x[i]]) for i in (3, 1, 0, 2)}
    files |= {"test_batch.bin": records(labels[4:], x[4:]), "other.txt": b"-",
              "batches.meta.txt": ("\n".join(names) + "\n\n").encode()}
    os.mkdir("there")
    inside = {f"cifar-10-batches-bin/{name}": content for name, content in files.items()}
    tar = write("there/cifar-10-binary.tar.gz", inside)
    found = load_data("cifar10", data_dir="there"), load_data(tar)
    for data in found:
        assert (data.x == x[:4]).all() and data.labels.tolist() == [2, 3, 0, 1]
        assert data.classes == ["airplane", "automobile", "cat", "truck"]
    assert [data.name for data in found] == ["cifar10", "cifar-10-binary"]
    assert found[0].fingerprint == found[1].fingerprint


@pytest.mark.parametrize("name, beside", [
    ("t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz"),
    ("t10k-images.idx3-ubyte", "t10k-labels.idx1-ubyte"),
    ("t10k-images.idx3-ubyte", "t10k-labels.idx1-ubyte.gz")])
def test_idx_files(name, beside):
    def put(name, content):
        Path(name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)

    x = noise(4, 28, 28)
    put(name, idx(x))
    bare = load_data(name)
    assert bare.labels is None and (bare.x == x[:, None]).all() and bare.x.flags.writeable
    put(beside, idx(np.uint8([7, 0, 2, 2])))
    data = load_data(name)
    assert data.labels.tolist() == [2, 0, 1, 1] and data.classes == ["0", "2", "7"]
    assert "gray images 28x28" in data.source


# ---- Progress ------------------------------------------------------------------------------------

def told(monkeypatch, terminal, step):
    """What stands on stderr after 20 images are read, if a clock goes on by `step` at each look."""
    screen, now = io.StringIO(), itertools.count(0, step)
    screen.isatty = mock.Mock(return_value=terminal)
    with monkeypatch.context() as patch:
        patch.setattr("sys.stderr", screen)
        patch.setattr(time, "time", now.__next__)
        load_data("f")
    return screen.getvalue()


def test_progress_is_a_line_now_and_then_on_a_pipe_and_one_line_on_a_terminal(monkeypatch):
    write("f", pngs(noise(20, 4, 4)))
    assert told(monkeypatch, terminal=False, step=0.2) == ""           # done within 5 seconds
    assert told(monkeypatch, terminal=True, step=0.01) == ""           # too quick to be read
    lines = told(monkeypatch, terminal=False, step=2).splitlines()
    assert 2 <= len(lines) <= 3                                        # in about 40 seconds
    done, left = map(int, re.findall(r"images: (\d+) of 20, 0:(\d\d) left", lines[0])[0])
    assert left == pytest.approx(2 * (20 - done), rel=0.2)
    screen = told(monkeypatch, terminal=True, step=1)
    assert screen.count("\n") == 1 and screen.startswith("\r") and screen.endswith("\n")
    assert screen.split("\r")[-1].startswith("reading images: 20 of 20, 0:00 left")


# ---- Downloads -----------------------------------------------------------------------------------

CIFAR = "cifar-10-binary.tar.gz"


def offer(monkeypatch, name, content, place):
    """A download comes from a folder in mirror/: whole/ has all of it, cut/ has half."""
    write("mirror", {f"whole/{name}": content, f"cut/{name}": content[:len(content) // 2]})
    address = f"{Path('mirror').resolve().as_uri()}/{place}/"
    sha256 = hashlib.sha256(content).hexdigest()[:16]
    monkeypatch.setitem(evaluate.DOWNLOADS, name, (address, sha256))


def test_a_download_comes_whole_and_once(monkeypatch):
    tar = write("x.tar.gz", {"data_batch_1.bin": records([1, 2, 1, 2], noise(4, 3, 32, 32))})
    offer(monkeypatch, CIFAR, Path(tar).read_bytes(), "whole")
    for _ in range(2):
        assert load_data("cifar10").labels.tolist() == [0, 1, 0, 1]
        shutil.rmtree("mirror", ignore_errors=True)
    assert os.listdir("data") == [CIFAR]


@pytest.mark.parametrize("place, why", [("gone", "No such file"), ("cut", "invalid hash value")])
def test_a_download_that_fails_says_which_file_to_put_where(monkeypatch, place, why):
    offer(monkeypatch, CIFAR, b"content", place)
    with pytest.raises(BadInput) as refusal:
        load_data("cifar10", data_dir="my/data")
    text = str(refusal.value)
    assert why in text and f"/{CIFAR}: " in text and "\n" not in text
    assert "put that file into the folder my/data by hand" in text
    assert os.listdir("my/data") == []             # no part that would be taken for the file


def test_a_server_that_stops_answering_is_left_after_30_seconds(monkeypatch):
    """Here after .1 s; other connections' limit is as before."""
    wait, limits = socket.setdefaulttimeout, {30: 0.1, None: None}
    monkeypatch.setattr(socket, "setdefaulttimeout", lambda seconds: wait(limits[seconds]))
    with socket.create_server(("127.0.0.1", 0)) as silent:             # takes calls, says nothing
        address = f"http://127.0.0.1:{silent.getsockname()[1]}/"
        monkeypatch.setitem(evaluate.DOWNLOADS, CIFAR, (address, ""))
        with pytest.raises(BadInput, match="timed out"):
            load_data("cifar10")
    assert socket.getdefaulttimeout() is None


def test_mnist_is_downloaded_with_its_labels_or_not_at_all(monkeypatch):
    x, classes = noise(4, 28, 28), gzip.compress(idx(np.uint8([5, 0, 5, 7])))
    offer(monkeypatch, "train-images-idx3-ubyte.gz", gzip.compress(idx(x)), "whole")
    offer(monkeypatch, "train-labels-idx1-ubyte.gz", classes, "cut")
    with pytest.raises(BadInput, match="train-labels-idx1-ubyte.gz"):
        load_data("mnist")
    assert os.listdir("data") == []
    offer(monkeypatch, "train-labels-idx1-ubyte.gz", classes, "whole")
    data = load_data("mnist")
    assert (data.x == x[:, None]).all() and data.labels.tolist() == [1, 0, 1, 2]
    assert data.classes == ["0", "5", "7"] and data.name == "mnist"
