// The forward pass: splits a batch into chunks, and computes the embedding, the token shift and the logits.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "cpu.h"
#include "model/workspace.h"
#include "pack.h"
#include "threads.h"

namespace fledge {
namespace {

constexpr int64_t MAX_CHUNK_ROWS = 256;  // enough rows to use each weight well, few enough to stay in the cache

}  // namespace

// Reserves all memory that the parts of a task need, because a part must not run out of memory.
void Model::reserve_thread_scratch() {
    auto& buffers = workspace_->thread_buffers;
    while (static_cast<int>(buffers.size()) < thread_count()) buffers.push_back(std::make_unique<Buffer>());
    const int64_t size = std::max({C_, (N_ + 3) * round_up(N_, LANES), int64_t{3 * PANEL}});
    for (auto& buffer : buffers) buffer->reserve_floats(size);
}

// A sequence without tokens keeps its state.
void Model::copy_unchanged_states(const Batch& batch) const {
    const bool is_rwkv4 = sizes_.version == 4;
    const int64_t tensors = is_rwkv4 ? 5 : 3;
    const int64_t wkv_size = is_rwkv4 ? sizes_.dim_att : sizes_.n_head * N_ * N_;
    for (int64_t sequence = 0; sequence < batch.sequences; sequence++) {
        if (batch.lengths[sequence]) continue;
        for (int64_t layer = 0; layer < sizes_.n_layer; layer++)
            for (int64_t tensor = 0; tensor < tensors; tensor++) {
                const bool is_shift = tensor == 0 || tensor == tensors - 1;
                const int64_t size = is_shift ? sizes_.n_embd : wkv_size;
                float* state_out = batch.state_out.tensor[tensor] + (layer * batch.sequences + sequence) * size;
                copy_floats(state_out, batch.state_in.get(tensor, layer, sequence, size), size);
            }
    }
}

void Model::forward(const Batch& batch) {
    Workspace& w = *workspace_;
    reserve_thread_scratch();
    copy_unchanged_states(batch);
    if (batch.logits_mode == LAST_LOGITS) w.last.reserve_floats(batch.sequences * C_);
    int64_t sequence = 0;
    int64_t position = 0;  // tokens of `sequence` that are done
    const int64_t chunks = (batch.rows + MAX_CHUNK_ROWS - 1) / MAX_CHUNK_ROWS;
    const int64_t chunk_rows =
        chunks ? (batch.rows + chunks - 1) / chunks : 0;  // equal, as short chunks are inefficient
    for (int64_t first_row = 0; first_row < batch.rows;) {
        Chunk chunk{batch, first_row, 0, {}};
        while (chunk.rows < chunk_rows && first_row + chunk.rows < batch.rows) {
            const int64_t length = std::min(batch.lengths[sequence] - position, chunk_rows - chunk.rows);
            if (length) chunk.segments.push_back({sequence, chunk.rows, length, position == 0});
            chunk.rows += length;
            position += length;
            if (position == batch.lengths[sequence]) {
                sequence++;
                position = 0;
            }
        }
        forward_chunk(chunk);
        const float* x = w.x.floats();
        if (batch.logits_mode == ALL_LOGITS)
            compute_logits(x, chunk.rows, batch.logits + first_row * sizes_.vocab_size);
        if (batch.logits_mode == LAST_LOGITS)
            for (const Segment& s : chunk.segments)  // the last chunk of a sequence overwrites the earlier ones
                copy_floats(w.last.floats() + s.sequence * C_, x + (s.first_row + s.length - 1) * C_, C_);
        first_row += chunk.rows;
    }
    if (batch.logits_mode == LAST_LOGITS) compute_logits(w.last.floats(), batch.sequences, batch.logits);
}

void Model::forward_chunk(const Chunk& chunk) {
    embed(chunk);
    for (int64_t layer_index = 0; layer_index < sizes_.n_layer; layer_index++) {
        time_mix(chunk, layer_index);
        channel_mix(chunk, layer_index);
    }
}

void Model::embed(const Chunk& chunk) {
    float* x = workspace_->x.reserve_floats(chunk.rows * C_);
    const int64_t width = sizes_.n_embd;
    parallel_rows(chunk.rows, [&](int64_t row, int) {
        float* out = x + row * C_;
        const int64_t offset = chunk.batch.ids[chunk.first_row + row] * width;
        if (embedding_.type == SOURCE_F32) {
            copy_floats(out, static_cast<const float*>(embedding_.data) + offset, width);
        } else {
            const uint16_t* halves = static_cast<const uint16_t*>(embedding_.data) + offset;
            for (int64_t i = 0; i < width; i++) {
                const uint32_t bits = static_cast<uint32_t>(halves[i]) << 16;
                if (embedding_.type == SOURCE_F16)
                    out[i] = half_to_float(halves[i]);
                else
                    std::memcpy(out + i, &bits, 4);
            }
        }
        kernels().layer_norm(out, ln0_weight_.get(), ln0_bias_.get(), eps_, width, out);
        std::fill(out + width, out + C_, 0.0f);
    });
}

// Normalizes every row, finds the previous row of each, and writes the last row of each segment to the new state.
void Model::normalize_and_shift(const Chunk& chunk, int64_t layer_index, bool is_channel_mix) {
    Workspace& w = *workspace_;
    const Batch& batch = chunk.batch;
    const Layer& layer = layers_[static_cast<size_t>(layer_index)];
    const int64_t width = sizes_.n_embd;
    const float* x = w.x.floats();
    const float* weight = is_channel_mix ? layer.ln2_weight.get() : layer.ln1_weight.get();
    const float* bias = is_channel_mix ? layer.ln2_bias.get() : layer.ln1_bias.get();
    float* norm = w.norm.reserve_floats(chunk.rows * C_);
    float* shift = w.shift.reserve_floats(static_cast<int64_t>(chunk.segments.size()) * C_);
    parallel_rows(chunk.rows, [&](int64_t row, int) {
        kernels().layer_norm(x + row * C_, weight, bias, eps_, width, norm + row * C_);
        std::fill(norm + row * C_ + width, norm + (row + 1) * C_, 0.0f);
    });
    const int ffn_shift = sizes_.version == 4 ? 4 : 2;
    const int tensor = is_channel_mix ? ffn_shift : 0;
    w.previous.resize(static_cast<size_t>(chunk.rows));
    for (const Segment& s : chunk.segments) {
        float* state_out = batch.state_out.tensor[tensor] + (layer_index * batch.sequences + s.sequence) * width;
        const float* state_in = batch.state_in.get(tensor, layer_index, s.sequence, width);
        copy_floats(shift, s.is_first ? state_in : state_out, width);
        std::fill(shift + width, shift + C_, 0.0f);
        const float** previous = &w.previous[static_cast<size_t>(s.first_row)];
        previous[0] = shift;
        for (int64_t t = 1; t < s.length; t++) previous[t] = norm + (s.first_row + t - 1) * C_;
        copy_floats(state_out, norm + (s.first_row + s.length - 1) * C_, width);
        shift += C_;
    }
}

void Model::compute_logits(const float* x, int64_t rows, float* logits) {
    Workspace& w = *workspace_;
    w.head_input.reset(activation_kind(head_.format), rows, sizes_.n_embd);
    parallel_rows(rows, [&](int64_t row, int thread) {
        float* norm = w.thread_scratch(thread);
        kernels().layer_norm(x + row * C_, ln_out_weight_.get(), ln_out_bias_.get(), eps_, sizes_.n_embd, norm);
        w.head_input.set_row(norm, row);
    });
    multiply({{&head_, &w.head_input.get(), {logits, sizes_.vocab_size, sizes_.vocab_size, false}}});
}

}  // namespace fledge
