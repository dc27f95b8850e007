"""The web server: the page, its files, one WebSocket, uploads and downloads."""

import contextlib
import webbrowser
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import uvicorn
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Mount, Route, WebSocketRoute
from starlette.staticfiles import StaticFiles
from starlette.websockets import WebSocket

from decmem.errors import UserError
from decmem.play.gate import Gate
from decmem.play.line import Line
from decmem.play.lobby import Lobby
from decmem.play.protocol import error_message
from decmem.play.studio import Stopped, Studio

PAGE = Path(__file__).parent / "page"
_SAFE = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
    "Cross-Origin-Resource-Policy": "same-origin",
}


def build_app(studio: Studio, host: str = "127.0.0.1", allowed: tuple[str, ...] = ()) -> Starlette:
    """The application; while it runs, its state holds the `lobby`."""

    @contextlib.asynccontextmanager
    async def life(app: Starlette) -> AsyncIterator[None]:
        app.state.lobby = Lobby(studio)
        try:
            yield
        finally:
            await app.state.lobby.close()

    return Starlette(
        routes=[
            Route("/", _page),
            WebSocketRoute("/ws", _socket),
            Route("/upload", _upload, methods=["POST"]),
            Route("/file/{key}", _file),
            Route("/memory", _memory),
            Mount("/static", StaticFiles(directory=PAGE, check_dir=False)),
        ],
        middleware=[Middleware(Gate, host=host, allowed=allowed)],
        lifespan=life,
    )


async def _page(request: Request) -> Response:
    return FileResponse(PAGE / "index.html", headers=_SAFE)


async def _socket(socket: WebSocket) -> None:
    await socket.accept()
    lobby: Lobby = socket.app.state.lobby
    await lobby.visit(Line(socket, lobby.studio.bounds))


async def _upload(request: Request) -> Response:
    lobby: Lobby = request.app.state.lobby
    limits = lobby.studio.bounds.uploads
    kind = request.query_params.get("kind", "")
    guest = lobby.guests.get(request.query_params.get("session", ""))
    try:
        if kind not in limits:
            raise UserError("kind", f"{kind[:40]!r} is unknown", f"One of {', '.join(limits)}")
        if guest is None:
            raise UserError("session", "unknown", "Connect first, and give the token of hello")
        declared = request.headers.get("content-length", "0")
        if declared.isdigit() and int(declared) > limits[kind]:
            problem = f"{int(declared) / 2**20:.1f} MiB, more than {limits[kind] / 2**20:.0f} MiB"
            raise UserError(kind, problem, "Give a smaller file")
        key = await lobby.parcels.take_in(kind, request.stream(), limits[kind], guest.token)
    except UserError as error:
        return _told(error, 413 if "MiB" in error.problem else 400)
    except ClientDisconnect:
        return Response(status_code=400)
    return JSONResponse({"id": key})


async def _file(request: Request) -> Response:
    lobby: Lobby = request.app.state.lobby
    parcel = lobby.parcels.find(request.path_params["key"])
    if parcel is None or parcel.kind != "file":
        return _told(UserError("file", "no such file", "Save again"), 404)
    return FileResponse(parcel.path, filename=parcel.name, headers=_SAFE)


async def _memory(request: Request) -> Response:
    lobby: Lobby = request.app.state.lobby
    try:
        return JSONResponse(await lobby.holdings(), headers=_SAFE)
    except Stopped:
        return _told(UserError("server", "it stops", "Start it again"), 503)


def _told(error: UserError, status: int) -> Response:
    message = error_message(error)
    message.pop("type")
    return JSONResponse({"error": message}, status_code=status)


def configure(app: Starlette, host: str, port: int) -> uvicorn.Config:
    """How the server runs: one process, its log our own, a close eye on lost connections."""
    return uvicorn.Config(
        app,
        host=host,
        port=port,
        log_level="warning",
        ws="websockets-sansio",
        ws_max_size=2**18,  # larger than any message allowed: what is a little too long is told
        ws_ping_interval=20,
        ws_ping_timeout=20,
        ws_per_message_deflate=False,  # JPEGs do not get smaller
        timeout_graceful_shutdown=3,
    )


def serve(studio: Studio, host: str, port: int, allowed: tuple[str, ...], browser: bool) -> None:
    """Serves until interrupted.

    Raises:
        UserError: when the address cannot be used.
    """
    shown = "localhost" if host in ("127.0.0.1", "0.0.0.0", "::", "::1") else host

    def opened(port: int) -> None:
        url = f"http://{shown}:{port}/"
        print(f"Walk in it: {url}  (Ctrl+C ends it)", flush=True)
        if browser:
            webbrowser.open(url)

    studio.warm_up()
    app = build_app(studio, host, allowed)
    server = Server(app, host, port, opened)
    try:
        server.run()
    except SystemExit as error:
        raise UserError(
            "port", f"{host}:{port} cannot be used", "Choose another --port or --host"
        ) from error


class Server(uvicorn.Server):
    """Says so once the port is open (`opened`), and lets everybody go before it closes: requests
    that wait for a busy worker would be cut off where they stand."""

    def __init__(self, app: Starlette, host: str, port: int, opened: Callable[[int], None]) -> None:
        super().__init__(configure(app, host, port))
        self.app = app
        self.opened = opened

    async def startup(self, sockets=None) -> None:
        await super().startup(sockets)
        if self.started:
            self.opened(self.servers[0].sockets[0].getsockname()[1])

    async def shutdown(self, sockets=None) -> None:
        await self.app.state.lobby.close()
        await super().shutdown(sockets)
