"""HTTP for endpoints that nobody vouches for: one answer takes bounded time and memory.

The HTTP library bounds each wait for the next bytes but not their sum, and holds whatever arrives.
Here the waits of one request, from the look-up of the host to the last byte, share a deadline, and
the body is read piece by piece up to a limit.
"""

import socket
import threading
import time
from contextlib import closing
from http.cookiejar import CookieJar, DefaultCookiePolicy
from importlib import import_module
from typing import Any

import openai

from rrhf_fast.data.checks import one_line

# The library that openai is built on: httpx2, or httpx in older releases.
httpx = import_module(openai.DefaultHttpxClient.__base__.__module__.partition(".")[0])
# What writes requests and responses to logs.
LOGGERS = ("openai._base_client", httpx.__name__)
LOGGERS += tuple(
    f"{httpx.__name__.replace('httpx', 'httpcore')}.{part}"
    for part in ("connection", "http11", "proxy", "socks")
)

# Bytes of an answer: 64 for each token of one of 128k tokens, of which a token of text rarely takes
# more than 12. Not more, because parsed JSON may take 30 times its size in memory.
MAX_ANSWER = 8 * 2**20
# Bytes of the explanation of an error; the rest is not read.
MAX_ERROR = 64 * 2**10
MAX_REDIRECTS = 5
# The headers of a response that matter here; others may lead the client astray, such as the
# charset in a content type.
_HEADERS = ("retry-after", "retry-after-ms", "x-should-retry")

_thread = threading.local()  # .deadline of the request that this thread waits for


class BoundedClient(openai.DefaultHttpxClient):
    """An HTTP client that gives up a request after `seconds` or `MAX_ANSWER` bytes, whichever comes
    first, keeps no cookies and asks for answers without compression."""

    def __init__(self, seconds: float):
        no_cookies = CookieJar(DefaultCookiePolicy(allowed_domains=[]))
        headers = {"Accept-Encoding": "identity"}
        super().__init__(timeout=seconds, cookies=no_cookies, headers=headers)
        self._seconds = seconds
        for transport in {self._transport, *self._mounts.values()} - {None}:  # one per proxy
            pool = transport._pool
            pool._network_backend = _Sockets(pool._network_backend)

    def send(self, request: Any, **_) -> Any:
        """Send a request and follow redirects; returns the response, its body read. Raises the
        library's RequestError."""
        _thread.deadline = time.monotonic() + self._seconds
        try:
            for _ in range(MAX_REDIRECTS + 1):
                # Without redirects: the library would read the bodies of these without a limit.
                response = super().send(request, stream=True, follow_redirects=False)
                with closing(response):
                    body, reason = _read(response)
                if response.next_request is None:
                    break
                request = response.next_request  # holds no key if the host is another one
            else:
                raise httpx.TooManyRedirects(f"more than {MAX_REDIRECTS} redirects")
        except (TimeoutError, httpx.TimeoutException):
            problem = f"no whole answer in {self._seconds:g} s"
            raise httpx.ReadTimeout(problem, request=request) from None
        except (OSError, UnicodeError) as error:  # no such host, or not the name of one
            raise httpx.ConnectError(str(error), request=request) from None
        headers = {name: response.headers[name] for name in _HEADERS if name in response.headers}
        return httpx.Response(
            response.status_code,
            headers=headers,
            content=body,
            request=response.request,
            extensions={"not_taken": reason},
        )


def _read(response: Any) -> tuple[bytes, str | None]:
    """The body of a response, or why it is not taken; of an error, its beginning."""
    limit = MAX_ANSWER if response.is_success else MAX_ERROR
    coding = response.headers.get("content-encoding") or "identity"
    if coding != "identity":  # a few bytes may decode to any number
        return b"", f"an answer compressed unasked (Content-Encoding: {one_line(coding, 40)})"
    body = bytearray()
    for piece in response.iter_raw():
        body += piece
        if len(body) > limit:
            break
    if len(body) > limit and response.is_success:
        return b"", f"an answer of more than {limit >> 20} MiB"
    return bytes(body[:limit]), None


def _left() -> float:
    """Seconds until this thread's request has to end. Raises TimeoutError after that."""
    left = _thread.deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left


class _Sockets:
    """Network backend of a connection pool that ends every wait at the deadline."""

    def __init__(self, backend: Any):
        self._backend = backend

    def connect_tcp(self, host: str, port: int, timeout: float | None = None, **options) -> Any:
        # One address at a time, as each is given the whole timeout.
        problem: Exception | None = None
        for *_, address in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM):
            left = _left()
            try:
                return _Stream(self._backend.connect_tcp(address[0], port, left, **options))
            except Exception as error:  # the library's own
                problem = error
        raise problem


class _Stream:
    """A connection that ends every wait at the deadline."""

    def __init__(self, stream: Any):
        self._stream = stream
        self.close, self.get_extra_info = stream.close, stream.get_extra_info

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        return self._stream.read(max_bytes, _left())

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        for start in range(0, len(buffer), 2**14):  # pieces that are sent in one go
            self._stream.write(buffer[start : start + 2**14], _left())

    def start_tls(self, ssl_context: Any, server_hostname: str, timeout: float | None = None):
        return _Stream(self._stream.start_tls(ssl_context, server_hostname, _left()))
