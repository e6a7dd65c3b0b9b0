"""Prompts extended by new events: the same answers as computed whole, in bounded memory."""

import numpy as np
import pytest
import torch

from genrec.decode import Prefilled, prefill
from genrec.prompts import Prompt
from genrec.serving.engine import RankedItem, RecommendRequest
from genrec.serving.export import Export
from genrec.serving.metrics import Metrics
from genrec.serving.torch_engine import TorchEngine
from tests.export_fixture import SOFT_TOKENS, make_export

TOLERANCE = 1e-4  # float32 rounding of two orders of summation; another event moves scores by far more


@pytest.fixture(scope="module", params=["qwen3", "llama"])
def export(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Export:
    return Export.load(make_export(tmp_path_factory.mktemp("prefix"), arch=request.param))


def ask(engine: TorchEngine, histories: list[list[int]]) -> list[list[RankedItem]]:
    return engine.recommend([RecommendRequest([f"item-{row}" for row in h], k=20, beams=60) for h in histories])


def difference(one: list[RankedItem], other: list[RankedItem]) -> float:
    """The greatest difference of an item's scores; infinite for other items."""
    scores = {item.item_id: item.score for item in other}
    return max(abs(item.score - scores.get(item.item_id, np.inf)) for item in one)


def test_new_events_extend_the_prompt_and_change_no_answer(export: Export) -> None:
    cached, whole = TorchEngine(export, "cpu"), TorchEngine(export, "cpu", cache_bytes=0)
    short = [[4, 9, 2], [7], [30, 31, 32, 33, 34, 35], []]
    longer = [[*short[0], 11], [*short[1], 5, 6, 8], [*short[2], 1, 2], [3]]
    ask(cached, short)
    assert (cached.prefixes.hits, cached.prefixes.misses) == (0, 4)
    read: list[int] = []
    embed = cached._embed

    def watched(prompts: list[Prompt]) -> tuple[torch.Tensor, torch.Tensor]:
        read.extend(len(prompt.input_ids) for prompt in prompts)
        return embed(prompts)

    cached._embed = watched  # type: ignore[method-assign]
    answers = ask(cached, [*longer, [50, 51]])  # the last begins like the empty history alone
    assert cached.prefixes.hits == 5
    event = export.layout.levels + SOFT_TOKENS
    assert sorted(read) == sorted([event, 3 * event, 2 * event, event, 2 * event])
    for row, (one, other) in enumerate(zip(answers, ask(whole, [*longer, [50, 51]]), strict=True)):
        assert [item.item_id for item in one] == [item.item_id for item in other], row
        assert difference(one, other) < TOLERANCE
    assert (whole.prefixes.hits, whole.prefixes.n_bytes, len(whole.prefixes)) == (0, 0, 0)
    # negative control: without the last event the answer is another
    assert difference(answers[0], ask(whole, short)[0]) > 100 * TOLERANCE


def test_another_order_is_no_beginning(export: Export) -> None:
    engine = TorchEngine(export, "cpu")
    ask(engine, [[4, 9, 2]])
    ask(engine, [[9, 4, 2, 11]])
    assert engine.prefixes.hits == 0


def test_memory_is_bounded_and_the_oldest_gives_way(export: Export) -> None:
    probe = TorchEngine(export, "cpu")
    ask(probe, [[1, 2, 3]])
    one = probe.prefixes.n_bytes
    engine = TorchEngine(export, "cpu", cache_bytes=2 * one)
    for first in (10, 20, 30):
        ask(engine, [[first, 2, 3]])
        assert engine.prefixes.n_bytes <= 2 * one
    assert len(engine.prefixes) == 2
    assert engine.prefixes.find(export.prompter.next_item([10, 2, 3, 4])) is None  # gone
    assert engine.prefixes.find(export.prompter.next_item([30, 2, 3, 4])) is not None


def test_what_is_kept_is_what_a_single_pass_computes(export: Export) -> None:
    """Keys and values of a padded row, without its padding, against the row alone."""
    engine = TorchEngine(export, "cpu")
    prompts = [export.prompter.next_item(h) for h in ([1, 2, 3, 4], [5])]
    engine._prefill(prompts, [None, None])
    found = engine.prefixes.find(export.prompter.next_item([5, 6]))
    assert found is not None
    alone: Prefilled = prefill(engine.model, *engine._embed(prompts[1:]))
    for (keys, values), (k, v) in zip(found.layers, alone.layers(), strict=True):
        torch.testing.assert_close(keys, k[0], atol=TOLERANCE, rtol=0)
        torch.testing.assert_close(values, v[0], atol=TOLERANCE, rtol=0)


def test_hits_are_in_the_metrics(export: Export) -> None:
    engine, metrics = TorchEngine(export, "cpu"), Metrics()
    metrics.watch_prefixes(engine.prefixes)
    ask(engine, [[4, 9]])
    ask(engine, [[4, 9, 1]])
    text = metrics.render().decode()
    assert 'genrec_prefix_cache_total{result="hit"} 1.0' in text
    assert 'genrec_prefix_cache_total{result="miss"} 1.0' in text
    assert f"genrec_prefix_cache_bytes {float(engine.prefixes.n_bytes)}" in text
