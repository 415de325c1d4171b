"""Large bodies and slow hosts: neither the event loop nor the threads of text wait for them, and their bytes count."""

import json
import threading
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
from tiny_detector import DETECTIONS, as_part, b64, encoded, halves

from server.vision import routes, upload
from server.vision.urls import MAX_REMOTE_BYTES
from server.vision.worker import READER_NAME

pytestmark = [
    pytest.mark.anyio,
    pytest.mark.skipif(
        find_spec("onnxruntime") is None or find_spec("onnx") is None,
        reason="not installed (extra vision): onnxruntime",
    ),
]
URL = "https://images.example/a.png"
LARGE = encoded(halves(size=(160, 120)), compress_level=0)  # 58 kB


async def test_bodies_are_parsed_and_decoded_in_threads_of_their_own(connect, worker, monkeypatch):
    threads = []
    text_source, loads = upload.text_source, json.loads
    monkeypatch.setattr(
        upload, "text_source", lambda t: threads.append(threading.current_thread().name) or text_source(t)
    )
    async with connect(None, vision=worker) as client:
        parsed = threading.local()
        watched = SimpleNamespace(loads=lambda *a, **k: setattr(parsed, "here", True) or loads(*a, **k))
        monkeypatch.setattr(upload, "json", watched)  # the reader's own: answers are parsed in this thread too
        assert (await client.post(DETECTIONS, json={"image": b64(LARGE)})).status_code == 200
        assert not hasattr(parsed, "here"), "the event loop's thread parsed it"
        form = {"image": (None, b64(LARGE))}
        assert (await client.post(DETECTIONS, files=form)).status_code == 200
        assert (await client.post(DETECTIONS, files=[as_part(LARGE)])).status_code == 200
    assert len(threads) == 2 and all(name.startswith(READER_NAME) for name in threads)


async def test_what_is_read_sooner_than_a_thread_is_asked_asks_none(connect, worker, monkeypatch):
    asked, aside = [], worker.aside

    async def counted(work, *arguments):
        asked.append(arguments)
        return await aside(work, *arguments)

    monkeypatch.setattr(worker, "aside", counted)
    small = b64(encoded(halves()))
    async with connect(None, vision=worker) as client:
        assert (await client.post(DETECTIONS, files=[as_part(LARGE)])).status_code == 200
        assert (await client.post(DETECTIONS, files={"image": (None, small)})).status_code == 200
        assert (await client.post(DETECTIONS, json={"image": small})).status_code == 200
        assert asked == []
        assert (await client.post(DETECTIONS, files={"image": (None, b64(LARGE))})).status_code == 200
    assert asked == [(b64(LARGE),)]


async def test_what_is_fetched_counts_and_is_fetched_in_threads_of_vision(connect, worker, monkeypatch):
    seen = []

    def fetch(url, hosts):
        seen.append((threading.current_thread().name, worker.num_bytes))
        return encoded(halves())

    monkeypatch.setattr(routes, "fetch_image", fetch)
    async with connect(None, vision=worker, vision_url_hosts=["images.example"]) as client:
        answer = await client.post(DETECTIONS, json={"images": [URL, URL]})
        assert [len(result["detections"]) for result in answer.json()["results"]] == [1, 1]
        assert all(name.startswith(READER_NAME) and held >= 2 * MAX_REMOTE_BYTES for name, held in seen)
        with worker.admit(worker.options.max_bytes - MAX_REMOTE_BYTES):
            full = await client.post(DETECTIONS, json={"image": URL})
            assert (full.status_code, full.json()["error"]["code"]) == (429, "queue_full")
    assert worker.num_bytes == 0
