"""The language model with what genrec adds to it: semantic-id rows, soft slots, a soft prompt, item scores, LoRA.

The base is never resized while it trains. The rows of the new tokens are a parameter of their own, which the splice
puts at their positions and the loss multiplies as output rows; so only L * C rows exist in the optimiser, and a frozen
base stays bit-identical. `merged()` writes them into the base's matrices for serving.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from genrec.adapters.item_scores import ItemScores, Likely
from genrec.decode import attention_mask
from genrec.encoders.features import Features
from genrec.errors import DataError
from genrec.prompts import Layout, Prompt
from genrec.trie import Prior, Trie

log = logging.getLogger(__name__)


def check_slots(input_ids: Tensor, slots: Tensor, layout: Layout) -> None:
    """Every placeholder has a vector and every vector a placeholder, sequence by sequence.

    Args:
        input_ids: int64 [B, T].
        slots: int64 [B, T], see `genrec.prompts.Prompt`.

    Raises:
        DataError: names the first sequence that is off, with both counts.
    """
    holders = (input_ids == layout.soft_id) | (input_ids == layout.prompt_id)
    wrong = (holders != (slots != -1)).any(1)
    if wrong.any():
        row = int(wrong.nonzero()[0])
        raise DataError(
            f"sequence {row}: {int(holders[row].sum())} placeholder tokens, but vectors for "
            f"{int((slots[row] != -1).sum())} slots (or at other positions); encode with genrec.prompts.Prompter"
        )


class Backbone(nn.Module):
    """Base + semantic-id rows + soft slots + soft prompt (+ LoRA)."""

    def __init__(
        self,
        lm: Any,
        layout: Layout,
        adapter: nn.Module | None,
        features: dict[str, Features],
        codes: np.ndarray,
        known: np.ndarray,
        *,
        item_scores: ItemScores | None = None,
        lora: dict[str, Any] | None = None,
        tune_base: bool = False,
        dropout: float = 0.0,
    ):
        """
        Args:
            lm: transformers causal LM.
            layout: where the added tokens are.
            adapter: item features -> soft tokens [B, K, D]; None when K = 0.
            features: modality -> features of all items, in catalogue order.
            codes: int32 [N, L] semantic ids.
            known: bool [N], items that training may name; an item it never names is no wrong answer there either.
            item_scores: what a history says of every item, which the codes' scores start from; None: nothing.
            lora: arguments of peft's LoraConfig; None: no LoRA.
            tune_base: train every weight of the base.
            dropout: on the input vectors while training.
        """
        super().__init__()
        self.layout = layout
        self.config = lm.config
        self.generation_config = lm.generation_config
        for parameter in lm.parameters():
            if parameter.is_floating_point():
                parameter.requires_grad_(tune_base)
        embedding = lm.get_input_embeddings().weight
        rms = embedding[: layout.base_vocab].float().square().mean().sqrt().item()
        rows, dim = layout.levels * layout.n_codes, embedding.shape[1]
        self.sid_in = nn.Parameter(torch.randn(rows, dim) * rms)
        tied = lm.get_output_embeddings().weight is embedding
        self.sid_out_rows = None if tied else nn.Parameter(torch.randn(rows, dim) * 0.02)
        self.soft_prompt = nn.Parameter(torch.randn(layout.soft_prompt, dim) * rms)
        self.adapter = adapter
        self.item_scores = item_scores
        self.dropout = nn.Dropout(dropout)
        for name, feature in features.items():
            self.register_buffer(f"features_{name}", torch.from_numpy(feature.values), persistent=False)
            self.register_buffer(f"present_{name}", torch.from_numpy(feature.present), persistent=False)
        self.modalities = sorted(features)
        self.register_buffer("codes", torch.from_numpy(codes.astype(np.int64)), persistent=False)
        self.register_buffer("known", torch.from_numpy(known), persistent=False)
        self._trie: Trie | None = None
        self._known_trie: Trie | None = None
        if lora is not None:
            from peft import LoraConfig, get_peft_model

            config = LoraConfig(
                r=lora["r"],
                lora_alpha=lora["alpha"],
                lora_dropout=lora["dropout"],
                target_modules="all-linear",
                task_type="CAUSAL_LM",
            )
            lm = get_peft_model(lm, config)
        self.lm = lm

    # -- what TRL's trainer asks of a model ---------------------------------------------------------------------------

    def add_model_tags(self, tags: list[str] | str) -> None:
        """TRL marks what it trained; an export has a model card of its own."""

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: dict[str, Any] | None = None) -> None:
        """Recompute activations in the backward pass."""
        self.lm.gradient_checkpointing_enable(gradient_checkpointing_kwargs or {"use_reentrant": False})

    # -- pieces ----------------------------------------------------------------------------------------------------

    @property
    def base(self) -> Any:
        """The transformers causal LM inside, with or without LoRA around its layers."""
        return self.lm.get_base_model() if hasattr(self.lm, "get_base_model") else self.lm

    @property
    def decoder(self) -> nn.Module:
        decoder: nn.Module = self.base.get_decoder()
        return decoder

    @property
    def device(self) -> torch.device:
        return self.sid_in.device

    @property
    def trie(self) -> Trie:
        """The semantic ids as a trie, on the model's device."""
        if self._trie is None or self._trie.device != self.device:
            self._trie = Trie.build(self.get_buffer("codes"), self.layout.n_codes, self.device)
        return self._trie

    @property
    def known_trie(self) -> Trie:
        """The ids of known items alone: what a target competes with in training."""
        if self._known_trie is None or self._known_trie.device != self.device:
            known = self.get_buffer("codes")[self.get_buffer("known")]
            self._known_trie = Trie.build(known, self.layout.n_codes, self.device)
        return self._known_trie

    @property
    def sid_out(self) -> Tensor:
        """Output rows of the semantic-id tokens: [L * C, D]."""
        return self.sid_in if self.sid_out_rows is None else self.sid_out_rows

    def sid_embed(self, level: int, codes: Tensor) -> Tensor:
        """codes int64 [...] -> input vectors [..., D]."""
        return F.embedding(codes + level * self.layout.n_codes, self.sid_in)

    def sid_logits(self, level: int, hidden: Tensor) -> Tensor:
        """hidden [..., D] -> logits [..., C] of the level's codes."""
        rows = self.sid_out[level * self.layout.n_codes : (level + 1) * self.layout.n_codes]
        return hidden @ rows.T.to(hidden.dtype)

    def soft_tokens(self, items: Tensor) -> Tensor:
        """items int64 [M] (catalogue rows) -> soft tokens [M, K, D]."""
        assert self.adapter is not None
        features = {m: getattr(self, f"features_{m}")[items] for m in self.modalities}
        present = {m: getattr(self, f"present_{m}")[items] for m in self.modalities}
        soft: Tensor = self.adapter(features, present)
        return soft

    def embed(self, input_ids: Tensor, slots: Tensor) -> Tensor:
        """The input vectors of prompts.

        Args:
            input_ids: int64 [B, T].
            slots: int64 [B, T], see `genrec.prompts.Prompt`.

        Returns:
            [B, T, D].

        Raises:
            DataError: placeholders and slots disagree.
        """
        layout = self.layout
        check_slots(input_ids, slots, layout)
        vectors = self.base.get_input_embeddings()(input_ids.clamp(max=layout.base_vocab - 1))
        is_sid = (input_ids >= layout.sid_start) & (input_ids < layout.soft_id)
        vectors = vectors.masked_scatter(
            is_sid[..., None],
            F.embedding(input_ids[is_sid] - layout.sid_start, self.sid_in).to(vectors.dtype),
        )
        is_prompt, is_item = slots < -1, slots >= 0
        vectors = vectors.masked_scatter(
            is_prompt[..., None], F.embedding(-2 - slots[is_prompt], self.soft_prompt).to(vectors.dtype)
        )
        if layout.soft_tokens and is_item.any():
            wanted = slots[is_item]
            items, where = torch.unique(wanted // layout.soft_tokens, return_inverse=True)
            soft = self.soft_tokens(items).flatten(0, 1)  # [M * K, D]
            rows = where * layout.soft_tokens + wanted % layout.soft_tokens
            vectors = vectors.masked_scatter(is_item[..., None], F.embedding(rows, soft).to(vectors.dtype))
        return vectors

    def hidden(self, input_ids: Tensor, slots: Tensor, position_ids: Tensor, segments: Tensor) -> Tensor:
        """Last hidden states [B, T, D] of packed rows; a token sees earlier tokens of its own segment only.

        Args:
            input_ids, slots: int64 [B, T].
            position_ids: int64 [B, T], from 0 in every segment.
            segments: int64 [B, T], which sequence of the row a token belongs to; -1 is padding.
        """
        vectors = self.dropout(self.embed(input_ids, slots))
        order = torch.arange(input_ids.shape[1], device=input_ids.device)
        visible = (segments[:, :, None] == segments[:, None, :]) & (order[:, None] >= order)
        mask = attention_mask(visible, vectors.dtype)
        states: Tensor = self.decoder(
            inputs_embeds=vectors, attention_mask=mask, position_ids=position_ids, use_cache=False
        ).last_hidden_state
        return states

    def likely(self, histories: Sequence[np.ndarray], apart: bool = False) -> Likely | None:
        """What each of B histories says of every item; None without item scores. `apart`: see `ItemScores.read`."""
        return None if self.item_scores is None else self.item_scores.read(histories, apart)

    def _prior_of_events(self, ends: Tensor, histories: Tensor) -> Prior | None:
        """The same before each event of a batch, over known items.

        Args:
            ends: int64 [M], where the events' ids end in the trie of known items, histories side by side.
            histories: int64 [M], equal for neighbours of one history and different for the next.
        """
        if self.item_scores is None:
            return None
        known = self.get_buffer("known").nonzero()[:, 0]
        items = known[self.known_trie.item(ends).clamp(min=0)]
        at = torch.arange(len(items), device=items.device)
        starts = torch.ones_like(at, dtype=torch.bool)
        starts[1:] = histories[1:] != histories[:-1]
        first = torch.where(starts, at, 0).cummax(0).values
        return self.known_trie.prior(self.item_scores.of_events(items, first), known)

    def token_losses(self, hidden: Tensor, labels: Tensor, segments: Tensor) -> tuple[Tensor, Tensor]:
        """Cross-entropy in nats of every target; logits are computed at targets only.

        A semantic-id target competes with the codes that lead on in the trie after its prefix (as in decoding), among
        known items: pushed down, new ones could never come. A text target competes with the whole vocabulary, semantic
        ids included.

        Args:
            hidden: [B, T, D].
            labels: int64 [B, T]; -100 where there is nothing to predict. labels[:, t] is predicted from t - 1.
            segments: int64 [B, T], which sequence of the row a token belongs to.

        Returns:
            losses float32 [M] and the flat positions int64 [M] in [B, T - 1] of their targets.
        """
        layout = self.layout
        shifted = labels[:, 1:].flatten()
        states = hidden[:, :-1].flatten(0, 1)
        losses, positions = [], []
        first_level = (shifted >= layout.sid_start) & (shifted < layout.sid_start + layout.n_codes)
        events = first_level.nonzero()[:, 0]  # where each id begins; its codes stand side by side
        if len(events):
            offsets = torch.arange(layout.levels, device=shifted.device)
            codes = shifted[events[:, None] + offsets] - layout.sid_start - offsets * layout.n_codes  # [M, L]
            nodes = [torch.zeros_like(events)]  # in the trie, before each level and after the last
            for level, code in enumerate(codes.unbind(1)):
                nodes.append(self.known_trie.step(nodes[-1], code, level))
            row = torch.div(events, labels.shape[1] - 1, rounding_mode="floor")
            prior = self._prior_of_events(nodes[-1], row * labels.shape[1] + segments[:, 1:].flatten()[events])
            for level, (node, code) in enumerate(zip(nodes, codes.unbind(1), strict=False)):
                logits = self.sid_logits(level, states[events + level]).float()
                options = self.known_trie.options(node, level, prior=prior)
                if options.weights is not None:
                    logits = logits + options.weights
                logits = logits.masked_fill(~options.known, torch.finfo(logits.dtype).min)
                losses.append(F.cross_entropy(logits, code, reduction="none"))
                positions.append(events + level)
        at = ((shifted >= 0) & (shifted < layout.sid_start)).nonzero()[:, 0]
        if len(at):
            logits = self.base.get_output_embeddings()(states[at])[:, : layout.base_vocab].float()
            own = (states[at] @ self.sid_out.T.to(states.dtype)).float()
            losses.append(F.cross_entropy(torch.cat([logits, own], 1), shifted[at], reduction="none"))
            positions.append(at)
        if not losses:
            return hidden.new_zeros(0), shifted.new_zeros(0)
        return torch.cat(losses), torch.cat(positions)

    def forward(
        self,
        input_ids: Tensor,
        slots: Tensor,
        labels: Tensor,
        position_ids: Tensor,
        segments: Tensor,
        num_items_in_batch: Tensor | int | None = None,
    ) -> dict[str, Tensor]:
        """Mean loss in nats per target of packed rows; arguments as in `hidden` and `token_losses`."""
        hidden = self.hidden(input_ids, slots, position_ids, segments)
        losses, _ = self.token_losses(hidden, labels, segments)
        total = losses.sum()
        if not len(losses):  # blank rows only: a gradient of zero for everything that is trained
            total = hidden.sum() * 0 + sum((p * 0).sum() for p in self.parameters() if p.requires_grad)
        count = max(len(losses), 1) if num_items_in_batch is None else num_items_in_batch
        return {"loss": total / count}

    # -- results -----------------------------------------------------------------------------------------------------

    def trained_state(self) -> dict[str, Tensor]:
        """Everything that training may change, on the CPU; with `load_trained` it restores the model exactly."""
        frozen = {name for name, p in self.lm.named_parameters() if not p.requires_grad}
        state = {}
        for name, value in self.state_dict().items():
            if name.startswith("lm.") and (name.removeprefix("lm.") in frozen or not value.is_floating_point()):
                continue
            if name == "lm.lm_head.weight" and self.sid_out_rows is None:
                continue  # tied to the embedding
            state[name] = value.detach().cpu().contiguous().clone()
        return state

    def load_trained(self, state: dict[str, Tensor]) -> None:
        """Restore `trained_state`; raises DataError when the shapes or names are another model's."""
        own = self.state_dict()
        wrong = [k for k in state if k not in own or own[k].shape != state[k].shape]
        if wrong:
            raise DataError(f"trained weights do not fit this model: {wrong[:3]}; train again with this recipe")
        self.load_state_dict(state, strict=False)

    @torch.inference_mode()
    def all_soft_tokens(self, n_items: int, batch: int = 1024) -> Tensor:
        """Soft tokens of the whole catalogue: float32 [N, K, D]."""
        training, dim = self.training, self.sid_in.shape[1]
        self.eval()
        if self.layout.soft_tokens == 0:
            return torch.zeros(n_items, 0, dim)
        parts = [
            self.soft_tokens(torch.arange(i, min(i + batch, n_items), device=self.device)).float().cpu()
            for i in range(0, n_items, batch)
        ]
        self.train(training)
        return torch.cat(parts)

    @torch.no_grad()
    def merged(self) -> Any:
        """The plain causal LM with LoRA merged and the new rows inside; this backbone must not be used afterwards."""
        lm = self.lm.merge_and_unload() if hasattr(self.lm, "merge_and_unload") else self.lm
        size = max(lm.get_input_embeddings().weight.shape[0], self.layout.size)
        lm.resize_token_embeddings(size, mean_resizing=False)
        ids = slice(self.layout.sid_start, self.layout.soft_id)
        embedding, head = lm.get_input_embeddings().weight, lm.get_output_embeddings().weight
        embedding[ids] = self.sid_in.to(embedding.dtype)
        head[ids] = self.sid_out.to(head.dtype)
        for matrix in (embedding, head):
            matrix[self.layout.soft_id : self.layout.size] = 0  # placeholders: always replaced, never an answer
        return lm


def collate_prompts(prompts: list[Prompt], layout: Layout, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Prompts -> input_ids, slots int64 [B, T] padded on the right, and lengths int64 [B]."""
    lengths = [len(p.input_ids) for p in prompts]
    ids = np.full((len(prompts), max(lengths)), layout.eos, np.int64)
    slots = np.full_like(ids, -1)
    for row, prompt in enumerate(prompts):
        ids[row, : lengths[row]] = prompt.input_ids
        slots[row, : lengths[row]] = prompt.slots
    return (
        torch.from_numpy(ids).to(device),
        torch.from_numpy(slots).to(device),
        torch.tensor(lengths, device=device),
    )
