"""Alignment: the frozen LLM stays bit-identical, InfoNCE is what the paper says, and the likelihoods are ordered."""

import math
import shutil

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F

from genrec.artefacts import read_manifest
from genrec.config import resolve_recipe
from genrec.errors import ConfigError
from genrec.pipeline import Run
from genrec.prompts import Answer, Item, render
from genrec.training.align import info_nce, nll_per_prompt, text_embeddings, weights_hash
from genrec.training.texts import held_out_items
from genrec.writer import DEFAULT_STYLE, told
from tests.conftest import tiny_recipe


def test_the_llm_stays_bit_identical_and_a_changed_bit_would_show(prepared):
    backbone = prepared.space.backbone(tuned=False)
    before = weights_hash(backbone.lm)
    assert read_manifest(prepared.folder / "alignment")["result"]["llm_sha256"] == before
    aligned = load_file(prepared.folder / "alignment" / "aligned.safetensors")
    assert all(name.startswith("adapter.") or name == "soft_prompt" for name in aligned)
    with torch.no_grad():  # the control: one bit of one weight
        weight = next(backbone.lm.parameters()).view(torch.int32)
        weight[0, 0] ^= 1
    assert weights_hash(backbone.lm) != before


def test_alignment_trains_the_adapter_and_the_soft_prompt(prepared, tmp_path):
    aligned = load_file(prepared.folder / "alignment" / "aligned.safetensors")
    folder = tmp_path / "run"
    shutil.copytree(prepared.folder, folder, ignore=shutil.ignore_patterns("alignment"))
    fresh = Run(folder, prepared.recipe, folder).space.backbone(tuned=False).state_dict()
    moved = [name for name, value in aligned.items() if not torch.equal(value, fresh[name])]
    assert "soft_prompt" in moved
    assert len(moved) > len(aligned) / 2


def test_aligning_again_starts_anew_and_not_from_the_last_one(prepared, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(prepared.folder, folder)
    Run(folder, prepared.recipe, folder, force=True).align()
    once, twice = (load_file(of / "alignment" / "aligned.safetensors") for of in (prepared.folder, folder))
    assert all(torch.equal(once[name], twice[name]) for name in once)


def test_info_nce_equals_a_plain_loop():
    torch.manual_seed(0)
    queries, keys = torch.randn(5, 7), torch.randn(5, 7)
    total = 0.0
    for i in range(5):
        row = [F.cosine_similarity(queries[i], keys[j], dim=0).item() / 0.07 for j in range(5)]
        column = [F.cosine_similarity(queries[j], keys[i], dim=0).item() / 0.07 for j in range(5)]
        total += math.log(sum(map(math.exp, row))) - row[i]
        total += math.log(sum(map(math.exp, column))) - column[i]
    assert info_nce(queries, keys).item() == pytest.approx(total / 10, rel=1e-5)
    assert info_nce(keys, keys) < info_nce(keys.roll(1, 0), keys)


def test_likelihoods_and_embeddings_are_per_text_and_do_not_depend_on_the_batch(prepared):
    space = prepared.space
    backbone = space.backbone(tuned=False).eval()
    texts = space.catalogue.texts()
    prompts = [space.prompter.item_text(i, texts[i]) for i in range(4)]
    longest = max(len(p.input_ids) for p in prompts)
    together = nll_per_prompt(backbone, prompts, longest)
    alone = [nll_per_prompt(backbone, [p], longest)[0] for p in prompts]
    assert together == pytest.approx(alone, rel=1e-5)
    vectors = text_embeddings(backbone, prompts)
    assert vectors.shape == (4, backbone.sid_in.shape[1])
    torch.testing.assert_close(vectors.mean(0), torch.zeros(vectors.shape[1]), atol=1e-5, rtol=0)


def test_a_scratch_base_tuned_along_reads_pictures_that_the_catalogue_does_not_tell(prepared, tmp_path):
    """Items that took part, against the same model reading another item's soft tokens: the negative control."""
    settings = {
        "steps": 150,
        "learning_rate": 1e-2,
        "batch_size": 32,
        "max_text_tokens": 64,
        "looks": True,
        "tune_base": True,
    }
    scratch = tiny_recipe()["backbone"]["scratch"] | {"layers": 2}
    recipe = resolve_recipe(tiny_recipe(align=settings, backbone={"scratch": scratch, "tune": "full"}))
    folder = tmp_path / "run"
    shutil.copytree(prepared.folder, folder)
    run = Run(folder, recipe, folder)
    run.base()
    run.align()
    result = read_manifest(folder / "alignment")["result"]
    assert set(result["looks_nll"]) == {"own", "other"}
    space = run.space
    backbone = space.backbone(tuned=True).eval()
    assert weights_hash(backbone.lm) == result["llm_sha256"]  # the tuned base goes on into fine-tuning
    apart = held_out_items(60, recipe.seed)
    rows = [row for row in range(60) if not apart[row]]
    looks = {row: told(DEFAULT_STYLE, space.writer.looks(row)) for row in rows}
    own = nll_per_prompt(backbone, [space.prompter.looks(row, DEFAULT_STYLE, looks[row]) for row in rows], 128)
    turned = zip(rows, rows[1:] + rows[:1], strict=True)
    other = nll_per_prompt(backbone, [space.prompter.looks(b, DEFAULT_STYLE, looks[a]) for a, b in turned], 128)
    assert own.mean() < other.mean() / 2


def test_only_a_scratch_base_that_is_tuned_whole_is_tuned_while_aligning():
    with pytest.raises(ConfigError, match=r"found backbone\.base 'scratch:' and backbone\.tune 'lora'"):
        resolve_recipe(tiny_recipe(align={"tune_base": True}))


def test_own_soft_tokens_tell_more_of_the_text_than_anothers(prepared, tmp_path):
    """Measured on items that took part in training, so that learning is sure; without it the two would tie."""
    scratch = tiny_recipe()["backbone"]["scratch"] | {"steps": 120, "layers": 2}
    settings = {"steps": 200, "learning_rate": 1e-2, "batch_size": 32, "max_text_tokens": 32}
    recipe = resolve_recipe(tiny_recipe(align=settings, backbone={"scratch": scratch}))
    folder = tmp_path / "run"
    shutil.copytree(prepared.folder, folder)
    run = Run(folder, recipe, folder)
    run.base()
    run.align()
    result = read_manifest(folder / "alignment")["result"]
    assert result["curve"][-1]["loss"] < result["curve"][0]["loss"] - 0.15
    assert result["held_out_items"] == 6
    texts, prompter = run.space.catalogue.texts(), run.space.prompter
    own = [prompter.item_text(i, texts[i]) for i in range(60)]
    answers = [render("item_text", item=Item((i + 7) % 60), answer=Answer(texts[i])) for i in range(60)]
    other = [prompter.encode(parts) for parts in answers]

    def gain(trained):
        backbone = (run if trained else bare).space.backbone(tuned=False).eval()
        return nll_per_prompt(backbone, other, 512) - nll_per_prompt(backbone, own, 512)

    aligned = gain(True)
    assert aligned.mean() > 3 * aligned.std() / math.sqrt(len(aligned))
    shutil.copytree(folder, tmp_path / "bare", ignore=shutil.ignore_patterns("alignment"))
    bare = Run(tmp_path / "bare", recipe, tmp_path / "bare")
    assert abs(gain(False).mean()) < aligned.mean() / 2
