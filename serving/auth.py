"""Clients' API keys: made here, kept nowhere but as their hashes.

A key is 256 random bits, so one SHA-256 is enough: there is nothing to guess from a list of words,
which is what slow, salted hashes are for. (They would also cost more than the whole request.)
"""

import hashlib
import hmac
import secrets
from collections.abc import Callable, Iterable

from serving.config import KeyEntry
from serving.openai.errors import ApiError
from serving.rate_limit import Account

PREFIX = "attnserve-"


def new_key() -> str:
    """Return a new random key."""
    return PREFIX + secrets.token_urlsafe(32)


def digest(key: str) -> str:
    """Return what the configuration has of a key: its SHA-256 in hexadecimal digits."""
    return hashlib.sha256(key.encode()).hexdigest()


class Keys:
    """The keys of a configuration, each with its account."""

    def __init__(
        self,
        entries: Iterable[KeyEntry],
        old: "Keys | None" = None,
        new_account: Callable[[str], Account] = Account,
    ) -> None:
        """Take the keys of a configuration; those that `old` has keep what they have used, and
        what runs for those that only `old` has ends."""
        self._accounts: dict[bytes, tuple[bytes, Account]] = {}
        for entry in entries:
            hashed = bytes.fromhex(entry.sha256)
            known = old._accounts.get(hashed) if old else None
            account = known[1] if known else new_account(entry.sha256)
            account.set(entry)
            self._accounts[hashed] = (hashed, account)
        for hashed, (_, account) in old._accounts.items() if old else ():
            if hashed not in self._accounts:
                account.revoke()

    def __bool__(self) -> bool:
        """Return whether a key is needed."""
        return bool(self._accounts)

    def account(self, authorization: bytes) -> Account:
        """Return the account of an Authorization header.

        No time depends on how much of a key is right: what is looked up is its SHA-256, which
        nobody can steer towards that of another, and the comparison is hmac's.

        Raises:
            ApiError: 401; there is no key, or one that is none of ours.
        """
        if not authorization:
            message = (
                "You didn't provide an API key. You need to provide your API key in an "
                "Authorization header using Bearer auth (i.e. Authorization: Bearer YOUR_KEY)."
            )
            raise ApiError(401, message)
        scheme, _, key = authorization.partition(b" ")
        hashed = hashlib.sha256(key.strip()).digest()
        known, account = self._accounts.get(hashed, (bytes(32), None))
        if account is None or not hmac.compare_digest(known, hashed) or scheme.lower() != b"bearer":
            # The message does not repeat the key.
            raise ApiError(401, "Incorrect API key provided.", code="invalid_api_key")
        return account
