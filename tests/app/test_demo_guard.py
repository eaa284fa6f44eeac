"""Requests to the served page: those of other web pages are refused, uploads are bounded and do not stay."""

import asyncio
import http.client
import os
import random
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast
from urllib.parse import quote, urlsplit

import httpx
import pytest

from igpt.app.demo_guard import FullError, UploadFolder, private_folder
from igpt.app.demo_page import DemoPage, serve
from igpt.app.workbench import MEBIBYTE, Workbench
from tests.app.test_demo import build_uploads, build_workbench, built_demo

EVIL = "http://evil.example"
UPLOAD, JOIN = "/gradio_api/upload", "/gradio_api/queue/join"


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, UploadFolder]]:
    """The page's host:port, and its folder of uploads."""
    state, place = random.getstate(), tmp_path_factory.mktemp("demo")
    bench, uploads = build_workbench(built_demo(place)), build_uploads(place)
    with serve(bench, {}, uploads) as url:
        yield urlsplit(url).netloc, uploads
        bench.stop()
    random.setstate(state)


@pytest.fixture
def client(served: tuple[str, UploadFolder]) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=f"http://{served[0]}", trust_env=False) as client:
        yield client
    for file in files(served[1]):
        file.unlink()


def files(uploads: UploadFolder) -> list[Path]:
    return [path for path in uploads.path.rglob("*") if path.is_file()]


def send_file(client: httpx.Client, data: bytes, **headers: str) -> httpx.Response:
    return client.post(UPLOAD, files={"files": ("a.png", data)}, headers=headers)


FOREIGN: list[dict[str, str]] = [
    {"Host": "evil.example"},
    {"Host": "evil.example:{port}"},
    {"Host": "127.0.0.1"},  # port 80
    {"Host": "127.0.0.1:1"},
    {"Host": "127.0.0.1.evil.example:{port}"},
    {"Host": "192.0.2.1:{port}"},
    {"Host": ""},
    {"Origin": EVIL},
    {"Origin": "null"},
    {"Origin": "http://127.0.0.1:1"},  # another server of this machine
    {"Origin": "http://localhost:{port}"},  # of another name than Host
    {"Host": "evil.example:{port}", "Origin": "http://evil.example:{port}"},
    {"Sec-Fetch-Site": "cross-site"},
    {"Sec-Fetch-Site": "same-site"},
]
OWN: list[dict[str, str]] = [
    {},
    {"Host": "LOCALHOST:{port}"},
    {"Host": "[::1]:{port}"},
    {"Host": "my-tunnel:9000", "Origin": "https://my-tunnel:9000"},  # task.allowed_hosts
    {"Origin": "http://127.0.0.1:{port}", "Sec-Fetch-Site": "same-origin"},
    {"Sec-Fetch-Site": "none"},  # typed
]
ROUTES = [
    ("GET", "/"),
    ("GET", "/config"),
    ("GET", "/theme.css"),
    ("HEAD", "/gradio_api/file={image}"),
    ("GET", "/gradio_api/info"),
    ("GET", "/gradio_api/startup-events"),
    ("GET", "/gradio_api/queue/status"),
    ("GET", "/gradio_api/file={image}"),
    ("POST", UPLOAD),
    ("POST", JOIN),
]
UNUSED = [
    ("POST", "/gradio_api/process_recording"),
    ("POST", "/gradio_api/component_server"),
    ("POST", "/gradio_api/run/predict"),
    ("GET", "/gradio_api/proxy=https://evil.hf.space/"),
    ("GET", "/gradio_api/file=http://evil.example/a.png"),
    ("GET", "/gradio_api/deep_link"),
    ("GET", "/monitoring"),
    ("PUT", "/"),
    ("OPTIONS", "/config"),
]


def test_which_requests_are_answered(client: httpx.Client, served: tuple[str, UploadFolder]) -> None:
    """By hand: every request of another page, or to a route that the page does not use, is a 403 and leaves nothing."""
    port = served[0].partition(":")[2]
    image = client.get("/config").json()["components"]
    path = next(c["props"]["value"][0]["image"]["path"] for c in image if c["type"] == "gallery")
    body: dict[str, Any] = {"files": {"files": ("a.png", b"1")}}

    def answer(method: str, route: str, headers: dict[str, str]) -> httpx.Response:
        content = body if route == UPLOAD else {"json": {"data": []}} if route == JOIN else {}
        headers = {name: value.format(port=port) for name, value in headers.items()}
        return client.request(method, route.format(image=path), headers=headers, **content)

    for headers in FOREIGN:
        for route in [*ROUTES, ("OPTIONS", "/config")]:
            got = answer(*route, headers)
            assert (got.status_code, "access-control-allow-origin" in got.headers) == (403, False), (headers, route)
    assert files(served[1]) == []
    for headers in OWN:
        statuses = [answer(*route, headers).status_code for route in ROUTES]
        assert statuses == [200] * 9 + [400], headers  # the last: a session is missing
        for file in files(served[1]):
            file.unlink()
    for route in UNUSED:
        assert answer(*route, {}).status_code == 403, route


def test_odd_requests(served: tuple[str, UploadFolder]) -> None:
    """By hand: two hosts, a whole address as the path, a WebSocket, a body of unknown length or of a megabyte."""
    host, port = served[0].split(":")

    def send(*lines: str) -> str:
        with socket.create_connection((host, int(port)), timeout=5) as connection:
            connection.sendall("\r\n".join([*lines, "Connection: close", "", ""]).encode())
            return connection.makefile("rb").readline().decode().split()[1]

    own = f"Host: {served[0]}"
    assert send("GET / HTTP/1.1", own) == "200"
    assert send("GET / HTTP/1.1", own, "Host: evil.example") in ("400", "403")
    assert send(f"GET http://{served[0]}/config HTTP/1.1", "Host: evil.example") in ("400", "403")
    assert send("GET / HTTP/1.0") == "403"
    key = "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ=="
    with socket.create_connection((host, int(port)), timeout=5) as connection:
        upgrade = ("Upgrade: websocket", "Connection: Upgrade", key, "Sec-WebSocket-Version: 13", "Origin: " + EVIL)
        connection.sendall("\r\n".join(["GET /gradio_api/queue/join HTTP/1.1", own, *upgrade, "", ""]).encode())
        assert b" 403 " in connection.recv(100)
    chunked = "Transfer-Encoding: chunked"
    assert send(f"POST {UPLOAD} HTTP/1.1", own, "Content-Type: multipart/form-data; boundary=b", chunked) == "411"
    assert send(f"POST {JOIN} HTTP/1.1", own, f"Content-Length: {2**20 + 1}") == "413"
    assert files(served[1]) == []


def test_no_other_file_is_read(client: httpx.Client, served: tuple[str, UploadFolder], tmp_path: Path) -> None:
    """By hand: uploads and the page's images, but no file beside, above, in the working directory or behind a link."""
    uploads = served[1].path
    own = Path(send_file(client, b"mine").json()[0])
    assert client.get(f"/gradio_api/file={own}").content == b"mine"
    here = tmp_path / ".gradio" / "cached_examples" / "secret.txt"
    here.parent.mkdir(parents=True)
    here.write_text("hidden here")
    (link := uploads / "link.png").symlink_to(here)
    weights = uploads.parents[1] / "run" / "model" / "config.json"
    assert weights.is_file()
    hidden = ".gradio/cached_examples/secret.txt"
    before = os.getcwd()
    os.chdir(tmp_path)
    try:
        for path in (
            "/etc/passwd", "//etc/passwd", weights, f"{uploads}/../../run/model/config.json", f"file://{weights}",
            f"{own}/../../../../run/model/config.json", here, hidden, f"/proc/self/cwd/{hidden}", "secret.txt", link,
            uploads, f"{own}%00", Path(__file__),
        ):  # fmt: skip
            for name in (str(path), quote(str(path), safe="")):
                got = client.get(f"/gradio_api/file={name}")
                assert (got.status_code, b"hidden here" in got.content) == (403, False), path
    finally:
        os.chdir(before)


def test_uploads_have_bounds(client: httpx.Client, served: tuple[str, UploadFolder]) -> None:
    """By hand: a file of 1 MB and no more, 2 MB in all, 3 files; also many in one request."""
    uploads = served[1]
    assert send_file(client, bytes(MEBIBYTE + 1)).status_code == 413
    assert send_file(client, bytes(3 * MEBIBYTE)).status_code == 413
    assert files(uploads) == []
    assert send_file(client, bytes(MEBIBYTE)).status_code == 200
    assert send_file(client, bytes(MEBIBYTE - 1)).status_code == 413  # with its headers: more than 2 MB
    assert send_file(client, b"1").status_code == 200
    assert send_file(client, b"2").status_code == 200
    refused = send_file(client, b"3")
    assert (refused.status_code, refused.text) == (413, "at most 3 uploads are kept: try again later\n")
    assert len(files(uploads)) == 3
    uploads.remove_all()
    many = [("files", (f"{i}.png", str(i).encode())) for i in range(40)]
    client.post(UPLOAD, files=many)
    until(lambda: len(files(uploads)) == 3)


def test_an_upload_that_is_cut_off(served: tuple[str, UploadFolder]) -> None:
    """Invariant: the part that came is deleted by its age, and holds no room."""
    host, uploads = *served[0].split(":")[:1], served[1]
    connection = http.client.HTTPConnection(served[0])
    connection.putrequest("POST", UPLOAD)
    for name, value in {"Content-Type": "multipart/form-data; boundary=b", "Content-Length": "900000"}.items():
        connection.putheader(name, value)
    head = b'--b\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\n'
    connection.endheaders(head + bytes(100_000))
    until(lambda: files(uploads))
    with pytest.raises(FullError), uploads.reserve(1_050_000), uploads.reserve(200_000):
        pass
    uploads.remove_all()
    assert len(files(uploads)) == 1  # it is arriving
    connection.close()
    until(lambda: not uploads._arriving)
    uploads.remove_old()
    for file in files(uploads):
        os.utime(file, (0, 0))
    uploads.remove_old()
    assert files(uploads) == []
    assert host == "127.0.0.1"


def until(look: Any, seconds: float = 10) -> None:
    end = time.monotonic() + seconds
    while not look():
        assert time.monotonic() < end, "nothing came"
        time.sleep(0.02)


def test_uploads_are_deleted_by_age_and_with_the_last_page(
    client: httpx.Client, served: tuple[str, UploadFolder]
) -> None:
    """Invariant: an upload that was not used goes after a minute, or when the last page is closed."""
    uploads = served[1]
    first, second = (Path(send_file(client, name).json()[0]) for name in (b"1", b"2"))
    os.utime(first, (time.time() - 61, time.time() - 61))
    uploads.remove_old()
    assert files(uploads) == [second]
    load = next(d["id"] for d in client.get("/config").json()["dependencies"] if [None, "load"] in
                [[None, t[1]] for t in d["targets"]])  # fmt: skip
    for session in ("a", "b"):
        joined = client.post(JOIN, json={"data": [], "fn_index": load, "session_hash": session, "trigger_id": None})
        assert joined.status_code == 200
        with client.stream("GET", f"/gradio_api/queue/data?session_hash={session}") as events:
            assert any("process_completed" in line for line in events.iter_lines())
    for session, left in (("a", 1), ("b", 0)):
        with client.stream("GET", f"/gradio_api/heartbeat/{session}") as alive:
            next(alive.iter_lines())
        until(lambda left=left: len(files(uploads)) == left)
        time.sleep(0.2)
        assert len(files(uploads)) == left


def test_no_address_is_fetched_for_a_visitor(tmp_path: Path) -> None:
    """By hand: of the names that a visitor may send as an upload, only that of an uploaded file is taken."""
    uploads = build_uploads(tmp_path)
    page = DemoPage(cast(Workbench, None), uploads)
    own = str(uploads.path / "a" / "a.png")
    assert asyncio.run(page.check_uploaded(own)) == own
    for name in ("http://192.0.2.1/a.png", str(uploads.path.parent / "image.png"), f"{uploads.path}/../image.png"):
        with pytest.raises(ValueError, match="an uploaded file is expected"):
            asyncio.run(page.check_uploaded(name))


KILLED = """
import os, signal, sys, tempfile
tempfile.tempdir = sys.argv[1]
from igpt.app.demo_guard import private_folder
with private_folder() as folder:
    (folder / "uploads").mkdir()
    (folder / "uploads" / "a.png").write_bytes(b"mine")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_demos_uploads_are_removed_at_the_next_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Invariant: the folder of a running demo stays, that of a dead one goes, as does one's own at the end."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with private_folder() as running:
        subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], check=False)
        assert len([*tmp_path.rglob("a.png")]) == 1
        (tmp_path / "igpt-demo-of-another").mkdir()  # no lock: not known to be dead
        with private_folder() as mine:
            assert {*tmp_path.iterdir()} == {running, mine, tmp_path / "igpt-demo-of-another"}
            assert mine.stat().st_mode & 0o777 == 0o700
        assert {*tmp_path.iterdir()} == {running, tmp_path / "igpt-demo-of-another"}
