"""The fused kernels behind the ops: one pass over the elements, then one over the partial sums.

A sample's elements are cut into blocks of BLOCK, one program per (sample, block). A program writes its
partial sums to its own slot; a second kernel, one program per sample, adds the slots in order. The partition
depends on the sample's size alone, and there are no atomics: a sample's result has the same bits whatever
else is in the batch, run after run, and a step's log-probability has those of `log_prob`. Offsets are 64-bit.
"""

import torch

from opd.flow import per_sample
from opd.kernels.common import BLOCK, CHUNK, launch, rows, tl, triton

SCHEMA = """(Tensor v, Tensor[] targets, Tensor alpha_BK, Tensor? x, Tensor[] transition, Tensor? noise,
    SymInt seed, Tensor? index, bool need_grad) -> (Tensor, Tensor, Tensor, Tensor)"""


@torch.library.custom_op("flow_opd::forward", mutates_args=(), schema=SCHEMA)
def forward_op(v, targets, alpha_BK, x, transition, noise, seed, index, need_grad):
    """The launcher: what `ops.distances` returns, and the gradient's direction, empty unless need_grad."""
    batch, dims = len(v), v[0].numel()
    n_blocks = triton.cdiv(dims, BLOCK.value)
    distance_B, means_BC, x_next, direction = outputs = new_outputs(v, targets, x, need_grad)
    # A slot per block of a sample; in it a column per teacher, and one more for the step.
    partials = torch.empty(n_blocks * means_BC.numel(), dtype=torch.float32, device=v.device)
    alpha_BK = alpha_BK.contiguous()
    step = ()
    if x is not None:
        step = (rows(x), *transition, rows(noise), rows(index), x_next)
    inputs = (rows(v), tuple(map(rows, targets)), alpha_BK, direction if need_grad else None, step, seed)
    launch(forward_kernel, batch * n_blocks, v, *inputs, partials, dims, n_blocks)
    sums = (partials, alpha_BK, means_BC, distance_B, dims, n_blocks)
    launch(finish_kernel, batch, v, *sums, K=len(targets), COLUMNS=means_BC.shape[1])
    return outputs


@forward_op.register_fake
def _(v, targets, alpha_BK, x, transition, noise, seed, index, need_grad):
    return new_outputs(v, targets, x, need_grad)


def new_outputs(v, targets, x, need_grad):
    """Uninitialised (distance_B, means_BC, x_next, direction)."""
    like = {"dtype": torch.float32, "device": v.device}
    means_BC = torch.empty(len(v), len(targets) + (x is not None), **like)
    x_next = torch.empty(0 if x is None else x.shape, **like)
    direction = torch.empty(v.shape if need_grad else 0, **like)
    return torch.empty(len(v), **like), means_BC, x_next, direction


def setup_context(ctx, inputs, output):
    v, targets, _, _, transition, *_ = inputs
    ctx.dtype, ctx.list_lengths = v.dtype, (len(targets), len(transition))
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[-1])


def backward(ctx, grad_B, *_):
    """d distance / d v = direction 2 / d, times the sample's upstream gradient."""
    (direction,) = ctx.saved_tensors
    scale_B = grad_B * (2 * len(direction) / direction.numel())
    grad_v = direction * per_sample(scale_B, direction)
    no_targets, no_transition = ([None] * length for length in ctx.list_lengths)
    return grad_v.to(ctx.dtype), no_targets, None, None, no_transition, *[None] * 4


forward_op.register_autograd(backward, setup_context=setup_context)


# ---------------------------------------------------------------- kernels


@triton.jit(do_not_specialize=["seed"])
def forward_kernel(v_rows, teachers, alpha_ptr, direction_ptr, step, seed, partials_ptr, dims, n_blocks):
    """The partial sums of one block: K teachers', then the step's. `rows` are pairs (pointer, stride)."""
    K: tl.constexpr = len(teachers)
    sample, block, offsets, mask = block_position(dims, n_blocks)
    v = load_row(v_rows, sample, offsets, mask)
    slot_ptr = partials_ptr + (sample * n_blocks + block) * K
    if len(step) > 0:
        slot_ptr += sample * n_blocks + block
        square = step_block(v, step, seed, sample, block, offsets, mask, dims)
    if K > 0:
        teachers_block(v, teachers, alpha_ptr, direction_ptr, slot_ptr, sample, offsets, mask, dims)
    if len(step) > 0:
        tl.store(slot_ptr + K, tl.sum(square))


@triton.jit
def step_block(v, step, seed, sample, block, offsets, mask, dims):
    """Store one block of x_next; return (v - velocity_taken)^2 of what was stored, by the operations of
    `flow`."""
    x_rows, keep_ptr, move_ptr, std_ptr, noise_rows, index_rows, x_next_ptr = step
    x = load_row(x_rows, sample, offsets, mask)
    if len(noise_rows) > 0:
        noise = load_row(noise_rows, sample, offsets, mask)
    else:
        number = sample
        if len(index_rows) > 0:
            number = tl.load(index_rows[0] + sample * index_rows[1])
        noise = normal_block(seed, number, block)
    keep_x = x * tl.load(keep_ptr + sample)
    move = tl.load(move_ptr + sample)
    x_next = keep_x - v * move + tl.load(std_ptr + sample) * noise
    tl.store(x_next_ptr + sample * dims + offsets, x_next, mask=mask)
    difference = tl.where(mask, v - tl.div_rn(keep_x - x_next, move), 0.0)
    return difference * difference


@triton.jit
def teachers_block(v, teachers, alpha_ptr, direction_ptr, slot_ptr, sample, offsets, mask, dims):
    """The sums of (v - v_k)^2 go to the block's slot; sum_k alpha_k (v - v_k), the gradient but for a factor
    per sample, is stored if a gradient is wanted. A teacher with alpha 0 is masked out, not read. A sum is a
    barrier, so teacher k is loaded before teacher k - 1 is summed."""
    K: tl.constexpr = len(teachers)
    direction = tl.zeros_like(v)
    square = tl.zeros_like(v)
    for k in tl.static_range(K):
        alpha = tl.load(alpha_ptr + sample * K + k)
        read = offsets < tl.where(alpha != 0, dims, 0)
        target = load_row(teachers[k], sample, offsets, read)
        if k > 0:
            tl.store(slot_ptr + k - 1, tl.sum(square))
        difference = tl.where(read, v - target, 0.0)
        direction += alpha * difference
        square = difference * difference
    tl.store(slot_ptr + K - 1, tl.sum(square))
    if direction_ptr is not None:
        tl.store(direction_ptr + sample * dims + offsets, direction, mask=mask)


@triton.jit
def finish_kernel(
    partials_ptr, alpha_ptr, means_ptr, distance_ptr, dims, n_blocks, K: tl.constexpr, COLUMNS: tl.constexpr
):
    """Means over one sample's dimensions of each column of its partial sums, and sum_k alpha_k mean_k."""
    sample = tl.program_id(0).to(tl.int64)
    distance = 0.0
    for column in tl.static_range(COLUMNS):
        total = tl.zeros((CHUNK,), tl.float32)
        start = 0
        while start < n_blocks:
            block = start + tl.arange(0, CHUNK)
            slot = (sample * n_blocks + block) * COLUMNS + column
            total += tl.load(partials_ptr + slot, mask=block < n_blocks, other=0.0)
            start += CHUNK
        mean = tl.div_rn(tl.sum(total), dims * 1.0)
        tl.store(means_ptr + sample * COLUMNS + column, mean)
        if column < K:
            distance += tl.load(alpha_ptr + sample * K + column) * mean
    tl.store(distance_ptr + sample, distance)


@triton.jit
def block_position(dims, n_blocks):
    """Which sample and block this program owns: (sample, block, element offsets in the sample, mask),
    64-bit."""
    program = tl.program_id(0).to(tl.int64)
    block = program % n_blocks
    offsets = block * BLOCK + tl.arange(0, BLOCK)
    return program // n_blocks, block, offsets, offsets < dims


@triton.jit
def load_row(rows, sample, offsets, mask):
    """A sample's elements in float32, 0 outside the mask."""
    return tl.load(rows[0] + sample * rows[1] + offsets, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def normal_block(seed, number, block):
    """Standard normals for one block of sample `number`: the device side of `normal`, same counters."""
    call = block * (BLOCK // 4) + tl.arange(0, BLOCK // 4)
    number = tl.zeros((BLOCK // 4,), tl.int64) + number
    call_low, call_high = call.to(tl.uint32), (call >> 32).to(tl.uint32)
    number_low, number_high = number.to(tl.uint32), (number >> 32).to(tl.uint32)
    w0, w1, w2, w3 = tl.philox(seed, call_low, call_high, number_low, number_high)
    z0, z1 = box_muller_block(w0, w1)
    z2, z3 = box_muller_block(w2, w3)
    return tl.interleave(tl.interleave(z0, z2), tl.interleave(z1, z3))


@triton.jit
def box_muller_block(word_a, word_b):
    """Two random 32-bit words -> two standard normals; the constants are 2^-32, 2^-33 and 2 pi 2^-32."""
    radius = tl.sqrt(-2.0 * tl.log(word_a.to(tl.float32) * 2.3283064365386963e-10 + 1.1641532182693481e-10))
    angle = word_b.to(tl.float32) * 1.4629180792671596e-09
    return radius * tl.cos(angle), radius * tl.sin(angle)
