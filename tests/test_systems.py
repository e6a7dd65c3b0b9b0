"""Every system's recipe trains, stops, goes on and ends in features; what it claims about its structure is so."""

import copy
import dataclasses
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from genrec.adapters.fused import Given, Sizes
from genrec.adapters.fusion import FUSIONS
from genrec.adapters.self_attention import left_pad
from genrec.adapters.user_models import TransformerUser
from genrec.errors import ConfigError
from genrec.planted import Planted, plant
from genrec.proofs import interval, kept_trial, prove
from genrec.system_recipe import FOLDER, SystemRecipe, load_system, system_names
from genrec.training import reconstruct
from genrec.training.pairs import Whose, batches
from genrec.training.reconstruct import Reconstruct
from genrec.training.system_quality import impression_scores, measure_system
from genrec.training.systems import fresh, train, train_stage
from genrec.training.tuning import set_tuning
from genrec.training.views import Views
from tests.tiny_worlds import TINY, tiny


class Words:
    """A tokenizer of single letters."""

    eos_token_id = 0

    def __init__(self, letters: str) -> None:
        self.words = ["<end>", "\n", *letters]

    def __call__(self, text: str, add_special_tokens: bool) -> Any:
        return SimpleNamespace(input_ids=[self.words.index(of) for of in text if of != " "])


@pytest.fixture(autouse=True)
def quick_lm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reconstruct, "PRETRAIN", (3,))
    monkeypatch.setattr(reconstruct, "READS", -1.0)  # after three steps it reads nothing


@pytest.mark.parametrize("name", system_names())
def test_a_recipe_is_short_trains_stops_and_goes_on(name: str, tmp_path: Path, caplog: Any) -> None:
    assert len((FOLDER / f"{name}.yaml").read_text().splitlines()) <= 20
    recipe = load_system(name)
    table = tiny(recipe)
    whole = train(recipe, table, 0, steps=2)
    first = recipe.model_copy(update={"stages": recipe.stages[:1]})
    train(first, table, 0, folder=tmp_path, steps=2)
    with caplog.at_level(logging.INFO, "genrec"):
        resumed = train(recipe, table, 0, folder=tmp_path, steps=2)
    assert "skipped" in caplog.text or not recipe.stages
    views = resumed.items(torch.arange(table.n_items))
    for key, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[key]), f"{key}: resumed is not uninterrupted"
    assert views.content.shape == (table.n_items, recipe.item.width)
    assert torch.isfinite(views.content).all()
    values = measure_system(resumed, table, recipe.prove.metric)
    assert len(values)
    assert ((values >= 0) & (values <= 1)).all()


@pytest.mark.parametrize("name", system_names())
def test_a_proof_s_ablation_and_control_are_other_recipes_and_worlds(name: str) -> None:
    recipe = load_system(name)
    assert recipe.changed(recipe.prove.without) != recipe
    world = recipe.prove.world
    assert Planted.model_validate(world.model_dump() | recipe.prove.control) != world


def test_frozen_parts_stay_bit_identical_and_the_rest_moves() -> None:
    for name in ("llm_adapter", "llm_lora", "prompt_tuning"):
        recipe = load_system(name)
        table = tiny(recipe)
        once = train(recipe.changed({"stages.1": None}), table, 0, steps=2).state_dict()
        twice = train(recipe, table, 0, steps=2)
        after = {k.replace(".block.", ".").replace(".base_layer.", "."): v for k, v in twice.state_dict().items()}
        assert all(torch.equal(once[key], after[key]) for key in once), name
        assert len(after) > len(once)
        small = sum(p.numel() for p in twice.parameters() if p.requires_grad)
        assert small < sum(p.numel() for p in twice.parameters()) / 2


def test_what_ease_leaves_ranks_without_the_language_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = load_system("ease")
    table = tiny(recipe)
    lm, _ = reconstruct.frozen_lm(tuple(sorted(table.texts or [])))
    before = {name: of.clone() for name, of in lm.state_dict().items()}
    system = train(recipe, table, 0, folder=tmp_path, steps=3)
    assert all(torch.equal(before[name], of) for name, of in lm.state_dict().items())
    assert not any("lm" in name or name.startswith("lift") for name in system.state_dict())
    small = sum(of.numel() for of in system.state_dict().values())
    assert small < sum(of.numel() for of in before.values())

    def gone(*_: Any) -> None:
        raise AssertionError("the language model was asked for")

    monkeypatch.setattr(reconstruct, "frozen_lm", gone)
    rank_only = fresh(recipe, dataclasses.replace(table, texts=None), 1)
    rank_only.load_state_dict(torch.load(tmp_path / "stage-1.pt", weights_only=True)["state"])
    assert torch.equal(
        torch.from_numpy(impression_scores(rank_only, table)), torch.from_numpy(impression_scores(system, table))
    )


def test_a_language_model_that_does_not_read_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = tuple(f"a {colour} lamp number {n}" for n in range(9) for colour in ("red", "blue"))
    monkeypatch.setattr(reconstruct, "PRETRAIN", (2, 3))
    monkeypatch.setattr(reconstruct, "READS", 0.1)
    with pytest.raises(ConfigError, match=r"18 texts does not read .* after 3 steps"):
        reconstruct.frozen_lm(texts)


def test_what_own_words_spare_is_the_difference_of_two_costs() -> None:
    """A model that copies its context word by word, and one that does not look at it."""
    texts = [f"{a} {b} {c}" for a in "pqr" for b in "stu" for c in "vwx"]
    tokenizer = Words("pqrstuvwx")

    def copying(ids: torch.Tensor) -> Any:
        there = torch.zeros(*ids.shape, len(tokenizer.words))
        seen = torch.zeros(len(ids), len(tokenizer.words))
        for at in range(ids.shape[1]):  # words that stood before are likely, all others are not
            seen.scatter_(1, ids[:, at : at + 1], 5.0)
            there[:, at] = seen
        return SimpleNamespace(logits=there)

    assert reconstruct.spared(copying, tokenizer, texts) > 1
    blind = reconstruct.spared(lambda ids: SimpleNamespace(logits=torch.zeros(*ids.shape, 11)), tokenizer, texts)
    assert blind == pytest.approx(0)


def test_reconstruction_moves_the_adapter_and_not_the_language_model() -> None:
    recipe = load_system("ease")
    table = tiny(recipe)
    system = fresh(recipe, table, 0)
    (batch,) = batches(table, "items", steps=1, size=8, negatives=0, whose=Whose(), seed=0)
    loss = Reconstruct(system, table)
    loss(Views(system, batch)).backward()
    assert all(p.grad is None for p in loss.lm.parameters())
    (queries,) = (p for name, p in system.fusion.named_parameters() if name == "queries")
    assert queries.grad is not None
    assert queries.grad.abs().sum() > 0


def test_fields_start_from_the_features_and_learn_to_read_the_content() -> None:
    recipe = load_system("ease")
    table = tiny(recipe)
    system, other = fresh(recipe, table, 0), fresh(recipe, table, 0)
    assert other.fusion is not None
    torch.nn.init.normal_(next(other.fusion.parameters()))
    rows = torch.arange(table.n_items)
    before, changed = system.items(rows), other.items(rows)
    assert not torch.allclose(before.content, changed.content)
    assert torch.equal(before.final, changed.final)
    with torch.no_grad():
        system.values_text.add_(torch.randn_like(system.values_text))  # type: ignore[operator, arg-type]
    assert not torch.allclose(system.items(rows).final, before.final)
    trained = train(recipe, table, 0, steps=3)
    assert trained.fields is not None
    assert trained.fields.made.weight.abs().sum() > 0


def test_a_batch_reads_every_item_once() -> None:
    recipe = load_system("dicm")
    table = tiny(recipe)
    system = fresh(recipe, table, 0)
    (batch,) = batches(table, "impressions", steps=1, size=64, negatives=0, whose=Whose(), seed=0)
    named = torch.cat([batch.histories[batch.histories >= 0], batch.items])
    Views(system, batch)
    assert system.reads == len(named.unique())
    assert system.reads < len(named)


def test_what_the_id_tells_is_taken_off_a_modality() -> None:
    torch.manual_seed(0)
    width, n = 8, 2000
    fusion = FUSIONS["difference"](Sizes(width, ("image",), 1, 1))
    ids, own = torch.randn(n, width), torch.randn(n, width)
    told = ids @ torch.randn(width, width) / width**0.5
    nothing = torch.zeros(n, dtype=torch.long)
    read = (told + own)[:, None]

    def fused() -> Any:
        return fusion({"image": read}, {"image": torch.ones(n, dtype=torch.bool)}, Given(nothing, nothing, ids))

    optimiser = torch.optim.Adam(fusion.parameters(), 0.02)
    for _ in range(200):
        parts = fused().parts
        optimiser.zero_grad()
        (parts["guess_image"] - parts["read_image"]).square().mean().backward()
        optimiser.step()
    left = fused().modal["image"].detach()
    before, after, kept = (
        np.mean([abs(np.corrcoef(a[:, d], b[:, d])[0, 1]) for d in range(width)])
        for a, b in ((read[:, 0], told), (left, told), (left, own))
    )
    assert before > 0.5
    assert after < 0.1
    assert kept > 0.9


def test_gmmf_trains_on_differences_too() -> None:
    terms = {"softmax": 1, "mse(guess_image, read_image)": 0.1}
    recipe = load_system("gmmf").changed({"item.fusion": "difference", "item.ids": True, "stages.0.objectives": terms})
    table = tiny(recipe)
    system = train(recipe, table, 0, steps=2)
    rows = torch.arange(table.n_items)
    left, plain = system.items(rows).modal["image"], system.items(rows).parts["read_image"]
    assert not torch.allclose(left, plain)


def test_bm3_draws_no_negative() -> None:
    recipe = load_system("bm3")
    assert all(stage.negatives == 0 for stage in recipe.stages)
    assert all(term.startswith("bootstrap") for stage in recipe.stages for term in stage.objectives)


def test_what_a_category_reader_says_follows_the_category_and_the_ablation_only_adds() -> None:
    recipe = load_system("cscnn")
    table = tiny(recipe)
    values, kinds = torch.randn(2, 4, 24), torch.tensor([0, 1])
    for reader, adds in (("category", False), ("late_category", True)):
        system = fresh(recipe.changed({"item.reader.image": reader}), table, 0)
        read: Any = system.readers["image"]
        assert torch.equal(read(values, kinds), read(values, torch.zeros_like(kinds))), "it starts unsteered"
        torch.nn.init.normal_(read.category.weight)
        moved = read(values, kinds) - read(values, torch.zeros_like(kinds))
        again = read(values + 1.0 * torch.randn_like(values), kinds) - read(values, kinds)
        assert moved[0].abs().max() == 0
        assert moved[1].abs().max() > 1e-3
        assert again.abs().max() > 1e-3
        other = torch.randn(2, 4, 24)
        shift = read(other, kinds)[1] - read(other, torch.zeros_like(kinds))[1]
        assert torch.allclose(shift, moved[1], atol=1e-6) == adds


def test_the_graph_equals_a_dense_product() -> None:
    recipe = load_system("mmgcn").changed({"item.graph": "lightgcn"})
    table = tiny(recipe)
    system = fresh(recipe, table, 0)
    views = system.items(torch.arange(table.n_items))
    users, items = system.spread(views)
    taken = np.zeros((table.n_users, table.n_items))
    for user, history in zip(table.split.train_users, table.split.train, strict=True):
        taken[user, history] = 1
    adjacency = np.block([[np.zeros((40, 40)), taken], [taken.T, np.zeros((60, 60))]])
    degree = np.maximum(adjacency.sum(1), 1) ** -0.5
    step = degree[:, None] * adjacency * degree[None]
    x = torch.cat([system.graph.users.weight, views.final]).detach().numpy()  # type: ignore[union-attr]
    wanted = (x + step @ x + step @ step @ x) / 3
    assert np.allclose(torch.cat([users, items.final]).detach().numpy(), wanted, atol=1e-5)


def test_a_missing_picture_changes_nothing_however_its_row_looks() -> None:
    recipe = load_system("mmsrec")
    table = tiny(recipe)
    gone = ~table.features["image"].present
    assert gone.any()
    other = copy.deepcopy(table)
    other.features["image"].values[gone] = 7.0
    rows = torch.from_numpy(np.flatnonzero(gone))
    one, two = (fresh(recipe, t, 0).items(rows).final for t in (table, other))
    assert torch.equal(one, two)


def test_a_proof_is_kept_and_read_again(tmp_path: Path) -> None:
    recipe = load_system("cb2cf").changed({"stages.0.steps": 2})
    small = recipe.model_copy(
        update={"prove": recipe.prove.model_copy(update={"world": Planted(**TINY, cold_share=0.3)})}
    )
    first = prove(small, 0, tmp_path)
    assert prove(small, 0, tmp_path) == first
    assert kept_trial(small, 0, tmp_path) == first
    assert kept_trial(small, 1, tmp_path) is None
    other = small.changed({"stages.0.steps": 3})
    assert kept_trial(other, 0, tmp_path) is None
    assert prove(other, 0, tmp_path).key != first.key


def test_the_interval_is_student_s() -> None:
    mean, ends = interval([0.1, 0.2, 0.3, 0.2, 0.2])
    assert mean == pytest.approx(0.2)
    assert ends == pytest.approx([0.2 - 2.776 * 0.0316228, 0.2 + 2.776 * 0.0316228], abs=1e-4)


def test_clcrec_finds_new_items_and_does_not_where_content_says_nothing() -> None:
    trial = prove(load_system("cb2cf"), 100)
    assert trial.gain > 0.1
    assert abs(trial.control) < 0.08
    assert trial.method < trial.oracle


def assert_trained(recipe: SystemRecipe, steps: int) -> None:
    """So many steps of each stage move weights, and leave finite features of every item."""
    table = tiny(recipe)
    before, system = fresh(recipe, table, 0).state_dict(), train(recipe, table, 0, steps=steps)
    assert any(name in before and not torch.equal(of, before[name]) for name, of in system.state_dict().items())
    features = system.items(torch.arange(table.n_items)).final
    assert len(features) == table.n_items
    assert features.isfinite().all()
    assert features.std(0).max() > 0


def test_a_new_combination_needs_no_python(tmp_path: Path) -> None:
    text = (Path(__file__).parent.parent / "docs" / "adding-a-system.md").read_text()
    recipe = text.split("```yaml\n")[1].split("```")[0]
    path = tmp_path / "attentive.yaml"
    path.write_text(recipe)
    system = load_system(str(path))
    assert_trained(system, steps=2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"item.fusion": "domain_maps"}, "needs two domains"),
        ({"item.modalities": ["video"]}, "names video, the data has image, text"),
        ({"item.reader": {"audio": "frames"}}, "item.reader.audio: no such modality"),
        ({"user": "multi_query"}, "reads categories"),
        ({"stages.0.pairs": "pears"}, "pairs 'pears'; there are clicks"),
        ({"stages.0.pairs": "across_domains"}, "items are of one domain"),
        ({"stages.0.objectives": {"nce(item, smell)": 1}}, "view 'smell': there are user"),
        ({"stages.0.objectives": {"nse(item)": 1}}, "objective 'nse'; there are bpr"),
        ({"stages.0.objectives": {"nce(item)": 1}}, "wrong number of views"),
        ({"stages.0.objectives": {"masked(audio)": 1}}, "the items have image, text"),
        ({"stages.0.tune": {"wheels": "frozen"}}, "parts are readers"),
        ({"stages.0.tune": {"ids": "frozen"}}, "has no ids to tune"),
        ({"stages.0.tune": {"user": "lora"}}, "needs a part of blocks"),
        ({"stages.0.tune": dict.fromkeys(["readers", "fusion", "user", "head"], "frozen")}, "nothing can learn"),
        ({"stages.0.objectives": {"reconstruct(content)": 1}}, "items have no texts to write; give them titles"),
        ({"item.fusion": "soft_queries", "item.width": 30}, "item.width: 30 cannot hold 4 soft tokens"),
        ({"item.mix": "sum"}, "needs item.ids: true"),
        ({"item.fusion": "difference"}, "takes off what ids say: it needs item.ids: true"),
        ({"stages.0.swap": 0.5}, "needs item.mix: swap"),
        ({"stages.0.objectives": {"softmax of all": 1}}, "expected NAME"),
        ({"item.modalities": ["image"], "item.reader": {}}, "items have no image, the first is row"),
    ],
)
def test_a_recipe_that_the_data_cannot_feed_is_refused(change: dict[str, Any], message: str) -> None:
    recipe = load_system("joint").changed({"item": {}, "stages.0.tune": {}})
    table = plant(Planted(**TINY, categories=1, missing=0.1), 0)
    with pytest.raises(ConfigError, match=message):
        train(recipe.changed(change), table, 0, steps=1)


def test_weights_of_another_recipe_or_catalogue_are_refused_before_training(tmp_path: Path) -> None:
    recipe = load_system("cb2cf")
    table = tiny(recipe)
    train(recipe, table, 0, folder=tmp_path, steps=1)
    train(recipe, table, 0, folder=tmp_path, steps=1)
    other = copy.deepcopy(table)
    other.features["text"].values[0] += 1
    for which, data, seed in (
        (recipe.changed({"item.fusion": "sum"}), table, 0),
        (recipe, other, 0),
        (recipe, table, 1),
    ):
        with pytest.raises(ConfigError, match=r"cb2cf: stages\.0: .*stage-0\.pt is stale.*delete"):
            train(which, data, seed, folder=tmp_path, steps=1)


@pytest.mark.parametrize("steps", [1, 2, 9, 10, 11])
def test_any_number_of_steps_has_a_schedule(steps: int) -> None:
    assert_trained(load_system("cb2cf"), steps)


def test_a_cached_item_table_answers_as_reading_does_and_reads_once() -> None:
    recipe = load_system("ease")
    table = tiny(recipe)
    states = []
    for cache in (True, False):
        system = fresh(recipe, table, 0)
        stage = recipe.stages[1].model_copy(update={"cache": cache})
        learns = set_tuning(system, stage.tune, "here")
        train_stage(system, stage, table, learns, seed=0, steps=3, where="here")
        assert system.cache is None
        assert (system.reads == table.n_items) == cache
        states.append(system.state_dict())
    for name, of in states[0].items():
        assert torch.allclose(of, states[1][name], atol=1e-5), name


@pytest.mark.parametrize("kind", ["bottleneck", "lora"])
def test_cached_lower_layers_equal_uncached_ones_and_stay_as_they_are(kind: str) -> None:
    recipe = load_system("llm_lora").changed({"stages.1.tune.user": kind, "stages.1.tune_from": 1})
    table = tiny(recipe, n_users=20)
    system = train(recipe, table, 0, steps=3)
    learns = {name for name, p in system.user.named_parameters() if p.requires_grad}
    assert learns
    assert all("layers.1." in name for name in learns)
    first = train(recipe.changed({"stages.1": None}), table, 0, steps=3).state_dict()
    after = system.state_dict()
    assert all(torch.equal(of, after[name]) for name, of in first.items() if "layers.0." in name)
    assert isinstance(system.user, TransformerUser)
    users, histories = torch.arange(20), left_pad(table.split.train)
    plain = system.all_scores(users, histories)
    system.user.keep_below(1)
    computed = system.all_scores(users, histories)
    ran = []
    system.user.layers[0].register_forward_hook(lambda *_: ran.append(1))
    looked_up = system.all_scores(users, histories[:, -4:])  # shorter histories are others
    again = system.all_scores(users, histories)
    assert len(ran) == 1
    assert (plain - computed).abs().max() < 1e-5
    assert (plain - again).abs().max() < 1e-5
    assert (plain - looked_up).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("llm_lora", {"stages.1.tune_from": 2}, "user has 2 blocks, so none would learn"),
        (
            "llm_lora",
            {"stages.1.tune_from": 1, "stages.1.tune": {"user": "lora"}},
            "states of histories would be stale",
        ),
        ("prompt_tuning", {"stages.1.tune_from": 1}, "needs stages.1.tune.user: bottleneck or lora"),
        ("joint", {"stages.0.cache": True}, r"stages\.0\.cache: the cached item table would be stale.*readers, fusion"),
        ("ease", {"stages.1.tune": {"readers": "frozen"}}, "for fusion learn; set stages.1.tune to frozen for them"),
        ("ease", {"stages.1.drop_modality": 0.5}, "drop_modality shows an item another way in every batch"),
        (
            "clcrec",
            {"stages.0.cache": True, "stages.0.tune": {"readers": "frozen", "fusion": "frozen"}},
            "for ids learn",
        ),
    ],
)
def test_a_cache_that_would_go_stale_is_refused(name: str, change: dict[str, Any], message: str) -> None:
    table = tiny(load_system(name))
    with pytest.raises(ConfigError, match=message):
        train(load_system(name).changed(change), table, 0, steps=1)


def test_a_late_stage_s_mistake_shows_before_the_first_is_trained(tmp_path: Path) -> None:
    recipe = load_system("llm_lora")
    with pytest.raises(ConfigError, match="parts are readers"):
        train(recipe.changed({"stages.1.tune": {"wheels": "frozen"}}), tiny(recipe), 0, folder=tmp_path, steps=1)
    assert not list(tmp_path.iterdir())
    with pytest.raises(ConfigError, match=r"stages\.0 has put something small into user already"):
        recipe.changed({"stages.0.tune": {"user": "bottleneck"}})


@pytest.mark.parametrize(("name", "part"), [("mmgcn", "item.graph: per_modality"), ("clcrec", "user: learned")])
def test_users_that_nothing_reaches_are_refused(name: str, part: str) -> None:
    recipe = load_system(name)
    table = tiny(recipe)
    split = dataclasses.replace(table.split, train=table.split.train[1:], train_users=table.split.train_users[1:])
    with pytest.raises(ConfigError, match=f"{part}: 1 users have no training event, the first is row 0"):
        train(recipe, dataclasses.replace(table, split=split), 0, steps=1)


def test_other_names_lead_to_the_same_recipe() -> None:
    assert load_system("dcim") == load_system("dicm")
    assert load_system("marn") == load_system("amrl")


def test_an_unknown_system_and_an_unknown_key_name_what_there_is(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there are alignrec"):
        load_system("alignwreck")
    raw = yaml.safe_load((FOLDER / "clcrec.yaml").read_text())
    raw["stages"][0]["objective"] = raw["stages"][0].pop("objectives")
    path = tmp_path / "wrong.yaml"
    path.write_text(yaml.safe_dump(raw))
    with pytest.raises(ConfigError, match="did you mean 'objectives'"):
        load_system(str(path))


def test_tuning_the_last_layer_leaves_the_first() -> None:
    recipe = load_system("cscnn")
    system = fresh(recipe, tiny(recipe), 0)
    set_tuning(system, {"readers": "last"}, "here")
    learns = [name for name, p in system.readers.named_parameters() if p.requires_grad]
    assert learns
    assert not any("first" in name for name in learns)
