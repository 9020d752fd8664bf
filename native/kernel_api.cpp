// The C interface of single kernels, used by fledge/kernels/native_ops.py, which checks all sizes.
#include <algorithm>

#include "buffer.h"
#include "cpu.h"
#include "export.h"
#include "matmul.h"
#include "pack.h"
#include "threads.h"

using namespace fledge;

FLEDGE_API int64_t fledge_packed_bytes(int32_t format, int64_t n, int64_t k) { return packed_bytes(format, n, k); }

// Packs a dense weight (n, k) into panels. `data` holds fledge_packed_bytes bytes. Not for the quantized formats.
// F16_EXACT requires a float16 source.
FLEDGE_API int fledge_pack(int32_t format, int64_t n, int64_t k, const void* source, int32_t type, int64_t row_stride,
                           int64_t column_stride, uint8_t* data) {
    return catch_errors([&] {
        const CallLock lock;
        pack(Source{source, type, row_stride, column_stride}, Matrix{format, n, k, nullptr}, data);
    });
}

// Quantizes a dense weight (n, k) into the blocks of INT8 or INT4. importance: null, or one number per input, padded to
// whole groups. Returns the weighted sum of the squared errors, -1 if a weight cannot be represented, or -2 if memory
// is exhausted.
FLEDGE_API double fledge_quantize(int32_t format, int64_t n, int64_t k, const void* source, int32_t type,
                                  int64_t row_stride, int64_t column_stride, const float* importance, uint8_t* data) {
    double error = 0;
    const int status = catch_errors([&] {
        const CallLock lock;
        error =
            quantize(Source{source, type, row_stride, column_stride}, Matrix{format, n, k, nullptr}, importance, data);
    });
    return status ? -2 : error;
}

// y (rows, n) = x (rows, k) W^T. skip_zeros: skip pairs of inputs that are zero (only for a single row in pairs).
FLEDGE_API int fledge_matmul(int32_t format, int64_t n, int64_t k, const uint8_t* data, const float* x, int64_t rows,
                             float* y, int32_t skip_zeros) {
    return catch_errors([&] {
        const CallLock lock;
        const Matrix weight{format, n, k, data};
        ActivationBuffer activations;
        activations.reset(activation_kind(format), rows, k, skip_zeros != 0);
        parallel_rows(rows, [&](int64_t row, int) { activations.set_row(x + row * k, row); });
        multiply({{&weight, &activations.get(), {y, n, n, false}}});
    });
}

// Reads `bytes` bytes `repeats` times with every thread, to measure the memory bandwidth.
FLEDGE_API void fledge_measure_read(const uint8_t* data, int64_t bytes, int64_t repeats) {
    const CallLock lock;
    constexpr int64_t PART_BYTES = 1 << 20;
    for (int64_t i = 0; i < repeats; i++)
        parallel_for((bytes + PART_BYTES - 1) / PART_BYTES, [&](int64_t part, int) {
            const int64_t start = part * PART_BYTES;
            const volatile double result = kernels().read_memory(data + start, std::min(bytes - start, PART_BYTES));
            (void)result;
        });
}

// Multiplies and adds in registers with every thread, to measure the arithmetic throughput. kind: an ActivationKind.
// Returns the number of operations (a multiply-add counts as two).
FLEDGE_API double fledge_measure_compute(int64_t repeats, int32_t kind) {
    const CallLock lock;
    const int parts = 8 * thread_count();
    parallel_for(parts, [&](int64_t, int) { kernels().multiply_registers(repeats, kind); });
    const auto operations_per_vector = static_cast<double>(kernels().vector_floats * (kind == FLOATS ? 2 : 4));
    return static_cast<double>(repeats) * parts * CHAINS * operations_per_vector;
}

// The recurrence of RWKV-5 and RWKV-6. sizes: B, T, H, K, V. r, k, decay (B, T, H, K), v, y (B, T, H, V), u (H, K),
// states (B, H, K, V); all contiguous.
FLEDGE_API int fledge_wkv(const int64_t* sizes, const float* r, const float* k, const float* v, const float* decay,
                          const float* u, const float* state_in, float* state_out, float* y) {
    return catch_errors([&] {
        const CallLock lock;
        const int64_t T = sizes[1], H = sizes[2], K = sizes[3], V = sizes[4];
        const int64_t scratch_size = (K + 3) * round_up(std::max(K, V), LANES);
        Buffer buffer;
        float* scratch = buffer.reserve_floats(scratch_size * thread_count());
        parallel_for(sizes[0] * H, [&](int64_t part, int thread) {
            const int64_t b = part / H;
            const int64_t h = part % H;
            const int64_t key_offset = (b * T * H + h) * K;
            const int64_t value_offset = (b * T * H + h) * V;
            const int64_t state_offset = part * K * V;
            WkvParams p{};
            p.length = T;
            p.keys = K;
            p.values = V;
            p.r = r + key_offset;
            p.k = k + key_offset;
            p.v = v + value_offset;
            p.decay = decay + key_offset;
            p.key_stride = H * K;
            p.value_stride = H * V;
            p.decay_stride = H * K;
            p.bonus = u + h * K;
            p.state_in = state_in + state_offset;
            p.state_out = state_out + state_offset;
            p.y = y + value_offset;
            p.scratch = scratch + thread * scratch_size;
            kernels().wkv(p);
        });
    });
}

// The gradient of fledge_wkv. dy, dstate_out: the gradients of y and of state_out. The results have the shapes of the
// inputs. dw is the gradient of the logarithm of the decay. The caller sums du (B, H, K) over B.
FLEDGE_API int fledge_wkv_gradient(const int64_t* sizes, const float* r, const float* k, const float* v,
                                   const float* decay, const float* u, const float* state_in, const float* dy,
                                   const float* dstate_out, float* dr, float* dk, float* dv, float* dw, float* du,
                                   float* dstate_in) {
    return catch_errors([&] {
        const CallLock lock;
        const int64_t T = sizes[1], H = sizes[2], K = sizes[3], V = sizes[4];
        const int64_t scratch_size = round_up(WkvGradientParams::scratch_floats(T, K, V), LANES);
        Buffer buffer;
        float* scratch = buffer.reserve_floats(scratch_size * thread_count());
        parallel_for(sizes[0] * H, [&](int64_t part, int thread) {
            const int64_t b = part / H;
            const int64_t h = part % H;
            const int64_t key_offset = (b * T * H + h) * K;
            const int64_t value_offset = (b * T * H + h) * V;
            const int64_t state_offset = part * K * V;
            WkvGradientParams p{};
            p.length = T;
            p.keys = K;
            p.values = V;
            p.r = r + key_offset;
            p.k = k + key_offset;
            p.v = v + value_offset;
            p.dy = dy + value_offset;
            p.decay = decay + key_offset;
            p.key_stride = H * K;
            p.value_stride = H * V;
            p.bonus = u + h * K;
            p.state_in = state_in + state_offset;
            p.dstate_out = dstate_out + state_offset;
            p.dr = dr + key_offset;
            p.dk = dk + key_offset;
            p.dv = dv + value_offset;
            p.dw = dw + key_offset;
            p.du = du + part * K;
            p.dstate_in = dstate_in + state_offset;
            p.scratch = scratch + thread * scratch_size;
            kernels().wkv_gradient(p);
        });
    });
}

// The recurrence of RWKV-4. sizes: B, T, A. k, v, w, y (B, T, A) with A a multiple of 16; u (A); aa, bb, pp (B, A),
// updated in place. w: the logarithm of the decay.
FLEDGE_API int fledge_wkv4(const int64_t* sizes, const float* k, const float* v, const float* w, const float* u,
                           float* aa, float* bb, float* pp, float* y) {
    return catch_errors([&] {
        const CallLock lock;
        const int64_t T = sizes[1], A = sizes[2];
        const int64_t blocks = A / LANES;
        parallel_for(sizes[0] * blocks, [&](int64_t part, int) {
            const int64_t b = part / blocks;
            const int64_t channel = part % blocks * LANES;
            const int64_t offset = b * T * A + channel;
            const int64_t state_offset = b * A + channel;
            Wkv4Params p{};
            p.length = T;
            p.width = LANES;
            p.stride = A;
            p.decay_stride = A;
            p.k = k + offset;
            p.v = v + offset;
            p.w = w + offset;
            p.u = u + channel;
            p.aa = aa + state_offset;
            p.bb = bb + state_offset;
            p.pp = pp + state_offset;
            p.y = y + offset;
            kernels().wkv4(p);
        });
    });
}
