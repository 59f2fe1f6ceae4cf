"""The gateway's web page, /playground: three files that use its API and nothing from elsewhere."""

from pathlib import Path

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.responses import RedirectResponse, Response

from serving.state import GatewayState

FOLDER = Path(__file__).parent
TYPES = {".html": "text/html", ".js": "text/javascript", ".css": "text/css"}

# Scripts and styles from here only, none written in the page; no text is ever made into HTML
# ("trusted types" make the browser refuse it); nobody may frame the page to catch clicks.
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types 'none'"
)
HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}


def add_playground(app: FastAPI, state: GatewayState) -> None:
    """Serve the page while the configuration says `playground: true`, and send / there."""
    files = {f.name: f.read_bytes() for f in FOLDER.iterdir() if f.suffix in TYPES}

    def file(name: str) -> Response:
        if not state.config.playground or name not in files:
            raise HTTPException(404)
        kind = TYPES[Path(name).suffix]
        return Response(files[name], headers=HEADERS, media_type=kind)

    @app.get("/", include_in_schema=False)
    async def root() -> Response:
        """Redirect to the page: the gateway has nothing else here."""
        if not state.config.playground:
            raise HTTPException(404)
        return RedirectResponse("playground")  # relative: a proxy may serve this under a path

    @app.get("/playground", include_in_schema=False)
    async def page() -> Response:
        """Return the page."""
        return file("index.html")

    @app.get("/playground/{name}", include_in_schema=False)
    async def part(name: str) -> Response:
        """Return a script or the style sheet."""
        return file(name)
