"""Requests made from the server's own schema, right ones and wrong ones: no 500, and all answers fit the schema."""

from __future__ import annotations

from typing import Any

import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import (
    content_type_conformance,
    not_a_server_error,
    response_schema_conformance,
    status_code_conformance,
)

from tests.server.running import WAIT_SECONDS, Running

EXAMPLES = 25
CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]


def shortened(body: Any) -> Any:
    """The same request for a few tokens, where it is one: the test is of requests, not of decoding."""
    if isinstance(body, dict):
        for name in ("max_tokens", "max_completion_tokens"):
            if isinstance(body.get(name), int) and body[name] > 3:
                body[name] = 3
        if isinstance(body.get("n"), int) and body["n"] > 2:
            body["n"] = 2
        if "messages" in body and "max_completion_tokens" not in body:
            body.setdefault("max_tokens", 2)
        if body.get("model") not in (None, "tiny"):
            body["model"] = "tiny"  # else nothing behind the name is ever reached
    return body


@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE])
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_no_request_of_the_schema_breaks_the_server(served: Running, path: str, mode: GenerationMode) -> None:
    schema = schemathesis.openapi.from_dict(served.ask("/openapi.json").json)
    operation = schema[path]["POST"]
    statuses = set()

    @settings(
        max_examples=EXAMPLES,
        deadline=None,
        database=None,
        derandomize=True,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operation.as_strategy(generation_mode=mode))
    def fuzz(case: schemathesis.Case) -> None:
        case.body = shortened(case.body)
        response = case.call(base_url=served.url, timeout=WAIT_SECONDS)
        case.validate_response(response, checks=CHECKS)
        statuses.add(response.status_code)
        if response.status_code != 200:
            assert response.json()["error"].keys() == {"message", "type", "param", "code"}

    fuzz()
    assert any(status >= 400 for status in statuses)
    if mode is GenerationMode.POSITIVE:
        assert 200 in statuses, "no request was right: nothing was tested but refusals"


@pytest.mark.parametrize(
    "path", ["/v1/models", "/health", "/health/ready", "/metrics", "/stats", "/v1/models/tiny"]
)
def test_the_other_endpoints_answer_whatever_the_query(served: Running, path: str) -> None:
    for query in ("", "?x=1", "?" + "a=b&" * 500, "?%00=%ff"):
        assert requests.get(served.url + path + query, timeout=WAIT_SECONDS).status_code == 200
    for method in ("POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE"):
        found = requests.request(method, served.url + path, timeout=WAIT_SECONDS)
        assert found.status_code == 405
        assert found.json()["error"]["code"] == "method_not_allowed"
