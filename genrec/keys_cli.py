"""The command line's part for API keys: genrec keys add | list | revoke."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

keys_app = typer.Typer(no_args_is_help=True, help="API keys for genrec serve --keys FILE.")
File = Annotated[Path, typer.Argument(help="the file of API keys")]
Rate = Annotated[float | None, typer.Option(help="the tenant's limit per second; default: as it was, or none")]


@keys_app.command()
def add(
    file: File,
    tenant: Annotated[str, typer.Option(help="whose key: histories and limits belong to a tenant")],
    scope: Annotated[list[str], typer.Option(help="recommend, read, write, admin or metrics; may be repeated")],
    requests_per_s: Rate = None,
    beams_per_s: Rate = None,
    tokens_per_s: Rate = None,
) -> None:
    """Make a key and print it, once: the file holds only its hash."""
    from genrec.serving.api_keys import add_key

    limits = {"requests_per_s": requests_per_s, "beams_per_s": beams_per_s, "tokens_per_s": tokens_per_s}
    typer.echo(add_key(file, tenant, scope, limits))


@keys_app.command(name="list")
def list_keys(file: File) -> None:
    """The keys without their secrets."""
    from genrec.serving.api_keys import read_keys

    table = Table("id", "tenant", "scopes", "created", "limits per second")
    found = read_keys(file)
    for key in found.keys:
        limits = found.tenants[key.tenant].model_dump(exclude_none=True) if key.tenant in found.tenants else {}
        shown = ", ".join(f"{kind.removesuffix('_per_s')} {rate:g}" for kind, rate in limits.items())
        table.add_row(key.id, key.tenant, ", ".join(key.scopes), key.created, shown or "none")
    Console().print(table)


@keys_app.command()
def revoke(file: File, key_id: Annotated[str, typer.Argument(help="the key's id: its second part")]) -> None:
    """Remove a key; running gateways refuse it within a second or two."""
    from genrec.serving.api_keys import revoke_key

    revoke_key(file, key_id)
    typer.echo(f"revoked {key_id}")
