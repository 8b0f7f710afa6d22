"""What a run reads, by content: a run that resumes must find what it began with, wherever that lies now."""

from opd.config import DistillationConfig, RunConfig, SFTConfig
from opd.files import digest, resolve
from opd.formats.lora_files import find_adapter
from opd.model import Model

PATHS = ("model", "teachers", "prompts", "cold_start", "merge_from", "data")
"""The settings that name what is read: they may change where the contents stay."""
WORDS = ("base", "merge", "ema")  # sources that are no files


def contents(cfg: RunConfig, model: Model) -> dict[str, str]:
    """What is read -> its sha256; and the dtype, which "auto" chooses by the machine."""
    weights = model.folder / "transformer"
    found = {"dtype": str(model.dtype), "base": digest(*sorted(weights.glob("*.safetensors")))}
    found["cold start"] = of_source(cfg.cold_start)
    if cfg.cold_start == "merge":
        for name, source in cfg.merged().items():
            found[f"merged {name}"] = of_source(source)
    if isinstance(cfg, DistillationConfig):
        for name, source in cfg.teachers.items():
            found[f"teacher {name}"] = of_source(source)
    if isinstance(cfg, SFTConfig):
        found["data"] = of_source(cfg.data)
    else:
        for number, (task, source) in enumerate(cfg.prompts.items(), 1):
            found[f"prompts {number}: {task}"] = digest(resolve(source))
    return found


def of_source(source: str) -> str:
    """sha256 of a file, of all files below a directory, or of an adapter on the Hub; what is no file, such as
    "base", stands for itself."""
    if source in WORDS:
        return source
    path = resolve(source)
    if path.is_file():
        return digest(path)
    if path.is_dir():
        return digest(*sorted(file for file in path.rglob("*") if file.is_file()))
    try:
        return digest(find_adapter(source))
    except FileNotFoundError:
        return source
