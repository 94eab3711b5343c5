"""docker/.env: read, checked, and made from docker/.env.example with random passwords.

Compose reads the same file: https://docs.docker.com/compose/environment-variables/env-file/
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import re
import secrets
import stat
from collections.abc import Mapping
from pathlib import Path

from cv_platform.errors import ConfigError
from cv_platform.files import write_file

RANDOM = "__random__"
HASH = "__hash__"
PASSWORD = "STACK_PASSWORD"
PASSWORD_HASH = "STACK_PASSWORD_HASH"
SHORTEST_SECRET = 16
_LINE = re.compile(r"^(?:export\s+)?([A-Za-z_][A-Za-z0-9_]*)=(.*)$")
_PLACEHOLDER = re.compile(r"^__\w+__$|change[-_]?me|placeholder|your[-_]?(password|secret|token)|^<.*>$", re.IGNORECASE)
_WEAK = {"password", "postgres", "admin", "secret", "123456", "letmein", "qwerty", "mlflow", "dagster", "default"}


def read_env(path: Path) -> dict[str, str]:
    """Returns the variables of an env file, in their order; comments and empty lines are left out.

    Raises:
        ConfigError: a line is no assignment; all of them are named.
    """
    return parse_env(path.read_text(encoding="utf-8"), str(path))


def parse_env(text: str, name: str) -> dict[str, str]:
    """Returns the variables of an env file's text; `name` is for the message.

    Raises:
        ConfigError: as `read_env`.
    """
    values: dict[str, str] = {}
    wrong: list[str] = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        found = _LINE.match(line.strip())
        if found is None:
            wrong.append(str(number))
            continue
        value = found[2].strip()
        if len(value) >= 2 and value[0] == value[-1] and value[0] in "\"'":
            value = value[1:-1]
        values[found[1]] = value
    if wrong:
        # Without its text, which may be a password.
        raise ConfigError(f"{name}: expected NAME=value. Received: something else in line {', '.join(wrong)}. Mend it.")
    return values


def make_secrets(example: Path, target: Path) -> list[str]:
    """Makes `target` from `example`, or adds the secrets that it lacks; returns the names of what was made.

    A value that is there stays, whatever it is; a placeholder is none. The file's mode becomes 600.

    Raises:
        ConfigError: a line of `target` is no assignment.
    """
    wanted = {name: value for name, value in read_env(example).items() if value in (RANDOM, HASH)}
    text = target.read_text(encoding="utf-8") if target.exists() else example.read_text(encoding="utf-8")
    present = read_env(target) if target.exists() else read_env(example)
    made = [name for name in wanted if present.get(name, "") in ("", RANDOM, HASH)]
    values = {name: secrets.token_urlsafe(24) for name in made if wanted[name] == RANDOM}
    if PASSWORD_HASH in made:
        values[PASSWORD_HASH] = ssha(values.get(PASSWORD) or present[PASSWORD])
    if made or not target.exists():
        write_file(target, _assigned(text, values), is_private=True)
    target.chmod(0o600)
    return made


def set_values(target: Path, values: Mapping[str, str]) -> None:
    """Sets variables of an env file; everything else in it stays as it is."""
    write_file(target, _assigned(target.read_text(encoding="utf-8"), values), is_private=True)


def ssha(password: str, salt: bytes | None = None) -> str:
    """Returns `{SSHA}…` as nginx's auth_basic reads it; without a `$`, which Compose would take for a variable."""
    salt = secrets.token_bytes(16) if salt is None else salt
    digest = hashlib.sha1(password.encode() + salt).digest()
    return "{SSHA}" + base64.b64encode(digest + salt).decode()


def fits(password: str, hashed: str) -> bool:
    """Returns whether a hash of `ssha` is that of the password."""
    try:
        content = base64.b64decode(hashed[len("{SSHA}") :], validate=True)
    except ValueError:
        return False
    return hashed.startswith("{SSHA}") and hmac.compare_digest(ssha(password, content[20:]), hashed)


def env_problems(example: Path, target: Path) -> list[str]:
    """Returns what is wrong with the env file, each with what to do; never a value of it."""
    if not target.exists():
        return [f"Expected the stack's settings in {target}. Received: no such file. Run: make secrets"]
    problems: list[str] = []
    mode = stat.S_IMODE(target.stat().st_mode)
    if mode & 0o077:
        problems.append(
            f"Expected {target} to be its owner's alone (mode 600), as it holds passwords. Received: mode {mode:o}. "
            f"Run: chmod 600 {target}"
        )
    try:
        values = read_env(target)
    except ConfigError as err:
        return [*problems, str(err)]
    needed = [name for name, value in read_env(example).items() if value in (RANDOM, HASH)]
    missing = [name for name in needed if not values.get(name)]
    if missing:
        problems.append(f"Expected a value for {', '.join(missing)} in {target}. Received: none. Run: make secrets")
    placeholders = [name for name, value in values.items() if _PLACEHOLDER.search(value)]
    if placeholders:
        problems.append(
            f"Expected real values in {target}. Received: placeholders in {', '.join(placeholders)}. "
            "Delete those lines and run: make secrets"
        )
    keys = {f"CV_API_KEYS[{i}]": key.strip() for i, key in enumerate(values.get("CV_API_KEYS", "").split(",")) if key}
    pairs = [pair.partition("=")[2].strip() for pair in values.get("CV_LABELLER_KEYS", "").split(",") if pair]
    keys |= {f"CV_LABELLER_KEYS[{i}]": key for i, key in enumerate(pairs)}
    candidates = {**{name: values.get(name, "") for name in needed if name != PASSWORD_HASH}, **keys}
    weak = [n for n, value in candidates.items() if value and n not in placeholders and is_weak(value)]
    if weak:
        problems.append(
            f"Expected secrets of at least {SHORTEST_SECRET} characters that nobody guesses. Received: weak ones in "
            f"{', '.join(weak)}. Delete those lines and run: make secrets "
            "(once PostgreSQL has its volume, a role's password is changed there too, by ALTER ROLE)"
        )
    unsafe = [name for name in needed if re.search(r"[^A-Za-z0-9._~{}+/=-]", values.get(name, ""))]
    if unsafe:
        problems.append(
            f"Expected secrets of letters, digits, '.', '_', '~' and '-', as they become part of URLs. Received: other "
            f"characters in {', '.join(unsafe)}. Choose others, or delete those lines and run: make secrets"
        )
    both = values.get(PASSWORD), values.get(PASSWORD_HASH)
    if both[0] and both[1] and PASSWORD_HASH not in placeholders and not fits(both[0], both[1]):
        problems.append(
            f"Expected {PASSWORD_HASH} to be made of {PASSWORD}. Received: that of another password. "
            f"Delete the line of {PASSWORD_HASH} and run: make secrets"
        )
    return problems


def is_weak(secret: str) -> bool:
    """Returns whether a secret is short, of few characters, or made of a word that everybody tries first."""
    stripped = re.sub(r"[^a-z]", "", secret.lower())
    return len(secret) < SHORTEST_SECRET or len(set(secret)) < 6 or stripped in _WEAK


def _assigned(text: str, values: Mapping[str, str]) -> str:
    for name, value in values.items():
        line = re.compile(rf"^(?:export\s+)?{name}=.*$", re.MULTILINE)
        assignment = f"{name}={value}"
        text = line.sub(assignment, text) if line.search(text) else f"{text.rstrip()}\n{assignment}\n"
    return text
