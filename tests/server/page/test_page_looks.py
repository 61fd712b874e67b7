"""How the page looks: models of any shape, windows, light and dark; and what assistive technology has of it."""

from __future__ import annotations

import re
from collections.abc import Callable
from itertools import product
from typing import Any

import pytest

from tests.server.page.served import Served

expect = pytest.importorskip("playwright.sync_api", reason="playwright is not installed").expect
pytestmark = pytest.mark.timeout(600)

# Everything that places a cell, for one shape of a model and one size of the box.
PLACES = """async ([layers, experts, width, height]) => {
  const { layOut, corner, cellAt, LABEL, STALL } = await import("/page/layout.js");
  const layout = layOut(layers, experts, width, height);
  const wrong = [];
  for (let layer = 0; layer < layers; layer++) for (let expert = 0; expert < experts; expert++) {
    const { x, y } = corner(layout, layer, expert);
    const right = x + layout.cellWidth, bottom = y + layout.cellHeight;
    const found = cellAt(layout, (x + right) / 2, (y + bottom) / 2);
    const inside = x >= LABEL && right <= width - STALL + 1 && y >= 0 && bottom <= layout.height + 1;
    if (!inside) wrong.push(["outside", layer, expert]);
    if (found?.layer !== layer || found?.expert !== expert) wrong.push(["not found", layer, expert]);
  }
  return { wrong: wrong.slice(0, 5), cell: Math.min(layout.cellWidth, layout.cellHeight), height: layout.height };
}"""


def test_every_expert_has_a_place_that_can_be_seen(page: Any) -> None:
    for layers, experts, width in product((1, 6, 24, 60), (8, 60, 128, 512), (290, 480, 800, 1500)):
        found = page.evaluate(PLACES, [layers, experts, width, 380])
        shape = (layers, experts, width, found)
        assert not found["wrong"], shape
        assert found["cell"] >= 4, shape
        # Where cells of some size would fit the box, nothing scrolls.
        if layers * experts * 12 * 12 * 1.5 < (width - 72) * 380:
            assert found["height"] <= 381, shape


# Two experts in two layers; each event is what changes.
CELLS = """async (events) => {
  const { Cells } = await import("/page/cells.js");
  const empty = { layers: 2, experts: 2, time_s: 0, hits: 0, misses: 0, resident_LE: [[0, 0], [0, -1]],
    uses_LE: [[0, 0], [0, 0]], misses_LE: [[0, 0], [0, 0]], loads_LE: [[0, 0], [0, 0]], predicted_LE: null };
  let event = empty;
  const cells = new Cells(event), seen = [];
  for (const [now, change] of events) {
    event = { ...event, ...change };
    seen.push(cells.continuesWith(event));
    cells.update(event, now);
  }
  return { continues: seen, outcome: [cells.outcome(0, 0), cells.outcome(0, 1)],
    place: [cells.place(0, 0), cells.place(0, 1), cells.place(1, 0)],
    predicted: [cells.predicted(0, 0), cells.predicted(0, 1)], exists: [cells.exists(1, 0), cells.exists(1, 1)] };
}"""


def test_a_cell_says_what_its_expert_does(page: Any) -> None:
    used = {"uses_LE": [[1, 1], [0, 0]], "misses_LE": [[0, 1], [0, 0]], "hits": 1, "misses": 1}
    where = {"resident_LE": [[2, 1], [0, -1]], "predicted_LE": [[0.9, 0.2], [0.0, 0.0]], "time_s": 1}
    now = page.evaluate(CELLS, [[1000, used | where]])
    assert now["outcome"] == ["hit", "miss"]
    assert now["place"] == ["resident", "loading", "absent"]
    assert now["predicted"] == [True, False]
    assert now["exists"] == [True, False]
    later = page.evaluate(CELLS, [[1000, used | where], [3000, {"time_s": 3}]])
    assert later["outcome"] == [None, None]
    assert later["place"] == now["place"]
    again = page.evaluate(CELLS, [[1000, used | where], [1250, {"time_s": 0.1, "hits": 0, "misses": 0}]])
    assert again["continues"] == [True, False], "a server that was restarted counts from zero"


@pytest.mark.parametrize("width", [320, 700, 1000, 1440, 2400])
def test_nothing_sticks_out_of_the_window(page: Any, width: int) -> None:
    page.set_viewport_size({"width": width, "height": 800})
    page.evaluate("new Promise(requestAnimationFrame)")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.evaluate("document.querySelector('#map canvas').getBoundingClientRect().width") > 200
    expect(page.get_by_role("button", name="Send")).to_be_in_viewport()


CONTRASTS = """() => {
  const light = (text) => {
    const [r, g, b] = text.match(/[\\d.]+/g).slice(0, 3).map((n) => n / 255)
      .map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = (element) => {
    for (let at = element; at; at = at.parentElement) {
      const colour = getComputedStyle(at).backgroundColor;
      if (!/, 0\\)$/.test(colour)) return colour;
    }
    return "rgb(255, 255, 255)";
  };
  const found = [];
  for (const element of document.querySelectorAll("body *")) {
    const text = [...element.childNodes].some((node) => node.nodeType === 3 && node.data.trim());
    if (!text || !element.checkVisibility() || element.closest(".unseen, .skip, script, noscript")) continue;
    const [a, b] = [light(getComputedStyle(element).color), light(behind(element))].sort((x, y) => y - x);
    found.push([(a + 0.05) / (b + 0.05), element.tagName, element.id, element.textContent.trim().slice(0, 30)]);
  }
  return found;
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_can_be_read_in_both_lights(served: Served, open_page: Callable[..., Any], scheme: str) -> None:
    page = open_page(served, color_scheme=scheme)
    expect(page.locator("#connection")).to_have_text("live")
    ground = page.evaluate("getComputedStyle(document.documentElement).backgroundColor")
    brightness = sum(map(int, re.findall(r"\d+", ground)[:3])) / 3
    assert (brightness > 128) == (scheme == "light")
    found = page.evaluate(CONTRASTS)
    assert len(found) > 25
    assert [one for one in found if one[0] < 4.5] == [], "WCAG AA"


STATES = """async () => {
  const { paint } = await import("/page/heatmap.js"), { colours } = await import("/page/canvas.js");
  const examples = { absent: { place: "absent" }, resident: { place: "resident" }, loading: { place: "loading" },
    hit: { place: "resident", outcome: "hit" }, miss: { place: "resident", outcome: "miss" },
    predicted: { place: "absent", predicted: true } };
  const drawn = {};
  for (const size of [5, 14]) for (const [name, what] of Object.entries(examples)) {
    const canvas = document.createElement("canvas");
    canvas.width = canvas.height = size;
    const context = canvas.getContext("2d");
    paint(context, 0, 0, size, size, what, colours());
    const { data } = context.getImageData(0, 0, size, size), grey = [];
    for (let at = 0; at < data.length; at += 4) {
      const over = 1 - data[at + 3] / 255;
      grey.push(0.2126 * data[at] + 0.7152 * data[at + 1] + 0.0722 * data[at + 2] + over * 128);
    }
    drawn[`${name} ${size}`] = grey;
  }
  return drawn;
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_states_differ_without_their_colours(
    served: Served, open_page: Callable[..., Any], scheme: str
) -> None:
    """As greys, at a small and at a usual size: no two look alike."""
    page = open_page(served, color_scheme=scheme)
    drawn = page.evaluate(STATES)
    for size in ("5", "14"):
        states = {name: grey for name, grey in drawn.items() if name.endswith(f" {size}")}
        for one, grey in states.items():
            for other, grey_of_other in states.items():
                if one < other:
                    far = [abs(a - b) for a, b in zip(grey, grey_of_other, strict=True)]
                    assert sum(sorted(far)[-len(far) // 8 :]) / (len(far) // 8) > 25, (one, other)


def test_the_theme_can_be_chosen_and_is_kept(served: Served, open_page: Callable[..., Any]) -> None:
    page = open_page(served, color_scheme="light")
    ground = "getComputedStyle(document.documentElement).backgroundColor"
    light = page.evaluate(ground)
    button = page.locator("#theme")
    for theme in ("system", "light", "dark"):
        expect(button).to_have_text(f"Theme: {theme}")
        if theme != "dark":
            button.click()
    dark = page.evaluate(ground)
    assert dark != light
    page.reload()
    expect(button).to_have_text("Theme: dark")
    assert page.evaluate(ground) == dark


def test_screen_readers_have_names_and_places(page: Any) -> None:
    for role, name in (
        ("region", "Chat"), ("region", "Expert cache"), ("log", "Chat"), ("textbox", "Message"), ("button", "Send"),
        ("button", "New conversation"), ("application", "Experts by layer; arrow keys move between them"),
        ("application", "Seconds of the last steps; arrow keys move between them"),
        ("group", "What the map shows"), ("radio", "Now"),
    ):  # fmt: skip
        expect(page.get_by_role(role, name=name, exact=True)).to_have_count(1)
    for landmark in ("main", "banner"):
        expect(page.get_by_role(landmark)).to_have_count(1)
    expect(page.locator("#map-summary")).to_have_text(
        re.compile("^[0-9]+ experts? in memory, [0-9]+ loading")
    )
    # Nothing can be reached that has no name.
    unnamed = page.locator("button, input:not([type=radio]), textarea, a, [tabindex='0']").evaluate_all(
        """all => all.filter((one) => !one.textContent.trim() && !one.labels?.length && !one.getAttribute("aria-label"))
            .map((one) => one.outerHTML)"""
    )
    assert unnamed == []
    # What changes several times a second is not read out.
    live = page.locator("[aria-live], [role=status], [role=alert], [role=log]").evaluate_all(
        "all => all.map((a) => a.id)"
    )
    assert sorted(live) == ["cell", "connection", "key-error", "log", "step"]


def test_nothing_moves_for_those_who_ask_for_that(served: Served, open_page: Callable[..., Any]) -> None:
    moving = """() => {
      const message = document.createElement("article");
      message.className = "message answering";
      message.innerHTML = "<div class=text></div>";
      document.body.append(message);
      return getComputedStyle(message.firstChild, "::after").animationName;
    }"""
    assert open_page(served, reduced_motion="reduce").evaluate(moving) == "none"
    assert open_page(served, reduced_motion="no-preference").evaluate(moving) == "blink"
