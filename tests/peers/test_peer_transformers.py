"""Our transformer against LlamaForCausalLM of the package transformers, with the same weights."""

from __future__ import annotations

import pytest
import torch
from closeness import assert_close_relative

from fledge.models import ModelConfig, build

pytestmark = pytest.mark.peer
transformers = pytest.importorskip("transformers")

CONFIG = ModelConfig("llama", 37, n_layer=3, n_embd=24, dim_att=40, dim_ffn=56, n_head=4, norm_eps=1e-6)
THEIRS = (  # part of a name: ours, theirs
    ("emb.", "model.embed_tokens."),
    ("blocks.", "model.layers."),
    ("ln_out.", "model.norm."),
    ("head.", "lm_head."),
    ("att.query", "self_attn.q_proj"),
    ("att.key", "self_attn.k_proj"),
    ("att.value", "self_attn.v_proj"),
    ("att.output", "self_attn.o_proj"),
    ("ffn.gate", "mlp.gate_proj"),
    ("ffn.key", "mlp.up_proj"),
    ("ffn.value", "mlp.down_proj"),
    ("ln1.", "input_layernorm."),
    ("ln2.", "post_attention_layernorm."),
)


def renamed(name: str) -> str:
    for ours, theirs in THEIRS:
        name = name.replace(ours, theirs)
    return name


def test_logits_are_those_of_llama() -> None:
    ours = build(CONFIG).eval().requires_grad_(False)
    for parameter in ours.parameters():
        if parameter.dim() == 1:
            parameter.data = 1 + 0.1 * torch.randn(parameter.shape)
        else:
            parameter.data = 1.5 * torch.randn(parameter.shape) * parameter.shape[1] ** -0.5
    settings = transformers.LlamaConfig(
        vocab_size=CONFIG.vocab_size,
        hidden_size=CONFIG.n_embd,
        intermediate_size=CONFIG.dim_ffn,
        num_hidden_layers=CONFIG.n_layer,
        num_attention_heads=CONFIG.n_head,
        head_dim=CONFIG.head_size,
        rms_norm_eps=CONFIG.norm_eps,
        attn_implementation="eager",
    )
    theirs = transformers.LlamaForCausalLM(settings).eval().requires_grad_(False)
    theirs.load_state_dict({renamed(name): tensor for name, tensor in ours.state_dict().items()})
    idx = torch.randint(0, CONFIG.vocab_size, (2, 33))
    found, state = ours(idx[:, :20])
    rest, _ = ours(idx[:, 20:], state)
    # Rounding is bounded by 2 * 3 layers * 56 terms * 2**-24 = 2e-5 of the largest logit.
    assert_close_relative(torch.cat((found, rest), 1), theirs(idx).logits, 1e-5, "logits")
