"""Make images: prompts -> PNG files and one labelled grid, adapters side by side as rows with the same noise.

    python sample.py                                              # the miniature: base and its teachers
    python sample.py --adapters student=runs/mini/student --prompts "two red circles" 'a sign that says "K7A"'
    python sample.py --model stabilityai/stable-diffusion-3.5-medium --prompts prompts.txt \\
        --adapters ocr=jieliu/SD3.5M-FlowGRPO-Text --steps 40 --guidance 4.5 --resolution 512
    python sample.py --save latents --out runs/mini-samples       # teachers' samples: data of an SFT start
    python sample.py --again images/two-red-circles.0.student.png   # the same image, from its metadata
"""

import json
import re
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Literal

import torch
import tyro
from PIL import Image, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo

from opd import adapters, errors
from opd.data import load_prompts, load_tasks
from opd.files import check_folder, is_hub_id, reading, resolve
from opd.flags import (
    Numbers,
    Texts,
    at_least_one,
    at_most,
    check_seed,
    dashed,
    finite,
    plain_names,
    require,
    time_limit,
)
from opd.formats import latents
from opd.formats.deployment import KEY, guidance_of
from opd.formats.pictures import labelled_grid, save_image, to_pil
from opd.model import Model, Sampling, find_device
from opd.presets import DEFAULT
from opd.settings import restore


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
    model: str = DEFAULT.model
    """Pipeline directory or Hub id."""
    adapters: Texts = field(default_factory=lambda: dict(DEFAULT.teachers))
    """Rows of the grid: name and source of each adapter. The base is always the first row."""
    out: str = "images"
    """Folder for the files."""
    save: Literal["images", "latents"] = "images"
    """images: PNG files of --prompts and a grid. latents: samples of --tasks with captions, for stage sft."""
    tasks: Texts = field(default_factory=lambda: dict(DEFAULT.prompts))
    """latents: task -> file of prompts; the adapter of the task's name samples them."""
    count: int = 256
    """latents: samples per task; prompts are repeated with other noise where a file has fewer."""
    rewards: Texts = field(default_factory=dict)
    """latents: task -> reward, module:function or a sum, that filters its samples; none = all are kept."""
    at_least: Numbers = field(default_factory=dict)
    """latents: task -> smallest reward that is kept."""
    reward_timeout: float = 60.0
    """latents: seconds after which a call of a reward is given up."""
    images: int = 1
    """Images per prompt."""
    steps: int = 20
    """Denoising steps."""
    guidance: float | None = None
    """Classifier-free guidance of every row; 1 = none. Not given: what is recorded with each adapter, 1 where
    nothing is."""
    seed: int = 0
    """Seed of the noise; every row uses the same."""
    sampler: Literal["ode", "sde", "cps"] = "ode"
    """Deterministic, or with the noise of training rollouts."""
    noise_level: float = 0.7
    """a, for sde and cps."""
    resolution: str = ""
    """Pixels per side, or HEIGHTxWIDTH. None: what the model was made for."""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """What the transformer computes in; auto: bfloat16 where the hardware multiplies it, else float32."""
    t5: bool = True
    """Use the pipeline's T5 encoder where it has one."""
    batch: int = 16
    """Images per forward pass. Images do not depend on it beyond rounding."""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    """Where to run."""
    again: str = ""
    """A PNG made by this program: repeat it with the settings in its metadata (only --out and
    --device apply)."""
    trust_png: bool = False
    """With --again: fetch the model and the adapter that the PNG names from the Hub if they are not here."""


ORIGIN = {"adapter": str, "index": int, "place": int}
"""What a PNG tells besides the arguments: the row, its number, and where in the forward pass it was."""


IMAGES_ONLY = ("prompts", "images")
LATENTS_ONLY = ("tasks", "count", "rewards", "at_least", "reward_timeout")


def read_settings(file: str) -> dict:
    """The settings in a PNG's metadata. FileNotFoundError / ValueError if there are none."""
    if not Path(file).is_file():
        raise FileNotFoundError(f"--again {file!r}: no such file")
    try:
        info = Image.open(file).info
    except UnidentifiedImageError as error:
        raise ValueError(f"--again {file!r}: this is not an image") from error
    if KEY not in info:
        raise ValueError(f"--again {file!r}: this image carries no settings of sample.py")
    with reading(f"--again {file!r}: the settings in this image"):
        settings = json.loads(info[KEY])
        require(isinstance(settings, dict), "expected an object")
        for name, kind in ORIGIN.items():
            require(type(settings.get(name)) is kind, f"{name!r} is missing or no {kind.__name__}")
    return settings


def trusted(args: Arguments, settings: dict) -> Arguments:
    """The settings of a PNG, with this call's own places. A stranger may have written them: ValueError for
    wrong ones, and for sources that are not here, unless the user trusts the PNG."""
    own = {"out": args.out, "device": args.device}
    theirs = asdict(args) | settings | own | {"again": "", "trust_png": False}
    with reading(f"--again {args.again!r}: the settings in this image"):
        used = restore(Arguments, theirs, "sample.py")
        require(len(used.prompts) == 1, "expected one prompt")
    for source in (used.model, *used.adapters.values()):
        print(f"{args.again} was made with {source!r}")
        fetched = "is not on this machine; add --trust-png to fetch it from the Hub"
        here = args.trust_png or resolve(source).exists() or not is_hub_id(source)
        require(here, f"--again {args.again!r}: {source!r} {fetched}")
    return used


def load(args: Arguments, prompts: list[str]) -> Model:
    """The model with all adapters attached and the prompts encoded; whatever can be refused is refused
    first."""
    check(args)
    device = find_device(args.device, "device")
    model = Model.plan(args.model, args.dtype, args.resolution, device, args.t5)
    return model.load_with(args.adapters, prompts)


def check(args: Arguments) -> None:
    """Every argument that can be judged by itself. ValueError with its value and the flag."""
    at_least_one(args, "images", "steps", "batch")
    at_most(args, 10_000, "images", "steps", "batch")
    check_seed(args)
    plain_names("--adapters", args.adapters)
    finite(args, "noise_level")
    if args.guidance is not None:
        finite(args, "guidance")
    noise = args.noise_level
    if args.sampler != "ode":
        require(noise > 0, f"--sampler {args.sampler} needs --noise-level above 0, got {noise}")
    if args.sampler == "cps":
        require(noise <= 1, f"--sampler cps needs --noise-level in (0, 1], got {noise}")


def sampling_of(args: Arguments, guidance: float) -> Sampling:
    return Sampling(args.steps, args.seed, guidance, args.sampler, args.noise_level)


def make(
    args: Arguments, model: Model, adapter: str, prompts: list[str], index: list[int]
) -> list[torch.Tensor]:
    """One image (3, H, W) per prompt; image i depends on (seed, index[i]) and its prompt."""
    images = []
    sampling = sampling_of(args, args.guidance)
    for i in range(0, len(prompts), args.batch):
        piece = slice(i, i + args.batch)
        images += list(model.images(adapter, prompts[piece], index[piece], sampling))
    return images


def write(
    args: Arguments, image: torch.Tensor, adapter: str, prompt: str, index: int, place: int, batch: int
) -> Path:
    """One PNG with everything that is needed to make it again: even its place among the `batch` images of its
    forward pass, since rounding depends on both."""
    settings = asdict(args) | {
        "prompts": [prompt],
        "adapter": adapter,
        "index": index,
        "place": place,
        "batch": batch,
        "adapters": {adapter: args.adapters[adapter]} if adapter != adapters.BASE else {},
    }
    info = PngInfo()
    info.add_text(KEY, json.dumps(settings))
    path = Path(args.out) / f"{slug(prompt)}.{index}.{adapter}.png"
    save_image(to_pil(image, 1), path, info)
    return path


def slug(prompt: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:60] or "empty"


def repeat(args: Arguments) -> None:
    """--again: one image, from its own metadata. It fills a forward pass as large as the first time, to the
    same bits."""
    settings = read_settings(args.again)
    adapter, index, place = (settings.pop(name) for name in ORIGIN)
    args = trusted(args, settings)
    known = adapter == adapters.BASE or adapter in args.adapters
    require(known, f"the image was made with adapter {adapter!r}, which its settings do not name")
    inside = 0 <= place < args.batch and 0 <= index < 2**31
    require(inside, f"the image was number {place} of {args.batch} and {index} in all; that cannot be")
    model = load(args, list(args.prompts))
    images = make(args, model, adapter, list(args.prompts) * args.batch, [index] * args.batch)
    print(write(args, images[place], adapter, args.prompts[0], index, place, args.batch))


def refuse_settings_of_the_other_kind(args: Arguments) -> None:
    """ValueError for a flag that would do nothing."""
    unused = LATENTS_ONLY
    if args.save == "latents":
        unused = IMAGES_ONLY
    for name in unused:
        value, usual = getattr(args, name), getattr(Arguments(), name)
        changed = f"--{dashed(name)} does nothing with --save {args.save}"
        require(value == usual, f"{changed}; leave it out, or use the other --save")


def write_latents(args: Arguments) -> None:
    """--save latents: what the teachers sample, for stage sft."""
    at_least_one(args, "count")
    time_limit(args, "reward_timeout")
    latents.check_samples(args)
    pools = load_tasks(args.tasks)
    filters = latents.find_filters(args, pools)
    scales = guidance_of(args.adapters, args.guidance)
    model = load(args, [prompt.text for pool in pools.values() for prompt in pool])
    for task, chosen in filters.items():
        chosen.reward.load(model.device)
        chosen.reward.check(task, pools[task], model.pixels)
    samplings = {task: sampling_of(args, scales[task]) for task in pools}
    latents.save_samples(args, model, pools, samplings, filters)


def main(arguments: list[str] | None = None) -> None:
    args = tyro.cli(Arguments, args=arguments, description=__doc__)
    with errors.in_one_line(ValueError, OSError):
        if args.again:
            return repeat(args)
        refuse_settings_of_the_other_kind(args)
        if args.save == "latents":
            return write_latents(args)
        if len(args.prompts) == 1 and Path(args.prompts[0]).suffix in (".txt", ".jsonl", ".csv"):
            prompts = [p.text for p in load_prompts(args.prompts[0], "any", None)]
        else:
            prompts = list(args.prompts)
        require(
            bool(prompts) and all(p.strip() for p in prompts),
            "--prompts: give at least one, none of them empty",
        )
        scales = guidance_of(args.adapters, args.guidance)
        check_folder(args.out)
        model = load(args, prompts)
    columns = [p for p in prompts for _ in range(args.images)]
    rows = {}
    for adapter, guidance in scales.items():
        used = replace(args, guidance=guidance)
        rows[adapter] = make(used, model, adapter, columns, list(range(len(columns))))
        for n, (prompt, image) in enumerate(zip(columns, rows[adapter], strict=True)):
            place = n % args.batch
            write(used, image, adapter, prompt, n, place, min(args.batch, len(columns) - n + place))
    save_image(labelled_grid(rows, columns), Path(args.out) / "grid.png")
    print(f"{Path(args.out) / 'grid.png'}: {len(rows)} rows x {len(columns)} images")


if __name__ == "__main__":
    main()
