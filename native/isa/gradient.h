// The gradient of the recurrence of RWKV-5 and RWKV-6, token by token, for training.
//
//     y_t = r_t (S_{t-1} + diag(u) k_t^T v_t)        S_t = diag(d_t) S_{t-1} + k_t^T v_t
//
// Let G_t be the gradient of S_t, including all tokens after t, and a = dy_t . v_t. Then:
//
//     dr_t = S_{t-1} dy_t + a u k_t        dv_t = G_t^T k_t + (r_t . u k_t) dy_t
//     dk_t = G_t v_t      + a u r_t        d(log d)_t = d_t * rowsum(G_t * S_{t-1})
//     du  += a r_t k_t                     G_{t-1} = diag(d_t) G_t + r_t^T dy_t
//
// S cannot be computed backwards, because a decay may be almost zero. It is stored at the start of every segment and
// computed again within the segment. There is no division and no difference of sums, so the result is exact for every
// decay. S and G are stored as (V, K): vectors extend over keys, and only the sum of dv reduces a vector.
#pragma once
#include "recurrence.h"
#include "tables.h"
#include "vector.h"

namespace {

using namespace fledge;

// One token for N vectors of keys: computes S_t from S_{t-1}. With READ also the part of dr that depends on the state.
template <int N, bool READ>
INLINE void advance_state(int64_t values, int64_t padded_keys, const float* k, const float* decay, const float* v,
                          const float* dy, const float* state, float* next_state, float* dr) {
    vf key[N];
    vf keep[N];
    vf out[N] = {};
    for (int n = 0; n < N; n++) {
        key[n] = load(k + n * W);
        keep[n] = load(decay + n * W);
    }
    for (int64_t j = 0; j < values; j++) {
        const vf value = splat(v[j]);
        const vf y_gradient = splat(dy[j]);
        for (int n = 0; n < N; n++) {
            const vf s = load(state + j * padded_keys + n * W);
            if (READ) out[n] = fma(y_gradient, s, out[n]);
            store(next_state + j * padded_keys + n * W, fma(keep[n], s, key[n] * value));
        }
    }
    for (int n = 0; READ && n < N; n++) store(dr + n * W, out[n]);
}

// One token for N vectors of keys: g = G_t becomes G_{t-1}. Writes dk and dw, and adds to dv.
template <int N>
INLINE void step_back(int64_t values, int64_t padded_keys, const float* r, const float* k, const float* decay,
                      const float* v, const float* dy, const float* state, float* g, float* dk, float* dw, float* dv) {
    vf read[N];
    vf key[N];
    vf keep[N];
    vf k_gradient[N] = {};
    vf decay_gradient[N] = {};
    for (int n = 0; n < N; n++) {
        read[n] = load(r + n * W);
        key[n] = load(k + n * W);
        keep[n] = load(decay + n * W);
    }
    for (int64_t j = 0; j < values; j++) {
        const vf value = splat(v[j]);
        const vf y_gradient = splat(dy[j]);
        vf v_gradient = {};
        for (int n = 0; n < N; n++) {
            const vf gradient = load(g + j * padded_keys + n * W);
            k_gradient[n] = fma(value, gradient, k_gradient[n]);
            decay_gradient[n] = fma(load(state + j * padded_keys + n * W), gradient, decay_gradient[n]);
            v_gradient = fma(key[n], gradient, v_gradient);
            store(g + j * padded_keys + n * W, fma(keep[n], gradient, read[n] * y_gradient));
        }
        dv[j] += sum(v_gradient);
    }
    for (int n = 0; n < N; n++) {
        store(dk + n * W, k_gradient[n]);
        store(dw + n * W, keep[n] * decay_gradient[n]);
    }
}

// The inputs of one token. The keys are padded to whole vectors.
struct TokenInputs {
    const float* r;
    const float* k;
    const float* decay;
    const float* v;
    const float* dy;
};

template <bool READ>
INLINE void forward_token(const WkvGradientParams& p, int64_t padded_keys, const TokenInputs& x, const float* state,
                          float* next_state, float* dr) {
    int64_t i = 0;
    for (; i + 4 * W <= padded_keys; i += 4 * W)
        advance_state<4, READ>(p.values, padded_keys, x.k + i, x.decay + i, x.v, x.dy, state + i, next_state + i,
                               dr + i);
    for (; i < padded_keys; i += W)
        advance_state<1, READ>(p.values, padded_keys, x.k + i, x.decay + i, x.v, x.dy, state + i, next_state + i,
                               dr + i);
}

INLINE void backward_token(const WkvGradientParams& p, int64_t padded_keys, const TokenInputs& x, const float* state,
                           float* g, float* dk, float* dw, float* dv) {
    for (int64_t j = 0; j < p.values; j++) dv[j] = 0;
    int64_t i = 0;
    for (; i + 4 * W <= padded_keys; i += 4 * W)
        step_back<4>(p.values, padded_keys, x.r + i, x.k + i, x.decay + i, x.v, x.dy, state + i, g + i, dk + i, dw + i,
                     dv);
    for (; i < padded_keys; i += W)
        step_back<1>(p.values, padded_keys, x.r + i, x.k + i, x.decay + i, x.v, x.dy, state + i, g + i, dk + i, dw + i,
                     dv);
}

// Adds the terms of the token itself, which do not depend on the state. dr, dk: rows of K.
void add_own_terms(const WkvGradientParams& p, const TokenInputs& x, float* dr, float* dk, float* dv, float* du) {
    float dy_v = 0;  // dy . v
    float r_uk = 0;  // r . (u k)
    for (int64_t j = 0; j < p.values; j++) dy_v += x.dy[j] * x.v[j];
    for (int64_t i = 0; i < p.keys; i++) {
        const float rk = x.r[i] * x.k[i];
        r_uk += rk * p.bonus[i];
        dr[i] += dy_v * p.bonus[i] * x.k[i];
        dk[i] += dy_v * p.bonus[i] * x.r[i];
        du[i] += dy_v * rk;
    }
    for (int64_t j = 0; j < p.values; j++) dv[j] += r_uk * x.dy[j];
}

// (K, V) -> (V, padded_keys), with zeros for the keys beyond K.
void transpose_state(const float* from, int64_t keys, int64_t values, int64_t padded_keys, float* to) {
    for (int64_t j = 0; j < values; j++) {
        for (int64_t i = 0; i < keys; i++) to[j * padded_keys + i] = from[i * values + j];
        for (int64_t i = keys; i < padded_keys; i++) to[j * padded_keys + i] = 0;
    }
}

// (V, padded_keys) -> (K, V).
void untranspose_state(const float* from, int64_t keys, int64_t values, int64_t padded_keys, float* to) {
    for (int64_t i = 0; i < keys; i++)
        for (int64_t j = 0; j < values; j++) to[i * values + j] = from[j * padded_keys + i];
}

// One gradient computation and its parts of the scratch memory.
struct GradientPass {
    const WkvGradientParams& p;
    int64_t padded_keys;
    int64_t state_size;
    float* g;         // (V, padded_keys)
    float* states;    // (GRADIENT_SEGMENT + 1, V, padded_keys): before each token of the segment, and after the last
    float* rows;      // (GRADIENT_SEGMENT, 3, padded_keys): r, k and decay of the tokens of the segment
    float* token_dr;  // (padded_keys): the gradients of one token
    float* token_dk;
    float* token_dw;
    float* segment_starts;  // (segments, V, padded_keys): the states at the start of the segments

    explicit GradientPass(const WkvGradientParams& params)
        : p(params), padded_keys((p.keys + W - 1) / W * W), state_size(p.values * padded_keys), g(p.scratch) {
        states = g + state_size;
        rows = states + (GRADIENT_SEGMENT + 1) * state_size;
        token_dr = rows + GRADIENT_SEGMENT * 3 * padded_keys;
        token_dk = token_dr + padded_keys;
        token_dw = token_dk + padded_keys;
        segment_starts = token_dw + padded_keys;
    }

    float* token_rows(int64_t t) const { return rows + t % GRADIENT_SEGMENT * 3 * padded_keys; }

    TokenInputs token(int64_t t) const {
        const float* r = token_rows(t);
        return {r, r + padded_keys, r + 2 * padded_keys, p.v + t * p.value_stride, p.dy + t * p.value_stride};
    }

    // Copies r, k and decay of the tokens of a segment. Returns the end of the segment.
    int64_t load_segment(int64_t segment) const {
        const int64_t first = segment * GRADIENT_SEGMENT;
        const int64_t end = first + GRADIENT_SEGMENT < p.length ? first + GRADIENT_SEGMENT : p.length;
        for (int64_t t = first; t < end; t++) {
            float* row = token_rows(t);
            const float* inputs[3] = {p.r + t * p.key_stride, p.k + t * p.key_stride, p.decay + t * p.key_stride};
            for (int n = 0; n < 3; n++) {
                copy(row + n * padded_keys, inputs[n], p.keys);
                for (int64_t i = p.keys; i < padded_keys; i++) row[n * padded_keys + i] = 0;
            }
        }
        return end;
    }

    // Computes the state at the start of every segment.
    void compute_segment_starts(int64_t segments) const {
        if (segments) transpose_state(p.state_in, p.keys, p.values, padded_keys, segment_starts);
        for (int64_t segment = 0; segment + 1 < segments; segment++) {
            const int64_t end = load_segment(segment);
            const float* state = segment_starts + segment * state_size;
            float* next_state = segment_starts + (segment + 1) * state_size;
            for (int64_t t = segment * GRADIENT_SEGMENT; t < end; t++) {
                forward_token<false>(p, padded_keys, token(t), state, next_state, token_dr);
                state = next_state;
            }
        }
    }

    // Computes the states of a segment again, then its gradients from the last token to the first.
    void run_segment(int64_t segment) const {
        const int64_t first = segment * GRADIENT_SEGMENT;
        const int64_t end = load_segment(segment);
        copy(states, segment_starts + segment * state_size, state_size);
        for (int64_t t = first; t < end; t++) {
            float* state = states + (t - first) * state_size;
            forward_token<true>(p, padded_keys, token(t), state, state + state_size, token_dr);
            copy(p.dr + t * p.key_stride, token_dr, p.keys);
        }
        for (int64_t t = end - 1; t >= first; t--) {
            float* dv = p.dv + t * p.value_stride;
            const TokenInputs x = token(t);
            backward_token(p, padded_keys, x, states + (t - first) * state_size, g, token_dk, token_dw, dv);
            add_own_terms(p, x, p.dr + t * p.key_stride, token_dk, dv, p.du);
            copy(p.dk + t * p.key_stride, token_dk, p.keys);
            copy(p.dw + t * p.key_stride, token_dw, p.keys);
        }
    }
};

void wkv_gradient(const WkvGradientParams& params) {
    const GradientPass pass(params);
    const int64_t segments = (params.length + GRADIENT_SEGMENT - 1) / GRADIENT_SEGMENT;
    pass.compute_segment_starts(segments);
    transpose_state(params.dstate_out, params.keys, params.values, pass.padded_keys, pass.g);
    for (int64_t i = 0; i < params.keys; i++) params.du[i] = 0;
    for (int64_t segment = segments - 1; segment >= 0; segment--) pass.run_segment(segment);
    untranspose_state(pass.g, params.keys, params.values, pass.padded_keys, params.dstate_in);
}

}  // namespace
