"""FusedDecoder against the transformers decoder that it was made from, in every way that the engine calls it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    GemmaConfig,
    LlamaConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
)
from transformers.cache_utils import DynamicCache

from genrec.decode import attention_mask
from genrec.serving.fused_decoder import FEW, FusedDecoder, product

SIZES: dict[str, Any] = {
    "vocab_size": 50, "hidden_size": 32, "intermediate_size": 88, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256,
}  # fmt: skip
CONFIGS: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True),
    "llama, long": LlamaConfig(
        **SIZES,
        rope_parameters={
            "rope_type": "llama3", "rope_theta": 1e4, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    ),
    "qwen2": Qwen2Config(**SIZES),
    "qwen3": Qwen3Config(**SIZES, head_dim=16, rms_norm_eps=1e-5),
}  # fmt: skip


def model_of(config: PreTrainedConfig):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    for weight in model.parameters():  # norms and biases that matter, too
        torch.nn.init.normal_(weight, 1.0 if weight.ndim == 1 else 0.0, 0.3)
    return model


@pytest.mark.parametrize("kind", CONFIGS)
@torch.inference_mode()
def test_every_call_gives_what_transformers_gives(kind: str) -> None:
    decoder = model_of(CONFIGS[kind]).get_decoder()
    assert FusedDecoder.fits(decoder)
    fused = FusedDecoder(copy.deepcopy(decoder))
    ours, theirs = DynamicCache(), DynamicCache()
    generator = torch.Generator().manual_seed(1)

    def same(length: int, mask: torch.Tensor, positions: torch.Tensor) -> None:
        embeds = torch.randn(2, length, SIZES["hidden_size"], generator=generator)
        given = {"inputs_embeds": embeds, "position_ids": positions, "use_cache": True}
        expected = decoder(**given, attention_mask=mask, past_key_values=theirs).last_hidden_state
        found = fused(**given, attention_mask=mask, past_key_values=ours).last_hidden_state
        real = mask[:, -length:].bool() if mask.ndim == 2 else torch.ones(2, length, dtype=torch.bool)
        torch.testing.assert_close(found[real], expected[real], rtol=1e-4, atol=2e-5)

    padding = torch.ones(2, 40, dtype=torch.long)
    padding[1, 33:] = 0  # a text prompt that is shorter
    same(40, padding, torch.arange(40).expand(2, -1))
    grown = torch.cat([padding, torch.ones(2, 1, dtype=torch.long)], 1)
    same(1, grown, torch.tensor([[40], [33]]))  # its next word
    visible = torch.rand(2, 5, 46, generator=generator) < 0.7  # beams: any pattern
    visible[:, :, 0] = True
    same(5, attention_mask(visible, torch.float32), torch.full((2, 5), 41))
    assert ours.get_seq_length() == theirs.get_seq_length() == 46


@torch.inference_mode()
def test_the_model_itself_stays_what_it_was() -> None:
    """Its weights are views now: nothing is kept twice, and whoever calls the model gets the same."""
    model = model_of(CONFIGS["qwen3"])
    ids = torch.arange(20)[None]
    before = model(input_ids=ids).logits
    fused = FusedDecoder(model.get_decoder())
    torch.testing.assert_close(model(input_ids=ids).logits, before)
    attention = model.get_decoder().layers[1].self_attn
    assert attention.k_proj.weight.untyped_storage().data_ptr() == fused.blocks[1].qkv.untyped_storage().data_ptr()


def test_other_models_are_left_to_transformers() -> None:
    assert not FusedDecoder.fits(model_of(GemmaConfig(**SIZES, head_dim=8)).get_decoder())
    windows = Qwen3Config(**SIZES, use_sliding_window=True, sliding_window=8, max_window_layers=1)
    assert not FusedDecoder.fits(model_of(windows).get_decoder())
    quantised = model_of(CONFIGS["llama"]).get_decoder()
    quantised.layers[0].mlp.down_proj = torch.nn.Sequential(quantised.layers[0].mlp.down_proj)
    assert not FusedDecoder.fits(quantised)


@pytest.mark.parametrize("rows", [1, 2, FEW, FEW + 1])
def test_products_from_either_side_are_the_same(rows: int) -> None:
    x, weight, bias = torch.randn(1, rows, 24), torch.randn(40, 24), torch.randn(40)
    torch.testing.assert_close(product(x, weight, bias), torch.nn.functional.linear(x, weight, bias))
    torch.testing.assert_close(product(x, weight), torch.nn.functional.linear(x, weight))
    assert product(x, weight, bias).is_contiguous()  # or attention leaves its fast path
