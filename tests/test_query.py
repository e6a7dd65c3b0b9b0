"""Which items satisfy a query: against loops over the items."""

import numpy as np

from genrec.query import Fact, Query
from tests.export_fixture import COLOURS, THINGS, make_catalogue

CATALOGUE = make_catalogue(80, np.random.default_rng(3))
FACTS = [Fact(name="colour", value=v) for v in (*COLOURS, "mauve")] + [
    Fact(name="category", value=v) for v in (*THINGS, "indoor", "outdoor")
]


def satisfies(query: Query, row: int) -> bool:
    def has(fact: Fact) -> bool:
        if fact.name == "category":
            return fact.value in CATALOGUE.categories[row]
        return CATALOGUE.attributes[row].get(fact.name) == fact.value

    price = float(CATALOGUE.prices[row])
    return (
        bool(CATALOGUE.available[row])
        and all(any(has(f) for f in query.wanted if f.name == name) for name in {f.name for f in query.wanted})
        and not any(has(f) for f in query.unwanted)
        and (query.price_min is None or price >= query.price_min)
        and (query.price_max is None or price <= query.price_max)
        and CATALOGUE.item_ids[row] not in (*query.liked, *query.disliked)
    )


def test_allowed_items_are_those_of_a_loop() -> None:
    rng = np.random.default_rng(0)
    sizes = set()
    for _ in range(200):
        chosen = [FACTS[i] for i in rng.permutation(len(FACTS))[: rng.integers(0, 5)]]
        at = int(rng.integers(0, len(chosen) + 1))
        low, high = np.sort(np.round(rng.uniform(5, 100, 2), 2)).tolist()
        query = Query(
            wanted=chosen[:at],
            unwanted=chosen[at:],
            price_min=low if rng.random() < 0.3 else None,
            price_max=high if rng.random() < 0.3 else None,
            liked=["item-1", "nothing"],
            disliked=[f"item-{rng.integers(0, 80)}"],
        )
        allowed = query.allowed(CATALOGUE)
        assert allowed.tolist() == [satisfies(query, row) for row in range(80)]
        sizes.add(int(allowed.sum()))
    assert {0} < sizes
    assert max(sizes) > 40


def test_a_query_changes_no_catalogue() -> None:
    before = CATALOGUE.available.copy()
    Query(disliked=["item-1"]).allowed(CATALOGUE)
    assert (CATALOGUE.available == before).all()
