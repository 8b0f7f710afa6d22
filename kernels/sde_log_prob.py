"""Log-probability of a stored transition under the current velocity, differentiable (eq. 11; GRPO's ratio)."""

import torch
from torch import Tensor

from kernels.checks import check_guidance, check_same, check_schedule, check_state, check_velocity
from kernels.common import (BLOCK, CHUNK, block_position, launch, load_velocity, partition, per_sample, row_stride, rows, tl,
                            transition, triton, use_triton)
from kernels.sde_step import sde_step_finish_kernel
from opd import flow


@triton.jit
def sde_log_prob_kernel(x_next_ptr, x_next_stride, x_ptr, x_stride, v_ptr, v_stride, uncond_ptr, uncond_stride, guidance,
                        sigma_ptr, sigma_next_ptr, s_ptr, partials_ptr, dims, n_blocks, BLOCK: tl.constexpr):
    """One block's sum of (x_next - mean)^2; `sde_step_finish_kernel` turns the sums into log-probabilities."""
    sample, block, offsets, mask = block_position(dims, n_blocks, BLOCK)
    v = load_velocity(v_ptr, v_stride, uncond_ptr, uncond_stride, guidance, sample, offsets, mask)
    x = tl.load(x_ptr + sample * x_stride + offsets, mask=mask, other=0.0)
    x_next = tl.load(x_next_ptr + sample * x_next_stride + offsets, mask=mask, other=0.0)
    keep, move, std = transition(sigma_ptr, sigma_next_ptr, s_ptr, sample)
    error = x_next - (x * keep - v * move)
    tl.store(partials_ptr + sample * n_blocks + block, tl.sum(error * error))


@triton.jit
def sde_log_prob_backward_kernel(x_next_ptr, x_next_stride, x_ptr, x_stride, v_ptr, v_stride, uncond_ptr, uncond_stride,
                                 guidance, sigma_ptr, sigma_next_ptr, s_ptr, grad_ptr, grad_v_ptr, grad_uncond_ptr, dims,
                                 n_blocks, BLOCK: tl.constexpr):
    """d log_prob / d v = -(x_next - mean) move / (std^2 d), times g for v and 1 - g for v_uncond."""
    sample, block, offsets, mask = block_position(dims, n_blocks, BLOCK)
    v = load_velocity(v_ptr, v_stride, uncond_ptr, uncond_stride, guidance, sample, offsets, mask)
    x = tl.load(x_ptr + sample * x_stride + offsets, mask=mask, other=0.0)
    x_next = tl.load(x_next_ptr + sample * x_next_stride + offsets, mask=mask, other=0.0)
    keep, move, std = transition(sigma_ptr, sigma_next_ptr, s_ptr, sample)
    error = x_next - (x * keep - v * move)
    grad = error * tl.div_rn(-tl.load(grad_ptr + sample) * move, std * std * dims)
    out = sample * dims + offsets
    if uncond_ptr is not None:
        tl.store(grad_uncond_ptr + out, ((1 - guidance) * grad).to(grad_uncond_ptr.dtype.element_ty), mask=mask)
        grad = guidance * grad
    tl.store(grad_v_ptr + out, grad.to(grad_v_ptr.dtype.element_ty), mask=mask)


def _kernel_inputs(x_next, x, v, v_uncond, sigma, sigma_next, s, guidance):
    x_next, x, v, v_uncond = rows(x_next), rows(x), rows(v), rows(v_uncond)
    return (x_next, row_stride(x_next), x, row_stride(x), v, row_stride(v), v_uncond, row_stride(v_uncond), guidance,
            per_sample(sigma), per_sample(sigma_next), per_sample(s))


@torch.library.custom_op("flow_opd::sde_log_prob", mutates_args=())
def sde_log_prob_op(x_next: Tensor, x: Tensor, v: Tensor, v_uncond: Tensor | None, sigma: Tensor, sigma_next: Tensor, s: Tensor,
                    guidance: float) -> Tensor:
    """The forward launcher."""
    batch, dims, n_blocks = partition(x)
    inputs = _kernel_inputs(x_next, x, v, v_uncond, sigma, sigma_next, s, guidance)
    partials = torch.empty(batch * n_blocks, dtype=torch.float32, device=x.device)
    log_prob = torch.empty(batch, dtype=torch.float32, device=x.device)
    launch(sde_log_prob_kernel, batch * n_blocks, *inputs, partials, dims, n_blocks, BLOCK=BLOCK)
    launch(sde_step_finish_kernel, batch, partials, *inputs[-3:], log_prob, dims, n_blocks, CHUNK=CHUNK)
    return log_prob


@torch.library.custom_op("flow_opd::sde_log_prob_backward", mutates_args=())
def sde_log_prob_backward_op(grad: Tensor, x_next: Tensor, x: Tensor, v: Tensor, v_uncond: Tensor | None, sigma: Tensor,
                             sigma_next: Tensor, s: Tensor, guidance: float) -> tuple[Tensor, Tensor]:
    """The backward launcher: reads the inputs again, so that forward stores nothing. No v_uncond: second output empty."""
    batch, dims, n_blocks = partition(x)
    grad_v = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    grad_uncond = torch.empty(v.shape if v_uncond is not None else 0, dtype=v.dtype, device=v.device)
    inputs = _kernel_inputs(x_next, x, v, v_uncond, sigma, sigma_next, s, guidance)
    launch(sde_log_prob_backward_kernel, batch * n_blocks, *inputs, per_sample(grad), grad_v, grad_uncond, dims, n_blocks,
           BLOCK=BLOCK)
    return grad_v, grad_uncond


@sde_log_prob_op.register_fake
def _(x_next, x, v, v_uncond, sigma, sigma_next, s, guidance):
    return x.new_empty(x.shape[0], dtype=torch.float32)


@sde_log_prob_backward_op.register_fake
def _(grad, x_next, x, v, v_uncond, sigma, sigma_next, s, guidance):
    grad_v = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    return grad_v, torch.empty(v.shape if v_uncond is not None else 0, dtype=v.dtype, device=v.device)


def _setup_context(ctx, inputs, output):
    *tensors, ctx.guidance = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, grad):
    x_next, x, v, v_uncond, sigma, sigma_next, s = ctx.saved_tensors
    grad_v, grad_uncond = sde_log_prob_backward_op(grad, x_next, x, v, v_uncond, sigma, sigma_next, s, ctx.guidance)
    return None, None, grad_v, grad_uncond if v_uncond is not None else None, None, None, None, None


sde_log_prob_op.register_autograd(_backward, setup_context=_setup_context)


def sde_log_prob_reference(x_next, x, v, sigma, sigma_next, s, v_uncond, guidance):
    """The equations, on any device, in any precision."""
    v = flow.guided(v, v_uncond, guidance).to(x.dtype)
    mean = flow.sde_mean(x.detach(), v, sigma, sigma_next, s)
    return flow.log_prob_mean(x_next.detach(), mean, flow.step_std(sigma, sigma_next, s))


def sde_log_prob(x_next: Tensor, x: Tensor, v: Tensor, sigma: Tensor, sigma_next: Tensor, s: Tensor, *,
                 v_uncond: Tensor | None = None, guidance: float = 1.0) -> Tensor:
    """log p(x_next | x) under the guided velocity v_u + g (v - v_u): (B,) float32, mean over dimensions, nats per dimension.

    x_next, x: (B, ...) float32, constants.  v, v_uncond: (B, ...) float32, bf16 or fp16, differentiable.
    sigma, sigma_next, s: (B,) float32; s > 0 is the diffusion coefficient, std per sqrt(unit sigma).
    ValueError: a wrong shape, dtype, device, layout or schedule, guidance without v_uncond.
    """
    check_state("x", x)
    check_state("x_next", x_next)
    check_same("x_next", x_next, x, "x")
    check_velocity("v", v, x)
    check_schedule(x, sigma, sigma_next, s, positive_s=True)
    check_guidance(v_uncond, guidance, v)
    if use_triton(x):
        return sde_log_prob_op(x_next.detach(), x.detach(), v, v_uncond, sigma.detach(), sigma_next.detach(), s.detach(),
                               float(guidance))
    return sde_log_prob_reference(x_next, x, v, sigma, sigma_next, s, v_uncond, guidance)
