"""What protects the demo from other web pages: an ASGI middleware in front of Gradio, and bounded uploads."""

import os
import re
import shutil
import tempfile
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout
from starlette.datastructures import Headers
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send
from starlette.websockets import WebSocketClose

LOCAL = ("127.0.0.1", "localhost", "::1")
PREFIX = "igpt-demo-"  # of the private folder of a demo
UPLOAD = "/gradio_api/upload"
# The routes that the page uses. Gradio has more: some start programs, fetch URLs or write other files.
READ = re.compile(
    r"/|/(config|theme\.css|favicon\.ico|manifest\.json|robots\.txt)|/(static|assets|svelte)/.*|"
    r"/gradio_api/(info|app_id|user|login_check|token|startup-events|theme\.css|queue/(data|status)|upload_progress|"
    r"heartbeat/[^/]*|file=/.*)"
)
WRITTEN = re.compile(rf"{UPLOAD}|/gradio_api/(queue/join|cancel|reset)")
JSON_BYTES = 2**20  # most of a request's body that is no upload
MULTIPART_BYTES = 2**16  # of an upload's body, beside the file


class FullError(ValueError):
    """An upload for which there is no room."""


class UploadFolder:
    """The uploaded files: bounded in total bytes and number, removed when older than `seconds`."""

    def __init__(self, path: Path, *, file_bytes: int, total_bytes: int, n_files: int, seconds: float) -> None:
        self.path, self.file_bytes, self.total_bytes = path, file_bytes, total_bytes
        self.n_files, self.seconds = n_files, seconds
        self._arriving: list[int] = []  # bytes of each upload in progress
        path.mkdir(parents=True, exist_ok=True)

    @contextmanager
    def reserve(self, n_bytes: int) -> Iterator[None]:
        """Holds room for a request of `n_bytes` in the block; of more than `n_files`, the oldest are removed after it.

        Raises:
            FullError: no room for it.
        """
        if n_bytes > self.file_bytes + MULTIPART_BYTES:
            raise FullError(f"an upload has at most {self.file_bytes} bytes")
        self.remove_old()
        sizes = [size for _, size, _ in self._files()]
        if sum([*sizes, *self._arriving, n_bytes]) > self.total_bytes:
            raise FullError(f"uploads have at most {self.total_bytes} bytes in total: try again later")
        if len(sizes) + len(self._arriving) >= self.n_files:
            raise FullError(f"at most {self.n_files} uploads are kept: try again later")
        self._arriving.append(n_bytes)
        try:
            yield
        finally:
            self._arriving.remove(n_bytes)
            for *_, file in self._files()[: -self.n_files]:
                file.unlink(missing_ok=True)

    def remove_old(self) -> None:
        """Removes files that were written more than `seconds` ago, and empty folders of that age."""
        self._remove(before=time.time() - self.seconds)

    def remove_all(self) -> None:
        """Removes every file, unless one is arriving: it then goes by its age."""
        if not self._arriving:
            self._remove(before=float("inf"))

    def _remove(self, before: float) -> None:
        for written, _, file in self._files():
            if written < before:
                file.unlink(missing_ok=True)
        for folder in self.path.iterdir():
            with suppress(OSError):  # one with files, or removed by another thread
                if folder.stat().st_mtime < before:
                    folder.rmdir()

    def _files(self) -> list[tuple[float, int, Path]]:
        """(time of writing, bytes, path) of every file, the oldest first."""
        files = []
        for file in self.path.rglob("*"):
            with suppress(FileNotFoundError):  # removed by another thread
                if file.is_file():
                    files.append((file.stat().st_mtime, file.stat().st_size, file))
        return sorted(files)


class RequestGuard:
    """ASGI middleware that answers requests of the page alone: 403 to those of other pages, 413 to large ones.

    Refused are a `Host` at which the page is not served (DNS rebinding), an `Origin` or `Sec-Fetch-Site` of another
    page, and routes that the page does not use. `hosts`: further values of `Host`.
    """

    def __init__(self, app: ASGIApp, *, host: str, hosts: Collection[str], uploads: UploadFolder) -> None:
        self.app, self.uploads = app, uploads
        self.names = (*LOCAL, host)
        self.hosts = {_normalize_host(name) for name in hosts}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
        elif scope["type"] == "websocket":  # the page opens none; this is a 403
            await WebSocketClose()(scope, receive, send)
        elif (reason := self._find_problem(scope)) is not None:
            await PlainTextResponse(f"{reason}\n", 403)(scope, receive, send)
        else:
            await self._pass_on(scope, receive, send)

    def _find_problem(self, scope: Scope) -> str | None:
        """The reason to refuse a request; None if it comes from the page, or opens it."""
        headers = Headers(scope=scope)
        address, port = scope["server"]  # of this end of the connection
        served = {_normalize_host(f"{_bracket_address(name)}:{port}") for name in (*self.names, address)} | self.hosts
        given = headers.getlist("host")
        if len(given) != 1 or (host := _normalize_host(given[0])) not in served:
            return f"The page is not served at {', '.join(given) or 'no host'}: task.allowed_hosts=[…] allows a name."
        origins = {_normalize_host(origin) for origin in headers.getlist("origin")}
        if not origins <= {f"http://{host}", f"https://{host}"}:
            return "Another web page has asked for this."
        if not {*headers.getlist("sec-fetch-site")} <= {"same-origin", "none"}:
            return "Another web page has asked for this: type or paste the address to open the page."
        routes = {"GET": READ, "HEAD": READ, "POST": WRITTEN}.get(scope["method"])
        return None if routes and routes.fullmatch(scope["path"]) else "The page has no such route."

    async def _pass_on(self, scope: Scope, receive: Receive, send: Send) -> None:
        length = Headers(scope=scope).get("content-length", "0" if scope["method"] != "POST" else "")
        if not length.isdecimal():
            await PlainTextResponse("A request states its length.\n", 411)(scope, receive, send)
        elif scope["path"] == UPLOAD:
            try:
                with self.uploads.reserve(int(length)):
                    await self.app(scope, receive, send)
            except FullError as error:
                await PlainTextResponse(f"{error}\n", 413)(scope, receive, send)
        elif int(length) > JSON_BYTES:
            await PlainTextResponse(f"A request has at most {JSON_BYTES} bytes.\n", 413)(scope, receive, send)
        else:
            await self.app(scope, receive, send)


def _bracket_address(name: str) -> str:
    return f"[{name}]" if ":" in name else name


def _normalize_host(host: str) -> str:
    """`Host` or `Origin` in lower case, without HTTP's own port."""
    return host.lower().removesuffix(":80")


@contextmanager
def private_folder() -> Iterator[Path]:
    """A temporary folder of this process, removed at the end; first removes those that killed demos left."""
    for left in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        with suppress(OSError, Timeout):  # another user's, or in use
            if left.lstat().st_uid == os.getuid() and (left / ".lock").is_file():
                with FileLock(left / ".lock", timeout=0):
                    shutil.rmtree(left)
    with tempfile.TemporaryDirectory(prefix=PREFIX) as name, FileLock(Path(name) / ".new"):
        (Path(name) / ".new").rename(Path(name) / ".lock")  # never there without being held
        yield Path(name)
