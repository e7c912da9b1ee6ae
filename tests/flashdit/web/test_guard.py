"""Who reaches a page: real requests, to a server on both loopback addresses that says what passed."""

import asyncio
import http.client
import json
import socket
import threading
import time
from contextlib import closing
from pathlib import Path

import pytest

uvicorn = pytest.importorskip("uvicorn", reason="needs uvicorn, of the extra 'app'")
from flashdit.web.guard import MAX_BODY, Guard, host_name  # noqa: E402

CALL, UPLOAD = "/gradio_api/call/generate", "/gradio_api/upload"


@pytest.fixture(scope="module")
def ports(tmp_path_factory):
    """Returns the ports, on 127.0.0.1 and ::1, of a guarded application that says what it was sent."""

    async def echo(scope, receive, send):
        body, more = b"", scope["method"] == "POST"
        while more:
            message = await receive()
            body, more = body + message["body"], message["more_body"]
        names = [name.decode() for name, _ in scope["headers"]]
        said = json.dumps({"bytes": len(body), "headers": names}).encode()
        await send({"type": "http.response.start", "status": 200, "headers": [(b"x-passed", b"1")]})
        await send({"type": "http.response.body", "body": said})

    sockets = [socket.create_server(("127.0.0.1", 0))]
    if socket.has_dualstack_ipv6() or socket.has_ipv6:
        sockets.append(socket.create_server(("::1", 0), family=socket.AF_INET6))
    guard = Guard(echo, ["10.0.0.7", "Page.Example", "[]"], tmp_path_factory.mktemp("made"))
    server = uvicorn.Server(uvicorn.Config(guard, log_level="warning", ws="none", lifespan="off"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": sockets})
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield [sock.getsockname()[1] for sock in sockets]
    server.should_exit = True
    thread.join()


def ask(port, headers, method="GET", path="/", body=None, address="127.0.0.1"):
    """Returns the status, the headers and the text of an answer; no header is sent beside these."""
    connection = http.client.HTTPConnection(address, port, timeout=20)
    with closing(connection):
        connection.putrequest(method, path, skip_host=True, skip_accept_encoding=True)
        for name, value in headers:
            connection.putheader(name, value)
        connection.endheaders(body)
        answer = connection.getresponse()
        return answer.status, dict(answer.getheaders()), answer.read().decode()


GOOD = ["localhost", "localhost:1", "LOCALHOST:7860", "127.0.0.1:9", "127.8.9.1", "[::1]", "[::1]:7860"]
GOOD += ["10.0.0.7:80", "page.example", "PAGE.example:8443"]
BAD = ["spoof", "evil.example:7860", "localhost.evil.example", "evil.localhost", "127.0.0.1.evil.example"]
BAD += ["192.168.1.5", "10.0.0.70", "0.0.0.0", "[::2]", "evil@localhost", "localhost:x", "localhost/x", ""]


@pytest.mark.parametrize("host", GOOD)
def test_loopback_names_at_any_port_the_host_and_what_is_allowed_pass(ports, host):
    assert ask(ports[0], [("Host", host)])[0] == 200
    for scheme in ("http", "https"):
        assert ask(ports[0], [("Host", "localhost"), ("Origin", f"{scheme}://{host}")])[0] == 200


@pytest.mark.parametrize("host", BAD)
@pytest.mark.parametrize(
    "path", ["/", "/config", "/gradio_api/queue/data", "/gradio_api/file=/tmp/x", UPLOAD]
)
def test_every_other_host_is_refused_on_every_route(ports, host, path):
    forwarded = [("Host", "localhost"), ("X-Forwarded-Host", host)]
    for headers in ([("Host", host)], *([forwarded] if host else [])):
        status, answered, text = ask(ports[0], headers, path=path)
        assert status == 403
        assert text.startswith("Host must be")
        assert not [key for key in answered if key.lower().startswith("access-control")]


@pytest.mark.parametrize("origin", ["null", "file://", "localhost", "chrome-extension://localhost"])
def test_an_origin_that_is_no_page_is_refused(ports, origin):
    assert ask(ports[0], [("Host", "localhost"), ("Origin", origin)])[0] == 403


@pytest.mark.parametrize("host", [host for host in BAD if host])
@pytest.mark.parametrize("method", ["GET", "POST", "OPTIONS", "HEAD"])
def test_a_foreign_origin_is_refused_and_gets_no_cors_headers(ports, host, method):
    headers = [("Host", "localhost"), ("Origin", f"http://{host}")]
    headers += [("Access-Control-Request-Method", "POST")] if method == "OPTIONS" else []
    status, answered, _ = ask(ports[0], headers, method, CALL)
    assert status == 403
    assert not [key for key in answered if key.lower().startswith("access-control")]


def test_a_spoofed_host_with_its_own_origin_is_refused(ports):
    headers = [("Host", "rebound.example:7860"), ("Origin", "http://rebound.example:7860")]
    assert ask(ports[0], headers)[0] == 403


def test_a_request_with_two_hosts_or_none_is_refused(ports):
    assert ask(ports[0], [("Host", "localhost"), ("Host", "localhost")])[0] in (400, 403)
    assert ask(ports[0], [])[0] in (400, 403)


def test_one_foreign_name_among_several_is_refused(ports):
    assert ask(ports[0], [("Host", "localhost"), ("X-Forwarded-Host", "localhost, evil.example")])[0] == 403
    two = [("Origin", "http://localhost"), ("Origin", "http://evil.example")]
    assert ask(ports[0], [("Host", "localhost"), *two])[0] == 403


def test_ipv6_loopback_is_served(ports):
    if len(ports) < 2:
        pytest.skip("this machine has no IPv6")
    headers = [("Host", f"[::1]:{ports[1]}"), ("Origin", f"http://[::1]:{ports[1]}")]
    assert ask(ports[1], headers, address="::1")[0] == 200
    assert ask(ports[1], [("Host", "evil.example")], address="::1")[0] == 403


def test_pictures_of_another_site_are_refused_and_links_are_not(ports):
    def fetched(mode, dest, site="cross-site"):
        headers = {"Sec-Fetch-Site": site, "Sec-Fetch-Mode": mode, "Sec-Fetch-Dest": dest}
        return ask(ports[0], [("Host", "localhost"), *headers.items()])[0]

    assert fetched("no-cors", "image") == fetched("navigate", "iframe") == 403
    assert fetched("navigate", "document") == fetched("no-cors", "image", "same-origin") == 200


def test_the_origin_stays_outside_so_that_gradio_sends_no_cors_headers(ports):
    _, _, text = ask(ports[0], [("Host", "localhost"), ("Origin", "http://localhost:5")])
    assert json.loads(text)["headers"] == ["host"]


@pytest.mark.parametrize("is_chunked", [False, True])
@pytest.mark.parametrize(("size", "status"), [(MAX_BODY, 200), (MAX_BODY + 1, 413), (2**22, 413)])
def test_a_body_is_bounded_with_and_without_a_stated_length(ports, is_chunked, size, status):
    headers = [("Host", "localhost")]
    body = b"a" * size
    if is_chunked:
        headers.append(("Transfer-Encoding", "chunked"))
        parts = [body[i : i + 60_000] for i in range(0, size, 60_000)]
        body = b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in parts) + b"0\r\n\r\n"
    else:
        headers.append(("Content-Length", str(size)))
    try:
        answered, _, text = ask(ports[0], headers, "POST", CALL, body)
    except (BrokenPipeError, ConnectionResetError):  # the server closed before all was sent
        assert status == 413
        return
    assert answered == status
    assert status == 413 or json.loads(text)["bytes"] == size


def test_a_stated_length_is_refused_before_anything_is_sent(ports):
    headers = [("Host", "localhost"), ("Content-Length", str(300 * 2**20))]
    status, _, text = ask(ports[0], headers, "POST", CALL)
    assert (status, text) == (413, "a request's body must have at most 262,144 bytes\n")


@pytest.mark.parametrize(
    ("method", "path"),
    [
        *(("POST", path) for path in (UPLOAD, "/", "/config", "/gradio_api/run/generate", "/login")),
        *(("GET", path) for path in ("/gradio_api/deep_link", "/gradio_api/proxy=http://a.hf.space/")),
        *(("GET", f"/assets/{up}/x") for up in ("..", "%2e%2e", "a/../..")),
        *((method, CALL) for method in ("PUT", "DELETE", "PATCH", "OPTIONS", "TRACE")),
    ],
)
def test_what_the_page_does_not_need_is_no_route(ports, method, path):
    status, _, text = ask(ports[0], [("Host", "localhost")], method, path)
    assert status == 403
    assert text.endswith("is no route of this page\n")


def test_a_websocket_is_refused(ports):
    upgrade = {"Connection": "Upgrade", "Upgrade": "websocket", "Sec-WebSocket-Version": "13"}
    headers = [("Host", "localhost"), ("Origin", "http://evil.example"), *upgrade.items()]
    headers.append(("Sec-WebSocket-Key", "dGhlIHNhbXBsZSBub25jZQ=="))
    assert ask(ports[0], headers, path="/gradio_api/queue/data")[0] == 403


def test_a_server_that_speaks_websocket_is_told_to_close():
    sent = []

    async def send(message):
        sent.append(message)

    asyncio.run(Guard(None, [], Path())({"type": "websocket"}, None, send))
    assert sent == [{"type": "websocket.close", "code": 1008}]


def test_files_are_served_from_the_folder_alone(tmp_path):
    folder = tmp_path / "made"
    folder.mkdir()
    (folder / "link").symlink_to(tmp_path / "secret")
    guard = Guard(None, [], folder)

    def passes(wanted):
        scope = {"path": f"/gradio_api/file={wanted}", "method": "GET"}
        return guard._refused_route(scope) is None

    assert passes(folder / "request" / "000000.png")
    for wanted in ("/etc/passwd", f"{folder}/../secret", f"{folder}/link", folder, f"{folder}x/a", "a.png"):
        assert not passes(wanted)
    for wanted in ("http://example.org/a.png", f"{folder}/a\0.png", ""):
        assert not passes(wanted)


def test_names_are_read_as_browsers_write_them():
    assert host_name("[::1]:80") == "::1"
    assert host_name("A.b:80") == "a.b"
    for text in ("a:b", "a@b", "a/b", "a?b", "[::1", "", ":80"):
        assert host_name(text) == ""
