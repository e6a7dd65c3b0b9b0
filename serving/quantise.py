"""Quantised copies of an export by bitsandbytes, and what they cost in quality.

Only the transformer blocks' linear layers are quantised: LLM.int8() (Dettmers et al. 2022, arXiv:2208.07339) or NF4
(Dettmers et al. 2023, arXiv:2305.14314). Embedding, output head (so the semantic-id rows) and soft tokens stay.
"""

from __future__ import annotations

import logging
import math
import shutil
import time
from collections.abc import Iterable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open

from genrec.artefacts import MANIFEST, key_at, run_stage, write_text
from genrec.errors import ConfigError
from genrec.metrics import paired, per_user
from genrec.serving.engine import RecommendRequest
from genrec.serving.export import REFUSED, Export
from genrec.serving.torch_engine import TorchEngine
from genrec.splits import Cases

log = logging.getLogger(__name__)
METHODS: dict[str, dict[str, Any]] = {
    "int8": {"load_in_8bit": True},
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
}
TOP = 10
WIDER = {"F32": 4, "F64": 8}  # safetensors' names of floats with more bytes than bfloat16
NF4_BLOCK_IN, NF4_BLOCK_OUT = 64, 32  # bitsandbytes' kernels for CPUs take no other shapes


def folder_bytes(folder: Path) -> int:
    """Bytes of all files below a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def bfloat16_bytes(model_dir: Path) -> int:
    """What `folder_bytes` of a transformers folder would be with its wider weights in bfloat16, up to file headers."""
    saved = 0
    for file in model_dir.glob("*.safetensors"):
        with safe_open(file, "pt") as weights:
            for name in weights.keys():  # noqa: SIM118 - not a dictionary
                part = weights.get_slice(name)
                saved += math.prod(part.get_shape()) * (WIDER.get(part.get_dtype(), 2) - 2)
    return folder_bytes(model_dir) - saved


def _kept_whole(source: Export, method: str) -> list[str]:
    """Names of the linear layers that are not quantised: the head, and what NF4's blocks do not fit.

    Raises:
        ConfigError: no layer would be left.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(source.model_dir))
    head = model.get_output_embeddings()
    linear = {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    kept = [
        name
        for name, module in linear.items()
        if module is head
        or (method == "nf4" and (module.in_features % NF4_BLOCK_IN or module.out_features % NF4_BLOCK_OUT))
    ]
    if len(kept) == len(linear):
        raise ConfigError(
            f"{source.model_dir}: NF4 needs linear layers with inputs in multiples of {NF4_BLOCK_IN} and outputs in "
            f"multiples of {NF4_BLOCK_OUT}, and no layer has both; use int8"
        )
    if len(kept) > 1:
        log.warning("%s: %d of %d linear layers stay whole: sizes do not fit", method, len(kept) - 1, len(linear))
    return kept


def quantise_export(export_dir: Path, run_dir: Path, method: str, force: bool = False) -> Path:
    """Write a quantised copy of an export, which serves like any other.

    Args:
        export_dir: a whole, unquantised export.
        run_dir: folder to write ``export-int8/`` or ``export-nf4/`` into.
        method: "int8" or "nf4".
        force: write it even when nothing changed.

    Returns:
        The copy's folder; its manifest's "result" also holds ``quantised``: method, bytes of model/ and of the
        original's model/, and the linear layers that were kept whole.

    Raises:
        ConfigError: no such method, the export is a quantised one, or no layer of its model can be quantised.
        ArtefactError: the export is not whole, or the copy cannot be written.
    """
    if method not in METHODS:
        raise ConfigError(f"no quantisation named {method!r}; there are {', '.join(METHODS)}")
    source = Export.load(export_dir)
    if "quantised" in source.manifest["result"]:
        raise ConfigError(f"{export_dir}: already quantised; give the export that it was made from")

    def build(work: Path) -> dict[str, Any]:
        import torch
        from transformers import AutoModelForCausalLM, BitsAndBytesConfig

        kept = _kept_whole(source, method)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        model = AutoModelForCausalLM.from_pretrained(
            source.model_dir,
            dtype="auto",
            device_map={"": device},
            quantization_config=BitsAndBytesConfig(**METHODS[method], llm_int8_skip_modules=kept),
        )
        model.save_pretrained(work / "model")
        for path in source.model_dir.iterdir():  # the tokenizer; the weights and their index are the new ones
            if not (work / "model" / path.name).exists() and ".safetensors" not in path.name:
                shutil.copy2(path, work / "model")
        (work / "model" / "generation_config.json").unlink(missing_ok=True)
        for path in source.folder.iterdir():
            if path.is_dir() and path.name != "model":
                shutil.copytree(path, work / path.name)
            elif path.is_file() and path.name != MANIFEST:
                shutil.copy2(path, work)
        source.check_unchanged()
        sizes = {"bytes": folder_bytes(work / "model"), "original_bytes": folder_bytes(source.model_dir)}
        return {**source.manifest["result"], "quantised": {"method": method, **sizes, "kept_whole": kept}}

    settings = {"method": method, **METHODS[method]}
    return run_stage(run_dir, f"export-{method}", settings, {"export": key_at(export_dir)}, build, force)


def bless(copy: Path, method: str, overlap: float, least: float) -> bool:
    """Let a quantised copy be served where it agrees enough with the original; else `Export.load` refuses it.

    Args:
        copy: its folder.
        method: how it was quantised.
        overlap: mean share of the original's top 10 that is in the copy's.
        least: what the recipe demands of it.
    """
    if overlap >= least:
        return True
    why = (
        f"refused: its lists share {overlap:.3f} of the top 10 with the original's, and serve.min_overlap.{method} "
        f"demands {least:g}; serve the original or another method, or lower the demand and run genrec quantize again"
    )
    write_text(copy / REFUSED, why)
    log.warning("%s: %s", copy, why)
    return False


def _top_rows(engine: TorchEngine, requests: Sequence[RecommendRequest]) -> np.ndarray:
    """Top 10 catalogue rows per request: int32 [n, 10], -1 pads."""
    top = np.full((len(requests), TOP), -1, np.int32)
    index = engine.export.catalogue.index
    for row, items in enumerate(engine.recommend(requests)):
        top[row, : len(items)] = [index[item.item_id] for item in items]
    return top


def compare_exports(
    reference: TorchEngine,
    quantised: Iterable[TorchEngine],
    cases: Cases,
    *,
    exclude_seen: bool = True,
    n_boot: int = 1000,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """What quantisation costs: size, changed lists, changed N@10 on the same users.

    Args:
        reference: engine on the unquantised export.
        quantised: engines on its copies; a generator may load and close them one after the other.
        cases: histories and targets to compare on.
        exclude_seen: leave out the items of the history.
        n_boot: bootstrap resamples behind each interval.
        seed: of the resamples.

    Returns:
        One row per export, the reference first: ``export`` (folder name), ``bytes`` of model/ and their ``share`` of
        the reference's in bfloat16, ``users``, ``users/s`` (lists on this machine, in turns), ``overlap@10`` (mean
        share of the reference's top 10 that is in the export's, in 0..1), ``ndcg@10``, ``change`` (N@10 minus the
        reference's) and its paired 95 % interval ``ci95``.
    """
    ids = reference.export.catalogue.item_ids
    requests = [
        RecommendRequest([ids[row] for row in history], k=TOP, exclude_seen=exclude_seen) for history in cases.histories
    ]
    rows: list[dict[str, Any]] = []
    base_top = base_gain = None
    whole = bfloat16_bytes(reference.export.model_dir)
    for engine in chain([reference], quantised):
        engine.recommend(requests[:1])  # what a first call starts is not timed
        started = time.perf_counter()
        top = _top_rows(engine, requests)
        seconds, size = time.perf_counter() - started, folder_bytes(engine.export.model_dir)
        gain = per_user(top, cases.targets, ks=(TOP,))["ndcg@10"]
        if base_top is None or base_gain is None:
            base_top, base_gain = top, gain
        shared = ((top[:, :, None] == base_top[:, None, :]) & (top >= 0)[:, :, None]).sum((1, 2))
        change = paired(gain, base_gain, n_boot, seed)
        rows.append(
            {
                "export": engine.export.folder.name,
                "bytes": size,
                "share": size / whole,
                "users": len(requests),
                "users/s": len(requests) / seconds,
                "overlap@10": float((shared / np.maximum((base_top >= 0).sum(1), 1)).mean()),
                "ndcg@10": float(gain.mean()),
                "change": change["mean"],
                "ci95": change["ci95"],
            }
        )
    return rows
