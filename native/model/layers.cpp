// The two halves of a layer: time mix and channel mix. The equations are those of the paper on Eagle and Finch.
#include <algorithm>
#include <cmath>

#include "cpu.h"
#include "model/workspace.h"
#include "threads.h"

namespace fledge {
namespace {

constexpr int64_t MAX_PREFETCH_ROWS = 32;  // up to this number of rows, reading the weights takes most of the time
constexpr int64_t MAX_CACHED_STATE_BYTES = 16 << 20;  // a larger state is no longer cached at the next token

void prefetch_next_if_few_rows(int64_t rows, const std::vector<const Matrix*>& weights) {
    if (rows <= MAX_PREFETCH_ROWS) prefetch_next(weights);
}

// k *= exp(min(d, 0)), where d = low + base is the raw decay.
void scale_keys(float* k, const float* low, const float* base, int64_t n) {
    for (int64_t i = 0; i < n; i++) k[i] *= std::exp(std::min(low[i] + base[i], 0.0f));
}

}  // namespace

void Model::time_mix(const Chunk& chunk, int64_t layer_index) {
    Workspace& w = *workspace_;
    const Layer& layer = layers_[static_cast<size_t>(layer_index)];
    const int64_t rows = chunk.rows;
    normalize_and_shift(chunk, layer_index, false);
    mix_inputs(layer, rows);
    project_inputs(layer, rows);
    float* y = w.y.reserve_floats(rows * A_);
    if (sizes_.version == 4)
        run_wkv4(chunk, layer_index);
    else
        run_wkv(chunk, layer_index);
    w.output_input.reset(activation_kind(layer.output.format), rows, sizes_.dim_att);
    const float* r = w.projected[RECEPTANCE].floats();
    const float* g = w.projected[GATE].floats();
    parallel_rows(rows, [&](int64_t row, int) {
        if (sizes_.has_gate) kernels().gate(y + row * A_, g + row * A_, A_);
        if (sizes_.version == 4) kernels().multiply(y + row * A_, r + row * A_, A_);
        w.output_input.set_row(y + row * A_, row);
    });
    prefetch_next_if_few_rows(rows, {&layer.ffn_key, &layer.ffn_receptance});
    multiply({{&layer.output, &w.output_input.get(), {w.x.floats(), C_, C_, true}}});
}

// RWKV-6: the part of the mix weights that depends on the token (equations 14 and 15).
void Model::compute_dynamic_mix(const Layer& layer, int64_t rows) {
    Workspace& w = *workspace_;
    const float* norm = w.norm.floats();
    const int64_t low_width = pad_width(PROJECTION_COUNT * sizes_.mix_rank);
    w.mix_down_input.reset(FLOATS, rows, sizes_.n_embd);
    parallel_rows(rows, [&](int64_t row, int thread) {
        float* mixed = w.thread_scratch(thread);
        kernels().lerp(norm + row * C_, w.previous_row(row), layer.mix[MIX_X].get(), nullptr, C_, mixed);
        w.mix_down_input.set_row(mixed, row);
    });
    float* low = w.mix_low.reserve_floats(rows * low_width);
    const Matrix* up = layer.mix_up;
    prefetch_next_if_few_rows(rows, {&up[0], &up[1], &up[2], &up[3], &up[4]});
    multiply({{&layer.mix_down, &w.mix_down_input.get(), {low, low_width, low_width, false}}});
    for (ActivationBuffer& input : w.mix_up_input) input.reset(FLOATS, rows, sizes_.mix_rank);
    parallel_rows(rows, [&](int64_t row, int) {
        kernels().tanh(low + row * low_width, low_width);
        for (int i = 0; i < PROJECTION_COUNT; i++)
            w.mix_up_input[i].set_row(low + row * low_width + i * sizes_.mix_rank, row);
    });
    float* dynamic_mix = w.dynamic_mix.reserve_floats(PROJECTION_COUNT * rows * C_);
    std::vector<Product> products;
    products.reserve(PROJECTION_COUNT);
    for (int i = 0; i < PROJECTION_COUNT; i++)
        products.push_back({&up[i], &w.mix_up_input[i].get(), {dynamic_mix + i * rows * C_, C_, C_, false}});
    prefetch_next_if_few_rows(rows, {&layer.key, &layer.value, &layer.receptance, &layer.gate, &layer.decay_down});
    multiply(products);
}

// The inputs of the projections: every token mixed with the previous one (equation 16; equations 3 and 4 of RWKV-5).
void Model::mix_inputs(const Layer& layer, int64_t rows) {
    Workspace& w = *workspace_;
    const bool is_rwkv6 = sizes_.version == 6;
    if (is_rwkv6) compute_dynamic_mix(layer, rows);
    const float* norm = w.norm.floats();
    const float* dynamic_mix = is_rwkv6 ? w.dynamic_mix.floats() : nullptr;
    const Matrix* weights[PROJECTION_COUNT] = {&layer.decay_down, &layer.key, &layer.value, &layer.receptance,
                                               &layer.gate};
    const int first = is_rwkv6 ? DECAY : KEY;
    const int end = sizes_.has_gate ? GATE + 1 : GATE;
    for (int i = first; i < end; i++)
        w.projection_input[i].reset(activation_kind(weights[i]->format), rows, sizes_.n_embd);
    parallel_rows(rows, [&](int64_t row, int thread) {
        float* mixed = w.thread_scratch(thread);
        for (int i = first; i < end; i++) {
            const float* mix = layer.mix[MIX_W + i].get();
            const float* extra_mix = is_rwkv6 ? dynamic_mix + (i * rows + row) * C_ : nullptr;
            kernels().lerp(norm + row * C_, w.previous_row(row), mix, extra_mix, C_, mixed);
            w.projection_input[i].set_row(mixed, row);
        }
    });
}

// k, v, r, g and, in RWKV-6, the decay of every token (equation 17).
void Model::project_inputs(const Layer& layer, int64_t rows) {
    Workspace& w = *workspace_;
    const Matrix* weights[PROJECTION_COUNT] = {nullptr, &layer.key, &layer.value, &layer.receptance, &layer.gate};
    const int end = sizes_.has_gate ? GATE + 1 : GATE;
    std::vector<Product> products;
    products.reserve(PROJECTION_COUNT);
    for (int i = KEY; i < end; i++) {
        float* out = w.projected[i].reserve_floats(rows * A_);
        products.push_back({weights[i], &w.projection_input[i].get(), {out, A_, A_, false}});
    }
    if (sizes_.version == 6) {
        const int64_t low_width = pad_width(sizes_.decay_rank);
        float* low = w.decay_low.reserve_floats(rows * low_width);
        products.push_back({&layer.decay_down, &w.projection_input[DECAY].get(), {low, low_width, low_width, false}});
        prefetch_next_if_few_rows(rows, {&layer.decay_up});
    }
    multiply(products);
    if (sizes_.version == 6) compute_decay(layer, rows);
    if (sizes_.version == 4) {
        float* r = w.projected[RECEPTANCE].floats();
        parallel_rows(rows, [&](int64_t row, int) { kernels().sigmoid(r + row * A_, A_); });
    }
}

void Model::compute_decay(const Layer& layer, int64_t rows) {
    Workspace& w = *workspace_;
    const int64_t low_width = pad_width(sizes_.decay_rank);
    float* low = w.decay_low.floats();
    float* decay = w.projected[DECAY].reserve_floats(rows * A_);
    w.decay_up_input.reset(FLOATS, rows, sizes_.decay_rank);
    parallel_rows(rows, [&](int64_t row, int) {
        kernels().tanh(low + row * low_width, low_width);
        w.decay_up_input.set_row(low + row * low_width, row);
    });
    multiply({{&layer.decay_up, &w.decay_up_input.get(), {decay, A_, A_, false}}});
    float* k = w.projected[KEY].floats();
    parallel_rows(rows, [&](int64_t row, int) {
        float* row_decay = decay + row * A_;
        if (sizes_.has_scaled_keys) scale_keys(k + row * A_, row_decay, layer.decay.get(), sizes_.dim_att);
        kernels().decay(row_decay, layer.decay.get(), A_, row_decay);
    });
}

// The recurrence and the norm of each head. Writes Workspace::y.
void Model::run_wkv(const Chunk& chunk, int64_t layer_index) {
    Workspace& w = *workspace_;
    const Batch& batch = chunk.batch;
    const Layer& layer = layers_[static_cast<size_t>(layer_index)];
    const int64_t rows = chunk.rows, H = sizes_.n_head, N = N_;
    const bool is_rwkv6 = sizes_.version == 6;
    float* y = w.y.floats();
    for (int64_t row = 0; row < rows; row++) std::fill(y + row * A_ + sizes_.dim_att, y + (row + 1) * A_, 0.0f);
    prefetch_next_if_few_rows(rows, {&layer.output});
    const auto parts = static_cast<int64_t>(chunk.segments.size()) * H;
    parallel_for(parts, 8 * rows * H * N * N, [&](int64_t part, int thread) {
        const Segment& s = chunk.segments[static_cast<size_t>(part / H)];
        const int64_t h = part % H;
        const int64_t offset = s.first_row * A_ + h * N;
        WkvParams p{};
        p.length = s.length;
        p.keys = N;
        p.values = N;
        p.r = w.projected[RECEPTANCE].floats() + offset;
        p.k = w.projected[KEY].floats() + offset;
        p.v = w.projected[VALUE].floats() + offset;
        p.decay = is_rwkv6 ? w.projected[DECAY].floats() + offset : layer.decay.get() + h * N;
        p.key_stride = A_;
        p.value_stride = A_;
        p.decay_stride = is_rwkv6 ? A_ : 0;
        p.bonus = layer.bonus.get() + h * N;
        p.state_out = batch.state_out.tensor[1] + ((layer_index * batch.sequences + s.sequence) * H + h) * N * N;
        const float* state_in = batch.state_in.get(1, layer_index, s.sequence, H * N * N) + h * N * N;
        p.state_in = s.is_first ? state_in : p.state_out;
        p.y = y + offset;
        p.bypass_cache = 4 * sizes_.n_layer * batch.sequences * H * N * N > MAX_CACHED_STATE_BYTES;
        p.scratch = w.thread_scratch(thread);
        kernels().wkv(p);
        const float* norm_weight = layer.ln_x_weight.get() + h * N;
        const float* norm_bias = layer.ln_x_bias.get() + h * N;
        for (int64_t t = 0; t < s.length; t++)
            kernels().layer_norm(p.y + t * A_, norm_weight, norm_bias, head_eps_, N, p.y + t * A_);
    });
}

// The recurrence of RWKV-4, in blocks of channels. Writes Workspace::y.
void Model::run_wkv4(const Chunk& chunk, int64_t layer_index) {
    Workspace& w = *workspace_;
    const Batch& batch = chunk.batch;
    const Layer& layer = layers_[static_cast<size_t>(layer_index)];
    const int64_t blocks = A_ / PANEL;
    parallel_for(static_cast<int64_t>(chunk.segments.size()) * blocks, [&](int64_t part, int thread) {
        const Segment& s = chunk.segments[static_cast<size_t>(part / blocks)];
        const int64_t channel = part % blocks * PANEL;
        const int64_t offset = s.first_row * A_ + channel;
        const int64_t state_offset = (layer_index * batch.sequences + s.sequence) * sizes_.dim_att + channel;
        const int64_t width = std::min<int64_t>(PANEL, sizes_.dim_att - channel);
        float* state = w.thread_scratch(thread);  // aa, bb and pp
        std::fill(state, state + 3 * PANEL, 0.0f);
        for (int i = 0; i < 3; i++) {
            const float* state_in = batch.state_in.get(1 + i, layer_index, s.sequence, sizes_.dim_att) + channel;
            const float* state_out = batch.state_out.tensor[1 + i] + state_offset;
            copy_floats(state + i * PANEL, s.is_first ? state_in : state_out, width);
        }
        Wkv4Params p{};
        p.length = s.length;
        p.width = PANEL;
        p.stride = A_;
        p.decay_stride = 0;
        p.k = w.projected[KEY].floats() + offset;
        p.v = w.projected[VALUE].floats() + offset;
        p.w = layer.decay.get() + channel;
        p.u = layer.bonus.get() + channel;
        p.aa = state;
        p.bb = state + PANEL;
        p.pp = state + 2 * PANEL;
        p.y = w.y.floats() + offset;
        kernels().wkv4(p);
        for (int i = 0; i < 3; i++) copy_floats(batch.state_out.tensor[1 + i] + state_offset, state + i * PANEL, width);
    });
}

// The matrix that is read first after this layer.
const Matrix* Model::first_matrix_after(int64_t layer_index) const {
    if (layer_index + 1 == sizes_.n_layer) return &head_;
    const Layer& next = layers_[static_cast<size_t>(layer_index + 1)];
    return sizes_.version == 6 ? &next.mix_down : &next.key;
}

// x += sigmoid(R x_r) * V relu(K x_k)^2 (equations 10 to 13).
void Model::channel_mix(const Chunk& chunk, int64_t layer_index) {
    Workspace& w = *workspace_;
    const Layer& layer = layers_[static_cast<size_t>(layer_index)];
    const int64_t rows = chunk.rows;
    normalize_and_shift(chunk, layer_index, true);
    const float* norm = w.norm.floats();
    w.ffn_key_input.reset(activation_kind(layer.ffn_key.format), rows, sizes_.n_embd);
    w.ffn_receptance_input.reset(activation_kind(layer.ffn_receptance.format), rows, sizes_.n_embd);
    parallel_rows(rows, [&](int64_t row, int thread) {
        float* mixed = w.thread_scratch(thread);
        kernels().lerp(norm + row * C_, w.previous_row(row), layer.ffn_mix_k.get(), nullptr, C_, mixed);
        w.ffn_key_input.set_row(mixed, row);
        kernels().lerp(norm + row * C_, w.previous_row(row), layer.ffn_mix_r.get(), nullptr, C_, mixed);
        w.ffn_receptance_input.set_row(mixed, row);
    });
    float* hidden = w.ffn_hidden.reserve_floats(rows * F_);
    float* r = w.ffn_receptance.reserve_floats(rows * C_);
    float* out = w.projected[KEY].reserve_floats(rows * std::max(A_, C_));  // its content is not needed any more
    multiply({{&layer.ffn_key, &w.ffn_key_input.get(), {hidden, F_, F_, false}},
              {&layer.ffn_receptance, &w.ffn_receptance_input.get(), {r, C_, C_, false}}});
    w.ffn_value_input.reset(activation_kind(layer.ffn_value.format), rows, sizes_.dim_ffn, true);
    parallel_rows(rows, [&](int64_t row, int) {
        kernels().squared_relu(hidden + row * F_, F_);
        w.ffn_value_input.set_row(hidden + row * F_, row);
    });
    prefetch_next_if_few_rows(rows, {first_matrix_after(layer_index)});
    multiply({{&layer.ffn_value, &w.ffn_value_input.get(), {out, C_, C_, false}}});
    float* x = w.x.floats();
    parallel_rows(rows, [&](int64_t row, int) { kernels().gated_add(x + row * C_, r + row * C_, out + row * C_, C_); });
}

}  // namespace fledge
