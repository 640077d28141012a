// Vectors and matrices of any of the three float formats, as kernel parameters.
#ifndef LAROSA_VECTORS
#define LAROSA_VECTORS

#include "device.cuh"

// A digit of an adapter, or a code of 8 bits.
struct Int8 {
    unsigned char bits;
};

// Two codes of 4 bits, the first in the lower half: each is 8 more than the whole number that it stands for.
struct Int4 {
    unsigned char bits;
};

// Digit `i` of four. The instruction that converts integers has a quarter of the rate of others, so x + 128 becomes the
// last byte of 2^23, whose mantissa counts ones.
DEVICE float widen_digit(unsigned digits, int i) {
    const unsigned sum = __byte_perm(digits ^ 0x80808080u, 0x4b000000u, 0x7540u + static_cast<unsigned>(i));
    return __uint_as_float(sum) - (8388608.0f + 128.0f);
}

// Code `i` of those in a word as a float, in units of UNIT and LIFTED units more: to take that off sums, at the end, spares an
// instruction a code. Of one byte it is the whole number that the code stands for.
template <class Code>
struct Decoded {
    static constexpr float UNIT = 1.0f;
    static constexpr float LIFTED = 0.0f;

    DEVICE static float at(unsigned codes, int i) { return widen_digit(codes, i); }
};

// A code of 4 bits becomes the upper part of the mantissa of 8, where it counts halves: three instructions for two codes.
template <>
struct Decoded<Int4> {
    static constexpr float UNIT = 0.5f;
    static constexpr float LIFTED = 16.0f + 8.0f;

    DEVICE static float at(unsigned codes, int i) {
        const unsigned upper = (i % 2 ? codes >> 1 : codes << 3) & 0x78787878u;
        return __uint_as_float(__byte_perm(upper, 0x41000000u, 0x7065u + 0x100u * static_cast<unsigned>(i / 2)));
    }
};

// Stands for the format of a vector that is not there, whose entries count as 1.
struct None {};
DEVICE None load_parameter(const None*, bool) { return {}; }
DEVICE float widen(None) { return 1.0f; }

// A short vector (gain, bias, score) of a format known at run time; null where there is none.
struct Vector {
    const void* data;
    long long type;  // 0 float32, 1 bfloat16, 2 float16

    DEVICE unsigned size() const { return type == 0 ? 4u : 2u; }  // bytes of an entry

    DEVICE float at(int i, float otherwise) const {
        if (data == nullptr) return otherwise;
        if (type == 1) return widen(static_cast<const BFloat16*>(data)[i]);
        if (type == 2) return widen(static_cast<const Half*>(data)[i]);
        return static_cast<const float*>(data)[i];
    }

    // Entries first, first + STEP, ... of `size`, which are T; 0 beyond the end, which is not reached where ALL are there, and
    // 1 where T is None. Nothing is asked of what has been read: that would be to wait for it.
    template <class T, bool ALL, int STEP = 32, int COUNT>
    DEVICE void read(float (&entries)[COUNT], int first, int size) const {
        T bits[COUNT];
#pragma unroll
        for (int i = 0; i < COUNT; ++i)
            bits[i] = load_parameter(static_cast<const T*>(data) + first + i * STEP, ALL || i * STEP < size - first);
#pragma unroll
        for (int i = 0; i < COUNT; ++i) entries[i] = widen(bits[i]);
    }

    // Brings its first `count` entries near, whole pieces of 16 bytes of them. For one thread.
    DEVICE void fetch(int count) const {
        if (data != nullptr && reinterpret_cast<unsigned long long>(data) % 16 == 0)
            prefetch(data, static_cast<unsigned>(count) * size() / 16 * 16);
    }
};

// One of the matrices [outputs, inputs] whose products stand side by side in the result.
struct Matrix {
    const void* weights;
    Vector bias;
    long long stride;   // elements between its columns (sparse) or rows (dense)
    long long outputs;
    long long first;    // its first output among all
    long long tile;     // its first tile among all
    // Where weights are codes: of each column, a scale for every `group` outputs.
    const BFloat16* scales;
    long long scale_stride;  // scales between columns
    long long group;
};

constexpr int MOST_MATRICES = 4;

struct Matrices {
    Matrix matrix[MOST_MATRICES];  // those that are not there start at a tile beyond all

    DEVICE const Matrix& of(int tile) const {
        int i = 0;
        while (i + 1 < MOST_MATRICES && tile >= matrix[i + 1].tile) ++i;
        return matrix[i];
    }
};

// Weights in an element of memory, and in 16 bytes.
template <class Weight>
constexpr int EACH_ELEMENT = 1;
template <>
constexpr int EACH_ELEMENT<Int4> = 2;
template <class Weight>
constexpr int WIDTH = 16 / sizeof(Weight) * EACH_ELEMENT<Weight>;

// Neighbouring weights in registers, as they stand in memory: 16 bytes, or `Data` of them.
template <class Weight, class Data = Words<4>>
union Pack {
    using Element = Weight;
    static constexpr int ELEMENTS = sizeof(Data) / sizeof(Weight);
    static constexpr int COUNT = ELEMENTS * EACH_ELEMENT<Weight>;

    Data data;
    Weight weight[ELEMENTS];

    DEVICE Pack() : data{} {}

    DEVICE float at(int i) const {
        if constexpr (sizeof(Weight) == 1)
            return widen_digit(data.word[i / 4], i % 4);
        else if constexpr (sizeof(Weight) == 2)
            return widen_half<Weight>(data.word[i / 2], i % 2);
        else
            return widen(weight[i]);
    }

    // From an address that is a multiple of their size where WHOLE, and with `count` weights to be had there.
    template <bool WHOLE>
    DEVICE void load(const Weight* from, int count) {
        if constexpr (WHOLE) {
            if (count > 0) load_once(data, from);
        } else {
#pragma unroll
            for (int i = 0; i < ELEMENTS; ++i)
                if (i * EACH_ELEMENT<Weight> < count) weight[i] = from[i];
        }
    }
};

#endif
