// Eight tiles of 16 rows of 64 bytes, and the products of tiles: in hardware (Intel AMX), or as a scalar model.
//
// The model computes the same bits, so a machine without AMX can test everything around these instructions. A tile
// number must be a literal, as for the instructions. Tiles are configured for one of two kinds of product:
//
//     bf16   a: 16 rows of 32 numbers; b: 16 rows of 16 pairs; c: 16 x 16 floats
//     int8   a: 16 rows of 32 bytes;   b: 8 rows of 16 groups of four bytes; c: 16 x 16 int32
#pragma once
#include "tables.h"
#include "vector.h"

namespace {

using namespace fledge;

constexpr int TILE = 16;  // rows of a and c, columns of b and c

// The layout that `ldtilecfg` reads.
struct alignas(64) TileConfig {
    uint8_t palette;
    uint8_t start_row;
    uint8_t reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
};

// Tiles 0 to 3: c. 4 and 5: a. 6 and 7: b.
INLINE TileConfig tile_config(int a_bytes, int b_rows) {
    TileConfig config{};
    config.palette = 1;
    for (int i = 0; i < 8; i++) {
        config.row_bytes[i] = (uint16_t)(i == 4 || i == 5 ? a_bytes : 64);
        config.rows[i] = (uint8_t)(i >= 6 ? b_rows : TILE);
    }
    return config;
}

}  // namespace

#if defined(__AMX_TILE__)

#define TILE_CONFIGURE(a_bytes, b_rows)                         \
    do {                                                        \
        const TileConfig config = tile_config(a_bytes, b_rows); \
        _tile_loadconfig(&config);                              \
    } while (0)
#define TILE_RELEASE() _tile_release()
#define TILE_ZERO(c) _tile_zero(c)
#define TILE_LOAD(tile, base, stride) _tile_loadd(tile, base, (size_t)(stride))
#define TILE_STORE(tile, base, stride) _tile_stored(tile, base, (size_t)(stride))
#define TILE_DOT_BF16(c, a, b) _tile_dpbf16ps(c, a, b)
#define TILE_DOT_SIGNED(c, a, b) _tile_dpbssd(c, a, b)    // a and b are signed bytes
#define TILE_DOT_UNSIGNED(c, a, b) _tile_dpbusd(c, a, b)  // a is unsigned, b is signed

#else

namespace {

struct TileModel {
    TileConfig config;
    alignas(64) uint8_t data[8][TILE][64];

    void load(int tile, const void* base, int64_t stride) {
        for (int row = 0; row < config.rows[tile]; row++)
            __builtin_memcpy(data[tile][row], (const uint8_t*)base + row * stride, config.row_bytes[tile]);
    }

    void store(int tile, void* base, int64_t stride) const {
        for (int row = 0; row < config.rows[tile]; row++)
            __builtin_memcpy((uint8_t*)base + row * stride, data[tile][row], config.row_bytes[tile]);
    }

    static float bf16_to_float(uint16_t bits) {
        const uint32_t word = (uint32_t)bits << 16;
        float x;
        __builtin_memcpy(&x, &word, 4);
        return x;
    }

    // Even and odd inputs are summed separately, each with fused multiply-adds, and added to c at the end. Denormal
    // numbers count as zero: the caller sets both flags of the control register.
    void dot_bf16(int c, int a, int b) {
        for (int m = 0; m < config.rows[c]; m++)
            for (int n = 0; n < TILE; n++) {
                float even = 0;
                float odd = 0;
                for (int k = 0; k < config.rows[b]; k++) {
                    uint16_t x[2];
                    uint16_t w[2];
                    __builtin_memcpy(x, data[a][m] + 4 * k, 4);
                    __builtin_memcpy(w, data[b][k] + 4 * n, 4);
                    even = __builtin_fmaf(bf16_to_float(x[0]), bf16_to_float(w[0]), even);
                    odd = __builtin_fmaf(bf16_to_float(x[1]), bf16_to_float(w[1]), odd);
                }
                float sum;
                __builtin_memcpy(&sum, data[c][m] + 4 * n, 4);
                sum = sum + (even + odd);
                __builtin_memcpy(data[c][m] + 4 * n, &sum, 4);
            }
    }

    template <class A>
    void dot_bytes(int c, int a, int b) {
        for (int m = 0; m < config.rows[c]; m++)
            for (int n = 0; n < TILE; n++) {
                int32_t sum;
                __builtin_memcpy(&sum, data[c][m] + 4 * n, 4);
                for (int k = 0; k < config.rows[b]; k++)
                    for (int i = 0; i < 4; i++)
                        sum += (int32_t)(A)data[a][m][4 * k + i] * (int32_t)(int8_t)data[b][k][4 * n + i];
                __builtin_memcpy(data[c][m] + 4 * n, &sum, 4);
            }
    }
};

thread_local TileModel tile_model;

}  // namespace

#define TILE_CONFIGURE(a_bytes, b_rows) (tile_model.config = tile_config(a_bytes, b_rows))
#define TILE_RELEASE() (void)0
#define TILE_ZERO(c) __builtin_memset(tile_model.data[c], 0, sizeof tile_model.data[c])
#define TILE_LOAD(tile, base, stride) tile_model.load(tile, base, stride)
#define TILE_STORE(tile, base, stride) tile_model.store(tile, base, stride)
#define TILE_DOT_BF16(c, a, b) tile_model.dot_bf16(c, a, b)
#define TILE_DOT_SIGNED(c, a, b) tile_model.dot_bytes<int8_t>(c, a, b)
#define TILE_DOT_UNSIGNED(c, a, b) tile_model.dot_bytes<uint8_t>(c, a, b)

#endif
