// Products of one panel of a weight (64 rows) with a tile of activations.
//
// Every output is one sum over the inputs in order, for any number of rows in the tile or in the batch. So a sequence
// gets the same bits alone, in any batch, and for any split of its prompt into chunks. The sums of bf16 and float
// weights are held in registers. For quantized weights, the integer sums of one group are held in registers and the
// float sums in `sums`.
#pragma once
#include "tables.h"
#include "vector.h"

namespace {

using namespace fledge;

constexpr int NV = 4;                       // vectors of columns that are processed together
constexpr int COLUMNS = NV * W;             // 64, 32 or 16
constexpr int PARTS = PANEL / COLUMNS;      // 1, 2 or 4
constexpr int TILE_ROWS = W == 16 ? 6 : 3;  // as many as the registers hold

struct Tile {
    const void* inputs;  // the first input (or pair) of the first row
    int64_t pitch;       // words from row to row
    const float* scale;
    const float* total;
    int64_t groups;                // of a whole row: the distance from row to row of `scale` and `total`
    const int32_t* nonzero_pairs;  // null: use all pairs
    const int32_t* nonzero_starts;
    float* sums;                   // [rows][PANEL]
    bool is_first;                 // the sums are not initialized yet
    const uint8_t* prefetch_from;  // the part of the next block that this tile prefetches
    int64_t prefetch_step;         // bytes to prefetch per pair of inputs; 0: nothing
};

// M: the rows of activations in the tile.
template <int M>
INLINE void load_sums(const Tile& t, int part, vf (&acc)[M][NV]) {
    for (int m = 0; m < M; m++)
        for (int v = 0; v < NV; v++) acc[m][v] = t.is_first ? vf{} : load(t.sums + m * PANEL + part * COLUMNS + v * W);
}

template <int M>
INLINE void store_sums(const Tile& t, int part, const vf (&acc)[M][NV]) {
    for (int m = 0; m < M; m++)
        for (int v = 0; v < NV; v++) store(t.sums + m * PANEL + part * COLUMNS + v * W, acc[m][v]);
}

// ---- prefetching

// How many bytes ahead a weight is prefetched, across page boundaries too. Measured per format: int4 takes the longest
// to compute; for the others the hardware prefetcher helps, and a longer distance disturbs it.
constexpr int PREFETCH_BYTES = 2048;
constexpr int PREFETCH_BYTES_INT4 = 4096;
constexpr int PREFETCH_PAIRS = 32;  // the distance in pairs if zeros are skipped

INLINE void prefetch_next_block(const Tile& t, int64_t pair) {
    for (int64_t i = 0; i < t.prefetch_step; i += 64)
        __builtin_prefetch(t.prefetch_from + pair * t.prefetch_step + i, 0, 2);
}

template <int DISTANCE = PREFETCH_BYTES>
INLINE void prefetch(const uint8_t* p, int bytes) {
    for (int i = 0; i < bytes; i += 64) __builtin_prefetch(p + DISTANCE + i, 0, 2);
}

// The output of a tile is prefetched before its last block, so that storing it does not wait.
INLINE void prefetch_output(float* y, int64_t stride, int64_t rows) {
    for (int64_t row = 0; row < rows; row++)
        for (int64_t i = 0; i < PANEL; i += 16) __builtin_prefetch(y + row * stride + i, 1);
}

// ---- bf16 x bf16

template <int M>
void tile_bf16(const uint8_t* panel, int64_t groups, const Tile& t) {
    for (int part = 0; part < PARTS; part++) {
        vf acc[M][NV];
        load_sums(t, part, acc);
        const int32_t* a = (const int32_t*)t.inputs;
        const uint8_t* b = panel + part * COLUMNS * 4;
        auto multiply_pair = [&](int64_t kp) {
            vi w[NV];
            for (int v = 0; v < NV; v++) w[v] = load_ints(b + kp * PANEL * 4 + v * W * 4);
            for (int m = 0; m < M; m++) {
                const vi x = splat(a[m * t.pitch + kp]);
                for (int v = 0; v < NV; v++) acc[m][v] = dot_bf16(acc[m][v], x, w[v]);
            }
        };
        if (M == 1 && t.nonzero_pairs) {
            const int32_t count = t.nonzero_starts[groups];
            for (int32_t i = 0; i < count; i++) {
                const int32_t later = t.nonzero_pairs[i + PREFETCH_PAIRS < count ? i + PREFETCH_PAIRS : count - 1];
                for (int j = 0; j < PANEL * 4 / PARTS; j += 64) __builtin_prefetch(b + later * PANEL * 4 + j, 0, 2);
                multiply_pair(t.nonzero_pairs[i]);
            }
        } else {
            for (int64_t kp = 0; kp < groups * PAIRS; kp++) {
                if (M == 1) prefetch(b + kp * PANEL * 4, PANEL * 4 / PARTS);
                if (M > 1 && part == 0) prefetch_next_block(t, kp);
                multiply_pair(kp);
            }
        }
        store_sums(t, part, acc);
    }
}

// ---- float activations; weights float32, or 16-bit numbers that represent the weight exactly

struct Float32 {
    static constexpr int PAIR_BYTES = PANEL * 8;
    INLINE void load_pair(const uint8_t* p, int part, int v, vf& even, vf& odd) {
        const float* floats = (const float*)p + part * COLUMNS + v * W;
        even = load(floats);
        odd = load(floats + PANEL);
    }
};

struct Bf16Exact {
    static constexpr int PAIR_BYTES = PANEL * 4;
    INLINE void load_pair(const uint8_t* p, int part, int v, vf& even, vf& odd) {
        const vi pair = load_ints(p + (part * COLUMNS + v * W) * 4);
        even = low_half(pair);
        odd = high_half(pair);
    }
};

struct F16Exact {
    static constexpr int PAIR_BYTES = PANEL * 4;
    INLINE void load_pair(const uint8_t* p, int part, int v, vf& even, vf& odd) {
        const uint8_t* halves = p + (part * COLUMNS + v * W) * 2;
        even = load_halves(halves);
        odd = load_halves(halves + PANEL * 2);
    }
};

template <class Stored, int M>
void tile_float(const uint8_t* panel, int64_t groups, const Tile& t) {
    for (int part = 0; part < PARTS; part++) {
        vf acc[M][NV];
        load_sums(t, part, acc);
        const float* a = (const float*)t.inputs;
        for (int64_t kp = 0; kp < groups * PAIRS; kp++) {
            const uint8_t* b = panel + kp * Stored::PAIR_BYTES;
            if (M == 1) prefetch(b, Stored::PAIR_BYTES / PARTS);
            if (M > 1 && part == 0) prefetch_next_block(t, kp);
            vf even[NV];
            vf odd[NV];
            for (int v = 0; v < NV; v++) Stored::load_pair(b, part, v, even[v], odd[v]);
            const float* x = a + 2 * kp;
            for (int m = 0; m < M; m++) {
                const vf input = splat(x[m * t.pitch]);
                for (int v = 0; v < NV; v++) acc[m][v] = fma(input, even[v], acc[m][v]);
            }
            for (int m = 0; m < M; m++) {
                const vf input = splat(x[m * t.pitch + 1]);
                for (int v = 0; v < NV; v++) acc[m][v] = fma(input, odd[v], acc[m][v]);
            }
        }
        store_sums(t, part, acc);
    }
}

// ---- quantized weights

struct Int8 {
    static constexpr int BYTES = 2 * PANEL + GROUP * PANEL;
    static constexpr int PAIR_BYTES = 2 * PANEL;
    static constexpr int DISTANCE = PREFETCH_BYTES;
    static constexpr bool HAS_MINIMUM = false;
    INLINE bool is_times_16(int, int) { return false; }
    INLINE const uint8_t* pairs(const uint8_t* block) { return block + 2 * PANEL; }
    INLINE void load_pair(const uint8_t* p, int part, vi (&w)[NV]) {
        for (int v = 0; v < NV; v++) w[v] = widen_bytes(p + (part * COLUMNS + v * W) * 2);
    }
};

struct Int4 {
    static constexpr int BYTES = 4 * PANEL + GROUP * PANEL / 2;
    static constexpr int PAIR_BYTES = PANEL;
    static constexpr int DISTANCE = PREFETCH_BYTES_INT4;
    static constexpr bool HAS_MINIMUM = true;
    // Whether load_pair returns these weights multiplied by 16, because it does not shift the high 4 bits down.
    INLINE bool is_times_16(int part, int v) { return (part * NV + v) * W / 16 % 2; }
    INLINE const uint8_t* pairs(const uint8_t* block) { return block + 4 * PANEL; }
    INLINE void load_pair(const uint8_t* p, int part, vi (&w)[NV]) {
        constexpr int LOADS = 16 / W;         // vectors that cover the 16 words
        constexpr int QUARTERS = NV / LOADS;  // quarters of the panel that one part covers
        for (int i = 0; i < LOADS; i++) {
            const vi words = load_ints(p + i * W * 4);
            for (int q = 0; q < QUARTERS; q++) {
                const int quarter = part * QUARTERS + q;
                const vi shifted = quarter < 2 ? words : (vi)((vu)words >> 8);
                w[q * LOADS + i] = shifted & (quarter % 2 ? 0x00f000f0 : 0x000f000f);
            }
        }
    }
};

// Prefetches the pair PREFETCH_PAIRS after the i-th nonzero pair, and the scales of its group if that group is new.
template <class Stored>
INLINE void prefetch_nonzero_pair(const uint8_t* panel, const Tile& t, int32_t i, int32_t count) {
    if (i + PREFETCH_PAIRS >= count) return;
    const int32_t pair = t.nonzero_pairs[i + PREFETCH_PAIRS];
    const uint8_t* block = panel + pair / PAIRS * (int64_t)Stored::BYTES;
    const uint8_t* p = Stored::pairs(block) + pair % PAIRS * Stored::PAIR_BYTES;
    for (int j = 0; j < Stored::PAIR_BYTES; j += 64) __builtin_prefetch(p + j, 0, 2);
    if (t.nonzero_pairs[i + PREFETCH_PAIRS - 1] / PAIRS != pair / PAIRS)
        for (int j = 0; j < Stored::pairs(block) - block; j += 64) __builtin_prefetch(block + j);
}

// Adds the integer sums of group g, multiplied by the scales, to the float sums.
template <class Stored, int M>
INLINE void add_scaled(const uint8_t* block, int64_t g, int part, const vi (&acc)[M][NV], const Tile& t) {
    vf scale[NV];
    vf minimum[NV];
    for (int v = 0; v < NV; v++) {
        scale[v] = load_halves(block + (part * COLUMNS + v * W) * 2);
        if (Stored::HAS_MINIMUM) minimum[v] = load_halves(block + (PANEL + part * COLUMNS + v * W) * 2);
    }
    for (int m = 0; m < M; m++) {
        const vf x_scale = splat(t.scale[m * t.groups + g]);
        const vf x_total = splat(t.total[m * t.groups + g]);
        for (int v = 0; v < NV; v++) {
            float* sums = t.sums + m * PANEL + part * COLUMNS + v * W;
            const vf factor = scale[v] * (Stored::is_times_16(part, v) ? x_scale * 0.0625f : x_scale);
            vf sum = fma(to_float(acc[m][v]), factor, load(sums));
            if (Stored::HAS_MINIMUM) sum = fma(minimum[v], x_total, sum);
            store(sums, sum);
        }
    }
}

template <class Stored, int M>
void tile_quantized(const uint8_t* panel, int64_t groups, const Tile& t) {
    if (t.is_first)
        for (int i = 0; i < M * PANEL; i += W) store(t.sums + i, vf{});
    for (int64_t g = 0; g < groups; g++) {
        if (M == 1 && t.nonzero_pairs && t.nonzero_starts[g] == t.nonzero_starts[g + 1]) continue;
        const uint8_t* block = panel + g * Stored::BYTES;
        const int32_t* a = (const int32_t*)t.inputs + g * PAIRS;
        for (int part = 0; part < PARTS; part++) {
            vi acc[M][NV] = {};
            auto multiply_pair = [&](int kp) {
                vi w[NV];
                Stored::load_pair(Stored::pairs(block) + kp * Stored::PAIR_BYTES, part, w);
                for (int m = 0; m < M; m++) {
                    const vi x = splat(a[m * t.pitch + kp]);
                    for (int v = 0; v < NV; v++) acc[m][v] = dot_i16(acc[m][v], x, w[v]);
                }
            };
            if (M == 1 && t.nonzero_pairs) {
                for (int32_t i = t.nonzero_starts[g]; i < t.nonzero_starts[g + 1]; i++) {
                    if (part == 0) prefetch_nonzero_pair<Stored>(panel, t, i, t.nonzero_starts[groups]);
                    multiply_pair(t.nonzero_pairs[i] - (int)g * PAIRS);
                }
            } else {
                constexpr int SCALE_BYTES = Stored::BYTES - PAIRS * Stored::PAIR_BYTES;
                if (M == 1 && part == 0) prefetch<Stored::DISTANCE>(block, SCALE_BYTES);
                for (int kp = 0; kp < PAIRS; kp++) {
                    const uint8_t* pair = Stored::pairs(block) + kp * Stored::PAIR_BYTES;
                    if (M == 1 && part == 0) prefetch<Stored::DISTANCE>(pair, Stored::PAIR_BYTES);
                    if (M > 1 && part == 0) prefetch_next_block(t, g * PAIRS + kp);
                    multiply_pair(kp);
                }
            }
            add_scaled<Stored>(block, g, part, acc, t);
        }
    }
}

// ---- a whole panel

typedef void (*TileFunction)(const uint8_t*, int64_t, const Tile&);

template <int M>
TileFunction tile_of_format(int32_t format) {
    switch (format) {
        case BF16: return tile_bf16<M>;
        case INT8: return tile_quantized<Int8, M>;
        case INT4: return tile_quantized<Int4, M>;
        case BF16_EXACT: return tile_float<Bf16Exact, M>;
        case F16_EXACT: return tile_float<F16Exact, M>;
        default: return tile_float<Float32, M>;
    }
}

template <int M>
TileFunction select_tile(int32_t format, int64_t rows) {
    if constexpr (M > 1)
        if (rows < M) return select_tile<M - 1>(format, rows);
    return tile_of_format<M>(format);
}

// A panel is processed in blocks of about this size, each for all rows. While the tiles multiply one block, they
// prefetch the next one. Otherwise, with a few rows, memory access and arithmetic would not overlap. With fewer tiles
// the block is smaller: it must fit into the level-1 cache while the next block arrives in the level-2 cache.
INLINE int64_t groups_per_block(const Matrix& w, const Activations& a) {
    constexpr int FEW_TILES = 4;
    if (a.rows <= TILE_ROWS) return a.groups();
    const int64_t bytes = a.rows <= FEW_TILES * TILE_ROWS ? 16 << 10 : 32 << 10;
    const int64_t count = bytes / block_bytes(w.format);
    return count < 1 ? 1 : count;
}

// A gap costs more than a multiplication, because the hardware prefetches sequential streams and gaps break them.
// Skipping pays off earlier if the pairs take more memory (measured: below 80% nonzero pairs of bfloat16, 55%
// quantized).
INLINE bool is_skipping_faster(const Activations& a) {
    if (a.rows != 1 || !a.nonzero_pairs) return false;
    const int64_t max_pairs = a.padded / 2 * (a.kind == BF16_PAIRS ? 80 : 55) / 100;
    return a.nonzero_starts[a.groups()] <= max_pairs;
}

struct Block {
    int64_t first_group;
    int64_t count;  // groups
    float* sums;
    float* y;  // the output of the panel
    int64_t stride;
};

INLINE void multiply_block(const Matrix& w, const uint8_t* data, const Block& block, const Activations& a) {
    const auto [g, count, sums, y, stride] = block;
    const int64_t groups = a.groups();
    const int64_t bytes = block_bytes(w.format);
    const int64_t inputs_per_word = a.kind == FLOATS ? 1 : 2;
    const int64_t tiles = (a.rows + TILE_ROWS - 1) / TILE_ROWS;
    const int64_t share = (count * bytes + tiles - 1) / tiles;  // bytes that one tile prefetches
    const int64_t pairs = count * PAIRS;
    for (int64_t tile = 0; tile < tiles; tile++) {
        const int64_t row = tile * TILE_ROWS;
        const int64_t rows_left = a.rows - row;
        const int64_t rows = rows_left < TILE_ROWS ? rows_left : TILE_ROWS;
        Tile t{};
        t.inputs = (const float*)a.data + row * a.pitch + g * GROUP / inputs_per_word;
        t.pitch = a.pitch;
        t.groups = groups;
        t.scale = a.scale + row * groups + g;
        t.total = a.total + row * groups + g;
        if (is_skipping_faster(a)) {
            t.nonzero_pairs = a.nonzero_pairs;
            t.nonzero_starts = a.nonzero_starts;
        }
        t.sums = sums + row * PANEL;
        t.is_first = g == 0;
        t.prefetch_step = (share + pairs * 64 - 1) / (pairs * 64) * 64;
        // The last block of a panel is followed by the next panel, which usually goes to the same thread.
        const int64_t offset = tile * t.prefetch_step * pairs;
        t.prefetch_from = data + (tiles == 1 ? g * bytes + PREFETCH_BYTES : (g + count) * bytes + offset);
        if (offset >= count * bytes) t.prefetch_step = 0;
        if (g + count == groups) prefetch_output(y + row * stride, stride, rows);
        select_tile<TILE_ROWS>(w.format, rows)(data + g * bytes, count, t);
    }
}

// Writes the sums of one panel, [rows][PANEL], to the output.
INLINE void write_output(int64_t panel, const Activations& a, const float* all_sums, const Output& out) {
    const int64_t start = panel * PANEL;
    const int64_t columns = out.width - start < PANEL ? out.width - start : PANEL;
    for (int64_t row = 0; row < a.rows; row++) {
        float* y = out.y + row * out.stride + start;
        const float* sums = all_sums + row * PANEL;
        if (a.groups() == 0)
            for (int64_t i = 0; i < columns; i++) y[i] = out.accumulate ? y[i] : 0.0f;
        else if (out.accumulate)
            for (int64_t i = 0; i < columns; i++) y[i] += sums[i];
        else
            for (int64_t i = 0; i < columns; i++) y[i] = sums[i];
    }
}

void multiply_panel(const Matrix& w, int64_t panel, const Activations& a, float* scratch, const Output& out) {
    const uint8_t* data = w.data + panel * w.panel_bytes();
    const int64_t groups = a.groups();
    const int64_t step = groups_per_block(w, a);
    const int64_t start = panel * PANEL;
    for (int64_t g = 0; g < groups; g += step) {
        const int64_t count = groups - g < step ? groups - g : step;
        multiply_block(w, data, {g, count, scratch, out.y + start, out.stride}, a);
    }
    write_output(panel, a, scratch, out);
}

}  // namespace
