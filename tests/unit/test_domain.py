"""Ids, arguments and transitions: pure rules, checked without any server."""

import json
from uuid import UUID, uuid4, uuid5

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.domain import (
    TERMINAL,
    TRANSITIONS,
    UNFINISHED,
    AnalysisArguments,
    CrawlArguments,
    ExtractionBatch,
    RunState,
    message_id,
    run_id_of,
    sources_of,
    traceparent_of,
)
from orchestrator.errors import InvalidArgumentsError

RUN = UUID("0af76519-16cd-43dd-8448-eb211c80319c")


@given(st.uuids())
def test_a_celery_id_that_is_a_uuid_is_the_run_id(celery_id: UUID) -> None:
    assert run_id_of(str(celery_id)) == (celery_id, None)


@given(st.text(max_size=300))
def test_any_other_id_maps_to_one_run_id_and_is_kept(celery_id: str) -> None:
    run_id, kept = run_id_of(celery_id)

    assert run_id_of(celery_id) == (run_id, kept)
    if kept is not None:
        assert "\x00" not in kept
        kept.encode()


@pytest.mark.parametrize("value", [None, "7", 1.0, True, False, 0, -1, 2**63, [7], {}])
def test_a_task_id_is_a_positive_bigint(value: object) -> None:
    with pytest.raises(InvalidArgumentsError, match="task_id must be"):
        CrawlArguments(value)  # type: ignore[arg-type] # what a client may send


@pytest.mark.parametrize("theme", ["", " \t", "x" * 256, None, 5, "a\x00b", "\ud800"])
def test_a_theme_is_short_storable_text(theme: object) -> None:
    with pytest.raises(InvalidArgumentsError, match="theme_name must"):
        AnalysisArguments(1, theme)  # type: ignore[arg-type] # what a client may send


def test_the_largest_arguments_are_accepted() -> None:
    assert CrawlArguments(2**63 - 1).task_id == 2**63 - 1
    assert AnalysisArguments(1, "新" * 255).theme_name == "新" * 255


def test_a_batch_renders_exactly_the_promised_body() -> None:
    batch = ExtractionBatch(RUN, 7, "", [(1, 11), (2**63 - 1, 12)])

    first, second = batch.messages()

    assert first == (1, str(uuid5(RUN, "1")), second[2].replace(b"12", b"11").replace(b"9223372036854775807", b"1"))
    assert json.loads(second[2]) == {
        "crawl_config_id": 12,
        "data_source_id": 2**63 - 1,
        "task_id": 7,
        "run_id": str(RUN),
    }


@given(st.uuids(), st.integers(1, 2**63 - 1))
def test_a_batch_and_a_single_id_agree(run_id: UUID, source: int) -> None:
    [(_, rendered, _)] = ExtractionBatch(run_id, 1, "", [(source, 1)]).messages()

    assert rendered == str(message_id(run_id, source)) == str(uuid5(run_id, str(source)))


def test_a_message_id_is_fixed_for_ever() -> None:
    # Extractors dedupe by it, across versions of ours.
    assert message_id(RUN, 42) == UUID("85eb5640-4a64-540c-926a-9b5c080a382f")


@pytest.mark.parametrize(
    "inherited",
    [
        None,
        7,
        "",
        "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331",
        "ff-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
        "00-00000000000000000000000000000000-b7ad6b7169203331-01",
        "00-0af7651916cd43dd8448eb211c80319c-0000000000000000-01",
        "00-0AF7651916CD43DD8448EB211C80319C-b7ad6b7169203331-01",
    ],
)
def test_an_invalid_traceparent_is_replaced_by_one_made_of_the_run_id(inherited: object) -> None:
    assert traceparent_of(RUN, inherited).split("-")[1] == RUN.hex


def test_a_valid_traceparent_goes_on() -> None:
    theirs = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-00"
    assert traceparent_of(uuid4(), theirs) == theirs


def test_transitions_are_those_of_the_design() -> None:
    drawn = {(source.value, target.value) for source, targets in TRANSITIONS.items() for target in targets}

    assert drawn == {
        ("queued", "running"),
        ("running", "retrying"),
        ("retrying", "running"),
        ("running", "succeeded"),
        ("running", "failed"),
        ("queued", "canceled"),
        ("running", "canceled"),
        ("retrying", "canceled"),
        ("failed", "queued"),
    }
    assert set(RunState) == TERMINAL | UNFINISHED
    assert sources_of(RunState.CANCELED) == UNFINISHED
