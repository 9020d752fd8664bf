"""An HTTP client over plain sockets. It parses a response only after it is complete, so it takes little CPU time."""

from __future__ import annotations

import json
import selectors
import socket
import time
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

from fledge.bench.measurement import JobResult
from fledge.core.errors import FledgeError


class ClientRequest:
    """One request on its own connection, with the data that was received and when."""

    def __init__(self, port: int, path: str, body: dict[str, Any]) -> None:
        self._path, self._streams = path, bool(body.get("stream"))
        self._chunks, self._times = list[bytes](), list[float]()
        data = json.dumps(body).encode()
        head = f"POST {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\ncontent-type: application/json\r\n"
        self.socket = socket.create_connection(("127.0.0.1", port))
        self.started = time.perf_counter()
        self.socket.sendall(f"{head}content-length: {len(data)}\r\n\r\n".encode() + data)

    def receive(self) -> bool:
        """Receive what is available. Return False at the end of the response."""
        data = self.socket.recv(1 << 20)
        self._times.append(time.perf_counter())
        self._chunks.append(data)
        return bool(data)

    def result(self) -> tuple[list[float], bytes]:
        """Return the time of each event, and the last event. Without streaming: the time of the end, and the last line.

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
        if last not in (b"data: [DONE]", b"0"):  # "0": the end of a chunked body
            raise FledgeError(f"a stream of {self._path} was cut off after {len(events)} events")
        return [now for now, _ in events], events[-1][1]

    def _lines(self) -> Iterator[tuple[float, bytes]]:
        """Every line with the time at which its end was received."""
        rest = b""
        for now, chunk in zip(self._times, self._chunks, strict=True):
            *complete, rest = (rest + chunk).split(b"\n")
            yield from ((now, line) for line in complete)
        yield self._times[-1], rest


def send_all(port: int, path: str, queues: Sequence[Sequence[dict[str, Any]]]) -> list[ClientRequest]:
    """Send the requests of each queue one after the other, and all queues concurrently."""
    requests, iterators = list[ClientRequest](), [iter(queue) for queue in queues]
    with selectors.DefaultSelector() as selector:

        def send_next(bodies: Iterator[dict[str, Any]]) -> None:
            if (body := next(bodies, None)) is not None:
                requests.append(ClientRequest(port, path, body))
                selector.register(requests[-1].socket, selectors.EVENT_READ, (requests[-1], bodies))

        for bodies in iterators:
            send_next(bodies)
        while selector.get_map():
            for key, _ in selector.select():
                request, bodies = key.data
                if not request.receive():
                    selector.unregister(request.socket)
                    request.socket.close()
                    send_next(bodies)
    return requests


def measure_load(job: dict[str, Any]) -> JobResult:
    """Send all requests with `clients` concurrent clients.

    Raises FledgeError if a response has fewer tokens than requested, because the rate counts all of them.
    """
    started, cpu_started = time.perf_counter(), time.process_time()
    queues = [job["bodies"][client :: job["clients"]] for client in range(job["clients"])]
    requests = send_all(job["port"], "/v1/completions", queues)
    seconds = time.perf_counter() - started
    cores = (time.process_time() - cpu_started) / seconds
    firsts, gaps, reasons = list[float](), list[float](), set[str]()
    for request in requests:
        times, last = request.result()
        reasons.add(str(json.loads(last)["choices"][0]["finish_reason"]))
        firsts.append(times[0] - request.started)
        gaps.extend(b - a for a, b in pairwise(times))
    if reasons != {"length"}:
        others = ", ".join(sorted(reasons - {"length"}))
        raise FledgeError(f"a response ended ({others}) before it had its {job['bodies'][0]['max_tokens']} tokens")
    return {"seconds": seconds, "first_s": firsts, "gaps_s": gaps, "client_cores": cores}


def measure_latency(job: dict[str, Any]) -> JobResult:
    """Send requests one after the other. Return the seconds to the first event of each, or to its end."""
    requests = send_all(job["port"], job.get("path", "/v1/completions"), [job["bodies"]])
    results = [request.result() for request in requests]
    seconds = [times[0] - request.started for request, (times, _) in zip(requests, results, strict=True)]
    return {"seconds": seconds, "last": results[-1][1].decode()}
