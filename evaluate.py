"""evaluate.py: data sets, the network of a run, its samples, and how good they are.

    python evaluate.py sample RUN --sampler heun --steps 18      a picture of samples
    python evaluate.py fid RUN|IMAGES                            distance to the data: FID, IS
    python evaluate.py levels RUN                                loss at each noise level

From Python:

    load_data(name)                    -> Dataset: x, labels, classes, ...
    load_run(folder)                   -> denoiser, options
    generate(denoiser, options, seeds) -> samples, one for each seed
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
import sys
import tarfile
import time
import urllib.request
import warnings
import zipfile
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageDraw, ImageFont, ImageOps, UnidentifiedImageError

import samplers
from losses import WEIGHTS, stf_target, stf_weights
from networks import MLP, UNETS, Denoiser, Inception, UNet, target_coefficients
from schedules import EDM, SCHEDULES


# ---- Errors, progress, ranks ---------------------------------------------------------------------

class BadInput(ValueError):
    """What a person typed or supplied is wrong; str() is one sentence that says what to do."""

    def __str__(self):      # names in archives may hold line breaks, or codes that rule a terminal
        return "".join(c if c.isprintable() else "?" for c in super().__str__())


def attempt(what, cure, call, *args, **kwargs):
    """call(*args, **kwargs); any failure becomes BadInput "cannot use <what>: <why>; <cure>"."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")        # warnings would be more than one sentence
            return call(*args, **kwargs)
    except BadInput:
        raise
    # On damaged files zlib, PIL's plug-ins, tarfile and numpy raise nearly every type there is.
    except Exception as error:
        why = " ".join(str(error).split()) or type(error).__name__
        raise BadInput(f"cannot use {what}: {why}; {cure}") from error


def plain_streams():
    """A class's name may have letters that the terminal has not: they become question marks."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")


class Progress:
    """What a long task is doing and how long it will still take, on stderr, told by rank 0.

    Progress("reading images", 50_000)(done) after each part.  A terminal shows one line that
    rewrites itself; a pipe or a file gets a line after 5 seconds and then every 15.
    """

    def __init__(self, what, total, begin=0):
        self.what, self.total, self.begin, self.live = what, total, begin, sys.stderr.isatty()
        self.start = time.time()
        self.due = self.start + (0.5 if self.live else 5)

    def __call__(self, done, more=""):
        now, end = time.time(), done >= self.total and self.live and self.due > self.start + 0.5
        if ranks()[0] > 0 or (now < self.due and not end):
            return
        self.due = now + (0.5 if self.live else 15)
        left = int((now - self.start) / max(done - self.begin, 1) * max(self.total - done, 0))
        text = f"{self.what}: {done:,} of {self.total:,}{more}, {left // 60}:{left % 60:02d} left"
        print(f"\r{text:<79}" if self.live else text, end="" if self.live and not end else "\n",
              file=sys.stderr, flush=True)


def ranks():
    """(this process's rank, the number of ranks): torchrun starts one process for each GPU."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def total(x):
    """The sum of all ranks' tensors x, in place."""
    if dist.is_initialized():
        dist.all_reduce(x)
    return x


# ---- Data sets -----------------------------------------------------------------------------------

IN_MEMORY_BYTES = 4 << 30        # a larger set is decoded once, into a memory-mapped cache file
MEMBER_BYTES = 256 << 20         # no single image or CIFAR batch is larger; a zip bomb is
MAX_CLASSES = 100_000
POINT_SETS = ("two-gaussians", "two-gaussians-64d", "ring", "checkerboard", "swiss-roll")
BUILT_IN = ("digits", *POINT_SETS, "cifar10", "mnist")
ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")   # no EPS: it starts Ghostscript
CIFAR_HOME = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
CIFAR_URLS = (CIFAR_HOME, f"https://web.archive.org/web/2023id_/{CIFAR_HOME}")
CIFAR_MD5 = "c32a1d4ab5d03f1284b67883e8d87530"
MNIST_URLS = ("https://ossci-datasets.s3.amazonaws.com/mnist/",
              "https://storage.googleapis.com/cvdf-datasets/mnist/")
MNIST_MD5 = {"train-labels-idx1-ubyte.gz": "d53e105ee54ea40749a09fcbcd1e9432",
             "train-images-idx3-ubyte.gz": "f68b3c2dcbeaaa9fbdd348bbdeb94873"}


@dataclass
class Dataset:
    x: np.ndarray           # uint8 (N, C, H, W), in memory or memory-mapped; or float32 (N, d)
    labels: np.ndarray      # int64 (N,), each within range(len(classes)); or None
    classes: list           # the names of the classes that occur; [] without labels
    name: str               # short, fit for a folder's name
    source: str             # one line for a person
    fingerprint: str        # 12 hex digits of the content, wherever it lies


def load_data(name, size=None, data_dir="data", fresh=None):
    """The data set of that name, or at that path, as a Dataset; BadInput where there is none.

    Names: BUILT_IN; 'cifar10' and 'mnist' are looked for in data_dir, else downloaded to it.
    Paths: a folder or a .zip of images (sub-folder = class; or labels in a dataset.json, as EDM's
    code has them), .npz ('images', 'labels'), .npy, a CIFAR-10 binary .tar.gz, folder or .bin, or
    an idx images file or its folder.
    size: crops each image to its central square, then resizes it to size x size.
    fresh: of a set that is drawn here, so many rows that load_data(name) does not have.
    """
    if size is not None and not 1 <= size <= 4096:
        raise BadInput(f"--size {size} is not between 1 and 4096; choose another")
    if name in ("digits", *POINT_SETS):
        more = dict(n=fresh, seed=1) if fresh else {}
        drawn = (*digits(**more), "0123456789") if name == "digits" else points(name, **more)
        return build(name, f"the built-in set {name}", data_dir, size, *drawn)
    path = find_built_in(name, Path(data_dir)) if name in BUILT_IN else Path(name)
    if not name or not os.path.exists(path):       # Path("") would be the current folder
        raise BadInput(f"there is no file, folder or data set {name!r}; "
                       f"give a path or one of {', '.join(BUILT_IN)}")
    stem = name if name in BUILT_IN else path.resolve().name.split(".")[0]
    short = re.sub(r"[^A-Za-z0-9_-]+", "-", stem).strip("-")[:40] or "data"
    file = cifar_folder(path) or find_idx(path) or path
    kind = "" if file.is_dir() else file.name.lower()
    if cifar_folder(file) or kind.endswith((".tar.gz", ".tgz", ".tar", ".bin")):
        read, cure = read_cifar, "put the official cifar-10-binary.tar.gz there, or its files"
    elif "idx3-ubyte" in kind:
        read, cure = read_idx, "replace it by a whole copy"
    elif not kind or kind.endswith(".zip"):
        files, key, labels, classes = attempt(
            file, "check that it is whole and that you may read it", read_images, file, size)
        x = gather(files, f"{short}-{key}", data_dir) if files else files
        return build(short, path, data_dir, None, x, labels, classes)
    elif kind.endswith((".npz", ".npy")):
        read, cure = read_numpy, "save plain numbers with numpy.save, or 'images' with numpy.savez"
    else:
        raise BadInput(f"{path} is of no known kind; give a folder or a .zip of images "
                       f"({' '.join(ENDINGS)}), .npz, .npy, a CIFAR-10 .tar.gz or .bin, or an "
                       "idx3-ubyte file")
    return build(short, path, data_dir, size, *attempt(file, cure, read, file))


def build(name, where, data_dir, size, x, labels=None, classes=()):
    """The Dataset of points (N, d) or images (N, C, H, W); classes: names of labels 0, 1, ..."""
    if len(x) < 4:
        raise BadInput(f"{where} holds {len(x)} images or points, and a data set needs at least 4; "
                       f"images end in {' '.join(ENDINGS)}")
    if labels is not None:
        labels, top = np.asarray(labels), len(classes) or MAX_CLASSES
        whole = labels.shape == (len(x),) and labels.dtype.kind in "iu"
        if not whole or labels.min() < 0 or labels.max() >= top:
            raise BadInput(
                f"{where} has {len(x)} images or points and {labels.dtype} labels {labels.shape}; "
                f"give one label for each, whole numbers from 0 to {top - 1}, or none at all")
        occur, labels = np.unique(labels, return_inverse=True)         # classes without images go
        labels = labels.astype(np.int64)
        classes = [str(classes[k] if classes else k) for k in occur]
    if size is not None and x.ndim != 4:
        raise BadInput(f"{where} has points, not images; leave out --size")
    if x.ndim == 4 and (size is not None or x.shape[2] != x.shape[3]):
        files = [(f"image {i} of {where}", picture, x[i], size) for i in range(len(x))]
        x = gather(files, f"{name}-{fingerprint(x, size)}", data_dir)
    if not isinstance(x, np.memmap):
        x = np.require(x, requirements="CW")       # contiguous, writable: torch wants it so
    what = (f"points in {x.shape[1]} dimensions" if x.ndim == 2 else
            f"{'RGB' if x.shape[1] == 3 else 'gray'} images {x.shape[2]}x{x.shape[3]}")
    names = f", {len(classes)} classes: {', '.join(classes[:10])}" if classes else ""
    source = f"{len(x):,} {what} from {where}{names}" + (", .." if len(classes) > 10 else "")
    return Dataset(x, labels, list(classes), name, source, fingerprint(x, labels))


def fingerprint(x, labels=None):
    """12 hex digits of a sha256 of the rows x and the labels; of a set too large for memory, of
    10,000 rows evenly spaced."""
    digest = hashlib.sha256(repr((x.shape, x.dtype.str)).encode())
    if x.nbytes > IN_MEMORY_BYTES:
        x = x[np.linspace(0, len(x) - 1, 10_000).astype(int)]
    for part in (x, labels):
        digest.update(np.ascontiguousarray(part) if isinstance(part, np.ndarray)
                      else repr(part).encode())
    return digest.hexdigest()[:12]


def gather(files, key, data_dir, channels=None):
    """The images of files as one uint8 array (n, C, H, W).

    files: for each (its name, read, what read is called with, size), where read gives a PIL image.
    C is 3 if any image has colour.  Above IN_MEMORY_BYTES the array is a memory-mapped file
    data_dir/cache/<key>.npy, which gets its name only when complete: one that exists is used as it
    is, and two processes do no harm.
    """
    def image(i):
        called, read, source, size = files[i]

        def pixels():
            return decode(read(source), size)
        return attempt(called, "replace it or remove it", pixels)

    def blank():
        path.parent.mkdir(parents=True, exist_ok=True)
        if bytes + 4096 > shutil.disk_usage(path.parent).free:
            raise OSError("no room on that disk")  # now; in the loop it would kill us (SIGBUS)
        return np.lib.format.open_memmap(part, "w+", np.uint8, shape)

    path = Path(data_dir, "cache", f"{key}.npy")
    if path.exists():
        return attempt(path, "delete it", np.lib.format.open_memmap, path, "c")
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    n, first = len(files), image(0)
    shape = (n, channels or len(first), *first.shape[1:])
    bytes = math.prod(shape)
    cure, large = f"choose a --data-dir with {bytes:,} bytes to spare", bytes > IN_MEMORY_BYTES
    x = attempt(path.parent, cure, blank) if large else np.empty(shape, np.uint8)
    told = Progress("reading images", n)
    try:
        for i in range(n):
            y = image(i)
            if y.shape[1:] != shape[2:] or shape[2] != shape[3]:
                raise BadInput(f"{files[i][0]} is {y.shape[2]}x{y.shape[1]}, and all must be "
                               "square and of one size; give --size N to crop and resize them")
            if len(y) > shape[1]:                  # the first colour after gray: start over
                return gather(files, key, data_dir, channels=3)
            x[i] = y
            told(i + 1)
        if large:
            x.flush()
            os.replace(part, path)
    finally:
        if large:
            part.unlink(missing_ok=True)
    return np.lib.format.open_memmap(path, "c") if large else x


def decode(image, size):
    """A PIL image -> uint8 (1, H, W) if its format is gray, else (3, H, W); see load_data's size.

    Upright by its EXIF orientation, transparent parts on white.  ValueError: more than 8 bits, or
    more than one picture.
    """
    raw = " ".join(str(tile[3]) for tile in getattr(image, "tile", ()))
    if image.mode[0] in "IF" or ";16" in raw:
        raise ValueError("it has more than 8 bits per channel; save it with 8")
    if getattr(image, "n_frames", 1) > 1 and image.format != "MPO":       # a phone's JPEG is MPO
        raise ValueError(f"it holds {image.n_frames} pictures; save each as a file")
    image = ImageOps.exif_transpose(image)
    gray = image.mode in ("1", "L", "LA", "La")
    if "A" in image.mode.upper() or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert("L" if gray else "RGB")
    if size is not None:
        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        image = image.crop((left, top, left + side, top + side))
        image = image.resize((size, size), Image.Resampling.LANCZOS)   # side == size: a copy
    x = np.asarray(image)
    return x[None] if x.ndim == 2 else x.transpose(2, 0, 1)


def picture(x):
    """uint8 (1, H, W) or (3, H, W) -> a PIL image."""
    return Image.fromarray(x[0] if len(x) == 1 else np.ascontiguousarray(x.transpose(1, 2, 0)))


# ---- Readers: of (x, labels, classes), as much as build() needs ----------------------------------

def bounded(size, limit):
    """size, if that many bytes may be read into memory at once."""
    if size > limit:
        raise ValueError(f"{size:,} bytes are more than the {limit:,} read at once")
    return size


def members(path, wanted, deep=True):
    """{name: (size, time or CRC)} of the wanted files of a folder, zip or tar, and read(name)."""
    if path.is_dir():
        found = {file.relative_to(path).as_posix(): os.stat(file) for file in walk(path, deep)
                 if wanted(file.relative_to(path).as_posix())}
        stamps = {name: (stat.st_size, stat.st_mtime_ns) for name, stat in found.items()}

        def opened(name):
            return open(path / name, "rb")
    elif path.suffix.lower() == ".zip":
        archive = zipfile.ZipFile(path)
        infos = [info for info in archive.infolist() if wanted(info.filename)]
        stamps = {info.filename: (info.file_size, info.CRC) for info in infos}
        opened = archive.open
    else:
        archive = tarfile.open(path)
        stamps = {i.name: (i.size, i.mtime) for i in archive if i.isfile() and wanted(i.name)}
        opened = archive.extractfile

    def read(name):
        size = bounded(stamps[name][0], MEMBER_BYTES)
        with opened(name) as file:                 # read(size): a false size gives no more
            return file.read(size)
    return stamps, read


def walk(folder, deep):
    """The files below a folder, through links, but each real folder once: links may go round."""
    def stop(error):                               # os.walk would pass over what it cannot read
        raise error

    seen = {os.path.realpath(folder)}
    for root, folders, files in os.walk(folder, onerror=stop, followlinks=True):
        yield from (Path(root, file) for file in files)
        paths = sorted((os.path.join(root, name) for name in folders), key=os.path.islink)
        folders[:] = []
        for path in paths:                         # folders before the links to them
            if deep and os.path.realpath(path) not in seen:
                folders.append(os.path.basename(path))
            seen.add(os.path.realpath(path))


def is_image(name):
    """Whether a file in a folder or archive is one of a set: not hidden, nor in a hidden folder."""
    parts = name.replace("\\", "/").split("/")     # hidden: .git/.., the Mac's ._twins
    return parts[-1].lower().endswith(ENDINGS) and not any(part.startswith(".") for part in parts)


def read_images(path, size):
    """(files as gather wants them, a cache key, labels, classes) of a folder or a zip of images."""
    stamps, read = members(path, lambda name: is_image(name) or name == "dataset.json")
    names, labels, classes = sorted(set(stamps) - {"dataset.json"}), None, ()
    parts = [name.replace("\\", "/").split("/") for name in names]
    while parts and len({p[0] for p in parts}) == 1 and min(map(len, parts)) > 2:
        parts = [p[1:] for p in parts]             # one folder around the folders of classes
    if "dataset.json" in stamps:
        cure = 'make it {"labels": [["file name", integer], ..]}, of all images, or remove it'
        labels = attempt(f"{path}/dataset.json", cure, json_labels, names, read)
    elif any(len(p) > 1 for p in parts):
        if not all(len(p) > 1 for p in parts):
            raise BadInput(f"{path} holds images both beside its sub-folders and inside them; "
                           "move each into the sub-folder of its class")
        classes, labels = np.unique([p[0] for p in parts], return_inverse=True)

    def opened(name):
        try:
            return Image.open(io.BytesIO(read(name)), formats=FORMATS)
        except UnidentifiedImageError:             # Pillow names an object, not the file
            raise ValueError("it is no image, or damaged") from None
    key = hashlib.sha256(repr((sorted(stamps.items()), size)).encode()).hexdigest()[:12]
    files = [(f"{path}/{name}", opened, name, size) for name in names]
    return files, key, labels, list(classes)


def json_labels(names, read):
    """The labels in EDM's dataset.json: {"labels": [[file name, integer], ..] or null}."""
    pairs = json.loads(read("dataset.json"))["labels"]
    if pairs is None:
        return None
    labels = {name.replace("\\", "/"): label for name, label in pairs}
    names = [name.replace("\\", "/") for name in names]
    if set(labels) != set(names):
        raise ValueError(f"it and the images disagree about {min(set(labels) ^ set(names))}")
    return np.asarray([labels[name] for name in names])


def read_numpy(path):
    """An .npy's points (N, d) or images (N, H, W[, C]) or (N, C, H, W); an .npz's, and labels."""
    if path.suffix.lower() == ".npy":
        x, labels = np.lib.format.open_memmap(path, "c"), None
        x = x if x.nbytes > IN_MEMORY_BYTES else np.array(x)           # a large one stays on disk
    else:
        with zipfile.ZipFile(path) as archive:     # np.savez makes a zip; it cannot be mapped
            bounded(sum(i.file_size for i in archive.infolist()), IN_MEMORY_BYTES)
        with np.load(path, allow_pickle=False) as arrays:
            if "images" not in arrays:
                raise ValueError(f"it holds {', '.join(arrays.files) or 'nothing'}, not 'images'")
            x, labels = arrays["images"], arrays.get("labels")
    if x.dtype.kind == "f" and x.ndim == 2 and x.shape[1]:
        x = np.asarray(x, np.float32)
        if not np.isfinite(x).all():
            raise BadInput(f"{path} has points that are infinite or NaN; remove them")
        return x, labels
    images = x.dtype == np.uint8 and x.ndim in (3, 4) and 0 not in x.shape[1:]
    if not images or (x.ndim == 4 and not {1, 3} & {x.shape[1], x.shape[3]}):
        raise BadInput(f"{path} holds {x.dtype} {x.shape}; store uint8 images (N, H, W), or "
                       "(N, H, W, C) or (N, C, H, W) of 1 or 3, not 4 channels, or float (N, d)")
    if x.ndim == 3:
        x = x[:, None]                                                 # (N, H, W) -> (N, 1, H, W)
    elif x.shape[3] in (1, 3):
        x = x.transpose(0, 3, 1, 2)                                 # (N, H, W, C) -> (N, C, H, W)
    return x, labels


def read_cifar(path):
    """(x, labels, classes) of CIFAR-10's binary layout: a tar, a folder or one .bin.

    A record is a byte of label and 3072 bytes: a red, a green, a blue plane, 32 rows each.  Gives
    the training batches if there are any, else the test batch.
    """
    folder, known = path, r"(data_batch_\d+|test_batch)\.bin"
    if path.is_file() and path.suffix.lower() == ".bin":
        folder, known = path.parent, re.escape(path.name)
    wanted = re.compile(rf"(.*/)?({known}|batches\.meta\.txt)", re.DOTALL).fullmatch
    stamps, read = members(folder, wanted, deep=False)
    bounded(sum(size for size, _ in stamps.values()), IN_MEMORY_BYTES)
    files = {name.split("/")[-1]: read(name) for name in stamps}
    classes = files.pop("batches.meta.txt", b"").decode("utf-8", "replace").split()
    batches = sorted(n for n in files if n.startswith("data_batch_")) or sorted(files)
    if not batches:
        raise ValueError("it has neither data_batch_*.bin nor test_batch.bin")
    for name in batches:
        if len(files[name]) % 3073:
            raise ValueError(f"{name} is not a whole number of 3073-byte records")
    records = np.frombuffer(b"".join(files[n] for n in batches), np.uint8).reshape(-1, 3073)
    return records[:, 1:].reshape(-1, 3, 32, 32), records[:, 0], classes or "0123456789"


def read_idx(path):
    """(x (N, 1, H, W), labels or None) of an idx images file and the labels file beside it."""
    name = path.name.replace("images", "labels").replace("idx3", "idx1").removesuffix(".gz")
    beside = [p for p in (path.with_name(name), path.with_name(name + ".gz")) if p.is_file()]
    labels = attempt(beside[0], "replace it by a whole copy", idx, beside[0], 1) if beside else None
    return idx(path, 3)[:, None], labels


def idx(path, rank):
    """The uint8 array of an idx file: big-endian int32 magic (0x800 + rank) and shape, bytes."""
    with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
        magic, *shape = np.frombuffer(file.read(4 + 4 * rank), ">i4").tolist()
        if magic != 0x800 + rank or len(shape) != rank or min(shape) < 1:
            raise ValueError(f"it does not start as an idx{rank} file of bytes does")
        size = bounded(math.prod(shape), IN_MEMORY_BYTES)
        data = file.read(size + 1)
    if len(data) != size:
        raise ValueError(f"it has not the {size:,} bytes of data that its header tells of")
    return np.frombuffer(data, np.uint8).reshape(shape)


# ---- Data sets downloaded and drawn --------------------------------------------------------------

def cifar_folder(path):
    """That of path and path/cifar-10-batches-bin which has batches, or None."""
    folders = (path, path / "cifar-10-batches-bin")
    return next((f for f in folders if any(f.glob("*_batch*.bin"))), None)


def find_idx(folder):
    """The images file of MNIST's layout in a folder: training before test, plain before .gz."""
    names = [f"{part}-images{dash}idx3-ubyte{gz}"
             for part in ("train", "t10k") for dash in "-." for gz in ("", ".gz")]
    return next((folder / n for n in names if os.path.isfile(folder / n)), None)


def find_built_in(name, folder):
    """The path of cifar10 or mnist in a folder, downloaded if it is not there."""
    if name == "mnist":
        if not find_idx(folder):
            for file, md5 in MNIST_MD5.items():    # labels first: never the images without them
                download([url + file for url in MNIST_URLS], folder / file, md5)
        return find_idx(folder)
    tars = sorted(folder.glob("cifar-10-binary*.tar.gz"))
    if cifar_folder(folder) or tars:
        return cifar_folder(folder) or tars[0]
    return download(CIFAR_URLS, folder / "cifar-10-binary.tar.gz", CIFAR_MD5)


def download(urls, path, checksum, kind="md5"):
    """The path of a file, downloaded if it is not there, from the first of urls that has it.

    checksum: the first digits of its md5, or of another kind of sum.  The file grows under the name
    path.part, and gets its own once the sum is right.
    """
    part, why = path.with_name(path.name + ".part"), []
    if path.is_file():
        return path
    attempt(path.parent, "choose another --data-dir", os.makedirs, path.parent, exist_ok=True)
    for url in urls:
        try:
            digest = hashlib.new(kind, usedforsecurity=False)
            with urllib.request.urlopen(url, timeout=30) as answer, open(part, "wb") as file:
                size = int(answer.headers.get("Content-Length") or 0)
                told = Progress(f"downloading {path.name}", size)
                while block := answer.read(1 << 18):
                    digest.update(block)
                    told(file.tell() + file.write(block))
            if not digest.hexdigest().startswith(checksum):
                raise ValueError(f"its {kind} sum is wrong, or its end is missing")
            os.replace(part, path)
            return path
        except (OSError, ValueError, http.client.HTTPException) as error:
            part.unlink(missing_ok=True)
            why.append(f"{url}: {' '.join(str(error).split())}")
    raise BadInput(f"{path.name} could not be downloaded ({'; '.join(why)}); try again, or put "
                   f"that file into the folder {path.parent} by hand")


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
        font, stroke = fonts[int(rng.integers(50, 56))], int(rng.integers(1, 3))
        ImageDraw.Draw(page).text((36, 36), str(digit), 255, font, "mm", stroke_width=stroke)
        page = page.rotate(rng.uniform(-5, 5), Image.Resampling.BILINEAR)
        low, high = np.reshape(page.getbbox(), (2, 2))       # at most 48x48: the whole digit fits
        shift = rng.uniform(-1, 1, 2) * np.minimum(2, (48 - high + low) / 2)
        x, y = ((low + high) / 2 - 24 + shift).round().astype(int).tolist()
        ink[i, 0] = np.asarray(page.crop((x, y, x + 48, y + 48)).reduce(3), np.float32) / 255
    hue = rng.uniform(0, 1, (n, 1)) + np.arange(3) / 3
    bright = 255 * (0.65 + 0.35 * np.cos(2 * np.pi * hue))[:, :, None, None]     # (n, 3, 1, 1)
    dark = rng.uniform(0, 70, (n, 3, 1, 1))
    return (dark + ink * (bright - dark)).round().astype(np.uint8), labels


def points(name, n=20_000, seed=0):
    """n points of a toy set, float32 (n, d), and their labels, int64 (n,), or None.

    Mean about 0 and standard deviation about 0.5, EDM's sigma_data, in every coordinate.
    two-gaussians: means +-0.48 in every coordinate, deviation 0.14 (0.48^2 + 0.14^2 = 0.5^2),
    the component is the label; in 64 dimensions a mixture such as STF section 6.1 measures on.
    ring: 8 Gaussians of deviation 0.07 on a circle, numbered round it; the number is the label.
    checkerboard: uniform on the 8 squares of one colour of a 4x4 board.  swiss-roll: a spiral.
    """
    rng, labels = np.random.default_rng(seed), None
    if name.startswith("two-gaussians"):
        labels = rng.permutation(np.arange(n, dtype=np.int64) % 2)
        z = rng.standard_normal((n, 64 if name.endswith("64d") else 2))
        x = 0.48 * (2 * labels[:, None] - 1) + 0.14 * z
    elif name == "ring":
        labels = rng.permutation(np.arange(n, dtype=np.int64) % 8)
        angle = labels[:, None] * np.pi / 4
        radius = (2 * (0.5 ** 2 - 0.07 ** 2)) ** 0.5                  # a coordinate has half of r^2
        x = radius * np.hstack([np.cos(angle), np.sin(angle)]) + 0.07 * rng.standard_normal((n, 2))
    elif name == "checkerboard":
        row, pair = rng.integers(0, 4, n), rng.integers(0, 2, n)
        square = np.stack([row, 2 * pair + row % 2], 1)
        x = (square + rng.uniform(0, 1, (n, 2)) - 2) * 3 ** 0.5 / 4    # U(-2, 2) has sd 2/sqrt(3)
    else:
        angle = rng.uniform(1.5 * np.pi, 4.5 * np.pi, (n, 1))
        x = angle * np.hstack([np.cos(angle), np.sin(angle)]) + 0.25 * rng.standard_normal((n, 2))
        x = (x - x.mean(0)) / x.std(0) * 0.5
    return x.astype(np.float32), labels


def to_uint8(x):
    """Images in [-1, 1] -> uint8; points (n, d) as they are.  A tensor -> an array on the CPU."""
    x = x.detach().cpu()
    return ((x.clamp(-1, 1) + 1) * 127.5).round().byte().numpy() if x.ndim == 4 else x.numpy()


def to_float(x):
    """Rows of a data set: uint8 images -> float32 in [-1, 1]; points as they are.  A tensor."""
    return x.float().div_(127.5).sub_(1) if x.dtype == torch.uint8 else x


def take(data, rows, device="cpu"):
    """Rows of a Dataset as to_float gives them, and their labels, or None, on the device."""
    x = to_float(torch.from_numpy(data.x[rows.numpy()]).to(device))
    return x, None if data.labels is None else torch.from_numpy(data.labels)[rows].to(device)


# ---- A run's network -----------------------------------------------------------------------------

def pick_device(name=None):
    """The device of that name; None: cuda where there is one, else cpu."""
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    attempt(f"--device {name}", "choose cpu or, where there is a GPU, cuda", torch.zeros, 1,
            device=name)
    return name


def build_schedule(options):
    """The schedule whose noise levels a run trains on."""
    if options.schedule == "edm":
        return EDM(P_mean=options.P_mean, P_std=options.P_std)
    return SCHEDULES[options.schedule]()


def build_precondition(options):
    """sigma -> c_skip, c_out, c_in, c_noise, by --precondition: a schedule's, or with the first
    two those of eps-, x0- or v-prediction and the others those of the run's own schedule."""
    name, schedule = options.precondition, build_schedule(options)
    if name in SCHEDULES:
        return SCHEDULES[name]().precondition

    def precondition(sigma):
        c_skip, c_out, c_in, c_noise = schedule.precondition(sigma)
        if name != "schedule":
            c_skip, c_out = target_coefficients(name, sigma)
        return c_skip, c_out, c_in, c_noise
    return precondition


def build_weight(options):
    """lambda(sigma), the weight on |D - x0|^2, by --weight: the schedule's own, or the named."""
    if options.weight == "schedule":
        return build_schedule(options).weight
    return WEIGHTS[options.weight]


def build_denoiser(options, amp=None):
    """The network and preconditioning of a run, with fresh weights; amp as in Denoiser."""
    channels, classes, head = options.shape[0], len(options.classes), options.head != "none"

    def build():
        if options.arch == "mlp":
            return MLP(channels, options.width or 128, options.blocks or 3, classes, head)
        given = dict(UNETS[options.arch])
        for name in ("width", "blocks", "mult", "attend"):
            if getattr(options, name):
                given[name] = getattr(options, name)
        return UNet(options.shape[1], channels, dropout=options.dropout, classes=classes,
                    label_dropout=options.label_dropout, augment_dim=9 if options.augment else 0,
                    head=head, **given)
    model = attempt(f"--arch {options.arch} for shape {tuple(options.shape)}",
                    "choose another --size, --width or --mult", build)
    return Denoiser(model, build_precondition(options), amp)


SAVED = {"step": int, "options": dict, "model": dict, "ema": dict, "optimizer": dict,
         "scaler": dict, "beta": object, "skipped": list, "best": float}       # in a checkpoint


def checkpoints(run):
    """Paths of a run's checkpoints, oldest first."""
    return sorted(str(path) for path in Path(run).glob("checkpoint-*.pt"))


def load_checkpoint(run, device="cpu"):
    """A checkpoint, or the newest of a run: a dict with SAVED's names.  Never unpickled."""
    path = run if os.path.isfile(run) else (checkpoints(run) or [None])[-1]
    if path is None:
        raise BadInput(f"{run} " + ("has no checkpoint" if os.path.isdir(run) else "does not exist")
                       + "; name a folder that train.py made")
    try:
        state = attempt(path, "", torch.load, path, map_location=device, weights_only=True)
        if not all(isinstance(state[name], kind) for name, kind in SAVED.items()):
            raise TypeError
    except Exception as error:      # torch's own text runs over lines and advises to unpickle
        raise BadInput(f"{path} is damaged, or no checkpoint of train.py; name another, or move it "
                       "away, and the one before it is used") from error
    return state


def load_weights(denoiser, weights, run):
    """Puts a checkpoint's weights into a denoiser; BadInput where they do not fit."""
    try:
        denoiser.load_state_dict(weights)
    except (RuntimeError, TypeError, AttributeError) as error:     # torch lists every name there is
        raise BadInput(f"the weights of {run} are not of this network; name another run, or build "
                       "the network as that run did") from error


def load_run(run, device=None, weights="ema"):
    """The denoiser of a run, in eval mode, and its options, as attributes.

    run: a folder that train.py made, or one checkpoint in it.  weights: "ema" (the first of
    --ema's averages), "raw", or another of --ema's half-lives.  options.step: of the checkpoint.
    """
    device = pick_device(device)
    state = load_checkpoint(run, device)
    options = SimpleNamespace(**state["options"])
    options.device, options.step = device, state["step"]
    denoiser = attempt(f"the options of {run}", "name another run", build_denoiser, options)
    averages = state["ema"]
    name = next(iter(averages), None) if weights == "ema" else weights
    if name != "raw" and name not in averages:
        raise BadInput(f"--weights {name}: the run has raw, ema and {', '.join(averages)}")
    load_weights(denoiser, state["model"] if name == "raw" else averages[name], run)
    return denoiser.to(device).eval(), options


def run_data(options):
    """The data that a run was trained on; BadInput if it has changed."""
    data = load_data(options.data, options.size, options.data_dir)
    if data.fingerprint != options.fingerprint:
        raise BadInput(f"the run was trained on other data than {data.source}; give it back what "
                       "it had")
    return data


# ---- Samples -------------------------------------------------------------------------------------

SAMPLERS = {         # name: the choices that belong to it, by the names of the samplers' arguments
    "heun": (), "euler": (), "edm-stochastic": ("S_churn", "S_tmin", "S_tmax", "S_noise"),
    "euler-maruyama": ("beta",), "ddim": ("eta", "variance"), "ddpm": ("variance",),
    "pc": ("snr",), "rk45": ("rtol",)}
CHOICES = {          # name: (lowest and highest value, help)
    "S_churn": (0, math.inf, "how much noise each step replaces (default: 0, none)"),
    "S_tmin": (0, math.inf, "smallest noise level at which it does (default: 0)"),
    "S_tmax": (0, math.inf, "largest noise level at which it does (default: any)"),
    "S_noise": (0, math.inf, "standard deviation of the new noise (default: 1)"),
    "beta": (0, math.inf, "rate of new for old noise, in units of sigma'/sigma (default: 1)"),
    "eta": (0, 1, "share of DDPM's noise (default: 0)"),
    "snr": (1e-4, 1, "size of the corrector's step (default: 0.16)"),
    "rtol": (1e-7, 1, "relative and absolute tolerance of a step (default: 1e-5)"),
    "variance": (None, None, "variance of a step; sn and npr need a run with that --head (default: "
                 "beta_tilde)")}
VARIANCES = ("beta_tilde", "beta", "analytic", "sn", "npr")


def generate(denoiser, options, seeds, sampler="heun", steps=18, labels=None, schedule=None,
             guide=1.0, batch=64, callback=None, **choices):
    """Samples, one for each seed: float32 (len(seeds), *options.shape) on the CPU.

    Sample i depends on seeds[i] and labels[i] alone, not on the batch it is drawn in.
    denoiser, options: of load_run.  sampler, choices: see SAMPLERS.  labels (len(seeds),): classes;
    None: of a class-conditional run, classes as often as the data has them.  schedule: whose time
    steps; None: the run's own.  guide: weight of classifier-free guidance.  steps: rk45 chooses
    its own.  callback(i, x): called after step i with the state x of a batch, for trajectories.
    """
    choices = check_choices(denoiser, options, sampler, guide, choices)
    schedule = schedule or build_schedule(options)
    t = attempt(f"--steps {steps}", "choose fewer", schedule.time_steps,
                2 if sampler == "rk45" else steps)
    labels = draw_labels(seeds, options) if labels is None else labels
    D = denoiser if guide == 1 else samplers.guidance(denoiser, denoiser, guide)
    device, samples = options.device, []
    for i in range(0, len(seeds), batch):
        own = () if labels is None else (labels[i:i + batch].to(device),)
        odd = [2 * seed + 1 for seed in seeds[i:i + batch]]      # training has the even seeds
        noise = samplers.seeded_noise(odd, options.shape, device)
        x = schedule.sigma(t[0]) * noise()                                        # (b, *shape)
        samples.append(draw(D, x, own, noise, sampler, schedule, t, choices, callback).cpu())
    return torch.cat(samples)


def draw(denoise, x, labels, noise, sampler, schedule, t, choices, callback=None):
    """The named sampler from x, of noise level sigma(t[0]); labels: () or one tensor (b,)."""
    sigma, start, images = schedule.sigma(t), schedule.s(t[0]) * x, x.ndim > 2
    variance, heads = choices.get("variance", "beta_tilde"), []

    def D(x, sigma):
        if variance not in ("sn", "npr"):
            return denoise(x, sigma, *labels)
        D_x, head = denoise(x, sigma, *labels, head=True)      # one call gives D and the head
        heads[:] = [head]
        return D_x

    def head(x, sigma):
        return heads[0]

    covariance = variance if callable(variance) else None
    if variance == "sn":
        covariance = samplers.sn_covariance(head)
    if variance == "npr":
        covariance = samplers.npr_covariance(head)
    more = dict(callback=callback)
    if sampler == "euler":
        return samplers.euler(D, start, t, schedule, **more)
    if sampler == "heun":
        return samplers.heun(D, start, t, schedule, **more)
    if sampler == "edm-stochastic":
        return samplers.edm_stochastic(D, x, sigma, noise, **choices, **more)
    if sampler == "euler-maruyama":
        return samplers.euler_maruyama(D, x, sigma, noise, **choices, **more)
    if sampler == "ddim":
        cap = 1.0 if covariance and images else None                  # as published
        return samplers.ddim(D, x, sigma, noise, choices.get("eta", 0.0), covariance, cap, **more)
    if sampler == "ddpm":
        cap = 2.0 if covariance and images else None
        return samplers.ddpm(D, x, sigma, noise, covariance or variance, cap, **more)
    if sampler == "pc":
        return samplers.predictor_corrector(D, start, t, schedule, noise, norms=images, **choices,
                                            **more)
    rtol = choices.get("rtol", 1e-5)
    return samplers.rk45(denoise, start, t, schedule, rtol, rtol, labels, **more)[0]


def check_choices(denoiser, options, sampler, guide, choices):
    """The choices that are not None; BadInput where one has no meaning.  "analytic" becomes its
    covariance, measured here."""
    choices = {name: value for name, value in choices.items() if value is not None}
    variance = choices.get("variance")
    measured = callable(variance) or variance in ("analytic", "sn", "npr")
    strange = [name for name in choices if name not in SAMPLERS[sampler]]
    for bad, sentence in [
        (strange, f"--{', --'.join(strange)}: not of --sampler {sampler}, whose choices are "
         f"{' '.join(SAMPLERS[sampler]) or 'none'}"),
        (variance == "beta" and sampler == "ddim", "--variance beta belongs to --sampler ddpm"),
        (variance in ("sn", "npr") and options.head != variance, f"--variance {variance}: the run "
         f"has no such head; train one with train.py --head {variance} --init RUN"),
        (measured and guide != 1, "--guidance: the variance is that of the conditional denoiser "
         "alone; choose another --variance"),
        (guide != 1 and not options.label_dropout, "--guidance needs a run trained with --cond and "
         "--label-dropout, which has an unconditional denoiser too"),
    ]:
        if bad:
            raise BadInput(sentence)
    if variance == "analytic":
        choices["variance"] = samplers.analytic_covariance(*analytic_moments(denoiser, options))
    return choices


def draw_labels(seeds, options):
    """A class for each seed, each class as often as the data has it; None without classes.

    Multiples of the golden ratio, modulo 1, spread evenly: so few seeds already have the shares.
    """
    if not options.classes:
        return None
    share = torch.tensor(options.counts, dtype=torch.float64).cumsum(0)
    u = (torch.as_tensor(seeds).double() * (5 ** 0.5 - 1) / 2 + 0.5) % 1
    return torch.searchsorted(share / share[-1], u, right=True).clamp(max=len(share) - 1)


@torch.no_grad()
def analytic_moments(denoiser, options, count=128):
    """Analytic-DPM's Gamma: noise levels, 33 from .002 to 200, and E|eps_hat|^2/d at each.

    On `count` images of the data, each with a noise and its opposite.  Of |eps_hat|^2 only what it
    differs from |eps|^2 by is measured: of sigma^2 (1 - Gamma) nothing but the noise of the
    measurement would be left at large sigma.
    """
    data = run_data(options)
    g = torch.Generator().manual_seed(options.seed)
    rows = torch.randperm(len(data.x), generator=g)[:count].repeat(2)
    x0, labels = take(data, rows, options.device)
    levels, moments = torch.logspace(math.log10(0.002), math.log10(200), 33), []
    told = Progress("measuring Analytic-DPM's moments", len(levels))
    for sigma in levels:
        noise = torch.randn(x0[len(x0) // 2:].shape, generator=g).to(x0)
        noise = torch.cat([noise, -noise])                                        # (2 count, ...)
        x = x0 + sigma * noise
        D = in_batches(denoiser, x, sigma, labels if options.classes else None)
        moments.append(1 + (((x - D) / sigma).double() ** 2 - noise.double() ** 2).mean().item())
        told(len(moments))
    return levels.tolist(), moments


def in_batches(denoise, x, sigma, labels=None, batch=None):
    """denoise(x, sigma, labels) for x of any length; sigma 0-d; batch: 64 images, 4096 points."""
    batch, D = batch or (64 if x.ndim > 2 else 4096), []
    for i in range(0, len(x), batch):
        own = () if labels is None else (labels[i:i + batch],)
        D.append(denoise(x[i:i + batch], sigma, *own))
    return torch.cat(D)


# ---- Pictures ------------------------------------------------------------------------------------

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
    whole(path, page.save, format="PNG", optimize=True)


def save_gif(path, frames, sigma, columns):
    """A GIF of a sampler's states: frames, x (n, C, H, W) after each step, at levels sigma.

    Each is shown as x/sqrt(1 + (sigma/0.5)^2), of the data's own contrast; the last one stays.
    """
    pages = []
    for x, level in zip(frames, sigma.tolist()):
        page = tile(to_uint8(x / (1 + (level / 0.5) ** 2) ** 0.5), columns, cell=32)
        pages.append(page.quantize(64))
    whole(path, pages[0].save, format="GIF", save_all=True, append_images=pages[1:], loop=0,
          duration=[200] * (len(pages) - 1) + [2000])


def whole(path, write, **options):
    """write(file, **options) to path, which is there whole or not at all."""
    def to_part():
        part = Path(f"{path}.part")
        try:
            with open(part, "wb") as file:
                write(file, **options)
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)           # of a full disk, no more than there was
    attempt(path, "make room there, or choose another place", to_part)


def class_grid(options, count):
    """Labels for a picture of samples and the names of its rows: a row for each of 10 classes."""
    if not options.classes:
        return None, []
    names = options.classes[:10] if len(options.shape) > 1 else options.classes
    labels = torch.arange(count) % len(names)
    return labels.sort().values, names if len(options.shape) > 1 and count % len(names) == 0 else []


# ---- Distances -----------------------------------------------------------------------------------

SHA256 = "6726825d"                          # of the published Inception, its first digits
INCEPTION = f"pt_inception-2015-12-05-{SHA256}.pth"
INCEPTION_URL = "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/" + INCEPTION


def pixel_features(x, side=16):
    """Images (n, C, H, W) averaged down to at most side x side, or points: float64 (n, d)."""
    if x.ndim == 4 and x.shape[-1] > side:
        x = torch.nn.functional.adaptive_avg_pool2d(x, side)
    return x.flatten(1).double()


def extractor(kind, shape, data_dir="data", device="cpu"):
    """(name, extract) of "pixels" or "inception", whose name has its weights' sha256 in it.

    extract: images (n, *shape) uint8, or points -> features (n, d) float64 and the probabilities of
    classes (n, 1008), or None, on the CPU.  Inception's file is looked for in data_dir, else
    downloaded to it.
    """
    if kind == "inception" and len(shape) == 1:
        raise BadInput("Inception's features are of images; choose pixels for points")
    if kind == "pixels":
        def extract_pixels(x):
            return pixel_features(to_float(x)), None
        return kind, extract_pixels
    path = download([INCEPTION_URL], Path(data_dir, INCEPTION), SHA256, "sha256")
    network = Inception()
    try:
        network.load_state_dict(attempt(path, "", torch.load, path, "cpu", weights_only=True))
    except Exception as error:      # torch's own text runs over lines and advises to unpickle
        raise BadInput(f"{path} is not Inception's weights, or not whole "
                       f"({type(error).__name__}); put there {INCEPTION_URL}") from error
    network.to(device)

    def extract(x):
        flags = torch.backends.cudnn, torch.backends.cuda.matmul
        before = [flag.allow_tf32 for flag in flags]
        flags[0].allow_tf32 = flags[1].allow_tf32 = False              # it keeps 3 digits of 7
        pool3, logits = network(x.to(device).expand(-1, 3, -1, -1))    # gray: three times the same
        flags[0].allow_tf32, flags[1].allow_tf32 = before
        return pool3.cpu().double(), logits.softmax(1).cpu()
    return f"inception {hashlib.sha256(path.read_bytes()).hexdigest()[:8]}", extract


@torch.no_grad()
def measure(batches, extract, count):
    """Mean (d,) and covariance (d, d) of the features of batches that hold `count` rows, float64;
    and their class probabilities, or None.

    Every rank brings its own batches and gets the moments of all; probabilities are its own.
    """
    n, x, xx, classes, told = torch.zeros((), dtype=torch.float64), 0, 0, [], None
    told = Progress("measuring samples", count)
    for batch in batches:
        features, p = extract(batch)
        n, x, xx = n + len(batch), x + features.sum(0), xx + features.T @ features
        classes.append(p)
        told(int(n))
    n, x, xx = total(n), total(x), total(xx)
    if not xx.isfinite().all():
        raise FloatingPointError("the features are not finite: damaged weights, or samples")
    mean = x / n
    cov = (xx - n * mean.outer(mean)) / (n - 1)
    return mean, cov, None if classes[0] is None else torch.cat(classes)


def frechet_distance(mean1, cov1, mean2, cov2):
    """Squared Frechet distance of two Gaussians: FID, where the features are Inception's.

        |m1 - m2|^2 + Tr(C1 + C2 - 2 (C1 C2)^{1/2})

    With any A A^T = C1, (C1 C2)^{1/2} has the trace of (A^T C2 A)^{1/2}, and that is a symmetric
    problem: no general matrix root, no complex numbers, singular C1, C2 allowed.
    mean (d,), cov (d, d) float64 -> float, in the features' squared units.
    """
    A, singular = torch.linalg.cholesky_ex(cov1)                # a tenth of an eigendecomposition
    if singular:
        values, Q = torch.linalg.eigh(cov1)
        A = Q * values.clamp(min=0).sqrt()
    root = torch.linalg.eigvalsh(A.T @ cov2 @ A).clamp(min=0).sqrt().sum()
    return float(((mean1 - mean2) ** 2).sum() + cov1.trace() + cov2.trace() - 2 * root)


def distance_name(features, n):
    """The name of n samples' distance: it falls with n, so only that of 50,000 is a FID, and others
    are fid_500, fid_2k, frechet_pixels_2k, .."""
    kind = "fid" if features.startswith("inception") else f"frechet_{features}"
    if kind == "fid" and n >= 50_000:
        return "FID"
    return f"{kind}_{n // 1000}k" if n % 1000 == 0 else f"{kind}_{n}"


def inception_score(p, splits=10):
    """exp E_x KL(p(y|x) || p(y)) (Salimans et al. 2016) of p(y|x) (n, classes), by consecutive
    splits: mean and standard deviation.  From 1 to the number of classes; more is better."""
    parts = p.double().tensor_split(min(splits, len(p)))
    values = [(torch.xlogy(q, q) - torch.xlogy(q, q.mean(0))).sum(1).mean().exp() for q in parts]
    values = torch.stack(values)
    return values.mean().item(), values.std(correction=0).item()


def real_statistics(data, num, features, seed=0, most=50_000, batch=64):
    """What `num` samples are compared with: at most `most` random rows of the data, as a dict.

    features: a name and function of extractor.  mean, cov and n are those of all these rows; floor
    is the distance of num of them to the others (NaN with fewer than 2 num), so that of samples
    which could not be better; classes are the class probabilities of these num.
    """
    rows = torch.randperm(len(data.x), generator=torch.Generator().manual_seed(seed))[:most]
    rank, world = ranks()

    def moments(rows):
        mine = rows[rank::world]
        return measure(some_rows(data, mine, batch), features[1], len(mine))
    mean, cov, classes = moments(rows)
    floor = math.nan
    if 2 * num <= len(rows):
        some_mean, some_cov, classes = moments(rows[:num])
        floor = frechet_distance(some_mean, some_cov, *moments(rows[num:])[:2])
    return dict(mean=mean, cov=cov, n=len(rows), floor=floor, classes=classes)


def some_rows(data, rows, batch):
    """Batches of these rows of a Dataset, as they are."""
    return (torch.from_numpy(data.x[part.numpy()]) for part in rows.split(batch))


def drawn(denoiser, options, seeds, batch=64, labels=None, **how):
    """generate's samples of many seeds in batches, images as uint8."""
    choices = {name: value for name, value in how.items() if name in CHOICES}
    how |= check_choices(denoiser, options, how.get("sampler", "heun"), how.get("guide", 1.0),
                         choices)                                 # measures "analytic" but once
    for i in range(0, len(seeds), batch):
        own = None if labels is None else labels[i:i + batch]
        x = generate(denoiser, options, seeds[i:i + batch], labels=own, batch=batch, **how)
        yield torch.from_numpy(to_uint8(x))


def run_distance(denoiser, options, num, features, real, **how):
    """The Frechet distance of num samples, drawn by generate(**how), to real_statistics.

    Each rank draws its share: of seeds 0, 1, ..., with classes as often as the data has them.
    """
    rank, world = ranks()
    seeds = range(num)[rank::world]
    batch = 64 if len(options.shape) > 1 else 4096
    mean, cov, _ = measure(drawn(denoiser, options, seeds, batch, **how), features[1], len(seeds))
    return frechet_distance(mean, cov, real["mean"], real["cov"])


# ---- Loss by noise level -------------------------------------------------------------------------

LEVELS = (0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0)     # sigma, of the tables


def held_out(data, options, count=None):
    """(x0, labels) that training does not see, on the device; 64 images or 1000 points by default.

    Fresh draws of a set that is drawn here, else every `holdout`-th row; training rows where that
    option is 0, or beyond the size of the set.
    """
    count, k = count or (64 if data.x.ndim == 4 else 1000), options.holdout
    if options.data in ("digits", *POINT_SETS):
        data, k = load_data(options.data, options.size, options.data_dir, fresh=count), 0
    N = len(data.x)
    rows = torch.arange(k - 1, N, k) if 0 < k <= N else torch.arange(N)
    rows = rows[torch.linspace(0, len(rows) - 1, min(count, len(rows))).long()]
    x0, labels = take(data, rows, options.device)
    return x0, labels if options.classes else None


@torch.no_grad()
def denoising_error(denoise, x0, labels=None, levels=LEVELS):
    """E |D(x0 + sigma eps; sigma) - x0|^2/d at each noise level; the ranks share the rows of x0.

    The noise is the same at each call, and the weight is 1, so that runs of any objective compare.
    """
    rank, world = ranks()
    noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(0)).to(x0)
    mine = slice(len(x0) * rank // world, len(x0) * (rank + 1) // world)
    own = None if labels is None else labels[mine]
    error = torch.zeros(len(levels), dtype=torch.float64, device=x0.device)
    for k, sigma in enumerate(torch.tensor(levels)):
        if len(x0[mine]):
            D = in_batches(denoise, x0[mine] + sigma * noise[mine], sigma, own)
            error[k] = ((D - x0[mine]).double() ** 2).sum()
    return (total(error) / x0.numel()).tolist()


@torch.no_grad()
def noise_table(denoise, options, data, count=128):
    """Rows (sigma, DSM loss, STF loss, ESS): the same `count` images and noise at each level.

    The two losses score the same D: against x0, and against x0's posterior mean given a reference.
    They differ by the variance of DSM's target, noise that no network can learn.  ESS is the number
    of references that STF's target averages, 1/sum_k w_k^2.
    """
    weight, g = build_weight(options), torch.Generator().manual_seed(options.seed)
    rows = torch.randperm(len(data.x), generator=g)[:max(options.ref_batch, count)]
    reference, label = take(data, rows, options.device)
    label = label if options.classes else None
    x0, own = reference[:count], None if label is None else label[:count]
    noise = torch.randn(x0.shape, generator=g).to(x0)
    table = []
    for sigma in torch.tensor(LEVELS).to(x0):
        x, s = x0 + sigma * noise, sigma.expand(len(x0), *[1] * (x0.ndim - 1))
        D = in_batches(denoise, x, sigma, own)
        w = stf_weights(x, s, reference, own, label)                              # (count, n)
        target = stf_target(x, s, reference, own, label)
        table.append((sigma.item(), (weight(s) * (D - x0) ** 2).mean().item(),
                      (weight(s) * (D - target) ** 2).mean().item(),
                      (1 / (w ** 2).sum(1)).mean().item()))
    return table


def print_levels(table, options):
    """noise_table on the terminal, with a bar for the share of the loss that is chance."""
    same = "of its class" if options.classes else ""
    print(f"{'':8} {'DSM loss':>11}{'STF loss':>11}{'references':>13}   share of DSM's loss that\n"
          f"{'sigma':>8} {'(to x0)':>11}{'(to mean)':>11}{'averaged':>13}   no network can learn\n"
          f"{same:>44}")
    for sigma, dsm, stf, size in table:
        chance = 1 - stf / dsm
        bar = "#" * max(round(20 * chance), 0)
        print(f"{sigma:8g} {dsm:11.4f}{stf:11.4f}{size:13.1f} {chance:8.0%}   {bar}")


def draw_levels(path, table, title):
    """noise_table as a PNG, where matplotlib is installed: where STF acts."""
    try:
        from matplotlib import figure
    except ImportError:
        print("(with matplotlib installed, a picture of this table would be drawn)")
        return
    sigma, dsm, stf, _ = zip(*table)
    page = figure.Figure(figsize=(9, 3.6))
    left, right = page.subplots(1, 2)
    left.loglog(sigma, dsm, label="DSM: against x0")
    left.loglog(sigma, stf, "--", label="STF: against x0's posterior mean")
    left.set(xlabel="noise level sigma", ylabel="weighted loss of one network")
    left.legend(fontsize=8)
    right.semilogx(sigma, [1 - b / a for a, b in zip(dsm, stf)])
    right.set(xlabel="noise level sigma", ylim=(0, 1),
              ylabel="share of DSM's loss that is chance")
    for axes in (left, right):
        axes.grid(alpha=0.3)
    page.suptitle(title)
    page.tight_layout()
    page.savefig(path, dpi=100)


# ---- Commands ------------------------------------------------------------------------------------

class Counted:
    """A denoiser that counts the rows it is asked for: NFE = rows / samples."""

    def __init__(self, denoiser):
        self.denoiser, self.rows = denoiser, 0

    def __call__(self, x, sigma, *labels, **more):
        self.rows += len(x)
        return self.denoiser(x, sigma, *labels, **more)


def sampling(args):
    """generate's arguments out of the command line, and a line that says them."""
    how = dict(sampler=args.sampler, steps=args.steps, guide=args.guidance,
               schedule=SCHEDULES[args.schedule]() if args.schedule else None)
    how |= {name: getattr(args, name) for name in CHOICES if getattr(args, name) is not None}
    text = args.sampler + ("" if args.sampler == "rk45" else f", {args.steps} steps")
    for name, usual in (("schedule", None), ("guidance", 1.0), ("seed", 0), ("weights", "ema"),
                        *((name, None) for name in CHOICES)):
        if getattr(args, name) != usual:
            text += f", {name} {getattr(args, name)}"
    return how, text


def sample(args):
    """evaluate.py sample: draws samples of a run and saves them."""
    denoiser, options = load_run(args.run, args.device, args.weights)
    images = len(options.shape) > 1
    num = args.num or (4000 if not images else 8 * len(options.classes[:10]) or 64)
    labels, names = class_grid(options, num)
    if args.label is not None:
        known = list(options.classes)
        if not any(name.isdigit() for name in known) and args.label not in known:
            known = [str(k) for k in range(len(known))]           # numbers, where names are words
        if args.label not in known:
            raise BadInput(f"--class {args.label}: " + (
                f"choose one of {', '.join(options.classes)}" if options.classes else
                "the run is not class-conditional; leave the option out"))
        labels, names = torch.full((num,), known.index(args.label)), []
    how, text = sampling(args)
    text += f", class {args.label}" if args.label is not None else ""
    folder = os.path.dirname(args.run) or "." if os.path.isfile(args.run) else args.run
    name = text.replace(" steps", "").replace(", ", "-").replace(" ", "-").replace("/", "-")
    out = args.out or f"{folder}/{name}.png"
    check_output("--out", out, ".png", ".npz")
    if args.gif and (not images or args.sampler == "rk45"):
        raise BadInput("--gif needs images and another --sampler than rk45")
    batch, frames = args.batch if images and not args.gif else num, {}

    def keep(i, x):
        frames[i] = x
    start, counted, parts = time.time(), Counted(denoiser), []
    told = Progress("drawing samples", num)
    for x in drawn(counted, options, range(args.seed, args.seed + num), batch, labels,
                   callback=keep if args.gif else None, **how):
        parts.append(x)
        told(sum(map(len, parts)))
    x = torch.cat(parts).numpy()
    if out.endswith(".npz"):
        whole(out, np.savez, images=x, **({} if labels is None else {"labels": labels.numpy()}))
    else:
        save_pictures(out, [(text, x)], names)
    print(f"{num} samples of {args.run} at step {options.step}, {text}, "
          f"NFE {counted.rows / num:g}, {time.time() - start:.1f} s\n{out}")
    if args.gif:
        schedule = how["schedule"] or build_schedule(options)
        t = schedule.time_steps(args.steps)[1:]
        states = [x / schedule.s(t_i) for x, t_i in zip(frames.values(), t)] \
            if args.sampler in ("heun", "euler", "pc") else list(frames.values())
        save_gif(f"{out[:-4]}.gif", states, schedule.sigma(t), num // len(names) if names else None)
        print(f"{out[:-4]}.gif")


def check_output(option, path, *endings):
    """BadInput where that file cannot be written: now, not after an hour's work."""
    if os.path.isdir(path) or not path.endswith(endings):
        raise BadInput(f"{option} {path} is not a file's name ending in {' or '.join(endings)}; "
                       "choose another")
    attempt(path, f"choose another {option}", lambda: open(f"{path}.part", "wb").close())
    os.remove(f"{path}.part")


def fid(args):
    """evaluate.py fid: Frechet distance and IS of samples, beside those of real images."""
    device, size = pick_device(args.device), args.size
    if os.path.isfile(f"{args.run}/options.json") or args.run.endswith(".pt"):
        denoiser, options = load_run(args.run, device, args.weights)
        how, text = sampling(args)
        num, shape = args.num or (2000 if len(options.shape) > 1 else 4000), options.shape
        size = options.size if size is None else size
        batches = drawn(denoiser, options, range(args.seed, args.seed + num), args.batch, **how)
        text = f"{args.run} at step {options.step}, {text}"
    elif not os.path.exists(args.run) and args.run not in BUILT_IN:
        raise BadInput(f"{args.run} does not exist; name a run's folder, or images")
    elif not args.ref:
        raise BadInput(f"{args.run} is no run; if it is images, name others with --ref, to compare "
                       "them with")
    else:
        data = load_data(args.run, size, args.data_dir)
        text, shape, num = data.source, data.x.shape[1:], args.num or len(data.x)
        if num > len(data.x):
            raise BadInput(f"--num {num} is more than the {len(data.x)} images there are")
        batches = some_rows(data, torch.arange(num), args.batch)
    data = load_data(args.ref, size, args.data_dir) if args.ref else run_data(options)
    if tuple(data.x.shape[1:]) != tuple(shape):
        raise BadInput(f"{data.name} has images of shape {tuple(data.x.shape[1:])}, and the "
                       f"samples are {tuple(shape)}; choose another --ref or --size")
    kind = args.features or ("inception" if len(shape) > 1 else "pixels")
    features = extractor(kind, shape, args.data_dir, device)
    real = real_statistics(data, num, features, args.seed, len(data.x), args.batch)
    mean, cov, classes = measure(batches, features[1], num)
    distance = frechet_distance(mean, cov, real["mean"], real["cov"])
    print(f"{text}\ncompared with {data.source}, fingerprint {data.fingerprint}\n"
          f"features of {features[0]}\n\n"
          f"{'':20}{f'{num} samples':>20}{f'{num} real (floor)':>20}\n"
          f"{distance_name(features[0], num):20}{distance:20.4g}{real['floor']:20.4g}")
    if classes is not None:
        cells = ["{:.4g} +- {:.2g}".format(*inception_score(p)) for p in (classes, real["classes"])]
        print(f"{'IS':20}{cells[0]:>20}{cells[1]:>20}")
    if min(num, real["n"]) < len(mean):
        print(f"warning: the covariance of {min(num, real['n'])} rows in {len(mean)} dimensions is "
              "singular; compare numbers of the same count only")
    if features[0] not in ("pixels", f"inception {SHA256}"):
        print("warning: these are not the published weights; compare numbers of the same weights "
              "only")


def levels(args):
    """evaluate.py levels: the loss at each noise level, and the share of it that is chance."""
    denoiser, options = load_run(args.run, args.device, args.weights)
    table = noise_table(denoiser, options, run_data(options))
    print(f"{args.run} at step {options.step}\n")
    print_levels(table, options)
    folder = os.path.dirname(args.run) or "." if os.path.isfile(args.run) else args.run
    draw_levels(f"{folder}/where-stf-acts.png", table, args.run)


def number(kind, low, high=math.inf):
    """A type for argparse: an int or float within [low, high]."""
    def parse(text):
        value = kind(text)
        if not (low <= value <= high):
            raise argparse.ArgumentTypeError(f"{text} is not " + (
                f"at least {low}" if high == math.inf else f"within [{low}, {high}]"))
        return value
    parse.__name__ = kind.__name__
    return parse


class Parser(argparse.ArgumentParser):
    """Its errors are BadInput, so that a wrong option is one sentence; no abbreviations."""

    def __init__(self, **options):
        super().__init__(allow_abbrev=False,
                         formatter_class=argparse.RawDescriptionHelpFormatter, **options)

    def error(self, message):
        raise BadInput(f"{message}; see --help")


def shared_arguments():
    """Two parsers: of the arguments of all commands, and of those that draw samples."""
    shared, how = Parser(add_help=False), Parser(add_help=False)
    add = shared.add_argument
    add("--weights", default="ema", metavar="NAME", help="which weights of the run: ema (the first "
        "average), raw, or another of its half-lives (default: ema)")
    add("--device", metavar="NAME", help="cpu or cuda (default: cuda where there is one)")
    add = how.add_argument
    add("--num", type=number(int, 2), metavar="N", help="number of samples (default: sample: 80 "
        "images or 4000 points; fid: 2000 or 4000)")
    add("--seed", type=number(int, 0, 2 ** 31 - 1), default=0, metavar="N",
        help="sample i has seed N + i (default: 0)")
    add("--batch", type=number(int, 1), default=64, metavar="N", help="samples drawn together; "
        "this changes none of them (default: 64)")
    add("--sampler", choices=SAMPLERS, default="heun", help="default: heun")
    add("--steps", type=number(int, 1), default=18, metavar="N", help="number of time steps; rk45 "
        "chooses its own (default: 18)")
    add("--schedule", choices=SCHEDULES, help="whose time steps (default: the run's own)")
    add("--guidance", type=number(float, 0), default=1.0, metavar="X", help="weight of classifier-"
        "free guidance; above 1 exaggerates the class (default: 1, none)")
    for name, (low, high, text) in CHOICES.items():
        kind = dict(choices=VARIANCES) if low is None else dict(type=number(float, low, high),
                                                                metavar="X")
        owners = [sampler for sampler, own in SAMPLERS.items() if name in own]
        add(f"--{name}", help=f"{' and '.join(owners)}: {text}", **kind)
    return shared, how


def parser():
    p = Parser(prog="evaluate.py", description="What a run of train.py has learned.", epilog="""\
examples:
  python evaluate.py sample runs/000-digits-stf-edm --class 7
  python evaluate.py sample runs/000-digits-stf-edm --sampler ddim --eta 0.5 --steps 24
  python evaluate.py fid runs/000-digits-stf-edm --features pixels --num 1000""")
    commands = p.add_subparsers(dest="command", required=True, metavar="COMMAND")
    shared, how = shared_arguments()
    c = commands.add_parser("sample", parents=[shared, how], help="draw samples of a run")
    c.add_argument("run", metavar="RUN", help="folder that train.py made")
    c.add_argument("--out", metavar="FILE", help="a .png, or an .npz of arrays (default: a .png in "
                   "RUN)")
    c.add_argument("--gif", action="store_true", help="write the states of the sampler as a GIF, "
                   "too")
    c.add_argument("--class", dest="label", help="name or number of one class (default: all)")
    f = commands.add_parser("fid", parents=[shared, how], help="the distance to the data, of a "
                            "run's samples or of images")
    f.add_argument("run", metavar="RUN|IMAGES", help="folder that train.py made, or any images")
    f.add_argument("--ref", metavar="PATH", help="images to compare with (default: the data of "
                   "RUN)")
    f.add_argument("--size", type=number(int, 1), metavar="N", help="crop and resize all images to "
                   "N x N")
    f.add_argument("--features", choices=["inception", "pixels"], help="what the distance is "
                   "measured on (default: inception for images, pixels for points)")
    f.add_argument("--data-dir", default="data", metavar="FOLDER", help="folder of downloads, such "
                   f"as {INCEPTION} (default: data)")
    n = commands.add_parser("levels", parents=[shared], help="the loss at each noise level")
    n.add_argument("run", metavar="RUN", help="folder that train.py made")
    return p


def main(argv=None):
    plain_streams()
    try:
        args = parser().parse_args(argv)
        dict(sample=sample, fid=fid, levels=levels)[args.command](args)
        return 0
    except (BadInput, OSError, FloatingPointError) as error:
        print(f"evaluate.py: {error}", file=sys.stderr)
        return 2
    except RuntimeError as error:                  # torch's, for lack of memory on any device
        if "memory" not in str(error):
            raise
        print("evaluate.py: out of memory; choose a smaller --batch", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nevaluate.py: stopped", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
