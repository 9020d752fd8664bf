"""`fledge bench`: speed and quality on this machine, with other programs in the same run where they are installed."""

from __future__ import annotations

import typer

from fledge.cli import bench_cpu, bench_embeddings, bench_plot, bench_quality, bench_serve, bench_tokenizer, bench_train

app = typer.Typer(name="bench", add_completion=False)


@app.callback()
def bench() -> None:
    """Measure speed, memory and quality on this machine."""


app.command()(bench_cpu.cpu)
app.command()(bench_train.train)
app.command()(bench_serve.serve)
app.command()(bench_plot.plot)
app.command()(bench_tokenizer.tokenizer)
app.command()(bench_quality.quality)
app.command()(bench_embeddings.embeddings)
