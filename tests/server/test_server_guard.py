"""Who may ask: keys, names, origins, sizes; what every answer carries and what none does."""

from __future__ import annotations

import base64
import hmac
import socket
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

from expertflow import LLM
from expertflow.server.guard import MOST_HEADER_BYTES
from expertflow.server.serve import listening_socket
from expertflow.server.settings import KEY_VARIABLE, ServerSettings
from tests.server.running import Running, running

PATHS = ("/", "/page/page.js", "/live", "/metrics", "/stats", "/v1/models", "/openapi.json", "/nowhere")
KEY, OTHER = "s3cret-key", "another-key"


@pytest.fixture(scope="module")
def locked(llm: LLM) -> Iterator[Running]:
    with running(llm, api_key=(KEY, OTHER), max_body="64KiB", allowed_host="box.lan") as server:
        yield server


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


@pytest.mark.parametrize("path", PATHS)
def test_nothing_but_health_is_there_without_the_key(locked: Running, path: str) -> None:
    for headers in (
        {},
        bearer("wrong"),
        bearer(""),
        bearer(KEY + "x"),
        {"Authorization": KEY},
        {"Authorization": "Basic !"},
    ):
        found = locked.ask(path, headers=headers)
        assert found.status == 401, (path, headers)
        assert found.error["type"] == "authentication_error"
        assert found.error["code"] == ("invalid_api_key" if headers else "missing_api_key")
        assert KEY not in found.body.decode()
        assert "www-authenticate" in found.headers
    assert locked.ask("/v1/completions", {"prompt": "x"}).status == 401
    for path in ("/health", "/health/live", "/health/ready"):
        assert locked.ask(path).status == 200


def test_each_key_opens_as_bearer_and_as_password(locked: Running) -> None:
    for key in (KEY, OTHER):
        assert locked.ask("/v1/models", headers=bearer(key)).status == 200
        password = base64.b64encode(f"me:{key}".encode()).decode()
        assert locked.ask("/stats", headers={"Authorization": f"Basic {password}"}).status == 200
    client = openai.OpenAI(base_url=f"{locked.url}/v1", api_key=KEY, max_retries=0)
    assert client.completions.create(model="chat", prompt="Hello", max_tokens=2).choices
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="wrong").models.list()


def test_a_browser_is_asked_for_the_password(locked: Running) -> None:
    assert locked.ask("/").headers["www-authenticate"].startswith("Basic ")
    assert locked.ask("/v1/models").headers["www-authenticate"] == "Bearer"


def test_keys_are_compared_in_constant_time_all_of_them(
    locked: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Digests of equal length, every key each time, also when the first fits."""
    seen = []

    def compare(one: bytes, other: bytes) -> bool:
        seen.append((len(one), len(other)))
        return one == other

    monkeypatch.setattr(hmac, "compare_digest", compare)
    for key in (KEY, OTHER, "wrong", ""):
        locked.ask("/v1/models", headers=bearer(key))
    assert seen == [(32, 32)] * 8


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("127.0.0.1:{port}", 200),
        ("localhost:{port}", 200),
        ("LOCALHOST", 200),
        ("[::1]:{port}", 200),
        ("box.lan", 200),
        ("192.168.1.7:80", 200),
        ("evil.example", 421),
        ("evil.example:{port}", 421),
        ("127.0.0.1.evil.example", 421),
        ("localhost.evil.example", 421),
        ("evil.example@localhost", 421),
        ("localhost:port", 421),
        ("", 421),
    ],
)
def test_a_foreign_host_is_refused(locked: Running, host: str, status: int) -> None:
    """DNS rebinding: a page's own name, pointed at this machine, comes as Host."""
    found = locked.ask("/v1/models", headers={"Host": host.format(port=locked.port), **bearer(KEY)})
    assert found.status == status
    if status != 200:
        assert "--allowed-host" in found.error["message"]


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Origin": "http://127.0.0.1:{port}"}, 200),
        ({"Origin": "http://127.0.0.1:1"}, 403),
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": "file://"}, 403),
        ({"Origin": "http://[bad"}, 403),
        ({"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "no-cors"}, 403),
        ({"Sec-Fetch-Site": "same-site", "Sec-Fetch-Mode": "cors"}, 403),
        ({"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"}, 200),
        ({"Sec-Fetch-Site": "same-origin", "Sec-Fetch-Mode": "cors"}, 200),
    ],
)
def test_a_page_of_another_site_is_refused(locked: Running, headers: dict[str, str], status: int) -> None:
    sent = {name: value.format(port=locked.port) for name, value in headers.items()}
    found = locked.ask("/v1/models", headers={**sent, **bearer(KEY)})
    assert found.status == status
    if status == 403:
        assert found.error["code"] == "foreign_origin"
        assert "access-control-allow-origin" not in found.headers


def test_bodies_have_a_limit_announced_or_not(locked: Running) -> None:
    large = b'{"prompt": "' + b"x" * 70_000 + b'"}'
    headers = {"Content-Type": "application/json", **bearer(KEY)}
    found = locked.ask("/v1/completions", large, headers=headers)
    assert found.status == 413
    assert "65536" in found.error["message"]
    with socket.create_connection(("127.0.0.1", locked.port), timeout=30) as sock:
        head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {KEY}\r\n"
        head += "Content-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
        sock.sendall(head.encode() + b"%x\r\n" % len(large) + large + b"\r\n")  # and no end
        assert sock.recv(4096).startswith(b"HTTP/1.1 413 ")


def test_a_body_may_be_as_large_as_its_limit(locked: Running) -> None:
    for nbytes, status in ((65536, 200), (65537, 413)):
        body = b'{"prompt": "Hello", "max_tokens": 1'.ljust(nbytes - 1) + b"}"
        headers = {"Content-Type": "application/json", **bearer(KEY)}
        assert locked.ask("/v1/completions", body, headers=headers).status == status


def test_a_page_of_another_site_does_not_learn_whether_there_is_a_key(locked: Running) -> None:
    for headers, status in (
        ({"Host": "evil.example"}, 421),
        ({"Origin": "http://evil.example"}, 403),
        ({"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "no-cors"}, 403),
    ):
        found = locked.ask("/v1/models", headers=headers)
        assert found.status == status
        assert "www-authenticate" not in found.headers


def test_headers_have_a_limit(locked: Running) -> None:
    found = locked.ask("/health", headers={"X-Large": "x" * MOST_HEADER_BYTES})
    assert found.status == 431
    assert str(MOST_HEADER_BYTES) in found.error["message"]


def test_every_answer_has_the_security_headers(locked: Running) -> None:
    for path, headers in (("/", {}), ("/health", {}), ("/v1/models", bearer(KEY)), ("/nowhere", bearer(KEY))):
        found = locked.ask(path, headers=headers).headers
        assert "default-src 'self'" in found["content-security-policy"]
        assert "unsafe" not in found["content-security-policy"]
        assert found["x-content-type-options"] == "nosniff"
        assert found["x-frame-options"] == "DENY"
        assert found["referrer-policy"] == "no-referrer"
        assert found["cache-control"] == "no-store"
        assert "server" not in found


def test_a_public_address_needs_a_key(tmp_path: Path) -> None:
    for host in ("0.0.0.0", "::", "192.168.1.7", "box.lan", "127.0.0.1.evil.example"):
        with pytest.raises(ValueError, match=KEY_VARIABLE):
            ServerSettings(host=host).with_keys({})
        assert ServerSettings(host=host).with_keys({KEY_VARIABLE: KEY}).api_key == (KEY,)
    for host in ("127.0.0.1", "127.1.2.3", "::1", "localhost"):
        assert ServerSettings(host=host).with_keys({}).api_key == ()


def test_keys_come_from_three_places(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("one\n\ntwo\n")
    found = ServerSettings(api_key="zero", api_key_file=str(file)).with_keys({KEY_VARIABLE: "three"})
    assert found.api_key == ("zero", "one", "two", "three")
    file.write_text("\n")
    with pytest.raises(ValueError, match="has no key"):
        ServerSettings(api_key_file=str(file)).with_keys({})
    with pytest.raises(OSError, match="absent"):
        ServerSettings(api_key_file=str(tmp_path / "absent")).with_keys({})
    with pytest.raises(ValueError, match="printable ASCII") as refused:
        ServerSettings(api_key="sch\u00f6n")
    assert "sch" not in str(refused.value), "the key is in a message that may go to a log"


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"port": 70000}, "port=70000 must be a whole number from 0 to 65535"),
        ({"queue": -1}, "queue=-1"),
        ({"deadline_seconds": 0}, "deadline_seconds=0 must be a number of seconds above 0"),
        ({"max_body": "4"}, "max_body='4' has no unit"),
        ({"host": ""}, "host is empty"),
    ],
)
def test_wrong_settings_are_refused(wrong: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ServerSettings(**wrong)  # type: ignore[arg-type]


def test_a_port_in_use_is_said_with_the_remedy(locked: Running) -> None:
    with pytest.raises(OSError, match=f"port {locked.port} .* another --port"):
        listening_socket(ServerSettings(port=locked.port))
    with pytest.raises(OSError, match=r"cannot listen at 203\.0\.113\.1"):
        listening_socket(ServerSettings(host="203.0.113.1", api_key=KEY))
