"""A step runs ahead of the device: it waits for it once, where it must know the gradient's norm."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import train
from opd.optim import Trained
from tests import tiny

CPU = torch.device("cpu")


class Fetches(TorchDispatchMode):
    """Counts what is fetched from the meta device: numbers that are waited for, and tensors sent in passing.
    Nothing else can come from there, as there is nothing."""

    def __init__(self):
        super().__init__()
        self.waited, self.sent = 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        aten = torch.ops.aten
        if function is aten._local_scalar_dense.default and args[0].device.type == "meta":
            self.waited += 1
            return 1.0
        to_host = function is aten._to_copy.default and kwargs.get("device") == CPU
        if to_host and args[0].device.type == "meta":
            self.waited += not kwargs.get("non_blocking", False)
            self.sent += 1
            return torch.zeros(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
        return function(*args, **kwargs)


@pytest.mark.parametrize("changes", [{}, {"queries": 2, "micro_batch": 3, "guidance": 2.0}], ids=str)
def test_a_step_waits_for_the_device_once(world, changes):
    """The step runs on a device that has shapes and no numbers: whatever it wanted to look at would be
    counted or fail."""
    cfg, model, pools, *_ = tiny.build(tiny.config(world, **changes))
    meta = torch.device("meta")
    model.transformer.to(meta)
    model.device = model.conditioning.device = meta
    trained = Trained(cfg, model)
    stage = train.choose_stage(cfg, model, pools, {}, trained)
    fetches = Fetches()
    with fetches:
        stage.step(0)
    assert (fetches.waited, fetches.sent) == (1, 1)
