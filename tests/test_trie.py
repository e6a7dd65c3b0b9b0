"""The trie against brute force, with and without filters; item bitmaps against their definition."""

import itertools
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from genrec import trie as trie_module
from genrec.errors import DataError
from genrec.trie import Trie


@st.composite
def catalogues(draw):
    n_codes, n_levels = draw(st.integers(1, 6)), draw(st.integers(1, 4))
    every = list(itertools.product(range(n_codes), repeat=n_levels))
    ids = draw(st.lists(st.sampled_from(every), min_size=1, max_size=40, unique=True))
    bitmaps = draw(st.lists(st.lists(st.booleans(), min_size=len(ids), max_size=len(ids)), min_size=1, max_size=3))
    return ids, n_codes, torch.tensor(bitmaps), draw(st.sampled_from([0, 8, 1 << 22]))


def next_codes(ids, prefix, n_codes, keep):
    """The oracle: codes that follow `prefix` in some kept id."""
    found = {one[len(prefix)] for one, kept in zip(ids, keep, strict=True) if kept and one[: len(prefix)] == prefix}
    return [code in found for code in range(n_codes)]


@settings(max_examples=80, deadline=None)
@given(catalogues())
def test_masks_steps_and_items_equal_brute_force(case):
    ids, n_codes, bitmaps, cells = case
    before, trie_module.DENSE_CELLS = trie_module.DENSE_CELLS, cells  # 0: every level compressed
    try:
        trie = Trie.build(torch.tensor(ids), n_codes)
    finally:
        trie_module.DENSE_CELLS = before
    allowed = trie.filter(bitmaps)
    row_of = {one: row for row, one in enumerate(ids)}
    n_rows = len(bitmaps)
    prefixes: list[tuple[int, ...]] = [()]
    states = torch.tensor([Trie.root])
    for level in range(trie.n_levels):
        plain = trie.mask(states, level)
        assert plain.tolist() == [next_codes(ids, p, n_codes, [True] * len(ids)) for p in prefixes]
        filtered = trie.mask(states.expand(n_rows, -1), level, allowed)
        for row, bitmap in enumerate(bitmaps.tolist()):
            assert filtered[row].tolist() == [next_codes(ids, p, n_codes, bitmap) for p in prefixes]
        # every state, live or illegal, takes every code and two that do not exist
        codes = torch.arange(-1, n_codes + 1)
        after = trie.step(states[:, None].expand(-1, len(codes)), codes.expand(len(states), -1), level)
        assert (after[:, [0, -1]] == -1).all()
        assert torch.equal(after[:, 1:-1] >= 0, plain)
        prefixes = [(*p, int(c)) for p in prefixes for c in codes[1:-1]]
        states = after[:, 1:-1].flatten()
    for prefix, row in zip(prefixes, trie.item(states).tolist(), strict=True):
        assert row == row_of.get(prefix, -1)


@settings(max_examples=40, deadline=None)
@given(catalogues())
def test_a_filtered_walk_always_ends_in_an_allowed_item(case):
    ids, n_codes, bitmaps, _ = case
    trie = Trie.build(torch.tensor(ids), n_codes)
    allowed = trie.filter(bitmaps)
    generator = torch.Generator().manual_seed(0)
    state = torch.zeros(len(bitmaps), 16, dtype=torch.int64)
    for level in range(trie.n_levels):
        weights = trie.mask(state, level, allowed).float() + 1e-9  # an empty row walks at random
        code = torch.multinomial(weights.flatten(0, 1), 1, generator=generator).view(state.shape)
        state = trie.step(state, code, level)
    items = trie.item(state)
    for row, bitmap in enumerate(bitmaps):
        if bitmap.any():
            assert (items[row] >= 0).all()
            assert bitmap[items[row]].all()


@settings(max_examples=40, deadline=None)
@given(catalogues(), st.integers(0, 2**31))
def test_a_prior_spells_the_softmax_over_items(case, seed):
    ids, n_codes, bitmaps, cells = case
    before, trie_module.DENSE_CELLS = trie_module.DENSE_CELLS, cells
    try:
        trie = Trie.build(torch.tensor(ids), n_codes)
    finally:
        trie_module.DENSE_CELLS = before
    scores = torch.randn(len(bitmaps), len(ids), generator=torch.Generator().manual_seed(seed)) * 5
    prior = trie.prior(scores)
    wanted = scores.double().log_softmax(1)
    path = torch.zeros(len(bitmaps), len(ids), dtype=torch.float64)
    state = torch.zeros(len(bitmaps), len(ids), dtype=torch.int64)
    for level, code in enumerate(torch.tensor(ids).unbind(1)):
        options = trie.options(state, level, prior=prior)
        assert options.weights is not None
        weights, legal = options.weights.double(), options.legal
        assert (weights[~legal] == 0).all()
        logp = weights.masked_fill(~legal, -torch.inf).log_softmax(-1)
        code = code.expand(len(bitmaps), -1)
        path += logp.gather(-1, code[..., None])[..., 0]
        state = trie.step(state, code, level)
    # float32 sums of at most 40 exponentials; a lost or doubled item would be off by more than 1e-3
    torch.testing.assert_close(path, wanted, atol=2e-4, rtol=1e-5)


@settings(max_examples=40, deadline=None)
@given(catalogues(), st.integers(0, 2**31))
def test_a_prior_reads_some_columns_and_sends_its_gradient_back_to_them(case, seed):
    ids, n_codes, _, _ = case
    trie, draw = Trie.build(torch.tensor(ids), n_codes), torch.Generator().manual_seed(seed)
    columns = torch.randperm(len(ids) + 3, generator=draw)[: len(ids)]
    wide = torch.randn(2, len(ids) + 3, generator=draw, dtype=torch.float32).requires_grad_()
    alike = wide.detach().clone().requires_grad_()
    found, expected = trie.prior(wide, columns), trie.prior(alike[:, columns])
    weights = [torch.randn(of.shape, generator=draw) for of in found.nodes]
    for prior in (found, expected):
        torch.stack([(of * weight).sum() for of, weight in zip(prior.nodes, weights, strict=True)]).sum().backward()
    for one, other in zip(found.nodes, expected.nodes, strict=True):
        assert torch.equal(one, other)
    assert wide.grad is not None
    torch.testing.assert_close(wide.grad, alike.grad)
    rest = sorted({*range(len(ids) + 3)} - {*columns.tolist()})
    assert not wide.grad[:, rest].any()


def test_a_prior_refuses_other_shapes():
    trie = Trie.build(torch.tensor([[2, 0], [2, 3], [1, 3]]), 4)
    with pytest.raises(DataError, match=r"expected float \[B, 3\], found torch.float32 \[1, 4\]"):
        trie.prior(torch.zeros(1, 4))
    with pytest.raises(DataError, match=r"expected float \[B, 3\], found torch.float32 \[1, 4\]"):
        trie.prior(torch.zeros(1, 4), torch.tensor([0, 2]))


def test_an_empty_filter_row_masks_everything_and_leaves_the_others_alone():
    trie = Trie.build(torch.tensor([[2, 0], [2, 3], [1, 3]]), 4)
    allowed = trie.filter(torch.tensor([[False] * 3, [True] * 3]))
    for level, state in [(0, 0), (1, 0), (1, 1)]:
        mask = trie.mask(torch.full((2, 5), state), level, allowed)
        assert not mask[0].any()
        assert torch.equal(mask[1], trie.mask(torch.full((5,), state), level))


def test_the_docstring_example():
    trie = Trie.build(torch.tensor([[2, 0], [2, 3], [1, 3]], dtype=torch.int32), 4)
    assert (trie.n_items, trie.n_levels, trie.n_codes) == (3, 2, 4)
    assert trie.item(torch.tensor([0, 1, 2, -1])).tolist() == [2, 0, 1, -1]
    assert trie.step(torch.tensor([0, 0]), torch.tensor([1, 2]), 0).tolist() == [0, 1]


def test_dead_states_stay_dead():
    trie = Trie.build(torch.tensor([[2, 0], [2, 3], [1, 3]]), 4)
    dead = torch.tensor([-1])
    assert trie.step(dead, torch.tensor([3]), 1).tolist() == [-1]
    assert not trie.mask(dead, 1).any()
    assert not trie.mask(dead[:, None], 1, trie.filter(torch.ones(1, 3, dtype=torch.bool))).any()


@pytest.mark.parametrize(
    ("codes", "n_codes", "message"),
    [
        ([[0, 1], [1, 1], [0, 1]], 2, r"2 of 3 rows share .* rows \[0, 2\] with id \[0, 1\]"),
        ([[0, 1], [1, 2]], 2, r"1 of 2 ids .* outside \[0, 2\).*\{1: \[1, 2\]\}"),
        ([[0, -1]], 2, r"outside \[0, 2\).*\{0: \[0, -1\]\}"),
        ([[0.0, 1.0]], 2, r"expected whole numbers \[N, L\], found torch.float32"),
        ([0, 1], 2, r"found torch.int64 \[2\]"),
    ],
)
def test_bad_ids_are_named(codes, n_codes, message):
    with pytest.raises(DataError, match=message):
        Trie.build(torch.tensor(codes), n_codes)


def test_a_filter_of_another_catalogue_is_refused():
    trie = Trie.build(torch.tensor([[0], [1]]), 2)
    with pytest.raises(DataError, match=r"expected bool \[B, 2\], found torch.bool \[1, 3\]"):
        trie.filter(torch.ones(1, 3, dtype=torch.bool))
    with pytest.raises(DataError, match=r"found torch.int64"):
        trie.filter(torch.ones(1, 2, dtype=torch.int64))


def test_half_a_million_items_build_in_seconds():
    numbers = torch.randperm(1 << 21, generator=torch.Generator().manual_seed(0))[: 1 << 19]
    codes = torch.stack([numbers >> 14, (numbers >> 7) % 128, numbers % 128], 1)
    start = time.monotonic()
    trie = Trie.build(codes, 128)
    assert time.monotonic() - start < 10  # about 0.3 s; a Python loop over the rows takes longer than the limit
    state = torch.zeros(len(codes), dtype=torch.int64)
    for level in range(3):
        state = trie.step(state, codes[:, level], level)
    assert torch.equal(trie.item(state), torch.arange(len(codes)))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_the_gpu_agrees_with_the_cpu():
    generator = torch.Generator().manual_seed(0)
    codes = torch.unique(torch.randint(0, 300, (5000, 3), generator=generator), dim=0)
    bitmaps = torch.rand(4, len(codes), generator=generator) < 0.1
    cpu, gpu = Trie.build(codes, 300), Trie.build(codes, 300, "cuda")
    state = torch.zeros(4, 8, dtype=torch.int64)
    for level in range(3):
        want = cpu.mask(state, level, cpu.filter(bitmaps))
        assert torch.equal(want, gpu.mask(state.cuda(), level, gpu.filter(bitmaps)).cpu())
        code = torch.multinomial(want.flatten(0, 1).float(), 1, generator=generator).view(4, 8)
        state = cpu.step(state, code, level)
    assert torch.equal(cpu.item(state), gpu.item(state.cuda()).cpu())


def catalogue():
    from genrec.catalog import Catalogue

    return Catalogue(
        item_ids=["a", "b", "c", "d"],
        titles=["A", "B", "C", "D"],
        descriptions=[""] * 4,
        categories=[["shoes"], ["shoes", "red"], ["hats"], []],
        attributes=[{}] * 4,
        prices=np.array([10, 20, np.nan, 30], np.float32),
        images=[None] * 4,
        available=np.array([True, True, True, False]),
    )


@pytest.mark.parametrize(
    ("conditions", "expected"),
    [
        ({}, "abc"),
        ({"seen": [1, 2, 1]}, "a"),
        ({"categories": ["shoes"]}, "ab"),
        ({"categories": ["red", "hats"]}, "bc"),
        ({"categories": []}, ""),
        ({"price_min": 20}, "b"),
        ({"price_max": 20}, "ab"),
        ({"price_min": 11, "price_max": 19}, ""),
        ({"allow": ["c", "d"]}, "c"),
        ({"allow": []}, ""),
        ({"deny": frozenset({0, 3})}, "bc"),
        ({"deny": frozenset(), "allow": ["a"]}, "a"),
        ({"deny": frozenset({0}), "allow": ["a", "b"]}, "b"),
        ({"seen": [0], "categories": ["shoes"], "price_max": 99, "allow": ["a", "b", "c"]}, "b"),
    ],
)
def test_item_bitmap_keeps(conditions, expected):
    from genrec.filters import item_bitmap

    items = catalogue()
    keep = item_bitmap(items, **{"seen": [], **conditions})
    assert keep.dtype == np.bool_
    assert "".join(np.array(items.item_ids)[keep]) == expected
    assert items.available.tolist() == [True, True, True, False]


@pytest.mark.parametrize(
    ("conditions", "message"),
    [
        ({"seen": [0, 4, -1]}, r"rows \[4, -1\] are outside this catalogue's 0\.\.3"),
        ({"categories": ["shoe"]}, r"categories: not in the catalogue: \['shoe'\] .*did you mean 'shoes'"),
        ({"allow": ["a", "zz"]}, r"allow: not in the catalogue: \['zz'\] \(1 in all\)"),
    ],
)
def test_item_bitmap_names_what_it_does_not_know(conditions, message):
    from genrec.filters import item_bitmap

    with pytest.raises(DataError, match=message):
        item_bitmap(catalogue(), **{"seen": [], **conditions})


def test_wide_levels_agree_whether_dense_or_compressed_and_stay_small(monkeypatch):
    n_codes, n_items = 300, 20_000
    flat = torch.randperm(n_codes**2, generator=torch.Generator().manual_seed(0))[:n_items]
    codes = torch.stack([flat // n_codes, flat % n_codes], 1)
    dense = Trie.build(codes, n_codes)
    monkeypatch.setattr(trie_module, "DENSE_CELLS", 0)
    trie = Trie.build(codes, n_codes)
    assert trie.n_bytes < 9 * n_items < dense.n_bytes  # a code and a row of 4 bytes each, little above them
    node = torch.arange(-1, n_codes)[:, None].expand(-1, n_codes)
    code = torch.arange(n_codes).expand_as(node)
    assert torch.equal(trie.step(node, code, 1), dense.step(node, code, 1))
    ends = trie.step(trie.step(torch.zeros(n_items, dtype=torch.int64), codes[:, 0], 0), codes[:, 1], 1)
    assert trie.item(ends).tolist() == list(range(n_items))
