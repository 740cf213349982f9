"""schemathesis asks for everything that the contract allows, and for much that it does not, as each role and as nobody.

Every answer is one that docs/openapi.json foresees, and none is a fault of ours.
"""

from collections.abc import Iterator
from typing import Any, Final

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis.core.result import Ok
from schemathesis.generation import GenerationMode
from schemathesis.specs.openapi.checks import ignored_auth

from orchestrator.domain import Role
from tests.support.api import Api
from tests.support.postgres import PostgresServer
from tests.support.rabbitmq import RabbitMQServer
from tests.support.rounds import rounds
from tests.support.stack import Stack

EXAMPLES: Final = len(rounds(8, 200))
"""Requests of each operation, of each kind, for each role."""
REFUSALS: Final = ("2xx", "401", "403", "404", "429", "503")


@pytest.fixture(scope="module")
def api(
    postgres_server: PostgresServer, rabbitmq_server: RabbitMQServer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Api]:
    """An API with a crawl task and a run."""
    directory = tmp_path_factory.mktemp("contract")
    broker = rabbitmq_server.vhost_url(rabbitmq_server.fresh_vhost())
    stack = Stack.on_rabbitmq(postgres_server.create_database(directory.name), broker, directory)
    stack.prepare()
    stack.application.add_sources(3)
    stack.application.add_task(1, [1, 2, 3])
    api = Api.start(stack)
    api.post("/v1/runs", {"task_id": 1}).raise_for_status()
    yield api
    api.close()
    stack.close()


@pytest.mark.parametrize("role", [*Role, None], ids=[*Role, "nobody"])
@pytest.mark.parametrize("mode", GenerationMode)
def test_every_answer_is_one_that_the_contract_foresees(api: Api, role: Role | None, mode: GenerationMode) -> None:
    headers = {} if role is None else {"Authorization": f"Bearer {api.keys[role]}"}
    contract = schemathesis.openapi.from_dict(api.get("/v1/openapi.json").json())
    contract.config.update(base_url=api.url)
    # What no schema can say: a cursor is one of ours, a schedule's text can be read, a time range has slots.
    contract.config.checks.positive_data_acceptance.expected_statuses = [*REFUSALS, "400", "409", "422"]
    failed = []
    for result in contract.get_all_operations():
        assert isinstance(result, Ok), result
        operation = result.ok()
        strategy = operation.as_strategy(generation_mode=mode)

        @given(case=strategy)
        @settings(
            max_examples=EXAMPLES,
            deadline=None,
            derandomize=True,
            database=None,
            phases=[Phase.explicit, Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        def ask(case: schemathesis.Case[Any]) -> None:
            # A key that is none is a 401, and after 20 of them a 429, which that check takes for an answer.
            case.call_and_validate(headers=headers, excluded_checks=[ignored_auth])

        try:
            ask()
        except Unsatisfiable:
            continue  # nothing can be wrong with a request without parameters
        except Exception as error:  # noqa: BLE001 -- one operation after the other; the end tells of all
            failed.append(f"{operation.label}: {error}")
    assert not failed, "\n\n".join(failed)
