"""Does prefetching pay, does grouping? A gate that tries it with and without in turn, and keeps to what was faster.

A prefetch can lose: its bytes compete with demands, its prediction takes time. So can a grouping: it has to be found
on processors that compute meanwhile, and parts batches that shared what the cache held. What counts is the seconds of
a pass (of a step of a unit), in which all that is contained. Decides only: whoever asks keeps the time.
"""

from __future__ import annotations

from statistics import median

# Passes. The first of a window still feel what the window before left in the cache.
LEARNING = (
    32  # with prefetching, before the first trial: predictors that learn while serving know nothing at first
)
WINDOW, SETTLING = 10, 3
# Pairs, so that a disturbance in one of them decides nothing. What was decided comes first: where rows come and go,
# trials begin anew again and again, and few passes then do otherwise.
WINDOWS = ("decided", "other", "decided", "other")
HOLD, LONGEST_HOLD = 256, 4096  # between trials; doubled each time that one changes nothing
MARGIN = 0.02  # by which the other way must be faster: less is chance
ALIKE = 1.25  # passes are compared where one has at most so many times the rows of the other


class PayoffGate:
    """Ask `open` before a pass, tell `passed` after it; `reason` says in words how it stands."""

    def __init__(self, what: str = "prefetching", during: tuple[str, str] = ("pass", "passes")) -> None:
        """For `reason`: what is done or left, and during what, one and many, whose seconds are told."""
        self._what, self._during = what, during
        self.on = True  # what was decided; a trial may do otherwise
        self.reason = "on: nothing measured yet"
        self.switches = 0
        self._wait, self._hold = LEARNING, HOLD  # passes until the next trial; and after that one
        self._passes = 0
        self._rows: int | None = None  # of the pass with which the trial began
        self._unlike = 0  # passes with other rows in this window
        self._window: int | None = None  # of WINDOWS; None: no trial
        self._in_window = 0
        self._seconds: list[list[float]] = [[] for _ in WINDOWS]

    @property
    def open(self) -> bool:
        """Whether the next pass is to prefetch."""
        return self.on if self._window is None else self.on == (WINDOWS[self._window] == "decided")

    @property
    def trying(self) -> bool:
        """Whether passes with and without are being compared: nothing else should change meanwhile."""
        return self._window is not None

    def passed(self, seconds: float, rows: int) -> None:
        """A pass is over. rows: of its batch; passes of very different size are not compared."""
        self._passes += 1
        if self._window is None:
            self._wait -= 1
            if self._wait <= 0:
                self._begin_trial(rows)
            return
        assert self._rows is not None, "a trial has begun"
        if max(rows, self._rows) > ALIKE * min(rows, self._rows):
            self._unlike += 1
            if self._unlike == WINDOW:  # the batch has another size now
                self._begin_trial(rows)
            return
        self._in_window += 1
        if self._in_window > SETTLING:
            self._seconds[self._window].append(seconds)
        if self._in_window == WINDOW:
            self._in_window = self._unlike = 0
            self._window += 1
            if self._window == len(WINDOWS):
                self._decide()

    def _begin_trial(self, rows: int) -> None:
        self._rows, self._window, self._in_window, self._unlike = rows, 0, 0, 0
        self._seconds = [[] for _ in WINDOWS]

    def _decide(self) -> None:
        medians = [median(seconds) for seconds in self._seconds]
        decided, other = medians[::2], medians[1::2]
        with_and_without = (decided, other) if self.on else (other, decided)
        pairs = list(zip(*with_and_without, strict=True))
        if self.on:
            on = any(with_it <= without * (1 + MARGIN) for with_it, without in pairs)
        else:
            on = all(with_it < without * (1 - MARGIN) for with_it, without in pairs)
        with_it, without = (sum(each) / len(pairs) for each in zip(*pairs, strict=True))
        self._hold = min(2 * self._hold, LONGEST_HOLD) if on == self.on else HOLD
        self.switches += on != self.on
        self.on, self._window, self._wait = on, None, self._hold
        self.reason = (
            f"{'on' if on else 'off'}: {_ms(with_it)} per {self._during[0]} with {self._what}, "
            f"{_ms(without)} without ({self._rows} row{'s' if self._rows != 1 else ''}, after "
            f"{self._passes} {self._during[1]})"
        )


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.{0 if seconds >= 0.1 else 1 if seconds >= 0.01 else 2}f} ms"


class AlwaysOpen(PayoffGate):
    """For measuring what predictions do, where a gate that tries both ways would be part of neither."""

    def passed(self, seconds: float, rows: int) -> None:
        pass
