"""What HTTP costs a token, and what an idle server costs: ``python tests/http_cost.py --json FILE [-- of the server]``.

The event loop has a thread to itself and the engine another, so the CPU time of the first while streams run, divided by
their tokens, is all that parsing, decoding, events and sending take. Without drafts every token is an event of its own.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import load

TICKS_S = 1 / os.sysconf("SC_CLK_TCK")


def cpu_s(stat: Path) -> float:
    """CPU seconds that a process has used."""
    fields = stat.read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) * TICKS_S


async def stream_cost(port: int, pid: int, streams: int, length: int, *, drafts: bool) -> dict[str, Any]:
    """CPU milliseconds of the event loop for each token of so many streams."""
    client = load.Client(port, 0)
    fields: dict[str, Any] = {"stream": True, "ignore_eos": True, "speculative": {"enabled": drafts}}
    fields["stream_options"] = {"include_usage": True}
    await client.ask(load.completion("x = 1", 20, **fields))
    thread = Path(f"/proc/{pid}/task/{pid}/schedstat")
    before = int(thread.read_text().split()[0])  # nanoseconds on a processor
    answers = await asyncio.gather(*(client.ask(load.completion(f"x = {i}", length, **fields)) for i in range(streams)))
    used_s = (int(thread.read_text().split()[0]) - before) / 1e9
    events = [json.loads(line[6:]) for a in answers for line in a.body.decode().split("\n") if line[:7] == "data: {"]
    tokens = sum(event["usage"]["completion_tokens"] for event in events if event.get("usage"))
    cost = {"streams": streams, "drafts": drafts, "tokens": tokens, "events": len(events)}
    return cost | {"ms_per_token": round(used_s / tokens * 1e3, 4)}


def median_of(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """The run in the middle, and what each of them cost."""
    ordered = sorted(runs, key=lambda run: run["ms_per_token"])
    return ordered[len(ordered) // 2] | {"all_ms_per_token": [run["ms_per_token"] for run in runs]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--idle", type=float, default=20.0, help="seconds to look at the idle server")
    parser.add_argument("--length", type=int, default=400)
    parser.add_argument("--runs", type=int, default=5, help="of each, one behind another; the median counts")
    parser.add_argument("arguments", nargs="*", default=["tiny"])
    given = parser.parse_args()
    with load.server(*given.arguments) as (port, pid):
        costs = [
            median_of(
                [asyncio.run(stream_cost(port, pid, streams, given.length, drafts=drafts)) for _ in range(given.runs)]
            )
            for streams in (1, 4) for drafts in (False, True)
        ]  # fmt: skip
        time.sleep(2)
        before = cpu_s(Path(f"/proc/{pid}/stat"))
        time.sleep(given.idle)
        idle = (cpu_s(Path(f"/proc/{pid}/stat")) - before) / given.idle
    command = " ".join(["python", "tests/http_cost.py", *sys.argv[1:]])
    report = {"command": command, "http": costs, "idle_share_of_a_core": round(idle, 5)}
    given.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
