"""Frozen encoders: item text and pictures -> item features.

The tables below are the choices; an encoder is a function `(catalogue, settings, cache_dir) -> Features`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

from genrec.catalog import Catalogue
from genrec.config import Encoder
from genrec.encoders.builtin_image import encode_image_builtin
from genrec.encoders.builtin_text import encode_text_builtin
from genrec.encoders.features import Features
from genrec.encoders.precomputed import encode_precomputed
from genrec.encoders.sentence import encode_text_sentence
from genrec.encoders.transformers_image import encode_image_transformers
from genrec.encoders.transformers_text import encode_text_transformers
from genrec.errors import ConfigError, DataError

__all__ = ["ENCODERS", "Features", "encode"]
log = logging.getLogger(__name__)

ENCODERS: dict[str, dict[str, Callable[[Catalogue, Encoder, Path], Features]]] = {
    "text": {
        "builtin": encode_text_builtin,
        "transformers": encode_text_transformers,
        "sentence_transformers": encode_text_sentence,
        "precomputed": encode_precomputed,
    },
    "image": {
        "builtin": encode_image_builtin,
        "transformers": encode_image_transformers,
        "precomputed": encode_precomputed,
    },
}


def encode(catalogue: Catalogue, modality: str, settings: Encoder, cache_dir: Path) -> Features:
    """Features of every item for one modality.

    Args:
        catalogue: N items.
        modality: ``"text"`` or ``"image"``.
        settings: which encoder, and its settings.
        cache_dir: vectors of unchanged items are kept here between runs; may be shared by all encoders.

    Returns:
        Values float32 [N, T_m, D_m], present bool [N]; rows of absent items are zeros.

    Raises:
        ConfigError: there is no such modality, no such encoder for it, or its model cannot be loaded.
        DataError: no item has this modality, or a file cannot be read.
    """
    if modality not in ENCODERS:
        raise ConfigError(f"unknown modality {modality!r}; valid: {list(ENCODERS)}")
    kinds = ENCODERS[modality]
    if settings.kind not in kinds:
        raise ConfigError(f"encode.{modality}.kind {settings.kind!r} does not exist; valid: {list(kinds)}")
    nothing = f"no item of the catalogue has {modality} to encode; set encode.{modality}: null in the recipe"
    has_any = any(text.strip() for text in catalogue.texts()) if modality == "text" else any(catalogue.images)
    if settings.kind != "precomputed" and not has_any:
        raise DataError(nothing)
    features = kinds[settings.kind](catalogue, settings, cache_dir)
    if not features.present.any():
        raise DataError(nothing)
    log.info("%s: %s, %d absent", modality, list(features.values.shape), int((~features.present).sum()))
    return features
