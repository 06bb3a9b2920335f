"""No reply of a server is run, imported, unpickled or fetched; no hostile one becomes a score."""

import json
import subprocess
import sys
from pathlib import Path


def test_hostile_replies_cause_nothing(tmp_path: Path) -> None:
    script = Path(__file__).with_name("hostile_replies.py")
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path)], cwd=tmp_path, capture_output=True, text=True,
        timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout.splitlines()[-1])
    assert said["asked"] == 4 * 99
    assert not said["events"] and not said["found"]
    assert not list(tmp_path.rglob("sip_hostile_marker"))
