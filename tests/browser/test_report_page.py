"""The report in a real browser: filter, search, open a pool; no script of a text ever runs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from devtools import Page, browser
from report_helpers import HOSTILE, write_ntp_run, write_run

from megatron_sip.report import write_report

pytestmark = pytest.mark.browser
COUNT = "document.querySelector('#pool-count').textContent"
TITLES = "[...document.querySelectorAll('.pool .where')].map(e => e.textContent)"


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    with browser(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four steps of eight pools; every text is hostile."""
    folder = tmp_path_factory.mktemp("report")
    run = write_run(folder / "run", steps=4, pools=8, text=HOSTILE)
    write_report(run, folder / "report.html")
    return folder / "report.html"


@pytest.fixture
def fresh(page: Page, report: Path) -> Page:
    """The page at laptop width, just loaded."""
    page.look(width=1440, height=900)
    page.open(report)
    return page


def choose(page: Page, selector: str, value: str) -> None:
    """Pick an option with the keyboard, as the list itself is drawn outside the page."""
    text = page.evaluate(
        f"[...document.querySelector('{selector}').options].find(o => o.value === '{value}').text"
    )
    page.evaluate(f"document.querySelector('{selector}').focus()")
    for letter in text:
        page.call("Input.dispatchKeyEvent", type="char", text=letter)
    assert page.evaluate(f"document.querySelector('{selector}').value") == value


def complaints(page: Page) -> list[Any]:
    """Errors, refused content, dialogs, and requests beyond the file itself."""
    found = {"Log.entryAdded", "Runtime.exceptionThrown", "Page.javascriptDialogOpening"}
    events = [e for e in page.events if e["method"] in found]
    asked = [e for e in page.events if e["method"] == "Network.requestWillBeSent"]
    urls = [e["params"]["request"]["url"] for e in asked]
    return events + [url for url in urls if not url.startswith("file:")]


def test_page_loads_without_errors_or_requests(fresh: Page) -> None:
    assert fresh.evaluate("document.querySelectorAll('.pool').length") == 20
    assert fresh.evaluate("document.querySelectorAll('svg.plot path').length") > 8
    assert complaints(fresh) == []
    assert len([e for e in fresh.events if e["method"] == "Network.requestWillBeSent"]) == 1


def test_clicking_a_pool_shows_its_candidates_as_text(fresh: Page) -> None:
    fresh.click("#pool-list li:nth-child(2) button")
    texts = fresh.evaluate(
        "[...document.querySelectorAll('.candidate')].map(e => "
        "[e.className, e.querySelector('b').textContent, e.querySelector('.text').textContent])"
    )
    assert [kind.split()[1:] for kind, _, _ in texts] == [[], ["chosen"], [], ["rejected"]]
    assert [reward for _, reward, _ in texts] == ["10.01", "9.010", "8.010", "7.010"]
    assert all(text == f"candidate {c} of 0.1 {HOSTILE}" for c, (_, _, text) in enumerate(texts))
    assert fresh.evaluate("document.querySelector('.detail .prefix').textContent").endswith(HOSTILE)
    assert "well said" in fresh.evaluate("document.querySelector('.replies').textContent")
    assert fresh.evaluate("document.querySelectorAll('main img, main script').length") == 0
    fresh.click("#pool-list li:nth-child(2) button")
    assert fresh.evaluate("document.querySelectorAll('.detail').length") == 0
    assert complaints(fresh) == []


def test_search_finds_and_marks(fresh: Page) -> None:
    fresh.write("#f-text", "CANDIDATE 2 of 3.4")
    assert fresh.evaluate(COUNT) == "1 of 32 pools match"
    assert fresh.evaluate(TITLES) == ["step 4, pool 4"]
    fresh.click("#pool-list button")
    marks = "[...document.querySelectorAll('mark')].map(e => e.textContent)"
    assert fresh.evaluate(marks) == ["candidate 2 of 3.4"]
    fresh.click("#f-clear")
    assert fresh.evaluate(COUNT) == "32 of 32 pools match"


def test_hostile_text_can_be_searched_for(fresh: Page) -> None:
    fresh.write("#f-text", "</script><script>")
    assert fresh.evaluate(COUNT) == "32 of 32 pools match"
    fresh.click("#pool-list button")
    assert fresh.evaluate("document.querySelectorAll('mark').length") == 5  # prefix, candidates
    assert complaints(fresh) == []


def test_filters_join(fresh: Page) -> None:
    fresh.write("#f-step-low", "2")
    fresh.write("#f-step-high", "3")
    assert fresh.evaluate(COUNT) == "16 of 32 pools match"
    fresh.write("#f-reward-low", "10.15")  # suffixes of step 2: 10.10 to 10.17, of step 3: above
    assert fresh.evaluate(COUNT) == "11 of 32 pools match"
    fresh.write("#f-reward-high", "10.205")
    assert fresh.evaluate(COUNT) == "4 of 32 pools match"
    choose(fresh, "#f-source", "rollout")
    assert fresh.evaluate(COUNT) == "0 of 32 pools match"
    fresh.click("#f-clear")
    choose(fresh, "#f-source", "rollout")
    fresh.click("#pool-list button")
    sources = "[...document.querySelectorAll('.candidate .source')].map(e => e.textContent)"
    assert fresh.evaluate(sources) == ["rollout"] * 3


def test_conditions_and_more(fresh: Page) -> None:
    fresh.click("#pool-more")
    assert fresh.evaluate("document.querySelectorAll('.pool').length") == 32
    choose(fresh, "#f-where", "rollout-wins")  # no suffix is ever beaten here
    assert fresh.evaluate(COUNT) == "0 of 32 pools match"


def test_pointer_reads_values_off_a_curve(fresh: Page) -> None:
    place = fresh.evaluate(
        "(() => { const e = document.querySelector('figure[data-chart=\"0\"] svg.plot');"
        "e.scrollIntoView({block: 'center', behavior: 'instant'});"
        "const b = e.getBoundingClientRect(); return [b.right - 2, b.top + 20]; })()"
    )
    fresh.call("Input.dispatchMouseEvent", type="mouseMoved", x=place[0], y=place[1])
    note = "document.querySelector('figure[data-chart=\"0\"] .note').textContent"
    assert fresh.evaluate(note) == "step 4: loss 3.500"


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [390, 1440])
def test_nothing_overflows_and_colours_follow(
    page: Page, report: Path, tmp_path: Path, width: int, dark: bool
) -> None:
    runs = [report.parent / "run", write_ntp_run(tmp_path / "a_next_token_run_of_a_long_name")]
    write_report(runs[0], tmp_path / "report.html", runs[1:])
    unfinished = tmp_path / "unfinished.html"
    write_report(write_run(tmp_path / "run", steps=20, finished=False), unfinished)
    page.look(width=width, height=844, dark=dark)
    for file in (report, tmp_path / "report.html", unfinished):
        page.open(file)
        page.click("#pool-list button")
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        ink = json.loads(
            page.evaluate("getComputedStyle(document.body).color").replace("rgb(", "[")[:-1] + "]"
        )
        assert (sum(ink) > 384) == dark
        clipped = page.evaluate(
            "[...document.querySelectorAll('svg text')].filter(t => { const b = "
            "t.getBoundingClientRect(); return b.left < 0 || b.right > innerWidth; }).length"
        )
        assert clipped == 0
