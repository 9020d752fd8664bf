// Memory for intermediate results, reused between calls.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <new>

namespace fledge {

// Memory that starts at a cache line. It grows but never shrinks, and its content is lost when it grows.
class Buffer {
   public:
    Buffer() = default;
    Buffer(const Buffer&) = delete;
    Buffer& operator=(const Buffer&) = delete;
    ~Buffer() { std::free(memory_); }

    // Ensures a size of at least `size` bytes.
    void* reserve_bytes(size_t size) {
        if (size <= size_ && memory_) return memory_;
        std::free(memory_);
        size_ = (size + 127) / 64 * 64;
        memory_ = std::aligned_alloc(64, size_);
        if (!memory_) {
            size_ = 0;
            throw std::bad_alloc();
        }
        return memory_;
    }

    float* reserve_floats(int64_t count) {
        return static_cast<float*>(reserve_bytes(static_cast<size_t>(count) * sizeof(float)));
    }

    float* floats() const { return static_cast<float*>(memory_); }  // what has been reserved

   private:
    void* memory_ = nullptr;
    size_t size_ = 0;
};

}  // namespace fledge
