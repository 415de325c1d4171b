"""A real cluster on this machine: two replicas of the tiny pair under Ray Serve, one of them killed in mid-load."""

import asyncio
import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import load
import pytest

pytest.importorskip("ray.serve", reason="not installed (extra ray): ray")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

PATIENCE_S = 240.0
ASSETS = load.ROOT / "server" / "assets"
CHAT = "/v1/chat/completions"


@contextmanager
def cluster(folder: Path, **arguments: Any) -> Iterator[tuple[load.Client, int]]:
    """``serve run`` with these arguments until it answers; a client of it, and its session."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    application = {"import_path": "server.cluster.application:application", "route_prefix": "/", "args": arguments}
    config = {
        "http_options": {"host": "127.0.0.1", "port": port},
        "applications": [{"name": "dovetail", **application}],
    }
    (folder / "serve.yaml").write_text(json.dumps(config))  # JSON is YAML
    own = {name: value for name, value in os.environ.items() if not name.startswith(("DOVETAIL_", "RAY_"))}
    own |= {"RAY_ADDRESS": "local", "RAY_USAGE_STATS_ENABLED": "0", "DOVETAIL_THREADS": "1", "DOVETAIL_VISION": "none"}
    own["PYTHONPATH"] = os.pathsep.join(filter(None, [str(load.ROOT), os.environ.get("PYTHONPATH")]))
    command = [sys.executable, "-m", "ray.serve.scripts", "run", str(folder / "serve.yaml")]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, cwd=load.ROOT, env=own, stdout=log, stderr=log, start_new_session=True)
        try:
            client = load.Client(port, 0)
            until_answered(client, process, arguments.get("min_replicas", 1))
            yield client, process.pid
        finally:
            process.terminate()
            process.wait(60)


def until_answered(client: load.Client, process: "subprocess.Popen[bytes]", replicas: int) -> None:
    """Return when so many replicas answer."""
    deadline = time.monotonic() + PATIENCE_S
    seen = set()
    while len(seen) < replicas:
        assert process.poll() is None, f"the cluster ended with {process.returncode}"
        assert time.monotonic() < deadline, "the cluster did not come up"
        with contextlib.suppress(OSError):
            answer = asyncio.run(client.ask(load.completion(f"{time.monotonic()} = x", 1)))
            seen |= {answer.headers["x-dovetail-replica"]} if answer.status == 200 else set()
        time.sleep(0.2)


def chat(client: load.Client, messages: list[dict[str, str]], **fields: Any) -> tuple[load.Answer, dict[str, Any]]:
    body = json.dumps({"messages": messages, "max_tokens": 8, "temperature": 0} | fields).encode()
    answer = asyncio.run(client.ask(body, path=CHAT))
    return answer, json.loads(answer.body)


def replica_processes(session: int) -> set[int]:
    found = set()
    for folder in Path("/proc").iterdir():
        try:
            is_replica = (folder / "cmdline").read_bytes().startswith(b"ray::ServeReplica:dovetail:Replica")
            if is_replica and os.getsid(int(folder.name)) == session:
                found.add(int(folder.name))
        except (OSError, ValueError):
            continue
    return found


def test_conversations_stay_on_their_replica_and_a_lost_one_costs_its_own_requests_only(tmp_path: Path) -> None:
    with cluster(tmp_path, targets="tiny", min_replicas=2, max_replicas=2, replicas_per_machine=2) as (client, session):
        check_conversations(client)
        asyncio.run(lose_a_replica(client, session))


def check_conversations(client: load.Client) -> None:
    homes = set()
    for n in range(8):
        messages = [{"role": "user", "content": f"Write a function that adds {n} to a list of numbers."}]
        first, body = chat(client, messages)
        messages += [body["choices"][0]["message"], {"role": "user", "content": "And back."}]
        second, body = chat(client, messages)
        assert second.headers["x-dovetail-replica"] == first.headers["x-dovetail-replica"]
        assert body["usage"]["prompt_tokens_details"]["cached_tokens"] > 0
        homes.add(first.headers["x-dovetail-replica"])
    assert len(homes) == 2


async def lose_a_replica(client: load.Client, session: int) -> None:
    """Streams and whole answers on both replicas, one of which is killed while they run."""
    prompts = [f"def f{n}(x):" for n in range(16)]
    texts = {
        p: streamed((await client.ask(load.completion(p, 300, stream=True, ignore_eos=True))).body) for p in prompts
    }
    before = replica_processes(session)
    assert len(before) == 2
    streams = [client.ask(load.completion(p, 300, stream=True, ignore_eos=True)) for p in prompts]
    wholes = [client.ask(load.completion(p, 300, ignore_eos=True)) for p in prompts]
    running = asyncio.gather(*streams, *wholes)
    await asyncio.sleep(1.0)  # in mid-load
    os.kill(min(before), signal.SIGKILL)
    answers = await running
    lost = Counter[str]()
    for prompt, answer in zip(prompts, answers[:16], strict=True):
        text, error = streamed(answer.body)
        if error is None:
            assert answer.status == 200 and (text, error) == texts[prompt]
        else:
            assert error["code"] == "replica_lost" and texts[prompt][0].startswith(text)
            lost[answer.headers["x-dovetail-replica"]] += 1
    for prompt, answer in zip(
        prompts, answers[16:], strict=True
    ):  # nothing had been sent of these: they are asked again
        body = json.loads(answer.body)
        assert answer.status == 200 and body["choices"][0]["text"] == texts[prompt][0]
    assert len(lost) == 1, f"streams of one replica break off, and some were in hand: {lost}"
    deadline = time.monotonic() + PATIENCE_S
    while len(replica_processes(session) - {min(before)}) < 2:
        assert time.monotonic() < deadline, "no replica came in the lost one's place"
        await asyncio.sleep(0.5)
    again = await asyncio.gather(*(client.ask(load.completion(p, 300, stream=True, ignore_eos=True)) for p in prompts))
    assert [streamed(answer.body) for answer in again] == list(texts.values())


def streamed(body: bytes) -> tuple[str, dict[str, Any] | None]:
    """A stream's text, and the error it ended with."""
    events = [line[6:] for line in body.decode().split("\n") if line.startswith("data: ")]
    parsed = [json.loads(event) for event in events if event != "[DONE]"]
    text = "".join(choice["text"] for event in parsed for choice in event.get("choices", ()))
    error = parsed[-1].get("error")
    assert (events[-1] == "[DONE]") is (error is None)
    return text, error


def test_the_edge_has_no_torch() -> None:
    code = "import server.cluster.application, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=load.ROOT, check=False).returncode == 0


def test_a_replica_makes_room_for_another_target(tmp_path: Path) -> None:
    shutil.copytree(ASSETS / "target", tmp_path / "other")
    with cluster(tmp_path, targets=f"tiny,{tmp_path / 'other'}") as (client, _):
        listed = json.loads(asyncio.run(client.ask(None, path="/v1/models")).body)
        assert [entry["id"] for entry in listed["data"]] == ["tiny", "other"]
        names = ["tiny", "other", "other", "tiny"]
        bodies = [json.loads(asyncio.run(client.ask(load.completion("def f", 6, model=name))).body) for name in names]
        assert [body["model"] for body in bodies] == names
        assert len({body["choices"][0]["text"] for body in bodies}) == 1
        unknown = asyncio.run(client.ask(load.completion("def f", 6, model="third")))
        assert unknown.status == 404 and b"tiny, other" in unknown.body
