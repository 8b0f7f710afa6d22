"""The distillation loss: a weighted squared velocity difference to K teachers, anchor included (eq. 12, 15, 16)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from kernels.checks import check_guidance, check_targets, check_velocity
from kernels.common import (BLOCK, CHUNK, block_position, launch, load_velocity, mean_of_partials, partition, per_sample,
                            row_stride, rows, tl, triton, use_triton)
from opd import flow


@triton.jit
def teachers_block(v, targets, target_strides, unconds, uncond_strides, guidances, alpha_ptr, direction_ptr, slot_ptr, sample,
                   offsets, mask, dims, K: tl.constexpr):
    """One block against its K teachers: the sums of (v - v_k)^2 go to the block's slot, and direction = sum_k alpha_k (v - v_k)
    is stored if a gradient is wanted: it is the gradient but for the per-sample factor 2 w / (B d) that backward applies.
    A teacher with alpha 0 is masked out, not read. A sum is a barrier, so teacher k is loaded before teacher k - 1 is summed."""
    direction = tl.zeros_like(v)
    square = tl.zeros_like(v)
    for k in tl.static_range(K):
        alpha = tl.load(alpha_ptr + sample * K + k)
        read = offsets < tl.where(alpha != 0, dims, 0)
        target = load_velocity(targets[k], target_strides[k], unconds[k], uncond_strides[k], guidances[k], sample, offsets, read)
        if k > 0:
            tl.store(slot_ptr + k - 1, tl.sum(square))
        difference = tl.where(read, v - target, 0.0)
        direction += alpha * difference
        square = difference * difference
    tl.store(slot_ptr + K - 1, tl.sum(square))
    if direction_ptr is not None:
        tl.store(direction_ptr + sample * dims + offsets, direction.to(direction_ptr.dtype.element_ty), mask=mask)


@triton.jit
def finish_teachers(partials_ptr, alpha_ptr, w_ptr, per_teacher_ptr, loss_ptr, sample, dims, n_blocks, K: tl.constexpr,
                    COLUMNS: tl.constexpr, CHUNK: tl.constexpr):
    """per_teacher and w sum_k alpha_k per_teacher_k of one sample."""
    loss = 0.0
    for k in tl.static_range(K):
        mean_square = mean_of_partials(partials_ptr, sample, k, dims, n_blocks, COLUMNS, CHUNK)
        tl.store(per_teacher_ptr + sample * K + k, mean_square)
        loss += tl.load(alpha_ptr + sample * K + k) * mean_square
    tl.store(loss_ptr + sample, tl.load(w_ptr + sample) * loss)


@triton.jit
def velocity_mse_kernel(v_ptr, v_stride, uncond_ptr, uncond_stride, guidance, targets, target_strides, unconds, uncond_strides,
                        guidances, alpha_ptr, direction_ptr, partials_ptr, dims, n_blocks, K: tl.constexpr,
                        BLOCK: tl.constexpr):
    sample, block, offsets, mask = block_position(dims, n_blocks, BLOCK)
    v = load_velocity(v_ptr, v_stride, uncond_ptr, uncond_stride, guidance, sample, offsets, mask)
    teachers_block(v, targets, target_strides, unconds, uncond_strides, guidances, alpha_ptr, direction_ptr,
                   partials_ptr + (sample * n_blocks + block) * K, sample, offsets, mask, dims, K)


@triton.jit
def velocity_mse_finish_kernel(partials_ptr, alpha_ptr, w_ptr, per_teacher_ptr, loss_ptr, dims, n_blocks, K: tl.constexpr,
                               CHUNK: tl.constexpr):
    finish_teachers(partials_ptr, alpha_ptr, w_ptr, per_teacher_ptr, loss_ptr, tl.program_id(0).to(tl.int64), dims, n_blocks,
                    K, K, CHUNK)


@triton.jit
def velocity_mse_backward_kernel(direction_ptr, w_ptr, grad_loss_ptr, scale, guidance, grad_v_ptr, grad_uncond_ptr, dims,
                                 n_blocks, BLOCK: tl.constexpr):
    """d loss / d v = direction 2 w_b / (B d) times the upstream gradient, times g for v and 1 - g for v_uncond."""
    sample, block, offsets, mask = block_position(dims, n_blocks, BLOCK)
    here = sample * dims + offsets
    direction = tl.load(direction_ptr + here, mask=mask, other=0.0).to(tl.float32)
    grad = direction * (tl.load(grad_loss_ptr) * tl.load(w_ptr + sample) * scale)
    if grad_uncond_ptr is not None:
        tl.store(grad_uncond_ptr + here, ((1 - guidance) * grad).to(grad_uncond_ptr.dtype.element_ty), mask=mask)
        grad = guidance * grad
    tl.store(grad_v_ptr + here, grad.to(grad_v_ptr.dtype.element_ty), mask=mask)


def teacher_inputs(v, targets, targets_uncond, target_guidance, alpha):
    """Kernel arguments of the K teachers. An absent one points at v and is never read: its alpha is 0, or, where the
    caller broke that promise (only the CPU can afford to look), NaN, and so is the loss."""
    alpha_BK = per_sample(alpha)
    for k in (k for k, target in enumerate(targets) if not target.numel()):
        alpha_BK = alpha_BK.clone()
        alpha_BK[:, k].masked_fill_(alpha_BK[:, k] != 0, float("nan"))
    targets = tuple(rows(t) if t.numel() else v for t in targets)
    unconds = tuple(rows(t) if t.numel() else None for t in targets_uncond)
    strides = tuple(map(row_stride, targets)), tuple(map(row_stride, unconds))
    return targets, strides[0], unconds, strides[1], tuple(target_guidance), alpha_BK


def tensors(optional: list[Tensor | None], like: Tensor) -> list[Tensor]:
    """The op takes lists of tensors only (autograd wants it so): an absent one becomes an empty tensor."""
    return [like.new_empty(0) if t is None else t for t in optional]


def empty_direction(v: Tensor, need_grad: bool) -> Tensor:
    return torch.empty(v.shape if need_grad else 0, dtype=v.dtype, device=v.device)


@torch.library.custom_op("flow_opd::velocity_mse", mutates_args=())
def velocity_mse_op(v: Tensor, v_uncond: Tensor | None, targets: Sequence[Tensor], targets_uncond: Sequence[Tensor],
                    alpha: Tensor, w: Tensor, guidance: float, target_guidance: Sequence[float],
                    need_grad: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The forward launcher: (loss, per_teacher, direction), direction in v's dtype, empty unless need_grad."""
    batch, dims, n_blocks = partition(v)
    teachers = len(targets)
    v, v_uncond, w_B = rows(v), rows(v_uncond), per_sample(w)
    inputs = teacher_inputs(v, targets, targets_uncond, target_guidance, alpha)
    per_teacher = torch.empty((batch, teachers), dtype=torch.float32, device=v.device)
    loss_B = torch.empty(batch, dtype=torch.float32, device=v.device)
    partials = torch.empty(batch * n_blocks * teachers, dtype=torch.float32, device=v.device)
    direction = empty_direction(v, need_grad)
    launch(velocity_mse_kernel, batch * n_blocks, v, row_stride(v), v_uncond, row_stride(v_uncond), guidance, *inputs,
           direction if need_grad else None, partials, dims, n_blocks, K=teachers, BLOCK=BLOCK)
    launch(velocity_mse_finish_kernel, batch, partials, inputs[-1], w_B, per_teacher, loss_B, dims, n_blocks, K=teachers,
           CHUNK=CHUNK)
    return loss_B.mean(), per_teacher, direction


@torch.library.custom_op("flow_opd::velocity_mse_backward", mutates_args=())
def velocity_mse_backward_op(grad_loss: Tensor, direction: Tensor, w: Tensor, guidance: float,
                             with_uncond: bool) -> tuple[Tensor, Tensor]:
    """The backward launcher, for `opd_step` too. Without v_uncond the second output is empty."""
    batch, dims, n_blocks = partition(direction)
    grad_v = torch.empty_like(direction)
    grad_uncond = torch.empty(direction.shape if with_uncond else 0, dtype=direction.dtype, device=direction.device)
    launch(velocity_mse_backward_kernel, batch * n_blocks, direction, per_sample(w), grad_loss.float(), 2 / (batch * dims),
           guidance, grad_v, grad_uncond if with_uncond else None, dims, n_blocks, BLOCK=BLOCK)
    return grad_v, grad_uncond


@velocity_mse_op.register_fake
def _(v, v_uncond, targets, targets_uncond, alpha, w, guidance, target_guidance, need_grad):
    return v.new_empty((), dtype=torch.float32), v.new_empty(alpha.shape, dtype=torch.float32), empty_direction(v, need_grad)


@velocity_mse_backward_op.register_fake
def _(grad_loss, direction, w, guidance, with_uncond):
    return torch.empty_like(direction), direction.new_empty(direction.shape if with_uncond else 0)


def setup_context(ctx, inputs, output):
    """For `velocity_mse` and `opd_step`: both take (v, v_uncond, targets, targets_uncond, alpha, w, guidance, ...) and
    return (loss, ..., direction)."""
    loss, *constants = output
    ctx.with_uncond, ctx.teachers, ctx.guidance = inputs[1] is not None, len(inputs[2]), inputs[6]
    ctx.n_inputs = len(inputs)
    ctx.mark_non_differentiable(*constants)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[-1], inputs[5])


def backward(ctx, grad_loss, *_):
    direction, w = ctx.saved_tensors
    grad_v, grad_uncond = velocity_mse_backward_op(grad_loss, direction, w, ctx.guidance, ctx.with_uncond)
    no_teacher = [None] * ctx.teachers
    return grad_v, grad_uncond if ctx.with_uncond else None, no_teacher, no_teacher, *[None] * (ctx.n_inputs - 4)


velocity_mse_op.register_autograd(backward, setup_context=setup_context)


def velocity_mse_reference(v, targets, alpha, w, v_uncond, guidance, targets_uncond, target_guidance):
    """The equations, on any device, in any precision."""
    v = flow.guided(v, v_uncond, guidance)
    alpha_BK, w_B = alpha.detach().to(v.dtype), w.detach().to(v.dtype)
    columns = []
    for k, target in enumerate(targets):
        if target is None:
            columns.append(v.new_zeros(v.shape[0]))
            continue
        target = flow.guided(target, targets_uncond[k], target_guidance[k]).to(v.dtype)
        used_B1 = (alpha_BK[:, k] != 0)[:, None]
        difference_BD = torch.where(used_B1, (v - target).flatten(1), 0)  # an unused teacher may even hold NaN
        columns.append((difference_BD**2).mean(1))
    per_teacher_BK = torch.stack(columns, dim=1)
    loss = (w_B * (alpha_BK * per_teacher_BK).sum(1)).mean()
    return loss, per_teacher_BK.detach()


def needs_grad(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def velocity_mse(v: Tensor, targets, alpha: Tensor, w: Tensor, *, v_uncond: Tensor | None = None, guidance: float = 1.0,
                 targets_uncond=None, target_guidance=None) -> tuple[Tensor, Tensor]:
    """loss = mean_b w_b sum_k alpha_bk mean_d (v - v_k)^2, of guided velocities v_u + g (v - v_u).

    v, v_uncond: (B, ...) float32, bf16 or fp16, differentiable.
    targets, targets_uncond: (K, B, ...) or a sequence of K tensors (B, ...), K >= 1, constants. An entry of targets
    may be None if alpha[:, k] is 0 for the whole batch; one of targets_uncond may be None where the guidance is 1.
    alpha: (B, K) float32, non-negative, routing and anchor weights.  w: (B,) float32, per-step weight (`flow.WEIGHTS`).
    guidance: a number.  target_guidance: a number, K numbers or a (K,) tensor (whose values are read on the host).
    Returns loss, a float32 scalar, and per_teacher (B, K) float32, the unweighted mean squares for logging, no gradient.
    A teacher with alpha 0 for a sample is not read for it, and per_teacher is 0 there: not measured, not "no distance".
    ValueError: a wrong shape, dtype, device or layout, K = 0, guidance without the unconditional velocity.
    """
    check_velocity("v", v)
    check_guidance(v_uncond, guidance, v)
    targets, targets_uncond, target_guidance = check_targets(v, targets, alpha, w, targets_uncond, target_guidance)
    if use_triton(v):
        loss, per_teacher, _ = velocity_mse_op(
            v, v_uncond, tensors(targets, v), tensors(targets_uncond, v), alpha.detach(), w.detach(), float(guidance),
            target_guidance, needs_grad(v, v_uncond))
        return loss, per_teacher
    return velocity_mse_reference(v, targets, alpha, w, v_uncond, guidance, targets_uncond, target_guidance)
