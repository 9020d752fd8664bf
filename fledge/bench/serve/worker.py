"""One measurement of `fledge bench serve` in its own process: clients, the engine alone, or a filled state store.

python -m fledge.bench.serve.worker job.json
"""

from __future__ import annotations

import gc
import random
import time
from pathlib import Path
from typing import Any

from fledge.bench.measurement import JobResult, run_worker
from fledge.bench.serve.client import measure_latency, measure_load
from fledge.core.machine import resident_memory

OWNER = "everybody"
STORE_BYTES = 1 << 40  # no state is evicted


def measure_engine(job: dict[str, Any]) -> JobResult:
    """Run the requests of a load through Engine.step alone, without detokenizing."""
    from fledge.engine.engine import Engine
    from fledge.engine.llm.loading import load
    from fledge.engine.request import Request
    from fledge.engine.sampling import SamplingParams

    llm = load(job["model"], dtype=job["dtype"])

    def run_requests(bodies: list[dict[str, Any]], clients: int) -> float:
        engine, waiting = Engine(llm.model, eos_id=llm.tokenizer.eos_id), list(bodies)
        started = time.perf_counter()
        while waiting or engine.busy:
            while waiting and engine.num_waiting + engine.num_running < clients:
                body = waiting.pop(0)
                ban = tuple(body["fledge"]["ban"])
                params = SamplingParams(seed=body["seed"], max_tokens=body["max_tokens"], ban=ban)
                engine.add(Request(tuple(body["prompt"]), params))
            engine.step()
        return time.perf_counter() - started

    # A warm-up, as for the server: the first batch of a size allocates memory.
    run_requests(job["bodies"][: job["clients"]], job["clients"])
    gc.collect()
    gc.freeze()  # as the server does
    return {"seconds": run_requests(job["bodies"], job["clients"])}


def fill_state_store(job: dict[str, Any]) -> JobResult:
    """Fill the state store of a server with different states. Measure loading, memory, and bytes on disk."""
    import torch

    from fledge.engine.llm.loading import load
    from fledge.server.auth import Tenant
    from fledge.server.service import Service
    from fledge.server.settings import ServerSettings

    llm = load(job["model"], dtype=job["dtype"])
    service = Service(llm, ServerSettings(folder=Path(job["folder"]), state_storage=STORE_BYTES), llm.identity)
    store, tenant, metadata = service.require_state_store(), Tenant(OWNER), service.make_metadata(1, None)
    owner, before = service.get_owner(tenant), resident_memory()
    ids, started = list[str](), time.perf_counter()
    for number in range(job["states"]):
        state = service.initial_state.clone()
        generator = torch.Generator().manual_seed(number)
        for tensor in state.tensors().values():
            tensor.copy_(0.1 * torch.randn(tensor.shape, generator=generator))
        ids.append(store.put(owner, state, metadata))
    fill_seconds, after = time.perf_counter() - started, resident_memory()
    chosen, get_seconds = random.Random(0).sample(ids, min(job["resumed"], len(ids))), list[float]()
    for id in chosen:
        started = time.perf_counter()
        store.get(owner, id)
        get_seconds.append(time.perf_counter() - started)
    return {
        "fill_s": fill_seconds,
        "get_s": get_seconds,
        "before_bytes": before,
        "after_bytes": after,
        "disk_bytes": sum(file.stat().st_size for file in Path(job["folder"]).rglob("*") if file.is_file()),
        "handles": [service.make_handle(tenant, id) for id in chosen],
        "state_bytes": state.nbytes,
    }


KINDS = {
    "load": measure_load,
    "latency": measure_latency,
    "engine": measure_engine,
    "fill": fill_state_store,
}

if __name__ == "__main__":
    run_worker(lambda job: KINDS[job["kind"]](job))
