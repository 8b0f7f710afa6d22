"""From noise to latents: the one sampling loop of evaluation, sample grids and `sample.py`."""

import torch

from kernels import normal, sde_step
from opd import flow
from opd.data import seed_of


def velocities(family, transformer, x_BCHW, sigma_B, conditioning, unconditional, guidance: float):
    """(v, v_uncond or None), each shaped like x: ONE forward; with guidance != 1 both halves ride in one batch.

    The two are combined inside the kernels (`flow.guided`), so nothing here knows the formula.
    """
    if guidance == 1.0:
        return family.velocity(transformer, x_BCHW, sigma_B, conditioning), None
    both = tuple(torch.cat([c, u.expand_as(c)]) for c, u in zip(conditioning, unconditional))
    return family.velocity(transformer, torch.cat([x_BCHW, x_BCHW]), torch.cat([sigma_B, sigma_B]), both).chunk(2)


def step(rollout: str, x, v, v_uncond, guidance, grid: list[float], i: int, noise_level: float, seed: int, index):
    """State i -> state i + 1 (float32) by `rollout` in {"sde", "ode", "cps"}. `index` (B,) names the global samples."""
    sigma, sigma_next = (torch.full((len(x),), grid[j], device=x.device) for j in (i, i + 1))
    if rollout == "sde":
        s = flow.diffusion_coefficient(sigma, grid[1], noise_level)
        return sde_step(x, v, sigma, sigma_next, s, seed=seed, index=index, v_uncond=v_uncond, guidance=guidance)[0]
    v = flow.guided(v.float(), None if v_uncond is None else v_uncond.float(), guidance)
    if rollout == "ode":
        return flow.ode_step(x, v, sigma, sigma_next)
    noise = normal(x.shape, seed, index, device=x.device)
    return flow.cps_step(x, v, sigma, sigma_next, noise_level, noise)


@torch.no_grad()
def sample(family, transformer, conditioning, unconditional, grid: list[float], shape_CHW, *, seed: int,
           index: torch.Tensor, guidance: float, rollout: str = "ode", noise_level: float = 0.7) -> torch.Tensor:
    """Latents (B, C, H, W) float32 at sigma 0. Sample b depends on (seed, index[b]) and its prompt alone."""
    x = normal((len(index), *shape_CHW), seed_of(seed, "start"), index, device=index.device)
    for i in range(len(grid) - 1):
        sigma_B = torch.full((len(x),), grid[i], device=x.device)
        v, v_uncond = velocities(family, transformer, x, sigma_B, conditioning, unconditional, guidance)
        x = step(rollout, x, v, v_uncond, guidance, grid, i, noise_level, seed_of(seed, "step", i), index)
    return x
