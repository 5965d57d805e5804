"""The sign-in of 3D Slicer's MONAI Label plug-in, which cannot send a token before it has asked for one.

Off by default: it opens GET /auth/, which says that a token is needed, and POST /auth/token, which takes the token as
the password of any user and gives it back.

Source: the client of MONAI Label 0.8 (routes, fields and the form of answers).
"""

from __future__ import annotations

from urllib.parse import parse_qs

from fastapi import APIRouter, Request

from serve.auth import TokenBook
from serve.refusals import Refusal, TooLarge, Unauthenticated

SIGN_IN_ROUTES = frozenset({"/auth/", "/auth/token"})
MAX_BYTES = 4096


def sign_in_router(tokens: TokenBook) -> APIRouter:
    """Return the two routes."""
    router = APIRouter(tags=["MONAI Label"])

    @router.get("/auth/")
    async def enabled() -> dict[str, bool]:
        """Say that a token is needed."""
        return {"enabled": True}

    @router.post("/auth/token")
    async def token(request: Request) -> dict[str, str]:
        """Return a valid token to the client that presents it."""
        secret = await _password(request)
        tokens.identify(f"Bearer {secret}")
        return {"access_token": secret, "token_type": "bearer"}

    return router


async def _password(request: Request) -> str:
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > MAX_BYTES:
            raise TooLarge(f"a sign-in has at most {MAX_BYTES} bytes")
    try:
        fields = parse_qs(body.decode("ascii"), max_num_fields=16)
    except ValueError:
        raise Refusal("the sign-in is not a form") from None
    if len(fields.get("password", ())) != 1:
        raise Unauthenticated("the sign-in has no password; give a token of this service as the password")
    return fields["password"][0]
