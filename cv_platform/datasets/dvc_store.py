"""DVC's cache and remotes: folders of images go in, checked-out folders come out. The only module that imports DVC.

DVC always works in a scratch folder without git, against the cache and remotes of the repository, so that it neither
changes nor asks about a working tree. https://dvc.org/doc/user-guide/project-structure/internal-files
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import yaml

from cv_platform.datasets.repository import DATA_FOLDER, DVC_FILE, StoredVersion
from cv_platform.errors import DatasetError, DatasetNotFoundError, InvalidDatasetError
from cv_platform.files import exclusive

if TYPE_CHECKING:
    from dvc.repo import Repo

logger = logging.getLogger(__name__)

_SHARED = "cv-platform-shared"


def store_images(scratch: Path, *, repository: Path) -> str:
    """Moves `scratch/images` into the cache of `repository` and returns the text of its `images.dvc`."""
    with _dvc_in(scratch, repository) as repo:
        repo.add([str(scratch / DATA_FOLDER)])  # pyright: ignore[reportArgumentType]  # a method by assignment
    return (scratch / DVC_FILE).read_text(encoding="utf-8")


def check_out(version: StoredVersion, scratch: Path, *, repository: Path) -> None:
    """Puts a version's images at `scratch/<data_path>`, from the cache or else the remote, every checksum verified.

    Raises:
        DatasetError: neither cache nor remote has all the files.
        InvalidDatasetError: a file of the cache is damaged, and there is no remote to fetch it from again.
    """
    dvc_file = scratch / DVC_FILE
    dvc_file.write_text(version.dvc_file, encoding="utf-8")
    for attempt in ("first", "again"):
        with _dvc_in(scratch, repository) as repo:
            has_remote = bool(repo.config["core"].get("remote"))
            _fetch(repo, dvc_file, version, has_remote=has_remote)
            cache = Path(repo.cache.local.path)
        damaged = _damaged_files(version, scratch / version.data_path, cache)
        if not damaged:
            break
        # A name in the cache is its content's md5: a file that differs is of no use to anyone.
        for md5 in damaged.values():
            (cache / md5[:2] / md5[2:]).unlink(missing_ok=True)
        shutil.rmtree(scratch / version.data_path)
        if attempt == "again" or not has_remote:
            raise InvalidDatasetError(
                f"{repository} {version.tag}: expected {', '.join(sorted(damaged)[:5])} as DVC recorded "
                f"them. Received: {len(damaged)} file(s) with another md5, now removed from the cache. Restore them "
                "with `dvc pull` or `dvc add` in that repository, or import the dataset again."
            )
        logger.warning("%d damaged files in the DVC cache of %s; fetching them again", len(damaged), repository)
    shutil.rmtree(scratch / ".dvc")


def push_images(versions: Iterable[StoredVersion], *, repository: Path, url: str | None = None) -> int:
    """Sends the images of versions to a remote, and returns how many files it did not have.

    Args:
        versions: of the repository.
        repository: whose cache has the files.
        url: of the remote, a folder or what DVC has a driver of; None: the repository's default remote.

    Raises:
        DatasetError: there is no such remote, it is away, or neither cache nor remote has all the files.
    """
    from dvc.exceptions import DvcException

    sent = 0
    with (
        exclusive(repository.parent / f".{repository.name}.lock"),
        TemporaryDirectory() as folder,  # Not beside the repository: an import that was killed goes on there.
    ):
        scratch = Path(folder)
        for version in versions:
            dvc_file = scratch / DVC_FILE
            dvc_file.write_text(version.dvc_file, encoding="utf-8")
            with _dvc_in(scratch, repository, remote=url) as repo:
                if not (remote := repo.config["core"].get("remote")):
                    raise DatasetError(
                        f"Expected a default DVC remote of {repository}. Received: none. Run there: "
                        "dvc remote add -d NAME URL (a folder, or s3://…), then push again."
                    )
                try:
                    sent += repo.push([str(dvc_file)])  # pyright: ignore[reportArgumentType]  # as `add` above
                except (DvcException, OSError) as err:
                    raise DatasetError(
                        f"{version.tag}: expected the DVC remote {url or remote!r} to take the images. Received: "
                        f"{_one_line(err)} Check its address and rights; what it has is not sent again."
                    ) from err
    return sent


def object_name(md5: str, *, exact: bool) -> str:
    """Returns where a remote has a file, relative to the remote, by its md5 and whether that is exact."""
    return f"{'files/md5/' if exact else ''}{md5[:2]}/{md5[2:]}"


def listing_name(version: StoredVersion) -> str:
    """Returns where a remote has the listing of a version's files, relative to the remote."""
    return object_name(str(yaml.safe_load(version.dvc_file)["outs"][0]["md5"]), exact=is_exact(version))


def listed_files(version: StoredVersion, *, repository: Path) -> dict[str, str]:
    """Returns the md5 of each file that DVC tracks of a version, by its POSIX path below `data_path`.

    Raises:
        DatasetError: DVC's cache has no listing of the version.
    """
    # Not beside the repository: an import may be at work there, whose lock this is not worth.
    with TemporaryDirectory() as scratch, _dvc_in(Path(scratch), repository) as repo:
        cache = Path((repo.cache.local if is_exact(version) else repo.cache.legacy).path)
    try:
        return _listing(version, cache)
    except (OSError, ValueError, KeyError, TypeError) as err:
        raise DatasetError(
            f"{version.tag}: expected its listing in the DVC cache {cache}. Received: {err}. Run `dvc fetch` in "
            f"{repository}, or import the dataset again."
        ) from err


def is_exact(version: StoredVersion) -> bool:
    """Tells whether md5s are of files as they are; those of DVC 2 are of normalised line ends."""
    return bool(yaml.safe_load(version.dvc_file)["outs"][0].get("hash") == "md5")


def _listing(version: StoredVersion, cache: Path) -> dict[str, str]:
    name = str(yaml.safe_load(version.dvc_file)["outs"][0]["md5"])
    entries = json.loads((cache / name[:2] / name[2:]).read_bytes())
    return {str(entry["relpath"]): str(entry["md5"]) for entry in entries}


def _fetch(repo: Repo, dvc_file: Path, version: StoredVersion, *, has_remote: bool) -> None:
    from dvc.exceptions import CheckoutError, DvcException

    target = [str(dvc_file)]
    try:
        repo.checkout(target, force=True)
        return
    except CheckoutError as err:
        if not has_remote:
            raise DatasetError(
                f"{version.tag}: expected all images in the DVC cache {repo.cache.local.path}, or a default remote. "
                f"Received: {_one_line(err)} Run `dvc push` where the data are, and `dvc remote add -d` here."
            ) from err
    except DvcException as err:
        raise DatasetError(f"{version.tag}: expected DVC to check the images out. Received: {_one_line(err)}") from err
    try:
        repo.pull(target, force=True)
    except (DvcException, OSError) as err:
        remote = repo.config["core"]["remote"]
        raise DatasetError(
            f"{version.tag}: expected the missing images on the DVC remote {remote!r}. Received: {_one_line(err)} "
            "Check the remote's address and rights with `dvc pull` in the repository, then try again."
        ) from err


def _damaged_files(version: StoredVersion, images: Path, cache: Path) -> dict[str, str]:
    """Returns the recorded md5 of each file whose content differs from it, by relative path."""
    if not is_exact(version):
        return {}  # DVC itself vouches for those.
    expected = _listing(version, cache)

    def md5_of(relative: str) -> str:
        try:
            with (images / relative).open("rb") as file:
                return hashlib.file_digest(file, "md5").hexdigest()
        except FileNotFoundError:
            return ""

    with ThreadPoolExecutor(2) as pool:
        actual = dict(zip(expected, pool.map(md5_of, expected), strict=True))
    return {relative: md5 for relative, md5 in expected.items() if actual[relative] != md5}


@contextmanager
def _dvc_in(scratch: Path, repository: Path, *, remote: str | None = None) -> Iterator[Repo]:
    """Opens DVC in `scratch`, with the cache and remotes of `repository`; a remote's URL is then the default one's."""
    from dvc.config import Config
    from dvc.config import ConfigError as DvcConfigError
    from dvc.repo import Repo

    # Its import gives these loggers handlers that hold the streams of that moment and raise where one is closed since.
    for name in ("dvc", "dvc_data", "dvc_objects"):
        logging.getLogger(name).handlers.clear()
        logging.getLogger(name).setLevel(logging.WARNING)
    dvc_folder = repository / ".dvc"
    if not dvc_folder.is_dir():
        raise DatasetNotFoundError(
            f"Expected a DVC repository at {repository}. Received: no .dvc folder. Run `dvc init` there."
        )
    try:
        # Validated below, together with our changes: DVC's schema does not accept its own output.
        config: dict[str, Any] = Config(str(dvc_folder), validate=False)
        core = config.setdefault("core", {})
        core.update(analytics="false", autostage="false", no_scm="true", site_cache_dir=str(scratch / ".dvc" / "site"))
        cache = config.setdefault("cache", {})
        cache.setdefault("dir", str(dvc_folder / "cache"))
        cache["type"] = "reflink,hardlink,copy"
        if remote is not None:
            core["remote"] = _SHARED
            config.setdefault("remote", {})[_SHARED] = {"url": remote}
        (scratch / ".dvc").mkdir(exist_ok=True)
        (scratch / ".dvc" / "config").touch()
        repo = Repo(str(scratch), config=config)
    except DvcConfigError as err:
        raise DatasetError(
            f"Expected a readable DVC configuration in {dvc_folder}. Received: {_one_line(err)}. Correct it."
        ) from err
    try:
        yield repo
    finally:
        repo.close()


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:500]
