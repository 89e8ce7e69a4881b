"""Each public function or class of the four concept files and averages.py works when pasted alone.

Its source and what its docstring's `Needs:` names go into an empty module that has imported torch,
numpy and math; there it must give what the original gives.
"""

import ast
import importlib
import re
import sys
import types
from pathlib import Path

import pytest
import torch

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
    """{public function or class: (its source, the names in its `Needs:`)}"""
    text = (ROOT / f"{name}.py").read_text()
    found = {}
    for node in ast.parse(text).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
            first = min([node.lineno] + [d.lineno for d in node.decorator_list])
            source = "\n".join(text.splitlines()[first - 1:node.end_lineno])
            needs = re.search(r"Needs:([\w\s,]+)\.", ast.get_docstring(node) or "")
            assert needs, f"{name}.{node.name} does not say what it needs"
            words = [w.strip() for w in needs[1].split(",")]
            found[node.name] = source, [] if words == ["nothing"] else words
    return found


FOUND = {(file, name): entry for file in ("schedules", "networks", "losses", "samplers", "averages")
         for name, entry in sources(file).items()}


def pasted(file, name):
    source, needs = FOUND[file, name]
    module = types.ModuleType("pasted")
    sys.modules["pasted"] = module                               # dataclass looks its module up
    exec("\n\n".join([HEADER, *(FOUND[file, n][0] for n in needs), source]), vars(module))
    return getattr(module, name)


def denoise(x, sigma):
    return x / (1 + sigma ** 2)                                  # exact for N(0, I)


def start():
    torch.manual_seed(0)
    return torch.randn(4, 2), torch.randn(4, 2), torch.rand(4, 1) + 0.5


def schedule(cls):
    row, t = cls(), torch.tensor([0.3, 0.7])
    return torch.cat([row.sigma(t), row.sigma_inv(t), row.dsigma(t), row.s(t), row.ds(t),
                      row.time_steps(5), row.training_sigma(t), row.weight(t),
                      *row.precondition(t)])


IDENTITY = types.SimpleNamespace(sigma=lambda t: t, dsigma=torch.ones_like, s=torch.ones_like,
                                 ds=torch.zeros_like)
GRID = torch.tensor([3.0, 1.0, 0.3, 0.0], dtype=torch.float64)
IMAGE = torch.linspace(-1, 1, 2 * 8 * 4 * 4).view(2, 8, 4, 4)
PAST = []
LAYERS = torch.nn.Sequential(torch.nn.Linear(3, 3))
EMB = torch.linspace(-1, 1, 2 * 16).view(2, 16)


def filled(module):
    """Every parameter 0.1: fresh ones may be zero, or memory as it was found."""
    for p in module.parameters():
        p.data.fill_(0.1)
    return module


def unet(cls, adm):
    net = cls(8, 3, width=8, mult=(1, 2), blocks=1, attend=(4,), classes=2, fourier=not adm,
              residual=not adm, fir=(1, 3, 3, 1), augment_dim=9, adm=adm)
    x = torch.linspace(-1, 1, 2 * 3 * 64).view(2, 3, 8, 8)
    return net(x, torch.tensor([0.1, 0.2]), torch.tensor([0, 1]), torch.ones(2, 9))


PAIR = torch.stack(start()[:2])
WARP = torch.tensor([[1.0, 1, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5], [1, 0, 0, 0, 0, 0, 0, 0]])


def ema_of_two(update):
    ema, model = torch.nn.Linear(3, 1), torch.nn.Linear(3, 1)
    update(ema, model, 0.3)
    return ema.weight.detach()


def running_beta(beta):
    sigma, theta = start()[2], torch.ones(2, requires_grad=True)
    beta.update(sigma, (PAIR[0] * theta).sum(1), (PAIR[1] * theta).sum(1), [theta])
    return torch.cat([beta.sums.flatten(), beta(sigma).flatten()])


CALLS = {
    "Denoiser": lambda f: f(lambda x, c, *labels: x * c[:, None], lambda s: (s, s, s, s))(
        torch.ones(2, 3), torch.tensor(0.5)),
    "sinusoids": lambda f: f(torch.tensor([0.1, 7.0]), 8, endpoint=True),
    "one_hot": lambda f: f(torch.tensor([1, -1]), 3, EMB),
    "Fourier": lambda f: f(8)(torch.tensor([0.1, 7.0])),
    "GroupNorm": lambda f: f(8, 1e-6)(IMAGE),
    "Conv": lambda f: filled(f(8, 8, 3, down=True, fir=(1, 3, 3, 1), fused=True))(IMAGE),
    "Block": lambda f: filled(f(8, 8, 16, up=True, attention=True))(IMAGE, EMB),
    "MLP": lambda f: filled(f(2, 8, 2, 3))(torch.ones(2, 2), torch.tensor([0.1, 7.0]),
                                           torch.tensor([0, 2])),
    "UNet": lambda f: torch.cat([unet(f, False), unet(f, True)]),
    "ConvBN": lambda f: filled(f(8, 4, (1, 3)).eval())(IMAGE),
    "Mixed": lambda f: filled(f(8, {"branch3x3": [(4, 1), (3, (1, 3), (3, 1))],
                                    "branch_pool": [(2, 1)]}).eval())(IMAGE),
    "Inception": lambda f: torch.cat(f()(EMB[None, None].expand(1, 3, 2, 16)), dim=1),
    "initialise": lambda f: f(LAYERS, False) or LAYERS[0].weight.clone(),
    "target_coefficients": lambda f: torch.cat([c for target in ("eps", "x0", "v", "F")
                                                for c in f(target, start()[2])]),
    "dsm_loss": lambda f: f(denoise, *start(), torch.reciprocal),
    "stf_target": lambda f: f(start()[0], start()[2], start()[1], chunk=3),
    "head_loss": lambda f: f(lambda x, sigma: (denoise(x, sigma), x), *start()),
    "antithetic_loss": lambda f: f(denoise, *start(), torch.reciprocal),
    "together": lambda f: f(denoise, PAIR, start()[2].expand(2, 4, 1)),
    "stf_weights": lambda f: f(start()[0], start()[2], start()[1], chunk=3),
    "rows": lambda f: torch.cat([y.flatten() for y in [*f(start()[0], PAIR, 3),
                                                       *f(EMB.byte(), PAIR)]]),
    "weighted_sum": lambda f: f(torch.ones(2, 4), start()[0], chunk=3),
    "stf_loss": lambda f: f(denoise, *start(), torch.reciprocal, torch.multiply),
    "others_mean": lambda f: torch.cat(f(start()[0], PAIR.flatten(0, 1)), dim=1),
    "mean_correction": lambda f: f(start()[0], start()[2], PAIR.flatten(0, 1), start()[1],
                                   torch.reciprocal),
    "measure_gamma": lambda f: f(*start()[:2], start()[2][:, 0], PAIR.flatten(0, 1)),
    "interpolate": lambda f: f(torch.tensor([0.1, 1.0, 2.0]), PAIR[0, :3, 0])(start()[2]),
    "sa_tau": lambda f: torch.cat([f(GRID[:3].flip(0), torch.tensor([1, 3]), 2, kind)
                                   for kind in ("unit", "window", "paper")]),
    "path_noise": lambda f: f(PAIR, torch.stack([2 * start()[2], start()[2]])),
    "sa_loss": lambda f: f(denoise, start()[0], PAIR, start()[2].expand(2, 4, 1),
                           torch.reciprocal, torch.ones(2, 4, 1)),
    "taylor_control": lambda f: f(start()[0], *start(), 0.5),
    "taylor_terms": lambda f: torch.cat([t for order in (0, 1, 2) for t in f(
        lambda x, s: s * x.sin(), *start(), torch.reciprocal, torch.reciprocal, order)]),
    "stf_atoms": lambda f: torch.cat([t.flatten() for t in f(
        start()[0], start()[2], start()[1], start()[2][:, 0] / 2, K=2)]),
    "stf_taylor_terms": lambda f: torch.cat(f(
        denoise, *start(), torch.reciprocal, torch.reciprocal,
        lambda x, s: (PAIR, PAIR.new_full((2, 4), 0.5), x))),
    "RunningBeta": lambda f: running_beta(f()),
    "draw_augmentation": lambda f: f(4, 0.5),
    "augment_labels": lambda f: f(WARP),
    "augment": lambda f: f(IMAGE, WARP),
    "augmented_stf_target": lambda f: f(IMAGE, EMB[:, :1, None, None].abs(), IMAGE.flip(1), WARP),
    "ode_slope": lambda f: f(denoise, start()[0], GRID[0], IDENTITY),
    "euler": lambda f: f(denoise, start()[0], GRID, IDENTITY),
    "heun": lambda f: f(denoise, start()[0], GRID, IDENTITY),
    "seeded_noise": lambda f: f([1, 2], (3,))(),
    "edm_stochastic": lambda f: f(denoise, start()[0], GRID, lambda: start()[1], S_churn=1.0),
    "record": lambda f: f(start()[0], PAST, None) or PAST.pop(),
    "checked": lambda f: f(start()[0], [torch.tensor(True)], GRID),
    "guidance": lambda f: f(denoise, lambda x, sigma: 0 * x, 2.0)(start()[0], GRID[0]),
    "dormand_prince": lambda f: torch.cat(f(lambda x, t: t * x, start()[0], GRID[1], GRID[2],
                                            start()[1])),
    "rk45": lambda f: f(lambda x, sigma, label: label * denoise(x, sigma), start()[0], GRID,
                        IDENTITY, labels=(start()[2],))[0],
    "ddim": lambda f: f(denoise, start()[0], GRID, lambda: start()[1], 0.5,
                        lambda x, sigma, D: 0.1 * sigma, 1),
    "ddpm": lambda f: f(denoise, start()[0], GRID, lambda: start()[1], "beta", 2),
    "analytic_covariance": lambda f: f([0.5, 3.0], [0.4, 0.9])(*start()[:1], GRID[1], None),
    "sn_covariance": lambda f: f(denoise)(start()[0], GRID[1], start()[1]),
    "npr_covariance": lambda f: f(denoise)(start()[0], GRID[1], start()[1]),
    "langevin": lambda f: f(*start()[:2], start()[1], start()[2]),
    "snr_step": lambda f: f(*start()[:2], 0.16, 0.9),
    "predictor_corrector": lambda f: f(denoise, start()[0], GRID, IDENTITY, lambda: start()[1]),
    "ema_beta": lambda f: torch.tensor([f(0.1, 5), f(100, 5, 10, 0.5)]),
    "update_ema": ema_of_two,
    "exponent": lambda f: torch.tensor(f(0.1)),
    "mixture": lambda f: torch.from_numpy(f([1, 2], [0.1, 0.05], 2, 0.1)[0]),
    "reconstruct": lambda f: f([1, 2], lambda step: dict(step=step, ema={"0.1": {"w": start()[0]}}),
                               0.1)["w"],
}
CALLS |= {f"{name}_weight": lambda f: f(start()[2])
          for name in ("constant", "p2", "min_snr", "inverse_snr", "debias", "edm")}
CALLS |= {name: schedule for name in ("VP", "VE", "EDM", "IDDPM", "DDPM")}


@pytest.mark.parametrize("file, name", FOUND, ids=lambda v: v)
def test_runs_alone(file, name):
    results = []
    for f in (getattr(importlib.import_module(file), name), pasted(file, name)):
        torch.manual_seed(0)
        results.append(CALLS[name](f))
    assert torch.equal(results[0], results[1]) and results[0].isfinite().all()
