"""The alert rules, the dashboard and the page about metrics name what is exposed, and nothing else."""

import json
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


def test_the_rules_pass_prometheus_own_check() -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool is not installed: Debian package prometheus")
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
