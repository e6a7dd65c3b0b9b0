"""genrec systems list | show | run | prove: published systems as recipes."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml
from rich.console import Console
from rich.markup import escape
from rich.table import Table

log = logging.getLogger(__name__)
systems_app = typer.Typer(no_args_is_help=True, help="Published systems as recipes: list, show, run, prove.")
console = Console()
Name = Annotated[str, typer.Argument(help="a system's name, or a YAML file")]


@systems_app.command("list")
def list_systems() -> None:
    """All systems that come with genrec."""
    from genrec.system_recipe import load_system, system_names

    table = Table("system", "family", "what it claims", "source")
    for name in system_names():
        recipe = load_system(name)
        table.add_row(name, recipe.family, escape(recipe.prove.claim), escape(recipe.source))
    console.print(table)


@systems_app.command()
def show(name: Name) -> None:
    """A system's recipe with every default filled in."""
    from genrec.system_recipe import load_system

    typer.echo(yaml.safe_dump(load_system(name).model_dump(), sort_keys=False))


@systems_app.command()
def run(
    name: Name,
    data: Annotated[Path, typer.Option(help="folder with items.jsonl and interactions.parquet")],
    runs: Annotated[Path, typer.Option(help="folder that holds one folder per run")] = Path("runs"),
    seed: Annotated[int, typer.Option(help="of weights and batches")] = 0,
    steps: Annotated[int | None, typer.Option(min=1, help="of every stage, in place of the recipe's")] = None,
) -> None:
    """Train a system on a catalogue and a log, measure it, and write its item features."""
    from genrec.system_recipe import load_system
    from genrec.system_run import run_system

    result = run_system(load_system(name), data, runs, seed=seed, steps=steps)
    table = Table("list", "recall@10", "ndcg@10")
    for label, found in result["metrics"].items():
        table.add_row(label, f"{found['recall@10']:.4f}", f"{found['ndcg@10']:.4f}")
    console.print(table)
    console.print(f"item features, a precomputed encoder's file: {result['features']}")


@systems_app.command()
def prove(
    name: Name,
    seeds: Annotated[int, typer.Option(min=2, help="paired seeds, from 0")] = 5,
    out: Annotated[Path, typer.Option(help="folder that keeps every seed's trial")] = Path("runs/systems"),
) -> None:
    """With the system's idea and without it, where the idea is needed and where it is not."""
    from genrec.proofs import interval
    from genrec.proofs import prove as prove_seed
    from genrec.system_recipe import load_system

    recipe = load_system(name)
    trials = [prove_seed(recipe, seed, out) for seed in range(seeds)]
    table = Table("seed", recipe.prove.metric, "without", "difference", "control", "oracle")
    for t in trials:
        row: list[Any] = [t.seed, t.method, t.ablation, t.gain, t.control, t.oracle]
        table.add_row(str(row[0]), *(f"{v:.3f}" for v in row[1:]))
    console.print(table)
    for label, values in (("gain", [t.gain for t in trials]), ("control", [t.control for t in trials])):
        mean, ends = interval(values)
        console.print(f"{label}: {mean:+.3f} [{ends[0]:+.3f}, {ends[1]:+.3f}]", highlight=False, markup=False)
