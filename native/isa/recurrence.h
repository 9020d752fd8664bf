// The recurrences, token by token (equations 5 and 18 of the paper; for RWKV-4, the form with a running maximum).
//
// The state of one head has 64 x 64 floats and stays in the level-1 cache. So a step costs three operations per number
// of the state, a few percent of the products around it. A chunked form, which replaces these operations with matrix
// products, would gain nothing here.
#pragma once
#include "tables.h"
#include "vector.h"

namespace {

using namespace fledge;

INLINE void copy(float* to, const float* from, int64_t n) { __builtin_memcpy(to, from, (size_t)n * 4); }

// One token for N vectors of value channels. All pointers to values and states are those of the first of these
// channels.
template <int N, bool STREAMING>
INLINE void wkv_columns(int64_t keys, int64_t padded_values, const float* r, const float* k, const float* v,
                        const float* decay, float own_weight, const float* state_in, float* state_out, float* y) {
    vf value[N];
    vf out[N];
    for (int n = 0; n < N; n++) {
        value[n] = load(v + n * W);
        out[n] = value[n] * own_weight;
    }
    for (int64_t i = 0; i < keys; i++) {
        const vf ri = splat(r[i]);
        const vf ki = splat(k[i]);
        const vf wi = splat(decay[i]);
        for (int n = 0; n < N; n++) {
            const vf s = load(state_in + i * padded_values + n * W);
            out[n] = fma(ri, s, out[n]);
            const vf next = fma(wi, s, ki * value[n]);
            float* to = state_out + i * padded_values + n * W;
            STREAMING ? store_streaming(to, next) : store(to, next);
        }
    }
    for (int n = 0; n < N; n++) store(y + n * W, out[n]);
}

// One token. padded_values: the number of value channels, a multiple of W. With STREAMING, a multiple of 4 W.
template <bool STREAMING>
INLINE void wkv_step(int64_t keys, int64_t padded_values, const float* r, const float* k, const float* v,
                     const float* decay, const float* bonus, const float* state_in, float* state_out, float* y) {
    float own_weight = 0;  // the contribution of the token itself: r . (u k)
    for (int64_t i = 0; i < keys; i++) own_weight += r[i] * bonus[i] * k[i];
    int64_t j = 0;
    for (; j + 4 * W <= padded_values; j += 4 * W)
        wkv_columns<4, STREAMING>(keys, padded_values, r, k, v + j, decay, own_weight, state_in + j, state_out + j,
                                  y + j);
    for (; j < padded_values; j += W)
        wkv_columns<1, false>(keys, padded_values, r, k, v + j, decay, own_weight, state_in + j, state_out + j, y + j);
}

// For a number of values that is not a multiple of W. The state is padded in the scratch memory.
void wkv_padded(const WkvParams& p) {
    const int64_t K = p.keys, V = p.values;
    const int64_t padded_values = (V + W - 1) / W * W;
    float* state = p.scratch;
    float* v = state + K * padded_values;
    float* y = v + padded_values;
    for (int64_t i = 0; i < K; i++) {
        copy(state + i * padded_values, p.state_in + i * V, V);
        for (int64_t j = V; j < padded_values; j++) state[i * padded_values + j] = 0;
    }
    for (int64_t j = V; j < padded_values; j++) v[j] = 0;
    for (int64_t t = 0; t < p.length; t++) {
        copy(v, p.v + t * p.value_stride, V);
        wkv_step<false>(K, padded_values, p.r + t * p.key_stride, p.k + t * p.key_stride, v,
                        p.decay + t * p.decay_stride, p.bonus, state, state, y);
        copy(p.y + t * p.value_stride, y, V);
    }
    for (int64_t i = 0; i < K; i++) copy(p.state_out + i * V, state + i * padded_values, V);
}

void wkv(const WkvParams& p) {
    const int64_t K = p.keys, V = p.values;
    if (p.length == 0) {
        if (p.state_out != p.state_in) copy(p.state_out, p.state_in, K * V);
        return;
    }
    if (p.bypass_cache && p.length == 1 && V % (4 * W) == 0 && (uintptr_t)p.state_out % (4 * W) == 0) {
        wkv_step<true>(K, V, p.r, p.k, p.v, p.decay, p.bonus, p.state_in, p.state_out, p.y);
        return;
    }
    if (V % W != 0) {
        wkv_padded(p);
        return;
    }
    const float* state = p.state_in;
    for (int64_t t = 0; t < p.length; t++) {
        wkv_step<false>(K, V, p.r + t * p.key_stride, p.k + t * p.key_stride, p.v + t * p.value_stride,
                        p.decay + t * p.decay_stride, p.bonus, state, p.state_out, p.y + t * p.value_stride);
        state = p.state_out;
    }
}

// RWKV-4, for `width` channels.
void wkv4(const Wkv4Params& params) {
    const auto [length, width, stride, decay_stride, k, v, w, u, aa, bb, pp, y] = params;
    for (int64_t j = 0; j < width; j += W) {
        vf a = load(aa + j);
        vf b = load(bb + j);
        vf p = load(pp + j);
        const vf bonus = load(u + j);
        const vf tiny = splat(1e-30f);
        for (int64_t t = 0; t < length; t++) {
            const vf key = load(k + t * stride + j);
            const vf value = load(v + t * stride + j);
            const vf decay = load(w + t * decay_stride + j);
            const vf key_with_bonus = bonus + key;
            const vf max_exponent = select((vi)(p > key_with_bonus), p, key_with_bonus);
            const vf old_weight = exp(p - max_exponent);
            const vf new_weight = exp(key_with_bonus - max_exponent);
            const vf divisor = old_weight * b + new_weight;  // 0 only if nothing was read yet, in padding
            store(y + t * stride + j,
                  (old_weight * a + new_weight * value) / select((vi)(divisor < tiny), tiny, divisor));
            const vf decayed = p + decay;
            const vf next = select((vi)(decayed > key), decayed, key);
            const vf keep = exp(decayed - next);
            const vf add = exp(key - next);
            a = keep * a + add * value;
            b = keep * b + add;
            p = next;
        }
        store(aa + j, a);
        store(bb + j, b);
        store(pp + j, p);
    }
}

}  // namespace
