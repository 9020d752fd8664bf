// The C interface of the element-wise parts of training, used by fledge/kernels/fused/native.py, which checks all
// sizes.
#include <algorithm>

#include "buffer.h"
#include "cpu.h"
#include "export.h"
#include "threads.h"

using namespace fledge;

namespace {

constexpr int64_t BLOCK_ROWS = 256;        // of a kernel call; fixes the order of the sums over rows
constexpr int64_t BLOCK_ELEMENTS = 16384;  // of a call without rows

int64_t block_count(int64_t rows) { return (rows + BLOCK_ROWS - 1) / BLOCK_ROWS; }

// Calls f(rows, block) for every block of rows.
template <class F>
void for_row_blocks(int64_t rows, F&& f) {
    parallel_for(block_count(rows), [&](int64_t block, int) {
        f(RowRange{block * BLOCK_ROWS, std::min((block + 1) * BLOCK_ROWS, rows)}, block);
    });
}

// Calls f(start, count) for every block of elements. `elements` is a multiple of LANES.
template <class F>
void for_element_blocks(int64_t elements, F&& f) {
    parallel_for((elements + BLOCK_ELEMENTS - 1) / BLOCK_ELEMENTS, [&](int64_t block, int) {
        const int64_t start = block * BLOCK_ELEMENTS;
        f(start, std::min(BLOCK_ELEMENTS, elements - start));
    });
}

// Memory for a sum of `width` numbers from each block of rows.
class BlockSums {
   public:
    BlockSums(int64_t rows, int64_t width) : blocks_(block_count(rows)), width_(width) {
        std::fill_n(buffer_.reserve_floats(blocks_ * width), blocks_ * width, 0.0f);
    }

    float* block(int64_t index) const { return buffer_.floats() + index * width_; }

    // Writes the total of all blocks, in order.
    void total(float* out) const {
        parallel_for(width_ / LANES, 4 * blocks_ * width_, [&](int64_t part, int) {
            const int64_t end = (part + 1) * LANES;
            for (int64_t i = part * LANES; i < end; i++) out[i] = 0.0f;
            for (int64_t index = 0; index < blocks_; index++)
                for (int64_t i = part * LANES; i < end; i++) out[i] += block(index)[i];
        });
    }

   private:
    int64_t blocks_;
    int64_t width_;
    Buffer buffer_;
};

const char* offset_bytes(const void* data, int32_t element, int64_t index) {
    return static_cast<const char*>(data) + index * (element == ELEMENT_BF16 ? 2 : 4);
}

char* offset_bytes(void* data, int32_t element, int64_t index) {
    return static_cast<char*>(data) + index * (element == ELEMENT_BF16 ? 2 : 4);
}

// sizes: sequences, length, width, count.
MixParams mix_params(int32_t element, const int64_t* sizes, const float* x, const float* first, const uint8_t* starts,
                     const float* mix, const float* extra_mix) {
    MixParams p{};
    p.element = element;
    p.rows = sizes[0] * sizes[1];
    p.length = sizes[1];
    p.width = sizes[2];
    p.count = sizes[3];
    p.x = x;
    p.first = first;
    p.starts = starts;
    p.mix = mix;
    p.extra_mix = extra_mix;
    return p;
}

// sizes: rows, heads, head_size.
GatedNormParams gated_norm_params(int32_t element, const int64_t* sizes, float eps, const float* x, const void* gate,
                                  const float* weight, const float* bias) {
    GatedNormParams p{};
    p.element = element;
    p.heads = sizes[1];
    p.head_size = sizes[2];
    p.eps = eps;
    p.x = x;
    p.gate = gate;
    p.weight = weight;
    p.bias = bias;
    return p;
}

}  // namespace

// The arguments are those of MixParams. sizes: sequences, length, width, count.
FLEDGE_API int fledge_mix(int32_t element, const int64_t* sizes, const float* x, const float* first,
                          const uint8_t* starts, const float* mix, const float* extra_mix, void* const* y) {
    return catch_errors([&] {
        const CallLock lock;
        MixParams p = mix_params(element, sizes, x, first, starts, mix, extra_mix);
        p.y = y;
        for_row_blocks(p.rows, [&](RowRange rows, int64_t) { kernels().training.mix(p, rows); });
    });
}

// dextra_mix must not overlap extra_mix.
FLEDGE_API int fledge_mix_gradient(int32_t element, const int64_t* sizes, const float* x, const float* first,
                                   const uint8_t* starts, const float* mix, const float* extra_mix,
                                   const void* const* dy, float* dx, float* dfirst, float* dmix, float* dextra_mix) {
    return catch_errors([&] {
        const CallLock lock;
        MixParams p = mix_params(element, sizes, x, first, starts, mix, extra_mix);
        p.dy = dy;
        p.dx = dx;
        p.dfirst = dfirst;
        p.dextra_mix = dextra_mix;
        std::fill_n(dfirst, sizes[0] * p.width, 0.0f);
        const BlockSums sums(p.rows, p.count * p.width);
        for_row_blocks(p.rows, [&](RowRange rows, int64_t block) {
            MixParams part = p;
            part.dmix = sums.block(block);
            kernels().training.mix_gradient(part, rows);
        });
        sums.total(dmix);
    });
}

// The arguments are those of GatedNormParams. sizes: rows, heads, head_size.
FLEDGE_API int fledge_gated_norm(int32_t element, const int64_t* sizes, float eps, const float* x, const void* gate,
                                 const float* weight, const float* bias, void* y) {
    return catch_errors([&] {
        const CallLock lock;
        GatedNormParams p = gated_norm_params(element, sizes, eps, x, gate, weight, bias);
        p.y = y;
        for_row_blocks(sizes[0], [&](RowRange rows, int64_t) { kernels().training.gated_norm(p, rows); });
    });
}

FLEDGE_API int fledge_gated_norm_gradient(int32_t element, const int64_t* sizes, float eps, const float* x,
                                          const void* gate, const float* weight, const float* bias, const void* dy,
                                          float* dx, void* dgate, float* dweight, float* dbias) {
    return catch_errors([&] {
        const CallLock lock;
        GatedNormParams p = gated_norm_params(element, sizes, eps, x, gate, weight, bias);
        p.dy = dy;
        p.dx = dx;
        p.dgate = dgate;
        const int64_t width = p.heads * p.head_size;
        const BlockSums weight_sums(sizes[0], width);
        const BlockSums bias_sums(sizes[0], width);
        for_row_blocks(sizes[0], [&](RowRange rows, int64_t block) {
            GatedNormParams part = p;
            part.dweight = weight_sums.block(block);
            part.dbias = bias_sums.block(block);
            kernels().training.gated_norm_gradient(part, rows);
        });
        weight_sums.total(dweight);
        bias_sums.total(dbias);
    });
}

// The arguments are those of CrossEntropyParams. Overwrites the logits (rows, width) with their gradient.
FLEDGE_API int fledge_cross_entropy(int32_t element, int64_t rows, int64_t width, float pull, void* logits,
                                    const int64_t* targets, float* loss) {
    return catch_errors([&] {
        const CallLock lock;
        Buffer buffer;
        const int64_t scratch_size = round_up(width, LANES);
        float* scratch = buffer.reserve_floats(scratch_size * thread_count());
        constexpr int64_t ROWS = 8;  // of a part
        parallel_for((rows + ROWS - 1) / ROWS, [&](int64_t part, int thread) {
            const CrossEntropyParams p{element, width, pull, logits, targets, loss, scratch + thread * scratch_size};
            kernels().training.cross_entropy(p, {part * ROWS, std::min((part + 1) * ROWS, rows)});
        });
    });
}

FLEDGE_API int fledge_squared_relu(int32_t element, const void* x, int64_t n, void* y) {
    return catch_errors([&] {
        const CallLock lock;
        for_element_blocks(n, [&](int64_t start, int64_t count) {
            kernels().training.squared_relu(element, offset_bytes(x, element, start), count,
                                            offset_bytes(y, element, start));
        });
    });
}

FLEDGE_API int fledge_squared_relu_gradient(int32_t element, const void* x, const void* dy, int64_t n, void* dx) {
    return catch_errors([&] {
        const CallLock lock;
        for_element_blocks(n, [&](int64_t start, int64_t count) {
            kernels().training.squared_relu_gradient(element, offset_bytes(x, element, start),
                                                     offset_bytes(dy, element, start), count,
                                                     offset_bytes(dx, element, start));
        });
    });
}

FLEDGE_API int fledge_gated_value(int32_t element, const void* r, const void* v, int64_t n, float* y) {
    return catch_errors([&] {
        const CallLock lock;
        for_element_blocks(n, [&](int64_t start, int64_t count) {
            kernels().training.gated_value(element, offset_bytes(r, element, start), offset_bytes(v, element, start),
                                           count, y + start);
        });
    });
}

FLEDGE_API int fledge_gated_value_gradient(int32_t element, const void* r, const void* v, const float* dy, int64_t n,
                                           void* dr, void* dv) {
    return catch_errors([&] {
        const CallLock lock;
        for_element_blocks(n, [&](int64_t start, int64_t count) {
            kernels().training.gated_value_gradient(element, offset_bytes(r, element, start),
                                                    offset_bytes(v, element, start), dy + start, count,
                                                    offset_bytes(dr, element, start), offset_bytes(dv, element, start));
        });
    });
}

// factor = exp(-exp(base + x)). x, factor: (rows, width); base: (width).
FLEDGE_API int fledge_decay(int64_t rows, int64_t width, const float* x, const float* base, float* factor) {
    return catch_errors([&] {
        const CallLock lock;
        for_row_blocks(rows, [&](RowRange range, int64_t) {
            for (int64_t row = range.begin; row < range.end; row++)
                kernels().decay(x + row * width, base, width, factor + row * width);
        });
    });
}

// The gradients of x and base from that of the logarithm of the factor. dx may be dlog_decay.
FLEDGE_API int fledge_decay_gradient(int64_t rows, int64_t width, const float* x, const float* base,
                                     const float* dlog_decay, float* dx, float* dbase) {
    return catch_errors([&] {
        const CallLock lock;
        const BlockSums sums(rows, width);
        for_row_blocks(rows, [&](RowRange range, int64_t block) {
            for (int64_t row = range.begin; row < range.end; row++)
                kernels().training.decay_gradient(x + row * width, base, dlog_decay + row * width, width,
                                                  dx + row * width, sums.block(block));
        });
        sums.total(dbase);
    });
}
