"""A run's encoder for items that came after it: nothing is fitted or fetched."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np

from genrec.catalog import Catalogue
from genrec.config import Encoder
from genrec.encoders import sentence, transformers_image, transformers_text
from genrec.encoders.builtin_image import encode_image_fitted
from genrec.encoders.builtin_text import encode_text_fitted
from genrec.encoders.cache import EncodeBatch
from genrec.encoders.features import Features
from genrec.errors import ConfigError

log = logging.getLogger(__name__)


class FrozenEncoder:
    """One modality's encoder, loaded when first asked and kept. For one thread."""

    def __init__(self, modality: str, settings: Encoder, fitted: dict[str, np.ndarray], shape: tuple[int, int]) -> None:
        """
        Args:
            modality: "text" or "image".
            settings: of the run.
            fitted: the run's `Features.fitted`.
            shape: the run's (T_m, D_m).
        """
        self.modality, self.settings, self.fitted, self.shape = modality, settings, fitted, shape
        self._contents: list[Any] = []  # what the loaded model reads rows of
        self._model: EncodeBatch | None = None

    def encode(self, catalogue: Catalogue) -> Features:
        """Features of every item; those without this modality are absent.

        Raises:
            ConfigError: the encoder cannot run here, or is not the run's any more.
            DataError: a picture cannot be read.
        """
        contents: Sequence[str | None] = catalogue.images
        if self.modality == "text":
            contents = [text if text.strip() else None for text in catalogue.texts()]
        if self.settings.kind == "builtin":
            if not self.fitted:
                raise ConfigError(
                    f"encode.{self.modality}: the run kept nothing of its built-in encoder, as runs of older versions "
                    "did; run `genrec run RECIPE --force` and export again"
                )
            if self.modality == "text":
                return encode_text_fitted(catalogue.texts(), self.fitted)
            return encode_image_fitted(contents, self.fitted)
        values = np.zeros((len(contents), *self.shape), np.float32)
        present = np.array([content is not None for content in contents])
        self._contents[:] = [content for content in contents if content is not None]
        if self._contents:
            values[present] = self._by_model()
        return Features(values, present)

    def _by_model(self) -> np.ndarray:
        """float32 [present, T_m, D_m]."""
        if self._model is None:
            self._model = self._load()
        rows, size = range(len(self._contents)), self.settings.batch_size
        found = np.concatenate([self._model(list(rows[at : at + size])) for at in rows[::size]])
        if found.shape[1:] != self.shape:
            raise ConfigError(
                f"encode.{self.modality}.model {self.settings.model!r} gives {list(found.shape[1:])} values per item "
                f"now, and gave the run {list(self.shape)}; bring back the model that the run had"
            )
        return found

    def _load(self) -> EncodeBatch:
        settings, model = self.settings, str(self.settings.model)
        if settings.kind == "precomputed":
            raise ConfigError(
                f"encode.{self.modality}: the run's features came from a file, so nothing here can make those of a "
                "later item; run the recipe again with the item in its catalogue"
            )
        log.info("loading the encoder of %s: %s", self.modality, model)
        if self.modality == "image":
            return transformers_image.load_model(model, self._contents, settings.patches, True)
        if settings.kind == "sentence_transformers":
            return sentence.load_model(model, self._contents, True)
        return transformers_text.load_model(model, self._contents, True)
