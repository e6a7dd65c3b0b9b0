"""Every valid semantic id as arrays on the device: which codes may come next, which item a whole id names.

A *node* of level ``l`` is one distinct prefix of ``l`` codes, numbered by its rank among the sorted prefixes;
level 0 holds the root alone, level ``L`` one node per item. The children of a node are therefore
neighbours, sorted by code. For the ids ``[2, 0]``, ``[2, 3]``, ``[1, 3]`` level 1 has the nodes ``[1] -> 0``
and ``[2] -> 1``, level 2 has ``[1, 3] -> 0``, ``[2, 0] -> 1``, ``[2, 3] -> 2``, and `item` maps the final
nodes 0, 1, 2 to the rows 2, 0, 1.

Small levels are dense tables, the rest compressed sparse rows (STATIC, Su et al. 2026, arXiv:2602.22647).
After `build` nothing is read back to the host, so that a decoding step may run inside a captured graph.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from genrec.errors import DataError

DENSE_CELLS = 1 << 22  # a level becomes a dense table up to this many cells (4 bytes each)
SHOWN = 5


@dataclass(frozen=True)
class Filter:
    """Item bitmaps pushed up a trie: ``nodes[l]``, bool [B, nodes of level l]: an allowed item is below."""

    nodes: list[Tensor]


@dataclass(frozen=True)
class Prior:
    """Item scores pushed up a trie: ``nodes[l]``, float32 [B, nodes of level l]: log-sum-exp of the items below."""

    nodes: list[Tensor]


@dataclass(frozen=True)
class Options:
    """Of every code after each state; a dead state has none.

    Attributes:
        known: bool [..., C], it leads on.
        legal: bool [..., C], it leads to an allowed item.
        weights: float32 [..., C], the prior of the node that it leads to, 0 where it leads nowhere; or None.
    """

    known: Tensor
    legal: Tensor
    weights: Tensor | None


@dataclass(frozen=True)
class _Level:
    """The step from the nodes of one level to the next.

    Attributes:
        codes: int32 [children], sorted below each parent; a child's place is its node id.
        offsets: int32 [parents + 1], the first child of each parent.
        fan_out: most children of one parent.
        table: int32 [parents, C], child or -1; None where that would be too large.
    """

    codes: Tensor
    offsets: Tensor
    fan_out: int
    table: Tensor | None

    def parents(self) -> Tensor:
        """int64 [children], made anew: kept, it would be the largest of the arrays."""
        parents = torch.arange(len(self.offsets) - 1, device=self.codes.device)
        return parents.repeat_interleave(self.offsets.diff(), output_size=len(self.codes))

    def children(self, node: Tensor) -> Tensor:
        """node int64 [...] -> its children int64 [..., fan_out]; past the last one the last again: written twice, a
        value stays the same."""
        last = self.offsets[node + 1].long().unsqueeze(-1) - 1
        child = self.offsets[node].long().unsqueeze(-1) + torch.arange(self.fan_out, device=node.device)
        return torch.minimum(child, last)

    def find(self, node: Tensor, code: Tensor) -> Tensor:
        """The child of each node, int64 [...], by each code, int64 [...]: int64 [...], -1 where there is none.

        A binary search among the node's own children, all nodes at once: its steps depend on the fan-out, not on the
        number of items.
        """
        if self.table is not None:
            return self.table[node, code].long()
        low, last = self.offsets[node].long(), self.offsets[node + 1].long() - 1
        high = last
        for _ in range(self.fan_out.bit_length()):
            middle = (low + high) // 2
            before = self.codes[middle] < code
            low, high = torch.where(before, torch.minimum(middle + 1, last), low), torch.where(before, high, middle)
        return torch.where(self.codes[low] == code, low, -1)


class Trie:
    """The valid ids of a catalogue; states are int64 node ids, -1 is dead and stays dead."""

    root = 0

    def __init__(self, levels: list[_Level], rows: Tensor, n_codes: int) -> None:
        self._levels = levels
        self._rows = rows  # int32 [N]: final node -> catalogue row
        self.n_items = len(rows)
        self.n_levels = len(levels)
        self.n_codes = n_codes
        self.device = rows.device

    @property
    def n_bytes(self) -> int:
        """Bytes of all arrays; a `Filter` takes one more per node and request, a `Prior` four."""
        arrays = [self._rows]
        for level in self._levels:
            arrays += [level.codes, level.offsets] + ([] if level.table is None else [level.table])
        return sum(array.nbytes for array in arrays)

    @classmethod
    def build(cls, codes: Tensor, n_codes: int, device: torch.device | str = "cpu") -> Trie:
        """Sort the ids into a trie.

        Args:
            codes: int [N, L], the id of every catalogue row; all ids differ.
            n_codes: codes per level, C.
            device: where the trie's arrays and all results live.

        Raises:
            DataError: no ids, a code outside ``[0, C)``, or an id that two rows share.
        """
        if codes.ndim != 2 or 0 in codes.shape or codes.is_floating_point():
            raise DataError(f"codes: expected whole numbers [N, L], found {codes.dtype} {list(codes.shape)}")
        codes = codes.to(device=device, dtype=torch.int64)
        outside = ((codes < 0) | (codes >= n_codes)).any(1).nonzero().flatten()
        if len(outside):
            bad = {row: codes[row].tolist() for row in outside[:SHOWN].tolist()}
            raise DataError(
                f"{len(outside)} of {len(codes)} ids hold a code outside [0, {n_codes}), by row: {bad}; "
                "take n_codes from the semantic ids that the codes come from"
            )
        order = torch.arange(len(codes), device=device)
        for code in reversed(codes.unbind(1)):
            order = order[code[order].argsort(stable=True)]
        new = torch.zeros(len(codes), dtype=torch.bool, device=device)  # sorted row -> it begins another prefix
        new[0] = True
        levels, begins = [], new.nonzero().flatten()  # [parents]: the first sorted row below each
        for column in codes.unbind(1):
            code = column[order]
            new[1:] |= code[1:] != code[:-1]
            offsets = torch.cat([new.cumsum(0)[begins] - 1, new.sum()[None]])
            begins = new.nonzero().flatten()
            levels.append(_level(code[begins], offsets, n_codes))
        if len(begins) < len(codes):
            node = torch.empty_like(order)
            node[order] = new.cumsum(0) - 1
            shared = (torch.bincount(node)[node] > 1).nonzero().flatten()
            same = (node == node[shared[0]]).nonzero().flatten()[:SHOWN].tolist()
            raise DataError(
                f"{len(shared)} of {len(codes)} rows share their id with another; the first are rows {same} "
                f"with id {codes[same[0]].tolist()}; one id names one item, fit_semantic_ids sees to it"
            )
        return cls(levels, order.int(), n_codes)

    def options(self, state: Tensor, level: int, allowed: Filter | None = None, prior: Prior | None = None) -> Options:
        """What may come next; each node's children are looked up once.

        Args:
            state: int64 [...]; with a filter or prior [B, ...], where row b obeys their row b.
            level: codes read so far.
            allowed: from `filter`; one row alone holds for every row of `state`.
            prior: from `prior`; the same.
        """
        here = self._levels[level]
        alive, node = (state >= 0).unsqueeze(-1), state.clamp(min=0)
        dense = here.table is not None
        if here.table is not None:
            child = here.table[node].long()  # [..., C]
            known = (child >= 0) & alive
            child = child.clamp(min=0)
        else:
            child = here.children(node)  # [..., fan_out]
            known = alive.expand(child.shape)
            place = here.codes[child].long()

        def spread(values: Tensor) -> Tensor:
            """By child -> by code."""
            if dense:
                return values
            out = values.new_zeros(*state.shape, self.n_codes)
            return out.scatter(-1, place, values)

        legal = known if allowed is None else known & _of_rows(allowed.nodes[level + 1], child)
        weights = None if prior is None else _of_rows(prior.nodes[level + 1], child).masked_fill(~known, 0)
        known_codes = spread(known)
        return Options(
            known_codes,
            known_codes if allowed is None else spread(legal),
            None if weights is None else spread(weights),
        )

    def mask(self, state: Tensor, level: int, allowed: Filter | None = None) -> Tensor:
        """The codes that lead on from each state, bool [..., C]; arguments as for `options`, whose `legal` it is."""
        return self.options(state, level, allowed).legal

    def step(self, state: Tensor, code: Tensor, level: int) -> Tensor:
        """Read one more code.

        Args:
            state: int64 [...], nodes of `level`.
            code: int64 [...]; anything outside ``[0, C)`` is illegal, not an error.
            level: codes read so far.

        Returns:
            int64 [...], nodes of ``level + 1``; -1 where the state was dead or the code is illegal.
        """
        legal = (state >= 0) & (code >= 0) & (code < self.n_codes)
        child = self._levels[level].find(state.clamp(min=0), code.clamp(0, self.n_codes - 1))
        return torch.where(legal, child, -1)

    def item(self, state: Tensor) -> Tensor:
        """Catalogue row of each final state: int64 [...] -> int64 [...], -1 where dead."""
        return torch.where(state >= 0, self._rows[state.clamp(min=0)].long(), -1)

    def filter(self, items: Tensor) -> Filter:
        """Push item bitmaps up the levels, so that a beam never enters a branch without an allowed item.

        Args:
            items: bool [B, N], the items that request b allows.

        Raises:
            DataError: the bitmap is not bool [B, N].
        """
        if items.ndim != 2 or items.shape[1] != self.n_items or items.dtype != torch.bool:
            raise DataError(f"filter: expected bool [B, {self.n_items}], found {items.dtype} {list(items.shape)}")
        nodes = [items.to(self.device).index_select(1, self._rows)]
        for level in reversed(self._levels):
            count = nodes[0].cumsum(1, dtype=torch.int32)  # [B, children]: allowed nodes up to each
            count = count.index_select(1, level.offsets[1:] - 1)  # [B, parents]: up to the last child of each
            above = count.clone()
            above[:, 1:] -= count[:, :-1]
            nodes.insert(0, above > 0)
        return Filter(nodes)

    def prior(self, scores: Tensor, columns: Tensor | None = None) -> Prior:
        """Push item scores up the levels, so that a node weighs as much as all items below it together.

        With them as logits, the product of a path's softmaxes over siblings is the softmax over items: the trie
        spells a distribution over items without changing it.

        Args:
            scores: float [B, N], in nats up to a constant per row.
            columns: int64 [N], of which columns of wider scores these N are; None: there are no others.

        Raises:
            DataError: scores are not [B, N], or columns not [N].
        """
        n_items = scores.shape[-1] if columns is None else len(columns)
        if scores.ndim != 2 or n_items != self.n_items or not scores.is_floating_point():
            wanted = "" if columns is None else f", of which {n_items} columns are asked for"
            raise DataError(
                f"prior: expected float [B, {self.n_items}], found {scores.dtype} {list(scores.shape)}{wanted}"
            )
        rows = self._rows if columns is None else columns[self._rows]
        scores = _Columns.apply(scores.to(self.device).float(), rows)
        nodes = [scores - scores.amax(1, keepdim=True).detach()]  # exp() stays in range
        mass = nodes[0].exp()
        for level in reversed(self._levels):
            above = mass.new_zeros(len(mass), len(level.offsets) - 1)
            mass = above.index_add(1, level.parents(), mass)  # [B, parents]
            nodes.insert(0, mass.clamp(min=torch.finfo(mass.dtype).tiny).log())
        return Prior(nodes)


class _Columns(torch.autograd.Function):
    """Some columns in some order, none twice: index_select's own gradient would add them up one by one."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, columns: Tensor) -> Tensor:
        """values [B, N], columns int [n] -> [B, n]."""
        ctx.save_for_backward(columns)
        ctx.width = values.shape[1]
        return values.index_select(1, columns)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradients: Tensor) -> tuple[Tensor, None]:
        """[B, n] -> [B, N]."""
        (columns,) = ctx.saved_tensors
        place = columns.new_full((ctx.width,), -1)
        place[columns.long()] = torch.arange(len(columns), dtype=place.dtype, device=place.device)
        result = gradients.index_select(1, place.clamp(min=0))
        return result.index_fill_(1, (place < 0).nonzero()[:, 0], 0), None


def _level(codes: Tensor, offsets: Tensor, n_codes: int) -> _Level:
    n_parents = len(offsets) - 1
    level = _Level(codes.int(), offsets.int(), int(offsets.diff().max()), None)
    if n_parents * n_codes > DENSE_CELLS:
        return level
    table = torch.full((n_parents, n_codes), -1, dtype=torch.int32, device=codes.device)
    table[level.parents(), codes] = torch.arange(len(codes), dtype=torch.int32, device=codes.device)
    return dataclasses.replace(level, table=table)


def _of_rows(nodes: Tensor, child: Tensor) -> Tensor:
    """Row b of `nodes`, bool [B, nodes], read at row b of `child`, int64 [B, ..., n] -> bool [B, ..., n]."""
    rows = torch.arange(len(nodes), device=nodes.device).view(-1, *[1] * (child.ndim - 1))
    return nodes[rows, child]
