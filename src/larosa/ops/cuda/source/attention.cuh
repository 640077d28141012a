// What attention does before the first score and after the last.
//
// Each of ROWS rows has a position of a text, whose cache it reads. A cluster of CLUSTER blocks serves HEADS query heads of
// a row that share a key head, each block a stretch of positions. Each warp of a block works on a part of them with a
// running softmax (maximum, sum, weighted values); warps and blocks are merged at the end, in a fixed order. Scores are
// logarithms to the base 2.
#ifndef LAROSA_ATTENTION
#define LAROSA_ATTENTION

#include "values.cuh"

#ifndef CACHE
#error "CACHE, SIZE, HEADS, CLUSTER, THREADS and ROWS are given by the launcher"
#endif

constexpr int WARPS = THREADS / 32;

// The maximum of no scores: -infinity.
DEVICE float none() { return __uint_as_float(0xff800000u); }

// By which what was summed under `maximum` counts under a larger one; nothing was summed under -infinity.
DEVICE float rescale(float maximum, float larger) {
    return maximum == none() ? 0.0f : power_of_two(maximum - larger);
}

// Of one softmax over some positions.
struct Partial {
    float maximum;
    float sum;
    float weighted[SIZE];
};

struct Rotary {
    const float* cos;  // [T, SIZE], null without rotation
    const float* sin;
    Vector q_gain;
    Vector k_gain;
    float eps;
    float scale;
};

// The positions that a block of the cluster attends to.
struct Stretch {
    int begin;
    int end;
};

DEVICE Stretch stretch_of(int position, int window, int rank) {
    const int start = window > 0 ? max(0, position + 1 - window) : 0;
    const long long seen = position + 1 - start;
    return {start + static_cast<int>(seen * rank / CLUSTER), start + static_cast<int>(seen * (rank + 1) / CLUSTER)};
}

constexpr int HALF = SIZE / 2;
constexpr int PAIRS = (HALF + 31) / 32;  // of entries i and HALF + i that a lane has of a head: i is the lane and every 32nd

// By which a warp turns a head. Asked for before the head is there.
struct Turn {
    float cos[2][PAIRS];
    float sin[2][PAIRS];

    DEVICE Turn() {}
    DEVICE Turn(const Rotary& rotary, int position, bool wanted = true) {
        const bool turned = rotary.cos != nullptr && wanted;
        const long long at = turned ? static_cast<long long>(position) * SIZE : 0;
#pragma unroll
        for (int j = 0; j < PAIRS; ++j) {
            const int i = static_cast<int>(threadIdx.x) % 32 + j * 32;
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                cos[half][j] = load_parameter(rotary.cos + at + half * HALF + i, turned && i < HALF);
                sin[half][j] = load_parameter(rotary.sin + at + half * HALF + i, turned && i < HALF);
                if (!turned) cos[half][j] = 1.0f;
            }
        }
    }
};

// A head of a warp, PAIRS in each lane; zeros where it is not `there`.
struct Head {
    float entry[2][PAIRS];

    DEVICE Head() {}
    DEVICE Head(const float* head, bool there) {
#pragma unroll
        for (int j = 0; j < PAIRS; ++j) {
            const int i = static_cast<int>(threadIdx.x) % 32 + j * 32;
            entry[0][j] = load_fresh(head + i, there && i < HALF);
            entry[1][j] = load_fresh(head + HALF + i, there && i < HALF);
        }
    }

    // Norms it if it has a gain, and turns it.
    DEVICE void prepare(const Vector& gain, float eps, const Turn& turn) {
        if (gain.data != nullptr) norm(gain, eps);
#pragma unroll
        for (int j = 0; j < PAIRS; ++j) {
            const float first = entry[0][j];
            entry[0][j] = first * turn.cos[0][j] - entry[1][j] * turn.sin[0][j];
            entry[1][j] = entry[1][j] * turn.cos[1][j] + first * turn.sin[1][j];
        }
    }

    // `put(i, x)` takes the entries.
    template <class Put>
    DEVICE void each(Put put) const {
#pragma unroll
        for (int j = 0; j < PAIRS; ++j) {
            const int i = static_cast<int>(threadIdx.x) % 32 + j * 32;
            if (i >= HALF) break;
            put(i, entry[0][j]);
            put(HALF + i, entry[1][j]);
        }
    }

    // The largest magnitude, NaN if there is one, in all lanes.
    DEVICE float largest() const {
        unsigned bits = 0;  // those of NaN are above infinity's
#pragma unroll
        for (int j = 0; j < PAIRS; ++j)
#pragma unroll
            for (int half = 0; half < 2; ++half) bits = max(bits, __float_as_uint(entry[half][j]) & 0x7fffffffu);
        return __uint_as_float(__reduce_max_sync(ALL_LANES, bits));
    }

private:
    DEVICE void norm(const Vector& gain, float eps) {
        float squares = 0.0f;
#pragma unroll
        for (int j = 0; j < PAIRS; ++j)
            squares = fmaf(entry[0][j], entry[0][j], fmaf(entry[1][j], entry[1][j], squares));
        const float inverse = inverse_rms(warp_sum(squares), SIZE, eps);
#pragma unroll
        for (int j = 0; j < PAIRS; ++j) {
            const int i = static_cast<int>(threadIdx.x) % 32 + j * 32;
#pragma unroll
            for (int half = 0; half < 2; ++half)
                if (i < HALF) entry[half][j] *= inverse * gain.at(half * HALF + i, 1.0f);
        }
    }
};

// The positions that rows of this step write and a block attends to: -1 where a row writes none of these.
struct Fresh {
    int position[ROWS];

    // Of a row that only a running kernel knows; beyond ROWS there is none.
    DEVICE int of(int row) const {
        int found = -1;
#pragma unroll
        for (int r = 0; r < ROWS; ++r)
            if (r == row) found = position[r];
        return found;
    }
    // The row that writes a position, or -1.
    DEVICE int row(int at) const {
        int found = -1;
#pragma unroll
        for (int r = 0; r < ROWS; ++r)
            if (position[r] == at) found = r;
        return found;
    }
    // The first of them, beyond all positions if there is none.
    DEVICE int first() const {
        unsigned first = 0x7fffffffu;
#pragma unroll
        for (int r = 0; r < ROWS; ++r) first = min(first, static_cast<unsigned>(position[r]));
        return static_cast<int>(first);
    }
};

// What a kernel reads of the product before it, q, k and v: a block its query heads, each by a warp, and the keys and values
// of all rows whose positions are fresh in it, for other blocks are only writing those. All that a thread reads is asked
// for at once.
struct Heads {
    // Of every second warp, the last one among them, keys, of the others values.
    static constexpr int PAIRED = WARPS / 2;
    static constexpr int STORED = (ROWS + PAIRED - 1) / PAIRED;  // of a warp
    static_assert(WARPS % 2 == 0, "a warp has keys, another one values");

    const float* queries;  // of the block's first head
    const float* stored;    // the first row's, of the warp's kind
    const long long width;  // of a row
    const Rotary& rotary;
    const Fresh& fresh;
    const Turn turn;
    Turn turns[STORED];

    DEVICE Heads(const float* qkv, int row, int query_heads, int key_heads, int first_head, int key_head,
                 const Rotary& rotary, int position, const Fresh& fresh)
        : queries(qkv + row * (query_heads + 2ll * key_heads) * SIZE + first_head * SIZE),
          stored(qkv + (query_heads + (has_keys() ? 0 : key_heads) + key_head) * SIZE),
          width((query_heads + 2ll * key_heads) * SIZE),
          rotary(rotary),
          fresh(fresh),
          turn(rotary, position) {
        if (ROWS > 1)
#pragma unroll
            for (int i = 0; i < STORED; ++i) {
                const int at = fresh.of(row_of(i));
                turns[i] = Turn(rotary, at, at >= 0 && has_keys());
            }
    }

    // `put_query(h, head)` takes the block's queries, `put_key(row, position, head)` and `put_value` what is fresh.
    template <class PutQuery, class PutKey, class PutValue>
    DEVICE void prepare(PutQuery put_query, PutKey put_key, PutValue put_value) const {
        Head heads[STORED];
#pragma unroll
        for (int i = 0; i < STORED; ++i) heads[i] = Head(stored + row_of(i) * width, fresh.of(row_of(i)) >= 0);
#pragma unroll
        for (int from = 0; from < HEADS; from += WARPS) {
            const int head = from + warp();
            if (head >= HEADS) break;
            Head query(queries + head * SIZE, true);
            query.prepare(rotary.q_gain, rotary.eps, turn);
            put_query(head, query);
        }
#pragma unroll
        for (int i = 0; i < STORED; ++i) {
            const int at = fresh.of(row_of(i));
            if (at < 0) continue;
            if (has_keys()) {
                heads[i].prepare(rotary.k_gain, rotary.eps, ROWS > 1 ? turns[i] : turn);
                put_key(row_of(i), at, heads[i]);
            } else {
                put_value(row_of(i), at, heads[i]);
            }
        }
        __syncthreads();
    }

private:
    DEVICE static int warp() { return static_cast<int>(threadIdx.x) / 32; }
    DEVICE static bool has_keys() { return (WARPS - 1 - warp()) % 2 == 0; }
    // Of the i-th key or value of this warp.
    DEVICE static int row_of(int i) { return (WARPS - 1 - warp()) / 2 + i * PAIRED; }
};

// COUNT partial softmaxes in one, as far as entry i of the head goes; `at(p)` is the p-th.
struct Merged {
    float maximum;
    float sum;
    float entry;
};

template <int COUNT, class At>
DEVICE Merged merged(int i, At at) {
    Merged all = {none(), 0.0f, 0.0f};
    for (int p = 0; p < COUNT; ++p) all.maximum = fmaxf(all.maximum, at(p).maximum);
    for (int p = 0; p < COUNT; ++p) {
        const Partial& partial = at(p);
        const float scale = rescale(partial.maximum, all.maximum);
        all.sum = fmaf(scale, partial.sum, all.sum);
        all.entry = fmaf(scale, partial.weighted[i % SIZE], all.entry);
    }
    return all;
}

// What the blocks of a cluster have found, for this one.
struct Found {
    Partial by[CLUSTER][HEADS];
    Mailbox mailbox;
};

// Says that the block has begun. Block r finishes every CLUSTER-th entry from the r-th on, and gets of each block theirs
// and each head's maximum and sum.
DEVICE void begin(Found& found) {
    const int entries = (HEADS * SIZE - cluster_rank<CLUSTER>() + CLUSTER - 1) / CLUSTER;
    cluster_begin<CLUSTER>(found.mailbox, CLUSTER * (entries + 2 * HEADS));
}

// Merges what warps have found, `of_warp(w, h)` being warp w's of head h, and then blocks of the cluster.
template <class OfWarp>
DEVICE void finish(Found& found, int first_head, OfWarp of_warp, float* result) {
    const int thread = static_cast<int>(threadIdx.x);
    const int rank = cluster_rank<CLUSTER>();
    cluster_begun<CLUSTER>();
    __syncthreads();
    for (int i = thread; i < HEADS * SIZE; i += THREADS) {
        const int h = i / SIZE;
        const Merged own = merged<WARPS>(i, [&](int w) -> const Partial& { return of_warp(w, h); });
        Partial& mine = found.by[rank][h];
        cluster_send<CLUSTER>(found.mailbox, mine.weighted[i % SIZE], i % CLUSTER, own.entry);
        for (int to = i % SIZE; to < CLUSTER; to += SIZE) {
            cluster_send<CLUSTER>(found.mailbox, mine.maximum, to, own.maximum);
            cluster_send<CLUSTER>(found.mailbox, mine.sum, to, own.sum);
        }
    }
    cluster_received<CLUSTER>(found.mailbox);
    for (int i = rank + thread * CLUSTER; i < HEADS * SIZE; i += THREADS * CLUSTER) {
        const int h = i / SIZE;
        const Merged all = merged<CLUSTER>(i, [&](int b) -> const Partial& { return found.by[b][h]; });
        result[first_head * SIZE + i] = all.entry * reciprocal(all.sum);
    }
}

#endif
