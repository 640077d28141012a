// Vectors of LAROSA_LANES floats, and how weights of each dtype become such vectors.
//
// These are the compiler's own vector types (g++ and clang), so one source serves every instruction set. Where a way of
// its own is faster, LAROSA_LANES of 16 stands for AVX-512, of 8 for AVX2, and LAROSA_NEON for NEON. Everything is in a
// namespace of the instruction set's name, and nothing of the standard library's is called: an inline function that two
// copies share would be kept once, perhaps with instructions that the processor lacks.
#pragma once

#include <stddef.h>
#include <stdint.h>

#if LAROSA_LANES > 4
#include <immintrin.h>
#elif defined(LAROSA_NEON)
#include <arm_neon.h>
#endif

#include "../larosa_cpu.h"

// Before each loop over sums that are to be in registers: where instructions are called by name, compilers unroll too late
// for an array to leave memory.
#define LAROSA_UNROLLED _Pragma("GCC unroll 16")

namespace larosa {
namespace LAROSA_ISA {

constexpr int64_t kLanes = LAROSA_LANES;

typedef float Floats __attribute__((vector_size(4 * LAROSA_LANES)));
typedef uint32_t Words __attribute__((vector_size(4 * LAROSA_LANES)));
typedef uint16_t Halves __attribute__((vector_size(2 * LAROSA_LANES)));
typedef int32_t Integers __attribute__((vector_size(4 * LAROSA_LANES)));
typedef int8_t Bytes __attribute__((vector_size(LAROSA_LANES)));
typedef double Doubles __attribute__((vector_size(8 * LAROSA_LANES)));

template <class To, class From>
inline To bits(From from) {
    static_assert(sizeof(To) == sizeof(From), "the same bits");
    To to;
    __builtin_memcpy(&to, &from, sizeof to);
    return to;
}

inline Floats splat(float x) { return x - Floats{}; }

// a * b + c, rounded once where the instruction set can. It is the only way to that: the compiler is not to fuse operators,
// for each compiler does so in other places, and then bits differ between them.
inline Floats multiply_add(Floats a, Floats b, Floats c) {
#if LAROSA_LANES == 16
    return _mm512_fmadd_ps(a, b, c);
#elif LAROSA_LANES == 8
    return _mm256_fmadd_ps(a, b, c);
#elif defined(LAROSA_NEON)
    return vfmaq_f32(c, a, b);
#elif defined(__FP_FAST_FMAF)
    for (int i = 0; i < kLanes; ++i) c[i] = __builtin_fmaf(a[i], b[i], c[i]);
    return c;
#else
    return a * b + c;
#endif
}

inline Floats multiply_add(float a, Floats b, Floats c) { return multiply_add(splat(a), b, c); }

// How an element is stored, and a vector of them as floats. Two vectors of a "mixed" type are cheaper to have as the
// even and the odd elements than in order.
struct Float32 {
    using Element = float;
    using Stored = Floats;
    static constexpr bool mixed = false;
    static Floats widen(Stored x) { return x; }
};

struct BFloat16 {
    using Element = uint16_t;
    using Stored = Halves;
    static constexpr bool mixed = true;
    static Floats widen(Stored x) { return bits<Floats>(__builtin_convertvector(x, Words) << 16); }
};

struct Float16 {
    using Element = uint16_t;
    using Stored = Halves;
    static constexpr bool mixed = false;
#if LAROSA_LANES == 16
    static Floats widen(Stored x) { return bits<Floats>(_mm512_cvtph_ps(bits<__m256i>(x))); }
#elif LAROSA_LANES == 8
    static Floats widen(Stored x) { return bits<Floats>(_mm256_cvtph_ps(bits<__m128i>(x))); }
#elif defined(LAROSA_NEON)
    static Floats widen(Stored x) { return bits<Floats>(vcvt_f32_f16(bits<float16x4_t>(x))); }
#else
    // Moved to where a float has them, exponent and mantissa are too small by 2^112, subnormals included.
    static Floats widen(Stored x) {
        const Words word = __builtin_convertvector(x, Words);
        const Floats scaled = bits<Floats>((word & 0x7fffu) << 13) * 0x1p112f;
        const Words special = bits<Words>(scaled >= 65536.0f) & 0x7f800000u;  // infinity and NaN
        return bits<Floats>(bits<Words>(scaled) | special | ((word & 0x8000u) << 16));
    }
#endif
};

struct Int8 {
    using Element = int8_t;
    using Stored = Bytes;
    static constexpr bool mixed = false;
    // The compilers make a slow way through memory of __builtin_convertvector here.
#if LAROSA_LANES == 16
    static Floats widen(Stored x) { return bits<Floats>(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bits<__m128i>(x)))); }
#elif LAROSA_LANES == 8
    static Floats widen(Stored x) {
        return bits<Floats>(_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_cvtsi64_si128(bits<long long>(x)))));
    }
#elif defined(LAROSA_NEON)
    static Floats widen(Stored x) {
        const int16x8_t pairs = vmovl_s8(vreinterpret_s8_s32(vdup_n_s32(bits<int32_t>(x))));
        return bits<Floats>(vcvtq_f32_s32(vmovl_s16(vget_low_s16(pairs))));
    }
#else
    // Each byte becomes the highest of four, by two interleavings with zeros.
    static Floats widen(Stored x) {
        static_assert(kLanes == 4, "half of eight bytes");
        typedef int8_t Wide __attribute__((vector_size(16)));
        typedef int16_t Pairs __attribute__((vector_size(16)));
        const Wide wide = bits<Wide>(Integers{bits<int32_t>(x), 0, 0, 0});
        const Pairs pairs = bits<Pairs>(__builtin_shufflevector(Wide{}, wide, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21,
                                                                6, 22, 7, 23));
        const Integers high = bits<Integers>(__builtin_shufflevector(Pairs{}, pairs, 0, 8, 1, 9, 2, 10, 3, 11));
        return __builtin_convertvector(high >> 24, Floats);
    }
#endif
};

template <class Type>
inline Floats load(const typename Type::Element *from) {
    typename Type::Stored stored;
    __builtin_memcpy(&stored, from, sizeof stored);
    return Type::widen(stored);
}

// 2 kLanes elements; of a mixed type first the even and then the odd ones.
template <class Type>
inline void load_pair(const typename Type::Element *from, Floats *pair) {
    if constexpr (Type::mixed) {
        Words words;
        __builtin_memcpy(&words, from, sizeof words);
        pair[0] = bits<Floats>(words << 16);
        pair[1] = bits<Floats>(words & 0xffff0000u);
    } else {
        pair[0] = load<Type>(from);
        pair[1] = load<Type>(from + kLanes);
    }
}

// The first `count` < kLanes elements, and zeros.
template <class Type>
inline Floats load_some(const typename Type::Element *from, int64_t count) {
    typename Type::Stored stored = {};
    for (int64_t i = 0; i < count; ++i) stored[i] = from[i];
    return Type::widen(stored);
}

inline Floats load(const float *from) { return load<Float32>(from); }
inline Floats load_some(const float *from, int64_t count) { return load_some<Float32>(from, count); }
inline void store(float *to, Floats x) { __builtin_memcpy(to, &x, sizeof x); }
inline void store_some(float *to, Floats x, int64_t count) {
    for (int64_t i = 0; i < count; ++i) to[i] = x[i];
}

// Calls f(Type{}) for a dtype of numbers with a point.
template <class Function>
inline auto with_type(int64_t dtype, Function f) {
    if (dtype == LAROSA_BFLOAT16) return f(BFloat16{});
    if (dtype == LAROSA_FLOAT16) return f(Float16{});
    return f(Float32{});
}

// The same for any dtype.
template <class Function>
inline auto with_any_type(int64_t dtype, Function f) {
    return dtype == LAROSA_INT8 ? f(Int8{}) : with_type(dtype, f);
}

// `count` <= kLanes elements of a vector of any dtype from element `at` on, the rest zeros.
inline Floats load_vector(const larosa_vector &from, int64_t at, int64_t count) {
    return with_type(from.dtype, [&](auto type) {
        using Type = decltype(type);
        const auto *data = static_cast<const typename Type::Element *>(from.data) + at;
        return count == kLanes ? load<Type>(data) : load_some<Type>(data, count);
    });
}

// Calls f(at, count) for each vector of `width` elements: count is kLanes but perhaps the last time.
template <class Function>
inline void for_vectors(int64_t width, Function f) {
    int64_t at = 0;
    for (; at + kLanes <= width; at += kLanes) f(at, kLanes);
    if (at < width) f(at, width - at);
}

inline Floats load_at(const float *from, int64_t at, int64_t count) {
    return count == kLanes ? load(from + at) : load_some(from + at, count);
}

inline void store_at(float *to, int64_t at, Floats x, int64_t count) {
    if (count == kLanes) {
        store(to + at, x);
    } else {
        store_some(to + at, x, count);
    }
}

template <int64_t lanes>
struct Lanes {
    typedef float Vector __attribute__((vector_size(4 * lanes)));
};

// The lanes' sum, by halves, without a way through memory.
template <int64_t lanes = kLanes>
inline float sum(typename Lanes<lanes>::Vector x) {
    if constexpr (lanes == 2) {
        return x[0] + x[1];
    } else {
        typename Lanes<lanes / 2>::Vector halves[2];
        __builtin_memcpy(halves, &x, sizeof halves);
        return sum<lanes / 2>(halves[0] + halves[1]);
    }
}

inline double sum(const Doubles &x) {
    double total = 0;
    for (int64_t i = 0; i < kLanes; ++i) total += x[i];
    return total;
}

// e^x to 2 units in the last place; NaN, infinities and subnormal results included.
inline Floats exp(Floats x) {
    x = x > 89.0f ? splat(89.0f) : x;     // overflows
    x = x < -104.0f ? splat(-104.0f) : x; // vanishes
    // x = n ln 2 + r, n rounded by adding a number so large that no fraction has room.
    const Floats large = multiply_add(1.44269504088896341f, x, splat(12582912.0f));
    const Floats n = large - 12582912.0f;
    const Floats r = multiply_add(-1.42860682030941723e-6f, n, multiply_add(-0.693145751953125f, n, x));
    constexpr float terms[] = {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f};
    Floats power = splat(1.0f / 5040);
    for (const float term : terms) power = multiply_add(power, r, splat(term));
    // 2^n in two factors, for one alone can be too small or too large for a float. n + 256 > 0.
    const Words biased = bits<Words>(large) - 0x4b400000u + 256u;
    const Words first = biased >> 1;
    const Words second = biased - first;
    return power * bits<Floats>((first - 1u) << 23) * bits<Floats>((second - 1u) << 23);
}

inline float exp(float x) { return exp(splat(x))[0]; }

}  // namespace LAROSA_ISA
}  // namespace larosa
