"""Facts: against a plain loop; what was not fitted says nothing, and a later item touches no other's."""

import numpy as np
import pytest

from genrec.adapters import facts
from genrec.adapters.facts import FactSpace
from genrec.catalog import Catalogue
from tests.export_fixture import make_catalogue


def films() -> Catalogue:
    rows = [
        ({"director": "A. Bee", "actors": "C, D ,E"}, ["Comedy"]),
        ({"director": "a. bee", "actors": "D"}, ["Comedy", "Drama", "Drama"]),
        ({"director": "", "actors": " , F"}, ["Drama"]),
        ({}, []),
        ({"director": "Nobody", "actors": "D"}, ["Comedy"]),
    ]
    made = make_catalogue(len(rows), np.random.default_rng(0))
    titles = ["The Hive", "Hive 2: the Hive", "", "Étude", "hive"]
    return Catalogue(
        **vars(made) | {"attributes": [of for of, _ in rows], "categories": [of for _, of in rows], "titles": titles}
    )


def test_against_a_plain_loop() -> None:
    stated = [
        {"director: a. bee", "actors: c", "actors: d", "actors: e", "category: comedy", "title: the", "title: hive"},
        {
            "director: a. bee",
            "actors: d",
            "category: comedy",
            "category: drama",
            "title: the",
            "title: hive",
            "title: 2",
        },
        {"actors: f", "category: drama"},
        {"title: étude"},
        {"actors: d", "category: comedy", "title: hive"},  # nobody among the fitted has this director
    ]
    space = FactSpace.fit(films(), np.arange(5) < 4)
    found = space.keys(films()).toarray()
    assert set(space.weights) == set.union(*stated)
    for row, of in enumerate(stated):
        values = [np.log(4 / sum(fact in s for s in stated[:4])) * (fact in of) for fact in space.weights]
        np.testing.assert_allclose(found[row], np.array(values) / max(np.linalg.norm(values), 1e-9), rtol=1e-6)


def test_it_keeps_the_commonest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(facts, "MOST", 3)
    space = FactSpace.fit(films(), np.ones(5, bool))
    assert set(space.weights) == {"actors: d", "category: comedy", "title: hive"}


def test_without_facts_there_is_nothing() -> None:
    bare = Catalogue(**vars(films()) | {"attributes": [{}] * 5, "categories": [[]] * 5, "titles": [""] * 5})
    assert FactSpace.fit(bare, np.ones(5, bool)).keys(films()).shape == (5, 0)
    assert FactSpace.fit(films(), np.ones(5, bool)).keys(bare).nnz == 0
