// The C interface of models, used by fledge/models/native_model.py, which checks sizes and ids.
#include <exception>

#include "export.h"
#include "model/model.h"
#include "threads.h"

using namespace fledge;

// sizes: the fields of ModelSizes.
FLEDGE_API Model* fledge_model_new(const int64_t* sizes, float eps, float head_eps) {
    try {
        const ModelSizes model_sizes{sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], sizes[5],
                                     sizes[6], sizes[7], sizes[8], sizes[9], sizes[10]};
        return new Model(model_sizes, eps, head_eps);
    } catch (const std::exception&) {
        return nullptr;
    }
}

FLEDGE_API void fledge_model_free(Model* model) {
    const CallLock lock;
    delete model;
}

// Sets a vector. The values are copied. Returns 0, or -1 if the model has no such tensor or memory is exhausted.
FLEDGE_API int fledge_model_set_vector(Model* model, int64_t layer, const char* name, const float* values, int64_t n) {
    bool exists = false;
    const int status = catch_errors([&] { exists = model->set_vector(layer, name, values, n); });
    return status || !exists ? -1 : 0;
}

// Sets a packed matrix. The data is not copied and must outlive the model. Returns 0, or -1 if the model has no such
// tensor.
FLEDGE_API int fledge_model_set_matrix(Model* model, int64_t layer, const char* name, int32_t format, int64_t n,
                                       int64_t k, const uint8_t* data) {
    return model->set_matrix(layer, name, Matrix{format, n, k, data}) ? 0 : -1;
}

// Sets the embedding (vocab_size, width). type: a SourceType of pack.h. The data is not copied.
FLEDGE_API void fledge_model_set_embedding(Model* model, const void* data, int32_t type, int64_t rows, int64_t width) {
    model->set_embedding({data, type, rows, width});
}

// Returns null if the model is complete, otherwise the name of a tensor that is missing or has the wrong size.
FLEDGE_API const char* fledge_model_check(const Model* model) { return model->find_invalid_tensor(); }

// Runs one forward pass. sequence_table: the number of tokens of every sequence; then the batched state that each
// sequence uses; then its row in that state; then the number of sequences of every batched state. state_in: the tensors
// of the first batched state (3, or 5 for RWKV-4), then those of the next. state_out: the tensors of one new state.
// logits_mode: a LogitsMode. Returns 0, or -1 if memory is exhausted.
FLEDGE_API int fledge_model_forward(Model* model, const int64_t* ids, int64_t rows, int64_t sequences,
                                    const int64_t* sequence_table, void* const* state_in, void* const* state_out,
                                    int32_t tensors_per_state, float* logits, int32_t logits_mode) {
    return catch_errors([&] {
        const CallLock lock;
        const int64_t* lengths = sequence_table;
        const int64_t* state_indices = lengths + sequences;
        const int64_t* state_rows = state_indices + sequences;
        const int64_t* batch_sizes = state_rows + sequences;
        Batch batch{ids, rows, sequences, lengths, {}, {}, logits, logits_mode};
        batch.state_in = {reinterpret_cast<const float* const*>(state_in), batch_sizes, state_rows, state_indices,
                          tensors_per_state};
        for (int32_t i = 0; i < tensors_per_state; i++) batch.state_out.tensor[i] = static_cast<float*>(state_out[i]);
        model->forward(batch);
    });
}
