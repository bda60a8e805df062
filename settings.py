"""Settings of every process, read from the environment (prefix ``EXCHANGE_``)."""

from decimal import Decimal
from functools import cache
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, PositiveInt, SecretStr, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

PORT_MAX = 65_535
Port = Annotated[int, Field(ge=1, le=PORT_MAX)]


class Settings(BaseSettings):
    """One attribute per ``EXCHANGE_…`` variable; the defaults serve the embedded stack."""

    model_config = SettingsConfigDict(env_prefix="EXCHANGE_", env_ignore_empty=True)

    # The two addresses may hold passwords.
    database_url: SecretStr | None = None
    redis_url: SecretStr | None = None
    temporal_address: str | None = None
    temporal_namespace: str = "default"
    api_host: str = "127.0.0.1"
    api_port: Port = 8000
    state_dir: Path = Path(".exchange")
    admin_email: str = "admin@exchange.local"
    admin_password: SecretStr | None = None
    internal_token: SecretStr | None = None
    index_source: Literal["simulated", "ccxt"] = "simulated"
    index_seed: int = 1
    insurance_fund_seed: Decimal = Decimal(1_000_000)
    index_replay_file: Path | None = None
    index_exchanges: str = "binance:1,coinbase:1,kraken:1"
    index_urls: str = ""
    index_poll_seconds: PositiveFloat = 2.0
    index_timeout_seconds: PositiveFloat = 3.0
    index_stale_seconds: PositiveFloat = 10.0
    index_vwap_seconds: PositiveFloat = 10.0
    funding_interval_seconds: int = 8 * 3600
    mark_price_interval_seconds: float = 1.0
    # Ed25519 keys in PEM: the first signs access tokens, the tokens of all are good.
    jwt_private_key_file: Path | None = None
    # Fernet keys, one a line, that encrypt the secrets of HMAC API keys: the first encrypts, all decrypt.
    api_key_secrets_file: Path | None = None
    # How long an API key may be good for.
    api_key_lifetime_days_max: PositiveInt = 365
    log_level: str = "INFO"
    # Where engine, worker and market answer /metrics and /health/…; nowhere without a port. The api has its own.
    metrics_host: str = "127.0.0.1"
    metrics_port: Port | None = None
    # Where the Temporal SDK of worker and api shows its own figures.
    temporal_metrics_port: Port | None = None
    # The base URL of an OTLP/HTTP receiver of traces; none are made without one.
    otlp_endpoint: str | None = None
    log_format: Literal["text", "json"] = "text"
    # Which requests are logged: all, or those that failed (5xx, 401, 403, 408, 413, 429) or took longer than a second.
    access_log: Literal["all", "problems"] = "problems"
    # Origins of web pages that may call the api, separated by commas; none: no CORS headers at all.
    cors_origins: str = ""
    # Addresses or networks of proxies whose X-Forwarded-For and -Proto are believed, separated by commas.
    trusted_proxies: str = ""
    # Requests a second; twice as many at once (ten times as many sign-ins). 0: no limit.
    rate_limit_address: float = Field(5_000, ge=0)
    rate_limit_user: float = Field(1_000, ge=0)
    rate_limit_api_key: float = Field(1_000, ge=0)
    rate_limit_sign_in: float = Field(50, ge=0)
    # From here on requests are refused with 503, in each api process.
    requests_in_flight_max: int = 600
    loop_lag_seconds_max: float = 0.5
    # … and from here on while requests have been waiting for each other for a while.
    request_wait_seconds_max: PositiveFloat = 1.0
    sockets_per_address: int = 200
    engine_instruments: str = ""
    market_instruments: str = ""
    market_takeover_seconds: float = 3.0
    engine_lease_seconds: float = 5.0
    engine_snapshot_commands: int = 50_000
    # The newest events of each instrument that are kept in any case, and the trades among them.
    event_retention_count: int = 1_000_000
    # For how many days attempts to sign in are on record.
    login_audit_retention_days: PositiveInt = 90

    def require_database_url(self) -> str:
        """The Postgres URL. Raises RuntimeError when it is not set (outside the embedded stack)."""
        return _required("EXCHANGE_DATABASE_URL", revealed(self.database_url))

    def require_redis_url(self) -> str:
        """The Redis or Valkey URL. Raises RuntimeError when it is not set."""
        return _required("EXCHANGE_REDIS_URL", revealed(self.redis_url))

    def require_temporal_address(self) -> str:
        """The Temporal frontend, host:port. Raises RuntimeError when it is not set."""
        return _required("EXCHANGE_TEMPORAL_ADDRESS", self.temporal_address)


def revealed(secret: SecretStr | None) -> str | None:
    """The value behind a secret setting, for the one that needs it; None when it is not set."""
    return None if secret is None else secret.get_secret_value()


def _required(name: str, value: str | None) -> str:
    if not value:
        raise RuntimeError(f"{name} is not set: start the stack with `make run`, or name an external server")
    return value


@cache
def get_settings() -> Settings:
    """The settings of this process, read once."""
    return Settings()


def complaint(error: ValidationError) -> str:
    """In one line, the first thing that is wrong with the environment."""
    first = error.errors()[0]
    return f"EXCHANGE_{str(first['loc'][0]).upper()}: {first['msg']}"
