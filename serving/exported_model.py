"""An export's language model in torch: what beam search and free text need of it."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from genrec.errors import ArtefactError
from genrec.serving import compressed_tensors_copy
from genrec.serving.export import Export
from genrec.serving.fused_decoder import FusedDecoder

log = logging.getLogger(__name__)


class ExportedModel:
    """The model of an export; a `genrec.decode.Scorer`.

    The output rows of one level's codes are neighbours (see `genrec.prompts.Layout`), so a level's logits are one
    product with a view of C rows, never with the whole vocabulary. Tied and untied heads work alike.
    """

    def __init__(
        self, export: Export, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        """Load the weights.

        Args:
            export: whole or quantised by bitsandbytes.
            device: None takes a GPU where there is one.
            dtype: of what is not quantised; None: float32 on a CPU, as stored on a GPU.

        Raises:
            ArtefactError: model/ holds no loadable model, one in vLLM's format, or one with fewer rows than the layout
                has tokens.
        """
        from transformers import AutoModelForCausalLM

        quantised = export.manifest["result"].get("quantised", {}).get("method")
        if quantised in compressed_tensors_copy.METHODS:
            raise ArtefactError(
                f"{export.folder}: quantised by {quantised} in compressed-tensors' format, which only vLLM reads; "
                "take the vllm engine, or serve the unquantised export"
            )
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.layout = export.layout
        try:
            lm: Any = AutoModelForCausalLM.from_pretrained(
                export.model_dir,
                dtype=dtype or (torch.float32 if self.device.type == "cpu" else "auto"),
                device_map={"": self.device},
            )
        except (OSError, ValueError) as err:
            raise ArtefactError(f"{export.model_dir}: no loadable model ({err}); export the run again") from err
        self.lm = lm.eval().requires_grad_(False)
        decoder = lm.get_decoder()
        self.decoder: nn.Module = FusedDecoder(decoder) if FusedDecoder.fits(decoder) else decoder
        self.embedding: Tensor = lm.get_input_embeddings().weight  # [V, D]
        head = lm.get_output_embeddings()
        self._head: Tensor = head.weight  # [V, D]
        self._bias: Tensor | None = getattr(head, "bias", None)
        rows = min(len(self.embedding), len(self._head))
        if rows < self.layout.size:
            raise ArtefactError(
                f"{export.model_dir}: {rows} vocabulary rows, but the layout has {self.layout.size} tokens; "
                "export the run again"
            )
        if "quantised" in export.manifest["result"]:
            # LLM.int8() logs its cast to float16 at every product
            logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
            for module in lm.modules():  # Linear4bit would compute in the precision that it was saved with
                if hasattr(module, "compute_dtype"):
                    module.compute_dtype = self.embedding.dtype
        self.max_positions = int(lm.config.get_text_config().max_position_embeddings)

    def sid_embed(self, level: int, codes: Tensor) -> Tensor:
        """codes int64 [...] -> input vectors [..., D]."""
        return self.embedding[codes + (self.layout.sid_start + level * self.layout.n_codes)]

    def sid_logits(self, level: int, hidden: Tensor) -> Tensor:
        """hidden [..., D] -> logits [..., C] of the level's codes."""
        start = self.layout.sid_start + level * self.layout.n_codes
        return self._logits(hidden, start, start + self.layout.n_codes)

    def text_logits(self, hidden: Tensor) -> Tensor:
        """hidden [..., D] -> logits [..., V] of the base's own tokens: text holds no id and no placeholder."""
        return self._logits(hidden, 0, self.layout.base_vocab)

    def _logits(self, hidden: Tensor, start: int, end: int) -> Tensor:
        bias = None if self._bias is None else self._bias[start:end]
        return F.linear(hidden.to(self._head.dtype), self._head[start:end], bias)
