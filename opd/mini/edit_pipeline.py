"""Make the editing miniature: a genuine Flux2KleinPipeline directory, its data, and its shipped weights.

    P=runs/mini-edits-pipeline D=runs/mini-edits-data
    python -m opd.mini.edits runs/mini-edits                # prompt files and their pictures
    python -m opd.mini.edit_pipeline pipeline $P            # the shipped encoder and VAE, a new transformer
    python -m opd.mini.edit_pipeline data $D $P             # latents, instructions, source pictures
    torchrun train.py mini-edit-base                        # pretrain the base
    python -m opd.mini.build base $P runs/mini-edit-base/student opd/mini/weights/edits/base
    for t in recolour write paint; do
        torchrun train.py mini-edit-$t
        python -m opd.mini.build teacher runs/mini-edit-$t edits/$t
    done
    python -m opd.mini.build sha256

What came of it: opd/mini/study/RESULTS.md, "Editing".
"""

import sys
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from diffusers import Flux2KleinPipeline, Flux2Transformer2DModel
from einops import rearrange
from PIL import Image

from opd.families import flux2
from opd.formats.latents import write_samples
from opd.mini import build, drawing, edits, world

BASE = build.WEIGHTS / "edits/base"
IMAGES = {"recolour": 26_000, "write": 14_000, "paint": 8_000}


def build_pipeline(folder: Path) -> None:
    """Save the whole pipeline: the shipped text encoder and VAE, and a transformer that is untrained
    (`train.py mini-edit-base` trains it). Its modulations and output start at zero."""
    torch.manual_seed(0)
    config = Flux2Transformer2DModel.load_config(BASE, subfolder="transformer")
    model = Flux2Transformer2DModel.from_config(config)
    zero = (
        model.double_stream_modulation_img.linear,
        model.double_stream_modulation_txt.linear,
        model.single_stream_modulation.linear,
        model.norm_out.linear,
        model.proj_out,
    )
    for linear in zero:
        torch.nn.init.zeros_(linear.weight)
    pipeline = Flux2KleinPipeline.from_pretrained(BASE, transformer=model)
    pipeline.to(torch.bfloat16).save_pretrained(folder)


def samples(counts: dict[str, int], seed: int):
    """Yields `counts` training samples of each task: picture before (96, 96, 3) uint8 or None, picture after
    (3, 96, 96) uint8, instruction."""
    rng = np.random.default_rng(seed)
    tasks = rng.permutation(np.repeat(list(counts), list(counts.values()))).tolist()
    landscapes = world.split("quality")[0]
    for task in tasks:
        before = None
        if task == "paint":
            after, text = drawing.training_pair(landscapes[rng.integers(len(landscapes))], rng)
        else:
            pool = edits.split(task)[0]
            edit, other = (pool[number] for number in rng.integers(len(pool), size=2))
            if task == "write":  # any string may stand there before
                edit = replace(edit, before=other.after)
            before, after, _ = edits.draw(edit, rng, rng.random() < edits.FORGETFUL)
            before, text = edits.large(before), edits.misread(edit, rng)
        yield before, rearrange(torch.from_numpy(edits.large(after)), "h w c -> c h w"), text


def write_data(folder: Path, pipeline: Path, counts: dict[str, int]) -> None:
    """Latents, instructions and source pictures, as stage sft reads them."""
    vae = flux2.load_vae(pipeline)
    (folder / "sources").mkdir(parents=True, exist_ok=True)
    rows, latents = [], []
    drawn = enumerate(samples(counts, seed=10))
    while batch := list(islice(drawn, 64)):
        for number, (before, _, text) in batch:
            rows.append({"prompt": text})
            if before is not None:
                rows[-1]["image"] = f"sources/{number}.png"
                Image.fromarray(before).save(folder / rows[-1]["image"])
        after_B3HW = torch.stack([after for _, (_, after, _) in batch]) / 255
        latents.append(flux2.encode_images(vae, after_B3HW).half())
    write_samples(folder, torch.cat(latents), rows)
    print(f"{folder}: {len(rows)} latents", flush=True)


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["pipeline", folder]:
            build_pipeline(Path(folder))
        case ["data", folder, pipeline]:
            write_data(Path(folder), Path(pipeline), IMAGES)
        case _:
            sys.exit(__doc__)
