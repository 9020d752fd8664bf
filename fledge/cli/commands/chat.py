"""`fledge chat`: chat with a model, on a terminal or through a pipe."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from fledge.cli.options import ModelOptions, SamplingOptions, spread
from fledge.cli.terminal import SlowBar, print_terminal_note

app = typer.Typer(name="chat", add_completion=False)


@app.command()
@spread
def chat(
    model: ModelOptions,
    sampling: SamplingOptions,
    system: Annotated[str | None, typer.Option(help="A system prompt.")] = None,
    template: Annotated[
        str | None,
        typer.Option(help="Chat template: world, instruct or qa. (default: that of the model, else world)"),
    ] = None,
) -> None:
    """Chat with a model. Each line is a message.

    Lines that begin with a slash are commands (/help lists them). Ctrl-C ends an answer, Ctrl-D ends the conversation.
    In a pipe, standard output gets the answers, separated by blank lines, and the first error ends the command.
    """
    llm = model.load()

    from fledge.cli.views.conversation import ChatSession
    from fledge.engine.llm.chat import CHAT_PARAMS

    with SlowBar("reading the system prompt"):
        conversation = llm.chat(system=system, template=template, params=sampling.apply_to(CHAT_PARAMS))
    tuned = f" (tuned with {llm.template})" if llm.template not in (None, conversation.template.name) else ""
    print_terminal_note(
        f"{llm.name}: {llm.config.family}, {llm.weights} on {llm.device}, "
        f"template {conversation.template.name}{tuned}. "
        "/help lists commands"
    )
    ChatSession(conversation, interactive=sys.stdin.isatty() and sys.stdout.isatty()).run()
