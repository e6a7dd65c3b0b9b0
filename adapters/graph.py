"""User-item and item-item graphs: LightGCN, one graph per modality, and nearest neighbours of content.

Nodes are users, then items. Everything is a product with a sparse matrix that never changes while training.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn


def normalised(rows: Tensor, columns: Tensor, size: int) -> Tensor:
    """``D^-1/2 A D^-1/2`` of edges int64 [E], sparse float32 [size, size]; a node without edges has an empty row."""
    degree = torch.bincount(rows, minlength=size).clamp(min=1).float()
    values = (degree[rows] * degree[columns]).rsqrt()
    made = torch.sparse_coo_tensor(torch.stack([rows, columns]), values, (size, size), check_invariants=True)
    return made.coalesce()


def user_item_graph(histories: list[np.ndarray], users: np.ndarray, n_users: int, n_items: int) -> Tensor:
    """Both directions of every (user, item) of the training histories; sparse [U + N, U + N]."""
    who = np.repeat(users, [len(h) for h in histories])
    what = np.concatenate([*histories, np.empty(0, np.int32)]).astype(np.int64) + n_users
    pairs = torch.from_numpy(np.unique(np.stack([who, what]), axis=1))
    return normalised(torch.cat([pairs[0], pairs[1]]), torch.cat([pairs[1], pairs[0]]), n_users + n_items)


def content_graph(vectors: Tensor, nearest: int) -> Tensor:
    """Every item and its nearest by cosine, made symmetric: vectors [N, F] -> sparse [N, N]."""
    unit = nn.functional.normalize(vectors, dim=-1)
    blocks = [(unit[start : start + 1024] @ unit.T) for start in range(0, len(unit), 1024)]
    best = torch.cat([(b - 2 * torch.eye(len(unit))[i * 1024 : i * 1024 + len(b)]).topk(nearest).indices
                      for i, b in enumerate(blocks)])  # fmt: skip
    rows = torch.arange(len(unit)).repeat_interleave(nearest)
    both = torch.cat([torch.stack([rows, best.flatten()]), torch.stack([best.flatten(), rows])], 1).unique(dim=1)
    return normalised(both[0], both[1], len(unit))


class LightGcn(nn.Module):
    """Mean of 0 .. `layers` steps over the user-item graph (He et al. 2020, arXiv:2002.02126)."""

    layers = 2

    def __init__(self, width: int, n_users: int, modalities: tuple[str, ...]):
        super().__init__()
        self.users = nn.Embedding(n_users, width)
        nn.init.normal_(self.users.weight, std=width**-0.5)

    def forward(self, graph: Tensor, final: Tensor, modal: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """final [N, W] -> users [U, W], items [N, W]."""
        return self.spread(graph, self.users.weight, final)

    def spread(self, graph: Tensor, users: Tensor, items: Tensor) -> tuple[Tensor, Tensor]:
        """One graph's answer for users [U, W] and items [N, W]."""
        x = torch.cat([users, items])
        total = x
        for _ in range(self.layers):
            x = torch.sparse.mm(graph, x)
            total = total + x
        total = total / (self.layers + 1)
        return total[: len(users)], total[len(users) :]


class ModalGcn(LightGcn):
    """A graph per modality, with a user's liking of each, side by side (MMGCN: Wei et al. 2019)."""

    def __init__(self, width: int, n_users: int, modalities: tuple[str, ...]):
        nn.Module.__init__(self)
        self.likings = nn.ParameterDict(
            {m: nn.Parameter(torch.randn(n_users, width) * width**-0.5) for m in modalities}
        )

    def forward(self, graph: Tensor, final: Tensor, modal: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """modal[m] [N, W] -> users [U, M * W], items [N, M * W]."""
        both = [self.spread(graph, self.likings[m], of) for m, of in modal.items()]
        return torch.cat([users for users, _ in both], 1), torch.cat([items for _, items in both], 1)


GRAPHS: dict[str, type[LightGcn]] = {"lightgcn": LightGcn, "per_modality": ModalGcn}
