"""Fine-tuning: what must give the same losses does, a killed run resumes, and the planted order is learned."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from genrec.config import resolve_recipe
from genrec.errors import DataError
from genrec.pipeline import Run
from genrec.splits import Cases
from genrec.training.finetune import finetune, last_checkpoint
from genrec.training.packing import PackedCollator
from tests.conftest import tiny_recipe


@pytest.fixture(autouse=True)
def _every_loss(monkeypatch):
    monkeypatch.setattr("genrec.training.finetune.LOGGING_STEPS", 1)


def variant(prepared, folder, **settings):
    """A copy of the prepared run with other settings of fine-tuning; without dropout unless they say so."""
    recipe = resolve_recipe(tiny_recipe(finetune={"epochs": 1, "dropout": 0.0, **settings}))
    shutil.copytree(prepared.folder, folder)
    return Run.create(recipe.model_copy(update={"name": folder.name}), folder.parent)


def losses(curve):
    return [float(entry["loss"]) for entry in curve if "loss" in entry]


def test_accumulation_equals_a_larger_batch(prepared, tmp_path):
    whole = variant(prepared, tmp_path / "a", batch_rows=8)
    parts = variant(prepared, tmp_path / "b", batch_rows=2, accumulate=4)
    other = variant(prepared, tmp_path / "c", batch_rows=2)
    _, a = finetune(whole.space, tmp_path / "ca")
    _, b = finetune(parts.space, tmp_path / "cb")
    _, c = finetune(other.space, tmp_path / "cc")
    assert len(losses(a["curve"])) >= 5
    # float32 sums in another order, through AdamW; a wrong divisor (mean of means) is off by 1e-2 at the first step
    np.testing.assert_allclose(losses(a["curve"]), losses(b["curve"]), rtol=1e-3)
    assert not np.allclose(losses(a["curve"])[:5], losses(c["curve"])[:5], rtol=1e-3)
    assert losses(a["curve"])[-1] < losses(a["curve"])[0]


def launch(run, processes, port):
    """Fine-tune as the documents say; returns the loss curve."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", str(processes)]
    command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    command += ["--multi_gpu", "--main_process_port", str(port)] if processes > 1 else ["--cpu"]
    command += ["-m", "genrec.training.finetune", "--run", str(run.folder)]
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent), "OMP_NUM_THREADS": "1"}
    env |= {"GENREC_LOGGING_STEPS": "1", "ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"x {processes} processes" in done.stderr
    return losses(json.loads((run.folder / "lora" / "curve.json").read_text()))


def test_two_processes_equal_one_with_twice_the_accumulation(prepared, tmp_path):
    one = launch(variant(prepared, tmp_path / "one", batch_rows=4, accumulate=2), 1, 0)
    two = launch(variant(prepared, tmp_path / "two", batch_rows=4), 2, 29_611)
    assert len(one) >= 5
    np.testing.assert_allclose(one, two, rtol=1e-3)


def test_a_killed_run_resumes_to_the_same_curve(prepared, tmp_path):
    run = variant(prepared, tmp_path / "run", dropout=0.3, epochs=2)
    best, whole = finetune(run.space, tmp_path / "c1")
    checkpoints = tmp_path / "c2"
    shutil.copytree(tmp_path / "c1", checkpoints)
    first, second = sorted(checkpoints.glob("checkpoint-*"), key=lambda p: int(p.name.split("-")[1]))
    (second / "trainer_state.json").write_text('{"best_global')  # as if killed while the second one was written
    resumed_from = last_checkpoint(checkpoints)
    assert resumed_from == str(first)
    assert not second.exists()
    again, resumed = finetune(run.space, checkpoints)
    assert len(losses(whole["curve"])) >= 8
    np.testing.assert_allclose(losses(whole["curve"]), losses(resumed["curve"]), rtol=1e-6)
    assert resumed["best_ndcg@10"] == whole["best_ndcg@10"]
    state = again.trained_state()
    assert all(torch.allclose(value, state[name]) for name, value in best.trained_state().items())
    assert not again.training


def test_the_best_state_on_validation_is_kept(prepared, tmp_path, monkeypatch):
    """Evaluations whose truth is known: the second of four is the best, and patience ends the run after the fourth."""
    run = variant(prepared, tmp_path / "run", epochs=3, evals=6, patience=2)
    answers = iter([0.1, 0.4, 0.3, 0.2, 0.9, 0.9])
    seen = []

    def ndcg(top, targets):
        value = next(answers)
        return {"ndcg@10": np.array([value]), "recall@10": np.array([value])}

    monkeypatch.setattr("genrec.training.finetune.per_user", ndcg)
    backbone, result = finetune(run.space, tmp_path / "c")
    seen = [entry["eval_ndcg@10"] for entry in result["curve"] if "eval_ndcg@10" in entry]
    assert seen == [0.1, 0.4, 0.3, 0.2]
    assert result["best_ndcg@10"] == 0.4
    steps = [entry["step"] for entry in result["curve"] if "eval_ndcg@10" in entry]
    kept = load_file(tmp_path / "c" / f"checkpoint-{steps[1]}" / "trained.safetensors")
    last = load_file(tmp_path / "c" / f"checkpoint-{steps[3]}" / "trained.safetensors")
    state = backbone.trained_state()
    assert all(torch.equal(value, state[name]) for name, value in kept.items())
    assert any(not torch.equal(value, state[name]) for name, value in last.items())


def test_order_is_learned_and_shuffled_histories_are_not(prepared, tmp_path):
    """A floor and a ceiling: a planted successor is learned, the same items in random order stay at chance."""
    rng = np.random.default_rng(0)
    n, users = len(prepared.space.catalogue), 200
    cycle = rng.permutation(n).astype(np.int32)
    planted = [cycle[(rng.integers(n) + np.arange(8)) % n] for _ in range(users)]
    shuffled = [rng.permutation(n)[:8].astype(np.int32) for _ in range(users)]
    reached = {}
    for name, histories in (("planted", planted), ("shuffled", shuffled)):
        run = variant(prepared, tmp_path / name, epochs=25, learning_rate=1e-2, valid_users=users, evals=1)
        cases = Cases(np.arange(users), [h[:-1] for h in histories], np.array([h[-1] for h in histories], np.int32))
        split = dataclasses.replace(run.space.split, train=[h[:-1] for h in histories], valid=cases)
        run.space.__dict__["split"] = split
        reached[name] = finetune(run.space, tmp_path / f"c-{name}")[1]["best_ndcg@10"]
    # a random order of the 53 unseen items has N@10 of 4.54 / 53
    chance = np.sum(1 / np.log2(np.arange(10) + 2)) / (n - 7)
    assert reached["planted"] > 0.5
    assert abs(reached["shuffled"] - chance) < 3 * 0.22 / np.sqrt(users)


def test_the_stage_keeps_no_checkpoints_and_is_skipped_when_unchanged(prepared, tmp_path, caplog):
    run = variant(prepared, tmp_path / "run", evals=1)
    run.finetune()
    assert not (run.folder / ".checkpoints").exists()
    backbone = run.space.tuned_backbone()
    saved = load_file(run.folder / "lora" / "trained.safetensors")
    assert all(torch.equal(value, saved[name]) for name, value in backbone.trained_state().items())
    with caplog.at_level("INFO", logger="genrec"):
        Run.open(run.folder).finetune()
    assert "lora: unchanged, skipped" in caplog.text


def test_every_sample_sees_its_own_history_only(prepared):
    """Rows hold several histories, which start at position 0 and are numbered."""
    from genrec.training.finetune import samples

    rows = samples(prepared.space)
    assert len(rows) < len(prepared.space.split.train)
    batch = PackedCollator(prepared.space.layout)(rows[:4])
    starts = batch["position_ids"][:, 1:] < batch["position_ids"][:, :-1]
    moved = batch["segments"][:, 1:] != batch["segments"][:, :-1]
    assert torch.equal(starts | moved, moved)
    assert moved.any()


def test_weights_of_another_recipe_are_refused(prepared, tmp_path):
    run = variant(prepared, tmp_path / "run")
    state = run.space.backbone(tuned=True).trained_state()
    state["sid_in"] = state["sid_in"][:-1]
    with pytest.raises(DataError, match=r"do not fit this model: \['sid_in'\]; train again"):
        run.space.backbone(tuned=True).load_trained(state)
