"""A running exchange shows its figures, tells the truth about its health, and leaves one trace of an order."""

import json
import signal
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.deploy_files import expressions, metrics_named
from tests.otlp_receiver import ReceivedSpan, Receiver, receiver
from tests.stack_runner import RunningStack, stack_in, wait_until

BTC = "BTC-USDT-PERP"
PASSWORD = "correct horse battery"
SECONDS = 30


@dataclass(frozen=True)
class Watched:
    """A running exchange, where its figures are, and who gets its traces."""

    stack: RunningStack
    targets: dict[str, list[str]]
    traces: Receiver
    order_ids: list[int]

    def figures(self, job: str) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
        """All samples of a job's processes by name and labels."""
        return {
            (sample.name, tuple(sorted(sample.labels.items()))): sample.value
            for target in self.targets[job]
            for family in text_string_to_metric_families(get(f"http://{target}/metrics").text)
            for sample in family.samples
        }

    def ready(self, job: str) -> httpx.Response:
        """What the process says of its health."""
        return get(f"http://{self.targets[job][0]}/health/ready")


def get(url: str) -> httpx.Response:
    return httpx.get(url, trust_env=False, timeout=10)


@pytest.fixture(scope="module")
def exchange(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    """An exchange on which two orders have met."""
    folder = tmp_path_factory.mktemp("watched")
    with (
        receiver() as traces,
        stack_in(
            folder / "state", folder / "output", EXCHANGE_OTLP_ENDPOINT=traces.url, OTEL_BSP_SCHEDULE_DELAY="100"
        ) as stack,
    ):
        stack.wait_until_ready()
        targets: dict[str, list[str]] = {}
        for entry in json.loads((folder / "state" / "prometheus-targets.json").read_text()):
            targets.setdefault(entry["labels"]["job"], []).extend(entry["targets"])
        yield Watched(stack, targets, traces, trade(stack, folder / "state"))


def trade(stack: RunningStack, state: Path) -> list[int]:
    """A buy and a sell that fill each other; their ids."""
    with httpx.Client(base_url=stack.api_url, trust_env=False, timeout=30) as client:

        def post(path: str, body: dict[str, Any], token: str = "") -> dict[str, Any]:
            answer = client.post(path, json=body, headers={"Authorization": f"Bearer {token}"} if token else {})
            assert answer.status_code == 200, answer.text
            found: dict[str, Any] = answer.json()
            return found

        def sign_in(email: str, password: str) -> str:
            return str(post("/api/auth/login", {"email": email, "password": password})["accessToken"])

        admin = sign_in("admin@exchange.local", (state / "admin-password").read_text().strip())
        wait_until(lambda: client.get(f"/api/market/mark-price/{BTC}").is_success, SECONDS, "a mark price")
        post(f"/api/admin/mark-price/{BTC}", {"price": "60000"}, admin)
        order_ids = []
        for side in ("BUY", "SELL"):
            email = f"{uuid.uuid4().hex}@example.com"
            user = post("/api/users", {"email": email, "password": PASSWORD})
            transfer = {"userId": user["userId"], "asset": "USDT", "amount": "1000", "reference": email}
            post("/api/ledger/deposits", transfer, admin)
            order = {"instrumentId": BTC, "side": side, "type": "LIMIT", "quantity": "0.001", "price": "60000"}
            order_ids.append(post("/api/orders?wait=placed", order, sign_in(email, PASSWORD))["orderId"])
    return order_ids


def test_every_metric_that_alerts_and_dashboard_ask_for_exists(exchange: Watched) -> None:
    named = {name for expression in expressions() for name in metrics_named(expression)} - {"up"}
    assert len(named) > 40

    def missing() -> set[str]:
        return named - {name for job in exchange.targets for name, _ in exchange.figures(job)}

    wait_until(lambda: not missing() - ONLY_IN_TROUBLE, SECONDS, "every metric")


# Series that a healthy exchange does not have yet.
ONLY_IN_TROUBLE = {"temporal_request_failure_total", "exchange_engine_leases_lost_total"}


def test_orders_are_counted_by_outcome(exchange: Watched) -> None:
    def outcome(job: str, name: str) -> float:
        return exchange.figures(job).get(("exchange_orders_total", (("outcome", name),)), 0)

    wait_until(lambda: outcome("worker", "FILLED") == 2, SECONDS, "two filled orders")
    assert outcome("api", "ACCEPTED") == 2
    assert exchange.figures("engine")["exchange_engine_commands_total", (("instrument", BTC),)] >= 2


def test_what_is_behind_comes_to_nothing(exchange: Watched) -> None:
    def behind() -> list[float]:
        names = ("exchange_engine_lag_commands", "exchange_settlement_lag_events", "exchange_outbox_messages")
        values = [value for (name, _), value in exchange.figures("worker").items() if name in names]
        assert len(values) in (0, 7)
        return values

    wait_until(lambda: behind() == [0] * 7, SECONDS, "nothing behind")


def test_the_reports_come_to_hold_every_event(exchange: Watched) -> None:
    def behind() -> list[float]:
        figures = exchange.figures("worker").items()
        return [value for (name, _), value in figures if name == "exchange_reporting_lag_events"]

    wait_until(lambda: behind() == [0] * 4, SECONDS, "nothing missing in the reports")


def test_requests_are_counted_under_the_route_that_served_them(exchange: Watched) -> None:
    get(f"{exchange.stack.api_url}/nowhere/{uuid.uuid4().hex}")
    get(f"{exchange.stack.api_url}/api/market/tickers/{BTC}")
    routes = {
        dict(labels)["route"]: dict(labels)["status"]
        for name, labels in exchange.figures("api")
        if name == "exchange_http_requests_total"
    }
    assert routes["none"] == "404"
    assert routes["/api/market/tickers/{instrumentId}"] == "200"
    assert routes["/api/orders"] == "200"
    assert not [route for route in routes if BTC in route]


@pytest.mark.parametrize("job", ["engine", "market", "worker"])
def test_every_process_answers_for_its_health(exchange: Watched, job: str) -> None:
    assert exchange.ready(job).json() == {"status": "UP"}


def test_one_trace_leads_from_the_request_to_the_engine(exchange: Watched) -> None:
    def spans_of_orders() -> dict[str, list[ReceivedSpan]]:
        traces: dict[str, list[ReceivedSpan]] = {}
        for span in list(exchange.traces.spans):
            traces.setdefault(span.trace, []).append(span)
        return {
            trace: spans for trace, spans in traces.items() if any(span.name == "POST /api/orders" for span in spans)
        }

    def complete() -> bool:
        traces = spans_of_orders().values()
        return len(traces) == 2 and all("engine.match" in {span.name for span in spans} for spans in traces)

    wait_until(complete, SECONDS, spans_of_orders)
    for spans in spans_of_orders().values():
        by_id = {span.span: span for span in spans}
        paths = {span.name: _path(span, by_id) for span in spans}
        assert paths["engine.match"] == ["POST /api/orders", "saga PLACE", "engine.match"]
        assert paths["RunActivity:orders.accept"] == [
            "POST /api/orders",
            "saga PLACE",
            "StartWorkflow:OrderPlacementWorkflow",
            "StartActivity:orders.accept",
            "RunActivity:orders.accept",
        ]
        assert {span.service for span in spans} == {"api", "engine"}


def _path(span: ReceivedSpan, by_id: dict[str, ReceivedSpan]) -> list[str]:
    """The names from the first span of the trace to this one."""
    return [*(_path(by_id[span.parent], by_id) if span.parent else []), span.name]


def test_an_engine_whose_database_is_gone_says_so(exchange: Watched) -> None:
    postmaster = exchange.stack.process("postgres")
    everyone = [postmaster, *postmaster.children(recursive=True)]
    for process in everyone:
        process.send_signal(signal.SIGSTOP)
    try:
        answer = exchange.ready("engine")
        assert answer.status_code == 503
        assert answer.json() == {"status": "DOWN", "failed": ["postgres"]}
        assert get(f"http://{exchange.targets['engine'][0]}/health/live").json() == {"status": "UP"}
    finally:
        for process in everyone:
            process.send_signal(signal.SIGCONT)
    wait_until(lambda: exchange.ready("engine").is_success, SECONDS, "the engine to be ready again")
