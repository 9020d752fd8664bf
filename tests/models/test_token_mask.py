"""Several documents in one row, marked by `document_start`: outputs and gradients equal those of separate rows, in
every family."""

from __future__ import annotations

import pytest
import torch
from closeness import MODEL_TOLERANCE, assert_close_relative
from test_models import CONFIGS, assert_same_state, every_family, get_model, tokens

from fledge.core.errors import UsageError
from fledge.models import BaseModel, build, zero_state

LENGTHS = (5, 1, 70, 9)  # tokens of each document; 70 is more than a chunk of the recurrence

# The norm of a head divides by the size of its values, which is small at the start of a document, so rounding grows.
# Gradients differ from float64 by up to 1.3e-4 (RWKV-5.0), and the two ways to compute them by up to 1.2e-5.
GRADIENT_TOLERANCE = 5e-5


def make_trainable_model(name: str) -> BaseModel:
    model = build(CONFIGS[name])
    model.load_state_dict(get_model(name).state_dict())
    return model


def make_document_starts(length: int) -> torch.Tensor:
    document_start = torch.zeros(2, length, dtype=torch.bool)
    starts = torch.tensor(LENGTHS).cumsum(0) - torch.tensor(LENGTHS)
    document_start[:, starts[1:]] = True
    return document_start


@every_family
def test_a_document_does_not_depend_on_earlier_documents(name: str) -> None:
    model, idx = make_trainable_model(name), tokens(2, sum(LENGTHS))
    logits, after = model(idx, zero_state(model.config, 2), document_start=make_document_starts(sum(LENGTHS)))
    logits.square().mean().backward()
    gradients = {key: parameter.grad for key, parameter in model.named_parameters()}

    reference, documents = make_trainable_model(name), idx.split(LENGTHS, dim=1)
    separate, separate_states = zip(
        *(reference(document, zero_state(reference.config, 2)) for document in documents), strict=True
    )
    torch.cat(separate, 1).square().mean().backward()
    assert_close_relative(logits, torch.cat(separate, 1), MODEL_TOLERANCE, "logits")
    assert_same_state(after, separate_states[-1])
    for key, parameter in reference.named_parameters():
        if parameter.grad is not None:
            assert_close_relative(gradients[key], parameter.grad, GRADIENT_TOLERANCE, key)


@every_family
def test_a_document_start_at_the_first_token_ignores_the_state(name: str) -> None:
    model, idx = get_model(name), tokens(2, 6)
    document_start = torch.zeros(2, 6, dtype=torch.bool)
    document_start[1, 0] = True
    state = model(tokens(2, 9, seed=1))[1]
    logits, after = model(idx, state, document_start=document_start)
    continued, continued_after = model(idx[:1], state.rows(0))
    restarted, restarted_after = model(idx[1:], zero_state(model.config, 1))
    assert_close_relative(logits, torch.cat((continued, restarted)), MODEL_TOLERANCE, "logits")
    assert_same_state(after.rows(0), continued_after)
    assert_same_state(after.rows(1), restarted_after)


@every_family
def test_a_document_start_in_the_padding_has_no_effect(name: str) -> None:
    model, idx, lengths = get_model(name), tokens(2, 9), torch.tensor([4, 9])
    document_start = torch.zeros(2, 9, dtype=torch.bool)
    document_start[0, 6] = True
    _, after = model(idx, lengths=lengths, document_start=document_start)
    assert_same_state(after, model(idx, lengths=lengths)[1])


@every_family
def test_gradients_are_finite_at_document_starts(name: str) -> None:
    model = make_trainable_model(name)
    with torch.no_grad():
        for block in model.blocks:
            block.att.time_decay.fill_(3.0)  # forgets almost everything at every token
    logits, _ = model(tokens(2, 40), document_start=torch.ones(2, 40, dtype=torch.bool))
    logits.square().sum().backward()
    assert all(p.grad is None or bool(p.grad.isfinite().all()) for p in model.parameters())


def test_a_mask_of_a_wrong_shape_or_dtype_is_rejected() -> None:
    model = get_model("6.0")
    for wrong in (torch.zeros(2, 5, dtype=torch.bool), torch.zeros(2, 4)):
        with pytest.raises(UsageError, match="document_start is torch"):
            model(tokens(2, 4), document_start=wrong)
