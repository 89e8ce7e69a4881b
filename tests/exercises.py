"""exercises.py: three planted bugs and three lines to change, with answers.  A script, not a test.

    python tests/exercises.py                      the list
    python tests/exercises.py bug 1                a bug, and four tests: which of them fails?
    python tests/exercises.py bug 1 c              your answer; runs that test with the bug planted
    python tests/exercises.py change 1             a line to change, its numbers, what to explain
    python tests/exercises.py bug 1 --answer       the solution: of a bug the four tests' results,
                                                   of a change the numbers before and after; and why

To add one, add a dict to BUGS or CHANGES: in `file`, the line `old` of the function or class `name`
becomes `new`, in memory; no file is touched.
"""

import argparse
import inspect
import sys
import textwrap
from pathlib import Path

TESTS = Path(__file__).resolve().parent
sys.path.insert(0, str(TESTS.parent))

import pytest
import torch

import evaluate
import losses
import samplers
import schedules
from papers import stf

BUGS = [
    dict(file=losses, name="stf_weights", title="the weights of stable targets lose a factor 1/2",
         old="logits.append((query @ y.T - torch.linalg.vecdot(y, y) / 2) / variance)",
         new="logits.append((query @ y.T - torch.linalg.vecdot(y, y)) / variance)",
         tests="test_losses.py", a="test_stf_n_1_is_dsm_bit_for_bit",
         b="test_stf_target_of_far_and_near_noise",
         c="test_stf_target_on_a_whole_finite_set_is_the_exact_posterior_mean",
         d="test_stf_theorem_2_far_field_variance_falls_as_1_over_n",
         fails="c", hint="""What would a test notice if all logits were doubled? Ask it of one row,
         of rows that all weigh the same, and of one row that has all the weight.""",
         why="""Only (c) has the posterior mean another way, from the gradient of log p. A single
         row (a) weighs 1 whatever its logit; (b) and (d) are at the ends of sigma, where all
         rows weigh the same, or one row has all the weight. Limits do not see a wrong factor:
         test in between."""),
    dict(file=samplers, name="edm_stochastic", title="a step with churn from the wrong noise level",
         old="x_next = x + (sigma_next - sigma_hat) * (d + d_next) / 2",
         new="x_next = x + (sigma_next - sigma_cur) * (d + d_next) / 2",
         tests="test_samplers.py", a="test_nfe_is_what_each_docstring_says",
         b="test_without_noise_stochastic_samplers_are_euler_or_heun_and_draw_none",
         c="test_noise_is_drawn_where_sigma_is_in_the_window_and_gamma_is_clamped",
         d="test_churn_keeps_the_gaussian_marginal_in_exact_covariance",
         fails="d", hint="""Write down sigma_hat where S_churn is 0. Which of the tests compare
         numbers that come out of a step with churn?""",
         why="""(b) compares every digit, but without churn sigma_hat is sigma_cur. (a) and (c) see
         when denoiser and noise are called; (c) compares the sampler's results with one another,
         and all are wrong. Only (d) has churn and knows the result. A test of a special case is
         blind to what that case switches off."""),
    dict(file=losses, name="taylor_control", title="a control variate loses the trace of its mean",
         old="dot = dot + sigma * (product(noise) * noise - trace)",
         new="dot = dot + sigma * (product(noise) * noise)",
         tests="test_taylor.py",
         a="test_control_has_mean_zero_over_the_noise_whatever_the_dropout_masks",
         b="test_control_and_its_gradient_have_mean_zero_over_the_design",
         c="test_edm_untrained", d="test_remainder_of_order_k_falls_as_h_to_the_k_plus_1",
         fails="b", hint="""The trace does not depend on the noise. Does a test that measures only
         how much the loss varies see the trace? And of which order is the control of each test?""",
         why="""noise.J noise has the mean tr J. If tr J is not taken off, the control has a mean,
         and loss - beta control has a bias. (a) asks for that mean too, but at order 0, which has
         no trace. (c) finds that order 1 takes more variance off than order 0, and bug or not it
         does, for tr J does not depend on the noise; (d) leaves the trace out by design. Less
         variance is no sign of the right mean."""),
]


def target_variances():
    """V of stable targets (stf.target_variance) for two Gaussians in 64 dimensions."""
    x = torch.from_numpy(evaluate.load_data("two-gaussians-64d").x).double()
    means = 0.48 * torch.tensor([[1.0], [-1.0]]).double().expand(2, 64)
    levels, sizes, g = torch.tensor([0.03, 0.3, 1, 10]).double(), [16, 256], torch.Generator()

    def exact(x, sigma):
        return stf.mixture_mean(x, sigma, means, 0.14), sigma[:, 0]
    V, _ = stf.target_variance(x[:300], torch.randn(300, 64, generator=g).double(), levels, sizes,
                               x[300:], exact, g)
    return {f"sigma {level:g}, n = {n}": v for level, row in zip(levels, V.mean(0).T.tolist())
            for n, v in zip(sizes, row)}


def heun_errors():
    """Relative error of Heun on data N(0, .5^2), whose flow scales x with its deviation."""
    edm, errors = schedules.EDM(), {}

    def deviation(sigma):
        return (0.25 + sigma ** 2) ** 0.5

    def denoise(x, sigma):
        return 0.25 * x / deviation(sigma) ** 2
    for N in (64, 256, 1024):
        t = edm.time_steps(N)[:-1]
        x = samplers.heun(denoise, deviation(t[:1])[:, None], t, edm)
        errors[f"{N} steps"] = (x / deviation(t[-1]) - 1).abs().item()
    return errors


def best_shares():
    """On data N(0, 1): the c/c* of eps_hat = c x that is best for sa_loss, where c* x = E[eps | x].

    Each level has a c of its own; 20 of them around t will do.  The loss needs second moments of
    (x0, z_1, z_2) only, and eight rows of signs have those of N(0, I).  It is a parabola in c.
    """
    signs = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0]).double()] * 3).T.repeat(1, 19)
    first, shares = torch.arange(1, 20).repeat_interleave(8), {}                  # (152,)
    x0, z = signs[0, :, None], signs[1:, :, None]                                 # z (2, 152, 1)
    for t in (10, 100, 500):
        levels = schedules.DDPM().levels[t - 10:t + 10]                           # of t - 9, ...
        sigma = levels[torch.stack([first, first - 1])][:, :, None]
        noise = losses.path_noise(z, sigma)

        def loss(c):
            def denoise(x, s):
                return x - s * c[torch.searchsorted(levels, s)] * x
            tau = torch.ones_like(sigma)
            return losses.sa_loss(denoise, x0, noise, sigma, losses.constant_weight, tau).sum()
        zero = torch.zeros_like(levels)
        slope, curve = torch.func.grad(loss)(zero), torch.func.hessian(loss)(zero)
        best = torch.linalg.solve(curve, -slope) / (levels / (1 + levels ** 2))
        shares[f"t = {t}"] = best[9].item()
    return shares


CHANGES = [
    dict(file=stf, name="target_variance", title="stable targets that know their source alone",
         old="errors = [stf_target(x, sigma, reference[:n]).flatten(1) - mean for n in sizes]",
         new="errors = [stf_target(x, sigma, reference[:1]).flatten(1) - mean for n in sizes]",
         numbers=target_variances, shown="variance of the target about E[x0 | x]",
         ask="""What is the target after the change, whatever n? At which noise levels did the
         other n - 1 references help, how much, and why not at the rest?""",
         why="""A softmax over one row is 1: the target is x0, plain denoising score matching. At
         large sigma x hardly tells rows apart: the target was the mean of n, of 1/n the variance.
         At small sigma the source had all the weight, and the others changed nothing."""),
    dict(file=schedules, name="EDM", title="time steps of equal length",
         old="rho: float = 7.0", new="rho: float = 1.0",
         numbers=heun_errors, shown="relative error of Heun's method on Gaussian data",
         ask="""How much larger is the error for the same number of steps? By what factor does it
         fall for four times the steps, before and after? What does a schedule change, then?""",
         why="""With rho = 1 most steps go to large sigma, where the flow is straight, few to
         where it bends, about the data's deviation of .5. That costs a large factor; the limit is
         the same, and so is the order: once steps are small, 4 times as many divide by 4^2."""),
    dict(file=losses, name="path_noise", title="a noise of its own for each level of SA's loss",
         old="return steps.flip(0).cumsum(0).flip(0) / sigma", new="return noise",
         numbers=best_shares, shown="best predictor as a share of E[eps | x] (1: unbiased)",
         ask="""Either way, each level's noise is N(0, I). Why does the predictor that is best for
         the loss fall short of E[eps | x] after the change, at t = 10 by a quarter, and hardly at
         t = 500?""",
         why="""The loss squares a sum of two neighbours' errors, eps_hat - eps with eps_hat = c x.
         If they share x0 alone, their product has the mean c^2 E x0^2, least for c = 0: so c
         shrinks, at t = 10 to 0.75 of its best. Along a path they share the noise too, and the sum
         is about twice one error: 0.982 is left. At t = 500 x is nearly all noise, x0 hardly
         counts, and independent noises leave 0.974."""),
]
EXERCISES = {"bug": BUGS, "change": CHANGES}


# ---- The runner ----------------------------------------------------------------------------------

def plant(e):
    """Replaces the line in memory, in its own module; tests are imported later."""
    text = inspect.getsource(getattr(e["file"], e["name"]))
    if text.count(e["old"]) != 1:
        sys.exit(f"exercises.py: {e['name']} has been edited; put back the line: {e['old']}")
    exec(text.replace(e["old"], e["new"]), vars(e["file"]))


def bug(e, letter, answer):
    """Prints the four tests, with the results of those that run; returns what to say.

    A wrong letter runs its own test alone, and gets a hint; the right one, or --answer, runs all.
    """
    running = "abcd" if answer or letter == e["fails"] else letter or ""
    if running:
        plant(e)
    print(f"tests/{e['tests']}:")
    for k in "abcd":
        result = ""
        if k in running:
            status = pytest.main([f"{TESTS / e['tests']}::{e[k]}", "-p", "no:terminal", "-p",
                                  "no:cacheprovider"])
            result = {0: "passed  ", 1: "FAILED  "}.get(status, "did not run  ")
        print(f"  {k}  {result}{e[k]}")
    if not running:
        return "Which one of the four fails? Some that pass look as if they should not."
    if running == "abcd":
        return ("Right. " if letter else "") + e["why"]
    return f"No, ({letter}) passes. A hint: {e['hint']} Answer again."


def change(e, answer):
    """Prints the numbers, of both lines if the answer is wanted; returns what to say."""
    columns = {"before" if answer else "now": e["numbers"]()}
    if answer:
        plant(e)
        columns["after"] = e["numbers"]()
    print(f"{e['shown']}\n" + " " * 22 + "".join(f"{name:>12}" for name in columns))
    for row in next(iter(columns.values())):
        print(f"  {row:20}" + "".join(f"{column[row]:12.3g}" for column in columns.values()))
    if answer:
        return e["why"]
    return f"Change the line and run this again. {e['ask']} Put the line back before you go on."


def main(argv=None):
    parser = argparse.ArgumentParser(usage=__doc__)
    parser.error = lambda message: parser.exit(2, f"exercises.py: {message}\n")
    parser.add_argument("kind", nargs="?", choices=EXERCISES)
    parser.add_argument("number", nargs="?", type=int)
    parser.add_argument("letter", nargs="?", choices="abcd")
    parser.add_argument("--answer", action="store_true")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    if args.number is None:
        for kind, exercises in EXERCISES.items():
            for i, e in enumerate(exercises, 1):
                print(f"{kind:>6} {i}   {e['file'].__name__}.{e['name']}: {e['title']}")
        return print("\nOne of them:  python tests/exercises.py bug 1")
    if not 1 <= args.number <= len(EXERCISES[args.kind]):
        parser.error(f"there is no {args.kind} {args.number}; the list shows what there is")
    if args.letter and (args.answer or args.kind == "change"):
        parser.error("answer a bug with a letter; --answer shows the solution of a bug or a change")
    e, command = EXERCISES[args.kind][args.number - 1], f"{args.kind} {args.number}"
    file = e["file"].__name__.replace(".", "/")
    print(f"{command}: {e['title']}\n\n{file}.py, {e['name']}:\n  - {e['old']}\n  + {e['new']}\n")
    say = change(e, args.answer) if e in CHANGES else bug(e, args.letter, args.answer)
    print("\n" + textwrap.fill(" ".join(say.split()), 88))
    if not args.answer and args.letter != e.get("fails", ""):
        if e in BUGS:
            print(f"\nYour answer:   python tests/exercises.py {command}, then a, b, c or d")
        print(f"\nThe solution:  python tests/exercises.py {command} --answer")


if __name__ == "__main__":
    main()
