"""Bases from folders: Llama, Qwen3, the language part of multimodal ones, quantised ones; and what is refused."""

import json
import math
import shutil
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    PreTrainedTokenizerFast,
)

from genrec.artefacts import read_manifest
from genrec.bases import extract_language_part, is_multimodal, load_base
from genrec.config import resolve_recipe
from genrec.errors import ConfigError
from genrec.pipeline import Run
from genrec.scratch import train_tokenizer
from genrec.serving.engine import RecommendRequest
from genrec.serving.export import Export
from genrec.serving.torch_engine import TorchEngine
from tests.conftest import tiny_recipe

TEXT = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "max_position_embeddings": 512,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}


def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(["Blue mug of Brightwell\nmaterial: steel", "Red lamp\nmaterial: oak"] * 9, 320)


def make_base(folder, kind, outer=False, **more):
    """A tiny random checkpoint with its tokenizer, saved as its makers save theirs.

    `outer` is a multimodal config's own tie_word_embeddings, `more` its text part's settings; returns the whole model.
    """
    torch.manual_seed(0)
    tokens = tokenizer()
    text = {**TEXT, "vocab_size": len(tokens), **more}
    if kind == "llava":
        small: Any = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
        vision = CLIPVisionConfig(**small, image_size=28, patch_size=14)
        config: Any = LlavaConfig(
            vision_config=vision, text_config=LlamaConfig(**text), image_token_index=5, tie_word_embeddings=outer
        )
        model = AutoModelForImageTextToText.from_config(config)
    elif kind == "qwen3_vl":
        towers = {
            "depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 64,
            "deepstack_visual_indexes": [0], "num_position_embeddings": 16, "patch_size": 14,
        }  # fmt: skip
        rope = {"rope_type": "default", "rope_theta": 50_000.0, "mrope_section": [6, 5, 5], "mrope_interleaved": True}
        text["rope_parameters"] = rope
        config = AutoConfig.for_model(
            "qwen3_vl", vision_config=towers, text_config=text, tie_word_embeddings=outer
        )  # fmt: skip
        model = AutoModelForImageTextToText.from_config(config)
    else:
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **text))
    model.eval().save_pretrained(folder)
    tokens.save_pretrained(folder)
    return model


@pytest.mark.parametrize(
    ("outer", "inner"), [(True, True), (False, False), (False, True)], ids=["tied", "untied", "at-odds"]
)
@pytest.mark.parametrize("kind", ["llava", "qwen3_vl"])
def test_the_language_part_computes_what_the_whole_model_does_on_text(tmp_path, kind, outer, inner):
    whole = make_base(tmp_path / "whole", kind, outer, tie_word_embeddings=inner)
    assert is_multimodal(str(tmp_path / "whole"))
    found = extract_language_part(str(tmp_path / "whole"), tmp_path / "part")
    assert found["model_type"] == {"llava": "llama", "qwen3_vl": "qwen3"}[kind]
    assert not is_multimodal(str(tmp_path / "part"))
    part, tokens = load_base(str(tmp_path / "part"))
    assert len(tokens) == part.config.vocab_size
    ids = torch.randint(6, len(tokens), (2, 40), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        expected, logits = whole(input_ids=ids).logits, part.eval()(input_ids=ids).logits
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-4)
    assert logits.std() > 0.01
    assert not any("vision" in name or "visual" in name for name in load_file(tmp_path / "part" / "model.safetensors"))
    weights = sum(p.numel() for p in part.parameters())
    assert found["parameters"] == weights < sum(p.numel() for p in whole.parameters())


@pytest.mark.parametrize("kind", ["llama", "qwen3", "llava", "qwen3_vl"])
def test_a_base_is_tuned_exported_and_served(prepared, tmp_path, kind):
    make_base(tmp_path / "base", kind)
    run = with_base(prepared, tmp_path, str(tmp_path / "base"))
    run.finetune()
    assert math.isfinite(read_manifest(run.folder / "lora")["result"]["best_ndcg@10"])
    expected = np.load(run.rank_test() / "top.npy")[:8]
    export = Export.load(run.export())
    ids = np.array(export.catalogue.item_ids)
    cases = run.space.split.test
    requests = [RecommendRequest([*ids[history]], k=10) for history in cases.histories[:8]]
    for row, items in zip(expected, TorchEngine(export, "cpu").recommend(requests), strict=True):
        assert [item.item_id for item in items] == [*ids[row[:10]]]


def with_base(prepared, tmp_path, base, **backbone):
    """The prepared run's data under another base: a few steps of fine-tuning, no alignment."""
    recipe = tiny_recipe(
        backbone={"base": base, **backbone},
        align={"steps": 0},
        finetune={"epochs": 0.5, "evals": 1},
    )
    folder = tmp_path / "run"
    shutil.copytree(prepared.folder, folder)
    run = Run(folder, resolve_recipe(recipe), folder)
    run.base()
    run.semantic_ids()
    run.align()
    return run


@pytest.mark.parametrize("load_in", ["nf4", "int8", "bfloat16"])
def test_a_quantised_base_takes_a_training_step(prepared, tmp_path, load_in):
    """QLoRA: gradients reach LoRA through the quantised layers, which stay as they are."""
    make_base(tmp_path / "base", "llama")
    run = with_base(prepared, tmp_path, str(tmp_path / "base"), load_in=load_in)
    backbone = run.space.backbone(tuned=True)
    layer = backbone.decoder.layers[0].self_attn.q_proj
    kind = {"nf4": "Linear4bit", "int8": "Linear8bitLt", "bfloat16": "Linear"}[load_in]
    assert type(layer.base_layer).__name__ == kind
    frozen = layer.base_layer.weight.detach().clone()
    from genrec.training.packing import PackedCollator, packed_rows

    prompts = [run.space.prompter.next_item(history) for history in run.space.split.train[:4]]
    batch = PackedCollator(run.space.layout)(packed_rows(prompts, 256))
    optimiser = torch.optim.SGD([p for p in backbone.parameters() if p.requires_grad], lr=0.1)
    seen = []
    for _ in range(4):
        loss = backbone(**batch)["loss"]
        loss.backward()
        gradients = {n: p.grad for n, p in backbone.named_parameters() if "lora_" in n and p.grad is not None}
        seen.append(loss.item())
        optimiser.step()
        optimiser.zero_grad(set_to_none=False)
    assert len(gradients) == sum("lora_" in name for name, _ in backbone.named_parameters()) > 0
    assert all(math.isfinite(value) for value in seen)
    assert seen[-1] < seen[0]
    assert any(p.abs().sum() > 0 for n, p in backbone.named_parameters() if "lora_B" in n), "LoRA did not move"
    assert torch.equal(layer.base_layer.weight.detach(), frozen)


def edit(folder, name, **values):
    path = folder / name
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_errors_name_the_base_and_what_to_do(tmp_path):
    with pytest.raises(ConfigError, match=r"backbone\.base '.*nothing': no model there .*or scratch:"):
        load_base(str(tmp_path / "nothing"))
    make_base(tmp_path / "llama", "llama")
    edit(tmp_path / "llama", "tokenizer_config.json", eos_token=None)
    with pytest.raises(ConfigError, match=r"llama': its tokenizer names no end token; set eos_token"):
        load_base(str(tmp_path / "llama"))
    make_base(tmp_path / "qwen3", "qwen3")
    edit(tmp_path / "qwen3", "config.json", final_logit_softcapping=30.0)
    with pytest.raises(ConfigError, match=r"config\.final_logit_softcapping = 30\.0; scores over semantic ids need"):
        load_base(str(tmp_path / "qwen3"))
    edit(tmp_path / "qwen3", "config.json", final_logit_softcapping=None)
    load_base(str(tmp_path / "qwen3"))
