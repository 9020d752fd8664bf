// The element-wise parts of a training step, each in one pass over memory, with their gradients.
//
// torch needs about ten passes for each of them. The reference implementations are fledge/kernels/fused/reference.py.
// Activations are float32 or bfloat16; the arithmetic and the gradients of parameters are float32.
#pragma once
#include "activations.h"
#include "tables.h"
#include "vector.h"

namespace {

using namespace fledge;

typedef uint16_t bf16;

INLINE vf load_element(const float* p) { return load(p); }
INLINE vf load_element(const bf16* p) { return (vf)(__builtin_convertvector(*(const vh*)p, vu) << 16); }
INLINE void store_element(float* p, vf x) { store(p, x); }
INLINE void store_element(bf16* p, vf x) { *(vh*)p = __builtin_convertvector(round_bf16(x), vh); }
INLINE void add_to(float* p, vf x) { store(p, load(p) + x); }

// The row before `row` of the same sequence, or null for zeros.
INLINE const float* previous_row(const MixParams& p, int64_t row) {
    if (p.starts && p.starts[row]) return nullptr;
    if (row % p.length == 0) return p.first + row / p.length * p.width;
    return p.x + (row - 1) * p.width;
}

INLINE vf load_mix(const MixParams& p, int64_t i, int64_t row, int64_t channel) {
    const vf mix = load(p.mix + i * p.width + channel);
    return p.extra_mix ? mix + load(p.extra_mix + (i * p.rows + row) * p.width + channel) : mix;
}

template <class T>
void mix_rows(const MixParams& p, RowRange rows) {
    for (int64_t row = rows.begin; row < rows.end; row++) {
        const float* previous = previous_row(p, row);
        for (int64_t c = 0; c < p.width; c += W) {
            const vf current = load(p.x + row * p.width + c);
            const vf difference = (previous ? load(previous + c) : vf{}) - current;
            for (int64_t i = 0; i < p.count; i++)
                store_element((T*)p.y[i] + row * p.width + c, fma(difference, load_mix(p, i, row, c), current));
        }
    }
}

// The part of the gradient that belongs to the row before `row`, added to `to`.
template <class T>
INLINE void add_previous_gradient(const MixParams& p, int64_t row, float* to) {
    for (int64_t c = 0; c < p.width; c += W) {
        vf gradient = {};
        for (int64_t i = 0; i < p.count; i++) {
            const vf dy = load_element((const T*)p.dy[i] + row * p.width + c);
            gradient = fma(dy, load_mix(p, i, row, c), gradient);
        }
        add_to(to + c, gradient);
    }
}

template <class T>
void mix_gradient_rows(const MixParams& p, RowRange rows) {
    for (int64_t row = rows.begin; row < rows.end; row++) {
        const float* previous = previous_row(p, row);
        // Where the gradient of the previous row is added. That of the first row of this call is added by another call.
        float* previous_gradient = nullptr;
        if (previous && row % p.length == 0)
            previous_gradient = p.dfirst + row / p.length * p.width;
        else if (previous && row > rows.begin)
            previous_gradient = p.dx + (row - 1) * p.width;
        for (int64_t c = 0; c < p.width; c += W) {
            const vf current = load(p.x + row * p.width + c);
            const vf difference = (previous ? load(previous + c) : vf{}) - current;
            vf own = {};
            vf other = {};
            for (int64_t i = 0; i < p.count; i++) {
                const vf dy = load_element((const T*)p.dy[i] + row * p.width + c);
                const vf part = dy * load_mix(p, i, row, c);
                const vf mix_gradient = dy * difference;
                other += part;
                own += dy - part;
                if (p.dextra_mix) store(p.dextra_mix + (i * p.rows + row) * p.width + c, mix_gradient);
                add_to(p.dmix + i * p.width + c, mix_gradient);
            }
            store(p.dx + row * p.width + c, own);
            if (previous_gradient) add_to(previous_gradient + c, other);
        }
    }
    const int64_t next = rows.end;
    const bool has_next = next < p.rows && next % p.length != 0 && !(p.starts && p.starts[next]);
    if (has_next) add_previous_gradient<T>(p, next, p.dx + (next - 1) * p.width);
}

void mix_tokens(const MixParams& p, RowRange rows) {
    p.element == ELEMENT_BF16 ? mix_rows<bf16>(p, rows) : mix_rows<float>(p, rows);
}

void mix_tokens_gradient(const MixParams& p, RowRange rows) {
    p.element == ELEMENT_BF16 ? mix_gradient_rows<bf16>(p, rows) : mix_gradient_rows<float>(p, rows);
}

struct Moments {
    vf mean;
    vf inverse;  // of the standard deviation
};

INLINE Moments compute_moments(const float* x, int64_t n, float eps) {
    vf total = {};
    for (int64_t i = 0; i < n; i += W) total += load(x + i);
    const vf mean = splat(sum(total) / (float)n);
    vf squares = {};
    for (int64_t i = 0; i < n; i += W) {
        const vf difference = load(x + i) - mean;
        squares = fma(difference, difference, squares);
    }
    return {mean, splat(1.0f / __builtin_sqrtf(sum(squares) / (float)n + eps))};
}

template <class T>
void gated_norm_rows(const GatedNormParams& p, RowRange rows) {
    const int64_t width = p.heads * p.head_size;
    for (int64_t row = rows.begin; row < rows.end; row++)
        for (int64_t start = 0; start < width; start += p.head_size) {
            const int64_t offset = row * width + start;
            const Moments moments = compute_moments(p.x + offset, p.head_size, p.eps);
            for (int64_t c = 0; c < p.head_size; c += W) {
                const vf normed = (load(p.x + offset + c) - moments.mean) * moments.inverse;
                vf y = fma(normed, load(p.weight + start + c), load(p.bias + start + c));
                if (p.gate) y *= silu(load_element((const T*)p.gate + offset + c));
                store_element((T*)p.y + offset + c, y);
            }
        }
}

// The gradient of the normed value, after those of the gate, the weight and the bias have been written.
template <class T>
INLINE vf normed_gradient(const GatedNormParams& p, int64_t offset, int64_t channel, vf normed) {
    vf gradient = load_element((const T*)p.dy + offset);
    const vf weight = load(p.weight + channel);
    if (p.gate) {
        const vf gate = load_element((const T*)p.gate + offset);
        const vf open = sigmoid(gate);
        const vf value = fma(normed, weight, load(p.bias + channel));
        store_element((T*)p.dgate + offset, gradient * value * open * (1.0f + gate * (1.0f - open)));
        gradient *= gate * open;
    }
    add_to(p.dweight + channel, gradient * normed);
    add_to(p.dbias + channel, gradient);
    return gradient * weight;
}

template <class T>
void gated_norm_gradient_rows(const GatedNormParams& p, RowRange rows) {
    const int64_t width = p.heads * p.head_size;
    for (int64_t row = rows.begin; row < rows.end; row++)
        for (int64_t start = 0; start < width; start += p.head_size) {
            const int64_t offset = row * width + start;
            const Moments moments = compute_moments(p.x + offset, p.head_size, p.eps);
            vf total = {};
            vf total_normed = {};
            for (int64_t c = 0; c < p.head_size; c += W) {
                const vf normed = (load(p.x + offset + c) - moments.mean) * moments.inverse;
                const vf gradient = normed_gradient<T>(p, offset + c, start + c, normed);
                store(p.dx + offset + c, gradient);
                total += gradient;
                total_normed = fma(gradient, normed, total_normed);
            }
            const vf mean_gradient = splat(sum(total) / (float)p.head_size);
            const vf mean_product = splat(sum(total_normed) / (float)p.head_size);
            for (int64_t c = 0; c < p.head_size; c += W) {
                const vf normed = (load(p.x + offset + c) - moments.mean) * moments.inverse;
                const vf gradient = load(p.dx + offset + c) - mean_gradient - normed * mean_product;
                store(p.dx + offset + c, gradient * moments.inverse);
            }
        }
}

void gated_norm(const GatedNormParams& p, RowRange rows) {
    p.element == ELEMENT_BF16 ? gated_norm_rows<bf16>(p, rows) : gated_norm_rows<float>(p, rows);
}

void gated_norm_gradient(const GatedNormParams& p, RowRange rows) {
    p.element == ELEMENT_BF16 ? gated_norm_gradient_rows<bf16>(p, rows) : gated_norm_gradient_rows<float>(p, rows);
}

INLINE float load_one(const float* p) { return *p; }
INLINE float load_one(const bf16* p) {
    const uint32_t bits = (uint32_t)*p << 16;
    float x;
    __builtin_memcpy(&x, &bits, 4);
    return x;
}
INLINE void store_one(float* p, float x) { *p = x; }
INLINE void store_one(bf16* p, float x) { *p = (bf16)round_bf16(splat(x))[0]; }

// The index of the largest number (the first one, and NaN before all others).
INLINE int64_t find_largest(const float* x, int64_t n) {
    int64_t best = 0;
    for (int64_t i = 1; i < n; i++)
        if (!(x[i] <= x[best])) best = i;
    return best;
}

template <class T>
void cross_entropy_row(const CrossEntropyParams& p, int64_t row) {
    T* logits = (T*)p.logits + row * p.width;
    const int64_t whole = p.width / W * W;
    const int64_t padded = (p.width + W - 1) / W * W;
    float* scratch = p.scratch;  // the logits, with minus infinity behind them
    vf largest_lanes = splat(-__builtin_inff());
    for (int64_t i = 0; i < whole; i += W) {
        const vf x = load_element(logits + i);
        store(scratch + i, x);
        largest_lanes = select((vi)(x <= largest_lanes), largest_lanes, x);
    }
    for (int64_t i = whole; i < padded; i++) scratch[i] = i < p.width ? load_one(logits + i) : -__builtin_inff();
    if (whole < padded) {
        const vf x = load(scratch + whole);
        largest_lanes = select((vi)(x <= largest_lanes), largest_lanes, x);
    }
    float lanes[W];
    store(lanes, largest_lanes);
    const float largest = lanes[find_largest(lanes, W)];
    int64_t where = 0;
    while (where < p.width - 1 && scratch[where] < largest) where++;  // ends at the first NaN, too
    const int64_t target = p.targets[row];
    const float target_logit = scratch[target];
    vf total_lanes = {};
    for (int64_t i = 0; i < padded; i += W) {
        const vf power = exp(load(scratch + i) - largest);
        total_lanes += power;
        store(scratch + i, power);
    }
    const float total = sum(total_lanes);
    const float inverse = 1.0f / total;
    p.loss[row] = (float)(__builtin_log((double)total) - (double)(target_logit - largest));
    const float at_target = scratch[target] * inverse - 1.0f;
    const float at_largest = (where == target ? at_target : scratch[where] * inverse) + largest * p.pull;
    for (int64_t i = 0; i < whole; i += W) store_element(logits + i, load(scratch + i) * inverse);
    for (int64_t i = whole; i < p.width; i++) store_one(logits + i, scratch[i] * inverse);
    store_one(logits + target, at_target);
    store_one(logits + where, at_largest);
}

void cross_entropy(const CrossEntropyParams& p, RowRange rows) {
    for (int64_t row = rows.begin; row < rows.end; row++)
        p.element == ELEMENT_BF16 ? cross_entropy_row<bf16>(p, row) : cross_entropy_row<float>(p, row);
}

INLINE vf relu(vf x) { return select((vi)(x <= splat(0.0f)), splat(0.0f), x); }  // NaN stays NaN

template <class T>
void squared_relu_elements(const T* x, int64_t n, T* y) {
    for (int64_t i = 0; i < n; i += W) {
        const vf positive = relu(load_element(x + i));
        store_element(y + i, positive * positive);
    }
}

template <class T>
void squared_relu_gradient_elements(const T* x, const T* dy, int64_t n, T* dx) {
    for (int64_t i = 0; i < n; i += W) store_element(dx + i, 2.0f * relu(load_element(x + i)) * load_element(dy + i));
}

void training_squared_relu(int32_t element, const void* x, int64_t n, void* y) {
    element == ELEMENT_BF16 ? squared_relu_elements((const bf16*)x, n, (bf16*)y)
                            : squared_relu_elements((const float*)x, n, (float*)y);
}

void training_squared_relu_gradient(int32_t element, const void* x, const void* dy, int64_t n, void* dx) {
    element == ELEMENT_BF16 ? squared_relu_gradient_elements((const bf16*)x, (const bf16*)dy, n, (bf16*)dx)
                            : squared_relu_gradient_elements((const float*)x, (const float*)dy, n, (float*)dx);
}

template <class T>
void gated_value_elements(const T* r, const T* v, int64_t n, float* y) {
    for (int64_t i = 0; i < n; i += W) store(y + i, sigmoid(load_element(r + i)) * load_element(v + i));
}

template <class T>
void gated_value_gradient_elements(const T* r, const T* v, const float* dy, int64_t n, T* dr, T* dv) {
    for (int64_t i = 0; i < n; i += W) {
        const vf open = sigmoid(load_element(r + i));
        const vf gradient = load(dy + i);
        store_element(dr + i, gradient * load_element(v + i) * open * (1.0f - open));
        store_element(dv + i, gradient * open);
    }
}

void gated_value(int32_t element, const void* r, const void* v, int64_t n, float* y) {
    element == ELEMENT_BF16 ? gated_value_elements((const bf16*)r, (const bf16*)v, n, y)
                            : gated_value_elements((const float*)r, (const float*)v, n, y);
}

void gated_value_gradient(int32_t element, const void* r, const void* v, const float* dy, int64_t n, void* dr,
                          void* dv) {
    element == ELEMENT_BF16
        ? gated_value_gradient_elements((const bf16*)r, (const bf16*)v, dy, n, (bf16*)dr, (bf16*)dv)
        : gated_value_gradient_elements((const float*)r, (const float*)v, dy, n, (float*)dr, (float*)dv);
}

void decay_gradient(const float* x, const float* base, const float* dlog_decay, int64_t n, float* dx, float* dbase) {
    for (int64_t i = 0; i < n; i += W) {
        const vf gradient = load(dlog_decay + i) * -exp(load(base + i) + load(x + i));
        store(dx + i, gradient);
        add_to(dbase + i, gradient);
    }
}

}  // namespace
