"""Which wish to drop, against asking the query again with each wish left out."""

from itertools import combinations

import numpy as np
import pytest

from genrec.query import Fact, Query
from genrec.relax import in_words, relaxations, wishes
from tests.export_fixture import COLOURS, THINGS, make_catalogue

CATALOGUE = make_catalogue(60, np.random.default_rng(0))


def without(query: Query, dropped: tuple[Query, ...]) -> Query:
    """The query with some wishes left out, field by field."""
    names = {fact.name for wish in dropped for fact in wish.wanted}
    off = {fact for wish in dropped for fact in wish.unwanted}
    return query.model_copy(
        update={
            "wanted": [fact for fact in query.wanted if fact.name not in names],
            "unwanted": [fact for fact in query.unwanted if fact not in off],
            "price_min": None if any(wish.price_min is not None for wish in dropped) else query.price_min,
            "price_max": None if any(wish.price_max is not None for wish in dropped) else query.price_max,
        }
    )


def brute_force(query: Query, possible: np.ndarray) -> dict[tuple[str, ...], int]:
    """Drops of one wish that help, else of two: their words -> the items that fit the rest."""
    for n in (1, 2):
        counts = {
            tuple(in_words(wish) for wish in drop): int((without(query, drop).allowed(CATALOGUE) & possible).sum())
            for drop in combinations(wishes(query), n)
        }
        if found := {drop: items for drop, items in counts.items() if items}:
            return found
    return {}


def random_query(rng: np.random.Generator) -> Query:
    def facts(names: tuple[str, ...], name: str, most: int) -> list[Fact]:
        return [Fact(name=name, value=str(v)) for v in rng.choice(names, rng.integers(most + 1), replace=False)]

    items = [f"item-{row}" for row in rng.choice(60, 6)]
    low, high = sorted(rng.uniform(0, 110, 2))
    return Query(
        wanted=[*facts(COLOURS, "colour", 2), *facts((*THINGS, "indoor"), "category", 1)],
        unwanted=[*facts(COLOURS, "colour", 2), *facts((*THINGS, "outdoor"), "category", 2)],
        price_min=high if rng.random() < 0.4 else None,
        price_max=low if rng.random() < 0.6 else None,
        liked=items[:2],
        disliked=[*items[2:4], "sold out"],
    )


def test_every_drop_and_count_is_what_asking_again_gives() -> None:
    rng = np.random.default_rng(1)
    lengths, empty = set(), 0
    for _ in range(600):
        query, possible = random_query(rng), rng.random(60) < 0.4
        if (query.allowed(CATALOGUE) & possible).any():
            continue
        found = relaxations(CATALOGUE, query, possible)
        expected = brute_force(query, possible)
        assert {tuple(in_words(wish) for wish in one.dropped): one.items for one in found} == expected
        assert [one.items for one in found] == sorted(expected.values(), reverse=True)
        lengths |= {len(one.dropped) for one in found}
        empty += not found
    assert lengths == {1, 2}
    assert empty > 0


def test_wishes_together_are_the_query() -> None:
    rng = np.random.default_rng(2)
    for _ in range(100):
        query = random_query(rng)
        known = [int(item[5:]) for item in (*query.liked, *query.disliked) if item.startswith("item-")]
        keep = CATALOGUE.available.copy()
        keep[known] = False
        for wish in wishes(query):
            keep &= wish.allowed(CATALOGUE)
        assert (keep == query.allowed(CATALOGUE)).all()


@pytest.mark.parametrize(
    ("wish", "words"),
    [
        (Query(wanted=[Fact(name="colour", value="red"), Fact(name="colour", value="blue")]), "colour red or blue"),
        (Query(unwanted=[Fact(name="category", value="lamp")]), "not category lamp"),
        (Query(price_min=10), "price at least 10"),
        (Query(price_max=19.5), "price at most 19.5"),
        (Query(price_max=0), "price at most 0"),
    ],
)
def test_a_wish_in_words(wish: Query, words: str) -> None:
    assert [in_words(one) for one in wishes(wish)] == [words]
