"""What /openapi.json says of itself; that the service's answers are so is the contract test's part."""

from collections.abc import Iterator
from typing import Any

import jsonschema
import pytest

from cv_platform_tests.support.http_client import Client


@pytest.fixture
def document(client: Client) -> dict[str, Any]:
    return client.get("/openapi.json").json()


def answers(document: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    for path, verbs in document["paths"].items():
        for verb, route in verbs.items():
            for status, answer in route["responses"].items():
                yield f"{verb.upper()} {path}", status, answer


def test_every_answer_of_every_route_has_a_shape(document: dict[str, Any]):
    for route, status, answer in answers(document):
        shape = answer["content"]["application/json"]["schema"]
        name = shape["$ref"].removeprefix("#/components/schemas/")
        assert document["components"]["schemas"][name]["properties"], (route, status)


def test_every_route_has_an_example_of_its_answer_and_every_example_has_its_shape(document: dict[str, Any]):
    examples = 0
    for route, status, answer in answers(document):
        content = answer["content"]["application/json"]
        if status == "200":
            assert "example" in content, route
        if "example" in content:
            examples += 1
            schema = {**content["schema"], "components": document["components"]}
            jsonschema.Draft202012Validator(schema).validate(content["example"])
    assert examples > 50


def test_every_route_documents_what_any_request_may_get(document: dict[str, Any]):
    for path, verbs in document["paths"].items():
        for verb, route in verbs.items():
            assert {"200", "400", "421"} <= set(route["responses"]), (verb, path)
            if verb != "get":
                assert {"401", "403", "408", "413", "429"} <= set(route["responses"]), (verb, path)


def test_answers_that_name_a_time_to_come_again_say_so(document: dict[str, Any]):
    for route, status, answer in answers(document):
        if status == "429":
            assert "Retry-After" in answer["headers"], route


def test_the_schemas_are_schemas(document: dict[str, Any]):
    assert document["openapi"].startswith("3.1")
    for schema in document["components"]["schemas"].values():
        jsonschema.Draft202012Validator.check_schema(schema)
