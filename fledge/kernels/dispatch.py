"""Choose the backend of a kernel, explain the choice, and let an argument override it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fledge.core.errors import BackendError
from fledge.kernels.native_ops import can_read, can_run, instruction_set, wkv4_native
from fledge.kernels.onednn import why_not_packable
from fledge.kernels.product_kernels import apply_choices
from fledge.kernels.wkv.chunked import wkv_chunked
from fledge.kernels.wkv.native import wkv_differentiable
from fledge.kernels.wkv.reference import wkv_reference
from fledge.kernels.wkv4.chunked import wkv4_chunked
from fledge.kernels.wkv4.reference import State4, wkv4_reference
from fledge.native.library import why_missing

WKV_BACKENDS = {"reference": wkv_reference, "chunked": wkv_chunked}
WKV4_BACKENDS = {"reference": wkv4_reference, "chunked": wkv4_chunked}

# Float32 on a CPU only, and only with the native library. RWKV-4 has no native gradient.
WKV_NATIVE = {"native": wkv_differentiable}
WKV4_INFERENCE = {"native": wkv4_native}

# Up to this number of tokens the loop is as fast as the chunked form. For a single token it is much faster.
SHORT = 3

_preferred: str | None = None
_traced_native = False  # the value that torch.compile traces; compiled code cannot look for the library itself


def prefer(backend: str | None) -> None:
    """Use this backend in all calls that do not name one; None: use the table again. For comparisons."""
    global _preferred
    _preferred = backend


def preferred() -> str | None:
    """The backend set by `prefer`."""
    return _preferred


def prepare_tracing() -> None:
    """Call this before torch.compile: it checks whether the native library is present."""
    global _traced_native
    _traced_native = why_missing() is None


@dataclass(frozen=True)
class BackendChoice:
    """One line of `explain()`: a situation, the backend used in it, and the reason."""

    kernel: str
    situation: str
    backend: str
    reason: str


def explain() -> list[BackendChoice]:
    """The backends used without `backend=`, and the reasons. `fledge doctor` prints them."""
    return [
        *_explain_inference(),
        BackendChoice(
            "wkv, wkv4", f"else up to {SHORT} tokens", "reference", "one step has nothing to run in parallel"
        ),
        BackendChoice(
            "wkv", "else longer", "chunked", "matrix products over chunks, any device, exact for every decay"
        ),
        BackendChoice("wkv4", "else longer", "chunked", "parallel within short chunks, any device"),
        BackendChoice("linear", "any other", "plain", "torch's own product, with gradients"),
    ]


def _explain_inference() -> list[BackendChoice]:
    """The backends of inference on a CPU: the native library, else torch with packed matrices."""
    missing = why_missing()
    if missing is None:
        reason = f"one call for all layers, instruction set {instruction_set()}"
        return [
            BackendChoice("whole model", "inference on a CPU", "native", reason),
            *_explain_products(),
            BackendChoice("wkv", "on a CPU", "native", "the loop in vector instructions, also with a gradient"),
            BackendChoice("wkv4", "inference on a CPU", "native", "the loop in vector instructions"),
        ]
    reason = why_not_packable(torch.float32) or ""
    return [
        BackendChoice("whole model", "inference on a CPU", "torch", missing),
        BackendChoice(
            "linear",
            "large, inference on a CPU",
            "plain" if reason else "packed",
            reason or "oneDNN reads reordered weights about twice as fast",
        ),
    ]


def _explain_products() -> list[BackendChoice]:
    """The instruction sets of the matrix products, with the measurements."""
    situations = {"bfloat16": "bfloat16 weights", "int16": "int8 and int4 weights"}
    return [BackendChoice("product", situations[c.kind], c.name, c.reason) for c in apply_choices()]


def _choose(length: int, backend: str | None, available: list[str], is_native_usable: bool) -> str:
    backend = backend or _preferred
    if backend is None:
        if is_native_usable:
            return "native"
        return "reference" if length <= SHORT else "chunked"
    if backend not in available:
        raise BackendError(f"unknown kernel backend {backend!r}; choose one of: {', '.join(available)}")
    return backend


def _compute_dtype(*tensors: Tensor) -> torch.dtype:
    """float32 for any input dtype, but float64 for float64 inputs, which the tests use."""
    return torch.float64 if any(x.dtype == torch.float64 for x in tensors) else torch.float32


def wkv(
    r: Tensor,
    k: Tensor,
    v: Tensor,
    w: Tensor,
    u: Tensor,
    state: Tensor | None = None,
    *,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """The recurrence of RWKV-5 Eagle and RWKV-6 Finch (paper, equations 5-6 and 17-19).

    r, k, w: (B, T, H, K); v: (B, T, H, V); u: (H, K); state: (B, H, K, V) float32, zeros if None. `w` is the log of the
    decay, <= 0; Eagle passes its static decay expanded, without a copy. The inputs may have any floating dtype. All
    arithmetic, y (B, T, H, V) and the new state (B, H, K, V) are float32 (float64 if any input except the state is).
    The state passed in is not changed. `backend` is one of WKV_BACKENDS or WKV_NATIVE; None uses the table of
    `explain()`. Raises BackendError for an unknown or unavailable backend.
    """
    dtype = _compute_dtype(r, k, v, w, u)
    batch, length, heads, key = r.shape
    if state is None:
        state = r.new_zeros(batch, heads, key, v.shape[-1], dtype=dtype)
    backends = WKV_BACKENDS | WKV_NATIVE
    if torch.compiler.is_compiling():
        is_native_usable = _traced_native and r.device.type == "cpu" and dtype == torch.float32
    else:
        is_native_usable = can_read(r, k, v, w, u, state)
    run = backends[_choose(length, backend, list(backends), is_native_usable)]
    return run(r.to(dtype), k.to(dtype), v.to(dtype), w.to(dtype), u.to(dtype), state.to(dtype))


def wkv4(
    k: Tensor, v: Tensor, w: Tensor, u: Tensor, state: State4, *, backend: str | None = None
) -> tuple[Tensor, State4]:
    """The recurrence of RWKV-4.

    k, v, w: (B, T, A); `w` <= 0 is the log of the decay (a static decay is passed expanded); u: (A); state: aa, bb, pp,
    each (B, A) float32 (at the start: 0, 0, -1e30). Arithmetic and results are float32, or float64 if any input is.
    """
    dtype = _compute_dtype(k, v, w, u)
    aa, bb, pp = (x.to(dtype) for x in state)
    backends = WKV4_BACKENDS | WKV4_INFERENCE
    run = backends[_choose(k.shape[1], backend, list(backends), can_run(k, v, w, u, aa, bb, pp))]
    return run(k.to(dtype), v.to(dtype), w.to(dtype), u.to(dtype), (aa, bb, pp))
