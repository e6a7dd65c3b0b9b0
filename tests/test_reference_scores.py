"""ROUGE and BERTScore: published values, and what they must not reward."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from genrec.reference_scores import bert_score, greedy_f1, rouge_l, rouge_n


@pytest.mark.parametrize(
    ("text", "reference", "scores"),
    [  # rouge-score 0.1.2, without stemmer
        ("office of blue oak of office", "glass lamp and blue", (0.2, 0.0, 0.2)),
        ("oak red of for glass", "oak and blue office for a the of", (0.4615384615384615, 0.0, 0.3076923076923077)),
        ("for and oak glass a the office", "office a red blue office", (1 / 3, 0.0, 1 / 3)),
        ("The quick brown fox", "the quick fox", (6 / 7, 0.4, 6 / 7)),
        ("red red red", "red", (0.5, 0.0, 0.5)),
        ("", "red", (0.0, 0.0, 0.0)),
    ],
)
def test_rouge_is_the_reference_implementations(text: str, reference: str, scores: tuple[float, float, float]) -> None:
    found = (rouge_n(text, reference, 1), rouge_n(text, reference, 2), rouge_l(text, reference))
    assert found == pytest.approx(scores)


def test_rouge_reads_every_script() -> None:
    assert rouge_n("красная лампа", "красная лампа", 2) == 1
    assert rouge_l("красная лампа", "синяя лампа") == 0.5


def test_bertscore_matches_every_token_with_its_nearest() -> None:
    text = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    reference = torch.tensor([[3.0, 0.0]])
    # precision (1 + 0) / 2, recall 1
    assert greedy_f1(text, reference) == pytest.approx(2 * 0.5 / 1.5)
    assert greedy_f1(text, text) == pytest.approx(1)
    assert greedy_f1(text[:0], reference) == 0
    assert greedy_f1(-reference, reference) == 0


def test_bertscore_of_a_causal_model_prefers_the_same_words() -> None:
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 1}
    config = AutoConfig.for_model("llama", vocab_size=50, num_key_value_heads=1, **shape)
    lm = AutoModelForCausalLM.from_config(config).eval()
    same, near, far, empty = bert_score(
        lm, [([1, 2, 3], [1, 2, 3]), ([1, 2, 9], [1, 2, 3]), ([7, 8, 9], [1, 2, 3]), ([], [1])], 0
    )
    assert same == pytest.approx(1, abs=1e-5)
    assert same > near > far
    assert empty == 0
