"""Semantic ids: L codes per item, first codes shared by similar items, one id per item.

Item vectors are quantised level by level, by residual k-means or an RQ-VAE (TIGER, Rajput et al. 2023); items
that land on one id are moved apart (`genrec.collisions`). The statistics, encoder and codebooks stay frozen
afterwards, so a new item gets its id without touching the others.
"""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors.numpy import load_file, save_file

from genrec.artefacts import write_json
from genrec.collisions import check_capacity, resolve
from genrec.errors import ArtefactError, ConfigError
from genrec.item_vectors import ItemSpace, cooccurrence_factors
from genrec.kmeans import assign, residual_kmeans
from genrec.rqvae import fit_rqvae

if TYPE_CHECKING:
    from genrec.encoders import Features

log = logging.getLogger(__name__)
METHODS = ("residual_kmeans", "rqvae")
CODES, TENSORS, META = "codes.npy", "quantiser.safetensors", "semantic_ids.json"


@dataclass(frozen=True)
class SemanticIds:
    """The ids of a catalogue, and what gave them.

    Attributes:
        codes: int32 [N, L], unique rows.
        n_codes: codes per level, C.
        space: frozen statistics of the item vectors.
        encoder: weight, bias, weight, bias, ... of the RQ-VAE's encoder (ReLU between); empty for residual
        k-means. codebooks: float32 [L, C, d].
        report: JSON-able: collisions before they were resolved, moved items, usage and entropy per level.
    """

    codes: np.ndarray
    n_codes: int
    space: ItemSpace
    encoder: tuple[np.ndarray, ...]
    codebooks: np.ndarray
    report: dict[str, Any] = field(default_factory=dict)

    def latents(self, vectors: np.ndarray) -> np.ndarray:
        """What the codebooks code: float32 [N, D] (from `space.vectors`) -> float32 [N, d]."""
        for i in range(0, len(self.encoder), 2):
            if i:
                vectors = np.maximum(vectors, 0)
            vectors = vectors @ self.encoder[i].T + self.encoder[i + 1]
        return vectors

    def extend(self, features: dict[str, Features]) -> SemanticIds:
        """Append ids for new items; no old id changes.

        Args:
            features: of the new items only, from the encoders of the fit.

        Returns:
            semantic ids of ``N + new`` items; the report's ``extensions`` gains one entry.

        Raises:
            DataError: the features do not fit the frozen statistics.
            ConfigError: fewer free ids than new items.
        """
        return self._append(self.space.vectors(features))

    def _append(self, vectors: np.ndarray) -> SemanticIds:
        latents = self.latents(vectors)
        nearest, _ = assign(latents, self.codebooks)
        codes = resolve(latents, self.codebooks, nearest, self.codes)
        entry = _report(latents, self.codebooks, nearest, codes, self.codes)
        report = {**self.report, "extensions": [*self.report.get("extensions", []), entry]}
        return replace(self, codes=np.concatenate([self.codes, codes]), report=report)

    def save(self, folder: Path) -> None:
        """Write the codes, the quantiser and the report into `folder`."""
        folder.mkdir(parents=True, exist_ok=True)
        np.save(folder / CODES, self.codes)
        tensors = {"codebooks": self.codebooks}
        tensors |= {f"encoder.{i}": value for i, value in enumerate(self.encoder)}
        tensors |= {f"mean.{name}": value for name, value in self.space.means.items()}
        tensors |= {f"scale.{name}": value for name, value in self.space.scales.items()}
        save_file({name: np.ascontiguousarray(value) for name, value in tensors.items()}, folder / TENSORS)
        meta = {
            "n_codes": self.n_codes,
            "modalities": list(self.space.means),
            "encoder_tensors": len(self.encoder),
            "collaborative_dim": self.space.collaborative_dim,
            "report": self.report,
        }
        write_json(folder / META, meta)

    @classmethod
    def load(cls, folder: Path) -> SemanticIds:
        """Read what `save` wrote.

        Raises:
            ArtefactError: a file is missing or damaged.
        """
        try:
            codes = np.load(folder / CODES)
            tensors = load_file(folder / TENSORS)
            meta = json.loads((folder / META).read_text(encoding="utf-8"))
            means = {name: tensors[f"mean.{name}"] for name in meta["modalities"]}
            scales = {name: tensors[f"scale.{name}"] for name in meta["modalities"]}
            encoder = tuple(tensors[f"encoder.{i}"] for i in range(meta["encoder_tensors"]))
            space = ItemSpace(means, scales, meta["collaborative_dim"])
            return cls(codes, meta["n_codes"], space, encoder, tensors["codebooks"], meta["report"])
        except Exception as err:  # safetensors raises its own class, derived from Exception alone
            raise ArtefactError(
                f"{folder}: no whole semantic ids there ({type(err).__name__}: {err}); run the semantic_ids stage again"
            ) from err


def fit_semantic_ids(
    features: dict[str, Features],
    *,
    method: str,
    levels: int,
    codes: int,
    seed: int,
    histories: list[np.ndarray] | None = None,
    collaborative_dim: int = 0,
    collaborative_weight: float = 0.5,
    fit_on: np.ndarray | None = None,
) -> SemanticIds:
    """Fit a quantiser and give every item its id.

    Args:
        features: modality -> features of the same N items.
        method: ``residual_kmeans`` or ``rqvae``.
        levels: codes per item, L.
        codes: codes per level, C.
        seed: the ids follow from it.
        histories: int32 training histories; needed when `collaborative_dim` is above 0.
        collaborative_dim: width of the co-occurrence factors that join the content.
        collaborative_weight: length of these factors, where each modality's vector has length 1 on average.
        fit_on: bool [N], the items that shape statistics and codebooks (None: all); the others get ids
            afterwards, as `extend` gives them, so they change nothing for these.

    Raises:
        ConfigError: unknown method, nothing to fit on, or fewer ids than items.
        DataError: features that are not finite or cover different numbers of items.
    """
    if method not in METHODS:
        raise ConfigError(f"semantic_ids.method {method!r} is unknown; valid: {', '.join(METHODS)}")
    n_items = len(next(iter(features.values())).values) if features else 0
    fit_on = np.ones(n_items, bool) if fit_on is None else np.asarray(fit_on, bool)
    if fit_on.shape != (n_items,) or (n_items and not fit_on.any()):
        raise ConfigError(
            f"fit_on: expected bool [{n_items}] with a true entry, found {fit_on.sum()} of {fit_on.shape}"
        )
    check_capacity(n_items, levels, codes)
    space = ItemSpace.fit(features, fit_on, collaborative_dim)
    factors = None
    if collaborative_dim:
        factors = cooccurrence_factors(histories or [], n_items, collaborative_dim, seed) * collaborative_weight
    vectors = space.vectors(features, factors)
    encoder: tuple[np.ndarray, ...] = ()
    if method == "rqvae":
        encoder, codebooks = fit_rqvae(vectors[fit_on], levels=levels, codes=codes, seed=seed)
    else:
        codebooks = residual_kmeans(vectors[fit_on], levels=levels, codes=codes, seed=seed)
    none = np.empty((0, levels), np.int32)
    fitted = SemanticIds(none, codes, space, encoder, codebooks)
    for rows in (fit_on, ~fit_on):
        if rows.any():
            fitted = fitted._append(vectors[rows])
    by_row = np.empty_like(fitted.codes)
    by_row[np.concatenate([np.flatnonzero(fit_on), np.flatnonzero(~fit_on)])] = fitted.codes
    latents = fitted.latents(vectors)
    nearest, _ = assign(latents, codebooks)
    report = {
        "method": method,
        "fitted_on": int(fit_on.sum()),
        **_report(latents, codebooks, nearest, by_row, none),
    }
    log.info("semantic ids: %d items, %d moved off shared ids", n_items, report["moved"])
    return replace(fitted, codes=by_row, report=report)


def _report(
    latents: np.ndarray, codebooks: np.ndarray, nearest: np.ndarray, codes: np.ndarray, taken: np.ndarray
) -> dict[str, Any]:
    n_items, n_levels = codes.shape
    _, group, sizes = np.unique(np.concatenate([taken, nearest]), axis=0, return_inverse=True, return_counts=True)
    moved = (nearest != codes).any(1)
    spread = float(((latents - latents.mean(0)) ** 2).sum(1).mean()) if n_items else 0.0
    before, after = (_errors(latents, codebooks, which) for which in (nearest, codes))
    levels = []
    for level in range(n_levels):
        counts = np.bincount(codes[:, level], minlength=codebooks.shape[1])
        share = counts[counts > 0] / max(n_items, 1)
        entropy = float(-(share * np.log2(share)).sum())
        _, prefix_sizes = np.unique(codes[:, : level + 1], axis=0, return_counts=True)
        levels.append(
            {
                "codes_used": int((counts > 0).sum()),
                "entropy_bits": entropy,
                "perplexity": float(2**entropy),
                "max_items_per_prefix": int(prefix_sizes.max(initial=0)),
            }
        )
    return {
        "items": n_items,
        "unique_before": len(np.unique(nearest, axis=0)),
        "collided_share": float((sizes[group.ravel()][len(taken) :] > 1).mean()) if n_items else 0.0,
        "moved": int(moved.sum()),
        "mean_error": float(before.mean()) if n_items else 0.0,  # squared distance to the nearest codes' sum
        "relative_error": float(before.mean()) / spread if spread else 0.0,
        "mean_extra_error": float((after - before)[moved].mean()) if moved.any() else 0.0,
        "levels": levels,
    }


def _errors(latents: np.ndarray, codebooks: np.ndarray, codes: np.ndarray) -> np.ndarray:
    rest = latents.copy()
    for level, codebook in enumerate(codebooks):
        rest -= codebook[codes[:, level]]
    return (rest**2).sum(1, dtype=np.float64)
