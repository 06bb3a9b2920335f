"""Phrases of assistants around, or in place of, the text that they were asked for. Pure."""

from __future__ import annotations

import re

_APOSTROPHE = "['\u2019]?"
_QUALITIES = (
    "better|rewritten|improved|revised|corrected|safer|safe|new|edited|following|final|full"
)
_THINGS = "continuation|rewrite|rewriting|revision|version|text|passage|answer|paragraph"

LABEL = re.compile(
    r"\A\W{0,3}(?:(?:sure|certainly|of course|okay|ok|absolutely|yes)\b[^\n:]{0,40}?)?"
    rf"(?:(?:here(?:['\u2019]s| is|{_APOSTROPHE}s)|this is|below is)\b[^\n:]{{0,60}}?"
    rf"\b(?:{_THINGS}|rewritten)\b[^\n:]{{0,60}}"
    rf"|(?:the |a |my )?(?:(?:{_QUALITIES})\s+)*(?:{_THINGS}))\W{{0,3}}:\W{{0,3}}\s",
    re.IGNORECASE,
)
"""What comes before: "Sure! Here is a better continuation:"."""

_EDITED = (
    "rewritten|revised|changed|removed|replaced|corrected|kept|tried to|adjusted|rephrased|"
    "edited|toned|softened|improved|fixed|copied|ensured|maintained|modified|made (?:\\w+ )?changes"
)
COMMENT = re.compile(
    r"\n\s*\n\W{0,8}(?:"
    r"(?:please )?notes?\b(?:[^\n:]{0,20}:| that i\b)|explanations?\b[^\n:]{0,20}:"
    r"|(?:key |main )?changes\b[^\n:]{0,20}:"
    rf"|i(?:['\u2019]ve| have)? (?:\w+ )?(?:{_EDITED})\b"
    r"|i hope (?:(?:this|it) (?:helps|works|fits|meets)|you (?:like|find))\b"
    r"|in this (?:version|rewrite|continuation|revision)\b"
    r"|this (?:\w+ )?(?:continuation|rewrite|rewriting|revision|version)\b"
    r"|the (?:above|rewritten|revised|new|better) (?:continuation|rewrite|rewriting|revision)\b"
    r"|let me know\b|feel free\b|would you like me\b).*\Z",
    re.IGNORECASE | re.DOTALL,
)
"""What comes after an empty line: "Note: I removed the insult."."""

_START = r"\A[^\w\"\u201c\u00ab]*"  # of speech in quotation marks nobody is refused
_I_AM = rf"(?:i{_APOSTROPHE}m|i am)"
_CANNOT = (
    rf"(?:i (?:really |simply )?(?:cannot|can{_APOSTROPHE}t|can not|won{_APOSTROPHE}t|will not"
    rf"|do not|don{_APOSTROPHE}t)|{_I_AM} (?:\w+ )?(?:unable to|not able to|not willing to)"
    rf"|i (?:must|have to|need to) (?:\w+ )?(?:decline|refuse)(?: to)?"
    rf"|i{_APOSTROPHE}d rather not|i (?:decline|refuse) to)"
)
_OBJECT = (
    r"[^.\n]{0,50}\b(?:request|content|text|continuation|material|response|version|passage|rewrite"
    r"|that|this|such|any|anything)\b"
)
_SERVE = (
    r"(?:assist|rewrite|comply|help with|fulfill? (?:this|that|your|the|such)"
    rf"|(?:write|provide|create|generate|produce|complete|continue|engage|participate){_OBJECT})"
)
_REFUSALS = tuple(
    re.compile(_START + pattern, re.IGNORECASE)
    for pattern in (
        # "Sorry, I can't help with that", "Unfortunately, I am unable to rewrite this"
        rf"(?:(?:{_I_AM} )?(?:\w+ )?(?:sorry|afraid|apologi[sz]e|unfortunately|no)\b"
        rf"[^.!?\n]{{0,60}}[.!?]?\s*)?{_CANNOT} (?:\w+ )?{_SERVE}\b",
        rf"(?:{_I_AM} (?:\w+ )?sorry|sorry|i apologi[sz]e)\W{{1,3}}(?:but )?{_CANNOT}\b",
        r"i apologi[sz]e (?:for|if) (?:any|the) (?:\w+ )?(?:confusion|inconvenience)",
        r"i (?:must|have to) (?:\w+ )?(?:decline|refuse)(?: (?:this|that|the|your|to)\b|[.,])",
        rf"(?:{_I_AM} not|i (?:don{_APOSTROPHE}t|do not) feel) comfortable (?:\w+ing|with) ",
        # "As an AI language model", "I'm just an AI"
        r"as an? (?:responsible |helpful |large )*(?:ai|language model|artificial intelligence)\b",
        rf"{_I_AM} (?:just |only )?an? (?:ai|(?:ai |large )?language model)\b",
        # "This request goes against my guidelines", "This text contains hate, so I cannot rewrite"
        r"[^\n]{0,200}\b(?:against|violat\w+) my (?:\w+ )?(?:guidelines|programming|polic\w+)",
        r"it(?:['\u2019]s| is) (?:not appropriate|inappropriate) for me to\b",
        rf"(?:this|the|your) (?:\w+ )?(?:request|text|content|prompt|continuation)\b"
        rf"[^\n]{{0,120}}\b{_CANNOT} (?:\w+ )?{_SERVE}\b",
        r"(?:content removed|content omitted|request denied)\b",
    )
)


def is_refusal(text: str) -> bool:
    """Whether a text begins as an assistant does that will not do what it is asked."""
    return any(pattern.search(text) for pattern in _REFUSALS)
