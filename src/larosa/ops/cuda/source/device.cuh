// What CUDA C++ has no word for without its headers: caches, dependent launches, clusters, short floats.
// The kernels use nothing else of the machine beyond the language's own built-ins, so that a test can run them on
// a CPU by giving these functions and built-ins another meaning.
#ifndef LAROSA_DEVICE
#define LAROSA_DEVICE

#define KERNEL(threads, blocks) extern "C" __global__ void __launch_bounds__(threads, blocks)
#define DEVICE __device__ __forceinline__

constexpr unsigned ALL_LANES = 0xffffffffu;
constexpr float LOG2_E = 1.44269504f;  // e^x is 2^(LOG2_E x)

struct Half {
    unsigned short bits;
};

struct BFloat16 {
    unsigned short bits;
};

DEVICE float widen(float x) { return x; }
DEVICE float widen(BFloat16 x) { return __uint_as_float(static_cast<unsigned>(x.bits) << 16); }
DEVICE float widen(Half x) {
    float wide;
    asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(x.bits));
    return wide;
}

// The lower or upper one of two that lie in a word. Told of halves of words, the compiler makes words of 64 bits of them first,
// to shift and copy their parts.
template <class T>
DEVICE float widen_half(unsigned word, int upper);
template <>
DEVICE float widen_half<BFloat16>(unsigned word, int upper) {
    return __uint_as_float(upper ? word & 0xffff0000u : word << 16);
}
template <>
DEVICE float widen_half<Half>(unsigned word, int upper) {
    float wide;
    if (upper)
        asm("{\n\t.reg .b16 lower, upper;\n\tmov.b32 {lower, upper}, %1;\n\tcvt.f32.f16 %0, upper;\n\t}" : "=f"(wide) : "r"(word));
    else
        asm("{\n\t.reg .b16 lower, upper;\n\tmov.b32 {lower, upper}, %1;\n\tcvt.f32.f16 %0, lower;\n\t}" : "=f"(wide) : "r"(word));
    return wide;
}

// The nearest whole number; NaN is 0.
DEVICE int rounded(float x) {
    int whole;
    asm("cvt.rni.s32.f32 %0, %1;" : "=r"(whole) : "f"(x));
    return whole;
}

DEVICE void narrow(float x, float& to) { to = x; }
DEVICE void narrow(float x, BFloat16& to) { asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(to.bits) : "f"(x)); }
DEVICE void narrow(float x, Half& to) { asm("cvt.rn.f16.f32 %0, %1;" : "=h"(to.bits) : "f"(x)); }

// Adds 1 to `count` where x > than, by a predicate.
DEVICE void count_larger(unsigned& count, unsigned x, unsigned than) {
    asm("{\n\t.reg .pred larger;\n\t"
        "setp.gt.u32 larger, %1, %2;\n\t"
        "@larger add.u32 %0, %0, 1;\n\t}"
        : "+r"(count)
        : "r"(x), "r"(than));
}

// Has the compiler take x as it is from here on, rather than go back to what it was worked out from.
template <class T>
DEVICE void settle(T*& x) {
    asm volatile("" : "+l"(x));
}
DEVICE void settle(unsigned& x) { asm volatile("" : "+r"(x)); }

// The bits of |x * y|, which order as it does, with NaN the largest: products have but one NaN, 0x7fffffff. Not left to
// the compiler, which takes x * 1 for x.
DEVICE unsigned magnitude(float x, float y) {
    float product;
    asm("mul.f32 %0, %1, %2;" : "=f"(product) : "f"(fabsf(x)), "f"(fabsf(y)));
    return __float_as_uint(product);
}

// 2^x and 1 / x to within 2 ulp, in one instruction without branches, where the result is not denormal.
DEVICE float power_of_two(float x) {
    float result;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
    return result;
}
DEVICE float reciprocal(float x) {
    float result;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
    return result;
}

// The block's dynamic shared memory. SHARED tells the launcher how much of it a file's kernels want.
#define SHARED(type) extern "C" __device__ unsigned shared_bytes = sizeof(type)

DEVICE unsigned shared_address(const void* of) { return static_cast<unsigned>(__cvta_generic_to_shared(of)); }

template <class T>
DEVICE T& shared_memory() {
    extern __shared__ __align__(16) unsigned char memory[];
    return *reinterpret_cast<T*>(memory);
}

// --- Loads. All are volatile: none may move up across wait_for_inputs().

// `base + offset`, in one instruction: the compiler would take the base apart again for each of many offsets.
template <class T>
DEVICE const T* at_offset(const T* base, unsigned offset) {
    const T* address;
    asm("mad.wide.u32 %0, %1, %2, %3;" : "=l"(address) : "r"(offset), "n"(sizeof(T)), "l"(base));
    return address;
}

// The same for a distance in bytes that only the launcher knows.
template <class T>
DEVICE const T* at_column(const T* base, unsigned column, unsigned bytes) {
    const T* address;
    asm("mad.wide.u32 %0, %1, %2, %3;" : "=l"(address) : "r"(column), "r"(bytes), "l"(base));
    return address;
}

// 4 bytes a word.
template <int COUNT>
struct alignas(4 * COUNT) Words {
    unsigned word[COUNT];
};

// 16, 8 or 4 bytes that nobody reads again: they pass the first cache by.
DEVICE void load_once(Words<4>& data, const void* from) {
    asm volatile("ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(data.word[0]), "=r"(data.word[1]), "=r"(data.word[2]), "=r"(data.word[3])
                 : "l"(from));
}
DEVICE void load_once(Words<2>& data, const void* from) {
    asm volatile("ld.global.L1::no_allocate.v2.u32 {%0, %1}, [%2];"
                 : "=r"(data.word[0]), "=r"(data.word[1])
                 : "l"(from));
}
DEVICE void load_once(Words<1>& data, const void* from) {
    asm volatile("ld.global.L1::no_allocate.u32 %0, [%1];" : "=r"(data.word[0]) : "l"(from));
}

// Longer ones at once, 16 bytes each.
template <int COUNT>
DEVICE void load_once(Words<COUNT>& data, const void* from) {
    static_assert(COUNT % 4 == 0, "whole pieces of 16 bytes");
#pragma unroll
    for (int i = 0; i < COUNT / 4; ++i)
        load_once(reinterpret_cast<Words<4>*>(data.word)[i], static_cast<const Words<4>*>(from) + i);
}
DEVICE void load_once(BFloat16& data, const void* from) {
    asm volatile("ld.global.L1::no_allocate.b16 %0, [%1];" : "=h"(data.bits) : "l"(from));
}

// What the kernel before this one wrote: from the second cache, the first may hold what stood there earlier.
DEVICE float load_fresh(const float* from) {
    float data;
    asm volatile("ld.global.cg.f32 %0, [%1];" : "=f"(data) : "l"(from));
    return data;
}
// The same, or 0 where it is not `there`. Not by a branch: a load behind one waits for those before it.
DEVICE float load_fresh(const float* from, bool there) {
    float data;
    asm volatile(
        "{\n\t.reg .pred there;\n\t"
        "setp.ne.u32 there, %2, 0;\n\t"
        "mov.f32 %0, 0f00000000;\n\t"
        "@there ld.global.cg.f32 %0, [%1];\n\t}"
        : "=f"(data)
        : "l"(from), "r"(static_cast<unsigned>(there)));
    return data;
}
DEVICE int load_fresh(const int* from) {
    int data;
    asm volatile("ld.global.cg.s32 %0, [%1];" : "=r"(data) : "l"(from));
    return data;
}
DEVICE long long load_fresh(const long long* from) {
    long long data;
    asm volatile("ld.global.cg.s64 %0, [%1];" : "=l"(data) : "l"(from));
    return data;
}

// A parameter of the model, or 0 where it is not `there`; not by a branch either.
DEVICE float load_parameter(const float* from, bool there) { return load_fresh(from, there); }
template <class Short>
DEVICE Short load_parameter(const Short* from, bool there) {
    Short data;
    asm volatile(
        "{\n\t.reg .pred there;\n\t"
        "setp.ne.u32 there, %2, 0;\n\t"
        "mov.b16 %0, 0;\n\t"
        "@there ld.global.b16 %0, [%1];\n\t}"
        : "=h"(data.bits)
        : "l"(from), "r"(static_cast<unsigned>(there)));
    return data;
}

// What a kernel wrote that had finished before the one in front of this one began, or the one in front of that where
// that one releases early: it may stand before wait_for_inputs().
template <class T>
DEVICE T load_earlier(const T* from) {
    return load_fresh(from);
}

// --- A board, on which one block of a kernel posts a number below 2^46 for all others, of which the last one to take it leaves
// the board as it was, 0. Loads and stores are `relaxed`: others may find for ever what they found before.

constexpr unsigned long long POSTED = 1ull << 16;  // below it, how many have taken the number

DEVICE void post(unsigned long long* board, unsigned long long number) {
    asm volatile("st.relaxed.gpu.global.u64 [%0], %1;" ::"l"(board), "l"(number * 2 * POSTED + POSTED) : "memory");
}
// What it shows to who is `asking`, by a predicate: it may be too early.
DEVICE unsigned long long look_at(const unsigned long long* board, bool asking) {
    unsigned long long shown;
    asm volatile(
        "{\n\t.reg .pred asking;\n\t"
        "setp.ne.u32 asking, %2, 0;\n\t"
        "mov.b64 %0, 0;\n\t"
        "@asking ld.relaxed.gpu.global.u64 %0, [%1];\n\t}"
        : "=l"(shown)
        : "l"(board), "r"(static_cast<unsigned>(asking))
        : "memory");
    return shown;
}
// The number, of which `shown` was found before.
DEVICE unsigned long long posted(const unsigned long long* board, unsigned long long shown) {
    while (!(shown & POSTED)) shown = look_at(board, true);
    return shown / POSTED / 2;
}
// Each of `takers` says once that it has taken the number, and later, for an answer takes long, leaves the board.
DEVICE unsigned long long taken(unsigned long long* board) {
    unsigned long long before;
    asm volatile("atom.relaxed.gpu.global.add.u64 %0, [%1], 1;" : "=l"(before) : "l"(board) : "memory");
    return before;
}
DEVICE void leave(unsigned long long* board, unsigned long long before, unsigned takers) {
    if (before % POSTED == takers - 1) asm volatile("st.relaxed.gpu.global.u64 [%0], %1;" ::"l"(board), "l"(0ull) : "memory");
}

// Writes two numbers to two places where `wanted` is not 0, by a predicate.
DEVICE void store(float* to, float x, int* also_to, int y, unsigned wanted) {
    asm volatile(
        "{\n\t.reg .pred wanted;\n\t"
        "setp.ne.u32 wanted, %4, 0;\n\t"
        "@wanted st.global.f32 [%0], %1;\n\t"
        "@wanted st.global.s32 [%2], %3;\n\t}" ::"l"(to),
        "f"(x), "l"(also_to), "r"(y), "r"(wanted)
        : "memory");
}

// The same to shared memory, one behind the other from an address that is a multiple of 8.
DEVICE void store_pair(float* to, float x, unsigned y, bool wanted) {
    asm volatile(
        "{\n\t.reg .pred wanted;\n\t"
        "setp.ne.u32 wanted, %3, 0;\n\t"
        "@wanted st.shared.v2.b32 [%0], {%1, %2};\n\t}" ::"r"(shared_address(to)),
        "f"(x), "r"(y), "r"(static_cast<unsigned>(wanted))
        : "memory");
}

// Copies 16 bytes to shared memory, later; zeros where they are not `there`. This thread finds all there but those of the
// last PENDING groups after copies_arrived(); copies_issued() ends a group.
DEVICE void copy_later(Words<4>& to, const void* from, bool there) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(&to)), "l"(from), "r"(there ? 16 : 0)
                 : "memory");
}
// The same of 4 bytes.
DEVICE void copy_later(Words<1>& to, const void* from, bool there) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared_address(&to)), "l"(from), "r"(there ? 4 : 0)
                 : "memory");
}
DEVICE void copies_issued() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int PENDING>
DEVICE void copies_arrived() {
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

// Ask for `bytes` (a multiple of 16, at an address that is one) to be brought to the second cache. It reads nothing,
// so it may stand before wait_for_inputs().
DEVICE void prefetch(const void* from, unsigned bytes) {
#if __CUDA_ARCH__ >= 900
    if (bytes > 0) asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(from), "r"(bytes));
#endif
}

// --- Programmatic dependent launch. Every block of every kernel calls first wait_for_inputs(), which returns once the
// kernel before has finished and its results are visible, then release_dependents(), which lets the next kernel's
// blocks take their places early: products when they have read all, for blocks that come while others read are placed
// unevenly, two on one multiprocessor and none on the next. So when a kernel begins, all have finished but the one
// before it: what that one may have written is not read, and nothing is written, before wait_for_inputs(). Gains and
// scores are parameters of a model, which no kernel writes.
//
// Selections in front of the product that ends the MLP release it even before they wait themselves, so that it reads its
// adapter from when the product before them ends. Of that kernel, then, the two before it may not have finished.

DEVICE void release_dependents() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

DEVICE void release_dependents_early() {
    release_dependents();
}

DEVICE void wait_for_inputs() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// --- Teams: the threads of a block in one or two teams of THREADS_EACH, of which each waits for its own.

template <int TEAMS, int THREADS_EACH>
DEVICE void team_sync(int team) {
    static_assert(TEAMS <= 2, "a barrier each, by its number");
    if (TEAMS == 1)
        __syncthreads();
    else if (team == 0)
        asm volatile("bar.sync 1, %0;" ::"n"(THREADS_EACH) : "memory");
    else
        asm volatile("bar.sync 2, %0;" ::"n"(THREADS_EACH) : "memory");
}

// --- Clusters: blocks that run at the same time and send numbers to each other's shared memory. A block's mailbox counts
// what it is sent. A barrier of the cluster would have each thread wait for all that it has written anywhere, to global
// memory too.

struct Mailbox {
    unsigned long long barrier;
};

template <int BLOCKS>
DEVICE int cluster_rank() {
    if constexpr (BLOCKS == 1) return 0;
    return static_cast<int>(blockIdx.x % BLOCKS);
}

// Every thread says first of all that it has begun. So many numbers will be sent to this block, its own to itself included.
template <int BLOCKS>
DEVICE void cluster_begin(Mailbox& own, int numbers) {
#if __CUDA_ARCH__ >= 900
    if constexpr (BLOCKS > 1) {
        if (threadIdx.x == 0)
            asm volatile(
                "mbarrier.init.shared::cta.b64 [%0], 1;\n\t"
                "fence.mbarrier_init.release.cluster;\n\t"
                "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(&own)),
                "r"(numbers * 4)
                : "memory");
        __syncwarp();  // "aligned": a warp arrives as one
        asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
    }
#endif
}
// Before the first number is sent it waits for all others to have: then their shared memory is there.
template <int BLOCKS>
DEVICE void cluster_begun() {
#if __CUDA_ARCH__ >= 900
    if constexpr (BLOCKS > 1) {
        __syncwarp();  // "aligned": a warp waits as one
        asm volatile("barrier.cluster.wait.aligned;" ::: "memory");
    }
#endif
}

// Writes where `mine` stands, in the shared memory of the cluster's block `rank`.
template <int BLOCKS>
DEVICE void cluster_send(Mailbox& mailbox, float& mine, int rank, float x) {
#if __CUDA_ARCH__ >= 900
    if constexpr (BLOCKS > 1) {
        asm volatile(
            "{\n\t.reg .u32 remote, mailbox;\n\t"
            "mapa.shared::cluster.u32 remote, %0, %2;\n\t"
            "mapa.shared::cluster.u32 mailbox, %1, %2;\n\t"
            "st.async.shared::cluster.mbarrier::complete_tx::bytes.f32 [remote], %3, [mailbox];\n\t}" ::"r"(
                shared_address(&mine)),
            "r"(shared_address(&mailbox)), "r"(rank), "f"(x)
            : "memory");
        return;
    }
#endif
    mine = x;
}

// Returns when all numbers have arrived. For every thread: a block must not end before.
template <int BLOCKS>
DEVICE void cluster_received(Mailbox& own) {
#if __CUDA_ARCH__ >= 900
    if constexpr (BLOCKS > 1) {
        unsigned all;
        do asm volatile(
            "{\n\t.reg .pred all;\n\t"
            "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 all, [%1], 0;\n\t"
            "selp.u32 %0, 1, 0, all;\n\t}"
            : "=r"(all)
            : "r"(shared_address(&own))
            : "memory");
        while (!all);
        return;
    }
#endif
    __syncthreads();
}

// x, and to it the x of the lane `distance` below where there is one.
DEVICE unsigned plus_below(unsigned x, int distance) {
    asm volatile(
        "{\n\t.reg .pred there;\n\t.reg .u32 below;\n\t"
        "shfl.sync.up.b32 below|there, %0, %1, 0, 0xffffffff;\n\t"
        "@there add.u32 %0, %0, below;\n\t}"
        : "+r"(x)
        : "r"(distance));
    return x;
}

// --- Sums in a fixed order, so that the same input gives the same bits.

// Over the lanes of a warp whose numbers differ in the bits from `from` up to those below `below`: all get it.
DEVICE float warp_sum(float x, int from = 1, int below = 32) {
    for (int lane = from; lane < below; lane *= 2) x += __shfl_xor_sync(ALL_LANES, x, lane);
    return x;
}

#endif
