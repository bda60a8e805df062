"""docs/events.md says of every event what the catalogue says, and its examples are events."""

import json
import re

import msgspec
import pytest

from domain.event_docs import DESCRIBED, FIELDS, FIELDS_OF, meaning_of, page
from domain.events import CATALOGUE
from tests.servers import ROOT

FIELDS_IN_USE = {(event, field) for event, kind in CATALOGUE.items() for field in kind.__struct_fields__}
STEP = re.compile(r"`((?:risk|ledger|orders|positions|matching)\.(?!v_|liquidation_queue)\w+)`")


def test_the_page_is_what_the_catalogue_makes() -> None:
    stored = (ROOT / "docs" / "events.md").read_text(encoding="utf-8")
    assert stored == page(), "Run: python -m domain.event_docs > docs/events.md"


def test_every_event_is_described_and_no_other() -> None:
    assert DESCRIBED.keys() == CATALOGUE.keys()
    assert all((kind.__doc__ or "").strip() for kind in CATALOGUE.values())


def test_every_field_has_a_meaning_and_every_meaning_a_field() -> None:
    assert all(isinstance(meaning_of(*place), str) for place in FIELDS_IN_USE)
    assert FIELDS.keys() == {field for _, field in FIELDS_IN_USE}
    assert FIELDS_OF.keys() <= FIELDS_IN_USE


@pytest.mark.parametrize("event", CATALOGUE)
def test_the_example_is_the_event_with_all_its_fields(event: str) -> None:
    example = DESCRIBED[event].example
    decoded = msgspec.json.decode(example, type=CATALOGUE[event])
    assert json.loads(msgspec.json.encode(decoded)) == json.loads(example)


def test_every_step_that_the_page_names_is_one_of_a_workflow() -> None:
    named = set(STEP.findall(page()))
    sources = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "domain").rglob("*.py"))
    assert len(named) > 15
    assert [step for step in named if f'"{step}"' not in sources] == []


@pytest.mark.parametrize("event", CATALOGUE)
def test_the_event_is_written_somewhere(event: str) -> None:
    """By name, in the part that the page says: the engine, the market process, or a service."""
    writer = re.split(r"[:,]", DESCRIBED[event].emitted_by)[0].strip()
    folder = ROOT / (writer if writer in ("engine", "market") else "activities")
    sources = "".join(path.read_text(encoding="utf-8") for path in folder.rglob("*.py"))
    assert re.search(rf"\b{event}\(", sources)
