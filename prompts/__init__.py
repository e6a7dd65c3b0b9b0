"""Every sentence that the model reads: one Jinja file per task, and the renderer that turns it into token ids.

A template yields *parts*: its own text, text values (from catalogues and users: hostile), and references to items.
Text becomes tokens through a tokenizer that knows no special token at all, so nothing in it can forge a control
token, a semantic id or a soft slot; references become ids directly.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from copy import copy
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import StrictUndefined, Template, TemplateError, Undefined
from jinja2.nativetypes import NativeEnvironment
from tokenizers import Tokenizer

from genrec.catalog import Catalogue
from genrec.errors import ConfigError
from genrec.likeness import NOTHING, Likeness
from genrec.writer import DEFAULT_STYLE, card, evidence_of, title_of

TASKS = ("next_item", "item_text", "id_text", "text_id", "looks", "describe", "explain", "headline", "chat_query")


@dataclass(frozen=True)
class Layout:
    """Where the tokens that genrec adds stand in the vocabulary, all behind the base's own.

    Level `l`, code `c` is token ``sid_start + l * n_codes + c``; then come the placeholder of a soft token and the
    placeholder of a soft prompt token.
    """

    base_vocab: int  # tokens of the base's tokenizer
    levels: int  # L
    n_codes: int  # C
    soft_tokens: int  # K
    soft_prompt: int  # P
    bos: int | None
    eos: int

    @property
    def sid_start(self) -> int:
        return self.base_vocab

    @property
    def soft_id(self) -> int:
        return self.base_vocab + self.levels * self.n_codes

    @property
    def prompt_id(self) -> int:
        return self.soft_id + 1

    @property
    def size(self) -> int:
        """Tokens in all, base included."""
        return self.prompt_id + 1

    def token_strings(self) -> list[str]:
        """The added tokens in id order."""
        codes = [f"<|sid_{level}_{code}|>" for level in range(self.levels) for code in range(self.n_codes)]
        return [*codes, "<|soft|>", "<|prompt|>"]

    def sid_tokens(self, codes: np.ndarray) -> np.ndarray:
        """codes int [..., L] -> token ids int64 [..., L]."""
        return codes.astype(np.int64) + self.sid_start + np.arange(self.levels) * self.n_codes


@dataclass(frozen=True)
class Sid:
    """A reference to an item's semantic id: L tokens."""

    item: int


@dataclass(frozen=True)
class Soft:
    """A reference to an item's soft tokens: K slots."""

    item: int


@dataclass(frozen=True)
class SoftPrompt:
    """The task's soft prompt: P slots."""


@dataclass(frozen=True)
class Answer:
    """Text that the model has to write; followed by the end token. None: the model writes it."""

    text: str | None


@dataclass(frozen=True)
class Item:
    """What a template sees of an item (a catalogue row).

    Attributes:
        row: the item.
        title: one line, cut where it is long.
        card: title and attributes in one line.
    """

    row: int
    title: str = ""
    card: str = ""

    @property
    def sid(self) -> Sid:
        return Sid(self.row)

    @property
    def soft(self) -> Soft:
        return Soft(self.row)


Part = str | Sid | Soft | SoftPrompt | Answer


@dataclass(frozen=True)
class Prompt:
    """One encoded sequence.

    `slots` says what vector stands at a position: -1 the token's own row; ``item * K + k`` soft token k of an item;
    ``-2 - p`` position p of the soft prompt. `targets` marks the tokens that training must predict.
    """

    input_ids: np.ndarray  # int64 [T]
    slots: np.ndarray  # int64 [T]
    targets: np.ndarray = field(repr=False)  # bool [T]


@cache
def _environment() -> NativeEnvironment:
    return NativeEnvironment(undefined=StrictUndefined)


@cache
def source(task: str) -> str:
    """A task's template as it is in its file.

    Raises:
        ConfigError: no such task.
    """
    if task not in TASKS:
        raise ConfigError(f"no prompt named {task!r}; there are {', '.join(TASKS)}")
    return (Path(__file__).parent / f"{task}.jinja").read_text(encoding="utf-8")


@cache
def prompt_version(task: str) -> str:
    """What names a task's template in provenance: the task and 12 hexadecimal digits of the template's SHA-256."""
    return f"{task}-{hashlib.sha256(source(task).encode()).hexdigest()[:12]}"


@cache
def _template(text: str) -> Template:
    return _environment().from_string(text)


def render(task: str, template: str | None = None, **values: Any) -> list[Part]:
    """Run a task's template and return its parts in order.

    Args:
        task: one of `TASKS`.
        template: another text for it, of someone who edits prompts.
        values: what templates may name.

    Raises:
        ConfigError: no such task, or a template that is not valid or names a value that was not given.
    """
    text = source(task) if template is None else template
    given = ", ".join(sorted({"soft_prompt", *values}))
    parts: list[Part] = []
    try:
        compiled = _template(text)
        found = list(compiled.root_render_func(compiled.new_context({"soft_prompt": SoftPrompt(), **values})))
    except TemplateError as err:
        raise ConfigError(f"prompt {task}: {err}; a template may name {given} (docs/write.md)") from err
    for part in found:
        if isinstance(part, str | Sid | Soft | SoftPrompt | Answer):
            parts.append(part)
        elif isinstance(part, Undefined):
            name = part._undefined_name
            raise ConfigError(f"prompt {task}: {name!r} is undefined; a template may name {given} (docs/write.md)")
        else:
            raise ConfigError(f"prompt {task}: expected text or an item reference, found {type(part).__name__}")
    return parts


def item_of(catalogue: Catalogue | None, row: int) -> Item:
    """What templates see of a catalogue row; without a catalogue no text of it."""
    if catalogue is None:
        return Item(int(row))
    return Item(int(row), title_of(catalogue, row), card(catalogue, row))


def writing_parts(
    catalogue: Catalogue | None,
    task: str,
    history: Sequence[int] | np.ndarray,
    row: int,
    style: str = DEFAULT_STYLE,
    text: str | None = None,
    evidence: Sequence[int] | None = None,
    template: str | None = None,
    likeness: Likeness | None = None,
) -> list[Part]:
    """What a writing task's prompt consists of; arguments as in `Prompter` and `Prompter.write`."""
    values: dict[str, Any] = {"alike": NOTHING if likeness is None else likeness.words(history)}
    if task == "explain":
        if evidence is None:
            evidence = [] if catalogue is None else evidence_of(catalogue, history, row)
        values["evidence"] = [item_of(catalogue, r) for r in evidence]
    shown, item = [Item(int(r)) for r in history], item_of(catalogue, row)
    return render(task, template, history=shown, item=item, style=style, answer=Answer(text), **values)


def plain_tokenizer(tokenizer: Any) -> Tokenizer:
    """A copy of a fast tokenizer that knows no added and no special token.

    Text that spells a control token, such as ``<|im_end|>``, comes out as ordinary pieces.
    """
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state["added_tokens"] = []
    state["post_processor"] = None
    state["truncation"] = state["padding"] = None
    return Tokenizer.from_str(json.dumps(state))


class Prompter:
    """Encodes prompts for one vocabulary and one catalogue's semantic ids."""

    def __init__(
        self,
        tokenizer: Any,
        layout: Layout,
        codes: np.ndarray,
        max_text_tokens: int = 256,
        catalogue: Catalogue | None = None,
        likeness: Likeness | None = None,
    ):
        """
        Args:
            tokenizer: the base's fast transformers tokenizer.
            layout: where the added tokens are.
            codes: int32 [N, L] semantic ids.
            max_text_tokens: longer text values are cut.
            catalogue: whose titles and attributes the writing prompts show; None: they show none.
            likeness: in what a history's items are alike, which the writing prompts say; None: in nothing.
        """
        self.catalogue = catalogue
        self.likeness = likeness
        self.layout = layout
        self.sids = layout.sid_tokens(codes)  # [N, L]
        self.max_text_tokens = max_text_tokens
        self._plain = plain_tokenizer(tokenizer)
        self._control = frozenset(tokenizer.all_special_ids) | frozenset(tokenizer.get_added_vocab().values())
        self._fixed: dict[str, list[int]] = {}

    def with_items(self, codes: np.ndarray, catalogue: Catalogue, likeness: Likeness | None) -> Prompter:
        """The same for other items: codes int32 [N, L], their catalogue and what compares them."""
        more = copy(self)
        more.sids, more.catalogue, more.likeness = self.layout.sid_tokens(codes), catalogue, likeness
        return more

    def text_ids(self, text: str) -> list[int]:
        """Token ids of text, capped; never a control token, whatever the text says."""
        # a token holds at least one byte, so this cut loses nothing that the cap would keep of usual text
        text = text[: self.max_text_tokens * 32]
        ids = self._plain.encode(text, add_special_tokens=False).ids[: self.max_text_tokens]
        return [i for i in ids if i not in self._control]

    def encode(self, parts: Iterable[Part]) -> Prompt:
        """Parts -> one sequence; semantic ids and answers are its targets."""
        layout = self.layout
        ids: list[int] = [] if layout.bos is None else [layout.bos]
        slots: list[int] = [-1] * len(ids)
        targets: list[bool] = [False] * len(ids)
        for part in parts:
            match part:
                case str():
                    new = self._fixed.get(part)
                    if new is None:
                        new = (
                            self._fixed.setdefault(part, self.text_ids(part)) if len(part) < 64 else self.text_ids(part)
                        )
                    kinds, target = [-1] * len(new), False
                case Sid(item):
                    new, target = self.sids[item].tolist(), True
                    kinds = [-1] * layout.levels
                case Soft(item):
                    new, target = [layout.soft_id] * layout.soft_tokens, False
                    kinds = list(range(item * layout.soft_tokens, (item + 1) * layout.soft_tokens))
                case SoftPrompt():
                    new, target = [layout.prompt_id] * layout.soft_prompt, False
                    kinds = [-2 - p for p in range(layout.soft_prompt)]
                case Answer(text):
                    new, target = ([] if text is None else [*self.text_ids(text), layout.eos]), True
                    kinds = [-1] * len(new)
            ids += new
            slots += kinds
            targets += [target] * len(new)
        return Prompt(np.array(ids, np.int64), np.array(slots, np.int64), np.array(targets, bool))

    def next_item(self, history: Sequence[int] | np.ndarray) -> Prompt:
        """The prompt whose next L tokens are the next item's id; with its targets, a training sample as well.

        Example, L = 2, K = 1: items 7, 3 -> ``History: a7 b7 [7] a3 b3 [3]``; targets are a7, b7, a3, b3.
        """
        return self.encode(render("next_item", history=[Item(int(row)) for row in history]))

    def item_text(self, row: int, text: str | None = None) -> Prompt:
        """Item -> its text (given: a training sample)."""
        return self.encode(render("item_text", item=Item(row), answer=Answer(text)))

    def looks(self, row: int, style: str, text: str | None = None) -> Prompt:
        """Soft tokens alone -> what the item's picture shows, in a style's wording (given: a training sample)."""
        return self.encode(render("looks", item=Item(row), style=style, answer=Answer(text)))

    def item(self, row: int) -> Item:
        """What templates see of a catalogue row."""
        return item_of(self.catalogue, row)

    def id_text(self, row: int, text: str | None = None) -> Prompt:
        """Semantic id -> the item's text (given: a training sample)."""
        return self._text_only(render("id_text", item=self.item(row), answer=Answer(text)))

    def text_id(self, row: int) -> Prompt:
        """The item's title and attributes -> its semantic id: a training sample."""
        return self.encode(render("text_id", item=self.item(row)))

    def parts(self, task: str, history: Sequence[int] | np.ndarray, row: int, **values: Any) -> list[Part]:
        """What a writing task's prompt consists of; arguments as in `write`."""
        return writing_parts(self.catalogue, task, history, row, likeness=self.likeness, **values)

    def write(self, task: str, history: Sequence[int] | np.ndarray, row: int, **values: Any) -> Prompt:
        """History and item -> a text about the item.

        Args:
            task: "describe", "explain" or "headline".
            history: catalogue rows, oldest first.
            row: the item.
            values: `style` (see `genrec.writer.STYLES`); `text`, given: a training sample; `evidence`, rows that an
                explanation names (None: the best of `history`); `template`, another text for the task.
        """
        return self._text_only(self.parts(task, history, row, **values))

    def chat_query(self, message: str, text: str | None = None) -> Prompt:
        """A question about a user's message -> its answer as JSON (see `genrec.query_schema`).

        Args:
            message: with marks in place of its mentions.
            text: the JSON, given: a training sample.
        """
        return self.encode(render("chat_query", message=message, answer=Answer(text)))

    def _text_only(self, parts: list[Part]) -> Prompt:
        """One sequence whose ids are given, not asked for."""
        prompt = self.encode(parts)
        return replace(prompt, targets=prompt.targets & (prompt.input_ids < self.layout.sid_start))

    def describe(self, history: Sequence[int] | np.ndarray, row: int, **values: Any) -> Prompt:
        """`write` of a description."""
        return self.write("describe", history, row, **values)
