// Vectors of 4 kLanes bytes: how those of four columns come together, and their dot products by fours.
#pragma once

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
#if LAROSA_LANES == 16
inline __m512i raw(Integers x) { return bits<__m512i>(x); }
inline Integers low_bytes(Integers a, Integers b) { return bits<Integers>(_mm512_unpacklo_epi8(raw(a), raw(b))); }
inline Integers high_bytes(Integers a, Integers b) { return bits<Integers>(_mm512_unpackhi_epi8(raw(a), raw(b))); }
inline Integers low_pairs(Integers a, Integers b) { return bits<Integers>(_mm512_unpacklo_epi16(raw(a), raw(b))); }
inline Integers high_pairs(Integers a, Integers b) { return bits<Integers>(_mm512_unpackhi_epi16(raw(a), raw(b))); }
#elif LAROSA_LANES == 8
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

// The lowest bytes of four words.
inline Integers pack_bytes(const Integers *words) {
    return words[0] & 0xff | (words[1] & 0xff) << 8 | (words[2] & 0xff) << 16 | words[3] << 24;
}

inline Integers repeat(uint8_t byte) { return Integers{} + int32_t(0x01010101u * byte); }

// Products of 16-bit numbers, and sums of two of them.
inline Integers add_pairs(Shorts a, Shorts b) {
#if LAROSA_LANES == 16
    return bits<Integers>(_mm512_madd_epi16(bits<__m512i>(a), bits<__m512i>(b)));
#elif LAROSA_LANES == 8
    return bits<Integers>(_mm256_madd_epi16(bits<__m256i>(a), bits<__m256i>(b)));
#else
    const auto even = [](Shorts x) { return bits<Integers>(bits<Words>(x) << 16) >> 16; };
    const auto odd = [](Shorts x) { return bits<Integers>(x) >> 16; };
    return even(a) * even(b) + odd(a) * odd(b);
#endif
}

// The even and the odd ones of signed bytes.
inline Shorts even_bytes(Integers x) {
    typedef uint16_t Unsigned __attribute__((vector_size(4 * LAROSA_LANES)));
    return bits<Shorts>(bits<Unsigned>(x) << 8) >> 8;
}
inline Shorts odd_bytes(Integers x) { return bits<Shorts>(x) >> 8; }

// Where there are dot products of four bytes with four signed ones, added to sums: whether codes are signed bytes too.
#if defined(LAROSA_NEON)
#define LAROSA_DOTS
constexpr bool kSignedCodes = true;
inline Integers dots(Integers sums, Integers codes, Integers numbers) {
    const int8x16_t a = bits<int8x16_t>(codes), b = bits<int8x16_t>(numbers);
#ifdef __ARM_FEATURE_DOTPROD
    return bits<Integers>(vdotq_s32(bits<int32x4_t>(sums), a, b));
#else
    // Two products are within 16 bits: 2 * 128 * 127.
    const int16x8_t twos = vpaddq_s16(vmull_s8(vget_low_s8(a), vget_low_s8(b)), vmull_high_s8(a, b));
    return bits<Integers>(vpadalq_s16(bits<int32x4_t>(sums), twos));
#endif
}
#elif LAROSA_LANES == 16 && defined(__AVX512VNNI__)
#define LAROSA_DOTS
constexpr bool kSignedCodes = false;
inline Integers dots(Integers sums, Integers codes, Integers numbers) {
    return bits<Integers>(_mm512_dpbusd_epi32(raw(sums), raw(codes), raw(numbers)));
}
#elif LAROSA_LANES == 8 && (defined(__AVXVNNI__) || defined(__AVX512VNNI__))
#define LAROSA_DOTS
constexpr bool kSignedCodes = false;
inline Integers dots(Integers sums, Integers codes, Integers numbers) {
#ifdef __AVXVNNI__
    return bits<Integers>(_mm256_dpbusd_avx_epi32(raw(sums), raw(codes), raw(numbers)));
#else
    return bits<Integers>(_mm256_dpbusd_epi32(raw(sums), raw(codes), raw(numbers)));
#endif
}
#else
constexpr bool kSignedCodes = true;
#endif

// Dot products of codes of four columns, a byte each, and whole numbers up to kLargest, which come packed in kWords
// words: added up over up to 16 columns, for 4 kLanes bytes. Both classes have the same members but for their totals.
//
// Codes 0 to 15 in the low and in the high half of each byte, and numbers of 8 bits.
class NibbleDots {
  public:
    static constexpr int kWords = 1, kLargest = 127, kOffset = 8;
    static void pack(const Integers *numbers, Integers *words) { words[0] = pack_bytes(numbers); }
#if defined(LAROSA_NEON)
    void begin(Integers start) { low_ = high_ = start; }
    void add(Integers codes, const Integers *words) {
        typedef uint8_t Unsigned __attribute__((vector_size(16)));
        low_ = dots(low_, codes & repeat(15), words[0]);
        high_ = dots(high_, bits<Integers>(bits<Unsigned>(codes) >> 4), words[0]);
    }
    Integers low() const { return low_; }
    Integers high() const { return high_; }

  private:
    Integers low_, high_;
#elif defined(LAROSA_DOTS)
    void begin(Integers start) {
        high_ = start << 4;
        all_ = high_ + start;
    }
    void add(Integers codes, const Integers *words) {
        all_ = dots(all_, codes, words[0]);
        high_ = dots(high_, codes & repeat(0xf0), words[0]);
    }
    Integers low() const { return all_ - high_; }
    Integers high() const { return high_ >> 4; }

  private:
    Integers all_, high_;  // high halves count 16 times
#else
    // A sum and its start stay within 16 bits: 8 columns times 15 times 127, and 16 times 8 times 127.
    void begin(Integers start) { low_ = high_ = bits<Shorts>(start & 0xffff); }
    void add(Integers codes, const Integers *words) {
        low_ += products(codes & repeat(15), words[0]);
        high_ += products(codes >> 4 & repeat(15), words[0]);
    }
    Integers low() const { return add_pairs(low_, Shorts{} + int16_t(1)); }
    Integers high() const { return add_pairs(high_, Shorts{} + int16_t(1)); }

  private:
    // Sums of two.
    static Shorts products(Integers codes, Integers numbers) {
#if LAROSA_LANES == 16
        return bits<Shorts>(_mm512_maddubs_epi16(raw(codes), raw(numbers)));
#elif LAROSA_LANES == 8
        return bits<Shorts>(_mm256_maddubs_epi16(raw(codes), raw(numbers)));
#else
        return even_bytes(codes) * even_bytes(numbers) + odd_bytes(codes) * odd_bytes(numbers);
#endif
    }

    Shorts low_, high_;
#endif
};

// Codes of a byte each, `offset` more than what they stand for, and numbers of 15 bits, for which there is time while bytes are
// read. Codes are below 128, or of either kind of sign that dots() takes.
template <int offset>
class ByteDots {
  public:
    static constexpr int kWords = 2, kLargest = 127 * 128, kOffset = offset;
#ifdef LAROSA_DOTS
    // Of each number a high digit, which counts 128 times, and a low one.
    static void pack(const Integers *numbers, Integers *words) {
        Integers high[4], low[4];
        for (int i = 0; i < 4; ++i) {
            high[i] = (numbers[i] + 64) >> 7;
            low[i] = numbers[i] - (high[i] << 7);
        }
        words[0] = pack_bytes(high);
        words[1] = pack_bytes(low);
    }
    void begin(Integers start) {
        high_ = Integers{};
        low_ = start;
    }
    void add(Integers codes, const Integers *words) {
        high_ = dots(high_, codes, words[0]);
        low_ = dots(low_, codes, words[1]);
    }
    Integers total() const { return (high_ << 7) + low_; }

  private:
    Integers high_, low_;
#else
    static void pack(const Integers *numbers, Integers *words) {
        for (int i = 0; i < 2; ++i) words[i] = numbers[i] & 0xffff | numbers[i + 2] << 16;
    }
    void begin(Integers start) { total_ = start; }
    void add(Integers codes, const Integers *words) {
        total_ += add_pairs(even_bytes(codes), bits<Shorts>(words[0]));
        total_ += add_pairs(odd_bytes(codes), bits<Shorts>(words[1]));
    }
    Integers total() const { return total_; }

  private:
    Integers total_;
#endif
};

// Codes -128 to 127.
class SignedDots : public ByteDots<kSignedCodes ? 0 : 128> {
  public:
    void add(Integers codes, const Integers *words) { ByteDots::add(codes ^ repeat(kOffset), words); }
};

// Of 32 outputs each the four low bits, in 16 bytes, and the `leading` ones of two outputs, 4 bytes after the other at the top
// of bytes; what there is below those is left there.
template <int leading>
inline void load_parts(const uint8_t *from, Integers &low, Words &top) {
    constexpr int size = 16 + 4 * leading;
    // The leading bits of 16 bytes are `leading` times 4 bytes, and in each 4 / leading times above each other.
    constexpr int shift[4] = {8 - 2 * leading, 8 - 2 * leading * (1 / leading + 1), 8 - 2 * leading * (2 / leading + 1),
                              8 - 2 * leading * (3 / leading + 1)};
#if LAROSA_LANES == 4
    low = load_bytes(from);
    for (int i = 0; i < 4; ++i) {
        uint32_t word;
        __builtin_memcpy(&word, from + 16 + 4 * (i % leading), 4);
        top[i] = word << shift[i];
    }
#else
    Words packed, places;
    for (int i = 0; i < kLanes; ++i) places[i] = uint32_t(shift[i % 4]);
#if LAROSA_LANES == 16
    Integers lows, tops;
    for (int i = 0; i < kLanes; ++i) {
        lows[i] = i / 4 * (size / 4) + i % 4;
        tops[i] = i / 4 * (size / 4) + 4 + i % leading;
    }
    const __m512i first = _mm512_loadu_si512(from);
    const __m512i rest = leading == 2
        ? _mm512_castsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(from + 64)))
        : _mm512_castsi128_si512(_mm_loadu_si128(reinterpret_cast<const __m128i *>(from + 64)));
    low = bits<Integers>(_mm512_permutex2var_epi32(first, raw(lows), rest));
    packed = bits<Words>(_mm512_permutex2var_epi32(first, raw(tops), rest));
#else
    __m128i lows[2], tops[2];
    for (int i = 0; i < 2; ++i) {
        const uint8_t *piece = from + size * i;
        uint64_t word = 0;
        __builtin_memcpy(&word, piece + 16, 4 * leading);
        lows[i] = _mm_loadu_si128(reinterpret_cast<const __m128i *>(piece));
        tops[i] = leading == 2 ? _mm_set1_epi64x(int64_t(word)) : _mm_set1_epi32(int32_t(word));
    }
    low = bits<Integers>(_mm256_set_m128i(lows[1], lows[0]));
    packed = bits<Words>(_mm256_set_m128i(tops[1], tops[0]));
#endif
    top = packed << places;
#endif
}

// The codes of the even and of the odd outputs (`LeadingBits` in formats/columns.py), a byte each.
template <int leading>
inline void load_leading(const uint8_t *from, Integers *codes) {
    Integers low;
    Words top;
    load_parts<leading>(from, low, top);
    constexpr int mask = (16 << leading) - 16;
    codes[0] = low & repeat(15) | bits<Integers>(top >> (4 - 2 * leading)) & repeat(mask);
    codes[1] = low >> 4 & repeat(15) | bits<Integers>(top >> (4 - leading)) & repeat(mask);
}

// Numbers that each stand for some lanes of 16 bytes, to be spread over them: for element i number
// i / 4 * outputs / group, of so many outputs every 16 bytes.
class Spread {
  public:
    Spread(int64_t outputs, int64_t group) {
        for (int64_t i = 0; i < kLanes; ++i) of_[i] = int32_t(i / 4 * outputs / group);
    }

    // Of kLanes / 4 numbers.
    Integers operator()(const int32_t *from) const {
#if LAROSA_LANES == 16
        const __m128i some = _mm_loadu_si128(reinterpret_cast<const __m128i *>(from));
        return bits<Integers>(_mm512_permutexvar_epi32(raw(of_), _mm512_castsi128_si512(some)));
#elif LAROSA_LANES == 8
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
