import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from tiny_detector import write_tiny_detector
from typer.testing import CliRunner

from server.bench import vision
from server.bench.vision import VisionBenchOptions, measure_endpoint, measure_text, sample_picture
from server.cli import app
from vision.images import decode_image

needs_onnx = pytest.mark.skipif(
    find_spec("onnxruntime") is None or find_spec("onnx") is None, reason="not installed (extra vision): onnxruntime"
)


class Answers(BaseHTTPRequestHandler):
    """A server that takes 20 ms for an image and refuses every third; its text is slower while images come."""

    def do_GET(self) -> None:
        self.answer(200, {"data": [{"id": "tiny"}]})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        server: Any = self.server
        if self.path == vision.DETECTION_ROUTE:
            server.images += 1
            decode_image(body[body.index(b"\xff\xd8") : body.rindex(b"\xff\xd9") + 2])
            time.sleep(0.02)
            return self.answer(429 if server.images % 3 == 0 else 200, {})
        assert json.loads(body)["model"] == "tiny"
        before = server.images
        time.sleep(0.15)
        self.answer(200, {"timings": {"tokens_per_s": 90.0 if server.images > before else 100.0}})

    def answer(self, status: int, content: dict[str, Any]) -> None:
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def port() -> Iterator[int]:
    server: Any = ThreadingHTTPServer(("127.0.0.1", 0), Answers)
    server.images = 0
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server.server_address[1]
    server.shutdown()
    thread.join()
    server.server_close()


def test_the_endpoints_figures_count_answers_and_refusals(port: int) -> None:
    found = measure_endpoint(port, sample_picture(), 2, seconds=0.4)
    assert found["failures"] > 0 and found["images_per_s"] > found["failures"]
    assert 20 <= found["p50_ms"] <= found["max_ms"]


def test_the_loss_of_text_is_that_beside_images(port: int, tmp_path: Path) -> None:
    found = measure_text(port, sample_picture(), VisionBenchOptions(tmp_path, repeats=1))
    assert (found["alone_tokens_per_s"], found["beside_tokens_per_s"], found["loss"]) == (100.0, 90.0, 0.1)
    assert found["images_meanwhile"] > 0


@needs_onnx
def test_a_detector_is_timed_and_weighed_alone(tmp_path: Path) -> None:
    folder = write_tiny_detector(tmp_path / "halves")
    found = vision.measure_single_thread(VisionBenchOptions(folder, repeats=1, peer=False), sample_picture())
    assert (found["model"], found["runtime"], found["image_size"]) == ("halves", "onnxruntime", 32)
    assert found["decode_and_resize_ms"] > 0 and found["ms_per_image"] > 0 and "peer" not in found
    memory = vision.measure_peak_memory(folder, sample_picture())
    assert memory is None or 10 < memory["before_loading"] <= memory["peak"] < 400, "torch alone would take 500"


def test_the_command_writes_report_and_plot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report = {
        "single_thread": {"model": "mine", "runtime": "torch", "image_size": 320, "ms_per_image": 20.0,
                          "peer": {"name": "peer", "ms_per_image": 30.0}},
        "peak_memory_mb": {"before_loading": 50.0, "peak": 90.0},
        "endpoint": {"1": {"images_per_s": 30.0, "p50_ms": 33.0}, "4": {"images_per_s": 31.0, "p50_ms": 120.0}},
        "text": {"alone_tokens_per_s": 100.0, "beside_tokens_per_s": 95.0, "loss": 0.05, "vision_clients": 4},
    }  # fmt: skip
    asked: list[VisionBenchOptions] = []
    monkeypatch.setattr(vision, "measure_vision", lambda options, _: asked.append(options) or dict(report))
    file = tmp_path / "vision.json"
    given = ["bench", "vision", "--model", str(tmp_path), "--clients", "1,4", "--json", str(file)]
    result = CliRunner().invoke(app, given)
    assert result.exit_code == 0, result.output
    assert asked[0].clients == (1, 4) and asked[0].detector == tmp_path
    assert json.loads(file.read_text()) == report == json.loads(result.stdout.splitlines()[-1])
    assert file.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    del report["text"]
    assert CliRunner().invoke(app, given).exit_code == 0, "without text there is nothing to draw of it"
