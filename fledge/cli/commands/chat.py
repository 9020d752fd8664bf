"""`fledge chat`: talk to a model, on a terminal or through a pipe. The conversation itself is `fledge.engine.Chat`."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from fledge.cli.options import ModelOptions, SamplingOptions, spread
from fledge.cli.terminal import SlowBar, remark

app = typer.Typer(name="chat", add_completion=False)


@app.command()
@spread
def chat(
    model: ModelOptions,
    sampling: SamplingOptions,
    system: Annotated[str | None, typer.Option(help="A system text, read before the conversation.")] = None,
    template: Annotated[
        str | None,
        typer.Option(
            help="How turns are written: world, instruct or qa. (default: as the model was tuned, else world)"
        ),
    ] = None,
) -> None:
    """Talk to a model: one line, one message.

    Lines that begin with a slash are commands (/help lists them). Ctrl-C ends an answer, Ctrl-D the conversation.
    From a pipe, standard output gets the answers, a blank line between them, and the first error ends the run.
    """
    llm = model.load()

    from fledge.cli.views.conversation import ChatSession
    from fledge.engine.llm.chat import CHAT_PARAMS

    with SlowBar("reading the system text"):
        talk = llm.chat(system=system, template=template, params=sampling.applied_to(CHAT_PARAMS))
    tuned = f" (tuned with {llm.template})" if llm.template not in (None, talk.template.name) else ""
    remark(
        f"{llm.name}: {llm.config.family}, {llm.weights} on {llm.device}, template {talk.template.name}{tuned}. "
        "/help lists commands"
    )
    ChatSession(talk, interactive=sys.stdin.isatty() and sys.stdout.isatty()).run()
