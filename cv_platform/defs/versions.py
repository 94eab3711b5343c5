"""Code versions: one follows the code and the config that decide what an asset contains, all the way up its graph.

Dagster compares an asset's own code version, and the data versions of what it reads. That code versions are inherited
makes everything after a change stale at once, not one step with each run.
https://docs.dagster.io/guides/build/assets/asset-versioning
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any

from cv_platform.config import ExperimentConfig
from cv_platform.files import file_sha256
from cv_platform.training.architectures._users import find_source

_ROOT = Path(__file__).resolve().parents[2]
_PACKAGES = ("cv_platform", "bentos")
_PLUMBING = (
    *("client", "compute", "config", "containers", "cores", "database", "defs", "errors", "files", "local"),
    *("loopback", "maintenance", "object_store", "record_store", "records", "records_0_1", "settings", "storage"),
    "tracking",
)
"""Modules of `cv_platform` that move, keep or show what assets contain, and decide none of it."""


@dataclass(frozen=True)
class Reads:
    """What decides the content of an asset beside its body and its inputs, where `fields` alone do not say it.

    Attributes:
        fields: of the config, by their place in the YAML (`train`, `monitor.alpha`).
        ignores: fields below those that decide nothing.
        source: fields that say where the data are, see `Recipe`.
        code: what the body does not import by name, see `code_fingerprint`.
        functions: fields that may name a function of the user's, as `module:function`: its file counts.
    """

    fields: Sequence[str] = ()
    ignores: Sequence[str] = ()
    source: Sequence[str] = ()
    code: Sequence[str] = ()
    functions: Sequence[str] = ()


@dataclass(frozen=True)
class Recipe:
    """What decides the content of an asset.

    Attributes:
        reads: fields of the config, by their place in the YAML (`train`, `monitor.alpha`).
        ignores: fields below `reads` that decide nothing.
        source: fields that say where the data are. They are not inherited: a data version says what was there.
        code: of the body and of the domain modules that it imports, see `code_fingerprint`.
        upstream: recipes of the assets that it is made from.
        functions: fields that may name a function of the user's.
    """

    reads: tuple[str, ...]
    ignores: tuple[str, ...]
    source: tuple[str, ...]
    code: str
    upstream: tuple[Recipe, ...]
    functions: tuple[str, ...] = ()

    def version(self, config: ExperimentConfig) -> str:
        """Returns the code version under a config."""
        return _digest([self._inherited(config), config.fingerprint(*self.source) if self.source else ""])

    def _inherited(self, config: ExperimentConfig) -> str:
        own = config.fingerprint(*self.reads, without=self.ignores) if self.reads else ""
        named = (functools.reduce(getattr, field.split("."), config) for field in self.functions)
        users = [digest for name in named if (digest := _users_file(name))]
        return _digest([own, self.code, *users, *(recipe._inherited(config) for recipe in self.upstream)])


def code_fingerprint(body: FunctionType, paths: Sequence[str] = ()) -> str:
    """Returns a digest of a function and of every domain module that it imports, directly or not.

    Comments, docstrings and where a line stands do not count: it is the bytecode that is hashed, which differs between
    Python's minor releases.

    Args:
        body: the function.
        paths: files and folders of the repository that it finds by name at run time, or ships: they count as they are.
    """
    code = body.__code__
    if body.__doc__:  # Its first constant, which modules are compiled without.
        code = code.replace(co_consts=(None, *code.co_consts[1:]))
    own, found = _read(code)
    todo, seen = [*found], dict[str, str]()
    taken = [_ROOT / path for path in paths]
    for start in taken:
        files = [path for path in (start, *start.rglob("*")) if path.is_file() and path.suffix != ".pyc"]
        digests = (f"{path.relative_to(_ROOT)} {file_sha256(path)}" for path in sorted(files))
        seen[start.relative_to(_ROOT).as_posix()] = _digest(digests)
    while todo:
        name = todo.pop()
        if name in seen:
            continue
        if (path := _source(name)) is not None and not any(path.is_relative_to(start) for start in taken):
            seen[name], imported = _module(path)
            todo += imported
    return _digest([own, *(f"{name} {seen[name]}" for name in sorted(seen))])


def _users_file(function: Any) -> str | None:
    """Returns the digest of the file of `module:function`; None of a name without a colon, or without a file."""
    source = find_source(function) if ":" in function else None
    return None if source is None else file_sha256(source)


@functools.cache
def _module(path: Path) -> tuple[str, tuple[str, ...]]:
    """Returns a module's digest, and the names of what it imports of this repository."""
    return _read(compile(path.read_bytes(), path.name, "exec", dont_inherit=True, optimize=2))


@functools.cache
def _source(name: str) -> Path | None:
    """Returns the file of a domain module; None of plumbing, and of names that are no module."""
    if name.split(".")[:2][-1] in _PLUMBING:
        return None
    path = _ROOT / name.replace(".", "/")
    return next((file for file in (path.with_suffix(".py"), path / "__init__.py") if file.is_file()), None)


def _read(code: CodeType) -> tuple[str, tuple[str, ...]]:
    content, imported = list[str](), list[str]()
    for part in _parts(code):
        content.append(
            f"{part.co_code.hex()} {part.co_names} {part.co_varnames} {part.co_freevars} {part.co_cellvars} "
            f"{part.co_argcount} {part.co_posonlyargcount} {part.co_kwonlyargcount} {part.co_flags} "
            f"{[_constant(constant) for constant in part.co_consts]}"
        )
        # Only a module's name has a dot; what is imported from a package, a module too, stands beside it.
        modules = [name for name in part.co_names if name.split(".")[0] in _PACKAGES]
        packages = [name for name in modules if (_ROOT / name.replace(".", "/")).is_dir()]
        imported += [*modules, *(f"{package}.{name}" for package in packages for name in part.co_names)]
    return _digest(content), tuple(imported)


def _parts(code: CodeType) -> Iterator[CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _parts(constant)


def _constant(value: object) -> str:
    if isinstance(value, CodeType):
        return value.co_name
    if isinstance(value, frozenset):  # Its order is another in each process.
        return f"frozenset({sorted(map(repr, value))})"
    return f"({', '.join(map(_constant, value))})" if isinstance(value, tuple) else repr(value)


def _digest(parts: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:12]
