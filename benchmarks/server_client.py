"""The client of benchmarks/server.py: streams that are only counted, so that it takes little of the machine.

python -m benchmarks.server_client '{"url": "127.0.0.1:8000", "bodies": [{"prompt": "Hello", "stream": true}]}'
"""

from __future__ import annotations

import asyncio
import json
import random
import sys
import time
from collections import Counter
from typing import Any


async def client(work: dict[str, Any]) -> dict[str, Any]:
    """All streams at once, each to its end; or, with `seconds`, many one after another, some of them badly."""
    host, port = work["url"].split(":")
    began = time.perf_counter()
    if "seconds" not in work:
        ends = await asyncio.gather(*(stream(host, int(port), body) for body in work["bodies"]))
        seconds = time.perf_counter() - began
        if set(ends) != {"whole"}:
            raise RuntimeError(f"a stream ended otherwise: {ends}")
        return {"seconds": seconds}
    until = began + work["seconds"]
    counted: Counter[str] = Counter()

    async def one_after_another(number: int) -> None:
        drawn = random.Random(number)
        while time.perf_counter() < until:
            manner = drawn.choice(("whole", "whole", "left", "slow"))
            try:
                counted[await stream(host, int(port), work["bodies"][number], manner, drawn)] += 1
            except (OSError, RuntimeError) as error:
                counted["errors"] += 1
                print(f"{type(error).__name__}: {error}", file=sys.stderr)

    await asyncio.gather(*(one_after_another(number) for number in range(work["streams"])))
    return {"errors": 0, "seconds": time.perf_counter() - began, **counted}


async def stream(
    host: str, port: int, body: dict[str, Any], manner: str = "whole", drawn: random.Random | None = None
) -> str:
    """One streamed completion, read to its end, left after some events, or read slowly. Returns the manner."""
    reader, writer = await asyncio.open_connection(host, port, limit=2**14 if manner == "slow" else 2**16)
    try:
        sent = json.dumps(body).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}:{port}\r\nContent-Type: application/json\r\n"
        writer.write(f"{head}Connection: close\r\nContent-Length: {len(sent)}\r\n\r\n".encode() + sent)
        status = await reader.readline()
        if b" 200 " not in status:
            raise RuntimeError(status.decode())
        leave_after = drawn.randrange(1, 2000) if manner == "left" and drawn is not None else None
        received, tail = 0, b""
        while part := await reader.read(2**16):
            received += len(part)
            tail = (tail + part)[-64:]
            if leave_after is not None and received > leave_after:
                return manner
            if manner == "slow":
                await asyncio.sleep(0.1)
        if b"data: [DONE]" not in tail:
            raise RuntimeError("the stream broke off")
        return manner
    finally:
        writer.transport.abort()


if __name__ == "__main__":
    print(json.dumps(asyncio.run(client(json.loads(sys.argv[1])))))
