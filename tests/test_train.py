"""train.py: the batch, the objective, rates and averages, the papers' runs, options, what a run
leaves.  That a run goes on where it was: test_survival.py.  Several ranks: test_ranks.py."""

import dataclasses
import importlib.util
import json
import math
import timeit
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch._dynamo.utils import counters

import evaluate
import train
from evaluate import BadInput
from losses import RunningBeta
from networks import UNETS, Conv, target_coefficients
from schedules import DDPM, EDM, SCHEDULES, VP
from train import Options

TINY = dict(data="images.npz", width=8, mult=(1, 1), blocks=1, batch=4, ref_batch=8, holdout=0,
            sample_steps=1, eval_every=0)
POINTS = dict(data="two-gaussians", width=16, batch=16, ref_batch=32, sample_steps=2, eval_every=0)
OBJECTIVES = [dict(loss="dsm"), dict(loss="stf"), dict(loss="antithetic"), dict(loss="sa"),
              dict(loss="sa", K=4, level_noise="path", tau="window", lam=0.7),
              *(dict(loss="taylor", order=order) for order in (0, 1, 2))]

pytestmark = pytest.mark.usefixtures("folder")


def words(options):
    """A command line that says these options."""
    line = []
    for name, value in options.items():
        shown = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
        line += [f"--{name.replace('_', '-')}"] + ([] if value is True else [shown])
    return line


def refused(argv, capsys):
    """The one sentence with which train.py refuses a command line."""
    capsys.readouterr()
    assert train.main(argv) == 2
    error = capsys.readouterr().err
    assert error.startswith("train.py: ") and error.count("\n") == 1 and len(error) > 30, error
    return error


def trained(out="run", kind=POINTS, **more):
    """A run without report; its folder."""
    return train.run(Options(**kind | more | dict(out=out)), brief=True)


def log(folder, key="step"):
    lines = [json.loads(line) for line in Path(folder, "log.jsonl").read_text().splitlines()]
    return [line for line in lines if key in line]


# ---- The batch -----------------------------------------------------------------------------------

PIXELS = torch.randint(0, 256, (40, 3, 8, 8), dtype=torch.uint8,
                       generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(40) % 2
PIXELS[1::2] //= 2                                                     # class 1 is darker
BATCH = dict(batch=8, ref_batch=16, holdout=0, cond=True, device="cpu")


def draw(step=0, schedule=EDM(), **given):
    return train.draw_batch(PIXELS, LABELS, Options(**BATCH | given), schedule, step)


def tensors(batch):
    return {name: value for name, value in vars(batch).items() if value is not None}


def test_batch_is_a_pure_function_of_seed_and_step():
    given = dict(xflip=True, augment=0.5)
    first, again = tensors(draw(3, **given)), tensors(draw(3, **given))
    assert set(first) == {"x0", "noise", "sigma", "labels", "a", "reference", "reference_labels"}
    assert all(torch.equal(first[name], again[name]) for name in first)
    half = (train.CHOSEN["seed"].metadata["high"] + 1) // 2           # no bit of a seed is lost
    for step, seed in ((2, 0), (4, 0), (3, 1), (3, half)):
        other = tensors(draw(step, seed=seed, **given))
        assert not any(torch.equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize("more", [dict(ref_batch=40), dict(xflip=True)], ids=str)
def test_sources_are_among_the_references_and_rows_do_not_repeat(more):
    """ref_batch 40 is the whole set; references stay uint8; --xflip mirrors about half of them."""
    batch = draw(**more)
    reference = evaluate.to_float(batch.reference)
    same, k = (batch.x0[:, None] == reference).flatten(2).all(2).max(1)
    assert same.all() and torch.equal(batch.reference_labels[k], batch.labels)
    rows = torch.cat([PIXELS, PIXELS.flip(-1)])
    same, k = (batch.reference[:, None] == rows).flatten(2).all(2).max(1)
    assert same.all() and len((k % 40).unique()) == len(k) == more.get("ref_batch", 16)
    assert 3 <= (k >= 40).sum() <= 13 if "xflip" in more else (k < 40).all()
    assert batch.reference.dtype == torch.uint8
    assert batch.x0.dtype == batch.sigma.dtype == torch.float32 and batch.x0.abs().max() <= 1


def test_a_large_set_costs_no_more_than_the_rows_of_a_batch(monkeypatch):
    """A batch costs O(its rows), and these are still different ones, anew in each step.

    The sources do not depend on the number of references.
    """
    pixels = torch.arange(100_001.0)[:, None]
    monkeypatch.setattr(torch, "randperm", None)
    options = Options(**BATCH | dict(cond=False, ref_batch=20_000))
    first, again, other = (train.draw_batch(pixels, None, options, EDM(), step).reference[:, 0]
                           for step in (3, 3, 4))
    assert torch.equal(first, again) and len(first.unique()) == 20_000
    assert abs(first.mean() / 50_000 - 1) < 0.1 and len(torch.cat([first, other]).unique()) > 30_000
    plain = train.draw_batch(pixels, None, dataclasses.replace(options, loss="dsm"), EDM(), 3)
    assert torch.equal(plain.x0[:, 0], first[:len(plain.x0)])
    most = dataclasses.replace(options, ref_batch=90_000)
    most = train.draw_batch(pixels, None, most, EDM(), 3).reference[:, 0]
    assert torch.equal(most[:20_000], first) and len(most.unique()) == 90_000


def test_a_batch_larger_than_the_set_still_has_its_sources():
    given = TINY | dict(batch=64, ref_batch=64)
    options = train.resolve(Options(**given), evaluate.load_data("images.npz"))
    batch = draw(batch=64, ref_batch=options.ref_batch)
    assert torch.equal(evaluate.to_float(batch.reference), batch.x0) and len(batch.x0) == 64


def test_references_are_all_rows_where_there_are_few_and_never_fewer_than_the_batch():
    assert len(draw(ref_batch=1000).reference.unique(dim=0)) == 40
    assert len(draw(batch=16, ref_batch=1).reference) == 16
    few = Options(**TINY | dict(loss="dsm", ref_batch=1))                  # dsm has none
    assert train.resolve(few, evaluate.load_data("images.npz")).ref_batch == 1


def test_a_file_of_the_name_of_a_built_in_set_is_trained_on_as_any_other():
    np.savez("digits.npz", images=np.load("images.npz")["images"])
    data = evaluate.load_data("digits.npz")
    options = train.resolve(Options(data="digits.npz"), data)
    assert data.name == "digits" and not options.cond and options.holdout == 100


def test_rows_held_out_are_not_trained_on():
    """Every 4th row of 40; sets that are drawn here have new rows instead."""
    seen = torch.cat([draw(step, ref_batch=30, holdout=4).reference for step in range(2)])
    assert {tuple(row) for row in seen.flatten(1).tolist()} == {
        tuple(row) for k, row in enumerate(PIXELS.flatten(1).tolist()) if k % 4 != 3}
    data = evaluate.load_data("images.npz")
    held, _ = evaluate.held_out(data, Options(data="images.npz", holdout=4, device="cpu"))
    assert torch.equal(held, evaluate.to_float(torch.from_numpy(data.x[3::4])))
    for name in ("two-gaussians", "digits"):
        data = evaluate.load_data(name)
        held, _ = evaluate.held_out(data, Options(data=name, holdout=0, device="cpu"))
        rows = {row.tobytes() for row in evaluate.to_uint8(held)}
        assert len(rows) == len(held) and not rows & {row.tobytes() for row in data.x}


@pytest.mark.parametrize("loss", ["dsm", "taylor", "sa"])
def test_every_loss_sees_the_same_images_noise_and_sigma(loss):
    """Whatever --ref-batch.  SA has K levels of a ladder: the nearest above sigma is the first."""
    stf, other = draw(5, xflip=True, ref_batch=30), draw(5, xflip=True, loss=loss)
    assert torch.equal(stf.x0, other.x0) and torch.equal(stf.labels, other.labels)
    if loss == "sa":
        level, t = EDM().time_steps(1000)[:-1].flip(0), other.sigma[0].flatten().double()
        above = [level[level >= s - 1e-6].min() for s in stf.sigma.flatten().double()]
        torch.testing.assert_close(t, torch.stack(above), rtol=1e-6, atol=0)
    else:
        assert torch.equal(stf.noise, other.noise) and torch.equal(stf.sigma, other.sigma)


def test_sa_batch_is_k_consecutive_levels_of_the_ladder_and_masked_below():
    ladder, given = DDPM(), dict(loss="sa", K=3)
    batch = draw(0, ladder, **given)
    assert batch.noise.shape == (3, 8, 3, 8, 8)
    assert batch.sigma.shape == batch.tau.shape == (3, 8, 1, 1, 1)
    level = (ladder.levels - batch.sigma.double().view(3, 8, 1)).abs().argmin(-1)
    assert (level[:-1] - level[1:] == 1).all() and (batch.tau == 1).all()
    path = draw(0, ladder, **given, level_noise="path")
    assert (batch.noise[0] * batch.noise[1]).mean().abs() < 0.1
    assert (path.noise[0] * path.noise[1]).mean() > 0.9
    ladder.training_sigma = lambda u: ladder.levels[:1].repeat(len(u))                  # t = 1
    batch = draw(0, ladder, **given)
    assert batch.tau.view(3, 8)[:, 0].tolist() == [1, 0, 0]
    assert (batch.sigma == batch.sigma[0]).all()


def test_the_papers_windows_have_every_level_equally_often():
    """t - K + 1 ... t for t of 0 ... T + K - 1, without those outside 1 ... T (SA sec. 3.2)."""
    ladder = DDPM(T=5, beta_1=0.1, beta_T=0.5)
    share = {}
    for windows in ("up", "down"):
        batch = draw(0, ladder, loss="sa", K=3, batch=16_000, windows=windows, cond=False)
        level = (ladder.levels - batch.sigma.double().view(3, -1, 1)).abs().argmin(-1)   # 0 ... 4
        inside = batch.tau.view(3, -1) == 1
        assert (level[:-1] - level[1:])[inside[:-1] & inside[1:]].unique().tolist() == [1]
        share[windows] = level[inside].bincount() / 16_000
    torch.testing.assert_close(share["up"], torch.full((5,), 3 / 8), atol=0.02, rtol=0)
    assert share["down"][-1] == pytest.approx(1 / 5, abs=0.02)


def stable_target(batch, options):
    """STF's target, off the loss of a denoiser that gives theta: its gradient at theta = 0."""
    theta = torch.zeros_like(batch.x0, requires_grad=True)

    def denoise(x, sigma, **bound):
        return theta
    loss = train.objective(options, denoise, batch, torch.ones_like, None, None)
    gradient = torch.autograd.grad(loss.sum(), theta)[0]                   # 2 (theta - target)/d
    return -gradient * theta[0].numel() / 2


@pytest.mark.parametrize("more", [dict(cond=False), dict(xflip=True),
                                  dict(xflip=True, augment=0.3)], ids=str)
def test_stable_targets_of_a_run_have_the_mean_of_its_images_and_know_their_own(more):
    """E[target - x0] = 0 at high noise, in every value of a class; target = x0 at low noise."""
    options, errors = Options(**BATCH | more), []
    for step in range(60 if "augment" in more else 300):
        batch = draw(step, EDM(P_mean=3, P_std=0.5), **more)
        error = (stable_target(batch, options) - batch.x0).flatten(1)
        errors.append((error[batch.labels == 1] if options.cond else error).sum(0))
    errors = torch.stack(errors)
    z = errors.mean(0) / errors.std(0) * len(errors) ** 0.5
    assert 0.6 < (z ** 2).mean() < 1.5
    batch = draw(0, EDM(P_mean=-6, P_std=0.5), **more)
    torch.testing.assert_close(stable_target(batch, options), batch.x0, rtol=0, atol=1e-4)


# ---- The objective -------------------------------------------------------------------------------

def test_the_taylor_control_is_subtracted_so_that_the_gradient_varies_less():
    data, variance = evaluate.load_data("two-gaussians"), {}
    options = train.resolve(Options(**POINTS | dict(loss="taylor", batch=300, ref_batch=300)), data)
    torch.manual_seed(0)
    denoiser = evaluate.build_denoiser(options)
    torch.nn.init.normal_(denoiser.model.out.weight)                   # a fresh network is 0
    schedule, rows = EDM(P_mean=-5.0), train.on_device(data, "cpu")    # at small sigma
    for name in ("dsm", "taylor"):
        options.loss = name
        batch = train.draw_batch(*rows, options, schedule, 0)
        losses = train.objective(options, denoiser, batch, schedule.weight, denoiser.precondition,
                                 RunningBeta())
        last = denoiser.model.out.bias
        g = [torch.autograd.grad(loss, last, retain_graph=True)[0] for loss in losses]
        variance[name] = torch.stack(g).var(0).sum()
    assert variance["taylor"] < 0.1 * variance["dsm"]


@pytest.mark.parametrize("more", OBJECTIVES, ids=str)
def test_every_objective_in_every_schedule_learns_points_and_images(more):
    """The loss of one batch falls: of points with classes and an exact trace, of images with all
    there is."""
    shared = more | dict(device="cpu", cond=True, P_mean=-0.5, P_std=1.0)
    images = TINY | dict(arch="unet", schedule="edm", augment=0.5, xflip=True, dropout=0.1,
                         label_dropout=0.2)
    points = [POINTS | dict(arch="mlp", schedule=schedule) for schedule in SCHEDULES]
    for given in (images, *points):
        data = evaluate.load_data(given["data"])
        options = Options(**given | shared, shape=data.x.shape[1:], classes=data.classes)
        torch.manual_seed(0)
        denoiser, schedule = evaluate.build_denoiser(options), evaluate.build_schedule(options)
        batch = train.draw_batch(torch.from_numpy(data.x), torch.from_numpy(data.labels), options,
                                 schedule, 0)
        weight, beta, losses = evaluate.build_weight(options), RunningBeta(), []
        optimizer = torch.optim.Adam(denoiser.parameters(), lr=2e-3)
        for _ in range(12):
            torch.manual_seed(0)                                   # dropout: the same each time
            loss = train.objective(options, denoiser, batch, weight, denoiser.precondition, beta)
            optimizer.zero_grad()
            loss.mean().backward()
            optimizer.step()
            losses.append(loss.mean().item())
        assert loss.shape == (options.batch,) and losses[-1] < losses[0]


@pytest.mark.parametrize("more", [dict(loss="stf", augment=0.5, label_dropout=0.2),
                                  dict(loss="sa"), dict(loss="taylor")], ids=str)
def test_compile_makes_one_graph_with_the_losses_of_eager(more, monkeypatch):
    """The backend aot_eager traces forward and backward as inductor does, but needs no compiler.

    fullgraph refuses a break.  Held-out error, distance and pictures between the steps run without
    torch.compile, so they recompile nothing.
    """
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager",
                                                  fullgraph=True))
    given = TINY | dict(cond=True, arch="unet", steps=4, eval_every=2, fid_every=2, fid_num=4,
                        fid_features="pixels", sample_every=2) | more
    torch._dynamo.reset()
    counters.clear()
    for compile in (False, True):
        trained(f"{compile}", given, compile=compile)
    assert counters["stats"]["unique_graphs"] == 1
    for eager, compiled in zip(log("False", "loss"), log("True", "loss")):
        assert compiled["loss"] == pytest.approx(eager["loss"], rel=1e-5)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=[
    pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")])])
@pytest.mark.parametrize("arch", UNETS)
def test_convolutions_need_not_reorder_their_input(arch, device):
    """All but those beside attention get it in the network's memory format."""
    chosen = train.memory_format(device)
    options = Options(arch=arch, width=32, shape=(3, 16, 16), schedule="edm", P_mean=0, P_std=1)
    denoiser = evaluate.build_denoiser(options).to(device, memory_format=chosen)
    found = []

    def look(layer, inputs):
        found.append(inputs[0].is_contiguous(memory_format=chosen))
    for layer in denoiser.modules():
        if isinstance(layer, Conv):
            layer.register_forward_pre_hook(look)
    x = torch.randn(2, 3, 16, 16, device=device)
    denoiser(x, x.new_ones(2, 1, 1, 1))
    assert sum(found) > 0.9 * len(found)


@pytest.mark.parametrize("name", ["schedule", "edm", "v"])
def test_preconditioning_levels_and_weight_are_chosen_apart(name):
    """EDM Table 2, config D: EDM's network on VP's levels, with VP's weight; and other networks.

    A fresh network gives 0, so that D = c_skip x, and the first loss has its closed form.
    """
    trained(schedule="vp", precondition=name, loss="dsm", steps=1)
    denoiser, options = evaluate.load_run("run")
    rows, vp = torch.from_numpy(evaluate.load_data("two-gaussians").x), VP()
    batch = train.draw_batch(rows, None, options, vp, 0)
    x, sigma = batch.x0 + batch.sigma * batch.noise, batch.sigma
    c_skip, c_out, c_in, c_noise = vp.precondition(sigma)
    if name == "edm":
        c_skip, c_out, c_in, c_noise = EDM().precondition(sigma)
    if name == "v":
        c_skip, c_out = target_coefficients("v", sigma)
    loss = (vp.weight(sigma) * (c_skip * x - batch.x0) ** 2).mean()
    assert log("run")[0]["loss"] == pytest.approx(loss.item(), rel=1e-5)
    want = c_skip * x + c_out * denoiser.model(c_in * x, c_noise.flatten())
    torch.testing.assert_close(denoiser(x, sigma), want)


# ---- Rates, averages -----------------------------------------------------------------------------

def test_learning_rate_rises_stays_and_falls():
    options = Options(lr=1.0, warmup=10, decay=0.5, steps=100)
    rate = [train.learning_rate(options, step) for step in range(100)]
    assert rate[0] == pytest.approx(0.1) and rate[9:50] == [1.0] * 41
    assert rate[75] == pytest.approx(0.5) and rate[99] == pytest.approx(0.02)
    assert train.learning_rate(dataclasses.replace(options, decay=0.0), 99) == 1.0


def test_half_life_counts_images_and_ramps_up():
    options = Options(batch=10, ema_rampup=0.05)
    assert train.ema_beta(100, options, 10 ** 6) ** 10 == pytest.approx(0.5)     # 100 images
    for step in (1, 7, 199):                                # at most a 20th of the images seen
        assert train.ema_beta(100, options, step) == pytest.approx(0.5 ** (20 / step))


def test_the_best_distance_is_forgotten_where_the_next_ones_do_not_compare():
    """More samples give a smaller distance.  Where there is no floor, the log has none."""
    folder = trained(kind=TINY, steps=1, fid_every=1, fid_num=39, fid_features="pixels")
    train.run(train.resumed(folder, dict(steps=2, fid_num=3)), folder, brief=True)
    many, few = log(folder, "frechet_pixels_39")[0], log(folder, "frechet_pixels_3")[0]
    assert many["frechet_pixels_39"] < few["frechet_pixels_3"]
    assert evaluate.load_checkpoint(folder)["best"] == few["frechet_pixels_3"]
    assert "floor" in few and "floor" not in many


def test_averages_hold_no_graph_of_the_steps_before():
    """Which would grow with each step, until memory is full."""
    network = torch.nn.Linear(2, 1)
    average = torch.nn.Linear(2, 1).requires_grad_(False)
    train.update_averages({"100": average}, network, Options(batch=10), 5)
    assert average.weight.grad_fn is None and not average.weight.requires_grad


def test_a_run_keeps_averages_of_several_half_lives_and_samples_use_the_first():
    trained(steps=6, ema=(20, 400), ema_rampup=1.0, checkpoint_every=1, keep=6)
    states = [evaluate.load_checkpoint(path) for path in evaluate.checkpoints("run")]
    for half_life in ("20", "400"):
        average = states[0]["ema"][half_life]
        for step, state in enumerate(states[1:], 2):
            beta = train.ema_beta(int(half_life), Options(batch=16, ema_rampup=1.0), step)
            average = {name: beta * average[name] + (1 - beta) * weight
                       for name, weight in state["model"].items()}
            torch.testing.assert_close(state["ema"][half_life], average)
        denoiser, _ = evaluate.load_run("run", weights="ema" if half_life == "20" else half_life)
        torch.testing.assert_close(dict(denoiser.state_dict()), average)


# ---- The papers' runs ----------------------------------------------------------------------------

EDM_F = dict(length=200e6, batch=512, lr=10e-4, warmup=10e6, half_life=0.5e6, dropout=0.13,
             augment=0.12, clip=None)                                       # EDM Table 7, config F
FFHQ = EDM_F | dict(batch=256, lr=2e-4, dropout=0.05, augment=0.15)
IMAGENET = EDM_F | dict(length=2500e6, batch=4096, lr=1e-4, half_life=50e6, dropout=0.10, augment=0)
SCORE_SDE = dict(steps=1_300_000, batch=128, lr=2e-4, warmup_steps=5000, decay=0.9999, dropout=0.1,
                 xflip=True, clip=1.0)                          # Song et al. 2021's code, and STF's
VE = SCORE_SDE | dict(decay=0.999)
DEBIAS = dict(steps=500_000, batch=8, lr=2e-5, warmup_steps=0, decay=0.9999, dropout=0, clip=1.0)
PUBLISHED = {                                        # name: values, loss, schedule, network
    "cifar10-edm-vp": (EDM_F, "stf", "edm", "ddpmpp"),
    "cifar10-edm-ve": (EDM_F, "stf", "edm", "ncsnpp"),
    "ffhq64": (FFHQ, "stf", "edm", "ddpmpp"), "imagenet64-adm": (IMAGENET, "stf", "edm", "adm"),
    "cifar10-ve": (VE, "stf", "ve", "ncsnpp"),
    "cifar10-vp": (SCORE_SDE, "stf", "vp", "ddpmpp"),
    "celeba64-ve": (VE, "stf", "ve", "ncsnpp"),
    "cifar10-ddpm": (SCORE_SDE | dict(steps=500_000), "sa", "ddpm", "ddpmpp"),
    "ffhq256-adm": (DEBIAS, "dsm", "ddpm", "adm")}


@pytest.mark.parametrize("name", sorted({*train.PRESETS, *PUBLISHED} - {"mnist"}))
def test_a_preset_has_its_papers_values(name):
    """EDM states lengths in images, the others in steps, and averages as a factor for each step."""
    own, (paper, *kind) = Options(**train.PRESETS[name]), PUBLISHED[name]
    batch = paper["batch"]
    assert own.batch == batch and own.lr == pytest.approx(paper["lr"])
    assert own.steps == (paper.get("steps") or round(paper["length"] / batch))
    assert own.warmup == pytest.approx(paper.get("warmup_steps", paper.get("warmup", 0) / batch),
                                       abs=1)
    half_life = paper.get("half_life") or batch * math.log(0.5) / math.log(paper["decay"])
    assert own.ema[0] == pytest.approx(half_life, rel=1e-3)
    assert (own.dropout, own.augment) == (paper["dropout"], paper.get("augment", 0))
    assert own.clip == paper["clip"] if paper["clip"] else own.clip > 1e6
    assert own.xflip == paper.get("xflip", False) and own.decay == 0 and own.beta2 == 0.999
    assert [own.loss, own.schedule, own.arch] == kind


@pytest.mark.parametrize("name", train.PRESETS)
def test_a_presets_network_can_be_built(name):
    size = dict(mnist=28).get(name, 32)
    options = Options(**dict(P_mean=-1.2, P_std=1.2, size=size) | train.PRESETS[name])
    options.shape = (3, options.size, options.size)
    with torch.device("meta"):
        denoiser = evaluate.build_denoiser(options)
    assert sum(p.numel() for p in denoiser.parameters()) > 1e6


# ---- Options -------------------------------------------------------------------------------------

def test_options_from_python_are_checked_too():
    for given in (dict(loss="gan"), dict(batch=0), dict(beta2=1.0), dict(ema=(20, 0)),
                  dict(cond="no"), dict(steps=2.5), dict(ema=5000)):
        with pytest.raises(BadInput, match=f"--{next(iter(given))}"):
            trained("other", TINY, **given)
    assert not Path("other").exists()


def test_more_ranks_than_half_the_rows_are_refused(monkeypatch):
    """The report draws as many samples as half the rows, and each rank needs one of them."""
    np.savez("four.npz", images=PIXELS[:4])
    monkeypatch.setattr(train, "ranks", lambda: (0, 3))
    monkeypatch.setattr(train, "agree", lambda call: call())
    with pytest.raises(BadInput, match="half the number of images"):
        trained("other", TINY, data="four.npz")


# ---- What a run leaves ---------------------------------------------------------------------------

@pytest.mark.parametrize("arch, schedule, loss", [
    ("unet", "edm", "stf"), ("ddpmpp", "vp", "dsm"), ("ncsnpp", "ve", "antithetic"),
    ("adm", "ddpm", "sa"), ("mlp", "iddpm", "taylor")])
def test_the_command_trains_every_network_and_tells_what_it_did(arch, schedule, loss, capsys):
    given = POINTS if arch == "mlp" else TINY
    given = given | dict(arch=arch, schedule=schedule, loss=loss, steps=3)
    assert train.main(words(given)) == 0
    shown, run = capsys.readouterr().out, f"runs/000-{Path(given['data']).stem}-{loss}-{schedule}"
    for line in (f"loss      {loss}, schedule {schedule}, 3 steps",
                 "\n3 steps in 0:", "Frechet distance", f"samples     {run}/samples-0000003.png",
                 f"evaluate.py sample {run}"):
        assert line in shown
    assert Path(run, "samples-0000003.png").stat().st_size > 500
    assert [line["step"] for line in log(run, "loss")] == [1, 2, 3]


def test_training_learns_the_data():
    """300 steps on two Gaussians: samples far nearer to the data than noise of its moments."""
    argv = ["--data", "two-gaussians", "--width", "64", "--steps", "300", "--batch", "128",
            "--ref-batch", "256", "--warmup", "20", "--out", "run"]
    assert train.main(argv) == 0
    report = log("run", "report")[0]["report"]
    assert report["frechet_pixels"] < 0.02             # 0.5 for all samples at one of the two means
    denoiser, options = evaluate.load_run("run")
    features = evaluate.extractor("pixels", (2,))
    real = evaluate.real_statistics(evaluate.run_data(options), 128, features, most=10_000)
    distance = evaluate.run_distance(denoiser, options, range(128), features, real)
    assert report["frechet_pixels"] == pytest.approx(distance, rel=1e-3)
    x = evaluate.generate(denoiser, options, range(500), steps=18)
    near = (x.abs() - 0.48).abs().amax(1) < 0.5        # 3.6 standard deviations of a component
    assert near.float().mean() > 0.9 and 0.35 < (x[:, 0] > 0).float().mean() < 0.65
    table = {row[0]: row[1:] for row in report["loss_by_sigma"]}
    assert table[5][1] < 0.2 * table[5][0]             # DSM's target is all noise there, STF's not


def test_checkpoints_are_plain_and_whole_and_two_of_them_are_kept():
    assert train.main(words(POINTS | dict(steps=6, checkpoint_every=2, out="run"))) == 0
    names = {path.name for path in Path("run").iterdir()} - {".lock.part", "loss.png"}
    assert Path("run/loss.png").is_file() == bool(importlib.util.find_spec("matplotlib"))
    assert names == {"checkpoint-0000004.pt", "checkpoint-0000006.pt", "log.jsonl", "options.json",
                     "samples-0000006.png"}
    state = torch.load("run/checkpoint-0000006.pt", weights_only=True)
    stored = json.loads(Path("run/options.json").read_text())
    assert json.loads(json.dumps(state["options"])) == stored
    assert stored["shape"] == [2] and stored["lr"] == 5e-3 and stored["width"] == 16


def test_a_run_logs_the_error_of_both_weights_on_the_same_rows_whatever_the_seed():
    trained(steps=20, eval_every=10, warmup=0, seed=7)
    lines = log("run", "held_out")
    assert [line["step"] for line in lines] == [10, 20]
    data = evaluate.load_data("two-gaussians")
    for kind in ("raw", "ema"):
        denoiser, options = evaluate.load_run("run", weights=kind)
        options.seed = 0
        error = evaluate.denoising_error(denoiser, *evaluate.held_out(data, options))
        assert lines[-1]["held_out"][kind] == pytest.approx(error)
        assert len(error) == len(lines[-1]["levels"])
    assert lines[-1]["held_out"]["raw"] != lines[-1]["held_out"]["ema"]


def test_distances_are_logged_by_their_count_and_the_best_checkpoint_is_kept(monkeypatch):
    values = iter([5.0, 2.0, 3.0])
    monkeypatch.setattr(evaluate, "run_distance", lambda *given, **more: next(values))
    trained(steps=6, fid_every=2, fid_num=30, keep=1)
    lines = log("run", "frechet_pixels_30")
    assert [(line["step"], line["frechet_pixels_30"]) for line in lines] == [(2, 5), (4, 2), (6, 3)]
    assert [Path(path).name for path in evaluate.checkpoints("run")] == ["checkpoint-0000006.pt"]
    assert evaluate.load_checkpoint("run/best.pt")["step"] == 4
    assert evaluate.load_checkpoint("run")["best"] == 2.0


def test_init_takes_network_and_noise_levels_and_a_head_leaves_the_network_alone(capsys):
    """So that the hint "train.py --head npr --init RUN" is enough, beside the data."""
    trained("first", schedule="vp", precondition="v", loss="dsm", steps=5)
    averages = evaluate.load_checkpoint("first")["ema"]["20000"]
    start = dict(data="two-gaussians", init="first")
    trained("more", start, steps=1, lr=1e-9, ema_rampup=1.0)
    more = evaluate.load_checkpoint("more")
    for weights in (more["model"], more["ema"]["20000"]):
        torch.testing.assert_close(weights, averages)
    trained("head", start, head="npr", steps=5, warmup=0)
    head = evaluate.load_checkpoint("head")
    assert head["options"]["schedule"] == "vp" and head["options"]["precondition"] == "v"
    assert set(head["model"]) > set(averages)
    for name, weight in averages.items():
        assert torch.equal(weight, head["model"][name])
        assert torch.equal(weight, head["ema"]["20000"][name])
    for change, sentence in [("--schedule edm", "cannot change --schedule edm"),
                             ("--width 8", "cannot change --width 8"), ("--loss dsm", "--loss"),
                             ("--data images.npz", "--arch mlp")]:
        assert sentence in refused([*words(start), "--head", "npr", *change.split()], capsys)


@pytest.mark.parametrize("slow", [1, 2])
def test_fewer_threads_are_taken_where_they_are_faster(slow, monkeypatch, capsys):
    """With a clock by which as many threads as `slow` take ten times as long."""
    clock, threads = [0.0], [2]

    def denoise(x, sigma):
        clock[0] += 10 if threads[-1] == slow else 1
    measured = partial(timeit.repeat, timer=lambda: clock[0])
    monkeypatch.setattr(train.timeit, "repeat", measured)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads[-1])
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    train.choose_threads(denoise, Options(batch=4, shape=(2,)))
    assert threads[-1] == 3 - slow
    assert ("threads   1, which is faster here than 2" in capsys.readouterr().out) == (slow == 2)
