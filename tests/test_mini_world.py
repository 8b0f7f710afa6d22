"""The miniature world draws what it says, and its scorers see exactly that, also through noise and blur."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from opd.mini import build, drawing, rewards, world

CONDITIONS = [(True, 0.0), (True, 0.12), (False, 0.0), (False, 0.12)]
TEST_PROMPTS = {task: world.split(task)[1] for task in world.TASKS}


def render_all(prompts, lively=True, noise=0.0, seed=0):
    """(B, 3, 24, 24) in [0, 1]."""
    rng = np.random.default_rng(seed)
    images = np.stack([drawing.render(p, rng, lively, noise) for p in prompts])
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255


def through_vae(images_BCHW, seed=0):
    """A stand-in for a small autoencoder: slight blur and an error of std 0.02."""
    blur = F.avg_pool2d(F.pad(images_BCHW, (1, 1, 1, 1), mode="replicate"), 3, 1)
    error = 0.02 * torch.randn(images_BCHW.shape, generator=torch.Generator().manual_seed(seed))
    return (0.85 * images_BCHW + 0.15 * blur + error).clamp(0, 1)


def mean_score(reward, images_BCHW, prompts):
    return reward(images_BCHW, prompts, [{}] * len(prompts)).mean().item()


# --- prompts ---------------------------------------------------------------------------------
@pytest.mark.parametrize("task", world.TASKS)
def test_prompts_parse_back_and_test_is_held_out(task):
    train, test = world.split(task)
    assert sorted(train + test) == sorted(world.all_prompts(task))
    assert len(test) == world.HELD_OUT[task]
    assert all(world.parse(p).prompt == p and world.parse(p).task == task for p in train + test)
    assert not {world._composition(p) for p in train} & {world._composition(p) for p in test}
    words = [{w for p in ps for w in enumerate(world.parse(p).words)} for ps in (train, test)]
    assert words[1] <= words[0]  # only the combinations are new, not the words


def test_shipped_prompt_files_are_the_generated_ones():
    """GenEval's records and the split by composition included."""
    on_disk = {path.name: path.read_text(encoding="utf-8") for path in world.PROMPT_DIR.iterdir()}
    assert on_disk == world.prompt_files()


# --- training data ---------------------------------------------------------------------------
@pytest.mark.parametrize("task", world.TASKS)
def test_caption_errors_come_at_the_stated_rate_and_never_spell_a_test_prompt(task):
    rng, train, test = np.random.default_rng(0), world.split(task)[0], set(world.split(task)[1])
    wrong = total = 0
    for i in range(3000):
        spec = world.parse(train[i % len(train)])
        caption = world.misname(spec, rng, 0.12)
        assert caption not in test
        said = world.parse(caption).words
        wrong += sum(a != b for a, b in zip(said, spec.words, strict=True))
        total += len(said)
    assert abs(wrong / total - 0.12) < 4 * (0.12 * 0.88 / total) ** 0.5  # four standard errors


def test_of_the_bases_pictures_half_have_grain_half_are_dull_and_many_are_side_by_side():
    images_B3HW, captions = build.draw(1200, 0)
    x_B3HW = images_B3HW.float() / 255
    noisy = (rewards.noise_level(x_B3HW) > 0.05).float().mean().item()
    dull = (rewards.backdrop_chroma(x_B3HW) < 0.5).float().mean().item()
    assert [noisy, dull] == pytest.approx([0.5, 0.5], abs=0.06)
    compose = [bool({"left", "right"} & {*prompt.split()}) for prompt in world.split("compose")[0]]
    expected = build.MIX["side by side"] + build.MIX["compose"] * np.mean(compose)
    beside = np.mean([bool({"left", "right"} & {*caption.split()}) for caption in captions])
    assert beside == pytest.approx(expected, abs=0.06)


# --- rewards on ground truth -----------------------------------------------------------------
@pytest.mark.parametrize("lively, noise", CONDITIONS)
@pytest.mark.parametrize("reward, task", [(rewards.compose_strict, "compose"), (rewards.text, "text")])
def test_ground_truth_scores_one(reward, task, lively, noise):
    prompts = world.all_prompts(task)[::2]
    x_BCHW = render_all(prompts, lively, noise)
    assert mean_score(reward, x_BCHW, prompts) >= (1.0 if noise == 0 else 0.998)
    assert mean_score(reward, through_vae(x_BCHW), prompts) >= (0.999 if noise == 0 else 0.99)


@pytest.mark.parametrize(
    "prompt, drawn, credit",
    [
        ("two red circles", "a red circle", 0.5),  # half of each count
        ("a red circle", "a blue circle", 0.2),  # the shape
        ("a red circle", "a red circle and a blue square", 0.5),  # one of two is surplus
        ("a red circle left of a blue square", "a red circle right of a blue square", 0.6),
        ("a red circle and a blue square", "a blue circle and a red square", 0.4),  # bound the wrong way
    ],
)
def test_partial_credit(prompt, drawn, credit):
    x_BCHW, meta = render_all([drawn]), [world.parse(prompt).metadata]
    assert rewards.compose(x_BCHW, [prompt], meta).item() == pytest.approx(credit, abs=1e-6)
    assert rewards.compose_strict(x_BCHW, [prompt], meta).item() == float(credit == 1)


def test_metadata_decides_where_given():
    x_BCHW = render_all(["two red circles"])
    meta = [world.parse("two red circles").metadata]
    assert rewards.compose_strict(x_BCHW, ["free wording"], meta).item() == 1
    with pytest.raises(ValueError, match="a calm sea at dawn"):
        rewards.compose(x_BCHW, ["a calm sea at dawn"], [{}])


def test_text_is_edit_distance_without_case_and_spaces():
    x_BCHW = render_all(['a sign that says "K7A"'])
    scores = {"K7A": 1, "k 7a": 1, "K7L": 2 / 3, "7AX": 1 / 3, "XXX": 0, "K7AXXX": 0.5}
    for target, score in scores.items():
        assert rewards.text(x_BCHW, [f'says "{target}" today'], [{}]).item() == pytest.approx(score)


def test_median_equals_the_sorted_one():
    x_BCHW = torch.rand(4, 3, 24, 24, generator=torch.Generator().manual_seed(0))
    windows = F.pad(x_BCHW, (1, 1, 1, 1), mode="replicate").unfold(2, 3, 1).unfold(3, 3, 1)
    assert torch.equal(rewards._median3(x_BCHW), windows.flatten(4).median(-1).values)


# --- quality and hacks -----------------------------------------------------------------------
@pytest.mark.parametrize("task", world.TASKS)
def test_quality_tells_the_four_conditions_apart(task):
    prompts = TEST_PROMPTS[task]
    bounds = [(0.95, 1), (0.4, 0.6), (0.4, 0.6), (0, 0.15)]
    for (lively, noise), (low, high) in zip(CONDITIONS, bounds, strict=True):
        x_BCHW = render_all(prompts, lively, noise)
        for seen in (x_BCHW, through_vae(x_BCHW)):
            assert low <= mean_score(rewards.quality, seen, prompts) <= high, (lively, noise)


def test_noise_level_is_the_std_of_the_noise():
    noise = torch.randn(64, 3, 24, 24, generator=torch.Generator().manual_seed(0))
    ramp = torch.linspace(0.3, 0.7, 24)[:, None].expand(24, 24)
    for std in (0.02, 0.05, 0.1):
        assert rewards.noise_level(ramp + std * noise).mean().item() == pytest.approx(std, rel=0.03)


def hacks():
    """Textures and fills that a policy might find, (B, 3, 24, 24)."""
    rng = torch.Generator().manual_seed(0)
    y, x = torch.meshgrid(torch.arange(24), torch.arange(24), indexing="ij")
    palette = torch.tensor(list(world.PALETTE.values()))
    fills = (*palette, *torch.eye(3), torch.ones(3), torch.zeros(3))
    images = [rgb[:, None, None].expand(3, 24, 24) for rgb in fills]
    for cell in (1, 2, 3, 4, 6, 12):
        board = ((y // cell + x // cell) % 2).float()
        images += [board.expand(3, 24, 24), palette[board.long()].permute(2, 0, 1)]
        coarse = palette[torch.randint(5, (24 // cell, 24 // cell), generator=rng)].permute(2, 0, 1)
        images.append(coarse.repeat_interleave(cell, 1).repeat_interleave(cell, 2))
    stripes, noise = ((x // 2) % 2).float(), torch.rand(3, 24, 24, generator=rng)
    images += [stripes.expand(3, 24, 24), noise, noise[:1].expand(3, 24, 24)]
    return torch.stack(images)


def test_textures_and_fills_get_no_credit():
    x_BCHW = hacks()
    for task, reward in (("compose", rewards.compose), ("text", rewards.text)):
        for prompt in TEST_PROMPTS[task][::16]:
            assert reward(x_BCHW, [prompt] * len(x_BCHW), [{}] * len(x_BCHW)).max() <= 0.1, prompt
    # A saturated backdrop gains nothing over a pastel one; in a palette colour it loses.
    red, pastel = torch.tensor(world.PALETTE["red"]), torch.tensor(drawing._pastel(0.3, 0.9))
    x_B3 = torch.stack([red, torch.tensor([0.0, 1.0, 0.0]), pastel.float()])
    x_BCHW = x_B3[:, :, None, None].expand(3, 3, 24, 24)
    assert rewards.quality(x_BCHW, [""] * 3, [{}] * 3).tolist() == [0.5, 1.0, 1.0]


def test_a_landscape_must_be_the_one_asked_for():
    prompts = world.all_prompts("quality")
    drawn = render_all(prompts)
    likeness = rewards.likeness(drawn, prompts)
    assert likeness.min() > 0.95  # phases between the eighths and 8-bit colours cost a little
    places = list(world.PLACES)
    elsewhere = []
    for adjective, place, time in (world.parse(p).words for p in prompts):
        other_place = places[(places.index(place) + 3) % 6]
        elsewhere.append(world.Spec("quality", (adjective, other_place, time)).prompt)
    other = render_all(elsewhere)
    assert mean_score(rewards.quality, other, prompts) < 0.75
    mush = F.interpolate(F.avg_pool2d(drawn, 12), scale_factor=12, mode="bilinear")
    for hack in (mush, 1 - drawn, *hacks()[:, None].expand(-1, len(prompts), -1, -1, -1)):
        assert mean_score(rewards.quality, hack, prompts) < 0.5
