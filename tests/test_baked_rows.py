"""Baked exports: token ids give the logits that vectors give, in transformers and in vLLM."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from genrec.cli import app
from genrec.errors import ConfigError
from genrec.serving import baked_rows
from genrec.serving.baked_rows import bake_export, token_ids
from genrec.serving.engine import RecommendRequest, TextRequest
from genrec.serving.export import Export
from genrec.serving.quantise import quantise_export
from genrec.serving.torch_engine import TorchEngine
from tests.export_fixture import PADDING_ROWS, SOFT_PROMPT, SOFT_TOKENS, make_export

HISTORIES = [[], [3], [59, 0, 7], [5, 5, 58, 12, 1]]


def untie(folder: Path) -> None:
    """Give a tied export an output matrix of its own, unlike its embedding."""
    file, config = folder / "model" / "model.safetensors", folder / "model" / "config.json"
    tensors = load_file(file)
    embedding = tensors["model.embed_tokens.weight"]
    tensors["lm_head.weight"] = torch.randn(embedding.shape, generator=torch.Generator().manual_seed(7)) * 0.1
    save_file(tensors, file, {"format": "pt"})
    settings = json.loads(config.read_text(encoding="utf-8"))
    config.write_text(json.dumps({**settings, "tie_word_embeddings": False}), encoding="utf-8")


@pytest.fixture(scope="module", params=["tied", "untied"])
def pair(request, tmp_path_factory) -> tuple[Export, Export]:
    folder = make_export(tmp_path_factory.mktemp(request.param))
    if request.param == "untied":
        untie(folder)
    return Export.load(folder), Export.load(bake_export(folder, folder.parent))


@torch.inference_mode()
def test_ids_give_the_logits_that_vectors_give(pair) -> None:
    whole, baked = pair
    vectors = AutoModelForCausalLM.from_pretrained(whole.model_dir, dtype=torch.float32).eval()
    rows = AutoModelForCausalLM.from_pretrained(baked.model_dir, dtype=torch.float32).eval()
    vocab = whole.layout.size + PADDING_ROWS
    assert rows.config.vocab_size == vocab + len(whole.items) * SOFT_TOKENS + SOFT_PROMPT
    n_soft = 0
    for history in HISTORIES:
        for prompt in (whole.prompter.next_item(history), whole.prompter.describe(history, 4)):
            ids = token_ids(baked, prompt)
            assert ids is not None
            embeds = whole.splice(prompt, vectors.get_input_embeddings().weight)
            expected = vectors(inputs_embeds=embeds[None]).logits[0]
            found = rows(input_ids=ids[None]).logits[0, :, :vocab]
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
            plain = torch.from_numpy(prompt.input_ids)
            assert (ids[prompt.slots == -1] == plain[prompt.slots == -1]).all()
            n_soft += int((prompt.slots >= 0).sum())
            if history:  # another item's rows are another prompt
                wrong = torch.where(torch.from_numpy(prompt.slots) >= 0, ids + SOFT_TOKENS, ids)
                assert (rows(input_ids=wrong[None]).logits[0, -1, :vocab] - expected[-1]).abs().max() > 0.01
    assert n_soft > 20 * SOFT_TOKENS


def test_nothing_but_the_rows_changes(pair) -> None:
    whole, baked = pair
    before = load_file(whole.model_dir / "model.safetensors")
    after = load_file(baked.model_dir / "model.safetensors")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        longer = name in ("model.embed_tokens.weight", "lm_head.weight")
        assert torch.equal(after[name][: len(tensor)], tensor)
        assert (len(after[name]) > len(tensor)) == longer
    files = {p.relative_to(whole.folder) for p in whole.folder.rglob("*") if p.is_file()}
    assert files == {p.relative_to(baked.folder) for p in baked.folder.rglob("*") if p.is_file()}


def test_the_torch_engine_serves_both_alike(pair) -> None:
    wishes = [RecommendRequest([f"item-{row}" for row in history], k=10) for history in HISTORIES]
    lists = [TorchEngine(export, "cpu").recommend(wishes) for export in pair]
    assert lists[0] == lists[1]


def test_a_prompt_with_a_later_item_stays_vectors(pair) -> None:
    whole, baked = pair
    prompt = whole.prompter.next_item([59])
    assert token_ids(whole, prompt) is None
    assert token_ids(baked, prompt) is not None
    prompt.slots[prompt.slots >= 0] += SOFT_TOKENS  # item 60 of 60
    assert token_ids(baked, prompt) is None


def test_what_cannot_be_baked_is_refused(pair, tmp_path: Path, monkeypatch) -> None:
    whole, baked = pair
    with pytest.raises(ConfigError, match="baked already"):
        bake_export(baked.folder, tmp_path)
    int8 = quantise_export(whole.folder, tmp_path, "int8")
    with pytest.raises(ConfigError, match="bitsandbytes"):
        bake_export(int8, tmp_path)
    monkeypatch.setattr(baked_rows, "MOST_ROWS", 100)
    with pytest.raises(ConfigError, match=r"123 soft tokens of 60 items, and at most 100"):
        bake_export(whole.folder, tmp_path)
    assert not list(tmp_path.glob("*-baked"))


def test_the_command_bakes_beside_the_export(tmp_path: Path) -> None:
    folder = make_export(tmp_path)
    done = CliRunner().invoke(app, ["bake", str(folder)])
    assert done.exit_code == 0, done.output
    assert Export.load(tmp_path / "export-baked").manifest["result"]["baked"]["items"] == 60


@pytest.mark.vllm
def test_vllm_reads_ids_and_answers_as_with_vectors(tmp_path: Path, monkeypatch) -> None:
    pytest.importorskip("vllm", reason="needs the extra cpu or gpu")
    monkeypatch.setenv("OMP_NUM_THREADS", os.environ.get("OMP_NUM_THREADS", "1"))
    from genrec.serving.vllm_engine import VllmEngine
    from genrec.serving.vllm_process import VllmProcess

    folder = make_export(tmp_path)
    reference = TorchEngine(Export.load(folder), "cpu")
    sent: list[np.ndarray] = []

    class Recorded(VllmProcess):
        def codes(self, asked):
            sent.extend(asked.prompts)
            return super().codes(asked)

        def texts(self, asked):
            sent.extend(text.prompt for text in asked)
            return super().texts(asked)

    monkeypatch.setattr("genrec.serving.vllm_engine.VllmProcess", Recorded)
    engine = VllmEngine(Export.load(bake_export(folder, tmp_path)), dtype="float32")
    try:
        wishes = [RecommendRequest([f"item-{row}" for row in history], k=10) for history in HISTORIES]
        for found, expected in zip(engine.recommend(wishes), reference.recommend(wishes), strict=True):
            assert [item.item_id for item in found] == [item.item_id for item in expected]
            np.testing.assert_allclose([i.score for i in found], [i.score for i in expected], atol=1e-3)
        texts = [TextRequest(f"item-{row}", ["item-7", "item-8"], 24) for row in range(6)]
        assert engine.generate(texts) == reference.generate(texts)
        assert {prompt.dtype for prompt in sent} == {np.dtype(np.int64)}  # nobody sends vectors
    finally:
        engine.close()
