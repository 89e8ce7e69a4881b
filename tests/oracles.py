"""oracles.py: what the tests share: seeded noise, comparisons, Gaussian data, standard errors."""

import csv
import json
from pathlib import Path
from types import SimpleNamespace

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from networks import Denoiser, UNet
from schedules import EDM


def generator(seed):
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=generator(seed), dtype=dtype)


def tensor(*values):
    return torch.tensor(values, dtype=torch.float64)


def close(got, want, rtol=1e-9, atol=1e-12):
    """Equal within the tolerances; `want` is a tensor like `got`, or numbers."""
    if not torch.is_tensor(want):
        want = torch.tensor(want, dtype=got.dtype).expand_as(got)
    torch.testing.assert_close(got, want, rtol=rtol, atol=atol)


def shaped(values, x):
    """values (B,) or (K, B) -> (..., 1, ..., 1), which broadcasts with x (B, ...)."""
    values = torch.as_tensor(values).to(x)
    return values.view(*values.shape, *[1] * (x.ndim - 1))


def small_unet(**options):
    """8x8, attention at 4x4; every parameter random, so that no branch is off."""
    torch.manual_seed(0)
    net = UNet(8, 1, width=8, mult=(1, 2), blocks=1, attend=(4,), **options)
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return Denoiser(net, EDM().precondition)


class Largest(TorchDispatchMode):
    """Records the number of elements of the largest tensor that any operation gives."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.numel())
        return out


# ---- Minimisers ----------------------------------------------------------------------------------
# A denoiser minimises a loss if the mean gradient is zero in every direction it could move in.

def gradients(loss, denoise, x0, noise, sigma, *rest):
    """Each sample's gradient of loss(denoise, x0, noise, sigma, *rest) in three directions: (B, 3).

    denoise moves by theta_1 + theta_2 x + theta_3 sin(3 x), and each sample has its own theta.
    """
    theta = torch.zeros(len(x0), 3, dtype=x0.dtype, requires_grad=True)

    def moved(x, s):
        a, b, c = theta.repeat(len(x) // len(theta), 1).split(1, dim=1)
        return denoise(x, s) + a + b * x + c * (3 * x).sin()

    loss = loss(moved, x0, noise, sigma, *rest)
    assert loss.shape == (len(x0),)
    return torch.autograd.grad(loss.sum(), theta)[0]


# ---- Gaussian data -------------------------------------------------------------------------------

# N(MU, C), C = Q diag(VAR) Q': a full matrix shows an error that mixes up the coordinates, or
# treats them one by one.

MU, VAR = tensor(0.3, -0.5), tensor(0.25, 1.5)
Q = tensor([0.8, -0.6], [0.6, 0.8])
C = Q * VAR @ Q.T


def gaussian_denoiser(C):
    """The denoiser E[x0 | x] = mu + C (C + sigma^2 I)^-1 (x - mu) of N(mu, C), a Wiener filter."""
    variance, Q = torch.linalg.eigh(C)

    def denoise(x, sigma):
        return MU + (x - MU) @ Q * (variance / (variance + sigma ** 2)) @ Q.T
    return denoise


gaussian_denoise = gaussian_denoiser(C)


# ---- Commands of papers/ -------------------------------------------------------------------------

def called(paper, name, out, options, **arguments):
    """The rows of the CSV that a command writes to the folder `out`; its defaults but for these."""
    function, defaults, _ = paper.COMMANDS[name]
    title = paper.__name__.removeprefix("papers.")
    given = dict(paper=title, command=name, seed=0, out=str(out), options=options)
    function(SimpleNamespace(**defaults | given | arguments))
    return list(csv.DictReader((out / f"{title}-{name}.csv").read_text().splitlines()))


def runs():
    """The options of all runs that commands have trained."""
    return [json.loads(path.read_text()) for path in Path("plots/runs").glob("*/options.json")]
