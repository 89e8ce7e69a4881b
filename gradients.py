"""gradients.py: the variance of gradients, by objective (`evaluate.py gradvar`).

A share is what one gradient is of: a sample, or a mini-batch, and the reference it has.  A batch
holds many of them, `copies`; b is a dict of all that is drawn for it.
"""

import math
from functools import partial

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from datasets import BadInput, load_data, load_rows, progress
from losses import (antithetic_loss, dsm_loss, mean_correction, measure_gamma, stf_atoms, stf_loss,
                    stf_target, stf_taylor_terms, taylor_terms)
from networks import MLP, Denoiser
from papers import log_density, show
from runs import load_run, loss_weight, pick_device, run_data
from schedules import EDM

EXACT = 8        # coordinates up to which Taylor controls take the exact trace, above it one probe
TRAINED = {"--data": "ring", "--activation": "silu", "--width": 64, "--depth": 2,
           "--steps": 4000}                                  # the network that is trained here


def own_parameters(denoiser, copies):
    """denoise(x, sigma, labels) with parameters of its own, all equal, for each share of a batch;
    and these, (copies, ...) each: the gradient of a sum then holds one gradient for each share."""
    theta = {name: p.detach().expand(copies, *p.shape).requires_grad_()
             for name, p in denoiser.named_parameters()}
    one = lambda theta, *given: torch.func.functional_call(denoiser, theta, given)

    def own(x, sigma, labels):
        shares = (a.unflatten(0, (copies, -1)) for a in (x, sigma, labels))
        return torch.vmap(one)(theta, *shares).flatten(0, 1)
    return own, list(theta.values())


def share_gradients(values, theta):
    """Of each of m values (B,), the gradients of its mean over a share: (m, copies, p) float64."""
    out = []
    for value in values:
        mean = value.unflatten(0, (len(theta[0]), -1)).mean(1)
        g = torch.autograd.grad(mean.sum(), theta, retain_graph=True, materialize_grads=True)
        out.append(torch.cat([a.flatten(1) for a in g], dim=1).double())
    return torch.stack(out)


def draw_shares(denoiser, pool, labels, n, args, g):
    """Batches, until there are args.num shares: n rows of the pool (N, ...), with labels (N,), are
    a share's reference, and the first args.batch of these its samples."""
    copies = max(1, 2 ** 18 // sum(p.numel() for p in denoiser.parameters()))     # caches hold it
    copies = min(copies, args.num)
    means = torch.stack([pool[labels == k].mean(0) for k in range(labels.max() + 1)])
    for _ in range(math.ceil(args.num / copies)):
        rows = torch.randint(len(pool), (copies, n), generator=g)
        mine = rows[:, :args.batch].flatten()                                     # (B,)
        noise, probe = torch.randn(2, len(mine), *pool.shape[1:], generator=g).to(pool)
        own, theta = own_parameters(denoiser, copies)
        yield dict(theta=theta, D=partial(own, labels=labels[mine]), x0=pool[mine], noise=noise,
                   probe=probe.sign(), uniform=torch.rand(len(mine), generator=g).to(pool),
                   labels=labels[mine], mu=means[labels[mine]], reference=pool[rows],
                   reference_labels=labels[rows])


def by_share(function, b, n, *args, out_dims=0):
    """function(*args, n references, labels, the references' labels) on each share of args."""
    split = lambda a: a.unflatten(0, (len(b["reference"]), -1))
    return torch.vmap(function, out_dims=out_dims)(
        *map(split, args), b["reference"][:, :n], split(b["labels"]), b["reference_labels"][:, :n])


def loss_estimates(D, b, sigma, weight, gamma, sizes):
    """{name: (B,)}, all of one mean: DSM, antithetic pairs, STF with references of these sizes; and
    STF with the first and the mean_correction by gamma, a number, or antithetic pairs."""
    x0, noise, n = b["x0"], b["noise"], sizes[0]
    correct = lambda x0, s, mu, y, *label: mean_correction(x0, s, y, mu, lambda s: gamma, *label)
    shift = by_share(correct, b, n, x0, sigma, b["mu"]).flatten(0, 1)

    def stf(n, noise=noise, shift=0):
        target = lambda x, s: by_share(stf_target, b, n, x, s).flatten(0, 1) - shift
        return stf_loss(D, x0, noise, sigma, weight, target)
    return {"dsm": dsm_loss(D, x0, noise, sigma, weight),
            "antithetic": antithetic_loss(D, x0, noise, sigma, weight),
            **{f"stf {n}": stf(n) for n in sizes},
            "stf, corrected": stf(n, shift=shift), "stf, antithetic": (stf(n) + stf(n, -noise)) / 2}


def control_estimates(D, b, sigma, weight, c_skip, orders, n, K):
    """{name: (B,)}, all of mean 0: Taylor controls, and STF's at K atoms of n references."""
    def atoms(x, s):
        one = lambda x, s, u, y, *label: stf_atoms(x, s, y, u, K, *label)
        y, mass, target = by_share(one, b, n, x, s, b["uniform"], out_dims=(1, 1, 0))
        return y.flatten(1, 2), mass.flatten(1, 2), target.flatten(0, 1)
    given = D, b["x0"], b["noise"], sigma, weight, c_skip
    probe = b["probe"] if b["x0"][0].numel() > EXACT else None
    with sdpa_kernel(SDPBackend.MATH):              # the one attention with second derivatives
        return {f"order {k}": taylor_terms(*given, k, probe)[1] for k in orders} | {
            "atoms": stf_taylor_terms(*given, atoms)[1]}


def covariances(denoiser, pool, labels, sigma, weight, gamma, adam, args, g):
    """The names of m estimates, and {kind: (m, m)} of each two of them: the trace of the covariance
    of their gradients; of these times `adam`, (p,); the covariance of their values.

    Values are less what no parameter moves: the same estimate with F = 0.
    """
    values, square, mean, N = [], {}, {}, 0
    c_skip = lambda s: denoiser.precondition(s)[0]
    for b in draw_shares(denoiser, pool, labels, max(args.n), args, g):
        s = torch.full_like(b["uniform"], sigma).view(-1, *[1] * (pool.ndim - 1))
        losses = loss_estimates(b["D"], b, s, weight, gamma, args.n)
        still = loss_estimates(lambda x, s: c_skip(s) * x, b, s, weight, gamma, args.n)
        controls = control_estimates(b["D"], b, s, weight, c_skip, {0, *args.orders}, args.n[0],
                                     args.atoms)
        G = share_gradients([*losses.values(), *controls.values()], b["theta"])
        for kind in ("gradient", "Adam"):
            square[kind] = square.get(kind, 0) + G.flatten(1) @ G.flatten(1).T
            mean[kind] = mean.get(kind, 0) + G.sum(1)
            G *= adam
        part = torch.stack([*(losses[name] - still[name] for name in losses), *controls.values()])
        values.append(part.detach().double().unflatten(1, (G.shape[1], -1)).mean(2))
        N += G.shape[1]
    cov = {kind: square[kind] / N - mean[kind] @ mean[kind].T / N ** 2 for kind in square}
    return [*losses, *controls], cov | {"objective": torch.cov(torch.cat(values, 1), correction=0)}


def adam_scale(denoiser, pool, labels, weight, args, g):
    """What Adam's step multiplies a gradient by, 1/sqrt(E g^2), for the gradients g of DSM at the
    noise levels that EDM trains on.  (p,)"""
    square = []
    for b in draw_shares(denoiser, pool, labels, args.batch, args, g):
        u = torch.rand(len(b["x0"]), generator=g, dtype=torch.float64)
        s = EDM().training_sigma(u).to(pool).view(-1, *[1] * (pool.ndim - 1))
        loss = dsm_loss(b["D"], b["x0"], b["noise"], s, weight)
        square.append(share_gradients([loss], b["theta"])[0].square().mean(0))
    return 1 / (torch.stack(square).mean(0).sqrt() + 1e-8)


def reduction(names, cov, loss, control=None):
    """Var(loss - beta control)/Var(dsm), and the beta that makes it least."""
    i, j, dsm = names.index(loss), names.index(control or loss), names.index("dsm")
    beta = cov[i, j] / cov[j, j] if control else cov.new_zeros(())
    return ((cov[i, i] - beta * cov[i, j]) / cov[dsm, dsm]).item(), beta.item()


def trained_mlp(args, pool, g):
    """The MLP of --width, --depth and --activation behind EDM's row, after --steps on STF's target:
    on DSM's, its own error would be larger than the noise that is measured at small sigma."""
    torch.manual_seed(args.seed)
    activation = getattr(torch.nn.functional, args.activation)
    model = MLP(pool.shape[1], args.width, args.depth, activation=activation)
    model.out.reset_parameters()                    # zeros: no gradient behind them at --steps 0
    if args.activation in ("tanh", "softplus"):     # from torch's small start they stay at F = 0
        for layer in model.hidden:
            torch.nn.init.kaiming_normal_(layer.weight)
    net = Denoiser(model, EDM().precondition).to(pool.device)
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(args.steps, 1))
    for _ in range(args.steps):
        reference = pool[torch.randint(len(pool), (1024,), generator=g)]
        x0, sigma = reference[:256], 0.002 * 1e4 ** torch.rand(256, 1, generator=g).to(pool)
        noise = torch.randn(x0.shape, generator=g).to(pool)
        target = partial(stf_target, reference=reference)
        loss = stf_loss(net, x0, noise, sigma, EDM().weight, target).mean()
        optimizer.zero_grad(), loss.backward(), optimizer.step(), decay.step()
    return net


def measured(args, g):
    """A denoiser, rows it was trained on, their labels, and lambda: the RUN's, or trained_mlp's."""
    device = pick_device(args.device)
    if args.run:
        net, options, _ = load_run(args.run, device)
        data, weight = run_data(options), loss_weight(options)
    else:
        data, weight = load_data(args.data, args.data_dir), EDM().weight
        if data.x.ndim > 2:
            raise BadInput("images need a network that train.py made; name a RUN, or points")
    rows = torch.randperm(len(data.x), generator=g)[:20_000]
    pool, labels = load_rows(torch.from_numpy(data.x), rows, None, device), torch.zeros_like(rows)
    if not args.run:
        net = trained_mlp(args, pool, g)
    elif options["cond"]:
        labels = torch.from_numpy(data.labels)[rows]
    return net.requires_grad_(False), pool, labels.to(device), weight


def methods(args, d):
    """{name: (loss, its control or None, cost in evaluations of D and products with its J)}."""
    stf, trace = f"stf {args.n[0]}", d if d <= EXACT else 1
    return {"dsm": ("dsm", None, "1"),
            **{f"order {k}": ("dsm", f"order {k}", f"2 + {trace + 2 * k - 1} J" if k else "2")
               for k in args.orders},
            "antithetic": ("antithetic", None, "2"),
            **{f"stf {n}": (f"stf {n}", None, "1") for n in sorted(args.n)},
            f"{stf}, corrected": ("stf, corrected", None, "1"),
            f"{stf}, order 0": (stf, "order 0", "2"),
            f"{stf}, {args.atoms} atoms": (stf, "atoms", f"{args.atoms + 1}"),
            f"{stf}, antithetic": ("stf, antithetic", None, "2")}


def print_totals(table, rows):
    """Each method's variance over the levels that EDM trains on, DSM's being 1, and its cost."""
    share = log_density(EDM(), torch.tensor([row["sigma"] for row in rows]))
    print("variance over the levels that EDM trains on; cost in evaluations of D and products\n"
          f"with its Jacobian J\n{'':22}{'gradient':>12}{'Adam':>12}{'objective':>12}{'cost':>12}")
    for name, (_, _, cost) in table.items():
        print(f"{name:22}", end="")
        for kind in ("gradient", "Adam", "objective"):
            dsm = share * [row[f"{kind} variance:dsm"] for row in rows]           # (L,)
            print(f"{dsm @ [row[f'{kind}:{name}'] for row in rows] / dsm.sum():12.3f}", end="")
        print(f"{cost:>12}")
    print()


def gradvar(args):
    """Variance of the gradient, of Adam's step and of the objective over plain DSM's, by noise
    level, and beta, what a control is best multiplied by (TCV figs. 2, 4, 5; of a RUN: 3).

    Of single samples, each with a reference of its own; with --batch B, of mini-batches that share
    one.  beta is a regression coefficient, of the very samples it serves: one number from --num of
    them hardly overfits.  The first of --n is STF's reference where STF is combined.
    """
    if min(args.n) < args.batch or args.n[0] < args.atoms:
        raise BadInput("a reference has to hold the batch and the atoms; give larger --n")
    for name, default in TRAINED.items():
        if args.run and getattr(args, name[2:]) != default:
            raise BadInput(f"{name} is for the network trained here; leave it out for a RUN")
    g = torch.Generator().manual_seed(args.seed)
    net, pool, labels, weight = measured(args, g)
    args.num = args.num or (2000 if pool.ndim == 2 else 32)
    table, levels = methods(args, pool[0].numel()), torch.tensor(sorted(args.levels))
    noise = torch.randn(pool[:128].shape, generator=g).to(pool)
    gammas = measure_gamma(pool[:128], noise, levels, pool[:1024], labels[:128], labels[:1024])
    adam, rows = adam_scale(net, pool, labels, weight, args, g), []
    for sigma, gamma in zip(levels.tolist(), gammas.tolist()):
        names, covs = covariances(net, pool, labels, sigma, weight, gamma, adam, args, g)
        row = {"sigma": sigma}
        for kind, cov in covs.items():
            row[f"{kind} variance:dsm"] = cov[0, 0].item()
            for name, (loss, control, _) in table.items():
                row[f"{kind}:{name}"], beta = reduction(names, cov, loss, control)
                row |= {f"{kind} beta:{name}": beta} if control else {}
        rows.append(row)
        progress("noise levels", len(rows), len(levels))
    print_totals(table, rows)
    panel = lambda kind, names, title: dict(y=[f"{kind}:{name}" for name in names], title=title,
                                            ylabel="variance over plain DSM's")
    names, k = list(table), 2 + len(args.orders)
    taylor, sizes, joint = names[1:k], names[k:-3], [f"stf {args.n[0]}", *names[-3:]]
    show(args, list(row), [list(row.values()) for row in rows], [
        panel("gradient", taylor, "gradient: controls"),
        panel("gradient", sizes, "gradient: STF by reference size"),
        panel("gradient", joint, "gradient: STF with controls"),
        dict(title="best beta", y=[column for column in row if column.startswith("gradient beta")],
             ylabel="best beta of the gradient", yscale="linear"),
        panel("Adam", taylor, "Adam's step: controls"),
        panel("objective", taylor, "objective: controls")])
