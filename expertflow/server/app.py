"""The application: endpoints around one driver, behind the guard. It opens no socket and loads no model."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response

from expertflow import __version__
from expertflow.server.driver import EngineDriver
from expertflow.server.errors import APIError
from expertflow.server.guard import Guard
from expertflow.server.live import LiveFeed, snapshot
from expertflow.server.metrics import EngineCollector
from expertflow.server.openapi import describe
from expertflow.server.settings import ServerSettings
from expertflow.server.streams import EventStream
from expertflow.server.text_endpoints import TextEndpoints

_PAGE = Path(__file__).parent / "page"
_ASSET = re.compile(r"[A-Za-z0-9_-]+\.(css|html|ico|js|png|svg)")
_METRICS_TYPE = "text/plain; version=1.0.0; charset=utf-8"


def create_app(engine_driver: EngineDriver, settings: ServerSettings) -> FastAPI:
    """Endpoints that answer by this driver, which starts and ends with the application.

    settings: keys in a file or in the environment are to be in it already (`ServerSettings.with_keys`).
    """
    driver = engine_driver
    feed = LiveFeed(driver, settings.viewers)
    driver.metrics.registry.register(EngineCollector(driver))

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        driver.start()
        try:
            yield
        finally:
            feed.close()
            driver.close()

    app = FastAPI(
        title="ExpertFlow",
        version=__version__,
        description="Mixture-of-Experts models that do not fit in memory, behind OpenAI's API.",
        docs_url=None,  # they load scripts from elsewhere
        redoc_url=None,
        lifespan=lifespan,
    )
    app.state.live_feed = feed
    app.add_middleware(Guard, settings=settings)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(APIError, _api_error)
    name = settings.served_model_name or served_name(driver.llm.name)
    app.include_router(TextEndpoints(driver, settings, name).router())

    @app.get("/health/live", summary="Whether the process works", tags=["operation"])
    async def live() -> Response:
        return _health(driver.usable, "ok", "the engine has stopped")

    @app.get("/health/ready", summary="Whether a request would be taken", tags=["operation"])
    @app.get("/health", include_in_schema=False)
    async def ready() -> Response:
        why = "going down" if driver.draining else "the engine has stopped"
        return _health(driver.usable and not driver.draining, "ready", why)

    @app.get("/metrics", summary="For Prometheus", tags=["operation"])
    def metrics() -> Response:
        return Response(driver.metrics.expose(), media_type=_METRICS_TYPE)

    @app.get("/stats", summary="The same and more as JSON", tags=["operation"])
    def stats() -> Response:
        return JSONResponse(all_stats(driver))

    @app.get("/live", summary="What the cache does now, as server-sent events", tags=["operation"])
    async def watch() -> Response:
        return EventStream(feed.watch(), lambda: None, settings.write_seconds)

    @app.get("/", include_in_schema=False)
    def page() -> Response:
        return _page_file("index.html")

    @app.get("/page/{file}", include_in_schema=False)
    def asset(file: str) -> Response:
        return _page_file(file)

    describe(app, needs_key=bool(settings.api_key))
    return app


def served_name(model: str) -> str:
    """What clients call a model: of a folder its last part, since a path is nobody's business."""
    folder = Path(model).expanduser()
    return folder.resolve().name if folder.is_dir() else model


def all_stats(driver: EngineDriver) -> dict[str, Any]:
    """Plain JSON of engine, cache, predictor and memory, and what the live view shows."""
    llm = driver.llm
    predicting = llm.experts.predicting
    return {
        "model": served_name(llm.name),
        "engine": driver.engine.stats.to_dict(),
        "cache": llm.experts.cache.observe().stats.to_dict(),
        "predictor": None if predicting is None else predicting.stats.to_dict(),
        "outstanding": driver.outstanding,
        "draining": driver.draining,
        "live": snapshot(driver),
    }


def _health(well: bool, word: str, why_not: str) -> Response:
    return JSONResponse({"status": word if well else why_not}, 200 if well else 503)


def _page_file(name: str) -> Response:
    path = _PAGE / name
    if not _ASSET.fullmatch(name) or not path.is_file():
        raise APIError(404, "the page has no such file; open / instead", code="not_found")
    return FileResponse(path, headers={"Cache-Control": "no-cache"})


async def _api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, APIError), "registered for nothing else"
    return error.response()


async def _http_error(request: Request, error: Exception) -> Response:
    """Of FastAPI itself: no such path, no such method."""
    assert isinstance(error, HTTPException), "registered for nothing else"
    messages = {
        404: f"{request.url.path[:200]} is not here; the endpoints are /v1/models, /v1/completions, "
        f"/v1/chat/completions, /health, /metrics, /stats and /live",
        405: f"{request.method} is not for {request.url.path[:200]}; see /openapi.json",
    }
    message = messages.get(error.status_code, str(error.detail))
    code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code)
    return APIError(error.status_code, message, code=code, headers=error.headers).response()
