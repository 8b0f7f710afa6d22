"""SD3's joint attention of image and text, in which the last token of the text may stand for several alike.

Without T5, SD3 reads as many zeros as CLIP has tokens in its place. Text has no positions here, so equal
tokens stay equal in every block: what is computed of one of them, projections, norms, MLP and its own
attention, holds for all, and others attend to n equal keys and values. So one token is computed, and its key
and value are repeated.
"""

import torch
import torch.nn.functional as F
from diffusers import SD3Transformer2DModel
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn


def attend_to_copies(transformer: SD3Transformer2DModel) -> None:
    """Let the blocks take `joint_attention_kwargs={"copies": n}`."""
    if not isinstance(transformer.transformer_blocks[0].attn.processor, JointAttention):
        transformer.set_attn_processor(JointAttention())


class JointAttention:
    """In the place of diffusers' processor, whose arguments it has. Shapes: N image tokens, L of text,
    T = N + L, K = T + copies - 1 keys, H heads of size D."""

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: None = None,
        copies: int = 1,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """(B, N, HD) and (B, L, HD) -> the same, or the first alone where there is no text; the text's last
        token counts `copies` times."""
        image, text = hidden_states, encoder_hidden_states
        q_BTHD = projected(image, attn.to_q, attn.norm_q, attn.heads)
        k_BKHD = projected(image, attn.to_k, attn.norm_k, attn.heads)
        v_BKHD = projected(image, attn.to_v, None, attn.heads)
        if text is not None:
            q_text = projected(text, attn.add_q_proj, attn.norm_added_q, attn.heads)
            k_text = projected(text, attn.add_k_proj, attn.norm_added_k, attn.heads)
            v_text = projected(text, attn.add_v_proj, None, attn.heads)
            q_BTHD = torch.cat([q_BTHD, q_text], dim=1)
            k_BKHD = torch.cat([k_BKHD, k_text, last_again(k_text, copies)], dim=1)
            v_BKHD = torch.cat([v_BKHD, v_text, last_again(v_text, copies)], dim=1)
        out_BTM = attention(q_BTHD, k_BKHD, v_BKHD).flatten(2)
        # PyTorch multiplies a slice that is not contiguous sample by sample.
        image_out = out_BTM[:, : image.shape[1]].contiguous()
        for layer in attn.to_out:
            image_out = layer(image_out)
        if text is None:
            return image_out
        text_out = out_BTM[:, image.shape[1] :].contiguous()
        if not attn.context_pre_only:
            text_out = attn.to_add_out(text_out)
        return image_out, text_out


def attention(q_BTHD: Tensor, k_BKHD: Tensor, v_BKHD: Tensor) -> Tensor:
    """(B, T, H, D). On a CPU bfloat16 is attended to in float32: PyTorch's backward takes five times as long
    there for as few tokens as the miniature has. Without a backward too, or GRPO would sample by another
    policy than it trains."""
    qkv = [x.transpose(1, 2) for x in (q_BTHD, k_BKHD, v_BKHD)]
    if q_BTHD.device.type == "cpu" and q_BTHD.dtype == torch.bfloat16:
        qkv = [x.float() for x in qkv]
    return F.scaled_dot_product_attention(*qkv).transpose(1, 2).to(q_BTHD.dtype)


def projected(x_BTM: Tensor, layer: nn.Module, norm: nn.Module | None, heads: int) -> Tensor:
    """(B, T, H, D), each head normed where the model does so."""
    x_BTHD = layer(x_BTM).unflatten(-1, (heads, -1))
    if norm is None:
        return x_BTHD
    return norm(x_BTHD)


def last_again(x_BLHD: Tensor, copies: int) -> Tensor:
    """The last token's, copies - 1 times."""
    return x_BLHD[:, -1:].expand(-1, copies - 1, -1, -1)
