// A whole RWKV-4, RWKV-5 or RWKV-6 model: its weights by their official names, and one forward pass for prefill and
// decode.
#pragma once
#include <memory>
#include <vector>

#include "buffer.h"
#include "isa/tables.h"

namespace fledge {

struct ModelSizes {
    int64_t version;  // 4, 5 or 6
    int64_t vocab_size;
    int64_t n_layer;
    int64_t n_embd;
    int64_t dim_att;
    int64_t dim_ffn;
    int64_t n_head;
    int64_t mix_rank;
    int64_t decay_rank;
    int64_t has_gate;
    int64_t has_scaled_keys;
};

// A vector of parameters, padded with zeros to whole panels.
class ParameterVector {
   public:
    void set(const float* values, int64_t n);
    const float* get() const { return n_ ? memory_->floats() : nullptr; }
    int64_t size() const { return n_; }

   private:
    std::unique_ptr<Buffer> memory_ = std::make_unique<Buffer>();
    int64_t n_ = 0;
};

enum MixInput { MIX_X, MIX_W, MIX_K, MIX_V, MIX_R, MIX_G, MIX_COUNT };

// The projections of the time mix: indices of the arrays in Layer and Workspace.
enum Projection { DECAY, KEY, VALUE, RECEPTANCE, GATE, PROJECTION_COUNT };

struct Layer {
    ParameterVector ln1_weight, ln1_bias;
    ParameterVector ln2_weight, ln2_bias;
    ParameterVector ln_x_weight, ln_x_bias;
    ParameterVector mix[MIX_COUNT];  // the weight of the previous token
    ParameterVector decay;           // RWKV-6: time_decay; RWKV-5: the decay factor; RWKV-4: the logarithm of the decay
    ParameterVector bonus;
    ParameterVector ffn_mix_k, ffn_mix_r;
    Matrix mix_down{}, mix_up[PROJECTION_COUNT]{};  // the low-rank factors of RWKV-6
    Matrix decay_down{}, decay_up{};
    Matrix receptance{}, key{}, value{}, gate{}, output{};
    Matrix ffn_key{}, ffn_value{}, ffn_receptance{};
};

struct Embedding {
    const void* data;
    int32_t type;  // a SourceType
    int64_t rows;
    int64_t width;
};

// The tensors of a new batched state, (layer, batch, ...), float32: att_shift, wkv, ffn_shift, or for RWKV-4 att_shift,
// aa, bb, pp, ffn_shift. models/state.py describes them.
constexpr int MAX_STATE_TENSORS = 5;
struct StateOutput {
    float* tensor[MAX_STATE_TENSORS];
};

// The input states are not copied. Each sequence refers to one of several batched states and to a row in it.
struct StateInput {
    const float* const* tensors;   // the tensors of the first batched state, then of the next
    const int64_t* batch_sizes;    // per batched state
    const int64_t* rows;           // per sequence
    const int64_t* state_indices;  // per sequence
    int64_t tensors_per_state;

    // The part of a state tensor for one layer and one sequence. size: its number of elements.
    const float* get(int64_t tensor, int64_t layer, int64_t sequence, int64_t size) const {
        const int64_t state = state_indices[sequence];
        return tensors[state * tensors_per_state + tensor] + (layer * batch_sizes[state] + rows[sequence]) * size;
    }
};

enum LogitsMode : int32_t { NO_LOGITS = 0, LAST_LOGITS = 1, ALL_LOGITS = 2 };

struct Batch {
    const int64_t* ids;  // the tokens of all sequences, concatenated
    int64_t rows;        // the number of tokens
    int64_t sequences;
    const int64_t* lengths;  // the number of tokens per sequence
    StateInput state_in;
    StateOutput state_out;  // must not overlap `state_in`
    // ALL_LOGITS: (rows, vocab_size). LAST_LOGITS: (sequences, vocab_size); every sequence has at least one token.
    float* logits;
    int32_t logits_mode;
};

class Model {
   public:
    Model(const ModelSizes& sizes, float eps, float head_eps);
    // layer_index: -1 for parameters outside the layers. Returns false if there is no such tensor.
    bool set_vector(int64_t layer_index, const char* name, const float* values, int64_t n);
    bool set_matrix(int64_t layer_index, const char* name, const Matrix& weight);
    void set_embedding(const Embedding& embedding) { embedding_ = embedding; }
    // Returns nullptr, or the name of a tensor that is missing or has the wrong size.
    const char* find_invalid_tensor() const;
    void forward(const Batch& batch);

   private:
    struct Segment;
    struct Chunk;
    struct Workspace;

    const char* find_invalid_tensor(const Layer& layer) const;
    void reserve_thread_scratch();
    void copy_unchanged_states(const Batch& batch) const;
    void forward_chunk(const Chunk& chunk);
    void embed(const Chunk& chunk);
    void normalize_and_shift(const Chunk& chunk, int64_t layer_index, bool is_channel_mix);
    void time_mix(const Chunk& chunk, int64_t layer_index);
    void compute_dynamic_mix(const Layer& layer, int64_t rows);
    void mix_inputs(const Layer& layer, int64_t rows);
    void project_inputs(const Layer& layer, int64_t rows);
    void compute_decay(const Layer& layer, int64_t rows);
    void run_wkv(const Chunk& chunk, int64_t layer_index);
    void run_wkv4(const Chunk& chunk, int64_t layer_index);
    void channel_mix(const Chunk& chunk, int64_t layer_index);
    const Matrix* first_matrix_after(int64_t layer_index) const;
    void compute_logits(const float* x, int64_t rows, float* logits);

    ModelSizes sizes_;
    float eps_;
    float head_eps_;
    int64_t C_;  // n_embd, padded
    int64_t A_;  // dim_att, padded
    int64_t F_;  // dim_ffn, padded
    int64_t N_;  // the head size
    Embedding embedding_{};
    ParameterVector ln0_weight_, ln0_bias_;
    ParameterVector ln_out_weight_, ln_out_bias_;
    Matrix head_{};
    std::vector<Layer> layers_;
    std::shared_ptr<Workspace> workspace_;
};

}  // namespace fledge
