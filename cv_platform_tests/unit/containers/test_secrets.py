"""docker/.env: made with random passwords, never overwritten, judged without being shown."""

from __future__ import annotations

import base64
import hashlib
import stat
from pathlib import Path

import pytest

from cv_platform.containers.env_file import env_problems, fits, make_secrets, read_env, ssha
from cv_platform.errors import ConfigError

EXAMPLE = """# Settings
STACK_PASSWORD=__random__
STACK_PASSWORD_HASH=__hash__
POSTGRES_PASSWORD=__random__
BIND_ADDRESS=127.0.0.1
CV_API_KEYS=
"""


@pytest.fixture
def example(tmp_path: Path) -> Path:
    path = tmp_path / ".env.example"
    path.write_text(EXAMPLE)
    return path


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / ".env"


def test_makes_every_secret_and_keeps_the_rest(example: Path, target: Path) -> None:
    made = make_secrets(example, target)
    values = read_env(target)
    assert made == ["STACK_PASSWORD", "STACK_PASSWORD_HASH", "POSTGRES_PASSWORD"]
    assert values["BIND_ADDRESS"] == "127.0.0.1"
    assert len({values["STACK_PASSWORD"], values["POSTGRES_PASSWORD"]}) == 2
    assert min(len(values["STACK_PASSWORD"]), len(values["POSTGRES_PASSWORD"])) == 32
    assert stat.S_IMODE(target.stat().st_mode) == 0o600
    assert env_problems(example, target) == []


def test_a_second_time_changes_nothing(example: Path, target: Path) -> None:
    make_secrets(example, target)
    before = target.read_text()
    assert make_secrets(example, target) == []
    assert target.read_text() == before


def test_a_new_secret_is_added_to_a_file_that_lacks_it(example: Path, target: Path) -> None:
    make_secrets(example, target)
    before = read_env(target)
    example.write_text(EXAMPLE + "GRAFANA_PASSWORD=__random__\n")
    assert make_secrets(example, target) == ["GRAFANA_PASSWORD"]
    after = read_env(target)
    assert len(after.pop("GRAFANA_PASSWORD")) == 32
    assert after == before


def test_a_copied_example_gets_its_secrets(example: Path, target: Path) -> None:
    target.write_text(EXAMPLE)
    assert len(make_secrets(example, target)) == 3
    assert env_problems(example, target) == []


def test_the_login_is_hashed_as_nginx_reads_it() -> None:
    # {SSHA} is base64 of SHA-1(password + salt) followed by the salt: RFC 2307's scheme with a salt.
    hashed = ssha("open sesame", salt=b"salt")
    content = base64.b64decode(hashed.removeprefix("{SSHA}"))
    assert content == hashlib.sha1(b"open sesamesalt").digest() + b"salt"
    assert "$" not in hashed
    assert fits("open sesame", hashed)
    assert not fits("open barley", hashed)
    assert not fits("open sesame", "{SSHA}not base64!")


def test_a_missing_file_is_one_clear_message(example: Path, target: Path) -> None:
    assert env_problems(example, target) == [
        f"Expected the stack's settings in {target}. Received: no such file. Run: make secrets"
    ]


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o604])
def test_others_may_not_read_it(example: Path, target: Path, mode: int) -> None:
    make_secrets(example, target)
    target.chmod(mode)
    (problem,) = env_problems(example, target)
    assert f"Received: mode {mode:o}" in problem
    assert f"chmod 600 {target}" in problem


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("__random__", "placeholders in POSTGRES_PASSWORD"),
        ("change-me-change-me-change-me", "placeholders in POSTGRES_PASSWORD"),
        ("postgres", "weak ones in POSTGRES_PASSWORD"),
        ("short-1234", "weak ones in POSTGRES_PASSWORD"),
        ("aaaaaaaaaaaaaaaaaaaaaaaaa", "weak ones in POSTGRES_PASSWORD"),
        ("password1234567890", "weak ones in POSTGRES_PASSWORD"),
        ("", "Expected a value for POSTGRES_PASSWORD"),
        ("long enough, with a space@host", "other characters in POSTGRES_PASSWORD"),
    ],
)
def test_refuses_secrets_that_are_none(example: Path, target: Path, value: str, expected: str) -> None:
    make_secrets(example, target)
    good = read_env(target)["POSTGRES_PASSWORD"]
    target.write_text(target.read_text().replace(good, value))
    (problem,) = env_problems(example, target)
    assert expected in problem
    assert not value or value not in problem


def test_refuses_weak_api_keys(example: Path, target: Path) -> None:
    make_secrets(example, target)
    target.write_text(target.read_text().replace("CV_API_KEYS=", "CV_API_KEYS=kP2-unguessable-Zx9q,key1"))
    (problem,) = env_problems(example, target)
    assert "CV_API_KEYS[1]" in problem
    assert "CV_API_KEYS[0]" not in problem


def test_notices_a_login_that_was_changed_without_its_hash(example: Path, target: Path) -> None:
    make_secrets(example, target)
    old = read_env(target)["STACK_PASSWORD"]
    target.write_text(target.read_text().replace(f"STACK_PASSWORD={old}", "STACK_PASSWORD=another-Long-one-4711"))
    (problem,) = env_problems(example, target)
    assert "that of another password" in problem


def test_names_lines_that_are_no_assignment_without_their_text(target: Path) -> None:
    target.write_text("A=1\nhunter2 hunter2\n# comment\n\nB=2\n= 3\n")
    with pytest.raises(ConfigError, match=r"line 2, 6") as caught:
        read_env(target)
    assert "hunter2" not in str(caught.value)


def test_quotes_are_not_part_of_a_value(target: Path) -> None:
    target.write_text("A='one two'\nexport B=\"3\"\nC=4'\n")
    assert read_env(target) == {"A": "one two", "B": "3", "C": "4'"}
