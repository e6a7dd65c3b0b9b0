"""User models: a history, and where they look at it the candidates, to user vectors.

Every model is called with ``users`` int64 [B], ``history`` views [B, T, ...], ``there`` bool [B, T] and ``target``
views [B or 1, C, ...], and returns [B, C, W], or [B, 1, W] where it does not look at the candidates.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from genrec.adapters.fused import Sizes
from genrec.adapters.interests import InterestUser
from genrec.adapters.item_views import ItemViews
from genrec.adapters.self_attention import Block

LONGEST = 50  # newest events that are read, outside training


def masked_mean(values: Tensor, there: Tensor) -> Tensor:
    """Mean over the places that are there: values [B, T, W], there bool [B, T] -> [B, W]; zeros where none is."""
    return (values * there[..., None]).sum(1) / there.sum(1, keepdim=True).clamp(min=1)


class LearnedUser(nn.Module):
    """A vector per user: only known users have one."""

    def __init__(self, sizes: Sizes, n_users: int):
        super().__init__()
        self.vectors = nn.Embedding(n_users, sizes.width)
        nn.init.normal_(self.vectors.weight, std=sizes.width**-0.5)

    def forward(self, users: Tensor, history: ItemViews, there: Tensor, target: ItemViews) -> Tensor:
        return self.vectors(users)[:, None]


class MeanUser(nn.Module):
    """The mean of the history's vectors."""

    def __init__(self, sizes: Sizes, n_users: int):
        super().__init__()

    def forward(self, users: Tensor, history: ItemViews, there: Tensor, target: ItemViews) -> Tensor:
        return masked_mean(history.final, there)[:, None]


class ModalUser(nn.Module):
    """The history's mean of every modality, side by side: [B, 1, M * W], for the `modal` and `gated` heads."""

    def __init__(self, sizes: Sizes, n_users: int):
        super().__init__()

    def forward(self, users: Tensor, history: ItemViews, there: Tensor, target: ItemViews) -> Tensor:
        return torch.cat([masked_mean(of, there) for of in history.modal.values()], -1)[:, None]


class SumUser(nn.Module):
    """The sum of the history's vectors, mapped once: what attention is compared with."""

    def __init__(self, sizes: Sizes, n_users: int):
        super().__init__()
        self.out = nn.Linear(sizes.width, sizes.width)

    def forward(self, users: Tensor, history: ItemViews, there: Tensor, target: ItemViews) -> Tensor:
        return self.out(masked_mean(history.final, there))[:, None]


class QueryAttention(nn.Module):
    """The candidate asks the history: one query per thing it is asked by (DICM's MultiQueryAttentivePooling, 2018).

    Keys hold an event's vector and its category, so that a query by category can find its like.
    """

    queries: tuple[str, ...] = ("item",)
    sees_category = True

    def __init__(self, sizes: Sizes, n_users: int):
        super().__init__()
        width = sizes.width
        self.category = nn.Embedding(sizes.n_categories, width)
        self.key = nn.ModuleDict({q: nn.Linear(2 * width, width) for q in self.queries})
        self.query = nn.ModuleDict({q: nn.Linear(width, width) for q in self.queries})
        self.out = nn.Linear(len(self.queries) * width, width)

    def forward(self, users: Tensor, history: ItemViews, there: Tensor, target: ItemViews) -> Tensor:
        kind = target.category if self.sees_category else torch.zeros_like(target.category)
        asked = {"item": target.final, "category": self.category(kind)}
        known = torch.cat([history.final, self.category(history.category)], -1)
        said = []
        for name in self.queries:
            fit = self.query[name](asked[name]) @ self.key[name](known).transpose(1, 2)  # [B, C, T]
            fit = fit / known.shape[-1] ** 0.5
            weights = fit.masked_fill(~there[:, None], torch.finfo(fit.dtype).min).softmax(-1)
            said.append(weights @ history.final)
        return self.out(torch.cat(said, -1))


class MultiQueryAttention(QueryAttention):
    """`QueryAttention` asked by the candidate's vector and by its category."""

    queries = ("item", "category")


class BlindMultiQuery(MultiQueryAttention):
    """`MultiQueryAttention` whose second query asks the same whatever the candidate's category."""

    sees_category = False


class TransformerUser(nn.Module):
    """SASRec's blocks over the history; the state after the newest event is the user."""

    longest = 64

    def __init__(self, sizes: Sizes, n_users: int, layers: int = 2):
        super().__init__()
        self.ages = nn.Embedding(self.longest, sizes.width)
        self.layers = nn.ModuleList(Block(sizes.width, 2, 0.1) for _ in range(layers))
        self.norm = nn.LayerNorm(sizes.width)
        nn.init.normal_(self.ages.weight, std=0.02)
        self.prompt: nn.Parameter | None = None
        self.below = 0
        self.kept: dict[bytes, Tensor] | None = None

    def keep_below(self, layer: int) -> None:
        """Compute each history's states after the blocks below `layer` once, from now on until `kept` is None again.

        Right only while nothing below learns: those blocks, and whatever an item's vector is made of. They read
        without dropout.
        """
        self.below, self.kept = layer, {}
        for block in self.layers[:layer]:
            block.eval()

    def add_prompt(self, length: int) -> None:
        """Learned vectors that stand before every history from now on; they learn, the rest stays as it is."""
        like = self.ages.weight
        self.prompt = nn.Parameter(torch.randn(length, like.shape[1], device=like.device) * 0.02)

    def forward(self, users: Tensor, history: ItemViews, there: Tensor, target: ItemViews) -> Tensor:
        values = history.final
        if self.prompt is not None:
            values = torch.cat([self.prompt.expand(len(values), -1, -1), values], 1)
            there = torch.cat([there.new_ones(len(there), len(self.prompt)), there], 1)
        return self._read(values, there, history.rows)[:, -1:]

    def _read(self, values: Tensor, there: Tensor, rows: Tensor) -> Tensor:
        length = values.shape[1]
        ages = torch.arange(length - 1, -1, -1, device=values.device).clamp(max=self.longest - 1)
        x = values + self.ages(ages)
        causal = torch.ones(length, length, dtype=torch.bool, device=values.device).tril()
        mask = ((causal & there[:, None]) | torch.eye(length, dtype=torch.bool, device=values.device))[:, None]
        if self.kept is not None:
            x = self._lower(x, mask, there, rows, self.kept)
        for layer in self.layers[0 if self.kept is None else self.below :]:
            x = layer(x, mask)
        return self.norm(x)

    @torch.no_grad()
    def _lower(self, x: Tensor, mask: Tensor, there: Tensor, rows: Tensor, kept: dict[bytes, Tensor]) -> Tensor:
        """x [B, T, W], rows int64 [B, T] -> states after the lower blocks, those of known histories looked up."""
        keys = [row[seen].cpu().numpy().tobytes() for row, seen in zip(rows, there, strict=True)]
        new = [at for at, key in enumerate(keys) if key not in kept]
        if new:
            state, looks = x[new], mask[new]
            for layer in self.layers[: self.below]:
                state = layer(state, looks)
            for at, of in zip(new, state, strict=True):
                kept[keys[at]] = of[there[at]]
        out = torch.zeros_like(x)
        out[there] = torch.cat([kept[key] for key in keys])
        return out


class CrossModalUser(nn.Module):
    """Events weigh by how any of their modalities fits any of the candidate's (MM-Rec: arXiv:2104.07407).

    For each of the candidate's modalities a vector of its own, [B, C, M * W], to be compared by the `modal` head.
    """

    pairs_differ = True

    def __init__(self, sizes: Sizes, n_users: int):
        super().__init__()
        self.modalities = sizes.modalities
        names = [f"{a}_{b}" for a in sizes.modalities for b in sizes.modalities if a == b or self.pairs_differ]
        self.match = nn.ModuleDict({name: nn.Linear(sizes.width, sizes.width) for name in names})
        self.say = nn.ModuleDict({name: nn.Linear(sizes.width, sizes.width) for name in names})

    def forward(self, users: Tensor, history: ItemViews, there: Tensor, target: ItemViews) -> Tensor:
        said = []
        for b in self.modalities:
            vectors = torch.zeros((), device=there.device)
            for a in self.modalities:
                if f"{a}_{b}" in self.match:
                    fits = target.modal[b] @ self.match[f"{a}_{b}"](history.modal[a]).transpose(1, 2)  # [B, C, T]
                    fits = fits / target.final.shape[-1] ** 0.5
                    weights = fits.masked_fill(~there[:, None], torch.finfo(fits.dtype).min).softmax(-1)
                    vectors = vectors + weights @ self.say[f"{a}_{b}"](history.modal[a])
            said.append(vectors)
        return torch.cat(said, -1)


class SameModalUser(CrossModalUser):
    """`CrossModalUser` that compares text with text and pictures with pictures only."""

    pairs_differ = False


class JointReader(nn.Module):
    """A cross-encoder: the candidate stands at the end of the history, and one transformer reads both (UNBERT, 2021).

    What it reads is added to the history's mean, as nothing at first: where the mean is all there is, little is lost.
    It runs once per candidate, so it ranks few: the impressions of a page, or the beams of a generator.
    """

    def __init__(self, sizes: Sizes, n_users: int):
        super().__init__()
        self.mark = nn.Parameter(torch.randn(sizes.width) * 0.5)
        self.category = nn.Embedding(sizes.n_categories, sizes.width)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(sizes.width, 2, 2 * sizes.width, 0.0, batch_first=True, norm_first=True)
            for _ in range(2)
        )
        self.out = nn.Linear(sizes.width, sizes.width, bias=False)
        nn.init.zeros_(self.out.weight)

    def forward(self, users: Tensor, history: ItemViews, there: Tensor, target: ItemViews) -> Tensor:
        n, many = len(there), target.final.shape[1]
        events = history.final + self.category(history.category)
        last = (target.final + self.category(target.category) + self.mark).expand(n, -1, -1)
        # [B, C, T + 1, W] -> [B * C, T + 1, W]
        x = torch.cat([events[:, None].expand(-1, many, -1, -1), last[:, :, None]], 2).flatten(0, 1)
        unseen = torch.cat([~there, there.new_zeros(n, 1)], 1).repeat_interleave(many, 0)
        for layer in self.layers:
            x = layer(x, src_key_padding_mask=unseen)
        return masked_mean(history.final, there)[:, None] + self.out(x[:, -1]).unflatten(0, (n, many))


USERS: dict[str, type[nn.Module]] = {
    "learned": LearnedUser,
    "mean": MeanUser,
    "modal": ModalUser,
    "sum": SumUser,
    "attention": QueryAttention,
    "multi_query": MultiQueryAttention,
    "blind_multi_query": BlindMultiQuery,
    "transformer": TransformerUser,
    "cross_modal": CrossModalUser,
    "same_modal": SameModalUser,
    "interests": InterestUser,
    "joint_reader": JointReader,
}
