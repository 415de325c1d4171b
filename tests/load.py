"""Load on a real server: whole and streamed answers, clients that leave, that read slowly, that send nonsense.

``python tests/load.py --requests 10000 --at-once 200 --json FILE`` starts ``dovetail serve tiny``, asks it, and writes
what happened; with ``--seconds`` instead of ``--requests`` it goes on for that long, and ``--plot`` draws the memory.
The file is written every ten seconds, so that a run which is cut short leaves what it had found. Time in which the
whole run stood still (its processes were stopped) is told, and does not count.
Every greedy text is compared with what the same server answered alone and without drafts.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import random
import socket
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
START_LOOKS = 1500
STILL_S = 5.0  # a clock that should tick each second and does not for so long: the run was stopped
PROMPTS = [f"{start} {n}" for start in ("def mean", "import os", "The sum of", "class Tree") for n in range(6)]
LENGTHS = (3, 6, 10)
MAX_FILL_BYTES = 2**26
MIX = {"whole": 40, "stream": 25, "leave": 14, "nonsense": 12, "slow": 5, "look": 4}
NONSENSE: tuple[tuple[bytes, str], ...] = (
    (b'{"model": "tiny", ', "application/json"), (b"\xff\xfe\x00", "application/json"),
    (b'{"prompt": 7}', "application/json"), (b"[" * 5000, "application/json"),
    (b'{"prompt": "x", "model": "gpt-9"}', "application/json"), (b'{"prompt": "x"}', "text/plain"),
    (b'{"prompt": "x", "max_tokens": -5}', "application/json"),
    (b'{"prompt": "' + b"x " * 40_000 + b'"}', "application/json"),
)  # fmt: skip


@dataclass
class Tally:
    """What came back. mismatches: texts that differ from the reference; odd: answers that should not occur."""

    kinds: Counter[str] = field(default_factory=Counter)
    statuses: Counter[str] = field(default_factory=Counter)
    compared: int = 0
    mismatches: list[str] = field(default_factory=list)
    odd: list[str] = field(default_factory=list)
    first_byte_s: list[float] = field(default_factory=list)


@dataclass
class Answer:
    status: int
    headers: Mapping[str, str]
    body: bytes
    first_byte_s: float


class Client:
    """One request a connection, over plain sockets: the machine's time belongs to the server."""

    def __init__(self, port: int, seed: int, lengths: Sequence[int] = LENGTHS) -> None:
        self.port = port
        self.lengths = lengths
        self.random = random.Random(seed)
        self.tally = Tally()
        self.references: dict[tuple[str, int], str] = {}

    async def learn(self) -> None:
        """The reference texts, one request at a time."""
        for prompt in PROMPTS:
            for length in self.lengths:
                answer = await self.ask(completion(prompt, length, speculative={"enabled": False}))
                self.references[prompt, length] = json.loads(answer.body)["choices"][0]["text"]

    async def fill_cache(self) -> None:
        """Have the server keep as many prompts as it will: that memory has a bound of its own and is no leak."""
        last, held = -1.0, 0.0
        while held > last and held < MAX_FILL_BYTES:
            for _ in range(8):
                await self.ask(completion(f"{self.random.random()} " * 20, 1))
            text = (await self.ask(None, path="/metrics")).body.decode()
            last, held = held, float(text.split("\ndovetail_prefix_cache_bytes ")[1].split("\n")[0])

    async def one(self) -> None:
        """One call of the mix; refusals that ask to come back are counted, and followed."""
        kind = self.random.choices(list(MIX), list(MIX.values()))[0]
        self.tally.kinds[kind] += 1
        while True:
            try:
                answer = await getattr(self, f"_{kind}")()
            except OSError as error:
                self.tally.odd.append(f"{kind}: {error!r}")
                return
            if answer is None:
                return
            self.tally.statuses[str(answer.status)] += 1
            if answer.status not in (429, 503):
                return
            if "retry-after" not in answer.headers:
                self.tally.odd.append(f"{kind}: {answer.status} without Retry-After")
            await asyncio.sleep(self.random.uniform(0.1, 0.5))

    async def _whole(self) -> Answer:
        prompt, length = self.random.choice(list(self.references))
        answer = await self.ask(completion(prompt, length))
        if answer.status == 200:
            self.tally.first_byte_s.append(answer.first_byte_s)
            self._compare((prompt, length), json.loads(answer.body)["choices"][0]["text"])
        return self._expect(answer, 200, "whole")

    async def _stream(self, pause_s: float = 0.0) -> Answer:
        prompt, length = self.random.choice(list(self.references))
        answer = await self.ask(completion(prompt, length, stream=True), pause_s=pause_s)
        if answer.status == 200:
            self._compare((prompt, length), streamed_text(answer.body))
        return self._expect(answer, 200, "stream")

    async def _slow(self) -> Answer:
        return await self._stream(pause_s=0.02)

    async def _leave(self) -> None:
        prompt = self.random.choice(PROMPTS)
        await self.ask(completion(prompt, 200, stream=self.random.random() < 0.5), leave=self.random.choice((0, 1, 3)))

    async def _nonsense(self) -> Answer:
        body, kind = self.random.choice(NONSENSE)
        answer = await self.ask(body, kind)
        if answer.status not in (400, 404, 415, 429):
            self.tally.odd.append(f"nonsense: {answer.status}")
        return answer

    async def _look(self) -> Answer:
        return self._expect(await self.ask(None, path=self.random.choice(("/health", "/v1/models"))), 200, "look")

    def _expect(self, answer: Answer, status: int, kind: str) -> Answer:
        if answer.status not in (status, 429, 503):
            self.tally.odd.append(f"{kind}: {answer.status} {answer.body[:200]!r}")
        return answer

    def _compare(self, key: tuple[str, int], text: str) -> None:
        self.tally.compared += 1
        if text != self.references[key]:
            self.tally.mismatches.append(f"{key}: {text!r} is not {self.references[key]!r}")

    async def ask(
        self, body: bytes | None, kind: str = "application/json", *, path: str = "/v1/completions",
        pause_s: float = 0.0, leave: int | None = None,
    ) -> Answer:  # fmt: skip
        """Send and read. ``pause_s``: between small reads; ``leave``: hang up after so many reads."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        try:
            head = f"{'GET' if body is None else 'POST'} {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
            if body is not None:
                head += f"Content-Type: {kind}\r\nContent-Length: {len(body)}\r\n"
            writer.write(head.encode() + b"\r\n" + (body or b""))
            started, first, pieces = time.monotonic(), 0.0, []
            while leave is None or len(pieces) < leave:
                piece = await reader.read(64 if pause_s else 65536)
                if not piece:
                    break
                first = first or time.monotonic() - started
                pieces.append(piece)
                await asyncio.sleep(pause_s)
            return parsed(b"".join(pieces), first)
        finally:
            writer.close()


def completion(prompt: str, length: int, **fields: Any) -> bytes:
    """A greedy call."""
    return json.dumps({"prompt": prompt, "max_tokens": length, "temperature": 0} | fields).encode()


def parsed(raw: bytes, first_byte_s: float) -> Answer:
    """An answer that ended with its connection; status 0 where nothing came."""
    head, _, body = raw.partition(b"\r\n\r\n")
    lines = head.decode("latin-1").split("\r\n")
    headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines[1:])}
    if headers.get("transfer-encoding") == "chunked":
        body = unchunked(body)
    return Answer(int(lines[0].split()[1]) if raw else 0, headers, body, first_byte_s)


def unchunked(body: bytes) -> bytes:
    """The body without the lengths of its chunks."""
    pieces = []
    while body:
        length, _, body = body.partition(b"\r\n")
        pieces.append(body[: int(length or b"0", 16)])
        body = body[len(pieces[-1]) + 2 :]
    return b"".join(pieces)


def streamed_text(body: bytes) -> str:
    """A stream's text; what tells of an unfinished one where it does not end as it should."""
    lines = [line.removeprefix("data: ") for line in body.decode().split("\n") if line.startswith("data: ")]
    if not lines or lines[-1] != "[DONE]":
        return f"no end: {lines[-1:]}"
    return "".join(c["text"] for line in lines[:-1] for c in json.loads(line).get("choices", ()))


def resident_bytes(pid: int) -> int:
    """Memory of the process itself."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0]) * 1024


@contextmanager
def server(*arguments: str, shell: str = "", **environment: str) -> Iterator[tuple[int, int]]:
    """``dovetail serve`` until it answers, behind ``shell`` in the same process; (port, process id)."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    own = {name: value for name, value in os.environ.items() if not name.startswith("DOVETAIL_")}
    command = [sys.executable, "-c", "from server.cli import main; main()", "serve", "--port", str(port), *arguments]
    command = ["bash", "-c", f'{shell}\nexec "$@"', "-", *command]
    with subprocess.Popen(command, cwd=ROOT, env=own | environment, stderr=subprocess.DEVNULL) as process:
        try:
            wait_until_healthy(port, process)
            yield port, process.pid
        finally:
            process.terminate()
            assert process.wait(60) == 0, "the server did not end as it should"


def wait_until_healthy(port: int, process: subprocess.Popen[bytes]) -> None:
    """Return when text is answered."""
    for _ in range(START_LOOKS):  # five minutes of the process's own time: a stopped machine does not count
        assert process.poll() is None, f"the server ended with {process.returncode}"
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                return
        except OSError:
            time.sleep(0.2)
    raise AssertionError("the server did not come up")


async def drive(
    port: int, pid: int, *, at_once: int, requests: int | None = None, seconds: float = 1e9, rest_s: float = 0.0,
    warm_up: int = 500, seed: int = 0, lengths: Sequence[int] = LENGTHS,
    keep: Callable[[dict[str, Any]], None] = lambda report: None,
) -> dict[str, Any]:  # fmt: skip
    """The load, and what came of it. Memory is looked at behind ``warm_up`` requests with a full prefix cache, and at
    the end; ``keep`` is given what is known every ten seconds; ``stood_still``: when the run was, and for how long."""
    client = Client(port, seed, lengths)
    await client.learn()
    await client.fill_cache()
    await share(client, at_once, warm_up, lambda: False, 0)
    client.tally = Tally()
    before, started = resident_bytes(pid), time.monotonic()
    curve: list[tuple[float, int]] = []
    still: list[tuple[float, float]] = []

    def passed() -> float:
        return time.monotonic() - started

    def report(left_running: int | None = None) -> dict[str, Any]:
        tally, first = client.tally, sorted(client.tally.first_byte_s)
        return {
            "kinds": dict(tally.kinds), "statuses": dict(tally.statuses), "compared": tally.compared,
            "mismatches": tally.mismatches, "odd": tally.odd,
            "at_once": at_once, "warm_up": warm_up, "seconds": round(passed(), 1), "stood_still": still,
            "left_running": left_running,
            "first_byte_s": {p: round(first[int(len(first) * int(p) / 100)], 3) for p in ("50", "95") if first},
            "resident_bytes": {"before": before, "after": resident_bytes(pid)}, "memory": curve,
        }  # fmt: skip

    async def watch() -> None:
        for tick in itertools.count():
            if tick % 10 == 0:
                curve.append((round(passed(), 1), resident_bytes(pid)))
                keep(report())
            slept = passed()
            await asyncio.sleep(1)
            if passed() - slept > STILL_S:
                still.append((round(slept, 1), round(passed() - slept, 1)))

    watching = asyncio.ensure_future(watch())
    await share(client, at_once, requests, lambda: passed() - sum(s for _, s in still) > seconds, rest_s)
    watching.cancel()
    return report(await until_idle(client))


async def share(client: Client, at_once: int, requests: int | None, over: Callable[[], bool], rest_s: float) -> None:
    """``at_once`` callers take requests until none is left or it is over."""
    left = iter(range(requests if requests is not None else sys.maxsize))

    async def caller() -> None:
        for _ in left:
            if over():
                return
            await client.one()
            await asyncio.sleep(rest_s)

    await asyncio.gather(*(caller() for _ in range(at_once)))


async def until_idle(client: Client) -> int:
    """Requests still held when nobody asks any more: 0 within a minute."""
    for _ in range(300):
        health = json.loads((await client.ask(None, path="/health")).body)
        held = int(health["running"] + health["waiting"])
        if held == 0:
            return 0
        await asyncio.sleep(0.2)
    return held


def plot(report: Mapping[str, Any], file: Path) -> None:
    """Memory over time; grey where the run stood still."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 3))
    axes.plot([t / 60 for t, _ in report["memory"]], [b / 2**20 for _, b in report["memory"]])
    for begun, seconds in report["stood_still"]:
        axes.axvspan(begun / 60, (begun + seconds) / 60, color="0.85", linewidth=0)
    most = max(resident for _, resident in report["memory"])
    axes.set(xlabel="minutes", ylabel="resident memory, MiB", ylim=(0, 1.15 * most / 2**20))
    figure.tight_layout()
    figure.savefig(file, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int)
    parser.add_argument("--seconds", type=float, default=1e9)
    parser.add_argument("--at-once", type=int, default=200)
    parser.add_argument("--rest", type=float, default=0.0, help="seconds a caller waits between two requests")
    parser.add_argument("--warm-up", type=int, default=500)
    parser.add_argument(
        "--lengths", default=",".join(map(str, LENGTHS)), help="tokens of the answers that are compared"
    )
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("arguments", nargs="*", help="of the server, behind --", default=["tiny"])
    given = parser.parse_args()
    command = {"command": " ".join(["python", "tests/load.py", *sys.argv[1:]])}

    def keep(report: Mapping[str, Any]) -> None:
        given.json.write_text(json.dumps(command | report, indent=1) + "\n", encoding="utf-8")

    with server(*given.arguments) as (port, pid):
        report = asyncio.run(
            drive(
                port, pid, at_once=given.at_once, requests=given.requests, seconds=given.seconds, rest_s=given.rest,
                warm_up=given.warm_up, lengths=[int(length) for length in given.lengths.split(",")], keep=keep,
            )
        )  # fmt: skip
    keep(report)
    if given.plot is not None:
        plot(report, given.plot)


if __name__ == "__main__":
    main()
