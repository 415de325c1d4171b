"""POST /v1/vision/detection as DeepStack's clients call it: a form in, their answer or their error out."""

from importlib.util import find_spec

import pytest
from tiny_detector import encoded, halves

pytestmark = [
    pytest.mark.anyio,
    pytest.mark.skipif(
        find_spec("onnxruntime") is None or find_spec("onnx") is None,
        reason="not installed (extra vision): onnxruntime",
    ),
]
ROUTE = "/v1/vision/detection"


def image(*colours) -> dict[str, bytes]:
    return {"image": encoded(halves(*colours), "JPEG")}


async def test_the_answer_is_deepstacks(connect, worker):
    async with connect(None, vision=worker) as client:
        answer = await client.post(ROUTE, files=image(), data={"api_key": "", "min_confidence": 0.45})
        assert answer.status_code == 200
        body = answer.json()
        assert set(body) == {"success", "predictions", "duration"} and body["success"] is True
        (found,) = body["predictions"]
        assert found["confidence"] > 0.9
        assert {**found, "confidence": None} == {
            "label": "red", "confidence": None, "x_min": 0, "y_min": 0, "x_max": 32, "y_max": 48,
        }  # fmt: skip
        weak = image("red", (0, 0, 110))  # blue at 0.43: above DeepStack's own threshold, below ours
        assert [p["label"] for p in (await client.post(ROUTE, files=weak)).json()["predictions"]] == ["red", "blue"]
        strict = await client.post(ROUTE, files=weak, data={"min_confidence": "0.5"})
        assert [p["label"] for p in strict.json()["predictions"]] == ["red"]


async def test_errors_are_deepstacks_too(connect, worker, make_model):
    async with connect(None, vision=worker) as client:
        for request, status, words in (
            ({"files": {"image": b"no image"}}, 400, "no image of a known format"),
            ({"files": {"picture": b"x"}}, 400, "picture"),
            ({"files": image(), "data": {"min_confidence": "high"}}, 400, "min_confidence"),
            ({"files": image(), "data": {"min_confidence": "nan"}}, 400, "from 0 to 1"),
            ({"json": {}}, 415, "multipart"),
        ):
            answer = await client.post(ROUTE, **request)
            body = answer.json()
            assert (answer.status_code, body["success"]) == (status, False)
            assert words in body["error"] or words == "min_confidence"
        assert (await client.post(ROUTE, files=image())).json()["success"], "the server lives"
    async with connect(make_model()) as client:
        assert (await client.post(ROUTE, files=image())).json()["success"] is False


async def test_the_key_may_be_a_field_of_the_form(connect, worker):
    async with connect(None, vision=worker, api_key="secret") as client:
        for data, headers, status in (
            ({}, {}, 401),
            ({"api_key": "wrong"}, {}, 401),
            ({"api_key": "secret"}, {}, 200),
            ({}, {"Authorization": "Bearer secret"}, 200),
        ):
            answer = await client.post(ROUTE, files=image(), data=data, headers=headers)
            assert (answer.status_code, answer.json()["success"]) == (status, status == 200)
