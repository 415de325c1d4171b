"""The route: JSON and forms, batches, every bad input with its documented answer, nothing that means nothing."""

import base64
import io
import json
from collections.abc import Iterator
from importlib.util import find_spec

import pytest
from drawn_faces import LANDMARKS, drawn_face
from lasting_worker import Lasting
from PIL import Image
from tiny_detector import encoded, write_tiny_detector
from tiny_scorer import write_tiny_scorer

from server.vision.worker import VisionWorker, WorkerOptions
from vision.images import ImageLimits

pytestmark = [
    pytest.mark.anyio,
    pytest.mark.skipif(
        find_spec("onnxruntime") is None or find_spec("onnx") is None,
        reason="not installed (extra vision): onnxruntime",
    ),
]

ROUTE = "/v1/vision/face-quality"
POINTS = LANDMARKS.tolist()
FACE_KEYS = {"box", "landmarks", "quality", "raw", "status", "inter_eye_px", "warnings", "largest", "index"}


@pytest.fixture(scope="module")
def worker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[VisionWorker]:
    folder = tmp_path_factory.mktemp("models")
    models = {
        "halves": write_tiny_detector(folder / "halves"),
        "redness": write_tiny_scorer(folder / "redness"),
    }
    lasting = Lasting(models, WorkerOptions(limits=ImageLimits(max_pixels=300_000), niceness=0))
    yield lasting
    VisionWorker.stop(lasting)


def b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


async def ask(client, image, **fields):
    data = image if isinstance(image, bytes) else encoded(image)
    return await client.post(ROUTE, json={"image": b64(data), **fields})


async def test_one_image_as_json(connect, worker):
    async with connect(None, vision=worker) as client:
        answer = (await ask(client, drawn_face(), landmarks=[POINTS], model="redness")).json()
    (face,) = answer["faces"]
    assert set(face) == FACE_KEYS
    assert (face["status"], face["landmarks"], face["largest"]) == ("ok", POINTS, True)
    assert 0 <= face["quality"] <= 100 and 0 < face["raw"] < 1
    assert answer["object"] == "vision.face_quality" and answer["model"] == "redness"
    assert answer["image"] == {"width": 360, "height": 360}
    assert {"scale", "scale_map", "alignment", "model_sha256", "count", "status", "timings"} <= answer.keys()
    assert not any("embedding" in key or "feature" in key for key in answer)


async def test_as_a_form_and_as_an_aligned_crop(connect, worker):
    crop = drawn_face().resize((112, 112))
    async with connect(None, vision=worker) as client:
        upload = [("image", ("a.png", encoded(drawn_face()), "image/png"))]
        form = (await client.post(ROUTE, files=upload, data={"landmarks": json.dumps([POINTS])})).json()
        assert form["faces"] == (await ask(client, drawn_face(), landmarks=[POINTS])).json()["faces"]
        upload = [("image", ("a.png", encoded(crop), "image/png"))]
        as_form = (await client.post(ROUTE, files=upload, data={"aligned": "true"})).json()
        assert as_form["faces"] == (await ask(client, crop, aligned=True)).json()["faces"]
        assert as_form["faces"][0]["status"] == "ok"
        bad = await client.post(ROUTE, files=upload, data={"landmarks": "not json"})
        assert (bad.status_code, bad.json()["error"]["param"]) == (400, "landmarks")
        nan = await client.post(ROUTE, files=upload, data={"landmarks": "[[[NaN, 1]]]"})
        assert nan.status_code == 400


async def test_a_batch_keeps_its_order_and_isolates_failures(connect, worker):
    images = [b64(encoded(drawn_face())), b64(b"no image"), b64(encoded(drawn_face(2)))]
    async with connect(None, vision=worker) as client:
        answer = await client.post(ROUTE, json={"images": images, "landmarks": [[POINTS], [POINTS], []]})
        first, broken, empty = answer.json()["results"]
        assert first["faces"][0]["status"] == "ok"
        assert (broken["error"]["code"], broken["error"]["param"]) == ("unsupported_image", "images.1")
        assert (empty["status"], empty["faces"]) == ("no_face", [])
        short = await client.post(ROUTE, json={"images": images, "landmarks": [[POINTS]]})
        assert (short.status_code, short.json()["error"]["param"]) == (400, "landmarks")


async def test_faces_without_a_place_are_told_so(connect, worker):
    async with connect(None, vision=worker) as client:
        missing = await ask(client, drawn_face())
        assert (missing.status_code, missing.json()["status"], missing.json()["faces"]) == (
            200,
            "landmarks_missing",
            [],
        )
        none = await ask(client, drawn_face(), landmarks=[])
        assert (none.json()["status"], none.json()["count"]) == ("no_face", 0)


@pytest.mark.parametrize(
    ("landmarks", "status"),
    [
        ([POINTS[place] for place in (1, 0, 2, 4, 3)], "failure_to_assess"),
        ([[x + 150, y] for x, y in POINTS], "failure_to_assess"),
        ((LANDMARKS * 0.1 + 100).tolist(), "too_small"),
        ([[50, 50]] * 5, "failure_to_assess"),
    ],
    ids=["mirrored", "outside", "tiny", "coinciding"],
)
async def test_faces_that_cannot_be_scored(connect, worker, landmarks, status):
    async with connect(None, vision=worker) as client:
        answer = await ask(client, drawn_face(), landmarks=[landmarks, POINTS])
        assert answer.status_code == 200
        failed = next(face for face in answer.json()["faces"] if face["index"] == 0)
        assert (failed["status"], failed["quality"], failed["raw"]) == (status, -1, None)
        assert failed["warnings"]
        assert next(face for face in answer.json()["faces"] if face["index"] == 1)["status"] == "ok"


async def test_a_crop_of_the_wrong_size(connect, worker):
    async with connect(None, vision=worker) as client:
        for size in ((100, 112), (1, 1)):
            face = (await ask(client, drawn_face().resize(size), aligned=True)).json()["faces"][0]
            assert (face["status"], face["quality"]) == ("failure_to_assess", -1)


def with_orientation(image, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(image, "JPEG", exif=exif, quality=95)


def crop_of(mode):
    return encoded(drawn_face().resize((112, 112)).convert(mode), "JPEG" if mode == "CMYK" else "PNG")


def animated():
    frames = [drawn_face(n).resize((112, 112)) for n in (1, 2)]
    return encoded(frames[0], "WEBP", save_all=True, append_images=frames[1:], lossless=True)


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "P", "CMYK"])
async def test_every_kind_of_file_is_scored_as_its_rgb_twin(connect, worker, mode):
    data = crop_of(mode)
    with Image.open(io.BytesIO(data)) as opened:
        twin = opened.convert("RGB")
    async with connect(None, vision=worker) as client:
        given, plain = [(await ask(client, image, aligned=True)).json()["faces"][0] for image in (data, twin)]
    assert given["status"] == "ok" and given["raw"] == pytest.approx(plain["raw"], abs=2e-3)


async def test_sixteen_bit_animated_and_rotated_files(connect, worker):
    grey = Image.new("I;16", (112, 112))
    grey.putdata([65535 if n % 2 else 0 for n in range(112 * 112)])
    photo = drawn_face()
    async with connect(None, vision=worker) as client:
        assert (await ask(client, encoded(grey), aligned=True)).json()["faces"][0]["raw"] == pytest.approx(
            0.5, abs=0.01
        )
        first = (await ask(client, drawn_face(1).resize((112, 112)), aligned=True)).json()["faces"][0]
        assert (await ask(client, animated(), aligned=True)).json()["faces"][0]["raw"] == pytest.approx(first["raw"])
        turned = with_orientation(photo.transpose(Image.Transpose.ROTATE_90), 6)
        upright = (await ask(client, encoded(photo, "JPEG", quality=95), landmarks=[POINTS])).json()["faces"][0]
        answer = (await ask(client, turned, landmarks=[POINTS])).json()["faces"][0]
        assert (answer["status"], answer["box"]) == ("ok", upright["box"])
        assert answer["raw"] == pytest.approx(upright["raw"], abs=0.02)


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (encoded(Image.new("1", (20_000, 20_000))), "image_too_large"),
        (encoded(drawn_face(), "JPEG")[:500], "invalid_image"),
        (b"", "invalid_image"),
        (encoded(drawn_face().resize((112, 112)), "GIF"), "unsupported_image"),
    ],
    ids=["huge", "cut short", "empty", "gif"],
)
async def test_files_that_cannot_be_decoded_are_400(connect, worker, data, code):
    async with connect(None, vision=worker) as client:
        answer = await ask(client, data, aligned=True)
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, code)


CROP = b64(encoded(drawn_face().resize((112, 112))))


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"aligned": True, "landmarks": []}, "landmarks"),
        ({"landmarks": [POINTS[:4]]}, "landmarks.0"),
        ({"landmarks": [[[1, 2, 3]] * 5]}, "landmarks.0"),
        ({"landmarks": POINTS}, "landmarks.0"),
        ({"landmarks": [[[True, 1]] * 5]}, "landmarks.0"),
        ({"landmarks": [[[1e300, 1]] * 5]}, "landmarks.0"),
        ({"landmarks": [[["1", "2"]] * 5]}, "landmarks.0"),
        ({"landmarks": [POINTS] * 65}, "landmarks"),
        ({"landmarks": 5}, "landmarks"),
        ({"aligned": "yes"}, "aligned"),
        ({"model": "halves"}, "model"),
    ],
)
async def test_bad_fields(connect, worker, fields, param):
    async with connect(None, vision=worker) as client:
        answer = await client.post(ROUTE, json={"image": CROP, **fields})
        assert answer.status_code == 400, answer.text
        assert answer.json()["error"]["param"] == param
        assert worker.status().requests == 0


async def test_nan_is_no_json(connect, worker):
    async with connect(None, vision=worker) as client:
        body = f'{{"image": "{CROP}", "landmarks": [[[NaN, 1], [2, 2], [3, 3], [4, 4], [5, 5]]]}}'
        answer = await client.post(ROUTE, content=body, headers={"content-type": "application/json"})
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_json")


async def test_detectors_and_scorers_stand_beside_each_other(connect, worker):
    async with connect(None, vision=worker) as client:
        listed = (await client.get("/v1/models")).json()["data"]
        assert {(entry["id"], entry["kind"]) for entry in listed} == {
            ("halves", "detector"),
            ("redness", "face-quality"),
        }
        wrong = await client.post("/v1/vision/detections", json={"image": CROP, "model": "redness"})
        assert (wrong.status_code, wrong.json()["error"]["param"]) == (400, "model")
        assert (await client.post("/v1/vision/detections", json={"image": CROP})).status_code == 200
        unknown = await client.post(ROUTE, json={"image": CROP, "model": "gpt-9"})
        assert (unknown.status_code, unknown.json()["error"]["code"]) == (404, "model_not_found")


async def test_pictures_on_request(connect, worker):
    async with connect(None, vision=worker) as client:
        answer = (await ask(client, drawn_face(), landmarks=[POINTS], draw=True)).json()
        assert answer["picture"].startswith("data:image/jpeg;base64,")
        picture = await client.post(
            ROUTE, json={"image": b64(encoded(drawn_face())), "landmarks": [POINTS]}, headers={"accept": "image/png"}
        )
        assert Image.open(io.BytesIO(picture.content)).size == (360, 360)


async def test_a_large_photo_is_not_shrunk_before_its_face_is_cut_out(connect, worker):
    """A decoder that takes a fraction of a large JPEG would blur a small face, and misplace its landmarks."""
    canvas = Image.new("RGB", (520, 520), (128, 128, 128))
    face = drawn_face().resize((180, 180), Image.Resampling.LANCZOS)
    canvas.paste(face, (300, 250))
    points = [[x / 2 + 300, y / 2 + 250] for x, y in POINTS]
    async with connect(None, vision=worker) as client:
        big, alone = [
            (await ask(client, encoded(image, "JPEG", quality=98, subsampling=0), landmarks=[at])).json()["faces"][0]
            for image, at in ((canvas, points), (face, [[x / 2, y / 2] for x, y in POINTS]))
        ]
    assert big["status"] == alone["status"] == "ok"
    assert big["raw"] == pytest.approx(alone["raw"], abs=0.01)


async def test_no_scorer_no_answer(connect, tmp_path):
    lasting = Lasting({"halves": write_tiny_detector(tmp_path / "halves")}, WorkerOptions(niceness=0))
    try:
        async with connect(None, vision=lasting) as client:
            answer = await client.post(ROUTE, json={"image": CROP, "aligned": True})
            assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_value")
            assert "No model was named" in answer.json()["error"]["message"]
    finally:
        VisionWorker.stop(lasting)
