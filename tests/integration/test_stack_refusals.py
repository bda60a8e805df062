"""What is in the way of a start is said in one line, with exit status 1."""

import os
import socket
from pathlib import Path

import pytest

from tests.stack_runner import refused


def test_a_port_in_use(tmp_path: Path) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = str(other.getsockname()[1])
        line = refused(tmp_path / "state", EXCHANGE_API_PORT=port)
    assert f"127.0.0.1:{port}: Address already in use" in line
    assert not (tmp_path / "state").exists()


def test_a_file_in_place_of_the_state_folder(tmp_path: Path) -> None:
    (tmp_path / "state").write_text("not a folder")
    assert f"{tmp_path / 'state'}: File exists" in refused(tmp_path / "state")


def test_a_state_folder_that_cannot_be_written() -> None:
    # Not even root makes folders in /proc.
    assert "Cannot use state folder /proc/exchange: " in refused(Path("/proc/exchange"))


def test_data_of_another_postgres(tmp_path: Path) -> None:
    (tmp_path / "state" / "postgres").mkdir(parents=True)
    (tmp_path / "state" / "postgres" / "PG_VERSION").write_text("9\n")
    assert "is of PostgreSQL 9, this is " in refused(tmp_path / "state")


def test_a_folder_that_is_no_database(tmp_path: Path) -> None:
    (tmp_path / "state" / "postgres").mkdir(parents=True)
    assert "is not a PostgreSQL data folder" in refused(tmp_path / "state")


def test_an_empty_secret(tmp_path: Path) -> None:
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / "admin-password").touch()
    assert "admin-password is empty" in refused(tmp_path / "state")


@pytest.mark.parametrize("value", ["many", "0", "99999"])
def test_a_setting_that_is_no_port(tmp_path: Path, value: str) -> None:
    assert "EXCHANGE_API_PORT: " in refused(tmp_path / "state", EXCHANGE_API_PORT=value)


def test_too_few_ports_for_figures(tmp_path: Path) -> None:
    line = refused(tmp_path / "state", EXCHANGE_METRICS_PORT="65532")
    assert "from 65532 on: set EXCHANGE_METRICS_HOST or EXCHANGE_METRICS_PORT" in line


def test_an_external_database_that_does_not_answer(tmp_path: Path) -> None:
    url = f"postgresql://nobody@/nothing?host={os.fspath(tmp_path)}"
    line = refused(tmp_path / "state", EXCHANGE_DATABASE_URL=url)
    assert "postgres is not ready after" in line
