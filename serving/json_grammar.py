"""JSON under a schema: which tokens may come next, by xgrammar (docs/design/008-one-question-per-mention.md)."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import xgrammar
from torch import Tensor

from genrec.errors import DataError
from genrec.prompts import Layout

KEPT = 256  # compiled schemas


class JsonGrammar:
    """Masks for one export's vocabulary: the base's own tokens without its control tokens.

    The JSON has no spaces between its parts, so that there is one way to write it; vLLM is told the same.
    """

    def __init__(self, tokenizer: Any, layout: Layout):
        """
        Args:
            tokenizer: the export's fast transformers tokenizer.
            layout: where text ends and genrec's own tokens begin.
        """
        found = xgrammar.TokenizerInfo.from_huggingface(
            tokenizer, vocab_size=layout.base_vocab, stop_token_ids=[layout.eos]
        )
        control = {*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()}
        spelled = [b"" if i in control else piece for i, piece in enumerate(found.decoded_vocab)]
        self._compiler = xgrammar.GrammarCompiler(
            xgrammar.TokenizerInfo(
                spelled, xgrammar.VocabType.RAW, vocab_size=layout.base_vocab, stop_token_ids=[layout.eos]
            ),
            max_threads=1,
        )
        self._compiled = lru_cache(KEPT)(self._compile)

    def matcher(self, schema: str) -> xgrammar.GrammarMatcher:
        """The state of one answer under a JSON schema, before its first token.

        Raises:
            DataError: not a JSON schema that xgrammar can follow.
        """
        return xgrammar.GrammarMatcher(self._compiled(schema))

    def mask(self, logits: Tensor, matchers: list[xgrammar.GrammarMatcher | None]) -> None:
        """Put -inf at every token that an answer must not go on with.

        Args:
            logits: float32 [B, V] of the base's own tokens, changed in place.
            matchers: one per row; None, or one that has ended: the row stays as it is.
        """
        open_rows = {row: of for row, of in enumerate(matchers) if of is not None and not of.is_terminated()}
        if not open_rows:
            return
        bits = xgrammar.allocate_token_bitmask(len(matchers), logits.shape[1])
        for row, matcher in open_rows.items():
            matcher.fill_next_token_bitmask(bits, row)
        xgrammar.apply_token_bitmask_inplace(logits, bits.to(logits.device), indices=list(open_rows))

    def _compile(self, schema: str) -> xgrammar.CompiledGrammar:
        try:
            return self._compiler.compile_json_schema(schema, any_whitespace=False, separators=(",", ":"))
        except (RuntimeError, ValueError) as err:
            raise DataError(f"not a JSON schema that xgrammar can follow: {err}; found {schema[:200]!r}") from err
