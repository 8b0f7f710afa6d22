"""One stochastic step of the rollout and the log-probability of the state it lands on (eq. 5, 6, 11)."""

import torch
from torch import Tensor

from kernels.checks import check_guidance, check_noise, check_schedule, check_state, check_velocity
from kernels.common import (BLOCK, CHUNK, adjacent, block_position, gaussian_log_prob, launch, load_velocity, mean_of_partials,
                            normal_block, partition, per_sample, row_stride, rows, tl, transition, triton, use_triton)
from kernels.noise import normal
from opd import flow


@triton.jit
def step_block(x_ptr, x_stride, v, noise_ptr, noise_stride, seed, index_ptr, sigma_ptr, sigma_next_ptr, s_ptr, x_next_ptr,
               sample, block, offsets, mask, dims, BLOCK: tl.constexpr):
    """One block of x_next from its velocity: stores it, returns (x_next - mean)^2 of what was stored."""
    x = tl.load(x_ptr + sample * x_stride + offsets, mask=mask, other=0.0)
    if noise_ptr is not None:
        noise = tl.load(noise_ptr + sample * noise_stride + offsets, mask=mask, other=0.0)
    else:
        number = sample
        if index_ptr is not None:
            number = tl.load(index_ptr + sample)
        noise = normal_block(seed, number, block, BLOCK)
    keep, move, std = transition(sigma_ptr, sigma_next_ptr, s_ptr, sample)
    mean = x * keep - v * move
    x_next = mean + std * noise
    tl.store(x_next_ptr + sample * dims + offsets, x_next, mask=mask)
    error = tl.where(mask, x_next - mean, 0.0)
    return error * error


@triton.jit
def finish_step(partials_ptr, sigma_ptr, sigma_next_ptr, s_ptr, log_prob_ptr, sample, column, dims, n_blocks,
                COLUMNS: tl.constexpr, CHUNK: tl.constexpr):
    """log_prob of one sample from the partial sums in `column`; +inf for a step without noise."""
    keep, move, std = transition(sigma_ptr, sigma_next_ptr, s_ptr, sample)
    mean_square = mean_of_partials(partials_ptr, sample, column, dims, n_blocks, COLUMNS, CHUNK)
    log_prob = gaussian_log_prob(mean_square, std)
    tl.store(log_prob_ptr + sample, tl.where(std == 0.0, float("inf"), log_prob))


@triton.jit(do_not_specialize=["seed"])
def sde_step_kernel(x_ptr, x_stride, v_ptr, v_stride, uncond_ptr, uncond_stride, guidance, noise_ptr, noise_stride, seed,
                    index_ptr, sigma_ptr, sigma_next_ptr, s_ptr, x_next_ptr, partials_ptr, dims, n_blocks, BLOCK: tl.constexpr):
    sample, block, offsets, mask = block_position(dims, n_blocks, BLOCK)
    v = load_velocity(v_ptr, v_stride, uncond_ptr, uncond_stride, guidance, sample, offsets, mask)
    square = step_block(x_ptr, x_stride, v, noise_ptr, noise_stride, seed, index_ptr, sigma_ptr, sigma_next_ptr, s_ptr,
                        x_next_ptr, sample, block, offsets, mask, dims, BLOCK)
    tl.store(partials_ptr + sample * n_blocks + block, tl.sum(square))


@triton.jit
def sde_step_finish_kernel(partials_ptr, sigma_ptr, sigma_next_ptr, s_ptr, log_prob_ptr, dims, n_blocks, CHUNK: tl.constexpr):
    finish_step(partials_ptr, sigma_ptr, sigma_next_ptr, s_ptr, log_prob_ptr, tl.program_id(0).to(tl.int64), 0, dims, n_blocks,
                1, CHUNK)


@torch.library.custom_op("flow_opd::sde_step", mutates_args=())
def sde_step_op(x: Tensor, v: Tensor, v_uncond: Tensor | None, sigma: Tensor, sigma_next: Tensor, s: Tensor,
                noise: Tensor | None, seed: int, index: Tensor | None, guidance: float) -> tuple[Tensor, Tensor]:
    """The launcher. seed is ignored when noise is given."""
    batch, dims, n_blocks = partition(x)
    x, v, v_uncond, noise = rows(x), rows(v), rows(v_uncond), rows(noise)
    schedule = per_sample(sigma), per_sample(sigma_next), per_sample(s)
    x_next = torch.empty(x.shape, dtype=torch.float32, device=x.device)
    log_prob = torch.empty(batch, dtype=torch.float32, device=x.device)
    partials = torch.empty(batch * n_blocks, dtype=torch.float32, device=x.device)
    launch(sde_step_kernel, batch * n_blocks, x, row_stride(x), v, row_stride(v), v_uncond, row_stride(v_uncond), guidance,
           noise, row_stride(noise), seed, adjacent(index), *schedule, x_next, partials, dims, n_blocks, BLOCK=BLOCK)
    launch(sde_step_finish_kernel, batch, partials, *schedule, log_prob, dims, n_blocks, CHUNK=CHUNK)
    return x_next, log_prob


@sde_step_op.register_fake
def _(x, v, v_uncond, sigma, sigma_next, s, noise, seed, index, guidance):
    return torch.empty(x.shape, dtype=torch.float32, device=x.device), x.new_empty(x.shape[0], dtype=torch.float32)


@torch.no_grad()
def sde_step_reference(x, v, sigma, sigma_next, s, noise, seed, index, v_uncond, guidance):
    """The equations, on any device, in any precision."""
    if noise is None:
        noise = normal(x.shape, seed, index, device=x.device).to(x.dtype)
    v = flow.guided(v, v_uncond, guidance).to(x.dtype)
    mean = flow.sde_mean(x, v, sigma, sigma_next, s)
    std_B = flow.step_std(sigma, sigma_next, s).to(x.dtype)
    x_next = mean + std_B.reshape(-1, *[1] * (x.ndim - 1)) * noise
    log_prob_B = flow.log_prob_mean(x_next, mean, std_B)
    return x_next, torch.where(std_B == 0, torch.inf, log_prob_B)


def sde_step(x: Tensor, v: Tensor, sigma: Tensor, sigma_next: Tensor, s: Tensor, noise: Tensor | None = None, *,
             seed: int | None = None, index: Tensor | None = None, v_uncond: Tensor | None = None,
             guidance: float = 1.0) -> tuple[Tensor, Tensor]:
    """x_next = mean + s sqrt(D) z and log p(x_next | x), from the guided velocity v_u + g (v - v_u).

    x: (B, ...) float32.  v, v_uncond: (B, ...) float32, bf16 or fp16.
    sigma, sigma_next, s: (B,) float32; s is the diffusion coefficient, std per sqrt(unit sigma).
    noise: (B, ...) float32; or seed (0 <= seed < 2**63), from which z is drawn as `kernels.normal` does, sample b
    being number index[b] ((B,) int64, default 0 .. B-1).
    Returns x_next (B, ...) float32 and log_prob (B,) float32: mean over dimensions of the log-density of the x_next
    that is returned, nats per dimension; +inf where s = 0, an ODE step. Neither carries a gradient (`sde_log_prob` does).
    ValueError: a wrong shape, dtype, device, layout or schedule, guidance without v_uncond, not exactly one of noise and seed.
    """
    check_state("x", x)
    check_velocity("v", v, x)
    check_schedule(x, sigma, sigma_next, s)
    check_noise(x, noise, seed, index)
    check_guidance(v_uncond, guidance, v)
    if use_triton(x):
        uncond = None if v_uncond is None else v_uncond.detach()
        return sde_step_op(x.detach(), v.detach(), uncond, sigma, sigma_next, s, noise, 0 if seed is None else seed, index,
                           float(guidance))
    return sde_step_reference(x, v, sigma, sigma_next, s, noise, seed, index, v_uncond, guidance)
