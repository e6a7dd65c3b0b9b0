"""The torch engine against brute force and transformers' own generate; filters, batches and errors."""

import dataclasses
import json
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from genrec.errors import ArtefactError, ConfigError, DataError
from genrec.serving.engine import RecommendRequest, TextRequest
from genrec.serving.export import Export
from genrec.serving.exported_model import ExportedModel
from genrec.serving.resolve import MAX_POSITIONS, max_positions, recommend_prompt
from genrec.serving.select_engine import make_engine
from genrec.serving.torch_engine import TorchEngine, _batches
from tests.export_fixture import make_export
from tests.oracles import code_weights, item_scores, trie_log_softmax


@pytest.fixture(scope="module", params=["qwen3", "llama"])
def engine(request, tmp_path_factory) -> TorchEngine:
    return TorchEngine(Export.load(make_export(tmp_path_factory.mktemp("e"), arch=request.param)), "cpu")


def vectors(engine: TorchEngine, prompt) -> torch.Tensor:
    return engine.export.splice(prompt, engine.model.lm.get_input_embeddings().weight)[None]


@torch.inference_mode()
def brute_force(engine: TorchEngine, history: list[int]) -> np.ndarray:
    """Scores [N] of all items by full forward passes over prompt and id tokens."""
    export, lm = engine.export, engine.model.lm
    prompt = export.prompter.next_item(history)
    tokens = torch.from_numpy(export.layout.sid_tokens(export.codes))  # [N, L]
    embeds = torch.cat([vectors(engine, prompt).expand(len(tokens), -1, -1), lm.get_input_embeddings()(tokens)], 1)
    logits = lm(inputs_embeds=embeds).logits[:, len(prompt.input_ids) - 1 : -1]
    scores = np.zeros(len(tokens))
    assert export.item_scores is not None
    content = item_scores(export.item_scores, history)
    n_codes = export.layout.n_codes
    for level in range(export.layout.levels):
        first = export.layout.sid_start + level * n_codes
        prior = [code_weights(content, export.codes, id_[:level].tolist(), n_codes) for id_ in export.codes]
        of_level = logits[:, level, first : first + n_codes] + torch.tensor(np.array(prior)).float()
        logp = trie_log_softmax(of_level, export.codes, level)
        scores += logp.gather(1, (tokens[:, level] - first)[:, None])[:, 0].numpy()
    return scores


def test_lists_are_the_best_items_never_seen_and_available(engine: TorchEngine) -> None:
    history = [5, 9, 2]
    (ranked,) = engine.recommend([RecommendRequest([f"item-{row}" for row in history], k=7, beams=60)])
    scores = brute_force(engine, history)
    legal = engine.export.catalogue.available.copy()
    legal[history] = False
    best = [row for row in np.argsort(-scores) if legal[row]][:7]
    assert [item.item_id for item in ranked] == [f"item-{row}" for row in best]
    np.testing.assert_allclose([item.score for item in ranked], scores[best], atol=1e-4)
    assert [item.rank for item in ranked] == list(range(1, 8))


def test_a_batch_equals_one_by_one(engine: TorchEngine) -> None:
    rng = np.random.default_rng(0)
    requests = [
        RecommendRequest([f"item-{row}" for row in rng.integers(0, 60, n)], k=5, beams=beams)
        for n, beams in [(0, None), (1, 3), (30, None), (4, 3), (12, 20), (2, None)]
    ]
    together = engine.recommend(requests)
    for request, batched in zip(requests, together, strict=True):
        (alone,) = engine.recommend([request])
        assert [item.item_id for item in alone] == [item.item_id for item in batched]
        np.testing.assert_allclose([i.score for i in alone], [i.score for i in batched], atol=1e-5)
    assert engine.recommend([]) == []


def test_batches_hold_one_width_and_every_request_once() -> None:
    rng = np.random.default_rng(0)
    lengths, widths = rng.integers(1, 2000, 300).tolist(), rng.choice([5, 50, 200], 300).tolist()
    batches = list(_batches(lengths, widths, 3))
    assert sorted(i for batch in batches for i in batch) == list(range(300))
    for batch in batches:
        assert len({widths[i] for i in batch}) == 1
        assert len(batch) * (max(lengths[i] for i in batch) + 3 * widths[batch[0]]) <= 16_384
    assert list(_batches([10**6], [1], 1)) == [[0]]  # too long for the limit still runs, alone


@pytest.mark.parametrize(
    "conditions",
    [
        {"categories": ["lamp", "sofa"]},
        {"price_min": 30.0, "price_max": 60.0},
        {"allow": [f"item-{row}" for row in range(10, 25)]},
        {"exclude_seen": False, "allow": ["item-1", "item-4"]},
        {"allow": []},
    ],
)
def test_conditions_hold_and_lose_nothing(engine: TorchEngine, conditions) -> None:
    catalogue, history = engine.export.catalogue, ["item-1", "item-12", "item-12"]
    (ranked,) = engine.recommend([RecommendRequest(history, k=60, beams=1, **conditions)])
    legal = set()
    for row, item in enumerate(catalogue.item_ids):
        wanted = conditions.get("categories")
        fits = catalogue.available[row] and (item not in history or not conditions.get("exclude_seen", True))
        fits &= wanted is None or bool(set(wanted) & set(catalogue.categories[row]))
        fits &= "price_min" not in conditions or 30 <= catalogue.prices[row] <= 60
        fits &= "allow" not in conditions or item in conditions["allow"]
        legal |= {item} if fits else set()
    assert {item.item_id for item in ranked} == legal
    assert len(ranked) == len(legal)


def test_long_histories_keep_the_newest_events(engine: TorchEngine) -> None:
    rows = (np.arange(400) * 7 % 50).tolist()
    prompt = recommend_prompt(engine.export, rows, engine.max_positions)
    assert len(prompt.input_ids) + 3 <= engine.max_positions == 1024
    assert len(prompt.input_ids) + 3 > 1024 - 5  # and as many as fit: an item takes L + K = 5
    kept = [slot // 2 for slot in prompt.slots[prompt.slots >= 0].tolist()][::2]
    assert kept == rows[-len(kept) :]
    (ranked,) = engine.recommend([RecommendRequest([f"item-{row}" for row in rows], k=20)])
    assert {item.item_id for item in ranked} <= {f"item-{row}" for row in range(50, 60)}  # all seen are out
    with pytest.raises(DataError, match=r"an answer of 3 tokens and a prompt of .* exceed the model's 8 positions"):
        recommend_prompt(engine.export, rows, 8)


def test_positions_are_the_model_s_up_to_a_limit(tmp_path: Path) -> None:
    export = Export.load(make_export(tmp_path))
    config = export.model_dir / "config.json"
    known = json.loads(config.read_text())
    for changed, expected in [
        ({}, 1024),
        ({"max_position_embeddings": 40_960}, MAX_POSITIONS),
        ({"text_config": {"max_position_embeddings": 512}}, 512),
    ]:
        config.write_text(json.dumps(known | changed))
        assert max_positions(export) == expected
    assert max_positions(export, 100) == 100


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (RecommendRequest(["item-1", "nope", "<|sid_0_1|>"]), r"'nope', '<\|sid_0_1\|>'"),
        (RecommendRequest([f"x{i}" for i in range(9)]), "'x4' and 4 more"),
        (RecommendRequest([], k=0), "found k=0"),
        (RecommendRequest([], beams=0), "beams=0"),
        (RecommendRequest([], categories=["lamps"]), "did you mean 'lamp'"),
        (RecommendRequest([], allow=["nope"]), "allow: not in the catalogue"),
    ],
)
def test_bad_requests_for_lists_are_named(engine: TorchEngine, request_, message: str) -> None:
    with pytest.raises(DataError, match=message):
        engine.recommend([request_])


def test_greedy_text_equals_transformers_generate(engine: TorchEngine) -> None:
    export, lm = engine.export, engine.model.lm
    requests = [TextRequest("item-4", [f"item-{row}" for row in range(n)], max_tokens=12) for n in (3, 0, 1, 17)]
    answers = engine.generate(requests)
    for request, answer in zip(requests, answers, strict=True):
        prompt = export.prompter.describe(range(len(request.history)), 4)
        expected = lm.generate(
            inputs_embeds=vectors(engine, prompt),
            attention_mask=torch.ones(1, len(prompt.input_ids), dtype=torch.int64),
            max_new_tokens=12,
            do_sample=False,
            eos_token_id=export.layout.eos,
            pad_token_id=export.layout.eos,
            suppress_tokens=list(range(export.layout.base_vocab, lm.config.vocab_size)),
        )[0].tolist()
        if export.layout.eos in expected:
            assert answer.finish_reason == "stop"
            expected = expected[: expected.index(export.layout.eos)]
        else:
            assert answer.finish_reason == "length"
        assert answer.token_ids == expected
        assert answer.text == export.tokenizer.decode(expected)
    assert len({tuple(answer.token_ids) for answer in answers}) > 1  # the prompt matters


def test_text_stops_at_the_end_token(engine: TorchEngine) -> None:
    (free,) = engine.generate([TextRequest("item-2", max_tokens=12, temperature=1.0, seed=5)])
    at = next(i for i in range(3, 12) if free.token_ids[i] not in free.token_ids[:i])
    layout = dataclasses.replace(engine.export.layout, eos=free.token_ids[at])
    other = TorchEngine(dataclasses.replace(engine.export, layout=layout), "cpu")
    same = TextRequest("item-2", max_tokens=12, temperature=1.0, seed=5)
    short = TextRequest("item-2", max_tokens=2, temperature=1.0, seed=5)
    stopped, cut = other.generate([same, short])
    assert (stopped.finish_reason, stopped.token_ids) == ("stop", free.token_ids[:at])
    assert (cut.finish_reason, cut.token_ids) == ("length", free.token_ids[:2])


def test_sampling_follows_the_softmax_and_the_seed(engine: TorchEngine) -> None:
    n, base = 600, engine.export.layout.base_vocab
    requests = [TextRequest("item-7", ["item-3"], 1, 0.5, seed) for seed in range(n)]
    drawn = [(*result.token_ids, engine.export.layout.eos)[0] for result in engine.generate(requests)]
    again = [(*result.token_ids, engine.export.layout.eos)[0] for result in engine.generate(requests[::-1])]
    assert drawn == again[::-1]
    prompt = engine.export.prompter.describe([3], 7)
    with torch.inference_mode():
        logits = engine.model.lm(inputs_embeds=vectors(engine, prompt)).logits[0, -1, :base]
    chances = (logits / 0.5).softmax(-1).double().numpy()
    counts = np.bincount(drawn, minlength=base)
    top = np.argsort(-chances)[:10]
    expected = np.append(chances[top], 1 - chances[top].sum()) * n
    observed = np.append(counts[top], n - counts[top].sum())
    assert ((observed - expected) ** 2 / expected).sum() < 29.6  # chi-squared, 10 degrees, p = 0.001
    flat = np.full(11, n / 11)  # negative control
    assert ((observed - flat) ** 2 / flat).sum() > 29.6


def test_a_temperature_near_nothing_writes_the_greedy_text(engine: TorchEngine) -> None:
    for temperature in (1e-6, 1e-40, 1e-300, 5e-324):  # the last three are 0 as float32
        greedy, cold = engine.generate([TextRequest("item-3", max_tokens=8, temperature=t) for t in (0.0, temperature)])
        assert cold.token_ids == greedy.token_ids


def test_text_never_holds_an_id_or_a_placeholder(engine: TorchEngine) -> None:
    requests = [TextRequest("item-0", max_tokens=64, temperature=1e4, seed=seed) for seed in range(20)]
    tokens = [token for result in engine.generate(requests) for token in result.token_ids]
    assert len(tokens) > 500  # uniform draws over all rows would hold about 9 % of them
    assert max(tokens) < engine.export.layout.base_vocab


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (TextRequest("nope"), "'nope'"),
        (TextRequest("item-1", ["gone"]), "'gone'"),
        (TextRequest("item-1", max_tokens=0), "max_tokens=0"),
        (TextRequest("item-1", max_tokens=5000), "1024 positions"),
        (TextRequest("item-1", temperature=-0.1), "temperature=-0.1"),
    ],
)
def test_bad_requests_for_text_are_named(engine: TorchEngine, request_, message: str) -> None:
    with pytest.raises(DataError, match=message):
        engine.generate([request_])


@pytest.mark.parametrize("bias", [False, True])
def test_level_logits_are_a_slice_of_an_untied_head(tmp_path: Path, bias: bool) -> None:
    export = Export.load(make_export(tmp_path, arch="llama"))
    config = AutoConfig.from_pretrained(export.model_dir, tie_word_embeddings=False)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(export.model_dir)
    model = ExportedModel(export, "cpu")
    head = model.lm.get_output_embeddings()
    assert not torch.equal(head.weight, model.embedding)
    if bias:
        model._bias = head.bias = torch.nn.Parameter(torch.randn(len(head.weight)), requires_grad=False)
    hidden, layout = torch.randn(2, 3, 64), export.layout
    whole = head(hidden)
    for level in range(layout.levels):
        first = layout.sid_start + level * layout.n_codes
        torch.testing.assert_close(model.sid_logits(level, hidden), whole[..., first : first + layout.n_codes])
        codes = torch.tensor([[0, 7]])
        torch.testing.assert_close(model.sid_embed(level, codes), model.lm.get_input_embeddings()(codes + first))
    torch.testing.assert_close(model.text_logits(hidden), whole[..., : layout.base_vocab])


def test_models_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    export = Export.load(make_export(tmp_path))
    big = dataclasses.replace(export, layout=dataclasses.replace(export.layout, n_codes=4096))
    with pytest.raises(ArtefactError, match="vocabulary rows, but the layout has"):
        ExportedModel(big, "cpu")
    (export.model_dir / "model.safetensors").unlink()
    with pytest.raises(ArtefactError, match="no loadable model"):
        ExportedModel(export, "cpu")


def test_close_twice(tmp_path: Path) -> None:
    engine = TorchEngine(Export.load(make_export(tmp_path)), "cpu")
    engine.close()
    assert engine.close() is None  # type: ignore[func-returns-value]


def test_engine_choice_says_why(tmp_path: Path, monkeypatch, caplog) -> None:
    export = Export.load(make_export(tmp_path))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with caplog.at_level(logging.INFO):
        assert make_engine(export, "auto").name == make_engine(export, "torch").name == "torch"
    assert "engine: torch (as asked)" in caplog.text
    assert "no CUDA GPU" in caplog.text or "vLLM is not installed" in caplog.text
    with pytest.raises(ConfigError, match="'tpu'; there are auto, torch, vllm"):
        make_engine(export, "tpu")
    config = export.model_dir / "config.json"
    settings = json.loads(config.read_text()) | {"quantization_config": {"quant_method": "bitsandbytes"}}
    config.write_text(json.dumps(settings))
    with pytest.raises(ConfigError, match="quantised by bitsandbytes"):
        make_engine(export, "vllm")
