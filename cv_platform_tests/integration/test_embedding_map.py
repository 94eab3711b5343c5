"""The map of a dataset in a real browser: what it shows where one points, and that it loads nothing."""

from __future__ import annotations

import re
from pathlib import Path

import cv2
import numpy as np
import pytest
from playwright.sync_api import Browser, expect

from cv_platform.config import DatasetConfig, EncoderConfig, ModelConfig
from cv_platform.datasets.embeddings import embed_dataset
from cv_platform.datasets.importing import import_dataset
from cv_platform.datasets.versions import checkout_version
from cv_platform.validation.embedding_map import project, write_embedding_map
from cv_platform_tests.support.page_fixtures import browser

__all__ = ["browser"]

pytestmark = [pytest.mark.xdist_group("page"), pytest.mark.timeout(180)]
COLOURS = {"<i>red</i>".replace("/", "∕"): (40, 40, 220), "blue": (220, 60, 40)}


def test_what_looks_alike_lies_together() -> None:
    generator = np.random.default_rng(0)
    vectors = np.concatenate([generator.normal(8 * np.eye(6)[k], 1.0, (40, 6)) for k in range(2)]).astype(np.float32)
    places = project(vectors)
    assert (places.shape, float(places.min()), float(places.max())) == ((80, 2), pytest.approx(0.0), pytest.approx(1.0))
    distances = np.linalg.norm(places[:, None] - places[None], axis=2) + 9 * np.eye(80)
    assert (distances.argmin(axis=1) // 40 == np.arange(80) // 40).mean() >= 0.95


def test_pointing_at_an_image_shows_it_with_its_class_and_split(browser: Browser, tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    for name, colour in COLOURS.items():
        for at in range(12):
            (tmp_path / "source" / name).mkdir(parents=True, exist_ok=True)
            picture = np.clip(np.array(colour) + generator.integers(-40, 40, (24, 24, 3)), 0, 255).astype(np.uint8)
            cv2.imwrite(str(tmp_path / "source" / name / f"{at}.png"), picture)
    home = tmp_path / "home"
    import_dataset(tmp_path / "source", ds_name="balls", tag="v1", ds_root=home / "datasets")
    model = ModelConfig.model_validate({"model_name": "m", "classes": [*COLOURS], "input_size": {"h": 8, "w": 8}})
    version = checkout_version(DatasetConfig(ds_name="balls", dvc_tag="v1"), model, home=home)
    embeddings = embed_dataset(version, EncoderConfig(input_px=32), home=home)
    assert write_embedding_map(version, embeddings, tmp_path / "map.html") == 24
    page = browser.new_page()
    complaints: list[str] = []
    page.on("console", lambda message: complaints.append(message.text))
    page.on("request", lambda request: complaints.append(request.url) if request.url.startswith("http") else None)
    page.goto((tmp_path / "map.html").as_uri())
    expect(page.locator("#legend li")).to_have_count(2)
    x, y = page.evaluate("place(points[0])")
    page.locator("#canvas").hover(position={"x": x, "y": y})
    expect(page.locator("#words")).to_have_text(re.compile(r"· (train|valid|test|reference) · no remark · images/"))
    assert page.locator("#picture").evaluate("(image) => image.decode().then(() => image.naturalWidth)") == 24
    page.locator("#by").select_option("split")
    expect(page.locator("#legend")).to_contain_text("reference")
    page.locator("#by").select_option("status")
    expect(page.locator("#legend")).to_have_text("no remark (24)")
    path = page.evaluate("points[0].file")
    with page.expect_popup() as opened:
        page.locator("#canvas").click(position={"x": x, "y": y})
    opened.value.wait_for_load_state()
    assert opened.value.url == path
    assert opened.value.locator("img").evaluate("(image) => image.naturalWidth") == 24
    assert complaints == []
    opened.value.close()
    page.close()
