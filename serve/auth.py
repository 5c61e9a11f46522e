"""Who may ask, and how much: bearer keys of which only hashes are kept, and a quota for each.

    python -m serve.auth keys.json alice --requests_per_minute 600 --tokens_per_minute 1000000

adds a key for alice and prints it, this once.
"""

import argparse
import hashlib
import hmac
import math
import os
import secrets
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from pydantic import Field, TypeAdapter, ValidationError

from embedlib.config import Config
from embedlib.errors import ConfigError

PREFIX = "emb-"
SCHEME = "bearer "


class Key(Config):
    """A client."""

    name: str = Field(min_length=1)
    """Whose it is; what logs and metrics say."""
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    """Of the key. Keys are random and long, so that a plain hash cannot be turned back."""
    requests_per_minute: int | None = Field(default=None, ge=1)
    """Requests, unused ones kept for up to a minute; none: any number."""
    tokens_per_minute: int | None = Field(default=None, ge=1)
    """Tokens, unused ones kept for up to a minute; none: any number."""


KEYS = TypeAdapter(list[Key])


def read_keys(path: Path) -> list[Key]:
    """The keys of a JSON file; ConfigError where it cannot be read or names a client twice."""
    try:
        keys = KEYS.validate_json(path.read_bytes())
    except OSError as error:
        raise ConfigError(f"keys {path}: cannot be read: {error.strerror}") from error
    except ValidationError as error:
        raise ConfigError(f"keys {path}: {error}") from error
    if len({key.name for key in keys}) < len(keys):
        raise ConfigError(f"keys {path}: two keys have the same name; expected one a client")
    return keys


def add_key(path: Path, name: str, requests_per_minute: int | None, tokens_per_minute: int | None) -> str:
    """Add a client to the file, readable by its owner alone, and give its key."""
    keys = read_keys(path) if path.exists() else []
    if name in {key.name for key in keys}:
        raise ConfigError(f"keys {path}: {name!r} has a key; remove it first, or choose another name")
    secret = PREFIX + secrets.token_urlsafe(32)
    limits = {"requests_per_minute": requests_per_minute, "tokens_per_minute": tokens_per_minute}
    keys.append(Key.model_validate({"name": name, "sha256": hash_key(secret), **limits}))
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    with open(os.open(scratch, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "wb") as file:
        file.write(KEYS.dump_json(keys, indent=2) + b"\n")
    scratch.replace(path)
    return secret


def hash_key(secret: str) -> str:
    """SHA-256 (hex) of a key."""
    return hashlib.sha256(secret.encode()).hexdigest()


def client_of(authorization: str | None, keys: Sequence[Key]) -> Key | None:
    """Whose key an Authorization header carries; None where it is nobody's.

    All keys are compared, each in a time that does not depend on where it differs.
    """
    if authorization is None or not authorization.lower().startswith(SCHEME):
        return None
    given = hash_key(authorization[len(SCHEME) :].strip())
    found = None
    for key in keys:
        if hmac.compare_digest(given, key.sha256):
            found = key
    return found


class QuotaError(Exception):
    """A client has used what it has; come back in `retry_after_s`."""

    def __init__(self, client: str, unit: str, limit: int, retry_after_s: int) -> None:
        super().__init__(f"{client}: {limit} {unit} a minute are used up; try again in {retry_after_s} s")
        self.retry_after_s = retry_after_s


class Bucket:
    """An allowance that fills evenly, up to what a minute gives (a token bucket)."""

    def __init__(self, per_minute: int, now: float) -> None:
        self.per_minute, self.left, self.at = per_minute, float(per_minute), now

    def missing_s(self, amount: int, now: float) -> float:
        """Seconds until `amount` may be taken, 0 where it may now. More than a minute's worth waits for a full one."""
        self.left = min(self.per_minute, self.left + (now - self.at) * self.per_minute / 60)
        self.at = now
        return max(0.0, (min(amount, self.per_minute) - self.left) * 60 / self.per_minute)

    def take(self, amount: int) -> None:
        """Use `amount`; what is more than a minute's worth is owed."""
        self.left -= amount


class Quota(NamedTuple):
    """What one client has left."""

    key: Key
    requests: Bucket | None
    tokens: Bucket | None

    @classmethod
    def of(cls, key: Key, now: float) -> "Quota":
        """A full one."""
        return cls(
            key, *(Bucket(limit, now) if limit else None for limit in (key.requests_per_minute, key.tokens_per_minute))
        )

    def take(self, num_tokens: int, now: float) -> None:
        """Use one request and its tokens; QuotaError, and nothing used, where either is not there."""
        wanted = (("requests", self.requests, 1), ("tokens", self.tokens, num_tokens))
        for unit, bucket, amount in wanted:
            if bucket and (missing := bucket.missing_s(amount, now)):
                raise QuotaError(self.key.name, unit, bucket.per_minute, math.ceil(missing))
        for _, bucket, amount in wanted:
            if bucket:
                bucket.take(amount)


def main(arguments: Sequence[str] | None = None, show: Callable[[str], None] = print) -> None:
    """Add a key and print it."""
    parser = argparse.ArgumentParser(description="Add a client's key to a file and print it, this once.")
    parser.add_argument("file", type=Path, help="JSON file of the keys; made where it is not there")
    parser.add_argument("name", help="whose key it is")
    parser.add_argument("--requests_per_minute", type=int, help="none: any number")
    parser.add_argument("--tokens_per_minute", type=int, help="none: any number")
    options = parser.parse_args(arguments)
    try:
        show(add_key(options.file, options.name, options.requests_per_minute, options.tokens_per_minute))
    except (ConfigError, ValidationError) as error:
        parser.exit(1, f"{error}\n")


if __name__ == "__main__":
    main()
