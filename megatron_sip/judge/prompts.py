"""Prompts as files: `prompts/NAME_vN.txt`, a header, then a `--- role` line before each message.

The last part may be `--- answer`: the beginning of the answer, which the model goes on from. A
header `values:` gives what each label is worth; without it the first is worth 1 and the others 0.

A prompt that has been used is never edited; a new wording is a new version, so that verdicts in
caches and ledgers keep their meaning.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from string import Template

PLACEHOLDERS = frozenset(
    {"prefix", "option_1", "option_2", "candidate", "suffix", "nonce", "last_words", "num_words"}
)
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
    labels: tuple[str, ...]  # possible verdicts; empty for free text
    values: tuple[float, ...]  # the score of each


def prompt_names() -> list[str]:
    """Names of all prompts of the package, sorted."""
    files = resources.files("megatron_sip.prompts").iterdir()
    return sorted(f.name.removesuffix(".txt") for f in files if f.name.endswith(".txt"))


def load_prompt(name: str) -> Prompt:
    """Read a prompt of the package, or a file of your own if the name ends with .txt.

    Raises: ValueError if there is none of that name or the file breaks a rule.
    """
    if name.endswith(".txt"):
        try:
            return parse_prompt(Path(name).read_text(encoding="utf-8"), name=Path(name).stem)
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"prompt {name} cannot be read ({error})") from None
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
        (set(keys) - {"values"} == {"version", "placeholders", "labels"},
         "the header must hold version, placeholders and labels, and may hold values"),
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
    labels = tuple(keys["labels"].split())
    return Prompt(
        name=name,
        version=int(keys["version"]),
        digest=hashlib.sha256(text.encode()).hexdigest(),
        messages=messages,
        answer=answer,
        placeholders=declared,
        labels=labels,
        values=_values(keys.get("values", ""), len(labels), name=name),
    )


def _values(text: str, number: int, *, name: str) -> tuple[float, ...]:
    """Scores of `number` labels. Raises: ValueError if they are not as many numbers in [0, 1]."""
    if not text:
        return (1.0, *[0.0] * (number - 1))[:number]
    try:
        values = tuple(float(value) for value in text.split())
    except ValueError:
        values = ()
    if len(values) != number or not all(0 <= value <= 1 for value in values):
        raise ValueError(f"prompt {name}: values must be {number} numbers in [0, 1], one a label")
    return values


# placeholders that a prompt must have, and those that it may have beside them
_NEEDED = {
    "pairwise": ({"option_1", "option_2"}, {"prefix", "nonce"}),
    "pointwise": ({"candidate"}, {"prefix", "nonce"}),
    "graded": ({"candidate"}, {"prefix", "suffix", "nonce"}),
    "rewrite": ({"suffix"}, PLACEHOLDERS - {"candidate", "option_1", "option_2"}),
}
_LABELS = {"pairwise": (2, 2), "pointwise": (2, 2), "graded": (2, 99), "rewrite": (0, 0)}


def check_form(prompt: Prompt, form: str) -> None:
    """Raises: ValueError if the prompt does not show a model what a form is about."""
    needed, more = _NEEDED[form]
    fewest, most = _LABELS[form]
    counted = fewest <= len(prompt.labels) <= most
    if not counted or not needed <= prompt.placeholders <= needed | more:
        raise ValueError(
            f'prompt "{prompt.name}" is not for {form}: it has {len(prompt.labels)} labels and the '
            f"placeholders {sorted(prompt.placeholders)}; {form} needs {fewest}"
            f"{'' if fewest == most else ' or more'} labels, the placeholders {sorted(needed)}, "
            f"and takes {sorted(more)}; name another prompt"
        )
