// Operations on the scores of one row, from which native/sample.cpp samples a token. Scores come in whole blocks of
// SCORE_BLOCK, padded with minus infinity, which no operation counts. Sums are in double precision.
#pragma once
#include "tables.h"
#include "vector.h"

namespace {

using namespace fledge;

constexpr int D = W / 2;             // doubles in a vector
constexpr int PARALLEL_VECTORS = 4;  // vectors with independent sums, so that no addition waits for the one before
typedef double vd __attribute__((vector_size(D * 8), aligned(8), may_alias));
typedef int64_t vl __attribute__((vector_size(D * 8), aligned(8), may_alias));
typedef uint64_t vu64 __attribute__((vector_size(D * 8), aligned(8), may_alias));
typedef float half_vf __attribute__((vector_size(D * 4), aligned(4), may_alias));
typedef int32_t half_vi __attribute__((vector_size(D * 4), aligned(4), may_alias));

INLINE vd load_doubles(const double* p) { return *(const vd*)p; }
INLINE vd load_as_doubles(const float* p) { return __builtin_convertvector(*(const half_vf*)p, vd); }
INLINE void store(double* p, vd x) { *(vd*)p = x; }
INLINE vd splat(double x) { return vd{} + x; }
INLINE vd zero_unless(vl mask, vd x) { return (vd)((vl)x & mask); }

INLINE vd fma(vd a, vd b, vd c) {
#if defined(__AVX512F__)
    return (vd)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c);
#elif defined(__AVX2__)
    return (vd)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c);
#else
    return a * b + c;
#endif
}

INLINE double sum(vd x) {
    double total = 0;
    for (int i = 0; i < D; i++) total += x[i];
    return total;
}

// e^x for x <= 0, with an error of at most 1 ulp. 0 if x is below -EXP_RANGE.
INLINE vd exp_of_negative(vd x) {
    const vd shifted = fma(x, splat(1.4426950408889634), splat(0x1.8p52));  // the nearest integer is in the low bits
    const vd n = shifted - 0x1.8p52;
    // x - n ln 2, in two steps. The last bits of the first part of ln 2 are zero, so its product is exact.
    const vd r = fma(n, splat(-1.9082149292705877e-10), fma(n, splat(-6.93147180369123816490e-01), x));
    // Fitted to (e^r - 1 - r) / r^2 for |r| up to ln 2 / 2, with an error of 1/7 ulp of e^r.
    vd p = splat(2.510038549551032e-08);
    p = fma(p, r, splat(2.7620088445409746e-07));
    p = fma(p, r, splat(2.7557268459997064e-06));
    p = fma(p, r, splat(2.4801521295954376e-05));
    p = fma(p, r, splat(0.00019841269863053618));
    p = fma(p, r, splat(0.0013888888917213717));
    p = fma(p, r, splat(0.008333333333330062));
    p = fma(p, r, splat(0.04166666666662413));
    p = fma(p, r, splat(0.16666666666666669));
    p = fma(p, r, splat(0.5000000000000001));
    p = fma(p * r, r, r) + 1.0;
    const vu64 scaled = (vu64)p + ((vu64)shifted << 52);  // multiplied by 2^n; all results are normal numbers
    return zero_unless((vl)(x >= splat(-EXP_RANGE)), (vd)scaled);
}

// Copies the bits, because the addition in `splat` would flush a subnormal number to zero.
INLINE vf splat_bits(float x) {
    int32_t bits;
    __builtin_memcpy(&bits, &x, sizeof bits);
    return (vf)splat(bits);
}

// Whether a block has a score in [lowest, highest].
INLINE bool any_between(const float* x, float lowest, float highest) {
    vi mask = {};
    for (int i = 0; i < SCORE_BLOCK; i += W) {
        const vf scores = load(x + i);
        mask |= (vi)(scores >= splat_bits(lowest)) & (vi)(scores <= splat_bits(highest));
    }
    return any(mask);
}

Extremes find_extremes(const float* x, int64_t n) {
    vf high[PARALLEL_VECTORS];
    vf low[PARALLEL_VECTORS];
    vi nan[PARALLEL_VECTORS] = {};
    for (int j = 0; j < PARALLEL_VECTORS; j++) {
        high[j] = splat(-__builtin_inff());
        low[j] = splat(__builtin_inff());
    }
    for (int64_t i = 0; i < n; i += PARALLEL_VECTORS * W)
        for (int j = 0; j < PARALLEL_VECTORS; j++) {
            const vf scores = load(x + i + j * W);
            nan[j] |= (vi)(scores != scores);
            high[j] = select((vi)(scores > high[j]), scores, high[j]);
            low[j] = select((vi)(scores < low[j]) & (vi)(scores > splat(-__builtin_inff())), scores, low[j]);
        }
    Extremes extremes{high[0][0], low[0][0], false};
    for (int j = 0; j < PARALLEL_VECTORS; j++) {
        extremes.has_nan |= any(nan[j]);
        for (int i = 0; i < W; i++) {
            if (high[j][i] > extremes.highest) extremes.highest = high[j][i];
            if (low[j][i] < extremes.lowest) extremes.lowest = low[j][i];
        }
    }
    return extremes;
}

double compute_weights(const float* x, int64_t n, float highest, double* weights) {
    vd total[PARALLEL_VECTORS] = {};
    for (int64_t i = 0; i < n; i += PARALLEL_VECTORS * D)
        for (int j = 0; j < PARALLEL_VECTORS; j++) {
            const vd weight = exp_of_negative(load_as_doubles(x + i + j * D) - (double)highest);
            store(weights + i + j * D, weight);
            total[j] += weight;
        }
    return sum((total[0] + total[1]) + (total[2] + total[3]));
}

double sum_weights_from(const float* x, const double* weights, int64_t n, float lowest) {
    vd total[PARALLEL_VECTORS] = {};
    for (int64_t i = 0; i < n; i += PARALLEL_VECTORS * D)
        for (int j = 0; j < PARALLEL_VECTORS; j++) {
            const vl mask = (vl)(load_as_doubles(x + i + j * D) >= splat((double)lowest));
            total[j] += zero_unless(mask, weights ? load_doubles(weights + i + j * D) : splat(1.0));
        }
    return sum((total[0] + total[1]) + (total[2] + total[3]));
}

// The buckets of D scores. Scores outside the range get numbers after the last bucket, a different one per lane,
// because additions to the same sum would wait for each other.
INLINE half_vi find_buckets(vd x, const ScoreRange& range) {
    const vd bucket = (splat((double)range.highest) - x) * range.scale;
    const vl is_inside = (vl)(x >= splat((double)range.lowest)) & (vl)(x <= splat((double)range.highest));
    vd outside = splat((double)BUCKETS);
    for (int i = 0; i < D; i++) outside[i] += i;
    return __builtin_convertvector((vd)(((vl)bucket & is_inside) | ((vl)outside & ~is_inside)), half_vi);
}

void sum_buckets(const float* x, const double* weights, int64_t n, const ScoreRange& range, double* sums) {
    for (int64_t block = 0; block < n; block += SCORE_BLOCK) {
        if (!any_between(x + block, range.lowest, range.highest)) continue;
        int32_t buckets[SCORE_BLOCK];
        for (int i = 0; i < SCORE_BLOCK; i += D)
            *(half_vi*)(buckets + i) = find_buckets(load_as_doubles(x + block + i), range);
        if (weights)
            for (int i = 0; i < SCORE_BLOCK; i++) sums[buckets[i]] += weights[block + i];
        else
            for (int i = 0; i < SCORE_BLOCK; i++) sums[buckets[i]] += 1.0;
    }
}

int64_t gather_bucket(const float* x, const double* weights, int64_t n, const ScoreRange& range, int32_t bucket,
                      float* bucket_scores, double* bucket_weights) {
    int64_t count = 0;
    for (int64_t block = 0; block < n; block += SCORE_BLOCK) {
        if (!any_between(x + block, range.lowest, range.highest)) continue;
        int32_t buckets[SCORE_BLOCK];
        for (int i = 0; i < SCORE_BLOCK; i += D)
            *(half_vi*)(buckets + i) = find_buckets(load_as_doubles(x + block + i), range);
        vi mask = {};
        for (int i = 0; i < SCORE_BLOCK; i += W) mask |= (vi)(load_ints(buckets + i) == splat(bucket));
        if (!any(mask)) continue;
        for (int i = 0; i < SCORE_BLOCK; i++)
            if (buckets[i] == bucket) {
                bucket_scores[count] = x[block + i];
                bucket_weights[count++] = weights ? weights[block + i] : 1.0;
            }
    }
    return count;
}

void apply_temperature(const float* x, int64_t n, const TemperatureParams& params, double* weights,
                       double* block_sums) {
    for (int64_t block = 0; block < n; block += SCORE_BLOCK) {
        double& block_sum = block_sums[block / SCORE_BLOCK];
        block_sum = 0;
        if (!any_between(x + block, params.lowest, params.highest)) continue;
        vd total = {};
        for (int64_t i = block; i < block + SCORE_BLOCK; i += D) {
            const vd score = load_as_doubles(x + i);
            // At temperature 1 the weights do not change, and reading them is faster than computing them.
            const vd scaled = params.temperature == 1.0
                                  ? load_doubles(weights + i)
                                  : exp_of_negative((splat((double)params.highest) - score) / -params.temperature);
            const vd weight = zero_unless((vl)(score >= splat((double)params.lowest)), scaled);
            store(weights + i, weight);
            total += weight;
        }
        block_sum = sum(total);
    }
}

}  // namespace
