"""The live page in a real browser, against a real server with the embedded model: chat, map and keys.

With EXPERTFLOW_ARTIFACTS=FOLDER a screenshot is left there.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest

from tests.server.page.served import Served, ask, lengthen

expect = pytest.importorskip("playwright.sync_api", reason="playwright is not installed").expect
pytestmark = pytest.mark.timeout(600)
MARKUP = '<img src="x" onerror="window.ran = true"><script>window.ran = true</script>'
# The page itself looks: whoever asks it from outside comes too late on a busy machine.
NOTE_LENGTHS = """() => {
    window.lengths = [];
    new MutationObserver(() => {
        const texts = document.querySelectorAll(".message.assistant .text");
        if (texts.length) lengths.push(texts[texts.length - 1].textContent.length);
    }).observe(document.body, {subtree: true, childList: true, characterData: true});
}"""


def picture(page: Any) -> str:
    return page.evaluate("document.querySelector('#map canvas').toDataURL()")


def test_an_answer_streams_in_and_the_map_shows_it(served: Served, page: Any) -> None:
    lengthen(page, ignore_eos=True, max_tokens=120, temperature=0)
    before, used = picture(page), sum(map(sum, served.stats()["cache"]["uses_LE"]))
    page.evaluate(NOTE_LENGTHS)
    answer = ask(page, "Who was Moses?")
    expect(answer.locator(".text")).to_have_text(re.compile("."))
    if folder := os.environ.get("EXPERTFLOW_ARTIFACTS"):
        page.screenshot(path=Path(folder) / "live-page.png")
    expect(answer).not_to_have_class(re.compile("answering"))
    assert len(set(page.evaluate("lengths"))) > 3, "it came at once"
    assert picture(page) != before
    expect(answer.locator(".note")).to_have_text(re.compile(r"^120 tokens · [\d.]+ tokens/s"))
    page.get_by_text("The same as a table").click()
    uses = page.locator("#table tbody tr td:nth-child(4)").all_text_contents()
    assert sum(int(number.replace(",", "")) for number in uses) >= used + 120
    for figure in ("speed", "hits", "link", "stall", "predictor"):
        expect(page.locator(f"#figure-{figure}")).to_have_text(re.compile(r"\d"))
    expect(page.locator("#gate")).to_have_text(f"Prefetching {served.stats()['predictor']['gate']}")
    stats = served.stats()["cache"]
    shown = float(page.locator("#figure-hits").text_content().split()[0])
    assert abs(shown / 100 - stats["hits"] / (stats["hits"] + stats["misses"])) < 0.05


def test_a_conversation_is_remembered_and_forgotten(page: Any) -> None:
    lengthen(page, max_tokens=4)
    expect(ask(page, "Who was Moses?").locator(".note")).to_contain_text("token")
    with page.expect_request("**/v1/chat/completions") as second:
        expect(ask(page, "And then?").locator(".note")).to_contain_text("token")
    roles = [message["role"] for message in second.value.post_data_json["messages"]]
    assert roles == ["user", "assistant", "user"]
    page.get_by_role("button", name="New conversation").click()
    expect(page.locator(".message")).to_have_count(0)
    with page.expect_request("**/v1/chat/completions") as third:
        expect(ask(page, "Who?").locator(".note")).to_contain_text("token")
    assert len(third.value.post_data_json["messages"]) == 1


def test_sampling_is_sent_as_it_is_set(page: Any) -> None:
    page.get_by_text("Sampling").click()
    for name, value in (("Temperature", "0.5"), ("Top p", "0.9"), ("Most tokens", "3"), ("Seed", "7")):
        page.get_by_label(name).fill(value)
    page.get_by_label("System message").fill("Be brief.")
    with page.expect_request("**/v1/chat/completions") as sent:
        expect(ask(page, "Who?").locator(".note")).to_contain_text("3 tokens")
    body = sent.value.post_data_json
    assert (body["temperature"], body["top_p"], body["max_tokens"], body["seed"]) == (0.5, 0.9, 3, 7)
    assert body["messages"][0] == {"role": "system", "content": "Be brief."}


def test_stop_ends_the_answer_here_and_in_the_server(served: Served, page: Any) -> None:
    lengthen(page, ignore_eos=True)
    answer = ask(page, "Tell me a story.")
    expect(answer.locator(".text")).to_have_text(re.compile(".{5}"))
    page.get_by_role("button", name="Stop").click()
    expect(answer.locator(".note")).to_have_text(re.compile("stopped$"))
    expect(page.get_by_role("button", name="Stop")).to_be_hidden()
    expect(page.locator("#figure-speed + .note")).to_have_text("0 running, 0 waiting")
    assert served.stats()["outstanding"] == 0
    assert answer.locator(".error").count() == 0


def test_everything_can_be_done_from_the_keyboard(page: Any) -> None:
    lengthen(page, ignore_eos=True)
    keyboard = page.keyboard
    keyboard.press("Tab")
    expect(page.get_by_role("link", name="Skip to the prompt")).to_be_focused()
    keyboard.press("Enter")
    expect(page.get_by_role("textbox", name="Message", exact=True)).to_be_focused()
    keyboard.type("one")
    keyboard.press("Shift+Enter")
    keyboard.type("two")
    keyboard.press("Enter")
    expect(page.locator(".message.user .text")).to_have_text("one\ntwo")
    expect(page.locator(".message.assistant .text")).to_have_text(re.compile("."))
    keyboard.press("Escape")
    expect(page.locator(".message.assistant .note")).to_have_text(re.compile("stopped$"))

    cell, tooltip = page.locator("#cell"), page.locator("#tooltip")
    for _ in range(12):
        if page.evaluate("document.activeElement.id") == "map":
            break
        keyboard.press("Tab")
    expect(page.locator("#map")).to_be_focused()
    expect(cell).to_have_text(re.compile("^Layer 0, expert 0: "))
    keyboard.press("ArrowDown")
    keyboard.press("ArrowRight")
    expect(cell).to_have_text(re.compile("^Layer 1, expert 1: (not )?in memory"))
    expect(tooltip).to_be_visible()
    keyboard.press("Control+End")
    keyboard.press("ArrowRight")  # there is no more
    expect(cell).to_have_text(re.compile("^Layer 5, expert 31: "))
    keyboard.press("Escape")
    expect(tooltip).to_be_hidden()
    page.locator("#steps").focus()
    keyboard.press("ArrowLeft")
    expect(page.locator("#step")).to_have_text(re.compile("^1 step before: .* arithmetic", re.DOTALL))


def test_a_pointer_is_told_what_it_points_at(page: Any) -> None:
    page.locator("#map").hover(position={"x": 40, "y": 8})
    expect(page.locator("#tooltip")).to_have_text(
        re.compile(r"^Layer 0, expert 0: .*used .*, read ", re.DOTALL)
    )
    page.mouse.move(5, 5)
    expect(page.locator("#tooltip")).to_be_hidden()


def test_a_state_of_the_legend_stands_out(page: Any) -> None:
    page.evaluate("document.querySelector('#legend').scrollIntoView()")
    before = picture(page)
    button = page.get_by_role("button", name="not in memory")
    button.click()
    expect(button).to_have_attribute("aria-pressed", "true")
    assert picture(page) != before
    button.click()
    expect(button).to_have_attribute("aria-pressed", "false")
    page.locator("#view").get_by_text("Uses").click()
    expect(page.locator("#legend")).to_have_text(re.compile("used most often"))


def test_markup_stays_text(page: Any) -> None:
    """Of people and of models: written as markup, it would run in the page that holds the key."""
    event = {"choices": [{"index": 0, "delta": {"content": MARKUP}, "finish_reason": "stop"}]}
    stream = f"data: {json.dumps(event)}\n\ndata: [DONE]\n\n"
    answer_with = {"status": 200, "content_type": "text/event-stream", "body": stream}
    page.route("**/v1/chat/completions", lambda route: route.fulfill(**answer_with))
    answer = ask(page, MARKUP)
    expect(answer.locator(".text")).to_have_text(MARKUP)
    expect(page.locator(".message.user .text")).to_have_text(MARKUP)
    assert page.locator("#log img, #log script").count() == 0
    assert page.evaluate("window.ran") is None


def test_a_refusal_is_shown_in_the_server_s_words(page: Any) -> None:
    answer = ask(page, "word " * 600)
    expect(answer.get_by_role("alert")).to_contain_text("context of 512")
    expect(page.get_by_role("textbox", name="Message", exact=True)).to_have_value(re.compile("^word word"))
    assert [text for text in page.complaints if "400" not in text] == []
    page.complaints.clear()  # the browser notes a status of 400 by itself
