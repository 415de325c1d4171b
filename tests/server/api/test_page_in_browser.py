"""The built-in page in headless Chromium: keys, streams, tints, keyboard, phones, and axe's rules for accessibility."""

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow
ANSWER = "Grüße 🌍, one two three. STOP and more"
BROWSERS = ("chromium", "chromium-browser", "google-chrome")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip(
        "playwright.sync_api", reason="playwright is not installed (pip install playwright)"
    )
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    playwright.expect.set_options(timeout=20_000)
    with playwright.sync_playwright() as driver:
        if path is None and not Path(driver.chromium.executable_path).exists():
            pytest.skip("there is no Chromium here (apt install chromium, or playwright install chromium)")
        opened = driver.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture(params=[("light", 1200), ("dark", 1200), ("light", 375)], ids=lambda p: f"{p[0]}-{p[1]}")
def page(browser: Any, request: pytest.FixtureRequest) -> Iterator[Any]:
    scheme, width = request.param
    context = browser.new_context(viewport={"width": width, "height": 780}, color_scheme=scheme)
    context.set_default_timeout(20_000)
    opened = context.new_page()
    opened.asked, opened.faults = [], []
    opened.on("request", lambda asked: opened.asked.append(asked.url))
    opened.on("pageerror", lambda fault: opened.faults.append(str(fault)))
    opened.on("console", lambda line: opened.faults.append(line.text) if line.type == "error" else None)
    yield opened
    context.close()


def violations(page: Any) -> list[str]:
    """What axe finds, in one line each."""
    core = pytest.importorskip(
        "axe_playwright_python", reason="axe is not installed (pip install axe-playwright-python)"
    )
    page.evaluate((Path(core.__file__).parent / "axe.min.js").read_text(encoding="utf-8"))
    found = page.evaluate("axe.run(document)")["violations"]
    return [f"{one['impact']} {one['id']}: {[node['target'] for node in one['nodes']]}" for one in found]


def test_a_chat_with_a_key_by_the_keyboard_alone(page, listen, make_model):
    from playwright.sync_api import expect

    with listen(make_model(size=3), api_key="sesame") as (url, _):
        page.goto(url)
        expect(page.get_by_role("alert")).to_contain_text("API key")
        page.keyboard.type("sesame")  # the field has the focus by then
        page.keyboard.press("Enter")
        expect(page.locator("#model")).to_have_text("tiny")
        expect(page.get_by_role("alert")).to_be_hidden()
        page.get_by_label("Message").focus()
        page.keyboard.type("one")
        page.keyboard.press("Enter")
        expect(page.locator("#conversation")).to_have_attribute("aria-busy", "false")
        said = page.locator(".turn.assistant .said")
        expect(said).to_have_text(ANSWER)
        assert len("".join(said.locator("mark").all_text_contents())) > len(ANSWER) / 2
        expect(page.locator("#acceptance")).to_have_text(re.compile(r"\d\.\d\d"))
        found = {}
        for name in ("Chat", "Completion", "Vision", "Machine"):
            page.get_by_role("tab", name=name).press("Enter")
            expect(page.get_by_role("tabpanel", name=name)).to_be_visible()
            found[name] = violations(page)
        assert not any(found.values()), found
        expect(page.locator("#curve-text")).to_contain_text("8 rows takes 6.0 ms")
        page.keyboard.press("ArrowLeft")
        expect(page.get_by_role("tabpanel", name="Vision")).to_contain_text("No vision model is served")
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert {re.sub(r"(https?://[^/]+).*", r"\1", asked) for asked in page.asked} == {url}
    assert [fault for fault in page.faults if "401" not in fault] == []


def test_stop_ends_the_request_and_model_text_is_no_markup(page, listen, make_model):
    from playwright.sync_api import expect

    model = make_model(text="<img src=x onerror=alert(1)> " * 20, size=1, round_s=0.05, context=900)
    with listen(model) as (url, _):
        page.goto(url)
        expect(page.locator("#model")).to_have_text("tiny")
        page.get_by_role("tab", name="Completion").click()
        page.get_by_label("Prompt").fill("one")
        page.get_by_role("button", name="Continue").click()
        expect(page.locator("#continued")).to_contain_text("<img")
        page.keyboard.press("Escape")
        expect(page.get_by_role("button", name="Continue")).to_be_enabled()
        assert page.locator("#continued img").count() == 0
        expect(page.get_by_text("ready")).to_be_visible()
        page.wait_for_timeout(300)
        assert len(model.engine.cancelled) == 1
    assert page.faults == []


def test_a_hidden_page_asks_nothing(page, listen, make_model):
    from playwright.sync_api import expect

    with listen(make_model()) as (url, _):
        page.clock.install()
        page.goto(url)
        expect(page.locator("#model")).to_have_text("tiny")
        page.clock.run_for(40_000)
        page.wait_for_timeout(300)
        seen = len(page.asked)
        page.evaluate("Object.defineProperty(document, 'hidden', {value: true, configurable: true})")
        page.evaluate("document.dispatchEvent(new Event('visibilitychange'))")
        page.clock.run_for(600_000)
        page.wait_for_timeout(300)
        assert len(page.asked) == seen
        assert {asked.removeprefix(url) for asked in page.asked[1:]} >= {"/health", "/v1/models"}
