"""The command line: genrec run | init | doctor | serve | loadtest | keys | quantize | features | recommend | describe |
evaluate | audit | prompts | systems."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.logging import RichHandler
from rich.markup import escape
from rich.table import Table

from genrec.errors import GenrecError
from genrec.keys_cli import keys_app
from genrec.prompts_cli import prompts_app
from genrec.systems_cli import systems_app

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    help="From a catalogue and a log to a served generative recommender.",
)
app.add_typer(keys_app, name="keys")
app.add_typer(prompts_app, name="prompts")
app.add_typer(systems_app, name="systems")
console = Console()
Runs = Annotated[Path, typer.Option(help="folder that holds one folder per run")]
Force = Annotated[bool, typer.Option("--force", help="run stages even when nothing changed")]


@app.callback()
def _logging(verbose: Annotated[bool, typer.Option("--verbose", help="say more")] = False) -> None:
    logging.basicConfig(
        level=logging.WARNING,
        format="%(message)s",
        handlers=[RichHandler(console=Console(stderr=True), show_path=False, rich_tracebacks=True)],
    )
    logging.getLogger("genrec").setLevel(logging.DEBUG if verbose else logging.INFO)


@app.command()
def run(
    recipe: Annotated[Path, typer.Argument(help="a recipe: genrec init writes one")],
    runs: Runs = Path("runs"),
    force: Force = False,
) -> None:
    """The whole path: prepare, encode, ids, align, fine-tune, evaluate, report, export, quantise."""
    from genrec.config import load_recipe
    from genrec.evaluate import format_table
    from genrec.pipeline import Run
    from genrec.whole_path import whole_path

    done = Run.create(load_recipe(recipe), runs, force)
    metrics = whole_path(done)
    console.print(format_table(metrics))
    console.print(f"report: {done.folder / 'report.html'}")
    console.print(f"serve:  genrec serve {done.folder / 'export'}")


@app.command()
def init(
    items: Annotated[Path, typer.Argument(help="catalogue: JSONL, CSV or Parquet")],
    log: Annotated[Path, typer.Argument(help="interactions: JSONL, CSV or Parquet")],
    out: Annotated[Path, typer.Option(help="where to write the recipe")] = Path("recipe.yaml"),
) -> None:
    """Look at two files and write a commented recipe for them."""
    from genrec.artefacts import write_text
    from genrec.init_recipe import propose_recipe

    write_text(out, propose_recipe(items, log))
    console.print(f"{out}: read it, change what you like, then: genrec run {out}")


@app.command()
def doctor() -> None:
    """What this machine can do, and what to install."""
    from genrec.doctor import diagnose

    table = Table("what", "status", "found", "what to do")
    findings = diagnose()
    colours = {"ok": "green", "warn": "yellow", "missing": "red"}
    for finding in findings:
        table.add_row(
            finding.name,
            f"[{colours[finding.status]}]{finding.status}[/]",
            escape(finding.found),
            escape(finding.advice),
        )
    console.print(table)


@app.command()
def serve(
    context: typer.Context,
    export: Annotated[Path, typer.Argument(help="an export folder")],
    engine: Annotated[str, typer.Option(help="auto, torch or vllm")] = "auto",
    host: Annotated[str, typer.Option(help="address to listen on; without --keys a loopback address")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="port to listen on")] = 8000,
    store: Annotated[
        str | None,
        typer.Option(
            envvar="GENREC_STORE",
            help="where histories are kept: sqlite:///FILE, postgresql://..., or none; default: beside the export",
        ),
    ] = None,
    keys: Annotated[
        Path | None, typer.Option(envvar="GENREC_KEYS", help="file of API keys: genrec keys add makes it")
    ] = None,
) -> None:
    """Answer over HTTP: lists, texts, events; /openapi.json says how."""
    from genrec.serving.server import log_as_json
    from genrec.serving.server import serve as serve_export

    log_as_json(logging.getLogger("genrec").level)
    source = context.get_parameter_source("store")
    typed = source is not None and source.name == "COMMANDLINE"
    serve_export(export, engine=engine, host=host, port=port, store=store, keys=keys, typed_store=typed)


@app.command()
def loadtest(
    url: Annotated[str, typer.Argument(help="a running gateway")],
    rate: Annotated[float, typer.Option(min=0.1, help="requests a second")] = 10.0,
    seconds: Annotated[float, typer.Option(min=1, help="how long to send them")] = 30.0,
    users: Annotated[int, typer.Option(min=1, help="made-up users who ask")] = 100,
    deadline_ms: Annotated[int, typer.Option(min=1, max=30_000, help="of each request")] = 1_000,
    key_file: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="file that holds an API key, scope recommend")
    ] = None,
    find_capacity: Annotated[
        bool, typer.Option("--find-capacity", help="search the highest rate that keeps the deadline, from --rate on")
    ] = False,
    seed: Annotated[int, typer.Option(help="of arrivals and histories")] = 0,
    out: Annotated[Path, typer.Option(help="JSON file to write")] = Path("loadtest.json"),
) -> None:
    """Offer a gateway requests at a fixed rate and say what came of them."""
    import dataclasses
    import json
    from functools import partial

    from genrec.artefacts import write_text
    from genrec.errors import ConfigError
    from genrec.serving import loadtest as load

    key = key_file.read_text(encoding="utf-8").strip() if key_file else None
    test = partial(load.measure, url, seconds=seconds, users=users, seed=seed, deadline_ms=deadline_ms, key=key)
    found = load.find_capacity(lambda at: test(rate=at), rate) if find_capacity else test(rate=rate)
    if found is None:
        raise ConfigError(f"{url}: misses {deadline_ms} ms at every rate; allow more with --deadline-ms")
    text = json.dumps(dataclasses.asdict(found), indent=2)
    write_text(out, text + "\n")
    console.print_json(text)


@app.command()
def quantize(
    export: Annotated[Path, typer.Argument(help="an export folder")],
    method: Annotated[str, typer.Option(help="int8 or nf4 for the torch engine, w8a8 or w4a16 for vLLM")] = "int8",
    users: Annotated[int, typer.Option(help="test users to compare lists on")] = 300,
) -> None:
    """Write a quantised copy beside an export and say what it costs."""
    from genrec.errors import ArtefactError
    from genrec.whole_path import quantise_and_compare

    rows = quantise_and_compare(export, [method], users)
    print_rows(rows)
    if not rows[-1]["blessed"]:
        raise ArtefactError(
            f"{export.parent / rows[-1]['export']}: refused, overlap@10 {rows[-1]['overlap@10']:.3f} is below the "
            f"recipe's serve.min_overlap.{method}; serve the original, or try another method"
        )


@app.command()
def bake(export: Annotated[Path, typer.Argument(help="an export folder")]) -> None:
    """Write a copy whose soft tokens are vocabulary rows: any server of text models takes its prompts."""
    from genrec.serving.baked_rows import bake_export

    console.print(bake_export(export, export.parent))


@app.command()
def features(
    run_folder: Annotated[Path, typer.Argument(help="a run's folder")],
    out: Annotated[Path, typer.Option(help="Parquet file to write")] = Path("features.parquet"),
) -> None:
    """Write the aligned item vectors for other rankers; no LLM is loaded."""
    from genrec.features import write_features

    console.print(f"{out}: {write_features(run_folder, out)}")


@app.command()
def recommend(
    export: Annotated[Path, typer.Argument(help="an export folder")],
    history: Annotated[list[str], typer.Argument(help="item ids, oldest first")],
    k: Annotated[int, typer.Option(help="how many items")] = 10,
) -> None:
    """The next items for one history."""
    from genrec.recommender import Recommender

    table = Table("rank", "item", "title", "log-probability")
    with Recommender.load(export) as recommender:
        titles = dict(zip(recommender.export.catalogue.item_ids, recommender.export.catalogue.titles, strict=True))
        for item in recommender.recommend(history, k=k):
            table.add_row(str(item.rank), escape(item.item_id), escape(titles[item.item_id]), f"{item.score:.3f}")
    console.print(table)


@app.command()
def describe(
    export: Annotated[Path, typer.Argument(help="an export folder")],
    pairs: Annotated[
        Path, typer.Option(help="Parquet with user_id, item_id, and history and style where there are any")
    ],
    out: Annotated[Path, typer.Option(help="folder of the Parquet shards; the same command again goes on there")],
    engine: Annotated[str, typer.Option(help="auto, torch or vllm")] = "auto",
    task: Annotated[str, typer.Option(help="describe, explain or headline")] = "describe",
    max_tokens: Annotated[int, typer.Option(help="of each text")] = 64,
    temperature: Annotated[float, typer.Option(help="0: the likeliest word")] = 0.0,
    seed: Annotated[int, typer.Option(help="row r is written with seed + r")] = 0,
) -> None:
    """Write a text for every row of a Parquet file."""
    from genrec.errors import ConfigError
    from genrec.serving.batch import Wish, describe_pairs, open_pairs
    from genrec.serving.export import Export
    from genrec.serving.select_engine import make_engine
    from genrec.writer import TASKS

    if task not in TASKS or max_tokens < 1 or temperature < 0:
        raise ConfigError(f"--task is one of {', '.join(TASKS)}, --max-tokens 1 or more, --temperature 0 or more")
    open_pairs(pairs)  # what is wrong here shows before minutes of loading
    loaded = Export.load(export)
    running = make_engine(loaded, engine)
    try:
        counts = describe_pairs(loaded, running, pairs, out, Wish(task, max_tokens, temperature, seed))
    finally:
        running.close()
    console.print(f"{out}: {counts['written']} texts, {counts['rejected']} rejected rows")


@app.command()
def evaluate(
    run_folder: Annotated[Path, typer.Argument(help="a run's folder")],
    task: Annotated[str, typer.Option(help="describe, explain, headline or chat")] = "describe",
    texts: Annotated[int | None, typer.Option(help="texts to write (300), or conversations to read (500)")] = None,
    force: Force = False,
) -> None:
    """How good a run's texts are: true, personal, useful, diverse, fluent; or how well it understands conversations."""
    import dataclasses

    from genrec.chat_quality import CONVERSATIONS, measure_chat
    from genrec.pipeline import Run
    from genrec.text_quality import TEXTS, measure

    run = dataclasses.replace(Run.open(run_folder), force=force)
    if task == "chat":
        result = measure_chat(run, texts or CONVERSATIONS)
        console.print(f"{result['texts']} conversations of each kind, about values that were never trained")
    else:
        result = measure(run, task, texts or TEXTS)
        console.print(f"{result['texts']} texts for users whose texts were never trained")
    table = Table("measure", "mean", "95 % interval")
    for name, value in result["metrics"].items():
        ends = "" if value["ci95"] is None else "{:.3f} .. {:.3f}".format(*value["ci95"])
        table.add_row(escape(name), f"{value['mean']:.3f}", ends)
    console.print(table)
    for example in result["examples"]:
        console.print(escape("; ".join(f"{name}: {value}" for name, value in example.items())))


@app.command()
def audit(
    where: Annotated[Path, typer.Argument(help="a folder that genrec describe wrote, or an API answer as JSON")],
    row: Annotated[int | None, typer.Option(help="row of the pairs file, from 0")] = None,
    text: Annotated[str | None, typer.Option(help="words of the text")] = None,
    export: Annotated[Path | None, typer.Option(help="an export: was it the one?")] = None,
) -> None:
    """Which model and prompt wrote a text."""
    from genrec.serving.audit import find_origin

    for found in find_origin(where, row=row, text=text, export=export):
        table = Table("what", "value")
        for name, value in found.items():
            table.add_row(name, escape(str(value)))
        console.print(table)


def print_rows(rows: list[dict[str, Any]]) -> None:
    """A table of dictionaries with the same keys."""
    table = Table(*rows[0])
    for row in rows:
        table.add_row(*(f"{v:.4f}" if isinstance(v, float) else str(v) for v in row.values()))
    console.print(table)


def main() -> None:
    """Entry point: errors that the user can mend are one message and exit code 2."""
    try:
        app()
    except GenrecError as err:
        Console(stderr=True).print(f"[bold red]error:[/] {escape(str(err))}", highlight=False, soft_wrap=True)
        sys.exit(2)


if __name__ == "__main__":
    main()
