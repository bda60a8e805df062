"""The OpenAPI document: what every operation must say, and that its examples are true."""

from collections.abc import Iterator
from typing import Any

import jsonschema_rs
import pytest

from api.app import create_app
from api.schema.examples import BODIES
from domain.problems import HTTP_STATUS
from settings import Settings

DOCUMENT = create_app(Settings()).openapi()
OPERATIONS = {
    f"{method.upper()} {path}": call for path, calls in DOCUMENT["paths"].items() for method, call in calls.items()
}
each_operation = pytest.mark.parametrize("call", OPERATIONS.values(), ids=OPERATIONS)


def bodies(call: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Media type and description of what the operation takes and answers."""
    for place in (call.get("requestBody", {}), *call["responses"].values()):
        yield from place.get("content", {}).items()


def assert_valid(example: object, schema: dict[str, Any]) -> None:
    jsonschema_rs.validate({**schema, "components": DOCUMENT["components"]}, example)


@each_operation
def test_every_body_has_an_example_that_its_schema_allows(call: dict[str, Any]) -> None:
    for _, body in bodies(call):
        examples = [case["value"] for case in body.get("examples", {}).values()] or [body["example"]]
        for example in examples:
            assert_valid(example, body["schema"])


@each_operation
def test_every_refusal_is_a_problem_document_whose_codes_have_its_status(call: dict[str, Any]) -> None:
    refusals = {int(status): answer for status, answer in call["responses"].items() if int(status) >= 400}
    assert {422, 429, 500, 503} <= refusals.keys()
    for status, answer in refusals.items():
        ((media_type, body),) = answer["content"].items()
        assert media_type == "application/problem+json"
        assert {HTTP_STATUS[code] for code in body["examples"]} == {status}
        assert {case["value"]["status"] for case in body["examples"].values()} == {status}


@each_operation
def test_every_operation_is_described_and_says_who_may_call_it(call: dict[str, Any]) -> None:
    assert call["summary"]
    assert call["description"]
    assert call["tags"]
    for requirement in call.get("security", []):
        assert requirement.keys() <= DOCUMENT["components"]["securitySchemes"].keys()
    if call.get("security"):
        assert {"401", "403"} <= call["responses"].keys()


def test_operation_ids_are_unique() -> None:
    ids = [call["operationId"] for call in OPERATIONS.values()]
    assert len(set(ids)) == len(ids)


def test_there_are_no_examples_of_models_that_are_gone() -> None:
    assert BODIES.keys() - DOCUMENT["components"]["schemas"].keys() == set()
