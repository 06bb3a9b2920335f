"""Failures that end a run: their base class, and how several are told at once."""

from collections.abc import Sequence


class RunFailed(RuntimeError):
    """Something outside the program failed (a server, a judge, a check); the message says what."""


class StepAbandoned(RunFailed):
    """A step could not be made: raised on every rank, with what is trained so far as it was."""


def refuse(problems: Sequence[str]) -> None:
    """Raises: ValueError telling all of `problems`, which were found before anything started."""
    if len(problems) == 1:
        raise ValueError(problems[0])
    if problems:
        lines = "".join(f"\n  - {problem}" for problem in problems)
        raise ValueError(f"{len(problems)} things are wrong, nothing was started:{lines}")
