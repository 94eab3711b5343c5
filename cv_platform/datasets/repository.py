"""A dataset's git repository: its tags, the DVC file and the annotations behind each, and new versions.

The only caller of git. It reads and adds objects and tags; working tree, index and branches of an existing repository
stay as they are, and neither the user's git configuration nor hooks take part. Pixels are `dvc_store`'s business.
"""

from __future__ import annotations

import hashlib
import subprocess
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import yaml

from cv_platform.errors import DatasetError, DatasetNotFoundError, InvalidDatasetError, UnknownDatasetVersionError

DVC_FILE = "images.dvc"
DATA_FOLDER = "images"
ANNOTATIONS = "annotations.csv"

_SCAFFOLD = {
    ".dvc/config": b"[core]\n    analytics = false\n    autostage = false\n",
    ".dvc/.gitignore": b"/config.local\n/tmp\n/cache\n",
    ".dvcignore": b"",
    ".gitignore": f"/{DATA_FOLDER}\n".encode(),
}
# A git hook exports these: they would send our commands to the hook's repository, or commits under a person's name.
_FOREIGN_VARIABLES = (
    *("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE", "GIT_OBJECT_DIRECTORY", "GIT_COMMON_DIR", "GIT_PREFIX"),
    *("GIT_AUTHOR_NAME", "GIT_AUTHOR_EMAIL", "GIT_AUTHOR_DATE"),
    *("GIT_COMMITTER_NAME", "GIT_COMMITTER_EMAIL", "GIT_COMMITTER_DATE"),
)
_GIT_TIMEOUT_SECONDS = 120


@dataclass(frozen=True)
class StoredVersion:
    """One tag of a dataset repository.

    Attributes:
        tag: the git tag.
        commit: the commit that it names, 40 hex digits.
        dvc_md5: identity of images and labels. Without annotations in git it is DVC's md5 of the folder (without
            `.dir`); with them it is the md5 of that and of the annotations, since either may change alone.
        dvc_file: the text of the `*.dvc` file.
        data_path: the folder that it tracks, relative to the repository.
        annotations: the content of `annotations.csv`, if there is one.
    """

    tag: str
    commit: str
    dvc_md5: str
    dvc_file: str
    data_path: str
    annotations: bytes | None


def require_repository(directory: Path, *, remedy: str) -> None:
    """Checks that `directory` is the root of a git repository.

    Raises:
        DatasetNotFoundError: it is not; the message ends with `remedy`.
    """
    if not (directory / ".git").exists():
        state = "a folder without .git" if directory.is_dir() else "nothing there"
        raise DatasetNotFoundError(f"Expected a git + DVC repository at {directory}. Received: {state}. {remedy}")


def read_version(directory: Path, tag: str) -> StoredVersion:
    """Reads one tag, without a checkout.

    Raises:
        UnknownDatasetVersionError: there is no such tag; the tags that exist are listed.
        InvalidDatasetError: the tag tracks no single folder with DVC.
    """
    version = _read_tags(directory, [tag]).get(tag)
    if version is None:
        known = list_tag_names(directory)
        if tag in known:
            raise InvalidDatasetError(
                f"{directory} {tag}: expected {DVC_FILE} tracking one folder. Received: a tag without it. "
                f"Run `dvc add {DATA_FOLDER}`, commit, and tag again."
            )
        raise UnknownDatasetVersionError(
            f"Expected a tag of {directory}. Received: {tag!r}. Tags: {', '.join(known) or 'none'}. "
            "Change dataset.dvc_tag, or add the version with `cv-platform import-dataset`."
        )
    return version


def read_file(directory: Path, tag: str, path: str) -> bytes | None:
    """Returns the content of another file of a tag's commit, such as a review; None where there is none."""
    spec = f"refs/tags/{tag}:{path}"
    found = _read_objects(directory, [spec])[spec]
    return found[1] if found else None


def read_newest_file(directory: Path, path: str) -> bytes | None:
    """Returns the content of a file of the newest commit; None where there is none."""
    spec = f"{_newest_commit(directory)}:{path}"
    found = _read_objects(directory, [spec])[spec]
    return found[1] if found else None


def list_versions(directory: Path) -> dict[str, StoredVersion]:
    """Reads all tags that carry a dataset, in git's version order."""
    return _read_tags(directory, list_tag_names(directory))


def list_tag_names(directory: Path) -> list[str]:
    """Lists a repository's tags, datasets or not, in git's version order."""
    refs = run_git(directory, "for-each-ref", "--sort=version:refname", "--format=%(refname:strip=2)", "refs/tags")
    return refs.decode().splitlines()


@dataclass(frozen=True)
class VersionSummary:
    """A tag for a table: its data version, the files and bytes that DVC counts, when and why it was made."""

    tag: str
    dvc_md5: str
    files: int | None
    bytes: int | None
    made: str
    message: str


def summarise_versions(directory: Path) -> list[VersionSummary]:
    """Describes all tags that carry a dataset, in git's version order."""
    form = "--format=%(refname:strip=2)%00%(creatordate:iso-strict)%00%(contents:subject)"
    lines = run_git(directory, "for-each-ref", form, "refs/tags").decode(errors="replace").splitlines()
    told = {tag: (made, message) for tag, made, message in (line.split("\0") for line in lines)}
    summaries: list[VersionSummary] = []
    for tag, version in list_versions(directory).items():
        (out,) = yaml.safe_load(version.dvc_file)["outs"]
        summaries.append(VersionSummary(tag, version.dvc_md5, out.get("nfiles"), out.get("size"), *told[tag]))
    return summaries


def version_md5(dvc_file: str, annotations: bytes | None) -> str:
    """Returns the identity of images and labels, 32 hex digits: see `StoredVersion.dvc_md5`."""
    images_md5 = _tracked(dvc_file)[0].removesuffix(".dir")
    return images_md5 if annotations is None else hashlib.md5(images_md5.encode() + b"\n" + annotations).hexdigest()


def create_repository(directory: Path) -> None:
    """Makes an empty git repository in the existing, empty folder `directory`."""
    run_git(directory, "init", "--quiet", "--template=")
    run_git(directory, "symbolic-ref", "HEAD", "refs/heads/main")
    for name, content in _SCAFFOLD.items():
        (directory / name).parent.mkdir(exist_ok=True)
        (directory / name).write_bytes(content)


def commit_version(
    directory: Path,
    tag: str,
    *,
    dvc_file: str,
    annotations: bytes | None,
    message: str,
    date: str | None = None,
    beside: Mapping[str, bytes] | None = None,
) -> StoredVersion:
    """Adds a commit and a tag; of an existing repository nothing else changes, neither branch nor working tree.

    Args:
        directory: the repository.
        tag: the new tag.
        dvc_file: content of `images.dvc`.
        annotations: content of `annotations.csv`; None removes it.
        message: the commit's message.
        date: date of the commit, for commits that are to be the same everywhere.
        beside: more files, by path; those of earlier commits stay.

    Raises:
        DatasetError: git refused.
    """
    parent = _newest_commit(directory)
    files: dict[str, bytes | None] = {DVC_FILE: dvc_file.encode(), ANNOTATIONS: annotations, **(beside or {})}
    if parent is None:
        files |= _SCAFFOLD
    # An index of its own, so that what the user has staged stays staged.
    with tempfile.TemporaryDirectory(prefix="cv-platform-index-") as folder:
        index = {"GIT_INDEX_FILE": str(Path(folder) / "index")}
        run_git(directory, "read-tree", parent or "--empty", variables=index)
        lines = []
        for name, content in files.items():
            if content is None:
                lines.append(f"0 {'0' * 40}\t{name}")
            else:
                blob = run_git(directory, "hash-object", "-w", "--stdin", stdin=content).decode().strip()
                lines.append(f"100644 {blob}\t{name}")
        run_git(directory, "update-index", "--index-info", stdin=("\n".join(lines) + "\n").encode(), variables=index)
        tree = run_git(directory, "write-tree", variables=index).decode().strip()
    dates = {"GIT_AUTHOR_DATE": date, "GIT_COMMITTER_DATE": date} if date else {}
    parents = ("-p", parent) if parent else ()
    stdin = f"{message}\n".encode(errors="replace")
    commit = run_git(directory, "commit-tree", tree, *parents, stdin=stdin, variables=dates).decode().strip()
    run_git(directory, "update-ref", f"refs/tags/{tag}", commit, "")
    return read_version(directory, tag)


def show_version(directory: Path, version: StoredVersion) -> None:
    """Moves branch and working tree of a repository that nobody has seen yet to `version`."""
    run_git(directory, "update-ref", "HEAD", version.commit)
    run_git(directory, "reset", "--quiet", "--hard")


def run_git(
    directory: Path, *arguments: str, stdin: bytes | None = None, variables: Mapping[str, str] | None = None
) -> bytes:
    """Runs git in `directory` without hooks, prompts, signatures or the caller's git environment; returns its output.

    Raises:
        DatasetError: git is missing, fails or does not end.
    """
    settings = {
        "user.name": "cv-platform",
        "user.email": "cv-platform@localhost",
        "commit.gpgsign": "false",
        "tag.gpgsign": "false",
        "core.hooksPath": "/dev/null",
        "core.fsmonitor": "false",
        "core.autocrlf": "false",
        "core.quotePath": "false",
        "gc.auto": "0",
        # Repositories are often mounted from another account; no code of theirs runs here.
        "safe.directory": str(directory),
    }
    options = [part for key, value in settings.items() for part in ("-c", f"{key}={value}")]
    unset = [part for name in _FOREIGN_VARIABLES for part in ("-u", name)]
    assigned = [f"{name}={value}" for name, value in {"LC_ALL": "C", **(variables or {})}.items()]
    command = ["env", *unset, *assigned, "git", "-C", str(directory), *options, *arguments]
    try:
        # Always an input of its own: an inherited stdin could leave git waiting for a person.
        done = subprocess.run(
            command, input=stdin or b"", capture_output=True, timeout=_GIT_TIMEOUT_SECONDS, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as err:
        raise DatasetError(f"Expected git to run in {directory}. Received: {err}. Install git.") from err
    if done.returncode != 0:
        said = done.stderr.decode(errors="replace").strip() or f"status {done.returncode}"
        raise DatasetError(f"Expected `git {arguments[0]}` to succeed in {directory}. Received: {said}")
    return done.stdout


def _newest_commit(directory: Path) -> str | None:
    """Returns the newest commit that has no child, over branch and tags; None in an empty repository."""
    heads = run_git(directory, "for-each-ref", "--count=1", "--format=%(objectname)")
    if not heads:
        return None
    return run_git(directory, "rev-list", "--max-count=1", "--topo-order", "--branches", "--tags").decode().strip()


def _read_tags(directory: Path, tags: Iterable[str]) -> dict[str, StoredVersion]:
    """Reads tags with one git process; a tag without a dataset is left out."""
    tags = list(tags)
    suffixes = ("^{commit}", f":{DVC_FILE}", f":{ANNOTATIONS}")
    wanted = {tag: [f"refs/tags/{tag}{suffix}" for suffix in suffixes] for tag in tags}
    objects = _read_objects(directory, [spec for specs in wanted.values() for spec in specs])
    versions = {}
    for tag, (commit_spec, dvc_spec, annotations_spec) in wanted.items():
        commit, dvc_file, annotations = objects[commit_spec], objects[dvc_spec], objects[annotations_spec]
        if commit is None:
            continue
        content = dvc_file[1] if dvc_file else _only_dvc_file(directory, tag)
        if content is None:
            continue
        labels = annotations[1] if annotations else None
        versions[tag] = _stored_version(directory, tag, commit[0], content.decode(), labels)
    return versions


def _stored_version(directory: Path, tag: str, commit: str, dvc_file: str, annotations: bytes | None) -> StoredVersion:
    try:
        md5, path = _tracked(dvc_file)
    except (yaml.YAMLError, KeyError, TypeError, ValueError) as err:
        raise InvalidDatasetError(
            f"{directory} {tag}: expected a DVC file with one output. Received: {dvc_file[:200]!r}"
        ) from err
    if not md5.endswith(".dir") or path.is_absolute() or ".." in path.parts:
        raise InvalidDatasetError(
            f"{directory} {tag}: expected DVC to track one folder inside the repository. Received: {path} ({md5}). "
            f"Put the images below {DATA_FOLDER}/ and run `dvc add {DATA_FOLDER}`."
        )
    return StoredVersion(tag, commit, version_md5(dvc_file, annotations), dvc_file, path.as_posix(), annotations)


def _tracked(dvc_file: str) -> tuple[str, PurePosixPath]:
    (out,) = yaml.safe_load(dvc_file)["outs"]
    return str(out["md5"]), PurePosixPath(out["path"])


def _only_dvc_file(directory: Path, tag: str) -> bytes | None:
    """Returns the one `*.dvc` file at a tag's root, for repositories that name it otherwise."""
    names = run_git(directory, "ls-tree", "--name-only", f"refs/tags/{tag}^{{commit}}").decode().splitlines()
    found = [name for name in names if name.endswith(".dvc") and name != ".dvc"]
    return run_git(directory, "show", f"refs/tags/{tag}:{found[0]}") if len(found) == 1 else None


def _read_objects(directory: Path, specs: list[str]) -> dict[str, tuple[str, bytes] | None]:
    """Returns `(object id, content)` of each git object named, or None where there is none."""
    if not specs:
        return {}
    output = run_git(directory, "cat-file", "--batch", stdin=("\n".join(specs) + "\n").encode())
    found: dict[str, tuple[str, bytes] | None] = {}
    at = 0
    for spec in specs:
        end = output.index(b"\n", at)
        header = output[at:end].split()
        at = end + 1
        if len(header) == 3 and header[1] in {b"blob", b"commit"}:
            size = int(header[2])
            found[spec] = (header[0].decode(), output[at : at + size])
            at += size + 1
        elif len(header) == 3 and header[2].isdigit():
            found[spec] = None
            at += int(header[2]) + 1
        else:
            found[spec] = None
    return found
