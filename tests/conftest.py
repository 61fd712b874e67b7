from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest
import torch

# A shell that starts tests in the background has them ignore SIGINT, and Python then raises no KeyboardInterrupt:
# the tests of Ctrl-C would fail for that reason alone.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def _as_many_threads_as_before() -> Iterator[None]:
    """Benchmarks choose their number, and on some processors the last bits of a product depend on it."""
    before = torch.get_num_threads()
    yield
    if torch.get_num_threads() != before:
        torch.set_num_threads(before)
