"""What the fused kernels share: the choice of backend, the launch, and how tensors are handed to a kernel."""

import contextlib
import importlib.util
import os
from types import SimpleNamespace

import torch
from torch import Tensor

if importlib.util.find_spec("triton"):
    import triton
    import triton.language as tl
else:  # no wheel for this platform: the kernels stay plain functions that nothing calls
    triton = SimpleNamespace(jit=lambda function=None, **_: function or (lambda f: f))
    tl = SimpleNamespace(constexpr=int)

BLOCK = tl.constexpr(1024)  # elements per program; part of the result's bits through the order of summation
CHUNK = tl.constexpr(256)  # partial sums added at once in the second stage
NUM_WARPS = 8

MODES = ("auto", "triton", "eager")
_mode = os.environ.get("FLOW_OPD_KERNELS", "auto")
if _mode not in MODES:
    raise ValueError(f"FLOW_OPD_KERNELS = {_mode!r}: expected one of {MODES}")


def use_triton(t: Tensor) -> bool:
    """The one dispatch point. auto: accelerator tensors are fused; CPU and float64 tensors are not."""
    if _mode == "triton" and t.dtype == torch.float64:
        raise ValueError("fused kernels compute in float32: expected no float64 tensor, or backend eager")
    return _mode == "triton" or (_mode == "auto" and t.is_cuda and t.dtype != torch.float64)


@contextlib.contextmanager
def backend(mode: str):
    """Force a backend inside a `with`: one of MODES. "triton" on CPU tensors needs TRITON_INTERPRET=1."""
    global _mode
    if mode not in MODES:
        raise ValueError(f"backend {mode!r}: expected one of {MODES}")
    before, _mode = _mode, mode
    try:
        yield
    finally:
        _mode = before


recorder = None  # tests/kernels_aot.py sets this to collect the launches instead of running them


def launch(kernel, programs: int, like: Tensor, *args, **constexprs) -> None:
    """Run `kernel` on a 1-D grid on the device of `like`. Fused multiply-add is off, so that a kernel and the
    eager equations compute the same bits; the ops wait for memory, not for arithmetic."""
    if recorder is not None:
        return recorder(kernel, args, constexprs)
    if like.device.type == "cpu" and isinstance(kernel, triton.runtime.JITFunction):
        raise RuntimeError("kernels on the CPU are interpreted: set TRITON_INTERPRET=1 before Python starts")
    with torch.cuda.device_of(like):
        kernel[(programs,)](*args, **constexprs, num_warps=NUM_WARPS, enable_fp_fusion=False)


def rows(t: Tensor | None) -> tuple:
    """A batch as the kernels take it: (where it starts, stride from sample to sample), or () for None. Each
    sample is contiguous: checked in Python already, but a compiler may have changed it since."""
    if t is None:
        return ()
    if not t[0].is_contiguous():
        t = t.contiguous()
    return t, t.stride(0)
