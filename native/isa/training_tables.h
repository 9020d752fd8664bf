// The element-wise kernels of training, and the structures that they share with their callers.
//
// Each kernel processes some rows of a tensor. The gradients of parameters are sums over all rows: a kernel adds the
// sums of its rows to memory of its own, and the caller adds those of all blocks of rows in order. So the results do
// not depend on the number of threads. Widths are multiples of LANES.
#pragma once
#include <stdint.h>

namespace fledge {

// The type of activations and of their gradients.
enum Element : int32_t { ELEMENT_F32 = 0, ELEMENT_BF16 = 1 };

// The rows that a kernel processes.
struct RowRange {
    int64_t begin;
    int64_t end;
};

// y_i = x + (previous - x) (mix_i + extra_mix_i), for `count` mixes. Row t of a sequence has row t - 1 as its previous.
struct MixParams {
    int32_t element;  // of y and dy
    int64_t rows;     // of all sequences together
    int64_t length;   // rows of one sequence
    int64_t width;
    int64_t count;
    const float* x;          // (rows, width)
    const float* first;      // (sequences, width): the previous row of each sequence's first row
    const uint8_t* starts;   // (rows): the previous row of these rows is zero; may be null
    const float* mix;        // (count, width)
    const float* extra_mix;  // (count, rows, width), may be null
    void* const* y;          // count times (rows, width)

    // For the gradient.
    const void* const* dy;  // count times (rows, width)
    float* dx;              // (rows, width)
    float* dfirst;          // (sequences, width), initialized to zero
    float* dmix;            // (count, width): of the rows of this call, added to
    float* dextra_mix;      // (count, rows, width), null if `extra_mix` is
};

// y = silu(gate) (normalize(x) weight + bias), normalized over each head.
struct GatedNormParams {
    int32_t element;  // of gate, y, dy and dgate
    int64_t heads;
    int64_t head_size;
    float eps;
    const float* x;    // (rows, heads, head_size)
    const void* gate;  // (rows, heads * head_size); null: no gate
    const float* weight;
    const float* bias;
    void* y;

    // For the gradient.
    const void* dy;
    float* dx;
    void* dgate;
    float* dweight;  // (heads * head_size): of the rows of this call, added to
    float* dbias;
};

// The loss of each row, -log softmax(logits)[target], and its gradient in place of the logits.
struct CrossEntropyParams {
    int32_t element;  // of the logits
    int64_t width;    // any
    float pull;       // the gradient of the largest logit grows by this times the logit
    void* logits;     // (rows, width)
    const int64_t* targets;
    float* loss;     // (rows)
    float* scratch;  // (width), padded to whole vectors
};

struct TrainingKernels {
    void (*mix)(const MixParams& params, RowRange rows);
    void (*mix_gradient)(const MixParams& params, RowRange rows);
    void (*gated_norm)(const GatedNormParams& params, RowRange rows);
    void (*gated_norm_gradient)(const GatedNormParams& params, RowRange rows);
    void (*cross_entropy)(const CrossEntropyParams& params, RowRange rows);
    // For these, n is a multiple of LANES. y = relu(x)^2; dx = 2 relu(x) dy.
    void (*squared_relu)(int32_t element, const void* x, int64_t n, void* y);
    void (*squared_relu_gradient)(int32_t element, const void* x, const void* dy, int64_t n, void* dx);
    // y = sigmoid(r) v, in float32, and the gradients of r and v.
    void (*gated_value)(int32_t element, const void* r, const void* v, int64_t n, float* y);
    void (*gated_value_gradient)(int32_t element, const void* r, const void* v, const float* dy, int64_t n, void* dr,
                                 void* dv);
    // The gradient of x in log_decay = -exp(base + x), from that of log_decay. dbase: of this row, added to.
    void (*decay_gradient)(const float* x, const float* base, const float* dlog_decay, int64_t n, float* dx,
                           float* dbase);
};

}  // namespace fledge
