"""Copy and reviews: read by column, trained as descriptions, and compared with what the model writes."""

import json
from pathlib import Path
from typing import Any

import pytest

from genrec.catalog import Catalogue, read_catalogue
from genrec.config import resolve_recipe
from genrec.errors import DataError
from genrec.human_texts import MAX_CHARS, HumanTexts, cut
from genrec.interactions import Log, read_log
from genrec.pipeline import Run
from genrec.text_quality import measure
from genrec.text_subjects import human_subjects
from genrec.training.texts import assignments, held_out_items, held_out_users
from tests.conftest import tiny_recipe

N_ITEMS, N_USERS = 40, 220
LIMITS: dict[str, Any] = {"max_bad_share": 0, "max_text_chars": 1000, "max_pixels": 10_000}


def write_shop(folder: Path) -> Path:
    """items.jsonl with copy of every item, log.jsonl with reviews of every second event."""
    items = [
        {"item_id": f"i{i}", "title": f"Thing {i}", "attributes": {"use": ("desk", "wall")[i % 2]}, "ad": f"Copy {i}."}
        for i in range(N_ITEMS)
    ]
    events = [
        {"user_id": f"u{u}", "item_id": f"i{(u + 7 * t) % N_ITEMS}", "timestamp": t, "said": f"Good {u} {t}." * (t % 2)}
        for u in range(N_USERS)
        for t in range(6)
    ]
    for name, rows in (("items", items), ("log", events)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder


def shop_recipe(folder: Path, columns: bool = True) -> dict[str, Any]:
    data = {"items": str(folder / "items.jsonl"), "interactions": str(folder / "log.jsonl")}
    if columns:
        data |= {"item_columns": {"copy": "ad"}, "interaction_columns": {"review": "said"}}  # type: ignore[dict-item]
    finetune = {"epochs": 0.2, "evals": 1, "mixture": {"describe": 1.0}}
    return {**tiny_recipe(encode={"image": None}, finetune=finetune), "data": data}


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A tiny run on files in which people wrote about items."""
    folder = write_shop(tmp_path_factory.mktemp("shop"))
    run = Run.create(resolve_recipe(shop_recipe(folder)), folder / "runs")
    run.through_training()
    run.export()
    return run


def test_columns_are_read_and_kept(tmp_path: Path) -> None:
    folder = write_shop(tmp_path)
    catalogue, _ = read_catalogue(folder / "items.jsonl", {"copy": "ad"}, **LIMITS)
    log, _ = read_log(folder / "log.jsonl", {"review": "said"}, catalogue, max_bad_share=0)
    catalogue.save(tmp_path / "kept")
    log.save(tmp_path / "kept")
    for items, events in ((catalogue, log), (Catalogue.load(tmp_path / "kept"), Log.load(tmp_path / "kept"))):
        human = HumanTexts(items, events)
        assert human.copy(3) == "Copy 3."
        assert human.review("u0", 7) == human.of("u0", 7) == "Good 0 1."
        assert human.review("u0", 14) is None  # the third event is without words
        assert human.of("u0", 14) == human.of("nobody", 14) == "Copy 14."
    assert "Copy" not in "".join(catalogue.texts())  # it is what a text should say, not what it is written from


def test_files_without_such_columns_hold_no_texts(tmp_path: Path) -> None:
    folder = write_shop(tmp_path)
    catalogue, _ = read_catalogue(folder / "items.jsonl", {}, **LIMITS)
    log, _ = read_log(folder / "log.jsonl", {}, catalogue, max_bad_share=0)
    catalogue.save(tmp_path / "kept")
    log.save(tmp_path / "kept")
    assert catalogue.copies is log.reviews is Catalogue.load(tmp_path / "kept").copies is None
    assert Log.load(tmp_path / "kept").reviews is None
    assert not HumanTexts(catalogue, log)


def test_reviews_that_are_no_text_are_refused(tmp_path: Path) -> None:
    folder = write_shop(tmp_path)
    catalogue, _ = read_catalogue(folder / "items.jsonl", {}, **LIMITS)
    (folder / "log.jsonl").write_text('{"user_id": "u", "item_id": "i1", "timestamp": 1, "review": ["good"]}\n')
    with pytest.raises(DataError, match=r"log\.jsonl: review holds list.*expected text; name another column"):
        read_log(folder / "log.jsonl", {}, catalogue, max_bad_share=0)


@pytest.mark.parametrize(
    ("text", "short"),
    [
        (" two\n lines ", "two lines"),
        ("One. " + "x" * MAX_CHARS, "One."),
        ("word " * 100, ("word " * 60).strip()),
        ("x" * 400, "x" * MAX_CHARS),
        ("", ""),
    ],
)
def test_long_texts_end_where_a_sentence_does(text: str, short: str) -> None:
    assert cut(text) == short
    assert len(cut(text)) <= MAX_CHARS


def test_descriptions_are_trained_to_say_what_people_wrote_and_held_out_texts_are_not(shop: Run) -> None:
    space = shop.space
    apart = held_out_users(len(space.user_ids), space.recipe.seed)
    items = held_out_items(N_ITEMS, space.recipe.seed)
    texts = {a.text for a in assignments(space)}
    reviews = {text for text in texts if text.startswith("Good ")}
    copies = texts - reviews
    assert copies
    assert copies <= {f"Copy {row}." for row in range(N_ITEMS) if not items[row]}
    known = {space.user_ids[user][1:] for user in range(N_USERS) if not apart[user]}
    assert reviews
    assert {text.split()[1] for text in reviews} <= known
    chosen, human = human_subjects(space, 100, 0)
    assert len(chosen) == len(human) > 20
    assert not texts.intersection(human)
    for subject, text in zip(chosen, human, strict=True):
        assert subject.row not in subject.history
        assert text in (space.human_texts.review(subject.user, subject.row), f"Copy {subject.row}.")


def test_descriptions_are_scored_against_people(shop: Run) -> None:
    result = measure(shop, "describe", 22)
    for name in ("rouge-1", "rouge-2", "rouge-l", "bertscore", "rouge-l, another's text", "bertscore, another's text"):
        assert 0 <= result["metrics"][name]["mean"] <= 1
    assert len(result["human_examples"]) == 10
    assert all(of["reference"].startswith(("Good", "Copy")) for of in result["human_examples"])
