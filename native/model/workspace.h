// The intermediate results of a forward pass.
#pragma once
#include <cstring>
#include <memory>
#include <vector>

#include "matmul.h"
#include "model/model.h"

namespace fledge {

inline int64_t pad_width(int64_t n) { return round_up(n, PANEL); }

inline void copy_floats(float* to, const float* from, int64_t n) {
    std::memcpy(to, from, static_cast<size_t>(n) * sizeof(float));
}

// The tokens of one sequence in a chunk.
struct Model::Segment {
    int64_t sequence;
    int64_t first_row;
    int64_t length;
    bool is_first;  // of its sequence: the state is still in Batch::state_in
};

// The rows of a batch that are computed together.
struct Model::Chunk {
    const Batch& batch;
    int64_t first_row;
    int64_t rows;
    std::vector<Segment> segments;
};

struct Model::Workspace {
    Buffer x;                            // (rows, C): the residual stream
    Buffer norm;                         // (rows, C)
    Buffer shift;                        // (segments, C): the normalized last token before each segment
    std::vector<const float*> previous;  // per row: the normalized input of the previous token
    Buffer mix_low;                      // (rows, 5 * mix_rank), padded
    Buffer dynamic_mix;                  // (5, rows, C)
    Buffer projected[PROJECTION_COUNT];  // (rows, A); DECAY: the decay factors
    Buffer decay_low;                    // (rows, decay_rank), padded
    Buffer y;                            // (rows, A)
    Buffer ffn_hidden;                   // (rows, F)
    Buffer ffn_receptance;               // (rows, C)
    Buffer last;                         // (sequences, C): the last row of each sequence

    ActivationBuffer mix_down_input;
    ActivationBuffer mix_up_input[PROJECTION_COUNT];
    ActivationBuffer projection_input[PROJECTION_COUNT];
    ActivationBuffer decay_up_input;
    ActivationBuffer output_input;
    ActivationBuffer ffn_key_input, ffn_receptance_input, ffn_value_input;
    ActivationBuffer head_input;

    std::vector<std::unique_ptr<Buffer>> thread_buffers;
    float* thread_scratch(int thread) const { return thread_buffers[static_cast<size_t>(thread)]->floats(); }
    const float* previous_row(int64_t row) const { return previous[static_cast<size_t>(row)]; }
};

}  // namespace fledge
