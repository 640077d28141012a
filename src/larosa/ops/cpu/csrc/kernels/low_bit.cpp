// Products of a vector with weights of 4 to 8 bits, by columns and in whole numbers.
//
// The vector's entries times the scales of their columns are rounded, by one unit for kBlock columns in each group of
// outputs. Sums over a block are exact then. What is left in float32 has one order, and never multiplies and adds at once,
// which not every instruction set can: so results have the same bits on all of them.
#include "bytes.h"
#include "kernels.h"

namespace larosa {
namespace LAROSA_ISA {
namespace {

constexpr int64_t kLine = 64;                // bytes of a cache line
constexpr int64_t kTile = 4 * kLanes;        // bytes, of a column's codes, of a vector
constexpr int64_t kQuads = kBlock / 4;       // of columns, whose digits share a word
constexpr int64_t kRoom = kStrip / 32 + 16;  // groups of a strip, which have 32 outputs at least, in whole vectors

// Entries up to this magnitude count as nothing: the reciprocal of a smaller one would be too large for a float.
constexpr float kNothing = 1e-30f;

// How outputs lie in the bytes of a column, some vectors of which are taken at a time, and what dot products make of them.
struct Nibbles {
    using Dots = NibbleDots;
    static constexpr int64_t outputs = 2, vectors = 1, tile = kTile;  // a byte; a tile; bytes of a tile
    static int64_t width(int64_t count) { return (count + 1) / 2; }   // bytes of so many outputs
    static void load(const uint8_t *from, Integers *bytes) { bytes[0] = load_bytes(from); }
    static void totals(const Dots *dots, Integers *of) {
        of[0] = dots->low();
        of[1] = dots->high();
    }
    // Four outputs of each of two totals, in their own order.
    static void order(const float *totals, float *out) {
        typedef float Four __attribute__((vector_size(16)));
        Four low, high;
        __builtin_memcpy(&low, totals, sizeof low);
        __builtin_memcpy(&high, totals + kLanes, sizeof high);
        const Four first = __builtin_shufflevector(low, high, 0, 4, 1, 5);
        const Four last = __builtin_shufflevector(low, high, 2, 6, 3, 7);
        __builtin_memcpy(out, &first, sizeof first);
        __builtin_memcpy(out + 4, &last, sizeof last);
    }
};

struct WholeBytes {
    using Dots = SignedDots;
    static constexpr int64_t outputs = 1, vectors = 1, tile = kTile;
    static int64_t width(int64_t count) { return count; }
    static void load(const uint8_t *from, Integers *bytes) { bytes[0] = load_bytes(from); }
    static void totals(const Dots *dots, Integers *of) { of[0] = dots->total(); }
    static void order(const float *totals, float *out) { __builtin_memcpy(out, totals, 4 * sizeof *out); }
};

// Of 32 outputs 16 bytes like those of Nibbles, and their `leading` bits behind: a vector each of the even and the odd ones.
template <int leading>
struct Leading {
    using Dots = ByteDots<8 << leading>;
    static constexpr int64_t outputs = 2, vectors = 2, tile = kTile / 16 * (16 + 4 * leading);
    static int64_t width(int64_t count) { return (count + 31) / 32 * (16 + 4 * leading); }
    static void load(const uint8_t *from, Integers *bytes) { load_leading<leading>(from, bytes); }
    static void totals(const Dots *dots, Integers *of) {
        of[0] = dots[0].total();
        of[1] = dots[4].total();
    }
    static void order(const float *totals, float *out) { Nibbles::order(totals, out); }
};

// kBlock columns of a strip, and the vector's entries for them.
struct Block {
    const uint8_t *codes[kBlock];
    const uint8_t *next[kBlock];  // codes of the block that is likely to follow
    // For each group of the strip's outputs: the rounded entries of four columns in up to two words, what sums start at
    // for the codes' offset, and the bits of the unit.
    int32_t words[kQuads][2][kRoom];
    int32_t starts[kRoom];
    int32_t units[kRoom];
};

// The strip's groups of a column's scales, from group `at` on.
inline Floats load_scales(const larosa_low_bit &matrix, int64_t column, int64_t at, int64_t groups, int64_t depth) {
    const uint16_t *from = matrix.scales + column * matrix.scales_stride + at;
    // What stands behind a column's scales is not used, but must be memory of the matrix.
    const bool whole = (depth - 1 - column) * matrix.scales_stride + groups >= at + kLanes;
    return whole ? load<BFloat16>(from) : load_some<BFloat16>(from, groups - at < kLanes ? groups - at : kLanes);
}

// Entries times scales, rounded, for `count` groups from `first` on.
template <class Dots>
inline void round_entries(const float *values, const int32_t *columns, const larosa_low_bit &matrix, int64_t depth,
                          int64_t first, int64_t count, Block &block) {
    constexpr float most = Dots::kLargest;
    const int64_t groups = (matrix.outputs + matrix.group - 1) / matrix.group;
    for (int64_t at = 0; at < count; at += kLanes) {
        Floats scaled[kBlock];
        Integers magnitude = {};  // compared as integers, floats that are not negative sort likewise, with NaN on top
        for (int64_t i = 0; i < kBlock; ++i) {
            scaled[i] = values[i] * load_scales(matrix, columns[i], first + at, groups, depth);
            const Integers one = bits<Integers>(scaled[i]) & 0x7fffffff;
            magnitude = one > magnitude ? one : magnitude;
        }
        const Floats largest = bits<Floats>(magnitude);
        const Floats none = {};
        const Floats inverse = largest > kNothing ? most / largest : none;
        const Floats unit = largest > kNothing ? largest / most : none;
        const Floats nan = splat(__builtin_nanf(""));
        const Floats kept = magnitude < 0x7f800000 ? unit : nan;
        // Where the unit is NaN, so is the result, whatever the numbers are.
        Integers total = {};
        for (int64_t quad = 0; quad < kQuads; ++quad) {
            Integers numbers[4], words[2];
            for (int64_t i = 0; i < 4; ++i) {
                // To a number so large that no fraction has room: its bits are those of 12582912 and the rounded entry.
                numbers[i] = bits<Integers>(scaled[4 * quad + i] * inverse + 12582912.0f) - 0x4b400000;
                total += numbers[i];
            }
            Dots::pack(numbers, words);
            for (int64_t i = 0; i < Dots::kWords; ++i)
                __builtin_memcpy(&block.words[quad][i][at], &words[i], sizeof words[i]);
        }
        const Integers start = total * -Dots::kOffset;
        __builtin_memcpy(&block.starts[at], &start, sizeof start);
        __builtin_memcpy(&block.units[at], &kept, sizeof kept);
    }
}

// sums += a block's columns times its entries, for one tile of outputs, of which `group` is the first's.
template <class Type>
inline void add_tile(const Block &block, const uint8_t *const *codes, int64_t at, int64_t group, const Spread &spread,
                     float *sums) {
    typename Type::Dots dots[4 * Type::vectors];
    for (auto &each : dots) each.begin(spread(&block.starts[group]));
    for (int64_t quad = 0; quad < kQuads; ++quad) {
        Integers words[2];
        for (int64_t i = 0; i < Type::Dots::kWords; ++i) words[i] = spread(&block.words[quad][i][group]);
        Integers columns[4][Type::vectors];
        for (int64_t i = 0; i < 4; ++i) Type::load(codes[4 * quad + i] + at, columns[i]);
        for (int64_t v = 0; v < Type::vectors; ++v) {
            typename Type::Dots *of = dots + 4 * v;
            const Integers low[2] = {low_bytes(columns[0][v], columns[1][v]), low_bytes(columns[2][v], columns[3][v])};
            const Integers high[2] = {high_bytes(columns[0][v], columns[1][v]),
                                      high_bytes(columns[2][v], columns[3][v])};
            of[0].add(low_pairs(low[0], low[1]), words);
            of[1].add(high_pairs(low[0], low[1]), words);
            of[2].add(low_pairs(high[0], high[1]), words);
            of[3].add(high_pairs(high[0], high[1]), words);
        }
    }
    const Floats unit = bits<Floats>(spread(&block.units[group]));
    for (int64_t i = 0; i < 4; ++i) {
        Integers totals[Type::outputs];
        Type::totals(dots + i, totals);
        for (int64_t v = 0; v < Type::outputs; ++v, sums += kLanes)
            store(sums, load(sums) + __builtin_convertvector(totals[v], Floats) * unit);
    }
}

// One tile's sums in the order of the outputs.
template <class Type>
inline void order_tile(const float *sums, float *out) {
    for (int64_t lane = 0; lane < kLanes; lane += 4)
        for (int64_t v = 0; v < 4; ++v, out += 4 * Type::outputs)
            Type::order(sums + v * Type::outputs * kLanes + lane, out);
}

template <class Type, bool near>
inline void strip(const float *values, const int32_t *indices, int64_t k, int64_t listed, const larosa_low_bit &matrix,
                  int64_t depth, int64_t first, int64_t count, float *sums) {
    constexpr int64_t together = kTile * Type::outputs;  // outputs of a tile
    const int64_t width = Type::width(count), whole = width / Type::tile;  // bytes, and tiles that have all theirs
    const int64_t first_group = first / matrix.group;
    const int64_t groups = (first + count - 1) / matrix.group + 1 - first_group;
    const int64_t end = (depth - 1) * matrix.codes_stride + Type::width(matrix.outputs);
    const auto offset = [&](int64_t column) { return column * matrix.codes_stride + Type::width(first); };
    const Spread spread(16 * Type::outputs, matrix.group);
    const int shift = __builtin_ctzll(uint64_t(matrix.group));
    float mixed[kStrip];  // tile by tile, in the order of their totals
    for (int64_t at = 0; at < count; at += together)
        for (int64_t v = 0; v < together; v += kLanes) store(mixed + at + v, Floats{});

    Block block;
    for (int64_t from = 0; from < k; from += kBlock) {
        float entries[kBlock];
        int32_t columns[kBlock];
        bool ends_inside = true;  // whether what stands behind the strip, up to whole tiles, is memory of the matrix
        for (int64_t i = 0; i < kBlock; ++i) {
            const bool there = from + i < k;  // or else a column once more, times zero
            entries[i] = there ? values[from + i] : 0.0f;
            columns[i] = indices[there ? from + i : from];
            block.codes[i] = matrix.codes + offset(columns[i]);
            const int64_t after = from + kBlock + i < listed ? indices[from + kBlock + i] : columns[i];
            block.next[i] = matrix.codes + offset(after);
            const uint16_t *scales = matrix.scales + after * matrix.scales_stride + first_group;
            for (int64_t at = 0; at < groups; at += kLine / 2) fetch<near>(scales + at);
            ends_inside = ends_inside && offset(columns[i]) + (whole + 1) * Type::tile <= end;
        }
        round_entries<typename Type::Dots>(entries, columns, matrix, depth, first_group, groups, block);
        const auto add = [&](int64_t tile, const uint8_t *const *codes, int64_t codes_at) {
            const int64_t at = tile * Type::tile;
            for (int64_t line = -at & (kLine - 1); line < Type::tile; line += kLine)
                for (int64_t i = 0; i < kBlock; ++i) fetch<near>(block.next[i] + at + line);
            const int64_t group = ((first + tile * together) >> shift) - first_group;
            add_tile<Type>(block, codes, codes_at, group, spread, mixed + tile * together);
        };
        for (int64_t tile = 0; tile < whole; ++tile) add(tile, block.codes, tile * Type::tile);
        if (whole * Type::tile == width) continue;
        if (ends_inside) {
            add(whole, block.codes, whole * Type::tile);
            continue;
        }
        uint8_t rest[kBlock][Type::tile] = {};
        const uint8_t *codes[kBlock];
        for (int64_t i = 0; i < kBlock; ++i) {
            for (int64_t at = whole * Type::tile; at < width; ++at) rest[i][at - whole * Type::tile] = block.codes[i][at];
            codes[i] = rest[i];
        }
        add(whole, codes, 0);
    }
    const int64_t full = count / together * together;  // outputs of tiles that have all theirs
    for (int64_t at = 0; at < full; at += together) order_tile<Type>(mixed + at, sums + at);
    if (full < count) {
        float rest[together];
        order_tile<Type>(mixed + full, rest);
        for (int64_t at = full; at < count; ++at) sums[at] = rest[at - full];
    }
}

template <bool near>
auto strip_of(int64_t bits) {
    return bits == 4   ? strip<Nibbles, near>
           : bits == 5 ? strip<Leading<1>, near>
           : bits == 6 ? strip<Leading<2>, near>
                       : strip<WholeBytes, near>;
}

}  // namespace

void low_bit_columns(const float *values, const int32_t *indices, int64_t k, int64_t listed,
                     const larosa_low_bit &matrix, int64_t depth, int64_t first, int64_t count, float *sums) {
    const auto run = kFetchNear ? strip_of<true>(matrix.bits) : strip_of<false>(matrix.bits);
    run(values, indices, k, listed, matrix, depth, first, count, sums);
}

}  // namespace LAROSA_ISA
}  // namespace larosa
