// An adapter on a product's residual: all of its columns times the residual's entries go into the product's sums.
//
// It is in the weights' format, beside codes in the format CARRIED; or, with a SCALE, in digits of 8 bits, and each output has
// a scale.
#ifndef LAROSA_ADAPTER
#define LAROSA_ADAPTER

#include "columns.cuh"

#ifndef ALONE
#error "ALONE, whether a block has a multiprocessor to itself, and a format as SCALE are given by the launcher"
#endif

// All `width` entries of a vector, or of each row, which were there before the kernel in front of this one began.
struct Carried {
    const float* values;
    unsigned stride;
    int width;

    DEVICE Held at(int i) const {
        return held(i * stride, [&](int row) { return load_earlier(values + row * width + i); });
    }
};

// The same where a low digit of each of them is followed by high ones of the first, which count 128 times.
struct CarriedByDigits {
    const float* values;
    unsigned stride;
    int width;

    DEVICE Held at(int i) const {
        const bool high = i >= width;
        const float* from = values + (high ? i - width : i);
        return held(i * stride, [&](int row) { return load_earlier(from + row * width) * (high ? 128.0f : 1.0f); });
    }
};

// What the thread's sums of digits are multiplied by. They are on their way while it adds up.
template <class Format>
struct Scales {
    Format scale[WIDTH<WEIGHT>];

    DEVICE Scales(const Format* scales, const Outputs& tile) {
        const Format* mine = scales + tile.matrix.first + tile.mine;
#pragma unroll
        for (int e = 0; e < WIDTH<WEIGHT>; ++e) scale[e] = load_parameter(mine + e, e < tile.there);
    }

    DEVICE void apply(Sum& sum) const {
#pragma unroll
        for (int r = 0; r < ROWS; ++r)
#pragma unroll
            for (int e = 0; e < WIDTH<WEIGHT>; ++e) sum[r][e] *= widen(scale[e]);
    }
};

// A thread's piece of a column of the adapter, and how many are in flight: beside codes pieces can be long ones.
#ifdef SCALE
#define SCALE_PARAMETERS int digits, const SCALE* scale,
#define SCALE_ARGUMENTS digits, scale,
using Carry = Int8;
#else
#define SCALE_PARAMETERS
#define SCALE_ARGUMENTS
#ifndef CARRIED
#define CARRIED WEIGHT
#endif
using Carry = CARRIED;
#endif
using Piece = Pack<Carry, Words<WIDTH<WEIGHT> * sizeof(Carry) / 4>>;
constexpr int LIGHTER = sizeof(Piece) < 16 ? 16 / sizeof(Piece) : 1;  // so many of them are one of the weights
constexpr int ADAPTER_DEPTH = sizeof(Piece) < 16 ? (ALONE ? 8 : 6) : (DEPTH * 16 + sizeof(Piece) - 1) / sizeof(Piece);

// Adds the block's part of an adapter's columns times the residual's `carried` entries, of which ROOM at a time lie in
// shared memory. `meanwhile` is told when the last ones have been asked for.
template <int ROOM, class Meanwhile>
DEVICE void add_adapter(Sum& sum, Entry* entries, const float* residual, const void* adapter, unsigned stride,
                        int carried, SCALE_PARAMETERS const Outputs& tile, Meanwhile& meanwhile) {
#ifdef SCALE
    const Scales<SCALE> scales(scale, tile);
    const CarriedByDigits all{residual, stride, carried};
    const Part part = Part::of_block(digits);
#else
    const Carried all{residual, stride, carried};
    const Part part = Part::of_block(carried);
#endif
    Pieces<Piece> pieces{static_cast<const Carry*>(adapter) + tile.matrix.first + tile.mine, tile.there};
    for (int begin = part.begin, here = 0; begin < part.end; begin += here) {
        here = min(ROOM, part.end - begin);
        __syncthreads();  // what stood here has been read
        for (int i = threadIdx.x; i < here; i += THREADS) entries[i] = all.at(begin + i);
        __syncthreads();
        if (begin + here < part.end)
            add_listed<GROUPS, ADAPTER_DEPTH>(sum, entries, group(), here, pieces);
        else
            add_listed<GROUPS, ADAPTER_DEPTH>(sum, entries, group(), here, pieces, meanwhile);
    }
    if (part.size() == 0) meanwhile.at_last();
#ifdef SCALE
    scales.apply(sum);
#endif
}

#endif
