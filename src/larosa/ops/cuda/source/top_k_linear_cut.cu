// y = residual R^T + x W^T + b for the k largest entries of x, of which one block tells all others the least: the cut.
//
// While it selects, the others read the adapter R. Each then lists for itself which of its entries are not below the cut,
// so that no list is written and fetched. Blocks start in the order of their numbers, so the first one, which selects, runs
// when others wait for it, if the GPU has a multiprocessor for each of them.
constexpr int DEPTH = 5;  // loads in flight in each thread

#include "adapter.cuh"
#include "selection.cuh"

static_assert(IN_REGISTERS && SOURCE == AS_IS, "longer vectors are selected from by a kernel of their own");

// Of x, the entries of a thread: a block lists every CLUSTER-th row of 32.
constexpr int ROW = 32 * CLUSTER;
constexpr int LISTED = (EACH + CLUSTER - 1) / CLUSTER;
static_assert(LISTED * THREADS * CLUSTER <= 1 << INDEX_BITS, "no room for the order's bits");

struct Elected {
    Ranking ranking;
    unsigned candidates;  // how many are listed
};

struct Listing {
    Entry entries[LISTED * THREADS];
    unsigned kept[WARPS];
    unsigned long long cut;
    Sums sums;
};

union Shared {
    Elected elected;
    Listing listing;
};

SHARED(Shared);

// Posts the cut.
DEVICE void elect(Elected& shared, const float* x, int width, int k, Vector score, unsigned long long* board) {
    if (threadIdx.x == 0) shared.candidates = 0;
    prepare(shared.ranking);
    const Factors<SCORE> scores(score, width);
    const Activation activation(x, 0, width, Vector{}, 0.0f);
    wait_for_inputs();
    release_dependents();

    const Chosen chosen = choose(shared.ranking, activation, scores, k);
    list_open(shared, chosen, activation);
    __syncthreads();
    const unsigned need = chosen.digit.need;
    compare(shared.ranking, chosen.digit.there, need, [&](unsigned, unsigned rest, unsigned larger) {
        if (larger + 1 == need) post(board, (static_cast<unsigned long long>(chosen.first_digit) << 32) + rest);
    });
}

// A thread's entries of x and of the score, asked for with the adapter's last pieces, by when x should be there: to wait
// for it sooner would leave memory idle. The cut is there later.
struct Asked {
    const float* x;
    const Vector score;
    const int width;
    const unsigned long long* board;
    static constexpr bool ALL = FILLED && EACH % CLUSTER == 0;
    const int first = cluster_rank<CLUSTER>() * 32 + Threads::warp() * LISTED * ROW + Threads::lane();
    float entry[LISTED];
    float factor[LISTED];
    unsigned long long shown;

    DEVICE Asked(const float* x, Vector score, int width, const unsigned long long* board)
        : x(x), score(score), width(width), board(board) {}

    DEVICE int index(int i) const { return first + i * ROW; }

    DEVICE void at_last() {
        wait_for_inputs();
#pragma unroll
        for (int i = 0; i < LISTED; ++i) entry[i] = load_fresh(x + index(i), ALL || index(i) < width);
        score.read<SCORE, ALL, ROW>(factor, first, width);
        shown = look_at(board, threadIdx.x == 0);
    }
};

// Says that the block has taken the cut, when it waits for its last columns anyway.
struct Leaving {
    unsigned long long* board;
    unsigned long long before = 0;

    DEVICE explicit Leaving(unsigned long long* board) : board(board) {}

    DEVICE void at_last() {
        if (threadIdx.x == 0) before = taken(board);
    }
};

// Lists the block's entries that are not below the cut, in a fixed order. Returns how many they are.
DEVICE int list(Listing& shared, const Asked& asked, unsigned stride) {
    settle(stride);
    __syncthreads();  // the adapter's entries have been read, and the cut is there
    // As in the order of all: by their magnitudes, then the lowest index first.
    const unsigned least = static_cast<unsigned>(shared.cut >> INDEX_BITS);
    const int last = static_cast<int>(LAST - (static_cast<unsigned>(shared.cut) & LAST));
    unsigned keep = 0;
#pragma unroll
    for (int i = 0; i < LISTED; ++i)
        if (magnitude(asked.entry[i], asked.factor[i]) >= least + (asked.index(i) > last)) keep |= 1u << i;
    const unsigned own = __popc(keep);
    const unsigned up_to = Threads::up_to(own);
    if (Threads::lane() == 31) shared.kept[Threads::warp()] = up_to;
    __syncthreads();
    unsigned place = Threads::before(shared.kept) + up_to - own;
#pragma unroll
    for (int i = 0; i < LISTED; ++i) {
        const bool kept = keep & 1u << i;
        const Entry entry{asked.entry[i], asked.index(i) * stride};
        entry.put(shared.entries + place, kept);
        if (kept) ++place;
    }
    __syncthreads();
    return static_cast<int>(Threads::sum(shared.kept));
}

KERNEL(THREADS, 1)
top_k_linear_cut(const float* x, int width, int k, Vector score, Matrices matrices, const float* residual,
                 const void* adapter, unsigned adapter_stride, int carried, SCALE_PARAMETERS unsigned long long* board,
                 float* result) {
    Shared& shared = shared_memory<Shared>();
    const int cluster = static_cast<int>(blockIdx.x) / CLUSTER;
    if (cluster == 0) {
        if (cluster_rank<CLUSTER>() == 0) {
            elect(shared.elected, x, width, k, score, board);
        } else {
            wait_for_inputs();
            release_dependents();
        }
        return;
    }
    Listing& own = shared.listing;
    const Outputs tile(matrices, cluster - 1);
    begin(own.sums);
    if (threadIdx.x == 0) score.fetch(width);
    Sum sum = {};
    Asked asked(x, score, width, board);
    add_adapter<LISTED * THREADS>(sum, own.entries, residual, adapter, adapter_stride, carried, SCALE_ARGUMENTS tile, asked);
    if (threadIdx.x == 0) own.cut = posted(board, asked.shown);
    const int count = list(own, asked, tile.stride());
    Leaving leaving(board);
    auto columns = tile.columns();
    if (count > 0)
        add_listed<GROUPS>(sum, own.entries, group(), count, columns, leaving);
    else
        leaving.at_last();
    columns.end(sum);
    release_dependents();
    finish(own.sums, tile, sum, 1.0f, nullptr, result, 0);
    if (threadIdx.x == 0) leave(board, leaving.before, gridDim.x - CLUSTER);
}
