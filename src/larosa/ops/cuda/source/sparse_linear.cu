// y = residual + x W^T + b for an x that is given by its k entries, or the first `count` of them where somebody counted:
// reads the columns of W at their indices.
//
// With an ADAPTER it is residual R^T instead of the residual. That reads memory while the list is still being made, and
// goes into the same sums.
//
// Of ROWS vectors, where they are more than one, all entries are meant: a block reads its columns once for all of them.
//
// Without indices all k columns are meant, of which an entry has COLUMNS_EACH: column c is of entry c % (k / COLUMNS_EACH).
#ifndef ADAPTER
#error "ADAPTER, ROWS and COLUMNS_EACH are given by the launcher"
#endif
#ifdef LOADS
constexpr int DEPTH = LOADS;  // loads in flight in each thread
#else
// Two blocks of a multiprocessor have registers for so many of them beside the sums of up to four rows.
constexpr int DEPTH = ROWS > 4 ? 4 : ALONE ? 5 : ROWS == 4 ? 2 : ROWS == 3 ? 3 : 4;
#endif

#include "adapter.cuh"

// From the end of the adapter to the first listed column memory would be idle. So a block that is alone is two teams, of
// which the first is done with its part of the adapter earlier, and takes more of the list.
constexpr int TEAMS = ALONE ? 2 : 1;
constexpr int MATES = THREADS / TEAMS;           // threads of a team
constexpr int EARLIER = 16 * 1024 / 16 / LANES;  // entries, 16 KB, that the first team takes of the list instead
// Entries of the list that a team holds in shared memory.
constexpr int CHUNK = ROWS == 1 && ALONE ? 3072 : ROWS > 4 && ALONE ? 1024 : 2048;
static_assert(TEAMS == 1 || MATES % LANES == 0, "a group is in one team");

// The columns that a product reads, without indices all that `width` entries of a vector have, or of each row, and how far
// apart columns are.
struct Listed {
    const float* values;
    const int* indices;
    unsigned stride;
    int width;

    DEVICE Held at(int i) const {
        const unsigned column = ROWS == 1 && indices ? load_fresh(indices + i) : i;
        const float* value = values + (COLUMNS_EACH == 1 ? i : i % width);
        return held(column * stride, [&](int row) { return load_fresh(value + row * width); });
    }
};

struct Shared {
    Held entries[TEAMS][CHUNK];
    Sums sums;
};

SHARED(Shared);

// Adds entries of a part, those of the thread's team, of which the first has `more` than the second. Both take equally
// many chunks, or racecheck no longer knows which of their barriers belong together.
template <int DEEP, class Entries, class Columns>
DEVICE void add(Sum& sum, Shared& shared, Entries entries, Part part, int more, Columns columns) {
    const int team = static_cast<int>(threadIdx.x) / MATES;
    const int mate = static_cast<int>(threadIdx.x) % MATES;
    const int middle = part.begin + (part.size() + more) / 2;
    const Part own = TEAMS == 1 ? part : team == 0 ? Part{part.begin, middle} : Part{middle, part.end};
    const int most = TEAMS == 1 ? part.size() : max(middle - part.begin, part.end - middle);
    for (int done = 0; done < most; done += CHUNK) {
        const int start = own.begin + done;
        const int here = min(CHUNK, own.end - start);
        team_sync<TEAMS, MATES>(team);  // what stood here has been read
        for (int i = mate; i < here; i += MATES) shared.entries[team][i] = entries.at(start + i);
        team_sync<TEAMS, MATES>(team);
        if (here > 0)
            add_listed<MATES / LANES, DEEP>(sum, listed(shared.entries[team], start, entries.stride), mate / LANES,
                                            here, columns);
    }
    columns.end(sum);
}

// Sums of so many outputs as a thread has codes take more than half of the registers.
KERNEL(THREADS, ALONE || OF_CODES || ROWS > 4 ? 1 : 2)
sparse_linear(const float* values, const int* indices, int k, const long long* count, Matrices matrices,
              const float* residual, const void* adapter, unsigned adapter_stride, int width,
              SCALE_PARAMETERS float* result, int outputs) {
    Shared& shared = shared_memory<Shared>();
    const long long row = blockIdx.y;
    const Outputs tile(matrices, static_cast<int>(blockIdx.x) / CLUSTER);
    Part listed = Part::of_block(k);

    begin(shared.sums);
    Sum sum = {};
    int earlier = 0;
    if constexpr (ADAPTER) {
#ifdef SCALE
        const Scales<SCALE> scales(scale, tile);
        const CarriedByDigits entries{residual + row * width, adapter_stride, width};
        const Part carried = Part::of_block(digits);
#else
        const Carried entries{residual + row * width, adapter_stride, width};
        const Part carried = Part::of_block(width);
#endif
        earlier = 2 * min(EARLIER, min(carried.size() / LIGHTER, listed.size()) / 2);
        const Carry* pieces = static_cast<const Carry*>(adapter) + tile.matrix.first + tile.mine;
        add<ADAPTER_DEPTH>(sum, shared, entries, carried, -earlier * LIGHTER, Pieces<Piece>{pieces, tile.there});
#ifdef SCALE
        scales.apply(sum);
#endif
    }
    wait_for_inputs();
    if (count) {
        listed = Part::of_block(min(static_cast<int>(load_fresh(count + row)), k));
        earlier = min(earlier, listed.size());
    }
    const int given = k / COLUMNS_EACH;  // values of a row
    const Listed entries{values + row * given, indices ? indices + row * k : nullptr, tile.stride(), given};
    add<DEPTH>(sum, shared, entries, listed, earlier, tile.columns());
    release_dependents();
    finish(shared.sums, tile, sum, 1.0f, ADAPTER || !residual ? nullptr : residual + row * outputs,
           result + row * outputs, outputs);
}
