"""BLIP-VQA, T2I-CompBench's score of colours, shapes and textures: is each thing that the prompt names there?

Of T2I-CompBench++, this and `clipscore@openai/clip-vit-base-patch32` (its non-spatial relations) run here.
Missing: 2D- and 3D-spatial relations and numeracy (UniDet's detector, a depth model), complex prompts (3-in-1
of these all). Pictures are resized as the weights' processor says; the benchmark resizes to 480 px.

A prompt's things are the list "noun_phrases" of its metadata or, where that is missing, what spaCy's
en_core_web_sm takes for noun chunks, as the benchmark does (.[compbench])."""

import torch
from torch import Tensor

from opd.formats.hub import locate
from opd.rewards.clip import FILES, whole
from opd.rewards.inputs import need, pictures, versions

BLIP = "Salesforce/blip-vqa-capfilt-large"
SPACY = "en_core_web_sm"
MOST_PHRASES = 8  # things beyond the eighth are not asked for, as in the benchmark
POSITIONS = ("top", "the side", "the left", "the right")  # no things, and left out in the benchmark
LONGEST = 35  # tokens of a question
BATCH = 16  # pictures per forward pass


class BlipVqa:
    """Argument: directory or Hub id of a BlipForQuestionAnswering."""

    def __init__(self, source: str = BLIP):
        self.source = source
        self.chunker = None
        self.about = (
            f'{source}, BSD-3-Clause, 385 M parameters: product over noun phrases of P(yes) to "PHRASE?" '
            f"among yes and no, 0-1; {versions('transformers')}, float32"
        )

    def load(self, device: torch.device) -> None:
        """ValueError or OSError if the model is incomplete."""
        from transformers import BlipForQuestionAnswering, BlipProcessor

        folder = locate("BLIP", self.source, FILES)
        self.model = whole(BlipForQuestionAnswering.from_pretrained, folder).to(device).eval()
        self.model.requires_grad_(False)
        processor = BlipProcessor.from_pretrained(folder)
        self.resized, self.tokenizer, self.device = processor.image_processor, processor.tokenizer, device
        self.yes_no = self.tokenizer.convert_tokens_to_ids(["yes", "no"])
        if self.tokenizer.unk_token_id in self.yes_no:
            raise ValueError(f"{self.source}: its vocabulary has no words yes and no")

    def prompt_fault(self, text: str, metadata: dict) -> str:
        try:
            phrases = self.phrases(text, metadata)
        except ValueError as error:
            return str(error)
        return "" if phrases else "names nothing to look for: no noun phrase was found in it"

    @torch.no_grad()
    def __call__(self, images_BCHW: Tensor, prompts: list[str], metadata: list[dict]) -> Tensor:
        """(B,) in [0, 1]."""
        pixels_BCHW = self.resized(images=pictures(images_BCHW), return_tensors="pt").pixel_values
        seen = [self.model.vision_model(part.to(self.device))[0] for part in pixels_BCHW.split(BATCH)]
        scores = []
        for seen_LD, text, record in zip(torch.cat(seen), prompts, metadata, strict=True):
            questions = [f"{phrase}?" for phrase in self.phrases(text, record)]
            scores.append(self.yes_probability(seen_LD, questions).prod())
        return torch.stack(scores).cpu()

    def phrases(self, text: str, metadata: dict) -> list[str]:
        """What a picture is asked for. ValueError if the metadata's list is none, or spaCy is missing."""
        if "noun_phrases" in metadata:
            given = metadata["noun_phrases"]
            if not isinstance(given, list) or not all(isinstance(phrase, str) for phrase in given):
                raise ValueError(f'"noun_phrases" must be a list of texts, got {given!r}')
            return given[:MOST_PHRASES]
        if self.chunker is None:
            need("compbench", "spacy")
            import spacy

            try:
                self.chunker = spacy.load(SPACY)
            except OSError as error:
                fix = f'python -m spacy download {SPACY}, or give each prompt its "noun_phrases"'
                raise ValueError(f"spaCy has no model {SPACY}: {fix}") from error
        chunks = [chunk.text for chunk in self.chunker(text).noun_chunks]
        return [phrase for phrase in chunks if phrase not in POSITIONS][:MOST_PHRASES]

    def yes_probability(self, seen_LD: Tensor, questions: list[str]) -> Tensor:
        """(Q,) P(yes) / (P(yes) + P(no)) of the answer's first token; `seen_LD` is the encoded picture."""
        tokens = self.tokenizer(
            questions, padding=True, truncation=True, max_length=LONGEST, return_tensors="pt"
        ).to(self.device)
        start = self.model.decoder_start_token_id
        # BLIP was trained with [ENC], the last word of its vocabulary, where BERT has [CLS].
        tokens.input_ids[:, 0] = start + 1
        asked_QTD = self.model.text_encoder(
            input_ids=tokens.input_ids,
            attention_mask=tokens.attention_mask,
            encoder_hidden_states=seen_LD.expand(len(questions), -1, -1),
        )[0]
        answers_QV = self.model.text_decoder(
            input_ids=torch.full((len(questions), 1), start, device=self.device),
            encoder_hidden_states=asked_QTD,
            encoder_attention_mask=tokens.attention_mask,
        ).logits[:, 0]
        return answers_QV[:, self.yes_no].softmax(1)[:, 0]
