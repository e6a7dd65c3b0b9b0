import csv
import json
import re
from pathlib import Path

import numpy as np
import pytest
import yaml

from genrec import init_recipe
from genrec.catalog import read_catalogue
from genrec.config import Recipe, resolve_recipe
from genrec.doctor import Gpu, Machine
from genrec.errors import ConfigError
from genrec.init_recipe import propose_recipe
from genrec.interactions import read_log

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
CPU = Machine(cores=2, memory_gb=16, gpus=())


@pytest.fixture(autouse=True)
def small_machine(monkeypatch):
    monkeypatch.setattr(init_recipe, "machine", lambda: CPU)


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_csv(path, rows):
    with path.open("w", newline="") as handle:
        writer = csv.DictWriter(handle, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def resolve(text: str) -> Recipe:
    return resolve_recipe(yaml.safe_load(text))


def shop(folder, n_users=150, **renamed):
    """Fifty items and some events, with the column names of a shop."""
    rng = np.random.default_rng(0)
    items = [
        {"row": i, "SKU": f"s{i}", "Headline": f"thing {i}", "Genre": "a|b", "file": f"pics/{i}.jpg"} for i in range(50)
    ]
    events = [
        {
            "customer": f"c{user}",
            "product": f"s{rng.integers(50)}",
            "bought_at": f"2024-{1 + n:02d}-{rng.integers(1, 29):02d}T10:00:00",
            "quantity": 1.5,
        }
        for user in range(n_users)
        for n in range(rng.integers(3, 12))
    ]
    events = [{renamed.get(name, name): value for name, value in event.items()} for event in events]
    return write_jsonl(folder / "items.jsonl", items), write_csv(folder / "log.csv", events)


def test_columns_are_guessed_by_name_and_content_and_the_files_read(tmp_path):
    items, log = shop(tmp_path)
    data = resolve(propose_recipe(items, log)).data
    assert data.item_columns == {
        "item_id": "SKU",
        "title": "Headline",
        "categories": "Genre",
        "images": "file",
    }
    assert data.interaction_columns == {"user_id": "customer", "item_id": "product", "timestamp": "bought_at"}
    assert data.items is not None
    assert data.interactions is not None
    limits = {"max_text_chars": data.max_text_chars, "max_pixels": data.max_pixels}
    catalogue, _ = read_catalogue(data.items, data.item_columns, max_bad_share=0, **limits)
    read, bad = read_log(data.interactions, data.interaction_columns, catalogue, max_bad_share=0.05)
    assert len(read.user_ids) == 150
    assert set(bad.counts) <= {"duplicate event"}


def test_users_are_told_by_content_when_no_name_says_so(tmp_path):
    items, log = shop(tmp_path, customer="who")
    assert resolve(propose_recipe(items, log)).data.interaction_columns["user_id"] == "who"


def test_split_follows_the_times(tmp_path):
    items, log = shop(tmp_path, n_users=1000)
    assert resolve(propose_recipe(items, log)).data.split == "temporal"
    rows = [{"user": f"u{u}", "item": f"s{(u + t) % 50}", "ts": t} for u in range(150) for t in range(5)]
    text = propose_recipe(items, write_csv(tmp_path / "order.csv", rows))
    assert resolve(text).data.split == "leave_one_out"
    assert "the timestamps give order, not times" in text


def test_sizes_follow_data_and_machine(tmp_path, monkeypatch):
    items, log = shop(tmp_path)
    small = resolve(propose_recipe(items, log))
    assert (small.semantic_ids.levels, small.semantic_ids.codes) == (3, 16)
    assert small.data.max_history == 11
    assert small.finetune.epochs == 20
    many = [{"item_id": i} for i in range(10_000)]
    rows = [{"user_id": u, "item_id": (u * t) % 10_000, "timestamp": t} for u in range(300) for t in range(300)]
    many_items, long_log = write_jsonl(tmp_path / "many.jsonl", many), write_csv(tmp_path / "long.csv", rows)
    large = resolve(propose_recipe(many_items, long_log))
    assert large.semantic_ids.codes == 128
    assert large.data.max_history == 50
    assert large.finetune.pack_tokens >= 50 * 4
    assert large.encode.image is None
    monkeypatch.setattr(init_recipe, "machine", lambda: Machine(16, 128, (Gpu("H", 80, True),)))
    fast = resolve(propose_recipe(many_items, long_log))
    assert fast.data.max_history == 200
    assert fast.finetune.epochs < large.finetune.epochs
    assert fast.finetune.pack_tokens >= 200 * 4
    assert large.mix.users == small.mix.users == 0
    crowd = [{"user_id": u, "item_id": (u * t) % 50, "timestamp": t} for u in range(1_000) for t in range(5)]
    fifty = write_jsonl(tmp_path / "fifty.jsonl", many[:50])
    assert resolve(propose_recipe(fifty, write_csv(tmp_path / "crowd.csv", crowd))).mix.users == init_recipe.MIXED
    assert fast.finetune.batch_rows * fast.finetune.pack_tokens > large.finetune.batch_rows * large.finetune.pack_tokens


def test_every_chosen_number_has_a_reason(tmp_path):
    for line in propose_recipe(*shop(tmp_path)).splitlines():
        if re.search(r": [\d.]+\b", line) and not line.startswith("#"):
            assert re.search(r"\d  # \w+", line), line


def test_errors_name_the_candidates(tmp_path):
    items, log = shop(tmp_path)
    stranger = write_jsonl(tmp_path / "other.jsonl", [{"SKU": "zz1"}, {"SKU": "zz2"}])
    with pytest.raises(ConfigError, match=r"cannot tell which columns hold the item ids.*\['SKU'\].*'product'"):
        propose_recipe(stranger, log)
    rows = [{"x": f"a{i % 3}", "y": f"b{i % 4}", "sku": f"s{i % 50}", "ts": i} for i in range(100)]
    with pytest.raises(ConfigError, match=r"cannot tell which column holds the users; candidates: \['x', 'y'\]"):
        propose_recipe(items, write_csv(tmp_path / "users.csv", rows))
    rows = [{"user": f"a{i % 3}", "sku": f"s{i % 50}", "n": "q", "m": "p"} for i in range(100)]
    with pytest.raises(ConfigError, match=r"cannot tell which column holds the time.*candidates: \['n', 'm'\]"):
        propose_recipe(items, write_csv(tmp_path / "times.csv", rows))


@pytest.mark.parametrize("name", ["amazon-scientific", "movielens-1m-posters"])
def test_real_data(name):
    folder = DATA / name
    if not folder.exists():
        pytest.skip(f"{folder} is not on this machine")
    recipe = resolve(propose_recipe(folder / "items.jsonl", folder / "interactions.parquet"))
    assert recipe.data.item_columns == recipe.data.interaction_columns == {}
    assert recipe.data.split == "leave_one_out"
    assert (recipe.encode.image is not None) == (name == "movielens-1m-posters")
