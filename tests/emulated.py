"""A pretended GPU for a PyTorch without CUDA: tensors that say `cuda` and hold their numbers on the CPU.

    python -m tests.emulated [what pytest takes]      # runs tests/test_emulated.py on it

An operation on tensors of two devices, or a collective of a CPU tensor, raises. Every wait for the device is
counted: numbers that are read, shapes that hang on numbers, and copies from and to the host that nobody sent
with non_blocking=True. Numbers are those of the CPU; there is no time, no stream and no memory to measure.

A library of C++ registers a device guard for CUDA, so that autograd's engine runs on such tensors. PyTorch
looks for it when it is imported, so it is loaded before.
"""

import contextlib
import ctypes
import hashlib
import importlib.util
import os
import subprocess
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from unittest import mock

GUARD = r"""
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
using c10::Device, c10::DeviceIndex, c10::Stream;
struct Guard final : public c10::impl::DeviceGuardImplInterface {
  static thread_local DeviceIndex current;
  static Device cuda(DeviceIndex i) { return Device(c10::DeviceType::CUDA, i); }
  c10::DeviceType type() const override { return c10::DeviceType::CUDA; }
  Device exchangeDevice(Device d) const override { Device old = cuda(current); setDevice(d); return old; }
  Device getDevice() const override { return cuda(current); }
  void setDevice(Device d) const override { if (d.index() >= 0) current = d.index(); }
  void uncheckedSetDevice(Device d) const noexcept override { if (d.index() >= 0) current = d.index(); }
  Stream getStream(Device d) const override { return Stream(Stream::DEFAULT, d); }
  Stream getNewStream(Device d, int = 0) const override { return Stream(Stream::DEFAULT, d); }
  Stream exchangeStream(Stream s) const override { return s; }
  DeviceIndex deviceCount() const noexcept override { return 2; }
};
thread_local DeviceIndex Guard::current = 0;
c10::impl::DeviceGuardImplRegistrar registrar(c10::DeviceType::CUDA, new Guard());
struct CUDAHooks final : public at::CUDAHooksInterface {
  explicit CUDAHooks(at::CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex deviceCount() const override { return 2; }
  DeviceIndex getCurrentDevice() const override { return 0; }
  bool isPinnedPtr(const void*) const override { return false; }
};
namespace at { REGISTER_CUDA_HOOKS(CUDAHooks); }
"""


def load_guard() -> None:
    """Build the library (20 s, once a machine) and load it."""
    home = Path(importlib.util.find_spec("torch").origin).parent
    key = hashlib.sha256((GUARD + str(home)).encode()).hexdigest()[:12]
    library = Path(tempfile.gettempdir()) / f"emulated-gpu-{key}.so"
    if not library.exists():
        with tempfile.TemporaryDirectory(dir=library.parent) as folder:
            code, built = Path(folder, "guard.cpp"), Path(folder, "guard.so")
            code.write_text(GUARD)
            flags = ["-std=c++20", "-shared", "-fPIC", f"-I{home}/include", f"-L{home}/lib"]
            subprocess.run(["g++", *flags, str(code), "-o", str(built), "-lc10", "-ltorch_cpu"], check=True)
            built.rename(library)
    for file in (home / "lib/libc10.so", home / "lib/libtorch_cpu.so", library):
        ctypes.CDLL(str(file), ctypes.RTLD_GLOBAL)


if __name__ == "__main__":
    load_guard()

import torch  # noqa: E402
from torch import Tensor  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten  # noqa: E402

aten = torch.ops.aten
CPU = torch.device("cpu")
ROOT = str(Path(__file__).parents[1])
LOADED = "OPD_EMULATED_GPU"
READS = {aten._local_scalar_dense.default, aten.nonzero.default, aten.masked_select.default}
READS |= {aten.equal.default, aten.is_nonzero.default, aten.repeat_interleave.Tensor, aten._unique2.default}
# What takes a number on the CPU, a tensor without dimensions, as an argument of the launch.
TAKES_NUMBERS = set("add sub rsub mul div pow lt le gt ge eq ne where fill masked_fill index_put".split())


class Gpu(Tensor):
    """Says that it is on cuda; its numbers are in `held`."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held: Tensor, device: torch.device):
        like = {"strides": held.stride(), "storage_offset": held.storage_offset(), "dtype": held.dtype}
        made = Tensor._make_wrapper_subclass(cls, held.size(), device=device, **like)
        made.held = held
        return made

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return dispatch(function, args, kwargs or {})

    def tolist(self):
        return self.cpu().tolist()

    def __repr__(self):
        return f"Gpu({tuple(self.shape)}, {self.dtype}, {self.device})"


class OnGpu(TorchDispatchMode):
    """Inside, device="cuda" makes a Gpu."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return dispatch(function, args, kwargs or {})


waits: Counter[tuple[str, str]] = Counter()
"""How often which operation was waited for, at which line of the project."""


def wait(name: str) -> None:
    lines = [frame for frame in traceback.extract_stack() if frame.filename.startswith(ROOT)]
    own = [frame for frame in lines if "/tests/" not in frame.filename] or lines
    waits[name, f"{own[-1].filename.removeprefix(ROOT + '/')}:{own[-1].lineno}"] += 1


def held(value):
    return value.held if isinstance(value, Gpu) else value


def on(device: torch.device, value):
    return Gpu(value, device) if isinstance(value, Tensor) and not isinstance(value, Gpu) else value


def place(device) -> torch.device:
    device = torch.device(device)
    return torch.device("cuda", device.index or 0) if device.type == "cuda" else device


def dispatch(function, args: tuple, kwargs: dict):
    """Run an operation on what its tensors hold."""
    flat, spec = tree_flatten((args, kwargs))
    gpus = [value for value in flat if isinstance(value, Gpu)]
    asked = kwargs["device"] if "device" in kwargs else None
    target = place(asked) if asked is not None else gpus[0].device if gpus else CPU
    if not gpus and target.type != "cuda":
        return function(*args, **kwargs)
    if function is aten._to_copy.default:
        return moved(args[0], target, kwargs)
    if function is aten.copy_.default:
        crosses = isinstance(args[0], Gpu) != isinstance(args[1], Gpu)
        if crosses and not any(args[2:]):
            wait("copy_")
        held(args[0]).copy_(held(args[1]))
        return args[0]
    check_devices(function, args, flat, gpus, target)
    if function in READS and gpus:
        wait(function._schema.name)
    own = {id(gpu.held): gpu for gpu in gpus}
    plain_args, plain_kwargs = tree_unflatten([held(value) for value in flat], spec)
    if asked is not None:
        plain_kwargs["device"] = CPU
    out = function(*plain_args, **plain_kwargs)
    # What an operation changed in place is the tensor that it was.
    return tree_map(lambda value: own[id(value)] if id(value) in own else on(target, value), out)


def moved(tensor: Tensor, target: torch.device, kwargs: dict):
    sent = "non_blocking" in kwargs and kwargs["non_blocking"]
    there = tensor.device.type
    if not sent and target.type != there:
        wait("to the CPU" if there == "cuda" else "from the CPU")
    out = aten._to_copy.default(held(tensor), dtype=kwargs["dtype"] if "dtype" in kwargs else None)
    return on(target, out) if target.type == "cuda" else out


def check_devices(function, args: tuple, flat: list, gpus: list, target: torch.device) -> None:
    """RuntimeError for tensors of several devices, and for a generator of another device."""
    name = function._schema.name.removeprefix("aten::").rstrip("_")
    others = [value for value in flat if isinstance(value, Tensor) and not isinstance(value, Gpu)]
    if name in ("index", "index_put") and isinstance(args[0], Gpu):
        indices = [index for index in args[1] if index is not None]
        if any(index.dtype == torch.bool or not isinstance(index, Gpu) for index in indices):
            wait("index on the CPU or of booleans")
        others = [value for value in others if all(value is not index for index in indices)]
    if name in TAKES_NUMBERS:
        others = [value for value in others if value.dim() > 0]
    devices = {value.device for value in [*gpus, *others]}
    generators = {value.device.type for value in flat if isinstance(value, torch.Generator)}
    if (gpus and len(devices) > 1) or generators - {target.type}:
        raise RuntimeError(f"{name}: tensors on {devices}, generators on {generators}, result on {target}")


# ---- torch.cuda and what else looks for a GPU --------------------------------------------------------------

ANSWERS = {"is_available": True, "is_initialized": True, "device_count": 2, "current_device": 0}
ANSWERS |= {"set_device": None, "empty_cache": None}
ANSWERS |= {"_is_in_bad_fork": False, "manual_seed_all": None}
ANSWERS |= {"current_stream": mock.MagicMock(), "stream": contextlib.nullcontext()}
ANSWERS |= {"device": contextlib.nullcontext(), "device_of": contextlib.nullcontext()}


@contextlib.contextmanager
def pretended():
    """Inside, there are two GPUs."""
    from opd import ranks

    with contextlib.ExitStack() as stack:

        def put(owner, name, value):
            stack.enter_context(mock.patch.object(owner, name, value))

        for name, answer in ANSWERS.items():
            put(torch.cuda, name, lambda *_, answer=answer, **__: answer)
        begin = torch.distributed.init_process_group
        put(torch.distributed, "init_process_group", lambda _, device_id=None, **rest: begin("gloo", **rest))
        put(torch.cuda, "_initialized", True)
        put(ranks, "total", on_gpu(ranks.total))
        put(ranks, "largest", on_gpu(ranks.largest))
        # `.to` cannot pour a Gpu into a parameter on the CPU; a new parameter takes its place.
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        torch._C._set_only_lift_cpu_tensors(True)
        stack.callback(torch._C._set_only_lift_cpu_tensors, False)
        stack.callback(torch.__future__.set_overwrite_module_params_on_conversion, False)
        stack.enter_context(OnGpu())
        yield


def on_gpu(reduce: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """A collective: NCCL has none for tensors on the CPU. The numbers travel by gloo."""

    def collective(tensor: Tensor) -> Tensor:
        if not tensor.is_cuda:
            raise RuntimeError("a collective of a tensor on the CPU")
        reduce(tensor.held)
        return tensor

    return collective


if __name__ == "__main__":
    import pytest

    os.environ[LOADED] = "1"
    sys.modules["tests.emulated"] = sys.modules["__main__"]
    sys.exit(pytest.main(["tests/test_emulated.py", "-p", "no:cacheprovider", *sys.argv[1:]]))
