"""The documents say of settings, routes, figures, alerts and workflows what the code says."""

import re
from collections.abc import Iterator
from pathlib import Path

from starlette.routing import WebSocketRoute

from api.app import create_app
from api.routes.sockets import router as sockets_router
from domain.events import CATALOGUE
from settings import Settings
from storage.tables import SCHEMAS, metadata
from storage.views import VIEWS
from telemetry.alerts import NAMES
from tests.replay import every_workflow
from tests.servers import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
# Names that only look like settings: of the tests, of compose, and of the gateway's table, which leaves the prefix out.
NO_SETTINGS = {
    "EXCHANGE_SAVE_HISTORIES",
    "EXCHANGE_ADVERSARY_SEED",
    "EXCHANGE_ADVERSARY_SECONDS",
    "EXCHANGE_JWT_PRIVATE_KEY",
    "EXCHANGE_API_KEY_SECRETS",
    "EXCHANGE_",
}


def page(name: str) -> str:
    return (ROOT / "docs" / name).read_text(encoding="utf-8")


def found(pattern: str) -> Iterator[tuple[str, str]]:
    """Every place in a page that the pattern's group fits: page and text."""
    for path in PAGES:
        yield from ((path.name, text) for text in re.findall(pattern, path.read_text(encoding="utf-8")))


def default_of(value: object) -> str:
    """A default as the table writes it."""
    return f"{value:g}" if isinstance(value, float) else "" if value is None else str(value)


def test_every_setting_is_listed_once_with_its_default() -> None:
    rows = re.findall(r"^\| `(EXCHANGE_\w+)` \| (?:`([^`]*)`)? ?\|", page("settings.md"), re.MULTILINE)
    fields = Settings.model_fields.items()
    assert sorted(rows) == sorted((f"EXCHANGE_{name.upper()}", default_of(field.default)) for name, field in fields)


def test_the_gateways_table_gives_the_same_defaults() -> None:
    rows = re.findall(r"^\| [^|]* \| ((?:`[A-Z_]+`(?:, )?)+) \((\S+)\) \|", page("identity.md"), re.MULTILINE)
    given = {name.lower(): default for names, default in rows for name in re.findall(r"[A-Z_]+", names)}
    assert len(given) >= 6
    assert given == {name: default_of(Settings.model_fields[name].default) for name in given}


def test_every_setting_that_a_page_names_exists() -> None:
    known = NO_SETTINGS | {f"EXCHANGE_{name.upper()}" for name in Settings.model_fields}
    assert [place for place in found(r"\b(EXCHANGE_[A-Z_]*)") if place[1] not in known] == []


def test_every_route_that_a_page_names_exists() -> None:
    sockets = [route.path for route in sockets_router.routes if isinstance(route, WebSocketRoute)]
    known = [re.sub(r"\{\w+\}", "{}", path) for path in [*create_app(Settings()).openapi()["paths"], *sockets]]
    # A path that goes on with … stands for all that begin with it.
    named = list(found(r"(/(?:api|ws|health|\.well-known)/[\w/{}$.-]*)(?![\w/{}$.…-])"))
    assert len(named) > 20
    assert [place for place in named if not any(map(_route_pattern(place[1]).fullmatch, known))] == []


def _route_pattern(path: str) -> re.Pattern[str]:
    """Fits the routes that `path` may be a call of: a value may stand where the route has a parameter."""
    segments = path.strip("/").rstrip(".").split("/")
    return re.compile("".join(r"/\{\}" if s[0] in "{$" else rf"/(?:{re.escape(s)}|\{{\}})" for s in segments))


def test_every_figure_that_a_page_names_is_shown() -> None:
    sources = [*(ROOT / "telemetry").glob("*.py"), *(ROOT / "monitors").glob("*.py")]
    shown = set(re.findall(r'"(exchange_\w+)"', "".join(source.read_text(encoding="utf-8") for source in sources)))
    figures = list(found(r"\b(exchange_\w+)"))
    assert figures, "Expected pages that name figures"
    assert [place for place in figures if place[1].removesuffix("_total") not in shown] == []


def test_every_alert_of_ours_is_explained_once() -> None:
    assert sorted(re.findall(r"^\| ([A-Z_]+) \|", page("operations.md"), re.MULTILINE)) == sorted(NAMES)


def test_every_workflow_is_in_the_table_of_ids() -> None:
    rows = "".join(line for line in page("temporal-recipes.md").splitlines() if re.match(r"\| \w+Workflow", line))
    assert {workflow.__name__ for workflow in every_workflow()} == set(re.findall(r"\w+Workflow", rows))


def test_every_file_that_a_page_names_exists() -> None:
    named = found(r"`((?:docs|domain|storage|activities|workflows|engine|market|monitors|api|stack|deploy|tests|bench"
                  r"|reporting|telemetry|client)/[\w./-]*\.\w+)`")  # fmt: skip
    # That page may also name what is still to come.
    assert [place for place in named if place[0] != "status.md" and not _exists(place[1])] == []


def test_every_link_to_a_file_or_a_section_of_ours_leads_there() -> None:
    links = [
        (page, *link)
        for page in PAGES
        for link in re.findall(r"\]\((?!https?:)([^)#\s]*)#?([^)\s]*)\)", page.read_text(encoding="utf-8"))
    ]
    assert len(links) > 50
    assert [(page.name, file, section) for page, file, section in links if not _leads(page, file, section)] == []


def _leads(page: Path, file: str, section: str) -> bool:
    target = page.parent / file if file else page
    return target.exists() and (not section or section in _sections(target))


def _sections(page: Path) -> set[str]:
    """The anchors that GitHub gives to the headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_every_table_view_and_step_that_a_page_names_exists() -> None:
    known = {*metadata.tables, *VIEWS, *_steps(), *(event.topic for event in CATALOGUE.values())}
    named = list(found(rf"`((?:{'|'.join(SCHEMAS)})\.\w+)(?:\.\w+)?`"))
    assert len(named) > 100
    assert [place for place in named if place[1] not in known] == []


def _steps() -> set[str]:
    sources = "".join(source.read_text(encoding="utf-8") for source in (ROOT / "domain").rglob("*.py"))
    return set(re.findall(r'^[A-Z_]+ = "(\w+\.\w+)"$', sources, re.MULTILINE))


def _exists(name: str) -> bool:
    """Whether it is a file, or a name (function, constant) in a module."""
    path = ROOT / name
    module, _, attribute = name.rpartition(".")
    source = ROOT / f"{module}.py"
    return path.exists() or (source.exists() and attribute in source.read_text(encoding="utf-8"))
