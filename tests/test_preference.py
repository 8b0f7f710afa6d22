"""Preference scores: formulas by hand on the same random weights; HPSv2's weights by torch's attention."""

import shutil

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

from opd import rewards
from opd.formats.pictures import to_pil
from opd.rewards import preference
from opd.rewards.clip import load_clip
from tests.tiny_scorers import SIZE, clip_parts, loaded, save_clip

PROMPTS = ["a red dog", "a photo of two blue cat", "the green object of a dog"]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_clip(tmp_path_factory.mktemp("clip") / "vit")


@pytest.fixture(scope="module")
def images_BCHW():
    return torch.rand(3, 3, 40, 40, generator=torch.Generator().manual_seed(1))


def outputs(images_BCHW, prompts=PROMPTS):
    model, processor = clip_parts()
    pictures = [to_pil(image, 0) for image in images_BCHW]
    inputs = processor(text=prompts, images=pictures, return_tensors="pt", padding=True, truncation=True)
    with torch.no_grad():
        return model(**inputs)


def scored(spec, images_BCHW, prompts=PROMPTS):
    return loaded(spec)(images_BCHW, prompts, [{}] * len(prompts))


def test_clipscore_is_the_cosine_of_each_pair_and_pickscore_scales_it(folder, images_BCHW):
    out = outputs(images_BCHW)
    scaled_B = out.logits_per_image.diagonal()
    assert scaled_B.std() > 0.1
    assert torch.allclose(scored(f"pickscore@{folder}", images_BCHW), scaled_B, atol=1e-4)
    cosine_B = F.cosine_similarity(out.image_embeds, out.text_embeds)
    assert torch.allclose(scored(f"clipscore@{folder}", images_BCHW), cosine_B, atol=1e-5)


def test_clip_direction_is_the_cosine_of_two_changes(folder, images_BCHW, tmp_path):
    model, processor = clip_parts()
    sources = [tmp_path / "0.png", tmp_path / "1.png"]
    for source, image in zip(sources, images_BCHW[1:].flip(3), strict=True):
        to_pil(image, 0).save(source)

    def unit(features):
        return F.normalize(features.pooler_output, dim=1)

    def of_pictures(pictures):
        return unit(model.get_image_features(**processor.image_processor(pictures, return_tensors="pt")))

    def of_texts(texts):
        return unit(model.get_text_features(**processor.tokenizer(texts, padding=True, return_tensors="pt")))

    befores, afters = PROMPTS[:2], ["a green dog", "a photo of the cat"]
    with torch.no_grad():
        results = of_pictures([to_pil(image, 0) for image in images_BCHW[:2]])
        change_BD = results - of_pictures([Image.open(source) for source in sources])
        wanted_B = F.cosine_similarity(change_BD, of_texts(afters) - of_texts(befores))
    metadata = [
        {"source": [str(source)], "source_caption": before, "target_caption": after}
        for source, before, after in zip(sources, befores, afters, strict=True)
    ]
    scores_B = loaded(f"clip_direction@{folder}")(images_BCHW[:2], ["redder"] * 2, metadata)
    assert wanted_B.abs().min() > 0.02 and torch.allclose(scores_B, wanted_B, atol=1e-4)


def test_more_pictures_than_a_batch_score_the_same(folder):
    images_BCHW, prompts = torch.rand(34, 3, 32, 32), ["a red dog"] * 34
    all_B = scored(f"clipscore@{folder}", images_BCHW, prompts)
    some_B = scored(f"clipscore@{folder}", images_BCHW[30:], prompts[30:])
    assert all_B.shape == (34,) and torch.allclose(all_B[30:], some_B, atol=1e-5)


@pytest.fixture(scope="module")
def predictor(tmp_path_factory):
    torch.manual_seed(3)
    sizes = {0: (16, 1024), 2: (1024, 128), 4: (128, 64), 6: (64, 16), 7: (16, 1)}
    weights = {}
    for place, (width, outputs_) in sizes.items():
        weights[f"layers.{place}.weight"] = torch.randn(outputs_, width) / width**0.5
        weights[f"layers.{place}.bias"] = torch.randn(outputs_)
    file = tmp_path_factory.mktemp("predictor") / preference.AESTHETIC_FILE
    torch.save(weights, file)
    save_file(weights, file.with_suffix(".safetensors"))
    return file, weights


@pytest.mark.parametrize("form", ["pickle", "safetensors", "directory"])
def test_aesthetic_is_a_chain_of_linear_maps(folder, images_BCHW, predictor, form):
    file, weights = predictor
    source = {"pickle": file, "safetensors": file.with_suffix(".safetensors"), "directory": file.parent}[form]
    x_BD = outputs(images_BCHW).image_embeds
    for place in (0, 2, 4, 6, 7):
        x_BD = x_BD @ weights[f"layers.{place}.weight"].T + weights[f"layers.{place}.bias"]
    scores_B = scored(f"aesthetic@{source},{folder}", images_BCHW)
    assert scores_B.shape == (3,) and torch.allclose(scores_B, x_BD[:, 0], atol=1e-4)


class OpenClip(nn.Module):
    """CLIP as open_clip lays it out: torch's MultiheadAttention, projections as plain matrices."""

    def __init__(self, width=32, projection=16, vocabulary=300, length=32, patch=14):
        super().__init__()
        self.visual = nn.Module()
        self.visual.conv1 = nn.Conv2d(3, width, patch, patch, bias=False)
        self.visual.class_embedding = nn.Parameter(torch.randn(width))
        self.visual.positional_embedding = nn.Parameter(torch.randn((SIZE // patch) ** 2 + 1, width))
        self.visual.ln_pre = nn.LayerNorm(width)
        self.visual.transformer = _blocks(width)
        self.visual.ln_post = nn.LayerNorm(width)
        self.visual.proj = nn.Parameter(torch.randn(width, projection))
        self.token_embedding = nn.Embedding(vocabulary, width)
        self.positional_embedding = nn.Parameter(torch.randn(length, width))
        self.transformer = _blocks(width)
        self.ln_final = nn.LayerNorm(width)
        self.text_projection = nn.Parameter(torch.randn(width, projection))
        self.logit_scale = nn.Parameter(torch.tensor(4.6))

    def of_pixels(self, pixels_BCHW):
        x_BLD = self.visual.conv1(pixels_BCHW).flatten(2).transpose(1, 2)
        start_B1D = self.visual.class_embedding.expand(len(x_BLD), 1, -1)
        x_BLD = torch.cat([start_B1D, x_BLD], 1) + self.visual.positional_embedding
        x_BLD = _run(self.visual.transformer, self.visual.ln_pre(x_BLD), None)
        return self.visual.ln_post(x_BLD[:, 0]) @ self.visual.proj

    def of_tokens(self, ids_BL, end_B):
        x_BLD = self.token_embedding(ids_BL) + self.positional_embedding[: ids_BL.shape[1]]
        causal_LL = torch.full((ids_BL.shape[1],) * 2, float("-inf")).triu(1)
        x_BLD = self.ln_final(_run(self.transformer, x_BLD, causal_LL))
        return x_BLD[torch.arange(len(end_B)), end_B] @ self.text_projection


def _blocks(width):
    def block():
        mlp = nn.ModuleDict({"c_fc": nn.Linear(width, 64), "c_proj": nn.Linear(64, width)})
        norms = {name: nn.LayerNorm(width) for name in ("ln_1", "ln_2")}
        return nn.ModuleDict(norms | {"attn": nn.MultiheadAttention(width, 2, batch_first=True), "mlp": mlp})

    return nn.ModuleDict({"resblocks": nn.ModuleList([block(), block()])})


def _run(transformer, x_BLD, mask_LL):
    for block in transformer["resblocks"]:
        h_BLD = block["ln_1"](x_BLD)
        x_BLD = x_BLD + block["attn"](h_BLD, h_BLD, h_BLD, attn_mask=mask_LL, need_weights=False)[0]
        x_BLD = x_BLD + block["mlp"]["c_proj"](F.gelu(block["mlp"]["c_fc"](block["ln_2"](x_BLD))))
    return x_BLD


@pytest.fixture(scope="module")
def hps(tmp_path_factory):
    torch.manual_seed(4)
    model, processor = clip_parts()
    reference = OpenClip(vocabulary=model.config.text_config.vocab_size).eval()
    for parameter in reference.parameters():
        if parameter.dim() == 1:
            parameter.data += 0.1 * torch.randn(parameter.shape)
    file = tmp_path_factory.mktemp("hps") / preference.HPS_FILE
    torch.save({"state_dict": reference.state_dict()}, file)
    return reference, processor, file


def test_converted_weights_compute_what_open_clip_computes(hps, folder, images_BCHW):
    reference, processor, file = hps
    small = [to_pil(image, 0).resize((SIZE, SIZE), Image.Resampling.BICUBIC) for image in images_BCHW]
    as_they_are = dict(do_resize=False, do_center_crop=False, return_tensors="pt")
    pixels_BCHW = processor.image_processor(images=small, **as_they_are).pixel_values
    with torch.no_grad():
        images_BD = F.normalize(reference.of_pixels(pixels_BCHW), dim=1)
        rows = []
        for prompt in PROMPTS:
            ids = torch.tensor([processor.tokenizer(prompt).input_ids])
            rows.append(reference.of_tokens(ids, torch.tensor([ids.shape[1] - 1])))
        texts_BD = F.normalize(torch.cat(rows), dim=1)
    expected_B = (images_BD * texts_BD).sum(1)
    assert expected_B.std() > 0.02
    assert torch.allclose(scored(f"hpsv2@{file},{folder}", images_BCHW), expected_B, atol=1e-4)


def test_padding_keeps_the_shape_of_the_picture():
    padded = preference.padded_to_square(Image.new("RGB", (80, 40), "white"), 20)
    assert padded.size == (20, 20)
    assert padded.getpixel((10, 2)) == (0, 0, 0) and padded.getpixel((10, 10)) == (255, 255, 255)


@pytest.mark.filterwarnings("ignore")
def test_a_clip_with_missing_weights_is_refused(folder, tmp_path):
    torn = tmp_path / "torn"
    shutil.copytree(folder, torn)
    weights = load_file(torn / "model.safetensors")
    del weights["visual_projection.weight"]
    save_file(weights, torn / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lack 1 tensors, such as \['visual_projection.weight'\]"):
        load_clip(str(torn), CPU)


def test_a_pickle_that_would_run_code_is_refused(folder, tmp_path):
    class Evil:
        def __reduce__(self):
            return (print, ("code ran",))

    torch.save({"layers.0.weight": Evil()}, tmp_path / "evil.pth")
    with pytest.raises(ValueError, match="(?i)weights.?only"):
        scored(f"aesthetic@{tmp_path}/evil.pth,{folder}", torch.rand(1, 3, 8, 8), ["a"])


def test_missing_weights_are_named(folder, tmp_path):
    missing = {f"pickscore@{tmp_path}/no": "CLIP '.*no': no such file"}
    missing[f"hpsv2@{folder},{folder}"] = "hpsv2@.*No such file .*HPS_v2.1_compressed.pt"
    for spec, message in missing.items():
        with pytest.raises(ValueError, match=message):
            loaded(spec)


def test_each_says_what_it_is_and_its_divisor():
    for name, divisor in {"pickscore": 26, "clipscore": 0.3, "aesthetic": 10}.items():
        about = rewards.find_reward(name).about[name]
        assert "transformers" in about and about.endswith(f"reward: score / {divisor}")
    assert "reward:" not in rewards.find_reward("hpsv2").about["hpsv2"]
