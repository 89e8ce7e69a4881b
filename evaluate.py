"""evaluate.py: data sets, the network of a run, its samples, and how good they are.

    python evaluate.py sample RUN --sampler heun --steps 18      a picture of samples
    python evaluate.py fid RUN                                   distance to the data
    python evaluate.py levels RUN                                loss at each noise level
"""

import argparse
import gzip
import hashlib
import io
import json
import math
import os
import re
import socket
import sys
import tarfile
import time
import warnings
import zipfile
from dataclasses import dataclass
from functools import partial
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


def attempt(what, cure, call, *args, **kwargs):
    """call(*args, **kwargs); any failure becomes BadInput "cannot use <what>: <why>; <cure>"."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")        # warnings would be more than one sentence
            return call(*args, **kwargs)
    except BadInput:
        raise
    except MemoryError as error:
        raise BadInput(f"{what} needs more memory than there is; choose a smaller --size, or less "
                       "data") from error
    except Exception as error:      # on damaged files zlib, PIL and numpy raise nearly every type
        why = " ".join(str(error).split())[:400] or type(error).__name__
        raise BadInput(f"cannot use {what}: {why}; {cure}") from error


def status(program, command, cure):
    """The exit status of command(); what a person can mend becomes one sentence on stderr.

    cure: what to do where memory is too small.
    """
    for stream in (sys.stdout, sys.stderr):        # the terminal may lack a letter of a class's
        if hasattr(stream, "reconfigure"):         # name: it becomes a question mark
            stream.reconfigure(errors="replace")
    try:
        command()
        return 0
    except (BadInput, OSError, FloatingPointError) as error:
        if ranks()[0] == 0 or not isinstance(error, BadInput):     # of all ranks one tells
            print(f"{program}: {error}", file=sys.stderr)
        return 2
    except (RuntimeError, MemoryError) as error:   # torch has no one type for all devices
        if not re.search("out of memory|allocate|MemoryError", repr(error)):
            raise
        print(f"{program}: out of memory; {cure}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\n{program}: stopped", file=sys.stderr)
        return 130


class Progress:
    """How far a long task is, on stderr, from rank 0: Progress("reading", 50_000)(done).

    A terminal shows one line, rewritten; a pipe or a file gets one after 5 s and then every 15.
    """

    def __init__(self, what, total, begin=0):
        self.what, self.total, self.begin, self.live = what, total, begin, sys.stderr.isatty()
        self.start, self.open = time.time(), False           # open: a line that will be rewritten
        self.due = self.start + (0.5 if self.live else 5)

    def __call__(self, done, more=""):
        now, last = time.time(), done >= self.total
        if ranks()[0] > 0 or (now < self.due and not (last and self.open)):
            return
        self.due = now + (0.5 if self.live else 15)
        left = int((now - self.start) / max(done - self.begin, 1) * max(self.total - done, 0))
        text = f"{self.what}: {done:,} of {self.total:,}{more}, {left // 60}:{left % 60:02d} left"
        self.open = self.live and not last
        print(f"\r{text:<79}" if self.live else text, end="" if self.open else "\n",
              file=sys.stderr, flush=True)

    def end_line(self):
        """Ends the line on a terminal, so that another text can follow."""
        if self.open:
            print(file=sys.stderr)
        self.open = False


def progress(what, items):
    """The items one by one; Progress tells how many are done."""
    told = Progress(what, len(items))
    for i, item in enumerate(items):
        yield item
        told(i + 1)


def ranks():
    """(this process's rank, the number of ranks): torchrun starts one process for each GPU."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def total(x):
    """The sum of all ranks' tensors x, in place."""
    if dist.is_initialized():
        dist.all_reduce(x)
    return x


# ---- Data sets -----------------------------------------------------------------------------------

LARGE_FILE = 4 << 30             # bytes; a larger .npy stays on disk and is memory-mapped
DRAWN = ("digits", "two-gaussians", "two-gaussians-64d", "ring")         # by digits() and points()
BUILT_IN = (*DRAWN, "cifar10", "mnist")
ENDINGS = (".png", ".jpg", ".jpeg", ".jfif", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm",
           ".pgm")
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")   # no EPS: it starts Ghostscript
INCEPTION = "pt_inception-2015-12-05-6726825d.pth"
MNIST = "https://ossci-datasets.s3.amazonaws.com/mnist/"
DOWNLOADS = {          # file: (the folder that it is in, the first digits of its sha256)
    "cifar-10-binary.tar.gz": ("https://www.cs.toronto.edu/~kriz/", "c4a38c50a1bc5f3a"),
    "train-labels-idx1-ubyte.gz": (MNIST, "3552534a0a558bbe"),
    "train-images-idx3-ubyte.gz": (MNIST, "440fcabf73cc546f"),
    INCEPTION: ("https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/",
                "6726825d")}


@dataclass
class Dataset:
    x: np.ndarray           # uint8 (N, C, H, W) or float32 (N, d); on disk, if a large .npy
    labels: np.ndarray      # int64 (N,), each within range(len(classes)); or None
    classes: list           # the names of the classes that occur; [] without labels
    name: str               # short, fit for a folder's name
    source: str             # one line for a person
    fingerprint: str        # 12 hex digits of the content, wherever it lies


def load_data(name, size=None, data_dir="data", fresh=None):
    """The data set of that name, or at that path, as a Dataset; BadInput where there is none.

    Names: BUILT_IN; 'cifar10' and 'mnist' are looked for in data_dir, else downloaded to it.
    Paths: a folder or a .zip of images (sub-folder = class; or labels in a dataset.json, as EDM's
    code has them), .npz ('images', 'labels'), .npy, CIFAR-10's binary .tar.gz, an idx3 file.
    size: crops each image to its central square, then resizes it to size x size.
    fresh: how many new rows to draw of a set in DRAWN; load_data(name) has none of them.
    """
    if name in DRAWN:
        more = dict(n=fresh, seed=1) if fresh else {}
        x, labels = digits(**more) if name == "digits" else points(name, **more)
        return build(name, f"the built-in set {name}", size, x, labels)
    path = Path(name)
    if name == "cifar10":
        path = download("cifar-10-binary.tar.gz", data_dir)
    elif name == "mnist":
        download("train-labels-idx1-ubyte.gz", data_dir)     # first: never images without labels
        path = download("train-images-idx3-ubyte.gz", data_dir)
    if not name or not path.exists():              # Path("") would be the current folder
        raise BadInput(f"there is no file, folder or data set {name!r}; "
                       f"give --data a path or one of {', '.join(BUILT_IN)}")
    stem = name if name in BUILT_IN else path.resolve().name.split(".")[0]
    short = re.sub(r"[^A-Za-z0-9_-]+", "-", stem).strip("-")[:40] or "data"
    ending = path.name.lower()
    if path.is_dir() or ending.endswith(".zip"):
        read = partial(read_images, size=size)
    elif ending.endswith((".npz", ".npy")):
        read = read_numpy
    elif ending.endswith((".tar.gz", ".tgz", ".tar")):
        read = read_cifar
    elif "idx3-ubyte" in ending:
        read = read_idx
    else:
        raise BadInput(f"{path} is of no known kind; give a folder or a .zip of images "
                       f"({' '.join(ENDINGS)}), .npz, .npy, CIFAR-10's .tar.gz, or an "
                       "idx3-ubyte file")
    cure = "check that it is whole, and that you may read it"
    return build(short, path, size, *attempt(path, cure, read, path))


def build(name, where, size, x, labels=None, classes=()):
    """The Dataset of points (N, d) or images (N, C, H, W); classes: names of labels 0, 1, ..."""
    if len(x) < 4:
        raise BadInput(f"{where} holds {len(x)} images or points, and a data set needs at least 4; "
                       f"images end in {' '.join(ENDINGS)}")
    if labels is not None:
        labels = np.asarray(labels)
        if labels.shape != (len(x),) or labels.dtype.kind not in "iu" or labels.min() < 0:
            raise BadInput(f"{where} has {len(x)} images or points and {labels.dtype} labels "
                           f"{labels.shape}; give one label for each, whole numbers from 0 on, or "
                           "none at all")
        occur, labels = np.unique(labels, return_inverse=True)         # classes without images go
        labels = labels.astype(np.int64)
        classes = [str(classes[k] if k < len(classes) else k) for k in occur]
    if size is not None and x.ndim != 4:
        raise BadInput(f"{where} has points, which --size cannot resize; choose images")
    if x.ndim == 4 and x.shape[2:] != (size or x.shape[2],) * 2:
        x = gather([(f"image {i} of {where}", partial(picture, x[i])) for i in range(len(x))], size)
    x = np.require(x, requirements="CW")           # contiguous, writable: torch wants it so
    what = (f"points in {x.shape[1]} dimensions" if x.ndim == 2 else
            f"{'RGB' if x.shape[1] == 3 else 'gray'} images {x.shape[2]}x{x.shape[3]}")
    names = f", {len(classes)} classes: {', '.join(classes[:10])}" if classes else ""
    source = f"{len(x):,} {what} from {where}{names}" + (", .." if len(classes) > 10 else "")
    digest = hashlib.sha256(repr((x.shape, x.dtype.str)).encode())
    digest.update(x)
    digest.update(b"None" if labels is None else labels)
    return Dataset(x, labels, list(classes), name, source, digest.hexdigest()[:12])


def gather(images, size):
    """Images [(name, read), ...] as one uint8 array (n, C, H, W); C is 3 if any has colour."""
    for i, (name, read) in enumerate(progress("reading images", images)):
        y = attempt(name, "replace it or remove it", decode, read, size)
        if i == 0:
            x = np.empty((len(images), *y.shape), np.uint8)
        if y.shape[1:] != x.shape[2:] or y.shape[1] != y.shape[2]:
            raise BadInput(f"{name} is {y.shape[2]}x{y.shape[1]}, and all must be square and of "
                           "one size; give --size N to crop and resize them")
        if len(y) > x.shape[1]:                    # the first colour after gray
            x = np.repeat(x, 3, axis=1)
        x[i] = y
    return x


def decode(read, size):
    """The PIL image read() -> uint8 (1, H, W) if it is gray, else (3, H, W); size: see load_data.

    It is turned upright by its EXIF orientation, and transparent parts are laid on white.
    """
    image = read()
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


# ---- Readers: each gives x, labels and classes, as build() takes them ----------------------------

def files_below(folder, seen):
    """The files below a folder, through links, but each real folder once: links may go round."""
    inside = sorted(folder.iterdir(), key=Path.is_symlink)             # folders before the links
    found, folders = [path for path in inside if path.is_file()], []
    for path in inside:
        if path.is_dir() and path.resolve() not in seen:
            seen.add(path.resolve())
            folders.append(path)
    for path in folders:
        found += files_below(path, seen)
    return found


def members(path):
    """({name: its path's parts}, content(name) -> bytes), of a folder's or zip's images and json.

    Hidden files are left out.  Outer folders that hold all the classes, or the dataset.json, are
    dropped from the paths.
    """
    if path.is_dir():
        names = [file.relative_to(path).as_posix() for file in files_below(path, {path.resolve()})]

        def content(name):
            return (path / name).read_bytes()
    else:
        archive = zipfile.ZipFile(path)
        names, content = archive.namelist(), archive.read
    parts = {name: name.replace("\\", "/").removeprefix("./").split("/")
             for name in sorted(set(names))}
    parts = {name: p for name, p in parts.items()                      # .git/.., the Mac's ._twins
             if p[-1] and not any(part.startswith(".") for part in p)}
    strange = [name for name, p in parts.items()
               if not p[-1].lower().endswith(ENDINGS) and p[-1] != "dataset.json"]
    for name in strange:
        del parts[name]
    if strange:
        print(f"left out  of {path}: {len(strange)}, such as {strange[0]}; images end in "
              f"{' '.join(ENDINGS)}")
    depth = 1 if any(p[-1] == "dataset.json" for p in parts.values()) else 2
    while len({p[0] for p in parts.values()}) == 1 and min(map(len, parts.values())) > depth:
        parts = {name: p[1:] for name, p in parts.items()}
    return parts, content


def read_images(path, size):
    """x, labels, classes of a folder or a zip of images."""
    parts, content = members(path)
    table = next((name for name, p in parts.items() if p == ["dataset.json"]), None)
    names = [name for name, p in parts.items() if p[-1] != "dataset.json"]
    depths, labels, classes = {len(parts[name]) for name in names}, None, []

    def read(name):
        try:
            return Image.open(io.BytesIO(content(name)), formats=FORMATS)
        except UnidentifiedImageError:             # Pillow names an object, not the file
            raise ValueError("it is no image, or damaged") from None
    if table:
        cure = 'make it {"labels": [["file name", integer], ..]}, of all images, or remove it'
        plain = ["/".join(parts[name]) for name in names]
        labels = attempt(f"{path}/{table}", cure, json_labels, content(table), plain)
    elif 1 in depths and len(depths) > 1:
        raise BadInput(f"{path} holds images both beside its sub-folders and inside them; move "
                       "each into the sub-folder of its class")
    elif 1 not in depths and names:
        classes, labels = np.unique([parts[name][0] for name in names], return_inverse=True)
    x = gather([(f"{path}/{name}", partial(read, name)) for name in names], size) if names else ()
    return x, labels, list(classes)


def json_labels(content, names):
    """The labels in EDM's dataset.json: {"labels": [[file name, integer], ..] or null}."""
    pairs = json.loads(content)["labels"]
    if pairs is None:
        return None
    labels = {name.replace("\\", "/"): label for name, label in pairs}
    if set(labels) != set(names):
        raise ValueError(f"it and the images disagree about {min(set(labels) ^ set(names))}")
    return [labels[name] for name in names]


def read_numpy(path):
    """x, labels of an .npy or .npz: points (N, d), images (N, H, W[, C]) or (N, C, H, W)."""
    if path.suffix.lower() == ".npy":
        x, labels = np.lib.format.open_memmap(path, mode="c"), None
        if path.stat().st_size <= LARGE_FILE:
            x = np.array(x)
    elif not zipfile.is_zipfile(path):             # np.load would advise to unpickle it
        raise ValueError("it is no .npz file, or not whole")
    else:
        with np.load(path, allow_pickle=False) as arrays:
            if "images" not in arrays:
                raise BadInput(f"{path} holds {', '.join(arrays.files) or 'nothing'}, not "
                               "'images'; save it with np.savez(file, images=..)")
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
    """x, labels, classes of the training batches in CIFAR-10's tar.

    A record is a byte of label and 3072 bytes: a red, a green, a blue plane, 32 rows each.
    """
    files = {}
    with tarfile.open(path) as archive:
        for member in archive:
            name = member.name.split("/")[-1]
            if re.fullmatch(r"data_batch_\d\.bin|batches\.meta\.txt", name):
                files[name] = archive.extractfile(member).read()
    classes = files.pop("batches.meta.txt", b"").decode().split()
    if not files:
        raise ValueError("it has no data_batch_1.bin")
    records = b"".join(files[name] for name in sorted(files))
    records = np.frombuffer(records, np.uint8).reshape(-1, 3073)
    return records[:, 1:].reshape(-1, 3, 32, 32), records[:, 0], classes


def read_idx(path):
    """x of an idx images file, labels of the labels file beside it, if there is one."""
    name = path.name.replace("images", "labels").replace("idx3", "idx1").removesuffix(".gz")
    labels = [path.with_name(name), path.with_name(f"{name}.gz")]
    found = [idx(beside, 1) for beside in labels if beside.is_file()]
    return idx(path, 3)[:, None], found[0] if found else None


def idx(path, rank):
    """The uint8 array of an idx file: magic number and shape as big-endian int32, then bytes."""
    with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
        _, *shape = np.frombuffer(file.read(4 + 4 * rank), ">i4").tolist()
        return np.frombuffer(file.read(), np.uint8).reshape(shape)


# ---- Data sets downloaded and drawn --------------------------------------------------------------

def download(name, folder, other=""):
    """The path of one of DOWNLOADS in a folder; downloaded, if it is not there.

    torch.hub gives the file its name when it is complete and its sha256 is right.  other: what else
    a person can do where the download fails.
    """
    path, (place, sha256) = Path(folder, name), DOWNLOADS[name]
    if not path.is_file():
        attempt(folder, "choose another --data-dir", os.makedirs, folder, exist_ok=True)
        print(f"downloading {place}{name}", flush=True)
        before = socket.getdefaulttimeout()
        socket.setdefaulttimeout(30)               # torch.hub would wait for ever
        try:
            attempt(place + name, f"try again, or put that file into the folder {folder} by hand"
                    f"{other}", torch.hub.download_url_to_file, place + name, str(path), sha256)
        finally:
            socket.setdefaulttimeout(before)
    return path


def digits(n=10_000, seed=0):
    """n images of the digits 0-9, uint8 (n, 3, 16, 16), and their labels, int64 (n,), balanced.

    Pillow's own font in random size, weight, tilt, place and colours, bright on dark: drawn three
    times as large and averaged down.
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
    """n points of a toy set, float32 (n, d), and their labels, int64 (n,).

    Mean about 0 and standard deviation about 0.5, EDM's sigma_data, in every coordinate.
    two-gaussians: means +-0.48 in every coordinate, deviation 0.14 (0.48^2 + 0.14^2 = 0.5^2),
    the component is the label; in 64 dimensions a mixture such as STF section 6.1 measures on.
    ring: 8 Gaussians of deviation 0.07 on a circle, numbered round it; the number is the label.
    """
    rng = np.random.default_rng(seed)
    if name.startswith("two-gaussians"):
        labels = rng.permutation(np.arange(n, dtype=np.int64) % 2)
        z = rng.standard_normal((n, 64 if name.endswith("64d") else 2))
        x = 0.48 * (2 * labels[:, None] - 1) + 0.14 * z
    else:
        labels = rng.permutation(np.arange(n, dtype=np.int64) % 8)
        angle = labels[:, None] * np.pi / 4
        radius = (2 * (0.5 ** 2 - 0.07 ** 2)) ** 0.5                  # a coordinate has half of r^2
        x = radius * np.hstack([np.cos(angle), np.sin(angle)]) + 0.07 * rng.standard_normal((n, 2))
    return x.astype(np.float32), labels


def to_uint8(x):
    """Images in [-1, 1] -> uint8; uint8 and points as they are.  From a tensor to an array."""
    x = x.detach().cpu()
    if x.ndim == 4 and x.dtype != torch.uint8:
        x = ((x.clamp(-1, 1) + 1) * 127.5).round().byte()
    return x.numpy()


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
    """sigma -> c_skip, c_out, c_in, c_noise, by --precondition: all four of a schedule; or for eps,
    x0 and v their own c_skip and c_out, and the c_in and c_noise of the run's schedule."""
    name, schedule = options.precondition, build_schedule(options)
    if name == "schedule":
        return schedule.precondition
    if name in SCHEDULES:
        return SCHEDULES[name]().precondition

    def precondition(sigma):
        c_skip, c_out = target_coefficients(name, sigma)
        return c_skip, c_out, *schedule.precondition(sigma)[2:]
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


SAVED = ("step", "options", "model", "ema", "optimizer", "scaler", "beta", "skipped", "best")


def checkpoints(run):
    """Paths of a run's checkpoints, oldest first."""
    return sorted(str(path) for path in Path(run).glob("checkpoint-*.pt"))


def load_checkpoint(run, device="cpu"):
    """A checkpoint, or the newest of a run: a dict of what is SAVED.  Nothing is unpickled."""
    path = run if os.path.isfile(run) else (checkpoints(run) or [None])[-1]
    if path is None:
        lack = "has no checkpoint" if os.path.isdir(run) else "does not exist"
        raise BadInput(f"{run!r} {lack}; name a folder in which train.py has left a checkpoint, or "
                       "start a new run")
    try:
        state = torch.load(path, map_location=device, weights_only=True)
        return {name: state[name] for name in SAVED}
    except Exception as error:      # torch's own text runs over lines and advises to unpickle
        raise BadInput(f"{path} is damaged, or no checkpoint of train.py; name another, or move it "
                       "away, and the one before it is used") from error


def load_weights(denoiser, weights, run):
    """Puts a checkpoint's weights into a denoiser; BadInput where they do not fit."""
    try:
        denoiser.load_state_dict(weights)
    except (RuntimeError, TypeError, AttributeError) as error:     # torch lists every name there is
        raise BadInput(f"the weights of {run} are not of this network; name another run, or build "
                       "the network as that run did") from error


def load_run(run, device=None, weights="ema", data=None):
    """The denoiser of a run, in eval mode, and its options; options.step and .folder are new.

    run: a folder that train.py made, or one checkpoint in it.  weights: "ema" (the first of
    --ema's averages), "raw", or another of --ema's half-lives.  data: where its data lie now.
    """
    device = pick_device(device)
    state = load_checkpoint(run, device)
    options = SimpleNamespace(**state["options"])
    options.device, options.step = device, state["step"]
    options.folder = (os.path.dirname(run) or ".") if os.path.isfile(run) else run
    denoiser = attempt(f"the options of {run}", "name another run", build_denoiser, options)
    options.data = data or options.data
    averages = state["ema"]
    name = next(iter(averages), None) if weights == "ema" else str(weights)
    if name != "raw" and name not in averages:
        raise BadInput(f"--weights {name}: the run has raw, ema and {', '.join(averages)}")
    load_weights(denoiser, state["model"] if name == "raw" else averages[name], run)
    return denoiser.to(device).eval(), options


def run_data(options):
    """The data that a run is trained on; BadInput if it has changed since its first step."""
    data = load_data(options.data, options.size, options.data_dir)
    if options.fingerprint not in ("", data.fingerprint):
        raise BadInput(f"the run was trained on other data than {data.source}; give it back what "
                       "it had, or start a new run")
    return data


# ---- Samples -------------------------------------------------------------------------------------

SAMPLERS = {         # name: the choices that belong to it, by the names of the samplers' arguments
    "heun": (),
    "euler": (),
    "edm-stochastic": ("S_churn", "S_tmin", "S_tmax", "S_noise"),
    "euler-maruyama": ("beta",),
    "ddim": ("eta", "variance"),
    "ddpm": ("variance",),
    "pc": ("snr",),
    "rk45": ("rtol",),
}
CHOICES = {          # name: (lowest and highest value, help)
    "S_churn": (0, math.inf, "how much noise each step replaces (default: 0, none)"),
    "S_tmin": (0, math.inf, "smallest noise level at which noise is replaced (default: 0)"),
    "S_tmax": (0, math.inf, "largest noise level at which noise is replaced (default: any)"),
    "S_noise": (0, math.inf, "standard deviation of the new noise (default: 1)"),
    "beta": (0, math.inf, "how fast new noise replaces old: 0 for Euler's method, 1 for VE's SDE "
             "(default: 1)"),
    "eta": (0, 1, "share of DDPM's noise (default: 0)"),
    "snr": (1e-4, 1, "size of the corrector's step (default: 0.16)"),
    "rtol": (1e-7, 1, "relative and absolute tolerance of a step (default: 1e-5)"),
    "variance": (None, None, "variance of a step; sn and npr need a run with that --head (default: "
                 "beta_tilde)")}
VARIANCES = ("beta_tilde", "beta", "analytic", "sn", "npr")


def generate(denoiser, options, seeds, sampler="heun", steps=18, labels=None, **choices):
    """Samples, one for each seed: float32 (len(seeds), *options.shape) on the CPU.

    Images are within about [-1, 1]; save_pictures shows them, and to_uint8 makes pixels of them.
    Sample i depends on seeds[i] and labels[i] alone, not on the batch it is drawn in.
    denoiser, options: of load_run.  seeds: whole numbers below 2^31.  labels (len(seeds),): class
    numbers; None: in the data's shares, if the run is class-conditional.  steps: rk45 chooses its
    own.  choices: those of `drawn`, and those that belong to the sampler, see SAMPLERS.
    """
    return torch.cat(list(drawn(denoiser, options, seeds, sampler, steps, labels, **choices)))


def drawn(denoiser, options, seeds, sampler="heun", steps=18, labels=None, schedule=None, guide=1.0,
          batch=64, callback=None, **choices):
    """What generate gives, batch by batch.

    schedule: whose time steps; None: the run's own.  guide: weight of classifier-free guidance.
    callback(i, x): called after step i with the state x of a batch, for trajectories.
    """
    choices = check_choices(denoiser, options, sampler, guide, choices)
    schedule = schedule or build_schedule(options)
    if steps < 1 or steps != int(steps):
        raise BadInput(f"--steps {steps} is not a whole number of at least 1")
    t = attempt(f"--steps {steps}", "choose fewer", schedule.time_steps,
                2 if sampler == "rk45" else steps)
    if labels is None:
        labels = draw_labels(seeds, options)
    else:
        labels = attempt("labels", "give class numbers", torch.as_tensor, labels).cpu()
        count = len(options.classes)
        if labels.shape != (len(seeds),) or not set(labels.tolist()) <= set(range(count)):
            raise BadInput(f"labels must be {len(seeds)} class numbers, one for each seed, below "
                           f"{count}; leave them out where the run has no classes")
    D = denoiser if guide == 1 else samplers.guidance(denoiser, denoiser, guide)
    for i in progress("drawing samples, batch", range(0, len(seeds), batch)):
        own = () if labels is None else (labels[i:i + batch].to(options.device),)
        odd = [2 * seed + 1 for seed in seeds[i:i + batch]]      # training has the even seeds
        noise = samplers.seeded_noise(odd, options.shape, options.device)
        x = schedule.sigma(t[0]) * noise()                                        # (b, *shape)
        yield draw(D, x, own, noise, sampler, schedule, t, choices, callback).cpu()


def draw(denoise, x, labels, noise, sampler, schedule, t, choices, callback=None):
    """The named sampler from x, of noise level sigma(t[0]); labels: () or one tensor (b,)."""
    sigma, start, images = schedule.sigma(t), schedule.s(t[0]) * x, x.ndim > 2
    variance, latest = choices.get("variance", "beta_tilde"), {}

    def D(x, sigma):
        if variance not in ("sn", "npr"):
            return denoise(x, sigma, *labels)
        D_x, latest["head"] = denoise(x, sigma, *labels, head=True)       # one call gives both
        return D_x

    def head(x, sigma):
        return latest["head"]

    covariances = dict(sn=samplers.sn_covariance(head), npr=samplers.npr_covariance(head))
    covariance = variance if callable(variance) else covariances.get(variance)
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
    if sampler == "rk45":
        rtol = choices.get("rtol", 1e-5)
        return samplers.rk45(denoise, start, t, schedule, rtol, rtol, labels, **more)[0]
    raise NotImplementedError(f"evaluate.draw has no branch for --sampler {sampler}")


def check_choices(denoiser, options, sampler, guide, choices):
    """The choices that are not None; BadInput where one has no meaning.  "analytic" becomes its
    covariance, measured here."""
    if sampler not in SAMPLERS:
        raise BadInput(f"--sampler {sampler} is none of {', '.join(SAMPLERS)}")
    choices = {name: value for name, value in choices.items() if value is not None}
    variance = choices.get("variance")
    measured = callable(variance) or variance in ("analytic", "sn", "npr")
    for name, value in choices.items():
        low, high, _ = CHOICES.get(name, (None, None, None))
        if low is not None and not low <= value <= high:
            raise BadInput(f"--{name} {value} is not within [{low}, {high}]")
    strange = [name for name in choices if name not in SAMPLERS[sampler]]
    for bad, sentence in [
        (strange, f"--{', --'.join(strange)}: not of --sampler {sampler}, whose choices are "
         f"{' '.join(SAMPLERS[sampler]) or 'none'}"),
        (variance and not callable(variance) and variance not in VARIANCES,
         f"--variance {variance} is none of {', '.join(VARIANCES)}"),
        ({"S_tmin", "S_tmax", "S_noise"} & set(choices) and not choices.get("S_churn"),
         "--S_tmin, --S_tmax and --S_noise need --S_churn, the amount of new noise"),
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

    Multiples of the golden ratio modulo 1 spread evenly: even a few seeds have these shares.
    """
    if not options.classes:
        return None
    share = torch.tensor(options.counts, dtype=torch.float64).cumsum(0)
    u = (torch.as_tensor(seeds).double() * (5 ** 0.5 - 1) / 2 + 0.5) % 1
    return torch.searchsorted(share / share[-1], u, right=True).clamp(max=len(share) - 1)


@torch.no_grad()
def analytic_moments(denoiser, options, count=128):
    """Analytic-DPM's Gamma: noise levels, 33 from .002 to 200, and E|eps_hat|^2/d at each.

    On `count` images of the data, each with a noise and its opposite.  Only |eps_hat|^2 - |eps|^2
    is measured: at large sigma, sigma^2 (1 - Gamma) would be lost in the noise of E|eps|^2.
    """
    data = run_data(options)
    g = torch.Generator().manual_seed(options.seed)
    rows = torch.randperm(len(data.x), generator=g)[:count].repeat(2)
    x0, labels = take(data, rows, options.device)
    levels, moments = torch.logspace(math.log10(0.002), math.log10(200), 33), []
    for sigma in progress("measuring Analytic-DPM's moments, noise level", levels):
        noise = torch.randn(x0[len(x0) // 2:].shape, generator=g).to(x0)
        noise = torch.cat([noise, -noise])                                        # (2 count, ...)
        x = x0 + sigma * noise
        D = in_batches(denoiser, x, sigma, labels if options.classes else None)
        moments.append(1 + (((x - D) / sigma).double() ** 2 - noise.double() ** 2).mean().item())
    return levels.tolist(), moments


def in_batches(denoise, x, sigma, labels=None):
    """denoise(x, sigma, labels) for a long x, 64 images or 4096 points at a time; sigma 0-d."""
    batch, D = 64 if x.ndim > 2 else 4096, []
    for i in range(0, len(x), batch):
        own = () if labels is None else (labels[i:i + batch],)
        D.append(denoise(x[i:i + batch], sigma, *own))
    return torch.cat(D)


# ---- Pictures ------------------------------------------------------------------------------------

def panel(x, columns, limit, cell=64):
    """A PIL image of images (n, C, H, W) uint8, each enlarged to about cell x cell, in so many
    columns (None: as many as rows); or of points (n, d): two coordinates, from -limit to limit."""
    if x.ndim == 2:
        page = Image.new("L", (400, 400), 235)
        pen = ImageDraw.Draw(page)
        for a, b in (x[:, :2] * [1, -1] / limit + 1) / 2 * 400:
            pen.rectangle((a, b, a + 1, b + 1), fill=0)
        return page
    columns = columns or math.ceil(math.sqrt(len(x)))
    rows, zoom = math.ceil(len(x) / columns), max(1, cell // x.shape[-1])
    page = np.full((rows * columns, *x.shape[1:]), 255, np.uint8)
    page[:len(x)] = x
    page = page.reshape(rows, columns, *x.shape[1:]).transpose(2, 0, 3, 1, 4)
    image = picture(page.reshape(x.shape[1], rows * x.shape[2], columns * x.shape[3]))
    return image.resize((image.width * zoom, image.height * zoom), Image.Resampling.NEAREST)


def save_pictures(path, panels, names=()):
    """One PNG of captioned panels side by side: [(caption, images or points), ...].

    Images are uint8, or within [-1, 1] as generate gives them; arrays or tensors.
    names: one for each row of images, as of its class; a panel then has len(names) equal rows.
    All panels of points have one scale: the one at which the first panel's points fit.
    """
    panels = [(text, to_uint8(x if torch.is_tensor(x) else torch.from_numpy(np.array(x))))
              for text, x in panels]
    limit = 1.1 * np.abs(panels[0][1]).max() or 1.0            # all points may be 0
    parts = [(text, panel(x, len(x) // len(names) if names else None, limit)) for text, x in panels]
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


def save_gif(path, frames, columns):
    """A GIF of a sampler's states x (n, ...), each with the contrast of the last, which stays."""
    pages, limit = [], 1.1 * frames[-1].abs().max().item()
    for x in frames:
        x = to_uint8(x * (frames[-1].std() / x.std()))
        pages.append(panel(x, columns, limit, cell=32).quantize(64))
    whole(path, pages[0].save, format="GIF", save_all=True, append_images=pages[1:], loop=0,
          duration=[200] * (len(pages) - 1) + [2000])


def whole(path, write, **options):
    """Writes a file by write(file, **options), whole or not at all."""
    def to_part():
        part = Path(f"{path}.part")
        os.makedirs(part.parent, exist_ok=True)
        try:
            with open(part, "wb") as file:
                write(file, **options)
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)           # a full disk keeps no part
    attempt(path, "make room there, or choose another place", to_part)


def class_grid(options, count):
    """Labels and row names of a picture: one row a class, at most 10 for images."""
    if not options.classes:
        return None, []
    names = options.classes[:10] if len(options.shape) > 1 else options.classes
    labels = (torch.arange(count) % len(names)).sort().values
    equal_rows = len(options.shape) > 1 and count % len(names) == 0
    return labels, names if equal_rows else []


# ---- Distances -----------------------------------------------------------------------------------

def extractor(kind, shape, data_dir="data", device="cpu"):
    """(kind, extract) of kind "pixels" or "inception".

    extract: images (n, *shape) uint8, or points -> features (n, d) float64 on the CPU.  Pixels are
    averaged down to at most 16 x 16.  Inception's file is looked for in data_dir, else downloaded
    to it.
    """
    if kind == "inception" and len(shape) == 1:
        raise BadInput("Inception's features are of images; choose pixels for points")
    if kind == "pixels":
        def extract_pixels(x):
            x = to_float(x)
            if x.ndim == 4 and x.shape[-1] > 16:
                x = torch.nn.functional.adaptive_avg_pool2d(x, 16)
            return x.flatten(1).double()
        return kind, extract_pixels
    path, network = download(INCEPTION, data_dir, "; or choose pixels as features"), Inception()
    try:
        network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    except Exception as error:      # torch's own text runs over lines and advises to unpickle
        raise BadInput(f"{path} is not Inception's weights, or not whole "
                       f"({type(error).__name__}); remove it, and it is downloaded") from error
    network.to(device)

    def extract(x):
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):   # it keeps 3 digits of 7
            pool3, _ = network(x.to(device).expand(-1, 3, -1, -1))     # gray: three times the same
        return pool3.cpu().double()
    return kind, extract


@torch.no_grad()
def measure(batches, extract):
    """Mean (d,) and covariance (d, d) of the features of batches of images or points.

    Every rank brings its own batches and gets the moments of all.
    """
    n, x, xx = torch.zeros((), dtype=torch.float64), 0, 0
    for batch in batches:
        features = extract(torch.from_numpy(to_uint8(batch)))
        n, x, xx = n + len(batch), x + features.sum(0), xx + features.T @ features
    n, x, xx = total(n), total(x), total(xx)
    if not xx.isfinite().all():
        raise FloatingPointError("the features are not finite: damaged weights, or samples")
    mean = x / n
    return mean, (xx - n * mean.outer(mean)) / (n - 1)


def frechet_distance(mean1, cov1, mean2, cov2):
    """Squared Frechet distance of two Gaussians: FID, where the features are Inception's.

        |m1 - m2|^2 + Tr(C1 + C2 - 2 (C1 C2)^{1/2})

    With any A A^T = C1, (C1 C2)^{1/2} has the trace of (A^T C2 A)^{1/2}, and that is a symmetric
    problem: no general matrix root, no complex numbers, singular C1, C2 allowed.
    mean (d,), cov (d, d) float64 -> float, in the features' squared units.
    """
    values, Q = torch.linalg.eigh(cov1)
    A = Q * values.clamp(min=0).sqrt()
    root = torch.linalg.eigvalsh(A.T @ cov2 @ A).clamp(min=0).sqrt().sum()
    return float(((mean1 - mean2) ** 2).sum() + cov1.trace() + cov2.trace() - 2 * root)


def distance_name(features, n):
    """The name of n samples' distance, which falls with n; FID is that of 50,000."""
    return f"fid_{n}" if features == "inception" else f"frechet_{features}_{n}"


def real_statistics(data, num, features, seed=0, most=50_000, batch=64):
    """What `num` samples are compared with: at most `most` random rows of the data, as a dict.

    features: of extractor.  mean and cov are those of all these rows; floor, the distance of num of
    them to the others, is what perfect samples reach (NaN with fewer than 2 num rows).
    """
    rows = torch.randperm(len(data.x), generator=torch.Generator().manual_seed(seed))[:most]
    rank, world = ranks()

    def moments(rows):
        parts = progress("measuring real rows, batch", rows[rank::world].split(batch))
        return measure((torch.from_numpy(data.x[part.numpy()]) for part in parts), features[1])
    mean, cov = moments(rows)
    floor = math.nan
    if 2 * num <= len(rows):
        floor = frechet_distance(*moments(rows[:num]), *moments(rows[num:]))
    return dict(mean=mean, cov=cov, floor=floor)


def run_distance(denoiser, options, seeds, features, real, batch=None, **how):
    """The Frechet distance of samples of these seeds, of generate(**how), to `real`, of
    real_statistics.  The ranks share the seeds."""
    rank, world = ranks()
    own, batch = seeds[rank::world], batch or (64 if len(options.shape) > 1 else 4096)
    samples = drawn(denoiser, options, own, batch=batch, **how)
    return frechet_distance(*measure(samples, features[1]), real["mean"], real["cov"])


# ---- Loss by noise level -------------------------------------------------------------------------

LEVELS = (0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0)     # sigma, of the tables


def held_out(data, options, count=None):
    """(x0, labels) that training does not see, on the device; 64 images or 1000 points by default.

    New draws of a built-in set, else every `holdout`-th row.  Without such rows: training rows.
    """
    count, k = count or (64 if data.x.ndim == 4 else 1000), options.holdout
    if options.data in DRAWN:
        data, k = load_data(options.data, options.size, options.data_dir, fresh=count), 0
    N = len(data.x)
    rows = torch.arange(k - 1, N, k) if 0 < k <= N else torch.arange(N)
    rows = rows[torch.linspace(0, len(rows) - 1, min(count, len(rows))).long()]
    x0, labels = take(data, rows, options.device)
    return x0, labels if options.classes else None


@torch.no_grad()
def denoising_error(denoise, x0, labels=None, levels=LEVELS):
    """E |D(x0 + sigma eps; sigma) - x0|^2/d at each noise level.

    The noise is the same at each call, and the weight is 1, so that runs of any objective compare.
    """
    noise, errors = torch.randn(x0.shape, generator=torch.Generator().manual_seed(0)).to(x0), []
    for sigma in torch.tensor(levels):
        D = in_batches(denoise, x0 + sigma * noise, sigma, labels)
        errors.append(((D - x0).double() ** 2).mean())
    return torch.stack(errors).tolist()


@torch.no_grad()
def noise_table(denoise, options, data, count=128):
    """Rows (sigma, DSM loss, STF loss, ESS): the same `count` images and noise at each level.

    The two losses score the same D: against x0, and against x0's posterior mean given a reference.
    They differ by the variance that averaging over the reference takes away.  That is noise, which
    no network can learn; more references would show more of it.  ESS is the number of references
    that STF's target averages, 1/sum_k w_k^2.
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


def print_levels(table, options, data):
    """noise_table on the terminal, with a bar for the share of the loss that is noise."""
    same = f"\n{'of its class':>44}" if options.classes else ""
    count = min(len(data.x), max(options.ref_batch, 128))
    print("the network's squared error by noise level, times the run's weight: to the clean x0 "
          f"(DSM), and to\nthe mean of x0 over {count:,} references (STF)\n\n"
          f"{'':8} {'DSM loss':>11}{'STF loss':>11}{'references':>13}   share of noise in\n"
          f"{'sigma':>8} {'(to x0)':>11}{'(to mean)':>11}{'averaged':>13}   DSM's loss, at least"
          f"{same}")
    for sigma, dsm, stf, size in table:
        noise = 1 - stf / dsm
        bar = "#" * max(round(20 * noise), 0)
        print(f"{sigma:8g} {dsm:11.4f}{stf:11.4f}{size:13.1f} {noise:8.0%}   {bar}")


def draw_run(folder, table):
    """loss.png, where matplotlib is installed: the loss by step, and noise_table as curves."""
    try:
        from matplotlib import figure
    except ImportError:
        print("(with matplotlib installed, a picture of the loss would be drawn)")
        return
    lines = map(json.loads, Path(folder, "log.jsonl").read_text().splitlines())
    found = [(line["step"], line["loss"]) for line in lines if "loss" in line]
    if not found:                                  # the log was moved away
        return
    steps, losses = zip(*found)
    span = max(len(losses) // 20, 1)
    means = np.convolve(losses, np.ones(span) / span, "valid")
    sigma, dsm, stf, _ = zip(*table)
    page = figure.Figure(figsize=(9, 4), layout="tight")
    left, right = page.subplots(1, 2)
    left.plot(steps, losses, linewidth=0.5, label="each step")
    left.plot(steps[span // 2:][:len(means)], means, label=f"mean of {span} steps around it")
    left.set(xlabel="step", ylabel="loss", ylim=(0, 2 * means.max()), title="training")
    left.legend(fontsize=8)
    right.semilogx(sigma, [1 - b / a for a, b in zip(dsm, stf)])
    right.set(xlabel="noise level sigma", ylim=(0, 1), title="where STF acts",
              ylabel="share of noise in DSM's loss, at least")
    page.suptitle(folder)
    page.savefig(f"{folder}/loss.png", dpi=100)
    print(f"picture     {folder}/loss.png")


# ---- Commands ------------------------------------------------------------------------------------

class Counted:
    """A denoiser that counts the rows it is asked for: NFE = rows / samples."""

    def __init__(self, denoiser):
        self.denoiser, self.rows = denoiser, 0

    def __call__(self, x, sigma, *labels, **more):
        self.rows += len(x)
        return self.denoiser(x, sigma, *labels, **more)


def sampling(args, denoiser, options):
    """generate's arguments out of the command line, and a line that says them."""
    choices = {name: getattr(args, name) for name in CHOICES}
    how = dict(sampler=args.sampler, steps=args.steps, guide=args.guidance,
               schedule=SCHEDULES[args.schedule]() if args.schedule else None)
    how |= check_choices(denoiser, options, args.sampler, args.guidance, choices)
    usual = dict(schedule=None, guidance=1.0, seed=0, weights="ema", **dict.fromkeys(CHOICES))
    text = args.sampler + ("" if args.sampler == "rk45" else f", {args.steps} steps")
    for name, value in usual.items():
        if getattr(args, name) != value:
            text += f", {name} {getattr(args, name)}"
    return how, text


def sample(args):
    """evaluate.py sample: draws samples of a run and saves them."""
    denoiser, options = load_run(args.run, args.device, args.weights, args.data)
    images, to_array = len(options.shape) > 1, (args.out or "").endswith(".npz")
    each = 8 if args.label is not None else 8 * len(options.classes[:10]) or 64
    num = args.num or (each if images else 4000)
    seeds = range(args.seed, args.seed + num)
    labels, names = (draw_labels(seeds, options), []) if to_array else class_grid(options, num)
    how, text = sampling(args, denoiser, options)
    if args.label is not None:
        if args.label not in options.classes:
            raise BadInput(f"--class {args.label}: " + (
                f"choose one of {', '.join(options.classes)}" if options.classes else
                "the run is not class-conditional; leave the option out"))
        labels, names = torch.full((num,), list(options.classes).index(args.label)), []
        text += f", class {args.label}"
    name = text.replace(" steps", "").replace(", ", "-").replace(" ", "-").replace("/", "-")
    out = args.out or f"{options.folder}/{name}-at-{options.step}.png"
    if not to_array and not out.endswith(".png"):
        raise BadInput(f"--out {out} ends neither in .png nor in .npz; choose another name")
    batch, frames = args.batch if images and not args.gif else num, []

    def keep(i, x):
        if args.gif:
            frames.append(x)
    start, counted = time.time(), Counted(denoiser)
    x = np.concatenate([to_uint8(x) for x in drawn(
        counted, options, seeds, labels=labels, batch=batch, callback=keep, **how)])
    if to_array:
        whole(out, np.savez, images=x, **({} if labels is None else {"labels": labels.numpy()}))
    else:
        save_pictures(out, [(text, x)], names)
    print(f"{num} samples of {args.run} at step {options.step}, {text}, "
          f"NFE {counted.rows / num:g}, {time.time() - start:.1f} s\n{out}")
    if args.gif:
        save_gif(f"{out[:-4]}.gif", frames, num // len(names) if names else None)
        print(f"{out[:-4]}.gif")


def fid(args):
    """evaluate.py fid: the Frechet distance of a run's samples to the data, beside the floor."""
    denoiser, options = load_run(args.run, args.device, args.weights, args.data)
    how, text = sampling(args, denoiser, options)
    shape, images = tuple(options.shape), len(options.shape) > 1
    num = args.num or (2000 if images else 4000)
    if args.ref:
        data = load_data(args.ref, shape[-1] if images else None, args.data_dir)
    else:
        data = run_data(options)
    if data.x.shape[1:] != shape:
        raise BadInput(f"{data.name} has rows of shape {data.x.shape[1:]}, and the samples are "
                       f"{shape}; choose another --ref")
    kind = args.features or ("inception" if images else "pixels")
    features = extractor(kind, shape, args.data_dir, options.device)
    real = real_statistics(data, num, features, args.seed, len(data.x), args.batch)
    seeds = range(args.seed, args.seed + num)
    distance = run_distance(denoiser, options, seeds, features, real, args.batch, **how)
    print(f"{args.run} at step {options.step}, {text}\n"
          f"compared with {data.source}, fingerprint {data.fingerprint}\n"
          f"features of {features[0]}\n\n"
          f"{'':20}{f'{num} samples':>20}{f'{num} real (floor)':>20}\n"
          f"{distance_name(features[0], num):20}{distance:20.4g}{real['floor']:20.4g}")
    if math.isnan(real["floor"]):
        print(f"no floor: it takes {2 * num} real rows, and the data have {len(data.x)}")


def levels(args):
    """evaluate.py levels: the loss at each noise level, and the share of it that is noise."""
    denoiser, options = load_run(args.run, args.device, args.weights, args.data)
    data = run_data(options)
    print(f"{args.run} at step {options.step}\n")
    print_levels(noise_table(denoiser, options, data), options, data)


def number(kind, low, high=math.inf):
    """A type for argparse: an int or float within [low, high]."""
    def parse(text):
        value = kind(text)
        if not low <= value <= high:
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


def parser():
    p = Parser(prog="evaluate.py", description="What a run of train.py has learned.", epilog="""\
examples:
  python evaluate.py sample runs/000-digits-stf-edm --class 7
  python evaluate.py sample runs/000-digits-stf-edm --sampler ddim --eta 0.5 --steps 24
  python evaluate.py fid runs/000-digits-stf-edm --features pixels --num 1000""")
    commands = p.add_subparsers(dest="command", required=True, metavar="COMMAND")
    sample = commands.add_parser("sample", help="draw samples of a run")
    fid = commands.add_parser("fid", help="the distance of a run's samples to the data")
    levels = commands.add_parser("levels", help="the loss at each noise level")
    for add in (sample.add_argument, fid.add_argument, levels.add_argument):
        add("run", metavar="RUN", help="folder that train.py made, or one of its checkpoints")
        add("--weights", default="ema", metavar="NAME", help="ema (the run's first average), raw, "
            "or another of its half-lives (default: ema)")
        add("--data", metavar="PATH", help="the data of RUN, if they are no longer where they were")
        add("--device", metavar="NAME", help="cpu or cuda (default: cuda where there is one)")
    for add in (sample.add_argument, fid.add_argument):
        few, usual = (1, "8 of each class, 64 without classes")
        if add == fid.add_argument:
            few, usual = (2, "2000 images")
        add("--num", type=number(int, few), metavar="N", help="number of samples (default: "
            f"{usual}; 4000 points)")
        add("--seed", type=number(int, 0, 2 ** 31 - 1), default=0, metavar="N",
            help="sample i has seed N + i (default: 0)")
        add("--batch", type=number(int, 1), default=64, metavar="N", help="samples drawn "
            "together; this changes none of them (default: 64)")
        add("--sampler", choices=SAMPLERS, default="heun", help="default: heun")
        add("--steps", type=number(int, 1), default=18, metavar="N", help="number of time steps; "
            "rk45 chooses its own (default: 18)")
        add("--schedule", choices=SCHEDULES, help="whose time steps (default: the run's own)")
        add("--guidance", type=number(float, 0), default=1.0, metavar="X", help="weight of "
            "classifier-free guidance; above 1 exaggerates the class (default: 1, none)")
        for name, (low, _, text) in CHOICES.items():
            kind = dict(choices=VARIANCES) if low is None else dict(type=float, metavar="X")
            owners = [sampler for sampler, own in SAMPLERS.items() if name in own]
            add(f"--{name}", help=f"{' and '.join(owners)}: {text}", **kind)
    sample.add_argument("--out", metavar="FILE", help="a .png or .npz (default: a .png in RUN)")
    sample.add_argument("--gif", action="store_true", help="also save the steps as a moving .gif")
    sample.add_argument("--class", dest="label", metavar="NAME", help="draw this class only")
    add = fid.add_argument
    add("--ref", metavar="PATH", help="other data to compare with, resized as those of RUN")
    add("--features", choices=["inception", "pixels"], help="what the distance is measured on "
        "(default: inception for images, pixels for points)")
    add("--data-dir", default="data", metavar="FOLDER", help="folder of downloads, such as "
        f"{INCEPTION} (default: data)")
    return p


def main(argv=None):
    def command():
        args = parser().parse_args(argv)
        dict(sample=sample, fid=fid, levels=levels)[args.command](args)
    return status("evaluate.py", command, "choose a smaller --batch")


if __name__ == "__main__":
    sys.exit(main())
