"""Distillation loss and stochastic step from one velocity: what single-pass distillation does at a queried state."""

from collections.abc import Sequence

import torch
from torch import Tensor

from kernels.checks import check_guidance, check_noise, check_schedule, check_state, check_targets, check_velocity
from kernels.common import (BLOCK, CHUNK, adjacent, block_position, launch, load_velocity, partition, per_sample, row_stride,
                            rows, tl, triton, use_triton)
from kernels.sde_step import finish_step, sde_step_reference, step_block
from kernels.velocity_mse import (backward, empty_direction, finish_teachers, needs_grad, setup_context, teacher_inputs,
                                  teachers_block, tensors, velocity_mse_reference)


@triton.jit(do_not_specialize=["seed"])
def opd_step_kernel(x_ptr, x_stride, v_ptr, v_stride, uncond_ptr, uncond_stride, guidance, targets, target_strides, unconds,
                    uncond_strides, guidances, alpha_ptr, noise_ptr, noise_stride, seed, index_ptr, sigma_ptr, sigma_next_ptr,
                    s_ptr, direction_ptr, x_next_ptr, partials_ptr, dims, n_blocks, K: tl.constexpr, BLOCK: tl.constexpr):
    """K + 1 partial sums per block: the K teachers', then the step's."""
    sample, block, offsets, mask = block_position(dims, n_blocks, BLOCK)
    v = load_velocity(v_ptr, v_stride, uncond_ptr, uncond_stride, guidance, sample, offsets, mask)
    square = step_block(x_ptr, x_stride, v, noise_ptr, noise_stride, seed, index_ptr, sigma_ptr, sigma_next_ptr, s_ptr,
                        x_next_ptr, sample, block, offsets, mask, dims, BLOCK)
    slot_ptr = partials_ptr + (sample * n_blocks + block) * (K + 1)
    teachers_block(v, targets, target_strides, unconds, uncond_strides, guidances, alpha_ptr, direction_ptr, slot_ptr, sample,
                   offsets, mask, dims, K)
    tl.store(slot_ptr + K, tl.sum(square))


@triton.jit
def opd_step_finish_kernel(partials_ptr, alpha_ptr, w_ptr, sigma_ptr, sigma_next_ptr, s_ptr, per_teacher_ptr, loss_ptr,
                           log_prob_ptr, dims, n_blocks, K: tl.constexpr, CHUNK: tl.constexpr):
    sample = tl.program_id(0).to(tl.int64)
    finish_teachers(partials_ptr, alpha_ptr, w_ptr, per_teacher_ptr, loss_ptr, sample, dims, n_blocks, K, K + 1, CHUNK)
    finish_step(partials_ptr, sigma_ptr, sigma_next_ptr, s_ptr, log_prob_ptr, sample, K, dims, n_blocks, K + 1, CHUNK)


@torch.library.custom_op("flow_opd::opd_step", mutates_args=())
def opd_step_op(v: Tensor, v_uncond: Tensor | None, targets: Sequence[Tensor], targets_uncond: Sequence[Tensor],
                alpha: Tensor, w: Tensor, guidance: float, target_guidance: Sequence[float], x: Tensor, sigma: Tensor,
                sigma_next: Tensor, s: Tensor, noise: Tensor | None, seed: int, index: Tensor | None,
                need_grad: bool) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The launcher: (loss, per_teacher, x_next, log_prob, direction). Backward is that of `velocity_mse`."""
    batch, dims, n_blocks = partition(v)
    teachers = len(targets)
    x, v, v_uncond, noise, w_B = rows(x), rows(v), rows(v_uncond), rows(noise), per_sample(w)
    inputs = teacher_inputs(v, targets, targets_uncond, target_guidance, alpha)
    schedule = per_sample(sigma), per_sample(sigma_next), per_sample(s)
    x_next = torch.empty(x.shape, dtype=torch.float32, device=x.device)
    log_prob = torch.empty(batch, dtype=torch.float32, device=x.device)
    per_teacher = torch.empty((batch, teachers), dtype=torch.float32, device=x.device)
    loss_B = torch.empty(batch, dtype=torch.float32, device=x.device)
    partials = torch.empty(batch * n_blocks * (teachers + 1), dtype=torch.float32, device=x.device)
    direction = empty_direction(v, need_grad)
    launch(opd_step_kernel, batch * n_blocks, x, row_stride(x), v, row_stride(v), v_uncond, row_stride(v_uncond), guidance,
           *inputs, noise, row_stride(noise), seed, adjacent(index), *schedule, direction if need_grad else None, x_next,
           partials, dims, n_blocks, K=teachers, BLOCK=BLOCK)
    launch(opd_step_finish_kernel, batch, partials, inputs[-1], w_B, *schedule, per_teacher, loss_B, log_prob, dims, n_blocks,
           K=teachers, CHUNK=CHUNK)
    return loss_B.mean(), per_teacher, x_next, log_prob, direction


@opd_step_op.register_fake
def _(v, v_uncond, targets, targets_uncond, alpha, w, guidance, target_guidance, x, sigma, sigma_next, s, noise, seed, index,
      need_grad):
    x_next = torch.empty(x.shape, dtype=torch.float32, device=x.device)
    loss, log_prob = x_next.new_empty(()), x_next.new_empty(x.shape[0])
    return loss, x_next.new_empty(alpha.shape), x_next, log_prob, empty_direction(v, need_grad)


opd_step_op.register_autograd(backward, setup_context=setup_context)


def opd_step_reference(x, v, targets, alpha, w, sigma, sigma_next, s, noise, seed, index, v_uncond, guidance,
                       targets_uncond, target_guidance):
    """The equations, on any device, in any precision."""
    loss, per_teacher = velocity_mse_reference(v, targets, alpha, w, v_uncond, guidance, targets_uncond, target_guidance)
    x_next, log_prob = sde_step_reference(x, v, sigma, sigma_next, s, noise, seed, index, v_uncond, guidance)
    return loss, per_teacher, x_next, log_prob


def opd_step(x: Tensor, v: Tensor, targets, alpha: Tensor, w: Tensor, sigma: Tensor, sigma_next: Tensor, s: Tensor,
             noise: Tensor | None = None, *, seed: int | None = None, index: Tensor | None = None,
             v_uncond: Tensor | None = None, guidance: float = 1.0, targets_uncond=None,
             target_guidance=None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`velocity_mse` and `sde_step` in one: (loss, per_teacher, x_next, log_prob).

    Arguments, shapes, dtypes, units and errors are those of the two. The loss carries a gradient to v and v_uncond;
    x_next and log_prob come from the detached velocity, so the state stays a constant. s = 0 makes it an ODE step.
    """
    check_state("x", x)
    check_velocity("v", v, x)
    check_schedule(x, sigma, sigma_next, s)
    check_noise(x, noise, seed, index)
    check_guidance(v_uncond, guidance, v)
    targets, targets_uncond, target_guidance = check_targets(v, targets, alpha, w, targets_uncond, target_guidance)
    if use_triton(x):
        loss, per_teacher, x_next, log_prob, _ = opd_step_op(
            v, v_uncond, tensors(targets, v), tensors(targets_uncond, v), alpha.detach(), w.detach(), float(guidance),
            target_guidance, x.detach(), sigma.detach(), sigma_next.detach(), s.detach(), noise, 0 if seed is None else seed,
            index, needs_grad(v, v_uncond))
        return loss, per_teacher, x_next, log_prob
    return opd_step_reference(x, v, targets, alpha, w, sigma, sigma_next, s, noise, seed, index, v_uncond, guidance,
                              targets_uncond, target_guidance)
