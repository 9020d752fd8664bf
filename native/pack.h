// Weights in the layout of the kernels: panels of 64 rows, inputs in pairs, every K filled up to whole groups of 32.
#pragma once
#include "isa/tables.h"

namespace fledge {

enum Stored : int32_t { STORED_F32 = 0, STORED_BF16 = 1, STORED_F16 = 2 };

// A weight as it lies in a file or a tensor: entry (i, j) at i * row + j * column.
struct Source {
    const void* data;
    int32_t stored;
    int64_t row, column;
};

float half_to_float(uint16_t half);

// The bytes of an (n, k) weight, or 0 where the sizes or the format are impossible.
int64_t packed_bytes(int32_t format, int64_t n, int64_t k);
void pack(const Source& from, const Matrix& to, uint8_t* data);

}  // namespace fledge
