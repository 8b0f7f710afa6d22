"""The ops on the CPU (eager equations), their checks and noise, and the commands around the fused
kernels."""

import importlib.util
import math
import operator
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from opd import flow, kernels
from opd.kernels.common import backend
from opd.kernels.noise import philox
from opd.kernels.ops import check_values

ROOT = Path(__file__).parents[1]
Normal = torch.distributions.Normal


def run(*command, **environment):
    environment = {**os.environ, "TRITON_INTERPRET": "0", **environment}
    command = (sys.executable, *command)
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


# ---------------------------------------------------------------- the fused kernels, in their own processes
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="no triton wheel")


SOME = "every_transition or alpha_0 or far_out or kernels_normal or same_bits"


@needs_triton
@pytest.mark.parametrize("which", [SOME, pytest.param("", marks=pytest.mark.slow)], ids=["some", "all"])
def test_fused_kernels_in_the_interpreter(which):
    """The tests of the fused kernels; with all of them the training loop's golden losses through them.
    Triton's interpreter must be chosen before triton is imported, hence the separate process."""
    tests = ["tests/test_kernels_fused.py"]
    if which == "":
        tests.append("tests/test_train.py::test_golden_losses")
    interpreted = {"TRITON_INTERPRET": "1", "FLOW_OPD_KERNELS": "triton"}
    result = run("-m", "pytest", *tests, "-k", which, "-p", "no:cacheprovider", **interpreted)
    assert result.returncode == 0 and "100%" in result.stdout, result.stdout[-5000:] + result.stderr[-2000:]


@needs_triton
@pytest.mark.slow
def test_every_kernel_compiles_for_every_target_without_spills():
    result = run("-m", "tests.kernels_aot")
    assert result.returncode == 0, result.stdout + result.stderr
    assert " 0 spills" in result.stdout
    for name in ("forward_kernel", "finish_kernel", "sm_80", "sm_90", "sm_100", "gfx942"):
        assert name in result.stdout


@needs_triton
@pytest.mark.slow
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="compiles")
@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_every_block_is_summed_in_one_order(target):
    """A step's log-probability and `log_prob` sum the same squares in two compiled kernels. Their bits agree
    if each sum runs over the same assignment of elements to threads, at every size, K and dtype."""
    from triton import compile

    from tests import kernels_aot as aot

    assignments = set()
    for _, source in aot.recorded_launches().values():
        if source.name == "forward_kernel":
            code = compile(source, target=aot.TARGETS[target], options=aot.OPTIONS).asm["ttgir"]
            sums = re.findall(r"\(tensor<1024xf32, (#\w+)>\) -> f32", code)
            assert sums
            assignments.update(re.search(f"^{name} = (.*)$", code, re.M)[1] for name in sums)
    assert len(assignments) == 1, assignments


A_STEP = """
import torch
from opd import flow, kernels
z = torch.zeros(1, 4)
transition = flow.sde_transition(torch.tensor(0.5), torch.tensor(0.4), 0.7)
print(kernels.sde_step(z, z, transition, seed=1)[0].shape)
"""


@needs_triton
@pytest.mark.slow
def test_fused_kernels_on_the_cpu_say_what_they_need():
    result = run("-c", A_STEP, FLOW_OPD_KERNELS="triton")
    assert result.returncode != 0 and "set TRITON_INTERPRET=1 before Python starts" in result.stderr
    result = run("-c", "from opd import kernels", FLOW_OPD_KERNELS="cuda")
    assert "expected one of ('auto', 'triton', 'eager')" in result.stderr


def test_without_triton_the_eager_ops_still_work():
    """Platforms without a triton wheel: the import finds no such package."""
    hide = """
import importlib.util as u
find = u.find_spec
u.find_spec = lambda name, *a: None if name == "triton" else find(name, *a)
"""
    result = run("-c", hide + A_STEP)
    assert "torch.Size([1, 4])" in result.stdout, result.stderr


# ---------------------------------------------------------------- equations
def arguments(shape=(3, 4, 5), teachers=2, dtype=torch.float64, kind="sde"):
    g = torch.Generator().manual_seed(0)
    batch = shape[0]
    x, noise, x_next = torch.randn(3, *shape, generator=g, dtype=dtype)
    sigma = torch.linspace(1, 0.3, batch, dtype=dtype)
    return {
        "x": x,
        "noise": noise,
        "x_next": x_next,
        "v": torch.randn(shape, generator=g, dtype=dtype, requires_grad=True),
        "targets": torch.randn(teachers, *shape, generator=g, dtype=dtype),
        "transition": flow.TRANSITIONS[kind](sigma, sigma - 0.2, 0.7),
        "alpha": torch.rand(batch, teachers, generator=g, dtype=dtype),
        "w": torch.rand(batch, generator=g, dtype=dtype),
    }


def opd(**changes):
    a = {**arguments(dtype=torch.float32), **changes}
    positional = (a[name] for name in ("x", "v", "targets", "alpha", "w", "transition", "noise"))
    return kernels.opd_step(*positional, seed=a.get("seed"), index=a.get("index"))


@pytest.mark.parametrize("kind", ["sde", "cps"])
def test_gradcheck(kind):
    """Per-sample outputs: gradcheck compares the whole Jacobian, so every upstream gradient."""
    a = arguments(kind=kind)
    a["alpha"][0, 1] = 0

    def log_prob(v):
        return kernels.log_prob(a["x_next"], a["x"], v, a["transition"])

    def loss(v):
        return kernels.velocity_mse(v, a["targets"], a["alpha"], a["w"])[0]

    def loss_and_step(v):
        return opd(**{**a, "v": v})[0]

    assert all(torch.autograd.gradcheck(function, a["v"]) for function in (log_prob, loss, loss_and_step))


def test_velocity_mse_by_hand():
    v, one = torch.tensor([[1.0, 2.0], [0.0, 4.0]]), torch.ones(2, 2)
    alpha, w = torch.tensor([[1.0, 0.5], [0.0, 2.0]]), torch.tensor([3.0, 0.5])
    loss, per_teacher = kernels.velocity_mse(v, [one, 0 * one], alpha, w)
    stacked, _ = kernels.velocity_mse(v, torch.stack([one, 0 * one]), alpha, w)
    # sample 0: mean (0, 1)^2 = 0.5 and mean (1, 2)^2 = 2.5; sample 1: not read, and mean (0, 4)^2 = 8
    assert torch.equal(per_teacher, torch.tensor([[0.5, 2.5], [0.0, 8.0]]))
    assert torch.equal(loss, torch.tensor([3 * (0.5 + 0.5 * 2.5), 0.5 * 2 * 8]))
    assert torch.equal(loss, stacked)


def test_steps_by_hand():
    """keep 0.5, move 0.25, std 2: from x = 4, v = 2, z = 1 the mean is 1.5 and x_next 3.5, one std away."""
    x, v, z = torch.full((1, 3), 4.0), torch.full((1, 3), 2.0), torch.ones(1, 3)
    transition = flow.Transition(torch.tensor(0.5), torch.tensor(0.25), torch.tensor(2.0))
    x_next, log_prob = kernels.sde_step(x, v, transition, z)
    assert torch.equal(x_next, torch.full((1, 3), 3.5))
    assert log_prob.item() == pytest.approx(-0.5 - math.log(2) - 0.5 * math.log(2 * math.pi), rel=1e-6)


@pytest.mark.parametrize("kind", ["sde", "cps"])
def test_log_prob_is_as_accurate_as_the_direct_formula(kind):
    """At every state of a 10-step grid, the error of the float32 log-probability against the float64 density
    is at most twice that of (x_next - mean)^2 / (2 std^2) in float32, plus a unit in the last place."""
    sigmas = torch.linspace(1, 0, 11, dtype=torch.float64)
    grid = flow.TRANSITIONS[kind](sigmas[:-1], sigmas[1:], 0.7)
    g = torch.Generator().manual_seed(0)
    x, v = torch.randn(2, 64, 4, 32, 32, generator=g)
    noisy = [i for i in range(10) if grid.std[i] > 0]
    assert len(noisy) == {"sde": 10, "cps": 9}[kind]
    for i in noisy:
        transition = grid.at(i)
        x_next, _ = kernels.sde_step(x, v, transition, seed=i)
        keep, move, std = (t.item() for t in transition)
        mean = keep * x.double() - move * v.double()
        exact = Normal(mean, std).log_prob(x_next.double()).flatten(1).mean(1)
        residual = x_next - (keep * x - move * v)
        direct = (
            -(residual**2).flatten(1).mean(1) / (2 * std**2) - math.log(std) - 0.5 * math.log(2 * math.pi)
        )
        error = (kernels.log_prob(x_next, x, v, transition).double() - exact).abs().max()
        allowed = (direct.double() - exact).abs().max()
        assert error <= 2 * allowed + torch.finfo(torch.float32).eps * exact.abs().max()


def test_opd_step_is_its_two_parts_and_keeps_the_state_constant():
    a = arguments(dtype=torch.float32)
    loss, per_teacher, x_next, log_prob = opd(noise=None, seed=4)
    assert loss.requires_grad
    assert not (x_next.requires_grad or log_prob.requires_grad or per_teacher.requires_grad)
    wanted = kernels.velocity_mse(a["v"], a["targets"], a["alpha"], a["w"])
    wanted += kernels.sde_step(a["x"], a["v"], a["transition"], seed=4)
    assert all(torch.equal(a, b) for a, b in zip((loss, per_teacher, x_next, log_prob), wanted, strict=True))
    assert torch.equal(kernels.log_prob(x_next, a["x"], a["v"], a["transition"]), log_prob)


def test_a_step_without_noise_is_eulers():
    a = arguments(dtype=torch.float32, kind="ode")
    x_next, log_prob = kernels.sde_step(a["x"], a["v"], a["transition"], seed=4)
    assert torch.allclose(x_next, a["x"] - 0.2 * a["v"]) and (log_prob == math.inf).all()
    again = kernels.log_prob(a["x_next"], a["x"], a["v"], a["transition"])
    assert (again == math.inf).all()


# ---------------------------------------------------------------- noise
PI = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344)
PHILOX = [
    ((0,) * 4, 0, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ((2**32 - 1,) * 4, 2**64 - 1, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    (PI, 0x299F31D0A4093822, "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


@pytest.mark.parametrize("counter, key, words", PHILOX)
def test_philox_known_answers(counter, key, words):
    """The three vectors published with the algorithm (Random123, philox4x32 10 rounds), in 9 lanes: the
    vectorised and the scalar path."""
    out = philox(key, tuple(torch.tensor([c] * 9) for c in counter))
    assert all(" ".join(f"{int(word[lane]):08x}" for word in out) == words for lane in range(9))


def test_normal_is_normal():
    """Moments within 5 standard errors; Kolmogorov-Smirnov statistic below its 0.1 % point, 1.95 / sqrt n."""
    z = kernels.normal((16, 16_384), seed=3).flatten().double()
    n = len(z)
    for power, moment, variance in [(1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)]:
        assert abs((z**power).mean() - moment) < 5 * math.sqrt(variance / n)
    cdf = 0.5 * (1 + torch.erf(z.sort().values / math.sqrt(2)))
    rank = torch.arange(n + 1, dtype=torch.float64) / n
    assert max((rank[1:] - cdf).max(), (cdf - rank[:-1]).max()) < 1.95 / math.sqrt(n)


def test_noise_differs_between_samples_steps_and_elements():
    rows = torch.cat([kernels.normal((8, 4096), seed) for seed in (0, 1, 2**40)])
    # Neighbouring elements, neighbouring Philox calls.
    rows = torch.cat([rows, rows[:1].roll(1, 1), rows[:1].roll(4, 1)])
    correlation = torch.corrcoef(rows).fill_diagonal_(0)
    assert correlation.abs().max() < 5 / math.sqrt(4096)


def test_noise_does_not_depend_on_the_batch():
    whole = kernels.normal((5, 3, 7), seed=8)
    index = torch.tensor([4, 0])
    assert torch.equal(kernels.normal((2, 3, 7), 8, index), whole[index])
    assert torch.equal(kernels.normal((5, 21), 8), whole.flatten(1))
    assert torch.equal(kernels.normal((5, 4), 8), whole.flatten(1)[:, :4])


# ---------------------------------------------------------------- bad input
def coefficients(**changes):
    return {"transition": arguments(dtype=torch.float32)["transition"]._replace(**changes)}


Z = torch.zeros(3, 4, 5)
BAD = [
    ({"x": Z.bfloat16()}, "x has dtype torch.bfloat16: expected torch.float32"),
    ({"v": torch.zeros(3, 4, 6)}, r"v has shape \(3, 4, 6\): expected \(3, 4, 5\)"),
    ({"v": Z.double()}, "v has dtype torch.float64: expected .*float32 or .*bfloat16 or .*float16"),
    ({"v": torch.zeros(3, 5, 4).mT}, r"v has strides \(20, 1, 4\): expected contiguous samples"),
    ({"v": torch.zeros(3, 4, 5, device="meta")}, "v is on meta: expected cpu"),
    ({"targets": []}, "K = 0"),
    ({"targets": [Z, torch.zeros(3, 5, 4)]}, r"targets\[1\] has shape \(3, 5, 4\): expected \(3, 4, 5\)"),
    ({"alpha": torch.ones(3, 3)}, r"alpha has shape \(3, 3\): expected \(3, 2\)"),
    ({"alpha": -torch.ones(3, 2)}, "alpha = .*expected no negative weight"),
    ({"w": 2.0}, r"w has type float: expected a tensor of shape \(3,\)"),
    (coefficients(std=torch.tensor(math.nan)), "transition.std = nan: expected no negative value"),
    (coefficients(move=torch.tensor([0.5, 0.0, 0.5])), "transition.move = .*: expected no 0"),
    (coefficients(std=torch.ones(3, 1, 1)), r"transition.std has shape \(3, 1, 1\): expected \(3,\)"),
    ({"seed": 3}, "noise and seed = 3 are both given, or neither"),
    ({"noise": None, "seed": -1}, "seed = -1: expected an integer, 0 <= seed"),
    ({"noise": None, "seed": 3, "index": torch.arange(3).int()}, "index has dtype torch.int32"),
    ({"index": torch.arange(3)}, "index is given but noise is too"),
    ({"noise": torch.zeros(3, 4, 4)}, r"noise has shape \(3, 4, 4\)"),
]


@pytest.mark.parametrize("changes, message", BAD, ids=[m for _, m in BAD])
def test_bad_input_is_named(changes, message):
    """By the fused ops too, which would read whatever lies there."""
    opd()
    for mode in ("eager", "triton"):
        with backend(mode), pytest.raises(ValueError, match=message):
            opd(**changes)


def test_backend_switch():
    with pytest.raises(ValueError, match="expected one of"):
        with backend("cuda"):
            pass
    a = arguments()
    with backend("triton"), pytest.raises(ValueError, match="float64"):
        kernels.velocity_mse(a["v"], a["targets"], a["alpha"], a["w"])
    check_values("t", torch.full((1,), -1.0, device="meta"), operator.ge, "never looked at")
