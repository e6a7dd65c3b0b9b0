"""Beam search against full forward passes of transformers over every item, and against a slow beam search."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from genrec.decode import Ranked, beam_search, prefill
from genrec.serving.export import Export
from genrec.serving.exported_model import ExportedModel
from genrec.trie import Trie
from tests.export_fixture import make_export
from tests.oracles import codes_after, trie_log_softmax

N_ITEMS = 60
LENGTHS = (11, 3, 26, 8)  # of the random prompts
TOLERANCE = 1e-4  # float32 rounding of two orders of summation is about 2e-6; a wrong mask moves scores by > 1e-2


class Setting:
    """A random model, its trie, and random prompts; the oracles never touch the code under test."""

    def __init__(self, folder: Path, arch: str) -> None:
        export = Export.load(make_export(folder, arch=arch, n_items=N_ITEMS))
        self.model = ExportedModel(export, "cpu")
        self.layout, self.codes = export.layout, export.codes
        self.trie = Trie.build(torch.from_numpy(export.codes), self.layout.n_codes)
        torch.manual_seed(1)
        self.prompts = [torch.randn(length, 64) * 0.5 for length in LENGTHS]
        width = max(LENGTHS)
        padded = [torch.nn.functional.pad(p, (0, 0, 0, width - len(p)), value=9.0) for p in self.prompts]
        self.padded, self.lengths = torch.stack(padded), torch.tensor(LENGTHS)

    def search(self, beams: int, allowed: Tensor | None = None) -> Ranked:
        bitmap = None if allowed is None else self.trie.filter(allowed)
        return beam_search(self.model, prefill(self.model, self.padded, self.lengths), self.trie, beams, bitmap)

    @torch.inference_mode()
    def log_probabilities(self, prompt: Tensor, prefix: list[int]) -> Tensor:
        """[C] of the next level's codes after a prompt and some codes, by one full forward pass."""
        n, start = self.layout.n_codes, self.layout.base_vocab
        tokens = torch.tensor([start + level * n + code for level, code in enumerate(prefix)], dtype=torch.int64)
        vectors = torch.cat([prompt, self.model.lm.get_input_embeddings()(tokens)])
        logits = self.model.lm(inputs_embeds=vectors[None]).logits[0, -1]
        first = start + len(prefix) * n
        known = codes_after(self.codes, prefix)
        out = torch.full((n,), -torch.inf)
        out[known] = logits[first : first + n][known].log_softmax(-1)
        return out

    @torch.inference_mode()
    def brute_force(self, prompt: Tensor) -> np.ndarray:
        """[N] scores of all items by full forward passes."""
        n, start = self.layout.n_codes, self.layout.base_vocab
        codes = torch.from_numpy(self.codes).long()
        tokens = codes + start + torch.arange(self.layout.levels) * n
        vectors = torch.cat([prompt.expand(len(codes), -1, -1), self.model.lm.get_input_embeddings()(tokens)], dim=1)
        logits = self.model.lm(inputs_embeds=vectors).logits[:, len(prompt) - 1 : -1]  # [N, L, V]
        score = torch.zeros(len(codes))
        for level in range(self.layout.levels):
            logp = trie_log_softmax(logits[:, level, start + level * n : start + (level + 1) * n], self.codes, level)
            score += logp[torch.arange(len(codes)), codes[:, level]]
        return score.numpy()

    def slow_beams(self, prompt: Tensor, beams: int, allowed: np.ndarray) -> list[tuple[int, float]]:
        """(item, score), best first, by lists and dictionaries."""
        items = {tuple(code): row for row, code in enumerate(self.codes.tolist()) if allowed[row]}
        alive: list[tuple[float, tuple[int, ...]]] = [(0.0, ())]
        for level in range(self.layout.levels):
            legal = {code[: level + 1] for code in items}
            grown = []
            for score, prefix in alive:
                logp = self.log_probabilities(prompt, list(prefix)).tolist()
                grown += [(score + logp[c], (*prefix, c)) for c in range(self.layout.n_codes)]
            alive = sorted((pair for pair in grown if pair[1] in legal), reverse=True)[:beams]
        return [(items[prefix], score) for score, prefix in alive]


@pytest.fixture(scope="module", params=["qwen3", "llama"])
def setting(request, tmp_path_factory) -> Setting:
    return Setting(tmp_path_factory.mktemp(request.param), request.param)


def test_wide_beams_are_exact(setting: Setting) -> None:
    ranked = setting.search(beams=N_ITEMS)
    for row, prompt in enumerate(setting.prompts):
        truth = setting.brute_force(prompt)
        order = np.argsort(-truth)
        assert np.diff(-truth[order]).min() > 1e-6  # no two items tie, so the order is defined
        assert ranked.items[row].tolist() == order.tolist()
        np.testing.assert_allclose(ranked.scores[row].numpy(), truth[order], atol=TOLERANCE)


def test_prompts_matter(setting: Setting) -> None:
    """Negative control: the oracle of another prompt is far outside the tolerance."""
    scores = setting.search(beams=N_ITEMS).scores[0]
    other = np.sort(setting.brute_force(setting.prompts[1]))[::-1]
    assert np.abs(scores.numpy() - other).max() > 100 * TOLERANCE


@pytest.mark.parametrize("beams", [1, 2, 5])
def test_narrow_beams_equal_a_slow_beam_search(setting: Setting, beams: int) -> None:
    allowed = torch.rand(len(LENGTHS), N_ITEMS, generator=torch.Generator().manual_seed(beams)) < 0.7
    ranked = setting.search(beams, allowed)
    for row, prompt in enumerate(setting.prompts):
        expected = setting.slow_beams(prompt, beams, allowed[row].numpy())
        assert ranked.items[row].tolist() == [item for item, _ in expected]
        np.testing.assert_allclose(ranked.scores[row].numpy(), [s for _, s in expected], atol=TOLERANCE)


def test_narrow_beams_are_not_exact(setting: Setting) -> None:
    """Control of the test above: with these models narrow beams and the exact order do differ."""
    narrow = setting.search(5).items
    assert not torch.equal(narrow, setting.search(N_ITEMS).items[:, :5])


@pytest.mark.parametrize("beams", [1, 3, 10, N_ITEMS])
@pytest.mark.parametrize("share", [0.02, 0.3, 0.9])
def test_a_filter_loses_and_leaks_nothing(setting: Setting, beams: int, share: float) -> None:
    allowed = torch.rand(len(LENGTHS), N_ITEMS, generator=torch.Generator().manual_seed(7)) < share
    ranked = setting.search(beams, allowed)
    for row, keep in enumerate(allowed):
        shown = [item for item in ranked.items[row].tolist() if item >= 0]
        legal = set(keep.nonzero().flatten().tolist())
        assert len(shown) == len(set(shown)) == min(beams, len(legal))
        assert set(shown) <= legal


def test_a_filter_changes_no_score(setting: Setting) -> None:
    allowed = torch.rand(1, N_ITEMS, generator=torch.Generator().manual_seed(3)) < 0.4
    ranked = setting.search(N_ITEMS, allowed.expand(len(LENGTHS), -1))
    truth = setting.brute_force(setting.prompts[2])
    best = [row for row in np.argsort(-truth) if allowed[0, row]]
    assert ranked.items[2, : len(best)].tolist() == best
    np.testing.assert_allclose(ranked.scores[2, : len(best)].numpy(), truth[best], atol=TOLERANCE)


def test_padding_on_the_right_does_not_matter(setting: Setting) -> None:
    together = setting.search(12)
    for row, prompt in enumerate(setting.prompts):
        read = prefill(setting.model, prompt[None], torch.tensor([len(prompt)]))
        alone = beam_search(setting.model, read, setting.trie, 12)
        assert alone.items[0].tolist() == together.items[row].tolist()
        torch.testing.assert_close(alone.scores[0], together.scores[row], atol=1e-5, rtol=0)
    # negative control: padding read as prompt does change the scores
    read = prefill(setting.model, setting.padded, torch.full_like(setting.lengths, max(LENGTHS)))
    wrong = beam_search(setting.model, read, setting.trie, 12)
    assert (wrong.scores[1] - together.scores[1]).abs().max() > 100 * TOLERANCE


def test_fewer_legal_items_than_beams_end_in_pads(setting: Setting) -> None:
    allowed = torch.zeros(len(LENGTHS), N_ITEMS, dtype=torch.bool)
    for row in range(1, len(LENGTHS)):
        allowed[row, : 2 * row] = True  # 0, 2, 4 and 6 legal items
    ranked = setting.search(10, allowed)
    for row in range(len(LENGTHS)):
        assert set(ranked.items[row, : 2 * row].tolist()) == set(range(2 * row))
        assert (ranked.items[row, 2 * row :] == -1).all()
        assert torch.isneginf(ranked.scores[row, 2 * row :]).all()
        assert torch.isfinite(ranked.scores[row, : 2 * row]).all()
