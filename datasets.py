"""datasets.py: which images.  Reads image sets of many formats, and draws small ones.

A data set is one array: uint8 images (N, C, H, W), or float32 points (N, d).  `load_data` takes
the name of a built-in set or the path of a folder or file, and either gives a Dataset or raises
BadInput, whose one sentence says what to do.  Nothing is ever unpickled or extracted to disk.
"""

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
import urllib.error
import urllib.request
import warnings
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

IN_MEMORY_BYTES = 4 << 30        # a larger set is decoded once, into a memory-mapped cache file
MEMBER_BYTES = 256 << 20         # no single image or CIFAR batch is larger; a zip bomb is
MAX_CLASSES = 100_000            # one wrong label of 10**9 would ask for a 10**9-wide embedding
POINT_SETS = ("two-gaussians", "two-gaussians-64d", "ring", "checkerboard", "swiss-roll")
BUILT_IN = ("digits", *POINT_SETS, "cifar10", "mnist")
NOT_HIDDEN = r"(?!\.|.*/\.)"     # nor in a hidden folder: .git/.., the Mac's ._twins
IMAGES = NOT_HIDDEN + r"(dataset\.json|.*\.(?i:png|jpe?g|webp|bmp|gif|tiff?|ppm|pgm))"
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")   # no EPS: it starts Ghostscript
CIFAR_HOME = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
CIFAR_URLS = (CIFAR_HOME, f"https://web.archive.org/web/2023id_/{CIFAR_HOME}")
CIFAR_MD5 = "c32a1d4ab5d03f1284b67883e8d87530"
MNIST_URLS = ("https://ossci-datasets.s3.amazonaws.com/mnist/",
              "https://storage.googleapis.com/cvdf-datasets/mnist/")
MNIST_MD5 = {"train-labels-idx1-ubyte.gz": "d53e105ee54ea40749a09fcbcd1e9432",
             "train-images-idx3-ubyte.gz": "f68b3c2dcbeaaa9fbdd348bbdeb94873"}


# ---- Data sets -----------------------------------------------------------------------------------

class BadInput(ValueError):
    """What a person typed or supplied is wrong; str() is one sentence that says what to do."""

    def __str__(self):      # names in archives may hold line breaks, or codes that rule a terminal
        return "".join(c if c.isprintable() else "?" for c in super().__str__())


def attempt(what, cure, call, *args, **kwargs):
    """call(*args, **kwargs); any failure becomes BadInput "cannot use <what>: <why>; <cure>"."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")        # they would be more than one sentence
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
        end = "\n" if done >= total else ""
        print(f"\r{what}: {done:,} of {total:,}", end=end, file=sys.stderr, flush=True)


@dataclass
class Dataset:
    x: np.ndarray           # uint8 (N, C, H, W), in memory or memory-mapped; or float32 (N, d)
    labels: np.ndarray      # int64 (N,), or None
    classes: list           # the names of the labels 0, 1, ..; [] without labels
    name: str               # short, fit for a folder's name
    source: str             # one line for a person
    fingerprint: str        # 12 hex digits that say of which content, or which files, this is


def load_data(name, data_dir="data", size=None, fresh=None):
    """The data set of that name, or at that path, as a Dataset; BadInput where there is none.

    Names: BUILT_IN; 'cifar10' and 'mnist' are looked for in data_dir, else downloaded to it.
    Paths: a folder of images (sub-folder = class), a .zip of images (EDM's layout, labels in
    dataset.json; a folder may have that layout too), .npz ('images', 'labels'), .npy, a CIFAR-10
    binary .tar.gz, folder or .bin, or an idx images file or its folder.
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
        read, cure = read_images, "check that it is whole and that you may read it"
    elif kind.endswith((".npz", ".npy")):
        read, cure = read_numpy, "save plain numbers with numpy.save, or 'images' with numpy.savez"
    else:
        raise BadInput(f"{path} is of no known kind; give a folder of images, a .zip of images, "
                       ".npz, .npy, a CIFAR-10 .tar.gz or .bin, or an idx3-ubyte file")
    return build(short, path, data_dir, size, *attempt(file, cure, read, file))


def build(name, where, data_dir, size, x, labels=None, classes=(), stamps=None, read=None):
    """The Dataset of points (N, d) or images (N, C, H, W); or of files: names x, read(name)."""
    if len(x) < 2:
        raise BadInput(f"{where} holds {len(x)} images or points; a data set needs at least two")
    if labels is not None:
        labels, top = np.asarray(labels), len(classes) or MAX_CLASSES
        whole = labels.shape == (len(x),) and labels.dtype.kind in "iu"
        if not whole or labels.min() < 0 or labels.max() >= top:
            raise BadInput(
                f"{where} has {len(x)} images or points and {labels.dtype} labels {labels.shape}; "
                f"give one label for each, whole numbers from 0 to {top - 1}, or none at all")
        labels = labels.astype(np.int64)
        classes = list(classes) or [str(k) for k in range(labels.max() + 1)]
    tag = fingerprint(*([sorted(stamps.items())] if read else [x.shape, x, labels]), size)
    if read:
        x = gather(len(x), lambda i, channels: decode(read(x[i]), channels, size),
                   lambda i: f"{where}/{x[i]}", f"{name}-{tag}", data_dir)
    elif x.ndim == 4 and (size is not None or x.shape[2] != x.shape[3]):
        x = gather(len(x), lambda i, channels: pixels(picture(x[i]), size),
                   lambda i: f"image {i} of {where}", f"{name}-{tag}", data_dir)
    elif size is not None:
        raise BadInput(f"{where} has points, not images; leave out --size")
    if not isinstance(x, np.memmap):
        x = np.require(x, requirements="CW")       # contiguous, writable: torch wants it so
    what = (f"points in {x.shape[1]} dimensions" if x.ndim == 2 else
            f"{'RGB' if x.shape[1] == 3 else 'gray'} images {x.shape[2]}x{x.shape[3]}")
    names = f", {len(classes)} classes: {', '.join(classes[:10])}" if classes else ""
    source = f"{len(x):,} {what} from {where}{names}" + ", .." * (len(classes) > 10)
    return Dataset(x, labels, list(classes), name, source, tag)


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


def gather(n, image, called, key, data_dir):
    """image(0, None), image(1, C), .. as one uint8 array (n, C, H, W); called(i) says which.

    Above IN_MEMORY_BYTES it is a memory-mapped file data_dir/cache/<key>.npy, which gets its name
    only when complete: one that exists is used as it is, and two processes do no harm.
    """
    def blank():
        path.parent.mkdir(parents=True, exist_ok=True)
        if size + 4096 > shutil.disk_usage(path.parent).free:
            raise OSError("no room on that disk")  # now; in the loop it would kill us (SIGBUS)
        return np.lib.format.open_memmap(part, "w+", np.uint8, shape)

    path = Path(data_dir, "cache", f"{key}.npy")
    if path.exists():
        return attempt(path, "delete it", np.lib.format.open_memmap, path, "c")
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    shape = (n, *attempt(called(0), "replace it or remove it", image, 0, None).shape)
    size = math.prod(shape)
    cure, large = f"choose a --data-dir with {size:,} bytes to spare", size > IN_MEMORY_BYTES
    x = attempt(path.parent, cure, blank) if large else np.empty(shape, np.uint8)
    try:
        for i in range(n):
            y = attempt(called(i), "replace it or remove it", image, i, shape[1])
            if y.shape != shape[1:] or shape[2] != shape[3]:
                raise BadInput(f"{called(i)} is {y.shape[2]}x{y.shape[1]}, and all must be square "
                               "and of one size; give --size N to crop and resize them")
            x[i] = y
            if n >= 1000 and (n - 1 - i) % 100 == 0:
                progress("reading images", i + 1, n)
        if large:
            x.flush()
            os.replace(part, path)
    finally:
        if large:
            part.unlink(missing_ok=True)
    return np.lib.format.open_memmap(path, "c") if large else x


# ---- Readers: of (x, labels, classes), as much as build() needs ----------------------------------

def bounded(size, limit):
    """size, if that many bytes may be read into memory at once."""
    if size > limit:
        raise ValueError(f"{size:,} bytes are more than the {limit:,} read at once")
    return size


def members(path, names, deep=True):
    """{name: (size, time or CRC)} of the files so named in a folder, zip or tar, and read(name)."""
    wanted = re.compile(names, re.DOTALL).fullmatch

    def stop(error):                               # os.walk would pass over what it cannot read
        raise error

    if path.is_dir():
        walk = os.walk(path, onerror=stop, followlinks=True)
        files = (Path(root, f) for root, _, fs in (walk if deep else [next(walk)]) for f in fs)
        found = filter(wanted, (file.relative_to(path).as_posix() for file in files))
        stats = {name: os.stat(path / name) for name in found}
        stamps = {name: (stat.st_size, stat.st_mtime_ns) for name, stat in stats.items()}
        opened = lambda name: open(path / name, "rb")
    elif path.suffix.lower() == ".zip":
        archive = zipfile.ZipFile(path)
        infos = (info for info in archive.infolist() if wanted(info.filename))
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


def read_images(path):
    """(names in order, labels, classes, stamps, read) of the images of a folder or a zip."""
    stamps, read = members(path, IMAGES)
    names, labels, classes = sorted(set(stamps) - {"dataset.json"}), None, ()
    if "dataset.json" in stamps:
        cure = 'make it {"labels": [["file name", integer], ..]}, of all images, or remove it'
        labels = attempt(f"{path}/dataset.json", cure, json_labels, names, read)
    elif path.is_dir() and any("/" in n for n in names):
        if not all("/" in n for n in names):
            raise BadInput(f"{path} holds images both beside its sub-folders and inside them; "
                           "move each into the sub-folder of its class")
        classes, labels = np.unique([n.split("/")[0] for n in names], return_inverse=True)
        classes = classes.tolist()
    return names, labels, classes, stamps, read


def json_labels(names, read):
    """The labels in EDM's dataset.json: {"labels": [[file name, integer], ..] or null}."""
    pairs = json.loads(read("dataset.json"))["labels"]
    if pairs is None:
        return None
    labels = {name.replace("\\", "/"): label for name, label in pairs}
    if set(labels) != set(names):
        raise ValueError(f"it and the images disagree about {min(set(labels) ^ set(names))}")
    return np.asarray([labels[name] for name in names])


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
    """A gray or RGB PIL image -> uint8 (C, H, W), its central square at size x size (or None)."""
    if size is not None:
        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        image = image.crop((left, top, left + side, top + side))
        image = image.resize((size, size), Image.Resampling.LANCZOS)   # side == size: a copy
    x = np.asarray(image)
    return x[None] if x.ndim == 2 else x.transpose(2, 0, 1)


def read_numpy(path):
    """An .npy's points (N, d) or images (N, H, W[, C]) or (N, C, H, W); an .npz's, and labels."""
    if path.suffix.lower() == ".npy":
        x, labels = np.lib.format.open_memmap(path, "c"), None
        x = x if x.nbytes > IN_MEMORY_BYTES else np.array(x)           # a large one stays on disk
    else:
        with zipfile.ZipFile(path) as archive:     # np.savez makes a zip; it cannot be mapped
            bounded(sum(i.file_size for i in archive.infolist()), IN_MEMORY_BYTES)
        with np.load(path, allow_pickle=False) as arrays:
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
    stamps, read = members(folder, rf"(.*/)?({known}|batches\.meta\.txt)", deep=False)
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


# ---- Built-in sets, downloaded and drawn ---------------------------------------------------------

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
    official = folder / "cifar-10-binary.tar.gz"
    tars = [official] * official.is_file() + sorted(folder.glob("cifar-10-binary*.tar.gz"))
    return cifar_folder(folder) or (tars[0] if tars else download(CIFAR_URLS, official, CIFAR_MD5))


def download(urls, path, checksum, kind="md5"):
    """The file whose md5 (or other) sum starts so, from the first of urls that has it; its path.

    It grows as path.part, which the next run resumes, and gets its name once its sum is right.
    """
    part, why = path.with_name(path.name + ".part"), []
    if path.is_file():
        return path
    attempt(path.parent, "choose another --data-dir", os.makedirs, path.parent, exist_ok=True)
    for url in urls:
        try:
            fetch(url, part, checksum, kind)
            os.replace(part, path)
            return path
        except (OSError, ValueError, http.client.HTTPException) as error:
            why.append(f"{url}: {' '.join(str(error).split())}")
    raise BadInput(f"{path.name} could not be downloaded ({'; '.join(why)}); "
                   f"run again to resume, or put that file into the folder {path.parent} by hand")


def fetch(url, part, checksum, kind):
    """Downloads url to part, onto its end where the server can; ValueError: a wrong sum."""
    have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            have *= answer.status == 206           # 200: the whole file, from the start
            total = have + int(answer.headers.get("Content-Length") or 0)
            with open(part, "ab" if have else "wb") as file:
                while block := answer.read(1 << 18):
                    file.write(block)
                    progress(f"downloading {part.stem}", file.tell(), total)
                if file.tell() < total:            # a broken connection reads like an end
                    raise OSError(f"it stopped after {file.tell():,} of {total:,} bytes")
    except urllib.error.HTTPError as error:
        if error.code != 416 or not have:          # nothing follows: part is complete, or wrong
            raise
    digest = hashlib.new(kind, part.read_bytes(), usedforsecurity=False).hexdigest()
    if not digest.startswith(checksum):
        part.unlink()
        if not have:
            raise ValueError(f"it has another {kind} sum")
        fetch(url, part, checksum, kind)           # the part was wrong: once more, all of it


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


# ---- Rows ----------------------------------------------------------------------------------------

def gather_rows(pixels, rows, flip, device):
    """The rows (n, ...) as they are, uint8 images mirrored where flip (n,)."""
    x = pixels[rows.to(pixels.device)].to(device)
    return x if flip is None else torch.where(flip.to(device)[:, None, None, None], x.flip(-1), x)


def load_rows(pixels, rows, flip, device):
    """gather_rows, uint8 images as float32 in [-1, 1]; points as they are."""
    x = gather_rows(pixels, rows, flip, device)
    return x.float().div_(127.5).sub_(1) if x.dtype == torch.uint8 else x


def training_rows(N, holdout):
    """The rows to train on of N: all but every `holdout`-th, or all where that is 0."""
    i = torch.arange(N)
    return i[(i + 1) % holdout != 0] if holdout else i
