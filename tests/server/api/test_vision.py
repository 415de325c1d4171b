import asyncio
import base64
import io
import json
from collections.abc import Iterator
from importlib.util import find_spec

import pytest
from PIL import Image, ImageDraw
from tiny_detector import encoded, halves, write_tiny_detector

from server.vision_worker import VisionWorker, WorkerOptions
from vision.images import ImageLimits

pytestmark = [
    pytest.mark.anyio,
    pytest.mark.skipif(
        find_spec("onnxruntime") is None or find_spec("onnx") is None,
        reason="not installed (extra vision): onnxruntime",
    ),
]

ROUTE = "/v1/vision/detections"
MAX_PIXELS = 200_000
RED_LEFT = {"box": [0.0, 0.0, 32.0, 48.0], "score": 0.99216, "class_id": 0, "class_name": "red"}


class Lasting(VisionWorker):
    """A worker that several apps use after each other: started once, not stopped with each."""

    def start(self, on_loaded=None):
        if not self.thread.is_alive():
            super().start()
        while not self.models:
            assert self.thread.is_alive(), self.failure
        on_loaded(None)

    def stop(self):
        pass


@pytest.fixture(scope="module")
def worker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[VisionWorker]:
    folder = write_tiny_detector(tmp_path_factory.mktemp("models") / "halves")
    options = WorkerOptions(limits=ImageLimits(max_pixels=MAX_PIXELS), niceness=0)
    lasting = Lasting({"halves": folder}, options)
    yield lasting
    VisionWorker.stop(lasting)


def b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def file(data: bytes, name: str = "image"):
    return (name, ("a.png", data, "image/png"))


async def ask(client, data: bytes, **fields):
    return await client.post(ROUTE, json={"image": b64(data), **fields})


async def test_one_image_as_json(connect, worker):
    async with connect(None, vision=worker) as client:
        answer = (await ask(client, encoded(halves()), model="halves")).json()
    assert answer["model"] == "halves"
    assert answer["image"] == {"width": 64, "height": 48}
    assert answer["detections"] == [RED_LEFT]
    assert answer["object"] == "vision.detection"
    assert set(answer["timings"]) == {"queue_ms", "decode_ms", "inference_ms"}


async def test_one_image_as_a_form_and_as_a_data_uri(connect, worker):
    async with connect(None, vision=worker) as client:
        answer = await client.post(ROUTE, files=[file(encoded(halves(), "JPEG"))], data={"score_threshold": "0.5"})
        assert [entry["class_name"] for entry in answer.json()["detections"]] == ["red"]
        uri = f"data:image/png;base64,{b64(encoded(halves()))}"
        assert (await client.post(ROUTE, json={"image": uri})).json()["detections"] == [RED_LEFT]


async def test_several_images_keep_their_order_and_their_errors(connect, worker):
    images = [encoded(halves("blue")), b"no image", encoded(halves())]
    async with connect(None, vision=worker) as client:
        as_json = await client.post(ROUTE, json={"images": [*map(b64, images), "no base64!"]})
        as_form = await client.post(ROUTE, files=[file(data, "images") for data in images])
        single = await client.post(ROUTE, json={"images": [b64(images[0])]})
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
        form = await client.post(ROUTE, files=[file(image)], data={"score_threshold": "0.2", "classes": "blue, 0"})
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
        several = await client.post(ROUTE, json={"images": [b64(encoded(halves()))] * 2, "format": shape})
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
        answer = await client.post(ROUTE, json={"image": b64(data)}, headers={"accept": "image/png"})
        assert answer.headers["content-type"] == "image/png"
        assert Image.open(io.BytesIO(answer.content)).size == (200, 150)
        two = await client.post(ROUTE, json={"images": [b64(data)] * 2}, headers={"accept": "image/png"})
        assert two.status_code == 400


@pytest.mark.parametrize("orientation", range(1, 9))
async def test_a_rotated_photo_answers_like_its_upright_twin(connect, worker, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = halves("red", "blue", (64, 48))
    photo = encoded(stored, "JPEG", exif=exif, quality=95, subsampling=0)
    turns = [
        None,
        "FLIP_LEFT_RIGHT",
        "ROTATE_180",
        "FLIP_TOP_BOTTOM",
        "TRANSPOSE",
        "ROTATE_270",
        "TRANSVERSE",
        "ROTATE_90",
    ]
    turn = turns[orientation - 1]
    upright = stored if turn is None else stored.transpose(Image.Transpose[turn])
    async with connect(None, vision=worker) as client:
        given = (await ask(client, photo, score_threshold=0.1)).json()
        twin = (await ask(client, encoded(upright), score_threshold=0.1)).json()
    assert given["image"] == {"width": upright.width, "height": upright.height} == twin["image"]
    boxes = [sorted((entry["box"], entry["class_id"]) for entry in one["detections"]) for one in (given, twin)]
    assert boxes[0] == boxes[1]
    assert len(boxes[0]) >= 2


def animated(file_format: str) -> bytes:
    return encoded(halves(), file_format, save_all=True, append_images=[halves("blue")], duration=50, lossless=True)


def sixteen_bits() -> bytes:
    image = Image.new("I;16", (64, 48), 65535)
    return encoded(image)


def palette() -> bytes:
    return encoded(halves().convert("P", palette=Image.Palette.ADAPTIVE))


def transparent() -> bytes:
    image = halves().convert("RGBA")
    ImageDraw.Draw(image).rectangle((32, 0, 64, 48), fill=(0, 0, 255, 0))
    return encoded(image)


GOOD = {
    "animated PNG": (animated("PNG"), [(0, 0)]),
    "animated WebP": (animated("WEBP"), [(0, 0)]),
    "grey": (encoded(Image.new("L", (64, 48), 255)), [(0, 0), (0, 1), (1, 0), (1, 1)]),
    "one bit": (encoded(Image.new("1", (64, 48), 1)), [(0, 0), (0, 1), (1, 0), (1, 1)]),
    "grey with alpha": (encoded(Image.new("LA", (64, 48), (255, 255))), [(0, 0), (0, 1), (1, 0), (1, 1)]),
    "16 bits": (sixteen_bits(), [(0, 0), (0, 1), (1, 0), (1, 1)]),
    "palette": (palette(), [(0, 0)]),
    "CMYK": (encoded(halves().convert("CMYK"), "JPEG", quality=95), [(0, 0)]),
    "transparent blue is white": (transparent(), [(0, 0), (1, 0), (1, 1)]),
    "1x1": (encoded(Image.new("RGB", (1, 1), "red")), [(0, 0), (1, 0)]),
    "1x10000": (encoded(Image.new("RGB", (1, 10_000), "blue")), [(0, 1), (1, 1)]),
    "nothing on it": (encoded(Image.new("RGB", (64, 48))), []),
    "damaged EXIF": (encoded(halves(), "JPEG", exif=b"Exif\0\0MM\0*\0\0\xff\xff broken"), [(0, 0)]),
    "JPEG named PNG": (encoded(halves(), "JPEG"), [(0, 0)]),
}


@pytest.mark.parametrize("name", GOOD)
async def test_unusual_images_get_the_right_answer(connect, worker, name):
    data, expected = GOOD[name]
    async with connect(None, vision=worker) as client:
        answer = await client.post(ROUTE, files=[file(data)], data={"score_threshold": "0.9"})
    assert answer.status_code == 200, answer.text
    body = answer.json()
    width = body["image"]["width"]
    found = [(int(entry["box"][0] * 2 >= width), entry["class_id"]) for entry in body["detections"]]
    assert sorted(found) == expected


def bomb() -> bytes:
    """60,000 x 60,000 pixels in a few bytes of PNG header."""
    data = bytearray(encoded(Image.new("1", (8, 8))))
    data[16:24] = (60_000).to_bytes(4, "big") * 2
    data[29:33] = __import__("zlib").crc32(bytes(data[12:29])).to_bytes(4, "big")
    return bytes(data)


BAD = {
    "too many pixels": (encoded(Image.new("1", (1000, 201))), "image_too_large", "1000x201"),
    "100 megapixels": (encoded(Image.new("1", (10_000, 10_000))), "image_too_large", "pixels"),
    "bomb": (bomb(), "image_too_large", "pixels"),
    "truncated JPEG": (encoded(halves(), "JPEG")[:400], "invalid_image", "cut short"),
    "truncated PNG": (encoded(halves())[:-30], "invalid_image", "cut short"),
    "truncated WebP": (encoded(halves(), "WEBP")[:40], "invalid_image", "cut short"),
    "header only": (encoded(halves())[:20], "invalid_image", "cut short"),
    "zero bytes": (b"", "invalid_image", "empty"),
    "text": (b"hello, world", "unsupported_image", "JPEG, PNG or WEBP"),
    "SVG": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "unsupported_image", "JPEG, PNG or WEBP"),
    "GIF": (encoded(halves(), "GIF"), "unsupported_image", "JPEG, PNG or WEBP"),
    "TIFF": (encoded(halves(), "TIFF"), "unsupported_image", "JPEG, PNG or WEBP"),
}


@pytest.mark.parametrize("name", BAD)
async def test_bad_images_are_400_and_the_next_one_is_answered(connect, worker, name):
    data, code, words = BAD[name]
    async with connect(None, vision=worker) as client:
        for answer in (await client.post(ROUTE, files=[file(data)]), await ask(client, data)):
            assert answer.status_code == 400, answer.text
            error = answer.json()["error"]
            assert set(error) == {"message", "type", "param", "code"}
            assert (error["code"], error["param"]) == (code, "image")
            assert words in error["message"]
        assert (await ask(client, encoded(halves()))).json()["detections"] == [RED_LEFT]
        assert worker.status().restarts == 0


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
        ({"image": IMAGE, "classes": [2]}, "invalid_value", "classes"),
        ({"image": IMAGE, "classes": []}, "invalid_value", "classes"),
        ({"image": IMAGE, "format": "xml"}, "invalid_value", "format"),
        ({"image": IMAGE, "format": "coco", "draw": True}, "invalid_value", "draw"),
        ({"image": IMAGE, "surprise": 1}, "unknown_parameter", "surprise"),
        ({"image": "https://example.com/a.png"}, "remote_url_not_allowed", "image"),
        ({"image": "HTTP://169.254.169.254/latest"}, "remote_url_not_allowed", "image"),
        ({"image": "file:///etc/passwd"}, "invalid_image", "image"),
    ],
)
async def test_bad_fields(connect, worker, fields, code, param):
    async with connect(None, vision=worker) as client:
        # httpx would refuse to encode a lone surrogate
        answer = await client.post(ROUTE, content=json.dumps(fields), headers={"content-type": "application/json"})
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
        answer = await client.post(ROUTE, content=content, headers={"content-type": kind})
        assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)
        assert (await ask(client, encoded(halves()))).status_code == 200


async def test_forms_that_are_not_what_they_should_be(connect, worker):
    image = file(encoded(halves()))
    async with connect(None, vision=worker) as client:

        async def code(files, **data):
            answer = await client.post(ROUTE, files=files, data=data)
            assert answer.status_code == 400, answer.text
            return answer.json()["error"]["code"]

        assert await code([file(b"x", "upload")]) == "invalid_value"
        assert await code([image] * 9) == "invalid_value"
        assert await code([image] * 20) == "invalid_multipart"
        assert await code([image], score_threshold="high") == "invalid_type"
        assert await code([image], score_threshold="nan") == "invalid_value"
        assert await code([image], surprise="1") == "unknown_parameter"
        assert await code([image], model=["halves", "halves"]) == "invalid_value"


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
        assert (wrong.status_code, wrong.json()["error"]["code"]) == (404, "model_not_found")
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
