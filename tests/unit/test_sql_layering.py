"""A service's SQL names its own schema's tables and what the others publish (`v_…`), nothing else; `api/` has none."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from storage.tables import SCHEMAS, metadata
from storage.views import VIEWS

ROOT = Path(__file__).parents[2]
FOLDERS = ("activities", "api", "engine", "market", "monitors", "reporting")
NAMED = re.compile(rf"\b({'|'.join(SCHEMAS)})\.([a-z_]+)\b")
TABLES = {f"{table.schema}.{table.name}" for table in metadata.tables.values()}
PUBLISHED = TABLES | set(VIEWS)

# Which service a module, or a whole package, speaks for; one that is not here may only read what is published.
SERVICE_OF = {
    "activities/identity/api_keys.py": "auth",
    "activities/identity/auth.py": "auth",
    "activities/identity/sessions.py": "auth",
    "activities/identity/users.py": "users",
    "activities/orders": "orders",
    "activities/risk": "risk",
    "activities/liquidation": "risk",
    "activities/ledger": "ledger",
    "activities/positions": "positions",
    "activities/matching": "matching",
    "activities/market": "market",
    "engine/lease.py": "matching",
    "engine/log.py": "matching",
    "engine/retention.py": "matching",
    "engine/signaller.py": "matching",
    "engine/snapshots.py": "matching",
    "engine/wakeups.py": "matching",
    "market/checkpoints.py": "market",
    "market/funding.py": "market",
    "market/kline_store.py": "market",
    "market/marks.py": "market",
    "monitors/relay.py": "outbox",
    "reporting/build.py": "reporting",
    "reporting/consumer.py": "reporting",
    "reporting/counting.py": "reporting",
    "reporting/views.py": "reporting",
}
# SQL is told by its verbs, by the names of tables and views, and by what runs it.
SQL = re.compile(
    r"\bSELECT\b|\bINSERT INTO\b|\bUPDATE [a-z_.]+ SET\b|\bDELETE FROM\b|\b(?:LISTEN|NOTIFY|LOCK TABLE)\b"
    r"|\bFROM [a-z_]+\.[a-z_]+"
)
RUNNING = {"fetch", "fetchrow", "fetchval", "fetchmany", "executemany", "prepare", "copy_records_to_table"}
MODULES = sorted(str(path.relative_to(ROOT)) for folder in FOLDERS for path in (ROOT / folder).glob("**/*.py"))


def tables_named(source: str) -> set[str]:
    """Tables (not views) in the string literals of a module, its docstrings apart."""
    tree = ast.parse(source)
    prose = set(_docstrings(tree))
    named: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in prose:
            named.update(match.group(0) for match in NAMED.finditer(node.value))
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.args:
            named.update(_copied_into(node))
    return named & TABLES


def sql_in(source: str) -> set[str]:
    """What looks like SQL in a module, its docstrings apart: literals, and calls that run statements."""
    tree = ast.parse(source)
    prose = set(_docstrings(tree))
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in prose:
            if SQL.search(node.value) or PUBLISHED.intersection(re.findall(r"[a-z]+\.[a-z_]+", node.value)):
                found.add(node.value)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in RUNNING:
            found.add(f".{node.func.attr}(…)")
    return found


def _docstrings(tree: ast.AST) -> Iterator[ast.Constant]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            yield node.value


def _copied_into(call: ast.Call) -> Iterator[str]:
    """The table of `copy_records_to_table("events", schema_name="matching", …)`."""
    for keyword in call.keywords:
        if keyword.arg == "schema_name":
            yield f"{ast.literal_eval(keyword.value)}.{ast.literal_eval(call.args[0])}"


def service_of(module: str) -> str | None:
    """The service that a module speaks for: its own entry, or else its package's."""
    return SERVICE_OF.get(module) or SERVICE_OF.get(module.rpartition("/")[0])


@pytest.mark.parametrize("module", MODULES)
def test_sql_touches_tables_of_its_own_service_only(module: str) -> None:
    foreign = {
        table for table in tables_named((ROOT / module).read_text()) if table.split(".")[0] != service_of(module)
    }
    assert not foreign, f"Expected tables of {service_of(module) or 'no service'} and views, was {sorted(foreign)}"


def test_the_scan_sees_tables_in_every_kind_of_literal() -> None:
    source = (
        '"""Prose may name ledger.journals."""\n'
        'A = "SELECT 1 FROM orders.orders JOIN risk.v_exposures USING (user_id)"\n'
        'B = f"UPDATE risk.exposures SET {A} = 1"\n'
        'conn.copy_records_to_table("events", schema_name="matching", columns=[])\n'
    )
    assert tables_named(source) == {"orders.orders", "risk.exposures", "matching.events"}


@pytest.mark.parametrize("module", [module for module in MODULES if module.startswith("api/")])
def test_the_api_has_no_sql(module: str) -> None:
    found = sql_in((ROOT / module).read_text())
    assert not found, f"Expected SQL in the `views` of a service only, was {sorted(found)}"


@pytest.mark.parametrize(
    ("statement", "seen"),
    [
        ('pool.fetchrow(text, "Prose may SELECT")', 2),
        ('"SELECT 1"', 1),
        ('f"INSERT INTO {table} VALUES (1)"', 1),
        ('"UPDATE orders.orders SET status = 1"', 1),
        ('f"DELETE FROM {table}"', 1),
        ('f"{columns} FROM orders.orders"', 1),
        ('"risk.v_exposures"', 1),
        ('conn.copy_records_to_table("events", schema_name="matching", columns=[])', 1),
        ('redis.publish("engine:orders", "selected FROM a list; UPDATE it")', 0),
    ],
)
def test_the_scan_sees_sql_in_every_form(statement: str, seen: int) -> None:
    assert len(sql_in(f'"""Docstrings may SELECT."""\nx = {statement}\n')) == seen
