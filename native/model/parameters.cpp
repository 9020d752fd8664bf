// The parameters of a model: setting them by name, and checking that all are present.
#include <algorithm>
#include <cstring>

#include "model/workspace.h"

namespace fledge {
namespace {

template <class T>
struct NamedParameter {
    const char* name;
    T* parameter;
};

template <class T, size_t SIZE>
T* find_parameter(const NamedParameter<T> (&parameters)[SIZE], const char* name) {
    for (const NamedParameter<T>& p : parameters)
        if (!std::strcmp(p.name, name)) return p.parameter;
    return nullptr;
}

ParameterVector* find_vector(Layer& layer, const char* name) {
    const NamedParameter<ParameterVector> parameters[] = {
        {"ln1.weight", &layer.ln1_weight},
        {"ln1.bias", &layer.ln1_bias},
        {"ln2.weight", &layer.ln2_weight},
        {"ln2.bias", &layer.ln2_bias},
        {"att.ln_x.weight", &layer.ln_x_weight},
        {"att.ln_x.bias", &layer.ln_x_bias},
        {"att.mix_x", &layer.mix[MIX_X]},
        {"att.mix_w", &layer.mix[MIX_W]},
        {"att.mix_k", &layer.mix[MIX_K]},
        {"att.mix_v", &layer.mix[MIX_V]},
        {"att.mix_r", &layer.mix[MIX_R]},
        {"att.mix_g", &layer.mix[MIX_G]},
        {"att.decay", &layer.decay},
        {"att.bonus", &layer.bonus},
        {"ffn.mix_k", &layer.ffn_mix_k},
        {"ffn.mix_r", &layer.ffn_mix_r},
    };
    return find_parameter(parameters, name);
}

Matrix* find_matrix(Layer& layer, const char* name) {
    const NamedParameter<Matrix> parameters[] = {
        {"att.mix_down", &layer.mix_down},
        {"att.mix_up_w", &layer.mix_up[DECAY]},
        {"att.mix_up_k", &layer.mix_up[KEY]},
        {"att.mix_up_v", &layer.mix_up[VALUE]},
        {"att.mix_up_r", &layer.mix_up[RECEPTANCE]},
        {"att.mix_up_g", &layer.mix_up[GATE]},
        {"att.decay_down", &layer.decay_down},
        {"att.decay_up", &layer.decay_up},
        {"att.receptance.weight", &layer.receptance},
        {"att.key.weight", &layer.key},
        {"att.value.weight", &layer.value},
        {"att.gate.weight", &layer.gate},
        {"att.output.weight", &layer.output},
        {"ffn.key.weight", &layer.ffn_key},
        {"ffn.value.weight", &layer.ffn_value},
        {"ffn.receptance.weight", &layer.ffn_receptance},
    };
    return find_parameter(parameters, name);
}

bool has_shape(const Matrix& m, int64_t n, int64_t k) { return m.data && m.n == n && m.k == k; }

}  // namespace

void ParameterVector::set(const float* values, int64_t n) {
    float* memory = memory_->reserve_floats(pad_width(n));
    std::fill(memory, memory + pad_width(n), 0.0f);
    copy_floats(memory, values, n);
    n_ = n;
}

Model::Model(const ModelSizes& sizes, float eps, float head_eps)
    : sizes_(sizes), eps_(eps), head_eps_(head_eps), C_(pad_width(sizes.n_embd)), A_(pad_width(sizes.dim_att)),
      F_(pad_width(sizes.dim_ffn)), N_(sizes.n_head ? sizes.dim_att / sizes.n_head : 0),
      layers_(static_cast<size_t>(sizes.n_layer)), workspace_(std::make_shared<Workspace>()) {}

bool Model::set_vector(int64_t layer_index, const char* name, const float* values, int64_t n) {
    if (layer_index >= sizes_.n_layer) return false;
    const NamedParameter<ParameterVector> parameters[] = {
        {"ln0.weight", &ln0_weight_},
        {"ln0.bias", &ln0_bias_},
        {"ln_out.weight", &ln_out_weight_},
        {"ln_out.bias", &ln_out_bias_},
    };
    ParameterVector* vector = layer_index < 0 ? find_parameter(parameters, name)
                                              : find_vector(layers_[static_cast<size_t>(layer_index)], name);
    if (!vector) return false;
    vector->set(values, n);
    return true;
}

bool Model::set_matrix(int64_t layer_index, const char* name, const Matrix& weight) {
    if (layer_index >= sizes_.n_layer) return false;
    const NamedParameter<Matrix> parameters[] = {{"head.weight", &head_}};
    Matrix* matrix = layer_index < 0 ? find_parameter(parameters, name)
                                     : find_matrix(layers_[static_cast<size_t>(layer_index)], name);
    if (!matrix) return false;
    *matrix = weight;
    return true;
}

const char* Model::find_invalid_tensor() const {
    const int64_t C = sizes_.n_embd;
    if (!embedding_.data || embedding_.rows != sizes_.vocab_size || embedding_.width != C) return "emb.weight";
    if (!has_shape(head_, sizes_.vocab_size, C)) return "head.weight";
    for (const ParameterVector* v : {&ln0_weight_, &ln0_bias_, &ln_out_weight_, &ln_out_bias_})
        if (v->size() != C) return "ln0 or ln_out";
    for (const Layer& layer : layers_)
        if (const char* name = find_invalid_tensor(layer)) return name;
    return nullptr;
}

const char* Model::find_invalid_tensor(const Layer& layer) const {
    const int64_t C = sizes_.n_embd, A = sizes_.dim_att, F = sizes_.dim_ffn;
    for (const ParameterVector* v :
         {&layer.ln1_weight, &layer.ln1_bias, &layer.ln2_weight, &layer.ln2_bias, &layer.mix[MIX_K], &layer.mix[MIX_V],
          &layer.mix[MIX_R], &layer.ffn_mix_k, &layer.ffn_mix_r})
        if (v->size() != C) return "ln1, ln2 or a mix";
    for (const ParameterVector* v : {&layer.decay, &layer.bonus})
        if (v->size() != A) return "att.decay or att.bonus";
    if (sizes_.version > 4 && (layer.ln_x_weight.size() != A || layer.ln_x_bias.size() != A)) return "att.ln_x";
    for (const Matrix* m : {&layer.receptance, &layer.key, &layer.value})
        if (!has_shape(*m, A, C)) return "a matrix of att";
    if (!has_shape(layer.output, C, A)) return "a matrix of att";
    if (sizes_.has_gate && (!has_shape(layer.gate, A, C) || layer.mix[MIX_G].size() != C)) return "att.gate";
    if (!has_shape(layer.ffn_key, F, C) || !has_shape(layer.ffn_value, C, F) || !has_shape(layer.ffn_receptance, C, C))
        return "a matrix of ffn";
    if (sizes_.version < 6) return nullptr;
    if (layer.mix[MIX_X].size() != C || layer.mix[MIX_W].size() != C) return "att.mix_x or att.mix_w";
    if (!has_shape(layer.mix_down, PROJECTION_COUNT * sizes_.mix_rank, C)) return "att.mix_down";
    for (const Matrix& up : layer.mix_up)
        if (!has_shape(up, C, sizes_.mix_rank)) return "att.mix_up";
    if (!has_shape(layer.decay_down, sizes_.decay_rank, C) || !has_shape(layer.decay_up, A, sizes_.decay_rank))
        return "att.decay_down or _up";
    return nullptr;
}

}  // namespace fledge
