"""The plot of `fledge bench cpu`: tokens per second of every program, and the rates that the machine's limits allow.

There is one row per model. The columns are prefill, decoding one text and decoding a batch. Bars are grouped by width.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fledge.bench.plot_renderer import BLUE, GREEN, ORANGE, Panel, Plot, Series, describe_machine

COLORS = {"fledge": ORANGE, "llama.cpp": BLUE, "rwkv": GREEN}


def plot_cpu(record: Mapping[str, Any]) -> Plot:
    """Return the plot of a record."""
    settings, repeats = record["settings"], record["settings"]["repeats"]
    titles = {"prefill": f"prefill, {settings['prompt']} tokens", "decode": "decode, one text"}
    if settings["batch"] > 1:
        titles["batch"] = f"decode, batch of {settings['batch']}"
    versions = {name: f"{peer['package']} {peer['version']}" for name, peer in record["peers"].items()}
    versions["fledge"] = record["machine"]["commit"] or record["machine"]["fledge"]
    caption = (
        f"{describe_machine(record, record['threads'])}. Bars: median of {repeats}, lines: extremes. "
        "llama.cpp int8 is Q8_0, int4 is Q4_0; rwkv: the better of JIT on and off."
    )
    rows = list[list[Panel]]()
    for number, block in enumerate(record["models"]):
        label = f"{_model_label(block['model'])}\ntokens/s"
        panels = list[Panel]()
        for key, title in titles.items():
            series, limits = collect_series(block, key, versions)
            panels.append(Panel(series, "" if number else title, y_label="" if panels else label, limits=limits))
        rows.append(panels)
    return Plot(rows, caption, (4.6, 3.1), bars=True, limit_label="what this machine's limits allow Fledge")


def collect_series(
    block: Mapping[str, Any], key: str, versions: Mapping[str, str]
) -> tuple[list[Series], dict[str, float]]:
    """Return a series for each program, and the limit of each width, over the widths of Fledge.

    Of `rwkv` with and without JIT, the faster one is shown.
    """
    cases = [case for case in block["figures"].values() if "error" not in case]
    own = {case["width"]: case for case in cases if case["program"] == "fledge"}
    points: dict[str, dict[str, Any]] = {program: {} for program in COLORS}
    for width in own:
        for case in cases:
            summary, program = case[f"{key}_tokens_per_s"], case["program"].removesuffix(" jit")
            if case["width"] == width and summary:
                best = points[program].get(width, summary)
                points[program][width] = max(best, summary, key=lambda one: one["median"])
    series = [
        Series(f"{program} ({versions.get(program)})", COLORS[program], values)
        for program, values in points.items()
        if values
    ]
    ceilings = {width: case["ceilings_tokens_per_s"][key] for width, case in own.items()}
    return series, {width: ceiling for width, ceiling in ceilings.items() if ceiling}


def _model_label(model: Mapping[str, Any]) -> str:
    size = model["parameters"]
    number = f"{size / 1e9:.1f}B" if size >= 0.95e9 else f"{size / 1e6:.0f}M"
    return f"{model['family'].split()[-1]} {number}, {model['name']}"
