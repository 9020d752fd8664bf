"""Constraints on generated text: JSON that fits a schema, or a complete match of a regex, as masks over the tokens.

Before a token is sampled, a constraint returns the mask of allowed tokens (`token_mask`); afterwards `accept` advances
it. The package llguidance (extra `serve`) evaluates the grammars. It works on bytes: tokens that are parts of a UTF-8
character are allowed wherever the character is, and every tokenization of a text is accepted. If only one text can
follow, the mask allows only the tokens that the tokenizer itself would produce.

llguidance processes a schema recursively, and a schema that is too deep would crash the process. The limits here
therefore protect against crashes, not only against slow compilation. Grammars in its Lark language, whose depth is hard
to measure, are never accepted from users.
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
"""A longer schema takes seconds to compile."""

MAX_PATTERN_CHARACTERS = 8_192

MAX_SCHEMA_DEPTH = 600
"""JSON brackets around the innermost value, with the depths of all targets of `$ref` added. With a stack of 8 MB,
llguidance crashes the process from about 2000 levels on."""

JSON_SEPARATORS = {"whitespace_flexible": False, "item_separator": ", ?", "key_separator": ": ?"}
"""The white space in generated JSON. With more freedom, a small model may generate white space forever."""

EXCLUSIVE_BOUNDS = (
    ("exclusiveMinimum", ("maximum", "exclusiveMaximum"), 1),
    ("exclusiveMaximum", ("minimum", "exclusiveMinimum"), -1),
)
VALUE_KEYWORDS = ("const", "enum", "default", "examples")
"""Keywords whose content is a value, not a schema."""

SCHEMA_MAP_KEYWORDS = ("properties", "patternProperties", "dependentSchemas", "$defs", "definitions")
"""Keywords whose content maps names to schemas."""

MAX_MESSAGE_CHARACTERS = 200


class Constraint(Protocol):
    """A position in a text that must match a grammar. Used by one thread at a time."""

    def token_mask(self) -> Mask:
        """Which tokens may come next: (V,) bool. The end-of-text id is allowed exactly if `is_accepting`.

        Raises UsageError if the grammar turns out to be too expensive.
        """

    def accept(self, token: int) -> None:
        """Advance by a sampled token. The end-of-text id, allowed if `is_accepting`, changes nothing.

        Raises UsageError for a token that is not allowed. The constraint cannot be used after that.
        """

    def fork(self) -> Constraint:
        """An independent copy at the same position."""

    @property
    def is_accepting(self) -> bool:
        """Whether the text may end here."""

    @property
    def is_complete(self) -> bool:
        """Whether the text is complete and nothing can follow."""


class GrammarVocabulary:
    """The tokens of a tokenizer in the form of llguidance. Takes 0.3 s to create for World; threads may share it."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        library = _import_llguidance()
        self.size, self.eos_id = tokenizer.vocab_size, tokenizer.eos_id
        tokens = [tokenizer.decode_bytes([token]) for token in range(self.size)]
        if self.eos_id == NO_EOS:
            tokens.append(b"")  # llguidance needs an end-of-text id: one after all tokens of the mask
        source = library.TokenizerWrapper(_TokenizerAdapter(tokenizer, tokens))
        self.tokens = library.LLTokenizer(source, slices=library.LLTokenizer.json_slices())


class _TokenizerAdapter:
    """The interface that llguidance expects of a tokenizer."""

    bos_token_id = None

    def __init__(self, tokenizer: Tokenizer, tokens: list[bytes]) -> None:
        self.tokens = tokens
        self.eos_token_id = len(tokens) - 1 if tokenizer.eos_id == NO_EOS else tokenizer.eos_id
        self._tokenizer = tokenizer

    def __call__(self, text: str | bytes) -> list[int]:
        return self._tokenizer.encode(text)


class Grammar:
    """A Constraint that llguidance evaluates."""

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
            raise UsageError(f"the text cannot continue within its grammar: {_shorten(error)}")


def compile_json_schema(
    schema: dict[str, Any] | str, vocabulary: GrammarVocabulary, *, leading_space: bool = False
) -> Constraint:
    """JSON that fits `schema`, a JSON Schema (draft 2020-12) as a dict or as text.

    The JSON is one line, with at most one space after a comma or a colon, and properties in the order of the schema.
    Strings, arrays and objects without a limit may continue until the tokens run out.
    leading_space: whether one space may come first, as in answers of chat models after `Assistant:`.

    Raises UsageError for an invalid schema, keywords that cannot be enforced, a schema that is too large or too deep,
    and one that no text fits.
    """
    lead = '" "? ' if leading_space else ""
    return compile_grammar(f"start: {lead}%json {normalize_schema(schema)}", vocabulary, "JSON schema")


def compile_json_object(vocabulary: GrammarVocabulary, *, leading_space: bool = False) -> Constraint:
    """Any JSON object, in the form of `compile_json_schema`."""
    return compile_json_schema({"type": "object"}, vocabulary, leading_space=leading_space)


def compile_regex(pattern: str, vocabulary: GrammarVocabulary) -> Constraint:
    """A text that `pattern` matches completely. `.` matches no line break; no look-around, no back-references.

    Raises UsageError for a pattern that is invalid, too long, uses unsupported features, or matches nothing.
    """
    if len(pattern) > MAX_PATTERN_CHARACTERS:
        raise UsageError(f"the regex has {len(pattern)} characters; at most {MAX_PATTERN_CHARACTERS} are allowed")
    if any("\ud800" <= letter <= "\udfff" for letter in pattern):
        raise UsageError("the regex contains half of a surrogate pair; it must be valid Unicode")
    return compile_grammar(_import_llguidance().LLMatcher.grammar_from_regex(pattern), vocabulary, "regex")


def compile_grammar(source: str, vocabulary: GrammarVocabulary, what: str) -> Constraint:
    """The constraint of a grammar in llguidance's Lark language. what: its name in the UsageError that it may raise.

    Not for grammars from users: a long chain of rules crashes the process.
    """
    library = _import_llguidance()
    limits = library.LLParserLimits(verbose_errors=False)
    matcher = library.LLMatcher(vocabulary.tokens, source, log_level=0, limits=limits)
    start = Grammar(vocabulary, matcher)
    matcher.compute_bitmask()  # detects a grammar that no text fits
    error = matcher.get_error()
    if error and not error.startswith("NoExtension"):
        raise UsageError(f"the {what} cannot be used: {_shorten(error)}")
    if error or not (np.flatnonzero(start.token_mask()) != vocabulary.eos_id).any():
        raise UsageError(f"no text, or only the empty one, fits the {what}")
    return start


def normalize_schema(schema: dict[str, Any] | str, what: str = "JSON schema") -> str:
    """The JSON text of a schema for llguidance, with JSON_SEPARATORS. Raises UsageError as `compile_json_schema`."""
    try:
        text = schema if isinstance(schema, str) else json.dumps(schema, ensure_ascii=False)
        if len(text) > MAX_SCHEMA_CHARACTERS:
            raise UsageError(f"the {what} has {len(text)} characters; at most {MAX_SCHEMA_CHARACTERS} are allowed")
        record = json.loads(text)
        if not isinstance(record, dict):
            raise UsageError(f"the {what} is {_shorten(text)}; it must be a JSON object")
        _narrow_bounds(record)
        text = json.dumps({**record, "x-guidance": JSON_SEPARATORS}, ensure_ascii=False)
        text.encode()
    except RecursionError:
        raise UsageError(f"the {what} is nested too deeply; at most {MAX_SCHEMA_DEPTH} levels are allowed") from None
    except (TypeError, ValueError) as error:
        raise UsageError(f"the {what} is not JSON: {_shorten(str(error))}") from None
    if (depth := _total_depth(record)) > MAX_SCHEMA_DEPTH:
        raise UsageError(
            f"the {what} is nested too deeply: {depth} levels including the targets of each $ref; "
            f"at most {MAX_SCHEMA_DEPTH} are allowed"
        )
    return text


def _narrow_bounds(record: dict[str, Any]) -> None:
    """Exclude integers at exclusive bounds: llguidance (1.9) allows 2 for a number above 2 and below 2.5.

    It does so if the other bound is less than 1 away. Then the exclusive bound moves by a millionth of the distance.
    """
    for schema in _iterate_schemas(record):
        for name, others, side in EXCLUSIVE_BOUNDS:
            bound: Any = schema.get(name)
            distances = [
                side * (schema[other] - bound)
                for other in others
                if _is_moderate_number(bound) and _is_moderate_number(schema.get(other))
            ]
            if distances and bound == int(bound) and 0 < min(distances) < 1:
                moved = bound + side * min(distances) * 1e-6
                schema[name] = moved if moved != bound else math.nextafter(bound, side * math.inf)


def _iterate_schemas(record: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """A schema and all schemas in it, without recursion. Values that look like schemas are not included."""
    waiting: list[Any] = [record]
    while waiting:
        schema = waiting.pop()
        if isinstance(schema, list):
            waiting.extend(schema)
        elif isinstance(schema, dict):
            yield schema
            for key, inner in schema.items():
                is_map = key in SCHEMA_MAP_KEYWORDS and isinstance(inner, dict)
                waiting.extend(inner.values() if is_map else [] if key in VALUE_KEYWORDS else [inner])


def _is_moderate_number(value: Any) -> bool:
    """Whether a value is a number small enough that a float can represent its neighbors."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1 << 50


def _total_depth(record: dict[str, Any]) -> int:
    """The depth of the schema plus those of all targets of references: an upper bound for any path through them."""
    inner = [value for value, _ in _walk(record) if isinstance(value, dict)]
    names = [value["$ref"] for value in inner if isinstance(value.get("$ref"), str)]
    if any("$id" in value for value in inner[1:]):  # then one name may have several targets
        return _depth(record) * (1 + len(names))
    return _depth(record) + sum(_depth(_resolve_reference(record, name)) for name in set(names))


def _depth(value: Any) -> int:
    return max(level for _, level in _walk(value))


def _walk(value: Any) -> Iterator[tuple[Any, int]]:
    """`value` and every value in it, each with the number of brackets around it, without recursion."""
    waiting = [(value, 0)]
    while waiting:
        value, level = waiting.pop()
        yield value, level
        if isinstance(value, (dict, list)):
            inner = value.values() if isinstance(value, dict) else value
            waiting.extend((item, level + 1) for item in inner)


def _resolve_reference(record: dict[str, Any], name: str) -> Any:
    """The target of a `$ref`; the whole schema if the reference is not a plain path from the root."""
    if not name.startswith("#/"):
        return record
    target: Any = record
    for step in name[2:].split("/"):
        key = unquote(step).replace("~1", "/").replace("~0", "~")
        if isinstance(target, dict) and key in target:
            target = target[key]
        elif isinstance(target, list) and key.isdecimal() and int(key) < len(target):
            target = target[int(key)]
        else:
            return record
    return target


def _shorten(message: str) -> str:
    """The line of a message of llguidance that describes the error."""
    lines = [line.strip() for line in message.splitlines()] or [""]
    line = next((line[7:] for line in lines if line.startswith("error: ")), lines[0])
    line = re.sub(r"^(at )?\d+\(\d+\): (invalid regex .* \(in regex\): |failed to compile JSON schema: )?", "", line)
    line = line.partition("; either increase")[0]  # the rest is advice about limits that users cannot change
    if line.startswith("oneOf constraints are not supported"):
        return "oneOf is not supported; use anyOf"
    return line if len(line) <= MAX_MESSAGE_CHARACTERS else line[:MAX_MESSAGE_CHARACTERS] + "..."


def _import_llguidance() -> ModuleType:
    try:
        import llguidance
    except ImportError:
        raise UsageError('structured output needs the package llguidance: pip install "fledge[serve]"') from None
    module: ModuleType = llguidance
    return module
