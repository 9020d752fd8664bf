#include "sample.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "cpu.h"
#include "export.h"
#include "threads.h"

namespace fledge {
namespace {

constexpr float MINUS_INFINITY = -std::numeric_limits<float>::infinity();
constexpr int64_t MAX_SORTED = 32;  // up to this number, scores are sorted instead of split into buckets

// Applies bans and penalties and drops tokens that are not allowed. Returns the padded number of scores.
int64_t fill_scores(const SampleInput& input, int64_t vocab_size, Scratch& scratch) {
    float* scores = scratch.scores;
    std::memcpy(scores, input.logits, static_cast<size_t>(vocab_size) * sizeof(float));
    for (int64_t i = 0; i < input.banned_count; i++) scores[input.banned_ids[i]] = MINUS_INFINITY;
    for (int64_t i = 0; i < input.previous_count; i++) {
        const auto penalty =
            static_cast<float>(input.presence_penalty + input.frequency_penalty * input.previous_frequencies[i]);
        if (penalty != 0) scores[input.previous_ids[i]] -= penalty;  // subtracting 0 would flush a subnormal score to 0
    }
    int64_t count = vocab_size;
    if (input.allowed_mask) {
        count = 0;
        for (int64_t i = 0; i < vocab_size; i++)
            if (input.allowed_mask[i]) {
                scores[count] = scores[i];
                scratch.token_ids[count++] = static_cast<int32_t>(i);
            }
    }
    const int64_t padded = round_up(count, SCORE_BLOCK);
    std::fill(scores + count, scores + padded, MINUS_INFINITY);
    return padded;
}

// Sorts a few scores in descending order. Returns the score at which the running sum of their weights reaches `goal`.
float find_cutoff_sorted(float* scores, double* weights, int64_t count, double sum, double goal) {
    for (int64_t i = 1; i < count; i++)
        for (int64_t j = i; j && scores[j - 1] < scores[j]; j--) {
            std::swap(scores[j - 1], scores[j]);
            std::swap(weights[j - 1], weights[j]);
        }
    int64_t index = 0;
    for (; index + 1 < count; index++) {
        sum += weights[index];
        if (sum >= goal) break;
    }
    return scores[index];
}

// Returns the score at which the running sum of the weights (null: ones), in descending order of the scores, reaches
// `goal`, or the lowest score of [lowest, highest] if the sum stays below. Scores are summed in buckets of adjacent
// values; then the bucket in which the sum reaches the goal is searched in the same way.
float find_cutoff(const float* scores, const double* weights, int64_t n, float lowest, float highest, double goal,
                  Scratch& scratch) {
    // Most tokens have low scores. If the goal is reached in the upper half of the range, they can be ignored.
    const auto middle = static_cast<float>(highest - (static_cast<double>(highest) - lowest) / 2);
    if (kernels().sum_weights_from(scores, weights, n, middle) >= goal) lowest = std::max(lowest, middle);
    double sum = 0;
    while (lowest < highest) {
        const ScoreRange range{lowest, highest, (BUCKETS - 1) / (static_cast<double>(highest) - lowest)};
        double* bucket_sums = scratch.bucket_sums;
        std::fill(bucket_sums, bucket_sums + BUCKETS + LANES, 0.0);
        kernels().sum_buckets(scores, weights, n, range, bucket_sums);
        int32_t cutoff_bucket = 0;  // the last bucket that is not empty, if the sum stays below the goal
        double previous_sum = sum;
        for (int32_t bucket = 0; bucket < BUCKETS; bucket++) {
            if (bucket_sums[bucket] == 0) continue;
            cutoff_bucket = bucket;
            previous_sum = sum;
            sum += bucket_sums[bucket];
            if (sum >= goal) break;
        }
        sum = previous_sum;
        const int64_t count = kernels().gather_bucket(scores, weights, n, range, cutoff_bucket,
                                                      scratch.candidate_scores, scratch.candidate_weights);
        if (count <= MAX_SORTED)
            return find_cutoff_sorted(scratch.candidate_scores, scratch.candidate_weights, count, sum, goal);
        n = round_up(count, SCORE_BLOCK);
        std::fill(scratch.candidate_scores + count, scratch.candidate_scores + n, MINUS_INFINITY);
        scores = scratch.candidate_scores;
        weights = scratch.candidate_weights;
        const Extremes extremes = kernels().find_extremes(scores, n);
        lowest = extremes.lowest;
        highest = extremes.highest;
    }
    return highest;
}

// The lowest score that top-p keeps. total: the sum of all weights.
float top_p_cutoff(const SampleInput& input, int64_t n, const Extremes& extremes, double total, Scratch& scratch) {
    const double highest = extremes.highest;
    auto lowest = static_cast<float>(highest - EXP_RANGE);
    if (highest - lowest > EXP_RANGE) lowest = std::nextafter(lowest, extremes.highest);
    lowest = std::max(lowest, extremes.lowest);
    if (input.top_p == 1.0) return lowest;
    // All tokens below this bound together hold less than half of 1 - top_p, so the cutoff is above it.
    const double bound = std::log((1.0 - input.top_p) * total / (2.0 * static_cast<double>(n)));
    lowest = std::max(lowest, static_cast<float>(highest + std::min(bound, 0.0)));
    return find_cutoff(scratch.scores, scratch.weights, n, lowest, extremes.highest, input.top_p * total, scratch);
}

// The lowest of the `count` highest scores. If more scores equal it than fit, the last ones are removed.
float apply_top_k(int64_t count, int64_t n, float lowest, float highest, Scratch& scratch) {
    lowest = find_cutoff(scratch.scores, nullptr, n, lowest, highest, static_cast<double>(count), scratch);
    int64_t excess = -count;
    for (int64_t i = 0; i < n; i++) excess += scratch.scores[i] >= lowest;
    for (int64_t i = n - 1; i >= 0 && excess > 0; i--)
        if (scratch.scores[i] == lowest) {
            scratch.scores[i] = MINUS_INFINITY;
            excess--;
        }
    return lowest;
}

// The index of the weight at which the running sum exceeds `random` times the total.
int64_t select_index(double random, int64_t n, const Scratch& scratch) {
    double total = 0;
    for (int64_t i = 0; i < n / SCORE_BLOCK; i++) total += scratch.block_sums[i];
    const double threshold = random * total;
    double sum = 0;
    int64_t block = 0;
    for (int64_t i = 0; i < n / SCORE_BLOCK; i++) {
        if (scratch.block_sums[i] == 0) continue;
        block = i;
        if (sum + scratch.block_sums[i] > threshold) break;
        sum += scratch.block_sums[i];
    }
    int64_t index = 0;
    for (int64_t i = block * SCORE_BLOCK; i < (block + 1) * SCORE_BLOCK; i++) {
        if (scratch.weights[i] == 0) continue;
        index = i;
        sum += scratch.weights[i];
        if (sum > threshold) break;
    }
    return index;
}

}  // namespace

void Scratch::reset(int64_t vocab_size) {
    const int64_t padded = round_up(vocab_size, SCORE_BLOCK);
    const int64_t blocks = padded / SCORE_BLOCK;
    const int64_t double_count = 2 * padded + blocks + BUCKETS + LANES;
    const int64_t float_count = 3 * padded;
    weights = static_cast<double*>(memory_.reserve_bytes(static_cast<size_t>(double_count) * sizeof(double) +
                                                         static_cast<size_t>(float_count) * sizeof(float)));
    candidate_weights = weights + padded;
    block_sums = candidate_weights + padded;
    bucket_sums = block_sums + blocks;
    scores = reinterpret_cast<float*>(bucket_sums + BUCKETS + LANES);
    candidate_scores = scores + padded;
    token_ids = reinterpret_cast<int32_t*>(candidate_scores + padded);
}

int64_t sample_token(const SampleInput& input, int64_t vocab_size, Scratch& scratch) {
    for (int64_t i = 0; i < input.banned_count; i++)
        if (input.banned_ids[i] >= vocab_size) return BANNED_ID_OUT_OF_RANGE;
    const int64_t n = fill_scores(input, vocab_size, scratch);
    if (n == 0) return NO_TOKENS;
    const Extremes extremes = kernels().find_extremes(scratch.scores, n);
    if (extremes.has_nan) return HAS_NAN;
    if (extremes.highest == MINUS_INFINITY) return NO_TOKENS;
    if (extremes.highest == -MINUS_INFINITY) return HAS_INFINITY;
    int64_t index = 0;
    if (input.temperature == 0.0) {
        while (scratch.scores[index] != extremes.highest) index++;
    } else {
        const double total = kernels().compute_weights(scratch.scores, n, extremes.highest, scratch.weights);
        float lowest = top_p_cutoff(input, n, extremes, total, scratch);
        if (input.top_k) lowest = apply_top_k(input.top_k, n, lowest, extremes.highest, scratch);
        kernels().apply_temperature(scratch.scores, n, {lowest, extremes.highest, input.temperature}, scratch.weights,
                                    scratch.block_sums);
        index = select_index(input.random, n, scratch);
    }
    return input.allowed_mask ? scratch.token_ids[index] : index;
}

}  // namespace fledge

using namespace fledge;

// Writes a token id or a SampleError for each row to `results`. Returns 0, or -1 if memory is exhausted.
FLEDGE_API int fledge_sample(const SampleInput* inputs, int64_t rows, int64_t vocab_size, int64_t* results) {
    // Kept between calls and not destroyed at exit: new memory of this size would take longer than sampling a token.
    static std::vector<Scratch*>& scratches = *new std::vector<Scratch*>;
    return catch_errors([&] {
        const CallLock lock;
        const auto count = static_cast<size_t>(rows == 1 ? 1 : thread_count());
        while (scratches.size() < count) scratches.push_back(new Scratch);
        for (size_t i = 0; i < count; i++) scratches[i]->reset(vocab_size);
        const int64_t bytes = rows * vocab_size * static_cast<int64_t>(sizeof(double));
        parallel_for(rows, bytes, [&](int64_t row, int thread) {
            results[row] = sample_token(inputs[row], vocab_size, *scratches[static_cast<size_t>(thread)]);
        });
    });
}
