"""evaluate.py: how good it is.  Reads image sets, draws samples of runs, measures distances.

    python evaluate.py sample RUN --sampler heun --steps 18 --num 64

A data set is one array: uint8 images (N, C, H, W), or float32 points (N, d).  `load_data` takes
the name of a built-in set or the path of a folder or file, and either gives a Dataset or raises
BadInput, whose one sentence says what to do.  Nothing is ever unpickled or extracted to disk.
"""

import argparse
import gzip
import hashlib
import http.client
import io
import json
import math
import os
import re
import shutil
import struct
import sys
import tarfile
import time
import urllib.error
import urllib.request
import zipfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from networks import MLP, UNETS, Denoiser, UNet, target_coefficients
from samplers import edm_stochastic, euler, heun, seeded_noise
from schedules import EDM, SCHEDULES

IN_MEMORY_BYTES = 4 << 30        # a larger set is decoded once, into a memory-mapped cache file
MEMBER_BYTES = 256 << 20         # no single image or CIFAR batch is larger; a zip bomb is
MAX_CLASSES = 100_000            # one wrong label of 10**9 would ask for a 10**9-wide embedding
POINT_SETS = ("two-gaussians", "two-gaussians-64d", "checkerboard", "swiss-roll")
BUILT_IN = ("digits", *POINT_SETS, "cifar10", "mnist")
EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")   # no EPS: it starts Ghostscript
CIFAR_URLS = ("https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
              "https://web.archive.org/web/2023id_/"
              "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz")
CIFAR_MD5 = "c32a1d4ab5d03f1284b67883e8d87530"
MNIST_URLS = ("https://ossci-datasets.s3.amazonaws.com/mnist/",
              "https://storage.googleapis.com/cvdf-datasets/mnist/")
MNIST_MD5 = {"train-labels-idx1-ubyte.gz": "d53e105ee54ea40749a09fcbcd1e9432",
             "train-images-idx3-ubyte.gz": "f68b3c2dcbeaaa9fbdd348bbdeb94873"}


# ---- Errors and progress -------------------------------------------------------------------------

class BadInput(ValueError):
    """What a person typed or supplied is wrong; str() is one sentence that says what to do."""


def attempt(what, cure, call, *args, **kwargs):
    """call(*args, **kwargs); any failure becomes BadInput "cannot use <what>: <why>; <cure>"."""
    try:
        return call(*args, **kwargs)
    except BadInput:
        raise
    # On damaged files zlib, PIL's plug-ins, tarfile and numpy raise nearly every type there is.
    except Exception as error:
        why = " ".join(str(error).split()) or type(error).__name__
        raise BadInput(f"cannot use {what}: {why}; {cure}") from error


def progress(what, done, total):
    """Rewrites one line on stderr, where that is a terminal."""
    if sys.stderr.isatty():
        print(f"\r{what}: {done:,} of {total:,}", end="\n" if done >= total else "",
              file=sys.stderr, flush=True)


# ---- Image sets ----------------------------------------------------------------------------------

@dataclass
class Dataset:
    x: np.ndarray           # uint8 (N, C, H, W), in memory or memory-mapped; or float32 (N, d)
    labels: np.ndarray      # int64 (N,), or None
    classes: list           # the names of the labels 0, 1, ..; [] without labels
    name: str               # short, fit for a folder's name
    source: str             # one line for a person
    fingerprint: str        # 12 hex digits that say of which content, or which files, this is


def load_data(name, data_dir="data", size=None):
    """The data set of that name, or at that path, as a Dataset.

    Names: BUILT_IN; 'cifar10' and 'mnist' are looked for in data_dir, else downloaded to it.
    Paths: a folder of images (sub-folder = class), a .zip of images (EDM's layout, labels in
    dataset.json; a folder may have that layout too), .npz ('images', 'labels'), .npy, a CIFAR-10
    binary .tar.gz, folder or .bin, or an idx images file or its folder.
    size: crops each image to its central square, then resizes it to size x size.
    Raises BadInput for all that is wrong with the name, the files or the size.
    """
    if size is not None and not 1 <= size <= 4096:
        raise BadInput(f"--size {size} is not between 1 and 4096; choose another")
    where = f"the built-in set {name}"
    if name == "digits":
        return from_array(*digits(), list("0123456789"), name, where, data_dir, size)
    if name in POINT_SETS:
        return from_array(*points(name), [], name, where, data_dir, size)
    path = find_built_in(name, Path(data_dir)) if name in BUILT_IN else Path(name)
    if not name or not os.path.exists(path):       # Path("") would be the current folder
        raise BadInput(f"there is no file, folder or data set {name!r}; "
                       f"give a path or one of {', '.join(BUILT_IN)}")
    stem = name if name in BUILT_IN else path.resolve().name.split(".")[0]
    short = re.sub(r"[^A-Za-z0-9_-]+", "-", stem).strip("-")[:40] or "data"
    kind = path.name.lower()
    if path.is_dir() and cifar_folder(path):
        arrays = read_cifar(cifar_folder(path))
    elif path.is_dir() and find_idx(path):
        arrays = read_idx(find_idx(path))
    elif path.is_dir() or kind.endswith(".zip"):
        return from_images(path, short, data_dir, size)
    elif kind.endswith((".npz", ".npy")):
        arrays = read_numpy(path)
    elif kind.endswith((".tar.gz", ".tgz", ".tar", ".bin")):
        arrays = read_cifar(path)
    elif "idx3-ubyte" in kind:
        arrays = read_idx(path)
    else:
        raise BadInput(f"{path} is of no known kind; give a folder of images, a .zip of images, "
                       ".npz, .npy, a CIFAR-10 .tar.gz or .bin, or an idx3-ubyte file")
    return from_array(*arrays, short, path, data_dir, size)


def from_array(x, labels, classes, name, where, data_dir, size):
    """A Dataset of float points (N, d), or of uint8 images (N, H, W[, C]) or (N, C, H, W)."""
    if x.dtype.kind == "f" and x.ndim == 2 and x.shape[1]:
        if size is not None:
            raise BadInput(f"{where} has points, not images; leave out --size")
        x = np.asarray(x, np.float32)
        if not np.isfinite(x).all():
            raise BadInput(f"{where} has points that are infinite or NaN; remove them")
    elif x.dtype == np.uint8 and x.ndim in (3, 4) and 0 not in x.shape[1:]:
        if x.ndim == 3:
            x = x[:, None]                                             # (N, H, W) -> (N, 1, H, W)
        elif x.shape[3] in (1, 3):
            x = x.transpose(0, 3, 1, 2)                             # (N, H, W, C) -> (N, C, H, W)
        if x.shape[1] not in (1, 3):
            raise BadInput(f"{where} has {x.shape[1]} channels; give it 1 (gray) or 3 (RGB)")
    else:
        raise BadInput(f"{where} holds {x.dtype} of shape {x.shape}; store images as uint8 "
                       "(N, H, W), (N, H, W, C) or (N, C, H, W), or points as float (N, d)")
    labels, classes = check_labels(labels, len(x), classes, where)
    tag = fingerprint(x.shape, x, labels, size)
    if x.ndim == 4 and (size is not None or x.shape[2] != x.shape[3]):
        x = gather(len(x), lambda i, channels: pixels(picture(x[i]), size),
                   lambda i: f"image {i} of {where}", f"{name}-{tag}", data_dir)
    if not isinstance(x, np.memmap):
        x = np.require(x, requirements="CW")       # contiguous, writable: torch wants it so
    return Dataset(x, labels, classes, name, describe(x, classes, where), tag)


def from_images(path, name, data_dir, size):
    """A Dataset of the image files of a folder or a zip, in the order of their names."""
    cure = "check that it is whole and that you may read it, or make it again"
    stamps, read = attempt(path, cure, zip_files if path.is_file() else folder_files, path)
    names = sorted(n for n in stamps if n.lower().endswith(EXTENSIONS))
    labels, classes = None, []
    if "dataset.json" in stamps:
        labels = json_labels(names, f"{path}/dataset.json", read)
    elif path.is_dir() and any("/" in n for n in names):
        tops = [n.split("/")[0] if "/" in n else "" for n in names]    # the class, whatever below
        classes = sorted(set(tops))
        if "" in classes:
            raise BadInput(f"{path} holds images both beside its sub-folders and inside them; "
                           "move each into the sub-folder of its class")
        number = {c: k for k, c in enumerate(classes)}
        labels = [number[c] for c in tops]
    labels, classes = check_labels(labels, len(names), classes, path)
    tag = fingerprint(sorted(stamps.items()), size)

    def image(i, channels):
        return attempt(f"{path}/{names[i]}", "replace that file or remove it",
                       lambda: decode(read(names[i]), channels, size))

    x = gather(len(names), image, lambda i: f"{path}/{names[i]}", f"{name}-{tag}", data_dir)
    return Dataset(x, labels, classes, name, describe(x, classes, path), tag)


def describe(x, classes, where):
    """One line for a person: how many, of what shape, from where, of which classes."""
    what = (f"points in {x.shape[1]} dimensions" if x.ndim == 2 else
            f"{'RGB' if x.shape[1] == 3 else 'gray'} images {x.shape[2]}x{x.shape[3]}")
    names = ", ".join(classes[:10]) + ", .." * (len(classes) > 10)
    return f"{len(x):,} {what} from {where}" + f", {len(classes)} classes: {names}" * bool(classes)


def check_labels(labels, n, classes, where):
    """labels as int64 (n,) and their classes' names; (None, []) where there are no labels."""
    if n < 2:
        raise BadInput(f"{where} holds {n} images or points; a data set needs at least two")
    if labels is None:
        return None, []
    labels, top = np.asarray(labels), len(classes) or MAX_CLASSES
    if labels.shape != (n,):
        raise BadInput(f"{where} has {n} images or points, but labels of shape {labels.shape}; "
                       "give one label for each, or none at all")
    if labels.dtype.kind not in "iu" or labels.min() < 0 or labels.max() >= top:
        raise BadInput(f"{where} has labels that are not whole numbers from 0 to {top - 1}; "
                       "number its classes from 0 up")
    return labels.astype(np.int64), classes or [str(k) for k in range(int(labels.max()) + 1)]


def fingerprint(*parts):
    """12 hex digits of a sha256 over arrays (their bytes) and other things (their repr)."""
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, np.memmap):            # by its file: to read it all takes minutes
            stat = os.stat(part.filename)
            part = (str(part.filename), stat.st_size, stat.st_mtime_ns)
        array = isinstance(part, np.ndarray)
        digest.update(np.ascontiguousarray(part) if array else repr(part).encode())
    return digest.hexdigest()[:12]


# ---- Encoded images: folders and zips ------------------------------------------------------------

def zip_files(path):
    """{name: (size, CRC)} of a zip's images and dataset.json, and read(name) -> bytes."""
    archive = zipfile.ZipFile(path)
    infos = {i.filename: i for i in archive.infolist() if wanted(i.filename)}

    def read(name):
        size = bounded(infos[name].file_size, MEMBER_BYTES)
        with archive.open(infos[name]) as file:    # read(size): a false size gives no more
            return file.read(size)
    return {n: (i.file_size, i.CRC) for n, i in infos.items()}, read


def folder_files(path):
    """{name: (size, time)} of a folder's images and dataset.json, and read(name) -> bytes."""
    def stop(error):                               # os.walk would pass over what it cannot read
        raise error
    stamps = {}
    for root, _, files in os.walk(path, onerror=stop, followlinks=True):
        for name in (Path(root, file).relative_to(path).as_posix() for file in files):
            if wanted(name):
                stat = os.stat(path / name)
                stamps[name] = (stat.st_size, stat.st_mtime_ns)

    def read(name):
        bounded(stamps[name][0], MEMBER_BYTES)
        return (path / name).read_bytes()
    return stamps, read


def wanted(name):
    """True for images and dataset.json; hidden ones (.git/.., the Mac's ._twins) are not wanted."""
    hidden = any(part.startswith(".") for part in name.split("/"))
    return not hidden and (name == "dataset.json" or name.lower().endswith(EXTENSIONS))


def bounded(size, limit):
    """size, if that many bytes may be read into memory at once."""
    if size > limit:
        raise ValueError(f"{size:,} bytes are more than the {limit:,} read at once")
    return size


def json_labels(names, where, read):
    """The labels in EDM's dataset.json: {"labels": [[file name, integer], ..] or null}."""
    cure = 'make it {"labels": [["file name", integer], ..]} or remove it'
    pairs = attempt(where, cure, lambda: json.loads(read("dataset.json"))["labels"])
    if pairs is None:
        return None
    labels = attempt(where, cure, lambda: {n.replace("\\", "/"): k for n, k in pairs})
    if set(labels) != set(names):
        raise BadInput(f"{where} and the images disagree about {min(set(labels) ^ set(names))}; "
                       "label every image there is and no other")
    return attempt(where, cure, lambda: np.asarray([labels[n] for n in names]))


def decode(data, channels, size):
    """The bytes of an image file -> uint8 (channels, H, W); channels None: 1 if it is gray."""
    with Image.open(io.BytesIO(data), formats=FORMATS) as image:
        gray = channels == 1 if channels else image.mode in ("1", "L") or image.mode[0] == "I"
        if image.mode[0] == "I":                   # 16 bits, which convert() would clip to white
            image = picture((np.asarray(image).clip(0, 65535) // 256).astype(np.uint8)[None])
        return pixels(image.convert("L" if gray else "RGB"), size)


def picture(x):
    """uint8 (1, H, W) or (3, H, W) -> a PIL image."""
    return Image.fromarray(x[0] if len(x) == 1 else np.ascontiguousarray(x.transpose(1, 2, 0)))


def pixels(image, size):
    """A gray or RGB PIL image -> uint8 (C, H, W): its central square at size x size, antialiased.

    size None: the image as it is.
    """
    if size is not None:
        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        image = image.crop((left, top, left + side, top + side))
        image = image.resize((size, size), Image.Resampling.LANCZOS)   # side == size: a copy
    x = np.asarray(image)
    return x[None] if x.ndim == 2 else x.transpose(2, 0, 1)


def gather(n, image, called, key, data_dir):
    """image(0, None), image(1, C), .. as one uint8 array (n, C, H, W); called(i) says which.

    Above IN_MEMORY_BYTES it is a memory-mapped file data_dir/cache/<key>.npy, which gets its name
    only when complete: one that exists is used as it is, and two processes do no harm.
    """
    path = Path(data_dir, "cache", f"{key}.npy")
    if os.path.exists(path):
        return attempt(path, "delete it", np.lib.format.open_memmap, path, "c")
    first = image(0, None)
    shape, part = (n, *first.shape), path.with_name(f"{path.name}.{os.getpid()}.part")
    large = math.prod(shape) > IN_MEMORY_BYTES

    def blank():
        path.parent.mkdir(parents=True, exist_ok=True)
        if math.prod(shape) + 4096 > shutil.disk_usage(path.parent).free:
            raise OSError("no room on that disk")  # now; in the loop it would kill us (SIGBUS)
        return np.lib.format.open_memmap(part, "w+", np.uint8, shape)

    cure = f"choose a --data-dir with {math.prod(shape):,} bytes to spare"
    x = attempt(path.parent, cure, blank) if large else np.empty(shape, np.uint8)
    try:
        for i in range(n):
            y = image(i, shape[1])
            if y.shape != first.shape or y.shape[1] != y.shape[2]:
                raise BadInput(f"{called(i)} is {y.shape[2]}x{y.shape[1]}, the first image is "
                               f"{shape[3]}x{shape[2]}, and all must be square and of one size; "
                               "give --size N to crop and resize them")
            x[i] = y
            if n >= 1000 and (i % 100 == 0 or i == n - 1):
                progress("reading images", i + 1, n)
        if large:
            x.flush()
            os.replace(part, path)
            x = np.lib.format.open_memmap(path, "c")
    finally:
        if large:
            part.unlink(missing_ok=True)
    return x


# ---- Array files: numpy, CIFAR-10, idx -----------------------------------------------------------

def read_numpy(path):
    """(x, labels or None, []) of an .npy or .npz; an .npy that is too large stays on disk."""
    cure = "save plain numbers with numpy.save, or as 'images' and 'labels' with numpy.savez"
    if path.name.lower().endswith(".npy"):
        x = attempt(path, cure, np.lib.format.open_memmap, path, "c")
        return x if x.nbytes > IN_MEMORY_BYTES else np.array(x), None, []

    def load():
        with zipfile.ZipFile(path) as archive:     # np.savez makes a zip; it cannot be mapped
            bounded(sum(i.file_size for i in archive.infolist()), IN_MEMORY_BYTES)
        with np.load(path, allow_pickle=False) as arrays:
            return arrays["images"], arrays["labels"] if "labels" in arrays else None, []
    return attempt(path, cure, load)


def cifar_folder(path):
    """That of path and path/cifar-10-batches-bin which has batches, or None."""
    folders = (path, path / "cifar-10-batches-bin")
    return next((f for f in folders if any(f.glob("*_batch*.bin"))), None)


def read_cifar(path):
    """(x, labels, classes) of CIFAR-10's binary layout: a tar, a folder or one .bin.

    A record is one byte of label and 3072 bytes: a red, a green, a blue plane, 32 rows each.
    The training batches if there are any, else the test batch.
    """
    cure = "put the official cifar-10-binary.tar.gz there, or files in its layout"
    files = attempt(path, cure, cifar_files, path)
    batches = sorted(set(files) - {"batches.meta.txt"})
    batches = [n for n in batches if n.startswith("data_batch_")] or batches
    for n in batches:
        if len(files[n]) % 3073:
            raise BadInput(f"{n} in {path} is not a whole number of 3073-byte records; {cure}")
    if not batches:
        raise BadInput(f"{path} has neither data_batch_*.bin nor test_batch.bin; {cure}")
    records = np.frombuffer(b"".join(files[n] for n in batches), np.uint8).reshape(-1, 3073)
    classes = files.get("batches.meta.txt", b"").decode("utf-8", "replace").split()
    return records[:, 1:].reshape(-1, 3, 32, 32), records[:, 0], classes or list("0123456789")


def cifar_files(path):
    """{base name: bytes} of the batches and batches.meta.txt, from a tar, a folder or one .bin."""
    known = re.compile(r"(data_batch_\d+|test_batch)\.bin|batches\.meta\.txt")
    files, room = {}, IN_MEMORY_BYTES
    if path.is_dir() or path.suffix == ".bin":
        found = [p for p in path.iterdir() if known.fullmatch(p.name)] if path.is_dir() else \
            [path, path.with_name("batches.meta.txt")]
        for p in (p for p in found if p.is_file()):
            room -= bounded(p.stat().st_size, min(MEMBER_BYTES, room))
            files[p.name] = p.read_bytes()
        return files
    with tarfile.open(path) as tar:
        for member in tar:
            base = member.name.split("/")[-1]
            if member.isfile() and known.fullmatch(base):
                room -= bounded(member.size, min(MEMBER_BYTES, room))
                files[base] = tar.extractfile(member).read(member.size)
    return files


def find_idx(folder):
    """The images file of MNIST's layout in a folder: training before test, plain before .gz."""
    names = [f"{part}-images{dash}idx3-ubyte{gz}"
             for part in ("train", "t10k") for dash in "-." for gz in ("", ".gz")]
    return next((folder / n for n in names if os.path.isfile(folder / n)), None)


def read_idx(path):
    """(x (N, H, W), labels or None, []) of an idx images file and the labels file beside it."""
    name = path.name.replace("images", "labels").replace("idx3", "idx1").removesuffix(".gz")
    beside = [p for p in (path.with_name(name), path.with_name(name + ".gz")) if p.is_file()]
    return idx_array(path, 3), idx_array(beside[0], 1) if beside else None, []


def idx_array(path, rank):
    """The uint8 array of an idx file: big-endian int32 magic (0x800 + rank) and shape, bytes."""
    def load():
        with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
            magic, *shape = struct.unpack(f">{1 + rank}i", file.read(4 + 4 * rank))
            if magic != 0x800 + rank or min(shape) < 0:
                raise ValueError(f"it does not start as an idx{rank} file of bytes does")
            size = bounded(math.prod(shape), IN_MEMORY_BYTES)
            data = file.read(size + 1)
        if len(data) != size:
            raise ValueError(f"it has not the {size:,} bytes of data that its header tells of")
        return np.frombuffer(data, np.uint8).reshape(shape)
    return attempt(path, "replace it by a whole copy", load)


# ---- Downloads -----------------------------------------------------------------------------------

def find_built_in(name, folder):
    """The path of cifar10 or mnist in a folder, downloaded if it is not there."""
    if name == "mnist":
        if not find_idx(folder):
            for file, md5 in MNIST_MD5.items():    # labels first: never the images without them
                download([url + file for url in MNIST_URLS], folder / file, md5)
        return find_idx(folder)
    if cifar_folder(folder):
        return cifar_folder(folder)
    official = folder / "cifar-10-binary.tar.gz"
    tars = [official] * official.is_file() + sorted(folder.glob("cifar-10-binary*.tar.gz"))
    return tars[0] if tars else download(CIFAR_URLS, official, CIFAR_MD5)


def download(urls, path, md5):
    """The file of that md5 sum, from the first of urls that has it, to path; returns path.

    It grows as path.part, which an interruption leaves behind for the next run to resume, and
    gets its name only once its sum is right.  BadInput says how to supply the file by hand.
    """
    part, why = path.with_name(path.name + ".part"), []
    if path.is_file():
        return path
    attempt(path.parent, "choose another --data-dir", path.parent.mkdir, parents=True,
            exist_ok=True)
    for url in urls:
        try:
            resumed = True
            while resumed:                         # a wrong sum: once more, from the start
                resumed = fetch(url, part)
                if hashlib.md5(part.read_bytes(), usedforsecurity=False).hexdigest() == md5:
                    os.replace(part, path)
                    return path
                part.unlink()
            why.append(f"{url} has another md5 sum")
        except (OSError, ValueError, http.client.HTTPException) as error:
            why.append(f"{url}: {' '.join(str(error).split())}")
    raise BadInput(f"{path.name} could not be downloaded ({'; '.join(why)}); "
                   f"run again to resume, or put that file into the folder {path.parent} by hand")


def fetch(url, part):
    """Downloads url to part, onto its end where the server can; True if part was so resumed."""
    have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        answer = urllib.request.urlopen(request, timeout=30)
    except urllib.error.HTTPError as error:
        if error.code == 416 and have:             # nothing follows: part is complete, or wrong
            return True
        raise
    resumed = answer.status == 206
    with answer, open(part, "ab" if resumed else "wb") as file:
        total = have * resumed + int(answer.headers.get("Content-Length") or 0)
        while block := answer.read(1 << 18):
            file.write(block)
            progress(f"downloading {part.stem}", file.tell(), total)
        if file.tell() < total:                    # a broken connection reads like an end
            raise OSError(f"it stopped after {file.tell():,} of {total:,} bytes")
    return resumed


# ---- Built-in sets -------------------------------------------------------------------------------

def digits(n=10_000, seed=0):
    """n images of the digits 0-9, uint8 (n, 3, 16, 16), and their labels, int64 (n,), balanced.

    Pillow's bundled font in random size, weight, tilt, place and colours, bright on dark: drawn
    three times as large and averaged down.  Fresh digits: another seed.
    """
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.arange(n, dtype=np.int64) % 10)
    fonts = {size: ImageFont.load_default(size=size) for size in range(50, 56)}
    ink = np.empty((n, 1, 16, 16), np.float32)
    for i, digit in enumerate(labels):
        page = Image.new("L", (72, 72))
        ImageDraw.Draw(page).text((36, 36), str(digit), fill=255, anchor="mm",
                                  font=fonts[int(rng.integers(50, 56))],
                                  stroke_width=int(rng.integers(1, 3)))
        page = page.rotate(rng.uniform(-5, 5), Image.Resampling.BILINEAR)
        left, top, right, bottom = page.getbbox()  # at most 48x48: the whole digit fits
        dx = rng.uniform(-1, 1) * min(2, (48 - right + left) / 2)
        dy = rng.uniform(-1, 1) * min(2, (48 - bottom + top) / 2)
        x, y = round((left + right) / 2 - 24 + dx), round((top + bottom) / 2 - 24 + dy)
        ink[i, 0] = np.asarray(page.crop((x, y, x + 48, y + 48)).reduce(3), np.float32) / 255
    hue = rng.uniform(0, 1, (n, 1)) + np.arange(3) / 3
    bright = 255 * (0.65 + 0.35 * np.cos(2 * np.pi * hue))[:, :, None, None]     # (n, 3, 1, 1)
    dark = rng.uniform(0, 70, (n, 3, 1, 1))
    return (dark + ink * (bright - dark)).round().astype(np.uint8), labels


def points(name, n=20_000, seed=0):
    """n points of a toy set, float32 (n, d), and their labels, int64 (n,), or None.

    Mean about 0 and standard deviation about 0.5, EDM's sigma_data, in every coordinate.
    two-gaussians: means +-0.48 in every coordinate, deviation 0.14 (0.48^2 + 0.14^2 = 0.5^2),
    the component is the label; in 64 dimensions it is the mixture of STF section 6.1.
    checkerboard: uniform on the 8 squares of one colour of a 4x4 board.  swiss-roll: a spiral.
    """
    rng = np.random.default_rng(seed)
    labels = None
    if name.startswith("two-gaussians"):
        labels = rng.permutation(np.arange(n, dtype=np.int64) % 2)
        x = 0.14 * rng.standard_normal((n, 64 if name.endswith("64d") else 2))
        x += 0.48 * (2 * labels[:, None] - 1)
    elif name == "checkerboard":
        row, pair = rng.integers(0, 4, n), rng.integers(0, 2, n)
        square = np.stack([row, 2 * pair + row % 2], 1)
        x = (square + rng.uniform(0, 1, (n, 2)) - 2) * 3 ** 0.5 / 4    # U(-2, 2) has sd 2/sqrt(3)
    else:
        angle = rng.uniform(1.5 * np.pi, 4.5 * np.pi, (n, 1))
        x = angle * np.concatenate([np.cos(angle), np.sin(angle)], 1)
        x = x + 0.25 * rng.standard_normal((n, 2))
        x = (x - x.mean(0)) / x.std(0) * 0.5
    return x.astype(np.float32), labels


# ---- Pictures ------------------------------------------------------------------------------------

def to_uint8(x):
    """Images in [-1, 1] -> uint8; points, (n, d), as they are.  A tensor -> an array."""
    x = x.detach().cpu()
    return ((x.clamp(-1, 1) + 1) * 127.5).round().byte().numpy() if x.ndim == 4 else x.numpy()


def tile(x, columns=None, cell=64):
    """Images (n, C, H, W) uint8 -> one PIL image, pixels enlarged; columns None: nearly square."""
    columns = columns or math.ceil(math.sqrt(len(x)))
    rows, zoom = math.ceil(len(x) / columns), max(1, cell // x.shape[-1])
    page = np.zeros((rows * columns, *x.shape[1:]), np.uint8)
    page[:len(x)] = x
    page = page.reshape(rows, columns, *x.shape[1:]).transpose(2, 0, 3, 1, 4)
    image = picture(page.reshape(x.shape[1], rows * x.shape[2], columns * x.shape[3]))
    return image.resize((image.width * zoom, image.height * zoom), Image.Resampling.NEAREST)


def scatter(x, half_width=1.2, side=400):
    """Points (n, d) -> a PIL image of their first two coordinates, each within +-half_width."""
    page = Image.new("L", (side, side), 235)
    pen = ImageDraw.Draw(page)
    for a, b in (x[:, :2] * [1, -1] / half_width + 1) / 2 * side:
        pen.rectangle((a, b, a + 1, b + 1), fill=0)
    return page


def save_pictures(path, panels, names=()):
    """One PNG of captioned panels side by side: [(caption, images or points), ...].

    names: one for each row of images, as of its class; a panel then has len(names) equal rows.
    """
    parts = [(text, scatter(x) if x.ndim == 2 else tile(x, len(x) // len(names) if names else None))
             for text, x in panels]
    gap, top, font = 16, 28, ImageFont.load_default(size=16)
    left = gap + max((math.ceil(font.getlength(name)) + gap for name in names), default=0)
    width = [max(image.width, math.ceil(font.getlength(text))) for text, image in parts]
    height = max(image.height for _, image in parts)
    page = Image.new("RGB", (left + sum(width) + gap * len(parts), top + height + gap), "white")
    pen = ImageDraw.Draw(page)
    for i, name in enumerate(names):
        pen.text((gap, top + height * (i + 0.5) / len(names)), name, "black", font, anchor="lm")
    for (text, image), w in zip(parts, width):
        pen.text((left, 5), text, "black", font)
        page.paste(image.convert("RGB"), (left, top))
        left += w + gap
    page.save(f"{path}.part", format="PNG", optimize=True)
    os.replace(f"{path}.part", path)


# ---- Distances -----------------------------------------------------------------------------------

def pixel_features(x, side=16):
    """Images (n, C, H, W) averaged down to at most side x side, or points: float64 (n, d)."""
    if x.ndim == 4 and x.shape[-1] > side:
        x = torch.nn.functional.adaptive_avg_pool2d(x, side)
    return x.flatten(1).double().cpu().numpy()


def moments(features):
    """(n, d) -> mean (d,) and covariance (d, d), float64."""
    return features.mean(0), np.cov(features, rowvar=False, dtype=np.float64).reshape(
        features.shape[1], features.shape[1])


def frechet_distance(mean1, cov1, mean2, cov2):
    """Squared Frechet distance of two Gaussians: FID, where the features are Inception's.

        |m1 - m2|^2 + Tr(C1 + C2 - 2 (C1 C2)^{1/2})

    (C1 C2)^{1/2} has the trace of (A C2 A)^{1/2}, A = C1^{1/2}, and that is a symmetric problem:
    two eigendecompositions, no general matrix root, no complex numbers, singular C1, C2 allowed.
    mean (d,), cov (d, d) float64 -> float, in the features' squared units.
    """
    values, Q = np.linalg.eigh(cov1)
    A = (Q * np.sqrt(values.clip(0))) @ Q.T
    root = np.sqrt(np.linalg.eigvalsh(A @ cov2 @ A).clip(0)).sum()
    return float(((mean1 - mean2) ** 2).sum() + np.trace(cov1) + np.trace(cov2) - 2 * root)


# ---- Runs ----------------------------------------------------------------------------------------
# A run is a folder: options.json, log.jsonl, checkpoint-*.pt, samples-*.png.

def new_run(out, name, root="runs"):
    """Makes the folder of a new run: `out`, or the next free root/NUMBER-name; returns its path."""
    if out is None:
        taken = [int(n.split("-")[0]) for n in os.listdir(root) if n.split("-")[0].isdigit()] \
            if os.path.isdir(root) else []
        out = f"{root}/{max(taken, default=-1) + 1:03d}-{name}"
    if os.path.isdir(out) and os.listdir(out):
        raise BadInput(f"{out} is not empty; choose another --out, or go on with --resume {out}")
    attempt(out, "choose another --out", os.makedirs, out, exist_ok=True)
    return out


def newest_run(root="runs"):
    runs = [f"{root}/{n}" for n in os.listdir(root)] if os.path.isdir(root) else []
    runs = [r for r in runs if os.path.exists(f"{r}/options.json")]
    if not runs:
        raise BadInput(f"there is no run under {root}/ to resume; start one, or name its folder")
    return max(runs, key=lambda r: os.path.getmtime(f"{r}/options.json"))


def checkpoints(run):
    """Paths of a run's checkpoints, oldest first."""
    return sorted(str(p) for p in Path(run).glob("checkpoint-*.pt"))


def read_options(run, needed=()):
    """The options a run was started with; each of `needed` must be among them."""
    def read():
        options = json.loads(Path(run, "options.json").read_text())
        [options[name] for name in needed]
        return options
    return attempt(f"{run}/options.json", "name a folder that train.py made", read)


def write_json(path, value):
    Path(f"{path}.part").write_text(json.dumps(value, indent=1) + "\n")
    os.replace(f"{path}.part", path)


def load_checkpoint(run, device="cpu"):
    """The newest checkpoint of a run: step, options, model, ema, optimizer.  Never unpickled."""
    paths = checkpoints(run)
    if not paths:
        raise BadInput(f"{run} has no checkpoint; name a folder that train.py made")
    try:
        state = torch.load(paths[-1], map_location=device, weights_only=True)
        state["step"], state["options"], state["model"], state["ema"], state["optimizer"]
    except Exception as error:      # torch's own text runs over lines and advises to unpickle
        raise BadInput(f"{paths[-1]} is damaged, or no checkpoint of train.py; remove it, and "
                       "the one before it is used") from error
    return state


def load_weights(denoiser, state, which, run):
    """Puts state[which], "model" or "ema", into the denoiser."""
    attempt(f"the {which} weights of {run}", "it is not a checkpoint of this network",
            lambda: denoiser.load_state_dict(state[which]))


def build_denoiser(options):
    """The network and preconditioning of a run, with fresh weights."""
    channels, *size = options["shape"]
    classes = len(options["classes"])
    if options["arch"] == "mlp":
        model = MLP(channels, options["width"] or 128, options["blocks"] or 3, classes)
    else:
        given = {key: options[key] for key in ("width", "blocks") if options[key]}
        if options["mult"]:
            given["mult"] = tuple(int(m) for m in options["mult"].split(","))
        given = UNETS[options["arch"]] | given
        what = f"--arch {options['arch']} at {size[0]}x{size[0]}"
        model = attempt(what, "choose another --size or --mult", lambda: UNet(
            size[0], channels, dropout=options["dropout"], classes=classes,
            label_dropout=options["label-dropout"], **given))
    return Denoiser(model, partial(precondition, options["target"], build_schedule(options)))


def precondition(target, schedule, sigma):
    """The schedule row's c_skip, c_out, c_in, c_noise; the first two are the target's, if any."""
    c_skip, c_out, c_in, c_noise = schedule.precondition(sigma)
    if target != "schedule":
        c_skip, c_out = target_coefficients(target, sigma)
    return c_skip, c_out, c_in, c_noise


def build_schedule(options):
    """The schedule row of a run."""
    if options["schedule"] == "edm":
        return EDM(P_mean=options["P-mean"], P_std=options["P-std"])
    return SCHEDULES[options["schedule"]]()


def load_run(run, device="cpu", weights="ema"):
    """A run's denoiser in eval mode, its options, and the step of its newest checkpoint."""
    state = load_checkpoint(run, device)
    denoiser = build_denoiser(state["options"]).to(device).eval()
    load_weights(denoiser, state, "ema" if weights == "ema" else "model", run)
    return denoiser, state["options"], state["step"]


def pick_device(name):
    """The device of that name; None: cuda where there is one, else cpu."""
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    attempt(f"--device {name}", "choose cpu or, where there is a GPU, cuda", torch.zeros, 1,
            device=name)
    return name


def generate(denoise, seeds, shape, sampler, schedule, steps, labels=None, batch=64, churn=0.0,
             device="cpu"):
    """Samples, one per seed: (len(seeds), *shape), on the CPU.

    Sample i depends on seeds[i] and labels[i] alone, not on the batch it is drawn in.
    """
    t, samples = schedule.time_steps(steps), []
    for i in range(0, len(seeds), batch):
        noise = seeded_noise(seeds[i:i + batch], shape, device)
        D = partial(denoise, labels=None if labels is None else labels[i:i + batch].to(device))
        x = schedule.sigma(t[0]) * noise()                                        # (b, *shape)
        if sampler == "euler":
            x = euler(D, schedule.s(t[0]) * x, t, schedule)
        elif sampler == "heun":
            x = heun(D, schedule.s(t[0]) * x, t, schedule)
        elif sampler == "edm-stochastic":
            x = edm_stochastic(D, x, schedule.sigma(t), noise, S_churn=churn)
        samples.append(x.cpu())
    return torch.cat(samples)


# ---- Command line --------------------------------------------------------------------------------

class Parser(argparse.ArgumentParser):
    """Its errors are BadInput, so that a wrong option is one sentence; no abbreviations."""

    def __init__(self, **options):
        super().__init__(allow_abbrev=False, **options)

    def error(self, message):
        raise BadInput(f"{message}; see --help")


def status(text):
    """A line that rewrites itself on a terminal; None ends it."""
    if text is None or not sys.stdout.isatty():
        print(text or "", flush=True)
    else:
        print(f"\r{text:<79}", end="", flush=True)


SAMPLERS = ("heun", "euler", "edm-stochastic")


def number(kind, low, high=float("inf")):
    """A type for argparse: an int or float within [low, high]."""
    def parse(text):
        value = kind(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text} is not within [{low}, {high}]")
        return value
    parse.__name__ = kind.__name__
    return parse


def parser():
    p = Parser(prog="evaluate.py", description="What a run of train.py has learned.")
    commands = p.add_subparsers(dest="command", required=True, metavar="COMMAND")
    c = commands.add_parser("sample", help="draw samples from a run")
    c.add_argument("run", metavar="RUN", help="folder that train.py made")
    c.add_argument("--sampler", choices=SAMPLERS, default="heun", help="default: heun")
    c.add_argument("--steps", type=number(int, 1), default=18, help="default: 18")
    c.add_argument("--churn", type=number(float, 0), default=0.0,
                   help="S_churn of edm-stochastic (default: 0)")
    c.add_argument("--num", type=number(int, 1), help="default: 64 images, or 4000 points")
    c.add_argument("--class", dest="label", help="name or number of one class; none: all in turn")
    c.add_argument("--seed", type=number(int, 0), default=0,
                   help="sample i has seed SEED + i (default: 0)")
    c.add_argument("--batch", type=number(int, 1), default=64, help="default: 64; changes no image")
    c.add_argument("--weights", choices=["ema", "raw"], default="ema", help="default: ema")
    c.add_argument("--out", help="a .png grid or an .npz of arrays; none: a .png in RUN")
    c.add_argument("--device", help="none: cuda where there is one, else cpu")
    return p


def sample(args):
    """evaluate.py sample: draws samples of a run and saves them."""
    device = pick_device(args.device)
    denoiser, options, step = load_run(args.run, device, args.weights)
    schedule, classes = build_schedule(options), options["classes"]
    images = len(options["shape"]) > 1
    args.num = args.num or (64 if images else 4000)
    if args.churn and args.sampler != "edm-stochastic":
        raise BadInput(f"--churn: {args.sampler} draws no noise; choose --sampler edm-stochastic")
    attempt(f"--steps {args.steps}", "choose fewer", schedule.time_steps, args.steps)
    labels = None
    if args.label is not None:
        names = classes if args.label in classes else [str(k) for k in range(len(classes))]
        if args.label not in names:
            raise BadInput(f"--class {args.label}: " + (
                f"choose one of {', '.join(classes)}" if classes else
                "the run is not class-conditional; leave the option out"))
        labels = torch.full((args.num,), names.index(args.label))
    elif classes:
        labels = torch.arange(args.num) % len(classes)
    suffix = "" if args.label is None else f"-{args.label}"
    out = args.out or f"{args.run}/{args.sampler}-{args.steps}{suffix}.png"
    if os.path.isdir(out) or not out.endswith((".png", ".npz")):
        raise BadInput(f"--out {out} is not a file's name ending in .png or .npz; choose another")
    attempt(out, "choose another --out", lambda: open(f"{out}.part", "wb").close())
    os.remove(f"{out}.part")

    start = time.time()
    x = to_uint8(generate(denoiser, range(args.seed, args.seed + args.num), options["shape"],
                          args.sampler, schedule, args.steps, labels,
                          args.batch if images else args.num, args.churn, device))
    if out.endswith(".npz"):
        with open(f"{out}.part", "wb") as file:
            np.savez(file, images=x, **({} if labels is None else {"labels": labels.numpy()}))
        os.replace(f"{out}.part", out)
    else:
        equal = args.label is None and classes and args.num % len(classes) == 0
        rows = classes if images and equal else ()
        x = x[np.argsort(labels.numpy(), kind="stable")] if rows else x       # a row for each class
        save_pictures(out, [(f"{args.sampler}, {args.steps} steps", x)], rows)
    print(f"{args.num} samples of {args.run} at step {step}, {args.weights} weights, "
          f"{args.sampler}, {args.steps} steps, {time.time() - start:.1f} s\n{out}")


def main(argv=None):
    try:
        args = parser().parse_args(argv)
        if args.command == "sample":
            sample(args)
        return 0
    except BadInput as error:
        print(f"evaluate.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nevaluate.py: stopped", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
