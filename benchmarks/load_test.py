"""Many clients at a server for a while: whether each answer is what it is alone, how fast they come, what memory stays.

    python benchmarks/load_test.py MODEL --clients 32 --seconds 180

It starts `larosa serve MODEL`, asks each of a pool of requests alone, and then lets the clients ask them in any order,
some leaving in the middle and some asking for what cannot be had. Needs `pip install 'larosa[serve]' httpx`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import httpx
import psutil

from larosa.data.text import TextSplit, read_text

_BAD: list[tuple[Any, int]] = [
    ({"temperature": -1}, 400),
    ({"stop": ["x"] * 10_000}, 400),
    ({"model": "nobody"}, 404),
    ({"prompt": [10**9]}, 400),
    ({"max_tokens": 10**9}, 400),
    (b'{"model": "\xff', 400),
    (b'{"temperature": NaN}', 400),
]


@dataclass
class Seen:
    """What the clients have seen."""

    kinds: Counter[str] = field(default_factory=Counter)
    tokens: int = 0
    seconds: list[float] = field(default_factory=list)
    first: list[float] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)


def pool_of(model: str, size: int, chance: random.Random) -> list[dict[str, Any]]:
    """Requests of mixed lengths, a third of them with the same beginning."""
    text = read_text("bundled", TextSplit.TEST)

    def piece(longest: int) -> str:
        start, length = chance.randrange(len(text) - longest), chance.randrange(1, longest)
        return text[start : start + length]

    shared = text[:1500]
    return [
        {
            "model": model,
            "prompt": (shared if number % 3 == 0 else "") + piece(2500 if number % 5 == 0 else 200),
            "max_tokens": chance.choice([1, 8, 32, 64, 200]),
            "temperature": chance.choice([0, 0.8, 1.0]),
            "seed": number,
            **({"stop": [" the"]} if number % 7 == 0 else {}),
            **({"logprobs": 2} if number % 6 == 0 else {}),
        }
        for number in range(size)
    ]


async def ask(http: httpx.AsyncClient, body: dict[str, Any], seen: Seen | None = None) -> dict[str, Any]:
    """Text, log-probabilities and finish reason; every other request is streamed."""
    begun = time.perf_counter()
    if body["seed"] % 2:
        response = await http.post("/v1/completions", json=body)
        response.raise_for_status()
        (choice,) = response.json()["choices"]
        tokens = response.json()["usage"]["completion_tokens"]
    else:
        pieces = []
        async with http.stream("POST", "/v1/completions", json=body | {"stream": True}) as response:
            response.raise_for_status()
            async for line in response.aiter_lines():
                if line.startswith("data: {"):
                    event = json.loads(line.removeprefix("data: "))
                    if "error" in event:
                        raise httpx.StreamError(event["error"]["message"])
                    if not pieces and seen is not None:
                        seen.first.append(time.perf_counter() - begun)
                    pieces.append(event["choices"][0])
        logprobs = None
        if "logprobs" in body:
            keys = pieces[0]["logprobs"]
            logprobs = {key: [value for piece in pieces for value in piece["logprobs"][key]] for key in keys}
        text = "".join(piece["text"] for piece in pieces)
        choice = {"index": 0, "text": text, "logprobs": logprobs, "finish_reason": pieces[-1]["finish_reason"]}
        tokens = len(pieces)
    if seen is not None:
        seen.seconds.append(time.perf_counter() - begun)
        seen.tokens += tokens
    return choice


async def client(
    http: httpx.AsyncClient, pool: list[dict[str, Any]], alone: list[Any], seed: int, end: float, seen: Seen
) -> None:
    """Ask one thing after the other until the time is over."""
    chance = random.Random(seed)
    while time.monotonic() < end:
        number, what = chance.randrange(len(pool)), chance.random()
        if what < 0.1:
            change, status = chance.choice(_BAD)
            content = change if isinstance(change, bytes) else json.dumps(pool[number] | change).encode()
            headers = {"Content-Type": "application/json"}
            response = await http.post("/v1/completions", content=content, headers=headers)
            seen.kinds["bad"] += 1
            if response.status_code != status or set(response.json()) != {"error"}:
                seen.wrong.append(f"{content[:80]!r} got {response.status_code}")
        elif what < 0.25:
            async with http.stream("POST", "/v1/completions", json=pool[number] | {"stream": True}) as response:
                lines = response.aiter_lines()
                for _ in range(chance.randrange(4)):
                    await anext(lines, None)
            seen.kinds["left"] += 1
        else:
            try:
                if await ask(http, pool[number], seen) != alone[number]:
                    seen.wrong.append(f"request {number} got another answer than alone")
            except (httpx.HTTPError, httpx.StreamError) as error:
                seen.wrong.append(f"request {number}: {error!r}")
            seen.kinds["answered"] += 1


async def run(url: str, process: psutil.Process, given: argparse.Namespace) -> Seen:
    """The whole test against a server."""
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=given.clients)
    async with httpx.AsyncClient(base_url=url, timeout=600, limits=limits, verify=False) as http:
        model = (await http.get("/v1/models")).json()["data"][0]["id"]
        pool = pool_of(model, given.pool, random.Random(0))
        alone = [await ask(http, body) for body in pool]
        print(f"{len(pool)} requests asked alone", flush=True)
        seen, begun, worked = Seen(), time.monotonic(), sum(process.cpu_times()[:2])
        clients = [
            asyncio.create_task(client(http, pool, alone, seed, begun + given.seconds, seen))
            for seed in range(given.clients)
        ]
        memory: list[tuple[float, float]] = []
        while not all(task.done() for task in clients):
            memory.append((time.monotonic() - begun, process.memory_info().rss / 2**20))
            if len(memory) % 60 == 1:
                print(f"{memory[-1][0]:.0f} s: {memory[-1][1]:.0f} MiB, {dict(seen.kinds)}", flush=True)
            await asyncio.wait(clients, timeout=10)
        await asyncio.gather(*clients)
        taken = time.monotonic() - begun
        memory.append((taken, process.memory_info().rss / 2**20))
        worked = sum(process.cpu_times()[:2]) - worked
        gauges = (await http.get("/metrics")).text
    print(f"{sum(seen.kinds.values())} requests in {taken:.0f} s from {given.clients} clients: {dict(seen.kinds)}")
    print(f"{seen.tokens / taken:.0f} tokens/s in whole answers, {len(seen.seconds) / taken:.1f} answers/s")
    print(f"the server's processor time: {worked:.0f} s")
    for name, values in (("answer", seen.seconds), ("first token", seen.first)):
        cuts = statistics.quantiles(values, n=20)
        print(f"{name}: median {statistics.median(values):.3f} s, p95 {cuts[-1]:.3f} s, longest {max(values):.3f} s")
    print(
        "server's memory, MiB: " + ", ".join(f"{mib:.0f} at {at:.0f} s" for at, mib in memory[:: len(memory) // 6 or 1])
    )
    print(
        "\n".join(
            line
            for line in gauges.splitlines()
            if line.startswith(("larosa_sequences", "larosa_prompt", "larosa_cached", "larosa_generated"))
        )
    )
    return seen


def main() -> None:
    """Start a server, let the clients loose, and fail if an answer was wrong."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=180)
    parser.add_argument("--pool", type=int, default=60, help="different requests")
    parser.add_argument("--max-num-seqs", default="8")
    given = parser.parse_args()
    command = [sys.executable, "-c", "from larosa.cli.main import main; main()", "serve", given.model, "--port", "0"]
    with subprocess.Popen(
        [*command, "--max-num-seqs", given.max_num_seqs], stderr=subprocess.PIPE, text=True
    ) as server:
        assert server.stderr is not None
        first = server.stderr.readline()
        if "Serving" not in first:
            sys.exit(first + server.stderr.read())
        try:
            seen = asyncio.run(run(first.split()[-1], psutil.Process(server.pid), given))
        finally:
            server.terminate()
            print(server.stderr.read(), end="")
    for line in seen.wrong[:10]:
        print(line)
    sys.exit(f"{len(seen.wrong)} wrong" if seen.wrong else 0)


if __name__ == "__main__":
    main()
