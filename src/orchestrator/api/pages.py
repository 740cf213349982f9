"""Lists by the page: opaque cursors that hold where a list goes on, bound to what it is a list of."""

import json
from base64 import urlsafe_b64decode, urlsafe_b64encode
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from hashlib import blake2b
from typing import Any, Final, TypeVar
from uuid import UUID

from orchestrator.bootstrap import Services
from orchestrator.errors import InvalidCursorError

_LARGEST: Final = 2**63 - 1
_LARGEST_INT4: Final = 2**31 - 1

Item = TypeVar("Item")
Position = TypeVar("Position")


def window_of(ours: Services) -> datetime:
    """Return where a list begins whose caller did not say."""
    return datetime.now(UTC).replace(microsecond=0) - timedelta(seconds=ours.settings.api.window)


def encode(position: Sequence[object], filters: Mapping[str, object]) -> str:
    """Return the cursor of a position in a list."""
    document = json.dumps([_digest(filters), *position], default=str, separators=(",", ":"))
    return urlsafe_b64encode(document.encode()).rstrip(b"=").decode()


def decode(
    cursor: str | None, filters: Mapping[str, object], *kinds: Callable[[Any], object]
) -> tuple[Any, ...] | None:
    """Return the position that a cursor holds, none of no cursor.

    Args:
        cursor: as it came.
        filters: of the list that is asked for.
        kinds: what to make of each part of the position.

    Raises:
        InvalidCursorError: it is none of ours, or of a list with other filters.
    """
    if cursor is None:
        return None
    try:
        padded = cursor.encode("ascii") + b"=" * (-len(cursor) % 4)
        digest, *parts = json.loads(urlsafe_b64decode(padded))
        position = tuple(kind(part) for kind, part in zip(kinds, parts, strict=True))
    except (ValueError, TypeError, AttributeError, RecursionError):
        raise InvalidCursorError("the cursor is none of ours: begin without one") from None
    if digest != _digest(filters):
        raise InvalidCursorError("the cursor belongs to a list with other filters: begin without one")
    return position


def after_number(
    cursor: str | None, filters: Mapping[str, object], kind: Callable[[Any], object] | None = None
) -> int | None:
    """Return the number that a cursor holds; see :func:`decode`."""
    position = decode(cursor, filters, kind or number)
    return None if position is None else position[0]


def moment(text: str) -> datetime:
    """Read a moment of a position."""
    read = datetime.fromisoformat(text)
    if read.tzinfo is None:
        raise ValueError(text)
    return read


def maybe_moment(text: str | None) -> datetime | None:
    """Read a moment of a position, where there may be none."""
    return None if text is None else moment(text)


def number(value: object) -> int:
    """Read a number of a position."""
    if type(value) is not int or not 0 <= value <= _LARGEST:
        raise ValueError(value)
    return value


def small_number(value: object) -> int:
    """Read a number of a position, where PostgreSQL has four bytes for it."""
    return min(number(value), _LARGEST_INT4)


def run_id(text: str) -> UUID:
    """Read a run's id of a position."""
    return UUID(text)


def paged(
    found: Sequence[Item], limit: int, position: Callable[[Item], Sequence[object]], filters: Mapping[str, object]
) -> tuple[Sequence[Item], str | None]:
    """Cut what was found, one more than wanted, to a page; return it, and the cursor of the next one.

    Args:
        found: at most one more than ``limit``.
        limit: items of a page.
        position: of an item in the list.
        filters: of the list.
    """
    page = found[:limit]
    return page, encode(position(page[-1]), filters) if len(found) > limit else None


def _digest(filters: Mapping[str, object]) -> str:
    # With those that are unset: their names tell lists apart.
    document = json.dumps(sorted((name, str(value)) for name, value in filters.items()))
    return blake2b(document.encode(), digest_size=9).hexdigest()
