"""What a text may become: JSON that fits a schema, or a whole match of a regex, as the tokens that may come next.

A constraint stands beside a sampler: before a draw it says which tokens may come (`mask`), after it it is told which
came (`accept`). The grammars are the work of the package llguidance (extra `serve`), which knows bytes: tokens that are
parts of UTF-8 letters are allowed where the letter is, and every way of cutting a text into tokens is accepted. Where
only one text can follow, the mask offers the tokens that the tokenizer itself would cut it into.

llguidance goes down a schema by recursion, and a schema that is too deep would end the whole process. So the limits
here are not only for speed, and grammars in its Lark language, where depth is not so easily measured, are taken from
nobody but ourselves.

Not here: the draw (`sampling.py`), tool calls (`tools.py`), ends of texts by length or stop text.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from types import ModuleType
from typing import Any, Protocol
from urllib.parse import unquote

import numpy as np
import numpy.typing as npt

from fledge.core.errors import UsageError
from fledge.tokenizer import NO_EOS, Tokenizer

Mask = npt.NDArray[np.bool_]

MAX_SCHEMA_CHARACTERS = 65_536
"""More than this takes seconds to compile."""

MAX_PATTERN_CHARACTERS = 8_192

MAX_SCHEMA_DEPTH = 600
"""JSON brackets around the innermost value, those of everything that `$ref` names put together. On a stack of 8 MB
llguidance ends the process from about 2000 such levels."""

SEPARATORS = {"whitespace_flexible": False, "item_separator": ", ?", "key_separator": ": ?"}
"""How JSON is written. More white space than this a small model may go on writing for ever."""

BOUNDS = (
    ("exclusiveMinimum", ("maximum", "exclusiveMaximum"), 1),
    ("exclusiveMaximum", ("minimum", "exclusiveMinimum"), -1),
)
LITERAL = ("const", "enum", "default", "examples")
"""Keywords that hold values, not schemas."""

NAMED = ("properties", "patternProperties", "dependentSchemas", "$defs", "definitions")
"""Keywords that hold schemas by name."""

MAX_MESSAGE_CHARACTERS = 200


class Constraint(Protocol):
    """A place in a text that is bound to a grammar. Used by one thread at a time."""

    def token_mask(self) -> Mask:
        """Which tokens may come next: (V,) bool. The end-of-text id is among them exactly where `may_end`.

        Raises UsageError where the grammar turns out to be too costly to follow.
        """

    def accept(self, token: int) -> None:
        """Go on by a drawn token. The end-of-text id, allowed where `may_end`, changes nothing.

        Raises UsageError for a token that cannot come here; such a constraint is of no more use.
        """

    def fork(self) -> Constraint:
        """An independent constraint at the same place."""

    @property
    def is_accepting(self) -> bool:
        """Whether the text is whole if it ends here."""

    @property
    def is_complete(self) -> bool:
        """Whether the text is whole and nothing can follow."""


class GrammarVocabulary:
    """The tokens of a tokenizer as llguidance wants them. Made once (0.3 s for World), and shared by all threads."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        library = _library()
        self.size, self.eos_id = tokenizer.vocab_size, tokenizer.eos_id
        tokens = [tokenizer.decode_bytes([token]) for token in range(self.size)]
        if self.eos_id == NO_EOS:
            tokens.append(b"")  # llguidance needs an end: a token beyond all masks
        source = library.TokenizerWrapper(_Tokens(tokenizer, tokens))
        self.tokens = library.LLTokenizer(source, slices=library.LLTokenizer.json_slices())


class _Tokens:
    """What llguidance asks of a tokenizer."""

    bos_token_id = None

    def __init__(self, tokenizer: Tokenizer, tokens: list[bytes]) -> None:
        self.tokens = tokens
        self.eos_token_id = len(tokens) - 1 if tokenizer.eos_id == NO_EOS else tokenizer.eos_id
        self._tokenizer = tokenizer

    def __call__(self, text: str | bytes) -> list[int]:
        return self._tokenizer.encode(text)


class Grammar:
    """The Constraint of a grammar that llguidance follows."""

    def __init__(self, vocabulary: GrammarVocabulary, matcher: Any) -> None:
        self._vocabulary, self._matcher = vocabulary, matcher

    def token_mask(self) -> Mask:
        packed = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        self._check()
        return np.unpackbits(packed, count=self._vocabulary.size, bitorder="little").view(np.bool_)

    def accept(self, token: int) -> None:
        if token != self._vocabulary.eos_id or not self.is_accepting:
            self._matcher.consume_token(token)
            self._check()

    def fork(self) -> Grammar:
        return Grammar(self._vocabulary, self._matcher.deep_copy())

    @property
    def is_accepting(self) -> bool:
        return bool(self._matcher.is_accepting())

    @property
    def is_complete(self) -> bool:
        return bool(self._matcher.is_stopped()) and self.is_accepting

    def _check(self) -> None:
        if error := self._matcher.get_error():
            raise UsageError(f"the text cannot go on within its grammar: {_short(error)}")


def compile_json_schema(
    schema: dict[str, Any] | str, vocabulary: GrammarVocabulary, *, leading_space: bool = False
) -> Constraint:
    """JSON that fits `schema`, a JSON Schema (draft 2020-12) or its text.

    Written on one line, with at most one space after a comma or a colon, properties in the order of the schema.
    Strings, arrays and objects without a bound may go on until the tokens run out.
    space: whether one space may come first, as the answers of chat models begin after `Assistant:`.

    Raises UsageError for what is no schema, has keywords that cannot be enforced, is too large or too deep, or fits
    nothing.
    """
    lead = '" "? ' if leading_space else ""
    return compile_grammar(f"start: {lead}%json {normalize_schema(schema)}", vocabulary, "JSON schema")


def compile_json_object(vocabulary: GrammarVocabulary, *, leading_space: bool = False) -> Constraint:
    """Any JSON object, written as in `json_schema`."""
    return compile_json_schema({"type": "object"}, vocabulary, leading_space=leading_space)


def compile_regex(pattern: str, vocabulary: GrammarVocabulary) -> Constraint:
    """A text that `pattern` matches as a whole. `.` stands for no line break; no look-around, no back-references.

    Raises UsageError for a pattern that is none, is too long, needs what is not there, or matches nothing.
    """
    if len(pattern) > MAX_PATTERN_CHARACTERS:
        raise UsageError(f"the regex has {len(pattern)} characters; at most {MAX_PATTERN_CHARACTERS} are taken")
    if any("\ud800" <= letter <= "\udfff" for letter in pattern):
        raise UsageError("the regex holds half of a surrogate pair; write it in valid Unicode")
    return compile_grammar(_library().LLMatcher.grammar_from_regex(pattern), vocabulary, "regex")


def compile_grammar(source: str, vocabulary: GrammarVocabulary, what: str) -> Constraint:
    """The constraint of a grammar in llguidance's Lark language, called `what` in the UsageError it may raise.

    Not for grammars of users: a long chain of rules ends the process.
    """
    library = _library()
    limits = library.LLParserLimits(verbose_errors=False)
    matcher = library.LLMatcher(vocabulary.tokens, source, log_level=0, limits=limits)
    start = Grammar(vocabulary, matcher)
    matcher.compute_bitmask()  # finds what fits nothing
    error = matcher.get_error()
    if error and not error.startswith("NoExtension"):
        raise UsageError(f"the {what} cannot be used: {_short(error)}")
    if error or not (np.flatnonzero(start.token_mask()) != vocabulary.eos_id).any():
        raise UsageError(f"no text, or only the empty one, fits the {what}")
    return start


def normalize_schema(schema: dict[str, Any] | str, what: str = "JSON schema") -> str:
    """A schema as the JSON text that llguidance is given, with our white space. Raises UsageError, as `json_schema`."""
    try:
        text = schema if isinstance(schema, str) else json.dumps(schema, ensure_ascii=False)
        if len(text) > MAX_SCHEMA_CHARACTERS:
            raise UsageError(f"the {what} has {len(text)} characters; at most {MAX_SCHEMA_CHARACTERS} are taken")
        record = json.loads(text)
        if not isinstance(record, dict):
            raise UsageError(f"the {what} is {_short(text)}; it must be a JSON object")
        _narrow(record)
        text = json.dumps({**record, "x-guidance": SEPARATORS}, ensure_ascii=False)
        text.encode()
    except RecursionError:
        raise UsageError(f"the {what} is nested too deeply; at most {MAX_SCHEMA_DEPTH} levels are taken") from None
    except (TypeError, ValueError) as error:
        raise UsageError(f"the {what} is not JSON: {_short(str(error))}") from None
    if (levels := _levels(record)) > MAX_SCHEMA_DEPTH:
        raise UsageError(
            f"the {what} is nested too deeply: {levels} levels with what each $ref names; "
            f"at most {MAX_SCHEMA_DEPTH} are taken"
        )
    return text


def _narrow(record: dict[str, Any]) -> None:
    """Keep out whole numbers that are excluded: llguidance (1.9) takes 2 for a number above 2 and below 2.5.

    It does so where the other bound is less than 1 away. There the excluded one moves by a millionth of the way to it.
    """
    for schema in _schemas(record):
        for name, others, side in BOUNDS:
            bound: Any = schema.get(name)
            ways = [side * (schema[other] - bound) for other in others if _number(bound) and _number(schema.get(other))]
            if ways and bound == int(bound) and 0 < min(ways) < 1:
                moved = bound + side * min(ways) * 1e-6
                schema[name] = moved if moved != bound else math.nextafter(bound, side * math.inf)


def _schemas(record: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """A schema and all inside it, without recursion; not what only looks like one, being a value."""
    waiting: list[Any] = [record]
    while waiting:
        schema = waiting.pop()
        if isinstance(schema, list):
            waiting.extend(schema)
        elif isinstance(schema, dict):
            yield schema
            for key, inner in schema.items():
                named = key in NAMED and isinstance(inner, dict)
                waiting.extend(inner.values() if named else [] if key in LITERAL else [inner])


def _number(value: Any) -> bool:
    """Whether it is one that a float can hold with room for what lies beside it."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1 << 50


def _levels(record: dict[str, Any]) -> int:
    """The levels of the whole and of everything that is referred to: no way through the references is longer."""
    inner = [value for value, _ in _walk(record) if isinstance(value, dict)]
    names = [value["$ref"] for value in inner if isinstance(value.get("$ref"), str)]
    if any("$id" in value for value in inner[1:]):  # one name may then stand for several things
        return _depth(record) * (1 + len(names))
    return _depth(record) + sum(_depth(_target(record, name)) for name in set(names))


def _depth(value: Any) -> int:
    return max(level for _, level in _walk(value))


def _walk(value: Any) -> Iterator[tuple[Any, int]]:
    """Every value inside `value` with the number of brackets around it, itself the first, without recursion."""
    waiting = [(value, 0)]
    while waiting:
        value, level = waiting.pop()
        yield value, level
        if isinstance(value, (dict, list)):
            inner = value.values() if isinstance(value, dict) else value
            waiting.extend((item, level + 1) for item in inner)


def _target(record: dict[str, Any], name: str) -> Any:
    """What a `$ref` names; the whole where it is not a plain path from the root."""
    if not name.startswith("#/"):
        return record
    found: Any = record
    for step in name[2:].split("/"):
        key = unquote(step).replace("~1", "/").replace("~0", "~")
        if isinstance(found, dict) and key in found:
            found = found[key]
        elif isinstance(found, list) and key.isdecimal() and int(key) < len(found):
            found = found[int(key)]
        else:
            return record
    return found


def _short(message: str) -> str:
    """The one line of a message of llguidance that says what is wrong."""
    lines = [line.strip() for line in message.splitlines()] or [""]
    line = next((line[7:] for line in lines if line.startswith("error: ")), lines[0])
    line = re.sub(r"^(at )?\d+\(\d+\): (invalid regex .* \(in regex\): |failed to compile JSON schema: )?", "", line)
    line = line.partition("; either increase")[0]  # what follows is advice about limits that are ours to set
    if line.startswith("oneOf constraints are not supported"):
        return "oneOf is not supported; use anyOf"
    return line if len(line) <= MAX_MESSAGE_CHARACTERS else line[:MAX_MESSAGE_CHARACTERS] + "..."


def _library() -> ModuleType:
    try:
        import llguidance
    except ImportError:
        raise UsageError('structured output needs the package llguidance: pip install "fledge[serve]"') from None
    module: ModuleType = llguidance
    return module
