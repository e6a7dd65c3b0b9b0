"""W8A8 and W4A16 weights in compressed-tensors' format, which vLLM loads: rounded to nearest, no calibration.

W8A8: int8 weights, one scale per output, and activations that vLLM rounds to int8 token by token (ZeroQuant's scheme,
Yao et al. 2022, arXiv:2206.01861). W4A16: eight int4 weights in an int32, one scale per group of inputs. Scales are
symmetric. Only the blocks' linear layers change. Why no tool writes these files: docs/design/010.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from genrec.errors import ArtefactError, ConfigError

GROUP = 32  # inputs per scale of W4A16: the smallest group that vLLM's kernels on CPUs and on GPUs both take
# Largest whole number of a W8A8 weight. CPUs without VNNI add two products of activation + 128 (at most 255) and weight
# in 16 bits and cut off what exceeds them: 2 * 255 * 127 does, 2 * 255 * 64 does not
STEPS = 64
PACK = 8  # int4 values in an int32
MULTIPLE = {"w8a8": 16, "w4a16": GROUP}  # of inputs and outputs: what vLLM's kernels demand
_INT: dict[str, Any] = {"type": "int", "symmetric": True}
METHODS: dict[str, dict[str, Any]] = {  # `format` and `config_groups` of compressed-tensors' configuration
    "w8a8": {
        "format": "int-quantized",
        "weights": {**_INT, "num_bits": 8, "strategy": "channel", "dynamic": False},
        "input_activations": {**_INT, "num_bits": 8, "strategy": "token", "dynamic": True},
    },
    "w4a16": {
        "format": "pack-quantized",
        "weights": {**_INT, "num_bits": 4, "strategy": "group", "group_size": GROUP, "dynamic": False},
        "input_activations": None,
    },
}


def method_of(config: Mapping[str, Any]) -> str | None:
    """Which of `METHODS` the config.json of a model names; None: none of them."""
    found = config.get("quantization_config", {})
    if found.get("quant_method") != "compressed-tensors":
        return None
    return next((name for name, settings in METHODS.items() if settings["format"] == found.get("format")), None)


def obstacle(method: str) -> str | None:
    """Why this machine's vLLM cannot compute with a copy; None when it can."""
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    if method == "w4a16" and x86 and not (torch.cuda.is_available() or torch.cpu._is_avx512_supported()):
        return "vLLM computes with 4-bit weights on a GPU or on a CPU with AVX-512, and there is neither; take w8a8"
    return None


def write_weights(model_dir: Path, out: Path, method: str, linear: Mapping[str, nn.Linear], head: str) -> None:
    """Write the quantised weights and config.json of a transformers folder.

    Args:
        model_dir: folder of a whole causal LM.
        out: folder that exists and holds no weights.
        method: "w8a8" or "w4a16".
        linear: its linear layers by name, on any device, the meta one too.
        head: which of them stays whole.

    Raises:
        ConfigError: the model has weights that are no matrices, or sizes that vLLM's kernels do not take.
        ArtefactError: the folder lacks a layer's weights.
    """
    layers = {name: layer for name, layer in linear.items() if name != head}
    _check_sizes(model_dir, method, layers)
    weight_map: dict[str, str] = {}
    left = {f"{name}.weight" for name in layers}
    total = 0
    for file in sorted(model_dir.glob("*.safetensors")):
        tensors: dict[str, Tensor] = {}
        for name, tensor in load_file(file).items():
            if name in left:
                left.remove(name)
                parts = QUANTISE[method](tensor.float())
                tensors |= {f"{name.removesuffix('weight')}{part}": value for part, value in parts.items()}
            elif tensor.ndim > 2:
                raise ConfigError(
                    f"{model_dir}: {name} {list(tensor.shape)} is no matrix; W8A8 and W4A16 copies are made of models "
                    "whose blocks hold linear layers only; take int8 or nf4"
                )
            else:
                tensors[name] = tensor
        save_file(tensors, out / file.name, {"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file.name)
        total += sum(tensor.nbytes for tensor in tensors.values())
    if left:
        raise ArtefactError(f"{model_dir}: no weights of {', '.join(sorted(left)[:3])}; export the run again")
    if len(set(weight_map.values())) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (out / "model.safetensors.index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")
    config = json.loads((model_dir / "config.json").read_text(encoding="utf-8"))
    settings = {key: value for key, value in METHODS[method].items() if key != "format"}
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "format": METHODS[method]["format"],
        "config_groups": {"group_0": {"targets": ["Linear"], **settings}},
        "ignore": [head],
    }
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _check_sizes(model_dir: Path, method: str, layers: Mapping[str, nn.Linear]) -> None:
    multiple = MULTIPLE[method]
    for name, layer in layers.items():
        if layer.in_features % multiple or layer.out_features % multiple:
            raise ConfigError(
                f"{model_dir}: {name} has {layer.in_features} inputs and {layer.out_features} outputs, and {method} "
                f"needs both in multiples of {multiple}; take int8, or a base whose widths are such multiples"
            )


def _w8a8(weight: Tensor) -> dict[str, Tensor]:
    """float32 [out, in] -> int8 [out, in] within ±STEPS and float32 scales [out, 1]."""
    scale = _nonzero(weight.abs().amax(1, keepdim=True) / STEPS)
    return {"weight": (weight / scale).round().to(torch.int8), "weight_scale": scale}


def _w4a16(weight: Tensor) -> dict[str, Tensor]:
    """float32 [out, in] -> int32 [out, in / 8], bfloat16 scales [out, in / GROUP] and the shape.

    A group's largest weight stands at 7.5 steps, so that no error exceeds half a step and steps are finer than with the
    largest at 7; hence scales are rounded upwards to bfloat16, and -8 is next to never written.
    Eight inputs of one output, rounded to 1 -7 0 0 0 0 0 0, become 9 1 8 8 8 8 8 8, the first in the lowest four bits.
    """
    groups = weight.view(len(weight), -1, GROUP)  # [out, in / GROUP, GROUP]
    exact = _nonzero(groups.abs().amax(2) / 7.5)
    scale = exact.bfloat16()
    scale = torch.where(scale.float() < exact, torch.nextafter(scale, torch.full_like(scale, torch.inf)), scale)
    values = (groups / scale.float()[:, :, None]).round().clamp(-8, 7).to(torch.int32) + 8
    nibbles = values.view(len(weight), -1, PACK) << torch.arange(0, 4 * PACK, 4, dtype=torch.int32)
    return {
        "weight_packed": nibbles.sum(2, dtype=torch.int32),
        "weight_scale": scale,
        "weight_shape": torch.tensor(weight.shape, dtype=torch.int64),
    }


def _nonzero(scale: Tensor) -> Tensor:
    """Scales of nothing but zeros would divide by zero: any other will do."""
    return torch.where(scale > 0, scale, 1.0)


QUANTISE = {"w8a8": _w8a8, "w4a16": _w4a16}
