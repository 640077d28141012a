// Columns of matrices times the entries of a list, added up: what sparse products have in common.
//
// Matrices are column-major. A tile of LANES * WIDTH outputs belongs to a cluster of CLUSTER blocks; each block takes a
// part of the list, each group of LANES threads every GROUPS-th entry of that part, 16 bytes a thread. Where LANES is no
// power of two, groups go across warps, and the last few threads have nothing to do. Partial sums meet in shared memory,
// first of the block, then of the cluster, each output's in the block that finishes it.
//
// Of several vectors that are read whole, ROWS of them, each piece of a column is read once and added to all their sums.
// The sum of a row is made in the order of one row alone.
#ifndef LAROSA_COLUMNS
#define LAROSA_COLUMNS

#include "values.cuh"

#ifndef WEIGHT
#error "WEIGHT, LANES, CLUSTER, ALIGNED and SWIGLU are given by the launcher"
#endif
#ifndef ROWS
#define ROWS 1
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
// Rows whose parts meet in shared memory at once: as many as leave room for other blocks.
constexpr int MEETING = (ROWS <= 4 ? 16 : 32) * 1024 / (PARTS * TILE * 4);
constexpr int AT_ONCE = MEETING < 1 ? 1 : MEETING > ROWS ? ROWS : MEETING;
constexpr int FINISHES = (ROWS * SHARE + THREADS - 1) / THREADS;  // results of a thread
static_assert(AT_ONCE * TILE <= THREADS, "a thread adds up the parts of an output of a row");

using Sum = float[ROWS][WIDTH<WEIGHT>];  // a thread's, for each row and output

struct alignas(8) Entry {
    float value;
    unsigned offset;  // of its column, in elements; its number where weights are codes

    // Written to shared memory where `wanted`, without a branch.
    DEVICE void put(Entry* to, bool wanted) const { store_pair(&to->value, value, offset, wanted); }
};

// What ROWS vectors have at one place, where they are read whole.
struct alignas(ROWS % 4 == 0 ? 16 : ROWS % 2 == 0 ? 8 : 4) Across {
    float row[ROWS];
};

// These in shared memory, from place `first` on: where a column is follows from its number.
struct Every {
    struct Item {
        const Across& value;
        unsigned offset;
    };
    const Across* entries;
    unsigned first;
    unsigned stride;

    DEVICE Item operator[](int i) const { return {entries[i], (first + i) * stride}; }
};

// What a product holds of what it reads: of one vector entries of a list, of several all that they have at a place.
#if ROWS == 1
using Held = Entry;
template <class Load>
DEVICE Held held(unsigned offset, Load load) { return {load(0), offset}; }
// Of those held in shared memory, from place `first` on.
DEVICE const Entry* listed(const Entry* entries, int, unsigned) { return entries; }
#else
using Held = Across;
template <class Load>
DEVICE Held held(unsigned, Load load) {
    Across across;
#pragma unroll
    for (int row = 0; row < ROWS; ++row) across.row[row] = load(row);
    return across;
}
DEVICE Every listed(const Across* entries, int first, unsigned stride) {
    return {entries, static_cast<unsigned>(first), stride};
}
#endif

DEVICE float of_row(float value, int) { return value; }
DEVICE float of_row(const Across& value, int row) { return value.row[row]; }

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
    template <class Value>
    DEVICE void add(Sum& sum, const Value& value, const Piece& piece) {
        static_assert(Piece::COUNT == WIDTH<WEIGHT>, "one for each of the thread's outputs");
#pragma unroll
        for (int e = 0; e < WIDTH<WEIGHT>; ++e) {
            const float weight = piece.at(e);
#pragma unroll
            for (int r = 0; r < ROWS; ++r) sum[r][e] = fmaf(of_row(value, r), weight, sum[r][e]);
        }
    }
    // When all have been added.
    DEVICE void end(Sum&) const {}
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
    float multiplied[ROWS] = {};  // the sum of what codes have been multiplied by

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
    template <class Value>
    DEVICE void add(Sum& sum, const Value& value, const Piece& piece) {
        constexpr int IN_WORD = WIDTH<WEIGHT> / 4;
        float factor[ROWS];
#pragma unroll
        for (int r = 0; r < ROWS; ++r) {
            factor[r] = of_row(value, r) * widen(piece.scale);
            if (Number::LIFTED != 0.0f) multiplied[r] += factor[r];
            factor[r] *= 1.0f / Number::UNIT;
        }
#pragma unroll
        for (int e = 0; e < WIDTH<WEIGHT>; ++e) {
            const float code = Number::at(piece.codes.data.word[e / IN_WORD], e % IN_WORD);
#pragma unroll
            for (int r = 0; r < ROWS; ++r) sum[r][e] = fmaf(factor[r], code, sum[r][e]);
        }
    }
    DEVICE void end(Sum& sum) const {
        if (Number::LIFTED != 0.0f)
#pragma unroll
            for (int r = 0; r < ROWS; ++r)
#pragma unroll
                for (int e = 0; e < WIDTH<WEIGHT>; ++e) sum[r][e] = fmaf(-Number::LIFTED, multiplied[r], sum[r][e]);
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
template <int SHARING, int DEEP = DEPTH, class Entries, class Columns, class Meanwhile = const Nothing>
DEVICE void add_listed(Sum& sum, Entries entries, int from, int count, Columns& columns,
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
    float parts[AT_ONCE][PARTS][TILE];
    float found[ROWS][CLUSTER][SIDES * SHARE];  // by the blocks of the cluster, for this one
    Mailbox mailbox;
};

// Says that the block has begun, which gets its sums of all blocks.
DEVICE void begin(Sums& sums) {
    const int finished = min(SHARE, SIDE - cluster_rank<CLUSTER>() * SHARE);
    cluster_begin<CLUSTER>(sums.mailbox, ROWS * CLUSTER * SIDES * max(finished, 0));
}

// Writes residual + (sum * factor + bias), or silu of that of the first side times that of the second where SWIGLU: groups
// of the block, blocks of the cluster. One thread of the cluster finishes each result; what it adds to the sum is on its
// way while sums meet. Results of a row, as of the residual, are `outputs` behind those of the row before.
DEVICE void finish(Sums& sums, const Outputs& tile, Sum& sum, float factor, const float* residual, float* result,
                   long long outputs) {
    const int thread = static_cast<int>(threadIdx.x);
    const int rank = cluster_rank<CLUSTER>();
    const int at = tile.first + rank * SHARE;  // of the block's first result
    bool finishes[FINISHES];
    long long place[FINISHES];
    float bias[FINISHES][SIDES] = {};
    float before[FINISHES] = {};
#pragma unroll
    for (int i = 0; i < FINISHES; ++i) {
        const int which = thread + i * THREADS;
        const int own = ROWS == 1 ? which : which % SHARE;
        finishes[i] = which < ROWS * SHARE && rank * SHARE + own < SIDE && at + own < tile.side->outputs;
        place[i] = (ROWS == 1 ? 0 : which / SHARE * outputs) + tile.side->first + at + own;
        if (finishes[i] && residual) before[i] = load_fresh(residual + place[i]);
#pragma unroll
        for (int side = 0; side < SIDES; ++side)
            if (finishes[i]) bias[i][side] = tile.side[side].bias.at(at + own, 0.0f);
    }

    if (IN_WARPS)
#pragma unroll
        for (int r = 0; r < ROWS; ++r)
#pragma unroll
            for (int e = 0; e < WIDTH<WEIGHT>; ++e) sum[r][e] = warp_sum(sum[r][e], LANES);
    const int part = IN_WARPS ? thread / 32 : group();
    const bool has_part = part < PARTS && (!IN_WARPS || thread % 32 < LANES);
#pragma unroll
    for (int first = 0; first < ROWS; first += AT_ONCE) {
        if (first > 0) __syncthreads();  // the parts of other rows have been added up
#pragma unroll
        for (int r = first; r < min(first + AT_ONCE, ROWS); ++r)
            if (has_part)
#pragma unroll
                for (int e = 0; e < WIDTH<WEIGHT>; ++e)
                    sums.parts[r - first][part][thread % LANES * WIDTH<WEIGHT> + e] = sum[r][e];
        if (first == 0) cluster_begun<CLUSTER>();
        __syncthreads();
        const int of_these = AT_ONCE == 1 ? 0 : thread / TILE;
        if (thread < min(AT_ONCE, ROWS - first) * TILE) {
            const int output = thread - of_these * TILE;
            float total = 0.0f;
            for (int part = 0; part < PARTS; ++part) total += sums.parts[of_these][part][output];
            const int side = output / SIDE;
            const int of_side = output % SIDE;
            float& mine = sums.found[first + of_these][rank][side * SHARE + of_side % SHARE];
            cluster_send<CLUSTER>(sums.mailbox, mine, of_side / SHARE, total);
        }
    }
    cluster_received<CLUSTER>(sums.mailbox);
#pragma unroll
    for (int i = 0; i < FINISHES; ++i) {
        if (!finishes[i]) continue;
        const int which = thread + i * THREADS;
        const int row = ROWS == 1 ? 0 : which / SHARE;
        float total[SIDES] = {};
#pragma unroll
        for (int side = 0; side < SIDES; ++side) {
            for (int from = 0; from < CLUSTER; ++from)
                total[side] += sums.found[row][from][side * SHARE + which - row * SHARE];
            total[side] = fmaf(total[side], factor, bias[i][side]);
        }
        result[place[i]] = SWIGLU ? silu_mul(total[0], total[SIDES - 1]) : before[i] + total[0];
    }
}

#endif
