"""The hub's client, huggingface_hub, and what a server at its other end may do with it.

HF_ENDPOINT may name any server, and anyone may own a repository. The client believes what it is
told: it makes names of files from headers, waits as long as it is asked to, takes what it is sent
until that ends, and shows messages as they are. `guard` puts a look at each answer in between.
"""

import contextlib
import functools
import logging
import re
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

from support.files import plain_name
from support.script import UNPRINTABLE, UserError

# Bytes of an answer that is no file: what is known of a repository, or the list of its files.
MOST_ANSWER_BYTES = 2**28
# Seconds that a busy server may ask the client to wait. The hub counts requests in five minutes.
LONGEST_WAIT = 300

# The most bytes that an answer may have now, and what is asked for; see `at_most`.
_limit: ContextVar[tuple[str, int] | None] = ContextVar("limit", default=None)


# Redirections one after the other. Some versions of the client follow a circle for ever.
MOST_REDIRECTS = 20
_redirects: ContextVar[int] = ContextVar("redirects", default=0)


class EndlessDownload(UserError):
    """A download went on beyond the size of what was asked for."""

    def __init__(self, name: str, size: int):
        super().__init__(
            f"{name}: more bytes came than were asked for; expected {size:,} bytes; check the "
            "connection, then run the same command again"
        )


def guard() -> None:
    """From now on look at every answer that huggingface_hub, or datasets through it, gets.

    Call it once more after `datasets` has been imported, whose messages are looked at too.
    """
    _guard_client()
    for name in ("huggingface_hub", "datasets"):
        for handler in logging.getLogger(name).handlers:
            handler.addFilter(_tame)


@functools.cache
def _guard_client() -> None:
    from huggingface_hub.utils import _http

    make_client = _http._GLOBAL_CLIENT_FACTORY  # a notebook may have set one of its own

    def make_guarded_client():
        client = make_client()
        client.event_hooks["request"].append(_ask_for_plain_bytes)
        client.event_hooks["response"].append(_check_answer)
        return client

    _http.set_client_factory(make_guarded_client)


@contextlib.contextmanager
def at_most(name: str, size: int) -> Iterator[None]:
    """Inside, no answer has more than `size` bytes: EndlessDownload, with this name, is raised."""
    token = _limit.set((name, size))
    try:
        yield
    finally:
        _limit.reset(token)


@contextlib.contextmanager
def foreign_errors() -> Iterator[None]:
    """What the clients raise where an answer is not what they think it is becomes a ValueError.

    Of what is not JSON, or no such JSON, or no yaml, each of their versions says something else.
    """
    try:
        yield
    except (UserError, OSError, ValueError, MemoryError):
        raise
    except Exception as error:
        from huggingface_hub.errors import HTTPError

        if isinstance(error, HTTPError):
            raise
        raise ValueError(f"{type(error).__name__}: {error}") from error


def without_secrets(text: str) -> str:
    """A message of the clients without passwords, signatures in addresses, and tokens."""
    from huggingface_hub import get_token

    text = re.sub(r"://[^/\s]*@", "://", text)
    text = re.sub(r"(://[^\s?]*)\?[^\s'\"]+", r"\1?…", text)
    text = re.sub(r"\bhf_[A-Za-z0-9]{16,}", "hf_…", text)
    token = get_token()
    return text.replace(token, "hf_…") if token else text


def _tame(record: logging.LogRecord) -> bool:
    """Make a line that a client is about to log fit for a terminal."""
    text = without_secrets(record.getMessage())
    record.msg, record.args = UNPRINTABLE.sub("?", text), ()
    return True


def _ask_for_plain_bytes(request: Any) -> None:
    """A few compressed bytes could unpack to more than there is memory."""
    request.headers["Accept-Encoding"] = "identity"


def _check_answer(response: Any) -> None:
    """Raise UserError where the client would make a file outside of its folder, or unpack a bomb.

    It also shortens long waits, and from here on counts what comes.
    """
    headers = response.headers
    _check_names(response)
    _count_redirects(response)
    encoding = headers.get("Content-Encoding", "identity")
    if encoding != "identity":
        _refuse(response, f"Content-Encoding {encoding[:80]!r}", "bytes as they are")
    for name in ("Retry-After", "RateLimit"):
        if any(
            int(number[:9]) > LONGEST_WAIT for number in re.findall("[0-9]+", headers.get(name, ""))
        ):
            del headers[name]
    path = response.request.url.path
    limit = _limit.get()
    if re.search("/api/(models|datasets)/", path) and "/resolve/" not in path:
        limit = (path, MOST_ANSWER_BYTES)
    if limit:
        size = headers.get("X-Linked-Size") or headers.get("Content-Length", "")
        if re.fullmatch("[0-9]+", size) and len(size) < 4000 and int(size) > limit[1]:
            raise EndlessDownload(*limit)  # it is not even begun
        response.iter_raw = functools.partial(_iter_raw, response.iter_raw, *limit)


def _check_names(response: Any) -> None:
    headers = response.headers
    # The client names folders and files of its cache after these, the latter by the part in quotes.
    names = {"X-Repo-Commit": headers.get("X-Repo-Commit")}
    if response.request.method == "HEAD":
        for name in ("ETag", "X-Linked-ETag"):
            etag = headers.get(name)
            names[name] = etag and etag.removeprefix("W/").strip('"')
    for name, value in names.items():
        if value is not None and not plain_name(value):
            _refuse(response, f"{name} {value[:80]!r}", "the name of a file")


def _count_redirects(response: Any) -> None:
    _redirects.set(_redirects.get() + 1 if response.is_redirect else 0)
    if _redirects.get() > MOST_REDIRECTS:
        _redirects.set(0)
        _refuse(response, f"{MOST_REDIRECTS} redirections", "a file")


def _iter_raw(
    iter_raw: Any, name: str, size: int, chunk_size: int | None = None
) -> Iterator[bytes]:
    received = 0
    for chunk in iter_raw(chunk_size):
        received += len(chunk)
        if received > size:
            raise EndlessDownload(name, size)
        yield chunk


def _refuse(response: Any, found: str, expected: str) -> None:
    raise UserError(
        f"{response.request.url.host}: answers with {found}; expected {expected}; check "
        "HF_ENDPOINT: this is no server to download from"
    )
