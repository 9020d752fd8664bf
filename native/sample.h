// Samples one token from the logits of one row. The reference implementation is fledge/engine/sampling.py.
#pragma once
#include <cstdint>

#include "buffer.h"
#include "isa/tables.h"

namespace fledge {

enum SampleError : int64_t { HAS_NAN = -1, HAS_INFINITY = -2, NO_TOKENS = -3, BANNED_ID_OUT_OF_RANGE = -4 };

// All fields have 8 bytes. fledge/engine/native_sampling.py declares the same structure.
struct SampleInput {
    const float* logits;          // (vocab_size), not modified
    const uint8_t* allowed_mask;  // (vocab_size) one byte per token; null: all tokens are allowed
    const int64_t* banned_ids;
    int64_t banned_count;
    const int64_t* previous_ids;  // the tokens of the context
    int64_t previous_count;
    const double* previous_frequencies;  // how often each of them occurred
    double presence_penalty;
    double frequency_penalty;
    double temperature;
    double top_p;
    int64_t top_k;
    double random;  // in [0, 1), selects the token
};

// The memory of one thread. `padded` is the vocabulary size, rounded up to whole blocks of SCORE_BLOCK.
class Scratch {
   public:
    void reset(int64_t vocab_size);

    float* scores;              // (padded)
    double* weights;            // (padded)
    double* block_sums;         // (padded / SCORE_BLOCK)
    float* candidate_scores;    // (padded) the scores that a cutoff search still considers
    double* candidate_weights;  // (padded)
    int32_t* token_ids;         // (padded) the token of each score, if not all tokens are allowed
    double* bucket_sums;        // (BUCKETS + LANES)

   private:
    Buffer memory_;
};

// Returns a token id or a SampleError. The result does not depend on the batch or on the number of threads.
int64_t sample_token(const SampleInput& input, int64_t vocab_size, Scratch& scratch);

}  // namespace fledge
