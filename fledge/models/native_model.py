"""A whole model in the native library, for inference on a CPU. One call runs all layers.

It has the interface of `BaseModel`, `logits, state = model(idx, state)`. The torch models are its specification: its
results are equal up to rounding. Every sum is computed in one order, so a sequence gets the same bits alone, in any
batch, and for any split of its tokens into calls. Padding is not computed.

The format of each matrix follows from its weights (see `fledge.kernels.native_ops.FORMATS`). Norms, mixes, LoRA
factors, decay and state are float32. Factors stored in 16 bits keep these 16 bits in memory. The arithmetic is in
native/model/.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping, Sequence
from typing import NoReturn

import torch
from torch import Tensor, nn

from fledge.core.errors import CheckpointError, StateError, TokenizerError, UsageError
from fledge.kernels.native_ops import STORED, PackedMatrix, check_memory, follow_torch_threads, functions, pack
from fledge.kernels.product_kernels import apply_choices
from fledge.kernels.quantized import QuantizedMatrix
from fledge.models.buffer_pool import BufferPool
from fledge.models.config import ModelConfig
from fledge.models.state import State, state_class, state_shapes, tuned_state, zero_state
from fledge.models.state_slice import StateSlice
from fledge.native.library import why_missing

Release = Callable[[Tensor], None]
LAST_LOGITS, ALL_LOGITS = 1, 2

MATRICES = {
    "att.receptance.weight",
    "att.key.weight",
    "att.value.weight",
    "att.gate.weight",
    "att.output.weight",
    "ffn.key.weight",
    "ffn.value.weight",
    "ffn.receptance.weight",
}
"""The matrices of one block, by their names in a checkpoint and in native/model/parameters.cpp."""

EXACT_FORMATS = {torch.bfloat16: "bfloat16 exact", torch.float16: "float16 exact"}
"""The formats that keep 16-bit weights unchanged and multiply them in float32."""

MAX_HEAD_SIZE = 1024


def why_not_native(config: ModelConfig) -> str | None:
    """None if a model with this config can run natively on this machine, else the reason."""
    if config.version == "llama":
        return "the native library runs RWKV only, not a transformer"
    if config.head_size > MAX_HEAD_SIZE:
        return f"head_size is {config.head_size}; the native library supports at most {MAX_HEAD_SIZE}"
    return why_missing()


class NativeModel(nn.Module):
    """A model for inference, from weights with official names and shapes.

    The matrices are packed into a copy. The embedding is used in place.

    tensors: all tensors that are not quantized. matrix_dtype: the dtype of the matrices among them, float32 or
    bfloat16; None: their own dtype (float16 is multiplied in float32). release: called with each tensor when it is no
    longer needed.
    """

    embedding: Tensor

    def __init__(
        self,
        config: ModelConfig,
        tensors: Mapping[str, Tensor],
        quantized: Mapping[str, QuantizedMatrix] | None = None,
        *,
        matrix_dtype: torch.dtype | None = None,
        release: Release | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.matrices: dict[str, PackedMatrix] = {}
        self.time_decays: list[Tensor] = []  # per layer, as in the checkpoint; for inspection
        self._matrix_dtype = matrix_dtype
        self._memory = BufferPool()
        self._release = release or (lambda tensor: None)
        apply_choices()
        self._handle = _new_model(config)
        for name in _list_matrices(config, -1):
            self._set_matrix(name, tensors, quantized or {})
        for layer in range(config.n_layer):
            for name in _list_matrices(config, layer):
                self._set_matrix(name, tensors, quantized or {})
            _set_block(self, layer, tensors)
        for name in ("ln0", "ln_out"):
            for part in ("weight", "bias"):
                source = f"blocks.0.ln0.{part}" if name == "ln0" else f"ln_out.{part}"
                self.set_vector(-1, f"{name}.{part}", tensors[source])
        self.register_buffer("embedding", _convert_embedding(tensors["emb.weight"]), persistent=False)
        # A second reference: `model.to(...)` replaces buffers, but the library keeps the address.
        self._embedding_reference = (self.embedding,)
        functions().fledge_model_set_embedding(
            self._handle, self.embedding.data_ptr(), STORED[self.embedding.dtype], *self.embedding.shape
        )
        self._tuned = _copy_tuned_state(config, tensors)
        missing = functions().fledge_model_check(self._handle)
        if missing is not None:
            raise CheckpointError(f"{missing.decode()} is missing, or its size does not match the config")

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise UsageError("a native model cannot be copied or pickled; load it again, or with pack=False")

    def __del__(self) -> None:
        handle = self.__dict__.pop("_handle", None)
        if handle is not None:
            functions().fledge_model_free(handle)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of products with the matrices that are not quantized; float32 if all are quantized."""
        formats = {matrix.format for matrix in self.matrices.values()}
        return torch.bfloat16 if "bfloat16" in formats else torch.float32

    @property
    def quantized(self) -> tuple[str, ...]:
        """The formats of the quantized matrices: "int4", "int8" or both; empty if there are none."""
        return tuple(sorted({matrix.format for matrix in self.matrices.values()} & {"int4", "int8"}))

    @property
    def formats(self) -> dict[str, int]:
        """The bytes of the matrices, by format."""
        nbytes: dict[str, int] = {}
        for matrix in self.matrices.values():
            nbytes[matrix.format] = nbytes.get(matrix.format, 0) + matrix.nbytes
        return nbytes

    @property
    def nbytes(self) -> int:
        """Bytes of all packed matrices and the embedding."""
        packed = sum(matrix.nbytes for matrix in self.matrices.values())
        return packed + self.embedding.numel() * self.embedding.element_size()

    def initial_state(self, batch: int) -> State:
        """The state before the first token: zeros, or the tuned state of the checkpoint."""
        return tuned_state(self.config, self._tuned, batch) if self._tuned else zero_state(self.config, batch)

    def forward(
        self, idx: Tensor, state: State | None = None, *, lengths: Tensor | None = None, last: bool = False
    ) -> tuple[Tensor, State]:
        """The arguments, results and errors of `BaseModel.forward`. Logits of padding are zero."""
        B, T = self._check(idx, state)
        before = self.initial_state(B) if state is None else state
        counts = [T] * B if lengths is None else _check_lengths(lengths, B, T)
        if last and min(counts, default=1) < 1:
            raise UsageError("last=True needs at least one token in every row")
        ids = (
            idx.reshape(-1)
            if lengths is None
            else torch.cat([idx[b, :n] for b, n in enumerate(counts)] or [idx.reshape(-1)])
        )
        logits, new_state = self._run(
            ids.contiguous(), [counts, [0] * B, range(B)], [before], LAST_LOGITS if last else ALL_LOGITS
        )
        if last or lengths is None:
            return logits.view(B, 1 if last else T, self.config.vocab_size), new_state
        padded = torch.zeros(B, T, self.config.vocab_size, dtype=torch.float32)
        for b, row_logits in enumerate(logits.split(counts)):
            padded[b, : counts[b]] = row_logits
        return padded, new_state

    def read(self, sequences: Sequence[Sequence[int]], slices: Sequence[StateSlice]) -> tuple[Tensor, State]:
        """Read new tokens of several sequences in one call, at least one token each. States are used in place.

        sequences: the token ids of each; slices: the state of each. Returns the logits after the last token of each
        (B, vocab_size) and the new state of all, in order.
        """
        assert len(sequences) == len(slices) and all(sequences), "every sequence needs at least one token"
        states = list({id(part.state): part.state for part in slices}.values())
        for state in states:
            self._check_state(state, state.batch)
        position = {id(state): i for i, state in enumerate(states)}
        ids = torch.tensor([token for sequence in sequences for token in sequence], dtype=torch.long)
        self._check_ids(ids)
        counts = [len(sequence) for sequence in sequences]
        layout = [counts, [position[id(part.state)] for part in slices], [part.index for part in slices]]
        return self._run(ids, layout, states, LAST_LOGITS)

    def _run(
        self, ids: Tensor, layout: Sequence[Sequence[int]], states: Sequence[State], logits_mode: int
    ) -> tuple[Tensor, State]:
        """Call the library.

        ids: of all sequences, concatenated. layout: three lists with one entry for each sequence: its number of tokens,
        the index of its state in `states`, and the row within that state. Returns logits (sequences or tokens,
        vocab_size) and the new states.
        """
        counts, state_indices, state_rows = layout
        B = len(counts)
        assert all(0 <= row < states[index].batch for index, row in zip(state_indices, state_rows, strict=True))
        shape = (B if logits_mode == LAST_LOGITS else ids.numel(), self.config.vocab_size)
        # The logits of all tokens have a different size in each call, so the pool would not reuse their memory.
        logits = self._memory.empty(shape) if logits_mode == LAST_LOGITS else torch.empty(shape, dtype=torch.float32)
        new = {name: self._memory.empty(shape) for name, shape in state_shapes(self.config, B).items()}
        follow_torch_threads()
        old = [t.detach().float().contiguous() for state in states for t in state.tensors().values()]
        batches = (state.batch for state in states)
        failed = functions().fledge_model_forward(
            self._handle,
            ids.data_ptr(),
            ids.numel(),
            B,
            (ctypes.c_int64 * (3 * B + len(states)))(*counts, *state_indices, *state_rows, *batches),
            (ctypes.c_void_p * len(old))(*(tensor.data_ptr() for tensor in old)),
            (ctypes.c_void_p * len(new))(*(tensor.data_ptr() for tensor in new.values())),
            len(new),
            logits.data_ptr(),
            logits_mode,
        )
        check_memory(failed, f"{ids.numel()} tokens in one call")
        return logits, state_class(self.config)(**new)

    def _check(self, idx: Tensor, state: State | None) -> tuple[int, int]:
        if idx.dim() != 2:
            raise UsageError(f"idx has shape {tuple(idx.shape)}; the model needs (batch, time)")
        if idx.dtype != torch.long or idx.device.type != "cpu":
            raise UsageError(f"idx is {idx.dtype} on {idx.device}; the model needs int64 on the CPU")
        self._check_ids(idx)
        if state is not None:
            self._check_state(state, idx.shape[0])
        return idx.shape[0], idx.shape[1]

    def _check_ids(self, ids: Tensor) -> None:
        if ids.numel():
            low, high = int(ids.min()), int(ids.max())
            if low < 0 or high >= self.config.vocab_size:
                bad = low if low < 0 else high
                raise TokenizerError(f"token id {bad} is outside this model's vocabulary of {self.config.vocab_size}")

    def _check_state(self, state: State, batch: int) -> None:
        if not isinstance(state, state_class(self.config)):
            raise StateError(f"a {type(state).__name__} does not fit a {self.config.family} model")
        state.check(self.config, batch)
        _check_readable(state)

    def set_vector(self, layer: int, name: str, values: Tensor) -> None:
        """Set a vector of parameters. The library copies it."""
        flat = values.detach().float().reshape(-1).contiguous()
        status = functions().fledge_model_set_vector(self._handle, layer, name.encode(), flat.data_ptr(), flat.numel())
        assert status == 0, name

    def set_factor(self, layer: int, name: str, weight: Tensor) -> None:
        """Set a low-rank factor (out, in). It is multiplied in float32 and stored in its own dtype."""
        self._add_matrix(layer, name, pack(weight, EXACT_FORMATS.get(weight.dtype, "float32")))

    def _set_matrix(self, name: str, tensors: Mapping[str, Tensor], quantized: Mapping[str, QuantizedMatrix]) -> None:
        layer, inner = (int(name.split(".")[1]), name.split(".", 2)[2]) if name.startswith("blocks.") else (-1, name)
        if name in quantized:
            self._add_matrix(layer, inner, PackedMatrix.from_quantized(quantized[name]))
            return
        weight = tensors[name]
        dtype = self._matrix_dtype or (torch.bfloat16 if weight.dtype == torch.bfloat16 else torch.float32)
        format = "bfloat16" if dtype == torch.bfloat16 else "float32"
        if format == "float32" and weight.dtype in EXACT_FORMATS:
            format = EXACT_FORMATS[weight.dtype]
        self._add_matrix(layer, inner, pack(weight, format))
        self._release(weight)

    def _add_matrix(self, layer: int, name: str, matrix: PackedMatrix) -> None:
        self.matrices[name if layer < 0 else f"blocks.{layer}.{name}"] = matrix
        status = functions().fledge_model_set_matrix(
            self._handle, layer, name.encode(), matrix.code, matrix.rows, matrix.columns, matrix.data.data_ptr()
        )
        assert status == 0, name


def _new_model(config: ModelConfig) -> int:
    sizes = (
        int(config.version[0]),
        config.vocab_size,
        config.n_layer,
        config.n_embd,
        config.dim_att,
        config.dim_ffn,
        config.n_head,
        config.mix_rank,
        config.decay_rank,
        int(config.version not in ("4", "5.0")),
        int(config.scaled_keys),
    )
    handle: int | None = functions().fledge_model_new(
        (ctypes.c_int64 * len(sizes))(*sizes), config.norm_eps, config.group_norm_eps
    )
    check_memory(handle is None, "the model")
    assert handle is not None
    return handle


def _list_matrices(config: ModelConfig, layer: int) -> list[str]:
    if layer < 0:
        return ["head.weight"]
    absent = {"att.gate.weight"} if config.version in ("4", "5.0") else set()
    return [f"blocks.{layer}.{name}" for name in sorted(MATRICES - absent)]


def _set_block(model: NativeModel, layer: int, tensors: Mapping[str, Tensor]) -> None:
    """Set the vectors and low-rank factors of one block."""
    config = model.config

    def get_tensor(name: str) -> Tensor:
        return tensors[f"blocks.{layer}.{name}"]

    for norm in ("ln1", "ln2", *(["att.ln_x"] if config.version != "4" else [])):
        for part in ("weight", "bias"):
            model.set_vector(layer, f"{norm}.{part}", get_tensor(f"{norm}.{part}"))
    if config.version == "6.0":
        for letter in "xwkvrg":
            model.set_vector(layer, f"att.mix_{letter}", get_tensor(f"att.time_maa_{letter}"))
        for letter in "kr":
            model.set_vector(layer, f"ffn.mix_{letter}", get_tensor(f"ffn.time_maa_{letter}"))
        model.set_factor(layer, "att.mix_down", get_tensor("att.time_maa_w1").T)
        for letter, factor in zip("wkvrg", get_tensor("att.time_maa_w2"), strict=True):
            model.set_factor(layer, f"att.mix_up_{letter}", factor.T)
        model.set_factor(layer, "att.decay_down", get_tensor("att.time_decay_w1").T)
        model.set_factor(layer, "att.decay_up", get_tensor("att.time_decay_w2").T)
    else:
        # Before Finch, files contain the weight of the current token. The library needs that of the previous token.
        for letter in "kvr" if config.version in ("4", "5.0") else "kvrg":
            model.set_vector(layer, f"att.mix_{letter}", 1 - get_tensor(f"att.time_mix_{letter}").float())
        for letter in "kr":
            model.set_vector(layer, f"ffn.mix_{letter}", 1 - get_tensor(f"ffn.time_mix_{letter}").float())
    model.time_decays.append(get_tensor("att.time_decay").detach().float().clone())
    decay, bonus = _compute_decay_and_bonus(config, get_tensor)
    model.set_vector(layer, "att.decay", decay)
    model.set_vector(layer, "att.bonus", bonus)


def _compute_decay_and_bonus(config: ModelConfig, get_tensor: Callable[[str], Tensor]) -> tuple[Tensor, Tensor]:
    """The decay and the bonus u, one number per channel.

    The decay is the raw decay for Finch, its factor exp(-exp(raw)) for Eagle, and the log of the factor for RWKV-4.
    """
    raw = get_tensor("att.time_decay").float()
    if config.version == "4":
        return -torch.exp(raw), get_tensor("att.time_first").float()
    bonus = get_tensor(f"att.{config.bonus}").float()
    if config.version == "6.0":
        return raw, bonus
    if config.bonus == "time_first":
        bonus = torch.exp(bonus)
    decay = torch.exp(-torch.exp(raw))
    if decay.dim() == 1:  # 5.0 and 5.1: one number per head
        decay, bonus = (x[:, None].expand(-1, config.head_size) for x in (decay, bonus))
    return decay, bonus


def _convert_embedding(weight: Tensor) -> Tensor:
    """The embedding in its own dtype if the library supports it, else in float32."""
    return weight.detach().to(weight.dtype if weight.dtype in STORED else torch.float32).contiguous()


def _copy_tuned_state(config: ModelConfig, tensors: Mapping[str, Tensor]) -> list[Tensor]:
    """The tuned state of each layer (H, V, K), copied; empty if the model has none."""
    if not config.tuned_state:
        return []
    return [tensors[f"blocks.{layer}.att.time_state"].detach().float().clone() for layer in range(config.n_layer)]


def _check_readable(state: State) -> None:
    """Raise an error for a state on another device, or one that requires a gradient."""
    for tensor in state.tensors().values():
        if tensor.device.type != "cpu":
            raise StateError(f"the state is on {tensor.device}, the model on the CPU; move it with state.to('cpu')")
        if tensor.requires_grad and torch.is_grad_enabled():
            raise UsageError(
                "a native model is for inference only and cannot compute gradients; load it with pack=False"
            )


def _check_lengths(lengths: Tensor, B: int, T: int) -> list[int]:
    counts: list[int] = lengths.tolist() if lengths.dim() == 1 else []
    if len(counts) != B or any(not 0 <= count <= T for count in counts):
        raise UsageError(f"lengths must hold {B} numbers between 0 and {T}, not {lengths.tolist()}")
    return counts
