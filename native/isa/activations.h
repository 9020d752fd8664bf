// Packs activations for the products: float32 as they are, or pairs of bf16 or int16.
#pragma once
#include "tables.h"
#include "vector.h"

namespace {

using namespace fledge;

typedef uint16_t vh __attribute__((vector_size(W * 2), aligned(2), may_alias));

// Rounds one group of inputs to int16 pairs. total: the sum of the numbers that the integers represent.
INLINE void round_group(const float* group, vh* halves, float& scale, float& total) {
    // The bits of the largest absolute values. They compare like the numbers, with infinity and NaN above all others.
    vi max_bits = {};
    for (int i = 0; i < GROUP; i += W) {
        const vi bits = load_ints(group + i) & 0x7fffffff;
        max_bits = (vi)select((vi)(bits > max_bits), (vf)bits, (vf)max_bits);
    }
    const int32_t bits = max_lane(max_bits);
    float largest;
    __builtin_memcpy(&largest, &bits, 4);
    const bool is_finite = bits < 0x7f800000;
    const float inverse = is_finite && largest > 1e-30f ? 32767.0f / largest : 0.0f;
    vi integer_sum = {};
    for (int i = 0; i < GROUP; i += W) {
        // Adding 1.5 * 2^23 rounds to the nearest integer, ties to even, and leaves it in the low bits.
        const vi rounded = (vi)(load(group + i) * inverse + 12582912.0f);
        halves[i / W] = __builtin_convertvector((vu)rounded, vh);
        integer_sum += (rounded << 16) >> 16;
    }
    scale = is_finite ? largest / 32767.0f : __builtin_nanf("");
    total = scale * (float)sum(integer_sum);
}

// Lists the pairs of group g that are not zero. All pairs of a group that is not finite are listed, because its numbers
// are in its scale.
INLINE void list_nonzero_pairs(const int32_t* pairs, int64_t g, const Activations& a) {
    const bool is_nan = a.kind == I16_PAIRS && !(a.scale[g] == a.scale[g]);
    int32_t count = a.nonzero_starts[g];
    for (int kp = 0; kp < PAIRS; kp++) {
        a.nonzero_pairs[count] = (int32_t)(g * PAIRS + kp);
        count += is_nan || (pairs[kp] & 0x7fff7fff) != 0;
    }
    a.nonzero_starts[g + 1] = count;
}

void pack_row(const float* x, int64_t row, const Activations& a) {
    if (a.kind == FLOATS) {
        float* out = (float*)a.data + row * a.pitch;
        __builtin_memcpy(out, x, (size_t)a.k * 4);
        for (int64_t k = a.k; k < a.padded; k++) out[k] = 0.0f;
        return;
    }
    int32_t* out = (int32_t*)a.data + row * a.pitch;
    const int64_t groups = a.groups();
    for (int64_t g = 0; g < groups; g++) {
        alignas(64) float padded_group[GROUP];
        int32_t* pairs = out + g * PAIRS;
        const float* group = x + g * GROUP;
        if ((g + 1) * GROUP > a.k) {
            for (int i = 0; i < GROUP; i++) padded_group[i] = g * GROUP + i < a.k ? group[i] : 0.0f;
            group = padded_group;
        }
        if (a.kind == BF16_PAIRS) {
            for (int i = 0; i < GROUP; i += W)
                ((vh*)pairs)[i / W] = __builtin_convertvector(round_bf16(load(group + i)), vh);
        } else {
            round_group(group, (vh*)pairs, a.scale[row * groups + g], a.total[row * groups + g]);
        }
        if (a.nonzero_pairs) list_nonzero_pairs(pairs, g, a);
    }
}

}  // namespace
