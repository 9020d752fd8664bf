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
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
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

// Whether the processor has tiles for bf16 and int8, and the system lets this process use them. The permission is for
// the whole process and is kept by its children.
bool can_use_amx() {
    unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
    constexpr unsigned AMX_BITS = 1u << 22 | 1u << 24 | 1u << 25;  // bf16, tiles, int8
    if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) || (edx & AMX_BITS) != AMX_BITS) return false;
#if defined(__linux__)
    constexpr long REQUEST_PERMISSION = 0x1023;  // ARCH_REQ_XCOMP_PERM
    constexpr long TILE_DATA = 18;               // XFEATURE_XTILEDATA
    return syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
#else
    return false;
#endif
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
    const bool has_bf16 = has_avx512 && __builtin_cpu_supports("avx512vnni") && has_avx512_bf16();
    if (has_bf16) tables.push_back(&kernels_avx512_bf16);
    if (has_avx512) tables.push_back(&kernels_avx512);
    if (has_avx2) tables.push_back(&kernels_avx2);
#endif
    tables.push_back(&kernels_portable);
#if defined(__x86_64__)
    // Not used unless they are selected by name.
    if (has_bf16 && can_use_amx()) tables.push_back(&kernels_amx);
    if (has_bf16) tables.push_back(&kernels_tile_model);
#endif
    return tables;
}

const std::vector<const Kernels*>& supported_kernels() {
    static const std::vector<const Kernels*> tables = detect_kernels();
    return tables;
}

std::atomic<const Kernels*> selected_kernels{nullptr};            // for everything; null: no selection
std::atomic<const Kernels*> selected_products[ACTIVATION_KINDS];  // for products, unless `selected_kernels` is set

// Returns false if this processor does not support the instruction set. An empty name gives null.
bool find_kernels(const char* name, const Kernels*& found) {
    found = nullptr;
    if (!*name) return true;
    for (const Kernels* table : supported_kernels())
        if (!std::strcmp(table->name, name)) found = table;
    return found != nullptr;
}

}  // namespace

const Kernels& kernels() {
    const Kernels* selected = selected_kernels.load(std::memory_order_relaxed);
    return selected ? *selected : *supported_kernels().front();
}

const Kernels& product_kernels(ActivationKind kind) {
    const Kernels* selected = selected_kernels.load(std::memory_order_relaxed);
    if (!selected) selected = selected_products[kind].load(std::memory_order_relaxed);
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

// Selects an instruction set for everything. Empty: no selection. Returns 0, or -1 if this processor does not support
// it. Packed weights stay valid. Activations packed for one set must not be used with another, so the lock waits for
// running calls.
FLEDGE_API int fledge_select_instruction_set(const char* name) {
    const fledge::CallLock lock;
    const fledge::Kernels* table;
    if (!fledge::find_kernels(name, table)) return -1;
    fledge::selected_kernels.store(table);
    return 0;
}

// Selects the instruction set for the products of one ActivationKind, while none is selected for everything. Empty: the
// best one. Returns 0, or -1 for an unknown kind or an instruction set that this processor does not support.
FLEDGE_API int fledge_select_product_kernels(int32_t kind, const char* name) {
    const fledge::CallLock lock;
    const fledge::Kernels* table;
    if (kind < 0 || kind >= fledge::ACTIVATION_KINDS || !fledge::find_kernels(name, table)) return -1;
    fledge::selected_products[kind].store(table);
    return 0;
}

// The instruction set that the products of one ActivationKind use.
FLEDGE_API const char* fledge_product_kernels(int32_t kind) {
    return fledge::product_kernels(static_cast<fledge::ActivationKind>(kind)).name;
}

FLEDGE_API int fledge_abi() { return 8; }
