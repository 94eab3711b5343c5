import re
from pathlib import Path

import httpx
import pytest

from cv_platform.errors import ConfigError
from cv_platform.serving.app import create_app
from cv_platform.serving.routes.page import PAGE, TEMPLATES
from cv_platform.serving.routes.parts import WorkerParts
from cv_platform.settings import Settings
from cv_platform_tests.support.app_fixtures import ADMIN_TOKEN, MakeWorker
from cv_platform_tests.support.http_client import Client, FixedModels, brightness_model, flat_image, png

FILES = sorted(path.name for path in PAGE.iterdir())
PAGES = {"index": "/", "labelling": "/labelling", "docs": "/docs"}


@pytest.mark.parametrize("path", PAGES.values())
def test_serves_its_pages_under_a_policy_without_exceptions(client: Client, path: str):
    response = client.get(path)
    assert response.status_code == 200
    assert response.headers["content-type"].startswith("text/html")
    policy = response.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert response.headers["x-content-type-options"] == "nosniff"
    assert response.headers["x-frame-options"] == "DENY"
    assert response.headers["referrer-policy"] == "no-referrer"


@pytest.mark.parametrize("name", FILES)
def test_serves_every_file_of_the_page_with_its_type(client: Client, name: str):
    response = client.get(f"/page/{name}")
    assert response.status_code == 200
    expected = {".css": "text/css", ".js": "javascript", ".svg": "image/svg+xml"}
    assert expected[Path(name).suffix] in response.headers["content-type"]
    assert response.headers["x-content-type-options"] == "nosniff"
    assert response.headers["cache-control"] == "no-cache"


@pytest.mark.parametrize("path", [*FILES, *TEMPLATES.iterdir()], ids=str)
def test_the_page_loads_nothing_from_elsewhere_and_has_no_inline_code(path: str | Path):
    path = PAGE / path
    text = path.read_text(encoding="utf-8")
    addresses = set(re.findall(r"(?:https?:)?//[\w.-]+\.\w+", text)) - {"http://www.w3.org"}
    assert addresses == set()
    if path.suffix == ".html":
        assert re.findall(r"<script(?![^>]*src=)", text) == []
        assert re.findall(r"<style|\sstyle=|\son\w+=", text) == []
        for asset in re.findall(r'(?:src|href)="page/([^"]+)"', text):
            assert asset in FILES
    if path.suffix == ".js":
        assert "innerHTML" not in text
        for module in re.findall(r"from '\./([^']+)'", text):
            assert module in FILES


def test_every_element_that_a_script_looks_up_is_in_its_page(client: Client):
    for name in FILES:
        if name.endswith(".js"):
            page = client.get(PAGES.get(name.removesuffix(".js"), "/")).text
            wanted = set(re.findall(r"\$\('([\w-]+)'\)", (PAGE / name).read_text()))
            assert wanted - set(re.findall(r'\bid="([\w-]+)"', page)) == set(), name


def test_other_sites_get_no_permission(client: Client):
    response = client.get("/health_check", headers={"Origin": "http://evil.example"})
    assert not [name for name in response.headers if name.startswith("access-control")]
    preflight = client.request(
        "OPTIONS", "/predict", headers={"Origin": "http://evil.example", "Access-Control-Request-Method": "POST"}
    )
    assert preflight.status_code == 405


FRONT_END = "https://app.example.org"


@pytest.fixture
def shared(make_worker: MakeWorker) -> Client:
    worker = make_worker(
        CV_CORS_ORIGINS=f"{FRONT_END}, http://localhost:3000", CV_API_KEYS="key", CV_ALLOWED_HOSTS="service"
    )
    return Client(create_app(worker))


def preflight(client: Client, origin: str, **headers: str) -> httpx.Response:
    """Asks as a browser does before it lets a page send an image with its key."""
    asked = {
        "Origin": origin,
        "Sec-Fetch-Site": "cross-site",
        "Sec-Fetch-Mode": "cors",
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "content-type,idempotency-key,x-api-key",
        **{name.replace("_", "-"): value for name, value in headers.items()},
    }
    return client.request("OPTIONS", "/predict", headers=asked)


def test_pages_of_a_named_origin_may_call_and_read(shared: Client):
    for origin in (FRONT_END, "http://localhost:3000"):
        allowed = preflight(shared, origin)
        assert allowed.status_code == 200
        assert allowed.headers["access-control-allow-origin"] == origin
        assert "POST" in allowed.headers["access-control-allow-methods"]
        assert "x-api-key" in allowed.headers["access-control-allow-headers"].lower()
        assert "access-control-allow-credentials" not in allowed.headers
        sent = {"Origin": origin, "Sec-Fetch-Site": "cross-site"}
        for headers, status in (({**sent, "X-API-Key": "key"}, 200), (sent, 401)):
            answer = shared.predict(png(flat_image(1, 2, 3)), headers=headers)
            assert answer.status_code == status
            assert answer.headers["access-control-allow-origin"] == origin
            assert "Origin" in answer.headers["vary"]
            assert {"X-Request-Id", "Retry-After"} <= set(answer.headers["access-control-expose-headers"].split(", "))


@pytest.mark.parametrize(
    ("origin", "headers"),
    [
        ("https://app.example.org.evil.example", {}),
        ("http://app.example.org", {}),
        (f"{FRONT_END}:8443", {}),
        ("null", {}),
        (FRONT_END, {"Access_Control_Request_Method": "DELETE"}),
        (FRONT_END, {"Access_Control_Request_Headers": "authorization"}),
    ],
)
def test_other_preflights_are_refused(shared: Client, origin: str, headers: dict[str, str]):
    refused = preflight(shared, origin, **headers)
    assert refused.status_code == 400
    if origin != FRONT_END:
        assert "access-control-allow-origin" not in refused.headers
        sent = {"Origin": origin, "Sec-Fetch-Site": "cross-site", "X-API-Key": "key"}
        answer = shared.predict(png(flat_image(1, 2, 3)), headers=sent)
        assert answer.status_code == 403
        assert "access-control-allow-origin" not in answer.headers


def test_another_host_is_refused_before_any_origin_is_looked_at(shared: Client):
    assert preflight(shared, FRONT_END, Host="evil.example").status_code == 421


@pytest.mark.parametrize("origins", ["*", "app.example.org", f"{FRONT_END}/", "ftp://a", f"{FRONT_END},null"])
def test_only_exact_origins_can_be_named(origins: str):
    with pytest.raises(ConfigError, match="CV_CORS_ORIGINS"):
        Settings.from_environment({"CV_CORS_ORIGINS": origins})


def test_the_openapi_description_names_every_route_with_its_answers(client: Client):
    spec = client.get("/openapi.json").json()
    routes = {(verb.upper(), path) for path, verbs in spec["paths"].items() for verb in verbs}
    assert routes == {
        ("POST", "/predict"),
        ("POST", "/predict/batch"),
        ("POST", "/feedback"),
        ("POST", "/feedback/{prediction_id}"),
        ("GET", "/predictions/{prediction_id}"),
        ("GET", "/predictions/{prediction_id}/passport"),
        ("DELETE", "/predictions/{prediction_id}"),
        ("PUT", "/update_model/{metadata_file}"),
        ("POST", "/rollback"),
        ("GET", "/models/current"),
        ("GET", "/health_check"),
    }
    predict = spec["paths"]["/predict"]["post"]
    form = predict["requestBody"]["content"]["multipart/form-data"]["schema"]
    assert form["required"] == ["file"]
    refusals = {"400", "401", "403", "408", "413", "415", "421", "422", "429", "503", "504"}
    assert set(predict["responses"]) == {"200", *refusals}
    assert {"adminToken", "apiKey"} == set(spec["components"]["securitySchemes"])
    assert spec["paths"]["/rollback"]["post"]["security"] == [{"adminToken": []}]


def test_the_documented_example_of_a_prediction_has_the_real_fields(client: Client):
    example = client.get("/openapi.json").json()["paths"]["/predict"]["post"]["responses"]["200"]
    body = client.predict(png(flat_image(1, 2, 3))).json()
    # FastAPI leaves out what is null.
    assert set(example["content"]["application/json"]["example"]) == {k for k, v in body.items() if v is not None}


def test_health_is_ready_with_a_model_even_without_a_database(client: Client, worker: WorkerParts):
    client.predict(png(flat_image(1, 2, 3)))
    response = client.get("/health_check")
    assert response.status_code == 200
    body = response.json()
    model = worker.models.current()
    assert model is not None
    assert body["status"] == "ready"
    assert (body["model_name"], body["model_version"]) == ("tiny", model.metadata.version)
    assert body["spool"]["entries"] == 1
    assert body["spool"]["oldest_seconds"] >= 0
    assert body["database"]["state"] == "not configured"
    assert "wait in the spool" in body["message"]


def test_health_is_not_ready_without_a_model(make_worker: MakeWorker):
    worker = make_worker(models=FixedModels(model=None))
    response = Client(create_app(worker)).get("/health_check")
    assert response.status_code == 503
    assert response.headers["retry-after"]
    assert response.json()["message"].startswith("No model is deployed yet.")


def test_health_tells_of_a_version_that_was_not_taken_up(make_worker: MakeWorker):
    worker = make_worker(models=FixedModels(last_swap_error="tiny 2026: a checksum does not hold"))
    response = Client(create_app(worker)).get("/health_check")
    assert response.status_code == 200
    assert "was not taken up: model refused" in response.json()["message"]
    assert "a checksum does not hold" not in response.text
    admin = {"Authorization": f"Bearer {ADMIN_TOKEN}"}
    assert "a checksum does not hold" in Client(create_app(worker)).get("/health_check", headers=admin).text


def test_a_worker_that_has_stopped_is_not_ready_and_predictions_are_a_503(make_worker: MakeWorker):
    worker = make_worker()
    make_worker.stop(worker)
    client = Client(create_app(worker))
    assert client.get("/health_check").status_code == 503
    assert client.predict(png(flat_image(1, 2, 3))).status_code == 503


@pytest.mark.parametrize("path", ["/livez", "/healthz"])
def test_a_worker_without_a_model_is_alive(make_worker: MakeWorker, path: str):
    client = Client(create_app(make_worker(models=FixedModels(None))))
    assert (client.get(path).status_code, client.get(path).text) == (200, "\n")


def test_a_worker_is_ready_once_it_has_a_model(make_worker: MakeWorker):
    models = FixedModels(None)
    client = Client(create_app(make_worker(models=models)))
    response = client.get("/readyz")
    assert (response.status_code, response.json()["message"]) == (503, "No model is deployed yet.")
    assert int(response.headers["retry-after"]) > 0
    models.model = brightness_model()
    assert client.get("/readyz").status_code == client.request("HEAD", "/readyz").status_code == 200
