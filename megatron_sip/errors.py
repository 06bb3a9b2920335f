"""Base class of the failures that end a run, so that they print as one line."""


class RunFailed(RuntimeError):
    """Something outside the program failed (a server, a judge, a check); the message says what."""
