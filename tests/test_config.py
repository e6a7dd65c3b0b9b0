"""Recipes: every shipped one loads, every wrong one says where and what instead."""

from pathlib import Path

import pytest
import yaml

from genrec.config import Recipe, load_recipe, resolve_recipe
from genrec.errors import ConfigError
from tests.conftest import RECIPE

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("path", sorted((ROOT / "training" / "recipes").glob("*.yaml")), ids=lambda p: p.stem)
def test_shipped_recipes_load(path):
    assert load_recipe(path).name


def test_a_resolved_recipe_reads_back_as_itself(tmp_path):
    recipe = resolve_recipe(RECIPE)
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe.model_dump(mode="json")))
    assert load_recipe(path) == recipe


def test_paths_are_relative_to_the_recipe(tmp_path):
    raw = {"name": "x", "data": {"items": "a/items.csv", "interactions": "/b/log.csv"}}
    raw["encode"] = {"text": {"kind": "precomputed", "path": "v.npy"}}
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(raw))
    recipe = load_recipe(path)
    assert recipe.data.items == tmp_path / "a" / "items.csv"
    assert recipe.data.interactions == Path("/b/log.csv")
    assert recipe.encode.text is not None
    assert recipe.encode.text.path == tmp_path / "v.npy"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"finetune": {"learningrate": 1}}, r"finetune\.learningrate: unknown setting; did you mean 'learning_rate'\?"),
        ({"backbone": {"lora": {"rank": 4}}}, r"backbone\.lora\.rank: unknown setting; valid: \['r', 'alpha'"),
        ({"data": {"synthetic": {"items": 5}}}, r"data\.synthetic\.items: unknown setting; did you mean 'n_items'\?"),
        ({"backbone": {"load_in": "int4"}}, r"backbone\.load_in: .*'int8' or 'nf4' \(found 'int4'\)"),
        ({"name": "a/b"}, r"name: .*\(found 'a/b'\)"),
        ({"data": {}}, r"give either data\.synthetic or both data\.items and data\.interactions"),
        ({"data": {"items": "x.csv"}}, r"data\.items and data\.interactions go together; one of them is missing"),
        ({"encode": {"text": {"kind": "transformers"}}}, r"encoder kind transformers needs model"),
        ({"encode": {"text": {"kind": "precomputed"}}}, r"encoder kind precomputed needs path"),
    ],
)
def test_wrong_settings_are_named(changes, message):
    with pytest.raises(ConfigError, match=message):
        resolve_recipe({**RECIPE, **changes})


def test_every_setting_is_described():
    def fields(model):
        for name, field in model.model_fields.items():
            for part in [field.annotation, *getattr(field.annotation, "__args__", ())]:
                if hasattr(part, "model_fields"):
                    yield from fields(part)
            yield name, field

    sections = {"data", "encode", "semantic_ids", "backbone", "adapter", "align", "finetune", "sequence"}
    sections |= {"mix", "new_items", "evaluate", "serve"}
    missing = [name for name, field in fields(Recipe) if not field.description and name not in sections]
    assert missing == []


def test_a_recipe_that_is_no_mapping(tmp_path):
    (tmp_path / "r.yaml").write_text("- 1")
    with pytest.raises(ConfigError, match=r"r\.yaml: expected a mapping of settings, found list"):
        load_recipe(tmp_path / "r.yaml")
