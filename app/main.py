"""Puts the application together."""

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI

from app import __version__, errors
from app.middleware import Envelope
from app.routes import explain, health, models, page, samples
from app.schemas import ProblemDocument
from app.service import Service
from app.settings import Settings

DESCRIPTION = """Relevance heatmaps (LRP) for trained image networks with normalization layers.

The shortest call: `curl --data-binary @cat.jpg http://127.0.0.1:8000/v1/explain -o heatmap.png`

Errors are RFC 9457 problem documents (`application/problem+json`) that say what to do."""


class Api(FastAPI):
    """An application whose OpenAPI document also has what the operations refer to by hand."""

    def openapi(self) -> dict[str, Any]:
        document = super().openapi()
        schemas = document.setdefault("components", {}).setdefault("schemas", {})
        schemas.setdefault(ProblemDocument.__name__, ProblemDocument.model_json_schema())
        return document


def create_app(settings: Settings | None = None) -> FastAPI:
    """The application; it opens its store when it starts, and not before."""
    chosen = settings or Settings()

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service = Service(chosen)
        app.state.service = service
        service.start()
        try:
            yield
        finally:
            await service.stop()

    # No documentation pages: theirs load scripts from elsewhere.
    app = Api(
        title="Clearfold",
        version=__version__,
        description=DESCRIPTION,
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
    )
    errors.install(app)
    for module in (explain, models, samples, health):
        app.include_router(module.router)
    page.install(app)
    app.add_middleware(Envelope)
    logging.getLogger("app").setLevel(chosen.log_level.upper())
    return app
