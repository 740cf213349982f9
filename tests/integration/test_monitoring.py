"""The alert rules, the dashboard and the page about metrics name what is exposed, and nothing else."""

import json
import os
import re
import shutil
import subprocess
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest
import yaml  # type: ignore[import-untyped] # no stubs for what three tests read
from prometheus_client.parser import text_string_to_metric_families

from orchestrator import measures, metrics
from tests.support.ledgers import Workbench

ROOT: Final = Path(__file__).parents[2]
RULES: Final = ROOT / "deploy/prometheus/alerts.yml"
DASHBOARD: Final = ROOT / "deploy/grafana/dashboard.json"
PAGE: Final = ROOT / "docs/monitoring.md"
_SELECTOR: Final = re.compile(r"(orchestrator_\w+)(?:\{([^}]*)\})?")
_MATCHER: Final = re.compile(r'(\w+)(=~|!~|!=|=)"([^"]*)"')
_BY: Final = re.compile(r"\bby \(([^)]*)\)")
Values = dict[str, set[str]]


@pytest.fixture
def exposed(bench: Workbench) -> dict[str, Values]:
    """Every sample's name with the values of its labels."""
    measures.begin()
    found: dict[str, Values] = defaultdict(lambda: defaultdict(set))
    for family in text_string_to_metric_families(metrics.exposition(bench.database).decode()):
        for sample in family.samples:
            for label, value in sample.labels.items():
                found[sample.name][label].add(value)
            _ = found[sample.name]
    return found


@pytest.fixture
def promtool() -> str:
    """Skip where there is no promtool, but not in CI: there the rules would go unchecked."""
    found = shutil.which("promtool")
    if found is None:
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(
            "promtool is missing: Debian package prometheus"
        )
    return found


def rules() -> list[dict[str, Any]]:
    """Return the alert rules."""
    (group,) = yaml.safe_load(RULES.read_text())["groups"]
    found: list[dict[str, Any]] = group["rules"]
    return found


def panels() -> list[dict[str, Any]]:
    """Return the dashboard's panels that show something."""
    return [panel for panel in json.loads(DASHBOARD.read_text())["panels"] if panel["type"] != "row"]


def expressions() -> Iterator[str]:
    """Yield every expression of the rules and of the dashboard."""
    for rule in rules():
        yield rule["expr"]
    for panel in panels():
        yield from (target["expr"] for target in panel["targets"])


def test_every_expression_asks_for_what_is_exposed(exposed: dict[str, Values]) -> None:
    for expression in expressions():
        selectors = _SELECTOR.findall(expression)
        assert selectors, expression
        known: set[str] = set()
        for name, matchers in selectors:
            assert name in exposed, expression
            known |= exposed[name].keys()
            for label, operator, value in _MATCHER.findall(matchers):
                wanted = value.split("|") if operator in {"=~", "!~"} else [value]
                assert set(wanted) <= exposed[name][label], f"{label} in {expression}"
        grouped = {label.strip() for labels in _BY.findall(expression) for label in labels.split(",")}
        assert grouped <= known, expression


def test_every_metric_is_shown_or_alerted_on(exposed: dict[str, Values]) -> None:
    asked = {name for expression in expressions() for name, _ in _SELECTOR.findall(expression)}
    families = {re.sub(r"_(bucket|sum|count)$", "", name) for name in exposed}

    assert families == {re.sub(r"_(bucket|sum|count)$", "", name) for name in asked}


def test_every_alert_says_how_bad_it_is_and_what_to_do() -> None:
    names = [rule["alert"] for rule in rules()]
    assert len(set(names)) == len(names)
    for rule in rules():
        assert rule["labels"]["severity"] in {"page", "ticket"}, rule
        assert all(rule["annotations"][part].strip() for part in ("summary", "description")), rule


def test_the_rules_pass_prometheus_own_check(promtool: str) -> None:
    checked = subprocess.run([promtool, "check", "rules", str(RULES)], capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout + checked.stderr


def test_the_dashboard_fits_grafana() -> None:
    dashboard = json.loads(DASHBOARD.read_text())
    assert {"title", "uid", "schemaVersion", "panels", "templating", "time"} <= dashboard.keys()
    assert [each["name"] for each in dashboard["templating"]["list"]] == ["datasource"]
    everything = dashboard["panels"]
    assert len({panel["id"] for panel in everything}) == len(everything)
    taken: set[tuple[int, int]] = set()
    for panel in everything:
        at = panel["gridPos"]
        place = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not place & taken, f"{panel['title']} lies on another"
        assert at["x"] + at["w"] <= 24, panel["title"]
        taken |= place
    for panel in panels():
        assert panel["description"], panel["title"]
        sources = {panel["datasource"]["uid"], *(target["datasource"]["uid"] for target in panel["targets"])}
        assert sources == {"${datasource}"}, panel["title"]


def test_the_page_lists_every_metric_with_type_and_labels(bench: Workbench) -> None:
    measures.begin()
    listed = dict(re.findall(r"^\| `(orchestrator_\w+)` \| (\w+ \| [^|]*) \|", PAGE.read_text(), re.MULTILINE))
    exposed = {}
    for family in text_string_to_metric_families(metrics.exposition(bench.database).decode()):
        name = f"{family.name}_total" if family.type == "counter" else family.name
        labels = sorted({label for sample in family.samples for label in sample.labels} - {"le"})
        exposed[name] = f"{family.type} | {', '.join(f'`{label}`' for label in labels)}"

    assert {name: text.strip() for name, text in listed.items()} == {
        name: text.strip() for name, text in exposed.items()
    }


# An alert, the series by which it fires in twenty minutes, a value a minute, and the labels that it then has.
_STORIES: Final[list[tuple[str, dict[str, str], dict[str, str]]]] = [
    ("OrchestratorUnobserved", {"orchestrator_ledger_up": "0x30"}, {}),
    ("OrchestratorSlotsMissed", {'orchestrator_schedule_fires_total{outcome="missed"}': "0x10 1x20"}, {}),
    ("OrchestratorBeatSilent", {"orchestrator_scheduler_last_tick_timestamp_seconds": "0x30"}, {}),
    ("OrchestratorSlotsUnclaimed", {"orchestrator_oldest_due_slot_age_seconds": "0+10x30"}, {}),
    ("OrchestratorSchedulesInvalid", {"orchestrator_schedules_invalid": "3x30"}, {}),
    (
        "OrchestratorStartsLate",
        {
            'orchestrator_run_start_delay_seconds_bucket{kind="crawl",le="30.0"}': "0+90x30",
            'orchestrator_run_start_delay_seconds_count{kind="crawl"}': "0+100x30",
        },
        {},
    ),
    (
        "OrchestratorStartsLateForHours",
        {
            'orchestrator_run_start_delay_seconds_bucket{kind="crawl",le="30.0"}': "0+99x30",
            'orchestrator_run_start_delay_seconds_count{kind="crawl"}': "0+100x30",
        },
        {},
    ),
    (
        "OrchestratorNoWorker",
        {
            'orchestrator_runs_active{state="queued"}': "5x30",
            'orchestrator_nodes{kind="worker",status="ready"}': "0x30",
            'orchestrator_nodes{kind="worker",status="silent"}': "2x30",
        },
        {},
    ),
    (
        "OrchestratorRunStuck",
        {
            "orchestrator_oldest_active_run_age_seconds": "700+60x30",
            'orchestrator_run_duration_seconds_bucket{kind="crawl",le="1.0"}': "0+10x30",
            'orchestrator_run_duration_seconds_bucket{kind="crawl",le="+Inf"}': "0+10x30",
        },
        {},
    ),
    (
        "OrchestratorRunsFail",
        {
            'orchestrator_runs_finished_total{kind="crawl",outcome="failed"}': "0+1x30",
            'orchestrator_runs_finished_total{kind="crawl",outcome="succeeded"}': "0+2x30",
        },
        {"kind": "crawl"},
    ),
    ("OrchestratorDispatchesWait", {"orchestrator_oldest_pending_dispatch_age_seconds": "0+60x30"}, {}),
    ("OrchestratorMessagesReturned", {"orchestrator_publish_returned_total": "0x10 7x20"}, {}),
    (
        "OrchestratorSweeperBusy",
        {'orchestrator_sweeper_corrections_total{from="running",to="running"}': "0x400 0+10x30"},
        {},
    ),
    ("OrchestratorDeadLetters", {"orchestrator_dead_letters_total": "0x10 1x20"}, {}),
]


def test_every_alert_fires_when_it_should_and_only_then(tmp_path: Path, promtool: str) -> None:
    by_name = {rule["alert"]: rule for rule in rules()}
    assert {alert for alert, _, _ in _STORIES} == by_name.keys()
    stories = []
    for alert, series, labels in _STORIES:
        values = {"orchestrator_ledger_up": "1x500"} | series
        at = "420m" if alert == "OrchestratorSweeperBusy" else "20m"
        annotations = {
            name: text.replace("{{ $labels.kind }}", labels.get("kind", ""))
            for name, text in by_name[alert]["annotations"].items()
        }
        fired = {
            "exp_labels": {"severity": by_name[alert]["labels"]["severity"]} | labels,
            "exp_annotations": annotations,
        }
        stories.append(
            {
                "name": alert,
                "interval": "1m",
                "input_series": [{"series": name, "values": value} for name, value in values.items()],
                "alert_rule_test": [
                    {"eval_time": at, "alertname": name, "exp_alerts": [fired] if name == alert else []}
                    for name in by_name
                    # Whoever burns ten times too fast burns six times too fast.
                    if name == alert or not name.startswith("OrchestratorStartsLate")
                ],
            }
        )
    file = tmp_path / "stories.yml"
    file.write_text(yaml.safe_dump({"rule_files": [str(RULES)], "evaluation_interval": "1m", "tests": stories}))

    checked = subprocess.run([promtool, "test", "rules", str(file)], capture_output=True, text=True, check=False)

    assert checked.returncode == 0, checked.stdout + checked.stderr
