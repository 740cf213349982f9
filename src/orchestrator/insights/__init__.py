"""Read models: what the command line and the HTTP API show of the ledger. They write nothing.

Lists come in pages. A page is bounded, ordered by keys that an index has, and followed by the one ``after`` the keys of
its last row: neither OFFSET nor a count over history, so that the millionth page costs what the first one does.

One module a story; no story knows another, but that searches show runs:

- ``runs``: runs, and what is kept of each.
- ``searches``: lists of runs.
- ``schedules``: schedules, their readings and pauses, and what became of slots.
- ``audit``: who changed what.
- ``nodes``: workers and beats.
"""

from orchestrator.insights.audit import AuditFilter, AuditInsights, AuditView
from orchestrator.insights.nodes import ALIVE_WITHIN, NodeInsights, NodeStatus, NodeView
from orchestrator.insights.runs import AttemptView, DispatchView, EventView, RunInsights, RunView
from orchestrator.insights.schedules import (
    FiringFilter,
    FiringView,
    PauseView,
    ReadingView,
    ScheduleInsights,
    ScheduleView,
)
from orchestrator.insights.searches import FoundRuns, RunFilter, RunSearches

__all__ = [
    "ALIVE_WITHIN",
    "AttemptView",
    "AuditFilter",
    "AuditView",
    "DispatchView",
    "EventView",
    "FiringFilter",
    "FiringView",
    "FoundRuns",
    "Insights",
    "NodeStatus",
    "NodeView",
    "PauseView",
    "ReadingView",
    "RunFilter",
    "RunView",
    "ScheduleView",
]


class Insights(RunSearches, RunInsights, ScheduleInsights, AuditInsights, NodeInsights):
    """Reads for people.

    Args:
        database: where the ledger's tables are.
    """
