"""Who may use the HTTP API: keys, kept as digests, and when they end.

A key is ``ork_<id>_<secret>``: the id is public, by it people and the audit log call the key; the secret has 256 random
bits. Only the SHA-256 of the whole is kept: of random bits that many, nobody finds another preimage, and a slow hash
would be a way to exhaust us.
"""

import secrets
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timedelta
from hashlib import sha256
from hmac import compare_digest
from typing import Any, Final

from sqlalchemy import Connection, Row, bindparam, exists, func, insert, or_, select, update

from orchestrator.db import Database
from orchestrator.domain import Role
from orchestrator.errors import (
    IllegalTransitionError,
    InvalidArgumentsError,
    KeyNotFoundError,
    TransientError,
    UnauthenticatedError,
)
from orchestrator.ledger.transitions import clock, now
from orchestrator.schema import api_keys, audit_events

PREFIX: Final = "ork"
_ID_BYTES: Final = 6
_SECRET_BYTES: Final = 32
_LONGEST: Final = 200
_LONGEST_NAME: Final = 100
_VALID: Final = api_keys.c.revoked_at.is_(None) & or_(api_keys.c.expires_at.is_(None), api_keys.c.expires_at > now)
_STALE: Final = or_(api_keys.c.used_at.is_(None), api_keys.c.used_at < now - timedelta(minutes=1))

_KNOWN: Final = select(api_keys.c.name, api_keys.c.role, api_keys.c.digest, _STALE.label("stale")).where(
    api_keys.c.id == bindparam("key_id"), _VALID
)


@dataclass(frozen=True, slots=True)
class Principal:
    """Whose request it is.

    Attributes:
        key_id: the public part of the key.
        name: whose key it is, as an administrator named it.
        role: what it may do.
    """

    key_id: str
    name: str
    role: Role

    @property
    def actor(self) -> str:
        """Who it is, for the audit log."""
        return f"key:{self.key_id} ({self.name})"


@dataclass(frozen=True, slots=True)
class KeyView:
    """One API key as people see it; moments are aware, in UTC."""

    id: str
    name: str
    role: Role
    created_at: datetime
    created_by: str
    expires_at: datetime | None
    revoked_at: datetime | None
    used_at: datetime | None
    valid: bool


_SHOWN: Final = [
    *(api_keys.c[name] for name in KeyView.__dataclass_fields__ if name != "valid"),
    _VALID.label("valid"),
]


class KeyLedger:
    """Makes, checks and revokes API keys.

    Args:
        database: where the ledger's tables are.
    """

    def __init__(self, database: Database) -> None:
        self._database = database

    def create(self, name: str, role: Role, *, actor: str, days: float | None) -> tuple[KeyView, str]:
        """Make a key; return it, and its text, which is not to be had again.

        Args:
            name: whose it is.
            role: what it may do.
            actor: who asks.
            days: after which it is no longer valid; none: it stays valid.

        Raises:
            InvalidArgumentsError: that is no name.
        """
        if not 1 <= len(name.strip()) <= _LONGEST_NAME or not name.isprintable():
            raise InvalidArgumentsError(
                f"a key's name has 1 to {_LONGEST_NAME} printable characters, got {name[:50]!r}"
            )
        key_id = secrets.token_hex(_ID_BYTES)
        text = f"{PREFIX}_{key_id}_{secrets.token_urlsafe(_SECRET_BYTES)}"
        lives = None if days is None else clock + timedelta(days=days)
        values = {"id": key_id, "name": name, "role": role, "digest": _digest(text), "created_by": actor}
        with self._database.transaction() as connection:
            made = connection.execute(insert(api_keys).values(values | {"expires_at": lives}).returning(*_SHOWN))
            _audit(connection, actor, "create_key", key_id, after={"name": name, "role": role, "days": days})
            return _view(made.one()), text

    def revoke(self, key_id: str, *, actor: str, reason: str | None = None) -> None:
        """Make a key invalid, at once and for good.

        Raises:
            KeyNotFoundError: there is no such key.
            IllegalTransitionError: it is revoked.
        """
        with self._database.transaction() as connection:
            known = connection.execute(select(api_keys).where(api_keys.c.id == key_id).with_for_update()).one_or_none()
            if known is None:
                raise KeyNotFoundError(f"there is no API key {key_id!r}; `orchestrator keys list` shows all")
            if known.revoked_at is not None:
                raise IllegalTransitionError(f"API key {key_id} is revoked already", [])
            connection.execute(update(api_keys).where(api_keys.c.id == key_id).values(revoked_at=clock))
            before = {"name": known.name, "role": known.role}
            _audit(connection, actor, "revoke_key", key_id, reason=reason, before=before)

    def all(self) -> list[KeyView]:
        """Return all keys, newest first."""
        statement = select(*_SHOWN).order_by(api_keys.c.created_at.desc(), api_keys.c.id)
        with self._database.autocommit() as connection:
            return list(map(_view, connection.execute(statement)))

    def any(self) -> bool:
        """Return whether anybody has a valid key."""
        with self._database.autocommit() as connection:
            return bool(connection.scalar(select(exists().where(_VALID))))

    def authenticate(self, text: str) -> Principal:
        """Return whose key this is.

        Raises:
            UnauthenticatedError: it is no key of ours, or not valid any more.
        """
        _, _, rest = text.partition(f"{PREFIX}_")
        key_id = rest.partition("_")[0]
        if not text.startswith(f"{PREFIX}_") or len(text) > _LONGEST or not key_id.isascii() or "\x00" in text:
            raise UnauthenticatedError("the API key is not valid")
        with self._database.autocommit() as connection:
            known = connection.execute(_KNOWN, {"key_id": key_id}).one_or_none()
        # Whether the id is known or not, a digest is compared.
        if not compare_digest(_digest(text), known.digest if known else bytes(32)) or known is None:
            raise UnauthenticatedError("the API key is not valid")
        if known.stale:
            self._note_use(key_id)
        return Principal(key_id, known.name, Role(known.role))

    def _note_use(self, key_id: str) -> None:
        # Not worth waiting for the disk or for anybody, nor worth refusing a key, nor worth a write for each request.
        free = select(api_keys.c.id).where(api_keys.c.id == key_id, _STALE).with_for_update(skip_locked=True)
        with suppress(TransientError), self._database.transaction() as connection:
            connection.execute(select(func.set_config("synchronous_commit", "off", True)))  # noqa: FBT003 -- SQL's
            connection.execute(update(api_keys).where(api_keys.c.id.in_(free)).values(used_at=clock))


def _view(row: Row[Any]) -> KeyView:
    return KeyView(**{**row._mapping, "role": Role(row.role)})  # noqa: SLF001 -- SQLAlchemy's documented name


def _digest(text: str) -> bytes:
    return sha256(text.encode()).digest()


def _audit(
    connection: Connection,
    actor: str,
    action: str,
    key_id: str,
    *,
    reason: str | None = None,
    before: dict[str, object] | None = None,
    after: dict[str, object] | None = None,
) -> None:
    about = {"key": key_id}
    connection.execute(
        insert(audit_events).values(
            actor=actor,
            action=action,
            reason=reason,
            before=None if before is None else about | before,
            after=about if after is None else about | after,
        )
    )
