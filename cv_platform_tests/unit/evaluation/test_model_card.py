from __future__ import annotations

from pathlib import Path

from cv_platform.evaluation.model_card import HTML, MARKDOWN, write_model_card
from cv_platform.records import Robustness, Slice
from cv_platform_tests.support.record_samples import VERSION, evaluation, trained_model

ROWS = [
    {"class": "cat", "precision": 0.9, "recall": 0.95, "f1": 0.92, "auc": 0.99, "support": 40.0, "intervals": {}},
    {"class": "<owl>", "precision": None, "recall": 0.5, "f1": 0.6, "auc": 0.9, "support": 20.0, "intervals": {}},
]


def _cards(folder: Path, licence: str, *, known: float | None = None, **changes) -> tuple[str, str]:
    config = {
        "name": "animals",
        "description": "Animals of the <north> yard",
        "owners": ["team:yard"],
        "train": {"epochs": 3, "init_lr": 0.01, "augment": {"sometimes": 0.5}},
        "model": {"architecture": "resnet9s"},
    }
    judged = evaluation(
        folder,
        metrics={"accuracy": 0.8, "images": 60.0, "ece": 0.02, "ece_uncalibrated": 0.09}
        | ({} if known is None else {"known_label_share": known}),
        intervals={"accuracy": (0.68, 0.88)},
        per_class=ROWS,
        parameters=1234,
        keras_bytes=56_700,
        **changes,
    )
    write_model_card(
        folder, trained_model(folder, effective_config=config, git_commit="c" * 40), judged, licence=licence
    )
    return (folder / MARKDOWN).read_text(), (folder / HTML).read_text()


def test_says_what_it_is_made_of_how_well_it_does_and_where_not(tmp_path: Path):
    part = Slice(column="camera", value="old", images=12, accuracy=0.5, low=0.2, high=0.7, p_value=0.004, is_worse=True)
    row = Robustness(corruption="blur", strength="strong", images=60, accuracy=0.4, low=0.3, high=0.5)
    markdown, html = _cards(tmp_path, "CC BY 4.0", slices=(part,), robustness=(row,))
    for card in (markdown, html):
        for fact in (VERSION, "v1.0.0", "CC BY 4.0", "resnet9s", "c" * 40, "0.8000", "0.6800 – 0.8800", "team:yard"):
            assert fact in card
        assert "1,234 parameters, a Keras file of 0.1 MB" in card
        assert "camera old: accuracy 0.5000" in card
        assert "blur" in card
        assert "0.0900" in card
    assert "| init_lr | 0.01 |" in markdown
    assert "augment" not in markdown
    # The class that is found least comes first, and only HTML escapes.
    assert markdown.index("| <owl> |") < markdown.index("| cat |")
    assert "&lt;owl&gt;" in html
    assert "the <north> yard" in markdown
    assert "the &lt;north&gt; yard" in html


def test_what_nobody_has_said_is_named_as_missing(tmp_path: Path):
    for card in _cards(tmp_path, ""):
        assert "not stated: set deploy.data_licence in the config" in card
        assert "0 parts of the test split" in card


def test_says_of_how_many_labels_the_numbers_are(tmp_path: Path):
    for card in _cards(tmp_path, "CC BY 4.0", known=0.7):
        assert "70.0% of whose labels are known: all numbers are of these" in card
    assert "of whose labels are known" not in "".join(_cards(tmp_path, "CC BY 4.0"))
