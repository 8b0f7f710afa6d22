"""train.py counted: one line of JSON from rank 0 with the sizes of what was reduced and the bytes held.

torchrun tests/counted_run.py PRESET --field value ...
"""

import gc
import json

import torch
import torch.distributed as dist

import train
from opd import ranks

reduced = []
original = dist.all_reduce
held = {}


def all_reduce(tensor, *arguments, **keywords):
    reduced.append(tensor.numel())
    return original(tensor, *arguments, **keywords)


def storage_bytes(tensors) -> int:
    """Bytes of the distinct storages behind `tensors`, sharded ones counted as what this rank holds."""
    local = [t.to_local() if hasattr(t, "to_local") else t for t in tensors]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in local}
    return sum(storages.values())


def counted_train(cfg, stage, trained, folder, report):
    loop(cfg, stage, trained, folder, report)
    parameters = list(trained.model.transformer.parameters())
    held["parameters"] = storage_bytes(parameters)
    held["whole"] = sum(p.numel() * p.element_size() for p in parameters)
    held["trained"] = sum(p.numel() for p in trained.parameters.values())
    gc.collect()
    # What FSDP gathers it keeps in tensors that are no parameters.
    alive = [t for t in gc.get_objects() if type(t) in (torch.Tensor, torch.nn.Parameter)]
    held["alive"] = storage_bytes(alive)


loop = train.train
train.train = counted_train
dist.all_reduce = all_reduce
stop = ranks.stop


def report_and_stop():
    if ranks.rank() == 0:
        print("COUNTED " + json.dumps({"reduced": reduced, **held}), flush=True)
    stop()


ranks.stop = report_and_stop
train.main()
