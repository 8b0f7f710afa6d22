"""A CLIP tokenizer whose words are one token each, and a random text encoder for it."""

from collections import Counter
from itertools import pairwise

import torch
from tokenizers import pre_tokenizers
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

TOKENS, WIDTH = 12, 64


def make_tokenizer(words: list[str]) -> CLIPTokenizer:
    """A CLIP BPE tokenizer in which each of `words` is one token and all else falls apart into characters."""
    characters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = learn_merges([[*word[:-1], word[-1] + "</w>"] for word in words])
    tokens = ["<|startoftext|>", "<|endoftext|>", *characters, *(c + "</w>" for c in characters)]
    tokens += dict.fromkeys(a + b for a, b in merges)
    return CLIPTokenizer(vocab={t: i for i, t in enumerate(tokens)}, merges=merges, model_max_length=TOKENS)


def learn_merges(words: list[list[str]]) -> list[tuple[str, str]]:
    """Byte pair encoding until every word, given as its characters, is one token. Ties go by the alphabet;
    the library's trainer breaks them at random."""
    pieces, merges = [list(word) for word in sorted(set(map(tuple, words)))], []
    while pairs := Counter(pair for word in pieces for pair in pairwise(word)):
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        for word in pieces:
            for i in range(len(word) - 1, 0, -1):
                if (word[i - 1], word[i]) == best:
                    word[i - 1 : i + 1] = ["".join(best)]
    return merges


def make_text_encoder(tokenizer: CLIPTokenizer, seed: int) -> CLIPTextModelWithProjection:
    """A frozen random CLIP text encoder. Wide embeddings, so that every word keeps its own direction."""
    torch.manual_seed(seed)
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        projection_dim=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = CLIPTextModelWithProjection(config)
    embeddings = next(m for n, m in model.named_modules() if n.endswith("embeddings"))
    torch.nn.init.normal_(embeddings.token_embedding.weight, std=0.7)
    torch.nn.init.normal_(embeddings.position_embedding.weight, std=0.4)
    return model.eval()
