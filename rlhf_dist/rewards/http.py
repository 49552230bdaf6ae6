"""A reward behind an HTTP endpoint: rows go out as JSON in small requests, a few at a time, each with a hard time limit.

Request: `{"prompts": [...], "completions": [...], "columns": {"answer": [...], ...}}`, each list with one entry a row.
Response, status 200: `{"rewards": [...]}` with one entry a row: a number, null (abstains), or `{"error": "why"}`.
"""

from __future__ import annotations

import asyncio
import email.utils
import json
import os
import re
import time
from collections.abc import Mapping, Sequence
from typing import Any

import httpx2

from rlhf_dist.config.errors import UserError
from rlhf_dist.config.rewards import HttpReward as HttpRewardSection
from rlhf_dist.contracts.reward import Attempt, RewardFailure, RewardRequest, checked_attempt

RESPONSE_BYTES, RESPONSE_BYTES_A_ROW = 1 << 16, 1 << 12
"""The largest response that is read: a fixed part, and as much for each row."""
SHOWN = 300
"""Characters of a response that are quoted in a message."""


class HttpReward:
    """Asks an endpoint (`rewards.guard.Fallible`). A request that fails affects its own rows only.

    Redirects are not followed. Statuses 408, 429 and 5xx, broken connections and answers that are not as agreed may be tried again, other
    statuses of 400 and more not. `Retry-After` is passed on to who decides when to try again.

    Args:
        section: of the config; the token is read from the environment now, and stands in no message.

    Raises:
        UserError: the url cannot be asked; the environment lacks the token, or it cannot stand in a header.
    """

    by_row = True

    def __init__(self, section: HttpRewardSection) -> None:
        self.name = section.name
        self._url, self._where = _url(section), section.url.partition("?")[0]  # a query may hold what is nobody's business
        self._batch_size, self._concurrency = section.batch_size, section.concurrency
        self._token = None if section.auth_env is None else _token(section.name, section.auth_env)
        authorisation = {} if self._token is None else {"Authorization": f"Bearer {self._token}"}
        headers = {"Content-Type": "application/json", "Accept": "application/json", "Accept-Encoding": "identity", **authorisation}
        limits = httpx2.Limits(max_connections=section.concurrency)
        self._client = httpx2.AsyncClient(headers=headers, timeout=section.timeout_s, limits=limits, follow_redirects=False)
        self._loop = asyncio.new_event_loop()

    def attempt(self, request: RewardRequest, limit_s: float) -> Attempt:
        """Sends all rows, in requests of `batch_size`, of which each may take `limit_s` seconds.

        Raises:
            UserError: a column that JSON cannot hold.
        """
        rows = range(len(request))
        batches = [rows[first : first + self._batch_size] for first in range(0, len(rows), self._batch_size)]
        contents = [(len(batch), self._content(request.select(batch))) for batch in batches]
        return _joined(self._loop.run_until_complete(self._all(contents, limit_s)))

    def close(self) -> None:
        """Closes the connections."""
        if not self._loop.is_closed():
            self._loop.run_until_complete(self._client.aclose())
            self._loop.close()

    def _content(self, request: RewardRequest) -> bytes:
        columns = {name: list(values) for name, values in request.columns.items()}
        for name, values in columns.items():
            try:
                json.dumps(values, allow_nan=False)
            except (TypeError, ValueError) as error:
                fix = "store it as text or numbers in the data, or leave it out"
                raise UserError(f"the column {name!r} cannot be sent as JSON: {error}", where=f"reward {self.name!r}", fix=fix) from None
        return json.dumps({"prompts": list(request.prompts), "completions": list(request.completions), "columns": columns}).encode()

    async def _all(self, contents: Sequence[tuple[int, bytes]], limit_s: float) -> list[Attempt]:
        free = asyncio.Semaphore(self._concurrency)

        async def one(rows: int, content: bytes) -> Attempt:
            async with free:  # waiting for its turn takes nothing of a request's time
                return await self._request(rows, content, limit_s)

        return await asyncio.gather(*(one(rows, content) for rows, content in contents))

    async def _request(self, rows: int, content: bytes, limit_s: float) -> Attempt:
        try:
            status, headers, body = await asyncio.wait_for(self._exchange(rows, content), limit_s)
        except (asyncio.TimeoutError, httpx2.TimeoutException):
            return self._failed(rows, f"did not answer within {limit_s:g} s", kind="timeout", fix="see why, or raise its timeout_s")
        except Exception as error:  # whatever it is, it befell this request: its rows fail, by the reward's own rules
            first = _first(error)
            return self._failed(rows, f"could not be asked: {type(first).__name__}: {first}", fix="see that the endpoint is up")
        if status != 200:
            retryable = status in (408, 429) or status >= 500
            said = f"answered with status {status}{_hint(status)}: {self._shown(body)}"
            return self._failed(rows, said, fix="see the endpoint's log", retryable=retryable, retry_after_s=_retry_after(headers))
        if body is None:
            return self._failed(rows, f"answered with more than {_largest(rows)} bytes", fix="answer with one reward a row")
        return self._read(rows, body)

    async def _exchange(self, rows: int, content: bytes) -> tuple[int, Mapping[str, str], bytes | None]:
        """Status, headers and body; None for one that is too large."""
        async with self._client.stream("POST", self._url, content=content) as response:
            body = bytearray()
            async for part in response.aiter_bytes():
                body += part
                if len(body) > _largest(rows):
                    return response.status_code, response.headers, None
            return response.status_code, response.headers, bytes(body)

    def _read(self, rows: int, body: bytes) -> Attempt:
        try:
            answer = json.loads(body)
        except (ValueError, RecursionError):
            return self._failed(rows, f"answered with what is no JSON: {self._shown(body)}", fix='answer with {"rewards": [...]}')
        if not isinstance(answer, dict) or "rewards" not in answer:
            return self._failed(rows, f'answered without "rewards": {self._shown(body)}', fix='answer with {"rewards": [...]}')
        entries = answer["rewards"]
        if not isinstance(entries, list) or len(entries) != rows:
            return checked_attempt(self.name, entries, rows, self._where)
        errors = {row: entry["error"] for row, entry in enumerate(entries) if isinstance(entry, dict) and entry.keys() == {"error"}}
        checked = checked_attempt(self.name, [None if row in errors else entry for row, entry in enumerate(entries)], rows, self._where)
        told = {
            row: RewardFailure("http", f"reward {self.name!r} says of row {row}: {self._shown(error)}", self._where, rows=rows)
            for row, error in errors.items()
        }
        return Attempt(checked.values, {**checked.failures, **told})

    def _failed(self, rows: int, what: str, *, kind: Any = "http", fix: str, retryable: bool = True, retry_after_s: float = 0.0) -> Attempt:
        said = self._without_token(f"reward {self.name!r} {what}")
        failure = RewardFailure(kind, said, self._where, fix, rows=rows, of_call=True, retryable=retryable, retry_after_s=retry_after_s)
        return Attempt.failed(rows, failure)

    def _shown(self, answer: Any) -> str:
        """The beginning of what the endpoint said, on one line, without the token: some endpoints repeat what they were sent."""
        if answer is None:
            return "(more than is read)"
        text = answer.decode("utf-8", "replace") if isinstance(answer, bytes) else str(answer)
        text = " ".join(self._without_token(text).split())
        return text[:SHOWN] + ("…" if len(text) > SHOWN else "") or "(nothing)"

    def _without_token(self, text: str) -> str:
        return text if self._token is None else text.replace(self._token, "***")


def _url(section: HttpRewardSection) -> httpx2.URL:
    """The address, as who sends the requests reads it: stricter than the config in what a host may be called."""
    try:
        return httpx2.URL(section.url)
    except (httpx2.InvalidURL, ValueError) as error:
        raise UserError(f"the url cannot be asked: {error}", where=f"reward {section.name!r}, url", fix="mend the address") from None


def _first(error: BaseException) -> BaseException:
    """The fault itself, of one that stands for several: tasks of a connection raise together."""
    while inner := getattr(error, "exceptions", None):
        error = inner[0]
    return error


def _token(name: str, variable: str) -> str:
    token = os.environ.get(variable, "").strip()
    where = f"reward {name!r}, auth_env"
    if not token:
        fix = f"set {variable} where the reward ranks run (before `ray start`, on a cluster)"
        raise UserError(f"the environment variable {variable} is not set", where=where, fix=fix)
    if not re.fullmatch(r"[!-~]+", token):
        raise UserError(f"the token in {variable} cannot stand in a header", where=where, fix="it may hold no spaces and only ASCII")
    return token


def _retry_after(headers: Mapping[str, str]) -> float:
    """Seconds to wait, of a number or a date; 0 where nothing sensible was said."""
    said = headers.get("Retry-After", "").strip()
    if re.fullmatch(r"\d{1,9}", said):
        return float(said)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(said).timestamp() - time.time())
    except (TypeError, ValueError, OverflowError):
        return 0.0


def _hint(status: int) -> str:
    if 300 <= status < 400:
        return " (redirects are not followed: give the final url)"
    return " (see auth_env)" if status in (401, 403) else ""


def _largest(rows: int) -> int:
    return RESPONSE_BYTES + RESPONSE_BYTES_A_ROW * rows


def _joined(attempts: Sequence[Attempt]) -> Attempt:
    """The requests of a try as one."""
    values: list[float | None] = []
    failures: dict[int, RewardFailure] = {}
    for attempt in attempts:
        failures.update((len(values) + row, failure) for row, failure in attempt.failures.items())
        values += attempt.values
    return Attempt(tuple(values), failures, len(attempts), sum(attempt.timeouts for attempt in attempts))
