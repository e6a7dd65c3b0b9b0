"""Which engine answers: as asked, as measured, or as what is installed suggests."""

from __future__ import annotations

import json
import logging

import torch

from genrec.errors import ConfigError
from genrec.serving.compressed_tensors_copy import method_of
from genrec.serving.engine import ExportEngine
from genrec.serving.export import Export
from genrec.serving.measured_engine import Choice, Speeds, measure, open_choice, remember, remembered
from genrec.serving.vllm_engine import vllm_obstacle

log = logging.getLogger(__name__)
KINDS = ("auto", "torch", "vllm")


def _obstacles(export: Export) -> dict[str, str | None]:
    """Why an engine cannot serve an export here, by engine; None when it can."""
    config = json.loads((export.model_dir / "config.json").read_text(encoding="utf-8"))
    quantised = config.get("quantization_config", {}).get("quant_method")
    vllm = vllm_obstacle(method_of(config))
    if quantised == "bitsandbytes":
        vllm = "this export is quantised by bitsandbytes, which vLLM does not read"
    torch_ = "this export is quantised in compressed-tensors' format, which only vLLM reads"
    return {"vllm": vllm, "torch": torch_ if quantised == "compressed-tensors" else None}


def make_engine(export: Export, kind: str = "auto", *, measure_first: bool = False) -> ExportEngine:
    """Start an engine on an export and log the choice with its reason.

    Args:
        export: the export.
        kind: "torch", "vllm", or "auto": for each kind of request what was faster when it was measured here. Where it
            was not: vLLM where it is installed and finds a GPU or where only it reads the export, else torch.
        measure_first: let auto measure where it has not yet, which takes a minute or more.

    Raises:
        ConfigError: no such engine, or it cannot serve this export here.
    """
    if kind not in KINDS:
        raise ConfigError(f"no engine named {kind!r}; there are {', '.join(KINDS)}")
    obstacles = _obstacles(export)
    reason = "as asked"
    if kind == "auto":
        if not any(obstacles.values()) and (speeds := _speeds(export, measure_first)) is not None:
            choice = speeds.choose()
            drafts = " with drafts" * choice.drafts
            log.info("engine: %s for lists, %s%s for texts (%s)", choice.lists, choice.texts, drafts, speeds)
            return open_choice(export, choice)
        gpu = None if torch.cuda.is_available() else "there is no CUDA GPU, and nothing was measured"
        if obstacles["torch"] is not None:
            kind, reason = "vllm", obstacles["torch"]
        elif (found := obstacles["vllm"] or gpu) is not None:
            kind, reason = "torch", found
        else:
            kind, reason = "vllm", "vLLM and a CUDA GPU are there, and nothing was measured"
    obstacle = obstacles[kind]
    if obstacle is not None:
        other = "torch" if kind == "vllm" else "vllm"
        advice = f"take the {other} engine" if obstacles[other] is None else "serve the unquantised export"
        raise ConfigError(f"engine {kind}: {obstacle}; {advice}")
    log.info("engine: %s (%s)", kind, reason)
    return open_choice(export, Choice(kind, kind, drafts=False))


def _speeds(export: Export, measure_first: bool) -> Speeds | None:
    speeds = remembered(export)
    if speeds is None and measure_first:
        speeds = measure(export)
        if "vllm" in speeds.lists:  # else it may do better next time
            remember(export, speeds)
    return speeds
