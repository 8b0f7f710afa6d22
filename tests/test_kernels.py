"""The ops on the CPU (eager references), their argument checks and noise, and the commands around the fused kernels."""

import importlib.util
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import kernels
from kernels.checks import readable
from kernels.common import backend
from kernels.noise import philox
from kernels.opd_step import opd_step_reference
from kernels.sde_log_prob import sde_log_prob_reference
from kernels.velocity_mse import velocity_mse_reference
from opd import flow

ROOT = Path(__file__).parents[1]


def run(*command, **environment):
    return subprocess.run([sys.executable, *command], cwd=ROOT, env={**os.environ, "TRITON_INTERPRET": "0", **environment},
                          capture_output=True, text=True)


# ---------------------------------------------------------------- the fused kernels, in processes of their own

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="no triton for this platform")


@needs_triton
def test_fused_kernels_in_the_interpreter():
    """Every test of the fused kernels, and the golden losses of the training loop reproduced through them. Triton's
    interpreter must be chosen before triton is imported, hence the separate process."""
    result = run("-m", "pytest", "tests/test_kernels_fused.py", "tests/test_train.py::test_golden_losses", "-p", "no:cacheprovider",
                 TRITON_INTERPRET="1", FLOW_OPD_KERNELS="triton")
    assert result.returncode == 0 and "100%" in result.stdout, result.stdout[-5000:] + result.stderr[-2000:]


@needs_triton
def test_every_kernel_compiles_for_every_target_without_spills():
    result = run("-m", "kernels.aot")
    assert result.returncode == 0, result.stdout + result.stderr
    assert " 0 spills" in result.stdout
    for name in ("sde_step_kernel", "sde_log_prob_kernel", "sde_log_prob_backward_kernel", "velocity_mse_kernel",
                 "velocity_mse_backward_kernel", "opd_step_kernel", "opd_step_finish_kernel"):
        assert name in result.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here: the benchmark would run")
def test_the_benchmark_says_that_it_needs_a_gpu():
    result = run("-m", "kernels.bench")
    assert result.returncode == 2 and "GPU" in result.stderr and "Traceback" not in result.stderr


@needs_triton
def test_fused_kernels_on_the_cpu_say_what_they_need():
    result = run("-c", "import torch, kernels; z = torch.zeros(1, 4); s = torch.ones(1)\n"
                       "kernels.sde_step(z, z, s, s / 2, s, z)", FLOW_OPD_KERNELS="triton")
    assert result.returncode != 0 and "set TRITON_INTERPRET=1 before Python starts" in result.stderr
    result = run("-c", "import kernels", FLOW_OPD_KERNELS="cuda")
    assert "expected one of ('auto', 'triton', 'eager')" in result.stderr


def test_without_triton_the_eager_ops_still_work():
    """Platforms without a triton wheel: the import finds no such package."""
    code = ("import importlib.util as u; find = u.find_spec\n"
            "u.find_spec = lambda name, *a: None if name == 'triton' else find(name, *a)\n"
            "import torch, kernels; z = torch.zeros(1, 4); s = torch.ones(1)\n"
            "print(kernels.sde_step(z, z, s, s / 2, s, seed=1)[0].shape)")
    result = run("-c", code)
    assert "torch.Size([1, 4])" in result.stdout, result.stderr


# ---------------------------------------------------------------- references


def arguments(shape=(3, 4, 5), teachers=2, dtype=torch.float64):
    g = torch.Generator().manual_seed(0)
    batch = shape[0]
    x, noise, x_next = torch.randn(3, *shape, generator=g, dtype=dtype)
    v, v_uncond = (torch.randn(shape, generator=g, dtype=dtype, requires_grad=True) for _ in range(2))
    targets, targets_uncond = torch.randn(2, teachers, *shape, generator=g, dtype=dtype)
    sigma = torch.linspace(1, 0.3, batch, dtype=dtype)
    sigma_next = sigma - 0.2
    s = flow.diffusion_coefficient(sigma, 0.8, 0.7)
    alpha, w = torch.rand(batch, teachers, generator=g, dtype=dtype), torch.rand(batch, generator=g, dtype=dtype)
    return dict(x=x, noise=noise, x_next=x_next, v=v, v_uncond=v_uncond, targets=targets, targets_uncond=targets_uncond,
                sigma=sigma, sigma_next=sigma_next, s=s, alpha=alpha, w=w)


def test_gradcheck():
    a = arguments()
    a["alpha"][0, 1] = 0
    schedule, targets, unconds = (a["sigma"], a["sigma_next"], a["s"]), list(a["targets"]), list(a["targets_uncond"])
    leaves = (a["v"], a["v_uncond"])
    teachers = unconds, [4.5, 2.0]

    def log_prob(v, u):
        return sde_log_prob_reference(a["x_next"], a["x"], v, *schedule, u, 4.5)

    def loss(v, u):
        return velocity_mse_reference(v, targets, a["alpha"], a["w"], u, 4.5, *teachers)[0]

    def loss_and_step(v, u):
        return opd_step_reference(a["x"], v, targets, a["alpha"], a["w"], *schedule, a["noise"], None, None, u, 4.5, *teachers)[0]

    assert all(torch.autograd.gradcheck(function, leaves) for function in (log_prob, loss, loss_and_step))


def test_velocity_mse_by_hand():
    v, one = torch.tensor([[1.0, 2.0], [0.0, 4.0]]), torch.ones(2, 2)
    alpha, w = torch.tensor([[1.0, 0.5], [0.0, 2.0]]), torch.tensor([3.0, 0.5])
    loss, per_teacher = kernels.velocity_mse(v, [one, 0 * one], alpha, w)
    # sample 0: mean (0, 1)^2 = 0.5 and mean (1, 2)^2 = 2.5; sample 1: not read, and mean (0, 4)^2 = 8
    assert torch.equal(per_teacher, torch.tensor([[0.5, 2.5], [0.0, 8.0]]))
    assert loss == (3 * (0.5 + 0.5 * 2.5) + 0.5 * 2 * 8) / 2


def test_kl_loss_is_the_kl_of_the_transitions_per_dimension():
    """velocity_mse with the `kl` weight = torch.distributions' KL of the two transitions over d, averaged over the batch."""
    a = arguments()
    teacher = a["targets"][0]
    schedule = a["sigma"], a["sigma_next"], a["s"]
    loss, _ = kernels.velocity_mse(a["v"], [teacher], torch.ones(3, 1, dtype=torch.float64), flow.kl_weight(*schedule))
    std = flow.step_std(*schedule)[:, None, None]
    student, expert = (torch.distributions.Normal(flow.sde_mean(a["x"], v, *schedule), std) for v in (a["v"], teacher))
    assert torch.allclose(loss, torch.distributions.kl_divergence(student, expert).mean(), rtol=1e-10)


def test_opd_step_is_its_two_parts_and_keeps_the_state_constant():
    a = arguments(dtype=torch.float32)
    schedule = a["sigma"], a["sigma_next"], a["s"]
    loss, per_teacher, x_next, log_prob = kernels.opd_step(a["x"], a["v"], a["targets"], a["alpha"], a["w"], *schedule, seed=4)
    assert not x_next.requires_grad and not log_prob.requires_grad and not per_teacher.requires_grad
    wanted_loss, wanted_per_teacher = kernels.velocity_mse(a["v"], a["targets"], a["alpha"], a["w"])
    wanted_x, wanted_log_prob = kernels.sde_step(a["x"], a["v"], *schedule, seed=4)
    wanted = wanted_loss, wanted_per_teacher, wanted_x, wanted_log_prob
    assert all(torch.equal(a, b) for a, b in zip((loss, per_teacher, x_next, log_prob), wanted))
    assert torch.allclose(kernels.sde_log_prob(x_next, a["x"], a["v"], *schedule), log_prob)
    ode_x, ode_log_prob = kernels.sde_step(a["x"], a["v"], a["sigma"], a["sigma_next"], 0 * a["s"], seed=4)
    assert torch.allclose(ode_x, flow.ode_step(a["x"], a["v"], a["sigma"], a["sigma_next"])) and (ode_log_prob == math.inf).all()


def test_a_teacher_equal_to_the_student_gives_0():
    a = arguments(teachers=1)
    loss, per_teacher = kernels.velocity_mse(a["v"], [a["v"].detach()], a["alpha"], a["w"])
    loss.backward()
    assert loss == 0 and (per_teacher == 0).all() and (a["v"].grad == 0).all()


def test_teachers_as_one_tensor_as_a_list_and_per_teacher_guidance():
    a = arguments()
    stacked = kernels.velocity_mse(a["v"], a["targets"], a["alpha"], a["w"], targets_uncond=a["targets_uncond"],
                                   target_guidance=torch.tensor([4.5, 2.0]))
    guided = [u + g * (t - u) for t, u, g in zip(a["targets"], a["targets_uncond"], (4.5, 2.0))]
    listed = kernels.velocity_mse(a["v"], guided, a["alpha"], a["w"])
    assert torch.allclose(stacked[0], listed[0]) and torch.allclose(stacked[1], listed[1])
    one = kernels.velocity_mse(a["v"], a["targets"], a["alpha"], a["w"], targets_uncond=[a["targets_uncond"][0], None],
                               target_guidance=[3.0, 1.0])
    assert torch.allclose(one[1][:, 1], ((a["v"] - a["targets"][1]) ** 2).flatten(1).mean(1))


# ---------------------------------------------------------------- noise


def test_philox_known_answers():
    """The three vectors published with the algorithm (Random123, philox4x32 10 rounds)."""
    ones = 0xFFFFFFFF
    for counter, key, words in [((0, 0, 0, 0), 0, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
                                ((ones,) * 4, 2**64 - 1, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
                                ((0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), 0x299F31D0A4093822,
                                 "d16cfe09 94fdcceb 5001e420 24126ea1")]:
        out = philox(key, tuple(torch.tensor([c] * 9) for c in counter))  # 9 lanes: the vectorised and the scalar path
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
    rows = torch.cat([rows, rows[:1].roll(1, 1), rows[:1].roll(4, 1)])  # neighbouring elements, neighbouring Philox calls
    correlation = torch.corrcoef(rows).fill_diagonal_(0)
    assert correlation.abs().max() < 5 / math.sqrt(4096)


def test_noise_does_not_depend_on_the_batch():
    whole = kernels.normal((5, 3, 7), seed=8)
    index = torch.tensor([4, 0])
    assert torch.equal(kernels.normal((2, 3, 7), 8, index), whole[index])
    assert torch.equal(kernels.normal((5, 21), 8), whole.flatten(1))
    assert torch.equal(kernels.normal((5, 4), 8), whole.flatten(1)[:, :4])


def test_split_batch_same_bits():
    a = arguments((6, 3, 33), dtype=torch.float32)
    schedule = a["sigma"], a["sigma_next"], a["s"]
    whole = kernels.sde_step(a["x"], a["v"], *schedule, seed=5)
    halves = [kernels.sde_step(a["x"][r], a["v"][r], *(t[r] for t in schedule), seed=5, index=torch.arange(6)[r])
              for r in (slice(0, 2), slice(2, 6))]
    for output, parts in zip(whole, zip(*halves)):
        assert torch.equal(output, torch.cat(parts))


# ---------------------------------------------------------------- bad input


def opd(**changes):
    a = {**arguments(dtype=torch.float32), "guidance": 4.5, "target_guidance": [4.5, 2.0], **changes}
    keys = ("v_uncond", "guidance", "targets_uncond", "target_guidance", "seed", "index")
    return kernels.opd_step(*(a[k] for k in ("x", "v", "targets", "alpha", "w", "sigma", "sigma_next", "s", "noise")),
                            **{k: a[k] for k in keys if k in a})


Z = torch.zeros(3, 4, 5)
BAD = [(dict(x=Z.bfloat16()), "x has dtype torch.bfloat16: expected float32"),
       (dict(x=torch.zeros(3)), r"x has shape \(3,\)"),
       (dict(x=torch.zeros(0, 4, 5)), r"x has shape \(0, 4, 5\)"),
       (dict(v=torch.zeros(3, 4, 6)), r"v has shape \(3, 4, 6\): expected \(3, 4, 5\), the shape of x"),
       (dict(v=Z.long()), "v has dtype torch.int64"),
       (dict(v=torch.zeros(3, 5, 4).transpose(1, 2)), r"v with shape .* has strides \(20, 1, 4\): each sample must be contiguous"),
       (dict(v=torch.zeros(3, 4, 5, device="meta")), "v is on meta: expected cpu"),
       (dict(v_uncond=Z.half()), "v_uncond has dtype torch.float16: expected torch.float32"),
       (dict(v_uncond=None), "guidance = 4.5 needs v_uncond"),
       (dict(guidance=math.nan), "guidance = nan: expected a finite number"),
       (dict(guidance=torch.ones(3)), "expected a finite number"),
       (dict(targets=[]), "K = 0"),
       (dict(targets=[Z, torch.zeros(3, 5, 4)]), r"targets\[1\] has shape \(3, 5, 4\)"),
       (dict(targets=[Z, None]), r"targets\[1\] is None but alpha\[:, 1\]"),
       (dict(alpha=torch.ones(3, 3)), r"alpha has shape \(3, 3\): expected a tensor of shape \(3, 2\)"),
       (dict(alpha=-torch.ones(3, 2)), "expected non-negative"),
       (dict(w=torch.ones(3, 1)), r"w has shape \(3, 1\): expected a tensor of shape \(3,\)"),
       (dict(w=2.0), "w has type float: expected a tensor"),
       (dict(sigma=torch.tensor([0.5, 0.1, 0.5]), sigma_next=torch.full((3,), 0.2)), "expected 0 <= sigma_next < sigma <= 1"),
       (dict(sigma=torch.full((3,), 1.5)), "expected 0 <= sigma_next < sigma <= 1"),
       (dict(s=-torch.ones(3)), "expected s >= 0"),
       (dict(s=torch.ones(3).long()), "s has dtype torch.int64"),
       (dict(seed=3), "noise is given and seed is 3: expected exactly one"),
       (dict(noise=None), "noise is None and seed is None: expected exactly one"),
       (dict(noise=None, seed=-1), "seed = -1: expected an integer, 0 <= seed"),
       (dict(noise=None, seed=2**63), "expected an integer, 0 <= seed"),
       (dict(noise=None, seed=1.5), "seed = 1.5: expected an integer"),
       (dict(noise=None, seed=3, index=torch.arange(2)), r"index has shape \(2,\)"),
       (dict(noise=None, seed=3, index=torch.arange(3).int()), "dtype torch.int32"),
       (dict(index=torch.arange(3)), "index is given but noise is too"),
       (dict(noise=torch.zeros(3, 4, 4)), r"noise has shape \(3, 4, 4\)"),
       (dict(noise=Z.half()), "noise has dtype torch.float16"),
       (dict(target_guidance=None), "targets_uncond is given without target_guidance"),
       (dict(target_guidance=[4.5]), r"target_guidance = \[4.5\]: expected one finite number or 2"),
       (dict(targets_uncond=None), r"target_guidance\[0\] = 4.5 needs targets_uncond\[0\]"),
       (dict(targets_uncond=[Z]), "targets_uncond has 1 entries: expected 2"),
       (dict(targets_uncond=[Z, torch.zeros(3, 9)]), r"targets_uncond\[1\] has shape \(3, 9\)")]


@pytest.mark.parametrize("changes, message", BAD, ids=[m for _, m in BAD])
def test_bad_input_is_named(changes, message):
    opd()
    with pytest.raises(ValueError, match=message):
        opd(**changes)


def test_log_prob_needs_a_stochastic_step():
    a = arguments(dtype=torch.float32)
    with pytest.raises(ValueError, match="expected s > 0"):
        kernels.sde_log_prob(a["x_next"], a["x"], a["v"], a["sigma"], a["sigma_next"], 0 * a["s"])
    with pytest.raises(ValueError, match=r"x_next has shape \(2, 4, 5\)"):
        kernels.sde_log_prob(a["x_next"][:2], a["x"], a["v"], a["sigma"], a["sigma_next"], a["s"])


def test_backend_switch():
    with pytest.raises(ValueError, match="expected one of"):
        with backend("cuda"):
            pass
    a = arguments()
    with backend("triton"), pytest.raises(ValueError, match="float64"):
        kernels.velocity_mse(a["v"], a["targets"], a["alpha"], a["w"])
    assert readable(torch.zeros(1)) and not readable(torch.zeros(1, device="meta"))
