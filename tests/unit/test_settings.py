"""Settings that are secret are not shown by accident, and reach whoever needs them."""

import logging

import pytest

from settings import Settings, revealed

SECRET = "hunter2-hunter2"
SECRETS = {
    "database_url": f"postgresql://exchange:{SECRET}@db/exchange",
    "redis_url": f"redis://:{SECRET}@cache",
    "admin_password": SECRET,
    "internal_token": SECRET,
}


@pytest.fixture
def settings(monkeypatch: pytest.MonkeyPatch) -> Settings:
    for name, value in SECRETS.items():
        monkeypatch.setenv(f"EXCHANGE_{name.upper()}", value)
    return Settings()


def test_secrets_are_in_no_text_of_the_settings(settings: Settings, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        logging.getLogger("settings").info("%s %r", settings, settings)
    texts = [caplog.text, str(settings), repr(settings), settings.model_dump_json(), str(settings.model_dump())]
    assert [text for text in texts if SECRET in text] == []
    assert all("redis_url" in text for text in texts)


def test_secrets_reach_whoever_needs_them(settings: Settings) -> None:
    assert settings.require_database_url() == SECRETS["database_url"]
    assert settings.require_redis_url() == SECRETS["redis_url"]
    assert revealed(settings.admin_password) == revealed(settings.internal_token) == SECRET


@pytest.mark.parametrize("value", [None, ""])
def test_an_address_that_is_not_set_is_named(value: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("EXCHANGE_DATABASE_URL", "EXCHANGE_REDIS_URL"):
        if value is None:
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, value)
    settings = Settings()
    with pytest.raises(RuntimeError, match="EXCHANGE_DATABASE_URL is not set"):
        settings.require_database_url()
    with pytest.raises(RuntimeError, match="EXCHANGE_REDIS_URL is not set"):
        settings.require_redis_url()
