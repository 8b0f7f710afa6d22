"""What the fused ops share: the choice of backend, the launch, and the device functions (noise, guidance, reductions).

How every op is laid out on the device: a sample's elements are cut into blocks of BLOCK, one program per (sample, block).
A program writes its partial sums to its own slot; a second kernel, one program per sample, adds the slots in order. The
partition depends on the sample's size alone, and there are no atomics: a sample's result has the same bits whatever
else is in the batch, run after run. Offsets are 64-bit.
"""

import contextlib
import importlib.util
import os
from types import SimpleNamespace

import torch
from torch import Tensor

if importlib.util.find_spec("triton"):
    import triton
    import triton.language as tl
else:  # no wheel for this platform: the kernels below stay plain functions that nothing calls
    triton, tl = SimpleNamespace(jit=lambda fn=None, **_: fn or (lambda f: f)), SimpleNamespace(constexpr=None)

BLOCK = 1024  # elements per program; part of the result's bits through the order of summation
CHUNK = 256  # partial sums added at once in the second stage
NUM_WARPS = 8

MODES = ("auto", "triton", "eager")
_mode = os.environ.get("FLOW_OPD_KERNELS", "auto")
if _mode not in MODES:
    raise ValueError(f"FLOW_OPD_KERNELS = {_mode!r}: expected one of {MODES}")


def use_triton(t: Tensor) -> bool:
    """The one dispatch point. auto: accelerator tensors are fused, CPU and float64 tensors take the eager reference."""
    if _mode == "triton" and t.dtype == torch.float64:
        raise ValueError("the fused kernels compute in float32: expected no float64 tensor, or the eager backend")
    return _mode == "triton" or _mode == "auto" and t.is_cuda and t.dtype != torch.float64


@contextlib.contextmanager
def backend(mode: str):
    """Force a backend inside a `with`: "triton" (CPU tensors then need TRITON_INTERPRET=1), "eager", or "auto"."""
    global _mode
    if mode not in MODES:
        raise ValueError(f"backend {mode!r}: expected one of {MODES}")
    before, _mode = _mode, mode
    try:
        yield
    finally:
        _mode = before


recorder = None  # `kernels.aot` sets this to collect the launches instead of running them


def launch(kernel, programs: int, first: Tensor, *args, **constexprs) -> None:
    """Run `kernel` on a 1-D grid on the device of its first argument. Fused multiply-add is off, so that a mean computed
    by two kernels, or by the eager reference, has the same bits; the ops wait for memory, not for arithmetic."""
    if recorder is not None:
        return recorder(kernel, (first, *args), constexprs)
    if first.device.type == "cpu" and isinstance(kernel, triton.runtime.JITFunction):
        raise RuntimeError("fused kernels on CPU tensors run in Triton's interpreter: "
                           "set TRITON_INTERPRET=1 before Python starts")
    with torch.cuda.device_of(first):
        kernel[(programs,)](first, *args, **constexprs, num_warps=NUM_WARPS, enable_fp_fusion=False)


def partition(x: Tensor) -> tuple[int, int, int]:
    """(batch, dimensions per sample, blocks per sample)."""
    dims = x.numel() // x.shape[0]
    return x.shape[0], dims, (dims + BLOCK - 1) // BLOCK


def rows(t: Tensor | None) -> Tensor | None:
    """The kernels step through a sample with stride 1. Checked in Python already; a compiler may have changed it since."""
    return t if t is None or t[0].is_contiguous() else t.contiguous()


def row_stride(t: Tensor | None) -> int:
    return 0 if t is None else t.stride(0)


def per_sample(t: Tensor) -> Tensor:
    """Sigmas, weights and the like: float32, adjacent in memory."""
    return t.detach().float().contiguous()


def adjacent(index: Tensor | None) -> Tensor | None:
    return None if index is None else index.contiguous()


# ---------------------------------------------------------------- device functions


@triton.jit
def block_position(dims, n_blocks, BLOCK: tl.constexpr):
    """Which sample and block this program owns: (sample, block, element offsets in the sample, mask), 64-bit."""
    program = tl.program_id(0).to(tl.int64)
    block = program % n_blocks
    offsets = block * BLOCK + tl.arange(0, BLOCK)
    return program // n_blocks, block, offsets, offsets < dims


@triton.jit
def load_velocity(v_ptr, v_stride, uncond_ptr, uncond_stride, guidance, sample, offsets, mask):
    """Guided velocity v_u + g (v - v_u) in float32, 0 outside the mask; without v_u the velocity itself."""
    v = tl.load(v_ptr + sample * v_stride + offsets, mask=mask, other=0.0).to(tl.float32)
    if uncond_ptr is not None:
        v_uncond = tl.load(uncond_ptr + sample * uncond_stride + offsets, mask=mask, other=0.0).to(tl.float32)
        v = v_uncond + guidance * (v - v_uncond)
    return v


@triton.jit
def transition(sigma_ptr, sigma_next_ptr, s_ptr, sample):
    """Eq. 5-6 for one sample: x_next = keep x - move v + std z. Returns (keep, move, std)."""
    sigma = tl.load(sigma_ptr + sample)
    dt = sigma - tl.load(sigma_next_ptr + sample)
    s = tl.load(s_ptr + sample)
    keep = 1 - tl.div_rn(s * s * dt, 2 * sigma)
    move = dt * (1 + tl.div_rn(s * s * (1 - sigma), 2 * sigma))
    return keep, move, s * tl.sqrt_rn(dt)


@triton.jit
def normal_block(seed, number, block, BLOCK: tl.constexpr):
    """Standard normals for one block of sample `number`: the device side of `kernels.normal`, same counters, same bits."""
    call = block * (BLOCK // 4) + tl.arange(0, BLOCK // 4)
    number = tl.zeros((BLOCK // 4,), tl.int64) + number
    w0, w1, w2, w3 = tl.philox(seed, (call & 0xFFFFFFFF).to(tl.uint32), (call >> 32).to(tl.uint32),
                               (number & 0xFFFFFFFF).to(tl.uint32), (number >> 32).to(tl.uint32))
    z0, z1 = box_muller(w0, w1)
    z2, z3 = box_muller(w2, w3)
    return tl.interleave(tl.interleave(z0, z2), tl.interleave(z1, z3))


@triton.jit
def box_muller(word_a, word_b):
    """Two random 32-bit words -> two standard normals; the constants are 2^-32, 2^-33 and 2 pi 2^-32."""
    radius = tl.sqrt(-2.0 * tl.log(word_a.to(tl.float32) * 2.3283064365386963e-10 + 1.1641532182693481e-10))
    angle = word_b.to(tl.float32) * 1.4629180792671596e-09
    return radius * tl.cos(angle), radius * tl.sin(angle)


@triton.jit
def mean_of_partials(partials_ptr, sample, column, dims, n_blocks, COLUMNS: tl.constexpr, CHUNK: tl.constexpr):
    """Second stage: the sum of one column of a sample's partial sums, in a fixed order, over its dimensions."""
    total = tl.zeros((CHUNK,), tl.float32)
    start = 0
    while start < n_blocks:
        block = start + tl.arange(0, CHUNK)
        slot = (sample * n_blocks + block) * COLUMNS + column
        total += tl.load(partials_ptr + slot, mask=block < n_blocks, other=0.0)
        start += CHUNK
    return tl.div_rn(tl.sum(total), dims * 1.0)


@triton.jit
def gaussian_log_prob(mean_square, std):
    """Eq. 11 per dimension: -|x_next - mean|^2 / (2 std^2 d) - log std - log(2 pi) / 2."""
    return -tl.div_rn(mean_square, 2 * std * std) - tl.log(std) - 0.9189385332046727
