"""Where the request log's database is, as far as that can be told without its driver.

What has to start soon begins here; `connection` makes an engine of the URL, and its imports take longer than loading a
small model.
"""

from __future__ import annotations

from cv_platform.errors import ConfigError
from cv_platform.settings import Settings

_DRIVER = "postgresql+psycopg2"


def postgres_url(url: str) -> str:
    """Returns the URL with the driver that the platform ships: `postgres://` and `postgresql://` are understood.

    Raises:
        ConfigError: it is no PostgreSQL URL.
    """
    scheme, separator, rest = url.strip().partition("://")
    if separator and scheme in {"postgres", "postgresql", _DRIVER}:
        return f"{_DRIVER}://{rest}"
    # The text may hold a password, so it is not repeated.
    received = f"{scheme}://…" if separator else "no URL"
    raise ConfigError(f"DATABASE_URL: expected postgresql://user:password@host:port/database. Received: {received}.")


def running_database_url(settings: Settings) -> str | None:
    """Returns the URL of the request log if it can be used now; starts nothing. None: no embedded PostgreSQL runs.

    `DATABASE_URL` is returned without asking the server.

    Raises:
        ConfigError: DATABASE_URL is no PostgreSQL URL.
        ServiceError: the embedded PostgreSQL's files belong to another user.
    """
    if settings.database_url is not None:
        return postgres_url(settings.database_url.get_secret_value())
    from cv_platform.database.embedded import existing_url

    return existing_url(settings.home)
