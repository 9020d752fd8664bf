"""Shared options: what help says of defaults is true, and every sampling setting has its option."""

from __future__ import annotations

import dataclasses
import re
from typing import Annotated, Any, get_type_hints

import typer
from typer.testing import CliRunner

from fledge.cli.options import SamplingOptions, spread
from fledge.engine import SamplingParams
from fledge.engine.llm.chat import CHAT_PARAMS


def _help_of(name: str) -> str:
    annotation: Any = get_type_hints(SamplingOptions, include_extras=True)[name]
    return str(annotation.__metadata__[0].help)


def test_every_setting_has_an_option() -> None:
    settings = {field.name for field in dataclasses.fields(SamplingParams)}
    assert {field.name for field in dataclasses.fields(SamplingOptions)} == settings - {"ban"}


def test_help_shows_the_actual_defaults() -> None:
    told = 0
    for field in dataclasses.fields(SamplingOptions):
        generate, chat = getattr(SamplingParams(), field.name), getattr(CHAT_PARAMS, field.name)
        if both := re.search(r"\(generate ([\d.]+), chat ([\d.]+)\)", _help_of(field.name)):
            assert (float(both[1]), float(both[2])) == (generate, chat), field.name
            told += 1
        elif one := re.search(r"\(default: ([\d.]+)\)", _help_of(field.name)):
            assert float(one[1]) == generate == chat, field.name
            told += 1
    assert told == 7  # all but the seed and the stop texts


def test_only_what_is_given_is_changed() -> None:
    given = SamplingOptions(top_k=3, stop=["a", "b"])
    assert given.apply_to(CHAT_PARAMS) == dataclasses.replace(CHAT_PARAMS, top_k=3, stop=("a", "b"))
    assert SamplingOptions(stop=[]).apply_to(SamplingParams()) == SamplingParams()


@dataclasses.dataclass(frozen=True)
class Size:
    width: Annotated[int, typer.Option(help="across")] = 2
    height: Annotated[int | None, typer.Option()] = None


def test_spread_makes_an_option_of_each_field() -> None:
    seen: list[Any] = []
    app = typer.Typer()

    @app.command()
    @spread
    def draw(size: Size, name: str, loud: bool = False) -> None:
        """Draw."""
        seen.append((size, name, loud))

    run = CliRunner().invoke(app, ["a name", "--height", "5", "--loud"])
    assert run.exit_code == 0 and seen == [(Size(2, 5), "a name", True)]
    assert CliRunner().invoke(app, ["a", "--width", "x"]).exit_code == 2
