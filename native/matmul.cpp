#include "matmul.h"

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <new>

namespace fledge {

Buffer::~Buffer() { std::free(memory_); }

void* Buffer::bytes(size_t count) {
    if (count <= size_ && memory_) return memory_;
    std::free(memory_);
    size_ = (count + 127) / 64 * 64;
    memory_ = std::aligned_alloc(64, size_);
    if (!memory_) {
        size_ = 0;
        throw std::bad_alloc();
    }
    return memory_;
}

void Prepared::reset(Kind kind, int64_t rows, int64_t k, bool sparse) {
    const int64_t padded = round_up(k, GROUP), groups = padded / GROUP;
    view_.kind = kind, view_.rows = rows, view_.k = k, view_.padded = padded;
    // A cache line more than a row: rows that lie a power of two apart would share their places in the cache.
    view_.pitch = kind == FLOATS ? padded : padded / 2;
    if (rows > 1) view_.pitch += LANES;
    view_.data = data_.bytes(static_cast<size_t>(rows * view_.pitch * 4));
    view_.scale = view_.total = nullptr;
    if (kind == I16_PAIRS) {
        view_.scale = scale_.floats(2 * rows * groups);
        view_.total = view_.scale + rows * groups;
    }
    view_.alive = view_.alive_from = nullptr;
    if (sparse && rows == 1 && kind != FLOATS) {
        view_.alive =
            static_cast<int32_t*>(alive_.bytes(static_cast<size_t>(padded / 2 + groups + 1) * sizeof(int32_t)));
        view_.alive_from = view_.alive + padded / 2;
        view_.alive_from[0] = 0;
    }
}

void Prepared::row(const float* x, int64_t number) const { kernels().prepare(x, number, view_); }

namespace {

// A thread's running totals. Kept between calls: a prompt needs the same room again and again.
std::vector<std::unique_ptr<Buffer>>& scratch() {
    static auto& buffers = *new std::vector<std::unique_ptr<Buffer>>;  // threads may outlive the end of main
    return buffers;
}

}  // namespace

void expect(const std::vector<const Matrix*>& weights) {
    constexpr int64_t MOST = 192 << 10;  // bytes; what the second cache holds beside everything else
    const int count = threads();
    int64_t parts = 0;
    for (const Matrix* w : weights) parts += w->panels();
    for (int thread = 0; thread < count; thread++) {
        int64_t part = parts * thread / count;
        for (const Matrix* w : weights) {
            if (part >= w->panels()) {
                part -= w->panels();
                continue;
            }
            expect(thread, w->data + part * w->panel_bytes(), std::min(MOST, (w->panels() - part) * w->panel_bytes()));
            break;
        }
    }
}

void multiply(const std::vector<Product>& products) {
    auto& buffers = scratch();
    while (static_cast<int>(buffers.size()) < threads()) buffers.push_back(std::make_unique<Buffer>());
    int64_t parts = 0, rows = 0, work = 0;
    for (const Product& p : products) {
        parts += p.weight->panels();
        rows = std::max(rows, p.x->rows);
        work += p.weight->panels() * p.weight->panel_bytes() * p.x->rows;
    }
    if (rows == 0) return;
    for (auto& buffer : buffers) buffer->floats(rows * PANEL);
    const Kernels& k = kernels();
    parallel(parts, work, [&](int64_t part, int thread) {
        for (const Product& p : products) {
            if (part >= p.weight->panels()) {
                part -= p.weight->panels();
                continue;
            }
            k.panel(*p.weight, part, *p.x, buffers[static_cast<size_t>(thread)]->floats(rows * PANEL), p.out);
            return;
        }
    });
}

}  // namespace fledge
