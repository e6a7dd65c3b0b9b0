"""New items inherit from their nearest relatives: against a brute force, through a file, and through a whole run."""

import numpy as np
import pytest
import torch

from genrec.adapters.newcomers import SHARPNESS, Newcomers
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
FAME = torch.linspace(-1, 1, N)


def unit(seed: int, width: int) -> torch.Tensor:
    values = torch.randn(N, width, generator=torch.Generator().manual_seed(seed))
    return values / values.norm(dim=1, keepdim=True)


KEYS = unit(1, 5)


def test_new_items_inherit_and_take_their_places() -> None:
    """Relatives that were found have their final score, the others what the item scores say, at most the last's."""
    newcomers = Newcomers.nearest(KEYS, FAME, KNOWN, 3, LIFT)
    generator = torch.Generator().manual_seed(3)
    likely = torch.randn(4, N, generator=generator)
    allowed = torch.ones(4, N, dtype=torch.bool)
    allowed[2, 5] = False
    known = [j for j in range(N) if KNOWN[j]]
    items = torch.tensor([known[:6], known[2:8], known[3:9], [*known[:2], -1, -1, -1, -1]])
    scores = torch.randn(4, 6, generator=generator).sort(1, descending=True).values - 2
    scores[items < 0] = -torch.inf
    found, values = newcomers.join(items, scores, likely, allowed, 9)
    for row in range(4):
        final = dict(zip(items[row].tolist(), scores[row].tolist(), strict=True))
        final.pop(-1, None)
        total, last = np.logaddexp.reduce(likely[row, KNOWN].numpy()), min(final.values())
        share = {j: float(likely[row, j]) - total for j in known}
        searched = {j: min(of, last) if allowed[row, j] else of for j, of in share.items()}
        of = {j: final.get(j, searched[j]) for j in known}
        expected = dict(final)
        for i in (1, 5, 9):
            cosine = {j: float(KEYS[i] @ KEYS[j]) for j in known}
            nearest = sorted(known, key=lambda j: -cosine[j])[:3]
            weights = np.exp([SHARPNESS * cosine[j] for j in nearest])
            mass = sum(w * np.exp(of[j]) for w, j in zip(weights / weights.sum(), nearest, strict=True))
            if allowed[row, i]:
                expected[i] = LIFT + float(FAME[i]) + np.log(mass)
        order = sorted(expected, key=lambda i: -expected[i])
        listed = found[row] >= 0
        assert found[row, listed].tolist() == order
        np.testing.assert_allclose(values[row, listed], [expected[i] for i in order], atol=1e-5)
        assert torch.isinf(values[row, ~listed]).all()


def test_without_item_scores_relatives_that_were_not_found_share_alike() -> None:
    newcomers = Newcomers.nearest(KEYS, FAME, KNOWN, 3, LIFT)
    nothing = torch.full((1, 1), -1), torch.full((1, 1), -torch.inf)
    found, values = newcomers.join(*nothing, None, ~KNOWN[None], 5)
    assert sorted(found[0].tolist()) == [-1, 1, 5, 9]
    np.testing.assert_allclose(values[0, :3], LIFT - np.log(9) + FAME[found[0, :3]], atol=1e-6)


def test_a_temper_flattens_what_they_inherit_and_takes_nothing() -> None:
    newcomers = Newcomers.nearest(KEYS, FAME, KNOWN, 3, LIFT)
    shares = (
        torch.randn(2, N, generator=torch.Generator().manual_seed(4)).masked_fill(~KNOWN, -torch.inf).log_softmax(1)
    )
    nothing = torch.full((2, 1), -1), torch.full((2, 1), -torch.inf)
    allowed = ~KNOWN.expand(2, N)  # nobody searched for known ones
    flat = (shares.exp() ** 0.4).where(KNOWN, torch.zeros(()))
    flat = flat / flat.sum(1, keepdim=True)
    for temper, of in ((1.0, shares.exp()), (0.4, flat)):
        expected = (of[:, newcomers.relatives] * newcomers.weights).sum(2).log()
        torch.testing.assert_close(newcomers.inherited(*nothing, shares, allowed, temper), expected)


def test_more_relatives_than_known_items_are_all_of_them() -> None:
    assert Newcomers.nearest(KEYS, FAME, KNOWN, 99, 0.0).relatives.shape == (3, 9)


def test_they_survive_the_file(tmp_path) -> None:
    newcomers = Newcomers.nearest(KEYS, FAME, KNOWN, 3, LIFT)
    newcomers.save(tmp_path / "newcomers.safetensors")
    found = Newcomers.load(tmp_path / "newcomers.safetensors")
    asked = torch.tensor([[0, 2]]), torch.tensor([[-0.5, -1.0]]), torch.zeros(1, N), torch.ones(1, N, dtype=torch.bool)
    for ours, theirs in zip(found.join(*asked, 8), newcomers.join(*asked, 8), strict=True):
        assert torch.equal(ours, theirs)


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


def test_a_lift_shows_more_new_items_and_orders_known_ones_alike(trained) -> None:
    cold = trained.space.split.cold
    assert cold.any()
    n_items = len(cold)
    orders, shares = {}, {}
    for lift in (-40.0, 0.0, 3.0):
        space = with_lift(trained, lift).space
        top = rank_cases(
            space.tuned_backbone(), space.prompter, space.split.test, available=space.catalogue.available,
            exclude_seen=True, beams=n_items, k=n_items, newcomers=space.newcomers,
        )  # fmt: skip
        shares[lift] = (cold[top] & (top >= 0))[:, :10].mean()
        orders[lift] = [[int(i) for i in row if i >= 0 and not cold[i]] for row in top]
    assert shares[-40.0] == 0 < shares[0.0] < shares[3.0]
    assert orders[-40.0] == orders[0.0] == orders[3.0]


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
    asked = [
        RecommendRequest([*ids[h]], k=beams, beams=beams, deny=frozenset(had.tolist()))
        for h, had in zip(space.split.test.histories[:20], space.split.test.seen, strict=False)
    ]
    for row, items in zip(np.load(changed.rank_test() / "top.npy")[:20], engine.recommend(asked), strict=True):
        expected = [ids[i] for i in row[:beams] if i >= 0]
        scores = {item.item_id: item.score for item in items}  # items with the same relatives tie, in either order
        assert sorted(scores) == sorted(expected)
        assert [scores[item] for item in expected] == pytest.approx([item.score for item in items], abs=1e-5)
