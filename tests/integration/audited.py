"""`pretrain_sip.py` on one rank under an audit hook: what was unpickled, run, imported, contacted.

python audited.py EVENTS.json MARK --config ...

Events of the steps, from the first one to the end of the run, are recorded whole. Before, while
everything is imported and built, only what carries MARK (which stands in all hostile data), what
starts a process, and what is unpickled.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from types import CodeType
from typing import Any

ROOT = Path(__file__).parents[2]
WATCHED = ("exec", "compile", "import", "ctypes.dlopen", "socket.connect", "socket.bind",
           "urllib.Request")  # fmt: skip
ALWAYS = ("subprocess.Popen", "os.system", "os.exec", "os.fork", "os.forkpty", "os.posix_spawn",
          "os.spawn", "pty.spawn", "pickle.find_class")  # fmt: skip
_found: list[list[str]] = []
_in_steps = _busy = False
MARK = ""


def _detail(event: str, arguments: tuple[Any, ...]) -> str:
    if arguments and isinstance(arguments[0], CodeType):
        return arguments[0].co_filename
    if event == "import":
        return str(arguments[0])
    if event == "compile":
        return f"{arguments[1]}: {arguments[0]!r}"[:4000]
    return repr(arguments)[:4000]


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    global _busy
    if _busy or not (event in ALWAYS or event in WATCHED):
        return
    _busy = True
    try:
        detail = _detail(event, arguments)
        if _in_steps or event in ALWAYS or MARK in detail:
            when = "step" if _in_steps else "start"
            what = "MARKED " + detail if MARK in detail else detail[:300]
            _found.append([when, event, what, _caller()])
    finally:
        _busy = False


def _caller() -> str:
    """The innermost frame that is neither of this file nor of the import system."""
    frame = sys._getframe(2)
    while frame and (
        "importlib" in frame.f_code.co_filename or frame.f_code.co_filename == __file__
    ):
        frame = frame.f_back
    return f"{frame.f_code.co_filename}:{frame.f_code.co_name}" if frame else ""


def main() -> int:
    global MARK, _in_steps
    events, MARK = Path(sys.argv[1]), sys.argv[2]
    sys.argv = ["pretrain_sip.py", *sys.argv[3:]]
    sys.path.insert(0, str(ROOT))
    sys.addaudithook(_hook)
    import pretrain_sip
    from megatron_sip import train

    steps = train.train_steps

    def marked_steps(*arguments: Any, **named: Any) -> None:
        global _in_steps
        _in_steps = True
        steps(*arguments, **named)

    train.train_steps = marked_steps
    status = pretrain_sip.main()
    _in_steps = False
    modules = sorted(
        {str(m.__file__) for m in list(sys.modules.values()) if getattr(m, "__file__", None)}
    )
    events.write_text(json.dumps({"status": status, "events": _found, "modules": modules}))
    return status


if __name__ == "__main__":
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1",
                   "MASTER_ADDR": "127.0.0.1"}  # fmt: skip
    sys.exit(main())
