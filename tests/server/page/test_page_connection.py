"""What the page does about keys, other models and servers that go away."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any
from urllib.error import HTTPError
from urllib.request import urlopen

import pytest

from tests.server.page.served import Served, ask, lengthen

expect = pytest.importorskip("playwright.sync_api", reason="playwright is not installed").expect
pytestmark = pytest.mark.timeout(600)


def test_a_model_without_a_chat_template_continues_text(
    served: Served, open_page: Callable[..., Any]
) -> None:
    model = {"id": "tiny-moe", "object": "model", "expertflow": {"chat": False, "context": 512}}
    models = {"object": "list", "data": [model]}
    page = open_page(served, {"v1/models": lambda route: route.fulfill(json=models)})
    box = page.get_by_role("textbox", name="Text to continue")
    expect(page.get_by_text("no chat template")).to_be_visible()
    page.get_by_text("Sampling").click()
    page.get_by_label("Most tokens").fill("5")
    box.fill("The old man went to")
    with page.expect_request("**/v1/completions") as sent:
        box.press("Enter")
    assert sent.value.post_data_json["prompt"] == "The old man went to"
    expect(page.locator(".message.assistant .note")).to_contain_text("5 tokens")
    expect(page.locator(".message.assistant .text")).to_have_text(re.compile(r"\w"))


def test_a_key_is_asked_for_kept_and_sent(served: Served, open_page: Callable[..., Any]) -> None:
    refusal = {"error": {"message": "the key is not one of this server's", "code": "invalid_api_key"}}

    def guard(route: Any) -> None:
        known = route.request.headers.get("authorization") == "Bearer sesame"
        route.continue_() if known else route.fulfill(status=401, json=refusal)

    page = open_page(served, dict.fromkeys(("live", "v1/models"), guard))
    for key in ("wrong", "sesame"):
        page.get_by_label("API key").fill(key)
        page.get_by_role("button", name="Use it").click()
        if key == "wrong":
            expect(page.get_by_role("alert")).to_have_text(refusal["error"]["message"])
    expect(page.locator("#connection")).to_have_text("live")
    expect(page.get_by_role("dialog")).to_be_hidden()
    page.reload()
    expect(page.locator("#connection")).to_have_text("live")
    assert [text for text in page.complaints if "401" not in text] == []
    page.complaints.clear()


def test_the_key_as_a_password_opens_everything(open_page: Callable[..., Any]) -> None:
    served = Served(key="sesame")
    try:
        page = open_page(served, http_credentials={"username": "me", "password": "sesame"})
        expect(page.locator("#connection")).to_have_text("live")
        lengthen(page, max_tokens=4)
        expect(ask(page, "Who?").locator(".note")).to_contain_text("token")
        for path in ("/", "/page/main.js", "/live"):
            with pytest.raises(HTTPError, match="401"):
                urlopen(served.address + path)
        page.close()  # or it would miss its server
    finally:
        served.kill()


def test_it_connects_again_when_the_server_was_restarted(open_page: Callable[..., Any]) -> None:
    served = Served()
    try:
        page = open_page(served)
        expect(page.locator("#connection")).to_have_text("live")
        lengthen(page, max_tokens=4)
        expect(ask(page, "Who?").locator(".note")).to_contain_text("token")
        served.kill()
        expect(page.locator("#connection")).to_have_text("connection lost, trying again")
        expect(page.locator("body.stale")).to_have_count(1)
        expect(ask(page, "Are you there?").get_by_role("alert")).to_contain_text("connection was lost")
        served.start()
        expect(page.locator("#connection")).to_have_text("live")
        expect(page.locator("#figure-hits")).to_have_text("\N{EN DASH}")  # counted from its start again
        page.get_by_role("button", name="Send").click()
        expect(page.locator(".message.assistant .note").last).to_contain_text("token")
        assert [text for text in page.complaints if "ERR_" not in text] == []
        page.close()
        page.complaints.clear()
    finally:
        served.kill()
