"""`fledge bench`: speed, memory and quality on this machine, with installed baselines in the same run."""

from __future__ import annotations

import typer

from fledge.cli.bench import cpu, embeddings, plot, quality, serve, tokenizer, train

app = typer.Typer(name="bench", add_completion=False)


@app.callback()
def bench() -> None:
    """Measure speed, memory and quality on this machine."""


app.command()(cpu.cpu)
app.command()(train.train)
app.command()(serve.serve)
app.command()(plot.plot)
app.command()(tokenizer.tokenizer)
app.command()(quality.quality)
app.command()(embeddings.embeddings)
