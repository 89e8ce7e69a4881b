"""Each public function or class of the four concept files works when pasted alone.

Its source and what its docstring's `Needs:` names go into an empty module that has imported torch,
numpy and math, and run there.  What others need runs there with them.
Arguments are found by their names, which are those of the contract: a new loss, weight, schedule or
sampler needs no line here.
"""

import ast
import inspect
import re
import sys
import types
from pathlib import Path

import pytest
import torch

from schedules import EDM

ROOT = Path(__file__).parent.parent
HEADER = """
import math
from dataclasses import dataclass
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
"""


def sources(name):
    """{public function or class: (its source, the names in its `Needs:`, the names it uses)}"""
    text = (ROOT / f"{name}.py").read_text()
    found = {}
    for node in ast.parse(text).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
            first = min([node.lineno] + [d.lineno for d in node.decorator_list])
            source = "\n".join(text.splitlines()[first - 1:node.end_lineno])
            needs = re.search(r"Needs:([\w\s,]+)\.", ast.get_docstring(node) or "")
            assert needs, f"{name}.{node.name}: end its docstring with 'Needs: nothing.'"
            words = {word.strip() for word in needs[1].split(",")} - {"nothing"}
            used = {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}
            found[node.name] = source, words, used
    return found


FILES = {name: sources(name) for name in ("schedules", "networks", "losses", "samplers")}
NEEDED = {need for found in FILES.values() for _, needs, _ in found.values() for need in needs}


@pytest.mark.parametrize("file, name", [(file, name) for file in FILES for name in FILES[file]])
def test_needs_names_what_is_used_in_the_file_directly_or_not(file, name):
    found, needed, new = FILES[file], set(), {name}
    while new:
        needed |= new
        new = {used for n in new for used in found[n][2] if used in found} - needed
    assert found[name][1] == needed - {name}


# ---- Arguments by their names --------------------------------------------------------------------

def denoise(x, sigma):
    return x / (1 + sigma ** 2)                                  # exact for N(0, I)


def normal(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


GRID = torch.tensor([3.0, 1.0, 0.3, 0.0], dtype=torch.float64)
SIGMA, PAIR = torch.tensor([[0.5], [0.7], [1.1], [1.4]]), normal(2, 4, 2)
IMAGE, LABELS = normal(4, 8, 8, 8), torch.tensor([0, 1, -1, 0])
ARGUMENTS = dict(
    networks=dict(
        model=lambda x, c_noise, *labels: x * c_noise.view(-1, 1, 1, 1), sigma=torch.tensor(0.5),
        precondition=lambda sigma: (sigma, sigma, sigma, sigma), target="v", channels=8, dim=8,
        size=8, classes=2, x=IMAGE, c_noise=SIGMA[:, 0], labels=LABELS, images=IMAGE[:1, :3]),
    losses=dict(
        denoise=denoise, with_head=lambda x, sigma: (denoise(x, sigma), x), x0=PAIR[0],
        noise=PAIR[1], sigma=SIGMA, weight=torch.reciprocal, c_skip=torch.reciprocal, x=PAIR[0],
        precondition=EDM().precondition,
        reference=normal(5, 2), target=torch.multiply, ladder=GRID[:3].flip(0),
        t=torch.tensor([1, 3]), K=2, B=4, p=0.5, a=normal(4, 8)),
    samplers=dict(
        denoise=denoise, conditional=denoise, unconditional=torch.multiply, weight=2.0, x=PAIR[0],
        noise=lambda: PAIR[1], schedule=EDM(), sigma=GRID[1], head=denoise, D=PAIR[1],
        seeds=[1, 2], shape=(3,), levels=[0.5, 3.0], moments=[0.4, 0.9]))
COPIES = dict(noise=PAIR, sigma=SIGMA.expand(2, 4, 1), tau=torch.ones(2, 4, 1))
UNUSUAL = {                                                      # something else by these names
    "path_noise": COPIES, "sa_loss": COPIES,
    "augmented_stf_target": dict(x=IMAGE, sigma=SIGMA[..., None, None], reference=IMAGE.flip(1)),
    "UNet": dict(width=8, mult=(1, 2), blocks=1, attend=(4,), fourier=True),
    "MLP": dict(x=IMAGE[:, 0, 0]),
}


def called(f, names):
    """f of the arguments that have a name here, the others left at their defaults."""
    return f(**{name: names[name] for name in inspect.signature(f).parameters if name in names})


def run(file, name, f):
    """Calls f, and calls what that gives as long as it is a function, a network or the like."""
    if file == "schedules":
        row, t = f(), torch.tensor([0.3, 0.7])
        row.time_steps(5)
        for member in (row.sigma, row.sigma_inv, row.dsigma, row.s, row.ds, row.training_sigma,
                       row.precondition, row.weight):
            member(t)
        return
    names = ARGUMENTS[file] | UNUSUAL.get(name, {})
    if "callback" in inspect.signature(f).parameters:            # a sampler: all of its times
        names = names | dict(t=GRID, sigma=GRID)
    while callable(f):
        f = called(f.forward if isinstance(f, torch.nn.Module) else f, names)
    if inspect.isgenerator(f):
        list(f)


@pytest.mark.parametrize("file, name", [
    (file, name) for file in FILES for name in FILES[file] if name not in NEEDED])
def test_runs_alone(file, name):
    module = types.ModuleType("pasted")
    sys.modules["pasted"] = module                               # dataclass looks its module up
    source, needs, _ = FILES[file][name]
    exec("\n\n".join([HEADER, *(FILES[file][n][0] for n in sorted(needs)), source]), vars(module))
    run(file, name, getattr(module, name))
