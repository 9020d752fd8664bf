"""Random checkpoints of any shape: complete, without constant tensors, and with finite logits."""

from __future__ import annotations

import pytest
import torch

from fledge.bench.random_model import config_of_shape, random_tensors
from fledge.checkpoint import assemble, get_expected_shapes
from fledge.core.errors import UsageError
from fledge.models import ModelConfig

SMALL = ModelConfig.finch(2, 64, vocab_size=300)


def test_shapes_are_official() -> None:
    config = config_of_shape("L12-D768", 65536)
    assert (config.n_layer, config.n_embd, config.n_head, config.dim_ffn) == (12, 768, 12, 2688)
    tensors = random_tensors(SMALL, torch.bfloat16)
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == get_expected_shapes(SMALL)
    assert all(tensor.dtype == torch.bfloat16 for tensor in tensors.values())


@pytest.mark.parametrize("shape", ["L12", "12-768", "L0-D64", "L2-D100", "L2-D0", ""])
def test_other_shapes_are_refused(shape: str) -> None:
    with pytest.raises(UsageError, match="L12-D768"):
        config_of_shape(shape, 300)


def test_no_tensor_is_constant_and_logits_are_of_order_one() -> None:
    tensors = random_tensors(SMALL, torch.float32)
    assert [name for name, tensor in tensors.items() if float(tensor.std()) == 0] == []
    with torch.inference_mode():
        logits, _ = assemble(SMALL, tensors)(torch.randint(300, (1, 40)))
    assert 0.3 < float(logits.std()) < 5 and bool(torch.isfinite(logits).all())
    assert not torch.equal(tensors["head.weight"], random_tensors(SMALL, torch.float32, seed=1)["head.weight"])
