"""The page in a real browser, what stands in it, and the terminal version."""

import io
import json
import re
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request

import pytest
from readers import data_of
from rich.console import Console

from draft_opd_trl.evaluation.traces import Trace, TraceBlock
from draft_opd_trl.evaluation.viewer import LEGEND, marked_text, print_traces, write_trace_page


NASTY = "</script><b>&amp;\u2028\"'"


def right(position, drafts, bonus=None):
    shares = [0.75] * len(drafts)
    return TraceBlock(position, drafts, shares, shares, len(drafts), [], [], [], bonus)


def wrong(position, accepted, rejected, choices, sure=0.9):
    by_drafter = [0.75] * len(accepted) + [sure] * len(rejected)
    by_target = [0.01] * len(by_drafter)
    choice_probs = [0.05] * len(choices), [0.97] * len(choices)
    return TraceBlock(
        position, accepted + rejected, by_drafter, by_target, len(accepted), choices, *choice_probs, bonus=None
    )


def traces():
    """Two drafters, three texts; τ is 2.5, 1, 4 for the first and 2.5, 2, 2 for the second."""
    first = [
        Trace("<|user|>" + NASTY, "So", [wrong(1, [" a"], ["<i>", "\n"], ["\n", " &"]), right(3, ["b", "c"], NASTY)]),
        Trace("two", "x", [wrong(1, [], ["p", "q", "r"], ["y", "z", "w"], 0.99), wrong(2, [], ["p"], ["z"], 0.5)]),
        Trace("three", "x", [right(1, ["1", "2", "3"], "4")]),
    ]
    second = [
        first[0],
        Trace("two", "x", [wrong(1, ["y"], ["q", "r"], ["z", "w"], 0.95)]),
        Trace("three", "x", [wrong(1, ["1"], ["3"], ["2"], 0.4), wrong(3, ["3"], ["\\xe2"], ["4"], 0.3)]),
    ]
    return {"before <b>": first, "after": second}


# -- the file -------------------------------------------------------------------------------------------------------


def test_page_holds_the_traces_and_nothing_that_ends_its_script(tmp_path):
    write_trace_page(tmp_path / "new" / "trace.html", traces(), "a <target>")
    data = data_of(tmp_path / "new" / "trace.html")
    assert data["drafters"] == ["before <b>", "after"] and data["about"] == "a <target>"
    assert data["num_draft_tokens"] == 3
    block = data["texts"][0][1]["blocks"][0]
    assert (block["drafts"], block["choices"], block["num_accepted"]) == ([" a", "<i>", "\n"], ["\n", " &"], 1)
    assert data["texts"][0][0]["blocks"][1]["bonus"] == NASTY
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["trace.html"]


def test_probabilities_are_written_to_four_digits(tmp_path):
    block = TraceBlock(1, ["a"], [1 / 3], [2 / 3], 1, [], [], [], None)
    write_trace_page(tmp_path / "trace.html", {"d": [Trace("p", "f", [block])]})
    written = data_of(tmp_path / "trace.html")["texts"][0][0]["blocks"][0]
    assert (written["draft_probs"], written["target_probs"]) == ([0.3333], [0.6667])


def test_page_names_no_other_file(tmp_path):
    write_trace_page(tmp_path / "trace.html", traces())
    page = (tmp_path / "trace.html").read_text("utf-8")
    page = re.sub(r'<script type="application/json".*?</script>', "", page, flags=re.DOTALL)
    assert re.findall(r"\b(?:src|href|action)=|url\(|@import|fetch\(|XMLHttp|import\(", page) == []
    # What is left is the namespace of SVG, which names no file.
    assert re.findall(r"https?://[^\s\"']+", page) == ["http://www.w3.org/2000/svg"]


@pytest.mark.parametrize("broken", [{}, {"a": []}, {"a": traces()["after"], "b": traces()["after"][:1]}])
def test_drafters_without_the_same_texts_are_refused(tmp_path, broken):
    for shows in (lambda: write_trace_page(tmp_path / "trace.html", broken), lambda: print_traces(broken)):
        with pytest.raises(ValueError, match="needs traces of the same texts"):
            shows()
    assert list(tmp_path.iterdir()) == []


# -- the terminal ---------------------------------------------------------------------------------------------------


def test_marked_text_can_be_read_without_colour():
    assert marked_text(traces()["after"][1]).plain == "x│y⟨q⟩z"
    assert marked_text(traces()["after"][2]).plain == "x│1⟨3⟩2│3⟨\\xe2⟩4"
    assert marked_text(traces()["before <b>"][2]).plain == "x│123⁺4"
    # The end of a line is shown and ends it, but a rejected one only shows.
    assert marked_text(Trace("", "a\n", [wrong(1, [], ["\n"], ["\t"])])).plain == "a↵\n│⟨↵⟩␉"


def test_terminal_has_the_legend_and_no_live_control_characters():
    file = io.StringIO()
    console = Console(file=file, width=60, force_terminal=True, color_system="truecolor")
    print_traces({"drafter [bold]": [Trace("\x1b[2J\x9bp", "\x1b]0;t\x07", [right(1, ["a"], "b")])]}, console)
    shown = file.getvalue()
    # Only colours: no escape sequence came from the text, and no markup was read from the name.
    assert (
        set(re.findall(r"\x1b.[^a-zA-Z]*([a-zA-Z])", shown)) == {"m"} and "\x9b" not in shown and "\x07" not in shown
    )
    plain = re.sub(r"\x1b\[[0-9;]*m", "", shown)
    assert "drafter [bold]: τ 2.00, 1 blocks" in plain
    assert "".join(word for word, _ in LEGEND) in plain
    assert "38;2;0;158;115" in shown


# -- a browser ------------------------------------------------------------------------------------------------------


class Browser:
    """Headless Chromium by the WebDriver protocol, which needs no package."""

    def __init__(self, profile):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}/session"
        self.process = subprocess.Popen(["chromedriver", f"--port={port}"], stdout=subprocess.DEVNULL)
        words = "headless no-sandbox disable-gpu disable-dev-shm-usage disable-background-networking disable-sync"
        # Tall enough that nothing scrolls, which would move other tokens under the mouse.
        sized = ["disable-component-update", "window-size=1280,1800", f"user-data-dir={profile}"]
        options = {"args": [*words.split(), *sized]}
        options["binary"] = shutil.which("chromium")
        wanted = {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
        deadline = time.monotonic() + 60
        while True:
            try:
                session = self._ask("", {"capabilities": {"alwaysMatch": wanted}})
                break
            except (ConnectionError, urllib.error.URLError):
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.05)
        self.url += f"/{session['sessionId']}"

    def _ask(self, path, body=None, method="POST"):
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, method=method)
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)["value"]

    def tool(self, name, **params):
        return self._ask("/goog/cdp/execute", {"cmd": name, "params": params})

    def open(self, file):
        self._ask("/url", {"url": file.as_uri()})
        self.tool("Emulation.setFocusEmulationEnabled", enabled=True)

    def run(self, script, *args):
        return self._ask("/execute/sync", {"script": script, "args": args})

    def choose(self, control, value):
        event = "input" if control == "limit" else "change"
        self.run(
            "const c = document.getElementById(arguments[0]); c.value = arguments[1];"
            "c.dispatchEvent(new Event(arguments[2]))", control, value, event
        )  # fmt: skip

    def press(self, key):
        keys = [{"type": kind, "value": key} for kind in ("keyDown", "keyUp")]
        self._ask("/actions", {"actions": [{"type": "key", "id": "keys", "actions": keys}]})

    def hover(self, selector):
        x, y = self.run(
            "const e = document.querySelector(arguments[0]); e.scrollIntoView({block: 'center'});"
            "const r = e.getClientRects()[0]; return [r.x + r.width / 2, r.y + r.height / 2]", selector
        )  # fmt: skip
        move = {"type": "pointerMove", "x": round(x), "y": round(y), "duration": 0}
        self._ask("/actions", {"actions": [{"type": "pointer", "id": "mouse", "actions": [move]}]})

    def tip(self):
        return self.run(
            "const t = document.getElementById('tip'); return t.hidden ? null : t.innerText.split(/\\s*\\n\\s*/)"
        )

    def texts(self, selector):
        return self.run("return [...document.querySelectorAll(arguments[0])].map(e => e.textContent)", selector)

    def picked(self):
        return self.run("return document.getElementById('pick').selectedOptions[0].textContent")

    def close(self):
        try:
            self._ask("", method="DELETE")
        finally:
            self.process.terminate()
            self.process.wait()


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if not shutil.which("chromium") or not shutil.which("chromedriver"):
        pytest.skip("chromium and chromedriver are not both here (Debian: apt-get install chromium chromium-driver)")
    browser = Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


@pytest.fixture
def page(browser, tmp_path):
    write_trace_page(tmp_path / "trace.html", traces(), "a <target>")
    browser.open(tmp_path / "trace.html")
    yield browser
    assert browser._ask("/se/log", {"type": "browser"}) == []  # no error, and nothing that the policy stopped


LEFT, RIGHT = "[data-column='0']", "[data-column='1']"


@pytest.mark.browser
def test_browser_shows_tokens_as_they_are(page):
    assert page.run("return document.querySelectorAll('script').length") == 2
    assert page.run("return performance.getEntriesByType('resource').length") == 0
    assert page.texts("#columns h2") == ["before <b>", "after"]
    assert page.texts(f"{LEFT} .token") == ["So", " a", "<i>", "↵\n", "b", "c", NASTY]
    assert page.texts("#prompt") == ["<|user|>" + NASTY]
    assert "a <target> · 3 texts · τ 2.20 before <b> → 2.20 after" in page.texts("#about")[0]
    assert page.run("return document.querySelectorAll('.text b, .text i').length") == 0


@pytest.mark.browser
def test_browser_tells_both_probabilities_on_hover_and_on_focus(page):
    rejected = ["rejected · token 2 · block 1", "slot 2", "drafter", "target", "proposed", "<i>", "90.0 %", "1.0 %"]
    rejected += ["target's choice", "↵", "5.0 %", "97.0 %"]
    page.hover(f"{LEFT} .rejected")
    assert page.tip() == rejected
    page.hover(f"{LEFT} .accepted")
    assert page.tip()[4:] == ["proposed", "␣a", "75.0 %", "1.0 %"]
    page.hover("h1")
    assert page.tip() is None
    page.run("document.querySelector(arguments[0]).focus()", f"{LEFT} .first")
    assert "prefill" in page.tip()[0]
    for _ in range(2):
        page.press("\ue014")  # →
    assert page.tip() == rejected
    page.press("n")
    assert page.tip() == ["recovered" + rejected[0][8:], *rejected[1:]]
    page.press("\ue014")
    page.press("\ue014")
    page.press("\ue014")
    assert page.tip()[0] == "bonus · token 5 · block 2"
    page.press("p")
    assert page.tip()[0].startswith("recovered")
    page.press("\ue00c")  # Escape
    assert page.tip() is None


@pytest.mark.browser
def test_browser_picks_and_orders_texts(page):
    assert page.picked().startswith("1 · τ 2.50 → 2.50")
    page.run("document.getElementById('next').click()")
    assert page.picked() == "2 · τ 1.00 → 2.00 · two"
    assert page.texts(f"{RIGHT} .tau") == ["τ 2.00 +1.00"]
    page.choose("order", "tau")
    assert page.picked().startswith("2 ")
    page.choose("order", "change")
    assert page.picked() == "3 · τ 4.00 → 2.00 · three"
    assert page.texts(f"{RIGHT} .tau") == ["τ 2.00 −2.00"]
    page.run("document.getElementById('previous').click()")
    assert page.picked().startswith("1 ")
    page.choose("pick", 1)
    assert page.texts(f"{LEFT} .token") == ["x", "p", "y", "p", "z"]


@pytest.mark.browser
def test_browser_filters_blocks_and_proposals(page):
    dimmed = f"return [...document.querySelectorAll(\"{LEFT} .block\")].map(e => e.classList.contains('dim'))"
    assert page.run(dimmed) == [False, False] and page.texts("#limit-text") == ["any run"]
    page.choose("limit", 1)
    assert page.run(dimmed) == [False, True] and page.texts("#limit-text") == ["≤ 1 accepted"]
    page.choose("proposals", "all")
    assert page.texts(f"{LEFT} .rejected") == ["<i>", "↵"]
    page.choose("proposals", "none")
    assert page.texts(f"{LEFT} .rejected") == []
    assert page.texts(f"{LEFT} .recovered") == ["↵\n"]


@pytest.mark.browser
def test_browser_leads_to_the_worst_blocks(page):
    first_cells = (
        "return [...document.querySelectorAll('#worst tr')].map(r => [...r.cells].slice(0, 5).map(c => c.textContent))"
    )
    rows = page.run(first_cells)
    assert rows[:2] == [["2", "1", "before <b>", "0 of 3", "p"], ["2", "2", "after", "1 of 3", "q"]]
    assert len(rows) == 7 and rows[-1][:2] == ["3", "4"]
    page.choose("worst-order", "few")
    assert [row[3] for row in page.run(first_cells)][:3] == ["0 of 3", "0 of 1", "1 of 3"]
    page.choose("worst-order", "sure")
    page.run("document.querySelectorAll('#worst button')[1].click()")
    assert page.picked().startswith("2 ")
    assert page.run("return document.activeElement.textContent") == "z"
    assert page.tip()[0] == "recovered · token 2 · block 1"
    assert page.run("return document.querySelectorAll('.block.shown').length") == 1


@pytest.mark.browser
def test_browser_changes_its_theme_and_fits_a_phone(page):
    color = "return getComputedStyle(document.body).backgroundColor"
    for scheme, other in (("light", "dark"), ("dark", "light")):
        page.tool("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        page.run("location.reload()")
        preferred = page.run(color)
        assert page.texts("#theme") == [other.title()]
        page.run("document.getElementById('theme').click()")
        assert page.run(color) != preferred and page.texts("#theme") == [scheme.title()]
    page.tool("Emulation.setDeviceMetricsOverride", width=420, height=900, deviceScaleFactor=1, mobile=True)
    assert page.run("return document.documentElement.scrollWidth") == 420
    page.tool("Emulation.clearDeviceMetricsOverride")


@pytest.mark.browser
def test_browser_marks_kinds_by_more_than_colour(page):
    """Border, underline and sign of each kind, so that no two look alike in grey."""
    looks = page.run(
        """return ['accepted', 'rejected', 'recovered', 'bonus', 'first'].map(kind => {
            const style = getComputedStyle(document.querySelector('.legend .' + kind));
            const before = getComputedStyle(document.querySelector('.legend .' + kind), '::before').content;
            return [style.borderBottomStyle, style.borderTopStyle, style.fontWeight, before].join(' ');
        })"""
    )
    assert len(set(looks)) == 5, looks


@pytest.mark.browser
def test_browser_shows_one_drafter_alone(browser, tmp_path):
    write_trace_page(tmp_path / "trace.html", {"only": traces()["after"]})
    browser.open(tmp_path / "trace.html")
    assert browser.texts("#columns h2") == ["only"] and browser.texts(".tau") == ["τ 2.50"]
    assert browser.run("return document.querySelector('#order [value=change]').hidden")
    assert browser.run("return [...document.querySelectorAll('#worst tr, thead tr')].every(r => r.cells[2].hidden)")
