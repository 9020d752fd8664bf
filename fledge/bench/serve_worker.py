"""One measurement of `fledge bench serve` in a process of its own: a client, the engine alone, or a filled shelf.

    python -m fledge.bench.serve_worker job.json

The client speaks HTTP over bare sockets and searches each line for two words, so that it takes next to nothing of the
cores that the server needs. Not here: the server's process, what is asked in which order (serve.py).
"""

from __future__ import annotations

import asyncio
import json
import random
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

from fledge.core.errors import FledgeError

LINE = 1 << 24
OWNER = "everybody"


async def post(port: int, path: str, body: dict[str, Any]) -> tuple[float, list[float], bytes]:
    """When it was sent, when each event came, and the last event, else the last line. Raises FledgeError unless 200."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=LINE)
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\ncontent-type: application/json\r\n"
    began = time.perf_counter()
    try:
        writer.write(f"{head}content-length: {len(data)}\r\n\r\n".encode() + data)
        if b" 200 " not in await reader.readline():
            raise FledgeError(f"{path} failed: {(await reader.read()).decode(errors='replace')[-300:]}")
        times, last, event = list[float](), b"", b""
        while line := await reader.readline():
            if line.startswith(b"data: {"):
                times.append(time.perf_counter())
                event = line
            last = line.strip() or last
        if body.get("stream") and last not in (b"data: [DONE]", b"0"):  # "0": the end of a body in chunks
            raise FledgeError(f"a stream of {path} broke off after {len(times)} events")
        return began, times, event.removeprefix(b"data: ") or last
    finally:
        writer.close()


def load(job: dict[str, Any]) -> dict[str, Any]:
    """All requests, `clients` at a time. Raises FledgeError for an answer cut short: the rate counts all its tokens."""
    firsts, gaps, ends = list[float](), list[float](), list[bytes]()

    async def client(mine: list[dict[str, Any]]) -> None:
        for body in mine:
            began, times, end = await post(job["port"], "/v1/completions", body)
            ends.append(end)
            firsts.append(times[0] - began)
            gaps.extend(b - a for a, b in pairwise(times))

    async def everybody() -> None:
        await asyncio.gather(*(client(job["bodies"][n :: job["clients"]]) for n in range(job["clients"])))

    began, own = time.perf_counter(), time.process_time()
    asyncio.run(everybody())
    seconds = time.perf_counter() - began
    share = (time.process_time() - own) / seconds
    reasons = {str(json.loads(end)["choices"][0]["finish_reason"]) for end in ends}
    if reasons != {"length"}:
        found = ", ".join(sorted(reasons - {"length"}))
        raise FledgeError(f"an answer ended ({found}) before it had its {job['bodies'][0]['max_tokens']} tokens")
    return {"seconds": seconds, "first_s": firsts, "gaps_s": gaps, "client_cores": share}


def ask(job: dict[str, Any]) -> dict[str, Any]:
    """Requests one after the other: seconds to the first event of each, or to the end of an answer in one piece."""

    async def all_of_them() -> tuple[list[float], str]:
        seconds, text = list[float](), b""
        for body in job["bodies"]:
            began, times, text = await post(job["port"], job.get("path", "/v1/completions"), body)
            seconds.append((times[0] if times else time.perf_counter()) - began)
        return seconds, text.decode()

    seconds, text = asyncio.run(all_of_them())
    return {"seconds": seconds, "last": text}


def engine(job: dict[str, Any]) -> dict[str, Any]:
    """The requests of a load, by Engine.step alone, no text made of them; tokens by the wall clock."""
    from fledge.engine.engine import Engine
    from fledge.engine.loading import load as load_model
    from fledge.engine.request import Request
    from fledge.engine.sampling import SamplingParams

    llm = load_model(job["model"], dtype=job["dtype"])

    def timed(bodies: list[dict[str, Any]], clients: int) -> float:
        runner, waiting = Engine(llm.model, eos_id=llm.tokenizer.eos_id), list(bodies)
        began = time.perf_counter()
        while waiting or runner.busy:
            while waiting and runner.waiting + runner.running < clients:
                body = waiting.pop(0)
                ban = tuple(body["fledge"]["ban"])
                params = SamplingParams(seed=body["seed"], max_tokens=body["max_tokens"], ban=ban)
                runner.add(Request(tuple(body["prompt"]), params))
            runner.step()
        return time.perf_counter() - began

    timed(job["bodies"][:1], 1)
    return {"seconds": timed(job["bodies"], job["clients"])}


def hold(job: dict[str, Any]) -> dict[str, Any]:
    """Fill a server's shelf with different states; times of Shelf.get, this process's memory, bytes on disk."""
    import torch

    from fledge.engine.loading import load as load_model
    from fledge.engine.statefile import identity_of
    from fledge.server.keys import Tenant
    from fledge.server.service import Service
    from fledge.server.settings import Settings

    llm = load_model(job["model"], dtype=job["dtype"])
    service = Service(llm, Settings(folder=Path(job["folder"]), shelf=1 << 40), identity_of(llm))
    shelf, tenant, card = service.states, Tenant(OWNER), service.card(1, None)
    owner, draw, before = service.owner(tenant), random.Random(0), resident()
    ids, began = list[str](), time.perf_counter()
    for number in range(job["states"]):
        state = service.beginning.clone()
        generator = torch.Generator().manual_seed(number)
        for tensor in state.tensors().values():
            tensor.copy_(0.1 * torch.randn(tensor.shape, generator=generator))
        ids.append(shelf.put(owner, state, card))
    filled, after = time.perf_counter() - began, resident()
    chosen, seconds = draw.sample(ids, min(job["resumed"], len(ids))), list[float]()
    for id in chosen:
        began = time.perf_counter()
        shelf.get(owner, id)
        seconds.append(time.perf_counter() - began)
    disk = sum(file.stat().st_size for file in Path(job["folder"]).rglob("*") if file.is_file())
    handles = [service.handle(tenant, id) for id in chosen]
    facts = {"fill_s": filled, "get_s": seconds, "before_bytes": before, "after_bytes": after, "disk_bytes": disk}
    return {**facts, "handles": handles, "state_bytes": state.nbytes}


def resident(pid: int | str = "self") -> int | None:
    """Bytes of RAM a process holds now (Linux)."""
    try:
        text = Path(f"/proc/{pid}/status").read_text(encoding="ascii", errors="replace")
        return int(text.partition("VmRSS:")[2].split()[0]) * 1024
    except (OSError, IndexError, ValueError):
        return None


KINDS = {"load": load, "ask": ask, "engine": engine, "hold": hold}

if __name__ == "__main__":
    found = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    print(json.dumps(KINDS[found["kind"]](found)))
