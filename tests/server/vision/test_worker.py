import os
import threading
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from tiny_detector import encoded, halves, write_tiny_detector

from server.vision.child import Job, JobAnswer, ProcessDied, VisionStopped
from server.vision.process import answer_batch
from server.vision.worker import ImageCrashed, VisionQueueFull, VisionWorker, WorkerOptions
from vision.images import ImageLimits
from vision.serving.load import load_models

pytestmark = pytest.mark.skipif(
    find_spec("onnxruntime") is None or find_spec("onnx") is None, reason="not installed (extra vision): onnxruntime"
)

PATIENCE_S = 60.0


def until(condition: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + PATIENCE_S
    while not (value := condition()):
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.005)
    return value


def job(left: str = "red", **options: Any) -> Job:
    return Job("halves", encoded(halves(left)), options)


def found(answer: JobAnswer) -> list[str]:
    return [entry["class_name"] for entry in answer.header["answer"]["detections"]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_detector(tmp_path_factory.mktemp("models") / "halves")


class ScriptedWorker(VisionWorker):
    """Everything but the process: ``exchange`` answers, blocks or dies in its stead."""

    def __init__(self, **options: Any) -> None:
        super().__init__({}, WorkerOptions(**options))
        self.go = threading.Event()
        self.go.set()
        self.batches: list[list[bytes]] = []
        self.deadly = b"deadly"
        self.starts = 0
        self.start_error: VisionStopped | None = None

    def _start_process(self) -> None:
        self.starts += 1
        if self.start_error is not None:
            raise self.start_error
        self.process = type("Alive", (), {"is_alive": lambda _: True, "end": lambda *_: 0, "kill": lambda _: 0})()
        self.models = ("scripted",)  # type: ignore[assignment]

    def _exchange(self, jobs):
        self.go.wait(PATIENCE_S)
        self.batches.append([job.data for job in jobs])
        if any(job.data == self.deadly for job in jobs):
            raise ProcessDied("killed by an image")
        return [JobAnswer({"data": job.data}, b"") for job in jobs]


@pytest.fixture
def make_worker() -> Iterator[Callable[..., ScriptedWorker]]:
    made: list[ScriptedWorker] = []

    def make(**options: Any) -> ScriptedWorker:
        made.append(ScriptedWorker(**options))
        made[-1].start()
        until(lambda: made[-1].models or made[-1].failure)
        return made[-1]

    yield make
    for worker in made:
        worker.go.set()
        worker.stop()


def jobs(*names: bytes) -> list[Job]:
    return [Job("m", name, {}) for name in names]


def test_what_waits_while_the_process_works_becomes_one_batch(make_worker) -> None:
    worker = make_worker(max_batch=3, window_s=0)
    worker.go.clear()
    futures = worker.submit(jobs(b"0"))
    until(lambda: worker.inbox.empty())
    for name in b"12345":
        futures += worker.submit(jobs(bytes([name])))
    assert worker.status().images == 6
    worker.go.set()
    assert [future.result(PATIENCE_S).header["data"] for future in futures] == [b"0", b"1", b"2", b"3", b"4", b"5"]
    assert worker.batches == [[b"0"], [b"1", b"2", b"3"], [b"4", b"5"]]
    assert worker.status().images == 0


def test_an_image_that_kills_the_process_fails_alone(make_worker) -> None:
    worker = make_worker(window_s=0.2)
    good, deadly, other = worker.submit(jobs(b"good", b"deadly", b"other"))
    assert good.result(PATIENCE_S).header["data"] == b"good"
    assert isinstance(deadly.exception(PATIENCE_S), ImageCrashed)
    assert other.result(PATIENCE_S).header["data"] == b"other"
    assert worker.batches == [[b"good", b"deadly", b"other"], [b"good"], [b"deadly"], [b"other"]]
    assert (worker.starts, worker.status().restarts, worker.alive) == (3, 2, True)


def test_when_no_new_process_comes_up_everybody_is_told(make_worker) -> None:
    worker = make_worker(window_s=0.2, retry_pause_s=PATIENCE_S)
    worker.start_error = VisionStopped("the model is gone")
    futures = worker.submit(jobs(b"good", b"deadly"))
    for future in futures:
        assert str(future.exception(PATIENCE_S)) == "the model is gone"
    assert not worker.alive
    with pytest.raises(VisionStopped, match="the model is gone"), worker.admit(1):
        pass
    assert isinstance(worker.submit(jobs(b"late"))[0].exception(PATIENCE_S), VisionStopped)
    assert worker.status().images == 0


def test_a_failed_restart_is_tried_again(make_worker) -> None:
    worker = make_worker(window_s=0, retry_pause_s=0.001)
    worker.start_error = VisionStopped("no memory just now")
    assert isinstance(worker.submit(jobs(b"deadly"))[0].exception(PATIENCE_S), VisionStopped)
    until(lambda: worker.starts >= 4)
    assert not worker.alive and worker.thread.is_alive()
    worker.start_error = None
    until(lambda: worker.alive)
    assert worker.submit(jobs(b"good"))[0].result(PATIENCE_S).header["data"] == b"good"


def test_jobs_whose_client_left_are_dropped(make_worker) -> None:
    worker = make_worker(window_s=0)
    worker.go.clear()
    (first,) = worker.submit(jobs(b"first"))
    until(lambda: worker.inbox.empty())
    left, last = worker.submit(jobs(b"left", b"last"))
    assert left.cancel()
    worker.go.set()
    assert last.result(PATIENCE_S)
    assert first.result(PATIENCE_S)
    assert [b"left"] not in worker.batches
    assert worker.status().images == 0


def test_requests_and_bytes_are_bounded_and_the_wait_is_told(make_worker) -> None:
    worker = make_worker(max_requests=2, max_bytes=100)
    worker.seconds_per_image = 7.0
    with worker.admit(60):
        with pytest.raises(VisionQueueFull) as full, worker.admit(41):
            pass
        assert full.value.retry_after_s == 7.0
        with worker.admit(40), pytest.raises(VisionQueueFull), worker.admit(0):
            pass
    with worker.admit(100):
        assert worker.status().requests == 1
    assert worker.status().requests == 0


def test_stopping_finishes_the_batch_in_hand_and_refuses_the_rest(make_worker) -> None:
    worker = make_worker(window_s=0)
    worker.go.clear()
    (running,) = worker.submit(jobs(b"running"))
    until(lambda: worker.inbox.empty())
    (waiting,) = worker.submit(jobs(b"waiting"))
    stopping = threading.Thread(target=worker.stop)
    stopping.start()
    until(lambda: worker.stopping)
    worker.go.set()
    stopping.join(PATIENCE_S)
    assert running.result(PATIENCE_S).header["data"] == b"running"
    assert isinstance(waiting.exception(PATIENCE_S), VisionStopped)
    assert not worker.alive


def test_the_real_process_is_niced_restarted_and_ended(folder: Path) -> None:
    worker = VisionWorker({"halves": folder})
    outcomes: list[Exception | None] = []
    worker.start(outcomes.append)
    until(lambda: outcomes)
    assert outcomes == [None]
    assert (worker.models[0].name, worker.models[0].licence) == ("halves", "MIT")
    assert found(worker.submit([job("blue")])[0].result(PATIENCE_S)) == ["blue"]
    assert worker.process is not None
    pid = worker.process.pid
    assert pid is not None
    assert os.getpriority(os.PRIO_PROCESS, pid) == 19
    worker.process.kill()
    until(lambda: worker.process is None or not worker.process.is_alive())
    answers = [future.result(PATIENCE_S) for future in worker.submit([job(), job("blue")])]
    assert list(map(found, answers)) == [["red"], ["blue"]]
    assert worker.status().restarts == 1
    second = worker.process.pid
    assert second != pid
    worker.stop()
    assert not Path(f"/proc/{second}").exists()


def test_a_model_that_cannot_be_loaded_is_told(tmp_path: Path) -> None:
    worker = VisionWorker({"nothing": tmp_path})
    outcomes: list[Exception | None] = []
    worker.start(outcomes.append)
    until(lambda: outcomes)
    assert "no vision model" in str(outcomes[0])
    assert not worker.alive
    worker.stop()


def test_a_model_that_is_damaged_at_the_start_is_served_once_it_is_whole(tmp_path: Path) -> None:
    folder = write_tiny_detector(tmp_path / "halves")
    config = (folder / "config.json").read_text()
    (folder / "config.json").write_text(config[: len(config) // 2])
    worker = VisionWorker({"halves": folder}, WorkerOptions(retry_pause_s=0.01))
    outcomes: list[Exception | None] = []
    worker.start(outcomes.append)
    until(lambda: outcomes)
    assert isinstance(outcomes[0], VisionStopped) and not worker.alive
    (folder / "config.json").write_text(config)
    until(lambda: worker.alive)
    assert outcomes[-1] is None
    assert found(worker.submit([job("blue")])[0].result(PATIENCE_S)) == ["blue"]
    worker.stop()


def test_a_process_that_dies_while_nobody_asks_comes_back_ever_more_slowly(make_worker) -> None:
    worker = make_worker(retry_pause_s=0.001)
    for deaths in range(1, 4):
        until(lambda: worker.process is not None)
        worker.process.is_alive = lambda: False
        until(lambda deaths=deaths: worker.restarts == deaths)
    assert worker.alive and worker.idle_deaths == 3
    assert worker._pause_s(4) == 8 * worker._pause_s(1)
    assert worker.submit(jobs(b"good"))[0].result(PATIENCE_S).header["data"] == b"good"
    assert worker.idle_deaths == 0


def test_a_batch_may_mix_models_options_and_faults(tmp_path: Path, folder: Path) -> None:
    other = write_tiny_detector(tmp_path / "other", class_names=("rot", "blau"))
    models = load_models({"halves": folder, "other": other})
    images = [encoded(halves("blue", "red")), b"", encoded(halves()), encoded(halves("blue", "red"))]
    headers = [
        {"model": "halves", "options": {"max_detections": 1}, "draw": None},
        {"model": "halves", "options": {}, "draw": None},
        {"model": "other", "options": {}, "draw": "PNG"},
        {"model": "halves", "options": {"classes": [0]}, "draw": None},
    ]
    answers = answer_batch(models, headers, images, ImageLimits())
    names = [
        [entry["class_name"] for entry in header["answer"]["detections"]] for header, _ in answers if "answer" in header
    ]
    assert names == [["blue"], ["rot"], ["red"]]
    assert answers[1][0]["error"]["code"] == "invalid_image"
    assert [bool(picture) for _, picture in answers] == [False, False, True, False]
