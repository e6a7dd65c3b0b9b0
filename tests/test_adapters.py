"""Adapters: shapes, masking of missing modalities, and what they can tell apart."""

import pytest
import torch

from genrec.adapters import ADAPTERS, build_adapter
from genrec.errors import ConfigError

DIMS = {"text": 12, "image": 7}


def inputs(batch=5, patches=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    features = {
        "text": torch.randn(batch, 1, 12, generator=generator),
        "image": torch.randn(batch, patches, 7, generator=generator),
    }
    return features, {m: torch.ones(batch, dtype=torch.bool) for m in features}


@pytest.fixture(params=sorted(ADAPTERS))
def adapter(request):
    torch.manual_seed(0)
    return build_adapter(request.param, DIMS, 3, 16, rms=0.05, width=8).eval()


def test_shape_and_scale(adapter):
    soft = adapter(*inputs())
    assert soft.shape == (5, 3, 16)
    assert soft.square().mean().sqrt().item() == pytest.approx(0.05, rel=0.01)


def test_items_do_not_see_each_other(adapter):
    features, present = inputs()
    together = adapter(features, present)
    alone = torch.cat(
        [
            adapter({m: f[i : i + 1] for m, f in features.items()}, {m: p[i : i + 1] for m, p in present.items()})
            for i in range(5)
        ]
    )
    torch.testing.assert_close(together, alone, atol=1e-6, rtol=1e-5)


def test_missing_modality_is_masked_not_zero(adapter):
    features, present = inputs()
    present["image"][2] = False
    soft = adapter(features, present)
    for filler in (0.0, 1e6, -3.0):
        other = {m: f.clone() for m, f in features.items()}
        other["image"][2] = filler
        torch.testing.assert_close(adapter(other, present), soft)
    zeros = {m: f.clone() for m, f in features.items()}
    zeros["image"][2] = 0.0
    seen = adapter(zeros, {m: torch.ones(5, dtype=torch.bool) for m in DIMS})
    assert (seen[2] - soft[2]).abs().max() > 1e-4, "an absent picture must differ from a picture of zeros"


def test_nothing_present_is_finite(adapter):
    features, _ = inputs()
    soft = adapter(features, {m: torch.zeros(5, dtype=torch.bool) for m in DIMS})
    assert torch.isfinite(soft).all()
    torch.testing.assert_close(soft[0], soft[4])


def test_every_weight_learns(adapter):
    loss = (adapter.train()(*inputs()) * torch.randn(5, 3, 16, generator=torch.Generator().manual_seed(1))).sum()
    loss.backward()
    still = [name for name, p in adapter.named_parameters() if p.grad is None or not p.grad.abs().any()]
    # a softmax over keys cannot see a bias that all keys share
    assert [name for name in still if not name.endswith(("kv.bias", "q.bias"))] == []


def test_qformer_reads_patches():
    torch.manual_seed(0)
    adapter = build_adapter("qformer", DIMS, 2, 16, rms=1.0, width=8, layers=2).eval()
    features, present = inputs()
    before = adapter(features, present)
    features["image"][:, 3] = features["image"][:, 3].flip(-1)
    assert (adapter(features, present) - before).abs().amax((1, 2)).max() > 1e-3


def test_unknown_kind_lists_the_valid_ones():
    with pytest.raises(ConfigError, match=r"'perceiver'; there are qformer, mlp, linear"):
        build_adapter("perceiver", DIMS, 1, 8)


def test_no_modality():
    with pytest.raises(ConfigError, match="both are null"):
        build_adapter("qformer", {}, 1, 8)
