"""The sequence part: SASRec's own logits, through a file, and through a whole run."""

import numpy as np
import pytest
import torch

from genrec.adapters.item_scores import ItemScores
from genrec.adapters.profile import Profile
from genrec.adapters.sequence import HEADS, SequenceScores
from genrec.artefacts import read_manifest
from genrec.config import resolve_recipe
from genrec.errors import ConfigError
from genrec.pipeline import Run
from genrec.sasrec import SASRec
from genrec.serving.engine import RecommendRequest
from genrec.serving.export import Export
from genrec.serving.torch_engine import TorchEngine
from genrec.training.sequence import WEIGHTS
from genrec.variants import VARIANTS
from genrec.workspace import SEQUENCE
from tests.conftest import manifest_times, tiny_recipe

N, LONGEST = 20, 6
HISTORIES = [np.array(history, np.int32) for history in ([], [5], [0, 5, 7], [7, 3, 3, 19, 8, 1, 2, 4, 11])]


@pytest.fixture(params=[False, True], ids=["ids", "features"])
def ranker(request) -> SASRec:
    features = torch.randn(N, 5, generator=torch.Generator().manual_seed(0)) if request.param else None
    model = SASRec(epochs=2, width=16, heads=HEADS, max_history=LONGEST, features=features)
    rng = np.random.default_rng(0)
    model.fit([rng.integers(0, N, 8).astype(np.int32) for _ in range(20)], N)
    return model


def test_scores_are_the_rankers_times_the_weight(ranker: SASRec) -> None:
    part = SequenceScores(ranker.network, 0.5)
    np.testing.assert_allclose(part(HISTORIES).numpy(), 0.5 * ranker.scores(HISTORIES), atol=1e-6)
    assert part(HISTORIES)[1:].abs().sum() > 1
    assert not SequenceScores(ranker.network, 0.0)(HISTORIES).any()


def test_item_scores_keep_it_through_a_file_and_out_of_training(ranker: SASRec, tmp_path) -> None:
    keys = {"text": torch.nn.functional.normalize(torch.randn(N, 4, generator=torch.Generator().manual_seed(1)), dim=1)}
    scores = ItemScores(Profile(keys), None, None)
    alone = scores(HISTORIES).detach()
    items, first = torch.from_numpy(HISTORIES[3]).long(), torch.zeros(len(HISTORIES[3]), dtype=torch.int64)
    before = scores.of_events(items, first).detach()
    scores.sequence = SequenceScores(ranker.network, 1.0)
    together = scores(HISTORIES).detach()
    np.testing.assert_allclose((together - alone).numpy(), ranker.scores(HISTORIES), atol=1e-5)
    assert torch.equal(scores.of_events(items, first).detach(), before)
    scores.save(tmp_path / "scores.safetensors")
    loaded = ItemScores.load(tmp_path / "scores.safetensors")
    np.testing.assert_allclose(loaded(HISTORIES).numpy(), together.numpy(), atol=1e-6)
    loaded.sequence = None
    np.testing.assert_allclose(loaded(HISTORIES).numpy(), alone.numpy(), atol=1e-6)


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Run:
    recipe = tiny_recipe(sequence={"epochs": 2, "width": 16}, evaluate={"baselines": [], "ablations": []})
    run = Run.create(resolve_recipe(recipe), tmp_path_factory.mktemp("sequence"))
    run.through_training()
    return run


def test_the_weight_that_validates_best_is_kept(trained: Run) -> None:
    result = read_manifest(trained.folder / "sequence")["result"]
    assert [float(weight) for weight in result["ndcg@10"]] == list(WEIGHTS)
    assert result["ndcg@10"][str(result["weight"])] == max(result["ndcg@10"].values())
    assert SequenceScores.load(trained.folder / "sequence" / SEQUENCE).weight == result["weight"]
    before = manifest_times(trained.folder)
    Run.open(trained.folder).train()
    assert manifest_times(trained.folder) == before


def test_the_export_serves_what_was_ranked(trained: Run) -> None:
    path = trained.folder / "sequence" / SEQUENCE
    part = SequenceScores.load(path)
    part.weight.fill_(2.0)  # whatever validation said: it must be seen
    part.save(path)
    ids, cases = np.array(trained.space.catalogue.item_ids), trained.space.split.test
    top = np.load(trained.rank_test() / "top.npy")[:20]
    beams = trained.recipe.evaluate.beams
    asked = [RecommendRequest([*ids[h]], k=beams, beams=beams) for h in cases.histories[:20]]
    export = Export.load(trained.export())
    lists = TorchEngine(export, "cpu").recommend(asked)
    for row, items in zip(top, lists, strict=True):
        assert [item.item_id for item in items] == [ids[i] for i in row[:beams] if i >= 0]
    assert export.item_scores is not None
    export.item_scores.sequence = None
    others = TorchEngine(export, "cpu").recommend(asked)
    assert [[i.item_id for i in of] for of in others] != [[i.item_id for i in of] for of in lists]


def test_without_item_scores_it_has_nothing_to_join(trained: Run) -> None:
    bare = trained.recipe.model_copy(update={"backbone": trained.recipe.backbone.model_copy(update={"profile": 0})})
    run = Run(trained.folder / "bare", bare, trained.folder)
    with pytest.raises(ConfigError, match=r"backbone\.profile"):
        run.train()


def test_leaving_it_out_removes_the_old_one(trained: Run) -> None:
    Run(trained.folder, VARIANTS["genrec-no-sequence"](trained.recipe), trained.folder).sequence()
    assert not (trained.folder / "sequence").exists()
