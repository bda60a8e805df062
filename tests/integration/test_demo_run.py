"""The demo on a whole exchange of its own."""

import asyncio
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.servers import ROOT
from tests.stack_runner import RunningStack, client_environment, stack_in

SECONDS = 8


@pytest.fixture(scope="module")
def state(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("demo") / "state"


@pytest.fixture(scope="module")
def stack(state: Path) -> Iterator[RunningStack]:
    with stack_in(state, state.with_name("output")) as running:
        running.wait_until_ready()
        yield running


async def start_demo(stack: RunningStack, state: Path, *arguments: str) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        sys.executable,
        *("-m", "demo", "--url", stack.api_url, "--seed", "1", *arguments),
        cwd=ROOT,
        env=client_environment(state) | {"COLUMNS": "120"},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )


async def text_of(demo: asyncio.subprocess.Process) -> str:
    output, _ = await asyncio.wait_for(demo.communicate(), 100)
    return output.decode()


def volumes_in(text: str) -> tuple[float, float]:
    """Ours and the replayed market's, as the summary shows them."""
    ours, theirs = re.findall(r"volume +│ ([\d.]+) \(replayed ([\d.]+)\)", text)[-1]
    return float(ours), float(theirs)


async def depth_of(stack: RunningStack) -> tuple[list[object], list[object]]:
    async with httpx.AsyncClient(base_url=stack.api_url, trust_env=False) as client:
        book = (await client.get("/api/market/depth/BTC-USDT-PERP")).json()
    return book["bids"], book["asks"]


async def test_a_run_trades_the_replayed_volume_leaves_no_quotes_and_a_clean_audit(
    stack: RunningStack, state: Path
) -> None:
    demo = await start_demo(stack, state, "--seconds", str(SECONDS))
    text = await text_of(demo)
    assert demo.returncode == 0, text
    assert re.search(r"audit +│ OK", text)
    assert re.search(r"rejected +│ none", text)
    ours, theirs = volumes_in(text)
    assert 0.8 * theirs <= ours <= theirs
    assert await depth_of(stack) == ([], [])


async def test_a_run_outlives_the_end_of_an_api_process(stack: RunningStack, state: Path) -> None:
    demo = await start_demo(stack, state, "--seconds", str(2 * SECONDS))
    await asyncio.sleep(SECONDS)
    stack.process("api").kill()
    text = await text_of(demo)
    assert demo.returncode == 0, text
    assert "CONNECTION_LOST" in text
    assert re.search(r"audit +│ OK", text)
    ours, theirs = volumes_in(text)
    assert 0 < ours <= theirs
    assert await depth_of(stack) == ([], [])
