from __future__ import annotations

import signal

# A shell that starts tests in the background has them ignore SIGINT, and Python then raises no KeyboardInterrupt:
# the tests of Ctrl-C would fail for that reason alone.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
