#include "pack.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <type_traits>

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

// What the 16 bits of a packed number are.
struct Bf16 {
    uint16_t bits;
};
struct F16 {
    uint16_t bits;
};

template <class T, int32_t STORED>
T converted(uint32_t stored) {
    constexpr bool same =
        (STORED == STORED_F16 && std::is_same_v<T, F16>) || (STORED == STORED_BF16 && std::is_same_v<T, Bf16>);
    if constexpr (same) return {static_cast<uint16_t>(stored)};
    const float x = STORED == STORED_F32    ? from_bits(stored)
                    : STORED == STORED_BF16 ? from_bits(stored << 16)
                                            : half_to_float(static_cast<uint16_t>(stored));
    if constexpr (std::is_same_v<T, Bf16>) return {float_to_bf16(x)};
    if constexpr (std::is_same_v<T, float>) return x;
    return {};  // float16 takes float16 only
}

// One group of inputs of the 64 rows of a panel. Zeros outside the weight.
template <class T>
using Rows = T[PANEL][GROUP];

template <class T, int32_t STORED>
void gather(const Source& from, const Matrix& w, int64_t panel, int64_t group, Rows<T>& rows) {
    using Stored = std::conditional_t<STORED == STORED_F32, uint32_t, uint16_t>;
    const int64_t first = panel * PANEL, start = group * GROUP;
    const int64_t height = std::min<int64_t>(PANEL, w.n - first), width = std::min<int64_t>(GROUP, w.k - start);
    if (height < PANEL || width < GROUP) std::memset(rows, 0, sizeof rows);
    for (int64_t i = 0; i < height; i++) {
        const Stored* row = static_cast<const Stored*>(from.data) + (first + i) * from.row + start * from.column;
        if (from.column == 1)
            for (int64_t j = 0; j < width; j++) rows[i][j] = converted<T, STORED>(row[j]);
        else
            for (int64_t j = 0; j < width; j++) rows[i][j] = converted<T, STORED>(row[j * from.column]);
    }
}

template <class T>
void gather(const Source& from, const Matrix& w, int64_t panel, int64_t group, Rows<T>& rows) {
    switch (from.stored) {
        case STORED_F32: return gather<T, STORED_F32>(from, w, panel, group, rows);
        case STORED_BF16: return gather<T, STORED_BF16>(from, w, panel, group, rows);
        default: return gather<T, STORED_F16>(from, w, panel, group, rows);
    }
}

// Columns of `rows` become rows of the block.
template <class T>
void transpose(const T* rows, int64_t columns, T* block) {
    for (int64_t j = 0; j < columns; j++)
        for (int64_t i = 0; i < PANEL; i++) block[j * PANEL + i] = rows[i * columns + j];
}

void pack_panel(const Source& from, const Matrix& w, int64_t panel, uint8_t* data) {
    for (int64_t group = 0; group < w.padded() / GROUP; group++) {
        uint8_t* block = data + panel * w.panel_bytes() + group * block_bytes(w.format);
        if (w.format == F32) {
            alignas(64) Rows<float> rows;
            gather(from, w, panel, group, rows);
            transpose(rows[0], GROUP, reinterpret_cast<float*>(block));
            continue;
        }
        if (w.format == F16_EXACT) {
            alignas(64) Rows<F16> rows;
            gather(from, w, panel, group, rows);
            transpose(rows[0], GROUP, reinterpret_cast<F16*>(block));
        } else {
            alignas(64) Rows<Bf16> rows;
            gather(from, w, panel, group, rows);
            alignas(64) uint32_t pairs[PANEL * PAIRS];
            std::memcpy(pairs, rows, sizeof rows);  // the first of a pair in the low half
            transpose(pairs, PAIRS, reinterpret_cast<uint32_t*>(block));
        }
    }
}

// The error of one panel, or -1.
double quantise_panel(const Source& from, const Matrix& to, int64_t panel, const float* importance, uint8_t* data) {
    double total = 0;
    for (int64_t group = 0; group < to.padded() / GROUP; group++) {
        alignas(64) Rows<float> rows;
        gather(from, to, panel, group, rows);
        uint8_t* block = data + panel * to.panel_bytes() + group * block_bytes(to.format);
        const double error =
            kernels().quantise(to.format, rows[0], importance ? importance + group * GROUP : nullptr, block);
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
    parallel(to.panels(), [&](int64_t panel, int) { pack_panel(from, to, panel, data); });
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
// groups. Returns the weighted sum of squared errors, -1 where a weight cannot be held, or -2 where memory did not
// suffice.
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
