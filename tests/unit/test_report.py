"""The report shows the files' numbers, keeps text as text, loads nothing, and survives damage."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from report_helpers import EVALUATION, HOSTILE, ROOT, reward_of, write_ntp_run, write_run

from megatron_sip.metrics import METRICS
from megatron_sip.report import curves, ledger, page, times, write_report
from megatron_sip.report.ledger import MAX_PREFIX, evenly
from megatron_sip.report.read_run import read_run


class Seen(HTMLParser):
    """Tags with their attributes, visible text, and the contents of scripts and styles."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.raw: list[tuple[dict[str, str | None], str]] = []
        self._open: dict[str, str | None] | None = None
        self.feed(html)
        self.close()
        self.text = re.sub(r"\s+", " ", " ".join(self.words))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag in ("script", "style"):
            self._open = {"tag": tag, **dict(attrs)}
            self.raw.append((self._open, ""))

    def handle_endtag(self, tag: str) -> None:
        if tag in ("script", "style"):
            self._open = None

    def handle_data(self, data: str) -> None:
        if self._open is not None:
            self.raw[-1] = (self._open, self.raw[-1][1] + data)
        else:
            self.words.append(data)

    def json(self, name: str) -> Any:
        return json.loads(next(text for tag, text in self.raw if tag.get("id") == name))

    def readout(self, label: str) -> dict[str, Any]:
        """The curve so named, the first if several are."""
        lines = [line for chart in self.json("chart-data") for line in chart["lines"]]
        return next(line for line in lines if line["label"] == label)


def seen(tmp_path: Path, *runs: Path) -> Seen:
    write_report(runs[0], tmp_path / "report.html", runs[1:])
    return Seen((tmp_path / "report.html").read_text())


def test_results_are_those_of_the_summary(tmp_path: Path) -> None:
    text = seen(tmp_path, write_run(tmp_path / "run")).text
    assert "The trained policy wins 79.0 % of 512 held-out prefixes" in text
    assert "95 % interval 76.9 % to 81.0 %, all of it above 50 %" in text
    assert "4.761 from 4.721 (+0.8 %)" in text  # held-out NLL
    assert "0.814 from 0.860 (\N{MINUS SIGN}5.3 %)" in text  # distinct-2
    assert "74.3 %" in text and "5 min 22 s" in text


@pytest.mark.parametrize(
    ("ends", "words"),
    [([0.2, 0.4], "all of it below 50 %"), ([0.45, 0.6], "no difference is shown")],
)
def test_interval_is_read_as_it_is(tmp_path: Path, ends: list[float], words: str) -> None:
    run = write_run(tmp_path / "run")
    summary = json.loads((run / "summary.json").read_text())
    summary["eval"]["win_rate_ci"] = ends
    (run / "summary.json").write_text(json.dumps(summary))
    assert words in seen(tmp_path, run).text


def test_curves_hold_the_logged_values(tmp_path: Path) -> None:
    report = seen(tmp_path, write_run(tmp_path / "run", steps=3))
    assert report.readout("loss") == {"label": "loss", "x": [1, 2, 3], "y": [3.875, 3.75, 3.625]}
    assert report.readout("by chance")["y"] == [0.75] * 3
    assert report.readout("rollout is best")["y"] == [0.25] * 3
    assert report.readout("chosen minus rejected")["y"] == [1.5] * 3
    assert "loss 3.625" in report.text  # the legend's last value


def test_every_metric_of_an_objective_has_a_curve(tmp_path: Path) -> None:
    values = {m: 0.01 * i for i, m in enumerate(METRICS, 1) if m.startswith("objective/")}
    report = seen(tmp_path, write_run(tmp_path / "run", steps=2, more=values))
    drawn = [line["y"] for chart in report.json("chart-data") for line in chart["lines"]]
    assert [name for name, value in values.items() if [value] * 2 not in drawn] == []


def test_rewards_by_source_are_means_over_the_pools(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "run", steps=3, pools=2), name="run", max_pools=9)
    for step in range(3):
        suffix = np.mean([reward_of(step, p, 0) for p in range(2)])
        rollout = np.mean([reward_of(step, p, c) for p in range(2) for c in (1, 2, 3)])
        assert run.ledger.means["suffix", "total"][step] == pytest.approx(suffix)
        assert run.ledger.means["rollout", "likelihood"][step] == pytest.approx(rollout - 12)
    assert run.ledger.steps == [1, 2, 3]  # as metrics.jsonl numbers them


def test_browser_data_equal_the_pools(tmp_path: Path) -> None:
    pools = seen(tmp_path, write_run(tmp_path / "run", steps=2, pools=2)).json("data")["pools"]
    assert [(p["step"], p["position"]) for p in pools] == [(1, 0), (1, 1), (2, 0), (2, 1)]
    last = pools[-1]
    assert last["prefix"].startswith(" prefix 1.1")
    assert [c["reward"] for c in last["candidates"]] == pytest.approx(
        [reward_of(1, 1, c) for c in range(4)], abs=1e-5
    )
    assert [c["roles"] for c in last["candidates"]] == [[], ["chosen"], [], ["rejected"]]
    assert last["candidates"][0]["criteria"]["likelihood"] == pytest.approx(-1.89, abs=1e-5)


def test_hostile_text_stays_text(tmp_path: Path) -> None:
    name = "<img onerror=alert(3)>"
    run = write_run(
        tmp_path / name, text=HOSTILE, overrides=('model.init.path="</script><script>x</script>"',)
    )
    report = seen(tmp_path, run)
    scripts = [tag for tag, _ in report.raw if tag["tag"] == "script"]
    assert [tag.get("type") for tag in scripts] == ["application/json", "application/json", None]
    assert not [tag for tag, _ in report.tags if tag in ("img", "iframe", "object", "link", "base")]
    assert not [a for _, attrs in report.tags for a in attrs if a.startswith("on") or a == "style"]
    assert HOSTILE in report.json("data")["pools"][0]["candidates"][0]["text"]
    assert HOSTILE in report.json("data")["pools"][0]["prefix"]
    assert name in report.text


def test_policy_allows_the_page_its_own_style_and_script_and_nothing_else(tmp_path: Path) -> None:
    write_report(write_run(tmp_path / "run"), tmp_path / "report.html")
    html = (tmp_path / "report.html").read_text()
    report = Seen(html)
    policy = next(a["content"] or "" for t, a in report.tags if a.get("http-equiv"))
    assert policy.startswith("default-src 'none';") and "unsafe" not in policy
    for tag, text in report.raw:
        if tag.get("type") is None:
            digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
            assert f"{tag['tag']}-src 'sha256-{digest}'" in policy
    assert html.index("Content-Security-Policy") < html.index("<style>")
    assert not [a for _, a in report.tags if "src" in a or "xlink:href" in a]
    assert all((a["href"] or "#").startswith("#") for _, a in report.tags if "href" in a)
    assert not [mark for mark in ("http:", "https:", "url(", "@import") if mark in html]


def test_number_of_pools_and_length_of_texts_are_limited(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(page, "MAX_POOLS", 7)
    run = write_run(tmp_path / "run", steps=6, pools=4, text="x" * 3000)
    report = seen(tmp_path, run)
    pools = report.json("data")["pools"]
    assert "7 of 24 recorded pools" in report.text and "at most 7" in report.text
    assert len(pools) == 7 and len({p["step"] for p in pools}) == 6
    assert len(pools[0]["prefix"]) == MAX_PREFIX and pools[0]["hidden"] > 1000


def test_steps_and_points_of_long_runs_are_thinned_evenly() -> None:
    assert evenly(range(10), 4) == [0, 3, 6, 9] and evenly([5, 6], 4) == [5, 6]
    x, y = curves.thin(np.arange(1, 4001), np.arange(1, 4001, dtype=float))
    assert len(x) == curves.MAX_POINTS
    assert y[0] == np.mean(range(1, 11)) and x[-1] == 4000


def test_fewer_steps_are_read_where_steps_are_large(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ledger, "MIN_STEPS", 2)
    monkeypatch.setattr(ledger, "MAX_READ", 13)
    report = seen(tmp_path, write_run(tmp_path / "run", steps=7, pools=4))
    assert "Rewards by source of run come from 3 of 7 recorded steps" in report.text
    assert report.readout("suffix")["x"] == [1, 4, 7]


def test_running_mean_keeps_gaps_and_constant_curves() -> None:
    y = np.full(100, 3.0)
    y[10] = np.nan
    smooth = curves.running_mean(curves.svg.Line("a", np.arange(100), y, "c0")).y
    assert np.isnan(smooth[10]) and np.nanmin(smooth) == np.nanmax(smooth) == 3.0


def test_median_step_fills_the_timeline(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "run", steps=5), name="run", max_pools=1)
    index = times.median_step(run)
    assert index == 2  # steps last 3, 4, 5, 6, 7 seconds
    _, busy = times.timeline(run, index)
    whole = 0.5 + 3.0 + 1.0 + 0.25
    assert dict(busy) == pytest.approx(
        {"trainer": 1.25 / whole, "policy server": 0.75 / whole, "judge server": 3.0 / whole}
    )
    rows = {row.name: row.mean_s for row in times.table(run)}
    assert rows["judge"] == 3.0 and rows["other"] == pytest.approx(0.25)


def test_next_token_run_gets_the_parts_that_it_has(tmp_path: Path) -> None:
    report = seen(tmp_path, write_ntp_run(tmp_path / "ntp"))
    assert "Held-out NLL fell from 8.374 to 4.727 nats a token." in report.text
    assert "recorded no pools" in report.text and "Reward by source" not in report.text
    assert "3 min 54 s" in report.text


def test_unfinished_run_says_so(tmp_path: Path) -> None:
    report = seen(tmp_path, write_run(tmp_path / "run", finished=False))
    assert "this run has not finished" in report.text and "4 of 4 steps" in report.text
    assert "The trained policy wins" not in report.text
    assert len(report.json("data")["pools"]) == 8


def test_damaged_parts_are_named_and_the_rest_is_shown(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", steps=4)
    (run / "config.toml").write_text("[run\n")
    (run / "environment.json").unlink()
    shard = run / "pools" / "step_00000002.dp0.parquet"
    shard.write_bytes(shard.read_bytes()[:-9])
    (run / "pools" / "step_00000003.done").write_text("{}")
    (run / "pools" / "step_x1.done").touch()
    with (run / "metrics.jsonl").open("a") as file:
        file.write('[]\n{"step": 5, "lo')
    report = seen(tmp_path, run)
    assert "parts of this run are damaged" in report.text
    assert "config.toml cannot be read" in report.text
    assert "environment.json is missing" in report.text
    assert "metrics.jsonl: 2 damaged lines" in report.text
    assert "2 of 4 steps cannot be read" in report.text
    assert report.readout("loss")["x"] == [1, 2, 3, 4]
    assert {p["step"] for p in report.json("data")["pools"]} == {1, 2}


@pytest.mark.parametrize(
    "content", ["", "{", "[]", '{"eval": 3}', '{"eval": {"win_rate": "x"}}', '{"steps": {}}',
                '{"eval": {"win_rate": 0.5, "win_rate_ci": [null, 1]}}',
                '{"eval": {"heldout_nll_start": 0, "heldout_nll_end": 1e400}}'],
)  # fmt: skip
def test_strange_summaries_do_not_break_the_page(tmp_path: Path, content: str) -> None:
    run = write_run(tmp_path / "run", steps=2)
    (run / "summary.json").write_text(content)
    assert "Settings and environment" in seen(tmp_path, run).text


@pytest.mark.parametrize("mark", ["config.toml", "metrics.jsonl"])
def test_one_file_is_enough_for_a_page(tmp_path: Path, mark: str) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / mark).touch()
    assert "0 steps are logged" in seen(tmp_path, tmp_path / "run").text


def test_missing_and_repeated_values_follow_the_log_rules(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", steps=2)
    (run / "metrics.jsonl").write_text(
        '{"loss": 1.0, "step": 1}\n{"loss": null, "non_finite": {"loss": "nan"}, "step": 2}\n'
        '{"loss": 3.0, "step": 3}\n{"loss": 2.0, "step": 1}\n'
    )
    assert seen(tmp_path, run).readout("loss")["y"] == [2.0, None, 3.0]


def test_evaluations_during_the_run_are_not_mixed_with_those_on_test_prefixes(
    tmp_path: Path,
) -> None:
    run = write_run(tmp_path / "run", steps=4)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"eval/nll": 4.5, "eval/new": 1.0, "step": 2}\n')
    report = seen(tmp_path, run)
    lines = [line for chart in report.json("chart-data") for line in chart["lines"]]
    nll = next(line for line in lines if 4.5 in line["y"])
    assert (nll["x"], nll["y"]) == ([2], [4.5]) and "eval/new" in report.text
    start, end = EVALUATION["distinct2_start"], EVALUATION["distinct2_end"]
    distinct = next(line for line in lines if line["y"] == [start, end])
    assert distinct["x"] == [0, 4]


def test_comparison_shows_every_run_and_what_differs(tmp_path: Path) -> None:
    first = write_run(tmp_path / "a" / "run", overrides=("optimizer.lr=3e-4",))
    second = write_run(tmp_path / "b" / "run", overrides=("optimizer.lr=7e-4",), finished=False)
    third = write_ntp_run(tmp_path / "ntp")
    report = seen(tmp_path, first, second, third)
    for name in ("a/run", "b/run", "ntp"):
        assert report.readout(name)["y"]  # the loss
    assert "b/run: this run has not finished" in report.text
    differing = report.text.split("Settings that differ")[1].split("Learning")[0]
    assert "optimizer.lr 0.0003 0.0007 0.002" in differing
    assert "run.dir" not in differing and "optimizer.adam_ beta1" not in differing
    assert {p["run"] for p in report.json("data")["pools"]} == {0, 1}
    assert report.json("data")["runs"] == ["a/run", "b/run", "ntp"]


def test_output_is_replaced_whole_and_needs_a_folder(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", steps=1)
    with pytest.raises(ValueError, match=r"output .*nowhere.* existing folder"):
        write_report(run, tmp_path / "nowhere" / "report.html")
    with pytest.raises(ValueError, match="is a folder"):
        write_report(run, tmp_path)
    write_report(run, tmp_path / "report.html")
    first = (tmp_path / "report.html").read_bytes()
    write_report(run, tmp_path / "report.html")
    assert (tmp_path / "report.html").read_bytes() == first  # nothing of the day or the machine


@pytest.mark.parametrize(("name", "words"), [("none", "does not exist"), ("empty", "holds none")])
def test_tool_refuses_what_is_no_run(tmp_path: Path, name: str, words: str) -> None:
    (tmp_path / "empty").mkdir()
    output = tmp_path / "report.html"
    done = subprocess.run(
        [sys.executable, ROOT / "tools" / "report.py", tmp_path / name, "--output", output],
        capture_output=True, text=True, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 1 and not output.exists()
    assert done.stderr.startswith("error: run directory") and words in done.stderr
    assert "give the run.dir of a run" in done.stderr and "Traceback" not in done.stderr


def test_report_needs_no_torch(tmp_path: Path) -> None:
    write_run(tmp_path / "run", steps=1)
    code = (
        "import sys; sys.modules['torch'] = sys.modules['matplotlib'] = None\n"
        "from pathlib import Path; from megatron_sip.report import write_report\n"
        f"write_report(Path({str(tmp_path / 'run')!r}), Path({str(tmp_path / 'r.html')!r}))"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
    assert (tmp_path / "r.html").stat().st_size > 10_000


def test_a_phase_names_all_servers_that_share_it():
    run = SimpleNamespace(settings={"rollout": {"server": ["a", "b"]}})
    assert times._workers(run, "rollout") == ["a, b servers"]  # pyright: ignore
    run.settings["rollout"]["server"] = "a"
    assert times._workers(run, "sync") == ["trainer", "a server"]  # pyright: ignore
