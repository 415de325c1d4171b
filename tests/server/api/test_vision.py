"""POST /v1/vision/detections: bodies, options, formats, models and load."""

import asyncio
import base64
import io
import json
from importlib.util import find_spec

import httpx
import jsonschema
import pytest
from PIL import Image
from tiny_detector import DETECTIONS, as_part, ask, b64, encoded, halves

pytestmark = [
    pytest.mark.anyio,
    pytest.mark.skipif(
        find_spec("onnxruntime") is None or find_spec("onnx") is None,
        reason="not installed (extra vision): onnxruntime",
    ),
]

RED_LEFT = {"box": [0.0, 0.0, 32.0, 48.0], "score": 0.99216, "class_id": 0, "class_name": "red"}


async def test_one_image_as_json(connect, worker):
    async with connect(None, vision=worker) as client:
        answer = (await ask(client, encoded(halves()), model="halves")).json()
    assert answer["model"] == "halves"
    assert answer["image"] == {"width": 64, "height": 48}
    assert answer["detections"] == [RED_LEFT]
    assert answer["object"] == "vision.detection"
    assert set(answer["timings"]) == {"queue_ms", "decode_ms", "inference_ms"}


async def test_an_answer_that_is_not_as_described_is_found_out(connect, worker, check_described):
    async with connect(None, vision=worker) as client:
        answer = await ask(client, encoded(halves()))
    told = answer.json()
    for wrong in (told | {"detections": [RED_LEFT | {"score": 2}]}, told | {"detections": [{"box": [1, 2, 3, 4]}]}, {}):
        with pytest.raises(jsonschema.ValidationError):
            await check_described(httpx.Response(200, json=wrong, request=answer.request))
    await check_described(answer)
    assert told["detections"] == [RED_LEFT]


async def test_one_image_as_a_form_and_as_a_data_uri(connect, worker):
    async with connect(None, vision=worker) as client:
        answer = await client.post(
            DETECTIONS, files=[as_part(encoded(halves(), "JPEG"))], data={"score_threshold": "0.5"}
        )
        assert [entry["class_name"] for entry in answer.json()["detections"]] == ["red"]
        uri = f"data:image/png;base64,{b64(encoded(halves()))}"
        assert (await client.post(DETECTIONS, json={"image": uri})).json()["detections"] == [RED_LEFT]


async def test_several_images_keep_their_order_and_their_errors(connect, worker):
    images = [encoded(halves("blue")), b"no image", encoded(halves())]
    async with connect(None, vision=worker) as client:
        as_json = await client.post(DETECTIONS, json={"images": [*map(b64, images), "no base64!"]})
        as_form = await client.post(DETECTIONS, files=[as_part(data, "images") for data in images])
        single = await client.post(DETECTIONS, json={"images": [b64(images[0])]})
    assert as_json.status_code == 200
    blue, broken, red, garbage = as_json.json()["results"]
    assert (blue["detections"][0]["class_name"], red["detections"]) == ("blue", [RED_LEFT])
    assert (broken["error"]["code"], broken["error"]["param"]) == ("unsupported_image", "images.1")
    assert garbage["error"]["code"] == "invalid_image"
    assert [result.get("detections") for result in as_form.json()["results"]] == [blue["detections"], None, [RED_LEFT]]
    assert len(single.json()["results"]) == 1


async def test_threshold_maximum_and_classes(connect, worker):
    image = encoded(halves("red", (0, 0, 100)))
    async with connect(None, vision=worker) as client:

        async def classes(**fields):
            answer = await ask(client, image, **fields)
            return [entry["class_name"] for entry in answer.json()["detections"]]

        assert await classes() == ["red"]
        assert await classes(score_threshold=0.2) == ["red", "blue"]
        assert await classes(score_threshold=0.2, max_detections=1) == ["red"]
        assert await classes(score_threshold=0.2, classes=["blue"]) == ["blue"]
        assert await classes(score_threshold=0.2, classes=[1, "red"]) == ["red", "blue"]
        assert await classes(score_threshold=1) == []
        form = await client.post(
            DETECTIONS, files=[as_part(image)], data={"score_threshold": "0.2", "classes": "blue, 0"}
        )
        assert len(form.json()["detections"]) == 2


def corners(shape: str, answer) -> list[float]:
    """x1, y1, x2, y2 out of every format."""
    width, height = 64, 48
    if shape == "dovetail":
        return answer["detections"][0]["box"]
    if shape == "roboflow":
        entry = answer["predictions"][0]
        x, y, w, h = (entry[key] for key in ("x", "y", "width", "height"))
        return [x - w / 2, y - h / 2, x + w / 2, y + h / 2]
    if shape == "ultralytics":
        return [answer[0]["box"][key] for key in ("x1", "y1", "x2", "y2")]
    if shape == "huggingface":
        return [answer[0]["box"][key] for key in ("xmin", "ymin", "xmax", "ymax")]
    if shape == "coco":
        x, y, w, h = answer[0]["bbox"]
        assert answer[0]["category_id"] >= 1, "COCO counts categories from 1"
        return [x, y, x + w, y + h]
    if shape == "supervision":
        return answer["xyxy"][0]
    value = answer["result"][0]["value"]
    x, y, w, h = (value[key] / 100 for key in ("x", "y", "width", "height"))
    return [x * width, y * height, (x + w) * width, (y + h) * height]


@pytest.mark.parametrize(
    "shape", ["dovetail", "roboflow", "ultralytics", "huggingface", "coco", "supervision", "label-studio"]
)
async def test_every_format_gives_the_same_box(connect, worker, shape):
    async with connect(None, vision=worker) as client:
        answer = (await ask(client, encoded(halves()), format=shape)).json()
        assert corners(shape, answer) == pytest.approx(RED_LEFT["box"], abs=1e-3)
        assert "red" in json.dumps(answer) or shape == "coco"
        several = await client.post(DETECTIONS, json={"images": [b64(encoded(halves()))] * 2, "format": shape})
        assert corners(shape, several.json()["results"][1]) == pytest.approx(RED_LEFT["box"], abs=1e-3)


async def test_pictures_on_request(connect, worker):
    data = encoded(halves("red", "black", (200, 150)))
    async with connect(None, vision=worker) as client:
        prefix, _, picture = (await ask(client, data, draw=True)).json()["picture"].partition(",")
        assert prefix == "data:image/jpeg;base64"
        drawn = Image.open(io.BytesIO(base64.b64decode(picture)))
        assert (drawn.format, drawn.size) == ("JPEG", (200, 150))
        assert drawn.getpixel((5, 140)) != Image.open(io.BytesIO(data)).getpixel((5, 140))
        assert "picture" not in (await ask(client, data)).json()
        answer = await client.post(DETECTIONS, json={"image": b64(data)}, headers={"accept": "image/png"})
        assert answer.headers["content-type"] == "image/png"
        assert Image.open(io.BytesIO(answer.content)).size == (200, 150)
        two = await client.post(DETECTIONS, json={"images": [b64(data)] * 2}, headers={"accept": "image/png"})
        assert two.status_code == 400


IMAGE = b64(encoded(halves()))


@pytest.mark.parametrize(
    ("fields", "code", "param"),
    [
        ({}, "missing_required_parameter", "image"),
        ({"image": None}, "missing_required_parameter", "image"),
        ({"image": 5}, "invalid_type", "image"),
        ({"image": "AAA A"}, "invalid_image", "image"),
        ({"image": "AAA"}, "invalid_image", "image"),
        ({"image": "data:text/html,<b>"}, "invalid_image", "image"),
        ({"image": "\ud800"}, "invalid_unicode", "image"),
        ({"image": IMAGE, "images": [IMAGE]}, "invalid_value", "image"),
        ({"images": []}, "invalid_value", "images"),
        ({"images": [IMAGE] * 9}, "invalid_value", "images"),
        ({"image": IMAGE, "score_threshold": -0.1}, "invalid_value", "score_threshold"),
        ({"image": IMAGE, "score_threshold": "0.5"}, "invalid_type", "score_threshold"),
        ({"image": IMAGE, "max_detections": 0}, "invalid_value", "max_detections"),
        ({"image": IMAGE, "max_detections": True}, "invalid_type", "max_detections"),
        ({"image": IMAGE, "classes": ["green"]}, "invalid_value", "classes"),
        ({"image": IMAGE, "classes": ["9" * 5000]}, "invalid_value", "classes"),
        ({"image": IMAGE, "classes": [10**4000]}, "invalid_value", "classes"),
        ({"image": IMAGE, "classes": [2]}, "invalid_value", "classes"),
        ({"image": IMAGE, "classes": []}, "invalid_value", "classes"),
        ({"image": IMAGE, "format": "xml"}, "invalid_value", "format"),
        ({"image": IMAGE, "format": "coco", "draw": True}, "invalid_value", "draw"),
        ({"image": "https://example.com/a.png"}, "remote_url_not_allowed", "image"),
        ({"image": "HTTP://169.254.169.254/latest"}, "remote_url_not_allowed", "image"),
        ({"image": "file:///etc/passwd"}, "invalid_image", "image"),
    ],
)
async def test_bad_fields(connect, worker, fields, code, param):
    async with connect(None, vision=worker) as client:
        # httpx would refuse to encode a lone surrogate
        answer = await client.post(DETECTIONS, content=json.dumps(fields), headers={"content-type": "application/json"})
        assert answer.status_code == 400, answer.text
        assert (answer.json()["error"]["code"], answer.json()["error"]["param"]) == (code, param)
        assert worker.status().requests == 0


async def test_unknown_classes_are_told_the_known_ones(connect, worker):
    async with connect(None, vision=worker) as client:
        message = (await ask(client, encoded(halves()), classes=["green"])).json()["error"]["message"]
    assert "'green'" in message
    assert "red, blue" in message


@pytest.mark.parametrize(
    ("content", "kind", "status", "code"),
    [
        (b'{"image": ', "application/json", 400, "invalid_json"),
        (b"[" * 100_000, "application/json", 400, "invalid_json"),
        (b'{"image": "x", "score_threshold": NaN}', "application/json", 400, "invalid_json"),
        (b"[1]", "application/json", 400, "invalid_type"),
        (b"\xff\xfe", "application/json", 400, "invalid_json"),
        (b"x", "text/plain", 415, "unsupported_media_type"),
        (b"x", "multipart/form-data", 400, "invalid_multipart"),
        (b"x", "multipart/form-data; boundary=a", 400, "invalid_multipart"),
        (b"--a\r\nnonsense", "multipart/form-data; boundary=a", 400, "missing_required_parameter"),
        (b" " * (33 * 2**20), "application/json", 413, "request_too_large"),
    ],
)
async def test_bodies_that_are_not_what_they_should_be(connect, worker, content, kind, status, code):
    async with connect(None, vision=worker) as client:
        answer = await client.post(DETECTIONS, content=content, headers={"content-type": kind})
        assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)
        assert (await ask(client, encoded(halves()))).status_code == 200


async def test_forms_that_are_not_what_they_should_be(connect, worker):
    image = as_part(encoded(halves()))
    async with connect(None, vision=worker) as client:

        async def code(files, **data):
            answer = await client.post(DETECTIONS, files=files, data=data)
            assert answer.status_code == 400, answer.text
            return answer.json()["error"]["code"]

        assert await code([as_part(b"x", "upload")]) == "invalid_value"
        assert await code([image] * 9) == "invalid_value"
        assert await code([image] * 20) == "invalid_multipart"
        assert await code([image], score_threshold="high") == "invalid_type"
        assert await code([image], score_threshold="nan") == "invalid_value"
        assert await code([image], model=["halves", "halves"]) == "invalid_value"


@pytest.mark.parametrize("name", ["../../etc/passwd", "a\0.png", "x" * 3000, "\u2028\n.png"])
async def test_a_files_name_is_never_used(connect, worker, name):
    async with connect(None, vision=worker) as client:
        answer = await client.post(DETECTIONS, files=[("image", (name, encoded(halves()), "image/png"))])
    assert answer.json()["detections"] == [RED_LEFT]
    assert name not in answer.text


async def test_models_are_listed_with_licence_and_classes(connect, worker, make_model):
    async with connect(make_model(), vision=worker) as client:
        text, vision = (await client.get("/v1/models")).json()["data"]
        assert (text["id"], vision["id"]) == ("tiny", "halves")
        assert (vision["kind"], vision["licence"], vision["class_names"]) == ("detector", "MIT", ["red", "blue"])
        assert (await client.get("/v1/models/halves")).json() == vision
        health = (await client.get("/health")).json()
        assert (health["model"], health["vision"]["models"]) == ("tiny", ["halves"])
        completion = {"model": "tiny", "prompt": "one", "max_tokens": 2}
        assert (await client.post("/v1/completions", json=completion)).status_code == 200
        wrong = await client.post("/v1/completions", json=completion | {"model": "halves"})
        assert (wrong.status_code, wrong.json()["error"]["code"]) == (400, "invalid_value")
        image = encoded(halves())
        for name, status, code in (("tiny", 400, "invalid_value"), ("gpt-9", 404, "model_not_found")):
            answer = await ask(client, image, model=name)
            assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)
            assert "'halves'" in answer.json()["error"]["message"]


async def test_without_the_other_half(connect, worker, make_model):
    async with connect(make_model()) as client:
        answer = await ask(client, encoded(halves()))
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "model_not_found")
        assert "--vision" in answer.json()["error"]["message"]
        assert "vision" not in (await client.get("/health")).json()
    async with connect(None, vision=worker) as client:
        assert "model" not in (await client.get("/health")).json()
        assert [entry["id"] for entry in (await client.get("/v1/models")).json()["data"]] == ["halves"]
        answer = await client.post("/v1/completions", json={"model": "tiny", "prompt": "one"})
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "model_not_found")


async def test_vision_needs_the_key(connect, worker):
    async with connect(None, vision=worker, api_key="sesame") as client:
        assert (await ask(client, encoded(halves()))).status_code == 401


async def test_a_full_queue_is_429_with_a_time_and_recovers(connect, worker):
    async with connect(None, vision=worker) as client:
        with worker.admit(worker.options.max_bytes):
            answer = await ask(client, encoded(halves()))
            assert (answer.status_code, answer.json()["error"]["code"]) == (429, "queue_full")
            assert 1 <= int(answer.headers["retry-after"]) <= 120
        assert (await ask(client, encoded(halves()))).status_code == 200


async def test_many_clients_at_once_get_their_own_answers(connect, worker):
    async with connect(None, vision=worker) as client:
        colours = ["red", "blue"] * 10
        answers = await asyncio.gather(*(ask(client, encoded(halves(colour))) for colour in colours))
    assert [answer.json()["detections"][0]["class_name"] for answer in answers] == colours
    assert worker.status() == type(worker.status())(0, 0, 0)


async def test_the_same_image_twice_is_the_same_answer(connect, worker):
    async with connect(None, vision=worker) as client:
        first, second = [(await ask(client, encoded(halves("red", "blue")))).json() for _ in range(2)]
    for answer in (first, second):
        for key in ("id", "created", "timings"):
            del answer[key]
    assert first == second


async def test_kinds_of_models_do_not_mix(connect, worker, make_model):
    async with connect(make_model(), vision=worker) as client:
        entries = (await client.get("/v1/models?kind=detector")).json()["data"]
        assert [entry["id"] for entry in entries] == ["halves"]
        asked = {"model": "halves", "messages": [{"role": "user", "content": "hi"}], "prompt": "hi"}
        for path in ("/v1/chat/completions", "/v1/completions"):
            answer = await client.post(path, json=asked)
            assert (answer.status_code, answer.json()["error"]["param"]) == (400, "model")
            assert "'halves' is a vision model" in answer.json()["error"]["message"]
        answer = await client.post(DETECTIONS, json={"image": IMAGE, "surprise": 1})
        assert answer.headers["x-dovetail-ignored"] == "surprise"
