"""What a run shows of its student: scores on the way, sample grids, and the table at the end."""

from opd import evaluate
from opd.adapters import BASE, START, STUDENT
from opd.config import Distil, Finetune, Run
from opd.data import Prompt, load_tasks
from opd.files import replace, write_json
from opd.images import Images
from opd.model import Model
from opd.optim import Trained, due
from opd.pictures import labelled_grid, save_image
from opd.ranks import say
from opd.rewards import Reward
from opd.runfolder import RunFolder


class Report:
    """Every method is called on all ranks; rank 0 writes into the run folder."""

    def __init__(
        self,
        cfg: Run,
        model: Model,
        data: dict[str, list[Prompt]] | Images,
        rewards: dict[str, Reward],
        folder: RunFolder,
    ):
        self.cfg, self.model, self.folder = cfg, model, folder
        self.texts = fixed_texts(data)
        self.splits = {}
        self.scorers = {}
        if is_scored(cfg):
            self.splits = splits(cfg, data)
            self.scorers = {task: rewards[spec] for task, spec in cfg.rewards.items() if spec in rewards}

    def watch(self, trained: Trained, done: int) -> dict:
        """{"watch": the student's score on held-out prompts of every task, trained on or not}, {} where it is
        not due. A scorer that fails costs its score, never the run."""
        cfg = self.cfg
        if isinstance(cfg, Finetune) or not due(done, cfg.watch_every, cfg.iterations):
            return {}
        scores = {}
        with trained.averaged():
            for task, pool in self.splits["held-out"].items():
                scores[task] = evaluate.score(
                    self.model,
                    self.model.trained,
                    pool,
                    self.scorers[task],
                    images_per_task=cfg.watch_prompts,
                    ode_steps=cfg.eval_steps,
                    seed=cfg.seed,
                    guidance=cfg.deployed_guidance(),
                    batch=cfg.micro_batch,
                    timeout=cfg.reward_timeout,
                    strict=False,
                )
        return {"watch": scores}

    def sample_grid(self, trained: Trained, done: int) -> None:
        """The student's images of fixed prompts from fixed noise: samples/STEP.png."""
        with trained.averaged():
            images = self.model.images(
                self.model.trained,
                self.texts,
                list(range(len(self.texts))),
                steps=self.cfg.eval_steps,
                seed=0,
                guidance=self.cfg.deployed_guidance(),
            )
        if self.folder.active:
            grid = labelled_grid({f"{done}": list(images)}, self.texts)
            save_image(grid, self.folder.path / "samples" / f"{done:06d}.png")

    def table(self, trained: Trained) -> None:
        """Base, teachers, start and student on every task, trained and held-out prompts: table.txt and
        scores.json. An image without a score is left out of its mean; without any the mean is NaN."""
        cfg = self.cfg
        if isinstance(cfg, Finetune) or cfg.full or not cfg.evaluate:
            return
        # Base and start are sampled as the student is, teachers as they taught.
        deployed = cfg.deployed_guidance()
        rows = {BASE: (BASE, deployed)}
        if isinstance(cfg, Distil):
            for name in cfg.teachers:
                label = name
                if name == BASE and cfg.teacher_guidance != deployed:
                    label = f"{BASE} g={cfg.teacher_guidance:g}"
                rows[label] = (name, cfg.teacher_guidance)
        if cfg.cold_start != "base":
            rows[START] = (START, deployed)
        rows[STUDENT] = (self.model.trained, deployed)
        say(f"scoring {', '.join(rows)}")
        with trained.averaged():
            scores = evaluate.evaluate(
                self.model,
                rows,
                self.splits,
                self.scorers,
                images_per_task=cfg.eval_prompts,
                ode_steps=cfg.eval_steps,
                seed=cfg.seed,
                batch=cfg.micro_batch,
                timeout=cfg.reward_timeout,
                strict=False,
            )
        note = f"n={cfg.eval_prompts} per task and split, {cfg.eval_steps} ODE steps, guidance {deployed}"
        if isinstance(cfg, Distil):
            note += f" (teachers {cfg.teacher_guidance})"
        text = evaluate.table(scores, f"{note}, seed {cfg.seed}")
        say(text)
        if self.folder.active:
            write_json(self.folder.path / "scores.json", scores)
            replace(self.folder.path / "table.txt", lambda path: path.write_text(text + "\n"))


def say_phases(rows: list[dict]) -> None:
    """Where the time of a GRPO run went, from its metrics; nothing where they hold no times."""
    seconds = {"rollout": 0.0, "reward": 0.0, "train": 0.0, "scoring": 0.0}
    for row in rows:
        if "seconds" not in row:
            return
        for phase, value in row["seconds"].items():
            seconds[phase] += value
    whole = seconds["rollout"] + seconds["reward"] + seconds["train"]
    if whole == 0:
        return
    shares = [f"{phase} {seconds[phase] / whole:.0%}" for phase in ("rollout", "reward", "train")]
    scoring, waited = seconds["scoring"], seconds["reward"]
    say(
        f"time: {', '.join(shares)}; rewards were computed for {scoring:.0f} s, "
        f"of which {waited:.0f} s were waited for"
    )


def fixed_texts(data: dict[str, list[Prompt]] | Images) -> list[str]:
    """What the sample grids show: the first prompts of every task, nine in all, or the first nine
    captions."""
    if isinstance(data, Images):
        return list(dict.fromkeys(data.captions))[:9]
    per_task = max(1, 9 // len(data))
    return [prompt.text for pool in data.values() for prompt in pool[:per_task]]


def is_scored(cfg: Run) -> bool:
    """Whether the run compares prompts with scorers, on the way or at the end."""
    return not isinstance(cfg, Finetune) and (cfg.evaluate or cfg.watch_every > 0)


def splits(cfg: Run, data: dict[str, list[Prompt]]) -> dict[str, dict[str, list[Prompt]]]:
    """The prompts of the table: those of training and, if there are any, those held out."""
    if not cfg.heldout:
        return {"train": data}
    return {"train": data, "held-out": load_tasks(cfg.heldout)}


def shown_texts(cfg: Run, data: dict[str, list[Prompt]] | Images) -> list[str]:
    """Every text that a report will need: those of the grids and, where the run is scored, of the table."""
    texts = fixed_texts(data)
    if not is_scored(cfg):
        return texts
    for pools in splits(cfg, data).values():
        for pool in pools.values():
            texts += [prompt.text for prompt in pool]
    return texts
