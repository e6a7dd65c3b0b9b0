"""An item as a client sends it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class SentItem:
    """
    Attributes:
        item_id: its id.
        fields: the catalogue's other fields, without pictures.
        picture: a file's bytes; None: the picture stays as it is.
    """

    item_id: str
    fields: Mapping[str, Any]
    picture: bytes | None
