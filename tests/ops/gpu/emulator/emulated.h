// The meaning of source/device.cuh and of CUDA's built-ins on a CPU: every thread is a fiber, blocks of a cluster run
// together, clusters one after the other. Threads take turns in an order that can be chosen, and give way only where
// they wait for each other, so a barrier that is missing shows as a result that depends on the order.
#ifndef LAROSA_DEVICE
#define LAROSA_DEVICE

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <numeric>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define KERNEL(threads, blocks) static void
#define DEVICE inline
#define SHARED(type) extern "C" unsigned shared_bytes; unsigned shared_bytes = sizeof(type)

using std::max;
using std::min;

struct Index {
    unsigned x = 0, y = 0, z = 0;
};
template <int COUNT>
struct alignas(4 * COUNT) Words {
    unsigned word[COUNT];
};
struct uint4 {
    unsigned x, y, z, w;
};
struct float4 {
    float x, y, z, w;
};

namespace emulator {

// Threads that wait for each other, `size` of them.
struct Barrier {
    unsigned size = 0;
    unsigned arrived = 0;
    unsigned generation = 0;
};

struct Warp {
    Barrier barrier;
    alignas(8) unsigned char given[32 * 8];  // by each lane, for the others
};

struct Block {
    Barrier barrier;
    Barrier teams[2];
    std::vector<Warp> warps;
    std::vector<unsigned char> shared;
};

struct Thread {
    Index thread, block;
    Block* of = nullptr;
    Warp* warp = nullptr;
    const Barrier* at = nullptr;  // where it waits, for another generation
    unsigned generation = 0;
    std::vector<std::vector<std::pair<void*, std::string>>> copies;  // groups of them, the last one not ended yet
    bool waited = false;    // has called wait_for_inputs
    bool released = false;  // has called release_dependents
    bool done = false;
};

// Where a thread runs. It outlives the thread, for the one with the same number in the next cluster: what stacks take
// is touched once a launch, and all but the first jump to their places, which spares the system calls of ucontext.
struct Fiber {
    jmp_buf place;
    bool started = false;
};

// An odd number of cache lines: what threads keep at the same depth of their stacks would share few places otherwise.
constexpr size_t STACK = 64 * 1024 + 64;

inline std::vector<Block> blocks;  // of the cluster that runs
inline Barrier cluster;
inline Thread* current = nullptr;
inline Fiber* fiber = nullptr;  // of the current thread
inline jmp_buf scheduler;
inline bool moved = false;  // some thread got on since the scheduler last looked
inline std::string failure;
inline Index grid;
inline void (*body)(void**) = nullptr;
inline void** arguments = nullptr;

inline void fail(const std::string& what) {
    if (failure.empty()) failure = what;
}

inline void start();

inline void give_way() {
    if (_setjmp(fiber->place) == 0) _longjmp(scheduler, 1);
}

inline void resume(Thread& thread, Fiber& its, char* stack) {
    current = &thread;
    fiber = &its;
    if (_setjmp(scheduler) != 0) return;
    if (its.started) _longjmp(its.place, 1);
    its.started = true;
    ucontext_t context;
    getcontext(&context);
    context.uc_stack.ss_sp = stack;
    context.uc_stack.ss_size = STACK;
    makecontext(&context, start, 0);
    setcontext(&context);
}

inline void wait_at(Barrier& barrier) {
    moved = true;
    if (++barrier.arrived == barrier.size) {
        barrier.arrived = 0;
        ++barrier.generation;
        return;
    }
    current->at = &barrier;
    current->generation = barrier.generation;
    give_way();  // until another thread has ended this generation
    moved = true;
}

// Every lane gives `x`, and gets what `choose` makes of the warp's 32 numbers.
template <class T, class Choose>
T exchange(T x, Choose choose) {
    static_assert(sizeof x <= 8);
    Warp& warp = *current->warp;
    T* all = reinterpret_cast<T*>(warp.given);
    all[current->thread.x % 32] = x;
    wait_at(warp.barrier);
    const T chosen = choose(all);
    wait_at(warp.barrier);
    return chosen;
}

inline uint32_t hash(uint32_t x, uint32_t seed) { return (x * 0x9e3779b1u ^ seed) * 0x85ebca6bu; }

inline void start() {
    for (;;) {
        body(arguments);
        if (!current->waited || !current->released) fail("a thread ended without waiting for inputs or releasing others");
        current->done = true;
        moved = true;
        give_way();  // until the next cluster
    }
}

inline void run_cluster(unsigned first, unsigned y, unsigned size, unsigned threads, unsigned shared, unsigned seed,
                        Fiber* fibers, char* stacks) {
    blocks = std::vector<Block>(size);
    cluster = {size * threads};
    std::vector<Thread> all(size * threads);
    for (unsigned b = 0; b < size; ++b) {
        blocks[b].barrier = {threads};
        blocks[b].warps.resize(threads / 32);
        for (Warp& warp : blocks[b].warps) warp.barrier = {32};
        blocks[b].shared.assign(shared + 16, 0xff);  // NaN, and far out of bounds as an index
    }
    for (unsigned i = 0; i < all.size(); ++i) {
        Thread& thread = all[i];
        thread.of = &blocks[i / threads];
        thread.thread.x = i % threads;
        thread.warp = &thread.of->warps[thread.thread.x / 32];
        thread.block = {first + i / threads, y, 0};
    }
    std::vector<unsigned> order(all.size());
    for (unsigned i = 0; i < order.size(); ++i) order[i] = i;
    if (seed == 1) std::reverse(order.begin(), order.end());
    if (seed > 1) std::sort(order.begin(), order.end(), [=](unsigned a, unsigned b) { return hash(a, seed) < hash(b, seed); });
    do {
        moved = false;
        for (unsigned i : order) {
            const Thread& thread = all[i];
            if (thread.done || (thread.at && thread.at->generation == thread.generation)) continue;
            resume(all[i], fibers[i], stacks + i * STACK);
            if (!failure.empty()) return;
        }
    } while (moved);
    for (const Thread& thread : all)
        if (!thread.done) return fail("threads wait for others that never come");
}

template <class... A>
void call(void (*kernel)(A...), void** from) {
    [&]<size_t... I>(std::index_sequence<I...>) {
        kernel(*static_cast<std::remove_reference_t<A>*>(from[I])...);
    }(std::index_sequence_for<A...>());
}

}  // namespace emulator

// Runs the kernel; the arguments come as cuLaunchKernel takes them. Returns what went wrong, or null.
template <void (*KERNEL_CALL)(void**)>
const char* emulate(unsigned x, unsigned y, unsigned cluster, unsigned threads, unsigned shared, unsigned seed,
                    void** arguments) {
    using namespace emulator;
    failure.clear();
    grid = {x, y, 1};
    body = KERNEL_CALL;
    emulator::arguments = arguments;
    if (x % cluster) fail("the grid is no multiple of the cluster");
    std::vector<Fiber> fibers(cluster * threads);
    const std::unique_ptr<char[]> stacks(new char[fibers.size() * STACK]);
    for (unsigned j = 0; j < y; ++j)
        for (unsigned i = 0; i < x && failure.empty(); i += cluster)
            run_cluster(i, j, cluster, threads, shared, seed, fibers.data(), stacks.get());
    return failure.empty() ? nullptr : failure.c_str();
}

#define threadIdx (emulator::current->thread)
#define blockIdx (emulator::current->block)
#define gridDim (emulator::grid)

template <int TEAMS, int THREADS_EACH>
void team_sync(int team) {
    emulator::Block& block = *emulator::current->of;
    if (TEAMS > 1) block.teams[team].size = THREADS_EACH;
    emulator::wait_at(TEAMS > 1 ? block.teams[team] : block.barrier);
}
inline void __syncthreads() { emulator::wait_at(emulator::current->of->barrier); }

constexpr unsigned ALL_LANES = 0xffffffffu;
constexpr float LOG2_E = 1.44269504f;

template <class T>
T __shfl_xor_sync(unsigned, T x, int lanes) {
    const unsigned from = threadIdx.x % 32 ^ lanes;
    return emulator::exchange(x, [&](const T* all) { return all[from]; });
}
template <class T>
T __shfl_sync(unsigned, T x, int lane) {
    return emulator::exchange(x, [=](const T* all) { return all[lane]; });
}
inline unsigned __ballot_sync(unsigned, bool x) {
    return emulator::exchange(static_cast<unsigned>(x), [](const unsigned* all) {
        unsigned votes = 0;
        for (int lane = 0; lane < 32; ++lane) votes |= all[lane] << lane;
        return votes;
    });
}
inline unsigned __reduce_add_sync(unsigned, unsigned x) {
    return emulator::exchange(x, [](const unsigned* all) { return std::accumulate(all, all + 32, 0u); });
}
inline unsigned __reduce_max_sync(unsigned, unsigned x) {
    return emulator::exchange(x, [](const unsigned* all) { return *std::max_element(all, all + 32); });
}
inline unsigned atomicAdd(unsigned* to, unsigned x) { return std::exchange(*to, *to + x); }
inline unsigned __dp4a(unsigned x, unsigned y, unsigned sum) {
    for (int i = 0; i < 32; i += 8) sum += (x >> i & 0xff) * (y >> i & 0xff);
    return sum;
}
inline int __dp4a(int x, int y, int sum) {
    for (int i = 0; i < 32; i += 8) sum += static_cast<signed char>(x >> i) * static_cast<signed char>(y >> i);
    return sum;
}
inline unsigned __byte_perm(unsigned x, unsigned y, unsigned which) {
    const uint64_t bytes = static_cast<uint64_t>(y) << 32 | x;
    unsigned chosen = 0;
    for (int i = 0; i < 4; ++i) chosen |= (bytes >> 8 * (which >> 4 * i & 7) & 0xff) << 8 * i;
    return chosen;
}
inline int __popc(unsigned x) { return std::popcount(x); }
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline unsigned __float_as_uint(float x) { return std::bit_cast<unsigned>(x); }
inline float __uint_as_float(unsigned x) { return std::bit_cast<float>(x); }

struct Half {
    unsigned short bits;
};
struct BFloat16 {
    unsigned short bits;
};

inline float widen(float x) { return x; }
inline float widen(BFloat16 x) { return __uint_as_float(static_cast<unsigned>(x.bits) << 16); }
inline float widen(Half x) { return static_cast<float>(std::bit_cast<_Float16>(x.bits)); }
template <class T>
float widen_half(unsigned word, int upper) {
    T half;
    half.bits = static_cast<unsigned short>(upper ? word >> 16 : word);
    return widen(half);
}
inline int rounded(float x) { return std::isnan(x) ? 0 : static_cast<int>(std::nearbyint(std::clamp(x, -2e9f, 2e9f))); }
inline void narrow(float x, float& to) { to = x; }
inline void narrow(float x, Half& to) { to.bits = std::bit_cast<unsigned short>(static_cast<_Float16>(x)); }
inline void narrow(float x, BFloat16& to) {
    const unsigned bits = __float_as_uint(x);
    to.bits = std::isnan(x) ? 0x7fff : static_cast<unsigned short>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

template <class T>
void settle(T*&) {}
inline void settle(unsigned&) {}
inline void count_larger(unsigned& count, unsigned x, unsigned than) { count += x > than; }
inline unsigned magnitude(float x, float y) {
    const float product = std::fabs(x * y);
    return std::isnan(product) ? 0x7fffffff : __float_as_uint(product);
}
inline float power_of_two(float x) { return std::exp2(x); }
inline float reciprocal(float x) { return 1.0f / x; }

template <class T>
T& shared_memory() {
    const auto address = reinterpret_cast<uintptr_t>(emulator::current->of->shared.data());
    return *reinterpret_cast<T*>((address + 15) / 16 * 16);
}

namespace emulator {
inline void check_place(const void* from, unsigned alignment) {
    if (reinterpret_cast<uintptr_t>(from) % alignment) fail("a load from a misaligned address");
}
inline void check(const void* from, unsigned alignment) {
    if (!current->waited) fail("a load before wait_for_inputs");
    check_place(from, alignment);
}
}  // namespace emulator

template <class T>
const T* at_offset(const T* base, unsigned offset) {
    return base + offset;
}
template <class T>
const T* at_column(const T* base, unsigned column, unsigned bytes) {
    return reinterpret_cast<const T*>(reinterpret_cast<const char*>(base) + static_cast<size_t>(column) * bytes);
}
template <class Data>
void load_once(Data& data, const void* from) {
    emulator::check_place(from, sizeof(Data));
    data = *static_cast<const Data*>(from);
}
template <class T>
T load_fresh(const T* from) {
    emulator::check(from, sizeof(T));
    return *from;
}
template <class T>
T load_earlier(const T* from) {
    emulator::check_place(from, sizeof(T));
    return *from;
}
template <class T>
T load_parameter(const T* from, bool there) {
    return there ? *from : T{};
}
inline float load_fresh(const float* from, bool there) { return there ? load_fresh(from) : 0.0f; }
constexpr unsigned long long POSTED = 1ull << 16;
inline void post(unsigned long long* board, unsigned long long number) {
    if (*board) emulator::fail("a number is posted where one stands");
    *board = number * 2 * POSTED + POSTED;
}
inline unsigned long long look_at(const unsigned long long* board, bool asking) { return asking ? *board : 0; }
inline unsigned long long posted(const unsigned long long* board, unsigned long long) {
    // The cluster that posts runs before the others.
    if (!(*board & POSTED)) emulator::fail("nothing has been posted");
    return *board / POSTED / 2;
}
inline unsigned long long taken(unsigned long long* board) { return (*board)++; }
inline void leave(unsigned long long* board, unsigned long long before, unsigned takers) {
    if (before % POSTED == takers - 1) *board = 0;
}
inline void store(float* to, float x, int* also_to, int y, unsigned wanted) {
    if (wanted) *to = x, *also_to = y;
}
inline void store_pair(float* to, float x, unsigned y, bool wanted) {
    if (reinterpret_cast<uintptr_t>(to) % 8) emulator::fail("a misaligned pair");
    if (wanted) to[0] = x, std::memcpy(to + 1, &y, sizeof y);
}
template <int COUNT>
void copy_later(Words<COUNT>& to, const void* from, bool there) {
    if (there) emulator::check_place(from, sizeof to);
    auto& groups = emulator::current->copies;
    if (groups.empty()) groups.emplace_back();
    groups.back().emplace_back(&to, there ? std::string(static_cast<const char*>(from), sizeof to) : std::string(sizeof to, 0));
    std::memset(&to, 0xff, sizeof to);
}
inline void copies_issued() {
    auto& groups = emulator::current->copies;
    if (groups.empty()) groups.emplace_back();
    groups.emplace_back();
}
template <int PENDING>
void copies_arrived() {
    auto& groups = emulator::current->copies;
    while (groups.size() > PENDING + 1) {
        for (const auto& [to, what] : groups.front()) std::memcpy(to, what.data(), what.size());
        groups.erase(groups.begin());
    }
}
inline void prefetch(const void* from, unsigned bytes) {
    if (reinterpret_cast<uintptr_t>(from) % 16 || bytes % 16) emulator::fail("a misaligned prefetch");
}
inline void wait_for_inputs() { emulator::current->waited = true; }
inline void release_dependents_early() { emulator::current->released = true; }
inline void release_dependents() {
    if (!emulator::current->waited) emulator::fail("the next kernel is let begin before wait_for_inputs");
    emulator::current->released = true;
}

template <int BLOCKS>
int cluster_rank() {
    return static_cast<int>(blockIdx.x % BLOCKS);
}
struct alignas(8) Mailbox {
    int expected, arrived;
};
namespace emulator {
template <class T>
T& there(const T& mine, int rank) {
    const auto base = [](const Block& block) {
        return (reinterpret_cast<uintptr_t>(block.shared.data()) + 15) / 16 * 16;
    };
    const uintptr_t offset = reinterpret_cast<uintptr_t>(&mine) - base(*current->of);
    return *reinterpret_cast<T*>(base(blocks[rank]) + offset);
}
}  // namespace emulator
template <int BLOCKS>
void cluster_begin(Mailbox& own, int numbers) {
    if (threadIdx.x == 0) own = {numbers, 0};
}
template <int BLOCKS>
void cluster_begun() {
    if (BLOCKS > 1) emulator::wait_at(emulator::cluster);
}
template <int BLOCKS>
void cluster_send(Mailbox& mailbox, float& mine, int rank, float x) {
    emulator::there(mine, rank) = x;
    ++emulator::there(mailbox, rank).arrived;
}
template <int BLOCKS>
void cluster_received(Mailbox& own) {
    emulator::wait_at(BLOCKS > 1 ? emulator::cluster : emulator::current->of->barrier);
    if (BLOCKS > 1 && own.arrived != own.expected) emulator::fail("a block is not sent as many numbers as it waits for");
}
inline unsigned plus_below(unsigned x, int distance) {
    const int lane = static_cast<int>(threadIdx.x % 32);
    return emulator::exchange(x, [=](const unsigned* all) { return lane < distance ? x : x + all[lane - distance]; });
}
inline float warp_sum(float x, int from = 1, int below = 32) {
    for (int lane = from; lane < below; lane *= 2) x += __shfl_xor_sync(ALL_LANES, x, lane);
    return x;
}

#endif
