// The recurrences, token after token (paper, equations 5 and 18; RWKV-4's with its running maximum).
//
// One head's state of 64 x 64 floats stays in the first-level cache, so a step costs three operations a number of
// state: a few hundredths of what the products around it cost. A chunked form, which trades these for matrix products,
// has nothing left to win here.
#pragma once
#include "tables.h"
#include "vector.h"

namespace {

INLINE void copy(float* to, const float* from, int64_t n) { __builtin_memcpy(to, from, (size_t)n * 4); }

// Whole vectors of value channels: `wide` of them, a multiple of W.
template <bool PAST>
INLINE void wkv_step(int64_t keys, int64_t wide, const float* r, const float* k, const float* v, const float* decay,
                     const float* bonus, const float* before, float* after, float* y) {
    float now = 0;  // the token itself: r . (u k)
    for (int64_t i = 0; i < keys; i++) now += r[i] * bonus[i] * k[i];
    for (int64_t j = 0; j < wide; j += 4 * W) {
        const int vectors = wide - j >= 4 * W ? 4 : (int)((wide - j) / W);
        if (vectors == 4) {
            vf value[4], out[4];
            for (int n = 0; n < 4; n++) value[n] = load(v + j + n * W), out[n] = value[n] * now;
            for (int64_t i = 0; i < keys; i++) {
                const vf ri = splat(r[i]), ki = splat(k[i]), wi = splat(decay[i]);
                for (int n = 0; n < 4; n++) {
                    const vf s = load(before + i * wide + j + n * W);
                    out[n] = fma(ri, s, out[n]);
                    const vf next = fma(wi, s, ki * value[n]);
                    float* to = after + i * wide + j + n * W;
                    PAST ? store_past(to, next) : store(to, next);
                }
            }
            for (int n = 0; n < 4; n++) store(y + j + n * W, out[n]);
            continue;
        }
        for (int n = 0; n < vectors; n++) {
            const vf value = load(v + j + n * W);
            vf out = value * now;
            for (int64_t i = 0; i < keys; i++) {
                const vf s = load(before + i * wide + j + n * W);
                out = fma(splat(r[i]), s, out);
                store(after + i * wide + j + n * W, fma(splat(decay[i]), s, splat(k[i]) * value));
            }
            store(y + j + n * W, out);
        }
    }
}

void wkv(const Wkv& c) {
    const int64_t K = c.keys, V = c.values, wide = (V + W - 1) / W * W;
    if (c.length == 0) {
        if (c.after != c.before) copy(c.after, c.before, K * V);
        return;
    }
    if (c.past_caches && c.length == 1 && V % (4 * W) == 0 && (uintptr_t)c.after % (4 * W) == 0) {
        wkv_step<true>(K, V, c.r, c.k, c.v, c.decay, c.bonus, c.before, c.after, c.y);
        return;
    }
    if (wide == V) {
        const float* state = c.before;
        for (int64_t t = 0; t < c.length; t++) {
            wkv_step<false>(K, V, c.r + t * c.stride, c.k + t * c.stride, c.v + t * c.v_stride,
                            c.decay + t * c.w_stride, c.bonus, state, c.after, c.y + t * c.y_stride);
            state = c.after;
        }
        return;
    }
    // A width that vectors do not divide is filled up in the scratch memory.
    float *state = c.scratch, *v = state + K * wide, *y = v + wide;
    for (int64_t i = 0; i < K; i++) {
        copy(state + i * wide, c.before + i * V, V);
        for (int64_t j = V; j < wide; j++) state[i * wide + j] = 0;
    }
    for (int64_t j = V; j < wide; j++) v[j] = 0;
    for (int64_t t = 0; t < c.length; t++) {
        copy(v, c.v + t * c.v_stride, V);
        wkv_step<false>(K, wide, c.r + t * c.stride, c.k + t * c.stride, v, c.decay + t * c.w_stride, c.bonus, state,
                        state, y);
        copy(c.y + t * c.y_stride, y, V);
    }
    for (int64_t i = 0; i < K; i++) copy(c.after + i * V, state + i * wide, V);
}

// RWKV-4 for `width` channels, a multiple of W; w is the log of the decay. The state is changed in place.
void wkv4(const Wkv4& c) {
    const auto [length, width, stride, w_stride, k, v, w, u, aa, bb, pp, y] = c;
    for (int64_t j = 0; j < width; j += W) {
        vf a = load(aa + j), b = load(bb + j), p = load(pp + j);
        const vf bonus = load(u + j), tiny = splat(1e-30f);
        for (int64_t t = 0; t < length; t++) {
            const vf key = load(k + t * stride + j), value = load(v + t * stride + j),
                     decay = load(w + t * w_stride + j);
            const vf with_bonus = bonus + key;
            const vf top = select((vi)(p > with_bonus), p, with_bonus);
            const vf old = exp(p - top), fresh = exp(with_bonus - top);
            const vf weight = old * b + fresh;  // 0 only where nothing was ever read, at padding
            store(y + t * stride + j, (old * a + fresh * value) / select((vi)(weight < tiny), tiny, weight));
            const vf decayed = p + decay;
            const vf next = select((vi)(decayed > key), decayed, key);
            const vf keep = exp(decayed - next), add = exp(key - next);
            a = keep * a + add * value;
            b = keep * b + add;
            p = next;
        }
        store(aa + j, a), store(bb + j, b), store(pp + j, p);
    }
}

}  // namespace
