"""Who may ask, and how often: keys, host names, pages of other sites, and limits for each caller."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from starlette.datastructures import Headers
from starlette.types import Scope

from server.api import page
from server.api.errors import ApiError, retry_after, shown
from server.settings import Settings

PUBLIC_PATHS = page.PATHS | {"/health"}
# DeepStack's clients send their key as a field of the form: without one in the head this path's route asks for it.
DEEPSTACK_PATH = "/v1/vision/detection"
ANY = "*"
SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})
MAX_CALLERS = 10_000  # callers remembered at once; the one not seen for longest is forgotten first
BUSY_RETRY_S = 1.0


class Access:
    """Judges a request by its head alone. Lives on the event loop."""

    def __init__(self, settings: Settings, now: Callable[[], float] = time.monotonic) -> None:
        self.digests = [digest(key) for key in settings.keys]
        self.origins = settings.cors_origins
        self.hosts = None if not is_loopback(settings.host) else {settings.host.lower(), *settings.allowed_hosts}
        self.limits = CallLimits(settings.rate_limit, settings.max_per_key, now)

    @contextmanager
    def admit(self, scope: Scope, headers: Headers) -> Iterator[dict[str, str]]:
        """A request's stay; what its answer's headers tell of the caller's limits. Errors: ApiError 401, 403, 429."""
        self._check_host(headers.get("host"))
        self._check_site(scope["method"], headers)
        if scope["path"] in PUBLIC_PATHS:
            yield {}
            return
        caller = self._caller(scope, headers)
        with self.limits.hold(caller) as told:
            yield told

    def _caller(self, scope: Scope, headers: Headers) -> str:
        """The key's digest, or the address where there are no keys, or none is sent yet. Errors: ApiError 401."""
        given = key_in(headers)
        if not self.digests or (not given and scope["path"] == DEEPSTACK_PATH):
            return str((scope.get("client") or ("",))[0])
        require_key(given, self.digests)
        return digest(given).hex()

    def _check_host(self, host: str | None) -> None:
        """A page whose name was pointed at this machine (DNS rebinding) must not reach a server that is for it alone.

        Errors: ApiError 403.
        """
        if self.hosts is None or host is None or ANY in self.hosts:
            return
        name = host_name(host)
        if name not in self.hosts and not is_loopback(name):
            message = f"The host {shown(name)} is not served here; start the server with --allowed-hosts to serve it."
            raise ApiError(403, message, kind="permission_error", code="host_not_allowed")

    def _check_site(self, method: str, headers: Headers) -> None:
        """Another site's page may not make a browser act, not even by a form. Errors: ApiError 403."""
        if method in SAFE_METHODS or headers.get("sec-fetch-site") != "cross-site":
            return
        if ANY not in self.origins and headers.get("origin") not in self.origins:
            message = "Pages of other sites may not use this server; start it with --cors-origins to let them."
            raise ApiError(403, message, kind="permission_error", code="origin_not_allowed")


@dataclass
class Caller:
    """What a caller has left (requests) at a moment (seconds), and how many of its requests are open."""

    tokens: float
    moment: float
    num_open: int = 0


class CallLimits:
    """A token bucket (Turner, IEEE Communications 24(10), 1986) and a count of open requests for each caller.

    ``per_minute`` requests come back evenly, as many may come at once; ``max_open`` may run beside each other. None:
    no limit.
    """

    def __init__(self, per_minute: float | None, max_open: int | None, now: Callable[[], float]) -> None:
        self.per_minute = per_minute
        self.max_open = max_open
        self.now = now
        self.callers: OrderedDict[str, Caller] = OrderedDict()

    @contextmanager
    def hold(self, name: str) -> Iterator[dict[str, str]]:
        """Count a request in until it ends; the headers that tell what is left. Errors: ApiError 429."""
        if self.per_minute is None and self.max_open is None:
            yield {}
            return
        caller = self._find(name)
        if self.max_open is not None and caller.num_open >= self.max_open:
            message = f"{caller.num_open} requests of this caller are open, and {self.max_open} may be; wait for one."
            raise refusal(message, BUSY_RETRY_S, {})
        told = {} if self.per_minute is None else self._take(caller, self.per_minute)
        caller.num_open += 1
        try:
            yield told
        finally:
            caller.num_open -= 1

    def _find(self, name: str) -> Caller:
        caller = self.callers.setdefault(name, Caller(max(self.per_minute or 0, 1), self.now()))
        self.callers.move_to_end(name)
        if len(self.callers) > MAX_CALLERS:
            self.callers.popitem(last=False)
        return caller

    def _take(self, caller: Caller, per_minute: float) -> dict[str, str]:
        """Take one request out of the bucket. Errors: ApiError 429."""
        now, size = self.now(), max(per_minute, 1)
        caller.tokens = min(size, caller.tokens + (now - caller.moment) * per_minute / 60)
        caller.moment = now
        wait_s = (1 - caller.tokens) * 60 / per_minute
        if wait_s <= 0:
            caller.tokens -= 1
        told = {
            "x-ratelimit-limit-requests": f"{per_minute:g}",
            "x-ratelimit-remaining-requests": str(int(caller.tokens)),
            "x-ratelimit-reset-requests": f"{(size - caller.tokens) * 60 / per_minute:.3f}s",
        }
        if wait_s > 0:
            raise refusal(f"This caller may send {per_minute:g} requests a minute; wait.", wait_s, told)
        return told


def refusal(message: str, wait_s: float, told: dict[str, str]) -> ApiError:
    """429 for one caller."""
    headers = {"Retry-After": retry_after(wait_s)} | told
    return ApiError(429, message, kind="rate_limit_error", code="rate_limit_exceeded", headers=headers)


def key_in(headers: Headers) -> str:
    """The key that a request's head holds; empty for none."""
    return headers.get("authorization", "").removeprefix("Bearer ") or headers.get("x-api-key", "")


def require_key(given: str, known: Sequence[bytes]) -> None:
    """Errors: ApiError 401 where ``given`` is none of the keys with the digests ``known``."""
    own = digest(given)
    # Every key is compared, whichever fits: the time taken tells nothing.
    if sum(hmac.compare_digest(own, one) for one in known) == 0:
        message = "The API key is missing or wrong; send it as 'Authorization: Bearer KEY'."
        challenge = {"WWW-Authenticate": "Bearer"}
        raise ApiError(401, message, kind="authentication_error", code="invalid_api_key", headers=challenge)


def digest(key: str) -> bytes:
    """Keys are compared as digests, so that the time taken tells nothing."""
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def host_name(host: str) -> str:
    """The name in a Host header: without port, brackets and a dot at its end."""
    name = host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]
    return name.lower().rstrip(".")


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches ``host``."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


def open_to_all(settings: Settings) -> bool:
    """Whether other machines reach the server and no key is asked for."""
    return not is_loopback(settings.host) and not settings.keys
