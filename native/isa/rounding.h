// Weights to quantised blocks: one group of 32 inputs of one row at a time (the twin: fledge/kernels/rounding.py).
#pragma once
#include "tables.h"
#include "vector.h"

namespace {

constexpr int STEPS = GROUP / W;

INLINE float from_bits(uint32_t bits) {
    float x;
    __builtin_memcpy(&x, &bits, 4);
    return x;
}

// Ties to even; infinity from 65520 on.
INLINE uint16_t to_half(float x) {
    uint32_t bits;
    __builtin_memcpy(&bits, &x, 4);
    const uint16_t sign = (uint16_t)(bits >> 16 & 0x8000);
    const float size = x < 0 ? -x : x;
    if (!(size < 65520.0f)) return sign | 0x7c00;
    if (size < 0x1p-14f) return (uint16_t)(sign | (uint16_t)(int32_t)(size * 0x1p24f + 12582912.0f - 12582912.0f));
    bits &= 0x7fffffff;
    return (uint16_t)(sign | (((bits + 0xfff + (bits >> 13 & 1)) >> 13) - (112 << 10)));
}

INLINE float from_half(uint16_t h) {
    const float sign = h & 0x8000 ? -1.0f : 1.0f;
    const uint32_t rest = h & 0x7fff;
    if (rest >= 0x7c00) return sign * __builtin_inff();
    return sign * (rest < 0x400 ? (float)rest * 0x1p-24f : from_bits((rest << 13) + ((127 - 15) << 23)));
}

INLINE vf nearest(vf x) { return x + 12582912.0f - 12582912.0f; }  // ties to even, for |x| < 2^22
INLINE vf clamp(vf x, float low, float high) {
    x = select((vi)(x < splat(low)), splat(low), x);
    return select((vi)(x > splat(high)), splat(high), x);
}

struct Fit {
    uint16_t scale, least;
    float error;  // weighted sum of squares
    vf q[STEPS];
};

INLINE void extremes(const vf* w, float& low, float& high) {
    vf small = w[0], large = w[0];
    for (int i = 1; i < STEPS; i++) {
        small = select((vi)(w[i] < small), w[i], small);
        large = select((vi)(w[i] > large), w[i], large);
    }
    low = small[0], high = large[0];
    for (int i = 1; i < W; i++) {
        low = small[i] < low ? small[i] : low;
        high = large[i] > high ? large[i] : high;
    }
}

// The integers for a scale and a minimum as float16 has them, and the error that they leave.
INLINE void round_to(const vf* w, const vf* importance, float low, float high, Fit& fit) {
    const float scale = from_half(fit.scale), least = from_half(fit.least);
    const float inverse = scale > 0 ? 1.0f / scale : 0.0f;
    vf error = {};
    for (int i = 0; i < STEPS; i++) {
        fit.q[i] = clamp(nearest(clamp((w[i] - least) * inverse, -1000.0f, 1000.0f)), low, high);
        const vf off = w[i] - fma(fit.q[i], splat(scale), splat(least));
        error = fma(importance[i] * off, off, error);
    }
    fit.error = sum(error);
}

INLINE Fit fit_int8(const vf* w, const vf* importance) {
    float low, high;
    extremes(w, low, high);
    Fit fit{};
    fit.scale = to_half((-low > high ? -low : high) / 127.0f);
    round_to(w, importance, -127.0f, 127.0f, fit);
    return fit;
}

// The scale and minimum that leave the least error for the integers at hand (weighted least squares).
INLINE void refit(const vf* w, const vf* importance, Fit& fit) {
    vf n = {}, q = {}, qq = {}, x = {}, qx = {};
    for (int i = 0; i < STEPS; i++) {
        const vf weighted = importance[i] * fit.q[i];
        n += importance[i], q += weighted, x += importance[i] * w[i];
        qq = fma(weighted, fit.q[i], qq), qx = fma(weighted, w[i], qx);
    }
    const float N = sum(n), Q = sum(q), QQ = sum(qq), X = sum(x), QX = sum(qx), D = N * QQ - Q * Q;
    if (!(D > 1e-6f * N * QQ)) return;  // all integers are equal
    const float scale = (N * QX - Q * X) / D;
    if (!(scale > 0)) return;
    fit.scale = to_half(scale);
    fit.least = to_half((X - scale * Q) / N);
}

// Several ranges, from the full one to one that cuts off a fifth; each is refined once. The best stays.
INLINE Fit fit_int4(const vf* w, const vf* importance) {
    float low, high;
    extremes(w, low, high);
    const float middle = 0.5f * (low + high), reach = 0.5f * (high - low);
    Fit best{};
    for (int step = 0; step < 6; step++) {
        const float part = reach * (1.0f - 0.04f * (float)step);
        Fit fit{};
        fit.scale = to_half(2.0f * part / 15.0f);
        fit.least = to_half(middle - part);
        round_to(w, importance, 0.0f, 15.0f, fit);
        if (step == 0 || fit.error < best.error) best = fit;
        refit(w, importance, fit);
        round_to(w, importance, 0.0f, 15.0f, fit);
        if (fit.error < best.error) best = fit;
    }
    return best;
}

// 64 rows of one group (rows[i][32]) into one block. Returns the error, or a negative number where a weight is not
// finite or too large for float16.
double quantise(int32_t format, const float* rows, const float* importance, uint8_t* block) {
    vf by[STEPS];
    for (int i = 0; i < STEPS; i++) by[i] = importance ? load(importance + i * W) : splat(1.0f);
    uint16_t* halves = (uint16_t*)block;
    uint8_t* data = block + (format == INT8 ? 2 : 4) * PANEL;
    if (format == INT4) __builtin_memset(data, 0, GROUP * PANEL / 2);
    double total = 0;
    for (int row = 0; row < PANEL; row++) {
        vf w[STEPS];
        for (int i = 0; i < STEPS; i++) w[i] = load(rows + row * GROUP + i * W);
        const Fit fit = format == INT8 ? fit_int8(w, by) : fit_int4(w, by);
        if (!(fit.error < 1e30f) || (fit.scale & 0x7fff) >= 0x7c00 || (fit.least & 0x7fff) >= 0x7c00) return -1;
        total += fit.error;
        halves[row] = fit.scale;
        if (format == INT4) halves[PANEL + row] = fit.least;
        for (int i = 0; i < GROUP; i++) {
            const int32_t q = (int32_t)fit.q[i / W][i % W];
            if (format == INT8)
                ((int8_t*)data)[(i / 2 * PANEL + row) * 2 + i % 2] = (int8_t)q;
            else  // word row % 16 of pair i / 2; see fledge/kernels/quantised.py
                data[i / 2 * PANEL + row % 16 * 4 + i % 2 * 2 + row / 32] |= (uint8_t)(q << (row / 16 % 2 * 4));
        }
    }
    return total;
}

}  // namespace
