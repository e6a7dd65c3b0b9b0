"""Quantised copies of an export, and what they cost in quality.

Only the transformer blocks' linear layers are quantised: for the torch engine by bitsandbytes, to LLM.int8()
(Dettmers et al. 2022, arXiv:2208.07339) or NF4 (Dettmers et al. 2023, arXiv:2305.14314); for vLLM by
`genrec.serving.compressed_tensors_copy`. Embedding, output head (so the semantic-id rows) and soft tokens stay.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Generator, Iterable, Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors import safe_open

from genrec.artefacts import key_at, run_stage, write_text
from genrec.errors import ConfigError
from genrec.metrics import paired, per_user
from genrec.serving import compressed_tensors_copy
from genrec.serving.engine import ExportEngine, RecommendRequest
from genrec.serving.export import REFUSED, Export, copy_around_weights
from genrec.serving.select_engine import make_engine
from genrec.serving.vllm_engine import vllm_obstacle
from genrec.splits import Cases

if TYPE_CHECKING:
    from torch import nn

log = logging.getLogger(__name__)
BITSANDBYTES: dict[str, dict[str, Any]] = {
    "int8": {"load_in_8bit": True},
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
}
METHODS: dict[str, dict[str, Any]] = {**BITSANDBYTES, **compressed_tensors_copy.METHODS}
ENGINES = {method: "torch" if method in BITSANDBYTES else "vllm" for method in METHODS}  # what serves a copy
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


def _linear_layers(model_dir: Path) -> tuple[dict[str, nn.Linear], str]:
    """A model's linear layers by name, without their weights, and which of them is the output head."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model_dir))
    linear = {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    return linear, next(name for name, module in linear.items() if module is model.get_output_embeddings())


def _misfits(model_dir: Path, method: str, linear: dict[str, nn.Linear], head: str) -> list[str]:
    """Names of the layers beside the head that bitsandbytes must leave whole: what NF4's blocks do not fit.

    Raises:
        ConfigError: no layer would be left.
    """
    misfits = [
        name
        for name, layer in linear.items()
        if name != head and method == "nf4" and (layer.in_features % NF4_BLOCK_IN or layer.out_features % NF4_BLOCK_OUT)
    ]
    if len(misfits) == len(linear) - 1:
        raise ConfigError(
            f"{model_dir}: NF4 needs linear layers with inputs in multiples of {NF4_BLOCK_IN} and outputs in "
            f"multiples of {NF4_BLOCK_OUT}, and no layer has both; use int8"
        )
    if misfits:
        log.warning("%s: %d of %d linear layers stay whole: sizes do not fit", method, len(misfits), len(linear))
    return misfits


def _write_bitsandbytes(model_dir: Path, out: Path, method: str, kept: list[str]) -> None:
    """Load a model through bitsandbytes, `kept` layers whole, and save it."""
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    model = AutoModelForCausalLM.from_pretrained(
        model_dir,
        dtype="auto",
        device_map={"": "cuda" if torch.cuda.is_available() else "cpu"},
        quantization_config=BitsAndBytesConfig(**BITSANDBYTES[method], llm_int8_skip_modules=kept),
    )
    model.save_pretrained(out)


def quantise_export(export_dir: Path, run_dir: Path, method: str, force: bool = False) -> Path:
    """Write a quantised copy of an export, which serves like any other.

    Args:
        export_dir: a whole, unquantised export.
        run_dir: folder to write ``export-METHOD/`` into.
        method: "int8" or "nf4" for the torch engine, "w8a8" or "w4a16" for vLLM.
        force: write it even when nothing changed.

    Returns:
        The copy's folder; its manifest's "result" also holds ``quantised``: method, bytes of model/ and of the
        original's model/, and the linear layers that were kept whole.

    Raises:
        ConfigError: no such method, the export is a quantised one, or its model cannot be quantised so.
        ArtefactError: the export is not whole, or the copy cannot be written.
    """
    if method not in METHODS:
        raise ConfigError(f"no quantisation named {method!r}; there are {', '.join(METHODS)}")
    source = Export.load(export_dir)
    if "quantised" in source.manifest["result"]:
        raise ConfigError(f"{export_dir}: already quantised; give the export that it was made from")

    def build(work: Path) -> dict[str, Any]:
        linear, head = _linear_layers(source.model_dir)
        kept = [head]
        (work / "model").mkdir()
        if method in BITSANDBYTES:
            kept += _misfits(source.model_dir, method, linear, head)
            _write_bitsandbytes(source.model_dir, work / "model", method, kept)
        else:
            compressed_tensors_copy.write_weights(source.model_dir, work / "model", method, linear, head)
        copy_around_weights(source, work)
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


def check_runnable(methods: Iterable[str]) -> None:
    """Find out before the work, not after it, whether this machine can compare copies by these methods.

    Raises:
        ConfigError: vLLM is not installed, or cannot compute with such weights here.
    """
    for method in methods:
        if ENGINES.get(method) == "vllm" and (found := vllm_obstacle(method)):
            raise ConfigError(f"a copy by {method} cannot be compared here: {found}")


def open_engines(kind: str, folders: Iterable[Path]) -> Generator[ExportEngine, None, None]:
    """Engines on exports, one after the other: each is closed before the next one starts."""
    for folder in folders:
        engine = make_engine(Export.load(folder), kind)
        try:
            yield engine
        finally:
            engine.close()


def _top_rows(engine: ExportEngine, requests: Sequence[RecommendRequest]) -> np.ndarray:
    """Top 10 catalogue rows per request: int32 [n, 10], -1 pads."""
    top = np.full((len(requests), TOP), -1, np.int32)
    index = engine.export.catalogue.index
    for row, items in enumerate(engine.recommend(requests)):
        top[row, : len(items)] = [index[item.item_id] for item in items]
    return top


def compare_exports(
    reference: ExportEngine,
    quantised: Iterable[ExportEngine],
    cases: Cases,
    *,
    exclude_seen: bool = True,
    n_boot: int = 1000,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """What quantisation costs: size, changed lists, changed N@10 on the same users.

    Args:
        reference: engine on the unquantised export; may be closed when the first copy is asked for.
        quantised: engines on its copies; a generator may load and close them one after the other.
        cases: histories and targets to compare on.
        exclude_seen: leave out the items of the history.
        n_boot: bootstrap resamples behind each interval.
        seed: of the resamples.

    Returns:
        One row per export, the reference first: ``export`` (folder name), ``engine``, ``bytes`` of model/ and their
        ``share`` of the reference's in bfloat16, ``users``, ``users/s`` (lists on this machine, in turns),
        ``overlap@10`` (mean share of the reference's top 10 that is in the export's, in 0..1), ``ndcg@10``, ``change``
        (N@10 minus the reference's) and its paired 95 % interval ``ci95``.
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
                "engine": engine.name,
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
