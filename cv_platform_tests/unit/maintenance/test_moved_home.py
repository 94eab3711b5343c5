"""Which texts name a folder, and which only look like it."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from cv_platform.maintenance.moved_home import Relocation


@pytest.mark.parametrize(
    ("old", "new", "before", "after"),
    [
        ("/data/cv", "/srv/x", "/data/cv/models/a", "/srv/x/models/a"),
        ("/data/cv", "/srv/x", '{"a": "/data/cv"}', '{"a": "/srv/x"}'),
        ("/data/cv", "/srv/x", "file:///data/cv/mlflow", "file:///srv/x/mlflow"),
        ("/data/cv", "/srv/x", "/data/cv/a:/data/cv/b", "/srv/x/a:/srv/x/b"),
        ("/data/cv", "/srv/x", "/data/cv2/models", "/data/cv2/models"),
        ("/data/cv", "/srv/x", "/data/cv.old/models", "/data/cv.old/models"),
        ("/data/cv", "/srv/x", "/mnt/data/cv/models", "/mnt/data/cv/models"),
        ("/my data", "/ö", "file:///my%20data/a", "file:///%C3%B6/a"),
        ("/my data", "/ö", "/my data/a", "/ö/a"),
        ("/ö", "/x", '"/\\u00f6/a"', '"/x/a"'),
        # One replacement must not be replaced again.
        ("/a", "/a/a", "/a/b", "/a/a/b"),
        # Nor the second time.
        ("/a", "/a/a", "/a/a/b", "/a/a/b"),
    ],
)
def test_a_folder_is_replaced_where_it_is_named(old: str, new: str, before: str, after: str) -> None:
    assert Relocation(Path(old), Path(new)).text(before) == after


def test_databases_are_rewritten_and_bundles_are_not(tmp_path: Path) -> None:
    for name in ("storage/models/x", "mlflow"):
        (tmp_path / name).mkdir(parents=True)
    bundle = tmp_path / "storage" / "models" / "x" / "a.json"
    bundle.write_text('{"path": "/old/a"}')
    with closing(sqlite3.connect(tmp_path / "mlflow" / "mlflow.db")) as database, database:
        database.execute('CREATE TABLE "ru""ns" ("u ri" TEXT PRIMARY KEY, n INTEGER, b BLOB) WITHOUT ROWID')
        database.execute('INSERT INTO "ru""ns" VALUES (?, 7, ?), (?, NULL, NULL)', ("/old/a", b"/old/a", "/older/a"))
    Relocation(Path("/old"), Path("/new")).home(tmp_path)
    assert bundle.read_text() == '{"path": "/old/a"}'
    with closing(sqlite3.connect(tmp_path / "mlflow" / "mlflow.db")) as database:
        rows = database.execute('SELECT * FROM "ru""ns" ORDER BY 1').fetchall()
    assert rows == [("/new/a", 7, b"/old/a"), ("/older/a", None, None)]
