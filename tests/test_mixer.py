"""The mixer: features against plain loops, lists before and after it learned, through a file and a whole run."""

import numpy as np
import pytest
import torch

from genrec.adapters.item_scores import Likely
from genrec.adapters.mixer import COSINES, DECAY, LEAST, NUMBERS, Mixer, whole_lists
from genrec.adapters.newcomers import Newcomers
from genrec.artefacts import read_manifest
from genrec.config import resolve_recipe
from genrec.decode import Ranked
from genrec.errors import ConfigError
from genrec.pipeline import Run
from genrec.serving.engine import RecommendRequest
from genrec.serving.export import Export
from genrec.serving.torch_engine import TorchEngine
from genrec.training import mix
from genrec.training.mix import _fitted
from genrec.variants import VARIANTS
from tests.conftest import tiny_recipe

N = 12
KNOWN = torch.arange(N) % 4 != 1  # 1, 5 and 9 are new
POPULARITY = torch.where(KNOWN, torch.arange(N) + 3, 0)
HISTORIES = [[0, 2, 3], [4], [], [7, 7, 6, 2]]


def unit(seed: int, width: int) -> torch.Tensor:
    values = torch.randn(N, width, generator=torch.Generator().manual_seed(seed))
    return values / values.norm(dim=1, keepdim=True)


KEYS = {"text": unit(1, 5), "image": unit(2, 3).index_fill(0, torch.tensor([6]), 0)}


PARTS = ("profile", "neighbours")


def found() -> tuple[Ranked, Likely, torch.Tensor]:
    """Lists of known items, item scores, what is allowed."""
    generator = torch.Generator().manual_seed(3)
    known = KNOWN.nonzero()[:, 0]
    items = torch.stack([known[torch.randperm(len(known), generator=generator)][:5] for _ in HISTORIES])
    scores = torch.randn(4, 5, generator=generator).sort(1, descending=True).values - 2
    items[1, 3:], scores[1, 3:] = -1, -torch.inf
    allowed = torch.ones(4, N, dtype=torch.bool)
    allowed[2, 5] = False
    parts = {name: torch.randn(4, N, generator=generator) for name in PARTS}
    return Ranked(items, scores), Likely(sum(parts.values(), torch.zeros(4, N)), parts), allowed


def newcomers(lift: float = 0.0) -> Newcomers:
    return Newcomers.nearest(KEYS["text"], torch.linspace(-1, 1, N), KNOWN, 3, lift)


def test_features_say_what_they_should() -> None:
    ranked, likely, allowed = found()
    mixer = Mixer(PARTS, KEYS, POPULARITY)
    items, scores = mixer.candidates(ranked, likely, allowed, newcomers())
    assert items.shape == (4, 8)  # five found, three new
    assert sorted(items[0, 5:].tolist()) == [1, 5, 9]
    assert sorted(items[2, 5:].tolist()) == [-1, 1, 9]
    joined, values = newcomers().join(ranked.items, ranked.scores, likely.total, allowed, 8)
    for row in range(4):  # new ones have what they have without a mixer
        wanted = dict(zip(joined[row].tolist(), values[row].tolist(), strict=True))
        for item, score in zip(items[row].tolist(), scores[row].tolist(), strict=True):
            assert item < 0 or score == pytest.approx(wanted[item], abs=1e-5)
    features = mixer.features(HISTORIES, items, scores, likely)
    assert features.shape == (4, 8, NUMBERS + 2 + 2 * COSINES)
    for row, history in enumerate(HISTORIES):
        for place, item in enumerate(items[row].tolist()):
            if item < 0:
                continue
            new = not KNOWN[item]
            weights = np.array([DECAY**age for age in range(len(history))][::-1])
            expected = [
                max(float(scores[row, place]), LEAST),
                item in history,
                new,
                np.log1p(float(POPULARITY[item])),
                max(float(scores[row].sort(descending=True).values[-1]), LEAST),  # of eight
                np.log1p(len(history)),
                float(likely.parts["profile"][row, item]),
                0.0 if new else float(likely.parts["neighbours"][row, item]),
            ]
            for keys in (KEYS["image"], KEYS["text"]):
                cosines = np.array([float(keys[item] @ keys[h]) for h in history])
                expected += [(weights @ cosines) / weights.sum(), cosines.max(), cosines[-1]] if history else [0, 0, 0]
            np.testing.assert_allclose(features[row, place], expected, atol=1e-5)


def test_it_changes_no_order_before_it_learned() -> None:
    ranked, likely, allowed = found()
    mixer = Mixer(PARTS, KEYS, POPULARITY).eval()
    for joining in (None, newcomers(), newcomers(1.5)):
        plain = whole_lists(HISTORIES, ranked, likely, allowed, joining, None, 7)
        mixed = whole_lists(HISTORIES, ranked, likely, allowed, joining, mixer, 7)
        for row in range(4):
            score = dict(zip(plain.items[row].tolist(), plain.scores[row].tolist(), strict=True))
            values = [score.pop(item) for item in mixed.items[row].tolist() if item >= 0]
            assert not score.keys() - {-1}  # all of them
            assert np.diff(values).max() < 1e-5  # never up
        assert torch.equal(mixed.items < 0, mixed.scores == -torch.inf)
        if joining is None:
            torch.testing.assert_close(mixed.scores.exp().sum(1), torch.ones(4))


def test_one_of_new_items_leaves_known_ones_alone() -> None:
    """Its lists order known items by their scores, whatever it has learned, and new ones among them by what it says."""
    ranked, likely, allowed = found()
    torch.manual_seed(3)
    mixer = Mixer(PARTS, KEYS, POPULARITY, only_new=True).eval()
    torch.nn.init.normal_(mixer.plain.weight)
    torch.nn.init.normal_(mixer.plain.bias)
    torch.nn.init.constant_(mixer.trust, -0.7)
    items, scores = mixer.candidates(ranked, likely, allowed, newcomers())
    logits = mixer(mixer.features(HISTORIES, items, scores, likely))
    known = (items >= 0) & KNOWN[items]
    torch.testing.assert_close(logits[known], scores[known] * np.exp(-0.7))
    of_all = Mixer(PARTS, KEYS, POPULARITY)
    of_all.load_state_dict(mixer.state_dict() | {"only_new": torch.tensor(False)})
    new = (items >= 0) & ~KNOWN[items]
    torch.testing.assert_close(logits[new], of_all(mixer.features(HISTORIES, items, scores, likely))[new])
    lists = mixer.order(HISTORIES, ranked, likely, allowed, newcomers(), 8).items
    for row in range(4):
        wanted = [i for i in ranked.items[row].tolist() if i >= 0]
        assert [i for i in lists[row].tolist() if i >= 0 and KNOWN[i]] == wanted


def planted(n: int, seed: int, noise: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Lists whose target has the largest mean cosine of one modality, whatever the scores say; their last two items are
    new."""
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(n, 8, NUMBERS + COSINES, generator=generator)
    features[:, :, 2] = (torch.arange(8) >= 6).float()
    told = features[:, :, NUMBERS] + noise * torch.randn(n, 8, generator=generator)
    return features, told.argmax(1)


def hits(mixer: Mixer, features: torch.Tensor, targets: torch.Tensor) -> float:
    return float((mixer.eval()(features).argmax(1) == targets).float().mean())


def test_it_learns_what_is_there() -> None:
    torch.manual_seed(0)
    mixer = Mixer((), {"text": KEYS["text"]}, POPULARITY)
    fresh, targets = planted(2000, 3, 0.3)
    assert hits(mixer, fresh, targets) < 0.2  # by scores, which say nothing: one of eight
    assert hits(_fitted(mixer, *planted(600, 1, 0.3)), fresh, targets) > 0.7


@pytest.mark.parametrize(("noise", "learns"), [(0.3, True), (1e6, False)])
def test_lists_stay_plain_where_there_is_nothing_to_learn(trained, monkeypatch, tmp_path, noise, learns) -> None:
    """Targets are as likely as the scores say, or the best by a cosine; here alone a mixer is better than none."""
    features, targets = planted(400, 4, noise)
    if not learns:
        targets = features[:, :, 0].softmax(1).multinomial(1, generator=torch.Generator().manual_seed(6))[:, 0]
    space = trained.space
    scores = space.tuned_backbone().item_scores
    assert scores is not None
    width = NUMBERS + len(scores.names) + COSINES * len(space.mixed_keys)
    features = torch.nn.functional.pad(features, (0, width - features.shape[2]))
    new = targets >= 6
    monkeypatch.setattr(mix, "_lists", lambda *_: (features, targets, np.arange(400) % len(space.mixes), new))
    result = mix.fit_mixer(space, tmp_path)
    mixer = Mixer.load(tmp_path / "mixer.safetensors", space.mixed_keys, torch.from_numpy(space.popularity))
    assert (result["all"]["gain"] > 3 * result["all"]["error"]) == learns
    assert result["all"]["lists"] == int((~new).sum())
    assert result["orders"] == ("all" if learns else None)
    plain_order = bool((mixer(features).argmax(1) == features[:, :, 0].argmax(1)).all())
    assert plain_order != learns


def test_known_items_are_judged_among_themselves() -> None:
    """Two new ones stand first, then three known ones, the target second of those; one place holds nothing."""
    features = torch.zeros(1, 6, NUMBERS)
    features[0, :, 0] = torch.tensor([5.0, 4.0, 3.0, 2.0, 1.0, -torch.inf])
    features[0, :2, 2] = 1
    ndcg, nats = mix._judged(Mixer((), {}, POPULARITY), features, torch.tensor([3]))
    assert ndcg.item() == pytest.approx(1 / np.log2(3))
    assert nats.item() == pytest.approx(2 - np.log(np.exp([5.0, 4.0, 3.0, 2.0, 1.0]).sum()), abs=1e-5)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A tiny generator that has never seen a fifth of the items, with a mixer."""
    recipe = tiny_recipe(data={"split": "cold_items", "cold_share": 0.2})
    recipe |= {"mix": {"users": 100}, "new_items": {"relatives": 3, "lift": 0.0}}
    run = Run.create(resolve_recipe(recipe), tmp_path_factory.mktemp("mixer"))
    run.through_training()
    return run


def test_a_run_lists_what_its_export_serves(trained: Run) -> None:
    """A strong mixer instead of the learned one, so that it must be seen."""
    mixer = trained.space.mixer
    assert mixer is not None
    with torch.no_grad():
        mixer.plain.weight.copy_(torch.randn(mixer.plain.weight.shape, generator=torch.Generator().manual_seed(5)))
    mixer.save(trained.folder / "mix" / "mixer.safetensors")
    run = Run(trained.folder, trained.recipe, trained.folder, force=True)
    top = np.load(run.rank_test() / "top.npy")[:20]
    beams, ids, cases = run.recipe.evaluate.beams, np.array(run.space.catalogue.item_ids), run.space.split.test
    asked = [
        RecommendRequest([*ids[h]], k=beams, beams=beams, deny=frozenset(had.tolist()))
        for h, had in zip(cases.histories[:20], cases.seen, strict=False)
    ]
    export = Export.load(run.export())
    assert export.mixer is not None
    lists = TorchEngine(export, "cpu").recommend(asked)
    for row, items in zip(top, lists, strict=True):
        assert [item.item_id for item in items] == [ids[i] for i in row[:beams] if i >= 0]
    plain = TorchEngine(Export.load(run.export()).with_items(mixer=None), "cpu").recommend(asked)
    assert [[i.item_id for i in of] for of in plain] != [[i.item_id for i in of] for of in lists]


def test_its_stage_says_what_it_was_worth(trained: Run) -> None:
    result = read_manifest(trained.folder / "mix")["result"]
    assert result["all"]["lists"] > 50
    assert 0 < result["all"]["plain"] <= 1
    if result["orders"] != "all":
        assert result["new"]["lists"] > result["all"]["lists"]
        assert result["new"]["plain"] < 0


def test_known_items_played_new_ones(trained: Run) -> None:
    """Every known target is a new one in one of the pools, and then its popularity says so."""
    space = trained.space
    backbone = space.tuned_backbone()
    assert backbone.item_scores is not None
    plain = Mixer(backbone.item_scores.names, space.mixed_keys, torch.from_numpy(space.popularity))
    features, targets, _, new = mix._lists(
        space, backbone, plain, mix._pools(space, plain), mix._known(space, backbone, space.mixes)
    )
    is_new = features[torch.arange(len(targets)), targets, 2]
    assert torch.equal(is_new.bool(), new)
    assert 0 < new.sum() < len(targets)
    assert (features[..., 3] == 0)[features[..., 2] == 1].all()


def test_without_lists_that_hold_their_target_it_says_so(trained: Run) -> None:
    one = trained.recipe.mix.model_copy(update={"users": 1})
    few = Run(trained.folder, trained.recipe.model_copy(update={"mix": one}), trained.folder)
    with pytest.raises(ConfigError, match=r"mix\.users"):
        few.mix()


def test_leaving_it_out_removes_the_old_one(trained: Run) -> None:
    Run(trained.folder, VARIANTS["genrec-no-mix"](trained.recipe), trained.folder).mix()
    assert not (trained.folder / "mix").exists()
