"""papers/taylor.py: Taylor control variates (TCV): how much variance do they take off a gradient?

    python -m papers.taylor gradvar                     from the repository's root

Source: Jeha et al. 2024, "Variance reduction of diffusion model's gradients with Taylor
approximation-based control variate" (TCV).  losses.taylor_terms derives the control anew.
"""

import itertools
import math
import sys
from functools import partial

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

import evaluate
from losses import RunningBeta, antithetic_loss, dsm_loss, stf_loss, stf_target, taylor_terms
from networks import MLP, Denoiser
from papers import plot
from schedules import EDM

ACTIVATIONS = dict(silu=torch.nn.functional.silu, tanh=torch.tanh, relu=torch.relu)


# ---- Gradients of shares -------------------------------------------------------------------------

def draw_shares(net, pool, num, m, n, g):
    """Batches of `copies` shares, num or more in all.  One gradient comes from one share: m
    samples and n >= m references, the first of which are the samples.

    Yields x0, noise, probe (m copies, ...), all first samples first, reference (n, copies, ...).
    The probe has random signs; it is None in up to 8 coordinates: controls take the exact trace.
    """
    copies = max(1, 2 ** 18 // sum(p.numel() for p in net.parameters()))          # caches hold it
    copies = min(copies, num)
    for _ in range(0, num, copies):
        reference = pool[torch.randint(len(pool), (n, copies), generator=g)]
        x0 = reference[:m].flatten(0, 1)
        noise, probe = torch.randn(2, *x0.shape, generator=g).to(x0)
        yield x0, noise, probe.sign() if x0[0].numel() > 8 else None, reference


def gradients(net, shares, weight, sigma, orders, sizes, label=None):
    """Each share's gradients, {name: (copies, p) float64}, of losses, all of one mean, and then of
    controls, of mean 0.  label: the class of the samples, for a network that is told it.

    A share has parameters theta of its own, equal to the network's: the gradient of a sum over
    shares then holds one for each.
    """
    x0, noise, probe, reference = shares
    copies = reference.shape[1]
    theta = {name: p.detach().expand(copies, *p.shape).requires_grad_()
             for name, p in net.named_parameters()}

    def each(f, own, x, sigma):                  # f(own, x, sigma) of each share, from (copies, ..)
        x, sigma = x.unflatten(0, (-1, copies)), sigma.unflatten(0, (-1, copies))
        return torch.vmap(f, (0, 1, 1), 1)(own, x, sigma).flatten(0, 1)

    def denoise(theta, x, sigma):
        labels = None if label is None else torch.full((len(x),), label)
        return torch.func.functional_call(net, theta, (x, sigma, labels))

    def target(reference, x, sigma):
        return stf_target(x, sigma, reference)

    s = x0.new_full((len(x0), *[1] * (x0.ndim - 1)), sigma)
    given = partial(each, denoise, theta), x0, noise, s, weight
    with sdpa_kernel(SDPBackend.MATH):       # attention that has second derivatives, and for vmap
        values = dict(DSM=dsm_loss(*given), antithetic=antithetic_loss(*given))
        for n in sizes:
            own = partial(each, target, reference[:n].transpose(0, 1))
            values[f"STF {n}"] = stf_loss(*given, own)
        for k in orders:
            values[f"order {k}"] = taylor_terms(*given, net.precondition, k, probe)[1]
    for name, value in values.items():
        mean = value.sum() / (len(x0) // copies)
        g = torch.autograd.grad(mean, [*theta.values()], retain_graph=True, materialize_grads=True)
        values[name] = torch.cat([part.flatten(1) for part in g], 1).double()
    return values


def variances(net, pool, weight, sigma, num, g, m=1, orders=(), sizes=(), scale=1.0, label=None):
    """{name: V}, V the trace of the covariance of the gradient, and {control: beta}.

        V = Var(loss)   or   Var(DSM - beta control),
        beta = Cov(DSM, control)/Var(control), which makes that least

    From at least num shares of m samples; `scale` (p,) multiplies each gradient first.
    """
    square, total, count = 0, 0, 0
    for shares in draw_shares(net, pool, num, m, max([m, *sizes]), g):
        found = gradients(net, shares, weight, sigma, orders, sizes, label)
        G = scale * torch.stack([*found.values()])
        square, total = square + G.flatten(1) @ G.flatten(1).T, total + G.sum(1)
        count += G.shape[1]
    cov = square / count - total @ total.T / count ** 2                           # (k, k)
    names, V, losses = [*found], cov.diag(), len(found) - len(orders)
    beta = cov[0, losses:] / V[losses:]
    V = torch.cat([V[:losses], V[0] - beta * cov[0, losses:]])
    return dict(zip(names, V.tolist())), dict(zip(names[losses:], beta.tolist()))


def average_left(net, pool, num, g, scale=1.0):
    """{name: V over DSM's}, V summed over quantiles of EDM's training noise, each with the best
    beta."""
    total = {}
    u = (torch.arange(6, dtype=torch.float64) + 0.5) / 6
    for sigma in EDM().training_sigma(u).tolist():
        found, _ = variances(net, pool, EDM().weight, sigma, num, g, orders=(0, 1), scale=scale)
        for name, V in found.items():
            total[name] = total.get(name, 0) + V
    dsm = total.pop("DSM")
    return {name: V / dsm for name, V in total.items()}


# ---- The toy: a ring of Gaussians, and MLPs ------------------------------------------------------

def ring_mean(x, sigma, s=0.07):
    """E[x0 | x] of the built-in set "ring": 8 Gaussians of deviation s on a circle."""
    angle, radius = torch.arange(8).to(x) * math.pi / 4, (2 * (0.5 ** 2 - s ** 2)) ** 0.5
    return plot.mixture_mean(x, sigma, radius * torch.stack([angle.cos(), angle.sin()], 1), s)


def points():
    """The built-in ring, (20_000, 2)."""
    return torch.from_numpy(evaluate.load_data("ring").x)


def mlp(seed, width=64, depth=2, activation="silu"):
    """A fresh MLP of points in the plane behind EDM's column: D = c_skip x.

    torch's own start is so small that it would stay there for thousands of steps.  The two inputs
    for x get larger weights, for they stand beside `width` inputs for the noise level.
    """
    torch.manual_seed(seed)
    model = MLP(2, width, depth, activation=ACTIVATIONS[activation])
    for layer in model.hidden:
        torch.nn.init.kaiming_normal_(layer.weight)
    with torch.no_grad():
        model.hidden[0].weight[:, :2] *= 5
    return Denoiser(model, EDM().precondition)


def fitted(net, pool, steps, g):
    """The network after so many steps on STF's target: after DSM's, its own error would hide the
    noise that is measured at small sigma."""
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3, fused=True)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(steps, 1))
    for _ in range(steps):
        reference = pool[torch.randint(len(pool), (512,), generator=g)]
        x0, sigma = reference[:128], 0.002 * 1e4 ** torch.rand(128, 1, generator=g)
        target = partial(stf_target, reference=reference)
        loss = stf_loss(net, x0, torch.randn(x0.shape, generator=g), sigma, EDM().weight, target)
        optimizer.zero_grad()
        loss.mean().backward()
        optimizer.step()
        decay.step()
    return net


# ---- Figures 2 and 3 -----------------------------------------------------------------------------

def gradvar(args):
    """The variance of the gradient by estimator and noise level, over plain DSM's (TCV figs. 2, 3).

    The network is an MLP that is trained here, or --run's (if it is told classes, in the first
    class).  Each sample has STF references of its own; "shared": mini-batches of --batch share
    them, as in STF's Algorithm 1.  --num 0: 1500 points or 24 images.  About 1 minute; a U-Net 6.
    """
    g = torch.Generator().manual_seed(args.seed)
    label, weight, title = None, EDM().weight, "ring, an MLP"
    if args.run:
        net, options = evaluate.load_run(args.run, "cpu")
        data, weight = evaluate.run_data(options), evaluate.build_weight(options)
        pool, labels = evaluate.take(data, torch.randperm(len(data.x), generator=g)[:20_000])
        if options.classes:
            label, pool = 0, pool[labels == 0]
        args.command, title = "gradvar-run", f"{data.name}, network of {args.run}"
    else:
        pool = points()
        net = fitted(mlp(args.seed), pool, args.training, g)
    num = args.num or (1500 if pool.ndim == 2 else 24)
    orders, sizes = [f"order {k}" for k in args.orders], [f"STF {n}" for n in args.n]
    rows = []
    for sigma in plot.progress("noise levels", sorted(args.levels)):
        given = net, pool, weight, sigma
        V, beta = variances(*given, num, g, 1, args.orders, args.n, label=label)
        batch, _ = variances(*given, max(num // 4, 2), g, args.batch, (), args.n, label=label)
        row = dict(sigma=sigma)
        row |= {name: V[name] / V["DSM"] for name in ("antithetic", *orders, *sizes)}
        row |= {f"{name}, shared": batch[name] / batch["DSM"] for name in sizes}
        row |= {f"beta, {name}": beta[name] for name in orders}
        rows.append(row)
    own = {name: f"{name}, own references" for name in sizes}
    shared = {f"{name}, shared": f"{name}, shared by {args.batch}" for name in sizes}
    plot.show(args, f"{title}: variance of the gradient by estimator; plain DSM is 1", rows,
              dict(y=["antithetic", *orders], title="by control"),
              dict(y=own | shared, title="by reference"),
              dict(y={f"beta, {name}": name for name in orders}, title="regression coefficient",
                   ylabel="best factor beta of the control", yscale="linear"),
              ylabel="variance over plain DSM's")


# ---- Figure 1 ------------------------------------------------------------------------------------

ORDERS = {"order 0": 0, "order 1": 1}
METHODS = ["DSM", "DSM, 2 batches", "antithetic", *ORDERS, "exact target"]


def loss_by(method, net, pool, sigma, g):
    """The mean loss of a batch of 64 at one noise level, by one of METHODS.

    The exact target is E[x0 | x].  The control's factor beta is RunningBeta's first guess.
    """
    rows = torch.randint(len(pool), (256,), generator=g)
    x0 = pool[rows[:128 if method == "DSM, 2 batches" else 64]]
    s, noise = torch.full((len(x0), 1), sigma), torch.randn(x0.shape, generator=g)
    given = net, x0, noise, s, EDM().weight
    if method == "antithetic":
        return antithetic_loss(*given).mean()
    if method == "exact target":
        return stf_loss(*given, ring_mean).mean()
    if method in ORDERS:
        loss, control = taylor_terms(*given, net.precondition, ORDERS[method])
        return (loss - RunningBeta()(s)[:, 0] * control).mean()
    return dsm_loss(*given).mean()


def errors_of(method, pool, level, marks, seed):
    """The error that `converge` shows, of averaged weights, after each of marks steps of Adam."""
    net, average, g = mlp(seed), mlp(seed), torch.Generator().manual_seed(seed)
    s, fixed = torch.full((4096, 1), level), torch.Generator().manual_seed(1)
    x = pool[:4096] + s * torch.randn(4096, 2, generator=fixed)
    mean = ring_mean(x, s)
    fresh = (EDM().precondition(s)[0] * x - mean).square().sum()
    optimizer, errors = torch.optim.Adam(net.parameters(), lr=1e-3, fused=True), []
    for step in range(1, marks[-1] + 1):
        optimizer.zero_grad()
        loss_by(method, net, pool, level, g).backward()
        optimizer.step()
        with torch.no_grad():
            for slow, p in zip(average.parameters(), net.parameters()):
                slow.lerp_(p, 1 / 500)
            if step in marks:
                errors.append(((average(x, s) - mean).square().sum() / fresh).item())
    return errors


def converge(args):
    """Training at one noise level with and without the control variate (TCV fig. 1).

        E|D - E[x0 | x]|^2 over that of a fresh network, whose D is c_skip x

    An MLP on a ring of 8 Gaussians.  Twice the batch, antithetic pairs and a control of order 0
    cost two evaluations of the network for each sample; order 1 takes about five times DSM's time.
    About 2 minutes.
    """
    pool, marks = points(), sorted({max(1, args.training * k // 20) for k in range(1, 21)})
    seeds, rows = range(args.seed, args.seed + args.seeds), []
    for level in plot.progress("noise levels", args.levels):
        table = [dict(sigma=level, step=step) for step in marks]
        for method in METHODS:
            errors = [errors_of(method, pool, level, marks, seed) for seed in seeds]
            for row, of_seeds in zip(table, zip(*errors)):
                row[method], row[f"sd {method}"] = plot.mean_and_sd(of_seeds)
        rows += table
    panels = [dict(where=("sigma", level), title=f"sigma = {level:g}") for level in args.levels]
    plot.show(args, "ring: training at one noise level with and without a control; mean and sd of "
              f"{args.seeds} runs", rows, *panels, x="step", y=METHODS,
              ylabel="error over a fresh network's", yscale="linear", ylim=(0, 1.1))


# ---- Figures 4 and 5 -----------------------------------------------------------------------------

def optimizers(args):
    """Variance that a control leaves while Adam and while SGD train (TCV fig. 4).

    An MLP on a ring of 8 Gaussians learns by DSM.  "Adam's step": the variance of the gradient over
    the root of Adam's own average of its square.  About 1 minute.
    """
    pool, marks = points(), {max(1, round(args.training ** (k / 9))) for k in range(10)}
    table = {step: dict(step=step) for step in sorted(marks)}
    kinds = dict(Adam=partial(torch.optim.Adam, lr=3e-3),
                 SGD=partial(torch.optim.SGD, lr=0.1, momentum=0.9))
    for name, kind in kinds.items():
        net, g = mlp(args.seed), torch.Generator().manual_seed(args.seed)
        optimizer = kind(net.parameters())
        for step in plot.progress(f"steps by {name}", range(1, args.training + 1)):
            x0 = pool[torch.randint(len(pool), (256,), generator=g)]
            sigma = EDM().training_sigma(torch.rand(256, 1, generator=g))
            loss = dsm_loss(net, x0, torch.randn(x0.shape, generator=g), sigma, EDM().weight)
            optimizer.zero_grad()
            loss.mean().backward()
            optimizer.step()
            if step not in marks:
                continue
            scales = {name: 1.0}
            if name == "Adam":
                square = [optimizer.state[p]["exp_avg_sq"].flatten() for p in net.parameters()]
                scales["Adam's step"] = 1 / (torch.cat(square).double().sqrt() + 1e-8)
            for of, scale in scales.items():
                same = torch.Generator().manual_seed(args.seed)
                found = average_left(net, pool, args.num, same, scale)
                table[step] |= {f"{of} {control}": left for control, left in found.items()}
    titles = {"Adam": "gradient, while Adam trains", "Adam's step": "Adam's step",
              "SGD": "gradient, while SGD trains"}
    panels = [dict(y={f"{of} {control}": control for control in found}, title=title)
              for of, title in titles.items()]
    plot.show(args, "ring, an MLP: variance that is left while it trains; plain DSM is 1",
              list(table.values()), *panels, ylabel="variance over plain DSM's", xscale="log",
              yscale="linear", ylim=(0, 1.1))


def grid(args):
    """Variance that a control of order 0 and 1 leaves, by depth, width, activation (TCV fig. 5).

    MLPs on a ring of 8 Gaussians, each trained on STF's target.  About 3 minutes.
    """
    networks = list(itertools.product(ACTIVATIONS, args.depth, args.width))
    pool, rows = points(), []
    for activation, depth, width in plot.progress("networks", networks):
        g = torch.Generator().manual_seed(args.seed)
        net = fitted(mlp(args.seed, width, depth, activation), pool, args.training, g)
        found = average_left(net, pool, args.num, g)
        row = dict(activation=activation, depth=depth, width=width)
        row |= dict(parameters=sum(p.numel() for p in net.parameters()))
        rows.append(row | {name: found[name] for name in ORDERS})
    panels = [dict(where=("activation", name), title=name) for name in ACTIVATIONS]
    plot.show(args, "ring, MLPs of several sizes: variance that a control leaves; plain DSM is 1",
              rows, *panels, x="parameters", y=list(ORDERS), by="depth",
              xlabel="number of parameters", ylabel="variance over plain DSM's", yscale="linear",
              ylim=(0, 1), marker="o")


COMMANDS = {
    "gradvar": (gradvar, dict(run=None, num=0, batch=16, n=[16, 256, 1024], orders=[0, 1, 2],
                              training=3000, levels=[0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0,
                                                     10.0]), ()),
    "converge": (converge, dict(levels=[0.01, 0.03, 0.1], training=2000, seeds=2), ()),
    "optimizers": (optimizers, dict(training=3000, num=300), ()),
    "grid": (grid, dict(width=[16, 64, 256], depth=[1, 2, 3], training=700, num=200), ())}

if __name__ == "__main__":
    sys.exit(plot.main("taylor", COMMANDS))
