"""The judge behind an endpoint, against a server of our own that behaves and misbehaves."""

from __future__ import annotations

import json
import socket
import struct
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from swa.errors import InputError, JudgeError
from swa.grading import JUDGED, Grading, score_reply
from swa.judge import EndpointJudge, judge_prompt, says_yes

GRADING = Grading(("Paris", "the capital"), JUDGED, question="Where?", criterion="Be kind.")
KEY = "sk-secret-key"


class Server:
    """Answers each request with the next of `answers`: a function that is given the handler."""

    def __init__(self) -> None:
        self.answers: list[Callable[[BaseHTTPRequestHandler], None]] = []
        self.requests: list[tuple[str, dict[str, str], Any]] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                outer.requests.append((self.path, dict(self.headers), json.loads(body)))
                outer.answers.pop(0)(self)

            do_GET = do_POST

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.01,))


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("no_proxy", "*")
    running = Server()
    running.thread.start()
    yield running
    running.server.shutdown()
    running.server.server_close()
    running.thread.join()
    assert running.answers == []  # every one was asked for


def send(
    body: object, status: int = 200, **headers: str
) -> Callable[[BaseHTTPRequestHandler], None]:
    def answer(handler: BaseHTTPRequestHandler) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        handler.send_response(status)
        for name, value in headers.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.end_headers()
        handler.wfile.write(data)

    return answer


def says(text: object) -> Callable[[BaseHTTPRequestHandler], None]:
    return send({"choices": [{"message": {"role": "assistant", "content": text}}]})


def judge(server: Server, **settings: Any) -> EndpointJudge:
    return EndpointJudge(server.url, "referee-1", **{"backoff": 0.0, **settings})


def test_a_verdict(server, monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", KEY)
    server.answers = [says("Yes."), says(" no, not yes")]
    asked = judge(server, key_variable="JUDGE_KEY", max_tokens=7)
    assert score_reply(GRADING, "In Paris", asked) == 1.0
    assert score_reply(GRADING, "In Rome", asked) == 0.0
    path, headers, sent = server.requests[0]
    assert path == "/v1/chat/completions"
    assert headers["Authorization"] == f"Bearer {KEY}"
    assert headers["Content-Type"] == "application/json"
    assert sent == {
        "model": "referee-1",
        "messages": [{"role": "user", "content": judge_prompt(GRADING, "In Paris")}],
        "temperature": 0,
        "max_tokens": 7,
    }
    assert asked.name == f"referee-1 at {server.url.removeprefix('http://')}"
    assert KEY not in repr(asked)


def test_without_a_key_none_is_sent(server, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    server.answers = [says("yes")]
    assert judge(server)(GRADING, "x")
    assert "Authorization" not in server.requests[0][1]


def test_space_around_a_key_is_not_sent(server, monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", f" {KEY}\r\n")
    server.answers = [says("yes")]
    assert judge(server, key_variable="JUDGE_KEY")(GRADING, "x")
    assert server.requests[0][1]["Authorization"] == f"Bearer {KEY}"


@pytest.mark.parametrize(
    ("key", "message"),
    [
        (" \n", "JUDGE_KEY holds no key"),
        ("sk-secret-é", "JUDGE_KEY .* not printable ASCII"),
        ("sk-secret-日", "JUDGE_KEY .* not printable ASCII"),
        ("sk-secret\nsk-other", "JUDGE_KEY .* not printable ASCII"),
        ("sk-secret\x7f", "JUDGE_KEY .* not printable ASCII"),
    ],
)
def test_a_key_that_cannot_be_sent_is_refused_and_not_shown(key, message, monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", key)
    with pytest.raises(InputError, match=message) as caught:
        EndpointJudge("https://host/v1", "m", key_variable="JUDGE_KEY")
    assert "secret" not in str(caught.value)


def test_what_a_judge_is_told():
    text = judge_prompt(GRADING, "In Paris.")
    for part in ("Where?", "Paris", "the capital", "Be kind.", "In Paris.", "yes or no"):
        assert part in text
    assert "agrees with a reference" in judge_prompt(Grading(("a",)), "b")


@pytest.mark.parametrize(
    ("verdict", "right"),
    [
        ("yes", True),
        ("**Yes**, it is", True),
        ("No.", False),
        ("It is correct", False),
        ("yesterday", False),
        ("Not sure: yes", True),
        ("no... yes", False),
    ],
)
def test_the_first_yes_or_no_decides(verdict, right):
    assert says_yes(verdict) is right


@pytest.mark.parametrize("status", [408, 429, 500, 503])
def test_what_may_pass_is_tried_again(server, status):
    server.answers = [send(b"busy", status, Retry_After="0"), send({}, status), says("yes")]
    assert judge(server)(GRADING, "x")
    assert len(server.requests) == 3


def test_it_waits_as_long_as_the_server_asks_or_doubles(server, monkeypatch):
    waits: list[float] = []
    monkeypatch.setattr("swa.judge.time.sleep", waits.append)
    busy = [
        send(b"", 429, Retry_After=after) for after in ("7", "9999", "Wed, 21 Oct 2015", "", "²")
    ]
    server.answers = [*busy, says("no")]
    assert not judge(server, backoff=0.5, retries=5)(GRADING, "x")
    assert waits == [7.0, 60.0, 2.0, 4.0, 8.0]


def test_it_gives_up(server):
    server.answers = [send(b"overloaded", 503)] * 3
    with pytest.raises(JudgeError, match=r"referee-1 at 127.*/v1 \(3 tries\): HTTP status 503"):
        judge(server, retries=2)(GRADING, "x")


def test_a_dropped_connection_is_tried_again(server):
    def drop(handler: BaseHTTPRequestHandler) -> None:
        handler.connection.shutdown(socket.SHUT_RDWR)

    def short(handler: BaseHTTPRequestHandler) -> None:
        send(b'{"cho', Content_Length="500")(handler)

    server.answers = [drop, short, says("yes")]
    assert judge(server)(GRADING, "x")


def cut(status: int) -> Callable[[BaseHTTPRequestHandler], None]:
    """An error whose chunked body ends early."""
    return send(b"1f4\r\nbusy", status, Transfer_Encoding="chunked")


def reset(handler: BaseHTTPRequestHandler) -> None:
    """An error whose connection is reset after the start of its body."""
    send(b"busy", 503, Content_Length="500")(handler)
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    handler.rfile.close()  # holds the connection open
    handler.connection.close()


@pytest.mark.parametrize("answer", [cut(503), reset], ids=["cut", "reset"])
def test_an_error_whose_body_cannot_be_read_is_tried_again(server, answer):
    server.answers = [answer, says("yes")]
    assert judge(server)(GRADING, "x")
    assert len(server.requests) == 2


@contextmanager
def hanging(server, begin: Callable[[BaseHTTPRequestHandler], None], drip: bool):
    """Answers that begin so and never end, with a byte now and then if they `drip`."""
    over = threading.Event()

    def hang(handler: BaseHTTPRequestHandler) -> None:
        begin(handler)
        while not over.wait(0.02):
            if drip:
                handler.wfile.write(b" ")

    server.answers = [hang, hang]
    started = time.monotonic()
    try:
        yield
    finally:
        over.set()
    assert time.monotonic() - started < 30  # it did not wait for all of the body


@pytest.mark.parametrize("drip", [False, True])
def test_an_error_whose_body_hangs_is_tried_again(server, drip):
    begin = send(b"", 503, Content_Length="500")
    with (
        hanging(server, begin, drip),
        pytest.raises(JudgeError, match=r"\(2 tries\): HTTP status 503"),
    ):
        judge(server, timeout=0.5, retries=1)(GRADING, "x")


def test_an_error_says_what_could_be_read_and_its_status_decides(server):
    server.answers = [cut(401)]
    with pytest.raises(JudgeError, match=r"status 401 \(Unauthorized\) busy$"):
        judge(server)(GRADING, "x")
    assert len(server.requests) == 1


@pytest.mark.parametrize("status", [400, 401, 404])
def test_what_will_not_pass_is_not_tried_again_and_keeps_the_key_secret(
    server, status, monkeypatch
):
    monkeypatch.setenv("JUDGE_KEY", KEY)
    server.answers = [send(f"wrong key {KEY}".encode(), status)]
    with pytest.raises(JudgeError, match=rf"status {status} .*wrong key \*\*\*") as caught:
        judge(server, key_variable="JUDGE_KEY")(GRADING, "x")
    assert KEY not in str(caught.value)


@pytest.mark.parametrize(
    "answer",
    [
        send(f"wrong key {KEY}".encode(), 401),
        send(b"x" * 490 + f" {KEY}".encode(), 401),  # where the message is cut
        send(KEY.encode() * 40 + b"x" * 490 + KEY.encode(), 401),  # gets shorter
        send(f"{KEY[:-1]}".encode(), 401),  # where it was sent no further
        send(b"x" * 50 + KEY.encode() + b"x" * 50),  # no chat completion
        lambda handler: handler.wfile.write(f"{KEY}\r\n\r\n".encode()),  # no HTTP
    ],
    ids=["whole", "cut", "shrinks", "begun", "no json", "no http"],
)
def test_no_part_of_the_key_is_in_the_chain_of_errors(server, answer, monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", KEY)
    server.answers = [answer]
    with pytest.raises(JudgeError) as caught:
        judge(server, key_variable="JUDGE_KEY", retries=0)(GRADING, "x")
    assert KEY[:5] not in "".join(traceback.format_exception(caught.value))
    assert KEY[:5] not in repr((caught.value.__cause__, caught.value.__context__))


def test_redirects_are_refused(server):
    server.answers = [send(b"", 302, Location=f"{server.url}/elsewhere")]
    with pytest.raises(JudgeError, match="status 302"):
        judge(server)(GRADING, "x")
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (send(b"<html>"), "not a chat completion: b'<html>'"),
        (send([]), "not a chat completion"),
        (send({"choices": []}), "not a chat completion"),
        (send({"choices": [{"message": None}]}), "not a chat completion"),
        (send(b"[" * 100_000), "not a chat completion"),
        (send(b"\xff"), "not a chat completion"),
        (says(""), "said nothing"),
        (says(None), "said nothing"),
        (send(b" " * (2**20 + 9)), "no end"),
    ],
)
def test_a_response_that_is_none(server, answer, message):
    server.answers = [answer]
    with pytest.raises(JudgeError, match=message):
        judge(server)(GRADING, "x")


@pytest.mark.parametrize("drip", [False, True])
def test_a_server_that_hangs_times_out(server, drip):
    def begin(handler: BaseHTTPRequestHandler) -> None:
        if drip:
            handler.send_response(200)
            handler.end_headers()

    with hanging(server, begin, drip), pytest.raises(JudgeError, match=r"2 tries.*timed out"):
        judge(server, timeout=0.2, retries=1)(GRADING, "x")


def test_headers_that_drip_time_out(server):
    """Each byte comes soon enough for a socket, all of them do not for a try."""

    def drip(handler: BaseHTTPRequestHandler) -> None:
        handler.wfile.write(b"HTTP/1.0 200 OK\r\nX-Never: ")
        ends = time.monotonic() + 3
        while time.monotonic() < ends:
            handler.wfile.write(b"x")
            time.sleep(0.05)

    server.answers = [drip]
    started = time.monotonic()
    with pytest.raises(JudgeError, match="timed out"):
        judge(server, timeout=0.3, retries=0)(GRADING, "x")
    assert time.monotonic() - started < 2


def test_nobody_there():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    absent = EndpointJudge(f"http://127.0.0.1:{port}", "m", retries=1, backoff=0.0)
    with pytest.raises(JudgeError, match=r"\(2 tries\): cannot be reached"):
        absent(GRADING, "x")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"url": "ftp://host/v1"}, "https://host/v1"),
        ({"url": "file:///etc/passwd"}, "https://host/v1"),
        ({"url": "localhost:8000"}, "https://host/v1"),
        ({"url": "https://user:word@host/v1"}, "no user"),
        ({"url": "https://host/v1?key=x"}, "no user, query"),
        ({"url": "http://["}, "brackets"),
        ({"url": "http://h/é"}, "not printable ASCII"),
        ({"url": "http://é/v1"}, "not printable ASCII"),
        ({"url": "http://h/v 1"}, "a space"),
        ({"url": "http://h/v1\n"}, "not printable ASCII"),
        ({"url": f"http://{'a' * 64}.org/v1"}, "1 to 63"),
        ({"url": "http://a..org/v1"}, "1 to 63"),
        ({"url": "http://%E6%97%A5/v1"}, "1 to 63"),
        ({"url": "http://localhost:abc/v1"}, "port"),
        ({"url": "http://localhost:65536/v1"}, "port"),
        ({"model": ""}, "no name"),
        ({"timeout": 0}, "above 0"),
        ({"timeout": float("nan")}, "above 0"),
        ({"max_tokens": 0}, "above 0"),
        ({"retries": -1}, "0 or more"),
        ({"backoff": -1.0}, "0 or more"),
        ({"key_variable": "SWA_NO_SUCH_VARIABLE"}, "SWA_NO_SUCH_VARIABLE holds no key"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(InputError, match=message):
        EndpointJudge(**{"url": "https://host/v1", "model": "m", **settings})


def test_judges_of_other_endpoints_have_other_names():
    urls = ["http://h/v1", "http://h:80/v1", "http://h/v2", "http://g/v1", "http://[::1]:80"]
    assert [EndpointJudge(url, "m").name for url in urls] == [
        "m at h/v1",
        "m at h:80/v1",
        "m at h/v2",
        "m at g/v1",
        "m at [::1]:80",
    ]
    assert EndpointJudge("http://h/v1/", "m").name == "m at h/v1"  # asks the same


@pytest.mark.parametrize(
    "url",
    [
        "http://[::1]:8000/v1",
        "http://host:65535",
        "https://host./%C3%A9",
        "https://xn--mnchen-3ya.de",
    ],
)
def test_good_urls(url):
    EndpointJudge(url, "m")
