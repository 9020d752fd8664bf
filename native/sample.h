// One token drawn from the scores of one row, by the rules of fledge/engine/sampling.py, its twin in Python.
#pragma once
#include <cstdint>

#include "matmul.h"

namespace fledge {

enum Refusal : int64_t { NOT_NUMBERS = -1, INFINITE = -2, NOTHING = -3, BEYOND = -4 };

// All fields have 8 bytes; fledge/engine/native_sampling.py declares the same.
struct Draw {
    const float* logits;     // (vocabulary); not changed
    const uint8_t* allowed;  // (vocabulary) one byte for each token, or null: all
    const int64_t* banned;
    int64_t banned_count;
    const int64_t* known;  // tokens that came before, and how often each did
    int64_t known_count;
    const double* times;
    double presence, frequency;
    double temperature, top_p;
    int64_t top_k;
    double number;  // from 0 to below 1, by which the token is chosen
};

// The memory of one thread.
class Desk {
   public:
    void reset(int64_t vocabulary);

    float* scores;    // (room): the vocabulary, filled up to whole blocks
    double* weights;  // (room)
    double* sums;     // (room / SCORES) of the blocks
    float* few;       // (room), with the next: the scores among which a cutoff is looked for
    double* shares;   // (room)
    int32_t* ids;     // (room): whose the scores are, where not all tokens are allowed
    double* groups;   // (GROUPS + LANES)

   private:
    Buffer memory_;
};

// The id, or a Refusal. The same for a row in any batch and for any number of threads.
int64_t draw(const Draw& wanted, int64_t vocabulary, Desk& desk);

}  // namespace fledge
