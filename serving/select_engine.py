"""Which engine answers: torch everywhere, vLLM where it pays."""

from __future__ import annotations

import importlib.util
import json
import logging

import torch

from genrec.errors import ConfigError
from genrec.serving.engine import Engine
from genrec.serving.export import Export

log = logging.getLogger(__name__)
KINDS = ("auto", "torch", "vllm")


def _vllm_cannot(export: Export) -> str | None:
    """Why vLLM cannot serve an export here; None when it can."""
    config = json.loads((export.model_dir / "config.json").read_text(encoding="utf-8"))
    if config.get("quantization_config", {}).get("quant_method") == "bitsandbytes":
        return "this export is quantised by bitsandbytes, which vLLM does not read"
    return None if importlib.util.find_spec("vllm") else "vLLM is not installed"


def make_engine(export: Export, kind: str = "auto") -> Engine:
    """Start an engine on an export and log the choice with its reason.

    Args:
        export: the export.
        kind: "torch", "vllm", or "auto": vLLM where it is installed and finds a GPU, else torch.

    Raises:
        ConfigError: no such engine, or vLLM was asked for and cannot serve this export.
    """
    if kind not in KINDS:
        raise ConfigError(f"no engine named {kind!r}; there are {', '.join(KINDS)}")
    obstacle = _vllm_cannot(export)
    if kind == "vllm" and obstacle is not None:
        raise ConfigError(f"engine vllm: {obstacle}; take the torch engine, or install vLLM for a whole export")
    if kind == "auto":
        obstacle = obstacle or (None if torch.cuda.is_available() else "there is no CUDA GPU")
        kind, reason = ("vllm", "vLLM and a CUDA GPU are there") if obstacle is None else ("torch", obstacle)
    else:
        reason = "as asked"
    log.info("engine: %s (%s)", kind, reason)
    if kind == "vllm":
        from genrec.serving.vllm_engine import VllmEngine

        return VllmEngine(export)
    from genrec.serving.torch_engine import TorchEngine

    return TorchEngine(export)
