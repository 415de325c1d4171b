import asyncio
import logging
import threading

import pytest

from server.vision.worker import VisionWorker

pytestmark = pytest.mark.anyio

COMPLETION = {"model": "tiny", "prompt": "one", "max_tokens": 20, "temperature": 0}


def forever(request):
    while True:
        yield (70,)


async def test_while_loading_the_server_answers(connect, make_model):
    model, go = make_model(), threading.Event()

    def load(settings, report):
        assert settings.model_name == "tiny"
        report("reading the weights")
        go.wait(5)
        return model

    async with connect(load, ready=False) as client:
        answer = await client.post("/v1/completions", json=COMPLETION)
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "model_loading")
        assert 1 <= int(answer.headers["retry-after"]) <= 120
        health = await client.get("/health")
        assert (health.status_code, health.json()["status"]) == (503, "model_loading")
        assert health.json()["loading"]["stage"] == "reading the weights"
        assert health.json()["loading"]["elapsed_s"] >= 0
        models = (await client.get("/v1/models")).json()
        assert [entry["id"] for entry in models["data"]] == ["tiny"]
        go.set()
        while (await client.get("/health")).status_code != 200:
            await asyncio.sleep(0.01)
        assert (await client.get("/v1/models/tiny")).json()["max_model_len"] == 200
        assert (await client.post("/v1/completions", json=COMPLETION)).status_code == 200
        health = (await client.get("/health")).json()
        assert health["free_slots"] == 4
        assert health["drafting"] == {"state": "failed", "reason": "the device is gone"}
        assert set((await client.get("/version")).json()) == {"version"}


@pytest.mark.parametrize("error", [ValueError("weights.safetensors is cut short"), RuntimeError("odd")])
async def test_a_model_that_cannot_be_loaded_is_told(connect, caplog, error):
    def load(settings, report):
        raise error

    async with connect(load, ready=False) as client:
        while "model_loading" in (answer := await client.get("/health")).text:
            await asyncio.sleep(0.01)
        assert (answer.status_code, answer.json()["status"]) == (503, "model_failed")
        assert str(error) in answer.json()["error"]["message"]
    record = next(record for record in caplog.records if record.levelno == logging.ERROR)
    assert bool(record.exc_info) == isinstance(error, RuntimeError)


async def test_a_full_queue_is_429_and_recovers(connect, make_model):
    model = make_model(max_waiting=2, slots=1)
    model.engine.turn.clear()
    async with connect(model) as client:
        pending = [asyncio.ensure_future(client.post("/v1/completions", json=COMPLETION)) for _ in range(2)]
        while len(model.engine.submitted) < 2:
            await asyncio.sleep(0.01)
        answer = await client.post("/v1/completions", json=COMPLETION | {"n": 2})
        assert (answer.status_code, answer.json()["error"]["code"]) == (429, "queue_full")
        assert answer.headers["retry-after"] == "4"
        model.engine.turn.set()
        assert [(await task).status_code for task in pending] == [200, 200]
        assert (await client.post("/v1/completions", json=COMPLETION)).status_code == 200


async def test_when_some_choices_do_not_fit_the_others_are_taken_back(connect, make_model, caplog):
    caplog.set_level(logging.INFO)
    model = make_model(max_waiting=2, slots=1)
    model.engine.turn.clear()
    async with connect(model) as client:
        answer = await client.post("/v1/completions", json=COMPLETION | {"n": 3})
        assert answer.status_code == 429
        assert caplog.text.count("cancelled after 0 output tokens") == 3
        model.engine.turn.set()
        while len(model.engine.cancelled) < 2:
            await asyncio.sleep(0.01)
        assert model.engine.status().free_slots == 1
        assert not client.app.state.serving.dispatcher.queues


async def test_a_failing_request_is_500_without_details(connect, make_model, caplog):
    async with connect(make_model(script=lambda request: [(70,), None])) as client:
        answer = await client.post("/v1/completions", json=COMPLETION)
    assert (answer.status_code, answer.json()["error"]["code"]) == (500, "internal_error")
    assert "secret" not in answer.text
    assert "secret detail" in caplog.text


async def test_a_failure_after_the_first_event_is_an_event(connect, make_model, read_events):
    async with connect(make_model(script=lambda request: [(70,), None])) as client:
        answer = await client.post("/v1/completions", json=COMPLETION | {"stream": True})
        first, last = read_events(answer.text)
        assert answer.status_code == 200
        assert first["choices"][0]["text"]
        assert last["error"]["code"] == "internal_error"
        assert "[DONE]" not in answer.text


async def test_a_fault_of_ours_is_500_with_the_request_id(connect, make_model, caplog):
    model = make_model()
    model.engine.submit = lambda request: 1 / 0
    async with connect(model) as client:
        answer = await client.post("/v1/completions", json=COMPLETION, headers={"x-request-id": "mine-1"})
        assert (answer.status_code, answer.headers["x-request-id"]) == (500, "mine-1")
        assert "mine-1" in answer.json()["error"]["message"]
        assert "ZeroDivisionError" in caplog.text
        assert not client.app.state.serving.dispatcher.queues


async def test_a_dead_engine_is_503(connect, make_model):
    model = make_model()
    async with connect(model) as client:
        model.engine.stop()
        for answer in (await client.post("/v1/completions", json=COMPLETION), await client.get("/health")):
            assert (answer.status_code, answer.json()["error"]["code"]) == (503, "engine_dead")


async def test_an_engine_that_is_stuck_is_told_until_it_comes_back(connect, make_model, read_events, caplog):
    model = make_model(script=forever, round_s=0.05)
    async with connect(model, keepalive_s=0.05, watchdog_s=3) as client:
        watchdog = client.app.state.serving.watchdog
        stream = asyncio.ensure_future(client.post("/v1/completions", json=COMPLETION | {"stream": True}))
        while model.engine.status().running < 1:
            await asyncio.sleep(0.01)
        model.engine.turn.clear()
        for step in (7, 7, None, 8, 8, 8):
            watchdog.look(step, 1)
            assert not watchdog.is_stuck
        watchdog.look(8, 1)
        assert watchdog.is_stuck and "test_serving.py" in caplog.text
        for answer in (await client.post("/v1/completions", json=COMPLETION), await client.get("/health")):
            assert (answer.status_code, answer.json()["error"]["code"]) == (503, "engine_stuck")
        assert read_events((await stream).text)[-1]["error"]["code"] == "engine_stuck"
        watchdog.look(9, 1)
        model.engine.turn.set()
        assert (await client.get("/health")).status_code == 200


async def test_text_is_answered_whatever_becomes_of_vision(connect, make_model):
    class Late(VisionWorker):
        def start(self, on_loaded=None):
            self.on_loaded = on_loaded

    vision = Late({"halves": None})
    async with connect(make_model(), vision=vision) as client:
        assert (await client.get("/health")).json()["vision"]["state"] == "loading"
        vision.failure = "the model is damaged"
        vision.on_loaded(ValueError(vision.failure))
        await asyncio.sleep(0)
        health = (await client.get("/health")).json()
        assert (health["status"], health["vision"]["reason"]) == ("ok", "the model is damaged")
        assert (await client.post("/v1/completions", json=COMPLETION)).status_code == 200
        answer = await client.post("/v1/vision/detections", json={"image": ""})
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "engine_dead")
        vision.failure = ""
        vision.on_loaded(None)
        await asyncio.sleep(0)
        assert (await client.get("/health")).json()["vision"]["state"] == "ok"


async def test_an_engine_that_dies_tells_its_requests(connect, make_model, read_events):
    model = make_model(script=forever, round_s=0.05)
    async with connect(model) as client:
        stream = asyncio.ensure_future(
            client.post("/v1/completions", json=COMPLETION | {"max_tokens": 150, "stream": True})
        )
        while model.engine.status().running < 1:
            await asyncio.sleep(0.01)
        await asyncio.to_thread(model.engine.stop)
        assert read_events((await stream).text)[-1]["error"]["code"] == "engine_dead"


async def test_shutting_down_ends_running_requests_with_the_truth(connect, make_model, read_events):
    model = make_model(script=forever, round_s=0.05)
    async with connect(model, drain_s=0.05) as client:
        whole = asyncio.ensure_future(client.post("/v1/completions", json=COMPLETION | {"max_tokens": 150}))
        stream = asyncio.ensure_future(
            client.post("/v1/completions", json=COMPLETION | {"max_tokens": 150, "stream": True})
        )
        while model.engine.status().running < 2:
            await asyncio.sleep(0.01)
        draining = asyncio.ensure_future(client.app.state.serving.drain())
        await asyncio.sleep(0)
        refused = await client.post("/v1/completions", json=COMPLETION)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "shutting_down")
        await draining
        assert ((await whole).status_code, (await whole).json()["error"]["code"]) == (503, "shutting_down")
        assert read_events((await stream).text)[-1]["error"]["code"] == "shutting_down"


async def test_running_requests_finish_while_draining(connect, make_model):
    model = make_model(round_s=0.01)
    async with connect(model, drain_s=5) as client:
        running = asyncio.ensure_future(client.post("/v1/completions", json=COMPLETION))
        while not model.engine.submitted:
            await asyncio.sleep(0.005)
        await client.app.state.serving.drain()
        assert (await running).status_code == 200


async def test_with_a_key_every_route_but_health_needs_it(connect, make_model):
    async with connect(make_model(), api_key="sesame") as client:
        paths = {route.path for route in client.app.routes if hasattr(route, "path")}
        paths |= {"/v1/completions", "/v1/chat/completions", "/v1/models", "/version", "/nowhere"}
        for path in paths - {"/health", "/"}:
            for headers in ({}, {"authorization": "Bearer no"}, {"authorization": "Bearer "}, {"x-api-key": "sesam"}):
                answer = await client.request("POST", path, headers=headers)
                assert answer.status_code == 401, path
                assert answer.headers["www-authenticate"] == "Bearer"
                assert answer.json()["error"]["code"] == "invalid_api_key"
        for headers in ({"authorization": "Bearer sesame"}, {"x-api-key": "sesame"}):
            assert (await client.get("/v1/models", headers=headers)).status_code == 200
        assert (await client.get("/health")).status_code == 200
        assert (await client.get("/")).status_code == 200  # the page asks for the key


async def test_request_ids_are_taken_where_harmless(connect, make_model):
    async with connect(make_model()) as client:
        assert (await client.get("/health", headers={"x-request-id": "a.b-1"})).headers["x-request-id"] == "a.b-1"
        for odd in ("a b", "x" * 129):
            given = (await client.get("/nowhere", headers={"x-request-id": odd})).headers["x-request-id"]
            assert given
            assert given != odd


async def test_paths_and_methods_that_other_servers_take(connect, make_model):
    async with connect(make_model()) as client:
        for path in ("/v1/models/", "/v1//models"):
            answer = await client.get(path)
            assert (answer.status_code, answer.json()["data"][0]["id"]) == (200, "tiny")
        assert (await client.post("/v1/completions/", json=COMPLETION)).status_code == 200
        assert (await client.head("/health")).status_code == 200
        assert (await client.head("/v1/completions")).status_code == 405


async def test_models_of_one_kind(connect, make_model):
    async with connect(make_model()) as client:
        (entry,) = (await client.get("/v1/models?kind=language")).json()["data"]
        assert (entry["id"], entry["kind"]) == ("tiny", "language")
        answer = await client.get("/v1/models?kind=detector")
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "kind")


async def test_the_description_names_the_statuses_that_occur(connect, make_model):
    async with connect(make_model()) as client:
        description = (await client.get("/openapi.json")).json()
    for path, operations in description["paths"].items():
        for operation in operations.values():
            assert "422" not in operation["responses"], path
            assert set(operation["responses"]) > {"200"}
    assert set(description["paths"]["/v1/completions"]["post"]["responses"]) == {
        "200", "400", "401", "403", "404", "408", "413", "415", "429", "431", "500", "503",
    }  # fmt: skip
    prompt = description["components"]["schemas"]["CompletionBody"]["properties"]["prompt"]
    assert {shape["type"] for shape in prompt["anyOf"]} == {"string", "array"}
