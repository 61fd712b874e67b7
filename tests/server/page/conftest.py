"""A browser, a server with the embedded model, and pages of it that must not complain."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest

from tests.server.page.served import Served

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
PATIENCE_MS = 120_000  # on a machine whose time others take


@pytest.fixture(scope="package")
def chromium() -> str:
    pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if CHROMIUM is None:
        pytest.skip("no Chromium: apt-get install chromium")
    return CHROMIUM


@pytest.fixture(scope="package")
def served(chromium: str) -> Iterator[Served]:
    served = Served()
    yield served
    served.kill()


@pytest.fixture(scope="module")
def browser(chromium: str) -> Iterator[Any]:
    """For one file: its event loop is in the way of others that run in this thread."""
    from playwright import sync_api

    sync_api.expect.set_options(timeout=PATIENCE_MS)
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium)
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser: Any) -> Iterator[Callable[..., Any]]:
    """Opens pages; routes: who answers instead of the server, by path.

    At the end none of them may have complained, or asked anybody but its server.
    """
    contexts, complaints, asked = [], [], []

    def opened(
        served: Served, routes: Mapping[str, Callable[[Any], None]] | None = None, **options: Any
    ) -> Any:
        context = browser.new_context(**options)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(PATIENCE_MS)
        page.on(
            "console", lambda message: complaints.append(message.text) if message.type == "error" else None
        )
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda request: asked.append((served.address, request.url)))
        page.complaints = complaints
        for path, handler in (routes or {}).items():
            page.route(f"**/{path}", handler)
        page.goto(served.address)
        return page

    yield opened
    for context in contexts:
        context.close()
    assert not complaints
    assert [url for address, url in asked if not url.startswith(f"{address}/")] == []


@pytest.fixture
def page(served: Served, open_page: Callable[..., Any]) -> Any:
    """Live, at the size of a laptop's window."""
    from playwright.sync_api import expect

    page = open_page(served, viewport={"width": 1440, "height": 900})
    expect(page.locator("#connection")).to_have_text("live")
    expect(page.locator("#model")).to_have_text("tiny-moe")
    return page
