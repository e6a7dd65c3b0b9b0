"""README and docs say what is there: settings, links, commands, launches, recipes, requests, code.

`python -m tests.test_docs` writes the tables of docs/recipes.md again after a change of genrec/config.py.
"""

import importlib.util
import json
import re
from collections.abc import Iterator
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_origin

import pytest
import typer
import yaml
from fastapi.testclient import TestClient
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from genrec.cli import app
from genrec.config import Recipe, resolve_recipe, validated
from genrec.recommender import Recommender
from genrec.serving.gateway import create_app
from genrec.system_recipe import SystemRecipe
from tests.export_fixture import make_export

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
SETTINGS = ROOT / "docs" / "recipes.md"
START, END = "<!-- settings -->\n", "<!-- end of settings -->\n"
SIGNS = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}
WORDS = {int: "whole number", float: "number", str: "text", bool: "true, false", Path: "path"}


def is_model(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, BaseModel)


def parts(field: FieldInfo) -> list[Any]:
    """A field's type, or the members of its union."""
    kind = field.annotation
    return [kind] if get_origin(kind) in (None, Literal, list, dict) else list(get_args(kind))


def takes(kind: Any) -> str:
    """What one member of a field's type takes, in words."""
    if get_origin(kind) is Literal:
        return ", ".join(f"`{value}`" for value in get_args(kind))
    if get_origin(kind) is list:
        return f"list of {takes(get_args(kind)[0])}"
    if get_origin(kind) is dict:
        return "mapping"
    return "null" if kind is NoneType else "settings" if is_model(kind) else WORDS[kind]


def row(name: str, field: FieldInfo) -> str:
    """A setting's line: name, what it takes, default, meaning."""
    found = " or ".join(map(takes, parts(field)))
    limits = [f"{SIGNS[k]} {v:,}" for m in field.metadata for k, v in limits_of(m) if k in SIGNS]
    default = field.default
    if field.is_required():
        shown = "required"
    elif isinstance(default, BaseModel):
        shown = "its own"
    else:
        shown = f"`{default:g}`" if isinstance(default, float) else f"`{json.dumps(default)}`"
    return f"| `{name}` | {', '.join([found, *limits])} | {shown} | {field.description or 'below'} |"


def limits_of(constraint: Any) -> Iterator[tuple[str, Any]]:
    """A constraint of pydantic as name and bound."""
    return ((key, getattr(constraint, key)) for key in SIGNS if hasattr(constraint, key))


def models(model: type[BaseModel], path: str = "") -> Iterator[tuple[str, type[BaseModel]]]:
    """Every settings model with its place in a recipe, outermost first."""
    yield path, model
    for name, field in model.model_fields.items():
        for kind in filter(is_model, parts(field)):
            yield from models(kind, f"{path}.{name}".lstrip("."))


def tables() -> str:
    """One table per settings model, each model once."""
    places: dict[type[BaseModel], list[str]] = {}
    for path, model in models(Recipe):
        places.setdefault(model, []).append(f"`{path}`" if path else "The recipe itself")
    text = []
    for model, paths in places.items():
        text += [f"## {', '.join(paths)}", "", str(model.__doc__).strip(), ""]
        text += ["| setting | takes | default | meaning |", "|---|---|---|---|"]
        text += [*(row(name, field) for name, field in model.model_fields.items()), ""]
    return "\n".join(text)


def code(page: Path) -> list[str]:
    """Fenced blocks and inline code of a page."""
    return re.findall(r"```.*?```|`[^`\n]+`", page.read_text(encoding="utf-8"), re.DOTALL)


def options(command: Any) -> set[str]:
    """A command's options, and those of the commands below it."""
    own = {option for parameter in command.params for option in parameter.opts}
    return own.union(*(options(below) for below in getattr(command, "commands", {}).values()))


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)


def test_the_recipes_page_is_what_the_models_say() -> None:
    _, rest = SETTINGS.read_text(encoding="utf-8").split(START)
    assert rest.split(END)[0] == tables(), "run `python -m tests.test_docs` and commit docs/recipes.md"


@pytest.mark.parametrize("page", [*PAGES, *sorted(ROOT.glob("[CS]*.md"))], ids=lambda p: str(p.relative_to(ROOT)))
def test_every_relative_link_leads_somewhere(page: Path) -> None:
    prose = re.sub(r"```.*?```|<!--.*?-->", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    links = [link.split("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", prose) if "://" not in link]
    assert [link for link in links if not (page.parent / link).exists()] == []


def test_every_command_and_option_exists() -> None:
    commands = {name: options(command) for name, command in typer.main.get_command(app).commands.items()}  # type: ignore[attr-defined]
    named = set()
    for page in PAGES:
        for line in (line for part in code(page) for line in part.splitlines()):
            for name, rest in re.findall(r"(?<!from )(?<!import )(?<!cd )\bgenrec ([a-z]+)([^#`]*)", line):
                assert name in commands, f"{page.name}: no command {name!r} in {line!r}"
                assert set(re.findall(r"--[a-z-]+", rest)) <= commands[name], f"{page.name}: {line}"
                named.add(name)
    assert named == set(commands), "README or docs leave a command out"


def test_every_launched_module_and_named_file_exists() -> None:
    for page in PAGES:
        text = "\n".join(code(page))
        for module in re.findall(r"-m (genrec[\w.]*)", text):
            assert importlib.util.find_spec(module), f"{page.name}: {module}"
        for path in re.findall(r"\b(?:genrec|adapters|prompts|training|serving|tests)/[\w./-]+\.\w+", text):
            assert (ROOT / path).exists(), f"{page.name}: {path}"


def test_every_recipe_in_the_pages_loads() -> None:
    snippets = [snippet for page in PAGES for snippet in blocks(page, "yaml")]
    assert snippets
    for snippet in snippets:
        raw = yaml.safe_load(snippet)
        if "prove" in raw:
            validated(SystemRecipe, raw, source=snippet)
        else:
            resolve_recipe({"name": "x", "data": {"synthetic": {}}, **raw}, source=snippet)


def test_all_python_compiles() -> None:
    for page in PAGES:
        for snippet in blocks(page, "python"):
            if "->" not in snippet:  # signatures, not code
                assert compile(snippet, str(page), "exec").co_code


def test_the_readme_works_on_an_export(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its first Python and its curl, on a tiny export whose ids are written without leading zeros."""
    export = make_export(tmp_path)
    readme = re.sub(r"item-0*(\d)", r"item-\1", (ROOT / "README.md").read_text(encoding="utf-8"))
    (program, *_) = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    exec(program.replace("runs/demo/export", str(export)), {})
    printed = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in printed[:5]] == list("12345")
    (body,) = re.findall(r"-d '(.*?)'", readme)
    with Recommender.load(export, engine="torch") as recommender:
        client = TestClient(create_app(recommender.engine, recommender.export))
        answer = client.post("/v1/recommend", content=body, headers={"content-type": "application/json"})
        assert 1 <= len(answer.json()["items"]) <= json.loads(body)["k"]
        assert all("lamp" in item["title"] for item in answer.json()["items"])
        assert client.get("/healthz").json()["status"] == "ok"


if __name__ == "__main__":
    before, after = SETTINGS.read_text(encoding="utf-8").split(START)
    SETTINGS.write_text(before + START + tables() + END + after.split(END)[1], encoding="utf-8")
