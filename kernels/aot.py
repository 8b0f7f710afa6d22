"""Compile every kernel for every target, without a GPU, and print registers and spills.

    python -m kernels.aot [--targets sm_90 gfx942]

The launches are recorded from the ops themselves, so what is compiled is what runs: every op, 1 to 4 teachers, with and
without guidance, noise given and drawn, sizes that vectorise and sizes that do not. NVIDIA's numbers are those of
`ptxas -v` (shipped with triton), AMD's those in the assembly. Exits 1 if a kernel spills or does not compile.
"""

import argparse
import contextlib
import io
import re
import sys

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import kernels
from kernels import common

TARGETS = {"sm_80": GPUTarget("cuda", 80, 32), "sm_90": GPUTarget("cuda", 90, 32), "sm_100": GPUTarget("cuda", 100, 32),
           "gfx942": GPUTarget("hip", "gfx942", 64)}
TYPES = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.int64: "*i64"}


def run_ops(dims: int, teachers: int, dtype: torch.dtype, guided: bool, drawn: bool) -> None:
    """Call each op once, forward and backward, in one configuration."""
    x, noise, x_next = torch.zeros(3, 2, dims).unbind(0)
    v, v_uncond = (torch.zeros(2, dims, dtype=dtype, requires_grad=True) for _ in range(2))
    targets = [torch.zeros(2, dims, dtype=dtype) for _ in range(teachers)]
    sigma, sigma_next, s = torch.tensor([[0.5] * 2, [0.4] * 2, [0.7] * 2])
    alpha, w = torch.ones(2, teachers), torch.ones(2)
    policy = dict(v_uncond=v_uncond, guidance=4.5) if guided else {}
    teacher = dict(targets_uncond=targets, target_guidance=4.5) if guided else {}
    draw = dict(seed=3, index=torch.arange(2)) if drawn else dict(noise=noise)
    kernels.sde_step(x, v, sigma, sigma_next, s, **draw, **policy)
    kernels.sde_log_prob(x_next, x, v, sigma, sigma_next, s, **policy).sum().backward()
    kernels.velocity_mse(v, targets, alpha, w, **policy, **teacher)[0].backward()
    kernels.opd_step(x, v, targets, alpha, w, sigma, sigma_next, s, **draw, **policy, **teacher)[0].backward()


def recorded_launches() -> dict:
    """{(label, source key): (kernel, ASTSource)} of all configurations, each specialisation once."""
    found = {}
    configurations = [(2048, k, torch.bfloat16, True, True) for k in (1, 2, 3, 4)]
    configurations += [(2048, 2, torch.float32, False, False), (2048, 1, torch.float16, False, True),
                       (1089, 4, torch.bfloat16, True, True)]
    for configuration in configurations:
        dims, teachers, dtype, guided, _ = configuration
        label = f"d={dims} K={teachers} {str(dtype).removeprefix('torch.')}{' guided' if guided else ''}"

        def record(kernel, args, constexprs):
            signature, constants, attributes = specialise(kernel, args, constexprs)
            key = (kernel.__name__, str(signature), str(constants), str(attributes))
            found.setdefault(key, (label, kernel, ASTSource(kernel, signature, constants, attributes)))

        common.recorder = record
        try:
            with common.backend("triton"):
                run_ops(*configuration)
        finally:
            common.recorder = None
    return found


def specialise(kernel, args, constexprs):
    """Signature, constants and alignment that the just-in-time launcher would derive from these arguments."""
    signature, constants, attributes = {}, {}, {}

    def describe(value, path, specialised):
        if isinstance(value, torch.Tensor):
            attributes[path] = [["tt.divisibility", 16]]
            return TYPES[value.dtype]
        if isinstance(value, tuple):
            return tuple(describe(item, (*path, i), specialised) for i, item in enumerate(value))
        if isinstance(value, float):
            return "fp32"
        if value is None or specialised and value == 1:
            constants[path] = value
            return "constexpr"
        if specialised and value % 16 == 0:
            attributes[path] = [["tt.divisibility", 16]]
        return "i32" if value < 2**31 else "i64"

    for i, (parameter, value) in enumerate(zip(kernel.params, args)):
        signature[parameter.name] = describe(value, (i,), not parameter.do_not_specialize)
    for name, value in constexprs.items():
        signature[name] = "constexpr"
        constants[(kernel.arg_names.index(name),)] = value
    return signature, constants, attributes


def nvidia_usage(ptxas_log: str) -> tuple[int, int]:
    """(registers per thread, bytes spilled) from the log of ptxas -v."""
    spilled = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", ptxas_log)
    return int(re.search(r"Used (\d+) registers", ptxas_log)[1]), int(spilled[1]) + int(spilled[2])


def amd_usage(assembly: str) -> tuple[int, int]:
    """(vector registers per thread, registers spilled) from the metadata in the assembly."""
    def field(name):
        return int(re.search(rf"\.{name}:\s+(\d+)", assembly)[1])
    return field("vgpr_count"), field("vgpr_spill_count") + field("sgpr_spill_count")


def compile_for(source: ASTSource, target: GPUTarget) -> tuple[int, int]:
    """Compile, never from the cache, and return (registers per thread, spills)."""
    log = io.StringIO()
    with contextlib.redirect_stdout(log):
        binary = triton.compile(source, target=target, options=dict(num_warps=common.NUM_WARPS, enable_fp_fusion=False))
    return amd_usage(binary.asm["amdgcn"]) if target.backend == "hip" else nvidia_usage(log.getvalue())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--targets", nargs="+", choices=list(TARGETS), default=list(TARGETS))
    targets = parser.parse_args().targets
    if triton.knobs.runtime.interpret:
        sys.exit("kernels.aot compiles, TRITON_INTERPRET=1 interprets: unset it")
    triton.knobs.compilation.always_compile = triton.knobs.nvidia.dump_ptxas_log = True
    print(f"triton {triton.__version__}; registers per thread / spills, {common.NUM_WARPS} warps, blocks of {common.BLOCK}")
    print(f"{'kernel':32}{'first needed by':34}" + "".join(f"{t:>12}" for t in targets))
    spills = compiled = 0
    for label, kernel, source in recorded_launches().values():
        cells = []
        for target in targets:
            registers, spilled = compile_for(source, TARGETS[target])
            cells.append(f"{registers} / {spilled}")
            spills += spilled
            compiled += 1
        print(f"{kernel.__name__:32}{label:34}" + "".join(f"{c:>12}" for c in cells), flush=True)
    print(f"{compiled} compiled, {spills} spills")
    return 1 if spills else 0


if __name__ == "__main__":
    sys.exit(main())
