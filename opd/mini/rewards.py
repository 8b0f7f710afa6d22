"""Programs that score the miniature's images; no learned model anywhere.

`compose`, `compose_strict`, `text` and `quality` share one signature:

    (images_BCHW in [0, 1], prompts, metadata) -> scores_B float32 in [0, 1]

Metadata is GenEval's record per prompt; an empty dict means "read it off the prompt".

Shapes: B images, C = 3 channels, H = W = 24, N objects found, S shapes, places of a sign or scenes.
"""

from functools import cache

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from opd.mini import drawing, world
from opd.rewards.ocr import edit_distance, target_of

COLOURS, SHAPES = list(world.PALETTE), list(world.SHAPES)
OTHER = len(SHAPES)  # an object in a palette colour that is none of the shapes

# Detector. Palette colours are 0.45 or more apart and tints 0.45 or more away from them.
COLOUR_DISTANCE = 0.28
MIN_AREA = 16  # pixels; the smallest shape, the triangle, has 49
MIN_IOU = 0.70  # of an object with its shape
MIN_OFFSET = 6.0  # pixels between centres along the relation's axis
# Reader. Noise alone correlates at most about 0.5 with a glyph, a degraded glyph at least 0.9.
MIN_CORRELATION = 0.70
MIN_CONTRAST = 0.15  # std of the luminance in a glyph's window; black on white has 0.4
# Quality. Deviations are on a 0-1 scale; chroma is max - min over the channels of a block's mean.
NOISE_NONE, NOISE_FULL = 0.03, 0.09
CHROMA_DULL, CHROMA_LIVELY = 0.10, 0.26


# Paeth's 19 exchanges, which bring the median of nine values into the fifth place.
EXCHANGES = "12 45 78 01 34 67 12 45 78 03 58 47 36 14 25 47 42 64 42"


def _median3(x_BCHW: Tensor) -> Tensor:
    """3x3 median per channel, edges replicated; same shape. Ten times as fast as torch.median."""
    p = F.pad(x_BCHW, (1, 1, 1, 1), mode="replicate")
    h, w = x_BCHW.shape[-2:]
    v = [p[..., i : i + h, j : j + w] for i in range(3) for j in range(3)]
    for i, j in [map(int, pair) for pair in EXCHANGES.split()]:
        v[i], v[j] = torch.minimum(v[i], v[j]), torch.maximum(v[i], v[j])
    return v[4]


def _colour_map(images_BCHW: Tensor) -> Tensor:
    """Index of the palette colour of each pixel after the median, -1 where there is none, (B, H, W)."""
    smooth = _median3(images_BCHW.float())
    palette = torch.tensor(list(world.PALETTE.values()), device=smooth.device)
    squared = [((smooth - rgb[:, None, None]) ** 2).sum(1) for rgb in palette]
    nearest, colour = torch.stack(squared).min(0)
    return torch.where(nearest < COLOUR_DISTANCE**2, colour, -1)


# --- compose ---------------------------------------------------------------------------------


def _label(colour_BHW: Tensor) -> Tensor:
    """Connected components (4 neighbours): the largest pixel index in the component + 1, 0 outside."""
    b, h, w = colour_BHW.shape
    ids = torch.arange(1, h * w + 1, device=colour_BHW.device).view(h, w)
    label = torch.where(colour_BHW >= 0, ids, 0)
    same_y = (colour_BHW[:, 1:] == colour_BHW[:, :-1]) & (colour_BHW[:, 1:] >= 0)
    same_x = (colour_BHW[:, :, 1:] == colour_BHW[:, :, :-1]) & (colour_BHW[:, :, 1:] >= 0)
    while True:  # the largest index spreads by one pixel a round
        before = label.clone()
        for lo, hi, same in (
            (label[:, :-1], label[:, 1:], same_y),
            (label[:, :, :-1], label[:, :, 1:], same_x),
        ):
            spread = torch.maximum(lo, hi)
            lo.copy_(torch.where(same, spread, lo))
            hi.copy_(torch.where(same, torch.maximum(spread, hi), hi))
        if torch.equal(label, before):
            return label


def _shape_templates(device: torch.device) -> Tensor:
    """Each shape after the same median as the image, at 9 offsets, in a 13x13 window: (S - 1, 9, 169)."""
    masks = F.pad(torch.stack([torch.from_numpy(m) for m in world.SHAPES.values()]).float(), (2, 2, 2, 2))
    masks = _median3(masks[:, None])[:, 0]
    moved = [torch.roll(masks, (dy, dx), (1, 2)).flatten(1) for dy in (-1, 0, 1) for dx in (-1, 0, 1)]
    return torch.stack(moved, 1).to(device)


def detect(images_BCHW: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """All objects: image (N,), colour (N,), shape (N,) or `OTHER`, centre of the box (N, 2) as y, x."""
    colour_BHW = _colour_map(images_BCHW)
    label_BHW = _label(colour_BHW)
    area = torch.stack([torch.bincount(lab.flatten(), minlength=lab.numel() + 1) for lab in label_BHW])
    area[:, 0] = 0
    image_N, label_N = torch.nonzero(area >= MIN_AREA, as_tuple=True)
    mask_NHW = label_BHW[image_N] == label_N[:, None, None]
    centre_N2 = torch.stack([_middle(mask_NHW.any(2)), _middle(mask_NHW.any(1))], 1)

    # A 13x13 window around each centre; the part of an object outside it counts against the overlap.
    corner = centre_N2.floor().long()
    span = torch.arange(13, device=images_BCHW.device)
    y, x = corner[:, :1, None] + span[:, None], corner[:, 1:, None] + span
    number = torch.arange(len(image_N))[:, None, None]
    window_N = F.pad(mask_NHW, (6, 6, 6, 6))[number, y, x].flatten(1).float()
    templates = _shape_templates(images_BCHW.device)
    inter = torch.einsum("np,sop->nso", window_N, templates)
    union = area[image_N, label_N][:, None, None] + templates.sum(-1) - inter
    iou_NS, shape_N = (inter / union).amax(2).max(1)
    shape_N = torch.where(iou_NS >= MIN_IOU, shape_N, OTHER)
    return image_N, colour_BHW.flatten(1)[image_N, label_N - 1], shape_N, centre_N2


def _middle(present_NL: Tensor) -> Tensor:
    """Middle between the first and the last True of each row."""
    first = present_NL.int().argmax(1)
    behind_last = present_NL.shape[1] - present_NL.flip(1).int().argmax(1)
    return (first + behind_last - 1) / 2


def _wanted(prompt: str, metadata: dict) -> list[tuple[int, int, int, str | None]]:
    """What a prompt asks for: (colour, shape, count, relation to the first entry or None)."""
    record = metadata or world.parse(prompt).metadata
    if "include" not in record:
        raise ValueError(f"the compose reward needs objects to look for, but {prompt!r} names none")
    wanted = []
    for clause in record["include"]:
        relation = None
        if "position" in clause:
            relation, _ = clause["position"]
        colour, shape = COLOURS.index(clause["color"]), SHAPES.index(clause["class"])
        wanted.append((colour, shape, clause["count"], relation))
    return wanted


def _closeness(found: int, wanted: int) -> float:
    return max(0.0, 1 - abs(found - wanted) / wanted)


def _score_objects(objects: list[tuple[int, int, list[float]]], target: list) -> tuple[float, bool]:
    """(partial credit, everything right) for the (colour, shape, centre) found in one image. Per named thing:
    0.6 for the number of right objects, 0.2 each for the numbers of its colour and of its shape alone, blobs
    of no shape left out; scaled down by surplus objects; a wrong relation keeps 0.6 of the credit."""
    credit, exact, where = 0.0, True, []
    for colour, shape, count, _ in target:
        right = [centre for c, s, centre in objects if (c, s) == (colour, shape)]
        wanted_colour = sum(n for c, _, n, _ in target if c == colour)
        wanted_shape = sum(n for _, s, n, _ in target if s == shape)
        credit += (
            0.6 * _closeness(len(right), count)
            + 0.2 * _closeness(sum(c == colour and s != OTHER for c, s, _ in objects), wanted_colour)
            + 0.2 * _closeness(sum(s == shape for _, s, _ in objects), wanted_shape)
        ) / len(target)
        exact &= len(right) == count
        where.append(right)
    total = sum(count for _, _, count, _ in target)
    credit *= total / max(total, len(objects))
    exact &= len(objects) == total
    for (*_, relation), right in zip(target, where, strict=True):
        if relation is None:
            continue
        apart = -1.0  # pixels that it lies in the relation's direction, seen from the first thing
        if where[0] and right:
            dy, dx = world.RELATIONS[relation]
            (first_y, first_x), (y, x) = where[0][0], right[0]
            apart = (y - first_y) * dy + (x - first_x) * dx
        if apart < MIN_OFFSET:
            credit, exact = 0.6 * credit, False
    return credit, exact


def _compose_scores(
    images_BCHW: Tensor, prompts: list[str], metadata: list[dict]
) -> list[tuple[float, bool]]:
    wanted = [_wanted(prompt, record) for prompt, record in zip(prompts, metadata, strict=True)]
    objects = [[] for _ in wanted]
    for image, *thing in zip(*(t.tolist() for t in detect(images_BCHW)), strict=True):
        objects[image].append(thing)
    return [_score_objects(*pair) for pair in zip(objects, wanted, strict=True)]


def compose(images_BCHW: Tensor, prompts: list[str], metadata: list[dict]) -> Tensor:
    """Partial credit for objects, counts, colours, shapes and relation; the training reward."""
    return torch.tensor([credit for credit, _ in _compose_scores(images_BCHW, prompts, metadata)])


def compose_strict(images_BCHW: Tensor, prompts: list[str], metadata: list[dict]) -> Tensor:
    """1 where counts are exact, nothing else is there and the relation holds, else 0; for evaluation."""
    return torch.tensor([float(exact) for _, exact in _compose_scores(images_BCHW, prompts, metadata)])


# --- text ------------------------------------------------------------------------------------


def read(images_BCHW: Tensor) -> list[str]:
    """The characters in the three glyph places of the sign; a place with no glyph gives none. Every 7x9
    window is correlated with every glyph and its margin; the sign may sit two pixels off its place and each
    glyph one pixel off the sign."""
    luminance = images_BCHW.float().mean(1, keepdim=True)
    glyphs = F.pad(torch.stack([torch.from_numpy(g) for g in world.FONT.values()]).float(), (1, 1, 1, 1))
    glyphs = glyphs.mean((1, 2), keepdim=True) - glyphs  # dark on light
    glyphs = (glyphs / glyphs.flatten(1).norm(dim=1)[:, None, None])[:, None].to(luminance.device)
    mean, square = F.avg_pool2d(luminance, (9, 7), 1), F.avg_pool2d(luminance**2, (9, 7), 1)
    std = (square - mean**2).clamp_min(1e-8).sqrt()
    match = F.conv2d(luminance, glyphs) / (std * 63**0.5)  # (B, glyphs, 16, 18)
    match = F.max_pool2d(torch.where(std >= MIN_CONTRAST, match, 0.0), 3, 1)  # index shifts by one

    slots = []
    for slot in range(3):
        x = world.PANEL_COL + 6 * slot - 1
        rows = slice(world.PANEL_ROW - 3, world.PANEL_ROW + 4)
        left = F.pad(match, (2, 2))[:, :, rows, x : x + 5]  # horizontal offsets -2..2
        slots.append(left.flatten(2))
    match_BSGO = torch.stack(slots, 1)
    place_B = match_BSGO.amax(2).sum(1).argmax(1)
    best_BS, glyph_BS = match_BSGO[torch.arange(len(place_B)), :, :, place_B].max(2)
    seen_BS = torch.where(best_BS >= MIN_CORRELATION, glyph_BS, -1)
    chars = [*world.FONT, ""]
    return ["".join(chars[glyph] for glyph in glyph_S) for glyph_S in seen_BS.tolist()]


def text(images_BCHW: Tensor, prompts: list[str], metadata: list[dict]) -> Tensor:
    """1 - edit distance / length between the sign and the text in the first pair of double quotes."""
    scores = []
    for prompt, found in zip(prompts, read(images_BCHW), strict=True):
        target = target_of(prompt).replace(" ", "").upper()
        scores.append(1 - min(edit_distance(found, target), len(target)) / len(target))
    return torch.tensor(scores)


# --- quality ---------------------------------------------------------------------------------


def noise_level(images_BCHW: Tensor) -> Tensor:
    """Std of the noise, (B,), by Immerkaer's filter, which is 0 on straight edges and ramps. The 40th
    percentile instead of the median, as the outlines of four circles fill nearly half the image."""
    x = images_BCHW.float()
    x = x[:, :, 2:] - 2 * x[:, :, 1:-1] + x[:, :, :-2]
    x = x[..., 2:] - 2 * x[..., 1:-1] + x[..., :-2]
    response = x.abs().flatten(1)
    return response.kthvalue(int(0.4 * response.shape[1]), dim=1).values / (6 * 0.5244)  # of a unit normal


def backdrop_chroma(images_BCHW: Tensor) -> Tensor:
    """Colourfulness of the backdrop in [0, 1], (B,): the more colourful half of 16 blocks of 6x6 pixels, as a
    sign covers no more than the other half. Pixels in a palette colour and their neighbours are left out, so
    neither objects nor a saturated fill count; a block's mean keeps noise from counting as colour."""
    objects = (_colour_map(images_BCHW) >= 0).float()[:, None]
    keep = 1 - F.max_pool2d(objects, 3, 1, 1)
    weight = F.avg_pool2d(keep, 6)
    mean = F.avg_pool2d(images_BCHW.float() * keep, 6) / weight.clamp_min(1e-6)
    chroma = (mean.amax(1) - mean.amin(1)).flatten(1)
    lively = ((chroma - CHROMA_DULL) / (CHROMA_LIVELY - CHROMA_DULL)).clamp(0, 1)
    lively = torch.where(weight.flatten(1) * 36 >= 4, lively, 0.0)
    return lively.topk(8, dim=1).values.mean(1)


def _light_and_hue(images_BCHW: Tensor) -> tuple[Tensor, Tensor]:
    """Of 2x2 block means, as unit vectors: luminance without its mean (B, 144) and chroma (B, 432)."""
    blocks = F.avg_pool2d(images_BCHW.float(), 2)
    light = blocks.mean(1, keepdim=True)
    varying = light - light.mean((2, 3), keepdim=True)
    return F.normalize(varying.flatten(1), dim=1), F.normalize((blocks - light).flatten(1), dim=1)


@cache
def _scene_views(prompt: str) -> tuple[Tensor, Tensor]:
    return _light_and_hue(rearrange(torch.from_numpy(drawing.scenes(prompt)), "b h w c -> b c h w"))


def likeness(images_BCHW: Tensor, prompts: list[str]) -> Tensor:
    """How much an image looks like the landscape asked for, in [0, 1], (B,); 1 for prompts of other kinds.
    Correlation of the luminance times cosine of the chroma, with the best of all clean pictures of the
    prompt. Grain is grey and dullness a factor on the chroma, so the cosine sees neither."""
    light_B, hue_B = _light_and_hue(images_BCHW)
    scores = torch.ones(len(prompts), device=images_BCHW.device)
    for i, prompt in enumerate(prompts):
        light_S, hue_S = (view.to(images_BCHW.device) for view in _scene_views(prompt))
        if len(light_S):
            scores[i] = ((light_S @ light_B[i]).clamp_min(0) * (hue_S @ hue_B[i]).clamp_min(0)).max()
    return scores


def quality(images_BCHW: Tensor, prompts: list[str], metadata: list[dict]) -> Tensor:
    """Half for the absence of noise, half for a colourful backdrop; a landscape's whole score times its
    likeness."""
    clean = ((NOISE_FULL - noise_level(images_BCHW)) / (NOISE_FULL - NOISE_NONE)).clamp(0, 1)
    return likeness(images_BCHW, prompts) * (0.5 * clean + 0.5 * backdrop_chroma(images_BCHW))
