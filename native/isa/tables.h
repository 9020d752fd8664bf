// The kernels of one instruction set as a table of functions, and the plain structures that they share with their
// callers.
#pragma once
#include <stdint.h>

#include "training_tables.h"

namespace fledge {

constexpr int PANEL = 64;  // rows of a weight that are stored together
constexpr int GROUP = 32;  // inputs that share a scale; every K is padded to a multiple of this
constexpr int PAIRS = GROUP / 2;
constexpr int CHAINS = 8;        // independent sums of `multiply_registers`: enough to keep the arithmetic units busy
constexpr int ROW_PADDING = 16;  // memory of activations and sums has this multiple of rows, for matrix units
constexpr int LANES = 16;        // floats; rows of activations are padded to a multiple of this

// How the numbers of a weight are stored. This also determines how its product is computed.
enum Format : int32_t {
    F32 = 0,         // float32; activations float32
    BF16 = 1,        // bfloat16; activations rounded to bfloat16, sums in float32
    INT8 = 2,        // groups of int8; activations rounded to int16 by groups, exact integer sums within a group
    INT4 = 3,        // groups of 4 bits with a minimum; otherwise as INT8
    BF16_EXACT = 4,  // bfloat16 that represents a float32 weight exactly; activations float32
    F16_EXACT = 5,   // float16 that does so; not in pairs: 64 rows of one input, then of the next
};

// How the activations of a product are stored.
enum ActivationKind : int32_t { FLOATS = 0, BF16_PAIRS = 1, I16_PAIRS = 2 };
constexpr int ACTIVATION_KINDS = 3;

inline ActivationKind activation_kind(int32_t format) {
    if (format == BF16) return BF16_PAIRS;
    return format == INT8 || format == INT4 ? I16_PAIRS : FLOATS;
}

inline int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

// Activations of `rows` rows and `k` inputs, packed for products of one kind.
struct Activations {
    ActivationKind kind;
    int64_t rows;
    int64_t k;
    int64_t padded;  // k rounded up to whole groups
    int64_t pitch;   // words (floats, or int32 for pairs) from row to row
    void* data;      // FLOATS: [rows][padded] floats; pairs: [rows][padded / 2] int32
    float* scale;    // I16_PAIRS: [rows][groups]
    float* total;    // I16_PAIRS: [rows][groups], the sum of the numbers of each group
    // For a single row of pairs: the indices of the pairs that are not zero, or null.
    int32_t* nonzero_pairs;
    int32_t* nonzero_starts;  // (groups + 1) the start of each group in `nonzero_pairs`

    int64_t groups() const { return padded / GROUP; }
};

struct Output {
    float* y;
    int64_t stride;   // floats from row to row
    int64_t width;    // columns to write, at most those of all panels
    bool accumulate;  // add to the content of y
};

struct Matrix {
    int32_t format;
    int64_t n;  // outputs
    int64_t k;  // inputs
    const uint8_t* data;

    int64_t panels() const { return (n + PANEL - 1) / PANEL; }
    int64_t padded() const { return round_up(k, GROUP); }
    int64_t panel_bytes() const;
};

// The size of one group of one panel.
inline int64_t block_bytes(int32_t format) {
    switch (format) {
        case F32: return GROUP * PANEL * 4;
        case INT8: return PANEL * 2 + GROUP * PANEL;
        case INT4: return PANEL * 4 + GROUP * PANEL / 2;
        default: return GROUP * PANEL * 2;
    }
}
inline int64_t Matrix::panel_bytes() const { return padded() / GROUP * block_bytes(format); }

// One head of one sequence of RWKV-5 or RWKV-6. Strides are in floats, from token to token.
struct WkvParams {
    int64_t length;
    int64_t keys;
    int64_t values;
    const float* r;
    const float* k;
    const float* v;
    const float* decay;     // the factor, from 0 to 1
    int64_t key_stride;     // of r and k
    int64_t value_stride;   // of v and y
    int64_t decay_stride;   // 0: a static decay
    const float* bonus;     // (K)
    const float* state_in;  // (K, V)
    float* state_out;       // (K, V), may be equal to `state_in`
    float* y;
    bool bypass_cache;  // write `state_out` with non-temporal stores, because all states together exceed the caches
    float* scratch;     // keys * round_up(values, LANES) + 3 * round_up(max(keys, values), LANES) floats
};

// The number of tokens for which a gradient stores every state: 256 KiB for heads of 64, which fits a level-2 cache.
constexpr int64_t GRADIENT_SEGMENT = 16;

// The gradient for one head of one sequence; see gradient.h.
struct WkvGradientParams {
    int64_t length;
    int64_t keys;
    int64_t values;
    const float* r;
    const float* k;
    const float* v;
    const float* dy;
    const float* decay;       // the factor, from 0 to 1
    int64_t key_stride;       // of r, k, decay, dr, dk and dw
    int64_t value_stride;     // of v, dy and dv
    const float* bonus;       // (K)
    const float* state_in;    // (K, V)
    const float* dstate_out;  // (K, V)
    float* dr;
    float* dk;
    float* dv;
    float* dw;         // of the logarithm of the decay
    float* du;         // (K)
    float* dstate_in;  // (K, V)
    float* scratch;    // scratch_floats()

    static int64_t scratch_floats(int64_t length, int64_t keys, int64_t values) {
        const int64_t padded_keys = round_up(keys, LANES);
        const int64_t segments = round_up(length, GRADIENT_SEGMENT) / GRADIENT_SEGMENT;
        return (segments + GRADIENT_SEGMENT + 2) * values * padded_keys + (GRADIENT_SEGMENT + 1) * 3 * padded_keys;
    }
};

// Some channels of one sequence of RWKV-4.
struct Wkv4Params {
    int64_t length;
    int64_t width;         // a multiple of LANES
    int64_t stride;        // floats from token to token
    int64_t decay_stride;  // 0: a static decay
    const float* k;
    const float* v;
    const float* w;  // the logarithm of the decay
    const float* u;
    float* aa;  // the state, updated in place
    float* bb;
    float* pp;
    float* y;
};

constexpr int SCORE_BLOCK = 64;      // the number of scores of a row is padded to a multiple of this
constexpr int BUCKETS = 512;         // of a cutoff search; see native/sample.cpp
constexpr double EXP_RANGE = 708.0;  // the largest integer x for which e^-x is a normal double

struct Extremes {
    float highest;
    float lowest;  // of the scores above minus infinity
    bool has_nan;  // if set, the other fields are undefined
};

// The scores in [lowest, highest]. Bucket 0 has the highest ones.
struct ScoreRange {
    float lowest;
    float highest;
    double scale;  // buckets per unit of a score
};

struct TemperatureParams {
    float lowest;  // scores below get the weight 0
    float highest;
    double temperature;
};

struct Kernels {
    const char* name;
    int64_t vector_floats;

    // One panel of a product for all rows. scratch: rows * PANEL floats, with rows padded to ROW_PADDING.
    void (*multiply_panel)(const Matrix& w, int64_t panel, const Activations& a, float* scratch, const Output& out);
    // Packs row `row` of the activations. x: this row.
    void (*pack_row)(const float* x, int64_t row, const Activations& a);
    void (*wkv)(const WkvParams& params);
    void (*wkv_gradient)(const WkvGradientParams& params);
    void (*wkv4)(const Wkv4Params& params);
    // Layer norm over `width` numbers; y may be equal to x.
    void (*layer_norm)(const float* x, const float* weight, const float* bias, float eps, int64_t width, float* y);

    // For these, n is a multiple of LANES.
    // y = x + (previous - x) (mix + extra_mix); extra_mix may be null.
    void (*lerp)(const float* x, const float* previous, const float* mix, const float* extra_mix, int64_t n, float* y);
    void (*tanh)(float* x, int64_t n);
    void (*sigmoid)(float* x, int64_t n);
    void (*squared_relu)(float* x, int64_t n);
    void (*decay)(const float* x, const float* base, int64_t n, float* y);   // y = exp(-exp(base + x))
    void (*gate)(float* y, const float* g, int64_t n);                       // y *= silu(g)
    void (*gated_add)(float* x, const float* r, const float* v, int64_t n);  // x += sigmoid(r) v
    void (*multiply)(float* x, const float* y, int64_t n);                   // x *= y

    // Quantizes 64 rows of one group (rows[i][32]) into one block. Returns the error, or a negative number if a weight
    // is not finite or too large for float16.
    double (*quantize_block)(int32_t format, const float* rows, const float* importance, uint8_t* block);

    // For sampling; n is a multiple of SCORE_BLOCK. See sampling.h and native/sample.cpp.
    Extremes (*find_extremes)(const float* x, int64_t n);
    // weights = e^(x - highest). Returns their sum.
    double (*compute_weights)(const float* x, int64_t n, float highest, double* weights);
    // The sum of the weights (null: ones) of the scores >= lowest.
    double (*sum_weights_from)(const float* x, const double* weights, int64_t n, float lowest);
    // Adds the weights (null: ones) of the scores in the range to the sums of their buckets. The LANES entries after
    // the buckets receive the other weights.
    void (*sum_buckets)(const float* x, const double* weights, int64_t n, const ScoreRange& range, double* sums);
    // Copies the scores of one bucket and their weights, in order. Returns their number. The output may overlap the
    // input.
    int64_t (*gather_bucket)(const float* x, const double* weights, int64_t n, const ScoreRange& range, int32_t bucket,
                             float* bucket_scores, double* bucket_weights);
    // Raises the weights to the power of 1 / temperature; scores below `lowest` get 0. If a block has no other scores,
    // its weights are not written and its sum is 0.
    void (*apply_temperature)(const float* x, int64_t n, const TemperatureParams& params, double* weights,
                              double* block_sums);

    TrainingKernels training;

    // For measurements: reads every byte; multiplies registers.
    double (*read_memory)(const void* data, int64_t bytes);
    void (*multiply_registers)(int64_t repeats, int32_t kind);
};

extern const Kernels kernels_portable;
extern const Kernels kernels_avx2;
extern const Kernels kernels_avx512;
extern const Kernels kernels_avx512_bf16;
extern const Kernels kernels_amx;         // as avx512_bf16, with products in matrix units
extern const Kernels kernels_tile_model;  // the same with a scalar model of the matrix units, for tests

}  // namespace fledge
