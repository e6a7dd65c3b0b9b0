"""The model card of an export: Markdown with the YAML front matter that model hubs read."""

from __future__ import annotations

from typing import Any

import yaml

from genrec.evaluate import format_markdown


def model_card(
    *,
    name: str,
    base: str,
    data_summary: dict[str, Any],
    split: str,
    metrics: dict[str, Any] | None,
    settings: dict[str, Any],
) -> str:
    """What an export is, on what it was measured, and how to use it.

    Args:
        name: the run's name.
        base: the recipe's base: Hugging Face name, folder, or ``scratch:``.
        data_summary: what the data is -> how much of it.
        split: how test cases were taken.
        metrics: metrics.json, or None before the evaluation.
        settings: the resolved recipe.
    """
    front: dict[str, Any] = {
        "library_name": "transformers",
        "tags": ["genrec", "recommendation", "generative-recommendation", "semantic-ids"],
    }
    if _on_hub(base):
        front["base_model"] = base
    origin = "a small language model trained from scratch" if base.startswith("scratch:") else f"`{base}`"
    data = "\n".join(f"| {_cell(what)} | {_cell(amount)} |" for what, amount in data_summary.items())
    measured = (
        f"Test cases by the split `{split}`. Means over users, with 95 % bootstrap intervals.\n\n"
        + format_markdown(metrics)
        if metrics is not None
        else f"Not evaluated yet. Test cases would come from the split `{split}`: run `genrec run`."
    )
    recipe = yaml.safe_dump(settings, sort_keys=False, allow_unicode=True).strip()
    return f"""---
{yaml.safe_dump(front, sort_keys=False).strip()}
---

# {name}

A generative recommender made by genrec from {origin}: it reads a user's history as semantic ids and soft tokens and
writes the semantic id of the next item, by constrained beam search over the items of its own catalogue.

## Data

| what | amount |
|---|---:|
{data}

## Results

{measured.strip()}

## Serve

```
genrec serve PATH_OF_THIS_FOLDER
```

```python
from genrec import Recommender

with Recommender.load("PATH_OF_THIS_FOLDER") as recommender:
    print(recommender.recommend(["AN_ITEM_ID"], k=10))
```

## Intended use

Ranking the items of the catalogue in `items/` for a user with a history in that catalogue.

## Limits

- It knows no other items: a changed catalogue needs a new export.
- It repeats the tastes of the log that it learnt from, popularity included; measure before you show it to people.
- Free text about items is not checked for truth.
- Numbers hold for the data and the split above only.

## Settings

```yaml
{recipe}
```
"""


def _on_hub(base: str) -> bool:
    """Whether a base is named as on the Hugging Face hub: owner/name, or a bare name."""
    return ":" not in base and not base.startswith((".", "/", "~")) and base.count("/") <= 1


def _cell(value: Any) -> str:
    return str(value).replace("|", "\\|").replace("\n", " ")
