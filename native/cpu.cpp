#include "cpu.h"

#include <atomic>
#include <cstring>
#include <string>
#include <vector>

#include "export.h"
#include "threads.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace fledge {
namespace {

#if defined(__x86_64__)
// Some compilers have no name for these two features in __builtin_cpu_supports.
bool has_f16c() {
    unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
    return __get_cpuid(1, &eax, &ebx, &ecx, &edx) && (ecx >> 29 & 1);
}

bool has_avx512_bf16() {
    unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
    return __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) && (eax >> 5 & 1);
}
#endif

// Best first.
std::vector<const Kernels*> detect_kernels() {
    std::vector<const Kernels*> tables;
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool has_avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                            __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c();
    if (has_avx512 && __builtin_cpu_supports("avx512vnni") && has_avx512_bf16()) tables.push_back(&kernels_avx512_bf16);
    if (has_avx512) tables.push_back(&kernels_avx512);
    if (has_avx2) tables.push_back(&kernels_avx2);
#endif
    tables.push_back(&kernels_portable);
    return tables;
}

const std::vector<const Kernels*>& supported_kernels() {
    static const std::vector<const Kernels*> tables = detect_kernels();
    return tables;
}

std::atomic<const Kernels*> selected_kernels{nullptr};

}  // namespace

const Kernels& kernels() {
    const Kernels* selected = selected_kernels.load(std::memory_order_relaxed);
    return selected ? *selected : *supported_kernels().front();
}

}  // namespace fledge

// The names of the instruction sets that this processor supports, best first, separated by commas.
FLEDGE_API const char* fledge_instruction_sets() {
    static const std::string names = [] {
        std::string text;
        for (const fledge::Kernels* table : fledge::supported_kernels()) {
            if (!text.empty()) text += ',';
            text += table->name;
        }
        return text;
    }();
    return names.c_str();
}

FLEDGE_API const char* fledge_instruction_set() { return fledge::kernels().name; }

// Selects an instruction set (empty: the best one). Returns 0, or -1 if this processor does not support it.
// Packed weights stay valid. Activations packed for one set must not be used with another, so the lock waits for
// running calls.
FLEDGE_API int fledge_select_instruction_set(const char* name) {
    const fledge::CallLock lock;
    if (!*name) {
        fledge::selected_kernels.store(nullptr);
        return 0;
    }
    for (const fledge::Kernels* table : fledge::supported_kernels())
        if (!std::strcmp(table->name, name)) {
            fledge::selected_kernels.store(table);
            return 0;
        }
    return -1;
}

FLEDGE_API int fledge_abi() { return 7; }
