"""W8A8 and W4A16 copies: read back in numpy and by two libraries, and served by vLLM."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from genrec.cli import app
from genrec.config import resolve_recipe
from genrec.errors import ArtefactError, ConfigError
from genrec.pipeline import Run
from genrec.serving import select_engine
from genrec.serving.compressed_tensors_copy import GROUP, METHODS, method_of, obstacle, write_weights
from genrec.serving.engine import RecommendRequest
from genrec.serving.export import Export
from genrec.serving.quantise import compare_exports, folder_bytes, quantise_export
from genrec.serving.select_engine import make_engine
from genrec.serving.torch_engine import TorchEngine
from genrec.splits import Cases
from genrec.whole_path import quantise_and_compare
from tests.conftest import WITH_ABLATIONS, tiny_recipe
from tests.export_fixture import make_export

LAYER = "model.layers.0.self_attn.q_proj"
HALF_A_STEP = 0.5 + 1e-5  # rounding to nearest, and float32's own in the division


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    export = make_export(folder)
    for method in METHODS:
        assert quantise_export(export, folder, method) == folder / f"export-{method}"
    return folder


def read_back(tensors: dict[str, Tensor]) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Weights by their original names, and the steps [out, in] of the quantised ones, from the format's description."""
    plain = {name: tensor.float().numpy() if tensor.is_floating_point() else tensor.numpy()
             for name, tensor in tensors.items()}  # fmt: skip
    steps = {}
    for name in [name for name in plain if name.endswith(".weight_scale")]:
        layer, scale = name.removesuffix("_scale"), plain.pop(name)
        if f"{layer}_packed" in plain:
            words = plain.pop(f"{layer}_packed").view(np.uint32)
            values = np.stack([(words >> 4 * i) & 15 for i in range(8)], 2).astype(np.int32) - 8
            values = values.reshape(plain.pop(f"{layer}_shape"))
        else:
            values = plain[layer].astype(np.int32)
        steps[layer] = np.repeat(scale, values.shape[1] // scale.shape[1], 1)
        plain[layer] = values * steps[layer]
    return plain, steps


def shuffled(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same with every layer's scales in another order."""
    order = torch.Generator().manual_seed(0)

    def mixed(scale: Tensor) -> Tensor:
        return scale.flatten()[torch.randperm(scale.numel(), generator=order)].view_as(scale)

    return {name: mixed(tensor) if name.endswith("_scale") else tensor for name, tensor in tensors.items()}


def floats_of(copy: Path, original: Path, folder: Path) -> Path:
    """An unquantised export with a copy's weights, for the torch engine."""
    shutil.copytree(original, folder)
    weights, _ = read_back(load_file(copy / "model" / "model.safetensors"))
    tensors = {name: torch.from_numpy(weight) for name, weight in weights.items()}
    save_file(tensors, folder / "model" / "model.safetensors", {"format": "pt"})
    return folder


def negated(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same with every scale's sign turned."""
    return {name: -tensor if name.endswith("_scale") else tensor for name, tensor in tensors.items()}


def change_scales(copy: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    file = copy / "model" / "model.safetensors"
    save_file(change(load_file(file)), file, {"format": "pt"})


# -- what is written ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_weights_are_within_half_a_step_and_the_rest_is_untouched(run_dir: Path, method: str) -> None:
    before = load_file(run_dir / "export" / "model" / "model.safetensors")
    after = load_file(run_dir / f"export-{method}" / "model" / "model.safetensors")
    weights, steps = read_back(after)
    assert weights.keys() == before.keys()
    quantised = {name for name in before if "_proj." in name}
    assert steps.keys() == quantised
    for name, weight in before.items():
        if name in quantised:
            error = np.abs(weights[name] - weight.numpy()) / steps[name]
            assert error.max() <= HALF_A_STEP, name
            assert error.mean() > 0.2, name  # uniform: a quarter
            if method == "w8a8":  # no CPU's 16 bits overflow: see `compressed_tensors_copy.STEPS`
                assert 2 * 255 * after[name].abs().max() < 2**15
                assert after[name].abs().amax(1).min() == 64  # and all of them are used
            assert len(np.unique(np.round(weights[name] / steps[name]))) >= (15 if method == "w4a16" else 100)
        else:
            assert torch.equal(weight, after[name]), name
    wrong, _ = read_back(shuffled(after))
    assert (
        np.abs(wrong[f"{LAYER}.weight"] - before[f"{LAYER}.weight"].numpy()).max() > 2 * steps[f"{LAYER}.weight"].max()
    )
    for file in ("soft.safetensors", "adapter.safetensors", "items/codes.npy", "model/tokenizer.json"):
        assert (run_dir / "export" / file).read_bytes() == (run_dir / f"export-{method}" / file).read_bytes()


@pytest.mark.parametrize("method", METHODS)
def test_the_manifest_and_the_configuration_say_what_was_done(run_dir: Path, method: str) -> None:
    folder = run_dir / f"export-{method}"
    export = Export.load(folder)
    config = json.loads((export.model_dir / "config.json").read_text())
    assert method_of(config) == method
    assert config["quantization_config"]["ignore"] == ["lm_head"]
    found = export.manifest["result"]["quantised"]
    assert found["method"] == method
    assert found["kept_whole"] == ["lm_head"]
    assert found["bytes"] == folder_bytes(export.model_dir)
    files = [load_file(run_dir / name / "model" / "model.safetensors") for name in ("export", folder.name)]
    before, after = (sum(t.nbytes for name, t in tensors.items() if "_proj." in name) for tensors in files)
    bits = {"w8a8": 8, "w4a16": 4 + 16 / GROUP}[method]
    assert after / before == pytest.approx(bits / 32, rel=0.1)  # w8a8: four bytes more for every 64 or 96


@pytest.mark.parametrize("method", METHODS)
def test_the_formats_own_library_reads_the_same_weights(run_dir: Path, tmp_path: Path, method: str) -> None:
    """In two files too, as a large export's."""
    pytest.importorskip("compressed_tensors", reason="comes with vLLM")
    from transformers import CompressedTensorsConfig

    source, out = tmp_path / "source", tmp_path / "out"
    model = AutoModelForCausalLM.from_pretrained(run_dir / "export" / "model", dtype=torch.float32)
    model.save_pretrained(source, max_shard_size="200KB")
    out.mkdir()
    linear = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    write_weights(source, out, method, linear, "lm_head")
    assert len(list(out.glob("*.safetensors"))) > 1
    expected, _ = read_back(load_file(run_dir / f"export-{method}" / "model" / "model.safetensors"))
    read = AutoModelForCausalLM.from_pretrained(
        out, dtype=torch.float32, quantization_config=CompressedTensorsConfig(run_compressed=False)
    )
    found = {name: value.detach().float().numpy() for name, value in read.named_parameters()}
    assert expected.keys() <= found.keys()
    for name, weight in expected.items():
        np.testing.assert_allclose(found[name], weight, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("method", METHODS)
def test_rows_of_zeros_stay_zeros(run_dir: Path, tmp_path: Path, method: str) -> None:
    model_dir = shutil.copytree(run_dir / "export" / "model", tmp_path / "model")
    tensors = load_file(model_dir / "model.safetensors")
    tensors[f"{LAYER}.weight"][3] = 0
    save_file(tensors, model_dir / "model.safetensors", {"format": "pt"})
    out = tmp_path / "out"
    out.mkdir()
    write_weights(model_dir, out, method, {LAYER: nn.Linear(64, 128)}, "lm_head")
    weights, _ = read_back(load_file(out / "model.safetensors"))
    assert (weights[f"{LAYER}.weight"][3] == 0).all()
    assert np.isfinite(weights[f"{LAYER}.weight"]).all()


# -- what is refused ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "inputs", "outputs", "says"),
    [
        ("w4a16", 48, 64, "48 inputs and 64 outputs, and w4a16 needs both in multiples of 32"),
        ("w4a16", 64, 80, "64 inputs and 80 outputs, and w4a16 needs both in multiples of 32"),
        ("w8a8", 24, 32, "24 inputs and 32 outputs, and w8a8 needs both in multiples of 16"),
        ("w8a8", 32, 8, "32 inputs and 8 outputs, and w8a8 needs both in multiples of 16"),
    ],
)
def test_widths_that_do_not_fit_are_named(tmp_path: Path, method: str, inputs: int, outputs: int, says: str) -> None:
    layers = {"lm_head": nn.Linear(7, 7), "up": nn.Linear(inputs, outputs)}
    with pytest.raises(ConfigError, match=f"up has {says}; take int8"):
        write_weights(tmp_path, tmp_path / "out", method, layers, "lm_head")


def test_models_that_are_not_dense_or_not_whole_are_refused(run_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    model_dir = shutil.copytree(run_dir / "export" / "model", tmp_path / "model")
    with pytest.raises(ArtefactError, match=r"no weights of ghost\.weight"):
        write_weights(model_dir, tmp_path / "out", "w8a8", {"ghost": nn.Linear(64, 64)}, "lm_head")
    tensors = load_file(model_dir / "model.safetensors") | {"model.layers.0.mlp.experts": torch.zeros(2, 64, 64)}
    save_file(tensors, model_dir / "model.safetensors", {"format": "pt"})
    with pytest.raises(ConfigError, match=r"mlp\.experts \[2, 64, 64\] is no matrix"):
        write_weights(model_dir, tmp_path / "out", "w8a8", {}, "lm_head")


def test_only_vllm_serves_them(run_dir: Path, monkeypatch) -> None:
    copy = Export.load(run_dir / "export-w8a8")
    with pytest.raises(ArtefactError, match="by w8a8 in compressed-tensors' format, which only vLLM reads"):
        TorchEngine(copy, "cpu")
    monkeypatch.setattr(select_engine, "vllm_obstacle", lambda method: None)
    with pytest.raises(ConfigError, match=r"engine torch: .* only vLLM reads; take the vllm engine"):
        make_engine(copy, "torch")
    asked = []
    monkeypatch.setattr("genrec.serving.vllm_engine.VllmEngine", lambda export, **_: asked.append(export))
    make_engine(copy, "auto")
    assert asked == [copy]
    monkeypatch.setattr(select_engine, "vllm_obstacle", lambda method: "vLLM is not installed")
    with pytest.raises(ConfigError, match="engine vllm: vLLM is not installed; serve the unquantised export"):
        make_engine(copy, "auto")


def test_four_bits_need_a_machine_that_has_the_kernel(run_dir: Path, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    monkeypatch.setattr(torch.cpu, "_is_avx512_supported", lambda: True)
    assert obstacle("w4a16") is None
    monkeypatch.setattr(torch.cpu, "_is_avx512_supported", lambda: False)
    assert obstacle("w8a8") is None
    assert "AVX-512" in str(obstacle("w4a16"))
    from genrec.serving.vllm_engine import VllmEngine

    with pytest.raises(ArtefactError, match=r"export-w4a16: .*AVX-512"):
        VllmEngine(Export.load(run_dir / "export-w4a16"))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    with pytest.raises(ConfigError, match=r"w4a16 cannot be compared here: .*AVX-512"):
        quantise_and_compare(run_dir / "export", ["w4a16"], 10)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"w8a8 cannot be compared here: vLLM is not installed"):
        quantise_and_compare(run_dir / "export", ["w8a8"], 10)


# -- the comparison, with the copies' weights in the torch engine in vLLM's place -----------------------------


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch) -> None:
    def make(export: Export, kind: str) -> TorchEngine:
        folder = export.folder
        if "quantised" in export.manifest["result"] and kind == "vllm":
            shutil.rmtree(tmp_path / "floats", ignore_errors=True)
            folder = floats_of(folder, folder.parent / "export", tmp_path / "floats" / folder.name)
        engine = TorchEngine(Export.load(folder), "cpu")
        engine.name = kind
        return engine

    monkeypatch.setattr("genrec.serving.quantise.make_engine", make)
    monkeypatch.setattr("genrec.serving.quantise.vllm_obstacle", lambda method: None)


@pytest.mark.usefixtures("stand_in")
def test_each_engine_compares_its_own_copies_with_the_export(whole, tmp_path: Path) -> None:
    folder = shutil.copytree(whole[0].folder, tmp_path / "tiny")
    rows = quantise_and_compare(folder / "export", ["w4a16", "int8", "w8a8"], 120)
    found = [(row["export"], row["engine"]) for row in rows]
    assert found[:3] == [("export", "vllm"), ("export-w4a16", "vllm"), ("export-w8a8", "vllm")]
    assert found[3:] == [("export", "torch"), ("export-int8", "torch")]
    _, w4a16, w8a8, _, _ = rows
    assert w4a16["overlap@10"] < w8a8["overlap@10"] <= 1
    assert w8a8["overlap@10"] > 0.95
    assert all(row["blessed"] for row in rows)


@pytest.mark.usefixtures("stand_in")
@pytest.mark.parametrize("method", METHODS)
def test_a_copy_with_negative_scales_is_refused(whole, tmp_path: Path, method: str) -> None:
    folder = shutil.copytree(whole[0].folder, tmp_path / "tiny")
    least = {"min_overlap": {method: 0.96}}
    Run.create(resolve_recipe(tiny_recipe(evaluate=WITH_ABLATIONS, serve=least)), tmp_path)
    assert quantise_and_compare(folder / "export", [method], 120)[-1]["blessed"]
    change_scales(folder / f"export-{method}", negated)
    row = quantise_and_compare(folder / "export", [method], 110)[-1]
    assert row["overlap@10"] < 0.96
    assert not row["blessed"]
    with pytest.raises(ArtefactError, match=rf"refused: .* serve\.min_overlap\.{method} demands 0\.96"):
        Export.load(folder / f"export-{method}")
    done = CliRunner().invoke(app, ["quantize", str(folder / "export"), "--method", method, "--users", "110"])
    assert (type(done.exception), done.exit_code) == (ArtefactError, 1)


# -- vLLM itself -------------------------------------------------------------------------------------------


def round_activations(model: nn.Module) -> None:
    """Make a model's linear layers read their inputs as int8, one scale a token: the A8 of W8A8."""

    def rounded(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        scale = inputs[0].abs().amax(-1, keepdim=True).clamp(min=1e-12) / 127
        return ((inputs[0] / scale).round() * scale, *inputs[1:])

    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name != "lm_head":
            module.register_forward_pre_hook(rounded)


def cases(n: int = 40) -> Cases:
    rng = np.random.default_rng(0)
    histories = [rng.integers(0, 60, 5).astype(np.int32) for _ in range(n)]
    return Cases(np.arange(n), histories, rng.integers(0, 60, n).astype(np.int32))


def test_vllm_s_4_bit_weights_are_refused_in_float32(run_dir: Path) -> None:
    from genrec.serving.vllm_engine import VllmEngine

    with pytest.raises(ArtefactError, match="half precision"):
        VllmEngine(Export.load(run_dir / "export-w4a16"), dtype="float32")


@pytest.mark.vllm
@pytest.mark.parametrize("method", METHODS)
def test_vllm_serves_what_the_written_numbers_mean(run_dir: Path, tmp_path: Path, monkeypatch, method: str) -> None:
    """Lists of vLLM on the copy, on one with scales of the wrong sign, and by a float model with the copy's weights."""
    pytest.importorskip("vllm", reason="needs the extra cpu or gpu")
    if obstacle(method) is not None:
        pytest.skip(str(obstacle(method)))
    monkeypatch.setenv("OMP_NUM_THREADS", os.environ.get("OMP_NUM_THREADS", "1"))
    from genrec.serving.vllm_engine import VllmEngine

    copy, wrong = run_dir / f"export-{method}", tmp_path / "wrong" / f"export-{method}"
    floats = TorchEngine(Export.load(floats_of(copy, run_dir / "export", tmp_path / "floats")), "cpu")
    if method == "w8a8":
        round_activations(floats.model.lm)
    shutil.copytree(copy, wrong)
    change_scales(wrong, negated)
    requests = [RecommendRequest([f"item-{row}" for row in history], k=10, beams=60) for history in cases().histories]
    expected = [{item.item_id: item.score for item in items} for items in floats.recommend(requests)]
    found: list[list[dict[str, float]]] = []

    def engines(*folders: Path):
        for folder in folders:
            engine = VllmEngine(Export.load(folder), dtype="float32" if method == "w8a8" else "bfloat16")
            try:
                found.append([{i.item_id: i.score for i in items} for items in engine.recommend(requests)])
                yield engine
            finally:
                engine.close()

    whole, right, worse = compare_exports(
        TorchEngine(Export.load(run_dir / "export"), "cpu"), engines(copy, wrong), cases(), n_boot=100
    )
    shared = [len(a.keys() & b.keys()) / 10 for a, b in zip(found[0], expected, strict=True)]
    apart = [abs(a[i] - b[i]) for a, b in zip(found[0], expected, strict=True) for i in a.keys() & b.keys()]
    assert np.mean(shared) > 0.98
    assert np.mean(apart) < 0.02
    print(method, whole["overlap@10"], right["overlap@10"], worse["overlap@10"], np.mean(shared), np.mean(apart))
    assert worse["overlap@10"] < 0.6 < right["overlap@10"] < 1
