// The gradient of the recurrence of RWKV-5 and 6, token by token, for training.
//
//     y_t = r_t (S_{t-1} + diag(u) k_t^T v_t)        S_t = diag(d_t) S_{t-1} + k_t^T v_t
//
// With G_t the gradient of S_t, all that reads tokens after t included, and a = dy_t . v_t:
//
//     dr_t = S_{t-1} dy_t + a u k_t        dv_t = G_t^T k_t + (r_t . u k_t) dy_t
//     dk_t = G_t v_t      + a u r_t        d(log d)_t = d_t * rowsum(G_t * S_{t-1})
//     du  += a r_t k_t                     G_{t-1} = diag(d_t) G_t + r_t^T dy_t
//
// S is not run backwards, which a decay of almost zero does not allow: it is kept at the borders of segments and
// computed again inside each. Nothing is divided, and no difference of sums is taken, so it is exact for every decay.
// S and G lie as (V, K) here: vectors run over keys, and of all sums only that of dv goes across a vector.
#pragma once
#include "recurrence.h"
#include "tables.h"
#include "vector.h"

namespace {

// N vectors of keys of one token: `after` = S_t from `before` = S_{t-1}; with READ also what dr takes from the state.
template <int N, bool READ>
INLINE void run_state(int64_t values, int64_t wide, const float* k, const float* decay, const float* v, const float* dy,
                      const float* before, float* after, float* dr) {
    vf key[N], keep[N], out[N] = {};
    for (int n = 0; n < N; n++) key[n] = load(k + n * W), keep[n] = load(decay + n * W);
    for (int64_t j = 0; j < values; j++) {
        const vf value = splat(v[j]), weight = splat(dy[j]);
        for (int n = 0; n < N; n++) {
            const vf s = load(before + j * wide + n * W);
            if (READ) out[n] = fma(weight, s, out[n]);
            store(after + j * wide + n * W, fma(keep[n], s, key[n] * value));
        }
    }
    for (int n = 0; READ && n < N; n++) store(dr + n * W, out[n]);
}

// N vectors of keys of one token: g = G_t becomes G_{t-1}; dk and dw are set, dv is added to.
template <int N>
INLINE void run_gradient(int64_t values, int64_t wide, const float* r, const float* k, const float* decay,
                         const float* v, const float* dy, const float* state, float* g, float* dk, float* dw,
                         float* dv) {
    vf read[N], key[N], keep[N], from_value[N] = {}, from_state[N] = {};
    for (int n = 0; n < N; n++) read[n] = load(r + n * W), key[n] = load(k + n * W), keep[n] = load(decay + n * W);
    for (int64_t j = 0; j < values; j++) {
        const vf value = splat(v[j]), weight = splat(dy[j]);
        vf along = {};
        for (int n = 0; n < N; n++) {
            const vf now = load(g + j * wide + n * W);
            from_value[n] = fma(value, now, from_value[n]);
            from_state[n] = fma(load(state + j * wide + n * W), now, from_state[n]);
            along = fma(key[n], now, along);
            store(g + j * wide + n * W, fma(keep[n], now, read[n] * weight));
        }
        dv[j] += sum(along);
    }
    for (int n = 0; n < N; n++) store(dk + n * W, from_value[n]), store(dw + n * W, keep[n] * from_state[n]);
}

struct Token {  // its rows, filled up to whole vectors of keys
    const float *r, *k, *decay, *v, *dy;
};

template <bool READ>
void state_step(const WkvGradient& c, int64_t wide, const Token& x, const float* before, float* after, float* dr) {
    int64_t i = 0;
    for (; i + 4 * W <= wide; i += 4 * W)
        run_state<4, READ>(c.values, wide, x.k + i, x.decay + i, x.v, x.dy, before + i, after + i, dr + i);
    for (; i < wide; i += W)
        run_state<1, READ>(c.values, wide, x.k + i, x.decay + i, x.v, x.dy, before + i, after + i, dr + i);
}

void gradient_step(const WkvGradient& c, int64_t wide, const Token& x, const float* state, float* g, float* dk,
                   float* dw, float* dv) {
    for (int64_t j = 0; j < c.values; j++) dv[j] = 0;
    int64_t i = 0;
    for (; i + 4 * W <= wide; i += 4 * W)
        run_gradient<4>(c.values, wide, x.r + i, x.k + i, x.decay + i, x.v, x.dy, state + i, g + i, dk + i, dw + i, dv);
    for (; i < wide; i += W)
        run_gradient<1>(c.values, wide, x.r + i, x.k + i, x.decay + i, x.v, x.dy, state + i, g + i, dk + i, dw + i, dv);
}

// What the token itself adds, without a state in between. dr, dk: rows of K; du is added to.
void own_part(const WkvGradient& c, const Token& x, float* dr, float* dk, float* dv, float* du) {
    float along = 0, strength = 0;
    for (int64_t j = 0; j < c.values; j++) along += x.dy[j] * x.v[j];
    for (int64_t i = 0; i < c.keys; i++) {
        const float pair = x.r[i] * x.k[i];
        strength += pair * c.bonus[i];
        dr[i] += along * c.bonus[i] * x.k[i];
        dk[i] += along * c.bonus[i] * x.r[i];
        du[i] += along * pair;
    }
    for (int64_t j = 0; j < c.values; j++) dv[j] += strength * x.dy[j];
}

// (K, V) <-> (V, wide), the keys beyond K zero.
void turn_in(const float* from, int64_t keys, int64_t values, int64_t wide, float* to) {
    for (int64_t j = 0; j < values; j++) {
        for (int64_t i = 0; i < keys; i++) to[j * wide + i] = from[i * values + j];
        for (int64_t i = keys; i < wide; i++) to[j * wide + i] = 0;
    }
}

void turn_out(const float* from, int64_t keys, int64_t values, int64_t wide, float* to) {
    for (int64_t i = 0; i < keys; i++)
        for (int64_t j = 0; j < values; j++) to[i * values + j] = from[j * wide + i];
}

void wkv_gradient(const WkvGradient& c) {
    const int64_t K = c.keys, V = c.values, wide = (K + W - 1) / W * W, size = V * wide;
    const int64_t segments = (c.length + SEGMENT - 1) / SEGMENT;
    float* g = c.scratch;      // (V, wide)
    float* states = g + size;  // (SEGMENT + 1, V, wide): before each token of the segment, and after it
    float* rows = states + (SEGMENT + 1) * size;  // (SEGMENT, 3, wide): r, k and decay of its tokens
    float* sums = rows + SEGMENT * 3 * wide;      // (3, wide): dr, dk, dw of one token
    float* starts = sums + 3 * wide;              // (segments, V, wide)
    const auto token = [&](int64_t t) {
        const float* row = rows + t % SEGMENT * 3 * wide;
        return Token{row, row + wide, row + 2 * wide, c.v + t * c.v_stride, c.dy + t * c.v_stride};
    };
    const auto fetch = [&](int64_t segment) {  // returns the first token and the one behind the last
        const int64_t first = segment * SEGMENT;
        const int64_t last = first + SEGMENT < c.length ? first + SEGMENT : c.length;
        for (int64_t t = first; t < last; t++) {
            float* row = rows + t % SEGMENT * 3 * wide;
            const float* from[3] = {c.r + t * c.stride, c.k + t * c.stride, c.decay + t * c.stride};
            for (int n = 0; n < 3; n++) {
                copy(row + n * wide, from[n], K);
                for (int64_t i = K; i < wide; i++) row[n * wide + i] = 0;
            }
        }
        return last;
    };

    if (segments) turn_in(c.before, K, V, wide, starts);
    for (int64_t segment = 0; segment + 1 < segments; segment++) {
        const int64_t last = fetch(segment);
        float* next = starts + (segment + 1) * size;
        const float* state = starts + segment * size;
        for (int64_t t = segment * SEGMENT; t < last; t++) {
            state_step<false>(c, wide, token(t), state, next, sums);
            state = next;
        }
    }
    turn_in(c.dafter, K, V, wide, g);
    for (int64_t i = 0; i < K; i++) c.du[i] = 0;
    for (int64_t segment = segments - 1; segment >= 0; segment--) {
        const int64_t first = segment * SEGMENT, last = fetch(segment);
        copy(states, starts + segment * size, size);
        for (int64_t t = first; t < last; t++) {
            float* state = states + (t - first) * size;
            state_step<true>(c, wide, token(t), state, state + size, sums);
            copy(c.dr + t * c.stride, sums, K);
        }
        for (int64_t t = last - 1; t >= first; t--) {
            float *dk = sums + wide, *dw = dk + wide, *dv = c.dv + t * c.v_stride;
            const Token now = token(t);
            gradient_step(c, wide, now, states + (t - first) * size, g, dk, dw, dv);
            own_part(c, now, c.dr + t * c.stride, dk, dv, c.du);
            copy(c.dk + t * c.stride, dk, K), copy(c.dw + t * c.stride, dw, K);
        }
    }
    turn_out(g, K, V, wide, c.dbefore);
}

}  // namespace
