"""In which modalities the items of a history are alike: a rule, as the choice of an explanation's evidence is.

Ten blue things of all materials are alike in their pictures, ten things of oak in their words. The writing prompts say
so in a word: to find it out, a small language model would have to average its context and look for peaks, which it does
not learn in the time it has (docs/design/013-likeness-is-computed.md).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from torch import Tensor

WORDS = {"image": "pictures", "text": "words"}  # what prompts call the modalities
NOTHING = "nothing"
ALIKE = 1.5  # times what items drawn at random have in common
NEWEST = 50  # events that count


class Likeness:
    """Compares the items of a history, modality by modality."""

    def __init__(self, keys: Mapping[str, Tensor]):
        """
        Args:
            keys: modality -> float32 [N, E_m], see `genrec.adapters.profile.content_keys`: rows of length 1, or 0 where
                an item lacks the modality.
        """
        self._keys = {name: keys[name].cpu().numpy() for name in WORDS if name in keys}

    def ratio(self, name: str, history: Sequence[int] | np.ndarray) -> float:
        """How much items have in common against random ones: n times the squared length of their keys' mean.

        Random directions give 1 on average, n items with equal keys give n; without an item that has the modality it
        is 0. An item counts once: to take one thing often is a habit, no taste.

        Args:
            name: the modality.
            history: catalogue rows.
        """
        keys = self._keys[name][np.unique(np.asarray(history, np.int64))]
        n = int(keys.any(1).sum())
        return float(np.square(keys.sum(0)).sum() / n) if n else 0.0

    def words(self, history: Sequence[int] | np.ndarray) -> str:
        """The modalities in which the newest events' items are alike, such as "pictures" or "pictures, words"."""
        newest = history[-NEWEST:]
        return ", ".join(WORDS[name] for name in self._keys if self.ratio(name, newest) >= ALIKE) or NOTHING
