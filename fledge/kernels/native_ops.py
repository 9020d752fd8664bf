"""The native library's products and recurrences as functions on tensors, for inference on a CPU.

A weight is packed once (`pack`) and then multiplied often (`matmul`). The bytes of a packed weight are those that
`native/isa/tables.h` describes and, for the quantised formats, `fledge/kernels/quantized.py`. Every function here has
a twin in plain torch: `linear`, `quantised_linear`, `wkv_reference`, `wkv4_reference`. No gradients.

Not here: finding the library (fledge.native.library), whole models (fledge.models.native_model), and the one gradient
that the
library has (fledge.kernels.wkv.native).
"""

from __future__ import annotations

import ctypes
from ctypes import POINTER, c_char_p, c_double, c_float, c_int, c_int32, c_int64, c_void_p
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from fledge.core.errors import BackendError, FledgeError
from fledge.kernels.quantized import GROUP, QuantizedMatrix, blocks_shape
from fledge.native.library import library, why_missing

FORMATS = {"float32": 0, "bfloat16": 1, "int8": 2, "int4": 3, "bfloat16 exact": 4, "float16 exact": 5}
"""How weights are stored and multiplied. "bfloat16" rounds activations to bfloat16 as torch's product does; the two
"exact" ones keep weights that came with 16 bits as they are, and multiply in float32 without rounding anything."""

STORED = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
KINDS = {"float32": 0, "bfloat16": 1, "int16": 2}

_SIGNATURES: dict[str, tuple[object, list[object]]] = {
    "fledge_instruction_sets": (c_char_p, []),
    "fledge_instruction_set": (c_char_p, []),
    "fledge_choose": (c_int, [c_char_p]),
    "fledge_set_threads": (None, [c_int]),
    "fledge_threads": (c_int, []),
    "fledge_packed_bytes": (c_int64, [c_int32, c_int64, c_int64]),
    "fledge_pack": (c_int, [c_int32, c_int64, c_int64, c_void_p, c_int32, c_int64, c_int64, c_void_p]),
    "fledge_quantise": (
        c_double,
        [c_int32, c_int64, c_int64, c_void_p, c_int32, c_int64, c_int64, c_void_p, c_void_p],
    ),
    "fledge_matmul": (c_int, [c_int32, c_int64, c_int64, c_void_p, c_void_p, c_int64, c_void_p, c_int32]),
    "fledge_read": (None, [c_void_p, c_int64, c_int64]),
    "fledge_burn": (c_double, [c_int64, c_int32]),
    "fledge_wkv": (c_int, [POINTER(c_int64), *[c_void_p] * 8]),
    "fledge_wkv_gradient": (c_int, [POINTER(c_int64), *[c_void_p] * 14]),
    "fledge_wkv4": (c_int, [POINTER(c_int64), *[c_void_p] * 8]),
    "fledge_sample": (c_int, [c_void_p, c_int64, c_int64, c_void_p]),
    "fledge_model_new": (c_void_p, [POINTER(c_int64), c_float, c_float]),
    "fledge_model_free": (None, [c_void_p]),
    "fledge_model_vector": (c_int, [c_void_p, c_int64, c_char_p, c_void_p, c_int64]),
    "fledge_model_matrix": (c_int, [c_void_p, c_int64, c_char_p, c_int32, c_int64, c_int64, c_void_p]),
    "fledge_model_embedding": (None, [c_void_p, c_void_p, c_int32, c_int64, c_int64]),
    "fledge_model_check": (c_char_p, [c_void_p]),
    "fledge_model_forward": (
        c_int,
        [c_void_p, c_void_p, c_int64, c_int64, *[c_void_p] * 3, c_int32, c_void_p, c_int32],
    ),
}


@lru_cache(maxsize=1)
def functions() -> ctypes.CDLL:
    """The library with its functions declared. Raises BackendError where it is missing."""
    found = library()
    if found is None:
        raise BackendError(str(why_missing()))
    for name, (result, arguments) in _SIGNATURES.items():
        function = getattr(found, name, None)
        if function is None:
            raise BackendError(f"the native library has no {name}; it is from another version: install Fledge again")
        function.restype, function.argtypes = result, arguments
    return found


def instruction_sets() -> list[str]:
    """Those that this processor can run, best first; empty without the library."""
    return [] if library() is None else functions().fledge_instruction_sets().decode().split(",")


def instruction_set() -> str:
    """The one in use."""
    name: str = functions().fledge_instruction_set().decode()
    return name


def choose(name: str = "") -> None:
    """Use one of `instruction_sets()` from now on; empty: the best. For tests and comparisons."""
    if functions().fledge_choose(name.encode()):
        raise BackendError(f"instruction set {name!r} is not one of: {', '.join(instruction_sets())}")


def follow_torch_threads() -> None:
    """Use as many threads as torch does, which `torch.set_num_threads` changes."""
    count = torch.get_num_threads()
    if functions().fledge_threads() != count:
        functions().fledge_set_threads(count)


@dataclass(frozen=True, eq=False)
class PackedMatrix:
    """A weight (rows, columns) as the kernels read it; `data` is uint8 and stays where it is."""

    format: str  # one of FORMATS
    rows: int
    columns: int
    data: Tensor

    @property
    def code(self) -> int:
        """What the library calls the format."""
        return FORMATS[self.format]

    @property
    def nbytes(self) -> int:
        """Bytes it takes."""
        return self.data.numel()

    @classmethod
    def of(cls, weight: QuantizedMatrix) -> PackedMatrix:
        """A quantised weight, in place: its bytes already lie as the kernels read them."""
        return cls(weight.format, weight.rows, weight.columns, weight.data.contiguous())


def _storable(weight: Tensor) -> Tensor:
    """The weight in a dtype that the library reads."""
    weight = weight.detach()
    return weight if weight.dtype in STORED else weight.float()


def _source(weight: Tensor) -> tuple[int, ...]:
    """How the library is told of a dense weight: rows, columns, address, dtype and both strides."""
    return (*weight.shape, weight.data_ptr(), STORED[weight.dtype], *weight.stride())


def pack(weight: Tensor, format: str) -> PackedMatrix:
    """A dense weight (rows, columns), any float dtype and strides, as one of the formats that are not quantised."""
    weight = _storable(weight)
    rows, columns = weight.shape
    size = functions().fledge_packed_bytes(FORMATS[format], rows, columns)
    assert size > 0 and format not in ("int8", "int4"), (format, rows, columns)
    assert format != "float16 exact" or weight.dtype == torch.float16
    data = torch.empty(size, dtype=torch.uint8)
    follow_torch_threads()
    failed = functions().fledge_pack(
        FORMATS[format],
        *_source(weight),
        data.data_ptr(),
    )
    enough_memory(failed, f"a weight of {rows} x {columns}")
    return PackedMatrix(format, rows, columns, data)


def quantize_native(
    weight: Tensor, format: str, importance: Tensor | None = None
) -> tuple[QuantizedMatrix, float] | None:
    """As `fledge.kernels.rounding.quantise_reference`, with the same arguments and results."""
    weight = _storable(weight)
    rows, columns = weight.shape
    shape = blocks_shape(format, rows, columns)
    data = torch.empty(shape, dtype=torch.uint8)
    if importance is not None:
        importance = torch.nn.functional.pad(importance.float(), (0, -columns % GROUP)).contiguous()
    follow_torch_threads()
    error: float = functions().fledge_quantise(
        FORMATS[format],
        *_source(weight),
        None if importance is None else importance.data_ptr(),
        data.data_ptr(),
    )
    enough_memory(error == -2, f"a weight of {rows} x {columns}")
    return None if error < 0 else (QuantizedMatrix(format, rows, columns, data), error)


def matmul(x: Tensor, weight: PackedMatrix, *, sparse: bool = False) -> Tensor:
    """x (M, columns) -> x W^T (M, rows), float32. sparse: skip pairs of inputs that are zero, where M is 1; exact."""
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
    enough_memory(failed, f"a product of {x.shape[0]} rows")
    return y


def enough_memory(failed: int | bool, what: str) -> None:
    """Raise FledgeError where the library answered that it could not get memory, or threads, for `what`."""
    if failed:
        raise FledgeError(f"not enough memory for {what}; close other programs, or take a smaller model or batch")


def readable(*tensors: Tensor) -> bool:
    """Whether the library is there and these inputs are on the CPU and in no more precision than it has."""
    return library() is not None and all(x.device.type == "cpu" and x.dtype != torch.float64 for x in tensors)


def usable(*tensors: Tensor) -> bool:
    """Whether a recurrence with these inputs can run here: on the CPU, without gradients, with the library."""
    return readable(*tensors) and not (torch.is_grad_enabled() and any(x.requires_grad for x in tensors))


def wkv_native(r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """As `wkv_reference`, for float32 on the CPU, without a gradient."""
    B, T, H, K = r.shape
    V = v.shape[-1]
    _check_usable((r, k, w), (B, T, H, K))
    _check_usable((v,), (B, T, H, V))
    _check_usable((u,), (H, K))
    _check_usable((state,), (B, H, K, V))
    sizes = (c_int64 * 5)(B, T, H, K, V)
    r, k, v, u, state = (x.detach().contiguous() for x in (r, k, v, u, state))
    decay = torch.exp(w.detach()).contiguous()
    y, after = torch.empty_like(v), torch.empty_like(state)
    follow_torch_threads()
    pointers = (x.data_ptr() for x in (r, k, v, decay, u, state, after, y))
    enough_memory(functions().fledge_wkv(sizes, *pointers), f"{T} tokens at once")
    return y, after


def wkv4_native(
    k: Tensor, v: Tensor, w: Tensor, u: Tensor, state: tuple[Tensor, Tensor, Tensor]
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
    """As `wkv4_reference`, for float32 on the CPU, without a gradient."""
    B, T, width = k.shape
    _check_usable((k, v, w), (B, T, width))
    _check_usable((u,), (width,))
    _check_usable(state, (B, width))
    missing = -width % 16  # channels come in whole vectors
    k, v, w, u = (torch.nn.functional.pad(x.detach(), (0, missing)).contiguous() for x in (k, v, w, u))
    aa, bb, pp = (torch.nn.functional.pad(x.detach(), (0, missing)).contiguous().clone() for x in state)
    y = torch.empty_like(v)
    follow_torch_threads()
    pointers = (x.data_ptr() for x in (k, v, w, u, aa, bb, pp, y))
    enough_memory(functions().fledge_wkv4((c_int64 * 3)(*k.shape), *pointers), f"{T} tokens at once")
    return y[..., :width], (aa[..., :width], bb[..., :width], pp[..., :width])


def _check_usable(tensors: tuple[Tensor, ...], shape: tuple[int, ...]) -> None:
    """Raise BackendError unless the library can read these: it trusts what it is given."""
    if not usable(*tensors) or any(x.dtype != torch.float32 for x in tensors):
        raise BackendError(
            f"the native backend runs float32 on a CPU without gradients; {why_missing() or 'choose another backend'}"
        )
    for x in tensors:
        if tuple(x.shape) != shape:
            raise BackendError(f"the native backend needs a tensor of {shape} where {tuple(x.shape)} was given")
