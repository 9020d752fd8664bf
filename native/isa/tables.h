// The kernels of one instruction set as a table of functions, and the plain structures they share with their callers.
#pragma once
#include <stdint.h>

namespace fledge {

constexpr int PANEL = 64;  // rows of a weight that lie together
constexpr int GROUP = 32;  // inputs that share a scale, and the unit to which every K is filled up
constexpr int PAIRS = GROUP / 2;
constexpr int CHAINS = 8;  // sums that `burn` works on at a time: enough to keep the units busy, all in registers
constexpr int LANES = 16;  // floats; rows of activations are filled up to a multiple of this

// How the numbers of a weight are stored, which decides how its product is computed.
enum Format : int32_t {
    F32 = 0,         // float32; activations float32
    BF16 = 1,        // bfloat16; activations rounded to bfloat16, sums in float32
    INT8 = 2,        // groups of int8; activations rounded to int16 by groups, exact integer sums within a group
    INT4 = 3,        // groups of 4 bits with a minimum; as INT8
    BF16_EXACT = 4,  // bfloat16 that stands for the float32 number exactly; activations float32
    F16_EXACT = 5,   // float16, the same; not in pairs: 64 rows of one input, then of the next
};

// What a format asks of the activations.
enum Kind : int32_t { FLOATS = 0, BF16_PAIRS = 1, I16_PAIRS = 2 };

inline Kind kind_of(int32_t format) {
    return format == BF16 ? BF16_PAIRS : format == INT8 || format == INT4 ? I16_PAIRS : FLOATS;
}

inline int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

// Activations of `rows` rows and `k` inputs, ready for products of one kind.
struct Activations {
    Kind kind;
    int64_t rows, k, padded;  // padded: k filled up to whole groups
    int64_t pitch;            // words (floats, or int32 for pairs) from row to row
    void* data;               // FLOATS: [rows][padded] floats; pairs: [rows][padded / 2] int32
    float* scale;             // I16_PAIRS: [rows][groups]
    float* total;             // I16_PAIRS: the same shape, the sum of a group's numbers
    int32_t* alive;           // single row of pairs: the numbers of those that are not both zero, or null
    int32_t* alive_from;      // (groups + 1): where each group's begin in `alive`
    int64_t groups() const { return padded / GROUP; }
};

struct Output {
    float* y;
    int64_t stride;  // floats from row to row
    int64_t width;   // columns to write, at most those of all panels
    bool add;        // to what is there
};

struct Matrix {
    int32_t format;
    int64_t n, k;  // outputs, inputs
    const uint8_t* data;
    int64_t panels() const { return (n + PANEL - 1) / PANEL; }
    int64_t padded() const { return round_up(k, GROUP); }
    int64_t panel_bytes() const;
};

inline int64_t block_bytes(int32_t format) {  // of one group of one panel
    switch (format) {
        case F32: return GROUP * PANEL * 4;
        case INT8: return PANEL * 2 + GROUP * PANEL;
        case INT4: return PANEL * 4 + GROUP * PANEL / 2;
        default: return GROUP * PANEL * 2;
    }
}
inline int64_t Matrix::panel_bytes() const { return padded() / GROUP * block_bytes(format); }

struct Wkv {  // one head of one sequence
    int64_t length, keys, values;
    const float *r, *k, *v;
    const float* decay;                            // the factor itself, 0 to 1
    int64_t stride, v_stride, w_stride, y_stride;  // floats from token to token; w_stride 0: a static decay
    const float* bonus;                            // (K)
    const float* before;                           // (K, V)
    float* after;                                  // (K, V), may be `before`
    float* y;
    bool past_caches;  // write `after` past the caches: it is part of more than they hold
    float* scratch;    // keys * round_up(values, LANES) + 3 * round_up(max(keys, values), LANES) floats
};

// Tokens of which a gradient keeps every state: a quarter of a megabyte for heads of 64, which a second cache holds.
constexpr int64_t SEGMENT = 16;

struct WkvGradient {  // of one head of one sequence; see gradient.h
    int64_t length, keys, values;
    const float *r, *k, *v, *dy;
    const float* decay;            // the factor itself, 0 to 1
    int64_t stride, v_stride;      // floats from token to token: of r, k, decay, dr, dk, dw; of v, dy, dv
    const float* bonus;            // (K)
    const float *before, *dafter;  // (K, V)
    float *dr, *dk, *dv, *dw;      // dw: of the decay's logarithm
    float* du;                     // (K)
    float* dbefore;                // (K, V)
    float* scratch;                // scratch_floats()

    static int64_t scratch_floats(int64_t length, int64_t keys, int64_t values) {
        const int64_t wide = round_up(keys, LANES), segments = round_up(length, SEGMENT) / SEGMENT;
        return (segments + SEGMENT + 2) * values * wide + (SEGMENT + 1) * 3 * wide;
    }
};

struct Wkv4 {                  // some channels of one sequence of RWKV-4
    int64_t length, width;     // width: a multiple of LANES
    int64_t stride, w_stride;  // floats from token to token; w_stride 0: a static decay
    const float *k, *v, *w;    // w: the log of the decay
    const float* u;
    float *aa, *bb, *pp;  // the state, changed in place
    float* y;
};

constexpr int SCORES = 64;          // the scores of a row come in blocks of so many
constexpr int GROUPS = 512;         // in which a span of scores is looked through; see sample.cpp
constexpr double FARTHEST = 708.0;  // e^-708 is the last whole number of e that is a normal double

struct Extremes {
    float highest, lowest;  // lowest: of those above minus infinity
    bool nan;               // any is none; the others then say nothing
};

struct Span {  // scores from `least` to `most`, in groups from the highest down
    float least, most;
    double scale;  // groups for each unit of a score
};

struct Heat {
    float least, highest;  // which scores stay
    double temperature;
};

struct Kernels {
    const char* name;
    int64_t vector_floats;
    // One panel of a product for all rows. scratch: rows * PANEL floats.
    void (*panel)(const Matrix& w, int64_t panel, const Activations& a, float* scratch, const Output& out);
    // Row `row` of x, into its place in `a`.
    void (*prepare)(const float* x, int64_t row, const Activations& a);
    void (*wkv)(const Wkv& call);
    void (*wkv_gradient)(const WkvGradient& call);
    void (*wkv4)(const Wkv4& call);
    // Norm over `width` numbers; y may be x.
    void (*layer_norm)(const float* x, const float* weight, const float* bias, float eps, int64_t width, float* y);
    // The rest works on whole multiples of LANES floats.
    void (*lerp)(const float* x, const float* before, const float* mix, const float* more, int64_t n, float* y);
    void (*tanh)(float* x, int64_t n);
    void (*sigmoid)(float* x, int64_t n);
    void (*squared_relu)(float* x, int64_t n);
    void (*decay)(const float* x, const float* base, int64_t n, float* y);   // exp(-exp(base + x))
    void (*gate)(float* y, const float* g, int64_t n);                       // y *= silu(g)
    void (*gated_add)(float* x, const float* r, const float* v, int64_t n);  // x += sigmoid(r) v
    void (*multiply)(float* x, const float* y, int64_t n);
    double (*quantise)(int32_t format, const float* rows, const float* importance, uint8_t* block);
    // Of the draw of a token, n being a multiple of SCORES; see sampling.h and native/sample.cpp.
    Extremes (*extremes)(const float* x, int64_t n);
    double (*weigh)(const float* x, int64_t n, float highest, double* weights);  // e^(x - highest); returns their sum
    // The sum of the weights (null: ones) of the scores from `least` up.
    double (*above)(const float* x, const double* weights, int64_t n, float least);
    // Adds the weights (null: ones) of a span to the sums of its groups, behind which is room for LANES others.
    void (*spread)(const float* x, const double* weights, int64_t n, const Span& span, double* sums);
    // The scores of one group and their weights, in their order; returns how many. May write over what it reads.
    int64_t (*gather)(const float* x, const double* weights, int64_t n, const Span& span, int32_t wanted, float* scores,
                      double* kept);
    // Weights to 1 / temperature, 0 below `least`; a block without any keeps its weights and has the sum 0.
    void (*heat)(const float* x, int64_t n, const Heat& heat, double* weights, double* sums);
    double (*read)(const void* data, int64_t bytes);  // touches every byte: for measuring the memory
    void (*burn)(int64_t turns, int32_t kind);        // products of registers: for measuring the arithmetic
};

extern const Kernels kernels_portable, kernels_avx2, kernels_avx512, kernels_avx512_bf16;

}  // namespace fledge
