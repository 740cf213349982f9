"""Settings: environment over file over defaults, and one clear line for every mistake."""

import os
from pathlib import Path
from typing import Final

import pytest

from orchestrator import settings
from orchestrator.errors import ConfigurationError

CANARY: Final = "canary-5ecret"


@pytest.fixture(autouse=True)
def _nothing_set(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in list(os.environ):
        if name.upper().startswith("ORCHESTRATOR_"):
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)


def _set(monkeypatch: pytest.MonkeyPatch, **variables: str) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(f"ORCHESTRATOR_{name}", value)


def _complaint() -> str:
    with pytest.raises(ConfigurationError) as caught:
        settings.load()
    text = str(caught.value)
    assert "\n" not in text
    assert CANARY not in text
    # No chain that a traceback would print: pydantic's and libpq's errors quote what they were given.
    assert caught.value.__cause__ is None
    assert caught.value.__context__ is None or caught.value.__suppress_context__
    return text


def test_without_any_setting_everything_is_embedded() -> None:
    loaded = settings.load()
    assert loaded.database_url is None
    assert (loaded.broker_transport, loaded.extraction_transport) == ("pgmq", "pgmq")
    assert loaded.discovery_url == "http://discovery-svc/discover"
    assert (loaded.discovery_max_retries, loaded.discovery_retry_delay, loaded.discovery_timeout) == (3, 60, 10)
    assert loaded.extraction_queue == "extraction_queue"


def test_the_environment_wins_over_the_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "orchestrator.toml").write_text(
        'timezone = "Asia/Shanghai"\nschema = "fromfile"\n[catalog.crawl_tasks]\ntable = "tasks"\nid = "task_id"\n'
    )
    _set(monkeypatch, SCHEMA="fromenvironment", CATALOG__CRAWL_TASKS__ID="pk")
    loaded = settings.load()
    assert (loaded.timezone, loaded.schema_name) == ("Asia/Shanghai", "fromenvironment")
    assert (loaded.catalog.crawl_tasks.table, loaded.catalog.crawl_tasks.id) == ("tasks", "pk")


def test_another_file_is_named_by_a_variable(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "other.toml").write_text("discovery_max_retries = 7\n")
    _set(monkeypatch, CONFIG=str(tmp_path / "other.toml"))
    assert settings.load().discovery_max_retries == 7
    _set(monkeypatch, CONFIG=str(tmp_path / "missing.toml"))
    assert "ORCHESTRATOR_CONFIG: there is no file" in _complaint()


@pytest.mark.parametrize(
    ("name", "value", "complaint"),
    [
        ("DISCOVERY_MAX_RETRY", "3", "ORCHESTRATOR_DISCOVERY_MAX_RETRY: no such setting"),
        ("CATALOG__CRAWL_TASKS__IDS", "x", "ORCHESTRATOR_CATALOG__CRAWL_TASKS__IDS: no such setting"),
        ("DISCOVERY_MAX_RETRIES", "three", "ORCHESTRATOR_DISCOVERY_MAX_RETRIES: "),
        ("DISCOVERY_TIMEOUT", "nan", "ORCHESTRATOR_DISCOVERY_TIMEOUT: "),
        ("DISPATCH__BATCH_SIZE", "0", "ORCHESTRATOR_DISPATCH__BATCH_SIZE: "),
        ("TIMEZONE", "Mars/Olympus", "ORCHESTRATOR_TIMEZONE: 'Mars/Olympus' is no IANA time zone"),
        ("DISCOVERY_URL", "ftp://x", "ORCHESTRATOR_DISCOVERY_URL: must be an http:// or https:// address"),
        ("SCHEMA", "x" * 64, "ORCHESTRATOR_SCHEMA: must be a PostgreSQL identifier"),
        ("DATABASE_URL", f"postgresql://u:{CANARY}%zz@h/d", "percent-encoded"),
        ("DATABASE_URL", f"postgresql://u:{CANARY}/x@h/d", "percent-encoded"),
        ("DATABASE_URL", f"postgresql://u:1/{CANARY}@h/d", "percent-encoded"),
        ("DATABASE_URL", f"postgresql://u:{CANARY} x@h/d", "percent-encoded"),
        ("BROKER_URL", f"amqp://u:{CANARY}/x@h//", "percent-encoded"),
        ("BROKER_URL", f"amqp://u:{CANARY}#x@h//", "percent-encoded"),
        ("DISCOVERY_URL", f"http://u:{CANARY}/@h/", "has no readable port"),
        ("DATABASE_URL", f"mysql://u:{CANARY}@h/d", "ORCHESTRATOR_DATABASE_URL: must start with postgresql://"),
        ("BROKER_URL", f"redis://u:{CANARY}@h", "ORCHESTRATOR_BROKER_URL: must start with amqp://"),
        ("BROKER_URL", f"pgmq://u:{CANARY}@h/d", "pgmq:// takes no address"),
        ("EXTRACTION_URL", f"pgmq://u:{CANARY}@h/d", "pgmq:// takes no address"),
        ("EXTRACTION_QUEUE", "a.b", "at most 47 letters, digits or underscores"),
        ("BROKER_URL", f"kafka://u:{CANARY}@h", "ORCHESTRATOR_BROKER_URL: must start with amqp://"),
        ("EXTRACTION_URL", f"kafka://u:{CANARY}/x@h:9092", "percent-encoded"),
        ("EXTRACTION_URL", f"kafka://u:{CANARY}@h:9092,", "cannot be read"),
        ("EXTRACTION_URL", f"kafkas://u:{CANARY}@h:port", "cannot be read"),
        ("EXTRACTION_URL", "kafka://h:9092/topic", "cannot be read"),
        ("KAFKA__SASL_MECHANISM", "GSSAPI", "ORCHESTRATOR_KAFKA__SASL_MECHANISM: "),
        ("LOG__LEVEL", "LOUD", "ORCHESTRATOR_LOG__LEVEL: "),
    ],
)
def test_a_mistake_is_one_line_that_names_the_setting(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, complaint: str
) -> None:
    _set(monkeypatch, **{name: value})
    assert complaint in _complaint()


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("timezone = ", "is no valid TOML"),
        ("timezome = 'UTC'", "ORCHESTRATOR_TIMEZOME: there is no such setting"),
        ("[dispatch]\nbatch = 1", "ORCHESTRATOR_DISPATCH__BATCH: there is no such setting"),
        (f"database_url = 'mysql://u:{CANARY}@h/d'", "ORCHESTRATOR_DATABASE_URL: must start with"),
    ],
)
def test_a_mistake_in_the_file_is_one_line(tmp_path: Path, text: str, complaint: str) -> None:
    (tmp_path / "orchestrator.toml").write_text(text)
    assert complaint in _complaint()


@pytest.mark.parametrize(
    "url", ["kafka://h", "kafka://h:9092,g:9093", "kafkas://u:p%40ss@[::1]:9092", f"kafka://u:{CANARY}@h/"]
)
def test_kafka_may_carry_extraction_alone(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    _set(monkeypatch, EXTRACTION_URL=url, EXTRACTION_QUEUE="a.b-c_1")
    loaded = settings.load()
    assert (loaded.broker_transport, loaded.extraction_transport) == ("pgmq", "kafka")
    _set(monkeypatch, EXTRACTION_QUEUE="no topic")
    assert "when it is a Kafka topic" in _complaint()


def test_secrets_are_masked_however_they_are_printed(monkeypatch: pytest.MonkeyPatch) -> None:
    _set(
        monkeypatch,
        DATABASE_URL=f"postgresql://u:{CANARY}@h/d",
        BROKER_URL=f"amqp://u:{CANARY}@h//",
        EXTRACTION_URL=f"amqp://u:{CANARY}@h//",
    )
    loaded = settings.load()
    for text in (str(loaded), repr(loaded), loaded.model_dump_json(), str(loaded.model_dump())):
        assert CANARY not in text
    assert loaded.database_url is not None
    assert CANARY in loaded.database_url.get_secret_value()


def test_every_leaf_is_a_variable_of_its_own_that_can_be_set(monkeypatch: pytest.MonkeyPatch) -> None:
    variables = settings.variables()
    assert {"ORCHESTRATOR_SCHEMA", "ORCHESTRATOR_CATALOG__CRAWL_CONFIGS__SCHEMA"} <= variables.keys()
    texts = {
        name: field.get_default()
        for name, field in variables.items()
        if isinstance(field.get_default(), str | int | float)
    }
    assert len(texts) > 20
    for name, value in texts.items():
        monkeypatch.setenv(name, str(value))
    assert settings.load() == settings.Settings()


def test_every_variable_is_documented() -> None:
    assert [name for name, field in settings.variables().items() if not field.description] == []
