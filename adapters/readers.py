"""Readers: one modality's features to tokens of a common width; the top of what systems call an item encoder."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class LinearReader(nn.Module):
    """A normalisation and a linear map for every vector."""

    def __init__(self, dim: int, width: int, n_categories: int):
        super().__init__()
        self.map = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, width))

    def forward(self, values: Tensor, category: Tensor) -> Tensor:
        """values [B, T, D_m], category int64 [B] -> [B, T, W]."""
        return self.map(values)


class PatchReader(nn.Module):
    """Two layers over patches, then their mean; what it says depends on the picture alone (VGG's top in DICM)."""

    def __init__(self, dim: int, width: int, n_categories: int):
        super().__init__()
        self.first = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, 2 * width), nn.GELU())
        self.last = nn.Linear(2 * width, width)

    def forward(self, values: Tensor, category: Tensor) -> Tensor:
        """values [B, T, D_m], category int64 [B] -> [B, 1, W]."""
        return self.last(self.first(values)).mean(1, keepdim=True)


class CategoryReader(nn.Module):
    """Channel and place attention that the category steers (CSCNN: Liu et al. 2020, arXiv:2006.10337).

    After the first layer every channel is scaled by a gate of the category and the picture's mean, and every patch by a
    softmax over places; so the category decides what of a picture is read, not only what is added to it.
    """

    steers = True

    def __init__(self, dim: int, width: int, n_categories: int):
        super().__init__()
        inner = 2 * width
        self.first = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, inner), nn.GELU())
        self.category = nn.Embedding(n_categories, inner)
        nn.init.zeros_(self.category.weight)  # steers nothing until it has learned to
        self.common = nn.Parameter(torch.zeros(inner))  # how any picture is read
        self.channel = nn.Linear(2 * inner, inner)
        self.places = nn.Parameter(torch.zeros(8, inner))  # pictures of at most 8 patches: finer ones are pooled
        self.place = nn.Linear(inner, inner)
        self.last, self.late = nn.Linear(inner, width), nn.Linear(inner, width)

    def forward(self, values: Tensor, category: Tensor) -> Tensor:
        """values [B, T, D_m], category int64 [B] -> [B, 1, W]."""
        if values.shape[1] > len(self.places):
            values = nn.functional.adaptive_avg_pool1d(values.transpose(1, 2), len(self.places)).transpose(1, 2)
        read = self.first(values)
        steer = self.common + self.category(category) * self.steers
        read = read * torch.sigmoid(self.channel(torch.cat([read.mean(1), steer], 1)))[:, None] * 2
        keys = self.place(read + self.places[: read.shape[1]])  # [B, T, inner]
        weights = torch.softmax((keys * steer[:, None]).sum(-1) / keys.shape[-1] ** 0.5, 1)
        said = self.last((weights[..., None] * read).sum(1, keepdim=True))
        return said + self.late(self.category(category))[:, None]


class LateCategoryReader(CategoryReader):
    """The same attention, steered by nothing; the category is only added to what was read."""

    steers = False


class FrameReader(nn.Module):
    """Convolutions over time, then the mean of what they find: for sounds as frames (van den Oord et al. 2013)."""

    def __init__(self, dim: int, width: int, n_categories: int):
        super().__init__()
        inner = 4 * width
        self.waves = nn.Sequential(
            nn.Conv1d(dim, inner, 5, padding=2), nn.GELU(), nn.Conv1d(inner, inner, 3, padding=1), nn.GELU()
        )
        self.last = nn.Linear(inner, width)

    def forward(self, values: Tensor, category: Tensor) -> Tensor:
        """values [B, T, D_m], category int64 [B] -> [B, 1, W]."""
        return self.last(self.waves(values.transpose(1, 2)).mean(2))[:, None]


READERS: dict[str, type[nn.Module]] = {
    "linear": LinearReader,
    "patches": PatchReader,
    "late_category": LateCategoryReader,
    "category": CategoryReader,
    "frames": FrameReader,
}
