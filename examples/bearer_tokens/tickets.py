"""Tokens: who they are for and until when, signed, so that whoever has the key needs no list."""

import hashlib
import hmac


def sign(key: bytes, user: str, expires: float) -> str:
    """Return a token for a user until `expires`, in seconds of Unix time."""
    text = f"{user} {expires:.3f}"
    return f"{text} {_signature(key, text)}"


def verify(key: bytes, token: str) -> tuple[str, float]:
    """Return whose a token is, and until when.

    Raises:
        ValueError: it isn't one, or nobody with the key has signed it.
    """
    text, _, signature = token.rpartition(" ")
    # In constant time: how long it takes must not tell how much of a guess is right.
    if not hmac.compare_digest(signature.encode(), _signature(key, text).encode()):
        raise ValueError("no such token")
    user, _, expires = text.rpartition(" ")
    return user, float(expires)


def _signature(key: bytes, text: str) -> str:
    return hmac.new(key, text.encode(), hashlib.sha256).hexdigest()
