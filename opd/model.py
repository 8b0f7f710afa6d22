"""One model at work: a frozen base with its adapters, its text conditions, its velocity and its images."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from types import ModuleType

import torch
from diffusers.utils import logging as diffusers_logging
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers.utils import logging as transformers_logging

from opd import flow, kernels, lora, signals, trajectory
from opd.cli import in_pixels, pixels_of
from opd.conditioning import Conditioning
from opd.data import Asked, alike, seed_of
from opd.families import Condition, family_of, unconditional
from opd.families._parts import vae_skeleton
from opd.files import reading
from opd.formats import lora_files
from opd.formats.hub import check_encoders, check_weights, find_pipeline, stored, weight_files
from opd.formats.lora_files import Lora
from opd.trajectory import State

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}

# Their bars for loading a handful of files would bury ours.
diffusers_logging.disable_progress_bar()
transformers_logging.disable_progress_bar()
transformers_logging.set_verbosity_error()


@dataclass(frozen=True)
class Sampling:
    """How pictures are made from noise: along the ODE."""

    steps: int
    seed: int
    guidance: float


@dataclass
class Model:
    family: ModuleType
    """A module of opd/families."""
    folder: Path
    """The pipeline's directory."""
    skeleton: torch.nn.Module
    """The transformer on the meta device: names and shapes to check adapters against, before weights load."""
    shape: tuple[int, int, int]
    """(C, H, W) of the latents."""
    conditioning: Conditioning
    """The encoded prompts."""
    dtype: torch.dtype
    """What the transformer computes in."""
    device: torch.device
    trained: str = lora.STUDENT
    """The adapter that is trained; lora.BASE where all weights are."""
    decode_pixels: int = 4 * 1024**2
    """How many pixels of images the VAE decodes at once: its activations take gigabytes per million."""
    transformer: torch.nn.Module = None
    vae: torch.nn.Module = None
    teachers: dict[str, "Model"] = field(default_factory=dict)
    """The teachers with a transformer of their own."""
    grids: dict[int, list[float]] = field(default_factory=dict)
    """The noise levels by number of steps."""
    coefficients: dict[tuple, list[flow.Transition]] = field(default_factory=dict)
    """The transitions by (steps, rollout, noise_level)."""

    # ---- from a name to a loaded model ----

    @classmethod
    def plan(cls, source: str, dtype: str, resolution: str, device: torch.device, t5: bool) -> "Model":
        """Everything that can be known, and refused, before weights load. `resolution` "" is the model's own.

        FileNotFoundError / ValueError: no such source, no pipeline that we know, a resolution that does not
        fit.
        """
        folder = find_pipeline(source)
        family = family_of(folder)
        check_encoders(folder, t5)
        with reading(f"model {source!r}"):
            skeleton = family.skeleton(folder)
            check_weights(stored(weight_files(folder / "transformer")), skeleton)
            own = family.default_resolution(folder)
            height, width = pixels_of(resolution or str(own))
            vae_skeleton(folder)  # refuses a class that diffusers lacks
            shape = family.latent_shape(folder, height, width)
        compute = compute_dtype(dtype, device)
        conditioning = Conditioning(family, folder, compute, device, t5)
        model = cls(family, folder, skeleton, shape, conditioning, compute, device)
        with reading(f"{folder / 'scheduler'}"):
            model.sigmas(100)  # so many that none of a wrong shift's poles lies between two of them
        return model

    def read_lora(self, source: str) -> Lora:
        """An adapter from disk or Hub. ValueError / FileNotFoundError for a bad file, and for one that was
        made for another base."""
        adapter = lora_files.read_lora(source, self.family.convert_lora)
        lora_files.check_fits(adapter, self.skeleton)
        return adapter

    def prepare(self, prompts: list[Asked]) -> None:
        """Encode `prompts`, and what guidance needs beside them, and keep them."""
        self.conditioning.check(prompts)
        self.conditioning.prepare([*prompts, self.family.NEGATIVE])

    def follow(self, steps: list[list[Asked]], done: int) -> None:
        """Tell which prompts every step of the run will read, and encode those of the steps after `done`."""
        self.conditioning.check([asked for step in steps for asked in step])
        self.conditioning.follow(steps)
        self.conditioning.ahead(done)

    def ahead(self, step: int) -> None:
        """Before a step: encode the prompts of the window that it begins, if it does."""
        for model in (self, *self.teachers.values()):
            model.conditioning.ahead(step)

    def load(self, dtype: torch.dtype | None = None) -> None:
        """Load the transformer, on the CPU in `dtype` (default: the compute dtype), and the VAE."""
        with reading(f"{self.folder / 'transformer'}"):
            self.transformer = self.family.load_transformer(self.folder, dtype or self.dtype)
            check_finite(self.transformer)
        with reading(f"{self.folder / 'vae'}"):
            self.vae = self.family.load_vae(self.folder)
            check_finite(self.vae)
        self.vae.to(self.device)

    def recompute(self) -> None:
        """Keep no activations within a block: backward computes them again."""
        # No network here has dropout, so no state of random numbers is fetched from the device and kept.
        again = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
        self.transformer.enable_gradient_checkpointing(again)

    def load_with(self, sources: dict[str, str], prompts: list[Asked]) -> "Model":
        """Make a planned model ready to sample: frozen adapters by name attached, `prompts` encoded. Whatever
        can be refused is refused before weights load."""
        loras = {name: self.read_lora(source) for name, source in sources.items() if name != lora.BASE}
        self.prepare(prompts)
        self.load()
        for name, adapter in loras.items():
            lora.attach(self.transformer, name, adapter, self.dtype)
        self.transformer.to(self.device)
        return self

    @property
    def pixels(self) -> tuple[int, int]:
        """(height, width) of the pictures."""
        unit = self.family.pixels(self.folder)
        return unit * self.shape[1], unit * self.shape[2]

    @property
    def resolution(self) -> str:
        """The same as --resolution has it."""
        return in_pixels(*self.pixels)

    # ---- the velocity ----

    def shapes(self, prompts: list[Asked], each: int = 1) -> dict[int, str]:
        """Number of a sample -> sizes of its source pictures as the transformer sees them, "" without any;
        `each` samples in a row have one prompt."""
        return {n: self.conditioning.shape(prompts[n // each]) for n in range(each * len(prompts))}

    def text(self, prompts: list[Asked]) -> list[Condition]:
        """The conditions of prompts, on the device; rows of a batch are a slice of the list."""
        return self.conditioning(prompts)

    def velocity(self, x_BCHW: Tensor, sigma_B: Tensor, text: list[Condition], guidance: float) -> Tensor:
        """dx/dsigma (B, C, H, W) float32 of the adapter in use, guided: guidance is part of the policy, known
        here and to the family alone. One forward; with guidance both branches ride in one batch."""
        family = self.family
        if family.guide is None:
            return family.velocity(self.transformer, x_BCHW, sigma_B, family.collate(text), guidance).float()
        if guidance == 1.0:
            return family.velocity(self.transformer, x_BCHW, sigma_B, family.collate(text)).float()
        both = family.collate(text + [unconditional(condition, self.negative) for condition in text])
        twice_x, twice_sigma = torch.cat([x_BCHW, x_BCHW]), torch.cat([sigma_B, sigma_B])
        v, v_uncond = family.velocity(self.transformer, twice_x, twice_sigma, both).chunk(2)
        return family.guide(v, v_uncond, guidance).float()

    @cached_property
    def negative(self) -> Condition:
        """The condition of the unconditional branch, without source pictures."""
        return self.text([self.family.NEGATIVE])[0]

    # ---- the walk from noise ----

    def sigmas(self, steps: int) -> list[float]:
        """The pipeline's noise levels, `steps` + 1 of them, from 1 down to 0."""
        if steps not in self.grids:
            self.grids[steps] = self.family.sigmas(self.folder, self.shape, steps)
        return self.grids[steps]

    def path(self, steps: int, rollout: str, noise_level: float, key: tuple) -> trajectory.Path:
        """The pipeline's noise levels with each step's transition, and its seed made of `key`. `rollout`
        names one of flow.TRANSITIONS. Coefficients are 0-dim float64 tensors on the CPU."""
        kind = (steps, rollout, noise_level)
        if kind not in self.coefficients:
            sigma = torch.tensor(self.sigmas(steps), dtype=torch.float64)
            every = flow.TRANSITIONS[rollout](sigma[:-1], sigma[1:], noise_level)
            self.coefficients[kind] = [every.at(i) for i in range(steps)]
        seeds = [seed_of(*key, i) for i in range(steps)]
        return trajectory.Path(self.sigmas(steps), self.coefficients[kind], seeds)

    def walk(
        self, path: trajectory.Path, seed: int, index: list[int], starts: list[int] | None = None
    ) -> Iterator[State]:
        """The states of samples `index` along `path`, from noise that depends on `seed` and the sample alone
        (or on the number in `starts`, where several samples shall start alike)."""
        index_B = torch.tensor(index).to(self.device, non_blocking=True)
        starts_B = index_B
        if starts is not None:
            starts_B = torch.tensor(starts).to(self.device, non_blocking=True)
        x = kernels.normal((len(index), *self.shape), seed, starts_B, device=self.device)
        return trajectory.walk(x, path, index_B)

    @torch.no_grad()
    def latents(self, adapter: str, prompts: list[Asked], index: Sequence[int], sampling: Sampling) -> Tensor:
        """(B, C, H, W) float32 sampled by an adapter, or by the teacher with a transformer of its own that is
        called so; sample b depends on (seed, index[b]) and its prompt."""
        if adapter in self.teachers:
            return self.teachers[adapter].latents(lora.BASE, prompts, index, sampling).to(self.device)
        path = self.path(sampling.steps, "ode", 0.0, (sampling.seed, "step"))
        made = {}
        for rows in alike(self.shapes(prompts)):
            text, numbers = self.text([prompts[b] for b in rows]), [index[b] for b in rows]
            with lora.use(self.transformer, adapter):
                for state in self.walk(path, seed_of(sampling.seed, "start"), numbers):
                    signals.boundary()
                    state.step(self.velocity(state.x, state.sigma_B, text, sampling.guidance))
            made |= dict(zip(rows, state.x_next, strict=True))
        return torch.stack([made[b] for b in range(len(prompts))])

    def images(self, adapter: str, prompts: list[Asked], index: Sequence[int], sampling: Sampling) -> Tensor:
        """The same, decoded: (B, 3, height, width) float32 in [0, 1] on the CPU."""
        return self.decode(self.latents(adapter, prompts, index, sampling))

    def decode(self, latents_BCHW: Tensor) -> Tensor:
        """Images (B, 3, height, width) float32 in [0, 1] on the CPU, decoded in pieces of bounded memory."""
        height, width = self.pixels
        count = max(1, self.decode_pixels // (height * width))
        latents_BCHW = latents_BCHW.to(self.vae.device)
        pieces = [self.family.decode(self.vae, piece).cpu() for piece in latents_BCHW.split(count)]
        return torch.cat(pieces)


def check_finite(module: torch.nn.Module) -> None:
    """ValueError naming the first weight that holds NaN or infinity; a sum, which either spoils, is one
    pass."""
    for name, weight in module.state_dict().items():
        if not weight.is_floating_point() or weight.sum(dtype=torch.float32).isfinite():
            continue
        bad = int((~weight.isfinite()).sum())
        if bad > 0:
            raise ValueError(f"{bad} of {weight.numel()} numbers of {name} are NaN or infinite; get it anew")


def compute_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype named so; "auto" is bfloat16 on an accelerator and on CPUs with matrix units, else float32.

    A CPU without AMX takes half as long again in bfloat16 as in float32, even one with AVX512-BF16, whose
    products are twice as fast; one without either emulates it, more than ten times slower."""
    if name != "auto":
        return DTYPES[name]
    if device.type != "cpu":
        return torch.bfloat16
    return torch.bfloat16 if torch.cpu._is_amx_tile_supported() else torch.float32
