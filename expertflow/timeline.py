"""Timeline: what a run did when. Computing, loading, waiting, predicting, grouping: the paper's Fig. 4, measured.

Anybody adds spans, from any thread; the last ones are kept. Saved as a trace for Perfetto or Chrome, or drawn.
"""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from expertflow.whole_file import write_whole

# From top to bottom of the figure. Other tracks follow in the order in which they were first used.
TRACKS = ("predict", "group", "compute", "stall", "link")
_COLOURS = {
    "predict": "#8c6bb1",
    "group": "#dd9933",
    "compute": "#3b7dd8",
    "stall": "#d64541",
    "link": "#4c9f70",
}
_OTHER_COLOUR = "#888888"
_MOST_SPANS = 200_000  # some 40 MB
_STEPS_DRAWN = 3


class Span(NamedTuple):
    """Seconds of the clock."""

    track: str
    name: str
    begin: float
    end: float
    detail: dict[str, Any]


class Timeline:
    """Spans of a run, the last `most` of them. Thread-safe."""

    def __init__(self, most: int = _MOST_SPANS, clock: Callable[[], float] = time.perf_counter):
        self.clock = clock
        self._spans: deque[Span] = deque(maxlen=most)

    @property
    def spans(self) -> list[Span]:
        return list(self._spans)

    def add(self, track: str, name: str, begin: float, end: float, **detail: Any) -> None:
        self._spans.append(Span(track, name, begin, end, detail))  # atomic

    @contextmanager
    def span(self, track: str, name: str, **detail: Any) -> Iterator[None]:
        """Keep the time of a block, also of one that fails."""
        begin = self.clock()
        try:
            yield
        finally:
            self.add(track, name, begin, self.clock(), **detail)

    def busy_seconds(self) -> dict[str, float]:
        """By track, the time in which at least one span of it was there."""
        seconds: dict[str, float] = {}
        ends: dict[str, float] = {}
        for span in sorted(self._spans, key=lambda span: span.begin):
            begin = max(span.begin, ends.get(span.track, span.begin))
            seconds[span.track] = seconds.get(span.track, 0.0) + max(0.0, span.end - begin)
            ends[span.track] = max(span.end, begin)
        return seconds

    def save(self, path: Path) -> None:
        """A trace in the Trace Event Format where `path` ends in .json, else a figure (.png, .svg).

        Raises ValueError where nothing was recorded, or matplotlib cannot write such a file.
        """
        spans = self.spans
        if not spans:
            raise ValueError(f"nothing ran, so there is no timeline to write to {path}")
        if path.suffix == ".json":
            write_whole(path, json.dumps(trace_events(spans)))
        else:
            _draw(spans, path)


def trace_events(spans: list[Span]) -> dict[str, Any]:
    """Complete events of one process with a thread per track; microseconds from the first."""
    tracks = tracks_of(spans)
    start = min(span.begin for span in spans)
    events: list[dict[str, Any]] = []
    for number, track in enumerate(tracks):
        common = {"ph": "M", "pid": 1, "tid": number}
        events.append({**common, "name": "thread_name", "args": {"name": track}})
        events.append({**common, "name": "thread_sort_index", "args": {"sort_index": number}})
    for span in spans:
        events.append(
            {
                "ph": "X",
                "pid": 1,
                "tid": tracks.index(span.track),
                "name": span.name,
                "cat": span.track,
                "ts": (span.begin - start) * 1e6,
                "dur": (span.end - span.begin) * 1e6,
                "args": span.detail,
            }
        )
    return {"displayTimeUnit": "ms", "traceEvents": events}


def tracks_of(spans: list[Span]) -> list[str]:
    used = dict.fromkeys(span.track for span in spans)
    return [track for track in TRACKS if track in used] + [track for track in used if track not in TRACKS]


def _draw(spans: list[Span], path: Path) -> None:
    """The last decode steps: of a whole run nothing could be seen."""
    from matplotlib.figure import Figure

    computed = [span for span in spans if span.track == "compute"]
    steps = sorted(computed, key=lambda span: span.begin)[-_STEPS_DRAWN:]
    start = min((span.begin for span in steps), default=min(span.begin for span in spans))
    shown = [span for span in spans if span.end > start]
    tracks = tracks_of(shown)
    figure = Figure(figsize=(11, 1.2 + 0.55 * len(tracks)), layout="constrained")
    axes = figure.subplots()
    for row, track in enumerate(tracks):
        bars = [
            ((max(span.begin, start) - start) * 1e3, (span.end - max(span.begin, start)) * 1e3)
            for span in shown
            if span.track == track
        ]
        axes.broken_barh(
            bars,
            (row - 0.4, 0.8),
            facecolors=_COLOURS.get(track, _OTHER_COLOUR),
            edgecolor="white" if track == "compute" else "none",  # a border would hide what is short
        )
    for span in steps:
        middle = ((max(span.begin, start) + span.end) / 2 - start) * 1e3
        axes.text(
            middle, tracks.index("compute"), span.name, ha="center", va="center", color="white", fontsize=8
        )
    axes.set(yticks=range(len(tracks)), yticklabels=tracks, xlabel="ms", title=f"the last {len(steps)} steps")
    axes.invert_yaxis()
    try:
        figure.savefig(path, dpi=120)
    except ValueError as error:
        raise ValueError(
            f"cannot draw the timeline to {path}: {error}; name it FILE.png, .svg or .json"
        ) from None
