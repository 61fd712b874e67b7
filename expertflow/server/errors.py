"""Errors as OpenAI's clients know them: {"error": {"message", "type", "param", "code"}}.

No path and no stack trace: what we did not expect is logged under an id, and the answer has the id.
"""

from __future__ import annotations

import logging
import re
import uuid
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError
from starlette.responses import JSONResponse

logger = logging.getLogger(__name__)

_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
_LONGEST_SHOWN = 60
# Where a value may have several types pydantic lists what each of them lacks; this says it once.
_WANTED = {
    "prompt": "must be text, a list of texts, a list of token ids, or a list of such lists, and none of them empty",
    "stop": "must be text or a list of at most 16 texts, each of 1 to 1000 characters",
    "content": 'must be text, or a list of {"type": "text", "text": "..."}',
}


class APIError(Exception):
    """What a client is told. param: the name of the parameter that is wrong, if one is."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.headers = dict(headers or {})

    @property
    def body(self) -> dict[str, Any]:
        default = "server_error" if self.status >= 500 else "invalid_request_error"
        kind = _TYPES.get(self.status, default)
        return {
            "error": {"message": self.message, "type": kind, "param": self.param, "code": self.code},
        }

    def response(self) -> JSONResponse:
        return JSONResponse(self.body, self.status, headers=self.headers)


def unexpected(error: BaseException, doing: str) -> APIError:
    """For the client an id; for the log all there is under that id."""
    number = uuid.uuid4().hex[:12]
    logger.error("error %s while %s", number, doing, exc_info=error)
    return APIError(
        500,
        f"the server failed at this request; its log says why under id {number}. Report that if it happens again",
        code="internal_error",
    )


def refused_value(error: ValueError, param: str | None = None) -> APIError:
    """For what the engine refuses: its message names value, limit and remedy."""
    message = str(error).replace("prompt 0 ", "the prompt ", 1)
    if "does not fit the context" in message:
        return APIError(400, message, param=param, code="context_length_exceeded")
    return APIError(400, message, param=param or _first_name(message), code="invalid_value")


def _first_name(message: str) -> str | None:
    """Of a message such as "top_p=2 must be ..." or "logit_bias of token 9 is ...": what it is about."""
    found = re.match(r"([a-z_]+)(=| of token )", message)
    return found[1] if found else None


def malformed(error: ValidationError) -> APIError:
    """Of the first thing that is wrong with a body."""
    problem = error.errors(include_url=False, include_context=False)[0]
    kind, where = problem["type"], problem["loc"]
    if kind == "json_invalid":
        reason = problem["msg"].removeprefix("Invalid JSON: ")
        return APIError(
            400, f"the body is not valid JSON ({reason}); send one JSON object", code="invalid_json"
        )
    if not where:
        return APIError(400, f"{problem['msg']}; send one JSON object", code="invalid_type")
    names = [part for part in where if isinstance(part, int) or str(part).isidentifier()]
    param = _dotted(names)
    if kind == "extra_forbidden":
        message, code = f"{param} is not supported by this server; leave it out", "unsupported_parameter"
    elif kind == "missing":
        message, code = f"{param} is missing; give it", "missing_parameter"
    elif kind == "none_required":
        message, code = f"{param} is not supported by this server; leave it out", "unsupported_parameter"
    else:
        union = next((str(name) for name in names if name in _WANTED), None)
        if union is not None:
            names = names[: names.index(union) + 1]
            param, wanted = _dotted(names), _WANTED[union]
        else:
            wanted = problem["msg"][:1].lower() + problem["msg"][1:]
        got = repr(problem["input"])
        got = got if len(got) <= _LONGEST_SHOWN else got[: _LONGEST_SHOWN - 3] + "..."
        message, code = f"{param}: {wanted} (got {got})", "invalid_value"
    return APIError(400, message, param=param, code=code)


def _dotted(names: list[Any]) -> str:
    """messages[0].content, as OpenAI writes it."""
    text = ""
    for name in names:
        text += f"[{name}]" if isinstance(name, int) else f".{name}" if text else str(name)
    return text
