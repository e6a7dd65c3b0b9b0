"""Learned maps from an item's features to K vectors of the LLM's width: its soft tokens."""

from __future__ import annotations

from typing import Any

from torch import nn

from genrec.adapters.pooled import LinearAdapter, MlpAdapter
from genrec.adapters.qformer import QFormerAdapter
from genrec.errors import ConfigError

ADAPTERS: dict[str, type[nn.Module]] = {"qformer": QFormerAdapter, "mlp": MlpAdapter, "linear": LinearAdapter}


def build_adapter(kind: str, dims: dict[str, int], soft_tokens: int, dim: int, **settings: Any) -> nn.Module:
    """The adapter of that kind.

    Args:
        kind: a key of `ADAPTERS`.
        dims: modality -> D_m; at least one.
        soft_tokens: K.
        dim: D.
        settings: the adapter's own arguments; see its class.

    Raises:
        ConfigError: unknown kind, or no modality.
    """
    if kind not in ADAPTERS:
        raise ConfigError(f"adapter kind {kind!r}; there are {', '.join(ADAPTERS)}")
    if not dims:
        raise ConfigError("soft tokens need at least one of encode.text and encode.image; both are null")
    return ADAPTERS[kind](dims, soft_tokens, dim, **settings)
