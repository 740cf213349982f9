"""A served HTTP API, and its callers: one key for each role, and nobody's."""

import json
from dataclasses import dataclass, field
from typing import Any, Final, Self

import httpx2

from orchestrator.catalog import Catalog
from orchestrator.db import Database
from orchestrator.domain import Role
from orchestrator.ledger import Ledger
from orchestrator.schema import SCHEMA
from orchestrator.settings import CatalogSettings
from tests.support.processes import Process
from tests.support.stack import Stack

ROLES: Final = tuple(Role)


@dataclass
class Api:
    """The API of a set-up, as an ordinary process on a free port.

    Attributes:
        stack: the set-up.
        process: what serves.
        keys: an API key for each role.
    """

    stack: Stack
    process: Process
    keys: dict[Role, str]
    url: str = ""
    _client: httpx2.Client = field(default_factory=lambda: httpx2.Client(timeout=60))

    @classmethod
    def start(cls, stack: Stack, **settings: str) -> Self:
        """Make the keys, serve, and wait until it listens."""
        api = cls(stack, serve(stack, **settings), make_keys(stack.database))
        api.url = address_of(api.process)
        return api

    def restart(self) -> None:
        """Kill -9 it and start another, on a port of its own."""
        self.process.kill()
        self.process.close()
        self.process = serve(self.stack)
        self.url = address_of(self.process)

    def get(self, path: str, role: Role | None = Role.VIEWER, **options: Any) -> httpx2.Response:  # noqa: ANN401 -- httpx2's
        """GET something under ``/v1``, or what begins with a slash and two letters of its own."""
        return self.request("GET", path, role, **options)

    def post(
        self,
        path: str,
        body: object = None,
        role: Role | None = Role.OPERATOR,
        **options: Any,  # noqa: ANN401 -- the same
    ) -> httpx2.Response:
        """POST a JSON document."""
        if body is not None:
            options["json"] = body
        return self.request("POST", path, role, **options)

    def request(self, method: str, path: str, role: Role | None, **options: Any) -> httpx2.Response:  # noqa: ANN401 -- the same
        """Ask as whoever has a key of this role; none: nobody."""
        headers = dict(options.pop("headers", {}))
        if role is not None:
            headers.setdefault("Authorization", f"Bearer {self.keys[role]}")
        return self._client.request(method, self.url + path, headers=headers, **options)

    def close(self) -> None:
        """Let go of the connections; the process ends with its set-up."""
        self._client.close()


def serve(stack: Stack, **settings: str) -> Process:
    """Start ``orchestrator api`` on a free port."""
    return stack.start("orchestrator", "api", "--port", "0", settings=settings)


def address_of(process: Process) -> str:
    """Wait until it listens, and return where."""

    def listens() -> str:
        for line in process.text().splitlines():
            if '"api.started"' in line:
                said = json.loads(line)
                return f"http://{said['host']}:{said['port']}"
        return ""

    return process.await_ready(listens, within=60, what="the API listens")


def make_keys(database_url: str) -> dict[Role, str]:
    """Make an API key for each role."""
    database = Database(database_url, SCHEMA)
    ledger = Ledger(database, Catalog(CatalogSettings()))
    keys = {role: ledger.keys.create(f"test {role}", role, actor="tests", days=None)[1] for role in ROLES}
    database.close()
    return keys
