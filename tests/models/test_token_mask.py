"""Documents in one row, marked by `document_start`: each gets what it gets alone, outputs and gradients, in every
family."""

from __future__ import annotations

import pytest
import torch
from closeness import MODEL_TOLERANCE, assert_close_relative
from test_models import CONFIGS, assert_same_state, every_family, model_of, tokens

from fledge.core.errors import UsageError
from fledge.models import BaseModel, build, zero_state

LENGTHS = (5, 1, 70, 9)  # of the documents of a row: one token, and more than a chunk of the recurrence


def trainable(name: str) -> BaseModel:
    model = build(CONFIGS[name])
    model.load_state_dict(model_of(name).state_dict())
    return model


def borders(length: int) -> torch.Tensor:
    document_start = torch.zeros(2, length, dtype=torch.bool)
    starts = torch.tensor(LENGTHS).cumsum(0) - torch.tensor(LENGTHS)
    document_start[:, starts[1:]] = True
    return document_start


@every_family
def test_a_document_sees_nothing_of_the_one_before(name: str) -> None:
    model, idx = trainable(name), tokens(2, sum(LENGTHS))
    logits, after = model(idx, zero_state(model.config, 2), document_start=borders(sum(LENGTHS)))
    logits.square().mean().backward()
    together = {key: parameter.grad for key, parameter in model.named_parameters()}

    other, pieces = trainable(name), idx.split(LENGTHS, dim=1)
    alone, states = zip(*(other(piece, zero_state(other.config, 2)) for piece in pieces), strict=True)
    torch.cat(alone, 1).square().mean().backward()
    assert_close_relative(logits, torch.cat(alone, 1), MODEL_TOLERANCE, "logits")
    assert_same_state(after, states[-1])
    for key, parameter in other.named_parameters():
        if parameter.grad is not None:
            assert_close_relative(together[key], parameter.grad, MODEL_TOLERANCE, key)


@every_family
def test_a_border_at_the_first_token_forgets_the_given_state(name: str) -> None:
    model, idx = model_of(name), tokens(2, 6)
    document_start = torch.zeros(2, 6, dtype=torch.bool)
    document_start[1, 0] = True
    given = model(tokens(2, 9, seed=1))[1]
    logits, after = model(idx, given, document_start=document_start)
    carried, carried_after = model(idx[:1], given.rows(0))
    begun, begun_after = model(idx[1:], zero_state(model.config, 1))
    assert_close_relative(logits, torch.cat((carried, begun)), MODEL_TOLERANCE, "logits")
    assert_same_state(after.rows(0), carried_after)
    assert_same_state(after.rows(1), begun_after)


@every_family
def test_a_border_in_the_padding_is_none(name: str) -> None:
    model, idx, lengths = model_of(name), tokens(2, 9), torch.tensor([4, 9])
    document_start = torch.zeros(2, 9, dtype=torch.bool)
    document_start[0, 6] = True
    _, after = model(idx, lengths=lengths, document_start=document_start)
    assert_same_state(after, model(idx, lengths=lengths)[1])


@every_family
def test_gradients_stay_finite_at_borders(name: str) -> None:
    model = trainable(name)
    with torch.no_grad():
        for block in model.blocks:
            block.att.time_decay.fill_(3.0)  # forgets almost everything at every token
    logits, _ = model(tokens(2, 40), document_start=torch.ones(2, 40, dtype=torch.bool))
    logits.square().sum().backward()
    assert all(p.grad is None or bool(p.grad.isfinite().all()) for p in model.parameters())


def test_a_mask_that_does_not_fit_is_refused() -> None:
    model = model_of("6.0")
    for wrong in (torch.zeros(2, 5, dtype=torch.bool), torch.zeros(2, 4)):
        with pytest.raises(UsageError, match="document_start is torch"):
            model(tokens(2, 4), document_start=wrong)
