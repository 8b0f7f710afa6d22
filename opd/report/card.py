"""A student's model card, README.md in its folder with the front matter that the Hub reads; its upload."""

from functools import cache
from pathlib import Path

from huggingface_hub import EvalResult, HfApi, ModelCard, ModelCardData

from opd.adapters import BASE, STUDENT
from opd.config import DistillationConfig, GRPOConfig, RunConfig
from opd.evaluation.statistics import ALL, MEASURES, Cell
from opd.evaluation.tables import label, number
from opd.files import digest, replace, resolve
from opd.formats.deployment import deployment_of
from opd.model import Model
from opd.settings import stage_of

METHODS = {
    "opd": "on-policy distillation of several teachers into one student (Flow-OPD, arXiv 2605.08063)",
    "grpo": "reinforcement learning from rewards (Flow-GRPO, arXiv 2505.05470)",
    "sft": "flow matching on images with captions",
}


def write_card(folder: Path, cfg: RunConfig, model: Model, done: int, cells: list[Cell], table: str) -> None:
    """README.md of the student in `folder` after `done` steps; `cells` and `table` are its scores, if any."""
    deployment = deployment_of(cfg, model)
    parts = [
        f"---\n{front_matter(cfg, model, cells).to_yaml()}\n---",
        f"# {name_of(cfg)}",
        f"Made by {METHODS[stage_of(cfg)]}, {done} steps.",
        "## How to sample it",
        "\n".join(
            [
                f"- base: `{cfg.model}`{licence_text(model)}",
                f"- guidance: {deployment.guidance:g} (1 = none)",
                f"- resolution: {deployment.resolution} px",
                f"- steps: {deployment.steps} (ODE)",
                f"- T5: {t5_text(deployment.t5, deployment.t5_tokens)}",
            ]
        ),
        usage(cfg),
        "## What it was made from",
        "\n".join(origins(cfg)),
        training_text(cfg),
    ]
    if cells:
        parts += ["## Scores", score_table(cells), f"```\n{table}\n```"]
    text = "\n\n".join(parts) + "\n"
    replace(folder / "README.md", lambda path: path.write_text(text, encoding="utf-8"))


def front_matter(cfg: RunConfig, model: Model, cells: list[Cell]) -> ModelCardData:
    """The base as a Hub id (a local path means nothing there), its licence where its own card states one, and
    the student's scores."""
    base = None
    if not resolve(cfg.model).exists():
        base = cfg.model
    tags = ["text-to-image", "flow-matching", f"stage-{stage_of(cfg)}"]
    if not cfg.full:
        tags.append("lora")
    results = []
    for cell in student_cells(cells):
        result = EvalResult(
            task_type="text-to-image",
            dataset_type="prompts",
            dataset_name=f"{cell.task} ({cell.split})",
            dataset_config=cell.task,  # results of one config and split would be merged
            dataset_split=cell.split,
            metric_type=label(cell.scorer),
            metric_value=round(cell.mean, 4),
            metric_name=f"{label(cell.scorer)}, n={cell.n}, standard error {cell.error:.4f}",
        )
        results.append(result)
    return ModelCardData(
        base_model=base,
        library_name="diffusers",
        pipeline_tag="text-to-image",
        tags=tags,
        model_name=name_of(cfg),
        eval_results=results or None,
        **licence_of(model),
    )


def licence_of(model: Model) -> dict[str, str]:
    """What the base's own card says of its licence; {} where it has no card or says nothing."""
    file = model.folder / "README.md"
    if not file.is_file():
        return {}
    data = ModelCard(file.read_text(encoding="utf-8"), ignore_metadata_errors=True).data.to_dict()
    return {name: data[name] for name in ("license", "license_name", "license_link") if name in data}


def licence_text(model: Model) -> str:
    known = licence_of(model)
    name = known.get("license_name") or known.get("license")
    return f" (licence of the base: {name})" if name else " (licence of the base: not known; look it up)"


def t5_text(used: bool, tokens: int) -> str:
    return f"used where the pipeline has one, {tokens} tokens" if used else "not used"


def usage(cfg: RunConfig) -> str:
    if cfg.full:
        return "This is the `transformer/` of the pipeline; put it in the place of the base's."
    lines = [
        f"    python sample.py --model {cfg.model} --adapters student=THIS_FOLDER",
        "",
        "reads `deployment.json`. In diffusers: `pipe.load_lora_weights(THIS_FOLDER)`; PEFT reads it too.",
    ]
    return "\n".join(lines)


def origins(cfg: RunConfig) -> list[str]:
    """Teachers with their digests, or what was trained on."""
    lines = [f"- start: `{cfg.cold_start}`"]
    if isinstance(cfg, DistillationConfig):
        for name, source in cfg.teachers.items():
            lines.append(f"- teacher {name}: `{source}`{digest_text(source)}")
        lines.append(f"- guidance of the teachers {cfg.teacher_guidance:g}, of the student {cfg.guidance:g}")
        if cfg.anchor_weight > 0:
            lines.append(f"- anchor: {cfg.anchor}, weight {cfg.anchor_weight:g}")
    if isinstance(cfg, GRPOConfig):
        lines += [f"- reward of {task}: `{spec}`" for task, spec in cfg.train_rewards.items()]
    return lines


def training_text(cfg: RunConfig) -> str:
    trained = f"LoRA of rank {cfg.rank}, alpha {cfg.alpha:g}"
    if cfg.full:
        trained = "All weights"
    return f"{trained}; {cfg.samples_per_step()} samples per step; seed {cfg.seed}."


def digest_text(source: str) -> str:
    path = resolve(source.partition(":")[0])
    if source == BASE or not path.exists():
        return ""
    return f", sha256 `{digest_of_weights(path)}`"


@cache
def digest_of_weights(path: Path) -> str:
    """sha256 of an adapter: of the file that is read, or of all weights of a directory in the order of their
    names."""
    files = [path]
    if path.is_dir():
        files = sorted(path.glob("adapter_model.safetensors")) or sorted(path.rglob("*.safetensors"))
    return digest(*files)


def student_cells(cells: list[Cell]) -> list[Cell]:
    return [cell for cell in cells if cell.row == STUDENT and cell.tag == ALL and cell.scorer not in MEASURES]


def score_table(cells: list[Cell]) -> str:
    lines = ["| prompts | scorer | score ± standard error | n |", "|---|---|---|---|"]
    for cell in student_cells(cells):
        place = f"{cell.task} ({cell.split})"
        lines.append(f"| {place} | `{label(cell.scorer)}` | {number(cell.mean, cell.error)} | {cell.n} |")
    return "\n".join(lines)


def name_of(cfg: RunConfig) -> str:
    if cfg.push:
        return cfg.push.partition("/")[2]
    return Path(cfg.out).name


# ---- the Hub -------------------------------------------------------------------------------------


def check_login(push: str) -> None:
    """ValueError if something is to be pushed and the Hub does not know who asks."""
    if not push:
        return
    try:
        HfApi().whoami()
    except Exception as error:  # not logged in, no network
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise ValueError(
            f"--push {push!r}: log in first (hf auth login), or leave it out ({reason})"
        ) from error


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
