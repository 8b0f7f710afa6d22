"""Counter-based standard normal noise: a pure function of (seed, sample index, element index)."""

import math

import torch
from torch import Tensor

_LOW = 0xFFFFFFFF  # the lower word of 64 bits; after >> 32 it takes away the sign that the shift carries down
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)


def normal(shape, seed: int, index: Tensor | None = None, device="cpu") -> Tensor:
    """Standard normal noise, float32, of shape (B, ...). Element e of sample b depends on (seed, index[b], e)
    alone: not on the batch it is drawn in, the device, or how a batch is split over processes.

    seed: 0 <= seed < 2**63; give every step its own.
    index: (B,) int64, the samples' global indices; None means 0 .. B-1.
    The same bits feed the fused kernels: counter = (e // 4, index[b]) as 64-bit words, key = seed, elements
    4j .. 4j+3 are the four outputs of one Philox call. ValueError: bad seed or index.
    """
    check_seed(seed)
    batch, dims = shape[0], math.prod(shape[1:])
    if index is None:
        index = torch.arange(batch, device=device)
    if index.shape != (batch,) or index.dtype != torch.int64:
        got = f"shape {tuple(index.shape)} and dtype {index.dtype}"
        raise ValueError(f"index has {got}: expected ({batch},) int64, one global index per sample")
    index_B1 = index.to(device)[:, None]
    call_1N = torch.arange((dims + 3) // 4, device=device)[None]
    counters = torch.broadcast_tensors(call_1N & _LOW, call_1N >> 32, index_B1 & _LOW, index_B1 >> 32 & _LOW)
    w0, w1, w2, w3 = philox(seed, counters)
    z0, z1 = box_muller(w0, w1)
    z2, z3 = box_muller(w2, w3)
    noise_BN4 = torch.stack((z0, z1, z2, z3), dim=-1)
    return noise_BN4.flatten(1)[:, :dims].reshape(shape)


def philox(seed: int, counters: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-10 (Salmon et al. 2011): four 32-bit counters -> four random 32-bit words, held in int64. A
    product of two words wraps to the same 64 bits there, so its halves can be read off it."""
    c0, c1, c2, c3 = counters
    key_0, key_1 = seed & _LOW, seed >> 32
    for _ in range(10):
        product_0 = c0 * _MULTIPLIERS[0]
        product_1 = c2 * _MULTIPLIERS[1]
        c0 = (product_1 >> 32 & _LOW) ^ c1 ^ key_0
        c1 = product_1 & _LOW
        c2 = (product_0 >> 32 & _LOW) ^ c3 ^ key_1
        c3 = product_0 & _LOW
        key_0 = (key_0 + _KEY_STEPS[0]) & _LOW
        key_1 = (key_1 + _KEY_STEPS[1]) & _LOW
    return c0, c1, c2, c3


def box_muller(word_a: Tensor, word_b: Tensor) -> tuple[Tensor, Tensor]:
    """Two random 32-bit words -> two independent standard normals, float32, |z| < 6.8."""
    radius = (-2 * torch.log(word_a.float() * 2**-32 + 2**-33)).sqrt()
    angle = word_b.float() * (2 * math.pi * 2**-32)
    return radius * angle.cos(), radius * angle.sin()


def check_seed(seed: int) -> None:
    if not isinstance(seed, (int, torch.SymInt)) or not 0 <= seed < 2**63:
        raise ValueError(f"seed = {seed!r}: expected an integer, 0 <= seed < 2**63")
