"""Slow, plain versions of what the code does fast."""

import numpy as np
import torch
from torch import Tensor


def codes_after(codes: np.ndarray, prefix: list[int]) -> list[int]:
    """The codes that follow a prefix in the catalogue's ids [N, L], sorted."""
    level = len(prefix)
    return sorted({int(row[level]) for row in codes if row[:level].tolist() == list(prefix)})


def trie_log_softmax(logits: Tensor, codes: np.ndarray, level: int) -> Tensor:
    """Row i of logits [N, C] normalised over the codes that follow item i's own prefix; -inf elsewhere."""
    out = torch.full_like(logits, -torch.inf)
    for row, own in enumerate(codes):
        known = codes_after(codes, own[:level].tolist())
        out[row, known] = logits[row, known].log_softmax(-1)
    return out


def profile_scores(profile, history: list[int]) -> np.ndarray:
    """Scores [N] of a `genrec.adapters.profile.Profile`, item by item, in float64."""
    state = {name: value.double().numpy() for name, value in profile.state_dict().items()}
    keys = {name: profile.keys(name).double().numpy() for name in profile.names}
    means = {}
    for name, logit in zip(profile.names, 10.0 * state["logit_decays"], strict=True):
        fade = 1 / (1 + np.exp(-logit))
        rows = [(fade**age, keys[name][item]) for age, item in enumerate(reversed(history)) if keys[name][item].any()]
        total = sum(weight * row for weight, row in rows)
        means[name] = total / sum(weight for weight, _ in rows) if rows else np.zeros(keys[name].shape[1])
    signs = [3.0 * np.linalg.norm(means[name]) for name in profile.names] + [np.log(max(len(history), 1))]
    inner = state["gate.0.weight"] @ signs + state["gate.0.bias"]
    inner = torch.nn.functional.gelu(torch.from_numpy(inner)).numpy()
    gates = 3.0 * np.log1p(np.exp(state["gate.2.weight"] @ inner + state["gate.2.bias"]))
    return np.array(
        [
            sum(
                gate * means[name] @ state[f"maps.{name}"] @ keys[name][item]
                for gate, name in zip(gates, profile.names, strict=True)
            )
            for item in range(len(keys[profile.names[0]]))
        ]
    )


def neighbour_scores(neighbours, history: list[int]) -> np.ndarray:
    """Scores [N] of a `genrec.adapters.neighbours.Neighbours`, pair by pair, in float64."""
    columns, counts, norms = (table.numpy() for table in neighbours.tables().values())
    learned = {name: value.item() for name, value in neighbours.learned().items()}
    total = np.zeros(len(columns) + 1)
    for age, item in enumerate(reversed(history)):
        for column, count, norm in zip(columns[item], counts[item], norms[item], strict=True):
            total[column] += learned["decay"] ** age * count / (norm + learned["shrinkage"])
    return learned["weight"] * np.log1p(learned["scale"] * total[:-1])


def item_scores(scores, history: list[int]) -> np.ndarray:
    """Scores [N] of a `genrec.adapters.item_scores.ItemScores` that has all its parts, in float64."""
    total = profile_scores(scores.profile, history)
    for table in (scores.neighbours, scores.followers):
        total += neighbour_scores(table, history)
    total[history] += 10 * scores.repeats.stored.item()
    return total


def code_weights(scores: np.ndarray, codes: np.ndarray, prefix: list[int], n_codes: int) -> np.ndarray:
    """Log of the summed exp(scores [N]) of the items [N, L] whose id begins with prefix + code: [C], 0 for none."""
    out = np.zeros(n_codes)
    for code in codes_after(codes, prefix):
        below = [item for item, row in enumerate(codes) if row[: len(prefix) + 1].tolist() == [*prefix, code]]
        out[code] = np.log(np.exp(scores[below]).sum())
    return out
