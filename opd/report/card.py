"""A student's model card, README.md in its folder with the front matter that the Hub reads; its upload."""

import inspect
import shlex
from pathlib import Path

import diffusers
from huggingface_hub import HfApi, ModelCard, ModelCardData

from opd.config import RunConfig
from opd.files import path_of, reading, replace, resolve
from opd.formats.export import Deployment, deployment_of
from opd.formats.hub import variant_of
from opd.model import Model
from opd.report.start import facts


def write_card(folder: Path, cfg: RunConfig, model: Model, done: int, table: str) -> None:
    """README.md of the student in `folder` after `done` steps; `table` are its scores, "" without."""
    deployment, licence = deployment_of(cfg, model), licence_of(model)
    named = licence.get("license_name") or licence.get("license") or "not known; look it up"
    t5 = f"used, {deployment.max_sequence_length} tokens" if deployment.t5 else "not used"
    origins = "\n".join(f"- {name}: `{fact}`" for name, fact in facts(cfg).items())
    text = f"""---
{front_matter(cfg, model, licence).to_yaml()}
---

# {name_of(cfg)}

Made in {done} steps of {cfg.samples_per_step()} samples, seed {cfg.seed}.

## How to sample it

- base: `{cfg.model}` (licence of the base: {named})
- guidance: {deployment.guidance:g} (1 = none)
- resolution: {deployment.resolution} px
- steps: {deployment.steps} (ODE)
- T5: {t5}

{usage(cfg, model)}In diffusers:

```python
{snippet(cfg, model, deployment)}
```

## What it was made from

{origins}
"""
    if table:
        text += f"\n## Scores\n\n```\n{table}\n```\n"
    replace(folder / "README.md", lambda path: path.write_text(text, encoding="utf-8"))


def front_matter(cfg: RunConfig, model: Model, licence: dict[str, str]) -> ModelCardData:
    """The base as a Hub id: a local path means nothing there."""
    base = None
    if not resolve(cfg.model).exists():
        base = cfg.model
    does = "image-to-image" if model.conditioning.edits() else "text-to-image"
    tags = [does, "flow-matching", f"stage-{cfg.stage}"]
    if not cfg.full:
        tags.append("lora")
    kind = {"library_name": "diffusers", "pipeline_tag": tags[0], "tags": tags}
    return ModelCardData(base_model=base, model_name=name_of(cfg), **kind, **licence)


def licence_of(model: Model) -> dict[str, str]:
    """What the base's own card says of its licence; {} where it has no card or says nothing."""
    file = model.folder / "README.md"
    if not file.is_file():
        return {}
    data = ModelCard(file.read_text(encoding="utf-8"), ignore_metadata_errors=True).data.to_dict()
    return {name: data[name] for name in ("license", "license_name", "license_link") if name in data}


def usage(cfg: RunConfig, model: Model) -> str:
    if cfg.full:
        return "This is the `transformer/` of the pipeline; put it in the place of the base's. "
    words = ["python", "sample.py", "--model", cfg.model, "--adapters", "student=THIS_FOLDER"]
    if model.conditioning.edits():
        words += ["--prompts", "make it red", "--image", "a.png"]
    command = shlex.join(words)
    return f"    {command}\n\nreads all of this from `deployment.json`. PEFT reads the weights too. "


def snippet(cfg: RunConfig, model: Model, deployment: Deployment) -> str:
    """Code that samples the student with diffusers alone."""
    absent, call = model.family.arguments(model.folder, cfg.t5, deployment.guidance)
    pipeline, transformer = model.family.PIPELINE, type(model.skeleton).__name__
    given = "".join(f", {name}={value}" for name, value in absent.items())
    height, width = model.pixels
    size = f"num_inference_steps={deployment.steps}, height={height}, width={width}"
    lines = ["import torch", f"from diffusers import {pipeline}", ""]
    variant = variant_of(model.folder / "transformer")
    if variant:
        given += f', variant="{variant}"'
    if cfg.full:
        lines[1] = f"from diffusers import {transformer}, {pipeline}"
        lines.append(f'student = {transformer}.from_pretrained("THIS_FOLDER", dtype={model.dtype})')
        given += ", transformer=student"
    lines.append(f'pipe = {pipeline}.from_pretrained("{cfg.model}", dtype={model.dtype}{given})')
    if not cfg.full:
        lines.append('pipe.load_lora_weights("THIS_FOLDER")')
    told = ", ".join(f"{name}={value!r}" for name, value in call.items())
    lines.append(f'pipe.to("{model.device.type}")')
    about = 'prompt="two red circles"'
    if model.conditioning.edits():
        lines.insert(2, "from diffusers.utils import load_image")
        about = 'image=load_image("a.png"), prompt="make it red"'
    if "max_area" in inspect.signature(getattr(diffusers, pipeline).__call__).parameters:
        size += f", max_area={height * width}"  # else the pipeline paints a megapixel, whatever it is told
    lines += [f"image = pipe({about}, {told},", f"    {size}).images[0]"]
    return "\n".join(lines)


def name_of(cfg: RunConfig) -> str:
    if cfg.push:
        return cfg.push.partition("/")[2]
    return path_of(cfg.out).resolve().name


# ---- the Hub -------------------------------------------------------------------------------------


def check_login(push: str) -> None:
    """ValueError if something is to be pushed and the Hub does not know who asks."""
    if not push:
        return
    with reading(f"--push {push!r}: log in first (hf auth login), or leave it out"):
        HfApi().whoami()


def push_student(folder: Path, push: str) -> str:
    """Upload a student's folder to the Hub repository OWNER/NAME, which is made private if it is new. Returns
    what to tell the user; a failure costs nothing but the upload."""
    try:
        api = HfApi()
        api.create_repo(push, private=True, exist_ok=True)
        api.upload_folder(repo_id=push, folder_path=folder, commit_message="Upload student")
    except Exception as error:  # the run is saved; whatever the network does must not hide that
        return f"--push {push}: {type(error).__name__}: {error}; again by hand: hf upload {push} {folder}"
    return f"pushed {folder} to {push}"
