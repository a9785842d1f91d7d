"""The chat page in real Chromium: typing, streaming, stopping, files, reloading, and answers that mean harm."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

for package in ("fastapi", "uvicorn", "prometheus_client", "httpx"):
    pytest.importorskip(package)
playwright = pytest.importorskip("playwright.sync_api")

from scripted_paged import build_scripted  # noqa: E402
from served import Server, running  # noqa: E402

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium"),
]
SCREENSHOTS = os.environ.get("PERSIMMON_SCREENSHOTS")
"""Folder for pictures of the page, to be looked at."""

AXE = Path(os.environ.get("PERSIMMON_AXE") or Path(__file__).parents[2] / "build/axe/node_modules/axe-core/axe.min.js")
"""The accessibility checker; `make` fetches it where npm is there."""

DEMO = """A stack keeps things in order: the **last** one in is the first one out.

1. `push` puts a thing on top
2. `pop` takes it off again

```python
def reverse(items):
    stack = list(items)
    return [stack.pop() for _ in items]
```

| call | what it does |
|---|---|
| push | adds |
| pop | removes |

> Plates in a kitchen work like this. See [the long story](https://example.org/stack)."""

EVIL = """<img src=x onerror="window.hacked=1"><script>window.hacked=2</script>

[click](javascript:window.hacked=3) [data](data:text/html,<script>window.hacked=4</script>)
![](x" onerror="window.hacked=5) <svg onload=window.hacked=6> <a href="javascript:window.hacked=7">raw</a>

```"><img src=x onerror=window.hacked=8>
code <b>bold</b>
```
<iframe srcdoc="<script>parent.hacked=9</script>"></iframe> <style>body{display:none}</style>"""

REPLIES = {
    "stack": DEMO,
    "evil": EVIL,
    "wide": "x" * 1_000 + "\n" + "y " * 500,
    "endless": "and on " * 2_000,
    "file": "It says hello.",
}


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with running(partial(build_scripted, REPLIES), context=16_384) as found:
        yield found


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as p:
        chromium = p.chromium.launch(executable_path=CHROMIUM)
        yield chromium
        chromium.close()


class Page:
    """The page and what went wrong on it."""

    def __init__(self, browser: Any, server: Server, **options: Any) -> None:
        self.context = browser.new_context(**{"viewport": {"width": 1280, "height": 800}, **options})
        self.page = self.context.new_page()
        self.page.set_default_timeout(120_000)
        self.errors: list[str] = []
        self.requests: list[str] = []
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("console", lambda m: self.errors.append(m.text) if m.type == "error" else None)
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(server.url)

    def ask(self, text: str, *, wait: bool = True) -> None:
        self.page.fill("#prompt", text)
        self.page.keyboard.press("Enter")
        if wait:
            self.finished()

    def finished(self) -> None:
        self.page.wait_for_selector(".message.assistant:last-child:not(.streaming) .actions button")

    def answer(self) -> str:
        return str(self.page.inner_text(".message.assistant:last-child .content"))

    def shoot(self, name: str) -> None:
        if SCREENSHOTS:
            Path(SCREENSHOTS).mkdir(parents=True, exist_ok=True)
            self.page.screenshot(path=f"{SCREENSHOTS}/{name}.png")


@pytest.fixture
def page(browser: Any, server: Server) -> Iterator[Page]:
    found = Page(browser, server)
    yield found
    found.context.close()
    assert found.errors == []
    assert all(url.startswith((server.url, "blob:")) for url in found.requests), "nothing is loaded from elsewhere"


def test_an_answer_is_streamed_and_rendered(page: Page) -> None:
    page.shoot("empty-light")
    page.ask("what is a stack", wait=False)
    page.page.wait_for_selector(".message.streaming .content :text('last')")
    page.finished()
    content = page.page.locator(".message.assistant .content")
    assert content.locator("strong").inner_text() == "last"
    assert content.locator("ol li").count() == 2
    assert "stack.pop()" in content.locator(".code pre").inner_text()
    assert content.locator(".code .bar span").inner_text() == "python"
    assert content.locator("table td").count() == 4
    link = content.locator("a")
    assert link.get_attribute("href") == "https://example.org/stack"
    assert link.get_attribute("rel") == "noopener noreferrer nofollow"
    assert "tokens/s" in page.page.inner_text("#speed") and "91 % zeros" in page.page.inner_text("#speed")
    assert "of 16,384 tokens" in page.page.inner_text("#gauge-text")
    page.shoot("chat-light")


def test_code_is_copied(browser: Any, server: Server) -> None:
    page = Page(browser, server, permissions=["clipboard-read", "clipboard-write"])
    page.ask("what is a stack")
    page.page.click("button[aria-label='Copy code']")
    assert "def reverse(items)" in page.page.evaluate("navigator.clipboard.readText()")
    page.context.close()


def test_a_malicious_answer_does_nothing(page: Page) -> None:
    page.ask("be evil")
    page.page.wait_for_timeout(300)
    assert page.page.evaluate("window.hacked") is None
    content = page.page.locator(".message.assistant .content")
    for tag in ("img", "script", "iframe", "svg:not(.icon svg)", "style"):
        assert content.locator(tag).count() == 0, tag
    assert all(
        not (link.get_attribute("href") or "").startswith(("javascript", "data")) for link in content.locator("a").all()
    )
    assert "<img src=x onerror=" in content.inner_text(), "markup is shown as text"
    page.shoot("evil")


def test_huge_lines_stay_inside_the_page(page: Page) -> None:
    page.ask("make it wide")
    assert page.page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert len(page.answer()) > 1_900


def test_stopping_frees_the_engine(page: Page, server: Server) -> None:
    page.ask("endless please", wait=False)
    page.page.wait_for_selector(".message.streaming .content :text('and on')")
    page.page.keyboard.press("Escape")
    page.page.wait_for_selector("text=Stopped.")
    server.wait_idle()
    assert page.answer().startswith("and on")


def test_regenerate_and_edit(page: Page) -> None:
    page.ask("what is a stack")
    page.page.click("button[aria-label='Answer again']")
    page.finished()
    assert page.page.locator(".message").count() == 2
    page.page.hover(".message.user")
    page.page.click("button[aria-label='Edit']")
    assert page.page.input_value("#prompt") == "what is a stack"
    page.ask("the file")
    assert page.answer() == "It says hello."
    assert page.page.locator(".message").count() == 2


def drop_file(page: Page, name: str, text: str) -> None:
    """As a person drops it onto the page."""
    drop = """([name, text]) => { const data = new DataTransfer();
        data.items.add(new File([text], name, {type: 'text/plain'}));
        for (const kind of ['dragenter', 'dragover', 'drop'])
          document.body.dispatchEvent(new DragEvent(kind, {dataTransfer: data, bubbles: true, cancelable: true})); }"""
    page.page.evaluate(drop, [name, text])
    page.page.wait_for_selector(f"#files .chip:has-text('{name}')")


def test_files_are_dropped_into_the_context(page: Page, server: Server) -> None:
    before = page.page.inner_text("#gauge-text")
    drop_file(page, "notes.txt", "hello there " * 8)
    page.page.wait_for_function("old => document.querySelector('#gauge-text').textContent !== old", arg=before)
    page.shoot("file")
    page.ask("what does the file say")
    assert page.answer() == "It says hello."
    assert page.page.locator(".message.user .chip").inner_text().startswith("notes.txt")


def test_reading_a_long_prompt_shows_how_far_it_is(page: Page) -> None:
    page.page.evaluate("""() => { window.seen = [];
        const look = () => { const bar = document.querySelector('.reading progress');
          if (bar) window.seen.push([bar.value, bar.max]); };
        new MutationObserver(look).observe(document.querySelector('#messages'), {childList: true, subtree: true}); }""")
    drop_file(page, "long.txt", "hello there " * 1_500)
    page.ask("what does the file say")
    assert page.answer() == "It says hello."
    seen = page.page.evaluate("window.seen")
    assert seen and all(0 < value < most for value, most in seen)


def test_reloading_keeps_conversations(page: Page) -> None:
    page.ask("what is a stack")
    page.page.click("#new")
    page.ask("the file")
    page.page.reload()
    page.page.wait_for_selector("#conversations li:nth-child(2)")
    assert page.answer() == "It says hello."
    page.page.click("#conversations button:has-text('what is a stack')")
    assert "def reverse" in page.answer()
    page.page.on("dialog", lambda dialog: dialog.accept())
    page.page.hover("#conversations li.current")
    page.page.click("#conversations li.current button.icon")
    assert page.page.locator("#conversations li").count() == 1


def test_two_tabs_keep_each_others_conversations(page: Page) -> None:
    page.ask("what is a stack")
    other = page.context.new_page()
    other.goto(page.page.url)
    page.page.click("#new")
    page.ask("the file")
    other.wait_for_selector("#conversations button:has-text('the file')")
    other.click("#new")
    other.fill("#prompt", "make it wide")
    other.keyboard.press("Enter")
    other.wait_for_selector(".message.assistant:last-child:not(.streaming) .actions button")
    page.page.wait_for_selector("#conversations button:has-text('make it wide')")
    other.on("dialog", lambda dialog: dialog.accept())
    other.hover("#conversations li:has-text('the file')")
    other.click("#conversations li:has-text('the file') button.icon")
    page.page.wait_for_selector("#conversations button:has-text('the file')", state="detached")
    page.ask("the file")
    page.page.reload()
    titles = page.page.locator("#conversations .open").all_inner_texts()
    assert sorted(titles)[0] == "make it wide" and len(titles) == 2, titles
    other.close()


def test_an_answer_that_is_being_written_outlives_a_reload(page: Page) -> None:
    page.ask("endless please", wait=False)
    page.page.wait_for_selector(".message.streaming .content :text('and on')")
    page.page.reload()
    page.page.wait_for_selector("text=Stopped.")
    assert page.answer().startswith("and on")
    assert page.page.locator(".message.user .content").inner_text() == "endless please"


def test_another_conversation_while_answering(page: Page, server: Server) -> None:
    page.ask("the file")
    page.page.click("#new")
    page.ask("endless please", wait=False)
    page.page.wait_for_selector(".message.streaming .content :text('and on')")
    page.page.click("#conversations button:has-text('the file')")
    assert page.page.get_attribute("#send", "aria-label") == "Send"
    server.wait_idle()
    page.ask("the file")
    assert page.page.locator(".message").count() == 4


def test_escape_closes_the_settings_and_not_the_answer(page: Page) -> None:
    page.ask("endless please", wait=False)
    page.page.wait_for_selector(".message.streaming .content :text('and on')")
    page.page.click("#open-settings")
    page.page.keyboard.press("Escape")
    page.page.wait_for_selector("#settings", state="hidden")
    assert page.page.locator(".message.streaming").count() == 1
    page.page.keyboard.press("Escape")
    page.page.wait_for_selector("text=Stopped.")


def test_export(page: Page) -> None:
    page.ask("the file")
    page.page.click("#export")
    with page.page.expect_download() as found:
        page.page.click("button[value='md']")
    text = Path(found.value.path()).read_text()
    assert found.value.suggested_filename == "the-file.md"
    assert "**Persimmon**\n\nIt says hello." in text


def test_settings_are_kept_and_sent(page: Page) -> None:
    page.page.click("#open-settings")
    page.page.fill("[name=system]", "mention the stack")
    page.page.fill("[name=max_tokens]", "5")
    page.shoot("settings-light")
    page.page.click("#settings >> text=Done")
    page.ask("well")
    page.page.wait_for_selector("text=The answer reached its longest length.")
    page.page.reload()
    page.page.click("#open-settings")
    assert page.page.input_value("[name=max_tokens]") == "5"


def test_errors_are_told_with_a_way_out(page: Page, server: Server) -> None:
    server.service.draining = True
    try:
        page.ask("what is a stack", wait=False)
        page.page.wait_for_selector(".problem:has-text('shutting down')")
        page.shoot("problem")
    finally:
        server.service.draining = False
    page.page.click("text=Try again")
    page.finished()
    assert "def reverse" in page.answer()
    page.errors = [error for error in page.errors if "503" not in error]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_phone_and_dark(browser: Any, server: Server, scheme: str) -> None:
    page = Page(browser, server, viewport={"width": 375, "height": 740}, color_scheme=scheme, has_touch=True)
    page.ask("what is a stack")
    assert page.page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    page.shoot(f"phone-{scheme}")
    page.page.click("#menu")
    page.page.wait_for_selector("#sidebar.shown")
    page.page.wait_for_timeout(250)
    page.shoot(f"phone-menu-{scheme}")
    page.page.keyboard.press("Escape")
    page.page.set_viewport_size({"width": 1280, "height": 800})
    page.page.wait_for_timeout(100)
    page.shoot(f"chat-{scheme}")
    assert page.errors == []
    page.context.close()


def test_keyboard_alone_is_enough(page: Page) -> None:
    page.page.keyboard.type("the file")
    page.page.keyboard.press("Enter")
    page.finished()
    assert page.page.evaluate("document.activeElement.id") == "prompt"
    page.page.keyboard.press("Shift+Tab")
    assert page.page.evaluate("document.activeElement.id") == "attach"


def test_accessibility(page: Page) -> None:
    if not AXE.is_file():
        pytest.skip("no axe-core: make build/axe/node_modules/axe-core/axe.min.js, or name one by PERSIMMON_AXE")
    page.ask("what is a stack")
    page.page.evaluate(AXE.read_text() + ";void 0")
    found = page.page.evaluate(
        "axe.run().then(r => r.violations.map(v => v.id + ': ' + v.nodes.map(n => n.html).join(' | ')))"
    )
    assert found == []
