"""Train: on-policy distillation of flow-matching teachers into one student; before it, the teachers by GRPO (opd/grpo.py) and
flow-matching fine-tuning.

    torchrun train.py                                    # the miniature: three teachers, one student, minutes on a CPU
    torchrun train.py mini --anchor-weight 0 --seed 1    # PRESET --field value; presets are a table in opd/config.py
    torchrun --nproc_per_node 8 train.py sd35 --shard-size 8
    python train.py --dry-run                            # print the resolved configuration

The method (arXiv 2605.08063). The student samples its own trajectory x_1 -> x_0 by SDE. At every visited state the
teacher of the prompt's task, and an anchor, say which velocity they would have taken; the weighted squared difference is
the exact KL of the two transitions:

    L_b = w_b ( |v_b - v_teacher,b|^2 + lambda |v_b - v_anchor,b|^2 )                                   (eq. 16)

States carry no gradient, so the forward pass that drives the rollout is the one the loss needs: loss, backward, next
state. Where we differ from the paper and its released code, and why: README, "Where we differ".

Shapes: B samples of a micro-batch, T states, K teachers at a state (the task's, then the anchor).
"""

import math
import sys
import time
from collections import Counter

import torch
from tqdm import tqdm

import kernels
from opd import adapters, evaluate, flow, grpo, ranks, rollout, sft
from opd.adapters import BASE, START, STUDENT
from opd.config import Config, check, load_family, parse, require
from opd.data import MicroBatch, Prompt, load_tasks, micro_batches, prompts_of_step, seed_of
from opd.files import replace, write_json
from opd.images import load_images
from opd.model import Model
from opd.optim import Trained, learning_rate
from opd.rewards import Scoring, check_reward, find_reward
from opd.runfolder import RunFolder, labelled_grid, save_image


# ---- one optimizer step: on-policy distillation ----------------------------------------------------------------

def queried_states(cfg: Config, step: int) -> list[int]:
    """Indices of the states that are trained on in this step: all, or K drawn without replacement from Beta."""
    states = cfg.steps - cfg.skip_last
    if cfg.queries == 0:
        return list(range(states))
    middle = (torch.arange(states, dtype=torch.float64) + 0.5) / states
    density = torch.distributions.Beta(*map(torch.tensor, cfg.query_beta)).log_prob(middle.float()).exp()
    generator = torch.Generator().manual_seed(seed_of(cfg.seed, step, "query"))
    return sorted(torch.multinomial(density, cfg.queries, generator=generator).tolist())


def state_weights(name: str, grid: list[float], noise_level: float) -> torch.Tensor:
    """w of every state of the grid (T,), float64."""
    sigma = torch.tensor(grid, dtype=torch.float64)
    s = flow.diffusion_coefficient(sigma[:-1], grid[1], noise_level)
    return flow.WEIGHTS[name](sigma[:-1], sigma[1:], s)


def runs_of(batch: MicroBatch) -> dict[str, slice]:
    """Teacher -> its samples' rows, for every teacher that some rank has at this turn; no rows where this rank has none."""
    ends = [0]
    for name in batch.visits:
        ends.append(ends[-1] + batch.tasks.count(name))
    return dict(zip(batch.visits, map(slice, ends, ends[1:])))


def targets_at(cfg: Config, m: Model, batch: MicroBatch, x, sigma_B, conditioning, unconditional):
    """What each sample's teacher, and the anchor, would do at x: K velocities (B, ...) and, with guidance, K unconditional ones.

    The anchor sees every sample and each teacher its own, unless it is the anchor, which has seen them. A teacher without
    samples on this rank sees the first one for nothing: ranks run the same adapters in the same order.
    """
    def ask(name: str, rows: slice):
        with torch.no_grad(), adapters.use(m.transformer, name):
            v, v_uncond = rollout.velocities(m.family, m.transformer, x[rows], sigma_B[rows], [c[rows] for c in conditioning],
                                             unconditional, cfg.teacher_guidance)
        return [v] if v_uncond is None else [v, v_uncond]

    anchor = [ask(cfg.anchor, slice(None))] if cfg.anchor_weight > 0 else []
    parts = []
    for name, rows in runs_of(batch).items():
        here = rows.start < rows.stop
        own = [v[rows] for v in anchor[0]] if anchor and name == cfg.anchor else ask(name, rows if here else slice(1))
        parts += [own] if here else []
    teacher = parts[0] if len(parts) == 1 else [torch.cat(v) for v in zip(*parts)]
    targets, *unconds = zip(teacher, *anchor)
    return targets, unconds[0] if unconds else None


def student_step(cfg: Config, m: Model, x, i: int, grid, seed: int, index, conditioning, unconditional):
    """State i -> i + 1 without grad: a state that is not queried, or the rollout of the stored-trajectory path."""
    with torch.no_grad(), adapters.use(m.transformer, STUDENT):
        sigma_B = torch.full((len(x),), grid[i], device=x.device)
        v, v_uncond = rollout.velocities(m.family, m.transformer, x, sigma_B, conditioning, unconditional, cfg.guidance)
        return rollout.step(cfg.rollout, x, v, v_uncond, cfg.guidance, grid, i, cfg.noise_level, seed, index)


def distil(cfg: Config, m: Model, batch: MicroBatch, prompts: list[Prompt], step: int, query: list[int], scale: float):
    """Gradients of eq. 16 for one micro-batch, left in the student's .grad; returns |v_b - v_k,b|^2 (B, T, K), mean over dims.

    batch.tasks are the samples' teachers. `scale` turns the micro-batch's sum over samples and states into the step's mean.
    Each queried state costs a sample one student forward and backward, one teacher forward, one anchor forward.
    """
    index = torch.tensor(batch.samples, device=m.device)
    texts = [prompts[n // cfg.group].text for n in batch.samples]
    conditioning = m.conditioning(texts)
    unconditional = m.conditioning([""]) if (cfg.guidance, cfg.teacher_guidance) != (1.0, 1.0) else None
    real_B = torch.tensor(batch.real, dtype=torch.float32, device=m.device)
    alphas = [1.0, cfg.anchor_weight] if cfg.anchor_weight > 0 else [1.0]
    alpha_BK = torch.tensor(alphas, device=m.device).expand(len(index), -1).contiguous()
    grid, weights = m.grid(cfg.steps), state_weights(cfg.weight, m.grid(cfg.steps), cfg.noise_level)
    seeds = [seed_of(cfg.seed, step, "noise", i) for i in range(cfg.steps)]

    x = kernels.normal((len(index), *m.shape), seed_of(cfg.seed, step, "start"), index, device=m.device)
    states = [x]
    while not cfg.single_pass and len(states) <= max(query):
        i = len(states) - 1
        states.append(student_step(cfg, m, states[i], i, grid, seeds[i], index, conditioning, unconditional))

    squares_BTK = torch.zeros(len(index), cfg.steps, 2, device=m.device)
    for i in range(max(query) + 1):
        if i not in query:
            x = student_step(cfg, m, x, i, grid, seeds[i], index, conditioning, unconditional) if cfg.single_pass else x
            continue
        x = x if cfg.single_pass else states[i]
        sigma_B, next_B = (torch.full((len(x),), grid[j], device=m.device) for j in (i, i + 1))
        targets, targets_uncond = targets_at(cfg, m, batch, x, sigma_B, conditioning, unconditional)
        guidance = dict(guidance=cfg.guidance, targets_uncond=targets_uncond, target_guidance=cfg.teacher_guidance)
        w_B = weights[i].float() * real_B
        with adapters.use(m.transformer, STUDENT):  # around backward too: recomputed activations need the same adapter
            v, v_uncond = rollout.velocities(m.family, m.transformer, x, sigma_B, conditioning, unconditional, cfg.guidance)
            if cfg.single_pass and cfg.rollout == "sde":
                s_B = flow.diffusion_coefficient(sigma_B, grid[1], cfg.noise_level)
                loss, squares_BK, x, _ = kernels.opd_step(x, v, targets, alpha_BK, w_B, sigma_B, next_B, s_B,
                                                          seed=seeds[i], index=index, v_uncond=v_uncond, **guidance)
            else:
                loss, squares_BK = kernels.velocity_mse(v, targets, alpha_BK, w_B, v_uncond=v_uncond, **guidance)
                x = rollout.step(cfg.rollout, x, v.detach(), None if v_uncond is None else v_uncond.detach(),
                                 cfg.guidance, grid, i, cfg.noise_level, seeds[i], index) if cfg.single_pass else x
            (loss * len(index) * scale).backward()
        squares_BTK[:, i, :len(alphas)] = squares_BK * real_B[:, None]
    return squares_BTK


def opd_gradients(cfg: Config, m: Model, pools: dict[str, list[Prompt]], step: int) -> torch.Tensor:
    """Accumulate the gradient of one optimizer step over this rank's micro-batches.

    Returns (K + 1, T, 2), summed over ranks: per teacher (last row: the anchor) and state, sum and count of |v - v_k|^2.
    """
    prompts = prompts_of_step(pools, cfg.share(), cfg.prompts_per_step, cfg.seed, step, cfg.alternate)
    query = queried_states(cfg, step)
    samples = cfg.prompts_per_step * cfg.group
    scale = ranks.world() / (samples * len(query))  # FSDP averages over ranks; this makes it the mean over the global batch
    rows = teacher_names(cfg)
    table = torch.zeros(len(rows) + 1, cfg.steps, 2, device=m.device)
    counted = torch.zeros(cfg.steps, device=m.device)
    counted[query] = 1
    teacher_of = {n: cfg.route(prompts[n // cfg.group].task) for n in range(samples)}
    for batch in micro_batches(teacher_of, cfg.micro_batch, ranks.world(), ranks.rank()):
        squares_BTK = distil(cfg, m, batch, prompts, step, query, scale)
        runs = [(rows.index(name), own, 0) for name, own in runs_of(batch).items()]
        for row, own, k in [*runs, (len(rows), slice(None), 1)]:
            table[row, :, 0] += squares_BTK[own, :, k].sum(0)
            table[row, :, 1] += counted * sum(batch.real[own])
    return ranks.total(table)


def teacher_names(cfg: Config) -> list[str]:
    """The teachers that some task is routed to, in a fixed order."""
    return list(dict.fromkeys(cfg.route(task) for task in cfg.prompts))


def opd_metrics(cfg: Config, m: Model, table: torch.Tensor) -> dict:
    """Readable numbers from the table: the loss (eq. 16), and per teacher its weighted loss and its KL per sigma.

    All in nats per dimension; KL is eq. 12 whatever --weight is.
    """
    grid = m.grid(cfg.steps)
    weights = state_weights(cfg.weight, grid, cfg.noise_level)
    kl = state_weights("kl", grid, cfg.noise_level) if cfg.noise_level > 0 else None
    mean = (table[..., 0] / table[..., 1].clamp(min=1)).double().cpu()
    seen = table[..., 1].cpu() > 0
    row = {"loss": 0.0}
    for k, name in enumerate([*teacher_names(cfg), "anchor"]):
        if not seen[k].any() or (name == "anchor" and cfg.anchor_weight == 0):
            continue
        part = float((mean[k] * weights)[seen[k]].mean())
        share = float(table[k, :, 1].sum() / table[-1, :, 1].sum())
        row["loss"] += part * (cfg.anchor_weight if name == "anchor" else share)
        row[name] = {"loss": part}
        if kl is not None:
            row[name]["kl"] = {f"{grid[i]:.3f}": float(mean[k, i] * kl[i]) for i in range(cfg.steps) if seen[k, i]}
    return row


def opd_step(cfg: Config, m: Model, pools: dict[str, list[Prompt]], trained: Trained, step: int, first: bool) -> tuple[dict, float]:
    """One optimizer step of distillation: (metrics, gradient norm)."""
    table = opd_gradients(cfg, m, pools, step)
    norm = trained.update(step)
    for k, i in (~table[..., 0].isfinite()).nonzero().tolist()[:1]:
        say(f"step {step}: non-finite velocity difference to {[*teacher_names(cfg), 'anchor'][k]} at state {i}")
    return opd_metrics(cfg, m, table), norm


# ---- the run ---------------------------------------------------------------------------------------------------

def build(cfg: Config, device: torch.device):
    """Read and check everything the user named, then load weights, attach adapters, shard. Returns (model, data)."""
    m = Model.plan(load_family(cfg.family), cfg.model, cfg.dtype, cfg.resolution, cfg.cache, device, cfg.t5)
    targets = m.family.LORA_TARGETS
    used = {n: s for n, s in teachers(cfg).items() if s != BASE}
    loras = {name: adapters.read_lora(source) for name, source in used.items()}
    student = student_start(cfg, m, list(loras.values()))
    for lora in [*loras.values(), student]:
        adapters.check_fits(lora, m.skeleton, targets)
    if cfg.on_policy():
        data = load_tasks(cfg.prompts)
        texts = [p.text for step in range(cfg.iterations)
                 for p in prompts_of_step(data, cfg.share(), cfg.prompts_per_step, cfg.seed, step, cfg.alternate)]
    else:
        data = load_images(cfg.data, m)
        texts = list(data.captions)
    texts += fixed_prompts(cfg, data)
    if cfg.on_policy() and (cfg.evaluate or cfg.watch_every):
        texts += [p.text for pools in splits(cfg, data).values() for pool in pools.values() for p in pool]
        for spec in cfg.rewards.values():
            find_reward(spec)
    if cfg.stage == "grpo":
        for task, pool in data.items():
            check_reward(task, cfg.train_rewards[task], pool, cfg.resolution or m.family.default_resolution(m.folder))
    for name, lora in loras.items():
        say(f"teacher {name}: {lora.source}  sha256 {lora.sha256[:12]}  |update| {lora.norm():.3f}")

    m.conditioning.prepare(texts + [""])
    m.load(torch.float32 if cfg.full else None)
    for name, lora in loras.items():
        adapters.attach(m.transformer, name, lora, m.dtype)
    if cfg.full:
        m.transformer.requires_grad_(True)
    else:
        adapters.attach(m.transformer, START, student, m.dtype)
        adapters.attach(m.transformer, STUDENT, student, torch.float32)
        for parameter in adapters.parameters_of(m.transformer, STUDENT).values():
            parameter.requires_grad_(True)
    if cfg.checkpointing:
        m.transformer.enable_gradient_checkpointing()
    m.transformer.to(device)
    ranks.shard(m.transformer, m.family.blocks(m.transformer), cfg.shard_size, m.dtype, device)
    return m, data


def teachers(cfg: Config) -> dict[str, str]:
    return cfg.teachers if cfg.stage == "opd" else {}


def student_start(cfg: Config, m: Model, teachers: list[adapters.Lora]) -> adapters.Lora:
    """The student's first adapter: fresh (= base), the teachers merged, or one from disk."""
    if cfg.cold_start == "merge":
        return adapters.merge(teachers, cfg.rank, cfg.alpha, count=len(cfg.teachers))
    if cfg.cold_start == "base":
        return adapters.fresh_lora(m.skeleton, m.family.LORA_TARGETS, cfg.rank, cfg.alpha, cfg.seed)
    lora = adapters.read_lora(cfg.cold_start)
    largest = max(a.shape[0] for a in lora.A.values())
    require(largest <= cfg.rank, f"--cold-start {cfg.cold_start!r} has rank {largest}; use --rank {largest} or more")
    return adapters.merge([lora], cfg.rank, cfg.alpha)


def say(text: str) -> None:
    if ranks.rank() == 0:
        tqdm.write(text)


def fixed_prompts(cfg: Config, data) -> list[str]:
    """What the sample grids show: the first prompts of every task, or the first captions."""
    if cfg.on_policy():
        return [p.text for pool in data.values() for p in pool[:max(1, 9 // len(data))]]
    return list(dict.fromkeys(data.captions))[:9]


def save(cfg: Config, m: Model, run: RunFolder, trained: Trained, done: int) -> None:
    """Checkpoint: the student as a PEFT directory (or the full transformer), and the state to resume from."""
    with trained.averaged():
        weights = {n: ranks.full(p.detach()) for n, p in trained.parameters.items()}
    if run.active:
        for folder in (run.path / "checkpoints" / f"{done:06d}", run.path / "student"):
            if cfg.full:
                adapters.save_transformer(folder, m.transformer, weights, m.dtype)
            else:
                adapters.save_lora(folder, weights, STUDENT, cfg.rank, cfg.alpha)
    run.save_state(done, trained.state())


def sample_grid(cfg: Config, m: Model, run: RunFolder, trained: Trained, prompts: list[str], done: int) -> None:
    """The student's images of fixed prompts from fixed noise."""
    with trained.averaged():
        images = m.images(BASE if cfg.full else STUDENT, prompts, list(range(len(prompts))), steps=cfg.eval_steps,
                          seed=0, guidance=cfg.guidance)
    if run.active:
        save_image(labelled_grid({f"{done}": list(images)}, prompts), run.path / "samples" / f"{done:06d}.png")


def train(cfg: Config, m: Model, data, run: RunFolder) -> Trained:
    trained = Trained(cfg, m)
    first, state = run.load_state()
    if state:
        trained.load(state)
        say(f"resuming {run.path} after step {first}")
    prompts = fixed_prompts(cfg, data)
    take_step = {"opd": opd_step, "grpo": grpo.iteration, "sft": sft.optimizer_step}[cfg.stage]
    samples = cfg.prompts_per_step * (cfg.group if cfg.on_policy() else 1)
    bad, phases = 0, Counter()
    bar = tqdm(range(first, cfg.iterations), initial=first, total=cfg.iterations, disable=not run.active, mininterval=1.0)
    for step in bar:
        clock = time.perf_counter()
        row, norm = take_step(cfg, m, data, trained, step, step == first)
        done = step + 1
        bad = 0 if math.isfinite(norm) else bad + 1
        if bad:
            say(f"step {step}: non-finite gradient; step skipped")
        if bad >= cfg.max_bad_steps:
            raise FloatingPointError(f"{bad} non-finite steps in a row; lower --lr {cfg.lr} or use --dtype float32")
        phases.update(row["seconds"] if "seconds" in row else {})
        for reason in row["failed_rewards"] if "failed_rewards" in row else []:
            say(f"step {step}: no reward for {reason}; group dropped")
        seconds = time.perf_counter() - clock
        last, watched = done == cfg.iterations, cfg.watch_every and (done % cfg.watch_every == 0 or done == cfg.iterations)
        row |= {"watch": watch(cfg, m, data, trained)} if watched else {}
        if math.isfinite(norm) and (done % cfg.log_every == 0 or last or watched or "failed_rewards" in row):
            run.log({"step": done, **row, "grad_norm": norm, "lr": learning_rate(cfg, step), "effective_batch": samples,
                     "samples_per_second": samples / seconds})
            bar.set_postfix({"loss": f"{row['loss']:.4g}"} | (row["reward"] if "reward" in row else {}))
        if done % cfg.save_every == 0 or last:
            save(cfg, m, run, trained, done)
        if cfg.sample_every and (done % cfg.sample_every == 0 or last):
            sample_grid(cfg, m, run, trained, prompts, done)
    run.curves()
    if phases:
        whole = phases["rollout"] + phases["reward"] + phases["train"]
        say("time: " + ", ".join(f"{name} {phases[name] / whole:.0%}" for name in ("rollout", "reward", "train"))
            + f"; rewards were computed for {phases['scoring']:.0f} s, of which {phases['reward']:.0f} s were waited for")
    return trained


def watch(cfg: Config, m: Model, data: dict, trained: Trained) -> dict[str, float]:
    """The student's scores on held-out prompts of every task, trained on or not. A scorer that fails does not end the run."""
    def scorer(task: str):
        return lambda *inputs: Scoring(find_reward(cfg.rewards[task]), *inputs, cfg.reward_timeout).result()[0]
    with trained.averaged():
        return {task: evaluate.score(m, BASE if cfg.full else STUDENT, pool, scorer(task), count=cfg.watch_prompts, steps=cfg.eval_steps,
                                     seed=cfg.seed, guidance=cfg.guidance, batch=cfg.micro_batch, strict=False)
                for task, pool in splits(cfg, data)["held-out"].items()}


def splits(cfg: Config, data: dict) -> dict[str, dict[str, list[Prompt]]]:
    """The prompts of the final table: those of training and, if there are any, those held out."""
    return {"train": data} | ({"held-out": load_tasks(cfg.heldout)} if cfg.heldout else {})


def report(cfg: Config, m: Model, data: dict, run: RunFolder, trained: Trained) -> None:
    """Base, teachers, start and student on every task, trained and held-out prompts: table.txt and scores.json."""
    names = [BASE, *(n for n in teachers(cfg) if n != BASE), *([START] if cfg.cold_start != BASE else []), STUDENT]
    guidance = {n: cfg.teacher_guidance if n in teachers(cfg) else cfg.guidance for n in names}
    say(f"scoring {', '.join(names)}")
    with trained.averaged():
        scores = evaluate.evaluate(m, names, splits(cfg, data), cfg.rewards, count=cfg.eval_prompts, steps=cfg.eval_steps, seed=cfg.seed,
                                   guidance=guidance, say=lambda text: None, batch=cfg.micro_batch)
    text = evaluate.table(scores, f"n={cfg.eval_prompts} per task and split, {cfg.eval_steps} ODE steps, guidance "
                                  f"{cfg.guidance} (teachers {cfg.teacher_guidance}), seed {cfg.seed}")
    say(text)
    if run.active:
        write_json(run.path / "scores.json", scores)
        replace(run.path / "table.txt", lambda p: p.write_text(text + "\n"))


def main() -> None:
    try:
        cfg = parse(sys.argv[1:])
        check(cfg, ranks.declared_world())
        if cfg.dry_run:
            print(cfg)
            return
        device = ranks.start()
        run = RunFolder(cfg, active=ranks.rank() == 0)
        m, data = build(cfg, device)
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")
    trained = train(cfg, m, data, run)
    if cfg.on_policy() and not cfg.full and cfg.evaluate:
        report(cfg, m, data, run, trained)
    say(f"run folder: {run.path}")
    ranks.stop()


if __name__ == "__main__":
    main()
