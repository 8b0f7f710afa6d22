"""train.py counted: one line of JSON from rank 0 with the sizes of what was reduced and the bytes held."""

import gc
import json

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import train
from opd import ranks
from opd.runfolder import RunFolder
from tests import forked

reduced = []
original = dist.all_reduce
held = {"scattered": 0}


def all_reduce(tensor, *arguments, **keywords):
    reduced.append(tensor.numel())
    return original(tensor, *arguments, **keywords)


class Scatters(TorchDispatchMode):
    """How often gradients are reduced into shards, by FSDP."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        held["scattered"] += "reduce_scatter" in str(func)
        return func(*args, **(kwargs or {}))


def storage_bytes(tensors) -> int:
    """Bytes of the distinct storages behind `tensors`, sharded ones counted as what this rank holds."""
    local = [t.to_local() if hasattr(t, "to_local") else t for t in tensors]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in local}
    return sum(storages.values())


class Largest(TorchDispatchMode):
    """The bytes of the largest tensor of numbers that is read or made; what ranks tell each other about their
    parts is bytes, and grows with the count of tensors, not with their size."""

    bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves((args, result)):
            if type(value) is torch.Tensor and value.is_floating_point():
                self.bytes = max(self.bytes, value.untyped_storage().nbytes())
        return result


def measured(name, call):
    """`call`, and the largest tensor that it handles under `name`."""

    def counted(*arguments):
        with Largest() as largest:
            call(*arguments)
        held[name] = largest.bytes

    return counted


def counted_train(cfg, stage, trained, folder, report):
    with Scatters():
        finished = loop(cfg, stage, trained, folder, report)
    parameters = list(trained.model.transformer.parameters())
    held["parameters"] = storage_bytes(parameters)
    held["whole"] = sum(p.numel() * p.element_size() for p in parameters)
    held["trained"] = sum(p.numel() for p in trained.parameters.values())
    gc.collect()
    # What FSDP gathers it keeps in tensors that are no parameters.
    alive = [t for t in gc.get_objects() if type(t) in (torch.Tensor, torch.nn.Parameter)]
    held["alive"] = storage_bytes(alive)
    held["largest"] = max(p.numel() * p.element_size() for p in parameters)
    return finished


loop = train.train
stop = ranks.stop


def report_and_stop():
    if ranks.rank() == 0:
        print("COUNTED " + json.dumps({"reduced": reduced, **held}), flush=True)
    stop()


def main():
    RunFolder.save_to_go_on = measured("largest_saved", RunFolder.save_to_go_on)
    RunFolder.export = measured("largest_exported", RunFolder.export)
    train.train = counted_train
    dist.all_reduce = all_reduce
    ranks.stop = report_and_stop
    train.main()


def counted_by(runs: list[forked.Command]) -> dict:
    (line,) = [line for line in forked.finished(runs).splitlines() if line.startswith("COUNTED ")]
    return json.loads(line.removeprefix("COUNTED "))
