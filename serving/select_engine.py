"""Which engine answers: torch everywhere, vLLM where it pays."""

from __future__ import annotations

import importlib.util
import json
import logging

import torch

from genrec.errors import ConfigError
from genrec.serving.compressed_tensors_copy import method_of
from genrec.serving.compressed_tensors_copy import obstacle as copy_obstacle
from genrec.serving.engine import ExportEngine
from genrec.serving.export import Export

log = logging.getLogger(__name__)
KINDS = ("auto", "torch", "vllm")


def vllm_obstacle(method: str | None = None) -> str | None:
    """Why vLLM cannot compute here with a copy by a method (None: with an unquantised export); None when it can."""
    if importlib.util.find_spec("vllm") is None:
        return "vLLM is not installed; run `pip install 'genrec[cpu]'` (or 'genrec[gpu]' beside an NVIDIA GPU)"
    return None if method is None else copy_obstacle(method)


def _obstacles(export: Export) -> dict[str, str | None]:
    """Why an engine cannot serve an export here, by engine; None when it can."""
    config = json.loads((export.model_dir / "config.json").read_text(encoding="utf-8"))
    quantised = config.get("quantization_config", {}).get("quant_method")
    vllm = vllm_obstacle(method_of(config))
    if quantised == "bitsandbytes":
        vllm = "this export is quantised by bitsandbytes, which vLLM does not read"
    torch_ = "this export is quantised in compressed-tensors' format, which only vLLM reads"
    return {"vllm": vllm, "torch": torch_ if quantised == "compressed-tensors" else None}


def make_engine(export: Export, kind: str = "auto") -> ExportEngine:
    """Start an engine on an export and log the choice with its reason.

    Args:
        export: the export.
        kind: "torch", "vllm", or "auto": vLLM where it is installed and finds a GPU or where only it reads the export,
            else torch.

    Raises:
        ConfigError: no such engine, or it cannot serve this export here.
    """
    if kind not in KINDS:
        raise ConfigError(f"no engine named {kind!r}; there are {', '.join(KINDS)}")
    obstacles = _obstacles(export)
    reason = "as asked"
    if kind == "auto":
        gpu = None if torch.cuda.is_available() else "there is no CUDA GPU"
        if obstacles["torch"] is not None:
            kind, reason = "vllm", obstacles["torch"]
        elif (found := obstacles["vllm"] or gpu) is not None:
            kind, reason = "torch", found
        else:
            kind, reason = "vllm", "vLLM and a CUDA GPU are there"
    obstacle = obstacles[kind]
    if obstacle is not None:
        other = "torch" if kind == "vllm" else "vllm"
        advice = f"take the {other} engine" if obstacles[other] is None else "serve the unquantised export"
        raise ConfigError(f"engine {kind}: {obstacle}; {advice}")
    log.info("engine: %s (%s)", kind, reason)
    if kind == "vllm":
        from genrec.serving.vllm_engine import VllmEngine

        return VllmEngine(export)
    from genrec.serving.torch_engine import TorchEngine

    return TorchEngine(export)
