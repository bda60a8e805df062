"""The files under deploy/ as the tests read them."""

import json
from pathlib import Path
from typing import Any

from promql_parser import parse
from ruamel.yaml import YAML

from tests.servers import ROOT

DEPLOY = ROOT / "deploy"


def read_yaml(path: Path) -> Any:
    """The document in a YAML file."""
    return YAML(typ="safe").load(path.read_text(encoding="utf-8"))


def alert_rules() -> list[dict[str, Any]]:
    """Every alert of Prometheus."""
    return [rule for group in read_yaml(DEPLOY / "prometheus/alerts.yml")["groups"] for rule in group["rules"]]


def dashboard() -> dict[str, Any]:
    """The Grafana dashboard."""
    found: dict[str, Any] = json.loads((DEPLOY / "grafana/dashboards/exchange.json").read_text(encoding="utf-8"))
    return found


def expressions() -> list[str]:
    """Every PromQL expression in alerts and dashboard."""
    panels = dashboard()["panels"]
    return [rule["expr"] for rule in alert_rules()] + [
        target["expr"] for panel in panels for target in panel.get("targets", [])
    ]


def metrics_named(expression: str) -> set[str]:
    """The metrics that an expression asks for. Raises ValueError when it is not PromQL."""
    return set(_names(parse(expression)))


def _names(node: Any) -> list[str]:
    found = [node.name] if type(node).__name__ == "VectorSelector" and node.name else []
    for part in ("expr", "lhs", "rhs", "vs", "vector_selector"):
        child = getattr(node, part, None)
        if child is not None:
            found += _names(child)
    for child in getattr(node, "args", None) or []:
        found += _names(child)
    return found
