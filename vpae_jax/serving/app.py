"""The HTTP side: one page, its script, and the few addresses that the script talks to.

    GET  /                  the page; until all models are ready, a line that says what is going on (status 503)
    POST /images            bytes of an image file -> {"image": NAME, "height": H, "width": W}
    POST /requests          JSON (`limits.parse_request`) -> {"request": NAME}
    GET  /requests/NAME     where it stands (`JobQueue.look_up`)
    GET  /clips/NAME.mp4    a clip

What goes wrong is {"error": LINE} with a status of 4xx, or 503 if the queue is full or the models are not ready.
"""

from __future__ import annotations

import importlib.resources
from collections.abc import Awaitable, Callable
from functools import wraps
from http import HTTPStatus
from pathlib import Path
from tempfile import TemporaryDirectory

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, HTMLResponse, JSONResponse, Response
from starlette.routing import Route

from vpae_jax.flow.sampler import typed
from vpae_jax.media import Picture
from vpae_jax.pages import page_template
from vpae_jax.serving import limits
from vpae_jax.serving.access import Access, own_names
from vpae_jax.serving.jobs import Full
from vpae_jax.serving.worker import Ready, Worker
from vpae_jax.types import UserError

Endpoint = Callable[[Request], Awaitable[Response]]


class NotReady(UserError):
    """The models are still being loaded."""


def make_app(worker: Worker, bound: str, example: str = "") -> Starlette:
    """The application.

    Args:
      worker: what makes the clips.
      bound: the address that the server is bound to.
      example: prompt that the page begins with.
    """
    pages = Pages(worker, example)
    routes = [
        Route("/", pages.page),
        Route("/serve.js", pages.script),
        Route("/images", _in_lines(pages.add_image), methods=["POST"]),
        Route("/requests", _in_lines(pages.add_request), methods=["POST"]),
        Route("/requests/{name}", pages.request),
        Route("/clips/{name}.mp4", pages.clip),
    ]
    access = Middleware(Access, bound=bound, names=own_names())
    return Starlette(routes=routes, middleware=[access], exception_handlers={HTTPException: _failed})


class Pages:
    """The answers; for arguments see `make_app`."""

    def __init__(self, worker: Worker, example: str) -> None:
        self.worker, self.example = worker, example
        self._script = (importlib.resources.files("vpae_jax") / "assets" / "serve.js").read_bytes()

    async def page(self, request: Request) -> Response:
        """The page, or how far loading is."""
        if (ready := self.worker.ready) is None:
            text = page_template("serve_loading.html.jinja").render(doing=self.worker.doing)
            return HTMLResponse(text, HTTPStatus.SERVICE_UNAVAILABLE, {"Retry-After": "1"})
        return HTMLResponse(render(ready, self.example))

    async def script(self, request: Request) -> Response:
        """The page's script."""
        return Response(self._script, media_type="text/javascript")

    async def add_image(self, request: Request) -> Response:
        """Keeps an uploaded first frame."""
        models = self._ready().models
        if not any(model.takes_image for model in models):
            raise UserError("image: no model here takes a first frame; ask for a clip without one")
        content = await _body(request, limits.MAX_IMAGE_BYTES, "image")

        def read() -> Picture:
            with TemporaryDirectory(prefix="vpae_jax-") as folder:
                file = Path(folder) / "upload"
                file.write_bytes(content)
                return limits.read_upload(file, models)

        picture = await run_in_threadpool(read)
        height, width, _ = picture.shape
        name = self.worker.images.add(picture, picture.nbytes)
        return JSONResponse({"image": name, "height": height, "width": width}, HTTPStatus.CREATED)

    async def add_request(self, request: Request) -> Response:
        """Queues a request."""
        models = self._ready().models
        asked = limits.parse_request(await _body(request, limits.MAX_BODY, "the request"), models)
        if asked.image is not None and self.worker.images.get(asked.image) is None:
            raise UserError("image is not on the server any more; upload it again")
        return JSONResponse({"request": self.worker.queue.add(asked).name}, HTTPStatus.ACCEPTED)

    async def request(self, request: Request) -> Response:
        """Where a request stands."""
        found = self.worker.queue.look_up(request.path_params["name"])
        if found is None:
            raise HTTPException(HTTPStatus.NOT_FOUND, "the request is unknown, or too old; ask again")
        return JSONResponse(found)

    async def clip(self, request: Request) -> Response:
        """A clip's file, or the part of it that a player asks for."""
        file = self.worker.clips.file(request.path_params["name"])
        if file is None:
            raise HTTPException(HTTPStatus.NOT_FOUND, "the clip is unknown, or too old; make it again")
        return FileResponse(file, media_type="video/mp4")

    def _ready(self) -> Ready:
        if self.worker.ready is None:
            raise NotReady(f"the models are not ready yet ({self.worker.doing}); try again in a moment")
        return self.worker.ready


def render(ready: Ready, example: str) -> str:
    """The page."""
    panels = [
        {
            "name": model.name,
            "steps": typed(model.sampler.asked),
            "guidance": f"{model.sampler.guidance:g}",
            "takes_image": model.takes_image,
        }
        for model in ready.models
    ]
    return page_template("serve.html.jinja").render(
        panels=panels,
        typing=ready.typing,
        decision=ready.decision,
        takes_image=any(model.takes_image for model in ready.models),
        example=example,
        limits={"prompt": limits.MAX_PROMPT, "image_bytes": limits.MAX_IMAGE_BYTES},
    )


async def _body(request: Request, most: int, what: str) -> bytes:
    """A request's body. Raises `TooLarge` before more than `most` bytes are read."""
    content = bytearray()
    async for chunk in request.stream():
        content += chunk
        if len(content) > most:
            raise limits.TooLarge(f"{what} has more than {most} bytes; send less")
    return bytes(content)


def _in_lines(endpoint: Endpoint) -> Endpoint:
    """An endpoint whose `UserError` is an answer of one line."""

    @wraps(endpoint)
    async def answer(request: Request) -> Response:
        try:
            return await endpoint(request)
        except (Full, NotReady) as error:
            return _line(error, HTTPStatus.SERVICE_UNAVAILABLE, {"Retry-After": "1"})
        except limits.TooLarge as error:
            return _line(error, HTTPStatus.REQUEST_ENTITY_TOO_LARGE, {"Connection": "close"})
        except UserError as error:
            return _line(error, HTTPStatus.BAD_REQUEST)
        except ClientDisconnect:
            return Response(status_code=HTTPStatus.BAD_REQUEST)

    return answer


def _line(error: UserError, status: HTTPStatus, headers: dict[str, str] | None = None) -> Response:
    return JSONResponse({"error": str(error)}, status, headers)


async def _failed(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return JSONResponse({"error": error.detail}, error.status_code, error.headers)
