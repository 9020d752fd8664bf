// Quantizes weights, one group of 32 inputs of one row at a time. The reference implementation is
// fledge/kernels/rounding.py.
#pragma once
#include "tables.h"
#include "vector.h"

namespace {

using namespace fledge;

constexpr int GROUP_VECTORS = GROUP / W;

INLINE float bits_to_float(uint32_t bits) {
    float x;
    __builtin_memcpy(&x, &bits, 4);
    return x;
}

// Ties to even. The result is infinity from 65520 on.
INLINE uint16_t float_to_half(float x) {
    uint32_t bits;
    __builtin_memcpy(&bits, &x, 4);
    const uint16_t sign = (uint16_t)(bits >> 16 & 0x8000);
    const float size = x < 0 ? -x : x;
    if (!(size < 65520.0f)) return sign | 0x7c00;
    if (size < 0x1p-14f) return (uint16_t)(sign | (uint16_t)(int32_t)(size * 0x1p24f + 12582912.0f - 12582912.0f));
    bits &= 0x7fffffff;
    return (uint16_t)(sign | (((bits + 0xfff + (bits >> 13 & 1)) >> 13) - (112 << 10)));
}

INLINE float half_to_float(uint16_t half) {
    const float sign = half & 0x8000 ? -1.0f : 1.0f;
    const uint32_t magnitude = half & 0x7fff;
    if (magnitude >= 0x7c00) return sign * __builtin_inff();
    return sign *
           (magnitude < 0x400 ? (float)magnitude * 0x1p-24f : bits_to_float((magnitude << 13) + ((127 - 15) << 23)));
}

INLINE vf round_nearest(vf x) { return x + 12582912.0f - 12582912.0f; }  // ties to even, for |x| < 2^22
INLINE vf clamp(vf x, float low, float high) {
    x = select((vi)(x < splat(low)), splat(low), x);
    return select((vi)(x > splat(high)), splat(high), x);
}

// The integers q of a group, with w = q * scale + minimum.
struct GroupFit {
    uint16_t scale;    // float16
    uint16_t minimum;  // float16
    float error;       // weighted sum of squares
    vf q[GROUP_VECTORS];
};

INLINE void find_range(const vf* w, float& low, float& high) {
    vf smallest = w[0];
    vf largest = w[0];
    for (int i = 1; i < GROUP_VECTORS; i++) {
        smallest = select((vi)(w[i] < smallest), w[i], smallest);
        largest = select((vi)(w[i] > largest), w[i], largest);
    }
    low = smallest[0];
    high = largest[0];
    for (int i = 1; i < W; i++) {
        low = smallest[i] < low ? smallest[i] : low;
        high = largest[i] > high ? largest[i] : high;
    }
}

// Computes the integers for the scale and minimum of `fit`, and their error.
INLINE void round_to(const vf* w, const vf* importance, float low, float high, GroupFit& fit) {
    const float scale = half_to_float(fit.scale);
    const float minimum = half_to_float(fit.minimum);
    const float inverse = scale > 0 ? 1.0f / scale : 0.0f;
    vf error = {};
    for (int i = 0; i < GROUP_VECTORS; i++) {
        fit.q[i] = clamp(round_nearest(clamp((w[i] - minimum) * inverse, -1000.0f, 1000.0f)), low, high);
        const vf difference = w[i] - fma(fit.q[i], splat(scale), splat(minimum));
        error = fma(importance[i] * difference, difference, error);
    }
    fit.error = sum(error);
}

INLINE GroupFit fit_int8(const vf* w, const vf* importance) {
    float low;
    float high;
    find_range(w, low, high);
    GroupFit fit{};
    fit.scale = float_to_half((-low > high ? -low : high) / 127.0f);
    round_to(w, importance, -127.0f, 127.0f, fit);
    return fit;
}

// Sets the scale and minimum with the least error for the current integers (weighted least squares).
INLINE void refine_scale(const vf* w, const vf* importance, GroupFit& fit) {
    vf n = {};
    vf q = {};
    vf qq = {};
    vf x = {};
    vf qx = {};
    for (int i = 0; i < GROUP_VECTORS; i++) {
        const vf weighted_q = importance[i] * fit.q[i];
        n += importance[i];
        q += weighted_q;
        x += importance[i] * w[i];
        qq = fma(weighted_q, fit.q[i], qq);
        qx = fma(weighted_q, w[i], qx);
    }
    const float N = sum(n), Q = sum(q), QQ = sum(qq), X = sum(x), QX = sum(qx);
    const float D = N * QQ - Q * Q;
    if (!(D > 1e-6f * N * QQ)) return;  // all integers are equal
    const float scale = (N * QX - Q * X) / D;
    if (!(scale > 0)) return;
    fit.scale = float_to_half(scale);
    fit.minimum = float_to_half((X - scale * Q) / N);
}

// Tries six ranges, from the full one down to 80% of it, and refines each once. Returns the best fit.
INLINE GroupFit fit_int4(const vf* w, const vf* importance) {
    float low;
    float high;
    find_range(w, low, high);
    const float middle = 0.5f * (low + high);
    const float half_range = 0.5f * (high - low);
    GroupFit best{};
    for (int attempt = 0; attempt < 6; attempt++) {
        const float part = half_range * (1.0f - 0.04f * (float)attempt);
        GroupFit fit{};
        fit.scale = float_to_half(2.0f * part / 15.0f);
        fit.minimum = float_to_half(middle - part);
        round_to(w, importance, 0.0f, 15.0f, fit);
        if (attempt == 0 || fit.error < best.error) best = fit;
        refine_scale(w, importance, fit);
        round_to(w, importance, 0.0f, 15.0f, fit);
        if (fit.error < best.error) best = fit;
    }
    return best;
}

double quantize_block(int32_t format, const float* rows, const float* importance, uint8_t* block) {
    vf weights[GROUP_VECTORS];
    for (int i = 0; i < GROUP_VECTORS; i++) weights[i] = importance ? load(importance + i * W) : splat(1.0f);
    uint16_t* halves = (uint16_t*)block;
    uint8_t* data = block + (format == INT8 ? 2 : 4) * PANEL;
    if (format == INT4) __builtin_memset(data, 0, GROUP * PANEL / 2);
    double total = 0;
    for (int row = 0; row < PANEL; row++) {
        vf w[GROUP_VECTORS];
        for (int i = 0; i < GROUP_VECTORS; i++) w[i] = load(rows + row * GROUP + i * W);
        const GroupFit fit = format == INT8 ? fit_int8(w, weights) : fit_int4(w, weights);
        if (!(fit.error < 1e30f) || (fit.scale & 0x7fff) >= 0x7c00 || (fit.minimum & 0x7fff) >= 0x7c00) return -1;
        total += fit.error;
        halves[row] = fit.scale;
        if (format == INT4) halves[PANEL + row] = fit.minimum;
        for (int i = 0; i < GROUP; i++) {
            const int32_t q = (int32_t)fit.q[i / W][i % W];
            if (format == INT8)
                ((int8_t*)data)[(i / 2 * PANEL + row) * 2 + i % 2] = (int8_t)q;
            else  // word row % 16 of pair i / 2; fledge/kernels/quantized.py describes the layout
                data[i / 2 * PANEL + row % 16 * 4 + i % 2 * 2 + row / 32] |= (uint8_t)(q << (row / 16 % 2 * 4));
        }
    }
    return total;
}

}  // namespace
