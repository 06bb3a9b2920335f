"""Text to the token ids of a served model: its tokenizer and its chat template.

Prompts go to servers as token ids. The template and our own words may hold special tokens;
document text and candidates may not: whatever they spell, they become ordinary tokens. Nothing
from the model folder is executed but the chat template, in a sandbox.
"""

from __future__ import annotations

import hashlib
import json
import re
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from string import Template
from typing import Any, NoReturn

from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer


class JudgeTokenizer:
    """Text to token ids of one model folder (`tokenizer.json` and a chat template)."""

    def __init__(self, folder: Path) -> None:
        """Raises: ValueError naming the missing file or the broken template."""
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
            self._template = environment.from_string(source)
        except TemplateError as error:
            raise ValueError(f"{folder}: chat template is broken: {error}") from None
        parts = json.dumps([text, source, self._special], sort_keys=True)
        self.digest = hashlib.sha256(parts.encode()).hexdigest()

    def render(
        self, messages: Sequence[tuple[str, str]], *, fields: Mapping[str, str], answer: str = ""
    ) -> list[int]:
        """Chat with generation prompt as token ids.

        Args:    messages: (role, text with $placeholders); the text is trusted.
                 fields: value of each placeholder; untrusted.
                 answer: how the model's turn begins; trusted.
        Returns: token ids, not cut.
        Raises:  ValueError if a placeholder has no field or the template refuses the messages.
        """
        nonce = secrets.token_hex(12)
        marks = {name: f"{nonce}{name}{nonce}" for name in fields}
        try:
            filled = [{"role": r, "content": Template(t).substitute(marks)} for r, t in messages]
            text = self._template.render(
                messages=filled, add_generation_prompt=True, **self._special
            )
        except KeyError as error:
            raise ValueError(f"prompt placeholder {error} has no value") from None
        except TemplateError as error:
            raise ValueError(f"chat template refuses the prompt: {error}") from None
        pieces = re.split(f"{nonce}(.*?){nonce}", text + answer)
        wanted = sum(str(m["content"]).count(nonce) for m in filled) // 2
        if len(pieces) // 2 != wanted:
            raise ValueError("chat template drops or repeats parts of the prompt; use another one")
        ids: list[int] = []
        for index, piece in enumerate(pieces):
            tokenizer, part = (
                (self._untrusted, fields[piece]) if index % 2 else (self._trusted, piece)
            )
            ids += tokenizer.encode(part, add_special_tokens=False).ids
        return ids

    def encode_continuation(
        self, prefix: str, *, continuation: str, white_space: bool = True
    ) -> tuple[list[int], tuple[int, ...]]:
        """Prefix and continuation tokenised together, special tokens as ordinary text.

        Args:    white_space: whether tokens that cover white space alone count.
        Returns: (ids, positions): `positions` in `ids` are the continuation's, that is, cover at
                 least one of its characters; none when the continuation is empty.
        """
        text = prefix + continuation
        encoding = self._untrusted.encode(text)
        ids = list(encoding.ids)
        while ids and encoding.special_tokens_mask[len(ids) - 1]:
            ids.pop()  # an end-of-text token that the tokenizer adds by itself
        spans = encoding.offsets[: len(ids)]
        first = next((i for i, (_, end) in enumerate(spans) if end > len(prefix)), len(ids))
        return ids, tuple(
            i
            for i, (start, end) in enumerate(spans)
            if i >= first and (white_space or text[start:end].strip())
        )

    def label_id(self, label: str) -> int:
        """Id of a one-token label. Raises: ValueError if it takes several tokens."""
        ids = self._untrusted.encode(label, add_special_tokens=False).ids
        if len(ids) != 1:
            raise ValueError(f"prompt label {label!r} takes {len(ids)} tokens; choose another")
        return ids[0]


def _template_source(folder: Path, settings: dict[str, Any]) -> str:
    path = folder / "chat_template.jinja"
    source = path.read_text(encoding="utf-8") if path.is_file() else settings.get("chat_template")
    if not isinstance(source, str):
        raise ValueError(
            f"{folder} has no chat template; add chat_template.jinja or a single "
            '"chat_template" in tokenizer_config.json'
        )
    return source


def _read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _content(value: Any) -> Any:
    """A special token is a string or an object that holds it."""
    return value.get("content") if isinstance(value, dict) else value


def _raise_template_error(message: str) -> NoReturn:
    raise TemplateError(message)
