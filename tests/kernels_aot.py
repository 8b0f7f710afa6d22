"""Compile every kernel for every target, without a GPU, and print registers and spills.

    python -m tests.kernels_aot

The launches are recorded from the ops themselves, so what is compiled is what runs: every op, 1 to 4
teachers, noise given and drawn, sizes that vectorise and sizes that do not. NVIDIA's numbers are those of
`ptxas -v` (shipped with triton), AMD's those in the assembly. Exits 1 if a kernel spills or does not compile.
"""

import contextlib
import io
import re
import sys

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from opd import flow, kernels
from opd.kernels import common

TARGETS = {f"sm_{capability}": GPUTarget("cuda", capability, 32) for capability in (80, 90, 100)}
TARGETS["gfx942"] = GPUTarget("hip", "gfx942", 64)
TYPES = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.int64: "*i64"}
OPTIONS = {"num_warps": common.NUM_WARPS, "enable_fp_fusion": False}
# dimensions per sample, teachers, dtype of the velocities, whether the noise is drawn
CONFIGURATIONS = [(2048, k, torch.float32, True) for k in (1, 2, 3, 4)]
CONFIGURATIONS += [(2048, 2, torch.float32, False), (1089, 4, torch.float32, True)]
CONFIGURATIONS += [(2048, 2, torch.bfloat16, True), (2048, 1, torch.float16, True)]


def main() -> int:
    triton.knobs.compilation.always_compile = triton.knobs.nvidia.dump_ptxas_log = True
    compiled = spills = 0
    for label, source in recorded_launches().values():
        for target in TARGETS:
            registers, spilled = compile_for(source, TARGETS[target])
            counted = f"{registers:3} registers, {spilled} spills"
            print(f"{source.name:16}{label:22}{target:8}{counted}", flush=True)
            compiled += 1
            spills += spilled
    print(f"triton {triton.__version__}, {common.NUM_WARPS} warps: {compiled} compiled, {spills} spills")
    return int(spills > 0)


def recorded_launches() -> dict[str, tuple[str, ASTSource]]:
    """{key: (label, source)} of all configurations, each specialisation once."""
    found = {}

    def record(kernel, args, constexprs):
        specialised = specialise(kernel, args, constexprs)
        found.setdefault(f"{kernel.__name__} {specialised}", (label, ASTSource(kernel, *specialised)))

    common.recorder = record
    try:
        for dims, teachers, dtype, drawn in CONFIGURATIONS:
            label = f"d={dims} K={teachers} {str(dtype).removeprefix('torch.')}"
            with common.backend("triton"):
                run_ops(dims, teachers, dtype, drawn)
    finally:
        common.recorder = None
    return found


def run_ops(dims: int, teachers: int, dtype: torch.dtype, drawn: bool) -> None:
    """Call each op once, forward and backward, in one configuration."""
    x, x_next, noise = torch.zeros(3, 2, dims)
    v = torch.zeros(2, dims, dtype=dtype, requires_grad=True)
    loss_inputs = ([v] * teachers, torch.ones(2, teachers), torch.ones(2))
    transition = flow.sde_transition(torch.tensor(0.5), torch.tensor(0.4), 0.7)
    draw = {"noise": noise}
    if drawn:
        draw = {"seed": 2**62 + 3, "index": torch.arange(2)}
    kernels.sde_step(x, v, transition, **draw)
    kernels.log_prob(x_next, x, v, transition).sum().backward()
    kernels.velocity_mse(v, *loss_inputs)[0].sum().backward()
    kernels.opd_step(x, v, *loss_inputs, transition, **draw)[0].sum().backward()


def specialise(kernel, args, constexprs) -> tuple[dict, dict, dict]:
    """Signature, constants and alignment that the just-in-time launcher would derive from these arguments."""
    constants = {(kernel.arg_names.index(name),): value for name, value in constexprs.items()}
    attributes = {}

    def describe(value, path, specialised):
        if isinstance(value, tuple):
            return tuple(describe(item, (*path, i), specialised) for i, item in enumerate(value))
        if isinstance(value, float):
            return "fp32"
        if isinstance(value, torch.Tensor):
            attributes[path] = [["tt.divisibility", 16]]
            return TYPES[value.dtype]
        if value is None or (specialised and value == 1):
            constants[path] = value
            return "constexpr"
        if specialised and value % 16 == 0:
            attributes[path] = [["tt.divisibility", 16]]
        return "i32" if value < 2**31 else "i64"

    signature = dict.fromkeys(constexprs, "constexpr")
    for i, (parameter, value) in enumerate(zip(kernel.params, args, strict=False)):
        signature[parameter.name] = describe(value, (i,), not parameter.do_not_specialize)
    return signature, constants, attributes


def compile_for(source: ASTSource, target: GPUTarget) -> tuple[int, int]:
    """Compile, never from the cache, and return (registers per thread, spills)."""
    ptxas_log = io.StringIO()
    with contextlib.redirect_stdout(ptxas_log):
        binary = triton.compile(source, target=target, options=OPTIONS)
    text = ptxas_log.getvalue()
    patterns = (r"Used (\d+) registers", r"(\d+) bytes spill stores", r"(\d+) bytes spill loads")
    if target.backend == "hip":
        text = binary.asm["amdgcn"]
        patterns = (r"\.vgpr_count:\s+(\d+)", r"\.vgpr_spill_count:\s+(\d+)", r"\.sgpr_spill_count:\s+(\d+)")
    registers, *spilled = (int(re.search(pattern, text)[1]) for pattern in patterns)
    return registers, sum(spilled)


if __name__ == "__main__":
    sys.exit(main())
