"""The products and recurrences of the native library as functions on tensors, for inference on a CPU.

A weight is packed once (`pack`) and then multiplied often (`matmul`). `native/isa/tables.h` and, for the quantized
formats, `fledge/kernels/quantized.py` describe the bytes of a packed weight. Each function has a reference in torch:
`linear`, `quantized_linear`, `wkv_reference`, `wkv4_reference`. These functions have no gradients.
"""

from __future__ import annotations

import ctypes
from ctypes import c_int64
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from fledge.core.errors import BackendError, FledgeError
from fledge.kernels.quantized import GROUP, QuantizedMatrix, blocks_shape
from fledge.native.library import library, why_missing
from fledge.native.signatures import KERNEL_SIGNATURES, declare_functions

FORMATS = {"float32": 0, "bfloat16": 1, "int8": 2, "int4": 3, "bfloat16 exact": 4, "float16 exact": 5}
"""How weights are stored and multiplied. "bfloat16" rounds activations to bfloat16, as torch's product does. The two
"exact" formats keep 16-bit weights unchanged and multiply in float32 without rounding."""

STORED = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
KINDS = {"float32": 0, "bfloat16": 1, "int16": 2}


@lru_cache(maxsize=1)
def functions() -> ctypes.CDLL:
    """The library with its functions declared. Raises BackendError if it is missing."""
    handle = library()
    if handle is None:
        raise BackendError(str(why_missing()))
    if missing := declare_functions(handle, KERNEL_SIGNATURES):
        raise BackendError(f"the native library has no {missing}; it is from another version: install Fledge again")
    return handle


def instruction_sets() -> list[str]:
    """The instruction sets that this processor supports, best first; empty without the library."""
    return [] if library() is None else functions().fledge_instruction_sets().decode().split(",")


def instruction_set() -> str:
    """The instruction set in use."""
    name: str = functions().fledge_instruction_set().decode()
    return name


def choose_instruction_set(name: str = "") -> None:
    """Use one of `instruction_sets()` in all later calls; empty: the best. For tests and comparisons.

    Raises BackendError for an instruction set that this processor does not support.
    """
    if functions().fledge_select_instruction_set(name.encode()):
        raise BackendError(f"instruction set {name!r} is not one of: {', '.join(instruction_sets())}")


def use_product_kernels(kind: str, name: str) -> None:
    """Use one of `instruction_sets()` for the products of activations of one kind (see KINDS); empty: the best.

    `choose_instruction_set` has precedence. Raises BackendError for an unknown instruction set.
    """
    if functions().fledge_select_product_kernels(KINDS[kind], name.encode()):
        raise BackendError(f"instruction set {name!r} is not one of: {', '.join(instruction_sets())}")


def product_kernels(kind: str) -> str:
    """The instruction set that the products of activations of one kind use (see KINDS)."""
    name: str = functions().fledge_product_kernels(KINDS[kind]).decode()
    return name


def follow_torch_threads() -> None:
    """Use the same number of threads as torch (`torch.set_num_threads`)."""
    count = torch.get_num_threads()
    if functions().fledge_threads() != count:
        functions().fledge_set_threads(count)


@dataclass(frozen=True, eq=False)
class PackedMatrix:
    """A weight (rows, columns) in the layout that the kernels read; `data` is uint8 and must stay in place."""

    format: str  # one of FORMATS
    rows: int
    columns: int
    data: Tensor

    @property
    def code(self) -> int:
        """The library's number of the format."""
        return FORMATS[self.format]

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return self.data.numel()

    @classmethod
    def from_quantized(cls, weight: QuantizedMatrix) -> PackedMatrix:
        """A quantized weight, in place: its bytes already have the layout that the kernels read."""
        return cls(weight.format, weight.rows, weight.columns, weight.data.contiguous())


def _to_supported_dtype(weight: Tensor) -> Tensor:
    """The weight in a dtype that the library reads."""
    weight = weight.detach()
    return weight if weight.dtype in STORED else weight.float()


def _source_arguments(weight: Tensor) -> tuple[int, ...]:
    """The arguments that describe a dense weight: rows, columns, address, dtype and both strides."""
    return (*weight.shape, weight.data_ptr(), STORED[weight.dtype], *weight.stride())


def pack(weight: Tensor, format: str) -> PackedMatrix:
    """Pack a dense weight (rows, columns) of any float dtype and strides in one of the formats that are not quantized.

    Raises FledgeError if memory is short.
    """
    weight = _to_supported_dtype(weight)
    rows, columns = weight.shape
    size = functions().fledge_packed_bytes(FORMATS[format], rows, columns)
    assert size > 0 and format not in ("int8", "int4"), (format, rows, columns)
    assert format != "float16 exact" or weight.dtype == torch.float16
    data = torch.empty(size, dtype=torch.uint8)
    follow_torch_threads()
    failed = functions().fledge_pack(
        FORMATS[format],
        *_source_arguments(weight),
        data.data_ptr(),
    )
    check_memory(failed, f"a weight of {rows} x {columns}")
    return PackedMatrix(format, rows, columns, data)


def quantize_native(
    weight: Tensor, format: str, importance: Tensor | None = None
) -> tuple[QuantizedMatrix, float] | None:
    """The native form of `fledge.kernels.rounding.quantize_reference`: the same arguments and results."""
    weight = _to_supported_dtype(weight)
    rows, columns = weight.shape
    shape = blocks_shape(format, rows, columns)
    data = torch.empty(shape, dtype=torch.uint8)
    if importance is not None:
        importance = torch.nn.functional.pad(importance.float(), (0, -columns % GROUP)).contiguous()
    follow_torch_threads()
    error: float = functions().fledge_quantize(
        FORMATS[format],
        *_source_arguments(weight),
        None if importance is None else importance.data_ptr(),
        data.data_ptr(),
    )
    check_memory(error == -2, f"a weight of {rows} x {columns}")
    return None if error < 0 else (QuantizedMatrix(format, rows, columns, data), error)


def matmul(x: Tensor, weight: PackedMatrix, *, sparse: bool = False) -> Tensor:
    """x (M, columns) -> x W^T (M, rows), float32. sparse: if M is 1, skip pairs of inputs that are zero; exact."""
    assert x.dim() == 2 and x.shape[1] == weight.columns, (tuple(x.shape), weight.columns)
    x = x.detach().float().contiguous()
    y = x.new_empty(x.shape[0], weight.rows)
    follow_torch_threads()
    failed = functions().fledge_matmul(
        weight.code,
        weight.rows,
        weight.columns,
        weight.data.data_ptr(),
        x.data_ptr(),
        x.shape[0],
        y.data_ptr(),
        sparse,
    )
    check_memory(failed, f"a product of {x.shape[0]} rows")
    return y


def check_memory(failed: int | bool, what: str) -> None:
    """Raise FledgeError if the library reports that it could not get memory, or threads, for `what`."""
    if failed:
        raise FledgeError(f"not enough memory for {what}; close other programs, or use a smaller model or batch")


def can_read(*tensors: Tensor) -> bool:
    """Whether the library is present and supports the device and precision of these inputs."""
    return library() is not None and all(x.device.type == "cpu" and x.dtype != torch.float64 for x in tensors)


def can_run(*tensors: Tensor) -> bool:
    """Whether a recurrence with these inputs can run natively: on the CPU, without gradients, with the library."""
    return can_read(*tensors) and not (torch.is_grad_enabled() and any(x.requires_grad for x in tensors))


def wkv_native(
    r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor, state: Tensor, *, is_decay: bool = False
) -> tuple[Tensor, Tensor]:
    """The native form of `wkv_reference`, for float32 on the CPU, without a gradient.

    is_decay: w contains the decay factors, not their logarithms.
    """
    B, T, H, K = r.shape
    V = v.shape[-1]
    _check_inputs((r, k, w), (B, T, H, K))
    _check_inputs((v,), (B, T, H, V))
    _check_inputs((u,), (H, K))
    _check_inputs((state,), (B, H, K, V))
    sizes = (c_int64 * 5)(B, T, H, K, V)
    r, k, v, u, state = (x.detach().contiguous() for x in (r, k, v, u, state))
    decay = (w.detach() if is_decay else torch.exp(w.detach())).contiguous()
    y, after = torch.empty_like(v), torch.empty_like(state)
    follow_torch_threads()
    pointers = (x.data_ptr() for x in (r, k, v, decay, u, state, after, y))
    check_memory(functions().fledge_wkv(sizes, *pointers), f"{T} tokens in one call")
    return y, after


def wkv4_native(
    k: Tensor, v: Tensor, w: Tensor, u: Tensor, state: tuple[Tensor, Tensor, Tensor]
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
    """The native form of `wkv4_reference`, for float32 on the CPU, without a gradient."""
    B, T, width = k.shape
    _check_inputs((k, v, w), (B, T, width))
    _check_inputs((u,), (width,))
    _check_inputs(state, (B, width))
    padding = -width % 16  # the library needs whole vectors of channels
    k, v, w, u = (torch.nn.functional.pad(x.detach(), (0, padding)).contiguous() for x in (k, v, w, u))
    aa, bb, pp = (torch.nn.functional.pad(x.detach(), (0, padding)).contiguous().clone() for x in state)
    y = torch.empty_like(v)
    follow_torch_threads()
    pointers = (x.data_ptr() for x in (k, v, w, u, aa, bb, pp, y))
    check_memory(functions().fledge_wkv4((c_int64 * 3)(*k.shape), *pointers), f"{T} tokens in one call")
    return y[..., :width], (aa[..., :width], bb[..., :width], pp[..., :width])


def _check_inputs(tensors: tuple[Tensor, ...], shape: tuple[int, ...]) -> None:
    """Raise BackendError unless the library supports these tensors: it does not check its arguments."""
    if not can_run(*tensors) or any(x.dtype != torch.float32 for x in tensors):
        raise BackendError(
            f"the native backend runs float32 on a CPU without gradients; {why_missing() or 'choose another backend'}"
        )
    for x in tensors:
        if tuple(x.shape) != shape:
            raise BackendError(f"the native backend needs a tensor of shape {shape}, not {tuple(x.shape)}")
