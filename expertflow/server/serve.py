"""Serving: a socket, the application on it, and how it ends.

SIGTERM and Ctrl-C begin a drain: running and waiting requests end, new ones get 503. A second signal, or the time
limit, ends what is left: its clients are told.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import threading
from collections.abc import Callable
from types import FrameType

import uvicorn

from expertflow.engine.engine import Engine
from expertflow.engine.llm import LLM
from expertflow.server.app import create_app
from expertflow.server.driver import EngineDriver
from expertflow.server.errors import APIError
from expertflow.server.settings import ServerSettings

logger = logging.getLogger(__name__)

_CLOSING_SECONDS = 5  # for answers that are complete to leave
_KEEP_ALIVE_SECONDS = 30
_MOST_REQUEST_LINE = 64 * 1024  # with headers, whose own limit is the guard's


def listening_socket(settings: ServerSettings) -> socket.socket:
    """Bound, so that a port in use is known before a model is loaded; nobody is let in before `serve`.

    Raises OSError with the remedy.
    """
    host = settings.host.strip("[]")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        bound = socket.socket(family, kind, protocol)
        try:
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            bound.bind(address)
        except BaseException:
            bound.close()
            raise
    except OSError as error:
        raise OSError(
            f"cannot listen at {settings.host} port {settings.port} ({error.strerror or error}); give another --port "
            f"(0 takes a free one), or an address of this machine as --host"
        ) from None
    return bound


class DrainingServer(uvicorn.Server):
    """uvicorn's, which ends when the driver has nothing more to do. cut: whether requests were ended before that."""

    def __init__(self, config: uvicorn.Config, driver: EngineDriver, drain_seconds: float):
        super().__init__(config)
        self._driver = driver
        self._drain_seconds = drain_seconds
        self._drain: asyncio.Task[None] | None = None
        self._at_once = asyncio.Event()
        self._asked = 0
        self._serving_loop: asyncio.AbstractEventLoop | None = None
        self.cut = False
        self.ready = threading.Event()  # requests are let in

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self._serving_loop = asyncio.get_running_loop()
        await super().startup(sockets)
        self.ready.set()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A signal came, in the midst of anything."""
        if self._serving_loop is None:  # it has not started
            self.should_exit = True
        else:
            self._serving_loop.call_soon_threadsafe(self.stop)

    def stop(self) -> None:
        """In the loop: the first call drains, the second ends at once."""
        self._asked += 1
        if self._asked > 1:
            self._at_once.set()
        elif self._drain is None:
            self._drain = asyncio.create_task(self._end())

    async def _end(self) -> None:
        driver = self._driver
        driver.draining = True
        logger.info("draining: %d answers are under way; a second signal ends them", driver.outstanding)
        idle = asyncio.create_task(driver.wait_idle(self._drain_seconds))
        hurry = asyncio.create_task(self._at_once.wait())
        await asyncio.wait({idle, hurry}, return_when=asyncio.FIRST_COMPLETED)
        for task in (idle, hurry):
            task.cancel()
        if driver.outstanding:
            self.cut = True
            logger.warning("%d answers were ended before they were complete", driver.outstanding)
            driver.cancel_all(APIError(503, "the server is going down", code="draining"))
        self.config.app.state.live_feed.close()  # type: ignore[union-attr]
        self.should_exit = True


def make_server(llm: LLM, engine: Engine, settings: ServerSettings) -> tuple[DrainingServer, EngineDriver]:
    """All but the socket. settings: with their keys."""
    driver = EngineDriver(llm, engine, most_waiting=settings.queue)
    config = uvicorn.Config(
        create_app(driver, settings),
        http="h11",
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=_KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=_CLOSING_SECONDS,
        h11_max_incomplete_event_size=_MOST_REQUEST_LINE,
    )
    return DrainingServer(config, driver, settings.drain_seconds), driver


def serve(
    llm: LLM,
    engine: Engine,
    settings: ServerSettings,
    bound: socket.socket,
    started: Callable[[str], None] = lambda address: None,
) -> bool:
    """Serve until a signal ends it; True when no request was cut short. In the main thread, for the signals.

    settings: with their keys. bound: of `listening_socket`; closed in the end. started: is told the address.
    """
    server, driver = make_server(llm, engine, settings)
    host, port = bound.getsockname()[:2]

    async def run() -> None:
        running = asyncio.create_task(server.serve([bound]))
        while not server.started and not running.done():
            await asyncio.sleep(0.01)
        if server.started:
            started(f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}")
        await running

    try:
        asyncio.run(run())
    finally:
        driver.close()
        bound.close()
    if driver.died_of is not None:
        raise RuntimeError("the engine's thread ended; see the log") from driver.died_of
    return not server.cut
