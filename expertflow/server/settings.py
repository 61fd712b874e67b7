"""What a server is told: where it listens, who may ask, and how much. Flags are generated from it.

Values and their checks; nothing is opened here but the file of keys.
"""

from __future__ import annotations

import ipaddress
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from expertflow.config import parse_bytes, setting

KEY_VARIABLE = "EXPERTFLOW_API_KEY"


@dataclass(frozen=True)
class ServerSettings:
    """Immutable; wrong values raise ValueError with the remedy. Keys in a file or in the environment: `with_keys`."""

    host: str = setting("127.0.0.1", "address to listen at; any other than loopback needs a key")
    port: int = setting(8000, "port to listen at; 0 takes a free one")
    api_key: Iterable[str] = setting(
        (), f"a key that clients must give; seen in `ps`, so rather --api-key-file or {KEY_VARIABLE}"
    )
    api_key_file: str | None = setting(None, "a file with a key in each line")
    allowed_host: Iterable[str] = setting((), "another name under which clients address this server")
    served_model_name: str | None = setting(
        None, "what clients call the model; default: the last part of MODEL if it is a folder, else MODEL"
    )
    queue: int = setting(64, "answers that may wait for a place; further requests get status 429")
    deadline_seconds: float = setting(600.0, "a request that takes longer is ended")
    drain_seconds: float = setting(
        60.0, "after SIGTERM: time in which running requests may end; a second signal ends them at once"
    )
    max_body: str | int = setting("1MiB", "the largest request")
    max_prompts: int = setting(64, "prompts in one request for completions")
    write_seconds: float = setting(30.0, "a client that takes no byte for so long is given up")
    viewers: int = setting(16, "how many may watch the live page at once")

    def __post_init__(self) -> None:
        for name in ("api_key", "allowed_host"):
            given = getattr(self, name)
            object.__setattr__(self, name, (given,) if isinstance(given, str) else tuple(given or ()))
        if not self.host:
            raise ValueError("host is empty; give an address such as 127.0.0.1")
        for name, least, most in (
            ("port", 0, 65535),
            ("queue", 0, 1_000_000),
            ("max_prompts", 1, 10_000),
            ("viewers", 0, 10_000),
        ):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
                raise ValueError(f"{name}={value!r} must be a whole number from {least} to {most}")
        for name in ("deadline_seconds", "drain_seconds", "write_seconds"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
                raise ValueError(f"{name}={value!r} must be a number of seconds above 0")
        parse_bytes(self.max_body, "max_body")
        for key in self.api_key:
            _check_key(key, "api_key")

    @property
    def max_body_bytes(self) -> int:
        return parse_bytes(self.max_body, "max_body")

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can reach the address. A name other than localhost counts as public."""
        try:
            return ipaddress.ip_address(self.host.strip("[]")).is_loopback
        except ValueError:
            return self.host.lower() == "localhost"

    def with_keys(self, environment: Mapping[str, str]) -> ServerSettings:
        """The same with the keys of the file and of the environment. Raises OSError when the file cannot be read.

        ValueError for an empty file, and for a public address without a key.
        """
        keys = list(self.api_key)
        if self.api_key_file is not None:
            found = Path(self.api_key_file).expanduser().read_text(encoding="utf-8").split()
            if not found:
                raise ValueError(
                    f"api_key_file={self.api_key_file!r} has no key; write one into each line of it"
                )
            keys += found
        keys += environment.get(KEY_VARIABLE, "").split()
        for key in keys:
            _check_key(key, f"a key of {KEY_VARIABLE} or api_key_file")
        settled = replace(self, api_key=tuple(dict.fromkeys(keys)), api_key_file=None)
        if not settled.api_key and not settled.is_loopback:
            raise ValueError(
                f"host={self.host!r} can be reached by others, and no key is set: anybody could use the model. Set "
                f"{KEY_VARIABLE}, or give --api-key-file FILE; or listen at 127.0.0.1 and use an SSH tunnel"
            )
        return settled


def _check_key(key: object, where: str) -> None:
    """The key itself is in no message: messages go into logs."""
    if not isinstance(key, str) or not key or not key.isascii() or not key.isprintable() or " " in key:
        raise ValueError(f"{where} must be printable ASCII without spaces, of at least one character")
