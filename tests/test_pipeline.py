"""The whole path on a tiny embedded catalogue: what is written, what is skipped, what agrees."""

import json
import math
import re
import shutil

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from genrec.artefacts import MANIFEST, key_of, read_manifest, write_json
from genrec.baseline_rankings import rank_baseline
from genrec.cli import app
from genrec.config import resolve_recipe
from genrec.errors import ArtefactError
from genrec.metrics import KS
from genrec.pipeline import Run
from genrec.serving.engine import RecommendRequest
from genrec.serving.export import Export
from genrec.serving.torch_engine import TorchEngine
from genrec.whole_path import quantise_and_compare
from tests.conftest import WITH_ABLATIONS, logged, manifest_times, ran, tiny_recipe

STAGES = ["source", "catalog", "interactions", "features/text", "features/image", "base", "semantic_ids", "alignment"]
BASELINES = [f"baselines/{name}" for name in ("popularity", "markov", "itemknn", "sasrec")]
STAGES += [*BASELINES, "lora", "ranking", "eval", "export", "export-int8", "export-nf4", "quantised"]
MODELS = ["oracle", "popularity", "markov", "itemknn", "sasrec", "genrec", "genrec-no-image", "genrec-no-soft"]


def test_every_stage_leaves_an_artefact(whole):
    run, _, lines = whole
    found = [re.sub("/manifest.json$", "", name) for name in manifest_times(run.folder)]
    variants = [f"ablations/genrec-no-image/{s}" for s in ("semantic_ids", "alignment", "lora", "ranking")]
    variants += [f"ablations/genrec-no-soft/{s}" for s in ("semantic_ids", "lora", "ranking")]
    assert sorted(found) == sorted(STAGES + variants)
    assert sorted(ran(lines)) == sorted(STAGES + [v.split("/", 2)[2] for v in variants])
    assert not [p for p in run.folder.rglob(".*") if p.name.endswith((".part", ".old", ".tmp"))]
    assert not (run.folder / ".checkpoints").exists()


def test_metrics_have_the_documented_form(whole):
    run, metrics, _ = whole
    assert metrics == json.loads((run.folder / "eval" / "metrics.json").read_text())
    assert list(metrics["models"]) == MODELS
    assert sorted(metrics) == sorted(["data", "split", "users", "models", "paired", "groups", "seconds", "peak_rss_mb"])
    assert metrics["data"] == "tiny"
    assert metrics["split"] == "leave_one_out"
    assert metrics["users"] == len(run.space.split.test.targets) == 120
    assert metrics["seconds"] > 0
    assert metrics["peak_rss_mb"] > 100
    assert sorted(metrics["paired"]) == sorted(f"genrec-{m}" for m in MODELS if m not in ("genrec", "oracle"))
    names = {f"recall@{k}" for k in KS} | {"ndcg@5", "ndcg@10", "mrr", "tail_share", "invalid_rate"}
    for model, values in metrics["models"].items():
        assert set(values) == names | {"coverage"}, model
        assert values["invalid_rate"]["mean"] == 0, model
        for name, value in values.items():
            assert set(value) == {"mean", "ci95"}
            assert 0 <= value["mean"] <= 1, (model, name)
            if name != "coverage":
                low, high = value["ci95"]
                assert low <= value["mean"] + 1e-9
                assert high >= value["mean"] - 1e-9
    for pair, values in metrics["paired"].items():
        other = metrics["models"][pair.removeprefix("genrec-")]
        for name, value in values.items():
            difference = metrics["models"]["genrec"][name]["mean"] - other[name]["mean"]
            assert math.isclose(value["mean"], difference, abs_tol=1e-9), (pair, name)
    assert set(metrics["groups"]) == {"picture", "text", "order"}
    assert sum(group["users"] for group in metrics["groups"].values()) == 120


def test_a_second_start_skips_every_stage(whole):
    run, metrics, _ = whole
    before = manifest_times(run.folder)
    again, lines = logged(run)
    assert ran(lines) == []
    assert sum(line.endswith(": unchanged, skipped") for line in lines) == len(before)
    assert manifest_times(run.folder) == before
    assert again == metrics


EVAL_ON = {"eval", "export", "export-int8", "export-nf4", "quantised"}
LORA_ON = EVAL_ON | {"lora", "ranking"}
IDS_ON = LORA_ON | {"semantic_ids", "alignment"}
NO_IMAGE = {f"ablations/genrec-no-image/{stage}" for stage in ("semantic_ids", "alignment", "lora", "ranking")}
NO_SOFT = {f"ablations/genrec-no-soft/{stage}" for stage in ("semantic_ids", "lora", "ranking")}
TUNED = {of for of in NO_IMAGE | NO_SOFT if of.endswith(("lora", "ranking"))}


@pytest.mark.parametrize(
    ("sections", "expected"),
    [
        ({}, set()),
        ({"data": {"max_text_chars": 9_999}}, {*STAGES, *NO_IMAGE, *NO_SOFT} - {"source"}),
        (
            {"data": {"max_history": 7}},
            {*IDS_ON, *NO_IMAGE, *NO_SOFT, *BASELINES, "interactions"},
        ),
        ({"encode": {"image": None}}, {*IDS_ON, *NO_SOFT}),
        ({"semantic_ids": {"codes": 7}}, {*IDS_ON, *NO_IMAGE, *NO_SOFT}),
        ({"adapter": {"width": 8}}, {*LORA_ON, "alignment", *NO_IMAGE, *NO_SOFT} - {
            f"ablations/{name}/semantic_ids" for name in ("genrec-no-image", "genrec-no-soft")
        }),
        ({"finetune": {"learning_rate": 1e-3}}, LORA_ON | TUNED),
        ({"evaluate": {"bootstrap": 101}}, EVAL_ON),
        ({"new_items": {"relatives": 3}}, EVAL_ON | {"ranking"} | {of for of in TUNED if of.endswith("ranking")}),
        ({"serve": {"quantise": ["int8"]}}, {"quantised"}),
    ],
    ids=lambda value: "-".join(f"{k}.{n}" for k, v in value.items() for n in v) if isinstance(value, dict) else "",
)  # fmt: skip
def test_one_setting_runs_only_what_depends_on_it(whole, tmp_path, monkeypatch, sections, expected):
    """Only the keys are computed, on a copy: which stages would run is what is asked."""
    run, _, _ = whole
    folder = tmp_path / "tiny"
    shutil.copytree(run.folder, folder)
    started = set()

    def note(run_dir, name, settings, inputs, build, force=False):
        target = run_dir / name
        manifest = read_manifest(target)
        key = key_of({"stage": name, "settings": dict(settings), "inputs": dict(inputs)})
        if key != manifest["key"]:
            started.add(str(target.relative_to(folder)))
            write_json(target / MANIFEST, {**manifest, "key": key})  # so that what depends on it sees a new key
        return target

    for module in ("pipeline", "baseline_rankings", "whole_path", "serving.quantise"):
        monkeypatch.setattr(f"genrec.{module}.run_stage", note)
    sections = {**sections, "evaluate": {**WITH_ABLATIONS, **sections.get("evaluate", {})}}
    logged(Run.create(resolve_recipe(tiny_recipe(**sections)), tmp_path))
    assert started == expected


def test_a_sasrec_takes_a_setting_searched_elsewhere(whole, tmp_path):
    run, _, _ = whole
    shutil.copytree(run.folder, tmp_path / "tiny")
    copy = Run.create(resolve_recipe(tiny_recipe(evaluate={"sasrec_search": True, "sasrec_epochs": 1})), tmp_path)
    setting = {"lr": 0.003, "dropout": 0.1, "width": 16}
    folder = rank_baseline(copy, "sasrec", setting)
    assert read_manifest(folder)["result"].items() >= setting.items()
    assert read_manifest(folder)["key"] != read_manifest(run.folder / "baselines" / "sasrec")["key"]


def test_the_variant_without_pretraining_starts_from_random_weights(whole, tmp_path):
    run, _, _ = whole
    folder = tmp_path / "tiny"
    shutil.copytree(run.folder, folder)
    variant = Run.open(folder).variant("genrec-no-pretraining")
    variant.train()
    assert variant.space.base_folder == variant.folder / "base"
    assert read_manifest(variant.folder / "base")["result"]["curve"] == []
    assert not (variant.folder / "alignment").exists()
    assert read_manifest(folder / "base")["result"]["curve"] != []
    assert Run.open(folder).variant("genrec-no-soft").space.base_folder == folder / "base"


def test_the_export_recommends_what_was_ranked_in_the_test(whole):
    run, _, _ = whole
    top = np.load(run.folder / "eval" / "rankings.npz")["genrec"]
    export = Export.load(run.folder / "export")
    cases, ids = run.space.split.test, np.array(export.catalogue.item_ids)
    chosen = np.random.default_rng(0).choice(len(cases), 25, replace=False)
    beams = run.recipe.evaluate.beams
    requests = [RecommendRequest([*ids[cases.histories[c]]], k=beams, beams=beams) for c in chosen]
    lists = TorchEngine(export, "cpu").recommend(requests)
    for case, items in zip(chosen, lists, strict=True):
        assert [item.item_id for item in items] == [*ids[top[case][top[case] >= 0]]]


def test_the_report_shows_pictures(whole):
    run, _, _ = whole
    html = (run.folder / "report.html").read_text(encoding="utf-8")
    assert "<title>tiny" in html
    assert html.count("data:image/") > 20
    assert not re.search(r'(src|href)="(?!data:|#)|url\((?!#)', html), "the report must be one file"
    for model in MODELS:
        assert model in html


def test_quantised_copies_are_compared(whole):
    run, _, _ = whole
    rows = json.loads((run.folder / "quantised" / "comparison.json").read_text())
    assert [row["export"] for row in rows] == ["export", "export-int8", "export-nf4"]
    assert rows[0]["overlap@10"] == 1
    assert all(0.5 < row["overlap@10"] <= 1 for row in rows)
    assert all(row["users"] == 120 for row in rows)
    # test users are scored by the same ranker as in the table
    ndcg = json.loads((run.folder / "eval" / "metrics.json").read_text())["models"]["genrec"]["ndcg@10"]["mean"]
    assert rows[0]["ndcg@10"] == pytest.approx(ndcg, abs=0.02)


def test_a_copy_that_agrees_too_little_is_not_served(whole, tmp_path):
    run, _, _ = whole
    folder = tmp_path / "tiny"
    shutil.copytree(run.folder, folder)
    Run.create(resolve_recipe(tiny_recipe(evaluate=WITH_ABLATIONS, serve={"min_overlap": {"nf4": 1}})), tmp_path)
    rows = quantise_and_compare(folder / "export", ["nf4"], 120)
    assert rows[1]["overlap@10"] < 1
    assert [row["blessed"] for row in rows] == [True, False]
    with pytest.raises(ArtefactError, match=r"refused: .* serve\.min_overlap\.nf4 demands 1; serve the original"):
        Export.load(folder / "export-nf4")
    done = CliRunner().invoke(app, ["quantize", str(folder / "export"), "--method", "nf4", "--users", "120"])
    assert (type(done.exception), done.exit_code) == (ArtefactError, 1)
    Run.create(resolve_recipe(tiny_recipe(evaluate=WITH_ABLATIONS, serve={"min_overlap": {"nf4": 0.1}})), tmp_path)
    assert quantise_and_compare(folder / "export", ["nf4"], 120)[1]["blessed"]
    assert Export.load(folder / "export-nf4").manifest["result"]["quantised"]["method"] == "nf4"


def test_a_moved_run_is_not_run_again(whole, tmp_path):
    run, _, _ = whole
    folder = tmp_path / "elsewhere"
    shutil.copytree(run.folder, folder)
    moved = Run.open(folder)
    _, lines = logged(moved)
    # the pictures' paths are new, their bytes are not
    assert ran(lines) == ["catalog"]
    assert all(str(path).startswith(str(folder)) for path in moved.space.catalogue.images)


def test_a_replaced_picture_is_noticed(whole, tmp_path):
    run, _, _ = whole
    folder = tmp_path / "tiny"
    shutil.copytree(run.folder, folder)
    moved = Run.open(folder)
    moved.prepare()
    before = np.load(folder / "features" / "image" / "values.npy")
    picture = next((folder / "source" / "pictures").glob("*.png"))
    Image.new("RGB", (64, 64), "red").save(picture)
    changed = Run.open(folder)
    changed.prepare()
    changed.encode()
    assert not np.array_equal(np.load(folder / "features" / "image" / "values.npy"), before)
    text = read_manifest(folder / "features" / "text")
    assert text == read_manifest(run.folder / "features" / "text")
    picture.unlink()
    lost = Run.open(folder)
    lost.prepare()
    lost.encode()
    assert np.load(folder / "features" / "image" / "present.npy").sum() == 59


def test_force_runs_every_stage_again(prepared, tmp_path):
    folder = tmp_path / "tiny"
    shutil.copytree(prepared.folder, folder)
    before = manifest_times(folder)
    run = Run(folder, prepared.recipe, folder, force=True)
    run.prepare()
    run.encode()
    after = manifest_times(folder)
    redone = {name for name in after if after[name] != before[name]}
    assert redone == {f"{s}/manifest.json" for s in STAGES[:5]}


def test_leaving_alignment_out_removes_the_old_one(prepared, tmp_path):
    folder = tmp_path / "tiny"
    shutil.copytree(prepared.folder, folder)
    assert (folder / "alignment").is_dir()
    Run(folder, resolve_recipe(tiny_recipe(align={"steps": 0})), folder).align()
    assert not (folder / "alignment").exists()


def test_open_needs_a_run(tmp_path):
    with pytest.raises(ArtefactError, match=r"no recipe\.yaml there.*genrec run RECIPE"):
        Run.open(tmp_path)
