"""VllmEngine with later items: the lists of an export that always held them, and one state for each request."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from genrec.catalog import catalogue_of
from genrec.serving.engine import RankedItem, RecommendRequest, TextRequest
from genrec.serving.export import Export
from genrec.serving.torch_engine import TorchEngine
from genrec.serving.vllm_engine import VllmEngine
from tests.growing_export import Parts, make_parts, picture, write
from tests.test_item_upsert import from_scratch, next_state

pytest.importorskip("vllm", reason="needs the extra cpu or gpu")
pytestmark = pytest.mark.vllm
TOLERANCE = 1e-3  # float32 on both sides, another order of sums


@pytest.fixture(scope="module")
def parts(tmp_path_factory) -> Parts:
    return make_parts(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="module")
def export(parts, tmp_path_factory) -> Export:
    return Export.load(write(parts, tmp_path_factory.mktemp("base")))


@pytest.fixture(scope="module")
def engine(export) -> Iterator[VllmEngine]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", os.environ.get("OMP_NUM_THREADS", "1"))
        made = VllmEngine(export, dtype="float32", speculative=False)
        yield made
        made.close()


def alike(found: list[RankedItem], wanted: list[RankedItem]) -> bool:
    scores = {item.item_id: item.score for item in wanted}
    return scores.keys() == {item.item_id for item in found} and all(
        abs(item.score - scores[item.item_id]) < TOLERANCE for item in found
    )


def test_lists_and_texts_are_those_of_an_export_that_always_held_them(engine, parts, export, tmp_path: Path) -> None:
    file = tmp_path / "new.png"
    file.write_bytes(picture(99))
    rows: dict[str, dict[str, Any]] = {
        "new-1": {"title": "green lamp number 5", "categories": ["lamp", "kitchen"], "price": 12.5},
        "item-6": {"title": "black sofa", "price": 3},
        "new-2": {"title": "blue chair"},
    }
    items = catalogue_of(rows, [str(file), None, None], 1000)
    before, after = TorchEngine(export, "cpu"), TorchEngine(from_scratch(parts, export, items, tmp_path), "cpu")
    requests = [
        RecommendRequest(["item-1", "item-6"], k=50),
        RecommendRequest([], k=50),
        RecommendRequest(["item-9"], k=50),
    ]
    states = [engine_.recommend(requests) for engine_ in (before, after)]
    assert not any(alike(*pair) for pair in zip(*states, strict=True))
    swap = engine.prepare(next_state(export, items))
    stop = threading.Event()

    def ask(number: int) -> list[int]:
        seen: list[int] = []
        while not stop.is_set() or not seen:
            (found,) = engine.recommend([requests[number]])
            (state,) = [at for at, of in enumerate(states) if alike(found, of[number])]
            seen.append(state)
        return seen

    with ThreadPoolExecutor(3) as pool:
        asking = [pool.submit(ask, number) for number in range(3)]
        try:
            for answer, wanted in zip(engine.recommend(requests), states[0], strict=True):
                assert alike(answer, wanted)
            swap()
            for answer, wanted in zip(engine.recommend(requests), states[1], strict=True):
                assert alike(answer, wanted)
        finally:
            stop.set()
        assert all(seen == sorted(seen) for seen in (future.result(600) for future in asking))
    filters = [
        RecommendRequest(["new-1", "new-2", "item-6"], k=50),
        RecommendRequest([], allow=["new-1"]),
        RecommendRequest([], categories=["kitchen"]),
        RecommendRequest(["item-1"], k=50, price_max=15),
    ]
    for answer, wanted in zip(engine.recommend(filters), after.recommend(filters), strict=True):
        assert alike(answer, wanted)
        assert wanted
    texts = [TextRequest(item, ["new-2", "item-6"], 12) for item in ("new-1", "item-6", "item-8")]
    assert [text.token_ids for text in engine.generate(texts)] == [text.token_ids for text in after.generate(texts)]
