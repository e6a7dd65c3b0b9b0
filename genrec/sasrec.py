"""SASRec (Kang and McAuley, 2018), on ids or on ids and item features: the strong simple rival of a generator.

Differences from the paper, all in its favour (Klenitskiy and Vasilev, 2023): full-softmax cross-entropy over the
catalogue instead of one sampled negative, normalisation before each block, AdamW. The network is
`genrec.adapters.self_attention.Network`.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from genrec.adapters.self_attention import Network
from genrec.baselines import item_counts, ndcg10
from genrec.errors import ConfigError
from genrec.splits import Cases

log = logging.getLogger(__name__)

# What `SASRec.search` tries beside a model's own settings, one setting after the other.
GRID: dict[str, tuple[float, ...]] = {"lr": (1e-3,), "dropout": (0.2,), "width": (128,)}


class SASRec:
    """A trained self-attentive ranker on item ids, and features where it has them."""

    def __init__(
        self,
        *,
        seed: int = 0,
        epochs: int = 60,
        max_history: int = 50,
        width: int = 64,
        layers: int = 2,
        heads: int = 2,
        dropout: float = 0.5,
        lr: float = 4e-3,
        weight_decay: float = 0.01,
        batch_size: int = 128,
        patience: int = 6,
        features: Tensor | None = None,
        device: str = "cpu",
    ) -> None:
        """Keep the settings.

        `patience` counts epochs without a better validation ndcg@10, from a third of `epochs` on: before,
        training often rests where popularity is all it knows. `features` are those of `Network`.
        """
        self.seed, self.epochs, self.batch_size, self.patience = seed, epochs, batch_size, patience
        self.shape = {"max_history": max_history, "layers": layers, "heads": heads}
        self.setting = {"lr": lr, "dropout": dropout, "width": width}
        self.weight_decay, self.features, self.device = weight_decay, features, torch.device(device)
        self.curve: list[dict[str, float]] = []

    def fit(
        self,
        train: list[np.ndarray],
        n_items: int,
        valid: Cases | None = None,
        *,
        exclude_seen: bool = True,
        search: bool = False,
    ) -> dict[str, Any]:
        """Train, keeping the epoch with the best validation ndcg@10.

        Args:
            train: int32 histories, oldest event first; those of one event teach nothing.
            n_items: rows of the catalogue, N.
            valid: chooses the epoch (and the setting); without it every epoch runs and the last one counts.
            exclude_seen: as in the evaluation.
            search: also try the values of `GRID`, one setting after the other, and keep what validates best.

        Returns:
            The chosen ``lr``, ``dropout``, ``width``, ``epoch`` and its ``ndcg@10`` (None without `valid`).

        Raises:
            ConfigError: no history has two events, an item is outside the catalogue, a search lacks `valid`.
        """
        item_counts(train, n_items)
        if search and valid is None:
            raise ConfigError("sasrec: a search needs validation cases to choose by; give valid")
        histories = [h[-self.shape["max_history"] - 1 :] for h in train if len(h) > 1]
        if not histories:
            raise ConfigError(f"sasrec: none of {len(train)} training histories has two events; it needs an order")
        best = self._train(histories, n_items, valid, exclude_seen, self.setting)
        for name, values in GRID.items() if search else ():
            for value in values:
                setting = {key: best[key] for key in self.setting} | {name: value}
                result = self._train(histories, n_items, valid, exclude_seen, setting)
                log.info("SASRec: %s: %.4f, best so far %.4f", setting, result["ndcg@10"], best["ndcg@10"])
                if result["ndcg@10"] > best["ndcg@10"]:
                    best = result
        self.network, self.curve = best.pop("network"), best.pop("curve")
        log.info("SASRec: %s", best)
        return best

    def _train(
        self,
        histories: list[np.ndarray],
        n_items: int,
        valid: Cases | None,
        seen: bool,
        setting: dict[str, float],
    ) -> dict[str, Any]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            self.network = Network(
                n_items, width=int(setting["width"]), dropout=setting["dropout"], features=self.features, **self.shape
            ).to(self.device)
            rate = setting["lr"]
            optimiser = torch.optim.AdamW(self.network.parameters(), lr=rate, weight_decay=self.weight_decay)
            curve: list[dict[str, float]] = []
            best_score, best_epoch, state, step = -1.0, self.epochs, None, 0
            for epoch in range(1, self.epochs + 1):
                self.network.train()
                total = 0.0
                for batch in self._batches(histories, epoch):
                    loss = self.network.loss(batch)
                    optimiser.zero_grad()
                    loss.backward()
                    optimiser.step()
                    total += float(loss.detach()) * len(batch)
                    step += 1
                curve.append({"step": step, "loss": total / len(histories)})
                if valid is None:
                    continue
                curve[-1]["valid_ndcg@10"] = score = ndcg10(self, valid, seen)
                log.info("SASRec: epoch %d of at most %d, validation ndcg@10 %.4f", epoch, self.epochs, score)
                if score > best_score:
                    best_score, best_epoch, state = score, epoch, copy.deepcopy(self.network.state_dict())
                elif epoch - max(best_epoch, self.epochs // 3) >= self.patience:
                    break
        if state is not None:
            self.network.load_state_dict(state)
        score_or_none = None if valid is None else best_score
        chosen = {**setting, "epoch": best_epoch, "ndcg@10": score_or_none}
        return chosen | {"network": self.network.eval(), "curve": curve}

    def _batches(self, histories: list[np.ndarray], epoch: int) -> Iterator[list[np.ndarray]]:
        """All histories once, shuffled."""
        order = np.random.default_rng((self.seed, epoch)).permutation(len(histories))
        for start in range(0, len(order), self.batch_size):
            yield [histories[i] for i in order[start : start + self.batch_size]]

    @torch.no_grad()
    def scores(self, histories: list[np.ndarray]) -> np.ndarray:
        """Logit of every item as the next one, float32 [B, N]; an empty history scores all items 0."""
        return self.network.eval().logits(histories).cpu().numpy()
