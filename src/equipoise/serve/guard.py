"""What stands before the application: requests that are too long, or meant for another host."""

from __future__ import annotations

from fastapi.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from equipoise.serve.errors import ApiError


class Guard:
    """ASGI middleware.

    Args:
        app: what follows.
        limit: bytes a body may have.
        hosts: names in the Host header that are let in; None for all. A page in a browser can point a name
            of its own at a loopback address and read the answers; it cannot change the Host header.
    """

    def __init__(self, app: ASGIApp, limit: int, hosts: frozenset[str] | None) -> None:
        self.app, self.limit, self.hosts = app, limit, hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        host = headers.get(b"host", b"").decode("latin-1")
        if self.hosts is not None and _name(host) not in self.hosts:
            error = ApiError(403, f"this server listens on loopback only and is not called {host!r}.")
        elif int(headers.get(b"content-length", b"0")) > self.limit:
            error = self._too_long()
        else:
            await self.app(scope, self._counted(receive), send)
            return
        await JSONResponse(error.body(), error.status_code)(scope, receive, send)

    def _counted(self, receive: Receive) -> Receive:
        seen = 0

        async def counted() -> Message:
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            if seen > self.limit:
                raise self._too_long()
            return message

        return counted

    def _too_long(self) -> ApiError:
        return ApiError(413, f"expected a request of at most {self.limit:,} bytes, got more.")


def _name(host: str) -> str:
    """The host without its port."""
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition(":")[0]
