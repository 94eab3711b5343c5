"""Clients that are slow, gone, endless or talking nonsense: each gets its end, and nobody else notices."""

from __future__ import annotations

import itertools
import re
import select
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import suppress

import httpx
import pytest

from cv_platform_tests.support.http_client import flat_image, png
from cv_platform_tests.support.served_app import ServedApp, serve_app
from cv_platform_tests.support.waiting import wait_until

MAX_UPLOAD_BYTES = 200_000
PICTURE = png(flat_image(200, 30, 30))
FORM_START = b'--b\r\nContent-Disposition: form-data; name="file"; filename="a.png"\r\n\r\n'
FORM_END = b"\r\n--b--\r\n"
FORM = FORM_START + PICTURE + FORM_END
pytestmark = [pytest.mark.xdist_group("hostile_clients"), pytest.mark.timeout(120)]


def head(*headers: bytes, method: bytes = b"POST", path: bytes = b"/predict") -> bytes:
    lines = [method + b" " + path + b" HTTP/1.1", b"Host: service", b"Content-Type: multipart/form-data; boundary=b"]
    return b"\r\n".join([*lines, *headers]) + b"\r\n\r\n"


def with_length(form: bytes, length: int | None = None) -> bytes:
    return head(b"Content-Length: %d" % (len(form) if length is None else length)) + form


def chunk(content: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(content), content)


def read_to_end(connection: socket.socket) -> bytes:
    """Reads until the server closes; a connection that stays open fails by its time-out."""
    received = b""
    while part := connection.recv(65_536):
        received += part
    return received


def read_until(connection: socket.socket, mark: bytes) -> bytes:
    received = b""
    while mark not in received:
        part = connection.recv(65_536)
        assert part, f"closed after {received!r}"
        received += part
    return received


def send_for_ever(connection: socket.socket, part: bytes, *, most_bytes: int) -> int:
    """Sends until the server has had enough, and returns how many bytes it took."""
    sent = 0
    try:
        while sent < most_bytes:
            connection.sendall(part)
            sent += len(part)
    except OSError:
        return sent
    raise AssertionError(f"it still listened after {sent} bytes")


def send_until_reset(connection: socket.socket, part: bytes) -> None:
    """Sends until the server resets the connection; one that it lets wait fails by its time-out."""
    try:
        while True:
            connection.sendall(part)
    except (BrokenPipeError, ConnectionResetError):
        return


def fill(connection: socket.socket, part: bytes) -> None:
    """Sends until nothing more fits into the buffers between the client, who reads nothing, and the server."""
    connection.setblocking(False)
    # While the server reads on, there is room again within a moment.
    while select.select([], [connection], [], 0.5)[1]:
        connection.send(part)


@pytest.fixture(scope="module")
def served() -> Iterator[ServedApp]:
    limits = {"upload_seconds": 2.0, "small_body_seconds": 2.0, "head_seconds": 2.0, "max_uploads": 4}
    with serve_app(limits, CV_MAX_UPLOAD_BYTES=str(MAX_UPLOAD_BYTES)) as served:
        yield served


@pytest.fixture(scope="module")
def held() -> Iterator[ServedApp]:
    with serve_app({"head_seconds": 0.5, "small_body_seconds": 2.0}) as served:
        yield served


@pytest.fixture(autouse=True)
def nobody_else_notices(served: ServedApp) -> Iterator[None]:
    """After each of them all places are free again, and an ordinary client is served."""
    yield
    wait_until(lambda: not served.health()["in_flight"])
    # More than `max_uploads`, one after the other: a place that is not given back would soon be missed.
    for _ in range(5):
        answer = httpx.post(f"{served.url}/predict", files={"file": ("a.png", PICTURE)}, timeout=60)
        assert answer.status_code == 200, answer.text


def test_a_body_that_trickles_gets_408_and_the_connection_ends(served: ServedApp) -> None:
    with served.connect() as connection:
        connection.sendall(with_length(FORM_START + b"\x89PNG", 5_000))
        answer = read_to_end(connection)
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert b"The body was not complete after 2 s" in answer


def test_trickling_bytes_do_not_prolong_the_time(served: ServedApp) -> None:
    with served.connect() as connection:
        connection.sendall(with_length(FORM_START, 5_000))
        begin = time.monotonic()
        connection.settimeout(0.1)
        answer = b""
        while not answer and time.monotonic() - begin < 10:
            connection.sendall(b"a")
            try:
                answer = connection.recv(65_536)
            except TimeoutError:
                continue
    assert answer.startswith(b"HTTP/1.1 408 ")


def test_clients_that_go_in_the_middle_of_a_body_leave_nothing_behind(served: ServedApp) -> None:
    # Twice as many as there are places.
    for _ in range(8):
        with served.connect() as connection:
            connection.sendall(with_length(FORM_START + PICTURE[:20], len(FORM)))
    assert served.health()["status"] == "ready"  # And `nobody_else_notices`.


def test_a_client_that_resets_the_connection_leaves_nothing_behind(served: ServedApp) -> None:
    for _ in range(8):
        with served.connect() as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            connection.sendall(with_length(FORM))
    assert served.health()["status"] == "ready"  # And `nobody_else_notices`.


def test_a_client_that_does_not_read_its_answers_leaves_nothing_behind(served: ServedApp) -> None:
    with served.connect() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.sendall(with_length(FORM) * 3)
        assert select.select([connection], [], [], 60)[0], "answers are on their way"
    assert served.health()["status"] == "ready"  # And `nobody_else_notices`.


LONG_ANSWER = b"GET /openapi.json HTTP/1.1\r\nHost: service\r\n\r\n"
LAST_LONG_ANSWER = LONG_ANSWER.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n")


needs_user_timeout = pytest.mark.skipif(
    not hasattr(socket, "TCP_USER_TIMEOUT"), reason="this system has no TCP_USER_TIMEOUT, by which they are cut off"
)


def connect_without_room(served: ServedApp) -> socket.socket:
    """Connects so that little fits between: the server has the rest of an answer on its hands."""
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, 536)
    connection.settimeout(60)
    connection.connect(("127.0.0.1", served.port))
    return connection


@needs_user_timeout
def test_a_client_that_never_reads_is_cut_off_without_a_word_in_the_log() -> None:
    with serve_app({"untaken_seconds": 1.0}) as served:
        with connect_without_room(served) as connection:
            send_until_reset(connection, LONG_ANSWER * 1_000)
        assert served.health()["status"] == "ready"
        assert "Traceback" not in served.log.read_text()


@needs_user_timeout
def test_a_client_that_never_reads_does_not_hold_up_the_stop() -> None:
    with serve_app({"untaken_seconds": 2.0}) as served:
        connection = connect_without_room(served)
        fill(connection, LONG_ANSWER * 1_000)
    connection.close()
    assert served.process.returncode == -signal.SIGTERM  # `serve_app` kills one that does not stop in time.


def test_a_client_that_reads_slowly_but_steadily_gets_everything() -> None:
    answers, untaken_seconds = 6, 1.0  # Each takes longer than a client may take nothing.
    received, longest_pause = bytearray(), untaken_seconds
    for _ in range(5):
        received, longest_pause = _read_slowly(LONG_ANSWER * (answers - 1) + LAST_LONG_ANSWER, untaken_seconds)
        if longest_pause < untaken_seconds / 2:
            break  # Where a busy machine keeps the client from reading for longer, it may well be cut off.
    assert longest_pause < untaken_seconds / 2, "the machine is too busy for this client"
    assert received.count(b"HTTP/1.1 200 ") == answers
    assert received.endswith(b"}")


def _read_slowly(requests: bytes, untaken_seconds: float) -> tuple[bytearray, float]:
    """Returns what a slow client gets, and the longest time in which it took nothing."""
    received, moments = bytearray(), list[float]()
    with serve_app({"untaken_seconds": untaken_seconds}) as served, connect_without_room(served) as connection:
        connection.sendall(requests)
        with suppress(ConnectionResetError):
            while part := connection.recv(4_096):
                received += part
                moments.append(time.monotonic())
                time.sleep(0.15)  # What this client does: no wait for anything.
        moments.append(time.monotonic())
    return received, max(after - before for before, after in itertools.pairwise(moments))


def test_a_half_closed_connection_with_half_a_body_is_ended(served: ServedApp) -> None:
    with served.connect() as connection:
        connection.sendall(with_length(FORM_START, len(FORM)))
        connection.shutdown(socket.SHUT_WR)
        assert read_to_end(connection) == b""


def test_closing_one_side_after_the_answer_ends_the_connection(served: ServedApp) -> None:
    with served.connect() as connection:
        connection.sendall(with_length(FORM))
        assert read_until(connection, b'"message":"ok"').startswith(b"HTTP/1.1 200 ")
        connection.shutdown(socket.SHUT_WR)
        assert b"HTTP/1.1" not in read_to_end(connection)


def test_an_old_connection_ends_with_an_answer_that_says_so() -> None:
    # The first answer comes sooner on a busy machine, too.
    with serve_app({"kept_seconds": 3.0}) as served, served.connect() as connection:
        answers: list[bytes] = []
        while not answers or b"connection: close\r\n" not in answers[-1]:
            connection.sendall(with_length(FORM))
            answers.append(read_until(connection, b'"message":"ok"'))
        assert b"HTTP/1.1" not in read_to_end(connection)
    assert len(answers) > 1
    assert all(answer.count(b"HTTP/1.1 200 ") == 1 for answer in answers)


def test_an_old_connection_says_once_that_it_ends() -> None:
    with serve_app({"kept_seconds": 0.0}) as served, served.connect() as connection:
        request = with_length(FORM)
        for at in range(0, len(request), 20):
            connection.sendall(request[at : at + 20])
            served.wait_until_read(connection)
        answer = read_to_end(connection)
    assert answer.startswith(b"HTTP/1.1 200 ")
    assert answer.count(b"connection: close\r\n") == 1


GET_HEALTH = b"GET /health_check HTTP/1.1\r\nHost: service\r\n"
CHUNKED = b"Transfer-Encoding: chunked\r\n\r\n"


@pytest.mark.parametrize(
    ("start", "part"),
    [
        (GET_HEALTH + b"\r\n\r\n", b""),
        (b"POST /nowhere HTTP/1.1\r\nHost: service\r\n" + CHUNKED, b"1\r\na\r\n"),
        (GET_HEALTH + CHUNKED, b"1\r\na\r\n"),
        (GET_HEALTH + b"Content-Length: 999999999999\r\n\r\n", b"a"),
        (GET_HEALTH + CHUNKED + b"0\r\n", b"X-Trailer: a\r\n"),
        (GET_HEALTH + b"Connection: upgrade\r\nUpgrade: websocket\r\nContent-Length: 40\r\n\r\n", b""),
    ],
    ids=["an empty line", "chunks", "chunks to health", "a length", "trailers", "half an upgrade"],
)
def test_nothing_but_a_request_keeps_an_answered_connection(held: ServedApp, start: bytes, part: bytes) -> None:
    with held.connect() as connection:
        connection.sendall(start)
        answer = b""
        connection.settimeout(0.2)
        begin = time.monotonic()
        while time.monotonic() - begin < 30:
            try:
                connection.sendall(part)
                received = connection.recv(65_536)
            except TimeoutError:
                continue
            except OSError:
                break  # Closed while we still sent.
            if not received:
                break
            answer += received
        else:
            raise AssertionError(f"it is still open after {answer!r}")
    assert re.match(rb"HTTP/1\.1 (200|404|408|413) ", answer)


@pytest.mark.parametrize("protocol", [b"h2c", b"websocket"])
@pytest.mark.parametrize("connection_header", [b"Upgrade, HTTP2-Settings", b"Upgrade"])
def test_a_wish_for_another_protocol_is_ignored(served: ServedApp, protocol: bytes, connection_header: bytes) -> None:
    wish = [b"Connection: " + connection_header, b"Upgrade: " + protocol, b"HTTP2-Settings: AAMAAABkAAQAAP__"]
    with served.connect() as connection:
        for body, status in ((FORM, b"200"), (b"GET /nowhere HTTP/1.1\r\nHost: service\r\n\r\n", b"422")):
            connection.sendall(head(b"Content-Length: %d" % len(body), *wish))
            served.wait_until_read(connection)
            connection.sendall(body)
            assert read_until(connection, b'"message":').startswith(b"HTTP/1.1 " + status)
        chunks = head(b"Transfer-Encoding: chunked", *wish) + chunk(FORM) + b"0\r\n\r\n"
        connection.sendall(chunks + head(*wish, method=b"GET", path=b"/health_check") + head(path=b"/nowhere"))
        answers = read_until(connection, b"There is nothing at")
    assert re.findall(rb"HTTP/1\.1 (\d{3}) ", answers) == [b"200", b"200", b"404"]


def test_connect_is_refused(served: ServedApp) -> None:
    with served.connect() as connection:
        connection.sendall(b"CONNECT service:80 HTTP/1.1\r\nHost: service\r\n\r\n")
        assert read_to_end(connection).startswith(b"HTTP/1.1 400 ")


@pytest.mark.parametrize("hosts", [[], [b"Host: service", b"Host: other"]], ids=["none", "two"])
def test_a_request_names_one_host(served: ServedApp, hosts: list[bytes]) -> None:
    with served.connect() as connection:
        connection.sendall(b"\r\n".join([b"GET /livez HTTP/1.1", *hosts, b"", b""]))
        assert read_to_end(connection).startswith(b"HTTP/1.1 400 ")


def test_a_head_too_large_is_refused_in_one_piece_too(served: ServedApp) -> None:
    with served.connect() as connection:
        connection.sendall(head(b"X-Filler: " + b"a" * 17_000, method=b"GET", path=b"/livez"))
        assert read_to_end(connection).startswith(b"HTTP/1.1 400 ")


def test_trailers_without_end_are_cut_off(served: ServedApp) -> None:
    before = served.peak_memory_bytes()
    with served.connect() as connection:
        connection.sendall(head(b"Transfer-Encoding: chunked", path=b"/health_check") + chunk(b"a") + b"0\r\n")
        send_for_ever(connection, b"X-Trailer: " + b"a" * 8_000 + b"\r\n", most_bytes=50_000_000)
    assert served.peak_memory_bytes() - before < 20_000_000


def test_of_many_requests_sent_ahead_the_first_are_answered(served: ServedApp) -> None:
    with served.connect() as connection:
        connection.sendall(b"GET /livez HTTP/1.1\r\nHost: service\r\n\r\n" * 200)
        answers = read_to_end(connection)
    statuses = re.findall(rb"HTTP/1\.1 (\d{3}) ", answers)
    assert statuses == [b"200"] * 65 + [b"400"]


def test_a_chunked_upload_without_end_gets_413_at_the_limit(served: ServedApp) -> None:
    with served.connect() as connection:
        connection.sendall(head(b"Transfer-Encoding: chunked") + chunk(FORM_START))
        part = chunk(bytes(16_384))
        try:
            for _ in range(100):
                connection.sendall(part)
        except OSError:
            pass  # It may close while we still send.
        answer = connection.recv(65_536)
    assert answer.startswith(b"HTTP/1.1 413 ")
    assert b"connection: close" in answer.lower()


def test_a_chunked_upload_that_stops_gets_408(served: ServedApp) -> None:
    with served.connect() as connection:
        connection.sendall(head(b"Transfer-Encoding: chunked") + chunk(FORM_START) + b"ffff\r\nabc")
        assert read_to_end(connection).startswith(b"HTTP/1.1 408 ")


def test_a_broken_chunk_length_ends_the_connection(served: ServedApp) -> None:
    with served.connect() as connection:
        connection.sendall(head(b"Transfer-Encoding: chunked") + chunk(FORM_START) + b"-1\r\nabc\r\n")
        assert b" 200 " not in read_to_end(connection)[:20]


def test_a_promise_of_too_much_is_refused_before_it_is_kept(served: ServedApp) -> None:
    with served.connect() as connection:
        connection.sendall(head(b"Content-Length: 9999999999"))
        assert read_to_end(connection).startswith(b"HTTP/1.1 413 ")


def test_two_lengths_are_refused(served: ServedApp) -> None:
    with served.connect() as connection:
        connection.sendall(head(b"Content-Length: %d" % len(FORM), b"Transfer-Encoding: chunked") + FORM)
        assert read_to_end(connection).startswith(b"HTTP/1.1 400 ")


@pytest.mark.parametrize(
    ("start", "part"),
    [
        (b"GET /livez HTTP/1.1\r\nHost: service\r\n", b"X-Filler: " + b"a" * 8_000 + b"\r\n"),
        (b"GET /livez HTTP/1.1\r\nHost: service\r\nX-Filler: ", b"a" * 8_000),
        (b"GET /", b"a" * 8_000),
    ],
    ids=["headers", "one header", "path"],
)
def test_a_head_without_end_is_cut_off_at_its_limit(served: ServedApp, start: bytes, part: bytes) -> None:
    before = served.peak_memory_bytes()
    with served.connect() as connection:
        connection.sendall(start)
        # What the sockets' buffers take comes on top of what the service has read.
        sent = send_for_ever(connection, part, most_bytes=50_000_000)
    assert sent < 20_000_000
    assert served.peak_memory_bytes() - before < 20_000_000


def test_a_head_too_large_is_told_so(served: ServedApp) -> None:
    with served.connect() as connection:
        # No more than is bound to be read before the refusal: a reset would take that away.
        connection.sendall(b"GET /livez HTTP/1.1\r\nHost: service\r\n")
        for _ in range(2):
            connection.sendall(b"X-Filler: " + b"a" * 8_190 + b"\r\n")
            served.wait_until_read(connection)
        assert connection.recv(65_536).startswith(b"HTTP/1.1 400 ")


def test_half_a_head_and_silence_are_ended(served: ServedApp) -> None:
    with served.connect() as half, served.connect() as silent, served.connect() as kept:
        half.sendall(b"POST /predict HTTP/1.1\r\nHost: service\r\n")
        kept.sendall(with_length(FORM))
        assert read_until(kept, b'"message":"ok"').startswith(b"HTTP/1.1 200 ")
        kept.sendall(b"POST /predict HTTP/1.1\r\nHost: service\r\n")
        for connection in (half, silent, kept):
            assert b"HTTP/1.1" not in read_to_end(connection)


def test_a_slow_body_is_not_taken_for_a_slow_head(served: ServedApp) -> None:
    with served.connect() as connection:
        connection.sendall(head(b"Content-Length: %d" % len(FORM)))
        for at in range(0, len(FORM), 64):
            connection.sendall(FORM[at : at + 64])
            served.wait_until_read(connection)
        assert read_until(connection, b'"message":"ok"').startswith(b"HTTP/1.1 200 ")
        # Longer than `head_seconds`, and shorter than with the keep-alive time.
        assert select.select([connection], [], [], 2.5)[0] == [], "it was ended"
        connection.sendall(with_length(FORM))
        assert read_until(connection, b'"message":"ok"').startswith(b"HTTP/1.1 200 ")


def test_health_stays_green_beside_200_idle_connections(served: ServedApp) -> None:
    connections = [served.connect() for _ in range(200)]
    try:
        for _ in range(10):
            assert served.health()["status"] == "ready"
        answer = httpx.post(f"{served.url}/predict", files={"file": ("a.png", PICTURE)}, timeout=60)
        assert answer.status_code == 200
    finally:
        for connection in connections:
            connection.close()


def test_uploads_that_stall_take_their_places_and_no_more(served: ServedApp) -> None:
    stalled = [served.connect() for _ in range(8)]
    try:
        for connection in stalled:
            connection.sendall(with_length(FORM_START, 5_000))
        statuses = [read_until(connection, b"\r\n\r\n")[9:12] for connection in stalled]
        # Four places: the others are told to come again, at once.
        assert sorted(statuses) == [b"408"] * 4 + [b"429"] * 4
    finally:
        for connection in stalled:
            connection.close()


@pytest.mark.parametrize(
    "garbage",
    [
        b"\0" * 1_000,
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(500),
        b"GET\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    ],
    ids=["zeros", "TLS", "half a request line", "HTTP/2"],
)
def test_garbage_ends_the_connection(served: ServedApp, garbage: bytes) -> None:
    with served.connect() as connection:
        connection.sendall(garbage)
        assert read_to_end(connection)[:11] in {b"HTTP/1.1 40", b""}


def test_garbage_behind_a_request_costs_that_client_alone(served: ServedApp) -> None:
    with served.connect() as connection:
        connection.sendall(with_length(FORM))
        assert read_until(connection, b'"message":"ok"').startswith(b"HTTP/1.1 200 ")
        connection.sendall(b"\0\1\2 garbage\r\n\r\n")
        assert read_to_end(connection).startswith(b"HTTP/1.1 400 ")


@pytest.mark.parametrize("broken", [b"\0\1\2 garbage\r\n\r\n", head(CHUNKED[:-4]) + b"-1\r\n"], ids=["head", "body"])
@pytest.mark.parametrize("whole", [1, 2])
def test_garbage_sent_with_requests_does_not_cost_their_answers(served: ServedApp, whole: int, broken: bytes) -> None:
    with served.connect() as connection:
        connection.sendall(with_length(FORM) * whole + broken)
        answers = read_to_end(connection)
    assert re.findall(rb"HTTP/1\.1 (\d{3}) ", answers) == [b"200"] * whole + [b"400"]
    assert answers.count(b"connection: close\r\n") == 1


def test_pipelined_requests_are_answered_in_their_order(served: ServedApp) -> None:
    with served.connect() as connection:
        connection.sendall(
            with_length(FORM) + head(method=b"GET", path=b"/health_check") + head(method=b"GET", path=b"/nowhere")
        )
        answers = read_until(connection, b"There is nothing at")
    assert re.findall(rb"HTTP/1\.1 (\d{3}) ", answers) == [b"200", b"200", b"404"]


def test_who_says_to_speak_for_others_is_not_believed_on_this_machine_either() -> None:
    files = {"file": ("image.png", PICTURE, "image/png")}
    with serve_app({}, CV_RATE_LIMIT_PER_MINUTE="1") as served:
        statuses = [
            httpx.post(
                f"{served.url}/predict", files=files, headers={"X-Forwarded-For": f"192.0.2.{number}"}
            ).status_code
            for number in range(2)
        ]
    assert statuses == [200, 429]
