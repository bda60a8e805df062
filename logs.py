"""What the processes log: lines of text or of JSON, and no secrets in either."""

import logging
import re
from datetime import UTC, datetime

import msgspec

from settings import Settings

# The last net: nothing logs tokens on purpose, but an error may quote one.
_SECRET = re.compile(
    r"(?i)(bearer\s+|\"?(?:password|secret|token)\"?\s*[:=]\s*)[^\s,}]+|eyJ[\w-]+\.[\w-]+\.[\w-]*|\$argon2\S+"
)
_encode = msgspec.json.Encoder(enc_hook=str).encode


class TextLines(logging.Formatter):
    """Time, level, logger, message, and the fields of the record behind it."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s")

    def format(self, record: logging.LogRecord) -> str:
        """One line, more with a traceback."""
        return _without_secrets(super().format(record) + "".join(f" {k}={v}" for k, v in _fields(record).items()))


class JsonLines(logging.Formatter):
    """One JSON object a line: time, level, logger, message, error, and the fields of the record."""

    def format(self, record: logging.LogRecord) -> str:
        """One line."""
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "message": _without_secrets(record.getMessage()),
            **_fields(record),
        }
        if record.exc_info:
            line["error"] = _without_secrets(self.formatException(record.exc_info))
        return _encode(line).decode()


def set_up_logging(settings: Settings) -> None:
    """Log to stderr as the settings say."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonLines() if settings.log_format == "json" else TextLines())
    logging.basicConfig(level=settings.log_level.upper(), handlers=[handler])


def _fields(record: logging.LogRecord) -> dict[str, object]:
    """What was logged with `extra={"fields": {…}}`."""
    fields = getattr(record, "fields", None)
    return dict(fields) if fields else {}


def _without_secrets(text: str) -> str:
    return _SECRET.sub(lambda match: f"{match.group(1) or ''}***", text)
