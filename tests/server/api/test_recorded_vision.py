"""Answers of the vision routes, word for word as recorded.

``recorded_vision.json`` holds status, content type and body of each request below, by its name; what differs from call
to call (ids, times) is masked. A change that means to answer otherwise changes that file by hand, and says so.
"""

import json
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import httpx
import pytest
from drawn_faces import LANDMARKS, drawn_face
from lasting_worker import Lasting
from tiny_detector import as_part, b64, encoded, halves, write_tiny_detector
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

RECORDED = json.loads(Path(__file__).with_name("recorded_vision.json").read_text(encoding="utf-8"))
DETECTIONS, FACE_QUALITY = "/v1/vision/detections", "/v1/vision/face-quality"
VARYING = {"id", "created", "queue_ms", "decode_ms", "inference_ms", "picture"}
POINTS = LANDMARKS.tolist()
RED, BOTH, FACE = b64(encoded(halves())), b64(encoded(halves("red", "blue"))), b64(encoded(drawn_face()))
CROP = b64(encoded(drawn_face().resize((112, 112))))
FORMATS = ("dovetail", "roboflow", "ultralytics", "huggingface", "coco", "supervision", "label-studio")


def detection_bodies() -> Iterator[tuple[str, dict[str, Any]]]:
    for name in FORMATS:
        yield f"format {name}", {"image": BOTH, "format": name}
        yield f"format {name}, nothing found", {"image": BOTH, "format": name, "score_threshold": 1}
        yield f"format {name}, two images", {"images": [RED, BOTH], "format": name}
    yield "drawn", {"image": BOTH, "draw": True, "model": "halves"}
    yield "drawn without a place", {"image": BOTH, "draw": True, "format": "coco"}
    yield "one class", {"image": BOTH, "classes": ["blue"]}
    yield "unknown class", {"image": BOTH, "classes": ["green"]}
    yield "threshold out of range", {"image": BOTH, "score_threshold": 2}
    yield "threshold of another type", {"image": BOTH, "score_threshold": "0.5"}
    yield "maximum out of range", {"image": BOTH, "max_detections": 1001}
    yield "unknown format", {"image": BOTH, "format": "xml"}
    yield "nothing", {}
    yield "both", {"image": RED, "images": [RED]}
    yield "nine", {"images": [RED] * 9}
    yield "damaged", {"image": b64(b"no image")}
    yield "damaged among others", {"images": [RED, b64(b"no image"), "no base64!"]}
    yield "too large", {"image": b64(encoded(halves(size=(800, 800))))}
    yield "a URL", {"image": "https://example.com/a.png"}
    yield "unknown model", {"image": RED, "model": "gpt-9"}
    yield "model of another kind", {"image": RED, "model": "redness"}
    yield "field of another route", {"image": RED, "landmarks": [POINTS]}


def face_bodies() -> Iterator[tuple[str, dict[str, Any]]]:
    tiny = (LANDMARKS * 0.1 + 100).tolist()
    yield "one face", {"image": FACE, "landmarks": [POINTS]}
    yield "two faces", {"image": FACE, "landmarks": [tiny, POINTS], "draw": True}
    yield "mirrored", {"image": FACE, "landmarks": [[POINTS[place] for place in (1, 0, 2, 4, 3)]]}
    yield "outside", {"image": FACE, "landmarks": [[[x + 150, y] for x, y in POINTS]]}
    yield "coinciding", {"image": FACE, "landmarks": [[[50, 50]] * 5]}
    yield "no landmarks", {"image": FACE}
    yield "no faces", {"image": FACE, "landmarks": []}
    yield "two images", {"images": [FACE, b64(b"no image")], "landmarks": [[POINTS], []]}
    yield "one list for two", {"images": [FACE, FACE], "landmarks": [[POINTS]]}
    yield "aligned", {"image": CROP, "aligned": True}
    yield "aligned, of another size", {"image": FACE, "aligned": True}
    yield "aligned, of one colour", {"image": b64(encoded(halves("red", "red", (112, 112)))), "aligned": True}
    yield "aligned with landmarks", {"image": CROP, "aligned": True, "landmarks": [POINTS]}
    yield "four points", {"image": FACE, "landmarks": [POINTS[:4]]}
    yield "no list", {"image": FACE, "landmarks": 5}
    yield "65 faces", {"image": FACE, "landmarks": [POINTS] * 65}
    yield "aligned of another type", {"image": CROP, "aligned": "yes"}
    yield "model of another kind", {"image": FACE, "landmarks": [POINTS], "model": "halves"}
    yield "field of another route", {"image": FACE, "landmarks": [POINTS], "score_threshold": 0.5}


FORMS: list[tuple[str, str, list[Any], dict[str, Any]]] = [
    ("classes", DETECTIONS, [as_part(encoded(halves("red", "blue")))], {"classes": "blue, 0", "score_threshold": "0"}),
    ("field sent twice", DETECTIONS, [as_part(encoded(halves()))], {"model": ["halves", "halves"]}),
    ("no number", DETECTIONS, [as_part(encoded(halves()))], {"score_threshold": "high"}),
    ("two files", DETECTIONS, [as_part(encoded(halves()), "images")] * 2, {}),
    ("landmarks", FACE_QUALITY, [as_part(encoded(drawn_face()))], {"landmarks": json.dumps([POINTS])}),
    ("landmarks that are no JSON", FACE_QUALITY, [as_part(encoded(drawn_face()))], {"landmarks": "[["}),
]  # fmt: skip


async def ask_all(client: httpx.AsyncClient) -> dict[str, Any]:
    """Every request's answer by its name."""
    answers = {}
    for route, bodies in ((DETECTIONS, detection_bodies()), (FACE_QUALITY, face_bodies())):
        for name, body in bodies:
            answers[f"{route}: {name}"] = record(await client.post(route, json=body))
        answers[f"{route}: not JSON"] = record(await client.post(route, content=b"[" * 9))
        text = {"content-type": "text/plain"}
        answers[f"{route}: no JSON's type"] = record(await client.post(route, content=b"x", headers=text))
        asked = {"image": FACE} | ({"landmarks": [POINTS]} if route == FACE_QUALITY else {})
        for kind in ("image/png", "image/jpeg"):
            answers[f"{route}: {kind}"] = record(await client.post(route, json=asked, headers={"accept": kind}))
    for name, route, files, data in FORMS:
        answers[f"{route}: form, {name}"] = record(await client.post(route, files=files, data=data))
    for path in ("/v1/models", "/v1/models?kind=detector", "/v1/models/redness", "/health"):
        answers[path] = record(await client.get(path))
    return answers


def record(answer: httpx.Response) -> dict[str, Any]:
    """Status, content type, body."""
    kind = answer.headers["content-type"]
    body = masked(answer.json()) if kind == "application/json" else f"a picture, {answer.content[:4]!r}"
    return {"status": answer.status_code, "type": kind, "body": body}


def masked(value: Any) -> Any:
    """The same without what differs from call to call."""
    if isinstance(value, dict):
        return {key: type(inner).__name__ if key in VARYING else masked(inner) for key, inner in value.items()}
    return [masked(inner) for inner in value] if isinstance(value, list) else value


@pytest.fixture(scope="module")
def worker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[VisionWorker]:
    folder = tmp_path_factory.mktemp("models")
    models = {"halves": write_tiny_detector(folder / "halves"), "redness": write_tiny_scorer(folder / "redness")}
    lasting = Lasting(models, WorkerOptions(limits=ImageLimits(max_pixels=300_000), niceness=0))
    yield lasting
    VisionWorker.stop(lasting)


async def test_everything_that_answered_before_answers_the_same(
    connect: Callable[..., Any], worker: VisionWorker
) -> None:
    async with connect(None, vision=worker) as client:
        answers = await ask_all(client)
    assert answers.keys() == RECORDED.keys()
    for name, recorded in RECORDED.items():
        # As text: the order of keys is part of an answer.
        assert json.dumps(answers[name]) == json.dumps(recorded), name
