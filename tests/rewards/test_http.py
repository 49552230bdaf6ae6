"""An endpoint, asked over a real connection: what it does wrong is a failure of the rows it was asked about, and nothing leaks."""

import dataclasses
import json
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx2
import pytest

from rlhf_dist.config.errors import UserError
from rlhf_dist.config.rewards import HttpReward as HttpSection
from rlhf_dist.contracts.reward import RewardRequest
from rlhf_dist.rewards.guard import GuardedReward
from rlhf_dist.rewards.http import HttpReward

README = Path(__file__).resolve().parents[2] / "README.md"
TOKEN = "s3cret-token"


class _Several(Exception):
    """An ExceptionGroup, which Python 3.10 has not."""

    def __init__(self, what: str, exceptions: list[Exception]) -> None:
        super().__init__(what)
        self.exceptions = tuple(exceptions)


class Endpoint(ThreadingHTTPServer):
    """A server whose answers a test gives: `answer(rows, number of the request) -> (status, headers, body)`."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.answer: Callable[[dict[str, Any], int], tuple[int, dict[str, str], Any]] = lambda rows, _: (200, {}, lengths(rows))
        self.requests: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.lock, self.busy, self.busiest = threading.Lock(), 0, 0

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Askers that have gone are part of the tests."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/score?key=private"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Endpoint

    def do_POST(self) -> None:
        rows = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.requests.append(rows)
            self.server.headers.append(dict(self.headers))
            number = len(self.server.requests)
            self.server.busy += 1
            self.server.busiest = max(self.server.busiest, self.server.busy)
        status, headers, body = self.server.answer(rows, number)
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        with self.server.lock:
            self.server.busy -= 1
        try:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)
        except OSError:
            self.close_connection = True  # the asker has gone

    def log_message(self, *_: Any) -> None:
        pass


def lengths(rows: dict[str, Any]) -> dict[str, Any]:
    return {"rewards": [len(text) for text in rows["completions"]]}


@pytest.fixture
def endpoint(monkeypatch: pytest.MonkeyPatch) -> Iterator[Endpoint]:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    server = Endpoint()
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def reward_of(endpoint: Endpoint) -> Iterator[Callable[..., GuardedReward]]:
    """`reward_of(**settings)`: asks the endpoint; `pauses` of the reward says how long it would have waited."""
    made: list[GuardedReward] = []

    def make(**settings: Any) -> GuardedReward:
        section = HttpSection.model_validate({"kind": "http", "name": "h", "url": endpoint.url, "timeout_s": 5.0, **settings})
        pauses: list[float] = []
        made.append(GuardedReward(HttpReward(section), section, pause=pauses.append))
        made[-1].pauses = pauses  # type: ignore[attr-defined]
        return made[-1]

    yield make
    for reward in made:
        reward.close()


def request(rows: int, **columns: Any) -> RewardRequest:
    return RewardRequest([f"p{row}" for row in range(rows)], ["x" * row for row in range(rows)], columns)


def failure_of(reward: GuardedReward, rows: int = 2) -> Any:
    seen: list[Any] = []
    with pytest.raises(UserError) as caught:
        reward(request(rows), seen.append)
    first = next(iter(seen[0].values()))
    assert caught.value.what == first.what
    return first


def test_rows_go_out_in_batches_and_come_back_in_order(endpoint, reward_of) -> None:
    result = reward_of(batch_size=3)(request(8, answer=list("abcdefgh")))
    assert result.values == tuple(map(float, range(8))) and result.retried == 0
    by_first = sorted(endpoint.requests, key=lambda rows: rows["prompts"][0])
    assert [len(rows["prompts"]) for rows in by_first] == [3, 3, 2]
    assert by_first[1] == {"prompts": ["p3", "p4", "p5"], "completions": ["xxx", "xxxx", "xxxxx"], "columns": {"answer": ["d", "e", "f"]}}


def test_no_more_requests_are_on_the_way_than_allowed(endpoint, reward_of) -> None:
    def slowly(rows: Any, number: int) -> Any:
        time.sleep(0.05)
        return 200, {}, lengths(rows)

    endpoint.answer = slowly
    reward_of(batch_size=1, concurrency=3)(request(9))
    assert endpoint.busiest == 3


def test_abstentions_errors_of_rows_and_numbers_that_are_none(endpoint, reward_of) -> None:
    body = b'{"rewards": [1, null, {"error": "no parse"}, NaN, true, "0.5", 2.5]}'
    endpoint.answer = lambda rows, number: (200, {}, body)
    seen: list[Any] = []
    result = reward_of(on_failure="drop_group", retries=0)(request(7), seen.append)
    assert result.values == (1.0, None, None, None, None, None, 2.5) and result.failed == (2, 3, 4, 5)
    assert "says of row 2: no parse" in seen[0][2].what and [seen[0][row].kind for row in (2, 3, 4, 5)] == [
        "http",
        "value",
        "value",
        "value",
    ]


@pytest.mark.parametrize("status", [500, 503, 429, 408])
def test_a_passing_failure_is_tried_again_for_its_rows_only(status, endpoint, reward_of) -> None:
    endpoint.answer = lambda rows, n: (status, {}, b"busy") if rows["prompts"][0] == "p2" and n <= 3 else (200, {}, lengths(rows))
    reward = reward_of(batch_size=2, concurrency=1)
    result = reward(request(6))
    assert result.values == tuple(map(float, range(6))) and result.retried == 1
    assert [rows["prompts"] for rows in endpoint.requests] == [["p0", "p1"], ["p2", "p3"], ["p4", "p5"], ["p2", "p3"]]


def test_half_of_the_requests_fail_and_their_rows_alone_are_dropped_or_defaulted(endpoint, reward_of) -> None:
    endpoint.answer = lambda rows, number: (500, {}, b"") if rows["prompts"][0] in ("p2", "p6") else (200, {}, lengths(rows))
    result = reward_of(batch_size=2, on_failure="drop_group", retries=1)(request(8))
    assert result.failed == (2, 3, 6, 7) and result.values == (0.0, 1.0, None, None, 4.0, 5.0, None, None) and result.retried == 2
    result = reward_of(batch_size=2, on_failure="default", default=0.25, retries=0)(request(8))
    assert result.defaulted == (2, 3, 6, 7) and result.values == (0.0, 1.0, 0.25, 0.25, 4.0, 5.0, 0.25, 0.25)


@pytest.mark.parametrize("status, hint", [(400, ""), (401, "see auth_env"), (404, ""), (422, ""), (302, "redirects are not followed")])
def test_a_refusal_is_not_repeated_and_a_redirect_not_followed(status, hint, endpoint, reward_of) -> None:
    endpoint.answer = lambda rows, number: (status, {"Location": "/elsewhere"}, b"go away")
    failure = failure_of(reward_of())
    assert f"answered with status {status}" in failure.what and hint in failure.what and "go away" in failure.what
    assert len(endpoint.requests) == 1


@pytest.mark.parametrize("said, waited", [("7", 7.0), ("99999", 60.0), ("soon", 0.5), (None, 0.5), ("date", 30.0)])
def test_how_long_to_wait_is_heard_within_bounds(said, waited, endpoint, reward_of) -> None:
    header = {} if said is None else {"Retry-After": formatdate(time.time() + 30, usegmt=True) if said == "date" else said}
    endpoint.answer = lambda rows, n: (503, header, b"") if n == 1 else (200, {}, lengths(rows))
    reward = reward_of()
    assert reward(request(2)).values == (0.0, 1.0)
    assert reward.pauses == pytest.approx([waited], abs=2.0 if said == "date" else 0)


@pytest.mark.parametrize("drip", [False, True], ids=["silent", "dripping"])
def test_a_slow_answer_ends_in_time_and_is_counted(drip, endpoint, reward_of, monkeypatch) -> None:
    """A byte now and then keeps no request alive."""

    def slowly(rows: Any, number: int) -> Any:
        time.sleep(0.0 if drip else 1.0)
        return 200, {}, lengths(rows)

    def write_slowly(handler: Handler) -> None:
        for _ in range(20):
            handler._headers_buffer.append(b"X-Wait: yes\r\n")
            handler.flush_headers()
            time.sleep(0.05)

    if drip:
        monkeypatch.setattr(Handler, "end_headers", write_slowly)
    endpoint.answer = slowly
    began = time.monotonic()
    result = reward_of(timeout_s=0.3, on_failure="drop_group", retries=1, batch_size=1)(request(2))
    assert 0.6 <= time.monotonic() - began < 2.0
    assert result.failed == (0, 1) and result.timeouts == 4 and result.retried == 2


@pytest.mark.parametrize(
    "body, said",
    [
        (b"<html>", "what is no JSON: <html>"),
        (b"", "what is no JSON: "),
        (b"\xff\xfe", "no JSON"),
        (b"[" * 60_000, "no JSON"),
        (b"[1, 2]", 'without "rewards"'),
        (b'{"scores": [1, 2]}', 'without "rewards"'),
        (b'{"rewards": [1]}', "returned 1 values for 2 completions"),
        (b'{"rewards": [1, 2, 3]}', "returned 3 values"),
        (b'{"rewards": "12"}', "returned str, not a list"),
        (b'{"rewards": [1, 1e999]}', "returned inf for row 1"),
        (b'{"rewards": [1, ' + b"9" * 400 + b"]}", "beyond the largest float"),
        (b'{"rewards": [1, 2], "more": "' + b"x" * 200_000 + b'"}', "more than 73728 bytes"),
    ],
)
def test_what_an_endpoint_may_not_answer(body, said, endpoint, reward_of) -> None:
    endpoint.answer = lambda rows, number: (200, {}, body)
    failure = failure_of(reward_of(on_failure="raise", retries=0))
    assert said in failure.what and len(failure.what) < 600


def test_an_endpoint_that_is_not_there(reward_of, endpoint) -> None:
    reward = reward_of(retries=2)
    endpoint.shutdown()
    endpoint.server_close()
    failure = failure_of(reward)
    assert "could not be asked: ConnectError" in failure.what and reward.pauses == [0.5, 1.0]


@pytest.mark.parametrize("url", ["http://127.0.0.1:9/" + "b" * 70_000, "http://999.1.1.1/", "http://\u2603\ufe0f.example/"])
def test_an_address_that_no_request_can_have_is_found_before_training(url, reward_of) -> None:
    with pytest.raises(UserError, match="the url cannot be asked") as caught:
        reward_of(url=url)
    assert "'h'" in caught.value.where


@pytest.mark.parametrize(
    "error",
    [OverflowError("port must be 0-65535."), httpx2.InvalidURL("Invalid port"), ValueError("odd"), _Several("two", [KeyError("a")])],
)
def test_whatever_befalls_a_request_its_rows_fail_by_the_rules(error, endpoint, reward_of, monkeypatch) -> None:
    """Half of the requests; the others are judged."""
    exchange = HttpReward._exchange

    async def breaks(self: HttpReward, rows: int, content: bytes) -> Any:
        if b"p2" in content:
            raise error
        return await exchange(self, rows, content)

    monkeypatch.setattr(HttpReward, "_exchange", breaks)
    seen: list[Any] = []
    result = reward_of(batch_size=2, on_failure="drop_group", retries=1)(request(4), seen.append)
    assert result.values == (0.0, 1.0, None, None) and result.failed == (2, 3) and result.retried == 1
    inner = getattr(error, "exceptions", (error,))[0]
    assert f"could not be asked: {type(inner).__name__}: {inner}" in seen[0][2].what


def test_the_token_is_sent_and_stands_in_no_message(endpoint, reward_of, monkeypatch) -> None:
    monkeypatch.setenv("MY_TOKEN", f" {TOKEN}\n")
    bodies = [
        (403, {}, f"bad token {TOKEN}".encode()),
        (200, {}, {"rewards": [{"error": f"got {TOKEN}"}, 1]}),
        (200, {}, f"{TOKEN}<".encode()),
    ]
    for answer in bodies:
        endpoint.answer = lambda rows, number, answer=answer: answer
        reward = reward_of(auth_env="MY_TOKEN", on_failure="raise", retries=0)
        failure = failure_of(reward)
        assert TOKEN not in repr(dataclasses.asdict(failure)) and "***" in failure.what
        assert "private" not in failure.where, "a query may be a secret"
    assert {headers["Authorization"] for headers in endpoint.headers} == {f"Bearer {TOKEN}"}


@pytest.mark.parametrize("value", [None, "", "two words", "tab\there", "ümlaut"])
def test_a_token_that_is_missing_or_unfit_is_found_before_training(value, reward_of, monkeypatch) -> None:
    monkeypatch.delenv("MY_TOKEN", raising=False)
    if value is not None:
        monkeypatch.setenv("MY_TOKEN", value)
    with pytest.raises(UserError, match="MY_TOKEN") as caught:
        reward_of(auth_env="MY_TOKEN")
    assert not value or value not in str(caught.value)


def test_a_column_that_json_cannot_hold_is_a_fault_of_the_set_up(reward_of) -> None:
    with pytest.raises(UserError, match="the column 'when' cannot be sent as JSON"):
        reward_of(on_failure="drop_group")(request(1, when=[time.gmtime]))


def test_two_calls_share_a_connection(endpoint, reward_of) -> None:
    reward = reward_of(concurrency=1)
    assert reward(request(2)) == reward(request(2)) and len(endpoint.requests) == 2


def test_the_server_of_the_readme(monkeypatch) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    (code,) = re.findall(r"```python\n(import json\n.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    server = subprocess.Popen([sys.executable, "-c", code.replace("8900", str(port))], stderr=subprocess.DEVNULL)
    section = HttpSection.model_validate({"kind": "http", "name": "h", "url": f"http://127.0.0.1:{port}/score", "retries": 6})
    reward = GuardedReward(HttpReward(section), section)  # it waits until the server is up
    try:
        assert reward(RewardRequest(["p1", "p2"], ["yes please", "no"])).values == (1.0, 0.0)
    finally:
        reward.close()
        server.kill()
        server.wait()
