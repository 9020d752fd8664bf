#include "model.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "pack.h"

namespace fledge {
namespace {

constexpr int64_t CHUNK = 256;  // rows of one pass: enough to use a weight well, few enough that all stays in the cache
constexpr int64_t CACHES = 16 << 20;  // bytes of state that may still be there at the next token
constexpr int64_t FEW_ROWS = 32;      // up to here reading the weights is what takes the time
enum Mix { X, W_, K_, V_, R_, G_ };

int64_t filled(int64_t n) { return round_up(n, PANEL); }

void copy(float* to, const float* from, int64_t n) { std::memcpy(to, from, static_cast<size_t>(n) * sizeof(float)); }

// k times exp(min(d, 0)), where the raw decay d is the sum of both.
void scale_keys(float* k, const float* low, const float* base, int64_t n) {
    for (int64_t i = 0; i < n; i++) k[i] *= std::exp(std::min(low[i] + base[i], 0.0f));
}

}  // namespace

void Vector::set(const float* values, int64_t n) {
    float* memory = memory_->floats(filled(n));
    std::fill(memory, memory + filled(n), 0.0f);
    copy(memory, values, n);
    n_ = n;
}

// Some tokens of one sequence that a chunk holds.
struct Model::Segment {
    int64_t sequence, row, length;
    bool begins;  // its state is still the one that was given
};

struct Model::Work {
    Buffer x, norm, shift, row[5], low, mixes, decay_low, decay, y, hidden, last;
    Prepared in, mix[5], x_in[5], decay_in, out, ffn_k, ffn_r, ffn_hidden, head;
    std::vector<const float*> before;  // of each row: the normalised input of the token before
    std::vector<std::unique_ptr<Buffer>> thread;
    float* of_thread(int number, int64_t count) { return thread[static_cast<size_t>(number)]->floats(count); }
};

Model::Model(const Sizes& sizes, float eps, float head_eps)
    : s_(sizes), eps_(eps), head_eps_(head_eps), C_(filled(sizes.width)), A_(filled(sizes.inner)),
      F_(filled(sizes.hidden)), N_(sizes.heads ? sizes.inner / sizes.heads : 0),
      layers_(static_cast<size_t>(sizes.layers)), work_(std::make_shared<Work>()) {}

bool Model::set_vector(int64_t number, const char* name, const float* values, int64_t n) {
    struct Place {
        const char* name;
        Vector* vector;
    };
    if (number < 0) {
        const Place places[] = {{"ln0.weight", &ln0_weight_},
                                {"ln0.bias", &ln0_bias_},
                                {"ln_out.weight", &ln_out_weight_},
                                {"ln_out.bias", &ln_out_bias_}};
        for (const Place& p : places)
            if (!std::strcmp(p.name, name)) return p.vector->set(values, n), true;
        return false;
    }
    if (number >= s_.layers) return false;
    Layer& l = layers_[static_cast<size_t>(number)];
    const Place places[] = {{"ln1.weight", &l.ln1_weight},
                            {"ln1.bias", &l.ln1_bias},
                            {"ln2.weight", &l.ln2_weight},
                            {"ln2.bias", &l.ln2_bias},
                            {"att.ln_x.weight", &l.ln_x_weight},
                            {"att.ln_x.bias", &l.ln_x_bias},
                            {"att.mix_x", &l.mix[X]},
                            {"att.mix_w", &l.mix[W_]},
                            {"att.mix_k", &l.mix[K_]},
                            {"att.mix_v", &l.mix[V_]},
                            {"att.mix_r", &l.mix[R_]},
                            {"att.mix_g", &l.mix[G_]},
                            {"att.decay", &l.decay},
                            {"att.bonus", &l.bonus},
                            {"ffn.mix_k", &l.ffn_mix_k},
                            {"ffn.mix_r", &l.ffn_mix_r}};
    for (const Place& p : places)
        if (!std::strcmp(p.name, name)) return p.vector->set(values, n), true;
    return false;
}

bool Model::set_matrix(int64_t number, const char* name, const Matrix& weight) {
    if (number < 0) return !std::strcmp(name, "head.weight") ? (head_ = weight, true) : false;
    if (number >= s_.layers) return false;
    Layer& l = layers_[static_cast<size_t>(number)];
    const struct {
        const char* name;
        Matrix* matrix;
    } places[] = {{"att.mix_down", &l.mix_down},
                  {"att.mix_up_w", &l.mix_up[0]},
                  {"att.mix_up_k", &l.mix_up[1]},
                  {"att.mix_up_v", &l.mix_up[2]},
                  {"att.mix_up_r", &l.mix_up[3]},
                  {"att.mix_up_g", &l.mix_up[4]},
                  {"att.decay_down", &l.decay_down},
                  {"att.decay_up", &l.decay_up},
                  {"att.receptance.weight", &l.receptance},
                  {"att.key.weight", &l.key},
                  {"att.value.weight", &l.value},
                  {"att.gate.weight", &l.gate},
                  {"att.output.weight", &l.output},
                  {"ffn.key.weight", &l.ffn_key},
                  {"ffn.value.weight", &l.ffn_value},
                  {"ffn.receptance.weight", &l.ffn_receptance}};
    for (const auto& p : places)
        if (!std::strcmp(p.name, name)) return *p.matrix = weight, true;
    return false;
}

const char* Model::check() const {
    const auto is = [](const Matrix& m, int64_t n, int64_t k) { return m.data && m.n == n && m.k == k; };
    const int64_t C = s_.width, A = s_.inner, F = s_.hidden;
    if (!embedding_.data || embedding_.rows != s_.vocab || embedding_.width != C) return "emb.weight";
    if (!is(head_, s_.vocab, C)) return "head.weight";
    for (const Vector* v : {&ln0_weight_, &ln0_bias_, &ln_out_weight_, &ln_out_bias_})
        if (v->size() != C) return "ln0 or ln_out";
    for (const Layer& l : layers_) {
        for (const Vector* v : {&l.ln1_weight, &l.ln1_bias, &l.ln2_weight, &l.ln2_bias, &l.mix[K_], &l.mix[V_],
                                &l.mix[R_], &l.ffn_mix_k, &l.ffn_mix_r})
            if (v->size() != C) return "ln1, ln2 or a mix";
        for (const Vector* v : {&l.decay, &l.bonus})
            if (v->size() != A) return "att.decay or att.bonus";
        if (s_.version > 4 && (l.ln_x_weight.size() != A || l.ln_x_bias.size() != A)) return "att.ln_x";
        if (!is(l.receptance, A, C) || !is(l.key, A, C) || !is(l.value, A, C) || !is(l.output, C, A))
            return "a matrix of att";
        if (s_.has_gate && (!is(l.gate, A, C) || l.mix[G_].size() != C)) return "att.gate";
        if (!is(l.ffn_key, F, C) || !is(l.ffn_value, C, F) || !is(l.ffn_receptance, C, C)) return "a matrix of ffn";
        if (s_.version < 6) continue;
        if (l.mix[X].size() != C || l.mix[W_].size() != C) return "att.mix_x or att.mix_w";
        if (!is(l.mix_down, 5 * s_.mix_rank, C)) return "att.mix_down";
        for (const Matrix& up : l.mix_up)
            if (!is(up, C, s_.mix_rank)) return "att.mix_up";
        if (!is(l.decay_down, s_.decay_rank, C) || !is(l.decay_up, A, s_.decay_rank)) return "att.decay_down or _up";
    }
    return nullptr;
}

void Model::forward(const Batch& batch) {
    Work& w = *work_;
    while (static_cast<int>(w.thread.size()) < threads()) w.thread.push_back(std::make_unique<Buffer>());
    // All that a part of a task may ask for, now: a thread must not run out of memory.
    const int64_t most = std::max({C_, (N_ + 3) * round_up(N_, LANES), int64_t{3 * PANEL}});
    for (auto& buffer : w.thread) buffer->floats(most);
    const bool rwkv4 = s_.version == 4;
    const int64_t parts = rwkv4 ? 5 : 3;
    for (int64_t b = 0; b < batch.sequences; b++) {  // what reads nothing keeps its state
        if (batch.lengths[b]) continue;
        for (int64_t layer = 0; layer < s_.layers; layer++)
            for (int64_t i = 0; i < parts; i++) {
                const bool shift = i == 0 || i == parts - 1;
                const int64_t size = shift ? s_.width : rwkv4 ? s_.inner : s_.heads * N_ * N_;
                const int64_t at = (layer * batch.sequences + b) * size;
                copy(batch.after.tensor[i] + at, batch.before.at(i, layer, b, size), size);
            }
    }
    if (batch.want == LAST) w.last.floats(batch.sequences * C_);
    int64_t sequence = 0, used = 0;  // tokens of `sequence` that are behind us
    const int64_t chunks = (batch.rows + CHUNK - 1) / CHUNK;
    const int64_t size = chunks ? (batch.rows + chunks - 1) / chunks : 0;  // all alike: a short one would be dear
    for (int64_t first = 0; first < batch.rows;) {
        std::vector<Segment> segments;
        int64_t rows = 0;
        while (rows < size && first + rows < batch.rows) {
            const int64_t length = std::min(batch.lengths[sequence] - used, size - rows);
            if (length) segments.push_back({sequence, rows, length, used == 0});
            rows += length, used += length;
            if (used == batch.lengths[sequence]) sequence++, used = 0;
        }
        run_chunk(batch, segments, first, rows);
        if (batch.want == ALL) head(w.x.floats(0), rows, batch.logits + first * s_.vocab);
        if (batch.want == LAST)
            for (const Segment& g : segments)  // a sequence's last chunk is the one that stays
                copy(w.last.floats(0) + g.sequence * C_, w.x.floats(0) + (g.row + g.length - 1) * C_, C_);
        first += rows;
    }
    if (batch.want == LAST) head(w.last.floats(0), batch.sequences, batch.logits);
}

void Model::run_chunk(const Batch& batch, const std::vector<Segment>& segments, int64_t first_row, int64_t rows) {
    embed(batch, first_row, rows);
    for (int64_t layer = 0; layer < s_.layers; layer++) {
        time_mix(batch, segments, layer, rows);
        channel_mix(batch, segments, layer, rows);
    }
}

void Model::embed(const Batch& batch, int64_t first_row, int64_t rows) {
    float* x = work_->x.floats(rows * C_);
    for_rows(rows, [&](int64_t row, int) {
        float* to = x + row * C_;
        const int64_t at = batch.ids[first_row + row] * s_.width;
        if (embedding_.stored == STORED_F32) {
            copy(to, static_cast<const float*>(embedding_.data) + at, s_.width);
        } else {
            const uint16_t* from = static_cast<const uint16_t*>(embedding_.data) + at;
            for (int64_t i = 0; i < s_.width; i++) {
                const uint32_t bits = static_cast<uint32_t>(from[i]) << 16;
                if (embedding_.stored == STORED_F16)
                    to[i] = half_to_float(from[i]);
                else
                    std::memcpy(to + i, &bits, 4);
            }
        }
        kernels().layer_norm(to, ln0_weight_.get(), ln0_bias_.get(), eps_, s_.width, to);
        std::fill(to + s_.width, to + C_, 0.0f);
    });
}

// Normalises every row, finds the row before each, and hands each sequence's last one over as its new shift.
void Model::norm_and_shift(const Batch& batch, const std::vector<Segment>& segments, int64_t number, int64_t rows,
                           int which) {
    Work& w = *work_;
    const Layer& layer = layers_[static_cast<size_t>(number)];
    const float *x = w.x.floats(0), *weight = which ? layer.ln2_weight.get() : layer.ln1_weight.get(),
                *bias = which ? layer.ln2_bias.get() : layer.ln1_bias.get();
    float *norm = w.norm.floats(rows * C_), *shift = w.shift.floats(static_cast<int64_t>(segments.size()) * C_);
    for_rows(rows, [&](int64_t row, int) {
        kernels().layer_norm(x + row * C_, weight, bias, eps_, s_.width, norm + row * C_);
        std::fill(norm + row * C_ + s_.width, norm + (row + 1) * C_, 0.0f);
    });
    const int tensor = which ? (s_.version == 4 ? 4 : 2) : 0;
    w.before.resize(static_cast<size_t>(rows));
    for (const Segment& g : segments) {
        const int64_t at = (number * batch.sequences + g.sequence) * s_.width;
        const float* given = batch.before.at(tensor, number, g.sequence, s_.width);
        copy(shift, g.begins ? given : batch.after.tensor[tensor] + at, s_.width);
        std::fill(shift + s_.width, shift + C_, 0.0f);
        w.before[static_cast<size_t>(g.row)] = shift;
        for (int64_t t = 1; t < g.length; t++) w.before[static_cast<size_t>(g.row + t)] = norm + (g.row + t - 1) * C_;
        copy(batch.after.tensor[tensor] + at, norm + (g.row + g.length - 1) * C_, s_.width);
        shift += C_;
    }
}

void Model::time_mix(const Batch& batch, const std::vector<Segment>& segments, int64_t number, int64_t rows) {
    Work& w = *work_;
    const Layer& layer = layers_[static_cast<size_t>(number)];
    norm_and_shift(batch, segments, number, rows, 0);
    mix_inputs(layer, rows);
    project(layer, rows);
    float* y = w.y.floats(rows * A_);
    if (s_.version == 4)
        wkv4_channels(batch, segments, number);
    else
        wkv_heads(batch, segments, number, rows);
    w.out.reset(kind_of(layer.output.format), rows, s_.inner);
    const float *r = w.row[R_ - 1].floats(0), *g = w.row[G_ - 1].floats(0);
    for_rows(rows, [&](int64_t row, int) {
        if (s_.has_gate) kernels().gate(y + row * A_, g + row * A_, A_);
        if (s_.version == 4) kernels().multiply(y + row * A_, r + row * A_, A_);
        w.out.row(y + row * A_, row);
    });
    if (rows <= FEW_ROWS) expect({&layer.ffn_key, &layer.ffn_receptance});
    multiply({{&layer.output, &w.out.get(), {w.x.floats(0), C_, C_, true}}});
}

// The inputs of w, k, v, r and g: the token mixed with the one before (equations 14 to 16; Eagle's 3 and 4).
void Model::mix_inputs(const Layer& layer, int64_t rows) {
    Work& w = *work_;
    const float* norm = w.norm.floats(0);
    const bool finch = s_.version == 6;
    const int64_t low_width = filled(5 * s_.mix_rank);
    if (finch) {
        w.in.reset(FLOATS, rows, s_.width);
        for_rows(rows, [&](int64_t row, int thread) {
            float* mixed = w.of_thread(thread, C_);
            kernels().lerp(norm + row * C_, w.before[static_cast<size_t>(row)], layer.mix[X].get(), nullptr, C_, mixed);
            w.in.row(mixed, row);
        });
        float* low = w.low.floats(rows * low_width);
        if (rows <= FEW_ROWS)
            expect({&layer.mix_up[0], &layer.mix_up[1], &layer.mix_up[2], &layer.mix_up[3], &layer.mix_up[4]});
        multiply({{&layer.mix_down, &w.in.get(), {low, low_width, low_width, false}}});
        for (Prepared& part : w.mix) part.reset(FLOATS, rows, s_.mix_rank);
        for_rows(rows, [&](int64_t row, int) {
            kernels().tanh(low + row * low_width, low_width);
            for (int i = 0; i < 5; i++) w.mix[i].row(low + row * low_width + i * s_.mix_rank, row);
        });
        float* mixes = w.mixes.floats(5 * rows * C_);
        std::vector<Product> products;
        for (int i = 0; i < 5; i++)
            products.push_back({&layer.mix_up[i], &w.mix[i].get(), {mixes + i * rows * C_, C_, C_, false}});
        if (rows <= FEW_ROWS) expect({&layer.key, &layer.value, &layer.receptance, &layer.gate, &layer.decay_down});
        multiply(products);
    }
    const Matrix* weights[5] = {&layer.decay_down, &layer.key, &layer.value, &layer.receptance, &layer.gate};
    const int first = finch ? 0 : 1, last = s_.has_gate ? 5 : 4;
    for (int i = first; i < last; i++) w.x_in[i].reset(kind_of(weights[i]->format), rows, s_.width);
    const float* mixes = finch ? w.mixes.floats(0) : nullptr;
    for_rows(rows, [&](int64_t row, int thread) {
        float* mixed = w.of_thread(thread, C_);
        for (int i = first; i < last; i++) {
            kernels().lerp(norm + row * C_, w.before[static_cast<size_t>(row)], layer.mix[i + 1].get(),
                           finch ? mixes + (i * rows + row) * C_ : nullptr, C_, mixed);
            w.x_in[i].row(mixed, row);
        }
    });
}

// r, k, v, g and, in Finch, the decay of every token (equation 17).
void Model::project(const Layer& layer, int64_t rows) {
    Work& w = *work_;
    const Matrix* weights[5] = {nullptr, &layer.key, &layer.value, &layer.receptance, &layer.gate};
    const bool finch = s_.version == 6;
    const int64_t low_width = filled(s_.decay_rank);
    std::vector<Product> products;
    for (int i = 1; i < (s_.has_gate ? 5 : 4); i++)
        products.push_back({weights[i], &w.x_in[i].get(), {w.row[i].floats(rows * A_), A_, A_, false}});
    if (!finch) {
        multiply(products);
        if (s_.version == 4)
            for_rows(rows, [&](int64_t row, int) { kernels().sigmoid(w.row[R_ - 1].floats(0) + row * A_, A_); });
        return;
    }
    float *low = w.decay_low.floats(rows * low_width), *decay = w.decay.floats(rows * A_);
    products.push_back({&layer.decay_down, &w.x_in[0].get(), {low, low_width, low_width, false}});
    if (rows <= FEW_ROWS) expect({&layer.decay_up});
    multiply(products);
    w.decay_in.reset(FLOATS, rows, s_.decay_rank);
    for_rows(rows, [&](int64_t row, int) {
        kernels().tanh(low + row * low_width, low_width);
        w.decay_in.row(low + row * low_width, row);
    });
    multiply({{&layer.decay_up, &w.decay_in.get(), {decay, A_, A_, false}}});
    for_rows(rows, [&](int64_t row, int) {
        if (s_.scaled_keys)
            scale_keys(w.row[K_ - 1].floats(0) + row * A_, decay + row * A_, layer.decay.get(), s_.inner);
        kernels().decay(decay + row * A_, layer.decay.get(), A_, decay + row * A_);
    });
}

// The recurrence and the norm of each head; w.y afterwards.
void Model::wkv_heads(const Batch& batch, const std::vector<Segment>& segments, int64_t number, int64_t rows) {
    Work& w = *work_;
    const Layer& layer = layers_[static_cast<size_t>(number)];
    const int64_t H = s_.heads, N = N_;
    const float *k = w.row[K_ - 1].floats(0), *v = w.row[V_ - 1].floats(0), *r = w.row[R_ - 1].floats(0);
    const bool finch = s_.version == 6;
    float* y = w.y.floats(0);
    for (int64_t row = 0; row < rows; row++) std::fill(y + row * A_ + s_.inner, y + (row + 1) * A_, 0.0f);
    if (rows <= FEW_ROWS) expect({&layer.output});
    parallel(static_cast<int64_t>(segments.size()) * H, 8 * rows * H * N * N, [&](int64_t part, int thread) {
        const Segment& g = segments[static_cast<size_t>(part / H)];
        const int64_t h = part % H, at = g.row * A_ + h * N;
        const int64_t state = ((number * batch.sequences + g.sequence) * H + h) * N * N;
        Wkv call{};
        call.length = g.length, call.keys = N, call.values = N;
        call.r = r + at, call.k = k + at, call.v = v + at, call.y = y + at;
        call.decay = finch ? w.decay.floats(0) + at : layer.decay.get() + h * N;
        call.stride = call.v_stride = call.y_stride = A_, call.w_stride = finch ? A_ : 0;
        call.bonus = layer.bonus.get() + h * N;
        call.after = batch.after.tensor[1] + state;
        call.before = g.begins ? batch.before.at(1, number, g.sequence, H * N * N) + h * N * N : call.after;
        call.past_caches = 4 * s_.layers * batch.sequences * H * N * N > CACHES;
        call.scratch = w.of_thread(thread, (N + 3) * round_up(N, LANES));
        kernels().wkv(call);
        for (int64_t t = 0; t < g.length; t++)
            kernels().layer_norm(y + at + t * A_, layer.ln_x_weight.get() + h * N, layer.ln_x_bias.get() + h * N,
                                 head_eps_, N, y + at + t * A_);
    });
}

void Model::wkv4_channels(const Batch& batch, const std::vector<Segment>& segments, int64_t number) {
    Work& w = *work_;
    const Layer& layer = layers_[static_cast<size_t>(number)];
    const int64_t blocks = A_ / PANEL;
    parallel(static_cast<int64_t>(segments.size()) * blocks, [&](int64_t part, int thread) {
        const Segment& g = segments[static_cast<size_t>(part / blocks)];
        const int64_t channel = part % blocks * PANEL, at = g.row * A_ + channel;
        const int64_t state = (number * batch.sequences + g.sequence) * s_.inner + channel;
        const int64_t width = std::min<int64_t>(PANEL, s_.inner - channel);
        float* sums = w.of_thread(thread, 3 * PANEL);
        std::fill(sums, sums + 3 * PANEL, 0.0f);
        for (int i = 0; i < 3; i++) {
            const float* given = batch.before.at(1 + i, number, g.sequence, s_.inner) + channel;
            copy(sums + i * PANEL, g.begins ? given : batch.after.tensor[1 + i] + state, width);
        }
        Wkv4 call{};
        call.length = g.length, call.width = PANEL, call.stride = A_, call.w_stride = 0;
        call.k = w.row[K_ - 1].floats(0) + at, call.v = w.row[V_ - 1].floats(0) + at,
        call.w = layer.decay.get() + channel;
        call.u = layer.bonus.get() + channel;
        call.aa = sums, call.bb = sums + PANEL, call.pp = sums + 2 * PANEL, call.y = w.y.floats(0) + at;
        kernels().wkv4(call);
        for (int i = 0; i < 3; i++) copy(batch.after.tensor[1 + i] + state, sums + i * PANEL, width);
    });
}

// What a layer reads first.
const Matrix* Model::first_of(const Layer& layer) const { return s_.version == 6 ? &layer.mix_down : &layer.key; }

// x += sigmoid(R x_r) * V relu(K x_k)^2 (equations 10 to 13).
void Model::channel_mix(const Batch& batch, const std::vector<Segment>& segments, int64_t number, int64_t rows) {
    Work& w = *work_;
    const Layer& layer = layers_[static_cast<size_t>(number)];
    norm_and_shift(batch, segments, number, rows, 1);
    const float* norm = w.norm.floats(0);
    w.ffn_k.reset(kind_of(layer.ffn_key.format), rows, s_.width);
    w.ffn_r.reset(kind_of(layer.ffn_receptance.format), rows, s_.width);
    for_rows(rows, [&](int64_t row, int thread) {
        float* mixed = w.of_thread(thread, C_);
        const float* before = w.before[static_cast<size_t>(row)];
        kernels().lerp(norm + row * C_, before, layer.ffn_mix_k.get(), nullptr, C_, mixed);
        w.ffn_k.row(mixed, row);
        kernels().lerp(norm + row * C_, before, layer.ffn_mix_r.get(), nullptr, C_, mixed);
        w.ffn_r.row(mixed, row);
    });
    float *hidden = w.hidden.floats(rows * F_), *r = w.row[0].floats(rows * C_),
          *out = w.row[1].floats(rows * std::max(A_, C_));
    multiply({{&layer.ffn_key, &w.ffn_k.get(), {hidden, F_, F_, false}},
              {&layer.ffn_receptance, &w.ffn_r.get(), {r, C_, C_, false}}});
    w.ffn_hidden.reset(kind_of(layer.ffn_value.format), rows, s_.hidden, true);
    for_rows(rows, [&](int64_t row, int) {
        kernels().squared_relu(hidden + row * F_, F_);
        w.ffn_hidden.row(hidden + row * F_, row);
    });
    if (rows <= FEW_ROWS)
        expect({number + 1 < s_.layers ? first_of(layers_[static_cast<size_t>(number + 1)]) : &head_});
    multiply({{&layer.ffn_value, &w.ffn_hidden.get(), {out, C_, C_, false}}});
    float* x = w.x.floats(0);
    for_rows(rows, [&](int64_t row, int) { kernels().gated_add(x + row * C_, r + row * C_, out + row * C_, C_); });
}

void Model::head(const float* x, int64_t rows, float* logits) {
    Work& w = *work_;
    w.head.reset(kind_of(head_.format), rows, s_.width);
    for_rows(rows, [&](int64_t row, int thread) {
        float* normed = w.of_thread(thread, C_);
        kernels().layer_norm(x + row * C_, ln_out_weight_.get(), ln_out_bias_.get(), eps_, s_.width, normed);
        w.head.row(normed, row);
    });
    multiply({{&head_, &w.head.get(), {logits, s_.vocab, s_.vocab, false}}});
}

}  // namespace fledge
