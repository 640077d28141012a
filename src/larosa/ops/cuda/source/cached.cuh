// Keys and values as the cache holds them: of one of the three float formats, or digits of 8 bits, each position's times
// two scales.
#ifndef LAROSA_CACHED
#define LAROSA_CACHED

#include "attention.cuh"

constexpr bool DIGITS = sizeof(CACHE) == 1;

// By which digits of a position's key and value are multiplied.
struct alignas(4) Scales {
    BFloat16 key;
    BFloat16 value;
};

// A row's key and value, which the block has just made.
struct Own {
    alignas(16) CACHE key[SIZE];
    alignas(16) CACHE value[SIZE];
    Scales scales;
};

// Turns numbers to digits of that scale. 0 where the scale is next to nothing, infinite or NaN: what is not finite gives
// such a scale, and 0 times it is rounded to 0.
DEVICE float inverse_scale(float scale) { return scale > 1e-37f ? reciprocal(scale) : 0.0f; }

// For a warp: rounds a key or value for the cache, and keeps it at hand. One block of them all writes it.
template <class T>
DEVICE void put(const Head& head, bool writes, T* at_hand, T* in_cache, BFloat16&, BFloat16*) {
    head.each([&](int i, float x) {
        narrow(x, at_hand[i]);
        if (writes) in_cache[i] = at_hand[i];
    });
}

template <>
DEVICE void put(const Head& head, bool writes, Int8* at_hand, Int8* in_cache, BFloat16& scale_at_hand,
                BFloat16* scale_in_cache) {
    BFloat16 scale;
    narrow(head.largest() * (1.0f / 127.0f), scale);
    const float inverse = inverse_scale(widen(scale));
    head.each([&](int i, float x) {
        const int digit = max(-127, min(127, rounded(x * inverse)));
        at_hand[i].bits = static_cast<unsigned char>(digit);
        if (writes) in_cache[i] = at_hand[i];
    });
    if (threadIdx.x % 32 == 0) {
        scale_at_hand = scale;
        if (writes) *scale_in_cache = scale;
    }
}

// A thread's piece of a query, for a cache of T.
template <class T>
struct QueryPiece {
    float entry[WIDTH<T>];

    DEVICE float times(const Pack<T>& key) const {
        float sum = 0.0f;
#pragma unroll
        for (int e = 0; e < WIDTH<T>; ++e) sum = fmaf(entry[e], key.at(e), sum);
        return sum;
    }
};

// In 16 bits an entry, 256 high + low, so that digits are multiplied by digits, four at an instruction.
template <>
struct QueryPiece<Int8> {
    Words<4> high;
    Words<4> low;

    DEVICE float times(const Pack<Int8>& key) const {
        int high_sum = 0;
        int low_sum = 0;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            high_sum = __dp4a(static_cast<int>(high.word[i]), static_cast<int>(key.data.word[i]), high_sum);
            low_sum = __dp4a(static_cast<int>(low.word[i]), static_cast<int>(key.data.word[i]), low_sum);
        }
        return static_cast<float>(256 * high_sum + low_sum);
    }
};

// The queries of a block.
template <class T>
struct Queries {
    float entry[HEADS][SIZE];

    // For a warp: head h, `factor` times.
    DEVICE void put(int h, const Head& head, float factor) {
        head.each([&](int i, float x) { entry[h][i] = x * factor; });
    }

    // By which scores of head h are multiplied.
    DEVICE float scale(int) const { return 1.0f; }

    DEVICE QueryPiece<T> piece(int h, int part, bool there) const {
        QueryPiece<T> piece;
#pragma unroll
        for (int e = 0; e < WIDTH<T>; ++e) piece.entry[e] = there ? entry[h][part + e] : 0.0f;
        return piece;
    }
};

template <>
struct Queries<Int8> {
    static constexpr float LARGEST = 127.0f * 256.0f;

    alignas(16) Int8 high[HEADS][SIZE];
    alignas(16) Int8 low[HEADS][SIZE];
    float scales[HEADS];

    DEVICE void put(int h, const Head& head, float factor) {
        const float one = head.largest() * (1.0f / LARGEST);
        const float inverse = inverse_scale(one);
        head.each([&](int i, float x) {
            const int number = max(-32512, min(32512, rounded(x * inverse)));
            high[h][i].bits = static_cast<unsigned char>((number + 128) >> 8);
            low[h][i].bits = static_cast<unsigned char>(number);  // what is left, -128 to 127
        });
        if (threadIdx.x % 32 == 0) scales[h] = one * factor;
    }

    DEVICE float scale(int h) const { return scales[h]; }

    DEVICE QueryPiece<Int8> piece(int h, int part, bool there) const {
        if (!there) return {};
        return {reinterpret_cast<const Words<4>&>(high[h][part]), reinterpret_cast<const Words<4>&>(low[h][part])};
    }
};

// Entry e of a piece of a value, and LIFT more: to take that off from sums, at the end, spares an instruction an entry. It
// costs them a hundredth of a digit at most.
constexpr float LIFT = DIGITS ? 32768.0f + 128.0f : 0.0f;

template <class T>
DEVICE float lifted(const Pack<T>& value, int e) {
    if constexpr (sizeof(T) == 1)
        // x + 128 becomes the second byte of 2^15, where the mantissa counts ones.
        return __uint_as_float(__byte_perm(value.data.word[e / 4] ^ 0x80808080u, 0x47000000u, 0x7404u + 16u * (e % 4)));
    else
        return value.at(e);
}

#endif
