"""Make images: prompts -> PNG files and one labelled grid, adapters side by side as rows with the same noise,
guidance and steps: those recorded with the adapters (a student's deployment.json), unless flags say others.

    python sample.py                                              # the miniature: base and its teachers
    python sample.py --adapters student=runs/mini/student --prompts "two red circles" 'a sign that says "K7A"'
    python sample.py --model stabilityai/stable-diffusion-3.5-medium --prompts prompts.txt \\
        --adapters ocr=jieliu/SD3.5M-FlowGRPO-Text --steps 40 --guidance 4.5 --resolution 512
    python sample.py --save latents --out runs/mini-samples       # teachers' samples: data of an SFT start
"""

import opd  # isort: skip  # noqa: F401 (before torch: see there)
import json
import re
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro
from PIL.PngImagePlugin import PngInfo
from torch import Tensor
from tqdm import tqdm

from opd import errors, lora
from opd.cli import Count, Few, Finite, Seed, Texts, check_bounds, dashed, emptied, given_fields, plain_names
from opd.data import Asked, Prompt, fair_sample
from opd.files import check_folder, path_of, reading
from opd.formats.export import completed, guidance_of
from opd.formats.latents import write_samples
from opd.formats.lora_files import KEY
from opd.formats.pictures import labelled_grid, save_image, source_pictures, source_row, to_pil
from opd.formats.prompts import load_prompts, load_tasks
from opd.model import Model, Sampling
from opd.presets import DEFAULT


@dataclass(frozen=True)
class Arguments:
    prompts: tuple[str, ...] = (
        "two red circles",
        "a blue square left of a green circle",
        "a yellow triangle above a red square",
        'a sign that says "K7A"',
        'a sign that says "R2X"',
        "a calm sea at dawn",
        "a rolling meadow at dusk",
    )
    """Prompts, or one file of prompts (.txt, .jsonl, .csv)."""
    image: tuple[str, ...] = ()
    """Source pictures of every prompt, for pipelines that edit; a file of prompts names its own."""
    model: str = DEFAULT.model
    """Pipeline directory or Hub id."""
    adapters: Texts = field(default_factory=lambda: dict(DEFAULT.teachers))
    """Rows of the grid: name and source of each adapter. The base is always the first row. Of another
    --model none unless given, and no --tasks."""
    out: str = "images"
    """Folder for the files."""
    save: Literal["images", "latents"] = "images"
    """images: PNG files of --prompts and a grid. latents: samples of --tasks with captions, for stage sft."""
    tasks: Texts = field(default_factory=lambda: dict(DEFAULT.prompts))
    """latents: task -> file of prompts; the adapter of the task's name samples them."""
    count: Count = 256
    """latents: samples per task; prompts are repeated with other noise where a file has fewer."""
    images: Few = 1
    """Images per prompt."""
    steps: Few = 20
    """Denoising steps. Not given: what is recorded with the adapters, 20 where nothing is."""
    guidance: Annotated[float | None, Finite] = None
    """Classifier-free guidance of every row; 1 = none. Not given: the largest recorded with an adapter, 1
    where nothing is; with --save latents each adapter's own."""
    seed: Seed = 0
    """Seed of the noise; every row uses the same."""
    resolution: str = ""
    """Pixels per side, or HEIGHTxWIDTH. Not given: what is recorded with the adapters, or the model's own."""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """What the transformer computes in; auto: bfloat16 where the hardware has matrix units, else float32."""
    t5: bool = True
    """Use the pipeline's T5 encoder where it has one. Not given: as recorded with the adapters."""
    batch: Few = 16
    """Images per forward pass. Images do not depend on it beyond rounding."""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    """Where to run."""


UNREAD = {"images": ("tasks", "count"), "latents": ("prompts", "image", "images")}
"""--save -> flags that it does not read."""
HOW = ("steps", "resolution", "t5")
"""What is read from the record of an adapter, beside the guidance."""


def main(arguments: list[str] | None = None) -> None:
    args = tyro.cli(Arguments, args=arguments, description=__doc__)
    given = given_fields(sys.argv[1:] if arguments is None else arguments)
    with errors.in_one_line(ValueError, OSError):
        check(args)
        if args.model != DEFAULT.model:  # the miniature, whose the defaults are
            args = emptied(args, given, "adapters", "tasks")
        if args.save == "latents":
            write_latents(args, arguments)
        else:
            write_images(args, arguments)


def write_images(args: Arguments, words: list[str] | None) -> None:
    """A PNG of every row and prompt, and the grid of them. All rows have one guidance: pictures at different
    scales would not compare adapters."""
    prompts = read_prompts(args)
    args = completed(args, words, ("guidance", *HOW))
    if args.guidance is None:
        args = replace(args, guidance=1.0)
    model = load(args, [prompt.asked for prompt in prompts])
    columns = [prompt for prompt in prompts for _ in range(args.images)]
    asked, captions = [prompt.asked for prompt in columns], [prompt.text for prompt in columns]
    sampling, numbers = Sampling(args.steps, args.seed, args.guidance), list(range(len(columns)))
    rows = source_row(columns, model.pixels)
    for adapter in dict.fromkeys([lora.BASE, *args.adapters]):
        images = []
        for piece in batches(args, len(columns), adapter):  # image i depends on (seed, i) and its prompt
            images += model.images(adapter, asked[piece], numbers[piece], sampling)
        for index, image in enumerate(images):
            one = replace(args, prompts=(captions[index],), image=columns[index].pictures)
            write(one, image, adapter, index)
        rows[f"{adapter}\nguidance {args.guidance:g}"] = images
    save_image(labelled_grid(rows, captions), path_of(args.out) / "grid.png")
    print(f"{path_of(args.out) / 'grid.png'}: {len(rows)} rows x {len(columns)} images")


def write_latents(args: Arguments, words: list[str] | None) -> None:
    """What each task's teacher samples of the task's prompts, as data of stage sft, in float16: half the size
    of float32 and finer than bfloat16."""
    if not args.tasks:
        raise ValueError("--tasks is empty: give at least one TASK=FILE pair")
    for task in args.tasks:
        if task not in (lora.BASE, *args.adapters):
            raise ValueError(f"task {task!r} has no adapter of its name; add --adapters {task}=ADAPTER")
    for name in ("metadata.jsonl", "latents.safetensors"):
        if (path_of(args.out) / name).exists():
            raise ValueError(f"--out {args.out!r} holds a {name}; choose another folder, or delete that one")
    pools = load_tasks(args.tasks)
    args = completed(args, words, HOW)
    scales = guidance_of(args.adapters, args.guidance)
    model = load(args, [prompt.asked for pool in pools.values() for prompt in pool])
    latents, rows = [], []
    for task, pool in pools.items():
        index, prompts = zip(*fair_sample(pool, args.count), strict=True)
        asked = [prompt.asked for prompt in prompts]
        rows += [row_of(prompt) for prompt in prompts]
        sampling = Sampling(args.steps, args.seed, scales[task])
        for piece in batches(args, len(asked), task):
            latents += model.latents(task, asked[piece], list(index[piece]), sampling).cpu().half()
        print(f"{task}: {len(asked)} samples")
    write_samples(path_of(args.out), torch.stack(latents), rows)
    print(f"{args.out}: {len(rows)} latents with captions, for --data of stage sft")


def row_of(prompt: Prompt) -> dict:
    """Of metadata.jsonl."""
    row = {"prompt": prompt.text, "task": prompt.task}
    return row | {"image": list(prompt.pictures)} if prompt.pictures else row


# ---- what is asked for -----------------------------------------------------------------------------


def check(args: Arguments) -> None:
    """Every argument that can be judged by itself. ValueError with its value and the flag."""
    check_bounds(args)
    plain_names("--adapters", args.adapters)
    lora.check_names("--adapters", args.adapters)
    for name in UNREAD[args.save]:
        if getattr(args, name) != getattr(Arguments(), name):
            unread = f"--{dashed(name)} does nothing with --save {args.save}"
            raise ValueError(f"{unread}; leave it out, or use the other --save")
    check_folder(args.out)


def read_prompts(args: Arguments) -> list[Prompt]:
    """--prompts with --image, or what the file that they name holds."""
    endings = (".txt", ".jsonl", ".csv")
    files = [prompt for prompt in args.prompts if Path(prompt).suffix.lower() in endings]
    if len(args.prompts) > 1 and any(Path(file).is_file() for file in files):
        raise ValueError(f"--prompts: {files[0]!r} is a file; give one file and nothing else, or prompts")
    if len(args.prompts) == 1 and files:
        if args.image:
            raise ValueError("--image with a file of prompts: name the picture in its field image instead")
        return load_prompts(args.prompts[0], "any", None)
    if not args.prompts or not all(prompt.strip() for prompt in args.prompts):
        raise ValueError("--prompts: give at least one, none of them empty")
    pictures = source_pictures({"image": list(args.image)}, Path(), "--image")
    return [Prompt(prompt, "any", pictures=pictures) for prompt in args.prompts]


def load(args: Arguments, prompts: list[Asked]) -> Model:
    """The model with all adapters attached and the prompts encoded."""
    with reading(f"--device {args.device!r}"):
        device = torch.empty(0, device=args.device).device
    model = Model.plan(args.model, args.dtype, args.resolution, device, args.t5)
    return model.load_with(args.adapters, prompts)


# ---- making ----------------------------------------------------------------------------------------


def batches(args: Arguments, count: int, what: str) -> Iterable[slice]:
    """The forward passes of `count` images, with a bar on a terminal."""
    return tqdm([slice(i, i + args.batch) for i in range(0, count, args.batch)], desc=what, disable=None)


def write(args: Arguments, image: Tensor, adapter: str, index: int) -> None:
    """One PNG, in whose metadata stands how it was made."""
    own = {name: source for name, source in args.adapters.items() if name == adapter}
    settings = asdict(replace(args, adapters=own)) | {"adapter": adapter, "index": index}
    info = PngInfo()
    info.add_text(KEY, json.dumps(settings))
    save_image(to_pil(image, 1), path_of(args.out) / f"{slug(args.prompts[0])}.{index}.{adapter}.png", info)


def slug(prompt: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:60] or "empty"


if __name__ == "__main__":
    main()
