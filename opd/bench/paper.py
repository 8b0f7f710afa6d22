"""Scale on paper: a step's operations, its memory, and what is sent for it, COUNTED from shapes, never timed.

    python -m opd.bench.paper

SD3.5-Medium's shape with the work of the preset sd35 unless a row says otherwise. Operations are counted by
PyTorch's counter (matrix products and attention) in one pass over tensors without storage, then multiplied by
the passes that `train.Distillation` makes; memory is `opd.memory`'s prediction for one GPU, without the VAE.
Bytes are those that a rank sends in ring collectives.
"""

from dataclasses import replace
from functools import cache

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from opd import memory
from opd.bench.clock import flop_counter
from opd.bench.model import SIZES, Work, planned, predicted, text_shapes

WORK = Work(
    size="sd35-medium",
    stage="opd",
    teachers=3,
    anchor="further",
    rank=32,
    pixels=512,
    guidance=4.5,
    prompts_per_step=40,
    group=4,
    micro_batch=8,
    states=10,
    queries=0,
    query_range=(0, 0),
    dtype="bfloat16",
    checkpointing=False,
    compile=False,
)
ROWS = {
    "sd35": {},
    "1 teacher": {"teachers": 1},
    "8 teachers": {"teachers": 8},
    "a teacher as anchor": {"anchor": "teacher"},
    "no anchor": {"anchor": "none"},
    "5 states": {"states": 5},
    "20 states": {"states": 20},
    "2 of 10 states trained on": {"queries": 2},
    "group of 8": {"group": 8},
    "rank 128": {"rank": 128},
    "without guidance": {"guidance": 1.0},
    "with recomputation": {"checkpointing": True},
    "1024 px": {"pixels": 1024},
}
FITS = {
    "sd35": {},
    "sd35 with recomputation": {"checkpointing": True},
    "sd35-24gb": {"micro_batch": 2, "checkpointing": True},
    "sd35 at 1024 px, with recomputation": {"pixels": 1024, "checkpointing": True},
    "sd35-24gb at 1024 px": {"micro_batch": 2, "pixels": 1024, "checkpointing": True},
}
STEPS = 1000
"""The paper's."""
RATE = 400e12
"""FLOP/s of a GPU, ASSUMED for GPU-hours: 40 % of what an H100 promises in bfloat16."""
GPUS = (8, 32, 256)
PER_GPU = 16
"""Trajectories of a GPU in a step, for what is sent: two micro-batches."""
NODE = 8
"""GPUs that share the weights in hybrid sharding."""
CPU = torch.device("cpu")


def main() -> None:
    print("COUNTED on paper, not measured: operations of one step\n")
    print(f"| work | TFLOP per step | of sd35's | GPU-hours of {STEPS} steps at {RATE * 1e-12:.0f} TFLOP/s |")
    print("|---|---|---|---|")
    usual = step_flops(WORK)
    for label, changes in ROWS.items():
        flops = step_flops(replace(WORK, **changes))
        hours = STEPS * flops / RATE / 3600
        print(f"| {label} | {flops * 1e-12:,.0f} | {flops / usual:.3f} | {hours:.1f} |")
    print("\nPREDICTED, not measured: memory of one GPU, GiB\n")
    print("| work | base | adapters, gradients, optimizer | activations | peak |")
    print("|---|---|---|---|---|")
    for label, changes in FITS.items():
        parts = predicted(replace(WORK, **changes), CPU)
        trained = parts["adapters"] + parts["gradients"] + parts["optimizer"]
        sizes = [parts["base"], trained, parts["activations"], parts["peak"]]
        print(f"| {label} | {' | '.join(f'{size / memory.GIB:.2f}' for size in sizes)} |")
    print("\nCOUNTED on paper, not measured: what a rank sends per step\n")
    print("| GPUs | replicated | hybrid, in the node | hybrid, between nodes | sharded fully |")
    print("|---|---|---|---|---|")
    for gpus in GPUS:
        sent = [replicated(gpus), *hybrid(gpus), sharded(gpus)]
        print(f"| {gpus} | {' | '.join(f'{size / memory.GIB:,.3f} GiB' for size in sent)} |")


# ---- operations --------------------------------------------------------------------------------------------


def step_flops(work: Work) -> int:
    """Matrix products and attention of one optimizer step over all ranks.

    A trained state costs a sample one student forward and backward and a forward of each teacher that is
    asked; a state on the way, until the last trained one, a student forward.
    """
    forward, backward = pass_flops(work.pixels, work.guidance, work.rank)
    if work.checkpointing:
        backward += forward
    # The teacher of the task, and an anchor; a teacher that anchors answers its own samples once for both.
    asked = {"none": 1, "base": 2, "further": 2, "teacher": 2 - 1 / work.teachers}[work.anchor]
    trained = work.queries or work.states
    # Drawn states end a trajectory early now and then; counted as if they never did. Teachers are guided as
    # the student is.
    per_sample = work.states * forward + trained * (backward + asked * forward)
    return round(work.prompts_per_step * work.group * per_sample)


@cache
def pass_flops(pixels: int, guidance: float, rank: int) -> tuple[int, int]:
    """(forward, backward) of one sample with the student's adapter, nothing recomputed."""
    work = replace(WORK, pixels=pixels, guidance=guidance, rank=rank)
    text = text_shapes(SIZES[work.size])
    with FakeTensorMode():
        fake, _ = memory.without_weights(work.config(), planned(work, CPU), text)
        with flop_counter() as counter:
            v = memory.velocity(fake, 1, text, guidance)
            forward = counter.get_total_flops()
            v.sum().backward()
        return forward, counter.get_total_flops() - forward


# ---- bytes sent --------------------------------------------------------------------------------------------


def replicated(gpus: int) -> float:
    """The LoRA's gradients, once per step."""
    return all_reduce(lora_gradients(), gpus)


def sharded(gpus: int) -> float:
    """Per state and micro-batch: the weights for the student's forward pass, again for its backward pass and
    for every teacher (with many samples per step each is asked somewhere). The LoRA is on every rank."""
    return turns() * weights_sent(gpus) + replicated(gpus)


def hybrid(gpus: int) -> tuple[float, float]:
    """(within nodes of NODE GPUs, between them). Between nodes go the LoRA's gradients alone, summed in the
    node before."""
    return turns() * weights_sent(NODE) + replicated(NODE), all_reduce(lora_gradients(), gpus // NODE)


def turns() -> int:
    """Backward passes of a rank in a step."""
    return WORK.states * PER_GPU // WORK.micro_batch


def weights_sent(ranks: int) -> float:
    model = planned(WORK, CPU)
    whole = model.dtype.itemsize * memory.numbers(model.skeleton.parameters())
    passes = 2 + len(WORK.config().teachers)
    return passes * (ranks - 1) / ranks * whole


def lora_gradients() -> int:
    """Bytes, float32."""
    return 4 * memory.lora_numbers(WORK.config(), planned(WORK, CPU))


def all_reduce(size: float, ranks: int) -> float:
    """What a rank sends in a ring: (n - 1) / n of the data twice."""
    return 2 * (ranks - 1) / ranks * size


if __name__ == "__main__":
    main()
