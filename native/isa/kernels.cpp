// All kernels for one instruction set. The build compiles this file several times, each time with that set's compiler
// flags and FLEDGE_TABLE naming the table it fills.
#include "products.h"
#include "recurrence.h"

#include "gradient.h"
#include "rounding.h"
#include "sampling.h"

namespace {

void layer_norm(const float* x, const float* weight, const float* bias, float eps, int64_t width, float* y) {
    const int64_t whole = width / W * W;
    vf total = {};
    for (int64_t i = 0; i < whole; i += W) total += load(x + i);
    float mean = sum(total);
    for (int64_t i = whole; i < width; i++) mean += x[i];
    mean /= (float)width;
    vf squares = {};
    for (int64_t i = 0; i < whole; i += W) {
        const vf d = load(x + i) - mean;
        squares = fma(d, d, squares);
    }
    float variance = sum(squares);
    for (int64_t i = whole; i < width; i++) variance += (x[i] - mean) * (x[i] - mean);
    const float inverse = 1.0f / __builtin_sqrtf(variance / (float)width + eps);
    for (int64_t i = 0; i < whole; i += W)
        store(y + i, fma((load(x + i) - mean) * inverse, load(weight + i), load(bias + i)));
    for (int64_t i = whole; i < width; i++) y[i] = (x[i] - mean) * inverse * weight[i] + bias[i];
}

// x + (before - x) (mix + more); `more` may be null.
void lerp(const float* x, const float* before, const float* mix, const float* more, int64_t n, float* y) {
    for (int64_t i = 0; i < n; i += W) {
        const vf now = load(x + i), delta = load(before + i) - now;
        const vf weight = more ? load(mix + i) + load(more + i) : load(mix + i);
        store(y + i, fma(delta, weight, now));
    }
}

void tanh_all(float* x, int64_t n) {
    for (int64_t i = 0; i < n; i += W) store(x + i, tanh(load(x + i)));
}

void sigmoid_all(float* x, int64_t n) {
    for (int64_t i = 0; i < n; i += W) store(x + i, sigmoid(load(x + i)));
}

void squared_relu(float* x, int64_t n) {
    for (int64_t i = 0; i < n; i += W) {
        const vf value = load(x + i);
        // Not (value > 0), so that NaN stays.
        const vf positive = select((vi)(value <= splat(0.0f)), splat(0.0f), value);
        store(x + i, positive * positive);
    }
}

void decay(const float* x, const float* base, int64_t n, float* y) {
    for (int64_t i = 0; i < n; i += W) store(y + i, exp(-exp(load(base + i) + load(x + i))));
}

void gate(float* y, const float* g, int64_t n) {
    for (int64_t i = 0; i < n; i += W) store(y + i, load(y + i) * silu(load(g + i)));
}

void gated_add(float* x, const float* r, const float* v, int64_t n) {
    for (int64_t i = 0; i < n; i += W) store(x + i, fma(sigmoid(load(r + i)), load(v + i), load(x + i)));
}

void multiply(float* x, const float* y, int64_t n) {
    for (int64_t i = 0; i < n; i += W) store(x + i, load(x + i) * load(y + i));
}

double read_all(const void* data, int64_t bytes) {
    const float* p = (const float*)data;
    vi found[8] = {};
    const int64_t whole = bytes / 4 / (8 * W) * (8 * W);
    for (int64_t i = 0; i < whole; i += 8 * W) {
        __builtin_prefetch((const uint8_t*)(p + i) + AHEAD);
        for (int j = 0; j < 8; j++) found[j] ^= load_ints(p + i + j * W);
    }
    vi all = {};
    for (int j = 0; j < 8; j++) all ^= found[j];
    int32_t last = 0;
    for (int i = 0; i < W; i++) last ^= all[i];
    return last;
}

// Makes the compiler forget what it knows of a vector, without moving it.
#if defined(__x86_64__)
#define HIDE(x) __asm__ volatile("" : "+v"(x))
#else
#define HIDE(x) __asm__ volatile("" : "+m"(x))
#endif

template <class Sum, class Step>
void burn_chains(int64_t turns, Step step) {
    Sum sums[CHAINS] = {};
    vi a = splat(1), b = splat(1);
    for (int j = 0; j < CHAINS; j++) HIDE(sums[j]);  // or the compiler would see that all sums are the same
    for (int64_t t = 0; t < turns; t++) {
        HIDE(a);
        for (int j = 0; j < CHAINS; j++) sums[j] = step(sums[j], a, b);
    }
    for (int j = 0; j < CHAINS; j++) HIDE(sums[j]);
}

// Independent products of registers, `turns` times CHAINS of them.
void burn(int64_t turns, int32_t kind) {
    if (kind == FLOATS) burn_chains<vf>(turns, [](vf sum, vi a, vi b) { return fma((vf)a, (vf)b, sum); });
    if (kind == BF16_PAIRS) burn_chains<vf>(turns, [](vf sum, vi a, vi b) { return dot_bf16(sum, a, b); });
    if (kind == I16_PAIRS) burn_chains<vi>(turns, [](vi sum, vi a, vi b) { return dot_i16(sum, a, b); });
}

}  // namespace

#define NAME_(x) #x
#define NAME(x) NAME_(x)

namespace fledge {
const Kernels FLEDGE_TABLE = {
    NAME(FLEDGE_ISA), W,        panel,    prepare,     wkv,          wkv_gradient, wkv4,
    layer_norm,       lerp,     tanh_all, sigmoid_all, squared_relu, decay,        gate,
    gated_add,        multiply, quantise, extremes,    weigh,        above,        spread,
    gather,           heat,     read_all, burn,
};
}
