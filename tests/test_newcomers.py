"""New items inherit from their nearest relatives: against a brute force, through a file, and through a whole run."""

import numpy as np
import pytest
import torch

from genrec.adapters.item_scores import ItemScores
from genrec.adapters.newcomers import SHARPNESS, Newcomers
from genrec.adapters.profile import Profile
from genrec.artefacts import key_at, read_manifest
from genrec.config import resolve_recipe
from genrec.pipeline import Run
from genrec.ranking import rank_cases
from genrec.serving.engine import RecommendRequest
from genrec.serving.export import Export
from genrec.serving.torch_engine import TorchEngine
from tests.conftest import tiny_recipe

N, LIFT = 12, 0.7
KNOWN = torch.arange(N) % 4 != 1  # 1, 5 and 9 are new


def unit(seed: int, width: int) -> torch.Tensor:
    values = torch.randn(N, width, generator=torch.Generator().manual_seed(seed))
    return values / values.norm(dim=1, keepdim=True)


def keys() -> dict[str, torch.Tensor]:
    image = unit(2, 3)
    image[5] = 0  # an item without a picture
    return {"text": unit(1, 5), "image": image}


def test_a_new_item_inherits_from_its_relatives() -> None:
    newcomers = Newcomers.nearest(keys(), KNOWN, 3, LIFT)
    scores = torch.randn(4, N, generator=torch.Generator().manual_seed(3))
    found = newcomers(scores)
    assert torch.equal(found[:, KNOWN], scores[:, KNOWN])
    known = [j for j in range(N) if KNOWN[j]]
    for i in (1, 5, 9):
        cosine = {j: sum(float(of[i] @ of[j]) for of in keys().values()) / 2 for j in known}
        nearest = sorted(known, key=lambda j: -cosine[j])[:3]
        weights = np.exp([SHARPNESS * cosine[j] for j in nearest])
        for row in range(4):
            mass = sum(w * np.exp(float(scores[row, j])) for w, j in zip(weights / weights.sum(), nearest, strict=True))
            assert float(found[row, i]) == pytest.approx(LIFT + np.log(mass), abs=1e-5)


def test_more_relatives_than_known_items_are_all_of_them() -> None:
    assert Newcomers.nearest(keys(), KNOWN, 99, 0.0).relatives.shape == (3, 9)


def test_they_survive_the_file(tmp_path) -> None:
    scores = ItemScores(Profile(keys()), None, None)
    histories = [np.array([0, 3]), np.array([5])]
    plain = scores(histories)
    scores.newcomers = Newcomers.nearest(keys(), KNOWN, 3, LIFT)
    scores.save(tmp_path / "scores.safetensors")
    found = ItemScores.load(tmp_path / "scores.safetensors")(histories)
    torch.testing.assert_close(found, scores(histories))
    assert not torch.equal(found[:, ~KNOWN], plain[:, ~KNOWN])
    assert torch.equal(found[:, KNOWN], plain[:, KNOWN])


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A tiny generator that has never seen a fifth of the items."""
    recipe = resolve_recipe(tiny_recipe(data={"split": "cold_items", "cold_share": 0.2}))
    run = Run.create(recipe, tmp_path_factory.mktemp("newcomers"))
    run.through_training()
    return run


def with_lift(run: Run, lift: float) -> Run:
    settings = run.recipe.new_items.model_copy(update={"relatives": 3, "lift": lift})
    return Run(run.folder, run.recipe.model_copy(update={"new_items": settings}), run.folder)


def test_a_lift_shows_more_new_items(trained) -> None:
    cold = trained.space.split.cold
    assert cold.any()
    shares = {}
    for lift in (-40.0, 0.0, 3.0):
        space = with_lift(trained, lift).space
        n_items = len(cold)
        top = rank_cases(
            space.tuned_backbone(), space.prompter, space.split.test,
            available=space.catalogue.available, exclude_seen=True, beams=n_items, k=n_items,
        )  # fmt: skip
        shares[lift] = (cold[top] & (top >= 0))[:, :10].mean()
    assert shares[-40.0] == 0 < shares[0.0] < shares[3.0]


def test_training_is_the_same_with_them_and_without(trained) -> None:
    before = read_manifest(trained.folder / "lora")["seconds"], key_at(trained.folder / "lora")
    with_lift(trained, 1.0).train()
    assert (read_manifest(trained.folder / "lora")["seconds"], key_at(trained.folder / "lora")) == before


def test_the_export_serves_them(trained) -> None:
    changed = with_lift(trained, 2.0)
    space = changed.space
    engine = TorchEngine(Export.load(changed.export()), "cpu")
    ids = np.array(space.catalogue.item_ids)
    beams = changed.recipe.evaluate.beams
    asked = [RecommendRequest([*ids[h]], k=beams, beams=beams) for h in space.split.test.histories[:20]]
    for row, items in zip(changed.rank_test()[:20], engine.recommend(asked), strict=True):
        assert [item.item_id for item in items] == [ids[i] for i in row[:beams] if i >= 0]
