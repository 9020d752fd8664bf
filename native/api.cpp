// The C interface of models and recurrences. Sizes and ids are checked by the caller, fledge/models/native.py.
#include <algorithm>
#include <exception>

#include "export.h"
#include "model.h"
#include "pack.h"
#include "threads.h"

using namespace fledge;

FLEDGE_API Model* fledge_model_new(const int64_t* sizes, float eps, float head_eps) {
    try {
        const Sizes s{sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], sizes[5],
                      sizes[6], sizes[7], sizes[8], sizes[9], sizes[10]};
        return new Model(s, eps, head_eps);
    } catch (const std::exception&) {
        return nullptr;
    }
}

FLEDGE_API void fledge_model_free(Model* model) {
    Turn turn;
    delete model;
}

// 0, or -1 where the model has no such tensor. The values are copied.
FLEDGE_API int fledge_model_vector(Model* model, int64_t layer, const char* name, const float* values, int64_t n) {
    bool found = false;
    return guarded([&] { found = model->set_vector(layer, name, values, n); }) || !found ? -1 : 0;
}

// As above; the data stays the caller's and must outlive the model.
FLEDGE_API int fledge_model_matrix(Model* model, int64_t layer, const char* name, int32_t format, int64_t n, int64_t k,
                                   const uint8_t* data) {
    return model->set_matrix(layer, name, Matrix{format, n, k, data}) ? 0 : -1;
}

// (vocabulary, width), stored as in pack.h. Stays the caller's.
FLEDGE_API void fledge_model_embedding(Model* model, const void* data, int32_t stored, int64_t rows, int64_t width) {
    model->set_embedding({data, stored, rows, width});
}

// Null where everything is there, else the name of what is not.
FLEDGE_API const char* fledge_model_check(const Model* model) { return model->check(); }

// One forward pass. places: of each sequence its number of tokens; then of each the state it comes from; then of each
// its row there; then the sequences of every such state. before: the tensors of the first of these states (3, or 5 for
// RWKV-4), then those of the next; after: those of one new state. 0, or -1 where memory did not suffice.
FLEDGE_API int fledge_model_forward(Model* model, const int64_t* ids, int64_t rows, int64_t sequences,
                                    const int64_t* places, void* const* before, void* const* after, int32_t parts,
                                    float* logits, int32_t want) {
    return guarded([&] {
        Turn turn;
        const int64_t *lengths = places, *sources = lengths + sequences, *lines = sources + sequences,
                      *batches = lines + sequences;
        Batch batch{ids, rows, sequences, lengths, {}, {}, logits, want};
        batch.before = {reinterpret_cast<const float* const*>(before), batches, lines, sources, parts};
        for (int32_t i = 0; i < parts; i++) batch.after.tensor[i] = static_cast<float*>(after[i]);
        model->forward(batch);
    });
}

// The recurrence of RWKV-5 and 6. r, k, decay (B, T, H, K), v, y (B, T, H, V), u (H, K), states (B, H, K, V);
// contiguous.
FLEDGE_API int fledge_wkv(const int64_t* sizes, const float* r, const float* k, const float* v, const float* decay,
                          const float* u, const float* before, float* after, float* y) {
    return guarded([&] {
        Turn turn;
        const int64_t T = sizes[1], H = sizes[2], K = sizes[3], V = sizes[4];
        const int64_t each = (K + 3) * round_up(std::max(K, V), LANES);
        Buffer scratch;
        float* all = scratch.floats(each * threads());
        parallel(sizes[0] * H, [&](int64_t part, int thread) {
            const int64_t b = part / H, h = part % H;
            Wkv call{};
            call.length = T, call.keys = K, call.values = V;
            call.r = r + (b * T * H + h) * K, call.k = k + (b * T * H + h) * K,
            call.decay = decay + (b * T * H + h) * K;
            call.v = v + (b * T * H + h) * V, call.y = y + (b * T * H + h) * V;
            call.stride = call.w_stride = H * K, call.v_stride = call.y_stride = H * V;
            call.bonus = u + h * K;
            call.before = before + part * K * V, call.after = after + part * K * V;
            call.scratch = all + thread * each;
            kernels().wkv(call);
        });
    });
}

// Its gradient. dy and dafter: of y and of the state after; the results have the shapes of what they are gradients of,
// dw is that of the decay's logarithm, and du (B, H, K) has still to be summed over B.
FLEDGE_API int fledge_wkv_gradient(const int64_t* sizes, const float* r, const float* k, const float* v,
                                   const float* decay, const float* u, const float* before, const float* dy,
                                   const float* dafter, float* dr, float* dk, float* dv, float* dw, float* du,
                                   float* dbefore) {
    return guarded([&] {
        Turn turn;
        const int64_t T = sizes[1], H = sizes[2], K = sizes[3], V = sizes[4];
        const int64_t each = round_up(WkvGradient::scratch_floats(T, K, V), LANES);
        Buffer scratch;
        float* all = scratch.floats(each * threads());
        parallel(sizes[0] * H, [&](int64_t part, int thread) {
            const int64_t b = part / H, h = part % H;
            const int64_t keys = (b * T * H + h) * K, values = (b * T * H + h) * V, state = part * K * V;
            WkvGradient call{};
            call.length = T, call.keys = K, call.values = V;
            call.r = r + keys, call.k = k + keys, call.decay = decay + keys, call.v = v + values, call.dy = dy + values;
            call.stride = H * K, call.v_stride = H * V;
            call.bonus = u + h * K;
            call.before = before + state, call.dafter = dafter + state;
            call.dr = dr + keys, call.dk = dk + keys, call.dw = dw + keys, call.dv = dv + values;
            call.du = du + part * K, call.dbefore = dbefore + state;
            call.scratch = all + thread * each;
            kernels().wkv_gradient(call);
        });
    });
}

// RWKV-4. k, v, w, y (B, T, A) with A a multiple of 16; u (A); aa, bb, pp (B, A), changed in place. w: log of the
// decay.
FLEDGE_API int fledge_wkv4(const int64_t* sizes, const float* k, const float* v, const float* w, const float* u,
                           float* aa, float* bb, float* pp, float* y) {
    return guarded([&] {
        Turn turn;
        const int64_t T = sizes[1], A = sizes[2], blocks = A / LANES;
        parallel(sizes[0] * blocks, [&](int64_t part, int) {
            const int64_t b = part / blocks, channel = part % blocks * LANES;
            const int64_t at = b * T * A + channel, sums = b * A + channel;
            Wkv4 call{};
            call.length = T, call.width = LANES, call.stride = call.w_stride = A;
            call.k = k + at, call.v = v + at, call.w = w + at, call.u = u + channel;
            call.aa = aa + sums, call.bb = bb + sums, call.pp = pp + sums, call.y = y + at;
            kernels().wkv4(call);
        });
    });
}
