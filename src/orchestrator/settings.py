"""The one frozen tree of settings: environment over ``orchestrator.toml`` over defaults.

Every setting is an environment variable with the prefix ``ORCHESTRATOR_``, nested by ``__``, or a key of
``orchestrator.toml`` in the working directory (``ORCHESTRATOR_CONFIG`` names another file). Secrets live in
``SecretStr`` and appear nowhere else.
"""

import os
import re
import tomllib
from functools import cache
from ipaddress import ip_network
from pathlib import Path
from typing import Annotated, Final, Literal, Self
from urllib.parse import urlsplit
from zoneinfo import ZoneInfo

import psycopg
from kombu.utils.url import url_to_parts
from psycopg.conninfo import conninfo_to_dict
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    SecretStr,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic.fields import FieldInfo
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
)

from orchestrator.errors import ConfigurationError

PREFIX: Final = "ORCHESTRATOR_"
CONFIG_VARIABLE: Final = f"{PREFIX}CONFIG"
DEFAULT_CONFIG_FILE: Final = "orchestrator.toml"

_IDENTIFIER: Final = re.compile(r"[^\x00]{1,63}")
_KAFKA_SERVER: Final = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[^\[\]:@/\s]+)(:\d{1,5})?")
_KAFKA_TOPIC: Final = re.compile(r"(?!\.{1,2}$)[A-Za-z0-9._-]+")


def _identifier(value: str) -> str:
    if not _IDENTIFIER.fullmatch(value):
        raise ValueError("must be a PostgreSQL identifier of 1 to 63 characters")
    return value


def _time_zone(value: str) -> str:
    try:
        ZoneInfo(value)
    except (KeyError, ValueError, OSError) as error:
        raise ValueError(f"{value!r} is no IANA time zone such as 'Asia/Shanghai'") from error
    return value


def _http_url(value: str) -> str:
    parts = urlsplit(value)
    if parts.scheme not in {"http", "https"} or not parts.hostname:
        raise ValueError("must be an http:// or https:// address")
    try:
        _ = parts.port
    except ValueError:
        raise ValueError("has no readable port") from None
    return value


def _url_of(*schemes: str) -> AfterValidator:
    def check(value: SecretStr) -> SecretStr:
        address = value.get_secret_value()
        scheme, separator, _ = address.partition("://")
        if not separator or scheme not in schemes:
            raise ValueError(f"must start with {' or '.join(f'{scheme}://' for scheme in schemes)}")
        if not _is_readable(address):
            # Found here, for drivers quote what they cannot read, and that may be half of a password.
            raise ValueError("cannot be read: special characters in user name and password are percent-encoded")
        return value

    return AfterValidator(check)


def _is_readable(address: str) -> bool:
    try:
        parts = urlsplit(address)
        if parts.scheme.startswith("postgres"):
            ports = str(conninfo_to_dict(address).get("port") or "").split(",")
            if not all(port.isdecimal() or not port for port in ports):
                return False
        elif parts.scheme.startswith("kafka"):
            servers = parts.netloc.rpartition("@")[2].split(",")
            if parts.path.strip("/") or not all(map(_KAFKA_SERVER.fullmatch, servers)):
                return False
        else:
            url_to_parts(address)
    except (ValueError, psycopg.Error):
        return False
    return "@" not in parts.path + parts.query + parts.fragment


Identifier = Annotated[str, AfterValidator(_identifier)]
Seconds = Annotated[float, Field(gt=0, le=86_400, allow_inf_nan=False)]


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class CrawlTasksMapping(_Section):
    """Where crawl tasks stand in the application's database. Columns marked optional may be absent."""

    schema_name: Identifier | None = Field(None, alias="schema", description="unset: the search path")
    table: Identifier = Field("crawl_tasks", description="table or view")
    id: Identifier = Field("id", description="integer column")
    data_source_ids: Identifier = Field("data_source_ids", description="column: array of integers, json or jsonb")
    schedule: Identifier = Field("schedule", description="text column")
    is_active: Identifier = Field("is_active", description="boolean column; governs schedules only")
    updated_at: Identifier = Field("updated_at", description="optional column")
    name: Identifier = Field("name", description="optional column")
    timezone: Identifier = Field("timezone", description="optional column")
    misfire_policy: Identifier = Field("misfire_policy", description="optional column")
    overlap_policy: Identifier = Field("overlap_policy", description="optional column")


class CrawlConfigsMapping(_Section):
    """Where crawl configs stand in the application's database, which are active, which is the latest."""

    schema_name: Identifier | None = Field(None, alias="schema", description="unset: the search path")
    table: Identifier = Field("crawl_configs", description="table or view")
    id: Identifier = Field("id", description="integer column")
    data_source_id: Identifier = Field("data_source_id", description="integer column; have an index on it")
    status: Identifier = Field("status", description="text column; not read when ACTIVE is set")
    created_at: Identifier = Field("created_at", description="timestamp column; not read when LATEST is set")
    active: str | None = Field(
        None,
        description="SQL condition on a row of the table; default: the status column equals 'active'",
        examples=["is_enabled AND deleted_at IS NULL"],
    )
    latest: str | None = Field(
        None,
        description="SQL sort keys, latest first; default: created_at DESC NULLS LAST, id DESC",
        examples=["version DESC"],
    )


class KafkaSettings(_Section):
    """How to log in to Kafka, beyond what the address says."""

    sasl_mechanism: Literal["PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512"] = Field(
        "PLAIN", description="how the user and the password of a kafka address log in"
    )
    ca_file: Path | None = Field(
        None, description="certificates that kafkas:// trusts, PEM; unset: the system's, or those of SSL_CERT_FILE"
    )
    certificate_file: Path | None = Field(None, description="our certificate, PEM, where brokers want one of clients")
    key_file: Path | None = Field(None, description="its private key, PEM")
    key_password: SecretStr | None = Field(None, description="the key's password")


class CatalogSettings(_Section):
    """How the application's tables are called."""

    crawl_tasks: CrawlTasksMapping = CrawlTasksMapping()
    crawl_configs: CrawlConfigsMapping = CrawlConfigsMapping()


class DispatchSettings(_Section):
    """The fan-out engine."""

    batch_size: int = Field(2_000, ge=1, le=10_000, description="messages published per ledger transaction")
    slice_seconds: Seconds = Field(20.0, le=30, description="a delivery works this long, then continues later")
    help_above: int = Field(
        50_000, ge=1, le=1_000_000_000, description="data sources left of a run above which other workers help with it"
    )
    helpers: int = Field(3, ge=0, le=100, description="how many others are asked to; 0: none")


class SchedulerSettings(_Section):
    """When schedules fire, and what becomes of slots that could not."""

    misfire_policy: Literal["fire_once", "skip", "all"] = Field(
        "fire_once",
        description="tasks that name none: which slots missed by over 60 s still fire: latest, none, all",
    )
    overlap_policy: Literal["skip", "allow"] = Field(
        "skip", description="tasks that name none: a slot while a run of the task is unfinished"
    )
    catch_up_window: float = Field(
        86_400.0, gt=60, le=604_800, allow_inf_nan=False, description="slots missed for longer never fire"
    )
    spread: int = Field(0, ge=0, le=86_400, description="seconds over which words without a time are spread; 0: none")
    max_queued: int = Field(
        50_000, ge=1, le=10_000_000, description="runs that wait for a worker, above which no slot is claimed"
    )


class ApiSettings(_Section):
    """The HTTP API."""

    host: str = Field("127.0.0.1", min_length=1, max_length=255, description="address to listen on")
    port: int = Field(8000, ge=0, le=65_535, description="port to listen on; 0: any that is free")
    cors_origins: tuple[str, ...] = Field(
        (),
        max_length=50,
        description='JSON list of origins whose pages may call the API; default: none, "*" is refused',
    )
    window: float = Field(
        604_800.0, gt=0, le=315_360_000, allow_inf_nan=False, description="lists that name no time show so many seconds"
    )
    max_body: int = Field(1_048_576, ge=1_024, le=67_108_864, description="largest request body in bytes")
    trusted_proxies: tuple[str, ...] = Field(
        ("127.0.0.1", "::1"),
        max_length=50,
        description="JSON list of addresses of proxies, or their networks, whose X-Forwarded-For names the caller",
    )
    open_metrics: bool = Field(
        default=False, description="whether /metrics is for everybody; else it wants a viewer's key"
    )

    @field_validator("trusted_proxies")
    @classmethod
    def _are_networks(cls, proxies: tuple[str, ...]) -> tuple[str, ...]:
        for proxy in proxies:
            ip_network(proxy)  # its error says what is wrong
        return proxies

    @field_validator("cors_origins")
    @classmethod
    def _are_origins(cls, origins: tuple[str, ...]) -> tuple[str, ...]:
        for origin in origins:
            parts = urlsplit(origin)
            if (
                parts.scheme not in {"http", "https"}
                or not parts.netloc
                or origin != f"{parts.scheme}://{parts.netloc}"
            ):
                raise ValueError(f"{origin[:50]!r} is no origin such as 'https://console.example'")
        return origins


class RetentionSettings(_Section):
    """How long history is kept."""

    days: float | None = Field(
        None, gt=0, le=36_500, allow_inf_nan=False, description="days after which what is over is deleted; unset: never"
    )
    batch: int = Field(5_000, ge=1, le=100_000, description="rows deleted in one transaction")


class MetricsSettings(_Section):
    """Where workers and beats serve what they count; the API does so at /metrics."""

    host: str = Field(
        "127.0.0.1", min_length=1, max_length=255, description="address where workers and beats serve metrics"
    )
    worker_port: int | None = Field(
        None, ge=0, le=65_535, description="port of a worker's metrics; 0: any that is free; unset: none are served"
    )
    beat_port: int | None = Field(None, ge=0, le=65_535, description="the same of a beat's")


class LogSettings(_Section):
    """What is logged, and how."""

    level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = Field("INFO", description="lowest level that is logged")
    format: Literal["auto", "console", "json"] = Field(
        "auto", description="auto: console on a terminal, else one JSON object a line"
    )


class Settings(BaseSettings):
    """Everything that can be set. Times are in seconds.

    Raises:
        ConfigurationError: from :func:`load`, one line naming the setting.
    """

    model_config = SettingsConfigDict(
        env_prefix=PREFIX,
        env_prefix_target="all",
        env_nested_delimiter="__",
        frozen=True,
        extra="forbid",
        hide_input_in_errors=True,
    )

    database_url: Annotated[SecretStr, _url_of("postgresql", "postgres")] | None = Field(
        None, description="postgresql://user:password@host:port/database; unset: embedded PostgreSQL"
    )
    broker_url: Annotated[SecretStr, _url_of("amqp", "amqps", "pgmq")] = Field(
        SecretStr("pgmq://"), description="amqp://user:password@host:port/vhost; pgmq:// is the database itself"
    )
    extraction_url: Annotated[SecretStr, _url_of("amqp", "amqps", "kafka", "kafkas", "pgmq")] | None = Field(
        None,
        description="where extraction messages go; kafka:// or kafkas://user:password@host:port,host:port; "
        "unset: the broker",
    )
    extraction_queue: str = Field(
        "extraction_queue", min_length=1, max_length=200, description="the Extractor Service's queue or topic"
    )
    discovery_url: Annotated[str, AfterValidator(_http_url)] = Field(
        "http://discovery-svc/discover", description="where site analyses are posted to"
    )
    discovery_timeout: Seconds = Field(10.0, le=30, description="one whole call")
    discovery_max_retries: int = Field(3, ge=0, le=100, description="calls after the first")
    discovery_retry_delay: Seconds = Field(60.0, description="base of the exponential backoff")
    discovery_max_delay: Seconds = Field(3_600.0, description="longest wait, Retry-After included")
    discovery_concurrency: int = Field(16, ge=1, le=10_000, description="calls under way at once, all workers")
    timezone: Annotated[str, AfterValidator(_time_zone)] = Field(
        "UTC", description="IANA time zone of schedules that name none"
    )
    schema_name: Identifier = Field("orchestrator", alias="schema", description="the ledger's own schema")
    state_dir: Path | None = Field(
        None, description="embedded PostgreSQL's data; unset: the XDG state directory, or /var/lib as root"
    )
    catalog: CatalogSettings = CatalogSettings()
    kafka: KafkaSettings = KafkaSettings()
    dispatch: DispatchSettings = DispatchSettings()
    scheduler: SchedulerSettings = SchedulerSettings()
    api: ApiSettings = ApiSettings()
    retention: RetentionSettings = RetentionSettings()
    metrics: MetricsSettings = MetricsSettings()
    log: LogSettings = LogSettings()

    @model_validator(mode="after")
    def _extraction_fits_its_queue(self) -> Self:
        if self.extraction_transport == "pgmq" and not re.fullmatch(r"[A-Za-z0-9_]{1,47}", self.extraction_queue):
            raise ValueError(
                "extraction_queue must have at most 47 letters, digits or underscores when it lives in PostgreSQL"
            )
        if self.extraction_transport == "kafka" and not _KAFKA_TOPIC.fullmatch(self.extraction_queue):
            raise ValueError("extraction_queue must be of letters, digits, '.', '_' and '-' when it is a Kafka topic")
        for url in (self.broker_url, self.extraction_url):
            if url is not None and urlsplit(url.get_secret_value()).scheme == "pgmq" and url != SecretStr("pgmq://"):
                raise ValueError("pgmq:// takes no address: the queues live in the database of database_url")
        return self

    @property
    def broker_transport(self) -> Literal["amqp", "pgmq"]:
        """Which transport carries Celery's messages."""
        return "pgmq" if self.broker_url.get_secret_value().startswith("pgmq") else "amqp"

    @property
    def extraction_transport(self) -> Literal["amqp", "kafka", "pgmq"]:
        """Which transport carries extraction messages."""
        if self.extraction_url is None:
            return self.broker_transport
        url = self.extraction_url.get_secret_value()
        return "kafka" if url.startswith("kafka") else "pgmq" if url.startswith("pgmq") else "amqp"

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,  # noqa: ARG003 -- pydantic-settings' signature
        file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003 -- the same
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Environment over file; nothing else is read."""
        return init_settings, env_settings, TomlConfigSettingsSource(settings_cls, toml_file=_config_file())


def load() -> Settings:
    """Read the settings.

    Raises:
        ConfigurationError: a setting is unknown or malformed, or the file cannot be read.
    """
    _refuse_unknown_variables()
    try:
        return Settings()
    except ValidationError as error:
        raise ConfigurationError(_one_line(error)) from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigurationError(f"{_config_file()} is no valid TOML: {error}") from None
    except OSError as error:
        raise ConfigurationError(f"{_config_file()} cannot be read: {error.strerror}") from None
    except Exception as error:  # noqa: BLE001 -- pydantic-settings wraps a malformed variable in SettingsError
        raise ConfigurationError(f"{error}; nested settings are given by __, one variable each") from None


@cache
def current() -> Settings:
    """Return this process's settings, read once.

    Raises:
        ConfigurationError: see :func:`load`.
    """
    return load()


def variables() -> dict[str, FieldInfo]:
    """Return every leaf setting by its environment variable's name."""
    return dict(_leaves(Settings, PREFIX))


def _leaves(model: type[BaseModel], prefix: str) -> list[tuple[str, FieldInfo]]:
    leaves = []
    for name, field in model.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, _Section):
            leaves += _leaves(kind, f"{prefix}{name.upper()}__")
        else:
            leaves.append((f"{prefix}{(field.alias or name).upper()}", field))
    return leaves


def _config_file() -> Path:
    return Path(os.environ.get(CONFIG_VARIABLE, DEFAULT_CONFIG_FILE))


def _refuse_unknown_variables() -> None:
    # pydantic-settings ignores unknown variables; a typo would silently mean the default.
    known = {*variables(), CONFIG_VARIABLE}
    for name in sorted(os.environ):
        if name.upper().startswith(PREFIX) and name.upper() not in known:
            raise ConfigurationError(f"{name}: no such setting; `orchestrator doctor --settings` lists all")
    if CONFIG_VARIABLE in os.environ and not _config_file().is_file():
        raise ConfigurationError(f"{CONFIG_VARIABLE}: there is no file {_config_file()}")


def _one_line(error: ValidationError) -> str:
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    place = "__".join(str(part) for part in first["loc"] if not str(part).startswith("function-"))
    reason = "there is no such setting" if first["type"] == "extra_forbidden" else first["msg"]
    return f"{PREFIX + place.upper() if place else 'settings'}: {reason.removeprefix('Value error, ')}"
