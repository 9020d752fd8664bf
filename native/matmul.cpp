#include "matmul.h"

#include <algorithm>
#include <memory>

namespace fledge {

void ActivationBuffer::reset(ActivationKind kind, int64_t rows, int64_t k, bool skip_zeros) {
    Activations& a = activations_;
    const int64_t padded = round_up(k, GROUP);
    const int64_t groups = padded / GROUP;
    a.kind = kind;
    a.rows = rows;
    a.k = k;
    a.padded = padded;
    a.pitch = kind == FLOATS ? padded : padded / 2;
    // One cache line more per row: rows at a distance of a power of two would compete for the same cache sets.
    if (rows > 1) a.pitch += LANES;
    a.data = data_.reserve_bytes(static_cast<size_t>(round_up(rows, ROW_PADDING) * a.pitch * 4));
    a.scale = nullptr;
    a.total = nullptr;
    if (kind == I16_PAIRS) {
        a.scale = scale_.reserve_floats(2 * rows * groups);
        a.total = a.scale + rows * groups;
    }
    a.nonzero_pairs = nullptr;
    a.nonzero_starts = nullptr;
    if (skip_zeros && rows == 1 && kind != FLOATS) {
        const auto count = static_cast<size_t>(padded / 2 + groups + 1);
        a.nonzero_pairs = static_cast<int32_t*>(nonzero_pairs_.reserve_bytes(count * sizeof(int32_t)));
        a.nonzero_starts = a.nonzero_pairs + padded / 2;
        a.nonzero_starts[0] = 0;
    }
}

void ActivationBuffer::set_row(const float* x, int64_t row) const {
    product_kernels(activations_.kind).pack_row(x, row, activations_);
}

namespace {

// The running sums of each thread. Kept between calls, because every chunk of a prompt needs the same amount.
std::vector<std::unique_ptr<Buffer>>& sum_buffers() {
    static auto& buffers = *new std::vector<std::unique_ptr<Buffer>>;  // threads may still run after main ends
    return buffers;
}

}  // namespace

void prefetch_next(const std::vector<const Matrix*>& weights) {
    constexpr int64_t MAX_BYTES = 192 << 10;  // fits into the level-2 cache beside the other data
    const int count = thread_count();
    int64_t parts = 0;
    for (const Matrix* w : weights) parts += w->panels();
    for (int thread = 0; thread < count; thread++) {
        int64_t panel = parts * thread / count;
        for (const Matrix* w : weights) {
            if (panel >= w->panels()) {
                panel -= w->panels();
                continue;
            }
            const int64_t bytes = (w->panels() - panel) * w->panel_bytes();
            prefetch_next(thread, w->data + panel * w->panel_bytes(), std::min(MAX_BYTES, bytes));
            break;
        }
    }
}

void multiply(const std::vector<Product>& products) {
    auto& buffers = sum_buffers();
    while (static_cast<int>(buffers.size()) < thread_count()) buffers.push_back(std::make_unique<Buffer>());
    int64_t parts = 0;
    int64_t rows = 0;
    int64_t bytes = 0;
    for (const Product& p : products) {
        parts += p.weight->panels();
        rows = std::max(rows, p.x->rows);
        bytes += p.weight->panels() * p.weight->panel_bytes() * p.x->rows;
    }
    if (rows == 0) return;
    for (auto& buffer : buffers) buffer->reserve_floats(round_up(rows, ROW_PADDING) * PANEL);
    parallel_for(parts, bytes, [&](int64_t part, int thread) {
        int64_t panel = part;
        for (const Product& p : products) {
            if (panel < p.weight->panels()) {
                product_kernels(p.x->kind).multiply_panel(*p.weight, panel, *p.x,
                                                          buffers[static_cast<size_t>(thread)]->floats(), p.out);
                return;
            }
            panel -= p.weight->panels();
        }
    });
}

}  // namespace fledge
