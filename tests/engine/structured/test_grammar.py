"""Structured output: texts sampled from random logits must fit the schema or the regex, for any tokenizer."""

from __future__ import annotations

import json
import re
import sys
from functools import lru_cache
from typing import Any

import numpy as np
import pytest
import torch
from fakes import ByteTokenizer

from fledge.core.errors import UsageError
from fledge.engine.sampling import Sampler, SamplingParams
from fledge.engine.structured.grammar import (
    MAX_PATTERN_CHARACTERS,
    MAX_SCHEMA_CHARACTERS,
    Constraint,
    GrammarVocabulary,
    compile_json_object,
    compile_json_schema,
    compile_regex,
)
from fledge.tokenizer import NO_EOS, Tokenizer, load_world, prune, tokenizer_for, world_vocabulary

pytest.importorskip("llguidance", reason="needs llguidance")

WORLD, BYTES, PRUNED = "World", "bytes and words", "pruned, with reserved rows"


@lru_cache
def tokenizer_called(name: str) -> Tokenizer:
    if name == BYTES:
        return ByteTokenizer('{"', '":', '", "', "na", "日", b"\xe6\x97", "true}", "00", " ")
    if name == PRUNED:
        return tokenizer_for(prune(world_vocabulary(), range(300, 600), size=571))
    return load_world()


@lru_cache
def vocabulary_of(name: str) -> GrammarVocabulary:
    return GrammarVocabulary(tokenizer_called(name))


def generate(constraint: Constraint, name: str, seed: int) -> str:
    """A text sampled from random logits until the constraint ends."""
    tokenizer = tokenizer_called(name)
    sampler, random = Sampler(SamplingParams(top_p=1.0, seed=seed)), torch.Generator().manual_seed(seed)
    ids = list[int]()
    while not constraint.is_complete:
        allowed = constraint.token_mask()
        assert allowed.shape == (tokenizer.vocab_size,) and allowed[tokenizer.eos_id] == constraint.is_accepting
        token = sampler.sample(torch.randn(tokenizer.vocab_size, generator=random), allowed)
        constraint.accept(token)
        if token == tokenizer.eos_id:
            break
        ids.append(token)
        assert len(ids) < 1_000
    assert constraint.is_accepting
    return tokenizer.decode_bytes(ids).decode()


PETS = ["日本語", "🙂🙃", 'quo"ted', "Käse", 7, None]
PERSON: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 2, "maxLength": 9},
        "age": {"type": "integer", "minimum": 3, "maximum": 150},
        "pets": {"type": "array", "items": {"enum": PETS}, "minItems": 1, "maxItems": 3},
        "deep": {"$ref": "#/$defs/deep"},
        "// not a comment": {"type": "boolean"},
    },
    "required": ["name", "age", "pets", "deep"],
    "additionalProperties": False,
    "$defs": {
        "deep": {
            "type": "object",
            "properties": {"ok": {"type": "boolean"}, "code": {"type": "string", "pattern": "^[a-c]{2}-[0-9]$"}},
            "required": ["ok", "code"],
            "additionalProperties": False,
        }
    },
}


def check_person(person: Any) -> None:
    assert list(person)[:4] == ["name", "age", "pets", "deep"] and set(person) <= set(PERSON["properties"])
    assert isinstance(person["name"], str) and 2 <= len(person["name"]) <= 9
    assert type(person["age"]) is int and 3 <= person["age"] <= 150
    assert 1 <= len(person["pets"]) <= 3 and all(pet in PETS for pet in person["pets"])
    assert list(person["deep"]) == ["ok", "code"] and type(person["deep"]["ok"]) is bool
    assert re.fullmatch("[a-c]{2}-[0-9]", person["deep"]["code"])
    assert type(person.get("// not a comment", True)) is bool


@pytest.mark.parametrize("name, samples", [(WORLD, 50), (BYTES, 50), (PRUNED, 10)])
def test_generated_text_fits_the_schema(name: str, samples: int) -> None:
    start, texts = compile_json_schema(PERSON, vocabulary_of(name)), list[str]()
    for seed in range(samples):
        text = generate(start.fork(), name, seed)
        check_person(json.loads(text))
        assert "\n" not in text and not re.search('[:,] ["\\[{]? {2}', text)
        texts.append(text)
    assert len(set(texts)) == samples
    assert {'": ', '":'} == {match for text in texts for match in re.findall('":(?: |(?! ))', text)}


@pytest.mark.parametrize("name", [WORLD, BYTES])
def test_tokens_may_be_parts_of_a_character(name: str) -> None:
    """Every value is reached, even if a token is a part of a UTF-8 character."""
    start = compile_json_schema({"enum": ["日本", "日曜", "🙂", "🙃"]}, vocabulary_of(name))
    assert {json.loads(generate(start.fork(), name, seed)) for seed in range(50)} == {"日本", "日曜", "🙂", "🙃"}


@pytest.mark.parametrize(
    "pattern",
    [
        r"(\+[0-9]{2,3} )?[0-9]{3}-[0-9]{4}( north| Süd| 北🙂)?",
        "^[a-f]{1,9}$",
        "a/b|c\nd|\"e'",
        r"[^x]{3}",
        r"(ab?){2,4}",
    ],
)
@pytest.mark.parametrize("name", [WORLD, BYTES])
def test_generated_text_matches_the_regex(name: str, pattern: str) -> None:
    start = compile_regex(pattern, vocabulary_of(name))
    assert not start.is_accepting and not start.is_complete
    texts = [generate(start.fork(), name, seed) for seed in range(20)]
    assert all(re.fullmatch(pattern, text) for text in texts) and len(set(texts)) > 2


def test_every_tokenization_is_accepted() -> None:
    text = b'{"kind": "\xe6\x97\xa5"}'
    schema = {
        "type": "object",
        "properties": {"kind": {"const": "日"}},
        "required": ["kind"],
        "additionalProperties": False,
    }
    tokenizer = tokenizer_called(WORLD)
    longest = tokenizer.encode(text)
    single = [tokenizer.encode(text[index : index + 1])[0] for index in range(len(text))]
    assert len(longest) < len(single)
    for ids in (longest, single):
        constraint = compile_json_schema(schema, vocabulary_of(WORLD))
        for index, token in enumerate(ids):
            assert not constraint.is_accepting and not constraint.is_complete
            constraint.accept(token)
            assert constraint.is_complete == (index == len(ids) - 1)
        assert np.flatnonzero(constraint.token_mask()).tolist() == [tokenizer.eos_id]
        constraint.accept(tokenizer.eos_id)
        assert constraint.is_complete and constraint.is_accepting


def accepts(constraint: Constraint, text: str) -> bool:
    """Whether the constraint allows `text`."""
    tokenizer, fork = tokenizer_called(WORLD), constraint.fork()
    for token in tokenizer.encode(text):
        if not fork.token_mask()[token]:
            return False
        fork.accept(token)
    return fork.is_accepting


@pytest.mark.parametrize("low", ["minimum", "exclusiveMinimum"])
@pytest.mark.parametrize("high", ["maximum", "exclusiveMaximum"])
@pytest.mark.parametrize("ends", [(2, 2.5), (-2.5, -2), (0, 0.5), (-0.5, 0.0), (1.5, 2), (2, 3), (2.0, 2.25), (1, 7.5)])
def test_numbers_are_within_their_bounds(low: str, high: str, ends: tuple[float, float]) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "number", low: ends[0], high: ends[1]}}, "required": ["a"]}
    constraint = compile_json_schema(schema, vocabulary_of(WORLD))
    above = (lambda x: x > ends[0]) if low.startswith("e") else (lambda x: x >= ends[0])
    below = (lambda x: x < ends[1]) if high.startswith("e") else (lambda x: x <= ends[1])
    accepted = {text: accepts(constraint, f'{{"a": {text}}}') for text in (f"{n / 4:g}" for n in range(-12, 36))}
    assert accepted == {text: above(float(text)) and below(float(text)) for text in accepted}


def test_values_in_a_schema_do_not_change() -> None:
    value = {"exclusiveMinimum": 2, "maximum": 2.5}
    constraint = compile_json_schema({"enum": [value]}, vocabulary_of(WORLD))
    assert accepts(constraint, json.dumps(value))
    named = {"type": "object", "properties": {"enum": {"type": "number", **value}}, "required": ["enum"]}
    constraint = compile_json_schema(named, vocabulary_of(WORLD))
    assert accepts(constraint, '{"enum": 2.25}') and not accepts(constraint, '{"enum": 2}')


@pytest.mark.parametrize("bound", [10**400, -(10**400), 1e300, 2**60])
def test_huge_numbers_in_a_schema(bound: float) -> None:
    for name, other in (("exclusiveMinimum", "maximum"), ("exclusiveMaximum", "minimum")):
        try:
            compile_json_schema({"type": "number", name: bound, other: 1.5}, vocabulary_of(BYTES))
        except UsageError as error:
            assert len(str(error)) < 400


def test_a_fork_is_independent() -> None:
    tokenizer, start = tokenizer_called(BYTES), compile_regex("ab*c|ad", vocabulary_of(BYTES))
    start.accept(tokenizer.encode("a")[0])
    fork = start.fork()
    fork.accept(tokenizer.encode("d")[0])
    assert fork.is_complete and not start.is_complete
    for letter in "bbc":
        assert not start.is_complete and start.token_mask()[tokenizer.encode(letter)[0]]
        start.accept(tokenizer.encode(letter)[0])
    assert start.is_complete and fork.is_complete
    first, second = (compile_json_schema(PERSON, vocabulary_of(WORLD)) for _ in range(2))
    assert [generate(first.fork(), WORLD, 1), generate(first, WORLD, 1)] == [generate(second, WORLD, 1)] * 2


def test_json_object_with_a_leading_space() -> None:
    tokenizer = tokenizer_called(BYTES)
    for space in (False, True):
        start = compile_json_object(vocabulary_of(BYTES), leading_space=space)
        assert start.token_mask()[tokenizer.get_id(" ")] == space and start.token_mask()[tokenizer.get_id("{")]
        for token in tokenizer.encode(" " * space + '{"a": [1,{"b":null}, "\\n"]}'):
            start.accept(token)
        assert start.is_complete
    text = tokenizer.encode('{"a":  ')
    start = compile_json_object(vocabulary_of(BYTES))
    with pytest.raises(UsageError, match="cannot continue within its grammar"):
        for token in text:
            start.accept(token)
    with pytest.raises(UsageError, match="cannot continue within its grammar"):
        start.token_mask()


def test_a_vocabulary_without_an_end_of_text_id() -> None:
    tokenizer = ByteTokenizer()
    tokenizer.eos_id = NO_EOS
    start = compile_regex("ab?", GrammarVocabulary(tokenizer))
    start.accept(tokenizer.encode("a")[0])
    assert start.is_accepting and np.flatnonzero(start.token_mask()).tolist() == tokenizer.encode("b")
    start.accept(tokenizer.encode("b")[0])
    assert start.is_complete and not start.token_mask().any()


def nested(depth: int) -> str:
    return '{"type":"array","items":' * depth + "{}" + "}" * depth


def chain(length: int, form: str = '{"type":"array","items":%s}') -> str:
    links = [f'"d{at}":' + form % f'{{"$ref":"#/$defs/d{at + 1}"}}' for at in range(length)]
    return f'{{"$ref":"#/$defs/d0","$defs":{{{",".join(links)},"d{length}":{{"type":"string"}}}}}}'


@pytest.mark.parametrize(
    "schema, words",
    [
        ({"type": "strin"}, "Invalid type: strin"),
        ({"properties": {"a": {"type": ["string", "text"]}}}, "Invalid type: text"),
        ({"type": "array", "uniqueItems": True}, "uniqueItems"),
        ({"type": "string", "format": "color"}, "Unknown format: color"),
        ({"type": "string", "pattern": "("}, "unclosed group"),
        ({"type": "string", "pattern": "(?=a)b"}, "look-around"),
        ({"type": "string", "pattern": "(" * 900 + "a" + ")" * 900}, "nest"),
        ({"type": "string", "pattern": "(a|b)*a(a|b){20}", "minLength": 5000}, "Unable to determine"),
        ({"$ref": "https://example.org/schema"}, "https://example.org/schema"),
        ({"$ref": "#/$defs/gone"}, "/\\$defs/gone"),
        ({"$ref": "#"}, "no text, or only the empty one, fits the JSON schema"),
        ({"enum": []}, "Unsatisfiable"),
        ({"type": "integer", "minimum": 5, "maximum": 3}, "minimum"),
        ({"type": "array", "minItems": 9, "maxItems": 3}, "minItems"),
        ({"type": "number", "multipleOf": 1e-300}, "multipleOf"),
        ({"allOf": [{"anyOf": [{"properties": {f"p{i}": {"const": j}}} for j in (0, 1)]} for i in range(20)]}, "large"),
        ({"const": float("nan")}, "cannot be used"),
        ({"const": {1, 2}}, "is not JSON"),
        ({"const": "\ud800"}, "is not JSON"),
        ('{"type":', "is not JSON"),
        ("[]", "it must be a JSON object"),
        ("true", "it must be a JSON object"),
        (json.dumps({"enum": ["x" * 1_000_000]}), f"1000014 characters; at most {MAX_SCHEMA_CHARACTERS}"),
        (nested(140), "recursion limit"),
        (nested(2_000), "nested too deeply"),
        (chain(1_100), "nested too deeply: 2205 levels"),
        (chain(500).replace('"d7":', '"$id":"a:b","d7":'), "nested too deeply"),
        (chain(300, '{"prefixItems":[%s]}'), "nested too deeply"),
    ],
)
def test_invalid_schemas(schema: dict[str, Any] | str, words: str) -> None:
    with pytest.raises(UsageError, match=words) as caught:
        compile_json_schema(schema, vocabulary_of(BYTES))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


def test_a_schema_deeper_than_the_recursion_limit_of_python() -> None:
    deep: dict[str, Any] = {}
    for _ in range(3_000):
        deep = {"not": deep}
    with pytest.raises(UsageError, match="nested too deeply"):
        compile_json_schema(deep, vocabulary_of(BYTES))


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "array", "minItems": 10**9},
        {"type": "string", "minLength": 10**9},
        {"type": "array", "minItems": 999, "items": {"type": "array", "minItems": 999, "items": {"type": "string"}}},
        {"type": "string", "pattern": "^(((a{1,1000}){1,1000}){1,1000})+$"},
        {"$ref": "#/$defs/n", "$defs": {"n": {"properties": {"n": {"$ref": "#/$defs/n"}}, "required": ["n"]}}},
        nested(120),
        chain(190),
        {"x-guidance": {"whitespace_flexible": True, "nonsense": 1}, "type": "array"},
    ],
)
def test_schemas_that_need_very_long_texts(schema: dict[str, Any] | str) -> None:
    constraint, random = compile_json_schema(schema, vocabulary_of(WORLD)), np.random.default_rng(5)
    for _ in range(20):
        allowed = np.flatnonzero(constraint.token_mask())
        assert len(allowed) > 0
        if constraint.is_complete:
            break
        constraint.accept(int(random.choice(allowed)))


@pytest.mark.parametrize(
    "pattern, words",
    [
        ("(", "unclosed group"),
        ("a{", "repetition"),
        ("(?=a)a", "look-around"),
        (r"(a)\1", "backreferences"),
        (r"\bword\b", "lookarounds"),
        (r"(?-u:\xff)", "UTF-8"),
        ("(" * 2_000 + "a" + ")" * 2_000, "nest"),
        ("a" * (MAX_PATTERN_CHARACTERS + 1), f"has 8193 characters; at most {MAX_PATTERN_CHARACTERS}"),
        ("", "only the empty one"),
        (r"[^\x00-\x{10FFFF}]", "no text"),
        ("\ud800", "surrogate"),
    ],
)
def test_invalid_patterns(pattern: str, words: str) -> None:
    with pytest.raises(UsageError, match=words) as caught:
        compile_regex(pattern, vocabulary_of(BYTES))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


@pytest.mark.parametrize(
    "pattern", ["(((a{1,1000}){1,1000}){1,1000})+", "a{1000000}", "a?" * 4_000, "(a|b)*a(a|b){30}", r"(\w|\s)*\w{50}x"]
)
def test_expensive_patterns(pattern: str) -> None:
    random = np.random.default_rng(6)
    try:
        constraint = compile_regex(pattern, vocabulary_of(WORLD))
        for _ in range(30):
            constraint.accept(int(random.choice(np.flatnonzero(constraint.token_mask())[-50:])))
    except UsageError as error:
        assert "the regex cannot be used: " in str(error) or "cannot continue within its grammar: " in str(error)
        assert "\n" not in str(error) and len(str(error)) < 300


def test_without_llguidance(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(UsageError, match=r'pip install "fledge\[serve\]"'):
        GrammarVocabulary(ByteTokenizer())
