"""The dashboard shows what there is: no metric is misspelt, and none is forgotten."""

import json
import re
from pathlib import Path
from typing import Any

from pipeline.telemetry import FIGURES

PATH = Path(__file__).resolve().parents[1] / "deploy" / "grafana-dashboard.json"
DASHBOARD: dict[str, Any] = json.loads(PATH.read_text(encoding="utf-8"))

PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
EXPRESSIONS = [target["expr"] for panel in PANELS for target in panel["targets"]]
VARIABLES = {variable["name"]: variable for variable in DASHBOARD["templating"]["list"]}


def metrics_of(expression: str) -> set[str]:
    """
    >>> sorted(metrics_of('rate(ray_a_total{run="$run"}[5m]) / max(ray_b)'))
    ['ray_a_total', 'ray_b']
    """
    return set(re.findall(r"\bray_\w+", expression))


def test_every_figure_is_shown_and_nothing_else_of_ours() -> None:
    shown = set().union(*map(metrics_of, EXPRESSIONS))
    defined = {f"ray_gigasr_{figure.name}" for figure in FIGURES}
    assert {name for name in shown if name.startswith("ray_gigasr_")} == defined


def test_figures_are_those_of_the_run_and_machines_those_of_its_cluster() -> None:
    for expression in EXPRESSIONS:
        for metric, braces in re.findall(r"\b(ray_\w+)(\{[^}]*\})?", expression):
            wanted = '{run="$run"' if metric.startswith("ray_gigasr_") else '{SessionName=~"$session"'
            assert braces.startswith(wanted), expression


def test_counters_are_shown_as_rates_or_as_totals_of_the_run() -> None:
    for expression in EXPRESSIONS:
        for metric in re.findall(r"(\w+\()ray_gigasr_\w+_total\b", expression):
            assert metric in ("rate(", "max("), expression


def test_grafana_can_import_it() -> None:
    assert DASHBOARD["uid"] == "gigasr"
    assert DASHBOARD["schemaVersion"] >= 36
    assert DASHBOARD["id"] is None
    assert VARIABLES["datasource"]["type"] == "datasource"
    assert metrics_of(VARIABLES["run"]["query"]["query"]) == {"ray_gigasr_starts_total"}
    assert '{run="$run"}' in VARIABLES["session"]["query"]["query"]
    numbers = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(set(numbers)) == len(numbers)
    for panel in PANELS:
        assert panel["datasource"]["uid"] == "${datasource}"
        assert panel["title"] and panel["description"]


def test_no_panel_covers_another() -> None:
    covered: dict[tuple[int, int], str] = {}
    for panel in DASHBOARD["panels"]:
        at = panel["gridPos"]
        assert at["x"] + at["w"] <= 24
        for cell in ((x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])):
            assert cell not in covered, (panel["title"], covered[cell])
            covered[cell] = panel["title"]
