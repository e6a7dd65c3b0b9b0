"""Ten texts with pictures in the report of a whole path, as they came out."""

import json
import re

import pytest

from genrec.config import resolve_recipe
from genrec.pipeline import Run
from genrec.text_quality import EXAMPLES
from genrec.whole_path import whole_path
from tests.conftest import tiny_recipe


def _recipe(n_users: int):
    return resolve_recipe(
        tiny_recipe(
            data={"synthetic": {"n_items": 40, "n_users": n_users}},
            finetune={"epochs": 0.2, "evals": 1, "mixture": {"describe": 0.5}},
            evaluate={"baselines": ["popularity"], "bootstrap": 100, "beams": 10},
            serve={"quantise": []},
        )
    )


def test_ten_texts_with_pictures_are_in_the_report(tmp_path) -> None:
    run = Run.create(_recipe(240), tmp_path)
    whole_path(run)
    page = (run.folder / "report.html").read_text(encoding="utf-8")
    articles = re.findall(r'<article aria-label="describe for (\S+)">(.*?)</article>', page, re.DOTALL)
    kept = json.loads((run.folder / "texts" / "describe" / "texts.json").read_text(encoding="utf-8"))["examples"]
    assert [user for user, _ in articles] == [of["user"] for of in kept]
    assert len(kept) == EXAMPLES
    for (_, article), of in zip(articles, kept, strict=True):
        about = article.split("Had, oldest first")[0]
        assert about.count('<img src="data:image/jpeg;base64,') == 1
        assert f'title="{of["item"]}"' in about
        assert of["reference"] in article.replace("&#39;", "'")


def test_too_few_users_leave_texts_unmeasured(tmp_path, caplog: pytest.LogCaptureFixture) -> None:
    run = Run.create(_recipe(60), tmp_path)
    whole_path(run)
    assert "texts: not measured: 6 held-out users with a test case, the reader needs 20" in caplog.text
    assert 'id="texts"' not in (run.folder / "report.html").read_text(encoding="utf-8")
