"""Chats: which ids are read, and the tree of turns."""

from __future__ import annotations

import gc
import hashlib
import weakref

import pytest
from closeness import MODEL_TOLERANCE, assert_close_relative
from fakes import ByteTokenizer, FakeModel, equal_states, random_finch

from fledge.core.errors import UsageError
from fledge.engine import LLM, Chat, SamplingParams
from fledge.engine.llm.chat import turn_seed
from fledge.tokenizer import render

TOKENIZER = ByteTokenizer("\n\n", "User", "Assistant", "System", ": ", ".\n")
COLON = TOKENIZER.get_id(":")
GREEDY = SamplingParams(temperature=0.0)


def fake_chat(*replies: str, system: str | None = None) -> tuple[FakeModel, Chat]:
    """A chat that answers the n-th question with the n-th reply. The bare colon token occurs only after `Assistant`."""
    model = FakeModel([TOKENIZER.encode(reply) for reply in replies], COLON, TOKENIZER.vocab_size)
    return model, LLM(model, TOKENIZER).chat(system, params=GREEDY)


def check_state(model: FakeModel, chat: Chat) -> None:
    """Check that the state is that of reading all ids of the transcript in one call."""
    fresh = FakeModel(model.replies, model.cue, TOKENIZER.vocab_size)
    assert equal_states(chat.state, LLM(fresh, TOKENIZER).read(chat.ids))


def test_chat_reads_exactly_the_template() -> None:
    model, chat = fake_chat(" Hi.", " Fine.\n\nUser: more", " Bye\n", system="Be kind.")
    messages = [("system", "Be kind.")]
    for question, answer in (("hello", "Hi."), ("how are\n\nyou?", "Fine."), ("bye", "Bye")):
        assert "".join(chat.say(question)) == f" {answer}"
        messages += [("user", question), ("assistant", answer)]
        check_state(model, chat)
    assert chat.messages == messages
    assert chat.transcript == render(messages, "world", answer=False) + "\n\n"
    assert [turn.completion.finish_reason for turn in chat.turns] == ["eos", "stop", "eos"]
    assert chat.turns[2].parent is chat.turns[1]


def test_chat_without_system_text_reads_nothing_before_the_first_question() -> None:
    model, chat = fake_chat(" Hi.")
    assert (model.calls, chat.ids, chat.transcript, chat.turns) == ([], (), "", ())
    list(chat.say("hello"))
    assert chat.transcript == "User: hello\n\nAssistant: Hi.\n\n"


def test_turn_reads_only_new_text() -> None:
    model, chat = fake_chat(" One.", " Two.", " Three.")
    list(chat.say("first " * 50))
    model.calls.clear()
    list(chat.say("second"))
    question = len(TOKENIZER.encode("User: second\n\nAssistant:"))
    assert model.calls[0] == question and all(call == 1 for call in model.calls[1:])


def test_answer_of_full_length_is_closed() -> None:
    model, chat = fake_chat(" A long answer.\n", " Next.")
    list(chat.say("hello", max_tokens=6))
    assert chat.turns[-1].answer == " A lon" and chat.transcript.endswith("Assistant: A lon\n\n")
    list(chat.say("and?"))
    check_state(model, chat)


def test_undo_and_retry_do_not_read_the_question_again() -> None:
    model, chat = fake_chat(" One.", " Two.", " Three.")
    list(chat.say("a"))
    before = chat.state
    list(chat.say("b"))
    model.calls.clear()
    model.replies[1] = TOKENIZER.encode(" 2!")
    assert "".join(chat.retry()) == " 2!"
    assert all(call == 1 for call in model.calls), "the question was read a second time"
    assert [turn.answer for turn in chat.turns] == [" One.", " 2!"]
    check_state(model, chat)
    assert chat.undo().user == "b"
    assert equal_states(chat.state, before)
    chat.undo()
    with pytest.raises(UsageError, match="nothing to undo"):
        chat.undo()
    with pytest.raises(UsageError, match="nothing to retry"):
        chat.retry()


def test_retry_uses_the_next_seed_by_default() -> None:
    llm = LLM(random_finch(TOKENIZER.vocab_size), TOKENIZER)
    chat = llm.chat(params=SamplingParams(top_p=1.0, seed=7, max_tokens=8))
    first = "".join(chat.say("hello"))
    second = "".join(chat.retry())
    seed = turn_seed(7, 0)
    assert (chat.turns[-1].completion.seed, second != first) == (seed + 1, True)
    assert "".join(chat.retry()) not in (first, second) and chat.turns[-1].completion.seed == seed + 2
    assert "".join(chat.retry(seed=seed)) == first


def test_each_turn_has_its_own_seed_and_the_chat_is_reproducible() -> None:
    llm = LLM(random_finch(TOKENIZER.vocab_size), TOKENIZER)

    def talk() -> tuple[list[int], list[str]]:
        chat = llm.chat(params=SamplingParams(top_p=1.0, seed=7, max_tokens=8))
        for question in ("a", "b", "c"):
            list(chat.say(question))
        list(chat.retry())
        list(chat.say("d", seed=7))
        return [turn.completion.seed for turn in chat.turns], [turn.answer for turn in chat.turns]

    seeds, answers = talk()
    assert seeds == [turn_seed(7, 0), turn_seed(7, 1), turn_seed(7, 2) + 1, 7] and len(set(seeds)) == 4
    assert talk() == (seeds, answers)
    # As documented, so that other programs can reproduce a chat.
    assert turn_seed(7, 1) == int.from_bytes(hashlib.sha256(b"7 1").digest()[:4], "little")


def test_finished_answer_is_freed_without_the_garbage_collector() -> None:
    llm = LLM(random_finch(TOKENIZER.vocab_size), TOKENIZER)
    chat = llm.chat(params=SamplingParams(seed=7, max_tokens=4))
    gc.collect()
    gc.disable()
    try:
        stream = chat.say("a")
        list(stream)
        watched = [weakref.ref(stream), weakref.ref(chat.turns[-1]), weakref.ref(chat)]
        del stream, chat
        assert [reference() for reference in watched] == [None] * 3
    finally:
        gc.enable()


def test_branches_share_only_earlier_turns() -> None:
    model, chat = fake_chat(" One.", " Two.", " Three.")
    list(chat.say("a"))
    chat.branch("other")
    list(chat.say("b"))
    assert (chat.current, chat.branches) == ("other", ("main", "other"))
    chat.switch("main")
    assert [turn.user for turn in chat.turns] == ["a"]
    list(chat.say("c"))
    check_state(model, chat)
    chat.switch("other")
    assert [turn.user for turn in chat.turns] == ["a", "b"]
    check_state(model, chat)
    with pytest.raises(UsageError, match="branches: main, other"):
        chat.switch("third")
    with pytest.raises(UsageError, match="branch 'main' already exists"):
        chat.branch("main")


@pytest.mark.parametrize("taken", [0, 1, 3])
def test_stopped_answer_keeps_the_emitted_text(taken: int) -> None:
    model, chat = fake_chat(" Hello there.", " Good.")
    pieces = []
    for piece in chat.say("hi"):
        pieces.append(piece)
        if len(pieces) > taken:
            break
    list(chat.say("go on"))
    assert chat.turns[0].answer == "".join(pieces)
    assert chat.turns[0].completion.finish_reason == "interrupted"
    check_state(model, chat)


def test_chat_continues_after_an_interrupt_in_any_model_call() -> None:
    replies, asked = (" Hi.\n\nUser: x", " Good."), set[int]()
    for calls in range(9):
        model, chat = fake_chat(*replies)
        model.fail_after = calls
        stream, pieces = chat.say("hello"), list[str]()
        try:
            for piece in stream:
                pieces.append(piece)
        except KeyboardInterrupt:
            pass
        model.fail_after = None
        list(chat.say("again"))
        asked.add(len(chat.turns))
        if len(chat.turns) == 2:
            assert chat.turns[0].answer == "".join(pieces)
        check_state(model, chat)
    assert asked == {1, 2}, "only a question that was not read completely is dropped"


def test_unused_stream_changes_nothing() -> None:
    _, chat = fake_chat(" One.", " Two.")
    list(chat.say("a"))
    chat.retry()
    chat.say("b")
    chat.branch("other")
    assert [(turn.user, turn.answer) for turn in chat.turns] == [("a", " One.")]


def test_stop_strings_are_added_to_those_of_the_template() -> None:
    _, chat = fake_chat(" One. Two.\n\nUser:", " One. Two.\n\nUser:")
    assert "".join(chat.say("a", stop=" Two")) == " One."
    assert "".join(chat.say("b")) == " One. Two."
    assert chat.params.stop == ("\n\n",)


def test_other_templates_and_their_errors() -> None:
    llm = LLM(FakeModel([TOKENIZER.encode(" 42")], COLON, TOKENIZER.vocab_size), TOKENIZER)
    chat = llm.chat(template="qa", params=GREEDY)
    assert "".join(chat.say("How many?")) == " 42"
    assert chat.transcript == "Question: How many?\n\nAnswer: 42\n\n"
    with pytest.raises(UsageError, match="'nope' is unknown"):
        llm.chat(template="nope")
    with pytest.raises(UsageError, match="role 'system' is unknown"):
        llm.chat("Be kind.", template="qa")
    with pytest.raises(UsageError, match="the message is empty"):
        chat.say(" \n")


def test_chat_after_a_state() -> None:
    model, _ = fake_chat(" Yes.")
    llm = LLM(model, TOKENIZER)
    chat = llm.chat(state=llm.read("A document.\n\n"), params=GREEDY)
    list(chat.say("Is it?"))
    assert equal_states(chat.state, llm.read((*TOKENIZER.encode("A document.\n\n"), *chat.ids)))


def test_state_of_a_real_model_is_that_of_reading_the_transcript() -> None:
    llm = LLM(random_finch(TOKENIZER.vocab_size), TOKENIZER)
    chat = llm.chat("Be kind.", params=SamplingParams(top_p=1.0, seed=1, max_tokens=10))
    for question in ("hello", "how are you?", "bye"):
        list(chat.say(question))
    for name, tensor in llm.read(chat.ids).tensors().items():
        assert_close_relative(getattr(chat.state, name), tensor, MODEL_TOLERANCE, name)
