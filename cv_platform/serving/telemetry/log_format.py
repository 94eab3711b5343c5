"""How the service's log looks: one JSON object per line on standard error, or plain text.

Every line of a request carries its `request_id`, whoever writes it: this package, BentoML, a library. What a client
sent cannot start a line or move a cursor, and the secrets of the installation are blotted out wherever they turn up.
"""

from __future__ import annotations

import json
import logging
import re
import sys
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from typing import Any, TextIO
from urllib.parse import quote, unquote, urlsplit

from pydantic import SecretStr

from cv_platform.serving.telemetry.observation import current_observation
from cv_platform.settings import Settings

BLOT = "***"
_SHORTEST_SECRET = 4
"""Shorter ones are no secret, and occur everywhere."""
_ENCODE = json.JSONEncoder(default=str).encode
_OTHER_LOGGERS = ("bentoml", "uvicorn", "uvicorn.error", "circus")
"""Those that BentoML gives handlers of their own."""


def configure_logging(settings: Settings, stream: TextIO | None = None) -> None:
    """Makes every logger of this process write in the installation's format, to `stream` (None: standard error)."""
    handler = logging.StreamHandler(stream or sys.stderr)
    secrets = secret_texts(settings)
    handler.setFormatter(JsonLines(secrets) if settings.log_format == "json" else TextLines(secrets))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    for name in _OTHER_LOGGERS:
        other = logging.getLogger(name)
        other.handlers.clear()
        other.propagate = True
    logging.getLogger("cv_platform").setLevel(logging.INFO)
    logging.captureWarnings(True)


def secret_texts(settings: Settings) -> list[str]:
    """Returns the secrets of an installation in the forms in which they may turn up."""
    secrets = [
        secret.get_secret_value()
        for secret in (settings.admin_token, *settings.api_keys, *settings.alert_urls)
        if isinstance(secret, SecretStr)
    ]
    secrets += [pair.get_secret_value().partition("=")[2] for pair in settings.labeller_keys]
    urls = [settings.mlflow_tracking_uri, settings.storage_url, settings.evidently_url or ""]
    if settings.database_url is not None:
        urls.append(settings.database_url.get_secret_value())
    for url in urls:
        secrets += _passwords(url)
    return secrets


def _passwords(url: str) -> list[str]:
    try:
        password = urlsplit(url).password
    except ValueError:  # A malformed address: whoever uses the URL says so.
        return []
    return [password, unquote(password)] if password else []


def escaped(text: str) -> str:
    """Returns the text with everything that a terminal would not print as one visible character spelled out."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


class _Lines(logging.Formatter):
    """What both formats share.

    Args:
        secrets: texts that no line may show.
    """

    def __init__(self, secrets: Sequence[str] = ()) -> None:
        super().__init__()
        self._secrets = _pattern(secrets)

    def _blotted(self, line: str) -> str:
        return line if self._secrets is None else self._secrets.sub(BLOT, line)

    def _exception(self, record: logging.LogRecord) -> str | None:
        if record.exc_info and not record.exc_text:
            record.exc_text = self.formatException(record.exc_info)
        return record.exc_text or None


class JsonLines(_Lines):
    """Renders a record as one JSON object, in ASCII."""

    def format(self, record: logging.LogRecord) -> str:
        """Returns the line."""
        line: dict[str, Any] = {
            "time": _time(record),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
            **_context_fields(record),
        }
        exception = self._exception(record)
        if exception is not None:
            line["exception"] = exception
        # In ASCII, JSON spells out every control character but this one.
        return self._blotted(_ENCODE(line).replace("\x7f", "\\u007f"))


class TextLines(_Lines):
    """Renders a record as text: time, level, logger, message, then the fields."""

    def format(self, record: logging.LogRecord) -> str:
        """Returns the line; a traceback's lines follow, indented, so that none of them looks like one of its own."""
        fields = "".join(f" {name}={value}" for name, value in _context_fields(record).items())
        line = escaped(f"{_time(record)} {record.levelname} {record.name}: {record.getMessage()}{fields}")
        exception = self._exception(record)
        if exception is not None:
            line += "".join(f"\n    {escaped(part)}" for part in exception.splitlines())
        return self._blotted(line)


def _context_fields(record: logging.LogRecord) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    observation = current_observation()
    if observation is not None:
        fields["request_id"] = observation.facts.request_id
        if observation.span is not None:
            fields["trace_id"] = observation.span.trace_id
    own: dict[str, Any] = getattr(record, "fields", {})
    fields.update((name, value) for name, value in own.items() if value is not None)
    return fields


def _time(record: logging.LogRecord) -> str:
    return datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _pattern(secrets: Iterable[str]) -> re.Pattern[str] | None:
    forms: set[str] = set()
    for secret in secrets:
        if len(secret) >= _SHORTEST_SECRET:
            # As it is, as JSON, Python and a URL write it.
            forms |= {secret, json.dumps(secret)[1:-1], repr(secret)[1:-1], escaped(secret), quote(secret, safe="")}
            forms |= {json.dumps(form)[1:-1] for form in tuple(forms)}
    if not forms:
        return None
    return re.compile("|".join(re.escape(form) for form in sorted(forms, key=len, reverse=True)))
