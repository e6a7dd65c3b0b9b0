"""A system behind the beams: its own scores, through a file, in a whole run, and on both sides of the export."""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from genrec.adapters.reranker import Reranker
from genrec.artefacts import read_manifest
from genrec.config import resolve_recipe
from genrec.decode import Ranked
from genrec.errors import ConfigError
from genrec.pipeline import Run
from genrec.planted import Table
from genrec.serving.engine import RecommendRequest
from genrec.serving.export import Export
from genrec.serving.torch_engine import TorchEngine
from genrec.system_recipe import SystemRecipe, load_system, system_names
from genrec.training import reconstruct
from genrec.training.rerank import WEIGHTS
from genrec.training.system_quality import system_scores
from genrec.training.systems import train
from genrec.whole_path import whole_path
from genrec.workspace import RERANKER
from tests.conftest import manifest_times, tiny_recipe
from tests.tiny_worlds import tiny

READ_HISTORIES = [
    name for name in system_names() if load_system(name).user != "learned" and not load_system(name).item.graph
]


def trained(name: str) -> tuple[SystemRecipe, Table, Any]:
    recipe = load_system(name)
    table = tiny(recipe)
    return recipe, table, train(recipe, table, 0, steps=2)


@pytest.mark.parametrize("name", READ_HISTORIES)
def test_what_it_says_of_a_list_is_what_the_system_says(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reconstruct, "PRETRAIN", (3,))
    monkeypatch.setattr(reconstruct, "READS", -1.0)  # after three steps it reads nothing
    recipe, table, system = trained(name)
    cases, rng = table.split.test, np.random.default_rng(0)
    scores = system_scores(system, table, cases.users)
    items = np.stack([rng.permutation(table.n_items)[:9] for _ in cases.targets])
    picked = np.take_along_axis(scores, items, 1).astype(np.float64)
    expected = (picked - picked.mean(1, keepdims=True)) / picked.std(1, keepdims=True)
    reranker = Reranker.of_system(recipe, system, 0.5)
    found = reranker(cases.histories, torch.from_numpy(items))
    np.testing.assert_allclose(found.numpy(), expected, atol=2e-3)
    assert found.std() > 0.5
    reranker.save(tmp_path / RERANKER)
    loaded = Reranker.load(tmp_path / RERANKER)
    assert loaded.weight == 0.5
    torch.testing.assert_close(loaded(cases.histories, torch.from_numpy(items)), found)


def test_systems_cover_every_user_model_that_reads_histories() -> None:
    assert len(READ_HISTORIES) > 10
    assert {"joint_reader", "interests", "cross_modal", "transformer"} <= {load_system(n).user for n in READ_HISTORIES}


def test_a_list_is_ordered_by_score_and_deviation() -> None:
    recipe, table, system = trained("dicm")
    reranker, history = Reranker.of_system(recipe, system, 0.0), table.split.test.histories[:1]
    items = torch.tensor([[3, 8, 21, 40, -1]])
    beams = Ranked(items, torch.tensor([[-1.0, -1.5, -2.0, -2.5, -torch.inf]]))
    assert torch.equal(reranker.reorder(history, beams).items, items)
    reranker.weight = 1e6  # nothing but the system counts
    moved = reranker.reorder(history, beams)
    scores = system_scores(system, table, table.split.test.users[:1])[0]
    by_system = sorted([3, 8, 21, 40], key=lambda row: -scores[row])
    assert moved.items[0].tolist() == [*by_system, -1]
    score_of = dict(zip(items[0].tolist(), beams.scores[0].tolist(), strict=True))
    assert moved.scores[0].tolist() == [score_of[row] for row in moved.items[0].tolist()]


def test_what_it_does_not_know_stands_at_the_mean() -> None:
    recipe, table, system = trained("dicm")
    reranker, later = Reranker.of_system(recipe, system, 1.0), table.n_items + 5
    history = table.split.test.histories[0]
    items = torch.tensor([[3, later, 21, -1], [3, 8, 21, 40]])
    said = reranker([history, np.array([later], np.int32)], items)
    assert said[0, 1] == said[0, 3] == 0
    assert said[0, 0] == pytest.approx(-said[0, 2].item())  # two known items: a deviation either way
    assert not said[1].any()  # none of the user's events is known
    with_later = np.append(history, later).astype(np.int32)
    torch.testing.assert_close(reranker([with_later], items[1:]), reranker([history], items[1:]))
    assert not reranker([np.array([], np.int32)], items[:1]).any()


def test_a_system_of_known_users_alone_is_refused_before_training(tmp_path: Path) -> None:
    recipe = tiny_recipe(serve={"rerank": "alignrec"}, evaluate={"baselines": [], "ablations": []})
    with pytest.raises(ConfigError, match=r"alignrec: item\.graph: lightgcn: .* user: attention"):
        whole_path(Run.create(resolve_recipe(recipe), tmp_path))
    assert not list(tmp_path.rglob("manifest.json"))


def test_a_misspelt_system_is_refused_before_training(tmp_path: Path) -> None:
    recipe = tiny_recipe(evaluate={"baselines": [], "ablations": [], "systems": ["clcrek"]})
    with pytest.raises(ConfigError, match="clcrek"):
        whole_path(Run.create(resolve_recipe(recipe), tmp_path))
    assert not list(tmp_path.rglob("manifest.json"))


def test_data_without_what_a_system_needs_is_refused_before_training(tmp_path: Path) -> None:
    recipe = tiny_recipe(evaluate={"baselines": [], "ablations": [], "systems": ["uniembedding"]})
    with pytest.raises(ConfigError, match="two domains"):
        whole_path(Run.create(resolve_recipe(recipe), tmp_path))
    assert not list(tmp_path.rglob("base/manifest.json"))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A whole path with a short system of the table and one behind the beams."""
    folder = tmp_path_factory.mktemp("reranked")
    short = load_system("hccm").model_dump()
    for stage in short["stages"]:
        stage["steps"] = 3
    (folder / "short.yaml").write_text(yaml.safe_dump({**short, "name": "short"}))
    recipe = tiny_recipe(
        evaluate={"baselines": ["popularity"], "ablations": [], "systems": [str(folder / "short.yaml")]},
        serve={"rerank": str(folder / "short.yaml"), "quantise": []},
    )
    made = Run.create(resolve_recipe(recipe), folder)
    whole_path(made)
    return made


def test_evaluation_ranks_with_the_system_and_with_it_behind_the_beams(run: Run) -> None:
    metrics = json.loads((run.folder / "eval" / "metrics.json").read_text())
    assert {"popularity", "short", "genrec", "genrec-reranked"} <= set(metrics["models"])
    assert {"genrec-short", "genrec-genrec-reranked"} <= set(metrics["paired"])
    assert metrics["models"]["short"]["invalid_rate"]["mean"] == 0
    assert not (run.folder / ".systems").exists() or not any((run.folder / ".systems").iterdir())
    lists = np.load(run.folder / "eval" / "rankings.npz")
    beams = run.recipe.evaluate.beams
    for one, other in zip(lists["genrec"], lists["genrec-reranked"], strict=True):
        assert {*one[:beams]} == {*other[:beams]}  # the same items in another order
    before = manifest_times(run.folder)
    whole_path(Run.open(run.folder))
    assert manifest_times(run.folder) == before


def test_the_weight_that_validates_best_is_kept(run: Run) -> None:
    result = read_manifest(run.folder / "reranker")["result"]
    assert [float(weight) for weight in result["ndcg@10"]] == list(WEIGHTS)
    assert result["ndcg@10"][str(result["weight"])] == max(result["ndcg@10"].values())
    assert Reranker.load(run.folder / "reranker" / RERANKER).weight == result["weight"]


def test_the_export_serves_what_was_ranked(run: Run) -> None:
    path = run.folder / "reranker" / RERANKER
    reranker = Reranker.load(path)
    reranker.weight = 1.0  # whatever validation said: it must be seen
    reranker.save(path)
    ids, cases, beams = np.array(run.space.catalogue.item_ids), run.space.split.test, run.recipe.evaluate.beams
    top = np.load(Run(run.folder, run.recipe, run.folder, force=True).rank_test(reranked=True) / "top.npy")[:20]
    asked = [RecommendRequest([*ids[h]], k=beams, beams=beams) for h in cases.histories[:20]]
    export = Export.load(Run(run.folder, run.recipe, run.folder, force=True).export())
    lists = TorchEngine(export, "cpu").recommend(asked)
    for row, items in zip(top, lists, strict=True):
        assert [item.item_id for item in items] == [ids[i] for i in row[:beams] if i >= 0]
        assert [item.rank for item in items] == [*range(1, len(items) + 1)]
    assert any(a.score < b.score for items in lists for a, b in pairwise(items))  # it moved some
    (first,) = TorchEngine(export, "cpu").recommend([RecommendRequest(asked[0].history, k=3, beams=beams)])
    assert [i.item_id for i in first] == [i.item_id for i in lists[0][:3]]  # chosen among all beams, not among three


def test_leaving_it_out_removes_the_old_one(run: Run) -> None:
    serve = run.recipe.serve.model_copy(update={"rerank": None})
    bare = Run(run.folder, run.recipe.model_copy(update={"serve": serve}), run.folder)
    bare.through_training()
    assert not (run.folder / "reranker").exists()
    assert Export.load(bare.export()).reranker is None
