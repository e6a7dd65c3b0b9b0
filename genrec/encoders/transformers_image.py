"""Picture features from any transformers vision model: CLIP, SigLIP, DINO, ViT, MobileNet, ..."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from genrec.artefacts import file_hash
from genrec.catalog import Catalogue
from genrec.config import Encoder
from genrec.encoders.cache import EncodeBatch, encode_cached, encoder_folder
from genrec.encoders.features import Features
from genrec.errors import ConfigError
from genrec.pictures import load_picture

_MAX_PIXELS = 40_000_000


def load_model(model_name: str, paths: list[str | None], patches: bool, offline: bool = False) -> EncodeBatch:
    import torch  # both take seconds to import
    from transformers import AutoImageProcessor, AutoModel

    try:
        processor = AutoImageProcessor.from_pretrained(
            model_name, backend="pil", local_files_only=offline
        )  # the same pixels with or without torchvision
        model = AutoModel.from_pretrained(model_name, dtype=torch.float32, local_files_only=offline)
    except (OSError, ValueError, ImportError) as err:
        raise ConfigError(
            f"encode.image.model {model_name!r}: cannot be loaded ({err}); give the Hugging Face name or the "
            "local folder of a vision model with its image processor"
        ) from err
    if hasattr(model, "vision_model"):  # CLIP, SigLIP: the other half wants text
        model = model.vision_model
    if model.main_input_name != "pixel_values":
        raise ConfigError(
            f"encode.image.model {model_name!r}: {type(model).__name__} reads {model.main_input_name}, not "
            "pictures; give a vision model"
        )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = model.to(device).eval()

    @torch.inference_mode()
    def encode_batch(rows: list[int]) -> np.ndarray:
        pictures = [load_picture(Path(str(paths[row])), _MAX_PIXELS) for row in rows]
        found = model(**processor(images=pictures, return_tensors="pt").to(device))
        tokens = found.last_hidden_state
        if tokens.dim() == 4:  # a feature map, [B, D, H, W] -> [B, H * W, D], row by row
            tokens = tokens.flatten(2).transpose(1, 2)
        if patches:
            values = tokens
        elif found.get("image_embeds") is not None:
            values = found.image_embeds[:, None]
        elif found.get("pooler_output") is not None:
            values = found.pooler_output.flatten(1)[:, None]  # [B, D] or [B, D, 1, 1]
        else:
            values = tokens.mean(dim=1, keepdim=True)
        return values.float().cpu().numpy()

    return encode_batch


def encode_image_transformers(catalogue: Catalogue, settings: Encoder, cache_dir: Path) -> Features:
    """Vectors from `settings.model`, frozen: float32 [N, 1, D], or [N, T, D] with `settings.patches`.

    The pooled vector is the model's own where it has one, else the mean of the tokens. Items without a
    picture are absent.

    Raises:
        ConfigError: the model or its image processor cannot be loaded.
        DataError: a picture cannot be read.
    """
    assert settings.model is not None  # the recipe's own check
    model, paths = settings.model, catalogue.images
    return encode_cached(
        [None if path is None else file_hash(Path(path)) for path in paths],
        encoder_folder(cache_dir, model, {"kind": settings.kind, "patches": settings.patches}),
        lambda: load_model(model, paths, settings.patches),
        batch_size=settings.batch_size,
    )
