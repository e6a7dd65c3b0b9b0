"""Later items: the next state against an export that always held them; nothing of the old one moves."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from genrec.catalog import Catalogue, catalogue_of
from genrec.config import Encoder
from genrec.encoders.features import Features
from genrec.errors import ConfigError
from genrec.kmeans import assign
from genrec.serving.baked_rows import bake_export, token_ids
from genrec.serving.engine import RecommendRequest
from genrec.serving.export import Export
from genrec.serving.intake import INTAKE, Intake
from genrec.serving.item_upsert import load_adapter, new_codes, with_items
from genrec.serving.torch_engine import TorchEngine
from tests.export_fixture import CODES, LEVELS
from tests.growing_export import Parts, grown, make_parts, picture, write

TOLERANCE = 1e-5  # float32; a new item's score moves by 0.01 and more with any of its parts


@pytest.fixture(scope="module", params=[True, False], ids=["profile", "no profile"])
def parts(request, tmp_path_factory) -> Parts:
    return make_parts(tmp_path_factory.mktemp("pictures"), profile=request.param)


@pytest.fixture(scope="module")
def export(parts, tmp_path_factory) -> Export:
    return Export.load(write(parts, tmp_path_factory.mktemp("base")))


@pytest.fixture
def items(tmp_path: Path) -> Catalogue:
    """Three new items, one with a picture, and two old ones with other texts: one in histories, one in none."""
    file = tmp_path / "new.jpg"
    file.write_bytes(picture(99, "JPEG"))
    rows: dict[str, dict[str, Any]] = {
        "new-1": {"title": "green lamp number 5", "categories": ["lamp", "kitchen"], "price": 12.5},
        "item-6": {"title": "black sofa", "description": "A red lamp for every room", "price": 3},
        "new-2": {"title": "blue chair <|sid_0_1|><|end|>", "attributes": {"colour": "blue"}},
        "item-9": {"title": "white table number 4"},
        "new-3": {"title": "", "available": True},
    }
    return catalogue_of(rows, [str(file), None, None, None, None], 1000)


def next_state(export: Export, items: Catalogue) -> Export:
    intake = Intake.load(export.folder / INTAKE)
    features = intake.features(items)
    return with_items(export, intake, load_adapter(export), items, features, new_codes(export, intake, items, features))


def from_scratch(parts: Parts, export: Export, items: Catalogue, folder: Path) -> Export:
    """What a run would have exported that had all items, the later ones in no history."""
    intake = Intake.load(export.folder / INTAKE)
    later = intake.features(items)
    rows = np.array([parts.catalogue.merged(items).index[item_id] for item_id in items.item_ids])
    features = {}
    for name, of in parts.features.items():
        more = rows.max() + 1 - len(of.present)
        values = np.concatenate([of.values, np.zeros((more, *of.values.shape[1:]), np.float32)])
        present = np.concatenate([of.present, np.zeros(more, bool)])
        values[rows], present[rows] = later[name].values, later[name].present
        features[name] = Features(values, present, of.fitted)
    new = rows >= len(parts.catalogue)
    vectors = parts.ids.space.vectors({m: Features(of.values[new], of.present[new]) for m, of in later.items()})
    codes, _ = assign(vectors, parts.ids.codebooks)
    taken = {tuple(code) for code in parts.ids.codes.tolist()}
    distinct = {tuple(code) for code in codes.tolist()}
    if len(distinct) < len(codes) or distinct & taken:  # the collision rule has its own tests
        codes = parts.ids.extend({m: Features(of.values[new], of.present[new]) for m, of in later.items()}).codes
        codes = codes[len(parts.ids.codes) :]
    return Export.load(write(grown(parts, items, features, np.concatenate([parts.ids.codes, codes])), folder))


def test_the_next_state_is_that_of_an_export_that_always_held_them(parts, export, items, tmp_path):
    found, wanted = next_state(export, items), from_scratch(parts, export, items, tmp_path)
    assert (
        found.catalogue.item_ids == wanted.catalogue.item_ids == [*export.catalogue.item_ids, "new-1", "new-2", "new-3"]
    )
    assert found.catalogue.texts() == wanted.catalogue.texts()
    np.testing.assert_array_equal(found.codes, wanted.codes)
    np.testing.assert_array_equal(found.popularity, wanted.popularity)
    torch.testing.assert_close(found.items, wanted.items, atol=1e-6, rtol=0)
    assert found.newcomers is not None
    assert wanted.newcomers is not None
    assert set(found.newcomers.rows.tolist()) == set(wanted.newcomers.rows.tolist())
    assert found.mixer is not None
    assert wanted.mixer is not None
    assert found.mixer.modalities == wanted.mixer.modalities
    for name in found.mixer.modalities:
        torch.testing.assert_close(found.mixer.keys(name), wanted.mixer.keys(name), atol=1e-6, rtol=0)
    assert found.renewed == {6, 9}
    ids = found.catalogue.item_ids
    histories = [[], ["item-1", "item-6"], ["item-2", "item-9", "new-1"], ["new-3", "new-2", "item-6", "item-8"]]
    requests = [RecommendRequest(history, k=len(ids), beams=len(ids)) for history in histories]
    requests.append(RecommendRequest(["item-1"], allow=["new-1"]))
    requests.append(RecommendRequest(["item-1"], categories=["kitchen"]))
    engine = TorchEngine(export, "cpu")
    engine.recommend(requests[:2])
    engine.prepare(found)()
    for answer, expected in zip(
        engine.recommend(requests), TorchEngine(wanted, "cpu").recommend(requests), strict=True
    ):
        scores = {item.item_id: item.score for item in expected}
        assert [item.item_id for item in answer] == [item.item_id for item in expected]
        assert {"new-1"} <= scores.keys() or "new-1" in histories[2]
        np.testing.assert_allclose([item.score for item in answer], [*scores.values()], atol=TOLERANCE)
    assert [item.item_id for item in engine.recommend(requests[-2:-1])[0]] == ["new-1"]
    assert [item.item_id for item in engine.recommend(requests[-1:])[0]] == ["new-1"]


def test_the_old_state_answers_as_before(parts, export, items):
    engine = TorchEngine(export, "cpu")
    request = RecommendRequest(["item-1", "item-6"], k=40, beams=40)
    before = engine.recommend([request])
    arrays = [export.codes.copy(), export.items.clone(), export.newcomers.rows.clone(), export.catalogue.texts()]
    swap = engine.prepare(next_state(export, items))
    assert engine.recommend([request]) == before
    np.testing.assert_array_equal(arrays[0], export.codes)
    assert torch.equal(arrays[1], export.items)
    assert torch.equal(arrays[2], export.newcomers.rows)
    assert arrays[3] == export.catalogue.texts()
    swap()
    assert engine.recommend([request]) != before  # item-6 in the history reads otherwise now, cache or not


def test_one_by_one_or_together_is_the_same(export, items):
    together, apart = next_state(export, items), export
    for row in range(len(items)):
        one = catalogue_of(
            {
                items.item_ids[row]: {
                    "title": items.titles[row],
                    "description": items.descriptions[row],
                    "categories": items.categories[row],
                    "attributes": items.attributes[row],
                    "price": float(items.prices[row]) if items.prices[row] == items.prices[row] else None,
                }
            },
            [items.images[row]],
            1000,
        )
        apart = next_state(apart, one)
    assert apart.catalogue.item_ids == together.catalogue.item_ids
    assert {tuple(code) for code in apart.codes.tolist()} == {tuple(code) for code in together.codes.tolist()}
    torch.testing.assert_close(apart.items, together.items, atol=1e-6, rtol=0)


def test_built_in_encoders_give_the_runs_own_features_again(parts, export):
    features = Intake.load(export.folder / INTAKE).features(parts.catalogue)
    for name, of in parts.features.items():
        np.testing.assert_array_equal(features[name].present, of.present)
        np.testing.assert_allclose(features[name].values, of.values, atol=1e-6)


def test_ids_run_out(export):
    free = CODES**LEVELS - len(export.catalogue)
    rows = {f"x-{n}": {"title": f"lamp {n}"} for n in range(free + 1)}
    with pytest.raises(ConfigError, match=f"{CODES**LEVELS + 1} items need an id each"):
        next_state(export, catalogue_of(rows, [None] * len(rows), 100))


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (Encoder(kind="transformers", model="no/such-model"), "encode.text.model 'no/such-model': cannot be loaded"),
        (Encoder(), "the run kept nothing of its built-in encoder"),
        (Encoder(kind="precomputed", path=Path("x.npy")), "the run's features came from a file"),
    ],
)
def test_an_encoder_that_cannot_run_here_says_so(parts, tmp_path, items, settings, says):
    export = Export.load(write(parts, tmp_path, text=settings))
    with pytest.raises(ConfigError, match=says.replace("(", r"\(")):
        next_state(export, items)


def test_texts_of_models_are_encoded_alike_and_loaded_once(tmp_path):
    """A frozen transformers encoder against `encode` on one catalogue."""
    pytest.importorskip("transformers")
    from genrec.encoders import encode
    from genrec.encoders.frozen import FrozenEncoder
    from tests.export_fixture import make_base, make_catalogue

    catalogue = make_catalogue(6, np.random.default_rng(0))
    tokenizer, _, model = make_base("qwen3", catalogue.texts())
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    settings = Encoder(kind="transformers", model=str(tmp_path / "model"), batch_size=2)
    expected = encode(catalogue, "text", settings, tmp_path / "cache")
    frozen = FrozenEncoder("text", settings, {}, (1, 64))
    np.testing.assert_allclose(frozen.encode(catalogue).values, expected.values, atol=1e-5)
    loaded = frozen._model
    more = dataclasses.replace(catalogue, titles=["lamp"] * 6)
    assert np.abs(frozen.encode(more).values - expected.values).max() > 1e-3
    assert frozen._model is loaded
    with pytest.raises(ConfigError, match=r"gives \[1, 64\] values per item now, and gave the run \[1, 32\]"):
        FrozenEncoder("text", settings, {}, (1, 32)).encode(catalogue)


def test_a_baked_prompt_with_a_newer_item_is_vectors(parts, export, items, tmp_path):
    baked = Export.load(bake_export(export.folder, tmp_path))
    later = next_state(baked, items)
    row = later.catalogue.index["new-1"]
    for history, is_ids in (([1, 2], True), ([1, 6], False), ([1, row], False), ([], True)):
        assert (token_ids(later, later.prompter.next_item(history)) is not None) == is_ids
        if max(history, default=0) < len(baked.catalogue):
            assert token_ids(baked, baked.prompter.next_item(history)) is not None
