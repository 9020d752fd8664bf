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
// Two that __builtin_cpu_supports has no name for in some compilers.
bool has_half_floats() {
    unsigned a = 0, b = 0, c = 0, d = 0;
    return __get_cpuid(1, &a, &b, &c, &d) && (c >> 29 & 1);
}

bool has_bf16_products() {
    unsigned a = 0, b = 0, c = 0, d = 0;
    return __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 5 & 1);
}
#endif

// Best first.
std::vector<const Kernels*> usable() {
    std::vector<const Kernels*> found;
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_half_floats();
    if (avx512 && __builtin_cpu_supports("avx512vnni") && has_bf16_products()) found.push_back(&kernels_avx512_bf16);
    if (avx512) found.push_back(&kernels_avx512);
    if (avx2) found.push_back(&kernels_avx2);
#endif
    found.push_back(&kernels_portable);
    return found;
}

const std::vector<const Kernels*>& table() {
    static const std::vector<const Kernels*> found = usable();
    return found;
}

std::atomic<const Kernels*> chosen{nullptr};

}  // namespace

const Kernels& kernels() {
    const Kernels* now = chosen.load(std::memory_order_relaxed);
    return now ? *now : *table().front();
}

}  // namespace fledge

// Names of what this processor can run, best first, joined by commas.
FLEDGE_API const char* fledge_instruction_sets() {
    static const std::string names = [] {
        std::string text;
        for (const fledge::Kernels* k : fledge::table()) {
            if (!text.empty()) text += ',';
            text += k->name;
        }
        return text;
    }();
    return names.c_str();
}

FLEDGE_API const char* fledge_instruction_set() { return fledge::kernels().name; }

// Use one of them from now on (empty: the best). 0, or -1 where this processor cannot run it.
// Weights stay as they are; activations prepared for one set must not meet another, so calls that run end first.
FLEDGE_API int fledge_choose(const char* name) {
    fledge::Turn turn;
    if (!*name) return fledge::chosen.store(nullptr), 0;
    for (const fledge::Kernels* k : fledge::table())
        if (!std::strcmp(k->name, name)) return fledge::chosen.store(k), 0;
    return -1;
}

FLEDGE_API int fledge_abi() { return 6; }
