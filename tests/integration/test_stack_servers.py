"""The embedded servers start as anybody and anywhere, and never outlive who started them."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from stack import servers
from stack.servers import StackError, launcher, wait_until_ready
from tests.servers import running

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root has a choice of users")


@pytest.fixture
def private_folder(tmp_path: Path) -> Path:
    tmp_path.chmod(0o700)
    return tmp_path


@as_root
@pytest.mark.parametrize("allowed", [True, False], ids=["user namespace", "no user namespace"])
async def test_root_runs_postgres_in_a_folder_nobody_else_may_enter(
    private_folder: Path, monkeypatch: pytest.MonkeyPatch, *, allowed: bool
) -> None:
    if not allowed:
        other = servers._Identity(servers.NOBODY, in_namespace=False)
        monkeypatch.setattr(servers, "_postgres_identity", lambda: other)
    server = servers.postgres(private_folder)
    async with running([server], private_folder):
        assert (private_folder / "postgres" / "postmaster.pid").exists()
    assert not (private_folder / "postgres" / "postmaster.pid").exists()


async def test_a_path_too_long_for_a_socket_gets_a_short_private_folder(tmp_path: Path) -> None:
    state = tmp_path / ("long" * 25)
    state.mkdir()
    server = servers.valkey(state)
    folder = Path(server.endpoint.url.removeprefix("unix://")).parent
    try:
        async with running([server], tmp_path):
            assert folder.stat().st_mode & 0o777 == 0o700
    finally:
        folder.rmdir()


@pytest.mark.parametrize("name", ["postmaster.pid", f"{servers.POSTGRES_SOCKET}.lock"])
async def test_a_recycled_pid_in_a_lock_file_does_not_stop_postgres(tmp_path: Path, name: str) -> None:
    lock = tmp_path / "postgres" / name
    async with running([servers.postgres(tmp_path)], tmp_path):
        content = lock.read_text()
    # The machine was switched off, and now another program has the number (not a parent: PostgreSQL knows those).
    other = await asyncio.create_subprocess_exec("/bin/sleep", "60")
    try:
        lock.write_text("\n".join([str(other.pid), *content.splitlines()[1:]]))
        async with running([servers.postgres(tmp_path)], tmp_path):
            pass
    finally:
        other.kill()
        await other.wait()


async def test_a_copy_of_a_database_starts_beside_the_one_it_is_of(tmp_path: Path) -> None:
    state, copy = tmp_path / "state", tmp_path / "copy"
    state.mkdir()
    copy.mkdir()
    original = servers.postgres(state)
    async with running([original], tmp_path):
        where = ["-h", original.endpoint.url.split("host=")[1], "-U", "postgres", "-D", str(copy / "postgres")]
        backup = servers.POSTGRES_BIN_PATH / "pg_basebackup"
        assert await (await asyncio.create_subprocess_exec(backup, *where, "-c", "fast")).wait() == 0
        async with running([servers.postgres(copy)], tmp_path):
            pass


async def test_a_server_that_does_not_answer_is_reported_with_its_last_words(tmp_path: Path) -> None:
    with pytest.raises(StackError, match=r"valkey is not ready after 0 s: .*No such file"):
        await wait_until_ready(servers.valkey_at(f"unix://{tmp_path}/none"), 0.2)


@pytest.mark.parametrize("option", [[], pytest.param(["--user-namespace"], marks=as_root), ["--signal", "15"]])
def test_a_child_dies_with_its_parent(option: list[str]) -> None:
    program = f"import subprocess, time; print(subprocess.Popen({[*launcher(*option), '/bin/sleep', '60']}).pid)"
    command = [sys.executable, "-u", "-c", f"{program}; time.sleep(60)"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        child = psutil.Process(int(parent.stdout.readline()))
        deadline = time.monotonic() + 10
        while child.name() != "sleep":
            assert time.monotonic() < deadline, "The launcher did not become its command"
            time.sleep(0.01)
        parent.send_signal(signal.SIGKILL)
    assert psutil.wait_procs([child], timeout=10)[1] == []
