// Products y = x W^T of several weights in one go, cut into panels that threads take one by one.
#pragma once
#include <cstddef>
#include <vector>

#include "isa/tables.h"

namespace fledge {

// Memory that starts on a cache line; grows, never shrinks.
class Buffer {
   public:
    Buffer() = default;
    Buffer(const Buffer&) = delete;
    ~Buffer();
    void* bytes(size_t count);  // at least so many; the content is lost when it grows
    float* floats(int64_t count) { return static_cast<float*>(bytes(static_cast<size_t>(count) * sizeof(float))); }

   private:
    void* memory_ = nullptr;
    size_t size_ = 0;
};

// Activations with the memory behind them.
class Prepared {
   public:
    // Room for `rows` rows of `k` inputs. `sparse`: note which pairs are zero, so that a single row can skip them.
    void reset(Kind kind, int64_t rows, int64_t k, bool sparse = false);
    void row(const float* x, int64_t number) const;
    const Activations& get() const { return view_; }

   private:
    Activations view_{};
    Buffer data_, scale_, alive_;
};

struct Product {
    const Matrix* weight;
    const Activations* x;
    Output out;
};

void multiply(const std::vector<Product>& products);

// The weights of the products after the next task, for single rows, whose time is that of reading them.
void expect(const std::vector<const Matrix*>& weights);

// f(row, thread) for every row, some neighbours by one thread. A few rows are not worth waking anybody.
template <class F>
void for_rows(int64_t rows, F&& f);

}  // namespace fledge

#include "cpu.h"
#include "threads.h"

namespace fledge {

template <class F>
void for_rows(int64_t rows, F&& f) {
    constexpr int64_t FEW = 2, MOST = 12;
    if (rows <= FEW) {
        for (int64_t row = 0; row < rows; row++) f(row, 0);
        return;
    }
    // The fewer, the finer they are shared out: a batch of 16 in blocks of 12 would keep one thread waiting.
    const int64_t share = rows / (4 * threads()), block = share < 1 ? 1 : share > MOST ? MOST : share;
    parallel((rows + block - 1) / block, [&](int64_t part, int thread) {
        const int64_t end = (part + 1) * block < rows ? (part + 1) * block : rows;
        for (int64_t row = part * block; row < end; row++) f(row, thread);
    });
}

}  // namespace fledge
