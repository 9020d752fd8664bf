#include "pack.h"

#include <cmath>
#include <cstring>

#include "cpu.h"
#include "export.h"
#include "matmul.h"
#include "threads.h"

namespace fledge {
namespace {

float from_bits(uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
}

uint32_t to_bits(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    return bits;
}

}  // namespace

float half_to_float(uint16_t h) {
    const uint32_t sign = static_cast<uint32_t>(h & 0x8000) << 16, rest = h & 0x7fff;
    if (rest >= 0x7c00) return from_bits(sign | 0x7f800000 | (rest & 0x3ff) << 13);
    if (rest < 0x400) return std::copysign(static_cast<float>(rest) * 0x1p-24f, from_bits(sign));
    return from_bits(sign | ((rest << 13) + ((127 - 15) << 23)));
}

namespace {

uint16_t float_to_bf16(float x) {
    const uint32_t bits = to_bits(x);
    if (x != x) return static_cast<uint16_t>(bits >> 16 | 0x40);
    return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

template <int32_t STORED>
float read(const void* data, int64_t at) {
    if constexpr (STORED == STORED_F32) return static_cast<const float*>(data)[at];
    const uint16_t bits = static_cast<const uint16_t*>(data)[at];
    return STORED == STORED_BF16 ? from_bits(static_cast<uint32_t>(bits) << 16) : half_to_float(bits);
}

template <int32_t STORED>
void pack_panel_floats(const Source& from, const Matrix& w, int64_t panel, float* out) {
    for (int64_t j = 0; j < w.padded(); j++)
        for (int64_t i = 0; i < PANEL; i++) {
            const int64_t row = panel * PANEL + i;
            out[j * PANEL + i] = row < w.n && j < w.k ? read<STORED>(from.data, row * from.row + j * from.column) : 0;
        }
}

template <int32_t STORED>
uint32_t bf16_at(const Source& from, int64_t at) {
    if constexpr (STORED == STORED_BF16) return static_cast<const uint16_t*>(from.data)[at];
    return float_to_bf16(read<STORED>(from.data, at));
}

template <int32_t STORED>
void pack_panel_bf16(const Source& from, const Matrix& w, int64_t panel, uint32_t* out) {
    // Blocks of 16 pairs: 64 rows are read along, a cache line of each, before the next block is begun.
    for (int64_t block = 0; block < w.padded(); block += GROUP)
        for (int64_t i = 0; i < PANEL; i++) {
            const int64_t row = panel * PANEL + i;
            uint32_t* to = out + block / 2 * PANEL + i;
            for (int64_t j = block; j < block + GROUP; j += 2, to += PANEL) {
                uint32_t both = 0;
                if (row < w.n && j < w.k) both = bf16_at<STORED>(from, row * from.row + j * from.column);
                if (row < w.n && j + 1 < w.k) both |= bf16_at<STORED>(from, row * from.row + (j + 1) * from.column) << 16;
                *to = both;
            }
        }
}

// Of weights that are float16 already: nothing is rounded.
void pack_panel_f16(const Source& from, const Matrix& w, int64_t panel, uint16_t* out) {
    const uint16_t* values = static_cast<const uint16_t*>(from.data);
    for (int64_t j = 0; j < w.padded(); j++)
        for (int64_t i = 0; i < PANEL; i++) {
            const int64_t row = panel * PANEL + i;
            out[j * PANEL + i] = row < w.n && j < w.k ? values[row * from.row + j * from.column] : uint16_t{0};
        }
}

template <int32_t STORED>
void pack_panel(const Source& from, const Matrix& w, int64_t panel, uint8_t* data) {
    uint8_t* out = data + panel * w.panel_bytes();
    if (w.format == F32)
        pack_panel_floats<STORED>(from, w, panel, reinterpret_cast<float*>(out));
    else if (w.format == F16_EXACT)
        pack_panel_f16(from, w, panel, reinterpret_cast<uint16_t*>(out));
    else
        pack_panel_bf16<STORED>(from, w, panel, reinterpret_cast<uint32_t*>(out));
}

float value(const Source& from, int64_t row, int64_t column) {
    const int64_t at = row * from.row + column * from.column;
    switch (from.stored) {
        case STORED_F32: return read<STORED_F32>(from.data, at);
        case STORED_BF16: return read<STORED_BF16>(from.data, at);
        default: return read<STORED_F16>(from.data, at);
    }
}

// The error of one panel, or -1.
double quantise_panel(const Source& from, const Matrix& to, int64_t panel, const float* importance, uint8_t* data) {
    double total = 0;
    for (int64_t group = 0; group < to.padded() / GROUP; group++) {
        alignas(64) float rows[PANEL * GROUP];
        for (int64_t i = 0; i < PANEL; i++)
            for (int64_t j = 0; j < GROUP; j++) {
                const int64_t row = panel * PANEL + i, column = group * GROUP + j;
                rows[i * GROUP + j] = row < to.n && column < to.k ? value(from, row, column) : 0.0f;
            }
        uint8_t* block = data + panel * to.panel_bytes() + group * block_bytes(to.format);
        const double error = kernels().quantise(to.format, rows, importance ? importance + group * GROUP : nullptr, block);
        if (error < 0) return -1;
        total += error;
    }
    return total;
}

}  // namespace

int64_t packed_bytes(int32_t format, int64_t n, int64_t k) {
    constexpr int64_t LARGEST = int64_t{1} << 40;
    if (format < F32 || format > F16_EXACT || n < 1 || k < 1 || n > LARGEST / k / 8) return 0;
    const Matrix w{format, n, k, nullptr};
    return w.panels() * w.panel_bytes();
}

void pack(const Source& from, const Matrix& to, uint8_t* data) {
    parallel(to.panels(), [&](int64_t panel, int) {
        switch (from.stored) {
            case STORED_F32: return pack_panel<STORED_F32>(from, to, panel, data);
            case STORED_BF16: return pack_panel<STORED_BF16>(from, to, panel, data);
            default: return pack_panel<STORED_F16>(from, to, panel, data);
        }
    });
}

}  // namespace fledge

using namespace fledge;

FLEDGE_API int64_t fledge_packed_bytes(int32_t format, int64_t n, int64_t k) { return packed_bytes(format, n, k); }

// Dense weight (n, k) -> panels. `data` holds fledge_packed_bytes bytes. Not for the quantised formats; F16_EXACT takes
// float16 only.
FLEDGE_API int fledge_pack(int32_t format, int64_t n, int64_t k, const void* source, int32_t stored, int64_t row,
                           int64_t column, uint8_t* data) {
    return guarded([&] {
        Turn turn;
        pack(Source{source, stored, row, column}, Matrix{format, n, k, nullptr}, data);
    });
}

// Dense weight (n, k) -> the blocks of INT8 or INT4. importance: null, or one number for each input, filled up to whole
// groups. Returns the weighted sum of squared errors, -1 where a weight cannot be held, or -2 where memory did not suffice.
FLEDGE_API double fledge_quantise(int32_t format, int64_t n, int64_t k, const void* source, int32_t stored, int64_t row,
                                  int64_t column, const float* importance, uint8_t* data) {
    double total = 0;
    const int failed = guarded([&] {
        Turn turn;
        const Matrix to{format, n, k, nullptr};
        const Source from{source, stored, row, column};
        std::vector<double> errors(static_cast<size_t>(to.panels()));
        parallel(to.panels(), [&](int64_t panel, int) {
            errors[static_cast<size_t>(panel)] = quantise_panel(from, to, panel, importance, data);
        });
        for (double error : errors) total = error < 0 || total < 0 ? -1 : total + error;
    });
    return failed ? -2 : total;
}

// y (rows, n) = x (rows, k) W^T. sparse: skip pairs of inputs that are zero (single rows of pairs only).
FLEDGE_API int fledge_matmul(int32_t format, int64_t n, int64_t k, const uint8_t* data, const float* x, int64_t rows,
                             float* y, int32_t sparse) {
    return guarded([&] {
        Turn turn;
        const Matrix w{format, n, k, data};
        Prepared prepared;
        prepared.reset(kind_of(format), rows, k, sparse != 0);
        for_rows(rows, [&](int64_t row, int) { prepared.row(x + row * k, row); });
        multiply({{&w, &prepared.get(), {y, n, n, false}}});
    });
}

// Reads `bytes` bytes `turns` times with every thread: for measuring what the memory gives.
FLEDGE_API void fledge_read(const uint8_t* data, int64_t bytes, int64_t turns) {
    Turn turn;
    constexpr int64_t PIECE = 1 << 20;
    for (int64_t i = 0; i < turns; i++)
        parallel((bytes + PIECE - 1) / PIECE, [&](int64_t part, int) {
            const int64_t start = part * PIECE, count = bytes - start < PIECE ? bytes - start : PIECE;
            volatile double keep = kernels().read(data + start, count);
            (void)keep;
        });
}

// Multiply-adds of registers with every thread, `kind` as in Activations: for measuring what the arithmetic gives.
// Returns how many operations (a multiplication and an addition are two) were done.
FLEDGE_API double fledge_burn(int64_t turns, int32_t kind) {
    Turn turn;
    const int count = 8 * threads();
    parallel(count, [&](int64_t, int) { kernels().burn(turns, kind); });
    return static_cast<double>(turns) * count * CHAINS * kernels().vector_floats * (kind == FLOATS ? 2 : 4);
}
