// Packs weights into the layout of the kernels: panels of 64 rows, inputs in pairs, K padded to whole groups of 32.
#pragma once
#include "isa/tables.h"

namespace fledge {

enum SourceType : int32_t { SOURCE_F32 = 0, SOURCE_BF16 = 1, SOURCE_F16 = 2 };

// A weight in a file or a tensor: element (i, j) is at i * row_stride + j * column_stride.
struct Source {
    const void* data;
    int32_t type;
    int64_t row_stride;
    int64_t column_stride;
};

float half_to_float(uint16_t half);

// The size in bytes of a packed (n, k) weight, or 0 if the sizes or the format are invalid.
int64_t packed_bytes(int32_t format, int64_t n, int64_t k);

// Not for the quantized formats. F16_EXACT requires a float16 source.
void pack(const Source& source, const Matrix& weight, uint8_t* data);

// Packs into INT8 or INT4. importance: null, or one number per input, padded to whole groups. Returns the sum of the
// squared errors weighted by the importance, or -1 if a weight cannot be represented.
double quantize(const Source& source, const Matrix& weight, const float* importance, uint8_t* data);

}  // namespace fledge
