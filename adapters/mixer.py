"""The mixer: one order for a list, from all that is known of its items.

A beam's score says what the generator thinks of an item and nothing of how near its content or its words are to one
thing that the user took, how often it is taken at all, or whether it is new. Those who know different things are best
weighed by someone who has seen how often each was right: here a small network over a few numbers per item, which
learned from lists whose next item is known (stacking: Wolpert 1992, "Stacked generalization"). In learning, some known
items played new ones, so it knows what an inherited score is worth, and new items compete with known ones on equal
terms.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from genrec.adapters.item_scores import Likely
from genrec.adapters.newcomers import Newcomers, known_shares
from genrec.adapters.self_attention import PAD, left_pad
from genrec.decode import Ranked

HIDDEN = 64
DROPOUT = 0.3
NEW = 30  # new items per list that are weighed, those that inherit most
DECAY = 0.7  # of an event's weight per later event, in the mean cosine
LEAST = -30.0  # nats: what is less likely is not less likely here
LONGEST = 200  # events of a history that are looked at, the newest
NUMBERS = 6  # features of every mixer
COSINES = 3  # features per modality


class Mixer(nn.Module):
    """``logit(i) = w . z(i) + net(z(i))`` with the standardised features ``z`` of `features`; plain lists at first.

    One that orders only new items has that logit for them, and for known ones their own score times how far it is to be
    trusted: more than 0, so they keep their order.
    """

    only_new: Tensor  # bool []
    mean: Tensor  # float32 [F]
    spread: Tensor  # float32 [F]
    popularity: Tensor  # int64 [N]
    entry: Tensor  # float32 [], nats that new items get on top
    temper: Tensor  # float32 [], with which they inherit, see `Newcomers.inherited`

    def __init__(self, parts: Sequence[str], keys: dict[str, Tensor], popularity: Tensor, only_new: bool = False):
        """
        Args:
            parts: of the item scores, by name.
            keys: modality -> float32 [N, E_m] of unit rows, or 0 where an item lacks it; words may be one, see
                `genrec.adapters.words`; none: content counts for nothing.
            popularity: int64 [N], training events.
            only_new: leave known items' scores as they are.
        """
        super().__init__()
        self.parts, self.modalities = tuple(parts), sorted(keys)
        for name in self.modalities:
            self.register_buffer(f"keys_{name}", keys[name], persistent=False)
        self.register_buffer("popularity", popularity, persistent=False)
        width = NUMBERS + len(parts) + COSINES * len(keys)
        self.register_buffer("only_new", torch.tensor(only_new))
        self.register_buffer("entry", torch.zeros(()))
        self.register_buffer("temper", torch.ones(()))
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("spread", torch.ones(width))
        self.trust = nn.Parameter(torch.zeros(()))  # nats
        self.plain = nn.Linear(width, 1)
        nn.init.zeros_(self.plain.bias)
        last = nn.Linear(HIDDEN, 1, bias=False)
        self.net = nn.Sequential(
            nn.Linear(width, HIDDEN), nn.GELU(), nn.Dropout(DROPOUT),
            nn.Linear(HIDDEN, HIDDEN), nn.GELU(), nn.Dropout(DROPOUT), last,
        )  # fmt: skip
        nn.init.zeros_(last.weight)
        self.set_scale(torch.zeros(width), torch.ones(width))

    def keys(self, name: str) -> Tensor:
        """float32 [N, E_m]."""
        return self.get_buffer(f"keys_{name}")

    def set_scale(self, mean: Tensor, spread: Tensor) -> None:
        """Standardise features by these, float32 [F] each, and order lists by their own scores until it is trained."""
        self.mean.copy_(mean)
        self.spread.copy_(spread)
        nn.init.zeros_(self.plain.weight)
        with torch.no_grad():
            self.plain.weight[0, 0] = spread[0]

    def candidates(
        self, found: Ranked, likely: Likely | None, allowed: Tensor, newcomers: Newcomers | None
    ) -> tuple[Tensor, Tensor]:
        """What a list may hold: what was found, and the new items that inherit most.

        Args:
            found: known items, [B, W].
            likely: item scores; None where there are none.
            allowed: bool [B, N].
            newcomers: the new items; None: they are found like all others.

        Returns:
            items int64 [B, C], -1 where there are fewer, and their scores float32 [B, C]: log-probabilities, inherited
            by new ones.
        """
        items, scores = found.items, found.scores
        if newcomers is not None:
            shares = known_shares(None if likely is None else likely.total, allowed, newcomers)
            inherited = newcomers.inherited(items, scores, shares, allowed, self.temper)
            best, at = inherited.topk(min(NEW, inherited.shape[1]), dim=1)
            new = newcomers.rows[at].masked_fill(best == -torch.inf, -1)
            items, scores = torch.cat([items, new], 1), torch.cat([scores, best], 1)
        return items, scores

    def features(
        self,
        histories: Sequence[Sequence[int] | np.ndarray],
        items: Tensor,
        scores: Tensor,
        likely: Likely | None,
    ) -> Tensor:
        """What is known of each candidate after each of B histories, oldest event first; float32 [B, C, F].

        Its score; whether the history holds it; whether it is new; how often it is taken; the tenth score of the list
        and the history's length, which are the same for all; what each part of the item scores says, where a new item
        has none but the profile; and per modality its cosine with the history: the mean with old events fading, the
        largest, and the newest event's.

        Args:
            histories: B histories.
            items, scores: from `candidates`.
            likely: item scores with their parts; may be None for a mixer that reads none.
        """
        row = items.clamp(min=0)
        past = left_pad([np.asarray(history)[-LONGEST:] for history in histories]).to(items.device)  # [B, T]
        real = past != PAD
        taken = self.popularity[row].float()
        tenth = scores.topk(min(10, scores.shape[1]), dim=1).values[:, -1:].expand_as(scores)
        parts = [
            scores.clamp(min=LEAST),
            (row[:, :, None] == past[:, None]).any(2),
            taken == 0,
            taken.log1p(),
            tenth.clamp(min=LEAST),
            real.sum(1, keepdim=True).log1p().expand_as(scores),
        ]
        for name in self.parts:
            assert likely is not None
            said = likely.parts[name].gather(1, row)
            parts.append(said if name == "profile" else said * (taken > 0))
        if not past.shape[1]:  # nobody took anything: no cosines
            past, real = past.new_full((len(past), 1), PAD), real.new_zeros(len(real), 1)
        age = torch.arange(past.shape[1] - 1, -1, -1, device=past.device)
        weight = real * DECAY**age  # [B, T]
        weight = weight / weight.sum(1, keepdim=True).clamp(min=torch.finfo(weight.dtype).tiny)
        for keys in map(self.keys, self.modalities):
            cosines = keys[row] @ keys[past.clamp(min=0)].transpose(1, 2)  # [B, C, T]
            largest = cosines.masked_fill(~real[:, None], -1).amax(2)
            parts += [(cosines @ weight[:, :, None])[..., 0], largest, cosines[..., -1]]
            parts[-2:] = [of * real[:, -1:] for of in parts[-2:]]  # 0 where the history is empty
        return torch.stack([of.float() for of in parts], 2)

    def forward(self, features: Tensor) -> Tensor:
        """features [B, C, F] -> logits [B, C]."""
        z = (features - self.mean) / self.spread
        logits: Tensor = (self.plain(z) + self.net(z))[..., 0]
        known = (features[..., 0] - self.mean[0]) * self.trust.exp()
        return torch.where(features[..., 2] > 0, logits, known) if self.only_new else logits

    @torch.inference_mode()
    def order(
        self,
        histories: Sequence[Sequence[int] | np.ndarray],
        found: Ranked,
        likely: Likely | None,
        allowed: Tensor,
        newcomers: Newcomers | None,
        most: int,
    ) -> Ranked:
        """The list, best first.

        Scores are log-probabilities among the candidates; new items' entry and lift come on top. Arguments as for
        `candidates` and `features`; `most`: items of the longest list.
        """
        items, scores = self.candidates(found, likely, allowed, newcomers)
        logits = self(self.features(histories, items, scores, likely)).masked_fill(items < 0, -torch.inf)
        scores = logits.log_softmax(1).nan_to_num(nan=-torch.inf, neginf=-torch.inf)  # of an empty list
        if newcomers is not None:
            scores = scores + (newcomers.lift + self.entry) * (self.popularity[items.clamp(min=0)] == 0)
        best, at = scores.topk(min(most, scores.shape[1]), dim=1)
        return Ranked(items.gather(1, at).masked_fill(best == -torch.inf, -1), best)

    def with_items(self, keys: dict[str, Tensor], popularity: Tensor) -> Mixer:
        """The same for other items: `keys` of at least its modalities and `popularity`, as at the start."""
        other = Mixer(self.parts, {name: keys[name] for name in self.modalities}, popularity)
        other.load_state_dict(self.state_dict())
        return other.eval().requires_grad_(False)

    def save(self, path: Path) -> None:
        """Write what was learned and what it reads, by name; keys and popularity are elsewhere already."""
        state = {name: of.detach().cpu().contiguous() for name, of in self.state_dict().items()}
        save_file(state, path, {"parts": " ".join(self.parts), "modalities": " ".join(self.modalities)})

    @classmethod
    def load(cls, path: Path, keys: dict[str, Tensor], popularity: Tensor) -> Mixer:
        """Read what `save` wrote, frozen; arguments as at the start, `keys` may hold more.

        Raises:
            OSError, SafetensorError, RuntimeError, KeyError: no whole file of this kind, or of other modalities.
        """
        with safe_open(path, "pt") as file:
            read = {name: of.split() for name, of in (file.metadata() or {}).items()}
        mixer = cls(read["parts"], {name: keys[name] for name in read["modalities"]}, popularity)
        mixer.load_state_dict(load_file(path))
        return mixer.eval().requires_grad_(False)


def whole_lists(
    histories: Sequence[Sequence[int] | np.ndarray],
    found: Ranked,
    likely: Likely | None,
    allowed: Tensor,
    newcomers: Newcomers | None,
    mixer: Mixer | None,
    most: int,
) -> Ranked:
    """What a search found, as a list: new items join, the mixer orders; arguments as for `Mixer.order`."""
    if mixer is not None:
        return mixer.order(histories, found, likely, allowed, newcomers, most)
    if newcomers is None:
        return found
    return Ranked(*newcomers.join(found.items, found.scores, None if likely is None else likely.total, allowed, most))
