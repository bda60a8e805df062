"""Whatever starts a workflow says in words what it is for: operators read it in Temporal's list."""

import ast
import importlib
import inspect
from collections.abc import Iterator
from pathlib import Path

import pytest

import workflows
from domain import contracts

ROOT = Path(__file__).parents[2]
FOLDERS = ("activities", "api", "engine", "market", "monitors", "workflows")
STARTS = {
    "start_workflow",
    "execute_workflow",
    "start_child_workflow",
    "execute_child_workflow",
    "ScheduleActionStartWorkflow",
}
STEPS = {"execute_activity", "start_activity", "execute_local_activity", "start_local_activity"}
MODULES = [path for folder in FOLDERS for path in sorted((ROOT / folder).glob("**/*.py"))]


def calls(path: Path, names: set[str]) -> list[ast.Call]:
    """The calls in a module of anything called like one of `names`."""
    return _calls_in(ast.parse(path.read_text()), names)


def _calls_in(tree: ast.AST, names: set[str]) -> list[ast.Call]:
    return [node for node in ast.walk(tree) if isinstance(node, ast.Call) and _name(node) in names]


def _name(call: ast.Call) -> str:
    return call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")


def without(keyword: str, names: set[str]) -> list[str]:
    """Where something is called without this keyword."""
    return [
        f"{path.relative_to(ROOT)}:{call.lineno}"
        for path in MODULES
        for call in calls(path, names)
        if keyword not in {given.arg for given in call.keywords}
    ]


def workflow_classes() -> Iterator[type]:
    """Every workflow there is."""
    for path in sorted(Path(workflows.__path__[0]).glob("*.py")):
        module = importlib.import_module(f"workflows.{path.stem}")
        for value in vars(module).values():
            if getattr(value, "__temporal_workflow_definition", None) and value.__module__ == module.__name__:
                yield value


def constants() -> dict[str, set[str]]:
    """The texts that the contracts give names to, and those names."""
    found: dict[str, set[str]] = {}
    for path in Path(contracts.__path__[0]).glob("*.py"):
        for name, value in vars(importlib.import_module(f"domain.contracts.{path.stem}")).items():
            if isinstance(value, str) and name.isupper():
                found.setdefault(value, set()).add(name)
    return found


CLASSES = list(workflow_classes())


def test_every_start_has_a_static_summary() -> None:
    assert sum(len(calls(path, STARTS)) for path in MODULES) >= 6
    assert without("static_summary", STARTS) == []


def test_every_start_can_be_searched_for_by_whom_or_what_it_is_about() -> None:
    keys = {"search_attributes", "typed_search_attributes"}
    without_keys = {
        ast.unparse(call.args[0])
        for path in MODULES
        for call in calls(path, STARTS)
        if not keys & {given.arg for given in call.keywords}
    }
    # About the exchange as a whole: found by the ids of their schedules.
    assert without_keys == {"LEDGER_AUDIT", "REGISTRATION_RESUMER"}


@pytest.mark.parametrize("found", CLASSES, ids=lambda found: found.__name__)
def test_every_workflow_says_where_it_stands(found: type) -> None:
    assert _calls_in(ast.parse(inspect.getsource(found)), {"set_current_details"})


def test_every_step_has_a_summary() -> None:
    assert without("summary", STEPS) == []


@pytest.mark.parametrize("found", CLASSES, ids=lambda found: found.__name__)
def test_every_workflow_is_run_by_the_worker_and_started_by_its_name(found: type) -> None:
    names = constants()[getattr(found, "__temporal_workflow_definition").name]
    assert found.__name__ in _names_in(ROOT / "worker.py")
    # By name, in a start or in a table of names that a start looks into.
    assert [path for path in MODULES if names & _names_in(path) and (calls(path, STARTS) or path.stem == "registry")]


def _names_in(path: Path) -> set[str]:
    return {node.id for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Name)}


def test_the_scan_sees_a_start_without_a_summary(tmp_path: Path) -> None:
    module = tmp_path / "bad.py"
    module.write_text("async def f(c):\n    await c.start_workflow('X', 1, id='1')\n    await x(static_summary='')\n")
    assert [call.lineno for call in calls(module, STARTS)] == [2]
