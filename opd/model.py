"""One model at work: a frozen base with its adapters, its prompts' conditioning, its latents and its images."""

from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType

import torch

from opd import adapters, flow
from opd.conditioning import Conditioning
from opd.config import load_family
from opd.files import find_pipeline
from opd.rollout import sample

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def compute_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype of this name; "auto" is bfloat16 on an accelerator and on CPUs that multiply it, else float32.

    A CPU without AVX512-BF16 or AMX emulates bfloat16 more than ten times slower than it computes in float32.
    """
    if name != "auto":
        return DTYPES[name]
    fast = device.type != "cpu" or torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if fast else torch.float32


@dataclass
class Model:
    family: ModuleType
    folder: Path
    skeleton: torch.nn.Module
    """The bare transformer on the meta device: names and shapes to check adapters against, before weights load."""
    shape: tuple[int, int, int]
    """(C, H, W) of the latents."""
    conditioning: Conditioning
    dtype: torch.dtype
    device: torch.device
    transformer: torch.nn.Module = None
    vae: torch.nn.Module = None
    grids: dict[int, list[float]] = field(default_factory=dict)

    @classmethod
    def plan(cls, family: ModuleType, source: str, dtype: str, resolution: int, cache: str, device: torch.device,
             t5: bool) -> "Model":
        """Everything that can be known, and refused, before weights load."""
        folder = find_pipeline(source, family.PIPELINE)
        shape = family.latent_shape(folder, resolution or family.default_resolution(folder))
        compute = compute_dtype(dtype, device)
        conditioning = Conditioning(family, folder, cache, compute, device, t5)
        return cls(family, folder, family.skeleton(folder), shape, conditioning, compute, device)

    def load(self, dtype: torch.dtype | None = None) -> None:
        """Load the transformer (in `dtype`, default the compute dtype) and the VAE."""
        self.transformer = self.family.load_transformer(self.folder, dtype or self.dtype)
        self.vae = self.family.load_vae(self.folder).to(self.device)

    @classmethod
    def ready(cls, args, device: torch.device, prompts: list[str]) -> "Model":
        """A model to sample from, frozen adapters attached and prompts encoded; `args` are those of sample.py or
        opd.evaluate. Whatever can be refused is refused before weights load."""
        model = cls.plan(load_family(args.family), args.model, args.dtype, args.resolution, args.cache, device, args.t5)
        loras = {name: adapters.read_lora(source) for name, source in args.adapters.items() if name != adapters.BASE}
        for lora in loras.values():
            adapters.check_fits(lora, model.skeleton, model.family.LORA_TARGETS)
        model.conditioning.prepare([*prompts, ""])
        model.load()
        for name, lora in loras.items():
            adapters.attach(model.transformer, name, lora, model.dtype)
        model.transformer.to(device)
        return model

    def grid(self, steps: int) -> list[float]:
        """The scheduler's sigmas, `steps` + 1 of them, from 1 down to 0."""
        if steps not in self.grids:
            tokens = self.family.image_tokens(self.folder, self.shape)
            self.grids[steps] = flow.sigma_grid(self.family.load_scheduler(self.folder), steps, image_tokens=tokens).tolist()
        return self.grids[steps]

    def images(self, adapter: str, prompts: list[str], index: list[int], *, steps: int, seed: int, guidance: float,
               rollout: str = "ode", noise_level: float = 0.7) -> torch.Tensor:
        """Images (B, 3, H, W) float32 in [0, 1] on the CPU; image b depends on (seed, index[b]) and its prompt alone."""
        unconditional = self.conditioning([""]) if guidance != 1.0 else None
        where = torch.tensor(index, device=self.device)
        with adapters.use(self.transformer, adapter):
            latents = sample(self.family, self.transformer, self.conditioning(prompts), unconditional, self.grid(steps),
                             self.shape, seed=seed, index=where, guidance=guidance, rollout=rollout, noise_level=noise_level)
        return self.family.decode(self.vae, latents).cpu()
