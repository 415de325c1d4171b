"""GET / and /web/...: the built-in page. Its files say nothing of the server and need no key; what they ask does."""

from __future__ import annotations

from pathlib import Path

from fastapi import APIRouter
from fastapi.responses import FileResponse

from server.api.errors import ApiError

FOLDER = Path(__file__).resolve().parent.parent / "web"
TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
FILES = frozenset(file.name for file in FOLDER.iterdir() if file.suffix in TYPES)
PATHS = frozenset({"/", *(f"/web/{name}" for name in FILES)})
# Everything comes from this server, nothing is inline; pictures may also be those that the page made itself.
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' blob: data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}

router = APIRouter(include_in_schema=False)


@router.get("/")
async def read_page() -> FileResponse:
    """The page."""
    return send("index.html")


@router.get("/web/{name}")
async def read_file(name: str) -> FileResponse:
    """A file of it. Errors: ApiError 404."""
    if name not in FILES:
        raise ApiError(404, f"There is no file {name!r} here.", code="not_found")
    return send(name)


def send(name: str) -> FileResponse:
    """A file with the headers that all of them carry."""
    return FileResponse(FOLDER / name, media_type=TYPES[Path(name).suffix], headers=HEADERS)
