#include "pack.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <type_traits>
#include <vector>

#include "cpu.h"
#include "threads.h"

namespace fledge {
namespace {

float bits_to_float(uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
}

uint32_t float_to_bits(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    return bits;
}

}  // namespace

float half_to_float(uint16_t half) {
    const uint32_t sign = static_cast<uint32_t>(half & 0x8000) << 16;
    const uint32_t magnitude = half & 0x7fff;
    if (magnitude >= 0x7c00) return bits_to_float(sign | 0x7f800000 | (magnitude & 0x3ff) << 13);
    if (magnitude < 0x400) return std::copysign(static_cast<float>(magnitude) * 0x1p-24f, bits_to_float(sign));
    return bits_to_float(sign | ((magnitude << 13) + ((127 - 15) << 23)));
}

namespace {

uint16_t float_to_bf16(float x) {
    const uint32_t bits = float_to_bits(x);
    if (x != x) return static_cast<uint16_t>(bits >> 16 | 0x40);
    return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// Packed 16-bit numbers.
struct Bf16 {
    uint16_t bits;
};
struct F16 {
    uint16_t bits;
};

template <class T, int32_t SOURCE>
T convert(uint32_t source_bits) {
    constexpr bool is_copy =
        (SOURCE == SOURCE_F16 && std::is_same_v<T, F16>) || (SOURCE == SOURCE_BF16 && std::is_same_v<T, Bf16>);
    if constexpr (is_copy) return {static_cast<uint16_t>(source_bits)};
    const float x = SOURCE == SOURCE_F32    ? bits_to_float(source_bits)
                    : SOURCE == SOURCE_BF16 ? bits_to_float(source_bits << 16)
                                            : half_to_float(static_cast<uint16_t>(source_bits));
    if constexpr (std::is_same_v<T, Bf16>) return {float_to_bf16(x)};
    if constexpr (std::is_same_v<T, float>) return x;
    return {};  // F16 requires a float16 source
}

// One group of inputs for the 64 rows of a panel, zero outside the weight.
template <class T>
using GroupRows = T[PANEL][GROUP];

template <class T, int32_t SOURCE>
void read_group(const Source& source, const Matrix& weight, int64_t panel, int64_t group, GroupRows<T>& rows) {
    using Element = std::conditional_t<SOURCE == SOURCE_F32, uint32_t, uint16_t>;
    const int64_t first_row = panel * PANEL;
    const int64_t first_input = group * GROUP;
    const int64_t height = std::min<int64_t>(PANEL, weight.n - first_row);
    const int64_t width = std::min<int64_t>(GROUP, weight.k - first_input);
    if (height < PANEL || width < GROUP) std::memset(rows, 0, sizeof rows);
    for (int64_t i = 0; i < height; i++) {
        const Element* row = static_cast<const Element*>(source.data) + (first_row + i) * source.row_stride +
                             first_input * source.column_stride;
        if (source.column_stride == 1)
            for (int64_t j = 0; j < width; j++) rows[i][j] = convert<T, SOURCE>(row[j]);
        else
            for (int64_t j = 0; j < width; j++) rows[i][j] = convert<T, SOURCE>(row[j * source.column_stride]);
    }
}

template <class T>
void read_group(const Source& source, const Matrix& weight, int64_t panel, int64_t group, GroupRows<T>& rows) {
    switch (source.type) {
        case SOURCE_F32: return read_group<T, SOURCE_F32>(source, weight, panel, group, rows);
        case SOURCE_BF16: return read_group<T, SOURCE_BF16>(source, weight, panel, group, rows);
        default: return read_group<T, SOURCE_F16>(source, weight, panel, group, rows);
    }
}

// Writes the columns of `rows` as the rows of the block.
template <class T>
void transpose(const T* rows, int64_t columns, T* block) {
    for (int64_t j = 0; j < columns; j++)
        for (int64_t i = 0; i < PANEL; i++) block[j * PANEL + i] = rows[i * columns + j];
}

template <class T>
void pack_group(const Source& source, const Matrix& weight, int64_t panel, int64_t group, uint8_t* block) {
    alignas(64) GroupRows<T> rows;
    read_group(source, weight, panel, group, rows);
    if constexpr (std::is_same_v<T, Bf16>) {
        alignas(64) uint32_t pairs[PANEL * PAIRS];
        std::memcpy(pairs, rows, sizeof rows);  // the first number of a pair is in the low half
        transpose(pairs, PAIRS, reinterpret_cast<uint32_t*>(block));
    } else {
        transpose(rows[0], GROUP, reinterpret_cast<T*>(block));
    }
}

void pack_panel(const Source& source, const Matrix& weight, int64_t panel, uint8_t* data) {
    for (int64_t group = 0; group < weight.padded() / GROUP; group++) {
        uint8_t* block = data + panel * weight.panel_bytes() + group * block_bytes(weight.format);
        switch (weight.format) {
            case F32: pack_group<float>(source, weight, panel, group, block); break;
            case F16_EXACT: pack_group<F16>(source, weight, panel, group, block); break;
            default: pack_group<Bf16>(source, weight, panel, group, block);
        }
    }
}

// The error of one panel, or -1.
double quantize_panel(const Source& source, const Matrix& weight, int64_t panel, const float* importance,
                      uint8_t* data) {
    double total = 0;
    for (int64_t group = 0; group < weight.padded() / GROUP; group++) {
        alignas(64) GroupRows<float> rows;
        read_group(source, weight, panel, group, rows);
        uint8_t* block = data + panel * weight.panel_bytes() + group * block_bytes(weight.format);
        const float* group_importance = importance ? importance + group * GROUP : nullptr;
        const double error = kernels().quantize_block(weight.format, rows[0], group_importance, block);
        if (error < 0) return -1;
        total += error;
    }
    return total;
}

}  // namespace

int64_t packed_bytes(int32_t format, int64_t n, int64_t k) {
    constexpr int64_t MAX_BYTES = int64_t{1} << 40;
    if (format < F32 || format > F16_EXACT || n < 1 || k < 1 || n > MAX_BYTES / k / 8) return 0;
    const Matrix weight{format, n, k, nullptr};
    return weight.panels() * weight.panel_bytes();
}

void pack(const Source& source, const Matrix& weight, uint8_t* data) {
    parallel_for(weight.panels(), [&](int64_t panel, int) { pack_panel(source, weight, panel, data); });
}

double quantize(const Source& source, const Matrix& weight, const float* importance, uint8_t* data) {
    std::vector<double> errors(static_cast<size_t>(weight.panels()));
    parallel_for(weight.panels(), [&](int64_t panel, int) {
        errors[static_cast<size_t>(panel)] = quantize_panel(source, weight, panel, importance, data);
    });
    double total = 0;
    for (const double error : errors) {
        if (error < 0) return -1;
        total += error;
    }
    return total;
}

}  // namespace fledge
