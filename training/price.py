"""What new items cost known ones, and how much they may get so that it is no more than was agreed.

Whoever shows a new item takes a place from a known one, and how much a place is worth differs from list to list: in the
tenth one users with short histories are hit twice as often as others. Here that is read off validation's lists.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor

TOP = 10  # places that count
LOOKED_AT = 20  # known items per list that tell how often one in such a place is hit
ENTRIES = torch.arange(-6.0, 6.0, 0.05)  # nats that new items may get


@dataclass(frozen=True)
class Prices:
    """How lists of M cases look to known and to new items.

    Attributes:
        known: float32 [M, K], log-probabilities of the best `LOOKED_AT` known items, best first, -inf where there are
            fewer.
        hit: bool [M, K], whether that is the target.
        new: float32 [M, T], those of the best `TOP` new items, -inf where there are fewer.
        about: float32 [M, A], what else tells how often places are hit.
        plain: bool [M], whether the generator's own first `TOP` hold the target.
    """

    known: Tensor
    hit: Tensor
    new: Tensor
    about: Tensor
    plain: Tensor

    def of(self, cases: Tensor) -> Prices:
        """Those of some cases, bool [M]."""
        return Prices(*(getattr(self, of.name)[cases] for of in fields(self)))

    def entry(self, most: float) -> float:
        """The largest of `ENTRIES` with which known items lose no more than a share `most` of the generator's recall.

        Known items that leave the first places cost what a logistic regression says of such places: hits themselves are
        too few to tell 1 % from 2 %. What their own new order gains or loses counts as it was.
        """
        first = self.known[:, :TOP]
        likely, places = self._likely()[:, :TOP], torch.arange(first.shape[1])
        own, of_all = self.hit[:, :TOP].any(1).float().mean(), self.plain.float().mean()
        found = float(ENTRIES[0])
        for entry in ENTRIES:
            above = (self.new[:, :, None] + entry > first[:, None]).sum(1)
            lost = (likely * (places + above >= TOP)).sum(1).mean()
            if of_all - own + lost > most * of_all:
                break
            found = float(entry)
        return found

    def _likely(self) -> Tensor:
        """How likely each known item is the target, by its place and its list, float32 [M, K].

        Its score would make places that new items take look cheaper than they are: in the tenth it says little.
        """
        real = self.known > -torch.inf
        place = torch.arange(self.known.shape[1]).expand_as(self.known).log1p()
        about = self.about[:, None].expand(-1, self.known.shape[1], -1)
        seen = torch.cat([place[:, :, None], about], 2)[real]
        likely = torch.zeros(self.known.shape)
        if self.hit[real].any():
            model = make_pipeline(StandardScaler(), LogisticRegression()).fit(seen.numpy(), self.hit[real].numpy())
            likely[real] = torch.from_numpy(model.predict_proba(seen.numpy())[:, 1]).float()
        return likely
