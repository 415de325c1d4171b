"""What /openapi.json and /docs say is true: every field told, every status that occurs, and no other host."""

import os
import subprocess
import sys

import pytest

from server.app import create_app

STATUSES = {400, 401, 403, 404, 408, 413, 415, 429, 431, 500, 503}
CHECKS = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"


@pytest.fixture
def description(make_settings):
    return create_app(make_settings(), None).openapi()


def fields(schema):
    """Every field of a schema and of those inside it, with its path."""
    for name, field in schema.get("properties", {}).items():
        yield name, field
        yield from fields(field)


def test_every_field_says_what_it_is_and_every_number_its_range(description):
    schemas = dict(description["components"]["schemas"])
    for path, operations in description["paths"].items():
        for operation in operations.values():
            for kind, content in operation.get("requestBody", {}).get("content", {}).items():
                schemas[f"{path} {kind}"] = content["schema"]
    assert len(schemas) > 20
    found = [(name, *each) for name, schema in schemas.items() for each in fields(schema)]
    assert [(name, field) for name, field, what in found if not what.get("description")] == []
    numbers = [
        (name, field, part)
        for name, field, what in found
        for part in what.get("anyOf", [what])
        if part.get("type") in ("integer", "number")
    ]
    assert len(numbers) > 30
    bounded = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")
    assert [number[:2] for number in numbers if not any(bound in number[2] for bound in bounded)] == []


def test_every_status_is_told(description):
    assert "422" not in str(description["paths"])
    for path, operations in description["paths"].items():
        for method, operation in operations.items():
            told = {int(status) for status in operation["responses"]}
            assert 200 in told
            assert told >= (STATUSES if method == "post" else {403, 413, 415, 429, 431, 500}), path


@pytest.mark.anyio
async def test_the_page_of_it_needs_nobody_else(connect, make_model, description):
    async with connect(make_model()) as client:
        answer = await client.get("/docs")
    assert answer.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in answer.headers["content-security-policy"]
    for told in [*description["paths"], "max_completion_tokens", "integer, from 0, to 20", "The body is too large."]:
        assert told in answer.text
    assert "<script" not in answer.text
    assert "://" not in answer.text


@pytest.mark.parametrize(
    "effort",
    [
        ["--phases", "fuzzing", "--max-examples", "5", "--generation-deterministic"],
        pytest.param(
            ["--phases", "examples,coverage,fuzzing", "--max-examples", "60", "--generation-database", "none"],
            marks=pytest.mark.slow,
        ),
    ],
    ids=["short", "long"],
)
def test_no_request_made_from_it_finds_a_fault(listen, make_model, tmp_path, effort):
    pytest.importorskip("schemathesis", reason="pip install schemathesis (extra dev)")
    with listen(make_model(text="x", context=2000)) as (url, server):
        run = subprocess.run(
            [sys.executable, "-m", "schemathesis.cli", "run", f"{url}/openapi.json", "--checks", CHECKS, *effort,
             "--continue-on-failure", "--no-color", "--request-timeout", "60", "--warnings", "off"],
            cwd=tmp_path, env=dict(os.environ) | {"PYTHONPATH": os.pathsep.join(sys.path)}, capture_output=True,
            text=True, check=False,
        )  # fmt: skip
        assert run.returncode == 0, run.stdout + run.stderr
        assert not server.app.state.serving.dispatcher.queues
    assert "0 failed" not in run.stdout
