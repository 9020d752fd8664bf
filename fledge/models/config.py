"""The version and sizes of a model. All of them except `NOT_IN_SHAPES` follow from the names and shapes of its
tensors."""

from __future__ import annotations

from dataclasses import dataclass

from fledge.core.errors import ConfigError

VERSIONS = ("4", "5.0", "5.1", "5.2", "6.0", "llama")

FAMILY_NAMES = {"4": "RWKV-4", "5": "RWKV-5 Eagle", "6": "RWKV-6 Finch", "llama": "Transformer"}


NOT_IN_SHAPES = ("scaled_keys", "norm_eps", "group_norm_eps")
"""Fields that do not follow from the name or shape of any tensor."""


@dataclass(frozen=True)
class ModelConfig:
    """Sizes of one model. Raises ConfigError if they contradict each other.

    Official checkpoints have dim_att = n_embd and head_size = 64; dim_ffn is 4 C for RWKV-4 and 5.0, and 3.5 C
    rounded down to a multiple of 32 from 5.1 on.
    """

    version: str  # one of VERSIONS; "5.2" is the paper's Eagle, "6.0" its Finch, "llama" the transformer baseline
    vocab_size: int
    n_layer: int
    n_embd: int  # C
    dim_att: int  # A, the width of r, k, v, g; of the transformer's q, k, v
    dim_ffn: int  # F, the hidden width of the channel mix; of the transformer's SwiGLU
    n_head: int = 0  # H; 0 for RWKV-4, which has no heads
    mix_rank: int = 0  # rank of the token-shift LoRA (6.0)
    decay_rank: int = 0  # rank of the decay LoRA (6.0)
    bonus: str = "time_faaaa"  # how u is stored in 5.x: "time_faaaa" directly, "time_first" as its logarithm (old 5.0)
    tuned_state: bool = False  # the checkpoint has a trained initial state, blocks.i.att.time_state
    scaled_keys: bool = False  # 6.0: k times exp(min(d, 0)), d the raw decay (RWKV-LM's README, against loss spikes)
    norm_eps: float = 1e-5  # every LayerNorm, the transformer's RMSNorm
    group_norm_eps: float = 64e-5  # the per-head norm; 1e-5 reproduces rwkv.cpp's RWKV-5

    def __post_init__(self) -> None:
        if self.version not in VERSIONS:
            raise ConfigError(f"version {self.version!r} is not one of {', '.join(VERSIONS)}")
        for name in ("vocab_size", "n_layer", "n_embd", "dim_att", "dim_ffn"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be at least 1")
        for name in ("norm_eps", "group_norm_eps"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be above 0")
        self._check_version()

    def _check_version(self) -> None:
        """What only some versions have must be there, and nothing that they do not have."""
        if self.version != "4" and (self.n_head < 1 or self.dim_att % self.n_head):
            raise ConfigError(f"n_head is {self.n_head}; it must divide dim_att = {self.dim_att}")
        if self.version == "6.0" and (self.mix_rank < 1 or self.decay_rank < 1):
            raise ConfigError(f"mix_rank {self.mix_rank} and decay_rank {self.decay_rank} must be at least 1 for 6.0")
        if self.tuned_state and self.version == "4":
            raise ConfigError("tuned_state is set, but RWKV-4 has no matrix state to tune")
        if self.scaled_keys and self.version != "6.0":
            raise ConfigError("scaled_keys is set, but a decay that keys could be scaled by is in 6.0 only")
        if self.bonus not in ("time_faaaa", "time_first"):
            raise ConfigError(f"bonus is {self.bonus!r}; it must be 'time_faaaa' or 'time_first'")
        if self.bonus == "time_first" and self.version in ("5.2", "6.0"):
            raise ConfigError(f"version {self.version} stores its bonus as time_faaaa, never as time_first")
        if self.version == "llama":
            self._check_transformer()

    def _check_transformer(self) -> None:
        """Nothing of a recurrence, and heads whose channels make pairs for the rotation."""
        for name, value in (("mix_rank", 0), ("decay_rank", 0), ("bonus", "time_faaaa"), ("tuned_state", False)):
            if getattr(self, name) != value:
                raise ConfigError(f"{name} is {getattr(self, name)!r}, but a transformer has none; leave it out")
        if self.head_size % 2:
            raise ConfigError(f"head_size is {self.head_size}; rotary positions need an even number")

    @property
    def generation(self) -> str:
        """The version without its minor number: "4", "5", "6" or "llama"; what the models differ by."""
        return self.version.partition(".")[0]

    @property
    def head_size(self) -> int:
        """N: key and value channels of one head (K = V = N in every released model)."""
        return self.dim_att // self.n_head if self.n_head else 0

    @property
    def family(self) -> str:
        """The name for people: RWKV-4, RWKV-5 Eagle, RWKV-6 Finch or Transformer."""
        return FAMILY_NAMES[self.generation]

    @property
    def state_floats(self) -> int:
        """Numbers in the state of one sequence (paper, appendix E: L (2 D + D^2 / h); RWKV-4 has 5 D per layer).

        The state of a transformer grows with the text: 2 A per layer for each token read.
        """
        if self.version == "llama":
            return 2 * self.n_layer * self.dim_att
        if self.version == "4":
            return self.n_layer * (2 * self.n_embd + 3 * self.dim_att)
        return self.n_layer * (2 * self.n_embd + self.n_head * self.head_size**2)

    @classmethod
    def finch(cls, n_layer: int, n_embd: int, vocab_size: int = 65536, head_size: int = 64) -> ModelConfig:
        """A Finch with the official proportions (LoRA ranks 32 and 64, doubled at width 4096)."""
        wide = n_embd >= 4096
        return cls(
            version="6.0",
            vocab_size=vocab_size,
            n_layer=n_layer,
            n_embd=n_embd,
            dim_att=n_embd,
            dim_ffn=int(n_embd * 3.5 // 32 * 32),
            n_head=_heads(n_embd, head_size),
            mix_rank=64 if wide else 32,
            decay_rank=128 if wide else 64,
        )

    @classmethod
    def eagle(cls, n_layer: int, n_embd: int, vocab_size: int = 65536, head_size: int = 64) -> ModelConfig:
        """An Eagle (5.2) with the official proportions."""
        return cls(
            version="5.2",
            vocab_size=vocab_size,
            n_layer=n_layer,
            n_embd=n_embd,
            dim_att=n_embd,
            dim_ffn=int(n_embd * 3.5 // 32 * 32),
            n_head=_heads(n_embd, head_size),
        )

    @classmethod
    def rwkv4(cls, n_layer: int, n_embd: int, vocab_size: int = 65536) -> ModelConfig:
        """An RWKV-4 with the official proportions."""
        return cls("4", vocab_size, n_layer, n_embd, dim_att=n_embd, dim_ffn=4 * n_embd)

    @classmethod
    def transformer(cls, n_layer: int, n_embd: int, vocab_size: int = 65536, head_size: int = 64) -> ModelConfig:
        """A Llama-shaped transformer with the number of parameters of the Finch of these sizes, as closely as
        possible."""
        return cls.finch(n_layer, n_embd, vocab_size, head_size).as_transformer()

    def as_transformer(self) -> ModelConfig:
        """The transformer of the same depth, width, heads and vocabulary; dim_ffn makes the parameter counts agree."""
        C, A = self.n_embd, self.dim_att
        step = 32 if C >= 256 else 8  # matrix products prefer multiples of 32; for small models this is too coarse
        ffn_parameters = _count_block_parameters(self) - 4 * C * A - 2 * C
        return ModelConfig(
            version="llama",
            vocab_size=self.vocab_size,
            n_layer=self.n_layer,
            n_embd=C,
            dim_att=A,
            dim_ffn=max(step, round(ffn_parameters / (3 * C * step)) * step),
            n_head=self.n_head,
            norm_eps=self.norm_eps,
        )


def _heads(n_embd: int, head_size: int) -> int:
    if n_embd % head_size:
        raise ConfigError(f"n_embd is {n_embd}; it must be a multiple of head_size = {head_size}")
    return n_embd // head_size


def _count_block_parameters(config: ModelConfig) -> int:
    """Number of parameters of one block of an Eagle (5.2) or Finch."""
    if config.version not in ("5.2", "6.0"):
        raise ConfigError(f"version is {config.version}; a transformer of equal size exists for 5.2 and 6.0 only")
    C, A, F = config.n_embd, config.dim_att, config.dim_ffn
    matrices = 5 * C * A + 2 * C * F + C * C
    vectors = 4 * C + 2 * A + 2 * A  # two norms, the head norm, decay and bonus
    if config.version == "5.2":
        return matrices + vectors + 6 * C
    factors = 10 * config.mix_rank * C + config.decay_rank * (C + A)
    return matrices + vectors + 8 * C + factors
