"""Configs and settings: what is accepted, what is refused, and how the refusal reads."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from dagster._core.definitions.utils import is_valid_owner

from cv_platform.config import (
    ExperimentConfig,
    LabelsConfig,
    config_files,
    json_schema,
    load_beside_others,
    load_experiment,
    load_experiments,
    parse_experiment,
)
from cv_platform.errors import ConfigError
from cv_platform.settings import Settings

REPOSITORY = Path(__file__).parents[2]
MINIMAL: dict[str, Any] = {
    "name": "cats",
    "model": {"model_name": "cats_v1", "classes": ["cat", "dog"], "input_size": {"h": 32, "w": 48}},
    "dataset": {"ds_name": "cats", "dvc_tag": "v1.0.0"},
}


def experiment(**changes: object) -> ExperimentConfig:
    return parse_experiment({**MINIMAL, **changes}, origin="test")


def test_image_size_is_height_then_width() -> None:
    assert experiment().model.image_size == (32, 48)


@pytest.mark.parametrize(
    ("bits", "mistake"),
    [
        (8, "model.sample_bits: Input should be greater than or equal to 9. Received: '8'"),
        (17, "model.sample_bits: Input should be less than or equal to 16. Received: '17'"),
        ("twelve", "model.sample_bits: Input should be a valid integer"),
    ],
)
def test_bits_of_samples_are_9_to_16(bits: object, mistake: str) -> None:
    with pytest.raises(ConfigError) as caught:
        experiment(model={**MINIMAL["model"], "sample_bits": bits})
    assert mistake in str(caught.value)


def test_16_bits_are_what_there_is_without_the_field() -> None:
    given, none = (experiment(model={**MINIMAL["model"], "sample_bits": bits}) for bits in (16, None))
    assert given == none == experiment()
    assert experiment(model={**MINIMAL["model"], "sample_bits": 12}).model.sample_bits == 12


def test_every_mistake_is_reported_at_once_with_its_path() -> None:
    content = {**MINIMAL, "train": {"epochs": "many", "epoch": 3}, "validate": {"nope": 1}, "modle": {}}
    with pytest.raises(ConfigError) as caught:
        parse_experiment(content, origin="cats.yaml")
    message = str(caught.value)
    assert message.startswith("cats.yaml: 4 mistake(s)")
    assert "train.epochs: Input should be a valid integer" in message
    assert "'many'" in message
    assert "train.epoch: unknown key. Expected one of: epochs, batch_size" in message
    assert "validate.nope: unknown key" in message
    assert "modle: unknown key. Expected one of: name, description" in message


@pytest.mark.parametrize(
    ("train", "mistake"),
    [
        (
            {"workers": 2, "batch_size": 33},
            "train.batch_size: expected a multiple of train.workers, which share each batch. Received: 33 for 2. "
            "Correct one of them.",
        ),
        (
            {"workers": 2, "devices": "all"},
            "train.devices: expected one, as each of the 2 train.workers computes on one. Received: all. Take one of "
            "the two.",
        ),
    ],
)
def test_fields_that_contradict_each_other_are_told_without_the_whole_file(train: dict[str, Any], mistake: str) -> None:
    with pytest.raises(ConfigError) as caught:
        experiment(train=train)
    assert str(caught.value).splitlines()[1:] == [f"  (top level): {mistake}"]


@pytest.mark.parametrize("name", ["Cats", "cats-v1", "cats.v1", "1cats", ""])
def test_names_that_dagster_cannot_carry_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="name: String should match pattern"):
        experiment(name=name)


@pytest.mark.parametrize("model_name", ["../x", "a/b", "A", "a.b", ""])
def test_model_names_are_never_paths(model_name: str) -> None:
    with pytest.raises(ConfigError, match=r"model\.model_name"):
        experiment(model={**MINIMAL["model"], "model_name": model_name})


def test_repeated_classes_are_named() -> None:
    with pytest.raises(ConfigError, match="Received twice: cat"):
        experiment(model={**MINIMAL["model"], "classes": ["cat", "dog", "cat"]})


def written(tmp_path: Path, classes: str, tag: str) -> ExperimentConfig:
    path = tmp_path / "cats.yaml"
    path.write_text(
        f"name: cats\nmodel: {{model_name: cats, classes: {classes}, input_size: {{h: 32, w: 48}}}}\n"
        f"dataset: {{ds_name: cats, dvc_tag: {tag}}}\n"
    )
    return load_experiment(path)


def test_whole_numbers_are_names_as_they_were_written(tmp_path: Path) -> None:
    config = written(tmp_path, "[0, 1, 10]", "2024")
    assert config.model.classes == ("0", "1", "10")
    assert config.dataset.dvc_tag == "2024"


@pytest.mark.parametrize(
    ("scalar", "received"),
    [
        ("1.10", "1.1, which YAML takes for a decimal number"),
        ("yes", "True, which YAML takes for a truth value"),
        ("2024-01-31", "2024-01-31, which YAML takes for a date"),
        ("010", "010, which YAML takes for another number"),
        ("1_000", "1_000, which YAML takes for another number"),
        ("~", "None, which YAML takes for nothing"),
    ],
)
def test_what_yaml_does_not_keep_as_it_was_written_is_to_be_quoted(tmp_path: Path, scalar: str, received: str) -> None:
    with pytest.raises(ConfigError) as caught:
        written(tmp_path, f"[cat, {scalar}]", scalar)
    for place in ("model.classes.1", "dataset.dvc_tag"):
        assert f"{place}: expected text. Received: {received}" in str(caught.value)
    assert "Put it in quotes" in str(caught.value)
    assert written(tmp_path, f'[cat, "{scalar}"]', '"v1"').model.classes == ("cat", scalar)


def test_a_number_in_an_odd_notation_is_still_a_number_where_one_is_wanted(tmp_path: Path) -> None:
    path = tmp_path / "cats.yaml"
    path.write_text(yaml.safe_dump(MINIMAL) + "train: {batch_size: 0x10}\n")
    assert load_experiment(path).train.batch_size == 16


def test_class_names_have_one_form_of_their_accents() -> None:
    assert experiment(model={**MINIMAL["model"], "classes": ["cafe\u0301", "dog"]}).model.classes[0] == "caf\u00e9"
    with pytest.raises(ConfigError, match="Received twice: caf\u00e9"):
        experiment(model={**MINIMAL["model"], "classes": ["cafe\u0301", "caf\u00e9"]})


def test_a_window_without_its_zone_is_refused() -> None:
    with pytest.raises(ConfigError, match="with its zone"):
        experiment(monitor={"window_start_utc": "2026-01-31T06:00:00"})


def test_a_cron_that_says_nothing_is_refused_and_a_period_is_from_report_to_report() -> None:
    with pytest.raises(ConfigError, match=r"monitor\.schedule_cron: expected five fields .* \"weekly\": it has 1"):
        experiment(monitor={"schedule_cron": "weekly"})
    assert experiment().monitor.period == timedelta(days=7)
    assert experiment(monitor={"schedule_cron": "@daily", "window_days": 30}).monitor.period == timedelta(days=1)


@pytest.mark.parametrize("owner", ["the-team", "team:", "a@b", "a@b.museums1", ".a@b.de", "a@b.technology", ""])
def test_an_owner_that_dagster_does_not_know_is_refused(owner: str) -> None:
    with pytest.raises(ConfigError, match=r"owners: expected e-mail addresses .* or team:NAME\. Received: "):
        experiment(owners=["team:yard", owner])
    assert not is_valid_owner(owner)


@pytest.mark.parametrize("owner", ["team:computer vision", "first.last+cv@lab.example.org", "A_1@B.DE"])
def test_owners_are_addresses_and_teams(owner: str) -> None:
    assert experiment(owners=[owner]).owners == (owner,)
    assert is_valid_owner(owner)


def test_a_dumped_experiment_is_read_back_as_itself() -> None:
    original = experiment(validate={"duplicates": "error"})
    assert parse_experiment(original.model_dump(mode="json"), origin="dump") == original
    assert "validate" in original.model_dump()


def test_fingerprint_follows_only_the_named_sections() -> None:
    one, two = experiment(), experiment(train={"epochs": 99})
    assert one.fingerprint("model") == two.fingerprint("model")
    assert one.fingerprint("train") != two.fingerprint("train")
    assert one.fingerprint() != two.fingerprint()
    three = experiment(validate={"max_duplicate_fraction": 0.5})
    assert one.fingerprint("validate") != three.fingerprint("validate")
    with pytest.raises(KeyError, match="trian"):
        one.fingerprint("trian")


@pytest.mark.parametrize(
    "content",
    ["[1, 2]", "a: [", "\x00", "just text", "name: 2024-13-45", pytest.param("name: " + 5000 * "9", id="digits")],
)
def test_a_file_that_is_no_experiment_is_refused_by_name(tmp_path: Path, content: str) -> None:
    path = tmp_path / "broken.yaml"
    path.write_text(content)
    with pytest.raises(ConfigError, match=r"broken\.yaml"):
        load_experiment(path)


def test_a_yaml_that_is_not_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "binary.yaml"
    path.write_bytes(b"\xff\xfe\x00name")
    with pytest.raises(ConfigError, match=r"binary\.yaml: expected a readable YAML"):
        load_experiment(path)


def test_config_files_are_the_folders_own_yamls_only(tmp_path: Path) -> None:
    for name in ("b.yaml", "a.yml", "notes.md", "schema.json", "._b.yaml", ".pre-commit-config.yaml"):
        (tmp_path / name).touch()
    (tmp_path / "examples").mkdir()
    (tmp_path / "examples" / "c.yaml").touch()
    assert [path.name for path in config_files(tmp_path)] == ["a.yml", "b.yaml"]
    assert config_files(tmp_path / "b.yaml") == [tmp_path / "b.yaml"]
    with pytest.raises(ConfigError, match="does not exist"):
        config_files(tmp_path / "missing")


def test_a_folder_or_a_missing_file_is_answered_with_the_files_that_are_there(tmp_path: Path) -> None:
    (tmp_path / "cats.yaml").touch()
    (tmp_path / "bare").mkdir()
    near = rf"Name one of the YAML files in {tmp_path}: cats\.yaml\."
    with pytest.raises(ConfigError, match=f"Received: a folder. {near}"):
        load_experiment(tmp_path)
    with pytest.raises(ConfigError, match=f"Received: nothing there. {near}"):
        load_experiment(tmp_path / "dogs.yaml")
    with pytest.raises(ConfigError, match="configs/examples has some to copy"):
        load_experiment(tmp_path / "bare")
    with pytest.raises(ConfigError, match="nor is there a folder"):
        load_experiment(tmp_path / "gone" / "dogs.yaml")
    with pytest.raises(ConfigError, match="Received: nothing there"):
        load_experiment(tmp_path / "cats.yaml" / "dogs.yaml")


@pytest.mark.parametrize("content", ["", "# nothing but a comment\n"])
def test_an_empty_file_is_told_what_to_start_from(tmp_path: Path, content: str) -> None:
    path = tmp_path / "empty.yaml"
    path.write_text(content)
    with pytest.raises(ConfigError, match=r"Received: an empty file\. Start from a copy of configs/examples/photos"):
        load_experiment(path)
    assert (REPOSITORY / "configs/examples/photos.yaml").is_file()


def write_experiment(
    file: Path, name: str, *, model_name: str | None = None, service: str | None = None, **deploy: str
) -> Path:
    """Writes an experiment whose model and service are its own, unless they are given."""
    content: dict[str, object] = {
        **MINIMAL,
        "name": name,
        "model": {**MINIMAL["model"], "model_name": model_name or f"{name.lower()}_model"},
        "deploy": {"service": service or name.lower(), **deploy},
    }
    file.write_text(yaml.safe_dump(content))
    return file


def test_files_of_one_name_give_no_experiment_and_the_others_do(tmp_path: Path) -> None:
    files = [tmp_path / name for name in ("a.yaml", "b.yaml", "c.yaml", "d.yaml")]
    for n, (file, name) in enumerate(zip(files, ("cats", "dogs", "cats", "Dogs"), strict=True)):
        write_experiment(file, name, model_name=f"model_{n}", service=f"service_{n}")
    experiments, broken = load_experiments(files)
    assert {path.name: one.name for path, one in experiments.items()} == {"b.yaml": "dogs"}
    assert (
        broken[files[0]]
        == broken[files[2]]
        == (f"{files[0]} and {files[2]}: expected one experiment with name: cats. Received: 2. Rename all but one.")
    )
    assert "name: String should match pattern" in broken[files[3]]


def test_a_copied_yaml_whose_name_alone_was_changed_is_refused_with_both_files_named(tmp_path: Path) -> None:
    """Field case 37: model and service were the copy's, too, and each run took the other's place."""
    one, two, other = (tmp_path / name for name in ("cats.yaml", "copy.yaml", "other.yaml"))
    one.write_text(yaml.safe_dump(MINIMAL))
    two.write_text(yaml.safe_dump({**MINIMAL, "name": "cats_again"}))
    write_experiment(other, "dogs")
    experiments, broken = load_experiments([one, two, other])
    assert list(experiments) == [other]
    assert broken[one] == broken[two]
    model, service = broken[one].splitlines()
    assert model.startswith(f"{one} and {two}: expected one experiment with model.model_name: cats_v1. Received: 2.")
    assert service.startswith(f"{one} and {two}: expected one experiment with deploy.service: image_classifier.")
    assert "deploy.takes_over" in service
    for path in (one, two):
        with pytest.raises(ConfigError) as refused:
            load_beside_others(path)
        assert str(refused.value) == broken[one]
    assert load_beside_others(other).name == "dogs"
    two.write_text("[broken")  # A neighbour that cannot be loaded claims nothing.
    assert load_beside_others(one).name == "cats"


@pytest.mark.parametrize(
    ("first", "second", "is_settled"),
    [
        ({}, {}, False),
        ({}, {"takes_over": "cats"}, True),
        ({"takes_over": "dogs"}, {}, True),
        ({"takes_over": "dogs"}, {"takes_over": "cats"}, False),
        ({}, {"takes_over": "owls"}, False),
    ],
)
def test_of_two_experiments_on_one_service_one_takes_the_others_place(
    tmp_path: Path, first: dict[str, str], second: dict[str, str], is_settled: bool
) -> None:
    files = [
        write_experiment(tmp_path / f"{name}.yaml", name, service="shared", **deploy)
        for name, deploy in (("cats", first), ("dogs", second))
    ]
    experiments, broken = load_experiments(files)
    assert (len(experiments), len(broken)) == ((2, 0) if is_settled else (0, 2))


def shipped_configs() -> list[Path]:
    return sorted([*(REPOSITORY / "configs").glob("*.yaml"), *(REPOSITORY / "configs" / "examples").glob("*.yaml")])


@pytest.mark.parametrize("path", shipped_configs(), ids=lambda path: path.stem)
def test_shipped_configs_load_and_satisfy_the_schema(path: Path) -> None:
    content = yaml.safe_load(path.read_text())
    jsonschema.validate(content, json_schema())
    assert load_experiment(path).name == content["name"]


@pytest.mark.parametrize(
    "path", [path for path in shipped_configs() if path.parent.name == "examples"], ids=lambda path: path.stem
)
def test_an_example_opens_with_its_commands(path: Path) -> None:
    experiment = load_experiment(path)
    header = [line for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("#")]
    assert experiment.name == path.stem
    assert any(f"make run CONFIG=configs/examples/{path.name}" in line for line in header)
    assert any(f"--name {experiment.dataset.ds_name} --tag {experiment.dataset.dvc_tag}" in line for line in header)


def test_animals10_keeps_the_originals_experiment() -> None:
    experiment = load_experiment(REPOSITORY / "configs" / "examples" / "animals10.yaml")
    assert experiment.model.model_name == "animals10_classifier"
    assert len(experiment.model.classes) == 10
    assert experiment.model.image_size == (50, 50)
    assert experiment.model.drift_detection.uae_encoding_dims == 128
    assert experiment.model.drift_detection.reference_data_n_sample == 5000
    assert (experiment.dataset.ds_name, experiment.dataset.dvc_tag) == ("animals10", "v2.0.0")


def test_schema_file_is_the_generated_schema() -> None:
    written = json.loads((REPOSITORY / "configs" / "schema.json").read_text())
    assert written == json_schema(), "Run `make schema`."


def test_settings_default_below_cv_home(tmp_path: Path) -> None:
    settings = Settings.from_environment({"CV_HOME": str(tmp_path)})
    assert settings.storage_url == str(tmp_path / "storage")
    assert settings.mlflow_tracking_uri == f"sqlite:///{tmp_path}/mlflow/mlflow.db"
    assert settings.database_url is None
    assert settings.api_keys == ()


@pytest.mark.parametrize(
    ("variables", "public", "pages"),
    [
        ({}, None, "http://127.0.0.1:5050"),
        ({"CV_MLFLOW_PORT": "6060"}, None, "http://127.0.0.1:6060"),
        (
            {"MLFLOW_TRACKING_URI": "https://me:s3cr3t@mlflow.example.org:8443/base"},
            "https://mlflow.example.org:8443/base",
            "https://mlflow.example.org:8443/base",
        ),
        (
            {"MLFLOW_TRACKING_URI": "http://mlflow:5050", "MLFLOW_PUBLIC_URL": "https://vision.example.org:5050"},
            "https://vision.example.org:5050",
            "https://vision.example.org:5050",
        ),
        ({"MLFLOW_TRACKING_URI": "postgresql://u:p@db/mlflow"}, None, "http://127.0.0.1:5050"),
    ],
)
def test_links_to_mlflow_lead_where_people_open_it(variables: dict[str, str], public: str | None, pages: str) -> None:
    settings = Settings.from_environment(variables)
    assert settings.mlflow_public_url == public
    assert settings.mlflow_pages == pages


def test_the_public_address_of_mlflow_is_a_web_address() -> None:
    with pytest.raises(ConfigError, match="MLFLOW_PUBLIC_URL"):
        Settings.from_environment({"MLFLOW_PUBLIC_URL": "vision.example.org:5050"})


@pytest.mark.parametrize("typed_in", ["photos", "photos/cats"])
def test_home_and_configs_lie_in_the_checkout_wherever_a_command_is_typed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, typed_in: str
) -> None:
    (tmp_path / typed_in).mkdir(parents=True)
    monkeypatch.chdir(tmp_path / typed_in)
    settings = Settings.from_environment({})
    assert settings.home == REPOSITORY / ".cv_platform"
    assert settings.configs == REPOSITORY / "configs"
    assert settings.mlflow_tracking_uri == f"sqlite:///{REPOSITORY}/.cv_platform/mlflow/mlflow.db"


def test_a_relative_home_is_one_of_the_folder_where_it_is_typed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    settings = Settings.from_environment({"CV_HOME": "mine", "CV_CONFIGS": "my_configs"})
    assert (settings.home, settings.configs) == (tmp_path / "mine", tmp_path / "my_configs")
    assert settings.dagster_home == tmp_path / "mine" / "dagster"


def test_without_a_checkout_they_lie_where_a_command_is_typed(tmp_path: Path) -> None:
    """As in a Bento, or a wheel in site-packages."""
    shutil.copytree(
        REPOSITORY / "cv_platform", tmp_path / "lib" / "cv_platform", ignore=shutil.ignore_patterns("__pycache__")
    )
    (tmp_path / "here").mkdir()
    code = "from cv_platform.settings import Settings; print(Settings.from_environment({}).home)"
    printed = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path / "here",
        env={**os.environ, "PYTHONPATH": str(tmp_path / "lib")},
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    ).stdout
    assert printed == f"{tmp_path}/here/.cv_platform\n"


def test_an_image_knows_its_revision_and_an_empty_one_is_none() -> None:
    assert Settings.from_environment({"CV_REVISION": "b40259d"}).revision == "b40259d"
    assert Settings.from_environment({"CV_REVISION": ""}).revision is None


@pytest.mark.parametrize("proxy", ["nonsense", "10.0.0.1/8"])
def test_a_proxy_that_is_no_network_is_named(proxy: str) -> None:
    with pytest.raises(ConfigError, match=rf"CV_TRUSTED_PROXIES: Expected addresses .*{proxy}"):
        Settings.from_environment({"CV_TRUSTED_PROXIES": f"172.16.0.0/12,{proxy}"})


def test_shares_of_the_queue_that_are_too_many_are_listed() -> None:
    with pytest.raises(
        ValueError, match=r"at most 1 together .* received 1\.1: random_share 0\.8, .*disagreeing_share 0\.05"
    ):
        LabelsConfig(random_share=0.8)


def test_settings_name_each_wrong_variable() -> None:
    with pytest.raises(ConfigError) as caught:
        Settings.from_environment({"CV_SERVICE_PORT": "http", "CV_SERVICE_WORKERS": "0"})
    assert "CV_SERVICE_PORT" in str(caught.value)
    assert "CV_SERVICE_WORKERS" in str(caught.value)


def test_the_archive_of_a_spool_is_another_folder(tmp_path: Path) -> None:
    for archive in (tmp_path / "spool", f"{tmp_path}/spool/"):
        with pytest.raises(ConfigError, match="CV_SPOOL_ARCHIVE: Expected another folder than"):
            Settings.from_environment({"CV_HOME": str(tmp_path), "CV_SPOOL_ARCHIVE": str(archive)})
    settings = Settings.from_environment({"CV_HOME": str(tmp_path), "CV_SPOOL_ARCHIVE": str(tmp_path / "archive")})
    assert settings.spool_archive == tmp_path / "archive"


@pytest.mark.parametrize("url", ["s4://bucket/prefix", "S3//://x", "://bucket", "simplecache::s4://bucket"])
def test_a_storage_of_no_known_scheme_is_refused(url: str) -> None:
    with pytest.raises(ConfigError, match="CV_STORAGE: Expected a folder, or a URL of a known scheme") as caught:
        Settings.from_environment({"CV_STORAGE": url})
    assert f"Received: {url!r}" in str(caught.value)


@pytest.mark.parametrize(
    "url", ["s3://bucket/prefix", "/data/storage", "storage", "file:///data", "gs://b", "simplecache::s3://bucket"]
)
def test_folders_and_known_schemes_are_storage(url: str) -> None:
    assert Settings.from_environment({"CV_STORAGE": url}).storage_url == url


def test_the_example_of_a_database_url_is_refused_as_the_placeholder_that_it_is() -> None:
    example = (REPOSITORY / ".env.example").read_text()
    url = next(line.split("=", 1)[1].split()[0] for line in example.splitlines() if "DATABASE_URL=" in line)
    with pytest.raises(ConfigError, match="DATABASE_URL"):
        Settings.from_environment({"DATABASE_URL": url})


@pytest.mark.parametrize("variable", ["CV_ADMIN_TOKEN", "CV_API_KEYS", "DATABASE_URL"])
def test_placeholder_secrets_are_refused(variable: str) -> None:
    with pytest.raises(ConfigError, match=variable):
        Settings.from_environment({variable: "changeme"})


def test_secrets_do_not_show_in_a_printed_settings() -> None:
    settings = Settings.from_environment({"CV_ADMIN_TOKEN": "s3cr3t-token", "CV_API_KEYS": "key-1,key-2"})
    assert "s3cr3t-token" not in repr(settings)
    assert "key-1" not in repr(settings)
    assert [key.get_secret_value() for key in settings.api_keys] == ["key-1", "key-2"]
