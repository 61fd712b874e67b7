"""`expertflow serve` in a process of its own, and what tests do on its page."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import urllib.request
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[3]


class Served:
    """`expertflow serve` with the embedded model, on a port that stays its own through restarts."""

    def __init__(self, *flags: str, key: str | None = None):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.address = f"http://127.0.0.1:{self.port}"
        self._flags = flags
        self._environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        self._environment.pop("EXPERTFLOW_API_KEY", None)
        if key is not None:
            self._environment["EXPERTFLOW_API_KEY"] = key
        self.start()

    def start(self) -> None:
        """Returns when it serves."""
        model = str(ROOT / "models" / "tiny-moe")
        command = [sys.executable, "-m", "expertflow.cli", "serve", model, "--port", str(self.port)]
        command += ["--cache-size", "8", "--context", "512", "--predictor", "online", *self._flags]
        self._process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=self._environment)
        assert self._process.stderr is not None
        said = []
        for line in self._process.stderr:
            said.append(line)
            if line.startswith("serving "):
                # What it logs is read, or it would wait for that one day.
                threading.Thread(target=self._process.stderr.read, daemon=True).start()
                return
        raise AssertionError("it did not start: " + "".join(said))

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()

    def stats(self) -> Any:
        with urllib.request.urlopen(f"{self.address}/stats", timeout=60) as response:
            return json.load(response)


def lengthen(page: Any, **changes: Any) -> None:
    """The page's requests as they are, but for these parameters: answers without an end to stop."""

    def change(route: Any) -> None:
        route.continue_(post_data=json.dumps({**route.request.post_data_json, **changes}))

    page.route("**/v1/*completions", change)
    page.route("**/v1/chat/completions", change)


def ask(page: Any, text: str) -> Any:
    """The answer's element."""
    page.get_by_role("textbox", name="Message", exact=True).fill(text)
    page.get_by_role("button", name="Send").click()
    return page.locator(".message.assistant").last
