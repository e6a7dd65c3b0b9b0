"""Text features from sentence-transformers, pooled and normalised as the model says."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from genrec.catalog import Catalogue
from genrec.config import Encoder
from genrec.encoders.cache import EncodeBatch, encode_cached, encoder_folder
from genrec.encoders.features import Features
from genrec.encoders.transformers_text import text_keys
from genrec.errors import ConfigError


def load_model(model_name: str, texts: list[str], offline: bool = False) -> EncodeBatch:
    from sentence_transformers import SentenceTransformer  # takes seconds to import

    try:
        model = SentenceTransformer(model_name, local_files_only=offline)
    except (OSError, ValueError) as err:
        raise ConfigError(
            f"encode.text.model {model_name!r}: cannot be loaded ({err}); give the Hugging Face name or the "
            "local folder of a sentence-transformers model"
        ) from err

    def encode_batch(rows: list[int]) -> np.ndarray:
        vectors = model.encode([texts[row] for row in rows], batch_size=len(rows), show_progress_bar=False)
        return np.asarray(vectors, dtype=np.float32)[:, None]

    return encode_batch


def encode_text_sentence(catalogue: Catalogue, settings: Encoder, cache_dir: Path) -> Features:
    """Vectors float32 [N, 1, D] from `settings.model`, frozen; items without text are absent.

    Raises:
        ConfigError: the model cannot be loaded.
    """
    assert settings.model is not None  # the recipe's own check
    model, texts = settings.model, catalogue.texts()
    return encode_cached(
        text_keys(texts),
        encoder_folder(cache_dir, model, {"kind": settings.kind}),
        lambda: load_model(model, texts),
        batch_size=settings.batch_size,
        lengths=[len(text) for text in texts],
    )
