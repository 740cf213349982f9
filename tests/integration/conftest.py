"""Fixtures of the tests that work on a ledger: each has a copy of one migrated database."""

from collections.abc import Iterator

import pytest

from tests.support.ledgers import Workbench, template
from tests.support.postgres import PostgresServer


@pytest.fixture(scope="module")
def empty(postgres_server: PostgresServer) -> Iterator[str]:
    """A migrated database, to be copied."""
    with template(postgres_server) as name:
        yield name


@pytest.fixture
def bench(postgres_server: PostgresServer, empty: str) -> Iterator[Workbench]:
    """A ledger of the test's own."""
    with Workbench.copy_of(postgres_server, empty) as workbench:
        yield workbench
