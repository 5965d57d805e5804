"""Requests that are refused on purpose: one sentence and an HTTP status each."""

from __future__ import annotations

from medfl_ray.errors import DataError, MedflError


class Refusal(MedflError):
    """A request that is not answered; `status` is its HTTP status."""

    status = 400


class Unauthenticated(Refusal):
    """No token, or one that is not known."""

    status = 401


class Forbidden(Refusal):
    """A token without the role that the route needs."""

    status = 403


class NotServed(Refusal):
    """A model, version or route that is not served."""

    status = 404


class TooSlow(Refusal):
    """A client that stopped sending its request."""

    status = 408


class TooLarge(Refusal):
    """A request or an answer over its limit of size."""

    status = 413


class TooMany(Refusal):
    """More requests than a token may send; `retry_after_s` says when the next is welcome."""

    status = 429
    retry_after_s = 1.0


class Unavailable(Refusal):
    """The service cannot answer now; the same request may succeed later."""

    status = 503


class TimedOut(Refusal):
    """The model did not answer in time."""

    status = 504


def status_of(error: MedflError) -> int:
    """Return the HTTP status of an expected error; data that cannot be used are 422, our own failures 500."""
    if isinstance(error, Refusal):
        return error.status
    return 422 if isinstance(error, DataError) else 500
