#include "dispatch.h"

#include <atomic>
#include <cstring>
#include <initializer_list>

namespace larosa {
namespace {

bool supported(const Kernels &kernels) {
#ifdef LAROSA_X86
    __builtin_cpu_init();
    if (&kernels == &avx512vnni::kernels) return supported(avx512::kernels) && __builtin_cpu_supports("avx512vnni");
    if (&kernels == &avx512::kernels)
        return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
               __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
               __builtin_cpu_supports("fma");
    if (&kernels == &avx2::kernels)  // every processor with AVX2 converts half precision (F16C)
        return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#endif
    return &kernels == &portable::kernels;
}

// Widest first.
const Kernels *const built[] = {
#ifdef LAROSA_X86
    &avx512vnni::kernels,
    &avx512::kernels,
    &avx2::kernels,
#endif
    &portable::kernels,
};

const Kernels *widest() {
    for (const Kernels *kernels : built)
        if (supported(*kernels)) return kernels;
    return &portable::kernels;
}

std::atomic<const Kernels *> &chosen() {
    static std::atomic<const Kernels *> kernels{widest()};
    return kernels;
}

}  // namespace

const Kernels &kernels() { return *chosen().load(std::memory_order_relaxed); }

}  // namespace larosa

const char *larosa_isa(void) { return larosa::kernels().isa; }

int larosa_set_isa(const char *name) {
    for (const larosa::Kernels *kernels : larosa::built)
        if (std::strcmp(name, kernels->isa) == 0) {
            if (!larosa::supported(*kernels)) return 2;
            larosa::chosen() = kernels;
            return 0;
        }
    for (const char *other : {"avx2", "avx512", "avx512vnni"})
        if (std::strcmp(name, other) == 0) return 2;
    return 1;
}
