// Products of one panel of a weight (64 rows) with a tile of activations.
//
// Every output is one sum over the inputs in their order, whatever the number of rows in the tile or in the batch, so a
// sequence gets the same bits alone, in any batch and in any cut of its prompt. Sums live in registers (bf16, float)
// or, for quantised weights, integer sums of one group in registers and the float total in `c`.
#pragma once
#include "tables.h"
#include "vector.h"

namespace {

using namespace fledge;

constexpr int NV = 4;                   // vectors of columns worked on at a time
constexpr int COLUMNS = NV * W;         // 64, 32 or 16
constexpr int PARTS = PANEL / COLUMNS;  // 1, 2 or 4
constexpr int TILE = W == 16 ? 6 : 3;   // rows: as many as the registers hold
constexpr int FAR =
    32;  // pairs: the same where zeros are skipped, and into the second cache, which waits for more at once

constexpr int FEW_TILES = 4;

struct Tile {
    const void* a;  // first input (pair) of the tile's first row
    int64_t pitch;  // words from row to row
    const float *scale, *total;
    int64_t groups;                     // of a whole row: from row to row of `scale` and `total`
    const int32_t *alive, *alive_from;  // null: all pairs count
    float* c;                           // [rows][PANEL]
    bool first;                         // c holds nothing yet
    const uint8_t* ahead;               // what the tiles of this block are to bring into the cache for the next one
    int64_t ahead_step;                 // bytes for each pair of inputs; 0: nothing
};

INLINE void bring(const Tile& t, int64_t pair) {
    for (int64_t i = 0; i < t.ahead_step; i += 64) __builtin_prefetch(t.ahead + pair * t.ahead_step + i, 0, 2);
}

// A stream is asked for this many bytes early, across page borders too. Measured by format: int4 takes the longest to
// work off, and the processor's own reading ahead helps the others, which a longer distance disturbs.
constexpr int AHEAD = 2048, AHEAD_INT4 = 4096;

template <int DISTANCE = AHEAD>
INLINE void ask(const uint8_t* p, int bytes) {
    for (int i = 0; i < bytes; i += 64) __builtin_prefetch(p + DISTANCE + i, 0, 2);
}

// ---- bf16 x bf16

template <int M>
void tile_bf16(const uint8_t* panel, int64_t groups, const Tile& t) {
    for (int part = 0; part < PARTS; part++) {
        vf acc[M][NV];
        for (int m = 0; m < M; m++)
            for (int v = 0; v < NV; v++) acc[m][v] = t.first ? vf{} : load(t.c + m * PANEL + part * COLUMNS + v * W);
        const int32_t* a = (const int32_t*)t.a;
        const uint8_t* b = panel + part * COLUMNS * 4;
        auto pair = [&](int64_t kp) {
            vi w[NV];
            for (int v = 0; v < NV; v++) w[v] = load_ints(b + kp * PANEL * 4 + v * W * 4);
            for (int m = 0; m < M; m++) {
                const vi x = splat(a[m * t.pitch + kp]);
                for (int v = 0; v < NV; v++) acc[m][v] = dot_bf16(acc[m][v], x, w[v]);
            }
        };
        if (M == 1 && t.alive) {
            const int32_t count = t.alive_from[groups];
            for (int32_t i = 0; i < count; i++) {
                const int32_t later = t.alive[i + FAR < count ? i + FAR : count - 1];
                for (int j = 0; j < PANEL * 4 / PARTS; j += 64) __builtin_prefetch(b + later * PANEL * 4 + j, 0, 2);
                pair(t.alive[i]);
            }
        } else {
            for (int64_t kp = 0; kp < groups * PAIRS; kp++) {
                if (M == 1) ask(b + kp * PANEL * 4, PANEL * 4 / PARTS);
                if (M > 1 && part == 0) bring(t, kp);
                pair(kp);
            }
        }
        for (int m = 0; m < M; m++)
            for (int v = 0; v < NV; v++) store(t.c + m * PANEL + part * COLUMNS + v * W, acc[m][v]);
    }
}

// ---- float activations; weights float32, or bfloat16 that is exact

struct Float32 {
    static constexpr int PAIR_BYTES = PANEL * 8;
    INLINE void pair(const uint8_t* p, int part, int v, vf& even, vf& odd) {
        const float* f = (const float*)p + part * COLUMNS + v * W;
        even = load(f);
        odd = load(f + PANEL);
    }
};

struct Bf16Exact {
    static constexpr int PAIR_BYTES = PANEL * 4;
    INLINE void pair(const uint8_t* p, int part, int v, vf& even, vf& odd) {
        const vi both = load_ints(p + (part * COLUMNS + v * W) * 4);
        even = low_half(both);
        odd = high_half(both);
    }
};

struct F16Exact {
    static constexpr int PAIR_BYTES = PANEL * 4;
    INLINE void pair(const uint8_t* p, int part, int v, vf& even, vf& odd) {
        const uint8_t* halves = p + (part * COLUMNS + v * W) * 2;
        even = load_halves(halves);
        odd = load_halves(halves + PANEL * 2);
    }
};

template <class Stored, int M>
void tile_float(const uint8_t* panel, int64_t groups, const Tile& t) {
    for (int part = 0; part < PARTS; part++) {
        vf acc[M][NV];
        for (int m = 0; m < M; m++)
            for (int v = 0; v < NV; v++) acc[m][v] = t.first ? vf{} : load(t.c + m * PANEL + part * COLUMNS + v * W);
        const float* a = (const float*)t.a;
        for (int64_t kp = 0; kp < groups * PAIRS; kp++) {
            const uint8_t* b = panel + kp * Stored::PAIR_BYTES;
            if (M == 1) ask(b, Stored::PAIR_BYTES / PARTS);
            if (M > 1 && part == 0) bring(t, kp);
            vf even[NV], odd[NV];
            for (int v = 0; v < NV; v++) Stored::pair(b, part, v, even[v], odd[v]);
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
        for (int m = 0; m < M; m++)
            for (int v = 0; v < NV; v++) store(t.c + m * PANEL + part * COLUMNS + v * W, acc[m][v]);
    }
}

// ---- quantised weights

struct Int8 {
    static constexpr int BYTES = 2 * PANEL + GROUP * PANEL;
    static constexpr int PAIR_BYTES = 2 * PANEL;
    static constexpr int DISTANCE = AHEAD;
    static constexpr bool HAS_MIN = false;
    INLINE bool sixteenfold(int, int) { return false; }
    INLINE const uint8_t* pairs(const uint8_t* block) { return block + 2 * PANEL; }
    INLINE void pair(const uint8_t* p, int part, vi (&out)[NV]) {
        for (int v = 0; v < NV; v++) out[v] = widen_bytes(p + (part * COLUMNS + v * W) * 2);
    }
};

struct Int4 {
    static constexpr int BYTES = 4 * PANEL + GROUP * PANEL / 2;
    static constexpr int PAIR_BYTES = PANEL;
    static constexpr int DISTANCE = AHEAD_INT4;
    static constexpr bool HAS_MIN = true;
    INLINE bool sixteenfold(int part, int v) { return (part * NV + v) * W / 16 % 2; }
    INLINE const uint8_t* pairs(const uint8_t* block) { return block + 4 * PANEL; }
    INLINE void pair(const uint8_t* p, int part, vi (&out)[NV]) {
        constexpr int LOADS = 16 / W;         // of the 16 words
        constexpr int QUARTERS = NV / LOADS;  // of the panel in this part
        for (int i = 0; i < LOADS; i++) {
            const vi words = load_ints(p + i * W * 4);
            for (int q = 0; q < QUARTERS; q++) {
                const int quarter = part * QUARTERS + q;
                const vi shifted = quarter < 2 ? words : (vi)((vu)words >> 8);
                out[q * LOADS + i] = shifted & (quarter % 2 ? 0x00f000f0 : 0x000f000f);
            }
        }
    }
};

// The pair that comes FAR pairs after the i-th that counts, and the scales of its group where that is a new one.
template <class Stored>
INLINE void ask_later(const uint8_t* panel, const Tile& t, int32_t i, int32_t count) {
    if (i + FAR >= count) return;
    const int32_t pair = t.alive[i + FAR];
    const uint8_t* block = panel + pair / PAIRS * (int64_t)Stored::BYTES;
    const uint8_t* p = Stored::pairs(block) + pair % PAIRS * Stored::PAIR_BYTES;
    for (int j = 0; j < Stored::PAIR_BYTES; j += 64) __builtin_prefetch(p + j, 0, 2);
    if (t.alive[i + FAR - 1] / PAIRS != pair / PAIRS)
        for (int j = 0; j < Stored::pairs(block) - block; j += 64) __builtin_prefetch(block + j);
}

template <class Stored, int M>
void tile_quantised(const uint8_t* panel, int64_t groups, const Tile& t) {
    if (t.first)
        for (int i = 0; i < M * PANEL; i += W) store(t.c + i, vf{});
    for (int64_t g = 0; g < groups; g++) {
        if (M == 1 && t.alive && t.alive_from[g] == t.alive_from[g + 1]) continue;
        const uint8_t* block = panel + g * Stored::BYTES;
        const int32_t* a = (const int32_t*)t.a + g * PAIRS;
        for (int part = 0; part < PARTS; part++) {
            vi acc[M][NV] = {};
            auto pair = [&](int kp) {
                vi w[NV];
                Stored::pair(Stored::pairs(block) + kp * Stored::PAIR_BYTES, part, w);
                for (int m = 0; m < M; m++) {
                    const vi x = splat(a[m * t.pitch + kp]);
                    for (int v = 0; v < NV; v++) acc[m][v] = dot_i16(acc[m][v], x, w[v]);
                }
            };
            if (M == 1 && t.alive) {
                for (int32_t i = t.alive_from[g]; i < t.alive_from[g + 1]; i++) {
                    if (part == 0) ask_later<Stored>(panel, t, i, t.alive_from[groups]);
                    pair(t.alive[i] - (int)g * PAIRS);
                }
            } else {
                if (M == 1 && part == 0) ask<Stored::DISTANCE>(block, Stored::BYTES - PAIRS * Stored::PAIR_BYTES);
                for (int kp = 0; kp < PAIRS; kp++) {
                    if (M == 1 && part == 0)
                        ask<Stored::DISTANCE>(Stored::pairs(block) + kp * Stored::PAIR_BYTES, Stored::PAIR_BYTES);
                    if (M > 1 && part == 0) bring(t, g * PAIRS + kp);
                    pair(kp);
                }
            }
            vf scale[NV], least[NV];
            for (int v = 0; v < NV; v++) {
                scale[v] = load_halves(block + (part * COLUMNS + v * W) * 2);
                if (Stored::HAS_MIN) least[v] = load_halves(block + (PANEL + part * COLUMNS + v * W) * 2);
            }
            for (int m = 0; m < M; m++) {
                const vf by = splat(t.scale[m * t.groups + g]), total = splat(t.total[m * t.groups + g]);
                for (int v = 0; v < NV; v++) {
                    float* c = t.c + m * PANEL + part * COLUMNS + v * W;
                    vf sum = fma(to_float(acc[m][v]), scale[v] * (Stored::sixteenfold(part, v) ? by * 0.0625f : by),
                                 load(c));
                    if (Stored::HAS_MIN) sum = fma(least[v], total, sum);
                    store(c, sum);
                }
            }
        }
    }
}

// ---- a whole panel

typedef void (*TileFunction)(const uint8_t*, int64_t, const Tile&);

template <int M>
TileFunction tile_of(int32_t format) {
    switch (format) {
        case BF16: return tile_bf16<M>;
        case INT8: return tile_quantised<Int8, M>;
        case INT4: return tile_quantised<Int4, M>;
        case BF16_EXACT: return tile_float<Bf16Exact, M>;
        case F16_EXACT: return tile_float<F16Exact, M>;
        default: return tile_float<Float32, M>;
    }
}

template <int M>
TileFunction tile_for(int32_t format, int64_t rows) {
    if constexpr (M > 1)
        if (rows < M) return tile_for<M - 1>(format, rows);
    return tile_of<M>(format);
}

// A panel is worked off in blocks of about this size, each with all rows before the next. While they multiply, the
// tiles share the work of asking for the next block: with a few rows, memory and arithmetic would otherwise take turns.
// The fewer tiles, the smaller the block, which stays in the first cache beside the next one's arrival in the second.
INLINE int64_t groups_of_block(const Matrix& w, const Activations& a) {
    if (a.rows <= TILE) return a.groups();
    const int64_t bytes = a.rows <= FEW_TILES * TILE ? 16 << 10 : 32 << 10, fitting = bytes / block_bytes(w.format);
    return fitting < 1 ? 1 : fitting;
}

// The places of a tile's results are asked for before its last block, so that storing them does not wait.
INLINE void ask_for_output(float* y, int64_t stride, int64_t rows) {
    for (int64_t row = 0; row < rows; row++)
        for (int64_t i = 0; i < PANEL; i += 16) __builtin_prefetch(y + row * stride + i, 1);
}

// A jump costs more than a step: memory is read ahead in streams, and a few gaps only break them. The wider the pairs
// are in memory, the sooner it pays (measured: ahead at 80 % of bfloat16 pairs, at 55 % of quantised ones).
INLINE bool worth_skipping(const Activations& a) {
    if (a.rows != 1 || !a.alive) return false;
    const int64_t most = a.padded / 2 * (a.kind == BF16_PAIRS ? 80 : 55) / 100;
    return a.alive_from[a.groups()] <= most;
}

struct Block {
    int64_t g, count;  // groups
    float* c;
    float* y;  // where the panel's results go
    int64_t stride;
};

INLINE void panel_block(const Matrix& w, const uint8_t* data, const Block& block, const Activations& a) {
    const auto [g, count, c, y, stride] = block;
    const int64_t groups = a.groups(), bytes = block_bytes(w.format);
    const int64_t word = a.kind == FLOATS ? 1 : 2;  // inputs in a word of the activations
    const int64_t tiles = (a.rows + TILE - 1) / TILE;
    const int64_t share = (count * bytes + tiles - 1) / tiles, pairs = count * PAIRS;
    for (int64_t tile = 0; tile < tiles; tile++) {
        const int64_t row = tile * TILE, left = a.rows - row, rows = left < TILE ? left : TILE;
        Tile t{};
        t.a = (const float*)a.data + row * a.pitch + g * GROUP / word;
        t.pitch = a.pitch, t.groups = groups;
        t.scale = a.scale + row * groups + g, t.total = a.total + row * groups + g;
        if (worth_skipping(a)) t.alive = a.alive, t.alive_from = a.alive_from;
        t.c = c + row * PANEL;
        t.first = g == 0;
        t.ahead_step = (share + pairs * 64 - 1) / (pairs * 64) * 64;
        // What lies behind the last block of a panel is the next panel, which the same thread nearly always takes.
        t.ahead = data + (tiles == 1 ? g * bytes + AHEAD : (g + count) * bytes + tile * t.ahead_step * pairs);
        if (tile * t.ahead_step * pairs >= count * bytes) t.ahead_step = 0;
        if (g + count == groups) ask_for_output(y + row * stride, stride, rows);
        tile_for<TILE>(w.format, rows)(data + g * bytes, count, t);
    }
}

void panel(const Matrix& w, int64_t number, const Activations& a, float* scratch, const Output& out) {
    const uint8_t* data = w.data + number * w.panel_bytes();
    const int64_t groups = a.groups(), step = groups_of_block(w, a);
    const int64_t start = number * PANEL;
    for (int64_t g = 0; g < groups; g += step)
        panel_block(w, data, {g, groups - g < step ? groups - g : step, scratch, out.y + start, out.stride}, a);
    const int64_t columns = out.width - start < PANEL ? out.width - start : PANEL;
    for (int64_t row = 0; row < a.rows; row++) {
        float* y = out.y + row * out.stride + start;
        const float* c = scratch + row * PANEL;
        if (groups == 0)
            for (int64_t i = 0; i < columns; i++) y[i] = out.add ? y[i] : 0.0f;
        else if (out.add)
            for (int64_t i = 0; i < columns; i++) y[i] += c[i];
        else
            for (int64_t i = 0; i < columns; i++) y[i] = c[i];
    }
}

// ---- activations

typedef uint16_t vh __attribute__((vector_size(W * 2), aligned(2), may_alias));

// One group of inputs as int16 pairs, with its scale and the sum of what the integers stand for.
INLINE void round_group(const float* group, vh* halves, float& scale, float& total) {
    vi sizes = {};  // bits of the largest sizes: they compare as the numbers do, infinite and undefined ones above all
    for (int i = 0; i < GROUP; i += W) {
        const vi size = load_ints(group + i) & 0x7fffffff;
        sizes = (vi)select((vi)(size > sizes), (vf)size, (vf)sizes);
    }
    const int32_t bits = largest(sizes);
    float top;
    __builtin_memcpy(&top, &bits, 4);
    const bool sound = bits < 0x7f800000;
    const float inverse = sound && top > 1e-30f ? 32767.0f / top : 0.0f;
    vi count = {};
    for (int i = 0; i < GROUP; i += W) {
        // Adding 1.5 * 2^23 rounds to the nearest integer, ties to even, and leaves it in the low bits.
        const vi rounded = (vi)(load(group + i) * inverse + 12582912.0f);
        halves[i / W] = __builtin_convertvector((vu)rounded, vh);
        count += (rounded << 16) >> 16;
    }
    scale = sound ? top / 32767.0f : __builtin_nanf("");
    total = scale * (float)sum(count);
}

void prepare(const float* x, int64_t row, const Activations& a) {
    if (a.kind == FLOATS) {
        float* out = (float*)a.data + row * a.pitch;
        __builtin_memcpy(out, x, (size_t)a.k * 4);
        for (int64_t k = a.k; k < a.padded; k++) out[k] = 0.0f;
        return;
    }
    int32_t* out = (int32_t*)a.data + row * a.pitch;
    const int64_t groups = a.groups();
    for (int64_t g = 0; g < groups; g++) {
        alignas(64) float filled[GROUP];
        int32_t* pairs = out + g * PAIRS;
        const float* group = x + g * GROUP;
        if ((g + 1) * GROUP > a.k) {
            for (int i = 0; i < GROUP; i++) filled[i] = g * GROUP + i < a.k ? group[i] : 0.0f;
            group = filled;
        }
        if (a.kind == BF16_PAIRS) {
            for (int i = 0; i < GROUP; i += W)
                ((vh*)pairs)[i / W] = __builtin_convertvector(round_bf16(load(group + i)), vh);
        } else {
            round_group(group, (vh*)pairs, a.scale[row * groups + g], a.total[row * groups + g]);
        }
        if (a.alive) {
            // A group that is not finite counts whole: its numbers are in its scale.
            const bool broken = a.kind == I16_PAIRS && !(a.scale[g] == a.scale[g]);
            int32_t count = a.alive_from[g];
            for (int kp = 0; kp < PAIRS; kp++) {
                a.alive[count] = (int32_t)(g * PAIRS + kp);
                count += broken || (pairs[kp] & 0x7fff7fff) != 0;
            }
            a.alive_from[g + 1] = count;
        }
    }
}

}  // namespace
