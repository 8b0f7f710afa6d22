"""The fused kernels against a float64 reference: on the GPU where there is one, else in Triton's interpreter.

The interpreter must be chosen before triton is imported, so `tests/test_kernels.py` runs this file in a
process of its own; by hand: TRITON_INTERPRET=1 pytest tests/test_kernels_fused.py
"""

import contextlib
import itertools
import math
import os

import pytest
import torch
from torch.utils._pytree import tree_map

from opd import flow, kernels
from opd.kernels import common
from opd.kernels.common import backend, launch, tl, triton
from opd.kernels.fused import block_position, finish_kernel, forward_op, normal_block
from opd.kernels.noise import box_muller, philox

interpreter = pytest.importorskip("triton.runtime.interpreter")

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
__test__ = INTERPRETED or torch.cuda.is_available()
only_interpreted = pytest.mark.skipif(not INTERPRETED, reason="takes the interpreter apart")

BLOCK = common.BLOCK.value
TRANSITIONS = flow.TRANSITIONS
SMALL = [(1, 1), (5, 7)]
# The last block of a sample is partial, or whole. The interpreter takes 15 ms a block, and three show it all.
PARTIAL, WHOLE, STEPPED = (3, 5, 33, 17), (2, 2, 32, 32), (2, 2, 32, 32)
if not INTERPRETED:
    PARTIAL, WHOLE, STEPPED = (3, 16, 33, 17), (2, 16, 64, 64), (2, 4, 64, 64)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
CASES = list(itertools.product([*SMALL, PARTIAL, WHOLE], DTYPES))
# Every K and both kinds of routing on small shapes; on larger ones once per dtype, and every K in float32.
TEACHER_CASES = [
    (shape, dtype, k, soft)
    for shape, dtype in CASES
    for k in (1, 2, 3, 4)
    for soft in (False, True)
    if shape in SMALL or (k, soft) == (4, False)
]
TEACHER_CASES += [(PARTIAL, torch.float32, k, True) for k in (1, 2, 3)]


@pytest.fixture(autouse=True)
def default_device():
    with contextlib.nullcontext() if INTERPRETED else torch.device(DEVICE):
        yield


@pytest.fixture(autouse=True)
def nearest_bfloat16(monkeypatch):
    """Hardware rounds float32 to bf16 to the nearest; the interpreter truncates, and its error would not be
    the kernels'."""
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

    def __init__(self, shape, dtype, teachers=2, soft=False, kind="sde"):
        g = torch.Generator(DEVICE).manual_seed(0)
        batch = shape[0]
        self.x, self.noise = torch.randn(2, *shape, generator=g)
        self.v = torch.randn(shape, generator=g).to(dtype)
        self.targets = [torch.randn(shape, generator=g).to(dtype) for _ in range(teachers)]
        sigma = torch.linspace(1, 0.2, batch)
        self.transition = TRANSITIONS[kind](sigma, sigma - 0.13, 0.7)
        self.alpha = torch.rand(batch, teachers, generator=g)
        if not soft:
            routes = torch.arange(batch) % teachers
            self.alpha = torch.nn.functional.one_hot(routes, teachers).float()
        self.w = torch.rand(batch, generator=g) + 0.5
        self.upstream_B = torch.randn(batch, generator=g)

    def each(self, change):
        other = object.__new__(Inputs)
        vars(other).update(tree_map(change, vars(self)))
        return other

    def to64(self):
        return self.each(lambda t: t.double())

    def rows(self, keep):
        """The same for some samples, without a copy."""
        return self.each(lambda t: t[keep])

    def leaf(self):
        return self.v.clone().requires_grad_()


def run_sde_step(i):
    return kernels.sde_step(i.x, i.leaf(), i.transition, i.noise)


def run_log_prob(i):
    v = i.leaf()
    x_next = i.x - 0.1 * i.v.to(i.x.dtype) + 0.3 * i.noise
    log_prob = kernels.log_prob(x_next, i.x, v, i.transition)
    log_prob.backward(i.upstream_B)
    return log_prob, v.grad


def run_velocity_mse(i):
    v = i.leaf()
    loss, per_teacher = kernels.velocity_mse(v, i.targets, i.alpha, i.w)
    loss.backward(i.upstream_B)
    return loss, per_teacher, v.grad


def run_opd_step(i):
    v = i.leaf()
    outputs = kernels.opd_step(i.x, v, i.targets, i.alpha, i.w, i.transition, i.noise)
    assert [output.requires_grad for output in outputs] == [True, False, False, False]
    outputs[0].backward(i.upstream_B)
    return *outputs, v.grad


def assert_as_accurate_as_eager(run, inputs):
    """Error against float64 at most twice the eager op's at the same precision. The floor, one unit in the
    last place of the largest value, covers outputs that the eager op happens to hit exactly (a loss, a single
    element)."""
    with backend("triton"):
        fused = run(inputs)
    with backend("eager"):
        eager, exact = run(inputs), run(inputs.to64())
    for f, e, reference in zip(fused, eager, exact, strict=True):
        assert f.dtype == e.dtype and f.shape == e.shape
        finite = reference.isfinite()
        assert torch.equal(f[~finite].double(), reference[~finite])  # the log-probability of an ODE step
        if not finite.any():
            continue
        error = (f.double() - reference)[finite].abs().max()
        allowed = (e.double() - reference)[finite].abs().max()
        floor = torch.finfo(f.dtype).eps * reference[finite].abs().max()
        assert error <= 2 * allowed + floor, f"error {error:.3g}, eager {allowed:.3g}, floor {floor:.3g}"


@pytest.mark.usefixtures("nan_in_fresh_buffers")
@pytest.mark.parametrize("shape, dtype", CASES)
@pytest.mark.parametrize("run", [run_sde_step, run_log_prob])
def test_step_and_log_prob_against_float64(run, shape, dtype):
    assert_as_accurate_as_eager(run, Inputs(shape, dtype))


@pytest.mark.usefixtures("nan_in_fresh_buffers")
@pytest.mark.parametrize("shape, dtype, teachers, soft", TEACHER_CASES)
@pytest.mark.parametrize("run", [run_velocity_mse, run_opd_step])
def test_losses_against_float64(run, shape, dtype, teachers, soft):
    assert_as_accurate_as_eager(run, Inputs(shape, dtype, teachers, soft))


@pytest.mark.usefixtures("nan_in_fresh_buffers")
@pytest.mark.filterwarnings("ignore:.*divide:RuntimeWarning")  # the interpreter's numpy
@pytest.mark.parametrize("shape, dtype", [((5, 7), torch.bfloat16), (PARTIAL, torch.float32)])
@pytest.mark.parametrize("run", [run_sde_step, run_opd_step])
@pytest.mark.parametrize("kind", ["ode", "cps"])
def test_every_transition_against_float64(run, kind, shape, dtype):
    assert_as_accurate_as_eager(run, Inputs(shape, dtype, kind=kind))


# ---------------------------------------------------------------- what is read, what is kept apart
@pytest.mark.parametrize("mode", ["triton", "eager"])
def test_a_teacher_with_alpha_0_is_not_read(mode):
    i = Inputs((4, 3, 5), torch.float32, teachers=3)
    with backend(mode):
        _, wanted, grad = run_velocity_mse(i)
        for k in range(3):
            i.targets[k][i.alpha[:, k] == 0] = math.nan
        loss, per_teacher, grad_again = run_velocity_mse(i)
        assert torch.isfinite(loss).all()
        assert torch.equal(grad, grad_again) and torch.equal(per_teacher, wanted)
        assert (per_teacher[i.alpha == 0] == 0).all() and (per_teacher[i.alpha != 0] > 0).all()


@pytest.mark.parametrize("mode", ["triton", "eager"])
def test_a_teacher_nobody_uses_may_be_absent(mode):
    i = Inputs((4, 3, 5), torch.float32, teachers=3, soft=True)
    i.alpha[:, 1] = 0
    with backend(mode):
        wanted = run_opd_step(i)
        i.targets[1] = None
        assert all(torch.equal(a, b) for a, b in zip(wanted, run_opd_step(i), strict=True))


@pytest.mark.parametrize("mode", ["triton", "eager"])
def test_an_absent_teacher_that_is_used_after_all_gives_nan(mode):
    """On the CPU this is a ValueError; an accelerator or a compiler does not look at alpha, so the op must
    not stay silent about the samples that want the absent teacher."""
    i = Inputs((3, 9), torch.float32)
    i.alpha = torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.0, 2.0]])

    def op(v, target, alpha, w):
        return kernels.velocity_mse(v, [target, None], alpha, w)[0]

    with backend(mode):
        loss = torch.compile(op, backend="eager", fullgraph=True)(i.v, i.targets[0], i.alpha, i.w)
    assert loss.isnan().tolist() == [False, True, True]


def draw(i, index=None, seed=11):
    """Step and loss with drawn noise, and the step alone; with the gradient."""
    v = i.leaf()
    with backend("triton"):
        outputs = kernels.opd_step(i.x, v, i.targets, i.alpha, i.w, i.transition, seed=seed, index=index)
        step = kernels.sde_step(i.x, v, i.transition, seed=seed, index=index)
        outputs[0].backward(i.upstream_B)
    return *outputs, v.grad, *step


@pytest.mark.parametrize("shape", [(5, 7), (5, 3, 33, 17)])
def test_same_bits_twice_and_when_the_batch_is_split(shape):
    i = Inputs(shape, torch.bfloat16, teachers=2, soft=True)
    whole = draw(i)
    assert all(torch.equal(a, b) for a, b in zip(whole, draw(i), strict=True))
    parts = [draw(i.rows(slice(0, 2)), torch.arange(0, 2)), draw(i.rows(slice(2, 5)), torch.arange(2, 5))]
    for w, a, b in zip(whole, *parts, strict=True):
        assert torch.equal(w, torch.cat([a, b]))


@pytest.mark.filterwarnings("ignore:.*divide:RuntimeWarning")
@pytest.mark.parametrize("mode", ["triton", "eager"])
@pytest.mark.parametrize("kind", ["sde", "ode", "cps"])
@pytest.mark.parametrize("shape", [(1, 1), (2, 5, 300), STEPPED, (2, 1023)], ids=str)
def test_step_and_log_prob_agree_to_the_bit(shape, kind, mode):
    """So the importance ratio of an unchanged policy is exactly 1."""
    for dtype in DTYPES:
        i = Inputs(shape, dtype, kind=kind, soft=True)
        with backend(mode):
            for noise in ({"seed": 5}, {"noise": i.noise}):
                x_next, log_prob = kernels.sde_step(i.x, i.v, i.transition, **noise)
                given = (i.x, i.v, i.targets, i.alpha, i.w, i.transition)
                *_, x_again, log_prob_again = kernels.opd_step(*given, **noise)
                wanted = kernels.log_prob(x_next, i.x, i.leaf(), i.transition)
                assert torch.equal(x_next, x_again)
                assert torch.equal(log_prob, wanted) and torch.equal(log_prob_again, wanted)


@pytest.mark.filterwarnings("ignore:.*divide:RuntimeWarning")
@pytest.mark.parametrize("mode", ["triton", "eager"])
@pytest.mark.parametrize("kind", ["sde", "ode", "cps"])
def test_one_coefficient_for_all_is_one_per_sample(kind, mode):
    """A grid's float64 coefficients on the CPU, 0-dim, give the bits of float32 ones, one per sample, on the
    device."""
    i = Inputs((4, 3, 50), torch.float32, soft=True)
    sigma = torch.tensor([0.83, 0.61], dtype=torch.float64, device="cpu")
    one = TRANSITIONS[kind](sigma[0], sigma[1], 0.7)
    results = []
    for transition in (one, flow.Transition(*(t.float().to(DEVICE).expand(4) for t in one))):
        i.transition = transition
        with backend(mode):
            results.append(run_opd_step(i) + run_sde_step(i) + run_log_prob(i)[:1])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_batch_strides_are_free():
    """Slices over the batch and one expanded sample need no copy."""
    i = Inputs((6, 4, 50), torch.bfloat16, soft=True)
    every_other = i.rows(slice(0, 6, 2))
    assert not every_other.x.is_contiguous()
    copied = every_other.rows([0, 1, 2])
    assert copied.x.is_contiguous()
    index = torch.tensor([0, 2, 4])
    results = draw(every_other, index), draw(copied, index)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert all(torch.equal(a, b[::2]) for a, b in zip(results[0], draw(i), strict=True))
    with backend("triton"):
        one = every_other.targets[0][:1]
        ones, w = torch.ones(3, 1), every_other.w
        expanded = kernels.velocity_mse(every_other.v, [one.expand(3, 4, 50)], ones, w)
        repeated = kernels.velocity_mse(every_other.v, [one.repeat(3, 1, 1)], ones, w)
        assert torch.equal(expanded[0], repeated[0])


def test_more_blocks_than_one_chunk():
    """The second stage walks 600 partial sums per sample and column in chunks of 256."""
    partials, alpha = torch.rand(2, 600, 3), torch.rand(2, 2)
    means, distance, dims = torch.empty(2, 3), torch.empty(2), 600 * BLOCK - 5
    launch(finish_kernel, 2, means, partials, alpha, means, distance, dims, 600, K=2, COLUMNS=3)
    expected = partials.double().sum(1) / dims
    assert torch.allclose(means.double(), expected, rtol=1e-6)
    assert torch.allclose(distance.double(), (alpha * expected[:, :2]).sum(1), rtol=1e-6)


# ---------------------------------------------------------------- noise drawn in the kernel
@triton.jit
def normals_kernel(out_ptr, seed, number, block, BLOCK: tl.constexpr):
    tl.store(out_ptr + tl.arange(0, BLOCK), normal_block(seed, number, block.to(tl.int64)))


# The last two blocks start beyond element 2^32, and beyond call 2^32 of the generator.
FAR_OUT = [(0, 0, 0), (1, 2, 3), (2**40 + 7, 2**33 + 1, 2**23), (2**63 - 1, 2**35 + 1, 2**24 + 1)]


@pytest.mark.parametrize("seed, number, block", FAR_OUT)
def test_a_block_of_normals_far_out(seed, number, block):
    """64-bit seeds, sample numbers and element counters."""
    out = torch.zeros(BLOCK)
    normals_kernel[(1,)](out, seed, number, block, BLOCK)
    c = block * (BLOCK // 4) + torch.arange(BLOCK // 4)
    n = torch.full_like(c, number)
    w0, w1, w2, w3 = philox(seed, (c & 0xFFFFFFFF, c >> 32, n & 0xFFFFFFFF, n >> 32))
    expected = torch.stack((*box_muller(w0, w1), *box_muller(w2, w3)), 1).flatten()
    assert torch.allclose(out, expected, atol=5e-6, rtol=0)


@triton.jit
def position_kernel(out_ptr, dims, n_blocks, BLOCK: tl.constexpr):
    sample, block, offsets, mask = block_position(dims, n_blocks)
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


def test_kernel_noise_is_kernels_normal():
    """x = v = 0 and std = 1: x_next is the noise itself."""
    shape, one = (3, 2, 33, 17), torch.tensor(1.0)
    zeros = torch.zeros(shape)
    with backend("triton"):
        noise, _ = kernels.sde_step(zeros, zeros, flow.Transition(one, one, one), seed=123)
    expected = kernels.normal(shape, 123, device=DEVICE)
    assert torch.allclose(noise, expected, atol=5e-6, rtol=0)  # log, sin, cos of two libraries


# ---------------------------------------------------------------- the dispatcher and the compiler
def op_calls():
    i = Inputs((3, 4, 5), torch.float32, soft=True)
    v, transition, nobody = i.leaf(), list(i.transition), i.x.new_zeros(3, 0)
    return {
        "step": (i.v, [], nobody, i.x, transition, i.noise, 0, None, False),
        "step_drawn": (i.v, [], nobody, i.x, transition, None, 3, torch.arange(3), False),
        "loss": (v, i.targets, i.alpha, None, [], None, 0, None, True),
        "loss_without_gradient": (i.v, i.targets, i.alpha, None, [], None, 0, None, False),
        "loss_and_step": (v, i.targets, i.alpha, i.x, transition, None, 3, None, True),
    }


@pytest.mark.parametrize("name", ["step", "step_drawn", "loss", "loss_without_gradient", "loss_and_step"])
def test_opcheck(name):
    """Schema, fake tensors, autograd registration, and AOT dispatch with dynamic shapes."""
    torch.library.opcheck(forward_op, op_calls()[name])


def one_step(i, v, seed):
    loss, _, x_next, log_prob = kernels.opd_step(i.x, v, i.targets, i.alpha, i.w, i.transition, seed=seed)
    ratio = kernels.log_prob(x_next, i.x, v, i.transition) - log_prob
    losses = loss + 2 * kernels.velocity_mse(v, i.targets, i.alpha, i.w)[0] + ratio.exp()
    return losses, kernels.sde_step(x_next, v, i.transition, seed=seed)[0]


def test_compiles_into_one_graph():
    i = Inputs((3, 4, 5), torch.float32, soft=True)
    results = []
    with backend("triton"):
        for function in (one_step, torch.compile(one_step, backend="aot_eager", fullgraph=True)):
            v = i.leaf()
            losses, x_next = function(i, v, 9)
            losses.backward(i.upstream_B)
            results.append((losses, x_next, v.grad))
    assert all(torch.allclose(a, b, rtol=1e-6) for a, b in zip(*results, strict=True))
