"""A page on this machine alone, on which a person compares two answers: `internlm2 annotate`.

It listens on the loopback address, answers only to its own name, takes no label without the token
of its own page, and shows answers as text, whatever they contain.
"""

from __future__ import annotations

import secrets
import sys
import urllib.parse
from pathlib import Path
from typing import Any

import click

from internlm2_jax.data.preferences import DOMAINS
from internlm2_jax.errors import UserError
from internlm2_jax.rlhf.annotation import Comparisons

HOST = "127.0.0.1"
_LONGEST = 4096  # bytes of a form


def app(comparisons: Comparisons, by: str = "person") -> Any:
    """The page as an ASGI application."""
    import jinja2
    from starlette.applications import Starlette
    from starlette.middleware import Middleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware
    from starlette.requests import Request
    from starlette.responses import HTMLResponse, PlainTextResponse, RedirectResponse, Response
    from starlette.routing import Route

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("internlm2_jax.rlhf", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
    )
    page, token = environment.get_template("annotate.html"), secrets.token_urlsafe(16)
    headers = {
        "content-security-policy": "default-src 'none'; style-src 'unsafe-inline'; "
        "form-action 'self'; frame-ancestors 'none'",
        "cache-control": "no-store",
    }

    def shown(row: dict[str, Any] | None) -> Response:
        labels = comparisons.labels()
        numbers = [r["id"] for r in comparisons.rows]
        at = numbers.index(row["id"]) if row else len(numbers)
        text = page.render(
            row=row,
            token=token,
            done=len(labels),
            total=len(numbers),
            guide=DOMAINS.get(row["domain"], "") if row else "",
            winner=labels[row["id"]]["winner"] if row and row["id"] in labels else "",
            before=numbers[at - 1] if at else "",
        )
        return HTMLResponse(text, headers=headers)

    async def following(request: Request) -> Response:
        labels = comparisons.labels()
        left = (row for row in comparisons.rows if row["id"] not in labels)
        return shown(next(left, None))

    async def one(request: Request) -> Response:
        number = request.path_params["number"]
        found = [row for row in comparisons.rows if row["id"] == number]
        return shown(found[0]) if found else PlainTextResponse("no such comparison", 404)

    async def label(request: Request) -> Response:
        body = b""
        async for part in request.stream():
            body += part
            if len(body) > _LONGEST:
                return PlainTextResponse("too long", 413)
        form = dict(urllib.parse.parse_qsl(body.decode("utf-8", "replace")))
        if not secrets.compare_digest(form.get("token", "").encode(), token.encode()):
            return PlainTextResponse("this page is of an earlier start; load it again", 403)
        try:
            comparisons.label(form.get("id", ""), form.get("winner", ""), by)
        except UserError as error:
            return PlainTextResponse(str(error), 400)
        return RedirectResponse("/", 303)

    return Starlette(
        routes=[
            Route("/", following),
            Route("/pair/{number}", one),
            Route("/label", label, methods=["POST"]),
        ],
        middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=[HOST, "localhost"])],
    )


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--port", default=8077, show_default=True)
@click.option("--name", default="person", show_default=True, help="Whose labels they are.")
def annotate(folder: Path, port: int, name: str) -> None:
    """Compare answers in a browser: FOLDER is `annotation` of a round, or the round itself.

    Only this machine can open the page. Every label is a file of its own in FOLDER/labels; the
    next round's reward model takes those that are there when it starts.
    """
    try:
        import uvicorn
    except ImportError as error:
        raise UserError(
            f"the serve extra is not installed ({error}): pip install 'internlm2-jax[serve]'"
        ) from error
    inner = folder / "annotation"
    comparisons = Comparisons(inner if inner.is_dir() else folder)
    left = len(comparisons.rows) - len(comparisons.labels())
    click.echo(f"{left} comparisons to make: http://{HOST}:{port} (Ctrl-C ends it)", err=True)
    sys.stderr.flush()
    uvicorn.run(app(comparisons, name), host=HOST, port=port, log_level="warning")
