"""The command line: what each command prints, and that it starts without torch."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from genrec import cli
from genrec.config import load_recipe
from genrec.errors import DataError

ROOT = Path(__file__).parent.parent


def call(*arguments):
    done = CliRunner().invoke(cli.app, [*map(str, arguments)], env={"COLUMNS": "200"}, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


def test_help_names_every_command_and_loads_no_torch():
    code = "import sys; from genrec.cli import app; assert 'torch' not in sys.modules, 'torch'; app(['--help'])"
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=True)
    for command in ("run", "init", "doctor", "serve", "keys", "quantize", "features", "recommend"):
        assert f" {command} " in done.stdout


def test_run_prints_the_table_and_what_to_do_next(whole, monkeypatch):
    run, metrics, _ = whole
    monkeypatch.setattr("genrec.whole_path.whole_path", lambda done: metrics)
    monkeypatch.setattr(cli.console, "width", 200, raising=False)
    out = call("run", run.folder / "recipe.yaml", "--runs", run.folder.parent)
    assert "genrec-no-soft" in out
    assert "invalid" in out
    assert "report:" in out
    assert "genrec serve" in out


def test_recommend_and_features(whole, tmp_path):
    run, _, _ = whole
    out = call("recommend", run.folder / "export", "item-000001", "item-000002", "--k", 4)
    assert sum("item-0000" in line for line in out.splitlines()) == 4
    out = call("features", run.folder, "--out", tmp_path / "f.parquet")
    assert "60 items, 128 values each" in " ".join(out.split())
    assert (tmp_path / "f.parquet").is_file()


def test_quantize_compares(whole, monkeypatch):
    run, _, _ = whole
    rows = [{"export": "export", "overlap@10": 1.0}, {"export": "export-int8", "overlap@10": 0.98765, "blessed": True}]
    monkeypatch.setattr("genrec.whole_path.quantise_and_compare", lambda *_: rows)
    assert "0.9877" in call("quantize", run.folder / "export", "--method", "int8")


def test_init_writes_a_recipe_that_loads(whole, tmp_path):
    source = whole[0].folder / "source"
    out = call("init", source / "items.jsonl", source / "interactions.parquet", "--out", tmp_path / "recipe.yaml")
    assert "genrec run" in out
    assert load_recipe(tmp_path / "recipe.yaml").data.items == source / "items.jsonl"


def test_errors_are_printed_as_they_are(monkeypatch, capsys):
    def fail():
        raise DataError("row 3 holds [/red] and [bold]x[/bold], expected [n, d]")

    monkeypatch.setattr(cli, "app", fail)
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 2
    assert "error: row 3 holds [/red] and [bold]x[/bold], expected [n, d]" in capsys.readouterr().err
