"""An export whose soft tokens are rows of its vocabulary: prompts are token ids, which any server of text models takes.

Behind the export's vocabulary of V rows stand the K rows of each item and then the P rows of the soft prompt:

    row V + item * K + k          soft token k of an item
    row V + N * K + p             soft prompt token p

An untied output matrix gets rows of zeros there. Every row is an output row too, so this is for small catalogues: large
ones stay with prompt vectors, and so does a prompt with an item that came or changed later.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from genrec.artefacts import key_at, run_stage
from genrec.errors import ArtefactError, ConfigError
from genrec.prompts import Prompt
from genrec.serving.export import Export, copy_around_weights

MOST_ROWS = 1 << 18  # of items and soft prompt: 512 MB of bfloat16 at a width of 1024, and as many more logits a token


def token_ids(export: Export, prompt: Prompt) -> Tensor | None:
    """A prompt as token ids int64 [T]; None where the export is not baked, or an item is newer than it."""
    baked: dict[str, int] | None = export.manifest["result"].get("baked")
    slots, behind = prompt.slots, export.layout.soft_tokens * (baked["items"] if baked else 0)
    if baked is None or slots.max(initial=-1) >= behind:
        return None
    if export.renewed and not export.renewed.isdisjoint((slots[slots >= 0] // export.layout.soft_tokens).tolist()):
        return None
    rows = baked["first_row"] + np.where(slots >= 0, slots, behind - 2 - slots)
    return torch.from_numpy(np.where(slots == -1, prompt.input_ids, rows).astype(np.int64))


def bake_export(export_dir: Path, run_dir: Path, force: bool = False) -> Path:
    """Write a copy of an export with the soft tokens in its vocabulary, which serves like any other.

    Args:
        export_dir: a whole export, quantised for vLLM or not.
        run_dir: folder to write ``NAME-baked/`` into, NAME the export's.
        force: write it even when nothing changed.

    Returns:
        The copy's folder; its manifest's "result" also holds ``baked``: the first new row and the number of items.

    Raises:
        ConfigError: baked already, too many rows, or quantised by bitsandbytes, which no server of text models reads.
        ArtefactError: the export is not whole, or the copy cannot be written.
    """
    source = Export.load(export_dir)
    config: dict[str, Any] = json.loads((source.model_dir / "config.json").read_text(encoding="utf-8"))
    if "baked" in source.manifest["result"]:
        raise ConfigError(f"{export_dir}: baked already; give the export that it was made from")
    if config.get("quantization_config", {}).get("quant_method") == "bitsandbytes":
        raise ConfigError(f"{export_dir}: quantised by bitsandbytes, for the torch engine alone; bake the whole export")
    rows = torch.cat([source.items.flatten(0, 1), source.prompt])  # [N * K + P, D]
    if len(rows) > MOST_ROWS:
        raise ConfigError(
            f"{export_dir}: {len(rows)} soft tokens of {len(source.items)} items, and at most {MOST_ROWS} become rows, "
            "as every row costs a logit at every token; serve with prompt vectors, as any engine does by itself"
        )

    def build(work: Path) -> dict[str, Any]:
        (work / "model").mkdir()
        text = config.get("text_config", config)
        row = _write_rows(source.model_dir, work / "model", rows)
        text["vocab_size"] = row + len(rows)
        (work / "model" / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        copy_around_weights(source, work)
        source.check_unchanged()
        return {**source.manifest["result"], "baked": {"first_row": row, "items": len(source.items)}}

    return run_stage(run_dir, f"{export_dir.name}-baked", {}, {"export": key_at(export_dir)}, build, force)


def _write_rows(model_dir: Path, out: Path, rows: Tensor) -> int:
    """Write weights whose embedding, and output matrix where there is one, end in new rows; returns the first one."""
    first = None
    for file in sorted(model_dir.glob("*.safetensors")):
        tensors = load_file(file)
        for name, tensor in tensors.items():
            if name.endswith("embed_tokens.weight"):
                first = len(tensor)
                tensors[name] = torch.cat([tensor, rows.to(tensor)])
            elif name.endswith("lm_head.weight"):
                tensors[name] = torch.cat([tensor, tensor.new_zeros(rows.shape)])
        save_file(tensors, out / file.name, {"format": "pt"})
    if first is None:
        raise ArtefactError(f"{model_dir}: no input embedding (…embed_tokens.weight); export the run again")
    index = model_dir / "model.safetensors.index.json"
    if index.is_file():  # names and files stay
        (out / index.name).write_bytes(index.read_bytes())
    return first
