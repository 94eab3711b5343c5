"""Messages to people, through Apprise: https://github.com/caronc/apprise/wiki lists the services and their URLs.

The URLs hold tokens, so neither logs nor results ever repeat them.
"""

# Apprise comes without complete types.
# pyright: basic

from __future__ import annotations

import logging
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

logger = logging.getLogger(__name__)


def send_alert(urls: Sequence[str], title: str, body: str, picture: bytes | None = None) -> list[str]:
    """Sends a message to each address.

    Args:
        urls: Apprise URLs, such as `mailtos://…` or `json://host/path`; none sends nothing.
        title: one line.
        body: text.
        picture: JPEG, for the services that take one: mail, most chats, JSON.

    Returns:
        One sentence per address that could not be reached, which names its place in the list and its service, never the
        address. An alert that fails is no reason for the report to fail.
    """
    if not urls:
        return []
    with (
        warnings.catch_warnings(),
        _silent("apprise", "urllib3"),
        tempfile.TemporaryDirectory(prefix="cv-alert-") as folder,
    ):
        # It loads all its plugins at once, and one imports a module that Python has deprecated (Apprise 2.2).
        warnings.simplefilter("ignore", DeprecationWarning)
        attached = None
        if picture is not None:
            attached = Path(folder) / "images.jpg"
            attached.write_bytes(picture)
        failures = _send(urls, title, body, attached)
    logger.info("Alerts sent: %d of %d.", len(urls) - len(failures), len(urls))
    return failures


def _send(urls: Sequence[str], title: str, body: str, attached: Path | None) -> list[str]:
    from apprise import Apprise

    failures: list[str] = []
    for position, url in enumerate(urls, start=1):
        service = _service(url)
        alert = Apprise()
        if not alert.add(url):
            failures.append(f"Alert {position} ({service}): expected an Apprise URL. Received one that it cannot read.")
        elif not alert.notify(body=body, title=title, attach=str(attached) if attached else None):
            failures.append(f"Alert {position} ({service}): the service did not take the message. Check CV_ALERT_URLS.")
    return failures


@contextmanager
def _silent(*names: str) -> Iterator[None]:
    """Silences loggers that write what is sent and where: the addresses' paths are the tokens of many services."""
    loggers = [logging.getLogger(name) for name in names]
    before = [each.level for each in loggers]
    for each in loggers:
        each.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        for each, level in zip(loggers, before, strict=True):
            each.setLevel(level)


def _service(url: str) -> str:
    """Returns the URL's scheme, which names the service and holds no secret."""
    try:
        scheme = urlsplit(url.strip()).scheme
    except ValueError:
        return "unknown"
    return scheme if scheme and len(scheme) <= 20 else "unknown"
