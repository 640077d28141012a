#include "dispatch.h"

#include <atomic>
#include <cstring>
#include <initializer_list>

#ifdef LAROSA_X86
#include <cpuid.h>
#endif
#if defined(LAROSA_AARCH64) && defined(__linux__)
#include <sys/auxv.h>
#elif defined(LAROSA_AARCH64) && defined(__APPLE__)
#include <sys/sysctl.h>
#endif

namespace larosa {
namespace {

#ifdef LAROSA_X86
// Where AVX2 is. Not every compiler that has the instructions knows of __builtin_cpu_supports("avxvnni").
bool has_avxvnni() {
#ifdef LAROSA_AVXVNNI_BY_AVX512
    return __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512vl");
#else
    unsigned eax, ebx, ecx, edx;
    return __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) && eax >> 4 & 1;
#endif
}

bool supported(const Kernels &kernels) {
    __builtin_cpu_init();
    if (&kernels == &avx512vnni::kernels) return supported(avx512::kernels) && __builtin_cpu_supports("avx512vnni");
    if (&kernels == &avx512::kernels)
        return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
               __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
               __builtin_cpu_supports("fma");
    if (&kernels == &avxvnni::kernels) return supported(avx2::kernels) && has_avxvnni();
    if (&kernels == &avx2::kernels)  // every processor with AVX2 converts half precision (F16C)
        return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    return true;
}
#elif defined(LAROSA_AARCH64)
bool supported(const Kernels &kernels) {
    if (&kernels != &neondotprod::kernels) return true;  // every 64-bit Arm processor has NEON
#if defined(__linux__)
    return getauxval(AT_HWCAP) >> 20 & 1;  // HWCAP_ASIMDDP
#elif defined(__APPLE__)
    int has = 0;
    size_t size = sizeof has;
    return sysctlbyname("hw.optional.arm.FEAT_DotProd", &has, &size, nullptr, 0) == 0 && has;
#else
    return false;
#endif
}
#else
bool supported(const Kernels &) { return true; }
#endif

bool fetches_near() {
#ifdef LAROSA_X86
    __builtin_cpu_init();
    return !__builtin_cpu_is("amd");
#else
    return true;
#endif
}

// Widest first.
const Kernels *const built[] = {
#ifdef LAROSA_X86
    &avx512vnni::kernels,  &avx512::kernels, &avxvnni::kernels, &avx2::kernels,
#endif
#ifdef LAROSA_AARCH64
    &neondotprod::kernels, &neon::kernels,
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

const bool kFetchNear = fetches_near();

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
    for (const char *other : {"avx2", "avxvnni", "avx512", "avx512vnni", "neon", "neondotprod"})
        if (std::strcmp(name, other) == 0) return 2;
    return 1;
}
