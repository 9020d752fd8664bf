// Vectors of W floats or 32-bit integers, and the operations that the compiler's vector extensions lack.
//
// isa/kernels.cpp compiles this file once per instruction set, with the compiler flags of that set. Everything is
// static, so code compiled for a newer processor cannot be linked into code for an older one. For the same reason, this
// file includes no header of the C++ standard library.
#pragma once
#include <stddef.h>
#include <stdint.h>
#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

// gcc 12 warns about uninitialized variables in its own AVX-512 headers.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif

#define INLINE static inline __attribute__((always_inline))

#if defined(__AVX512F__)
#define FLEDGE_W 16
#elif defined(__AVX2__)
#define FLEDGE_W 8
#else
#define FLEDGE_W 4
#endif

namespace {

constexpr int W = FLEDGE_W;
typedef float vf __attribute__((vector_size(W * 4), aligned(4), may_alias));
typedef int32_t vi __attribute__((vector_size(W * 4), aligned(4), may_alias));
typedef uint32_t vu __attribute__((vector_size(W * 4), aligned(4), may_alias));

INLINE vf load(const float* p) { return *(const vf*)p; }
INLINE void store(float* p, vf x) { *(vf*)p = x; }

// Stores without filling the caches, for data that is not read soon. p must be aligned to the vector size.
INLINE void store_streaming(float* p, vf x) {
#if defined(__AVX512F__)
    _mm512_stream_ps(p, (__m512)x);
#elif defined(__AVX2__)
    _mm256_stream_ps(p, (__m256)x);
#else
    store(p, x);
#endif
}

INLINE vi load_ints(const void* p) { return *(const vi*)p; }
INLINE vf splat(float x) { return vf{} + x; }
INLINE vi splat(int32_t x) { return vi{} + x; }
INLINE vf to_float(vi x) { return __builtin_convertvector(x, vf); }
INLINE vi to_int(vf x) { return __builtin_convertvector(x, vi); }  // truncates

INLINE vf fma(vf a, vf b, vf c) {
#if defined(__AVX512F__)
    return (vf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX2__)
    return (vf)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__ARM_NEON)
    return (vf)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
    return a * b + c;
#endif
}

INLINE float sum(vf x) {
#if defined(__AVX512F__)
    return _mm512_reduce_add_ps((__m512)x);
#else
    float total = 0;
    for (int i = 0; i < W; i++) total += x[i];
    return total;
#endif
}

INLINE int32_t sum(vi x) {
#if defined(__AVX512F__)
    return _mm512_reduce_add_epi32((__m512i)x);
#else
    int32_t total = 0;
    for (int i = 0; i < W; i++) total += x[i];
    return total;
#endif
}

INLINE int32_t max_lane(vi x) {
#if defined(__AVX512F__)
    return _mm512_reduce_max_epi32((__m512i)x);
#else
    int32_t largest = x[0];
    for (int i = 1; i < W; i++) largest = x[i] > largest ? x[i] : largest;
    return largest;
#endif
}

// Whether a comparison is true in any lane.
INLINE bool any(vi mask) {
#if defined(__AVX512F__)
    return _mm512_test_epi32_mask((__m512i)mask, (__m512i)mask);
#elif defined(__AVX2__)
    return !_mm256_testz_si256((__m256i)mask, (__m256i)mask);
#elif defined(__SSE2__)
    return _mm_movemask_epi8((__m128i)mask);
#else
    int32_t bits = 0;
    for (int i = 0; i < W; i++) bits |= mask[i];
    return bits;
#endif
}

// The two bf16 numbers of each lane, as floats.
INLINE vf low_half(vi x) { return (vf)(x << 16); }
INLINE vf high_half(vi x) { return (vf)(x & splat((int32_t)0xffff0000)); }

// acc + a.low * b.low + a.high * b.high, for pairs of bf16.
INLINE vf dot_bf16(vf acc, vi a, vi b) {
#if defined(__AVX512BF16__)
    return (vf)_mm512_dpbf16_ps((__m512)acc, (__m512bh)a, (__m512bh)b);
#else
    return fma(high_half(a), high_half(b), fma(low_half(a), low_half(b), acc));
#endif
}

// acc + a.low * b.low + a.high * b.high, for pairs of int16. Exact.
INLINE vi dot_i16(vi acc, vi a, vi b) {
#if defined(__AVX512VNNI__)
    return (vi)_mm512_dpwssd_epi32((__m512i)acc, (__m512i)a, (__m512i)b);
#elif defined(__AVX512BW__)
    return acc + (vi)_mm512_madd_epi16((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
    return acc + (vi)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#elif defined(__SSE2__)
    return acc + (vi)_mm_madd_epi16((__m128i)a, (__m128i)b);
#else
    return acc + ((a << 16) >> 16) * ((b << 16) >> 16) + (a >> 16) * (b >> 16);
#endif
}

// Converts 2 W bytes to W pairs of int16.
INLINE vi widen_bytes(const void* p) {
#if defined(__AVX512BW__)
    return (vi)_mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i*)p));
#elif defined(__AVX2__)
    return (vi)_mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)p));
#else
    vi out;
    const int8_t* bytes = (const int8_t*)p;
    for (int i = 0; i < W; i++)
        out[i] = (int32_t)((uint32_t)(uint16_t)(int16_t)bytes[2 * i] | (uint32_t)(int32_t)bytes[2 * i + 1] << 16);
    return out;
#endif
}

// Loads W float16 numbers, including subnormal ones, as floats.
INLINE vf load_halves(const void* p) {
#if defined(__AVX512F__)
    return (vf)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
#elif defined(__AVX2__)
    return (vf)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
#else
    vi bits;
    const uint8_t* bytes = (const uint8_t*)p;
    for (int i = 0; i < W; i++) bits[i] = bytes[2 * i] | bytes[2 * i + 1] << 8;
    const vi sign = (bits & 0x8000) << 16;
    const vi magnitude = bits & 0x7fff;
    // A normal number needs another exponent bias. A subnormal number is an integer times 2^-24.
    const vi normal = (magnitude << 13) + splat((127 - 15) << 23);
    const vf subnormal = to_float(magnitude) * 0x1p-24f;
    const vi is_small = (vi)(magnitude < 0x0400);
    const vi is_special = (vi)(magnitude >= 0x7c00);  // infinity and NaN
    const vi finite = (normal & ~is_small) | ((vi)subnormal & is_small);
    return (vf)((finite & ~is_special) | ((((magnitude & 0x3ff) << 13) | 0x7f800000) & is_special) | sign);
#endif
}

// Rounds to bf16, ties to even. The result is in the low 16 bits of each lane. NaN stays NaN.
INLINE vu round_bf16(vf x) {
    const vu bits = (vu)x;
    const vu rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    const vu is_nan = (vu)(x != x);
    return (rounded & ~is_nan) | (((bits >> 16) | 0x40) & is_nan);
}

INLINE vf select(vi mask, vf a, vf b) { return (vf)(((vi)a & mask) | ((vi)b & ~mask)); }

// e^x with an error of about 2 ulp. 0 below -87.3 (no subnormal results), infinity above 88.7, NaN for NaN.
INLINE vf exp(vf x) {
    const vi is_under = (vi)(x < splat(-87.33f));
    const vi is_over = (vi)(x > splat(88.72f));
    const vi is_nan = (vi)(x != x);
    const vf safe = select(is_under | is_over | is_nan, splat(0.0f), x);
    const vf shifted = safe * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: the nearest integer is in the low bits
    const vf n = shifted - 12582912.0f;
    const vf r = fma(n, splat(1.42860677e-6f), fma(n, splat(-0.693148613f), safe));  // x - n ln 2, in two steps
    vf p = splat(1.37805939e-3f);
    p = fma(p, r, splat(8.37312452e-3f));
    p = fma(p, r, splat(4.16695364e-2f));
    p = fma(p, r, splat(1.66664720e-1f));
    p = fma(p, r, splat(4.99999851e-1f));
    p = fma(p, r, splat(1.0f));
    p = fma(p, r, splat(1.0f));
    const vi exponent = to_int(n);
    // 2^n as two factors, because 2^128 is not a float.
    const vi half = exponent >> 1;
    const vf factor = (vf)((half + 127) << 23);
    const vf other_factor = (vf)((exponent - half + 127) << 23);
    const vf value = p * factor * other_factor;
    const vf bounded = select(is_over, splat(__builtin_inff()), select(is_under, splat(0.0f), value));
    return select(is_nan, x, bounded);
}

INLINE vf sigmoid(vf x) { return 1.0f / (1.0f + exp(-x)); }
INLINE vf silu(vf x) { return x * sigmoid(x); }

// A polynomial near zero (coefficients of Cephes), where 1 - 2 / (e^2x + 1) would lose precision.
INLINE vf tanh(vf x) {
    const vf z = x * x;
    vf p = splat(-5.70498872745e-3f);
    p = fma(p, z, splat(2.06390887954e-2f));
    p = fma(p, z, splat(-5.37397155531e-2f));
    p = fma(p, z, splat(1.33314422036e-1f));
    p = fma(p, z, splat(-3.33332819422e-1f));
    const vf small = fma(p * z, x, x);
    const vf large = 1.0f - 2.0f / (exp(x + x) + 1.0f);
    return select((vi)(z < 0.390625f), small, large);
}

}  // namespace
