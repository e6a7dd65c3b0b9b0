"""The second exit of alignment (EASE): item vectors for other rankers, without a language model."""

from __future__ import annotations

import contextlib
import logging
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors.torch import load_file

from genrec.adapters import build_adapter
from genrec.artefacts import read_manifest
from genrec.errors import ArtefactError
from genrec.pipeline import Run

log = logging.getLogger(__name__)


def write_features(run_folder: Path, out: Path) -> str:
    """Write item_id and the aligned soft tokens, as one list of K * D float32 values, to Parquet.

    Args:
        run_folder: a run whose alignment is there.
        out: Parquet file; an old one is replaced as a whole.

    Returns:
        what was written, in words.

    Raises:
        ArtefactError: the run has no alignment.
    """
    run = Run.open(run_folder)
    aligned = run.folder / "alignment" / "aligned.safetensors"
    if not aligned.is_file():
        raise ArtefactError(f"{aligned}: not there; run the recipe with align.steps above 0 and soft tokens first")
    state = {k.removeprefix("adapter."): v for k, v in load_file(aligned).items() if k.startswith("adapter.")}
    shape = read_manifest(run.folder / "alignment")["result"]
    space, recipe = run.space, run.recipe
    adapter = build_adapter(
        recipe.adapter.kind,
        {m: f.values.shape[2] for m, f in space.features.items()},
        recipe.backbone.soft_tokens,
        shape["width"],
        rms=1.0,
        **space.adapter_settings,
    )
    adapter.load_state_dict(state)
    adapter.eval()
    vectors = []
    n = len(space.catalogue.item_ids)
    with torch.inference_mode():
        for start in range(0, n, 1024):
            rows = slice(start, min(start + 1024, n))
            vectors.append(
                adapter(
                    {m: torch.from_numpy(f.values[rows]) for m, f in space.features.items()},
                    {m: torch.from_numpy(f.present[rows]) for m, f in space.features.items()},
                ).flatten(1)
            )
    values = torch.cat(vectors).numpy()
    table = pa.table(
        {
            "item_id": space.catalogue.item_ids,
            "vector": pa.FixedSizeListArray.from_arrays(pa.array(values.ravel()), values.shape[1]),
        }
    )
    temporary = out.with_name(f".{out.name}.tmp")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(table, temporary)
        temporary.replace(out)
    except OSError as err:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise ArtefactError(
            f"{out}: cannot be written ({err.strerror or err}); free some space or fix the permissions, then run again"
        ) from err
    return f"{len(values)} items, {values.shape[1]} values each"
