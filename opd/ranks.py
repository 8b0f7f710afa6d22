"""All rank handling. On one process, under torchrun or not, everything here does nothing or the obvious."""

import os
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from tqdm import tqdm

TIMEOUT = timedelta(minutes=10)
"""After which ranks give up one that does not answer, and end."""
# At the start the other ranks wait while the first encodes prompts, which may take longer than any step.
PATIENCE = timedelta(hours=24)
# Groups of CPU tensors, made by `start`: one that waits so long, and one for `largest_later`.
_patient = _aside = None


def start(deterministic: bool = False) -> torch.device:
    """Join the process group that torchrun describes (or make one of one process); gloo on CPU, nccl on
    GPU. `deterministic`: torch refuses what has no deterministic algorithm.

    ValueError for more processes than GPUs.
    """
    global _patient, _aside
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it when it starts
    torch.use_deterministic_algorithms(deterministic)
    cuda = torch.cuda.is_available()
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost"}
    for name, value in alone.items():
        os.environ.setdefault(name, value)
    local, gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    device = torch.device("cuda", local) if cuda else torch.device("cpu")
    if cuda:
        if local >= gpus:
            raise ValueError(f"process {local + 1} of this machine has no GPU; use --nproc_per_node {gpus}")
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        dist.init_process_group(
            "nccl" if cuda else "gloo",
            store=meeting_point(TIMEOUT),
            rank=int(os.environ["RANK"]),
            world_size=int(os.environ["WORLD_SIZE"]),
            # NCCL ends the process without a word of ours: `average_gradients` gives up before.
            timeout=2 * TIMEOUT,
            device_id=device if cuda and declared_world() > 1 else None,
        )
        _patient = dist.new_group(backend="gloo", timeout=PATIENCE)
        _aside = dist.new_group(backend="gloo", timeout=TIMEOUT)
    if deterministic:
        say("deterministic algorithms alone, as --deterministic asks")
    return device


def meeting_point(timeout: timedelta) -> dist.Store:
    """Where ranks leave their addresses for each other. torchrun keeps one for all its restarts, in which the
    addresses of the dead still lie: every attempt has its own names. ValueError for a port in use."""
    if os.environ["WORLD_SIZE"] == "1":
        return dist.HashStore()
    try:
        store, _, _ = next(dist.rendezvous("env://", timeout=timeout))
    except dist.DistNetworkError as error:
        if "EADDRINUSE" not in str(error):
            raise
        port = os.environ["MASTER_PORT"]
        raise ValueError(
            f"port {port} is in use; choose another: torchrun --master_port, or MASTER_PORT"
        ) from error
    attempt = "0"
    if "TORCHELASTIC_RESTART_COUNT" in os.environ:
        attempt = os.environ["TORCHELASTIC_RESTART_COUNT"]
    return dist.PrefixStore(f"attempt {attempt}", store)


def declared_world() -> int:
    """The number of ranks torchrun started, known before the process group exists."""
    return int(os.environ["WORLD_SIZE"]) if "WORLD_SIZE" in os.environ else 1


def stop() -> None:
    dist.destroy_process_group()


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def say(text: str) -> None:
    """Print a line once, above a progress bar if there is one."""
    if rank() == 0:
        tqdm.write(text)


def barrier() -> None:
    """Wait for all ranks, however long one of them works."""
    if world() > 1:
        dist.barrier(_patient)


def is_lost(error: RuntimeError) -> bool:
    """Whether a collective failed because another rank is gone or does not answer."""
    by_gloo = "/gloo/" in str(error) or "pair closure" in str(error)
    return isinstance(error, dist.DistError) or (world() > 1 and by_gloo)


def total(tensor: torch.Tensor) -> torch.Tensor:
    """Sum over ranks, in place."""
    if world() > 1:
        dist.all_reduce(tensor)
    return tensor


def largest(tensor: torch.Tensor) -> torch.Tensor:
    """Maximum over ranks, in place."""
    if world() > 1:
        dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return tensor


def largest_later(tensor: torch.Tensor) -> dist.Work:
    """The same for a CPU tensor, without waiting: it has the maximum after `wait()` of what is returned."""
    return dist.all_reduce(tensor, dist.ReduceOp.MAX, group=_aside, async_op=True)


def gather(value) -> list:
    """A small value of every rank, in rank order, on every rank."""
    if world() == 1:
        return [value]
    found = [None] * world()
    dist.all_gather_object(found, value, group=_patient)
    return found


def shard(
    model: torch.nn.Module,
    blocks: list[torch.nn.Module],
    shard_size: int,
    compute: torch.dtype,
    device: torch.device,
    whole: set[torch.nn.Parameter],
) -> None:
    """FSDP2 from outside, block by block. Parameters keep their dtype (float32 masters), compute runs in
    `compute`, gradients are reduced in float32. Inputs are not cast: a timestep of 1000 sigma would not
    survive bf16. Every rank keeps the parameters `whole` as they are: the gradients of a trained adapter are
    then reduced once per step, and not in every backward pass of every block."""
    policy = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=torch.float32, cast_forward_inputs=False)
    # shard_size 1 replicates, world() shards fully, anything between is hybrid.
    shape = (world() // shard_size, shard_size)
    grid = init_device_mesh(device.type, shape, mesh_dim_names=("replicate", "shard"))
    for module in [*blocks, model]:
        fully_shard(
            module,
            mesh=grid,
            mp_policy=policy,
            reshard_after_forward=shard_size > 1 and module is not model,
            ignored_params=whole,
        )


def average_gradients(parameters: list[torch.Tensor]) -> None:
    """Mean over ranks of the gradients of plain parameters, in one reduction. FSDP averages those of sharded
    parameters (--full) in every backward."""
    if world() == 1:
        return
    # On the CPU, where a rank that does not come ends in our line.
    dist.barrier(_aside)
    if isinstance(parameters[0], DTensor):
        return
    used = [parameter for parameter in parameters if parameter.grad is not None]
    flat = total(torch.cat([parameter.grad.flatten() for parameter in used])) / world()
    pieces = flat.split([parameter.numel() for parameter in used])
    for parameter, piece in zip(used, pieces, strict=True):
        parameter.grad.copy_(piece.view_as(parameter))


def reshard(model: torch.nn.Module) -> None:
    """Drop gathered copies. Needed before the optimizer changes the masters: a later forward must gather them
    anew."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def full(tensor: torch.Tensor) -> torch.Tensor:
    """A copy of the whole tensor on every rank (a collective where it is sharded). On one rank DTensor would
    return a view, which changes with the parameter."""
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).clone()


def part(tensor: torch.Tensor) -> torch.Tensor:
    """What this rank has of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def gathered(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Whole copies on rank 0's CPU, {} on the other ranks, which hold one whole tensor at a time
    (collectives)."""
    found = {}
    for name, tensor in tensors.items():
        whole = full(tensor)
        if rank() == 0:
            found[name] = whole.cpu().contiguous()
    return found
