"""Vectors kept by content: an item is encoded again only when its text or picture, or the encoder, changed.

A cache folder belongs to one encoder with one set of settings. It holds shards, `.npz` files with the content
keys and the vectors of some items; each is written whole or not at all, so a killed run keeps what it did.
"""

from __future__ import annotations

import logging
import os
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from genrec.artefacts import file_hash, key_of
from genrec.encoders.features import Features
from genrec.errors import ArtefactError

log = logging.getLogger(__name__)
SHARD_ITEMS = 512  # items encoded between two writes, rounded up to whole batches

EncodeBatch = Callable[[list[int]], np.ndarray]  # item rows -> float32 [rows, T, D]


def encoder_folder(cache_dir: Path, model: str, settings: Mapping[str, Any]) -> Path:
    """The cache folder of one encoder; a local model is known by its files' content, not by its path.

    Args:
        cache_dir: where all encoders' caches are.
        model: Hugging Face name or local folder.
        settings: everything else that changes the vectors (JSON-able).
    """
    path = Path(model)
    identity: Any = model
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.is_file())
        identity = {str(file.relative_to(path)): file_hash(file) for file in files}
    return cache_dir / key_of({"model": identity, "settings": dict(settings)})[:32]


def _read(folder: Path, wanted: set[str]) -> dict[str, np.ndarray]:
    """Vectors of the wanted keys that are there: key -> float32 [T, D]."""
    found: dict[str, np.ndarray] = {}
    for shard in sorted(folder.glob("*.npz")):
        try:
            with np.load(shard, allow_pickle=False) as held:
                hits = [(place, key) for place, key in enumerate(held["keys"].tolist()) if key in wanted]
                values = held["values"] if hits else None
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as err:
            log.warning("%s: damaged (%s); its items are encoded again", shard, err)
            continue
        if values is not None:
            found.update((key, values[place]) for place, key in hits)
    return found


def _write(folder: Path, keys: list[str], values: np.ndarray) -> None:
    """Add one shard, atomically."""
    target = folder / f"{key_of(keys)[:32]}.npz"
    temporary = folder / f".{target.name}.{os.getpid()}.tmp"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as handle:
            np.savez(handle, keys=np.array(keys), values=values)
            handle.flush()
            os.fsync(handle.fileno())
        temporary.replace(target)
    except OSError as err:
        temporary.unlink(missing_ok=True)
        raise ArtefactError(
            f"{target}: cannot be written ({err.strerror or err}); free some space or fix the permissions, "
            "then run again: finished items are kept"
        ) from err


def encode_cached(
    keys: Sequence[str | None],
    folder: Path,
    load: Callable[[], EncodeBatch],
    *,
    batch_size: int,
    lengths: Sequence[int] | None = None,
) -> Features:
    """Features of all items, from the cache where their content is known and from the encoder elsewhere.

    Args:
        keys: per item a hash of its content, None where it has none. Equal contents are encoded once.
        folder: this encoder's cache, from `encoder_folder`.
        load: loads the encoder; not called when everything is known.
        batch_size: items per call of the encoder.
        lengths: items are encoded shortest first by these, so that a batch has little padding.

    Raises:
        ArtefactError: the cache cannot be written.
    """
    row_of = {key: row for row, key in reversed(list(enumerate(keys))) if key is not None}
    known = _read(folder, set(row_of))
    missing = sorted(row for key, row in row_of.items() if key not in known)
    if lengths is not None:
        missing.sort(key=lambda row: lengths[row])
    log.info("%d of %d contents known, %d to encode", len(known), len(row_of), len(missing))
    if missing:
        encode_batch = load()
        per_shard = -(-SHARD_ITEMS // batch_size) * batch_size
        with tqdm(total=len(missing), desc="encode", unit="item", leave=False) as bar:
            for start in range(0, len(missing), per_shard):
                rows = missing[start : start + per_shard]
                parts = []
                for first in range(0, len(rows), batch_size):
                    batch = rows[first : first + batch_size]
                    parts.append(encode_batch(batch))
                    bar.update(len(batch))
                values = np.concatenate(parts).astype(np.float32, copy=False)
                new = [key for row in rows if (key := keys[row]) is not None]
                _write(folder, new, values)
                known.update(zip(new, values, strict=True))
    shape = next(iter(known.values())).shape
    values = np.zeros((len(keys), *shape), dtype=np.float32)
    for row, key in enumerate(keys):
        if key is not None:
            values[row] = known[key]
    return Features(values, np.array([key is not None for key in keys]))
