"""genrec prompts render | compare: see what a prompt's template makes of a user and an item, before it is trained."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from genrec.errors import ConfigError

if TYPE_CHECKING:
    from genrec.prompts import Part
    from genrec.serving.export import Export

prompts_app = typer.Typer(no_args_is_help=True, help="see what the prompts' templates render to")
console = Console()
Folder = Annotated[Path, typer.Argument(help="an export folder")]
Item = Annotated[str, typer.Option(help="item id")]
History = Annotated[list[str], typer.Option(help="item id of the history, oldest first; repeat it")]
Task = Annotated[str, typer.Option(help="describe, explain or headline")]
Style = Annotated[str, typer.Option(help="short plain, long plain, short playful or long playful")]


def shown(parts: list[Part]) -> str:
    """A prompt as a person reads it: text as it is, what is not text in brackets."""
    from genrec.prompts import Answer, Sid, Soft, SoftPrompt

    words = []
    for part in parts:
        match part:
            case Sid(item):
                words.append(f"[id of {item}]")
            case Soft(item):
                words.append(f"[soft tokens of {item}]")
            case SoftPrompt():
                words.append("[soft prompt]")
            case Answer():
                words.append("[the model writes]")
            case _:
                words.append(part)
    return "".join(words)


def _template(path: Path | None) -> str | None:
    if path is None:
        return None
    try:
        return path.read_text(encoding="utf-8").removesuffix("\n")
    except (OSError, UnicodeDecodeError) as err:
        raise ConfigError(f"{path}: no readable template ({err}); give a .jinja file in UTF-8") from err


def _parts(
    export: Export, task: str, item: str, history: list[str], style: str, template: Path | None
) -> tuple[list[Part], int]:
    """The prompt's parts and its number of tokens."""
    from genrec.serving.resolve import item_rows
    from genrec.writer import STYLES, TASKS

    if task not in TASKS or style not in STYLES:
        raise ConfigError(f"--task is one of {', '.join(TASKS)}; --style one of {', '.join(STYLES)}")
    (row,) = item_rows(export.catalogue, [item])
    rows = item_rows(export.catalogue, history)
    parts = export.prompter.parts(task, rows, row, style=style, template=_template(template))
    return parts, len(export.prompter.encode(parts).input_ids)


@prompts_app.command()
def render(
    export: Folder,
    item: Item,
    history: History = [],  # noqa: B006 - typer makes a new one
    task: Task = "describe",
    style: Style = "short plain",
    template: Annotated[Path | None, typer.Option(help="another .jinja file for the task")] = None,
) -> None:
    """One prompt for one user and item."""
    from genrec.serving.export import Export

    parts, tokens = _parts(Export.load(export), task, item, history, style, template)
    console.print(escape(shown(parts)), soft_wrap=True)
    console.print(f"{tokens} tokens")


@prompts_app.command()
def compare(
    export: Folder,
    template: Annotated[Path, typer.Argument(help="a .jinja file to set beside the task's own")],
    item: Item,
    history: History = [],  # noqa: B006 - typer makes a new one
    task: Task = "describe",
    style: Style = "short plain",
    max_tokens: Annotated[int, typer.Option(help="of each text")] = 64,
) -> None:
    """The task's own prompt and another one: what they render to, and what the model writes after each.

    The model was trained on its own prompt, so it may do badly after another one until it is trained with that.
    """
    from genrec.serving.export import Export
    from genrec.serving.torch_engine import TorchEngine

    loaded = Export.load(export)
    engine = TorchEngine(loaded)
    table = Table("", "prompt", "tokens", "text", show_lines=True)
    for name, path in (("its own", None), (template.name, template)):
        parts, tokens = _parts(loaded, task, item, history, style, path)
        result = engine.continue_prompt(loaded.prompter.encode(parts), max_tokens)
        table.add_row(escape(name), escape(shown(parts)), str(tokens), escape(result.text))
    console.print(table)
