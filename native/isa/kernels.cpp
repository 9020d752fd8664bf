// All kernels for one instruction set. The build compiles this file several times, each time with the compiler flags of
// one instruction set and with FLEDGE_TABLE set to the name of its table.
#include "activations.h"
#include "gradient.h"
#include "products.h"
#include "recurrence.h"
#include "rounding.h"
#include "sampling.h"
#include "training.h"
#if defined(FLEDGE_TILES)
#include "tiles.h"
#endif

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
        const vf difference = load(x + i) - mean;
        squares = fma(difference, difference, squares);
    }
    float variance = sum(squares);
    for (int64_t i = whole; i < width; i++) variance += (x[i] - mean) * (x[i] - mean);
    const float inverse = 1.0f / __builtin_sqrtf(variance / (float)width + eps);
    for (int64_t i = 0; i < whole; i += W)
        store(y + i, fma((load(x + i) - mean) * inverse, load(weight + i), load(bias + i)));
    for (int64_t i = whole; i < width; i++) y[i] = (x[i] - mean) * inverse * weight[i] + bias[i];
}

void lerp(const float* x, const float* previous, const float* mix, const float* extra_mix, int64_t n, float* y) {
    for (int64_t i = 0; i < n; i += W) {
        const vf current = load(x + i);
        const vf difference = load(previous + i) - current;
        const vf weight = extra_mix ? load(mix + i) + load(extra_mix + i) : load(mix + i);
        store(y + i, fma(difference, weight, current));
    }
}

void apply_tanh(float* x, int64_t n) {
    for (int64_t i = 0; i < n; i += W) store(x + i, tanh(load(x + i)));
}

void apply_sigmoid(float* x, int64_t n) {
    for (int64_t i = 0; i < n; i += W) store(x + i, sigmoid(load(x + i)));
}

void squared_relu(float* x, int64_t n) {
    for (int64_t i = 0; i < n; i += W) {
        const vf value = load(x + i);
        // Not (value > 0), because NaN must stay NaN.
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

double read_memory(const void* data, int64_t bytes) {
    const float* p = (const float*)data;
    vi bits[8] = {};
    const int64_t whole = bytes / 4 / (8 * W) * (8 * W);
    for (int64_t i = 0; i < whole; i += 8 * W) {
        __builtin_prefetch((const uint8_t*)(p + i) + PREFETCH_BYTES);
        for (int j = 0; j < 8; j++) bits[j] ^= load_ints(p + i + j * W);
    }
    vi combined = {};
    for (int j = 0; j < 8; j++) combined ^= bits[j];
    int32_t result = 0;
    for (int i = 0; i < W; i++) result ^= combined[i];
    return result;
}

// Hides the value of a vector from the compiler, without an instruction.
#if defined(__x86_64__)
#define HIDE(x) __asm__ volatile("" : "+v"(x))
#else
#define HIDE(x) __asm__ volatile("" : "+m"(x))
#endif

template <class Sum, class Step>
void multiply_chains(int64_t repeats, Step step) {
    Sum sums[CHAINS] = {};
    vi a = splat(1);
    const vi b = splat(1);
    for (int j = 0; j < CHAINS; j++) HIDE(sums[j]);  // otherwise the compiler would compute only one of the equal sums
    for (int64_t i = 0; i < repeats; i++) {
        HIDE(a);
        for (int j = 0; j < CHAINS; j++) sums[j] = step(sums[j], a, b);
    }
    for (int j = 0; j < CHAINS; j++) HIDE(sums[j]);
}

// CHAINS independent products, `repeats` times.
void multiply_registers(int64_t repeats, int32_t kind) {
    if (kind == FLOATS) multiply_chains<vf>(repeats, [](vf sum, vi a, vi b) { return fma((vf)a, (vf)b, sum); });
    if (kind == BF16_PAIRS) multiply_chains<vf>(repeats, [](vf sum, vi a, vi b) { return dot_bf16(sum, a, b); });
    if (kind == I16_PAIRS) multiply_chains<vi>(repeats, [](vi sum, vi a, vi b) { return dot_i16(sum, a, b); });
}

}  // namespace

#define STRINGIFY_(x) #x
#define STRINGIFY(x) STRINGIFY_(x)

namespace fledge {

const Kernels FLEDGE_TABLE = {
    .name = STRINGIFY(FLEDGE_ISA),
    .vector_floats = W,
#if defined(FLEDGE_TILES)
    .multiply_panel = multiply_panel_with_tiles,
    .pack_row = pack_row_for_tiles,
#else
    .multiply_panel = multiply_panel,
    .pack_row = pack_row,
#endif
    .wkv = wkv,
    .wkv_gradient = wkv_gradient,
    .wkv4 = wkv4,
    .layer_norm = layer_norm,
    .lerp = lerp,
    .tanh = apply_tanh,
    .sigmoid = apply_sigmoid,
    .squared_relu = squared_relu,
    .decay = decay,
    .gate = gate,
    .gated_add = gated_add,
    .multiply = multiply,
    .quantize_block = quantize_block,
    .find_extremes = find_extremes,
    .compute_weights = compute_weights,
    .sum_weights_from = sum_weights_from,
    .sum_buckets = sum_buckets,
    .gather_bucket = gather_bucket,
    .apply_temperature = apply_temperature,
    .training =
        {
            .mix = mix_tokens,
            .mix_gradient = mix_tokens_gradient,
            .gated_norm = gated_norm,
            .gated_norm_gradient = gated_norm_gradient,
            .cross_entropy = cross_entropy,
            .squared_relu = training_squared_relu,
            .squared_relu_gradient = training_squared_relu_gradient,
            .gated_value = gated_value,
            .gated_value_gradient = gated_value_gradient,
            .decay_gradient = decay_gradient,
        },
    .read_memory = read_memory,
    .multiply_registers = multiply_registers,
};

}  // namespace fledge
