"""A BFF's way to the orchestrator over HTTP. To copy: needs task-orchestrator (or its client module) and httpx2.

API=http://127.0.0.1:8000 KEY=ork_… python bff_http.py 7
"""
# ruff: noqa: INP001, T201 -- a script to be copied, part of no package

import os
import sys

from orchestrator.client import ApiError, Client


def run_now(client: Client, task_id: int, click_id: str) -> str:
    """What a button does: a double click is one run, and so is a click whose answer was lost."""
    try:
        accepted = client.run(task_id, on_conflict="return_existing", idempotency_key=click_id)
    except ApiError as error:
        return f"refused: {error}"
    return f"{'started' if accepted.created else 'under way already'}: {accepted.id}"


if __name__ == "__main__":
    with Client(os.environ["API"], os.environ["KEY"]) as client:
        task_id = int(sys.argv[1])
        print(run_now(client, task_id, click_id=f"click-{os.getpid()}"))
        for run in client.runs(task_id=task_id, limit=5):
            print(run.id, run.state, f"{run.published} of {run.total} published")
