// Products of one panel of a weight with matrix units, for prompts and batches.
//
// bf16: a tile instruction sums even and odd inputs of a group of 32 separately, adds both, and adds the result to the
// sum of the earlier groups. A single row is computed in the same order with vector instructions, so every number of
// rows gets the same bits.
//
// int8 and int4: an activation is an int16, 256 high + low, and both bytes are multiplied by the weight as bytes. The
// integer sums are exact, so the results have the same bits as those of every other instruction set.
#pragma once
#include "products.h"
#include "tile_unit.h"

namespace {

using namespace fledge;

constexpr int64_t MIN_TILE_ROWS = 3;  // fewer rows use vector instructions: reading the weight takes most of the time
constexpr int64_t TILE_BLOCK_GROUPS = 8;  // of a weight, multiplied with all rows: 32 KiB of bf16, 16 KiB of bytes
constexpr int COLUMN_TILES = PANEL / TILE;

INLINE bool uses_tiles(const Activations& a) { return a.rows >= MIN_TILE_ROWS && a.kind != FLOATS; }

// Denormal inputs and results count as zero, as in the tile instructions.
class DenormalsAreZero {
   public:
    DenormalsAreZero() : saved_(_mm_getcsr()) { _mm_setcsr(saved_ | _MM_FLUSH_ZERO_ON | 0x0040); }
    ~DenormalsAreZero() { _mm_setcsr(saved_); }
    DenormalsAreZero(const DenormalsAreZero&) = delete;
    DenormalsAreZero& operator=(const DenormalsAreZero&) = delete;

   private:
    unsigned saved_;
};

// ---- bf16

// One or two rows in the order of the tiles, for some groups of a panel.
template <int M>
void row_bf16(const uint8_t* panel, int64_t groups, const Tile& t) {
    for (int part = 0; part < PARTS; part++) {
        vf acc[M][NV];
        load_sums(t, part, acc);
        const int32_t* a = (const int32_t*)t.inputs;
        const uint8_t* b = panel + part * COLUMNS * 4;
        for (int64_t g = 0; g < groups; g++) {
            vf even[M][NV] = {};
            vf odd[M][NV] = {};
            auto multiply_pair = [&](int64_t kp) {
                vi w[NV];
                for (int v = 0; v < NV; v++) w[v] = load_ints(b + kp * PANEL * 4 + v * W * 4);
                for (int m = 0; m < M; m++) {
                    const vi x = splat(a[m * t.pitch + kp]);
                    for (int v = 0; v < NV; v++) {
                        even[m][v] = fma(low_half(x), low_half(w[v]), even[m][v]);
                        odd[m][v] = fma(high_half(x), high_half(w[v]), odd[m][v]);
                    }
                }
            };
            if (M == 1 && t.nonzero_pairs) {
                const int32_t count = t.nonzero_starts[groups];
                for (int32_t i = t.nonzero_starts[g]; i < t.nonzero_starts[g + 1]; i++) {
                    const int32_t later = t.nonzero_pairs[i + PREFETCH_PAIRS < count ? i + PREFETCH_PAIRS : count - 1];
                    for (int j = 0; j < PANEL * 4 / PARTS; j += 64) __builtin_prefetch(b + later * PANEL * 4 + j, 0, 2);
                    multiply_pair(t.nonzero_pairs[i]);
                }
            } else {
                for (int64_t kp = g * PAIRS; kp < (g + 1) * PAIRS; kp++) {
                    prefetch(b + kp * PANEL * 4, PANEL * 4 / PARTS);
                    multiply_pair(kp);
                }
            }
            for (int m = 0; m < M; m++)
                for (int v = 0; v < NV; v++) acc[m][v] += even[m][v] + odd[m][v];
        }
        store_sums(t, part, acc);
    }
}

// 32 rows and 32 columns: c (2 x 2 tiles), a and b of `groups` groups.
INLINE void tiles_32x32(const uint8_t* a, int64_t a_pitch, const uint8_t* b, int64_t groups, float* c, bool is_first) {
    constexpr int64_t C_PITCH = PANEL * 4;
    constexpr int64_t B_PITCH = PANEL * 4;
    if (is_first) {
        TILE_ZERO(0);
        TILE_ZERO(1);
        TILE_ZERO(2);
        TILE_ZERO(3);
    } else {
        TILE_LOAD(0, c, C_PITCH);
        TILE_LOAD(1, c + TILE, C_PITCH);
        TILE_LOAD(2, c + TILE * PANEL, C_PITCH);
        TILE_LOAD(3, c + TILE * PANEL + TILE, C_PITCH);
    }
    for (int64_t g = 0; g < groups; g++) {
        const uint8_t* rows = a + g * GROUP * 2;
        const uint8_t* columns = b + g * GROUP * PANEL * 2;
        TILE_LOAD(4, rows, a_pitch);
        TILE_LOAD(6, columns, B_PITCH);
        TILE_DOT_BF16(0, 4, 6);
        TILE_LOAD(7, columns + 64, B_PITCH);
        TILE_DOT_BF16(1, 4, 7);
        TILE_LOAD(5, rows + TILE * a_pitch, a_pitch);
        TILE_DOT_BF16(2, 5, 6);
        TILE_DOT_BF16(3, 5, 7);
    }
    TILE_STORE(0, c, C_PITCH);
    TILE_STORE(1, c + TILE, C_PITCH);
    TILE_STORE(2, c + TILE * PANEL, C_PITCH);
    TILE_STORE(3, c + TILE * PANEL + TILE, C_PITCH);
}

// 16 rows and all 64 columns of the panel.
INLINE void tiles_16x64(const uint8_t* a, int64_t a_pitch, const uint8_t* b, int64_t groups, float* c, bool is_first) {
    constexpr int64_t C_PITCH = PANEL * 4;
    constexpr int64_t B_PITCH = PANEL * 4;
    if (is_first) {
        TILE_ZERO(0);
        TILE_ZERO(1);
        TILE_ZERO(2);
        TILE_ZERO(3);
    } else {
        TILE_LOAD(0, c, C_PITCH);
        TILE_LOAD(1, c + TILE, C_PITCH);
        TILE_LOAD(2, c + 2 * TILE, C_PITCH);
        TILE_LOAD(3, c + 3 * TILE, C_PITCH);
    }
    for (int64_t g = 0; g < groups; g++) {
        const uint8_t* columns = b + g * GROUP * PANEL * 2;
        TILE_LOAD(4, a + g * GROUP * 2, a_pitch);
        TILE_LOAD(6, columns, B_PITCH);
        TILE_DOT_BF16(0, 4, 6);
        TILE_LOAD(7, columns + 64, B_PITCH);
        TILE_DOT_BF16(1, 4, 7);
        TILE_LOAD(6, columns + 128, B_PITCH);
        TILE_DOT_BF16(2, 4, 6);
        TILE_LOAD(7, columns + 192, B_PITCH);
        TILE_DOT_BF16(3, 4, 7);
    }
    TILE_STORE(0, c, C_PITCH);
    TILE_STORE(1, c + TILE, C_PITCH);
    TILE_STORE(2, c + 2 * TILE, C_PITCH);
    TILE_STORE(3, c + 3 * TILE, C_PITCH);
}

// Prefetches the next block of the weight in equal shares, one for each tile of rows.
INLINE void prefetch_share(const uint8_t* next, int64_t bytes, int64_t share, int64_t shares) {
    const int64_t end = bytes * (share + 1) / shares;
    for (int64_t i = bytes * share / shares / 64 * 64; i < end; i += 64) __builtin_prefetch(next + i, 0, 2);
}

void multiply_panel_bf16(const uint8_t* data, const Activations& a, float* sums) {
    const int64_t groups = a.groups();
    const int64_t pitch = a.pitch * 4;
    for (int64_t g = 0; g < groups; g += TILE_BLOCK_GROUPS) {
        const int64_t count = groups - g < TILE_BLOCK_GROUPS ? groups - g : TILE_BLOCK_GROUPS;
        const uint8_t* b = data + g * block_bytes(BF16);
        const uint8_t* next = b + count * block_bytes(BF16);
        for (int64_t row = 0; row < a.rows; row += 2 * TILE) {
            const uint8_t* rows = (const uint8_t*)a.data + row * pitch + g * GROUP * 2;
            float* c = sums + row * PANEL;
            prefetch_share(next, count * block_bytes(BF16), row / (2 * TILE), (a.rows + 2 * TILE - 1) / (2 * TILE));
            if (a.rows - row > TILE) {
                tiles_32x32(rows, pitch, b, count, c, g == 0);
                tiles_32x32(rows, pitch, b + 128, count, c + 2 * TILE, g == 0);
            } else {
                tiles_16x64(rows, pitch, b, count, c, g == 0);
            }
        }
    }
}

// ---- int8 and int4

// The bytes of the weights of one group, in groups of four inputs: [8][64][4].
typedef uint8_t ByteBlock[GROUP / 4][PANEL][4];

// Loads the pairs (columns i to i + 15) of one pair of inputs as 16 int16 words of two signed bytes.
INLINE __m256i load_byte_pairs(const Int8&, const uint8_t* pairs, int column) {
    return _mm256_loadu_si256((const __m256i*)(pairs + column * 2));
}

// A word of an int4 pair holds four rows of the weight, 16 apart. Each byte has two 4-bit numbers.
INLINE __m256i load_byte_pairs(const Int4&, const uint8_t* pairs, int column) {
    const int quarter = column / TILE;
    const __m512i words = _mm512_loadu_si512(pairs);
    const __m512i shifted = _mm512_srli_epi32(words, (quarter < 2 ? 0 : 8) + (quarter % 2 ? 4 : 0));
    // Bytes 0 and 2 of each word have the number of the even and of the odd input.
    const __m512i numbers = _mm512_and_si512(shifted, _mm512_set1_epi32(0x000f000f));
    const __m512i packed = _mm512_or_si512(numbers, _mm512_srli_epi32(numbers, 8));
    return _mm512_cvtepi32_epi16(packed);
}

template <class Stored>
INLINE void unpack_bytes(const uint8_t* block, ByteBlock& bytes) {
    const uint8_t* pairs = Stored::pairs(block);
    for (int k = 0; k < GROUP / 4; k++)
        for (int column = 0; column < PANEL; column += TILE) {
            const uint8_t* first = pairs + 2 * k * Stored::PAIR_BYTES;
            const __m256i low = load_byte_pairs(Stored{}, first, column);
            const __m256i high = load_byte_pairs(Stored{}, first + Stored::PAIR_BYTES, column);
            const __m512i words =
                _mm512_or_si512(_mm512_cvtepu16_epi32(low), _mm512_slli_epi32(_mm512_cvtepu16_epi32(high), 16));
            _mm512_storeu_si512(bytes[k][column], words);
        }
}

// The integer sums of 16 rows and 16 columns: high * 256 + low.
struct alignas(64) IntegerSums {
    int32_t high[TILE][TILE];
    int32_t low[TILE][TILE];
};

template <class Stored>
INLINE void add_scaled_tile(const uint8_t* block, const IntegerSums& integers, const Activations& a, int64_t row,
                            int64_t g, int column, float* sums) {
    const int64_t groups = a.groups();
    const vf scale = load_halves(block + column * 2);
    const vf minimum = Stored::HAS_MINIMUM ? load_halves(block + (PANEL + column) * 2) : vf{};
    const int64_t rows = a.rows - row < TILE ? a.rows - row : TILE;
    for (int64_t m = 0; m < rows; m++) {
        const vi total = (load_ints(integers.high[m]) << 8) + load_ints(integers.low[m]);
        const vf factor = scale * splat(a.scale[(row + m) * groups + g]);
        float* out = sums + (row + m) * PANEL + column;
        vf sum = fma(to_float(total), factor, load(out));
        if (Stored::HAS_MINIMUM) sum = fma(minimum, splat(a.total[(row + m) * groups + g]), sum);
        store(out, sum);
    }
}

template <class Stored>
void multiply_panel_bytes(const uint8_t* data, const Activations& a, float* sums) {
    const int64_t groups = a.groups();
    const int64_t pitch = a.pitch * 4;
    ByteBlock bytes[TILE_BLOCK_GROUPS];
    IntegerSums integers;
    for (int64_t i = 0; i < a.rows * PANEL; i += W) store(sums + i, vf{});
    for (int64_t g = 0; g < groups; g += TILE_BLOCK_GROUPS) {
        const int64_t count = groups - g < TILE_BLOCK_GROUPS ? groups - g : TILE_BLOCK_GROUPS;
        const uint8_t* block = data + g * Stored::BYTES;
        for (int64_t i = 0; i < count; i++) unpack_bytes<Stored>(block + i * Stored::BYTES, bytes[i]);
        const uint8_t* next = block + count * Stored::BYTES;
        for (int64_t row = 0; row < a.rows; row += TILE) {
            prefetch_share(next, count * Stored::BYTES, row / TILE, (a.rows + TILE - 1) / TILE);
            for (int64_t i = 0; i < count; i++) {
                const uint8_t* rows = (const uint8_t*)a.data + row * pitch + (g + i) * GROUP * 2;
                TILE_LOAD(4, rows, pitch);          // the high bytes
                TILE_LOAD(5, rows + GROUP, pitch);  // the low bytes
                for (int column = 0; column < PANEL; column += TILE) {
                    TILE_LOAD(6, bytes[i][0][column], PANEL * 4);
                    TILE_ZERO(0);
                    TILE_ZERO(1);
                    TILE_DOT_SIGNED(0, 4, 6);
                    TILE_DOT_UNSIGNED(1, 5, 6);
                    TILE_STORE(0, integers.high, TILE * 4);
                    TILE_STORE(1, integers.low, TILE * 4);
                    add_scaled_tile<Stored>(block + i * Stored::BYTES, integers, a, row, g + i, column, sums);
                }
            }
        }
    }
}

// ---- activations

// Splits the int16 pairs of a row into bytes, in place: for each group 32 high bytes, then 32 low bytes.
void split_bytes(int64_t row, const Activations& a) {
    int32_t* pairs = (int32_t*)a.data + row * a.pitch;
    for (int64_t g = 0; g < a.groups(); g++) {
        const __m512i words = _mm512_loadu_si512(pairs + g * PAIRS);
        const __m256i low = _mm512_cvtepi16_epi8(words);
        const __m256i high = _mm512_cvtepi16_epi8(_mm512_srli_epi16(words, 8));
        _mm256_storeu_si256((__m256i*)(pairs + g * PAIRS), high);
        _mm256_storeu_si256((__m256i*)(pairs + g * PAIRS) + 1, low);
    }
}

void pack_row_for_tiles(const float* x, int64_t row, const Activations& a) {
    pack_row(x, row, a);
    if (a.kind == I16_PAIRS && uses_tiles(a)) split_bytes(row, a);
}

void multiply_panel_with_tiles(const Matrix& w, int64_t panel, const Activations& a, float* scratch,
                               const Output& out) {
    const uint8_t* data = w.data + panel * w.panel_bytes();
    const bool is_bf16 = a.kind == BF16_PAIRS;
    if (a.groups() == 0 || !(is_bf16 || uses_tiles(a))) {
        multiply_panel(w, panel, a, scratch, out);
        return;
    }
    if (!uses_tiles(a)) {
        const DenormalsAreZero scope;
        Tile t{};
        t.inputs = a.data;
        t.pitch = a.pitch;
        t.groups = a.groups();
        if (is_skipping_faster(a)) {
            t.nonzero_pairs = a.nonzero_pairs;
            t.nonzero_starts = a.nonzero_starts;
        }
        t.sums = scratch;
        t.is_first = true;
        a.rows == 1 ? row_bf16<1>(data, a.groups(), t) : row_bf16<2>(data, a.groups(), t);
    } else if (is_bf16) {
        const DenormalsAreZero scope;
        TILE_CONFIGURE(64, GROUP / 2);
        multiply_panel_bf16(data, a, scratch);
        TILE_RELEASE();
    } else {
        TILE_CONFIGURE(GROUP, GROUP / 4);
        w.format == INT8 ? multiply_panel_bytes<Int8>(data, a, scratch) : multiply_panel_bytes<Int4>(data, a, scratch);
        TILE_RELEASE();
    }
    write_output(panel, a, scratch, out);
}

}  // namespace
