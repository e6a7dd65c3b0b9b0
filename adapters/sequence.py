"""The order of a history: a small self-attentive ranker's logits, as a score for every item.

Neighbours and profiles read a history as a bag that fades; in a long one the order says more. The network is SASRec's,
trained alone on the same histories; `weight` says how much its logits count beside the other scores. In effect a
product of two experts, the generator and SASRec, as an ensemble of them would be.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from genrec.adapters.histories import Histories
from genrec.adapters.self_attention import Network

HEADS = 2
NETWORK = "network."  # of its weights in a saved file
FEATURES = "features"


class SequenceScores(nn.Module):
    """``score(i) = weight * logit(i)`` after the newest event; 0 for an empty history."""

    weight: Tensor  # float32 scalar

    def __init__(self, network: Network, weight: float):
        """
        Args:
            network: trained; it stays as it is.
            weight: nats per nat of its logits.
        """
        super().__init__()
        self.network = network.eval().requires_grad_(False)
        self.register_buffer("weight", torch.tensor(weight))

    def forward(self, histories: Histories) -> Tensor:
        """B histories of catalogue rows, oldest first -> float32 [B, N]."""
        if not self.weight:
            return self.weight.new_zeros(len(histories), self.network.items.num_embeddings)
        return self.weight * self.network.logits(histories)

    def grown(self, n_items: int, features: Tensor | None, unseen: Tensor) -> SequenceScores:
        """The same for N' items; a new one's own vector is the mean of those of the items that no history held.

        Args:
            n_items: N'.
            features: float32 [N', F], None where the network reads none.
            unseen: bool [N], items without training events; with none among them a new item's own vector is zeros.
        """
        state = self.tensors()
        vectors = state[f"{NETWORK}items.weight"]
        new = vectors[unseen].mean(0) if unseen.any() else torch.zeros_like(vectors[0])
        state[f"{NETWORK}items.weight"] = torch.cat([vectors, new.expand(n_items - len(vectors), -1)])
        if features is not None:
            state[FEATURES] = features
        return SequenceScores.of_tensors(state)

    def tensors(self) -> dict[str, Tensor]:
        """What `of_tensors` needs: weights, features, weight; float32."""
        state = {f"{NETWORK}{name}": of for name, of in self.network.state_dict().items()}
        if self.network.features is not None:
            state[FEATURES] = self.network.features
        return state | {"weight": self.weight}

    @classmethod
    def of_tensors(cls, state: dict[str, Tensor]) -> SequenceScores:
        """The inverse of `tensors`; KeyError where something is missing."""
        weights = {name.removeprefix(NETWORK): of for name, of in state.items() if name.startswith(NETWORK)}
        n_items, width = weights["items.weight"].shape
        network = Network(
            n_items,
            max_history=len(weights["ages.weight"]),
            width=width,
            layers=len({name.split(".")[1] for name in weights if name.startswith("blocks.")}),
            heads=HEADS,
            dropout=0.0,
            features=state.get(FEATURES),
        )
        network.load_state_dict(weights)
        return cls(network, float(state["weight"]))

    def save(self, path: Path) -> None:
        """Write all of it."""
        save_file({name: of.detach().cpu().contiguous() for name, of in self.tensors().items()}, path)

    @classmethod
    def load(cls, path: Path) -> SequenceScores:
        """Read what `save` wrote."""
        return cls.of_tensors(load_file(path))
