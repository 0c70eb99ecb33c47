"""Whether the server lives, whether it can serve, and what its problems mean."""

from fastapi import APIRouter
from starlette.responses import JSONResponse

from app.problems import KINDS, Problem, busy
from app.routes import problems
from app.schemas import Health, Readiness, Sandbox
from app.service import Serving

router = APIRouter(tags=["health"])


@router.get("/healthz", summary="The process lives", responses=problems())
async def healthz() -> Health:
    return Health(status="ok")


@router.get(
    "/readyz", summary="The default network is ready to explain", responses=problems("model-not-ready")
)
async def readyz(service: Serving) -> Readiness:
    if service.trouble:
        raise busy(5, service.trouble, "model-not-ready")
    confined = service.sandbox
    return Readiness(status="ready", sandbox=Sandbox(**confined.model_dump()) if confined else None)


@router.get(
    "/problems/{code}",
    summary="What a problem's type means",
    responses=problems("not-found", "invalid-parameter"),
)
async def problem(code: str) -> JSONResponse:
    if code not in KINDS:
        raise Problem("not-found", f"No problem is called {code[:80]!r}.")
    kind = KINDS[code]
    return JSONResponse({"type": f"/problems/{code}", "title": kind.title, "status": kind.status})
