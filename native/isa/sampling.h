// Passes over the scores of one row, from which native/sample.cpp draws a token. Scores come in whole blocks of SCORES,
// filled up with minus infinity, which no pass counts; sums are in double.
#pragma once
#include "tables.h"
#include "vector.h"

namespace {

using namespace fledge;

constexpr int D = W / 2;     // doubles in a vector
constexpr int ROW_SUMS = 4;  // vectors of a pass that go side by side, so that no sum waits for itself
typedef double vd __attribute__((vector_size(D * 8), aligned(8), may_alias));
typedef int64_t vl __attribute__((vector_size(D * 8), aligned(8), may_alias));
typedef uint64_t vu64 __attribute__((vector_size(D * 8), aligned(8), may_alias));
typedef float half_vf __attribute__((vector_size(D * 4), aligned(4), may_alias));
typedef int32_t half_vi __attribute__((vector_size(D * 4), aligned(4), may_alias));

INLINE vd load_doubles(const double* p) { return *(const vd*)p; }
INLINE vd widen(const float* p) { return __builtin_convertvector(*(const half_vf*)p, vd); }
INLINE void store(double* p, vd x) { *(vd*)p = x; }
INLINE vd splat(double x) { return vd{} + x; }
INLINE vd only(vl mask, vd x) { return (vd)((vl)x & mask); }

INLINE vd fma(vd a, vd b, vd c) {
#if defined(__AVX512F__)
    return (vd)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c);
#elif defined(__AVX2__)
    return (vd)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c);
#else
    return a * b + c;
#endif
}

// e^x for x of at most 0, to one unit in the last place; 0 where x is below -FARTHEST.
INLINE vd exp_down(vd x) {
    const vd shifted = fma(x, splat(1.4426950408889634), splat(0x1.8p52));  // the nearest integer sits in the low bits
    const vd whole = shifted - 0x1.8p52;
    // x - n ln 2, in two steps: of the first part of ln 2 the last bits are zero, so that its product is exact.
    const vd r = fma(whole, splat(-1.9082149292705877e-10), fma(whole, splat(-6.93147180369123816490e-01), x));
    // Fitted to (e^r - 1 - r) / r^2 for |r| up to ln 2 / 2: a seventh of a unit in the last place of e^r.
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
    const vu64 scaled = (vu64)p + ((vu64)shifted << 52);  // times 2^n: all results are normal numbers
    return only((vl)(x >= splat(-FARTHEST)), (vd)scaled);
}

// By its bits, as an addition would make zero of a number too small for a normal float.
INLINE vf bound(float x) {
    int32_t bits;
    __builtin_memcpy(&bits, &x, sizeof bits);
    return (vf)splat(bits);
}

// Whether any score of a block lies between two, both included.
INLINE bool any_between(const float* x, float least, float most) {
    vi found = {};
    for (int i = 0; i < SCORES; i += W) {
        const vf now = load(x + i);
        found |= (vi)(now >= bound(least)) & (vi)(now <= bound(most));
    }
    return any(found);
}

Extremes extremes(const float* x, int64_t n) {
    vf high[ROW_SUMS], low[ROW_SUMS];
    vi nan[ROW_SUMS] = {};
    for (int j = 0; j < ROW_SUMS; j++) high[j] = splat(-__builtin_inff()), low[j] = splat(__builtin_inff());
    for (int64_t i = 0; i < n; i += ROW_SUMS * W)
        for (int j = 0; j < ROW_SUMS; j++) {
            const vf now = load(x + i + j * W);
            nan[j] |= (vi)(now != now);
            high[j] = select((vi)(now > high[j]), now, high[j]);
            low[j] = select((vi)(now < low[j]) & (vi)(now > splat(-__builtin_inff())), now, low[j]);
        }
    Extremes found{high[0][0], low[0][0], false};
    for (int j = 0; j < ROW_SUMS; j++) {
        found.nan |= any(nan[j]);
        for (int i = 0; i < W; i++) {
            if (high[j][i] > found.highest) found.highest = high[j][i];
            if (low[j][i] < found.lowest) found.lowest = low[j][i];
        }
    }
    return found;
}

INLINE double sum(vd x) {
    double total = 0;
    for (int i = 0; i < D; i++) total += x[i];
    return total;
}

double weigh(const float* x, int64_t n, float highest, double* weights) {
    vd total[ROW_SUMS] = {};
    for (int64_t i = 0; i < n; i += ROW_SUMS * D)
        for (int j = 0; j < ROW_SUMS; j++) {
            const vd weight = exp_down(widen(x + i + j * D) - (double)highest);
            store(weights + i + j * D, weight);
            total[j] += weight;
        }
    return sum((total[0] + total[1]) + (total[2] + total[3]));
}

double above(const float* x, const double* weights, int64_t n, float least) {
    vd total[ROW_SUMS] = {};
    for (int64_t i = 0; i < n; i += ROW_SUMS * D)
        for (int j = 0; j < ROW_SUMS; j++) {
            const vl mask = (vl)(widen(x + i + j * D) >= splat((double)least));
            total[j] += only(mask, weights ? load_doubles(weights + i + j * D) : splat(1.0));
        }
    return sum((total[0] + total[1]) + (total[2] + total[3]));
}

// The groups of D scores. Scores beyond the span get numbers past those of its groups, each lane its own, as additions
// to one sum would wait for each other.
INLINE half_vi groups(vd x, const Span& span) {
    const vd gap = (splat((double)span.most) - x) * span.scale;
    const vl inside = (vl)(x >= splat((double)span.least)) & (vl)(x <= splat((double)span.most));
    vd beyond = splat((double)GROUPS);
    for (int i = 0; i < D; i++) beyond[i] += i;
    return __builtin_convertvector((vd)(((vl)gap & inside) | ((vl)beyond & ~inside)), half_vi);
}

void spread(const float* x, const double* weights, int64_t n, const Span& span, double* sums) {
    for (int64_t block = 0; block < n; block += SCORES) {
        if (!any_between(x + block, span.least, span.most)) continue;
        int32_t group[SCORES];
        for (int i = 0; i < SCORES; i += D) *(half_vi*)(group + i) = groups(widen(x + block + i), span);
        if (weights)
            for (int i = 0; i < SCORES; i++) sums[group[i]] += weights[block + i];
        else
            for (int i = 0; i < SCORES; i++) sums[group[i]] += 1.0;
    }
}

int64_t gather(const float* x, const double* weights, int64_t n, const Span& span, int32_t wanted, float* scores,
               double* kept) {
    int64_t count = 0;
    for (int64_t block = 0; block < n; block += SCORES) {
        if (!any_between(x + block, span.least, span.most)) continue;
        int32_t group[SCORES];
        for (int i = 0; i < SCORES; i += D) *(half_vi*)(group + i) = groups(widen(x + block + i), span);
        vi found = {};
        for (int i = 0; i < SCORES; i += W) found |= (vi)(load_ints(group + i) == splat(wanted));
        if (!any(found)) continue;
        for (int i = 0; i < SCORES; i++)
            if (group[i] == wanted) {
                scores[count] = x[block + i];
                kept[count++] = weights ? weights[block + i] : 1.0;
            }
    }
    return count;
}

void heat(const float* x, int64_t n, const Heat& heat, double* weights, double* sums) {
    for (int64_t block = 0; block < n; block += SCORES) {
        double& total = sums[block / SCORES];
        total = 0;
        if (!any_between(x + block, heat.least, heat.highest)) continue;
        vd all = {};
        for (int64_t i = block; i < block + SCORES; i += D) {
            const vd score = widen(x + i);
            // A division by 1 changes nothing, but what is known already is sooner read than computed.
            const vd warm = heat.temperature == 1.0
                                ? load_doubles(weights + i)
                                : exp_down((splat((double)heat.highest) - score) / -heat.temperature);
            const vd weight = only((vl)(score >= splat((double)heat.least)), warm);
            store(weights + i, weight);
            all += weight;
        }
        total = sum(all);
    }
}

}  // namespace
