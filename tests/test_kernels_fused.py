"""The fused kernels against a float64 reference: on the GPU where there is one, else on the CPU in Triton's interpreter.

The interpreter must be chosen before triton is imported, so `tests/test_kernels.py` runs this file in a process of its own;
by hand: TRITON_INTERPRET=1 pytest tests/test_kernels_fused.py
"""

import contextlib
import itertools
import math
import os

import pytest
import torch

import kernels
from kernels.common import BLOCK, CHUNK, backend, block_position, launch, normal_block, tl, triton
from kernels.noise import box_muller, philox
from kernels.opd_step import opd_step_op
from kernels.sde_log_prob import sde_log_prob_backward_op, sde_log_prob_op
from kernels.sde_step import sde_step_finish_kernel, sde_step_op
from kernels.velocity_mse import velocity_mse_backward_op, velocity_mse_op
from opd import flow

interpreter = pytest.importorskip("triton.runtime.interpreter")

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
__test__ = INTERPRETED or torch.cuda.is_available()
only_interpreted = pytest.mark.skipif(not INTERPRETED, reason="takes the interpreter apart, or trains on the CPU")

SHAPES = [(1, 1), (5, 7), (3, 16, 33, 17), (2, 16, 64, 64)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
CASES = list(itertools.product(SHAPES, DTYPES, [1.0, 4.5]))
# Every K and both kinds of routing on the shapes that are quick to interpret; the largest once per dtype and guidance.
TEACHER_CASES = [(shape, dtype, g, k, soft) for shape, dtype, g in CASES for k in (1, 2, 3, 4) for soft in (False, True)
                 if math.prod(shape) < 10_000 or (k, soft) == (4, False)]
TEACHER_CASES += [((3, 16, 33, 17), torch.float32, 4.5, k, True) for k in (1, 2, 3)]


@pytest.fixture(autouse=True)
def default_device():
    with contextlib.nullcontext() if INTERPRETED else torch.device(DEVICE):
        yield


@pytest.fixture(autouse=True)
def nearest_bfloat16(monkeypatch):
    """Hardware rounds float32 to bf16 to the nearest; the interpreter truncates, and its error would not be the kernels'."""
    original = interpreter._convert_float

    def convert(data, source, destination, rounding):
        if source == tl.float32 and destination == tl.bfloat16:
            return torch.tensor(data).bfloat16().view(torch.int16).numpy().view("uint16")
        return original(data, source, destination, rounding)
    monkeypatch.setattr(interpreter, "_convert_float", convert)


@pytest.fixture
def nan_in_fresh_buffers(monkeypatch):
    """Whatever a kernel does not write shows as NaN."""
    for name in ("empty", "empty_like"):
        original = getattr(torch, name)

        def filled(*args, original=original, **kwargs):
            t = original(*args, **kwargs)
            return t.fill_(math.nan) if t.is_floating_point() else t
        monkeypatch.setattr(torch, name, filled)


class Inputs:
    """Random arguments of every op; `.to64()` holds the same numbers in float64."""

    def __init__(self, shape, dtype, guidance, teachers=2, soft=False):
        g = torch.Generator(DEVICE).manual_seed(0)
        batch = shape[0]
        self.x, self.noise = torch.randn(2, *shape, generator=g)
        self.v, self.v_uncond = (torch.randn(shape, generator=g).to(dtype) for _ in range(2))
        self.targets = [torch.randn(shape, generator=g).to(dtype) for _ in range(teachers)]
        self.targets_uncond = [torch.randn(shape, generator=g).to(dtype) for _ in range(teachers)]
        self.sigma = torch.linspace(1, 0.2, batch)
        self.sigma_next = self.sigma - 0.13
        self.s = flow.diffusion_coefficient(self.sigma, 0.87, 0.7)
        self.alpha = torch.rand(batch, teachers, generator=g)
        if not soft:
            self.alpha = torch.nn.functional.one_hot(torch.arange(batch) % teachers, teachers).float()
        self.w = flow.kl_weight(self.sigma, self.sigma_next, self.s)
        self.upstream, self.upstream_B = torch.randn((), generator=g), torch.randn(batch, generator=g)
        self.guidance = guidance

    def to64(self):
        other = object.__new__(Inputs)
        for name, value in vars(self).items():
            other.__dict__[name] = ([t.double() for t in value] if isinstance(value, list)
                                    else value.double() if isinstance(value, torch.Tensor) else value)
        return other

    def policy(self):
        """v and v_uncond as fresh leaves, and the keywords of the guided policy and its teachers."""
        v = self.v.clone().requires_grad_()
        if self.guidance == 1.0:
            return v, None, {}, {}
        v_uncond = self.v_uncond.clone().requires_grad_()
        teachers = dict(targets_uncond=self.targets_uncond, target_guidance=[4.5, 1.0, 2.0, 3.5][:len(self.targets)])
        return v, v_uncond, dict(v_uncond=v_uncond, guidance=self.guidance), teachers

    def schedule(self):
        return self.sigma, self.sigma_next, self.s


def run_sde_step(i):
    v, _, policy, _ = i.policy()
    return kernels.sde_step(i.x, v, *i.schedule(), i.noise, **policy)


def run_sde_log_prob(i):
    v, v_uncond, policy, _ = i.policy()
    x_next = i.x - 0.1 * i.v.to(i.x.dtype) + 0.3 * i.noise
    log_prob = kernels.sde_log_prob(x_next, i.x, v, *i.schedule(), **policy)
    log_prob.backward(i.upstream_B)
    return log_prob, v.grad, *([] if v_uncond is None else [v_uncond.grad])


def run_velocity_mse(i):
    v, v_uncond, policy, teachers = i.policy()
    loss, per_teacher = kernels.velocity_mse(v, i.targets, i.alpha, i.w, **policy, **teachers)
    loss.backward(i.upstream)
    return loss, per_teacher, v.grad, *([] if v_uncond is None else [v_uncond.grad])


def run_opd_step(i):
    v, v_uncond, policy, teachers = i.policy()
    loss, per_teacher, x_next, log_prob = kernels.opd_step(i.x, v, i.targets, i.alpha, i.w, *i.schedule(), i.noise, **policy,
                                                           **teachers)
    assert not (per_teacher.requires_grad or x_next.requires_grad or log_prob.requires_grad)
    loss.backward(i.upstream)
    return loss, per_teacher, x_next, log_prob, v.grad, *([] if v_uncond is None else [v_uncond.grad])


def assert_as_accurate_as_eager(run, inputs):
    """Error against float64 at most twice the eager op's at the same precision. The floor, one unit in the last place of
    the largest value, covers outputs that the eager op happens to hit exactly (a scalar loss, a single element)."""
    with backend("triton"):
        fused = run(inputs)
    with backend("eager"):
        eager, exact = run(inputs), run(inputs.to64())
    for f, e, reference in zip(fused, eager, exact, strict=True):
        assert f.dtype == e.dtype and f.shape == e.shape
        error, allowed = (f.double() - reference).abs().max(), (e.double() - reference).abs().max()
        floor = torch.finfo(f.dtype).eps * reference.abs().max()
        assert error <= 2 * allowed + floor, f"error {error:.3g}, eager {allowed:.3g}, floor {floor:.3g}"


@pytest.mark.usefixtures("nan_in_fresh_buffers")
@pytest.mark.parametrize("shape, dtype, guidance", CASES)
@pytest.mark.parametrize("run", [run_sde_step, run_sde_log_prob])
def test_step_and_log_prob_against_float64(run, shape, dtype, guidance):
    assert_as_accurate_as_eager(run, Inputs(shape, dtype, guidance))


@pytest.mark.usefixtures("nan_in_fresh_buffers")
@pytest.mark.parametrize("shape, dtype, guidance, teachers, soft", TEACHER_CASES)
@pytest.mark.parametrize("run", [run_velocity_mse, run_opd_step])
def test_losses_against_float64(run, shape, dtype, guidance, teachers, soft):
    assert_as_accurate_as_eager(run, Inputs(shape, dtype, guidance, teachers, soft))


# ---------------------------------------------------------------- what is read, what is kept apart


@pytest.mark.parametrize("mode", ["triton", "eager"])
def test_a_teacher_with_alpha_0_is_not_read(mode):
    i = Inputs((4, 3, 5), torch.float32, 1.0, teachers=3)
    with backend(mode):
        _, wanted, grad = run_velocity_mse(i)
        for k in range(3):
            i.targets[k][i.alpha[:, k] == 0] = math.nan
        loss, per_teacher, grad_again = run_velocity_mse(i)
        assert torch.isfinite(loss) and torch.equal(grad, grad_again) and torch.equal(per_teacher, wanted)
        assert (per_teacher[i.alpha == 0] == 0).all() and (per_teacher[i.alpha != 0] > 0).all()


@pytest.mark.parametrize("mode", ["triton", "eager"])
def test_a_teacher_nobody_uses_may_be_absent(mode):
    i = Inputs((4, 3, 5), torch.float32, 4.5, teachers=3, soft=True)
    i.alpha[:, 1] = 0
    with backend(mode):
        wanted = run_opd_step(i)
        i.targets[1] = i.targets_uncond[1] = None
        assert all(torch.equal(a, b) for a, b in zip(wanted, run_opd_step(i)))


def test_an_absent_teacher_that_is_used_after_all_gives_nan():
    """On the CPU this is a ValueError; an accelerator does not look at alpha, so the kernel must not stay silent."""
    i = Inputs((2, 9), torch.float32, 1.0)
    args = [[i.targets[0], i.v.new_empty(0)], [i.v.new_empty(0)] * 2, torch.ones(2, 2), i.w, 1.0, [1.0, 1.0], False]
    assert velocity_mse_op(i.v, None, *args)[0].isnan()


def draw(i, rows=slice(None), seed=11):
    """The fused step and loss of some rows, as ops, so that the unscaled gradient is seen too."""
    absent, k = [i.v.new_empty(0)] * len(i.targets), len(i.targets)
    index = torch.arange(len(i.x))[rows]
    schedule = [t[rows] for t in i.schedule()]
    loss, *outputs = opd_step_op(i.v[rows], i.v_uncond[rows], [t[rows] for t in i.targets], absent, i.alpha[rows], i.w[rows], 4.5,
                                 [1.0] * k, i.x[rows], *schedule, None, seed, index, True)
    return loss, *outputs, *sde_step_op(i.x[rows], i.v[rows], None, *schedule, None, seed, index, 1.0)


@pytest.mark.parametrize("shape", [(5, 7), (5, 3, 33, 17)])
def test_same_bits_twice_and_when_the_batch_is_split(shape):
    i = Inputs(shape, torch.bfloat16, 4.5, teachers=2, soft=True)
    whole = draw(i)
    assert all(torch.equal(a, b) for a, b in zip(whole, draw(i)))
    first, second = draw(i, slice(0, 2)), draw(i, slice(2, 5))
    for w, a, b in zip(whole[1:], first[1:], second[1:]):
        assert torch.equal(w, torch.cat([a, b]))


def test_step_and_log_prob_agree_to_the_bit():
    """So the importance ratio of an unchanged policy is exactly 1."""
    i = Inputs((3, 5, 300), torch.bfloat16, 4.5)
    with backend("triton"):
        v, _, policy, _ = i.policy()
        x_next, log_prob = kernels.sde_step(i.x, v, *i.schedule(), seed=5, **policy)
        assert torch.equal(log_prob, kernels.sde_log_prob(x_next, i.x, v, *i.schedule(), **policy))


@pytest.mark.filterwarnings("ignore:.*divide:RuntimeWarning")  # the interpreter's numpy on 0/0 and log 0
def test_ode_step_at_s_0():
    i = Inputs((3, 40), torch.float32, 1.0)
    with backend("triton"):
        x_next, log_prob = kernels.sde_step(i.x, i.v, i.sigma, i.sigma_next, 0 * i.s, i.noise)
    assert torch.equal(x_next, flow.ode_step(i.x, i.v, i.sigma, i.sigma_next)) and (log_prob == math.inf).all()


def test_batch_strides_are_free():
    """Slices over the batch, the two halves of a guidance batch and one expanded sample need no copy."""
    i = Inputs((6, 4, 50), torch.bfloat16, 4.5, soft=True)
    wanted = draw(i, slice(0, 6, 2))
    i.x, i.v, i.targets = i.x[::2], i.v[::2], [t[::2] for t in i.targets]
    i.v_uncond, i.alpha, i.w = i.v_uncond[::2], i.alpha[::2], i.w[::2]
    i.sigma, i.sigma_next, i.s = i.sigma[::2], i.sigma_next[::2], i.s[::2]
    assert not i.x.is_contiguous()
    with backend("triton"):
        v, _, policy, _ = i.policy()
        _, per_teacher, x_next, log_prob = kernels.opd_step(i.x, v, i.targets, i.alpha, i.w, *i.schedule(), seed=11,
                                                            index=torch.tensor([0, 2, 4]), **policy)
        assert torch.equal(x_next, wanted[2]) and torch.equal(log_prob, wanted[3]) and torch.equal(per_teacher, wanted[1])
        expanded = kernels.velocity_mse(i.v, [i.targets[0][:1].expand(3, 4, 50)], torch.ones(3, 1), i.w)
        copied = kernels.velocity_mse(i.v, [i.targets[0][:1].repeat(3, 1, 1)], torch.ones(3, 1), i.w)
        assert torch.equal(expanded[0], copied[0])


def test_more_blocks_than_one_chunk():
    """The second stage walks 600 partial sums per sample in chunks of 256."""
    partials, schedule = torch.rand(2, 600), (torch.full((2,), 0.8), torch.full((2,), 0.7), torch.tensor([0.5, 2.0]))
    log_prob, dims = torch.empty(2), 600 * BLOCK - 5
    launch(sde_step_finish_kernel, 2, partials, *schedule, log_prob, dims, 600, CHUNK=CHUNK)
    std = flow.step_std(*schedule).double()
    expected = -partials.double().sum(1) / dims / (2 * std**2) - std.log() - 0.5 * math.log(2 * math.pi)
    assert torch.allclose(log_prob.double(), expected, rtol=1e-6)


# ---------------------------------------------------------------- noise drawn in the kernel


@triton.jit
def words_kernel(out_ptr, seed, call, number, N: tl.constexpr):
    c = call + tl.arange(0, N).to(tl.int64)
    n = tl.zeros((N,), tl.int64) + number
    words = tl.philox(seed, (c & 0xFFFFFFFF).to(tl.uint32), (c >> 32).to(tl.uint32),
                      (n & 0xFFFFFFFF).to(tl.uint32), (n >> 32).to(tl.uint32))
    for j in tl.static_range(4):
        tl.store(out_ptr + j * N + tl.arange(0, N), words[j].to(tl.int64))


@triton.jit
def normals_kernel(out_ptr, seed, number, block, BLOCK: tl.constexpr):
    tl.store(out_ptr + tl.arange(0, BLOCK), normal_block(seed, number, block.to(tl.int64), BLOCK))


@pytest.mark.parametrize("seed, number, call", [(0, 0, 0), (1, 2, 3), (2**40 + 7, 5, 2**31 - 8), (2**63 - 1, 2**35 + 1, 2**32 - 8)])
def test_philox_words_are_those_of_the_eager_stream(seed, number, call):
    """64-bit seeds, sample numbers beyond 2^32, element counters that cross 2^32."""
    words = torch.zeros(4, 16, dtype=torch.int64)
    words_kernel[(1,)](words, seed, call, number, 16)
    c = call + torch.arange(16)
    n = torch.full_like(c, number)
    expected = philox(seed, (c & 0xFFFFFFFF, c >> 32, n & 0xFFFFFFFF, n >> 32))
    assert torch.equal(words, torch.stack(expected))


def test_a_block_of_normals_far_out():
    """Element offsets beyond 2^32: block 2^23 of 1024 elements starts at element 2^33."""
    out = torch.zeros(BLOCK)
    number, block = 2**33 + 1, 2**23
    normals_kernel[(1,)](out, 7, number, block, BLOCK)
    c = block * (BLOCK // 4) + torch.arange(BLOCK // 4)
    n = torch.full_like(c, number)
    w0, w1, w2, w3 = philox(7, (c & 0xFFFFFFFF, c >> 32, n & 0xFFFFFFFF, n >> 32))
    expected = torch.stack((*box_muller(w0, w1), *box_muller(w2, w3)), 1).flatten()
    assert torch.allclose(out, expected, atol=5e-6, rtol=0)


@triton.jit
def position_kernel(out_ptr, dims, n_blocks, BLOCK: tl.constexpr):
    sample, block, offsets, mask = block_position(dims, n_blocks, BLOCK)
    tl.store(out_ptr + tl.arange(0, BLOCK), sample * dims + offsets, mask=mask)


@only_interpreted
def test_offsets_are_64_bit(monkeypatch):
    """Program 15 000 000 of samples with 10^10 elements: block 5 234 374 of sample 1, far beyond 2^32."""
    dims, program = 10**10, 15_000_000
    n_blocks = -(-dims // BLOCK)
    create = interpreter.interpreter_builder.create_get_program_id

    def far_out(axis):
        handle = create(axis)
        handle.data[...] = program
        return handle
    monkeypatch.setattr(interpreter.interpreter_builder, "create_get_program_id", far_out)
    out = torch.zeros(BLOCK, dtype=torch.int64)
    position_kernel[(1,)](out, dims, n_blocks, BLOCK)
    sample, block = divmod(program, n_blocks)
    assert sample == 1 and torch.equal(out, sample * dims + block * BLOCK + torch.arange(BLOCK))


def kernel_noise(shape, seed):
    """x = v = 0 and s sqrt(D) = 1: x_next is the noise itself."""
    zeros, batch = torch.zeros(shape), shape[0]
    sigma, sigma_next, s = (torch.full((batch,), value) for value in (0.75, 0.5, 2.0))
    with backend("triton"):
        return kernels.sde_step(zeros, zeros, sigma, sigma_next, s, seed=seed)[0]


def test_kernel_noise_is_kernels_normal():
    noise = kernel_noise((3, 2, 33, 17), seed=123)
    assert torch.allclose(noise, kernels.normal((3, 2, 33, 17), 123, device=DEVICE), atol=5e-6, rtol=0)  # log, sin, cos of two libraries


def test_kernel_noise_is_normal_and_independent():
    """Moments within 5 standard errors; Kolmogorov-Smirnov below its 0.1 % point (1.95 / sqrt n); rows uncorrelated."""
    noise = torch.cat([kernel_noise((4, 8192), seed) for seed in (0, 1)])
    z = noise.flatten().double()
    n = len(z)
    for power, moment, variance in [(1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)]:
        assert abs((z**power).mean() - moment) < 5 * math.sqrt(variance / n)
    cdf = 0.5 * (1 + torch.erf(z.sort().values / math.sqrt(2)))
    rank = torch.arange(n + 1, dtype=torch.float64) / n
    assert max((rank[1:] - cdf).max(), (cdf - rank[:-1]).max()) < 1.95 / math.sqrt(n)
    assert torch.corrcoef(noise).fill_diagonal_(0).abs().max() < 5 / math.sqrt(8192)


# ---------------------------------------------------------------- the dispatcher and the compiler


def op_calls():
    i = Inputs((3, 4, 5), torch.float32, 4.5, soft=True)
    v, v_uncond = i.v.requires_grad_(), i.v_uncond.requires_grad_()
    empty = [i.v.new_zeros(0)] * 2
    losses = (i.targets, i.targets_uncond, i.alpha, i.w, 4.5, [4.5, 2.0])
    return {"sde_step": (sde_step_op, (i.x, i.v.detach(), i.v_uncond.detach(), *i.schedule(), i.noise, 0, None, 4.5)),
            "sde_step_drawn": (sde_step_op, (i.x, i.v.detach(), None, *i.schedule(), None, 3, torch.arange(3), 1.0)),
            "sde_log_prob": (sde_log_prob_op, (i.noise, i.x, v, v_uncond, *i.schedule(), 4.5)),
            "sde_log_prob_backward": (sde_log_prob_backward_op, (i.upstream_B, i.noise, i.x, i.v.detach(), None, *i.schedule(), 1.0)),
            "velocity_mse": (velocity_mse_op, (v, v_uncond, *losses, True)),
            "velocity_mse_plain": (velocity_mse_op, (v, None, i.targets, empty, i.alpha, i.w, 1.0, [1.0, 1.0], True)),
            "velocity_mse_backward": (velocity_mse_backward_op, (i.upstream, i.x, i.w, 4.5, True)),
            "opd_step": (opd_step_op, (v, v_uncond, *losses, i.x, *i.schedule(), None, 3, None, True))}


@pytest.mark.parametrize("name", ["sde_step", "sde_step_drawn", "sde_log_prob", "sde_log_prob_backward", "velocity_mse",
                                  "velocity_mse_plain", "velocity_mse_backward", "opd_step"])
def test_opcheck(name):
    """Schema, fake tensors, autograd registration, and AOT dispatch with dynamic shapes."""
    torch.library.opcheck(*op_calls()[name])


def one_step(i, v, v_uncond, seed):
    loss, _, x_next, log_prob = kernels.opd_step(i.x, v, i.targets, i.alpha, i.w, *i.schedule(), seed=seed, v_uncond=v_uncond,
                                                 guidance=4.5)
    ratio = kernels.sde_log_prob(x_next, i.x, v, *i.schedule(), v_uncond=v_uncond, guidance=4.5) - log_prob
    return loss + 2 * kernels.velocity_mse(v, i.targets, i.alpha, i.w)[0] + ratio.exp().sum(), x_next


def test_compiles_into_one_graph():
    i = Inputs((3, 4, 5), torch.float32, 4.5, soft=True)
    results = []
    with backend("triton"):
        for function in (one_step, torch.compile(one_step, backend="aot_eager", fullgraph=True)):
            v, v_uncond, _, _ = i.policy()
            loss, x_next = function(i, v, v_uncond, 9)
            loss.backward()
            results.append((loss, x_next, v.grad, v_uncond.grad))
    assert all(torch.allclose(a, b, rtol=1e-6) for a, b in zip(*results))


def test_fake_tensors():
    from torch._subclasses.fake_tensor import FakeTensorMode
    i = Inputs((3, 4, 5), torch.bfloat16, 1.0)
    with FakeTensorMode() as mode, backend("triton"):
        fake = [mode.from_tensor(t) for t in (i.x, i.v, *i.targets, i.alpha, i.w, *i.schedule())]
        x, v, t0, t1, alpha, w, *schedule = fake
        loss, per_teacher, x_next, log_prob = kernels.opd_step(x, v.requires_grad_(), [t0, t1], alpha, w, *schedule, seed=1)
        loss.backward()
    assert (loss.shape, per_teacher.shape, x_next.shape, log_prob.shape) == ((), (3, 2), (3, 4, 5), (3,))
    assert x_next.dtype == torch.float32 and v.grad.dtype == torch.bfloat16


# ---------------------------------------------------------------- in the training loop


@only_interpreted
@pytest.mark.parametrize("changes", [{}, {"guidance": 2.0, "teacher_guidance": 3.0}, {"single_pass": False}, {"rollout": "ode"}], ids=str)
def test_a_training_step_has_the_eager_loss_and_gradient(world, changes):
    """One step of the tiny model through the loop's own code. The two differ by the rounding of float32 sums and of the
    noise's logarithm and cosine, about 1e-6, far inside the 2e-4 that the golden losses allow."""
    import train
    from opd import config, ranks
    from tests import tiny

    def step(mode):
        cfg = tiny.config(world, **changes)
        config.check(cfg, 1)
        m, data = train.build(cfg, ranks.start())
        trained = train.Trained(cfg, m)
        with backend(mode):
            row = train.opd_metrics(cfg, m, train.opd_gradients(cfg, m, data, 0))
        return row["loss"], torch.cat([ranks.full(p.grad).flatten() for p in trained.parameters.values()])

    (fused_loss, fused), (eager_loss, eager) = step("triton"), step("eager")
    assert fused_loss == pytest.approx(eager_loss, rel=1e-5)
    assert eager.norm() > 1e-4 and (fused - eager).norm() < 1e-5 * eager.norm()
