"""schemathesis reads the OpenAPI document and calls the real exchange: no answer but those it describes, and no 5xx.

What is generated is the same in every run.
"""

import asyncio
import itertools
import re
from collections import Counter, defaultdict
from copy import deepcopy
from functools import partial
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from hypothesis.errors import FlakyStrategyDefinition
from hypothesis.stateful import run_state_machine_as_test
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from api.app import create_app
from settings import Settings
from tests.exchange import BTC, INTERNAL_TOKEN, Exchange, Trader

CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    negative_data_rejection,
]
# A bad order of a batch is refused in the answer to the batch.
REFUSES_INSIDE = ("POST /api/orders/batch",)
EXAMPLES = 20
# Where a password is hashed.
COSTLY = ("POST /api/users", "POST /api/auth/login")
COSTLY_EXAMPLES = 4
# What they are about is there only after other calls; so it is of those that have its id in their path.
NEED_OTHERS = {
    "POST /api/auth/token/refresh",
    "POST /api/matching/cancel",
    "POST /api/positions/{instrument_id}/margin",
    "PUT /api/positions/{instrument_id}/margin-mode",
    "POST /api/auth/password/renew",
}
INSTRUMENT_NAMES = ("instrumentId", "instrument_id", "symbol")
SCENARIOS = 20
STEPS_PER_SCENARIO = 8
ATTEMPTS = 3

AnyCase = schemathesis.Case[Any]
AnySchema = schemathesis.BaseSchema
AnyOperation = schemathesis.APIOperation[Any, Any, Any, Any]
# They would end the sessions of all that follow, or change their passwords.
WOULD_LOCK_OUT = (
    "/api/auth/logout",
    "/api/auth/password",
    "/api/admin/users/{userId}/lock",
    "/api/admin/users/{userId}/expire",
)
LABELS = [
    f"{method.upper()} {path}"
    for path, calls in create_app(Settings()).openapi()["paths"].items()
    for method in calls
    if path not in WOULD_LOCK_OUT
]


class Caller:
    """Who calls what: operators, our services, or a trader, each where it has a right to."""

    def __init__(self, admin: Trader, trader: Trader) -> None:
        self._admin = dict(admin.client.headers)["authorization"]
        self._trader = dict(trader.client.headers)["authorization"]

    def headers(self, path: str) -> dict[str, str]:
        if path in ("/api/auth/credentials", "/api/matching/cancel"):
            return {"X-Internal-Token": INTERNAL_TOKEN}
        is_operation = path.startswith("/api/admin/") or path in ("/api/ledger/deposits", "/api/ledger/withdrawals")
        return {"Authorization": self._admin if is_operation else self._trader}


@pytest.fixture(scope="module")
async def caller(exchange: Exchange, admin: Trader) -> Caller:
    return Caller(admin, await exchange.trader(admin, "100000"))


@pytest.fixture(scope="module")
def answers() -> dict[str, set[int]]:
    """The statuses that operations have answered with."""
    return defaultdict(set)


@pytest.fixture(scope="module")
def document(exchange: Exchange) -> AnySchema:
    raw: dict[str, Any] = httpx.get(f"{exchange.url}/openapi.json", trust_env=False).json()
    schema = schemathesis.openapi.from_dict(raw)
    schema.config.update(base_url=exchange.url)
    # Who calls is for the tests to say.
    schema.config.generation.update(with_security_parameters=False)
    return schema


def bounded(examples: int, steps: int = 1) -> settings:
    return settings(
        max_examples=examples,
        stateful_step_count=steps,
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


def realistic(case: AnyCase) -> AnyCase:
    """The same about an instrument that exists, which nothing generated ever names."""
    for place in (case.path_parameters, case.query, case.body):
        if isinstance(place, dict):
            place.update({name: BTC for name in INSTRUMENT_NAMES if name in place})
    return case


def documented(operation: AnyOperation, case: AnyCase) -> AnyCase:
    """The same with the body that the document gives as an example, which is more than well-formed."""
    content = operation.definition.raw.get("requestBody", {}).get("content", {})
    if "application/json" in content:
        case.body = deepcopy(content["application/json"]["example"])
    return realistic(case)


def checks_of(label: str) -> list[Any]:
    return [check for check in CHECKS if check is not negative_data_rejection or label not in REFUSES_INSIDE]


def cases_of(operation: AnyOperation) -> st.SearchStrategy[AnyCase]:
    """Good requests, also about a real instrument, and bad ones where anything can be bad."""
    good = operation.as_strategy()
    if not (operation.body or operation.path_parameters or operation.query):
        return good
    return (
        good.map(partial(documented, operation))
        | good.map(realistic)
        | good
        | operation.as_strategy(generation_mode=schemathesis.GenerationMode.NEGATIVE)
    )


@pytest.mark.parametrize("label", LABELS)
async def test_an_operation_answers_as_described(
    document: AnySchema, caller: Caller, answers: dict[str, set[int]], label: str
) -> None:
    operation = document.find_operation_by_label(label)
    assert operation is not None

    @bounded(COSTLY_EXAMPLES if label in COSTLY else EXAMPLES)
    @given(case=cases_of(operation))
    def call(case: AnyCase) -> None:
        answer = case.call_and_validate(headers=caller.headers(case.path), checks=checks_of(label))
        answers[label].add(answer.status_code)

    await asyncio.to_thread(call)


def test_nearly_all_operations_have_served_a_request(answers: dict[str, set[int]]) -> None:
    unserved = {label for label, statuses in answers.items() if min(statuses) >= 300}
    assert {label for label in unserved if not names_a_thing(label)} <= NEED_OTHERS


def names_a_thing(label: str) -> bool:
    """Whether its path has an id of what nothing generated names; instruments exist."""
    return bool(set(re.findall(r"{(\w+)}", label)) - set(INSTRUMENT_NAMES))


async def test_orders_answer_as_described_through_their_life(
    document: AnySchema, exchange: Exchange, admin: Trader
) -> None:
    # Whatever the calls before have halted, held or signed out.
    await admin.client.post(f"/api/admin/instruments/{BTC}/resume")
    await exchange.hold_marks(admin)
    caller = Caller(admin, await exchange.trader(admin, "100000"))
    statuses: Counter[tuple[str, int]] = Counter()
    prices = itertools.cycle(("59000", "60000", "61000"))

    class Orders(document.include(tag="orders").as_state_machine()):  # type: ignore[misc]  # a class made at run time
        """Orders are placed, read, amended and cancelled, as the document links these calls, in any order."""

        def before_call(self, case: AnyCase) -> None:
            if case.operation.label == "POST /api/orders":
                side = "BUY" if statuses.total() % 2 else "SELL"
                case.body = {"instrumentId": BTC, "side": side, "type": "LIMIT", "quantity": "0.01"}
                case.body["price"] = next(prices)
            case.headers.update(caller.headers(case.path))

        def validate_response(self, response: schemathesis.Response, case: AnyCase, **_: object) -> None:
            statuses[case.operation.label, response.status_code] += 1
            case.validate_response(response, checks=checks_of(case.operation.label))

    for _ in range(ATTEMPTS):
        # The exchange remembers what was done before, which Hypothesis may take for a test that is not the same twice.
        # What a call answers wrongly is another error, and fails.
        try:
            walk = settings(bounded(SCENARIOS, STEPS_PER_SCENARIO), derandomize=False, phases=[Phase.generate])
            await asyncio.to_thread(run_state_machine_as_test, Orders, settings=walk)
            break
        except FlakyStrategyDefinition as error:
            flaky = error
    else:
        pytest.fail(f"No walk of {ATTEMPTS} came to its end: {flaky}")
    for label in ("POST /api/orders", "GET /api/orders/{order_id}", "DELETE /api/orders/{order_id}"):
        assert statuses[label, 200] > 0, statuses
