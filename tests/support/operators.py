"""An operator at the command line: what is typed there, and what must be told in time while servers are hurt."""

import json
import subprocess
import sys
from dataclasses import dataclass
from typing import Any, Final
from uuid import UUID

from tests.support.processes import eventually
from tests.support.stack import Stack

NOTICED: Final = 30.0
"""Seconds in which an operator must see that something is wrong, and what."""
COMMAND: Final = 90.0
"""Seconds that a command of ours may take, whatever is hurt."""
_LOOK: Final = 1.0
"""Seconds between two looks of an operator: a command takes a processor to itself for most of one."""


@dataclass(frozen=True)
class Outcome:
    """How a command of ours ended."""

    code: int
    out: str
    err: str

    @property
    def document(self) -> Any:  # noqa: ANN401 -- JSON
        """What it printed with --json."""
        return json.loads(self.out)

    @property
    def sentences(self) -> list[str]:
        """What it said to people on standard error; logs are not for them."""
        return [line for line in self.err.splitlines() if line and not line.startswith("{")]

    def assert_refused(self) -> None:
        """Check that it promised nothing, and said why in one sentence."""
        assert self.code == 1, self
        assert not self.out, self
        assert len(self.sentences) == 1, self
        assert self.sentences[0].startswith("orchestrator: "), self
        assert "Traceback" not in self.err, self


def command(stack: Stack, *arguments: str) -> Outcome:
    """Run a command of ours to its end."""
    done = subprocess.run(
        [sys.executable, "-m", "orchestrator", *arguments],
        env=stack.env,
        cwd=stack.directory,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=COMMAND,
    )
    return Outcome(done.returncode, done.stdout, done.stderr)


def await_told(stack: Stack, run_id: UUID, *codes: str) -> str:
    """Wait until the command line tells, in ``runs`` and ``show``, that a run waits and why; return the sentence."""
    seen: list[dict[str, Any]] = []

    def told() -> bool:
        seen.append(command(stack, "show", str(run_id), "--json").document)
        run = seen[-1]["run"]
        if run["state"] != "retrying" or run["error_code"] not in codes:
            return False
        # By its task: many more may wait by now.
        listed = command(stack, "runs", "--state", "retrying", "--task", str(run["task_id"]), "--json").document["runs"]
        return any(each["id"] == str(run_id) and each["error_code"] in codes for each in listed)

    try:
        eventually(told, within=NOTICED, what=f"an operator is told {codes}", every=_LOOK)
    except AssertionError as error:
        raise AssertionError(f"{error}; in {len(seen)} looks, at last it said {seen[-1]}") from None
    assert seen[-1]["run"]["pending"] > 0
    sentence: str = seen[-1]["run"]["error_message"]
    return sentence


def await_degraded(stack: Stack, *, answers: bool = True) -> str:
    """Wait until the command line tells that every worker does its work, and is degraded; return the reason.

    A broker that answers nobody is given up by its consumers before long: then they are not ready any more.
    """
    expected = {"degraded"} if answers else {"degraded", "not ready"}
    seen: list[list[dict[str, Any]]] = []

    def told() -> bool:
        nodes = command(stack, "workers", "--json").document["nodes"]
        seen.append([node for node in nodes if node["kind"] == "worker"])
        return {node["status"] for node in seen[-1]} <= expected

    try:
        eventually(told, within=NOTICED, what="`orchestrator workers` says that the workers are degraded", every=_LOOK)
    except AssertionError as error:
        raise AssertionError(f"{error}; at last it said {seen[-1]}") from None
    probe = command(stack, "ready", "worker")
    assert not answers or (probe.code, "degraded" in probe.out) == (0, True), probe
    reason: str = seen[-1][0]["degraded"] or seen[-1][0]["problem"]
    return reason
