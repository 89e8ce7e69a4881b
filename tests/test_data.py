"""Data sets: every reader against files made here, odd images, downloads from a local server."""

import gzip
import hashlib
import io
import itertools
import json
import os
import re
import shutil
import struct
import tarfile
import time
import zipfile
import zlib
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from PIL import Image

import evaluate
from evaluate import BadInput, load_data


@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


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


def write_folder(path, files):
    for name, content in files.items():
        Path(path, name).parent.mkdir(parents=True, exist_ok=True)
        Path(path, name).write_bytes(content)
    return str(path)


def write_zip(path, files):
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def write_tar(path, files):
    with tarfile.open(path, "w:gz") as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


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
    assert (some.x == again.x).all() and (some.labels == again.labels).all()
    small = load_data("digits", size=8, fresh=50)
    assert small.x.shape == (50, 3, 8, 8) and abs(small.x.mean() - some.x.mean()) < 3
    assert len({digits.fingerprint, some.fingerprint, small.fingerprint}) == 3


def test_fresh_rows_are_in_no_set_that_is_trained_on(digits):
    for data in (digits, load_data("ring")):
        fresh = load_data(data.name, fresh=100).x
        assert len(fresh) == 100
        assert not {row.tobytes() for row in data.x} & {row.tobytes() for row in fresh}


def test_digits_are_whole_in_contrast_and_legible_to_nearest_neighbours(digits):
    """The ink is seen through the two colours; the nearest of 2000 digits tells what one is."""
    def ink(x):
        x = x.astype(float).mean(1)                                              # (n, 16, 16)
        low, high = x.min((1, 2), keepdims=True), x.max((1, 2), keepdims=True)
        assert (high - low).mean() > 110 and (high - low).min() > 60
        return (x - low) / (high - low)

    def features(x):
        x = ink(x).reshape(len(x), -1)
        x = x - x.mean(1, keepdims=True)
        return x / np.linalg.norm(x, axis=1, keepdims=True)
    some, fresh = digits.x[:2000], load_data("digits", fresh=500)
    stroke = ink(some) > 0.4
    border = np.concatenate([stroke[:, 0], stroke[:, -1], stroke[:, :, 0], stroke[:, :, -1]], 1)
    assert stroke.any(2).sum(1).min() >= 9 and border.mean() < 0.03    # none crosses the border
    nearest = (features(fresh.x) @ features(some).T).argmax(1)
    assert (digits.labels[nearest] == fresh.labels).mean() > 0.94


@pytest.mark.parametrize("name", evaluate.POINT_SETS)
def test_point_sets_have_mean_0_and_deviation_half(name):
    a, b = load_data(name), load_data(name)
    assert a.x.shape == (20_000, 64 if name.endswith("64d") else 2) and a.x.dtype == np.float32
    assert (a.x == b.x).all() and a.fingerprint == b.fingerprint
    assert np.abs(a.x.mean(0)).max() < 0.015 and np.abs(a.x.std(0) - 0.5).max() < 0.01


ANGLES = np.arange(8)[:, None] * np.pi / 4
RING = (2 * (0.25 - 0.0049)) ** 0.5 * np.hstack([np.cos(ANGLES), np.sin(ANGLES)])


@pytest.mark.parametrize("name, means, deviation", [
    ("two-gaussians", [[-0.48] * 2, [0.48] * 2], 0.14),
    ("two-gaussians-64d", [[-0.48] * 64, [0.48] * 64], 0.14), ("ring", RING, 0.07)])
def test_mixtures_are_the_documented_ones_and_their_components_the_labels(name, means, deviation):
    data = load_data(name)
    assert data.classes == [str(k) for k in range(len(means))]
    for k, mean in enumerate(means):
        part = data.x[data.labels == k]
        error = (np.cov(part.T) - deviation ** 2 * np.eye(len(mean))) / deviation ** 2
        assert len(part) == 20_000 / len(means) and np.abs(part.mean(0) - mean).max() < 0.006
        assert np.abs(error).max() < 0.1


# ---- Folders and zips ----------------------------------------------------------------------------

def test_folder_with_a_class_in_each_sub_folder(capsys):
    x = noise(5, 6, 6, 3)
    files = {"dog/2.png": encoded(x[0]), "cat/b.png": encoded(x[1]), "cat/a.PNG": encoded(x[2]),
             "dog/deep/1.png": encoded(x[3]), "../elsewhere/0.bmp": encoded(x[4], "BMP"),
             "notes.txt": b"-", "dog/read.me": b"-", "cat/._a.png": b"-", ".git/x.png": b"-"}
    write_folder("my pets!", files)
    Path("my pets!/ant").symlink_to("../elsewhere")
    data = load_data("my pets!")
    assert "left out  2 files of my pets!, such as dog/read.me: images end in .png" in \
        capsys.readouterr().out
    assert data.classes == ["ant", "cat", "dog"] and data.labels.tolist() == [0, 1, 1, 2, 2]
    assert data.labels.dtype == np.int64 and data.name == "my-pets"
    assert (data.x == channels_first(x[[4, 2, 1, 0, 3]])).all()
    assert data.x.dtype == np.uint8 and data.x.flags.c_contiguous and data.x.flags.writeable


@pytest.mark.parametrize("prefix", ["", "pets/", "pets\\", "Neuer Ordner/pets/"])
def test_a_zip_of_class_folders_has_their_classes(prefix):
    x = noise(4, 5, 5, 3)
    slash = "\\" if "\\" in prefix else "/"
    names = [f"{prefix}{name}" for name in (f"cat{slash}0.png", f"cat{slash}1.png",
                                            f"dog{slash}0.png", f"dog{slash}1.png")]
    write_zip("x.zip", dict(zip(names, pngs(x).values())) | {f"{prefix}readme.txt": b"-"})
    data = load_data("x.zip")
    assert data.classes == ["cat", "dog"] and data.labels.tolist() == [0, 0, 1, 1]
    assert (data.x == channels_first(x)).all()
    flat = load_data(write_zip("flat.zip", pngs(x)))
    assert flat.labels is None and flat.classes == [] and (flat.x == data.x).all()


def test_zip_in_edm_layout():
    x = noise(4, 5, 5, 3)
    files = {f"0000{i}/img{i}.png": encoded(x[i]) for i in (2, 0, 3, 1)}
    labels = [["00000\\img0.png", 4], ["00002/img2.png", 0], ["00001/img1.png", 2],
              ["00003/img3.png", 2]]
    files["dataset.json"] = json.dumps({"labels": labels}).encode()
    for path in (write_zip("set-5x5.zip", files), write_folder("unpacked", files)):
        data = load_data(path)
        assert (data.x == channels_first(x)).all() and data.labels.tolist() == [2, 1, 0, 1]
        assert data.classes == ["0", "2", "4"]
    around = {f"top/{name}": content for name, content in files.items()}
    back = {name.replace("/", "\\"): content for name, content in around.items()}
    for path in (write_zip("top.zip", around), write_folder("inside", around),
                 write_zip("back.zip", back)):
        assert load_data(path).fingerprint == data.fingerprint
    files["dataset.json"] = b'{"labels": null}'
    assert load_data(write_zip("unlabelled.zip", files)).labels is None


def test_classes_are_those_that_occur_under_their_original_numbers():
    np.savez("a.npz", images=noise(6, 4, 4), labels=np.array([1, 4, 4, 1, 4, 4], np.uint8))
    data = load_data("a.npz")
    assert data.classes == ["1", "4"] and data.labels.tolist() == [0, 1, 1, 0, 1, 1]
    assert data.source.endswith("2 classes: 1, 4") and data.labels.dtype == np.int64


@pytest.mark.parametrize("link, target", [("a/up", ".."), ("a/self", "."), ("c", "a"), ("0", "a")])
def test_a_link_to_a_folder_that_is_read_anyway_multiplies_no_images(link, target):
    write_folder("x", {f"{k}/{i}.png": encoded(noise(4, 4, seed=i)) for k in "ab" for i in (1, 2)})
    Path("x", link).symlink_to(target)
    data = load_data("x")
    assert len(data.x) == 4 and data.classes == ["a", "b"]


def test_a_copied_or_moved_folder_has_the_same_fingerprint_and_changed_pixels_another():
    x = noise(5, 6, 6, 3)
    write_folder("first", {f"{i % 2}/{name}": content for i, (name, content) in
                           enumerate(pngs(x).items())})
    mark = load_data("first").fingerprint
    shutil.copytree("first", "copy/of it", copy_function=shutil.copyfile)
    os.utime("copy/of it/1/1.png", (1, 1))
    assert load_data("copy/of it").fingerprint == mark
    os.rename("first", "second")
    assert load_data("second").fingerprint == mark
    os.rename("second/1/1.png", "second/0/1.png")                      # another label
    assert load_data("second").fingerprint != mark
    x[3, 2, 2, 2] ^= 1
    Path("copy/of it/1/3.png").write_bytes(encoded(x[3]))
    assert load_data("copy/of it").fingerprint != mark


# ---- Odd images ----------------------------------------------------------------------------------

def loaded(content, ending=".png", **how):
    """The image (C, H, W) of a file, in a folder with three colour images of 8x8."""
    shutil.rmtree("odd", ignore_errors=True)
    others = {f"z{name}": png for name, png in pngs(noise(3, 8, 8, 3, seed=9)).items()}
    write_folder("odd", {f"a{ending}": content} | others)
    return load_data("odd", **how).x[0]


@pytest.mark.parametrize("place", [0, 3])
def test_any_colour_image_makes_the_set_rgb(place):
    gray, colour = noise(4, 4, 4), noise(4, 4, 3, seed=1)
    files = pngs(gray) | {"1.png": encoded(np.dstack([gray[1], np.full((4, 4), 255, np.uint8)]))}
    assert load_data(write_folder("gray", files)).x.shape == (4, 1, 4, 4)
    data = load_data(write_folder("mixed", files | {f"{place}.png": encoded(colour)}))
    assert data.x.shape == (4, 3, 4, 4) and "RGB" in data.source
    for i in range(4):
        assert (data.x[i] == (colour.transpose(2, 0, 1) if i == place else gray[i])).all()


def test_one_bit_and_palette_images_are_taken():
    bits = np.eye(8, dtype=np.uint8) * 255
    assert (loaded(encoded(Image.fromarray(bits).convert("1"))) == bits).all()
    few = noise(8, 8, 3) // 128 * 255                                  # eight colours
    assert (loaded(encoded(Image.fromarray(few).quantize(8))) == few.transpose(2, 0, 1)).all()


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_images_stand_upright_by_their_exif_orientation(kind):
    """Orientation 6: the file holds the picture turned; a quarter turn clockwise shows it."""
    quarters = np.repeat(np.repeat([[250, 170], [90, 10]], 16, 0), 16, 1).astype(np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6
    content = encoded(quarters, kind, exif=exif)
    x = loaded(content, f".{kind.lower()}", size=8).astype(int)
    assert abs(x[0][[0, 0, -1, -1], [0, -1, 0, -1]] - [90, 250, 10, 170]).max() < 6


def test_images_that_look_alike_load_alike_whatever_is_under_their_transparent_parts():
    shown, gray = noise(8, 8, 3), noise(8, 8)
    alpha = np.repeat([[255] * 4 + [0] * 4], 8, 0).astype(np.uint8)
    where = alpha == 0
    for hidden in (0, 77, 255):
        rgb, l, index = shown.copy(), gray.copy(), gray // 128 + 1
        rgb[where], l[where], index[where] = hidden, hidden, 0
        palette = Image.fromarray(index.astype(np.uint8)).convert("L")
        palette.putpalette([hidden, 1, 2, 200, 0, 0, 0, 0, 200])
        for x, want in [
                (loaded(encoded(np.dstack([rgb, alpha]))), shown.transpose(2, 0, 1)),
                (loaded(encoded(np.dstack([rgb, alpha]), "WEBP", lossless=True, exact=True),
                        ".webp"), shown.transpose(2, 0, 1)),
                (loaded(encoded(np.dstack([l, alpha]))), np.stack([gray] * 3)),
                (loaded(encoded(palette, transparency=0)),
                 np.stack([np.where(gray < 128, 200, 0), 0 * gray, np.where(gray < 128, 0, 200)])),
        ]:
            assert (x == np.where(where, 255, want)).all()


def png_of_16_bits():
    """Pillow cannot write one: 8x8, RGB."""
    def chunk(name, content):
        return struct.pack(">I", len(content)) + name + content + struct.pack(
            ">I", zlib.crc32(name + content))
    rows = b"".join(b"\0" + row.tobytes() for row in noise(8, 48))
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 8, 8, 16, 2, 0, 0, 0))
            + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b""))


DEEP = noise(8, 8).astype(np.int32) * 255
DEEP_FILES = {"16-bit gray": (encoded(DEEP.astype(np.uint16)), ".png"),
              "32-bit gray": (encoded(DEEP, "TIFF"), ".tif"),
              "float": (encoded(DEEP.astype(np.float32), "TIFF"), ".tif"),
              "16-bit RGB": (png_of_16_bits(), ".png")}


@pytest.mark.parametrize("name", DEEP_FILES)
def test_deep_images_are_refused_not_cut_to_8_bits(name):
    with pytest.raises(BadInput, match="odd/a.* more than 8 bits.*; "):
        loaded(*DEEP_FILES[name])


def test_several_pictures_in_a_file_are_refused_but_a_phones_is_taken():
    first, *more = (Image.fromarray(x // 64 * 64) for x in noise(3, 8, 8, 3))
    for kind in ("TIFF", "GIF", "WEBP", "PNG"):
        with pytest.raises(BadInput, match="odd/a.* holds 3 pictures; "):
            loaded(encoded(first, kind, save_all=True, append_images=more), f".{kind.lower()}")
    phone = encoded(first, "MPO", save_all=True, append_images=more)
    assert abs(loaded(phone, ".jpg").mean() - np.asarray(first).mean()) < 10


# ---- Sizes ---------------------------------------------------------------------------------------

def test_size_crops_the_central_square_then_averages():
    """A 20x12 image whose central 12x12 is four flat quarters, at size 6, is those quarters."""
    x = np.full((12, 20, 3), 255, np.uint8)
    for i, gray in enumerate((10, 60, 110, 160)):
        x[6 * (i // 2):6 * (i // 2) + 6, 4 + 6 * (i % 2):10 + 6 * (i % 2)] = gray
    small = x[::2, 4:16:2]                         # 6x6 already
    data = load_data(write_folder("f", pngs([x, x.transpose(1, 0, 2), small, small])), size=6)
    corners = data.x[:, 0][:, [0, 0, -1, -1], [0, -1, 0, -1]].astype(int)
    assert data.x.shape == (4, 3, 6, 6) and (data.x[2] == small.transpose(2, 0, 1)).all()
    assert abs(corners - [[10, 60, 110, 160], [10, 110, 60, 160], *[[10, 60, 110, 160]] * 2]
               ).max() < 6
    np.save("a.npy", np.stack([x] * 4))
    assert (load_data("a.npy", size=6).x == data.x[:1]).all()          # of arrays the same
    np.save("fine.npy", noise(9, 64, 64))          # averages of 8x8: an eighth of the deviation
    assert 74 / 8 * 0.8 < load_data("fine.npy", size=8).x.std() < 74 / 8 * 1.5


def test_a_folder_that_cannot_be_read_is_not_taken_for_an_empty_one(monkeypatch):
    write_folder("f", pngs(noise(4, 4, 4)))
    monkeypatch.setattr(Path, "iterdir", mock.Mock(side_effect=PermissionError("not for you")))
    with pytest.raises(BadInput, match="not for you"):
        load_data("f")


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


def test_cifar10_tar_and_folder():
    x, labels = noise(8, 3, 32, 32), [3, 9, 0, 1, 1, 2, 1, 1]
    names = "airplane automobile bird cat deer dog frog horse ship truck".split()
    files = {f"data_batch_{i + 1}.bin": records([labels[i]], [x[i]]) for i in (3, 1, 0, 2)}
    files |= {"test_batch.bin": records(labels[4:], x[4:]), "other.txt": b"-",
              "batches.meta.txt": ("\n".join(names) + "\n\n").encode()}
    inside = {f"cifar-10-batches-bin/{name}": content for name, content in files.items()}
    write_folder("here", inside)
    os.mkdir("there")
    tar = write_tar("there/cifar-10-binary.tar.gz", inside)
    found = [load_data("cifar10", data_dir="here"), load_data("cifar10", data_dir="there"),
             load_data("here"), load_data("here/cifar-10-batches-bin"), load_data(tar)]
    for data in found:
        assert (data.x == x[:4]).all() and data.labels.tolist() == [2, 3, 0, 1]
        assert data.classes == ["airplane", "automobile", "cat", "truck"]
        assert data.fingerprint == found[0].fingerprint
    assert [data.name for data in found] == ["cifar10", "cifar10", "here", "cifar-10-batches-bin",
                                             "cifar-10-binary"]
    for i in (1, 2, 3, 4):
        os.remove(f"here/cifar-10-batches-bin/data_batch_{i}.bin")
    one = load_data("here")                        # without training batches the test batch
    assert (one.x == x[4:]).all() and one.classes == ["automobile", "bird"]


def test_mnist_idx_files():
    x, labels = noise(4, 28, 28), np.array([7, 0, 2, 2], np.uint8)
    Path("t10k-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(x)))
    bare = load_data("t10k-images-idx3-ubyte.gz")
    assert bare.labels is None and (bare.x == x[:, None]).all() and bare.x.flags.writeable
    Path("t10k-labels-idx1-ubyte").write_bytes(idx(labels))            # plain beside a .gz
    for data in (load_data("mnist", data_dir="."), load_data(".")):
        assert (data.x == x[:, None]).all() and data.classes == ["0", "2", "7"]
        assert data.labels.tolist() == [2, 0, 1, 1]
    Path("train-images-idx3-ubyte").write_bytes(idx(x[:, ::-1]))
    Path("train-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(labels[::-1])))
    data = load_data("mnist", data_dir=".")        # training before test
    assert (data.x[:, 0] == x[:, ::-1]).all() and data.labels.tolist() == [1, 1, 0, 2]
    assert data.name == "mnist" and "gray images 28x28" in data.source


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
    write_folder("f", pngs(noise(20, 4, 4)))
    assert told(monkeypatch, terminal=False, step=0.2) == ""           # done within 5 seconds
    assert told(monkeypatch, terminal=True, step=0.01) == ""           # too quick to be read
    lines = told(monkeypatch, terminal=False, step=2).splitlines()
    assert 2 <= len(lines) <= 3                                        # in about 40 seconds
    screen = told(monkeypatch, terminal=True, step=1)
    assert screen.count("\n") == 1 and screen.startswith("\r") and screen.endswith("\n")
    rewritten = screen[1:-1].split("\r")
    assert rewritten[-1].startswith("reading images: 20 of 20, 0:00 left")
    for line, step in ((lines[0], 2), (rewritten[9], 1)):
        done, left = map(int, re.findall(r"images: (\d+) of 20, 0:(\d\d) left", line)[0])
        assert left == pytest.approx(step * (20 - done), rel=0.2)


# ---- Downloads -----------------------------------------------------------------------------------

def mirrored(monkeypatch, *places):
    """cifar10 comes from these places below the folder `mirror`: whole/ has it, cut/ half of it."""
    content = Path(write_tar("x", {"data_batch_1.bin": records([1, 2, 1, 2], noise(4, 3, 32, 32))}
                             )).read_bytes()
    write_folder("mirror", {"whole": content, "cut": content[:len(content) // 2]})
    monkeypatch.setattr(evaluate, "CIFAR_MD5", hashlib.md5(content).hexdigest())
    mirror = Path("mirror").resolve().as_uri()
    monkeypatch.setattr(evaluate, "CIFAR_URLS", ["http://127.0.0.1:1/x", "nonsense:",
                                                 *[f"{mirror}/{place}" for place in places]])


def test_a_download_comes_whole_from_the_first_mirror_that_has_it_and_once(monkeypatch):
    mirrored(monkeypatch, "gone", "cut", "whole", "never")
    for _ in range(2):
        assert load_data("cifar10").labels.tolist() == [0, 1, 0, 1]
        shutil.rmtree("mirror", ignore_errors=True)
    assert os.listdir("data") == ["cifar-10-binary.tar.gz"]


def test_a_download_that_fails_everywhere_says_which_file_to_put_where(monkeypatch):
    mirrored(monkeypatch, "gone", "cut")
    with pytest.raises(BadInput) as refusal:
        load_data("cifar10", data_dir="my/data")
    text = str(refusal.value)
    for part in ("refused", "nonsense", "No such file", "/cut: its md5 sum is wrong",
                 "put that file into the folder my/data by hand"):
        assert part in text, part
    assert text.startswith("cifar-10-binary.tar.gz could not be downloaded") and "\n" not in text
    assert os.listdir("my/data") == []             # no part that would be taken for the file


def test_mnist_is_downloaded_with_its_labels_or_not_at_all(monkeypatch):
    write_folder("mirror", {"train-images-idx3-ubyte.gz": gzip.compress(idx(noise(4, 28, 28))),
                            "train-labels-idx1-ubyte.gz": gzip.compress(idx(np.uint8([5, 0] * 2)))})
    sums = {name: hashlib.md5(Path("mirror", name).read_bytes()).hexdigest()
            for name in evaluate.MNIST_MD5}
    monkeypatch.setattr(evaluate, "MNIST_URLS", [Path("mirror").resolve().as_uri() + "/"])
    with pytest.raises(BadInput, match="train-labels-idx1-ubyte.gz could not"):      # other sums
        load_data("mnist")
    monkeypatch.setattr(evaluate, "MNIST_MD5", sums)
    assert load_data("mnist").labels.tolist() == [1, 0, 1, 0]
    shutil.rmtree("mirror")
    assert load_data("mnist").labels.tolist() == [1, 0, 1, 0]
