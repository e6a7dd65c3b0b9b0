"""A published system behind the beams: it scores what they found, and its scores move the order.

The beams' score of an item is a log-probability, a system's has a scale of its own. So within a list the system's
scores are brought to mean 0 and deviation 1, and `weight` says how many nats one deviation is worth::

    items a b c: log P -1.0 -1.1 -4.0, deviations -1.2 1.2 0, weight 0.5 -> order b a c
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from genrec.adapters.fused import Sizes
from genrec.adapters.heads import HEADS
from genrec.adapters.item_views import ItemViews
from genrec.adapters.self_attention import left_pad
from genrec.adapters.small_parts import put_in
from genrec.adapters.system import USERS_AT_ONCE, System
from genrec.adapters.user_models import LONGEST, USERS
from genrec.decode import Ranked
from genrec.errors import ConfigError
from genrec.system_recipe import SMALL, SystemRecipe

VIEWS, MODAL = "views.", "views.modal."  # of the item vectors in a saved file


class Reranker(nn.Module):
    """The user model and the head of a trained system, with the vectors that its items had.

    It knows the items that it was made with. Any other one stands at the list's mean, and is left out of histories.
    """

    def __init__(self, about: dict[str, Any], views: ItemViews, weight: float):
        """
        Args:
            about: "system", "user", "head", "sizes"; "put_in", pairs of what was put into the user model and its first
                block; "modal", the order of the views' modalities.
            views: of all items in catalogue order.
            weight: nats a deviation of the system's scores is worth.
        """
        super().__init__()
        self.about, self.views, self.weight = about, views, weight
        sizes = Sizes(**{**about["sizes"], "modalities": tuple(about["sizes"]["modalities"])})
        self.user = USERS[about["user"]](sizes, 1)
        self.head = HEADS[about["head"]](sizes)
        for kind, first in about["put_in"]:
            put_in(self.user, kind, sizes.width, first)
        self.eval().requires_grad_(False)

    @classmethod
    def of_system(cls, recipe: SystemRecipe, system: System, weight: float) -> Reranker:
        """What is left of a trained system when its items are read once.

        Raises:
            ConfigError: its user vectors are of the users that it was trained on, not of histories.
        """
        check_reads_histories(recipe)
        device = next(iter(system.buffers())).device
        with torch.no_grad():
            views = system.items(torch.arange(system.n_items, device=device))
        put = [(stage.tune["user"], stage.tune_from) for stage in recipe.stages if stage.tune.get("user") in SMALL]
        sizes = dataclasses.asdict(system.sizes)
        about: dict[str, Any] = {"system": recipe.name, "user": recipe.user, "head": recipe.head, "sizes": sizes}
        about |= {"put_in": put, "modal": list(views.modal)}
        made = cls(about, dataclasses.replace(views.to("cpu"), parts={}), weight)
        made.user.load_state_dict(system.user.state_dict())
        made.head.load_state_dict(system.head.state_dict())
        return made

    @torch.no_grad()
    def forward(self, histories: Sequence[Sequence[int] | np.ndarray], items: Tensor) -> Tensor:
        """The system's scores within each list, in deviations from the list's mean.

        Args:
            histories: B histories of catalogue rows, oldest first.
            items: int64 [B, W], -1 where a list has ended.

        Returns:
            float32 [B, W] on the CPU; 0 for items that it does not know, and for users of whom it knows no event.
        """
        items = items.cpu()
        parts = [slice(at, at + USERS_AT_ONCE) for at in range(0, len(items), USERS_AT_ONCE)]
        return torch.cat([self._deviations(histories[part], items[part]) for part in parts])

    def _deviations(self, histories: Sequence[Sequence[int] | np.ndarray], items: Tensor) -> Tensor:
        n_known = len(self.views.rows)
        read = [np.array([row for row in of if row < n_known][-LONGEST:], np.int64) for of in histories]
        judged = (items >= 0) & (items < n_known) & torch.tensor([len(of) > 0 for of in read])[:, None]
        if not judged.any():
            return torch.zeros(items.shape)
        padded = left_pad(read)  # [B, T]
        history = self.views.at(padded.clamp(min=0))
        target = self.views.at(items.clamp(0, n_known - 1))
        nobody = torch.zeros(len(read), dtype=torch.int64)
        scores = self.head(self.user(nobody, history, padded >= 0, target), target)
        count = judged.sum(1, keepdim=True).clamp(min=1)
        away = (scores - (scores * judged).sum(1, keepdim=True) / count) * judged
        deviation = (away.square().sum(1, keepdim=True) / count).sqrt()
        return away / deviation.clamp(min=1e-6)

    def reorder(self, histories: Sequence[Sequence[int] | np.ndarray], ranked: Ranked) -> Ranked:
        """The same items, each with its own score, by the sum of score and `weight` times deviations."""
        return moved(ranked, self.weight * self(histories, ranked.items)) if self.weight else ranked

    def save(self, path: Path) -> None:
        """Write all of it."""
        views = {f"{VIEWS}{name}": getattr(self.views, name) for name in ("final", "content", "ids", "category")}
        views |= {f"{MODAL}{m}": of for m, of in self.views.modal.items()}
        tensors = {  # copies: some views are one
            name: of.clone().contiguous() for name, of in (self.state_dict() | views).items()
        }
        save_file(tensors, path, {"about": json.dumps(self.about), "weight": str(self.weight)})

    @classmethod
    def load(cls, path: Path) -> Reranker:
        """Read what `save` wrote.

        Raises:
            OSError, SafetensorError, KeyError, RuntimeError: no whole file of this kind.
        """
        with safe_open(path, "pt") as file:
            said = file.metadata() or {}
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dictionary
        stored = {name: state.pop(name) for name in list(state) if name.startswith(VIEWS)}
        about = json.loads(said["about"])
        modal = {m: stored.pop(f"{MODAL}{m}") for m in about["modal"]}  # heads read them in this order
        plain = {name.removeprefix(VIEWS): of for name, of in stored.items()}
        made = cls(
            about,
            ItemViews(**plain, modal=modal, rows=torch.arange(len(plain["final"]))),
            float(said["weight"]),
        )
        made.load_state_dict(state)
        return made


def moved(ranked: Ranked, by: Tensor) -> Ranked:
    """The same items, each with its own score, in the order of score plus `by` [B, W]."""
    order = (ranked.scores + by.to(ranked.scores.device)).argsort(dim=1, descending=True, stable=True)
    return Ranked(ranked.items.gather(1, order), ranked.scores.gather(1, order))


def check_reads_histories(recipe: SystemRecipe) -> None:
    """Raises ConfigError for a system whose user vectors are of the users that it was trained on."""
    if recipe.item.graph or recipe.user == "learned":
        cause = f"item.graph: {recipe.item.graph}" if recipe.item.graph else "user: learned"
        raise ConfigError(
            f"{recipe.name}: {cause}: it has a vector for each user of the training log and none for a history, so it "
            "cannot stand behind the beams; take one whose user model reads histories, such as user: attention"
        )
