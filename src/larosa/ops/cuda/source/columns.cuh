// Columns of matrices times the entries of a list, added up: what sparse products have in common.
//
// Matrices are column-major. A tile of LANES * WIDTH outputs belongs to a cluster of CLUSTER blocks; each block takes a
// part of the list, each group of LANES threads every GROUPS-th entry of that part, 16 bytes a thread. Where LANES is no
// power of two, groups go across warps, and the last few threads have nothing to do. Partial sums meet in shared memory,
// first of the block, then of the cluster, each output's in the block that finishes it.
#ifndef LAROSA_COLUMNS
#define LAROSA_COLUMNS

#include "values.cuh"

#ifndef WEIGHT
#error "WEIGHT, LANES, CLUSTER, ALIGNED and SWIGLU are given by the launcher"
#endif

constexpr int THREADS = 512;
constexpr int WARPS = THREADS / 32;
constexpr int GROUPS = THREADS / LANES;
constexpr int TILE = LANES * WIDTH<WEIGHT>;
constexpr int SIDES = SWIGLU ? 2 : 1;
constexpr int SIDE = TILE / SIDES;                     // results of a tile
constexpr int SHARE = (SIDE + CLUSTER - 1) / CLUSTER;  // results that a block finishes
constexpr bool IN_WARPS = 32 % LANES == 0;              // groups, of which a warp can add up its own
constexpr int PARTS = IN_WARPS ? WARPS : GROUPS;        // of a sum in a block
static_assert(TILE <= THREADS, "a thread adds up the parts of an output");
static_assert(LANES % SIDES == 0, "a thread is on one side");

struct alignas(8) Entry {
    float value;
    unsigned offset;  // of its column, in elements; its number where weights are codes

    // Written to shared memory where `wanted`, without a branch.
    DEVICE void put(Entry* to, bool wanted) const { store_pair(&to->value, value, offset, wanted); }
};

// Entries [begin, end) of a list.
struct Part {
    int begin;
    int end;

    // This block's part of so many entries.
    DEVICE static Part of_block(int count) {
        const int rank = cluster_rank<CLUSTER>();
        return {static_cast<int>(static_cast<long long>(count) * rank / CLUSTER),
                static_cast<int>(static_cast<long long>(count) * (rank + 1) / CLUSTER)};
    }

    DEVICE int size() const { return end - begin; }
};

// Where a thread's pieces of columns are, of weights that stand for themselves.
template <class Data>
struct Pieces {
    using Piece = Data;

    const typename Piece::Element* first;  // in the first column
    int there;                             // weights to be had from it on

    // From output `mine` of a matrix on.
    DEVICE static Pieces of(const Matrix& matrix, int mine, int there) {
        return {static_cast<const typename Piece::Element*>(matrix.weights) + mine, there};
    }
    DEVICE void load(Piece& piece, unsigned offset) const {
        piece.template load<ALIGNED>(at_offset(first, offset), ALIGNED ? Piece::COUNT : there);
    }
    DEVICE void add(float (&sum)[WIDTH<WEIGHT>], float value, const Piece& piece) {
        static_assert(Piece::COUNT == WIDTH<WEIGHT>, "one for each of the thread's outputs");
#pragma unroll
        for (int e = 0; e < WIDTH<WEIGHT>; ++e) sum[e] = fmaf(value, piece.at(e), sum[e]);
    }
    // When all have been added.
    DEVICE void end(float (&)[WIDTH<WEIGHT>]) const {}
};

// The same of codes with scales. A piece lies in one group, so that its scale is multiplied with the entry.
struct Codes {
    using Number = Decoded<WEIGHT>;

    struct Piece {
        Pack<WEIGHT> codes;
        BFloat16 scale = {};
    };

    const WEIGHT* first;
    const BFloat16* scale;     // of the thread's piece in the first column
    unsigned stride, apart;    // bytes between columns of codes, and of scales
    int there;
    float multiplied = 0.0f;  // the sum of what codes have been multiplied by

    DEVICE static Codes of(const Matrix& matrix, int mine, int there) {
        const int group = min(mine, static_cast<int>(matrix.outputs) - 1) / static_cast<int>(matrix.group);
        return {static_cast<const WEIGHT*>(matrix.weights) + mine / EACH_ELEMENT<WEIGHT>,
                matrix.scales + group,
                static_cast<unsigned>(matrix.stride),
                static_cast<unsigned>(matrix.scale_stride * sizeof(BFloat16)),
                there};
    }
    DEVICE void load(Piece& piece, unsigned column) const {
        piece.codes.template load<ALIGNED>(at_column(first, column, stride), ALIGNED ? WIDTH<WEIGHT> : there);
        load_once(piece.scale, at_column(scale, column, apart));
    }
    DEVICE void add(float (&sum)[WIDTH<WEIGHT>], float value, const Piece& piece) {
        constexpr int IN_WORD = WIDTH<WEIGHT> / 4;
        float factor = value * widen(piece.scale);
        if (Number::LIFTED != 0.0f) multiplied += factor;
        factor *= 1.0f / Number::UNIT;
#pragma unroll
        for (int e = 0; e < WIDTH<WEIGHT>; ++e)
            sum[e] = fmaf(factor, Number::at(piece.codes.data.word[e / IN_WORD], e % IN_WORD), sum[e]);
    }
    DEVICE void end(float (&sum)[WIDTH<WEIGHT>]) const {
        if (Number::LIFTED != 0.0f)
#pragma unroll
            for (int e = 0; e < WIDTH<WEIGHT>; ++e) sum[e] = fmaf(-Number::LIFTED, multiplied, sum[e]);
    }
};

// A product's weights of one byte are codes, others stand for themselves.
template <class Weight, int SIZE = sizeof(Weight)>
struct ColumnsOf {
    using Type = Pieces<Pack<Weight>>;
};
template <class Weight>
struct ColumnsOf<Weight, 1> {
    using Type = Codes;
};
constexpr bool OF_CODES = sizeof(WEIGHT) == 1;

// What a thread adds up.
struct Outputs {
    const Matrix* const side;  // the tile's matrix; the first of two where SWIGLU
    const Matrix& matrix;      // this thread's
    const int first;           // of the tile, in each of its matrices
    const int mine;   // of this thread; beyond the matrix it reads the last whole piece again, and the sum is not used
    const int there;  // weights to be had from `mine` on

    DEVICE Outputs(const Matrices& matrices, int tile)
        : side(SWIGLU ? matrices.matrix : &matrices.of(tile)),
          matrix(side[lane() / (LANES / SIDES)]),
          first((tile - static_cast<int>(side->tile)) * SIDE),
          mine(ALIGNED ? min(own(), static_cast<int>(matrix.outputs) - WIDTH<WEIGHT>) : own()),
          there(static_cast<int>(matrix.outputs) - mine) {}

    DEVICE typename ColumnsOf<WEIGHT>::Type columns() const {
        return ColumnsOf<WEIGHT>::Type::of(matrix, mine, there);
    }
    // By which the number of an entry becomes its column's offset.
    DEVICE unsigned stride() const { return OF_CODES ? 1u : static_cast<unsigned>(matrix.stride); }

private:
    DEVICE static int lane() { return static_cast<int>(threadIdx.x) % LANES; }
    DEVICE int own() const { return first + lane() % (LANES / SIDES) * WIDTH<WEIGHT>; }
};

// The thread's group in the block; those left over make one that is not full.
DEVICE int group() {
    return static_cast<int>(threadIdx.x) / LANES;
}

// What a thread does while it adds entries of a list: nothing.
struct Nothing {
    DEVICE void at_last() const {}
};

// Adds entries of a list in shared memory that SHARING groups of threads take in turns: the `from`-th of them begins with
// entry `from`. Where a piece of a column has been added the next takes its registers, so that DEEP are under way from first
// to last. (The compiler waits for all of them at once.) `meanwhile` is told when the last ones have been asked for.
template <int SHARING, int DEEP = DEPTH, class Columns, class Meanwhile = const Nothing>
DEVICE void add_listed(float (&sum)[WIDTH<WEIGHT>], const Entry* entries, int from, int count, Columns& columns,
                       Meanwhile& meanwhile = Nothing()) {
    using Piece = typename Columns::Piece;
    constexpr int BATCH = DEEP * SHARING;
    if (from >= SHARING) from = count;
    // Where a batch's pieces lie is read a batch ahead, to ask for each as soon as its registers are free.
    const auto offset = [&](int i) { return entries[min(i, count - 1)].offset; };
    Piece pack[DEEP];
    unsigned ahead[DEEP];
#pragma unroll
    for (int j = 0; j < DEEP; ++j)  // without a condition in between, or the compiler waits at each
        columns.load(pack[j], offset(from + j * SHARING));
#pragma unroll
    for (int j = 0; j < DEEP; ++j) ahead[j] = offset(from + BATCH + j * SHARING);
#pragma unroll 1
    for (; from + 2 * BATCH - SHARING < count; from += BATCH) {
#pragma unroll
        for (int j = 0; j < DEEP; ++j) {
            columns.add(sum, entries[from + j * SHARING].value, pack[j]);
            columns.load(pack[j], ahead[j]);
        }
#pragma unroll
        for (int j = 0; j < DEEP; ++j) ahead[j] = offset(from + 2 * BATCH + j * SHARING);
    }
    // Fewer than two batches are left.
    Piece last[DEEP];
#pragma unroll
    for (int j = 0; j < DEEP; ++j)
        if (from + BATCH + j * SHARING < count) columns.load(last[j], ahead[j]);
    meanwhile.at_last();
    // What is not listed is not added, for 0 times an infinite weight would count.
#pragma unroll
    for (int j = 0; j < 2 * DEEP; ++j) {
        if (from + j * SHARING >= count) break;
        columns.add(sum, entries[from + j * SHARING].value, j < DEEP ? pack[j] : last[j - DEEP]);
    }
}

struct Sums {
    float parts[PARTS][TILE];
    float found[CLUSTER][SIDES * SHARE];  // by the blocks of the cluster, for this one
    Mailbox mailbox;
};

// Says that the block has begun, which gets its sums of all blocks.
DEVICE void begin(Sums& sums) {
    const int finished = min(SHARE, SIDE - cluster_rank<CLUSTER>() * SHARE);
    cluster_begin<CLUSTER>(sums.mailbox, CLUSTER * SIDES * max(finished, 0));
}

// Writes residual + (sum * factor + bias), or silu of that of the first side times that of the second where SWIGLU: groups
// of the block, blocks of the cluster. One thread of the cluster finishes each result; what it adds to the sum is on its
// way while sums meet.
DEVICE void finish(Sums& sums, const Outputs& tile, float (&sum)[WIDTH<WEIGHT>], float factor, const float* residual,
                   float* result) {
    const int thread = static_cast<int>(threadIdx.x);
    const int rank = cluster_rank<CLUSTER>();
    const int finished = rank * SHARE + thread;
    const bool finishes = thread < SHARE && finished < SIDE && tile.first + finished < tile.side->outputs;
    const long long place = tile.side->first + tile.first + finished;
    float bias[SIDES] = {};
    float before = 0.0f;
    if (finishes && residual) before = load_fresh(residual + place);
#pragma unroll
    for (int side = 0; side < SIDES; ++side)
        if (finishes) bias[side] = tile.side[side].bias.at(tile.first + finished, 0.0f);

    if (IN_WARPS)
#pragma unroll
        for (int e = 0; e < WIDTH<WEIGHT>; ++e) sum[e] = warp_sum(sum[e], LANES);
    const int part = IN_WARPS ? thread / 32 : group();
    if (part < PARTS && (!IN_WARPS || thread % 32 < LANES))
#pragma unroll
        for (int e = 0; e < WIDTH<WEIGHT>; ++e) sums.parts[part][thread % LANES * WIDTH<WEIGHT> + e] = sum[e];
    cluster_begun<CLUSTER>();
    __syncthreads();
    if (thread < TILE) {
        float total = 0.0f;
        for (int part = 0; part < PARTS; ++part) total += sums.parts[part][thread];
        const int side = thread / SIDE;
        const int of_side = thread % SIDE;
        float& mine = sums.found[rank][side * SHARE + of_side % SHARE];
        cluster_send<CLUSTER>(sums.mailbox, mine, of_side / SHARE, total);
    }
    cluster_received<CLUSTER>(sums.mailbox);
    if (finishes) {
        float total[SIDES] = {};
#pragma unroll
        for (int side = 0; side < SIDES; ++side) {
            for (int from = 0; from < CLUSTER; ++from) total[side] += sums.found[from][side * SHARE + thread];
            total[side] = fmaf(total[side], factor, bias[side]);
        }
        result[place] = SWIGLU ? silu_mul(total[0], total[SIDES - 1]) : before + total[0];
    }
}

#endif
