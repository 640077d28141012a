// Vectors of 4 kLanes bytes: how those of four columns come together, and their dot products by fours.
#pragma once

#ifdef __ARM_FEATURE_DOTPROD
#include <arm_neon.h>
#endif

#include "vector.h"

namespace larosa {
namespace LAROSA_ISA {

typedef int16_t Shorts __attribute__((vector_size(4 * LAROSA_LANES)));

inline Integers load_bytes(const uint8_t *from) {
    Integers bytes;
    __builtin_memcpy(&bytes, from, sizeof bytes);
    return bytes;
}

// Bytes, or pairs of bytes, of a and b by turns: of the low or the high half of each 16 bytes.
#if defined(__AVX512BW__)
inline __m512i raw(Integers x) { return bits<__m512i>(x); }
inline Integers low_bytes(Integers a, Integers b) { return bits<Integers>(_mm512_unpacklo_epi8(raw(a), raw(b))); }
inline Integers high_bytes(Integers a, Integers b) { return bits<Integers>(_mm512_unpackhi_epi8(raw(a), raw(b))); }
inline Integers low_pairs(Integers a, Integers b) { return bits<Integers>(_mm512_unpacklo_epi16(raw(a), raw(b))); }
inline Integers high_pairs(Integers a, Integers b) { return bits<Integers>(_mm512_unpackhi_epi16(raw(a), raw(b))); }
#elif defined(__AVX2__)
inline __m256i raw(Integers x) { return bits<__m256i>(x); }
inline Integers low_bytes(Integers a, Integers b) { return bits<Integers>(_mm256_unpacklo_epi8(raw(a), raw(b))); }
inline Integers high_bytes(Integers a, Integers b) { return bits<Integers>(_mm256_unpackhi_epi8(raw(a), raw(b))); }
inline Integers low_pairs(Integers a, Integers b) { return bits<Integers>(_mm256_unpacklo_epi16(raw(a), raw(b))); }
inline Integers high_pairs(Integers a, Integers b) { return bits<Integers>(_mm256_unpackhi_epi16(raw(a), raw(b))); }
#else
typedef int8_t Wide __attribute__((vector_size(16)));
inline Integers low_bytes(Integers a, Integers b) {
    return bits<Integers>(__builtin_shufflevector(bits<Wide>(a), bits<Wide>(b), 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5,
                                                  21, 6, 22, 7, 23));
}
inline Integers high_bytes(Integers a, Integers b) {
    return bits<Integers>(__builtin_shufflevector(bits<Wide>(a), bits<Wide>(b), 8, 24, 9, 25, 10, 26, 11, 27, 12, 28,
                                                  13, 29, 14, 30, 15, 31));
}
inline Integers low_pairs(Integers a, Integers b) {
    return bits<Integers>(__builtin_shufflevector(bits<Shorts>(a), bits<Shorts>(b), 0, 8, 1, 9, 2, 10, 3, 11));
}
inline Integers high_pairs(Integers a, Integers b) {
    return bits<Integers>(__builtin_shufflevector(bits<Shorts>(a), bits<Shorts>(b), 4, 12, 5, 13, 6, 14, 7, 15));
}
#endif

// What the dot products of bytes below want added to each code, to be subtracted from the sum again.
#if defined(__AVX512VNNI__)
constexpr int32_t kByteOffset = 128;
#else
constexpr int32_t kByteOffset = 0;
#endif

#if defined(__AVX512VNNI__) || defined(__ARM_FEATURE_DOTPROD)
#elif defined(__AVX512BW__)
inline Integers pairs_dot(Shorts a, Shorts b) {
    return bits<Integers>(_mm512_madd_epi16(bits<__m512i>(a), bits<__m512i>(b)));
}
#elif defined(__AVX2__)
inline Integers pairs_dot(Shorts a, Shorts b) {
    return bits<Integers>(_mm256_madd_epi16(bits<__m256i>(a), bits<__m256i>(b)));
}
#endif

// total + the dot product of each four bytes: digits -127 to 127, and codes -128 to 127 (with kByteOffset added, 0 to 255).
inline Integers dot_bytes(Integers total, Integers codes, Integers digits) {
#if defined(__AVX512VNNI__)
    return bits<Integers>(_mm512_dpbusd_epi32(raw(total), raw(codes), raw(digits)));
#elif defined(__ARM_FEATURE_DOTPROD)
    return bits<Integers>(vdotq_s32(bits<int32x4_t>(total), bits<int8x16_t>(codes), bits<int8x16_t>(digits)));
#else
    typedef uint16_t Unsigned __attribute__((vector_size(4 * LAROSA_LANES)));
    const auto even = [](Integers x) { return bits<Shorts>(bits<Unsigned>(x) << 8) >> 8; };
    const auto odd = [](Integers x) { return bits<Shorts>(x) >> 8; };
#if defined(__AVX2__)
    return total + pairs_dot(even(codes), even(digits)) + pairs_dot(odd(codes), odd(digits));
#else
    const Shorts pairs = even(codes) * even(digits) + odd(codes) * odd(digits);  // up to 2 * 128 * 127
    return total + (bits<Integers>(bits<Words>(pairs) << 16) >> 16) + (bits<Integers>(pairs) >> 16);
#endif
#endif
}

// The same of codes 0 to 15.
inline Integers dot_nibbles(Integers total, Integers codes, Integers digits) {
#if defined(__AVX512VNNI__)
    return dot_bytes(total, codes, digits);
#elif defined(__AVX512BW__)
    const Shorts pairs = bits<Shorts>(_mm512_maddubs_epi16(raw(codes), raw(digits)));
    return total + pairs_dot(pairs, Shorts{} + int16_t(1));
#elif defined(__AVX2__)
    const Shorts pairs = bits<Shorts>(_mm256_maddubs_epi16(raw(codes), raw(digits)));
    return total + pairs_dot(pairs, Shorts{} + int16_t(1));
#else
    return dot_bytes(total, codes, digits);
#endif
}

// Numbers that each stand for some lanes of 16 bytes, to be spread over them: number i / 4 * outputs / group for element
// i, of so many outputs every 16 bytes.
class Spread {
  public:
    Spread(int64_t outputs, int64_t group) {
        for (int64_t i = 0; i < kLanes; ++i) of_[i] = int32_t(i / 4 * outputs / group);
    }

    // Of kLanes / 4 numbers.
    Integers operator()(const int32_t *from) const {
#if defined(__AVX512BW__)
        const __m128i some = _mm_loadu_si128(reinterpret_cast<const __m128i *>(from));
        return bits<Integers>(_mm512_permutexvar_epi32(raw(of_), _mm512_castsi128_si512(some)));
#elif defined(__AVX2__)
        const __m128i some = _mm_loadl_epi64(reinterpret_cast<const __m128i *>(from));
        return bits<Integers>(_mm256_permutevar8x32_epi32(_mm256_castsi128_si256(some), raw(of_)));
#else
        return Integers{} + from[0];
#endif
    }

  private:
    Integers of_;
};

}  // namespace LAROSA_ISA
}  // namespace larosa
