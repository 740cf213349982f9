"""``orchestrator demo``: the whole service on sample data, told on the terminal; nothing to configure, nothing left.

``stage`` is a private directory and the processes that end with it, ``sample`` the main application's tables,
``discovery_stub`` and the extractors stand for the services around us, ``wire`` and ``kafka_wire`` for what is between,
``story`` has the chapters.
"""

import os
import signal
import sys
import time
from pathlib import Path
from typing import Annotated, Final, NoReturn

import typer

from orchestrator.demo.discovery_stub import DiscoveryStub
from orchestrator.demo.sample import SMALL
from orchestrator.demo.stage import SIGNALS, Stage
from orchestrator.demo.story import Story
from orchestrator.settings import LogSettings
from orchestrator.telemetry import configure_logging

MISMATCH: Final = 1
_SHOW_CURSOR: Final = b"\x1b[?25h"  # a progress bar hides it


def _kafka(url: str | None) -> str | None:
    if url is not None and not url.startswith(("kafka://", "kafkas://")):
        raise typer.BadParameter("must start with kafka:// or kafkas://")
    return url


def demo(
    *,
    once: Annotated[bool, typer.Option("--once", help="End by itself, as it does without a terminal.")] = False,
    extraction: Annotated[
        str | None,
        typer.Option(
            "--extraction",
            metavar="URL",
            callback=_kafka,
            help="Send extraction messages to this Kafka (kafka://host:port), to a topic that is deleted in the end.",
        ),
    ] = None,
    sources: Annotated[int, typer.Option("--sources", min=10 * SMALL, max=100_000, help="Data sources.")] = 3_000,
) -> None:
    """Tell the whole story on sample data: real processes, nothing to configure, nothing left behind."""
    started_at = _started_at()
    story: Story | None = None
    code: int | None = None
    configure_logging(LogSettings(level="ERROR"))  # the ledger is what the story tells from
    with Stage() as stage, DiscoveryStub() as discovery:

        def end(number: int, _: object) -> NoReturn:
            # Not by an exception: what it interrupts may swallow it, as kombu's and psycopg's pools now and then do.
            if story is not None:
                story.close()
            stage.close()
            if sys.stdout.isatty():
                os.write(sys.stdout.fileno(), _SHOW_CURSOR)
            os._exit(128 + number if code is None else code)

        for each in SIGNALS:
            if signal.getsignal(each) is not signal.SIG_IGN:
                signal.signal(each, end)
        try:
            story = Story(stage, discovery.url, sources, started_at, extraction)
            code = 0 if story.tell() else MISMATCH
            if sys.stdin.isatty() and sys.stdout.isatty() and not once:
                story.invite()
                while True:
                    signal.pause()
        except Exception:
            sys.stderr.write(stage.last_words())
            raise
        finally:
            if story is not None:
                story.close()
    raise typer.Exit(code)


def _started_at() -> float:
    """Return when this process was started, its imports included, on the clock of ``time.monotonic``."""
    try:
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        age = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, AttributeError):  # no Linux
        age = 0.0
    return time.monotonic() - age
