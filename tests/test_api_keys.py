"""The file of API keys: what it holds, who may read it, what changes while serving."""

import json
import os
import re
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from genrec import cli
from genrec.errors import ConfigError
from genrec.serving import api_keys
from genrec.serving.api_keys import Keys, Limits, add_key, read_keys, revoke_key


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "keys.json"


def add(file: Path, tenant: str = "shop", scopes: tuple[str, ...] = ("recommend",), **limits: float | None) -> str:
    return add_key(file, tenant, list(scopes), dict(limits))


def test_a_key_is_found_by_its_secret_only(file: Path) -> None:
    token = add(file, scopes=("write", "recommend"), requests_per_s=5)
    found = Keys(file).find(token)
    assert found is not None
    key, limits = found
    assert (key.tenant, sorted(key.scopes)) == ("shop", ["recommend", "write"])
    assert limits == Limits(requests_per_s=5)
    head, name, secret = token.split("_", 2)
    wrong = [
        "",
        token[:-1],
        token + "x",
        f"{head}_{name}_",
        f"{head}_{'0' * 12}_{secret}",
        f"other_{name}_{secret}",
        f"{head}_{name}_{key.sha256}",
        "\ud800",
    ]
    assert [text for text in wrong if Keys(file).find(text)] == []


def test_the_file_holds_no_secret_and_is_its_owners(file: Path) -> None:
    tokens = [add(file), add(file, tenant="news")]
    text = file.read_text()
    assert len({token.split("_", 2)[2] for token in tokens}) == 2
    for token in tokens:
        assert token.split("_", 2)[2] not in text
        assert len(token.split("_", 2)[2]) >= 43  # 256 bits in base64
    assert file.stat().st_mode & 0o777 == 0o600
    file.chmod(0o644)
    with pytest.raises(ConfigError, match=r"mode 644 lets every user.*chmod 600"):
        Keys(file)


def test_limits_of_a_tenant_stay_until_they_are_given_again(file: Path) -> None:
    add(file, requests_per_s=5, beams_per_s=100)
    add(file, requests_per_s=7, beams_per_s=None)
    assert read_keys(file).tenants["shop"] == Limits(requests_per_s=7, beams_per_s=100)


def test_changes_reach_a_running_gateway_and_a_broken_file_does_not(file: Path, monkeypatch, caplog) -> None:
    monkeypatch.setattr(api_keys, "CHECK_S", 0.0)
    first, second = add(file), add(file)
    keys = Keys(file)
    assert keys.find(second)
    revoke_key(file, second.split("_")[1])
    assert keys.find(second) is None
    assert keys.find(first)
    file.write_text('{"keys": [')
    assert keys.find(first)
    assert "API keys stay as they were" in caplog.text
    file.unlink()
    assert keys.find(first)
    third = add(file)
    assert keys.find(third)
    assert keys.find(first) is None


def test_the_file_is_not_read_for_every_request(file: Path, monkeypatch) -> None:
    keys, token = None, add(file)
    keys = Keys(file)
    monkeypatch.setattr(time, "monotonic", lambda: keys._checked + api_keys.CHECK_S / 2)
    monkeypatch.setattr(os, "stat", None)  # a look would fail
    assert keys.find(token)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "no file of API keys"),
        ("[1]", "no file of API keys: the file: Input should be an object"),
        ('{"keys": [{"id": "x"}]}', "keys.0.id"),
        ('{"keyz": []}', "keyz: Extra inputs are not permitted"),
    ],
)
def test_broken_files_are_named(file: Path, text: str | None, message: str) -> None:
    if text is not None:
        file.write_text(text)
        file.chmod(0o600)
    with pytest.raises(ConfigError, match=f"{re.escape(str(file))}.*{message}"):
        Keys(file)


def test_two_keys_with_one_id_are_refused(file: Path) -> None:
    add(file)
    found = json.loads(file.read_text())
    found["keys"] *= 2
    file.write_text(json.dumps(found))
    with pytest.raises(ConfigError, match="two keys have the same id"):
        read_keys(file)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"scopes": ("everything",)}, "no scope 'everything'; there are recommend, read, write, admin, metrics"),
        ({"scopes": ()}, "at least 1 item"),
        ({"tenant": "a b"}, "'a b'"),
        ({"requests_per_s": 0.0}, "greater than 0; found 0.0"),
    ],
)
def test_bad_keys_are_refused_and_nothing_is_written(file: Path, arguments, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        add(file, **arguments)
    assert not file.exists()


def test_the_command_adds_lists_and_revokes(file: Path) -> None:
    def call(*arguments: str) -> str:
        done = CliRunner().invoke(cli.app, ["keys", *arguments], env={"COLUMNS": "200"}, catch_exceptions=False)
        assert done.exit_code == 0, done.output
        return done.output

    options = ["--scope", "recommend", "--scope", "metrics", "--requests-per-s", "20"]
    token = call("add", str(file), "--tenant", "shop", *options).strip()
    assert Keys(file).find(token)
    listed = call("list", str(file))
    for part in (token.split("_")[1], "shop", "recommend", "metrics", "requests 20"):
        assert part in listed
    assert token.split("_", 2)[2] not in listed
    call("revoke", str(file), token.split("_")[1])
    assert read_keys(file).keys == []
    with pytest.raises(ConfigError, match="no key with the id 'nope'"):
        call("revoke", str(file), "nope")
