"""What quantised copies cost: a trained base wide enough that its blocks are most of its bytes."""

from __future__ import annotations

from pathlib import Path

from benchmarks.results import Check
from benchmarks.trained_export import trained_export
from genrec.whole_path import quantise_and_compare

USERS = 300
METHODS = {"export-int8": "int8 (torch)", "export-w8a8": "W8A8 (vLLM)"}
SHARE, OVERLAP = 0.65, 0.95


def quantised(runs: Path) -> tuple[list[Check], dict[str, str]]:
    """The copies of a trained export beside it, each in its own engine."""
    _, export = trained_export(runs)
    rows = quantise_and_compare(export, ["int8", "nf4", "w8a8"], USERS)
    checks = []
    for row in rows:
        if (name := METHODS.get(row["export"])) is None:
            continue
        share, overlap, (low, high) = row["share"], row["overlap@10"], row["ci95"]
        checks += [
            Check(f"{name}: bytes of the model, share of bf16's", share, None, f"at most {SHARE}", share <= SHARE),
            Check(f"{name}: overlap@10 with bf16", overlap, None, f"at least {OVERLAP}", overlap >= OVERLAP),
            Check(f"{name}: change of N@10", row["change"], [low, high], "interval not below 0", high >= 0),
        ]
    table = ["| export | engine | MB | users/s | overlap@10 | N@10 |", "|---|---|---|---|---|---|"]
    table += [
        f"| {row['export']} | {row['engine']} | {row['bytes'] / 1e6:.1f} | {row['users/s']:.1f} | "
        f"{row['overlap@10']:.3f} | {row['ndcg@10']:.4f} |"
        for row in rows
    ]
    return checks, {"Quantised": f"{USERS} test users of the embedded catalogue.\n\n" + "\n".join(table)}
