"""Text to the token ids of a served model: its tokenizer and its chat template.

Prompts go to servers as token ids. The template and our own words may hold special tokens;
document text and candidates may not: whatever they spell, they become ordinary tokens. That holds
for every border, also one that its tokenizer does not call special (DeepSeek's role marks, Qwen's
<think>), and one that stands in the vocabulary. Nothing from the model folder is executed but the
chat template, in a sandbox.
"""

from __future__ import annotations

import hashlib
import json
import re
import secrets
import string
from array import array
from collections.abc import Mapping, Sequence
from functools import lru_cache
from itertools import compress, pairwise, takewhile
from pathlib import Path
from typing import Any, NoReturn

from jinja2 import Template, TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

PIECES = 1024  # whose token ids are remembered: all questions on a pool share its texts
_BORDER = re.compile(r"[<\[|\uff5c].*\w")  # an added token of this form may border turns


class JudgeTokenizer:
    """Text to token ids of one model folder: `tokenizer.json`, and a chat template for prompts."""

    def __init__(self, folder: Path) -> None:
        """Raises: ValueError naming the missing file or the broken template."""
        self._folder = folder
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise ValueError(f"{folder} has no tokenizer.json; give the server model's folder")
        text = path.read_text(encoding="utf-8")
        self._trusted = Tokenizer.from_str(text)
        self._untrusted = Tokenizer.from_str(text)
        self._untrusted.encode_special_tokens = True
        for tokenizer in (self._trusted, self._untrusted):
            tokenizer.no_truncation()
            tokenizer.no_padding()
        settings = _read_json(folder / "tokenizer_config.json")
        self._special = {k: _content(v) for k, v in settings.items() if k.endswith("_token")}
        source = _template_source(folder, settings)
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.globals["raise_exception"] = _raise_template_error
        try:
            self._template = None if source is None else environment.from_string(source)
        except TemplateError as error:
            raise ValueError(f"{folder}: chat template is broken: {error}") from None
        self._borders = {
            i: token.content
            for i, token in self._trusted.get_added_tokens_decoder().items()
            if token.special or _BORDER.search(token.content)
        }
        self.special_texts = tuple(self._borders.values())
        # these borders also stand for a character that has no token
        self._unknown = {"<unk>", "[UNK]", self._special.get("unk_token")}
        one = self._untrusted.encode("a")  # what the tokenizer puts before a text by itself
        added = takewhile(lambda x: x[1], zip(one.ids, one.special_tokens_mask, strict=True))
        self._begin = [i for i, _ in added]
        parts = json.dumps([text, source, self._special], sort_keys=True)
        self.digest = hashlib.sha256(parts.encode()).hexdigest()
        self._ids = lru_cache(PIECES)(self._encode_piece)
        self._pieces = lru_cache(PIECES)(self._split)

    @property
    def has_template(self) -> bool:
        return self._template is not None

    def require_template(self) -> Template:
        """Raises: ValueError if the folder has none; what asks without prompts needs none."""
        if self._template is None:
            raise ValueError(
                f"{self._folder} has no chat template, with which prompts are made; add "
                'chat_template.jinja or a single "chat_template" in tokenizer_config.json'
            )
        return self._template

    def render(
        self, messages: Sequence[tuple[str, str]], *, fields: Mapping[str, str], answer: str = ""
    ) -> list[int]:
        """Chat with generation prompt as token ids.

        Args:    messages: (role, text with $placeholders); the text is trusted.
                 fields: value of each placeholder; untrusted.
                 answer: how the model's turn begins; trusted.
        Returns: token ids, not cut.
        Raises:  ValueError if a placeholder has no field, or there is no template or it refuses
                 the messages.
        """
        try:
            pieces = self._pieces(tuple(messages), tuple(fields), answer)
        except KeyError as error:
            raise ValueError(f"prompt placeholder {error} has no value") from None
        except TemplateError as error:
            raise ValueError(f"chat template refuses the prompt: {error}") from None
        ids: list[int] = []
        for index, piece in enumerate(pieces):
            is_field = index % 2 == 1
            ids.extend(self._ids(fields[piece] if is_field else piece, trusted=not is_field))
        return ids

    def _split(
        self, messages: tuple[tuple[str, str], ...], names: tuple[str, ...], answer: str
    ) -> tuple[str, ...]:
        """The chat as text, placeholder name, text, ..., text.

        Raises: KeyError, TemplateError; ValueError if it does not hold each placeholder as asked.
        """
        nonce = secrets.token_hex(12)
        marks = {name: f"{nonce}{name}{nonce}" for name in names}
        filled = [{"role": r, "content": string.Template(t).substitute(marks)} for r, t in messages]
        text = self.require_template().render(
            messages=filled, add_generation_prompt=True, **self._special
        )
        pieces = (text + answer).split(nonce)
        wanted = sum(m["content"].count(nonce) for m in filled) // 2
        if len(pieces) // 2 != wanted:
            raise ValueError("chat template drops or repeats parts of the prompt; use another one")
        return tuple(pieces)

    def _encode_piece(self, text: str, *, trusted: bool) -> array[int]:
        if trusted:
            return array("i", self._trusted.encode(text, add_special_tokens=False).ids)
        return array("i", self._ordinary(text)[0])

    def encode_continuation(
        self, prefix: str, *, continuation: str, white_space: bool = True
    ) -> tuple[list[int], tuple[int, ...]]:
        """Prefix and continuation tokenised together, special tokens as ordinary text.

        Args:    white_space: whether tokens that cover white space alone count.
        Returns: (ids, positions): `positions` in `ids` are the continuation's, that is, cover at
                 least one of its characters; none when the continuation is empty.
        """
        text = prefix + continuation
        ids, spans = self._ordinary(text)
        if ids:
            ids, spans = self._begin + ids, [(0, 0)] * len(self._begin) + spans
        first = next((i for i, (_, end) in enumerate(spans) if end > len(prefix)), len(ids))
        return ids, tuple(
            i
            for i, (start, end) in enumerate(spans)
            if i >= first and (white_space or text[start:end].strip())
        )

    def _ordinary(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids of untrusted text and the characters that each covers; no id is a border's.

        No option of a tokenizer covers borders that are not called special or that the vocabulary
        holds: text that became one all the same is cut after its first character; a border of one
        character can be spelled in no other way and is left out.
        """
        ids: list[int] = []
        spans: list[tuple[int, int]] = []
        rest = [(0, text)]
        while rest:
            at, part = rest.pop()
            encoding = self._untrusted.encode(part, add_special_tokens=False)
            found = encoding.ids, encoding.offsets
            if not self._borders.keys().isdisjoint(encoding.ids):
                borders = [self._is_border(i, part[a:b]) for i, (a, b) in zip(*found, strict=True)]
                cuts = [
                    a + 1
                    for (a, b), is_border in zip(encoding.offsets, borders, strict=True)
                    if is_border and b - a > 1
                ]
                if cuts:
                    pieces = pairwise([0, *cuts, len(part)])
                    rest += reversed([(at + start, part[start:end]) for start, end in pieces])
                    continue
                kept = [not is_border for is_border in borders]
                found = list(compress(found[0], kept)), list(compress(found[1], kept))
            ids += found[0]
            spans += [(at + start, at + end) for start, end in found[1]] if at else found[1]
        return ids, spans

    def _is_border(self, token: int, covered: str) -> bool:
        """Whether a token made of `covered` is a border and no sign for an unknown character."""
        border = self._borders.get(token)
        return border is not None and (border not in self._unknown or border in covered)

    def label_id(self, label: str) -> int:
        """Id of a one-token label. Raises: ValueError if it takes several tokens."""
        ids = self._ids(label, trusted=False)
        if len(ids) != 1:
            raise ValueError(f"prompt label {label!r} takes {len(ids)} tokens; choose another")
        return ids[0]


def _template_source(folder: Path, settings: dict[str, Any]) -> str | None:
    path = folder / "chat_template.jinja"
    source = path.read_text(encoding="utf-8") if path.is_file() else settings.get("chat_template")
    return source if isinstance(source, str) else None


def _read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _content(value: Any) -> Any:
    """A special token is a string or an object that holds it."""
    return value.get("content") if isinstance(value, dict) else value


def _raise_template_error(message: str) -> NoReturn:
    raise TemplateError(message)
