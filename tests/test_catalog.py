import json
import math
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from PIL import Image

from genrec.catalog import Catalogue, read_catalogue
from genrec.errors import ArtefactError, DataError

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


def read(path, columns=None, max_bad_share=0.0, max_text_chars=1000, max_pixels=1_000_000):
    return read_catalogue(
        path,
        columns or {},
        max_bad_share=max_bad_share,
        max_text_chars=max_text_chars,
        max_pixels=max_pixels,
    )


def write(folder, rows, name="items.jsonl"):
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


FULL = {
    "item_id": "a",
    "title": "Red\u0000 mug\u001b",
    "description": "Holds\ttea.\nLasts.",
    "categories": ["Kitchen", "Mugs", "Kitchen"],
    "attributes": {"colour": "red", "sizes": ["S", "M"], "litres": 0.3, "brand": None},
    "price": "$4.50",
    "available": "no",
}


def test_fields_and_texts(tmp_path):
    catalogue, bad = read(
        write(tmp_path, [FULL, {"item_id": 7, "categories": "x|y| ", "attributes": '{"\\ud800": 1}'}])
    )
    assert not bad.rows
    assert catalogue.item_ids == ["a", "7"]
    assert catalogue.index == {"a": 0, "7": 1}
    assert catalogue.titles == ["Red mug", ""]
    assert catalogue.descriptions == ["Holds\ttea.\nLasts.", ""]
    assert catalogue.categories == [["Kitchen", "Mugs"], ["x", "y"]]
    assert catalogue.attributes == [{"colour": "red", "sizes": "S, M", "litres": "0.3"}, {}]
    assert catalogue.prices.dtype == np.float32
    assert catalogue.prices[0] == 4.5
    assert math.isnan(catalogue.prices[1])
    assert catalogue.available.tolist() == [False, True]
    assert catalogue.texts() == [
        "Red mug\nCategories: Kitchen, Mugs\ncolour: red\nsizes: S, M\nlitres: 0.3\nPrice: 4.50\nHolds\ttea.\nLasts.",
        "Categories: x, y",
    ]


def test_csv_and_parquet_give_the_same_items(tmp_path):
    row = {"item_id": "1", "title": "t", "categories": ["p", "q"], "attributes": {"k": "v"}, "price": 2.0}
    wanted, _ = read(write(tmp_path, [row]))
    (tmp_path / "a.csv").write_text('item_id,title,categories,attributes,price\n1,t,p|q,"{""k"": ""v""}",2\n')
    kinds = {"attributes": pa.array([[("k", "v")]], pa.map_(pa.string(), pa.string()))}
    plain = {name: pa.array([value]) for name, value in row.items() if name != "attributes"}
    pa.parquet.write_table(pa.table(plain | kinds), tmp_path / "a.parquet")
    for name in ("a.csv", "a.parquet"):
        found, bad = read(tmp_path / name)
        assert not bad.rows
        assert found.texts() == wanted.texts()
        assert (found.item_ids, found.categories, found.attributes) == (["1"], [["p", "q"]], [{"k": "v"}])


def test_save_and_load_round_trip(tmp_path):
    catalogue, _ = read(write(tmp_path, [FULL, {"item_id": "é"}]))
    catalogue.save(tmp_path / "out")
    loaded = Catalogue.load(tmp_path / "out")
    for name in ("item_ids", "titles", "descriptions", "categories", "attributes", "images"):
        assert getattr(loaded, name) == getattr(catalogue, name)
    np.testing.assert_array_equal(loaded.prices, catalogue.prices)
    np.testing.assert_array_equal(loaded.available, catalogue.available)
    assert (loaded.prices.dtype, loaded.available.dtype) == (np.float32, np.bool_)
    with pytest.raises(ArtefactError, match=r"catalog\.parquet: no catalogue there"):
        Catalogue.load(tmp_path / "nothing")


BAD_ROWS = [
    ({"item_id": None}, "no item_id"),
    ({"item_id": "  "}, "no item_id"),
    ({"item_id": "ok"}, "duplicate item_id"),
    ({"item_id": "1", "title": "x" * 1001}, "title too long"),
    ({"item_id": "2", "description": "x" * 1001}, "description too long"),
    ({"item_id": "3", "price": "cheap"}, "price is not a number"),
    ({"item_id": "4", "price": "inf"}, "price is not finite"),
    ({"item_id": "5", "price": 1e39}, "price is not finite"),
    ({"item_id": "6", "price": -1}, "price is negative"),
    ({"item_id": "7", "attributes": "not json"}, "attributes are not a JSON object"),
    ({"item_id": "8", "categories": json.loads("[" * 600 + "]" * 600)}, "nested too deeply"),
    ({"item_id": "9", "available": "maybe"}, "available is neither true nor false"),
]


def test_bad_rows_go_to_quarantine_with_a_reason(tmp_path):
    path = write(tmp_path, [{"item_id": "ok"}, *(row for row, _ in BAD_ROWS), {"item_id": "end"}])
    catalogue, bad = read(path, max_bad_share=0.9)
    assert catalogue.item_ids == ["ok", "end"]
    assert bad.reasons == [reason for _, reason in BAD_ROWS]
    assert bad.rows == list(range(2, 2 + len(BAD_ROWS)))
    assert bad.counts["no item_id"] == 2
    bad.save(tmp_path / "out")
    saved = pa.parquet.read_table(tmp_path / "out" / "quarantine.parquet").to_pylist()
    assert saved[2]["row"] == 4
    assert saved[2]["item_id"] == "ok"
    assert json.loads(saved[5]["raw"])["price"] == "cheap"


def test_too_many_bad_rows_stop_the_run(tmp_path):
    path = write(tmp_path, [{"item_id": "a"}, {"item_id": "b"}, {"item_id": "c"}, {"item_id": "a", "title": "again"}])
    assert len(read(path, max_bad_share=0.25)[0]) == 3
    with pytest.raises(DataError, match=r"1 of 4 rows are bad \(25\.0%.*'duplicate item_id': 1.*row 4.*again"):
        read(path, max_bad_share=0.24)


def test_no_item_id_column(tmp_path):
    path = write(tmp_path, [{"asin": "B0", "title": "t"}])
    with pytest.raises(DataError, match=r"items\.jsonl: no item_id column.*\['asin', 'title'\].*item_columns.*init"):
        read(path)
    assert read(path, {"item_id": "asin"})[0].item_ids == ["B0"]
    with pytest.raises(DataError, match=r"unknown fields \['itemid'\]"):
        read(path, {"itemid": "asin"})


def test_empty_catalogue(tmp_path):
    with pytest.raises(DataError, match=r"items\.jsonl: the catalogue is empty"):
        read(write(tmp_path, []))
    with pytest.raises(DataError, match=r"none of the 1 rows is usable: \{'no item_id': 1\}"):
        read(write(tmp_path, [{"item_id": None}]), max_bad_share=1.0)


def test_pictures(tmp_path, caplog):
    Image.new("RGB", (8, 8)).save(tmp_path / "good.png")
    Image.effect_noise((300, 300), 90).save(tmp_path / "cut.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "cut.jpg").read_bytes()[:9000])
    Image.new("RGB", (40, 40)).save(tmp_path / "large.png")
    listed = [
        "good.png",
        ["none.png", "good.png"],
        "cut.jpg",
        ["cut.jpg", "good.png"],
        "large.png",
        "none.png",
        None,
    ]
    path = write(tmp_path, [{"item_id": i, "images": images} for i, images in enumerate(listed)])
    good = str(tmp_path / "good.png")
    catalogue, bad = read(path, max_bad_share=0.5, max_pixels=1500)
    assert catalogue.images == [good, good, None, good, None, None, None]
    assert bad.rows == [3, 4, 5]
    assert bad.reasons == ["picture too large"] * 3
    catalogue, bad = read(path, max_bad_share=0.3)
    assert catalogue.images == [good, good, None, good, str(tmp_path / "large.png"), None, None]
    assert bad.reasons == ["picture truncated"] * 2
    with pytest.raises(DataError, match=r"2 of 7 rows are bad.*'picture truncated': 2"):
        read(path, max_bad_share=0.28)
    with caplog.at_level("WARNING"):
        read(write(tmp_path, [{"item_id": "1", "images": "nowhere/1.png"}]))
    assert "1 items list pictures, and none can be read" in caplog.text


@pytest.mark.parametrize(
    ("name", "n_items", "n_images"), [("amazon-scientific", 4385, 0), ("movielens-1m-posters", 3416, 3291)]
)
def test_real_catalogues_are_read_as_they_are(name, n_items, n_images):
    path = DATA / name / "items.jsonl"
    if not path.exists():
        pytest.skip(f"{path.parent} is not on this machine")
    catalogue, bad = read(path, max_text_chars=20_000)
    assert (len(catalogue), n_items - catalogue.images.count(None), len(bad.rows)) == (n_items, n_images, 0)
    assert all(catalogue.titles)
