"""Facts: what the catalogue states of an item in so many words: categories, attributes' values, the title's words.

An encoder that reads "director: A, actors: B, C" blurs who they are. Here everyone is a column of their own: a sparse
unit vector per item, in which what few items have weighs more (inverse document frequency).
"""

from __future__ import annotations

import re
from collections import Counter

import numpy as np
from scipy import sparse
from sklearn.preprocessing import normalize

from genrec.catalog import Catalogue

MOST = 4096  # facts that are told apart, the commonest
BETWEEN = ","  # of the values that one attribute has


class FactSpace:
    """Which facts there are. It stays as it was fitted: a later item gets its key and touches no other's."""

    def __init__(self, weights: dict[str, float]):
        """weights: fact -> its inverse document frequency, in the order of the columns."""
        self.weights = weights

    @classmethod
    def fit(cls, catalogue: Catalogue, fit_on: np.ndarray) -> FactSpace:
        """Count how many items have each fact.

        Args:
            catalogue: N items.
            fit_on: bool [N], those that training may look at; at least one.
        """
        rows = np.flatnonzero(fit_on)
        counts = Counter(fact for row in rows for fact in _facts(catalogue, row))
        return cls({fact: float(np.log(len(rows) / of)) for fact, of in counts.most_common(MOST) if of < len(rows)})

    def keys(self, catalogue: Catalogue) -> sparse.csr_matrix:
        """Any N items -> float32 [N, F] of unit rows; zeros where an item has no fact that was fitted."""
        columns = {fact: at for at, fact in enumerate(self.weights)}
        known = [[columns[fact] for fact in _facts(catalogue, row) if fact in columns] for row in range(len(catalogue))]
        ends = np.cumsum([0, *map(len, known)])
        at = np.array([column for of in known for column in of], np.int64)
        values = np.array([*self.weights.values()], np.float32)[at]
        found = sparse.csr_matrix((values, at, ends), (len(catalogue), len(columns)))
        return normalize(found) if columns else found  # it refuses what has no column


def _facts(catalogue: Catalogue, row: int) -> list[str]:
    """Every fact of an item, once, as "name: value"."""
    stated = [(name, part) for name, value in catalogue.attributes[row].items() for part in value.split(BETWEEN)]
    stated += [("category", name) for name in catalogue.categories[row]]
    stated += [("title", word) for word in re.findall(r"\w+", catalogue.titles[row] or "")]
    return list(dict.fromkeys(f"{name}: {value.strip().casefold()}" for name, value in stated if value.strip()))
