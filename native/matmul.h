// Products y = x W^T of several weights in one task, split into panels that the threads take one by one.
#pragma once
#include <algorithm>
#include <vector>

#include "buffer.h"
#include "cpu.h"
#include "isa/tables.h"
#include "threads.h"

namespace fledge {

// Activations and the memory that holds them.
class ActivationBuffer {
   public:
    // Prepares for `rows` rows of `k` inputs. skip_zeros: list the nonzero pairs, so that the product of a single row
    // can skip the others.
    void reset(ActivationKind kind, int64_t rows, int64_t k, bool skip_zeros = false);
    void set_row(const float* x, int64_t row) const;
    const Activations& get() const { return activations_; }

   private:
    Activations activations_{};
    Buffer data_;
    Buffer scale_;
    Buffer nonzero_pairs_;
};

struct Product {
    const Matrix* weight;
    const Activations* x;
    Output out;
};

void multiply(const std::vector<Product>& products);

// Sets the weights of the products after the next task. Useful for few rows, which take as long as reading the weights.
void prefetch_next(const std::vector<const Matrix*>& weights);

// Calls f(row, thread) for every row. Adjacent rows go to the same thread. Few rows are not worth waking other threads.
template <class F>
void parallel_rows(int64_t rows, F&& f) {
    constexpr int64_t MAX_SERIAL_ROWS = 2;
    constexpr int64_t MAX_BLOCK_ROWS = 12;
    if (rows <= MAX_SERIAL_ROWS) {
        for (int64_t row = 0; row < rows; row++) f(row, 0);
        return;
    }
    // Few rows are split into small blocks: with blocks of 12, a batch of 16 would leave one thread idle.
    const int64_t block = std::clamp<int64_t>(rows / (4 * thread_count()), 1, MAX_BLOCK_ROWS);
    parallel_for((rows + block - 1) / block, [&](int64_t part, int thread) {
        const int64_t end = std::min((part + 1) * block, rows);
        for (int64_t row = part * block; row < end; row++) f(row, thread);
    });
}

}  // namespace fledge
