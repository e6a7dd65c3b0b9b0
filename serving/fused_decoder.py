"""The blocks of a Llama or Qwen on a CPU with fewer, larger products: the same numbers in less time for few tokens.

transformers makes about fifty small operations of a block, and its products go through MKL from the side that is slow
for a few rows. Reading one new event, and each beam or word after it, is little else. Here queries, keys and values are
one product, and so are a block's gate and up; up to `FEW` rows are multiplied from the weights' side.
Weights are not copied: those of transformers' modules become views.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast

from genrec.decode import attention_mask as additive

ARCHITECTURES = ("LlamaModel", "Qwen2Model", "Qwen3Model")
FEW = 16  # rows of a product


def product(rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """rows [..., K], weight [N, K], bias [N] -> [..., N]."""
    n_rows = rows.numel() // rows.shape[-1]
    if not 1 < n_rows <= FEW:
        return F.linear(rows, weight, bias)
    # in memory as F.linear's answer is: attention over vectors with strides would not take its fast path
    out = (weight @ rows.reshape(n_rows, -1).t()).t().contiguous().view(*rows.shape[:-1], -1)
    return out if bias is None else out + bias


def joined(parts: list[Any]) -> tuple[Tensor, Tensor | None]:
    """The weights of several nn.Linear, one under the other; theirs become views of it."""
    weight = torch.cat([part.weight for part in parts])
    bias = None if parts[0].bias is None else torch.cat([part.bias for part in parts])
    start = 0
    for part in parts:
        end = start + len(part.weight)
        part.weight = nn.Parameter(weight[start:end], requires_grad=False)
        if bias is not None:
            part.bias = nn.Parameter(bias[start:end], requires_grad=False)
        start = end
    return weight, bias


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions as transformers applies them: x [B, H, T, d], cos and sin [B, 1, T, d]."""
    left, right = x.chunk(2, -1)
    return x * cos + torch.cat([-right, left], -1) * sin


class _Block:
    """The weights of one block."""

    def __init__(self, layer: Any) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self.before, self.after = layer.input_layernorm.weight, layer.post_attention_layernorm.weight
        self.epsilon = layer.input_layernorm.variance_epsilon
        projections = [attention.q_proj, attention.k_proj, attention.v_proj]
        self.heads = [len(of.weight) // attention.head_dim for of in projections]
        self.qkv, self.qkv_bias = joined(projections)
        self.out, self.out_bias = attention.o_proj.weight, attention.o_proj.bias
        self.gate_up, self.gate_up_bias = joined([mlp.gate_proj, mlp.up_proj])
        self.down, self.down_bias = mlp.down_proj.weight, mlp.down_proj.bias
        self.q_norm = getattr(attention, "q_norm", None) and attention.q_norm.weight
        self.k_norm = getattr(attention, "k_norm", None) and attention.k_norm.weight
        self.head_dim, self.scaling = attention.head_dim, attention.scaling


class FusedDecoder(nn.Module):
    """In place of a transformers decoder, for inference on a CPU: the same call, the same answer."""

    def __init__(self, decoder: Any) -> None:
        """
        Args:
            decoder: one that `fits`.
        """
        super().__init__()
        self.norm, self.rotary = decoder.norm, decoder.rotary_emb
        self.blocks = [_Block(layer) for layer in decoder.layers[: decoder.config.num_hidden_layers]]

    @staticmethod
    def fits(decoder: Any) -> bool:
        """Whether it is a decoder of `ARCHITECTURES` with plain weights and full attention everywhere, on a CPU."""
        if type(decoder).__name__ not in ARCHITECTURES or decoder.config.hidden_act != "silu":
            return False
        plain = all(
            type(part) is nn.Linear and part.weight.device.type == "cpu"
            for name, part in decoder.named_modules()
            if name.endswith("_proj")
        )
        kinds = getattr(decoder.config, "layer_types", None) or ["full_attention"]
        return plain and set(kinds) == {"full_attention"}

    def forward(
        self,
        inputs_embeds: Tensor,
        attention_mask: Tensor,
        position_ids: Tensor,
        past_key_values: Cache,
        use_cache: bool = True,
    ) -> BaseModelOutputWithPast:
        """As transformers' decoders are called.

        Args:
            inputs_embeds: [B, T, D].
            attention_mask: additive [B, 1, T, S], or int64 [B, S] with 0 at padding: causal then.
            position_ids: int64 [B, T].
            past_key_values: grows by T.
            use_cache: it always does.
        """
        batch, length, _ = inputs_embeds.shape
        if attention_mask.ndim == 2:
            places = torch.arange(attention_mask.shape[1])
            causal = places <= places[-length:, None]  # [T, S]
            attention_mask = additive(causal & attention_mask[:, None].bool(), inputs_embeds.dtype)
        cos, sin = (part[:, None] for part in self.rotary(inputs_embeds, position_ids))  # [B, 1, T, d]
        x = inputs_embeds
        for number, of in enumerate(self.blocks):
            normed = F.rms_norm(x, x.shape[-1:], of.before, of.epsilon)
            n_q, n_k, _ = of.heads
            every = product(normed, of.qkv, of.qkv_bias).view(batch, length, -1, of.head_dim).transpose(1, 2)
            turned, v = every[:, : n_q + n_k], every[:, n_q + n_k :]
            if of.q_norm is not None:
                q = F.rms_norm(turned[:, :n_q], turned.shape[-1:], of.q_norm, of.epsilon)
                k = F.rms_norm(turned[:, n_q:], turned.shape[-1:], of.k_norm, of.epsilon)
                turned = torch.cat([q, k], 1)
            turned = rotated(turned, cos, sin)
            q = turned[:, :n_q]
            k, v = past_key_values.update(turned[:, n_q:], v, number)
            heads = F.scaled_dot_product_attention(
                q, k, v, attention_mask, scale=of.scaling, enable_gqa=q.shape[1] != k.shape[1]
            )
            x = x + product(heads.transpose(1, 2).reshape(batch, length, -1), of.out, of.out_bias)
            normed = F.rms_norm(x, x.shape[-1:], of.after, of.epsilon)
            gate, up = product(normed, of.gate_up, of.gate_up_bias).chunk(2, -1)
            x = x + product(F.silu(gate) * up, of.down, of.down_bias)
        x = F.rms_norm(x, x.shape[-1:], self.norm.weight, self.norm.variance_epsilon)
        return BaseModelOutputWithPast(last_hidden_state=x, past_key_values=past_key_values)  # type: ignore[arg-type]
