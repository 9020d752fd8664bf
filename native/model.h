// A whole RWKV-4, 5 or 6 model: its weights by their official names, and one forward pass for prompts and for writing.
#pragma once
#include <memory>
#include <vector>

#include "matmul.h"

namespace fledge {

struct Sizes {
    int64_t version;  // 4, 5 or 6
    int64_t vocab, layers, width, inner, hidden, heads, mix_rank, decay_rank, has_gate, scaled_keys;
};

// A vector of parameters, filled up with zeros to whole lanes.
class Vector {
   public:
    void set(const float* values, int64_t n);
    const float* get() const { return n_ ? static_cast<const float*>(memory_->bytes(0)) : nullptr; }
    int64_t size() const { return n_; }

   private:
    std::unique_ptr<Buffer> memory_ = std::make_unique<Buffer>();
    int64_t n_ = 0;
};

constexpr int MIXES = 6;  // x, w, k, v, r, g

struct Layer {
    Vector ln1_weight, ln1_bias, ln2_weight, ln2_bias, ln_x_weight, ln_x_bias;
    Vector mix[MIXES];    // weight of the token before, by letter
    Vector decay, bonus;  // Finch: time_decay; Eagle: the decay factor; RWKV-4: the log of the decay
    Vector ffn_mix_k, ffn_mix_r;
    Matrix mix_down{}, mix_up[5]{}, decay_down{}, decay_up{};  // Finch's LoRA factors; up in the order w, k, v, r, g
    Matrix receptance{}, key{}, value{}, gate{}, output{};
    Matrix ffn_key{}, ffn_value{}, ffn_receptance{};
};

struct Embedding {
    const void* data;
    int32_t stored;
    int64_t rows, width;
};

// The state tensors as state.py has them, (layer, batch, ...), float32: att_shift, wkv, ffn_shift, or for RWKV-4
// att_shift, aa, bb, pp, ffn_shift.
struct StateOut {
    float* tensor[5];
};

// The states that come in lie where they are: each sequence names one of several batched states and its row in it.
struct StateIn {
    const float* const* tensors;    // those of the first state, then of the next
    const int64_t *batches, *rows;  // of each state: its sequences; of each sequence: its row
    const int64_t* sources;         // of each sequence: its state
    int64_t parts;
    // Where the numbers of one layer and sequence begin, `size` of them a sequence.
    const float* at(int64_t part, int64_t layer, int64_t sequence, int64_t size) const {
        const int64_t source = sources[sequence];
        return tensors[source * parts + part] + (layer * batches[source] + rows[sequence]) * size;
    }
};

enum Want : int32_t { LAST = 1, ALL = 2 };

struct Batch {
    const int64_t* ids;  // the tokens of all sequences, one after the other
    int64_t rows, sequences;
    const int64_t* lengths;  // of each sequence
    StateIn before;
    StateOut after;  // must not overlap `before`
    float* logits;   // ALL: (rows, vocab); LAST: (sequences, vocab), each with at least one token
    int32_t want;
};

class Model {
   public:
    Model(const Sizes& sizes, float eps, float head_eps);
    // false: no such tensor.
    bool set_vector(int64_t layer, const char* name, const float* values, int64_t n);
    bool set_matrix(int64_t layer, const char* name, const Matrix& weight);
    void set_embedding(const Embedding& embedding) { embedding_ = embedding; }
    // nullptr, or the name of something that is missing or has the wrong size.
    const char* check() const;
    void forward(const Batch& batch);

   private:
    struct Segment;
    struct Work;
    void run_chunk(const Batch& batch, const std::vector<Segment>& segments, int64_t first_row, int64_t rows);
    void embed(const Batch& batch, int64_t first_row, int64_t rows);
    void norm_and_shift(const Batch& batch, const std::vector<Segment>& segments, int64_t layer, int64_t rows,
                        int which);
    void time_mix(const Batch& batch, const std::vector<Segment>& segments, int64_t layer, int64_t rows);
    void mix_inputs(const Layer& layer, int64_t rows);
    void project(const Layer& layer, int64_t rows);
    void wkv_heads(const Batch& batch, const std::vector<Segment>& segments, int64_t layer, int64_t rows);
    void wkv4_channels(const Batch& batch, const std::vector<Segment>& segments, int64_t layer);
    void channel_mix(const Batch& batch, const std::vector<Segment>& segments, int64_t layer, int64_t rows);
    const Matrix* first_of(const Layer& layer) const;
    void head(const float* x, int64_t rows, float* logits);

    Sizes s_;
    float eps_, head_eps_;
    int64_t C_, A_, F_, N_;  // C, A and F filled up; N the head size
    Embedding embedding_{};
    Vector ln0_weight_, ln0_bias_, ln_out_weight_, ln_out_bias_;
    Matrix head_{};
    std::vector<Layer> layers_;
    std::shared_ptr<Work> work_;
};

}  // namespace fledge
