"""Text features from any transformers text model: the last layer's mean over the text's tokens."""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path

import numpy as np

from genrec.catalog import Catalogue
from genrec.config import Encoder
from genrec.encoders.cache import EncodeBatch, encode_cached, encoder_folder
from genrec.encoders.features import Features
from genrec.errors import ConfigError

log = logging.getLogger(__name__)
MAX_TOKENS = 512  # longer texts are cut, earlier where the model takes fewer


def text_keys(texts: list[str]) -> list[str | None]:
    """Content key per text, None for one without a character to read."""
    return [hashlib.sha256(text.encode()).hexdigest() if text.strip() else None for text in texts]


def load_model(model_name: str, texts: list[str], offline: bool = False) -> EncodeBatch:
    import torch  # both take seconds to import
    from transformers import AutoModel, AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(model_name, local_files_only=offline)
        model = AutoModel.from_pretrained(model_name, dtype=torch.float32, local_files_only=offline)
    except (OSError, ValueError) as err:
        raise ConfigError(
            f"encode.text.model {model_name!r}: cannot be loaded ({err}); give the Hugging Face name or the "
            "local folder of a text model with its tokenizer"
        ) from err
    if hasattr(model, "text_model"):  # CLIP and its kin: the other half wants pictures
        model = model.text_model
    elif model.config.is_encoder_decoder:
        model = model.get_encoder()
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise ConfigError(f"{model_name}: its tokenizer has no padding token; add one and save it again")
        tokenizer.pad_token = tokenizer.eos_token
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = model.to(device).eval()
    limit = min(MAX_TOKENS, tokenizer.model_max_length)
    limit = min(limit, getattr(model.config, "max_position_embeddings", limit))

    @torch.inference_mode()
    def encode_batch(rows: list[int]) -> np.ndarray:
        tokens = tokenizer(
            [texts[row] for row in rows], padding=True, truncation=True, max_length=limit, return_tensors="pt"
        ).to(device)
        mask = tokens["attention_mask"][..., None].float()  # [B, T, 1]
        found = model(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"])
        pooled = (found.last_hidden_state * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1)
        return pooled[:, None].cpu().numpy()

    return encode_batch


def encode_text_transformers(catalogue: Catalogue, settings: Encoder, cache_dir: Path) -> Features:
    """Vectors float32 [N, 1, D] from `settings.model`, frozen; items without text are absent.

    Raises:
        ConfigError: the model or its tokenizer cannot be loaded.
    """
    assert settings.model is not None  # the recipe's own check
    model, texts = settings.model, catalogue.texts()
    folder = encoder_folder(cache_dir, model, {"kind": settings.kind, "max_tokens": MAX_TOKENS, "pool": "mean"})
    return encode_cached(
        text_keys(texts),
        folder,
        lambda: load_model(model, texts),
        batch_size=settings.batch_size,
        lengths=[len(text) for text in texts],
    )
