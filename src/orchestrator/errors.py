"""Every error this package raises on purpose, classified by remedy.

    OrchestratorError
    ├── ConfigurationError            a setting is unknown or malformed: correct it (exit 2)
    ├── RefusedError                  the request can never succeed as it stands
    │   ├── InvalidArgumentsError         wrong task arguments
    │   ├── CrawlTaskNotFoundError        no such row in the application's crawl_tasks
    │   ├── InvalidDataSourceIdsError     an element of data_source_ids is no positive integer
    │   ├── CatalogMismatchError          the application's tables do not fit the mapping
    │   ├── UnreadableScheduleError       a schedule or a time zone that cannot be read
    │   ├── RunNotFoundError              no such run in the ledger
    │   ├── ScheduleNotFoundError         no beat has noticed such a crawl task
    │   ├── IllegalTransitionError        the run's state does not allow it
    │   ├── RunInProgressError            a run of the crawl task is unfinished, and no second one is wanted
    │   ├── RequestReusedError            the idempotency key came with another request before
    │   ├── RequestInProgressError        the request with the same idempotency key is being answered
    │   ├── InvalidCursorError            a cursor that is none of ours, or of another list
    │   ├── UnauthenticatedError          no API key, or none that is valid
    │   ├── TooManyFailuresError          too many API keys that are none, from one address
    │   ├── ForbiddenError                the API key's role may not do that
    │   └── KeyNotFoundError              no such API key
    └── TransientError                wait and try again; nothing is lost meanwhile
        ├── ApiBusyError                  a request waited too long for its turn
        ├── DatabaseUnavailableError      PostgreSQL is down or restarting
        │   └── DatabaseLockedError           others hold locks that are needed
        ├── DatabaseRightsError           our role lacks a right on our own tables
        ├── NotMigratedError              the ledger's tables are missing or older than this code
        └── PublishError                  the broker did not confirm
            ├── BrokerUnreachableError        no connection, or it broke
            ├── BrokerBlockedError            the broker raised a resource alarm
            ├── ConfirmTimeoutError           no confirm in time
            ├── QueueMissingError             returned as unroutable, or no such queue
            └── MessageRefusedError           the broker said no (nack, queue full)

``code`` is stable and machine-readable: it is stored in the ledger, printed by the command line and
returned by the API. ``retryable`` tells whether waiting can help; no caller looks at messages.
"""

from collections.abc import Sequence
from math import ceil
from typing import ClassVar
from uuid import UUID


class OrchestratorError(Exception):
    """Root of the tree; ``str(error)`` is one sentence meant for people."""

    code: ClassVar[str] = "internal_error"
    retryable: ClassVar[bool] = False


class ConfigurationError(OrchestratorError):
    """A setting is unknown or malformed; the message names it."""

    code = "configuration"


class RefusedError(OrchestratorError):
    """The request can never succeed as it stands."""

    code = "refused"


class InvalidArgumentsError(RefusedError):
    """A task was called with wrong arguments."""

    code = "invalid_arguments"


class CrawlTaskNotFoundError(RefusedError):
    """The application's crawl_tasks has no such row."""

    code = "crawl_task_not_found"


class InvalidDataSourceIdsError(RefusedError):
    """An element of data_source_ids is no positive integer."""

    code = "invalid_data_source_ids"


class CatalogMismatchError(RefusedError):
    """The application's tables do not fit the mapping in the settings, or may not be read."""

    code = "catalog_mismatch"


class UnreadableScheduleError(RefusedError):
    """A schedule or the name of a time zone cannot be read; the message says where and what may stand there."""

    code = "invalid_schedule"


class RunNotFoundError(RefusedError):
    """The ledger has no such run."""

    code = "run_not_found"


class ScheduleNotFoundError(RefusedError):
    """No beat has noticed a crawl task of this id."""

    code = "schedule_not_found"

    def __init__(self, task_id: int) -> None:
        super().__init__(
            f"the scheduler knows no crawl task {task_id}: there is no such row, or no beat has seen it yet"
        )


class IllegalTransitionError(RefusedError):
    """The present state of a run or a schedule does not allow what was asked.

    Args:
        sentence: which state it is, and what is allowed.
        allowed: the actions that are allowed, as the API calls them.
    """

    code = "illegal_transition"

    def __init__(self, sentence: str, allowed: Sequence[str] = ()) -> None:
        super().__init__(sentence)
        self.allowed = tuple(allowed)


class RunInProgressError(RefusedError):
    """A run of the crawl task is unfinished, and its caller wants no second one.

    Args:
        task_id: the crawl task.
        run_id: the unfinished run.
    """

    code = "run_in_progress"

    def __init__(self, task_id: int, run_id: UUID) -> None:
        super().__init__(f"run {run_id} of crawl task {task_id} is not over; on_conflict=allow starts another")
        self.run_id = run_id


class RequestReusedError(RefusedError):
    """The idempotency key came with another request before."""

    code = "idempotency_key_reused"


class RequestInProgressError(RefusedError):
    """The request with the same idempotency key is being answered; ask again in a moment."""

    code = "request_in_progress"
    retryable = True


class InvalidCursorError(RefusedError):
    """A cursor that is none of ours, or belongs to a list with other filters."""

    code = "invalid_cursor"


class UnauthenticatedError(RefusedError):
    """There is no API key, or it is unknown, expired or revoked; which of these is not told."""

    code = "unauthenticated"


class TooManyFailuresError(RefusedError):
    """Too many requests from one address had an API key that is none.

    Args:
        seconds: when to try again.
    """

    code = "too_many_authentication_failures"
    retryable = True

    def __init__(self, seconds: float) -> None:
        super().__init__(f"too many API keys that are not valid came from this address; wait {ceil(seconds)} s")
        self.seconds = seconds


class ForbiddenError(RefusedError):
    """The role of the API key does not allow it."""

    code = "forbidden"


class KeyNotFoundError(RefusedError):
    """There is no such API key."""

    code = "key_not_found"


class TransientError(OrchestratorError):
    """Waiting can help."""

    code = "transient"
    retryable = True


class ApiBusyError(TransientError):
    """A request has waited so long for its turn that its caller will hardly be there any more."""

    code = "api_busy"


class DatabaseUnavailableError(TransientError):
    """PostgreSQL cannot be reached or cannot serve right now."""

    code = "database_unavailable"


class DatabaseLockedError(DatabaseUnavailableError):
    """Others hold locks that are needed, for too long or so that all would wait for each other."""


class DatabaseRightsError(TransientError):
    """Our role lacks a right on our own tables; work goes on once it is granted."""

    code = "database_rights"


class NotMigratedError(TransientError):
    """The ledger's tables are missing, or older than this code."""

    code = "not_migrated"


class PublishError(TransientError):
    """The broker did not confirm every message of a batch."""

    code = "publish_failed"


class BrokerUnreachableError(PublishError):
    """No connection to the broker, or it broke."""

    code = "broker_unreachable"


class BrokerBlockedError(PublishError):
    """The broker raised a memory or disk alarm and accepts nothing."""

    code = "broker_blocked"


class ConfirmTimeoutError(PublishError):
    """The broker did not confirm in time."""

    code = "confirm_timeout"


class QueueMissingError(PublishError):
    """The message could not be routed: its queue does not exist."""

    code = "queue_missing"


class MessageRefusedError(PublishError):
    """The broker answered with a nack, for instance because the queue is full."""

    code = "message_refused"
