"""A recommender put together from the tables: readers, fusion, ids, graph, user model, head.

``items`` makes views of some items, ``users_of`` vectors of some histories, ``score`` compares them. A batch reads each
of its items once however often it is named (DICM's embed-once service): `reads` counts them.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from genrec.adapters.fields import Fields
from genrec.adapters.fused import Given, Sizes, mean_vectors
from genrec.adapters.fusion import FUSIONS
from genrec.adapters.graph import GRAPHS, content_graph, user_item_graph
from genrec.adapters.heads import HEADS
from genrec.adapters.item_views import ItemViews
from genrec.adapters.readers import READERS
from genrec.adapters.user_models import USERS
from genrec.planted import Table
from genrec.system_recipe import SystemRecipe

CANDIDATES = 2048  # scored at once
USERS_AT_ONCE = 64


class System(nn.Module):
    """One recipe's model over one table. Parts: readers, fusion, ids, fields, graph, user, head."""

    categories: Tensor
    domains: Tensor
    cold: Tensor
    likest: Tensor
    edges: Tensor

    def __init__(self, recipe: SystemRecipe, table: Table):
        super().__init__()
        item, width = recipe.item, recipe.item.width
        self.modalities = tuple(m for m in table.features if item.modalities is None or m in item.modalities)
        self.mix, self.n_items, self.reads = item.mix, table.n_items, 0
        self.cache: ItemViews | None = None
        sizes = Sizes(width, self.modalities, int(table.categories.max()) + 1, int(table.domains.max()) + 1)
        self.sizes = sizes
        for m in self.modalities:
            self.register_buffer(f"values_{m}", torch.from_numpy(table.features[m].values), persistent=False)
            self.register_buffer(f"present_{m}", torch.from_numpy(table.features[m].present), persistent=False)
        self.register_buffer("categories", torch.from_numpy(table.categories), persistent=False)
        self.register_buffer("domains", torch.from_numpy(table.domains), persistent=False)
        self.register_buffer("cold", torch.from_numpy(table.split.cold), persistent=False)
        self.readers = nn.ModuleDict(
            {
                m: READERS[item.reader.get(m, "linear")](table.features[m].values.shape[2], width, sizes.n_categories)
                for m in self.modalities
            }
        )
        self.fusion = FUSIONS[item.fusion](sizes)
        self.ids = nn.Embedding(table.n_items, width) if item.ids else None
        if self.ids is not None:
            nn.init.normal_(self.ids.weight, std=width**-0.5)
        self.fields = Fields(sizes) if item.mix == "fields" else None
        self.graph = GRAPHS[item.graph](width, table.n_users, self.modalities) if item.graph else None
        if self.graph is not None:
            edges = user_item_graph(table.split.train, table.split.train_users, table.n_users, table.n_items)
            self.register_buffer("edges", edges, persistent=False)
        if item.neighbours:
            raw = torch.cat([F.normalize(self.raw(m), dim=-1) for m in self.modalities], 1)
            self.register_buffer("likest", content_graph(raw, item.neighbours), persistent=False)
        self.neighbours = item.neighbours
        self.user = USERS[recipe.user](sizes, table.n_users)
        self.head = HEADS[recipe.head](sizes)

    def raw(self, m: str) -> Tensor:
        """A modality's features as they came, mean over their tokens: [N, D_m]."""
        return getattr(self, f"values_{m}").mean(1)

    def items(self, rows: Tensor, *, swap: float = 0.0, hide: dict[str, Tensor] | None = None) -> ItemViews:
        """Views of items.

        Args:
            rows: int64 [n], each of which is read.
            swap: share of the items that show their content in place of their id (mix: swap).
            hide: modality -> bool [n], where it is kept from the fusion.
        """
        views = self._read(rows, swap, hide) if self.cache is None or hide is not None else self.cache.at(rows)
        return views if self.fields is None else replace(views, final=self.fields(views))

    def _read(self, rows: Tensor, swap: float, hide: dict[str, Tensor] | None) -> ItemViews:
        self.reads += len(rows)
        category, present, tokens = self.categories[rows], {}, {}
        for m in self.modalities:
            present[m] = getattr(self, f"present_{m}")[rows]
            if hide is not None:
                present[m] = present[m] & ~hide[m]
            tokens[m] = self.readers[m](getattr(self, f"values_{m}")[rows], category)
        ids = None if self.ids is None else self.ids(rows)
        if self.ids is not None and ids is not None and self.neighbours:
            ids = ids + torch.sparse.mm(self.likest, self.ids.weight)[rows]
        if ids is None:
            ids = torch.zeros(len(rows), self.sizes.width, device=rows.device)
        fused = self.fusion(tokens, present, Given(category, self.domains[rows], ids))
        content, cold = fused.content, self.cold[rows]
        modal = mean_vectors(tokens, present) if fused.modal is None else fused.modal
        if self.mix in ("content", "fields"):
            final = content
        elif self.mix == "ids":
            final = ids
        elif self.mix == "sum":
            final = content + ids * ~cold[:, None]
        else:
            gone = cold | (torch.rand(len(rows), device=rows.device) < swap)
            final = torch.where(gone[:, None], content, ids)
        return ItemViews(final, content, ids, modal, category, rows, fused.parts)

    @torch.no_grad()
    def keep_items(self) -> None:
        """Read every item once; `items` answers from that until `cache` is None again."""
        self.cache = self._read(torch.arange(self.n_items, device=self.categories.device), 0.0, None)

    def spread(self, views: ItemViews) -> tuple[Tensor, ItemViews]:
        """Users [U, W'] and items [N, W'] after the graph, from views of the whole catalogue in order."""
        assert self.graph is not None
        users, items = self.graph(self.edges, views.final, views.modal)
        wide = ItemViews(items, views.content, views.ids, views.modal, views.category, views.rows, views.parts)
        return users, wide

    def users_of(
        self, users: Tensor, history: ItemViews, there: Tensor, target: ItemViews, graph_users: Tensor | None = None
    ) -> Tensor:
        """User vectors [B, C or 1, W]."""
        if graph_users is not None:
            return graph_users[users][:, None]
        vectors: Tensor = self.user(users, history, there, target)
        return vectors

    def score(self, user: Tensor, target: ItemViews) -> Tensor:
        """user [B, C or 1, W], target views [B or 1, C, ...] -> [B, C]."""
        scores: Tensor = self.head(user, target)
        return scores

    @torch.no_grad()
    def all_scores(self, users: Tensor, histories: Tensor, hide: dict[str, Tensor] | None = None) -> Tensor:
        """Every item's score for every history.

        Args:
            users: int64 [B].
            histories: int64 [B, T], -1 where empty.
            hide: modality -> bool [N], kept from the fusion.

        Returns:
            float32 [B, N].
        """
        every = self.items(torch.arange(self.n_items, device=users.device), hide=hide)
        graph_users = None
        if self.graph is not None:
            graph_users, every = self.spread(every)
        rows = []
        for start in range(0, len(users), USERS_AT_ONCE):
            part = slice(start, start + USERS_AT_ONCE)
            there = histories[part] >= 0
            history = every.at(histories[part].clamp(min=0))
            scores = []
            for first in range(0, self.n_items, CANDIDATES):
                which = torch.arange(first, min(first + CANDIDATES, self.n_items), device=users.device)
                target = every.at(which[None])
                scores.append(self.score(self.users_of(users[part], history, there, target, graph_users), target))
            rows.append(torch.cat(scores, 1))
        return torch.cat(rows)

    @torch.no_grad()
    def pair_scores(self, users: Tensor, histories: Tensor, items: Tensor) -> Tensor:
        """The score of one item for each history: users and items int64 [n], histories int64 [n, T] -> float32 [n]."""
        every = self.items(torch.arange(self.n_items, device=users.device))
        graph_users = None
        if self.graph is not None:
            graph_users, every = self.spread(every)
        scores = []
        for start in range(0, len(users), CANDIDATES):
            part = slice(start, start + CANDIDATES)
            there = histories[part] >= 0
            history, target = every.at(histories[part].clamp(min=0)), every.at(items[part][:, None])
            user = self.users_of(users[part], history, there, target, graph_users)
            scores.append(self.score(user, target)[:, 0])
        return torch.cat(scores)
