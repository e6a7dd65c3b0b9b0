"""Newcomers: items that no training history holds inherit a share of what their nearest relatives have.

A log says nothing of an item that nobody has taken, and the language model never wrote its id, so on its own it does
not come up. Here it gets the weighted mean of the final probabilities of the known items that are most its kin, more
where its like is taken often, times a factor: the lift says how much of the lists new items may take from known ones.
Kinship stays as training left it, so an item that arrives later is treated like one that was held out before. Scoring
new items through content, beside the generated ones, is the idea of hybrids such as LIGER (Yang et al. 2024,
arXiv:2411.18814).
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

SHARPNESS = 15.0  # of the weights, per unit of cosine
BLOCK = 1024  # new items compared at once


class Newcomers:
    """``score(i) = lift + log sum over relatives j of w_ij * exp(score(j))`` for new items i; others keep theirs."""

    def __init__(self, rows: Tensor, relatives: Tensor, weights: Tensor, lift: Tensor):
        """
        Args:
            rows: int64 [M], the new items.
            relatives: int64 [M, k], known items.
            weights: float32 [M, k], shares of the relatives, times how much oftener than other items each new one
                would be taken.
            lift: float32 [], nats.
        """
        self.rows, self.relatives, self.weights, self.lift = rows, relatives, weights, lift

    @classmethod
    def nearest(cls, keys: Tensor, fame: Tensor, known: Tensor, most: int, lift: float) -> Newcomers:
        """Find each new item's relatives by the cosine of their keys.

        Args:
            keys: float32 [N, E] of unit rows, from `genrec.adapters.kinship.Kinship`.
            fame: float32 [N], nats by which an item would be taken oftener than others, see `Kinship.of`.
            known: bool [N], items that training histories hold; at least one.
            most: relatives per new item, k.
            lift: nats.
        """
        rows, others = (~known).nonzero()[:, 0], known.nonzero()[:, 0]
        best = []
        for block in rows.split(BLOCK):
            best.append((keys[block] @ keys[others].T).topk(min(most, len(others)), dim=1))
        relatives = others[torch.cat([found.indices for found in best])]
        weights = (SHARPNESS * torch.cat([found.values for found in best])).softmax(1) * fame[rows, None].exp()
        return cls(rows, relatives, weights, torch.tensor(float(lift)))

    def joined_by(self, more: Newcomers) -> Newcomers:
        """These and others; a row that both have is as `more` has it."""
        stay = ~torch.isin(self.rows, more.rows)
        return Newcomers(
            torch.cat([self.rows[stay], more.rows]),
            torch.cat([self.relatives[stay], more.relatives]),
            torch.cat([self.weights[stay], more.weights]),
            self.lift,
        )

    def to(self, device: torch.device | str) -> Newcomers:
        """The same on a device."""
        return Newcomers(*(of.to(device) for of in (self.rows, self.relatives, self.weights, self.lift)))

    def without(self, allowed: Tensor) -> Tensor:
        """bool [B, N] -> the same without new items: what the search looks for."""
        return allowed.index_fill(1, self.rows, False)

    def join(
        self, items: Tensor, scores: Tensor, likely: Tensor | None, allowed: Tensor, most: int
    ) -> tuple[Tensor, Tensor]:
        """Put new items among the known ones that a search found.

        A relative that the search did not find has what the item scores say of it, or an equal share where there are
        none; and at most the score of the last one found, unless it was not allowed and so not searched for.

        Args:
            items: int64 [B, W], known items, best first, -1 where there are fewer.
            scores: float32 [B, W], log-probabilities, -inf there.
            likely: float32 [B, N], item scores in nats up to a constant per row; None where there are none.
            allowed: bool [B, N], items that may be listed.
            most: longest list.

        Returns:
            items int64 [B, W'] and scores float32 [B, W'], best first, -1 and -inf where there are fewer; W' is at most
            `most`. New items take their share on top: the scores of known ones are what they were.
        """
        shares = known_shares(likely, allowed, self)
        every = torch.cat([scores, self.inherited(items, scores, shares, allowed) + self.lift], 1)
        best, at = every.topk(min(most, every.shape[1]), dim=1)
        found = torch.cat([items, self.rows.expand(len(items), -1)], 1).gather(1, at)
        return found.masked_fill(best == -torch.inf, -1), best

    def inherited(
        self, items: Tensor, scores: Tensor, shares: Tensor, allowed: Tensor, temper: float | Tensor = 1.0
    ) -> Tensor:
        """What new items have from their relatives, without the lift: float32 [B, M], -inf where not allowed.

        Arguments as for `join`; shares: from `known_shares`; temper: a power of the probabilities, which add up to what
        they did before. Those of a generator that is too sure of its first places need less than 1.
        """
        last = scores.masked_fill(items < 0, torch.inf).amin(1, keepdim=True)  # inf where nothing was found
        shares = torch.where(allowed, torch.minimum(shares, last), shares)  # nobody searched for what is not allowed
        of = torch.cat([shares, shares[:, :1]], 1)  # one column more, for what is -1
        of = of.scatter(1, torch.where(items < 0, allowed.shape[1], items), scores)[:, :-1]
        of = of * temper + (of.logsumexp(1, keepdim=True) - (of * temper).logsumexp(1, keepdim=True))
        inherited = (of[:, self.relatives] + self.weights.log()).logsumexp(2)
        return inherited.masked_fill(~allowed[:, self.rows], -torch.inf)

    def save(self, path: Path) -> None:
        """Write as one safetensors file."""
        arrays = {"rows": self.rows, "relatives": self.relatives, "weights": self.weights, "lift": self.lift}
        save_file({name: of.cpu().contiguous() for name, of in arrays.items()}, path)

    @classmethod
    def load(cls, path: Path) -> Newcomers:
        """Read what `save` wrote.

        Raises:
            OSError, SafetensorError, TypeError: no whole file of this kind.
        """
        return cls(**load_file(path))


def known_shares(likely: Tensor | None, allowed: Tensor, newcomers: Newcomers | None) -> Tensor:
    """What the item scores say as log-probabilities of known items, float32 [B, N]; all alike where there are none.

    Arguments as for `Newcomers.join`; newcomers: who is not known; None: everyone is.
    """
    shares = torch.zeros(allowed.shape, device=allowed.device) if likely is None else likely.float()
    if newcomers is not None:
        shares = shares.index_fill(1, newcomers.rows, -torch.inf)
    return shares.log_softmax(1)
