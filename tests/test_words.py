"""Word keys: their cosines against TF-IDF by scikit-learn, later texts, and texts without a known word."""

import numpy as np
import torch
from sklearn.feature_extraction.text import TfidfVectorizer

from genrec.adapters.words import WIDTH, WordSpace


def texts(n: int, seed: int = 0) -> list[str]:
    """Of six words of the seven of one of ten topics, and six of all."""
    rng = np.random.default_rng(seed)
    topics = rng.integers(3000, size=(10, 7))
    rows = [
        np.concatenate([rng.choice(topics[rng.integers(10)], 6, replace=False), rng.integers(3000, size=6)])
        for _ in range(n)
    ]
    return [" ".join(f"w{word}" for word in row) for row in rows]


def test_cosines_are_those_of_tfidf():
    some = texts(200)
    exact = TfidfVectorizer(sublinear_tf=True, token_pattern=r"(?u)\b\w+\b").fit_transform(some).toarray()
    keys = WordSpace.fit(some, np.ones(200, bool)).keys(some)
    assert keys.dtype == torch.float32
    torch.testing.assert_close(keys.norm(dim=1), torch.ones(200))
    pairs = ~np.eye(200, dtype=bool)
    found, wanted = (keys @ keys.T).numpy()[pairs], (exact @ exact.T)[pairs]
    assert (found - wanted).std() < 1.1 / np.sqrt(WIDTH)  # what signs of single words may do
    assert abs((found - wanted).mean()) < 0.005
    assert np.corrcoef(found, wanted)[0, 1] > 0.7
    assert abs(np.corrcoef(found, np.roll(wanted, 199))[0, 1]) < 0.1  # of other texts


def test_a_later_text_has_the_key_it_would_have_had_and_changes_no_other():
    some = texts(30)
    fitted = WordSpace.fit(some, np.arange(30) < 20)
    again = WordSpace.fit(some[:20], np.ones(20, bool))
    torch.testing.assert_close(fitted.keys(some[:20]), again.keys(some[:20]))
    torch.testing.assert_close(fitted.keys(some)[20:], again.keys(some[20:]))


def test_what_no_fitted_text_says_counts_for_nothing():
    fitted = WordSpace.fit(["oak lamp", "oak table"], np.ones(2, bool))
    keys = fitted.keys(["lamp", "lamp zebra", "zebra", "", "LAMP."])
    torch.testing.assert_close(keys[1], keys[0])
    torch.testing.assert_close(keys[4], keys[0])
    assert not keys[2:4].any()
