"""One measurement of `fledge bench serve` in a process of its own: a client, the engine alone, or a filled shelf.

    python -m fledge.bench.serve_worker job.json

The client speaks HTTP over bare sockets and looks at an answer only when it has ended, so that it takes next to nothing
of the cores that the server needs. Not here: the server's process, what is asked in which order (serve.py).
"""

from __future__ import annotations

import gc
import json
import random
import selectors
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from fledge.core.errors import FledgeError

OWNER = "everybody"


class Exchange:
    """One request on a connection of its own: what came, and when. Nothing is looked at before it has ended."""

    def __init__(self, port: int, path: str, body: dict[str, Any]) -> None:
        self._path, self._streams = path, bool(body.get("stream"))
        self._parts, self._times = list[bytes](), list[float]()
        data = json.dumps(body).encode()
        head = f"POST {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\ncontent-type: application/json\r\n"
        self.socket = socket.create_connection(("127.0.0.1", port))
        self.began = time.perf_counter()
        self.socket.sendall(f"{head}content-length: {len(data)}\r\n\r\n".encode() + data)

    def receive(self) -> bool:
        """Take what is there; False at the end."""
        data = self.socket.recv(1 << 20)
        self._times.append(time.perf_counter())
        self._parts.append(data)
        return bool(data)

    def result(self) -> tuple[list[float], bytes]:
        """When each event came (of an answer in one piece: its end), and the last event or line.

        Raises FledgeError unless the status is 200.
        """
        lines = [(now, line.strip()) for now, line in self._lines() if line.strip()]
        if not lines or b" 200 " not in lines[0][1]:
            text = b" ".join(line for _, line in lines).decode(errors="replace")
            raise FledgeError(f"{self._path} failed: {text[-300:]}")
        last = lines[-1][1]
        if not self._streams:
            return self._times[-1:], last
        events = [(now, line.removeprefix(b"data: ")) for now, line in lines if line.startswith(b"data: {")]
        if last not in (b"data: [DONE]", b"0"):  # "0": the end of a body in chunks
            raise FledgeError(f"a stream of {self._path} broke off after {len(events)} events")
        return [now for now, _ in events], events[-1][1]

    def _lines(self) -> Iterator[tuple[float, bytes]]:
        """Every line, and when its end came."""
        begun = b""
        for now, part in zip(self._times, self._parts, strict=True):
            *whole, begun = (begun + part).split(b"\n")
            yield from ((now, line) for line in whole)
        yield self._times[-1], begun


def ask_all(port: int, path: str, queues: Sequence[Sequence[dict[str, Any]]]) -> list[Exchange]:
    """The requests of each queue one after the other, the queues side by side."""
    found, rests = list[Exchange](), [iter(queue) for queue in queues]
    with selectors.DefaultSelector() as selector:

        def begin(rest: Iterator[dict[str, Any]]) -> None:
            if (body := next(rest, None)) is not None:
                found.append(Exchange(port, path, body))
                selector.register(found[-1].socket, selectors.EVENT_READ, (found[-1], rest))

        for rest in rests:
            begin(rest)
        while selector.get_map():
            for key, _ in selector.select():
                exchange, rest = key.data
                if not exchange.receive():
                    selector.unregister(exchange.socket)
                    exchange.socket.close()
                    begin(rest)
    return found


def load(job: dict[str, Any]) -> dict[str, Any]:
    """All requests, `clients` at a time. Raises FledgeError for an answer cut short: the rate counts all its tokens."""
    began, own = time.perf_counter(), time.process_time()
    queues = [job["bodies"][n :: job["clients"]] for n in range(job["clients"])]
    exchanges = ask_all(job["port"], "/v1/completions", queues)
    seconds = time.perf_counter() - began
    share = (time.process_time() - own) / seconds
    firsts, gaps, reasons = list[float](), list[float](), set[str]()
    for exchange in exchanges:
        times, end = exchange.result()
        reasons.add(str(json.loads(end)["choices"][0]["finish_reason"]))
        firsts.append(times[0] - exchange.began)
        gaps.extend(b - a for a, b in pairwise(times))
    if reasons != {"length"}:
        found = ", ".join(sorted(reasons - {"length"}))
        raise FledgeError(f"an answer ended ({found}) before it had its {job['bodies'][0]['max_tokens']} tokens")
    return {"seconds": seconds, "first_s": firsts, "gaps_s": gaps, "client_cores": share}


def ask(job: dict[str, Any]) -> dict[str, Any]:
    """Requests one after the other: seconds to the first event of each, or to the end of an answer in one piece."""
    exchanges = ask_all(job["port"], job.get("path", "/v1/completions"), [job["bodies"]])
    results = [exchange.result() for exchange in exchanges]
    seconds = [times[0] - exchange.began for exchange, (times, _) in zip(exchanges, results, strict=True)]
    return {"seconds": seconds, "last": results[-1][1].decode()}


def engine(job: dict[str, Any]) -> dict[str, Any]:
    """The requests of a load, by Engine.step alone, no text made of them; tokens by the wall clock."""
    from fledge.engine.engine import Engine
    from fledge.engine.llm.loading import load as load_model
    from fledge.engine.request import Request
    from fledge.engine.sampling import SamplingParams

    llm = load_model(job["model"], dtype=job["dtype"])

    def timed(bodies: list[dict[str, Any]], clients: int) -> float:
        runner, waiting = Engine(llm.model, eos_id=llm.tokenizer.eos_id), list(bodies)
        began = time.perf_counter()
        while waiting or runner.busy:
            while waiting and runner.num_waiting + runner.num_running < clients:
                body = waiting.pop(0)
                ban = tuple(body["fledge"]["ban"])
                params = SamplingParams(seed=body["seed"], max_tokens=body["max_tokens"], ban=ban)
                runner.add(Request(tuple(body["prompt"]), params))
            runner.step()
        return time.perf_counter() - began

    # As the server is: the first of a size finds memory that is not there yet.
    timed(job["bodies"][: job["clients"]], job["clients"])
    gc.collect()
    gc.freeze()  # as the server does
    return {"seconds": timed(job["bodies"], job["clients"])}


def hold(job: dict[str, Any]) -> dict[str, Any]:
    """Fill a server's shelf with different states; times of Shelf.get, this process's memory, bytes on disk."""
    import torch

    from fledge.engine.llm.loading import load as load_model
    from fledge.server.auth import Tenant
    from fledge.server.service import Service
    from fledge.server.settings import ServerSettings

    llm = load_model(job["model"], dtype=job["dtype"])
    service = Service(llm, ServerSettings(folder=Path(job["folder"]), shelf=1 << 40), llm.identity)
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
