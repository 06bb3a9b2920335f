"""Prompts as files: `prompts/NAME_vN.txt`, a header, then a `--- role` line before each message.

The last part may be `--- answer`: the beginning of the answer, which the model goes on from.

A prompt that has been used is never edited; a new wording is a new version, so that verdicts in
caches and ledgers keep their meaning.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from importlib import resources
from string import Template

PLACEHOLDERS = frozenset({"prefix", "option_1", "option_2", "candidate", "suffix"})
ROLES = ("system", "user")
ANSWER = "answer"


@dataclass(frozen=True)
class Prompt:
    """One prompt file."""

    name: str  # with version: quality_pairwise_v1
    version: int
    digest: str  # sha256 of the file
    messages: tuple[tuple[str, str], ...]  # (role, text with $placeholders)
    answer: str  # how the answer begins; no placeholders
    placeholders: frozenset[str]
    labels: tuple[str, ...]  # answers whose probabilities are read; empty for free text


def prompt_names() -> list[str]:
    """Names of all prompts of the package, sorted."""
    files = resources.files("megatron_sip.prompts").iterdir()
    return sorted(f.name.removesuffix(".txt") for f in files if f.name.endswith(".txt"))


def load_prompt(name: str) -> Prompt:
    """Read a prompt of the package.

    Raises: ValueError if there is none of that name or the file breaks a rule.
    """
    if name not in prompt_names():
        raise ValueError(f"no prompt {name!r}; there are {', '.join(prompt_names())}")
    text = (resources.files("megatron_sip.prompts") / f"{name}.txt").read_text(encoding="utf-8")
    return parse_prompt(text, name=name)


def parse_prompt(text: str, *, name: str) -> Prompt:
    """The prompt in `text`.

    Raises: ValueError naming the prompt and the rule: version as in the name, declared
            placeholders equal to the used ones and known, roles known and non-empty.
    """
    header, *parts = re.split(r"^--- (\w+)\n", text, flags=re.MULTILINE)
    keys: dict[str, str] = {}
    for line in filter(str.strip, header.splitlines()):
        key, _, value = line.partition(":")
        keys[key] = value.strip()
    messages = tuple(zip(parts[::2], (part.strip("\n") for part in parts[1::2]), strict=True))
    answer = messages[-1][1] if parts[-2:-1] == [ANSWER] else ""
    messages = messages[: len(messages) - bool(answer)]
    declared = frozenset(keys.get("placeholders", "").split())
    valid = all(Template(body).is_valid() for _, body in messages)
    used = {key for _, body in messages for key in Template(body).get_identifiers()}
    rules = [
        (set(keys) == {"version", "placeholders", "labels"},
         "the header must hold version, placeholders and labels"),
        (name.endswith(f"_v{keys.get('version', '')}"),
         "the version must be the one in the name"),
        (bool(messages) and all(role in ROLES for role, _ in messages),
         f"roles must be among {ROLES}"),
        (valid, "a lone $ must be written $$"),
        ("$" not in answer, "the answer part takes no placeholders"),
        (declared == used, f"declares {sorted(declared)} but uses {sorted(used)}"),
        (used <= PLACEHOLDERS, f"placeholders must be among {sorted(PLACEHOLDERS)}"),
    ]  # fmt: skip
    for holds, rule in rules:
        if not holds:
            raise ValueError(f"prompt {name}: {rule}")
    return Prompt(
        name=name,
        version=int(keys["version"]),
        digest=hashlib.sha256(text.encode()).hexdigest(),
        messages=messages,
        answer=answer,
        placeholders=declared,
        labels=tuple(keys["labels"].split()),
    )
