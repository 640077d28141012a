// One token through all decoder layers: one launch, in which blocks stay and wait for each other between products.
//
// Launching a kernel and handing it a list costs three or four microseconds, ten times a layer; a barrier of the whole
// grid costs one, five times. There is one block a multiprocessor. Each takes an equal share of a product's outputs and
// chooses the entries that the product reads for itself, all blocks alike: that costs less than being told. Outputs are
// counted in packs of 16 bytes. The threads of a block stand in `groups` of `lanes`, a lane for each of its packs; a
// group reads the pieces of one column, every groups-th on the list. Sums are added in a fixed order.
#include "attention.cuh"
#include "choose.cuh"
#include "values.cuh"

#ifndef HEADS
#error "WEIGHT, CACHE, SIZE, HEADS, HIDDEN (entries of the residual stream) and WIDEST (of any vector) are given"
#endif

constexpr int THREADS = 512;
constexpr int DEPTH = 8;              // loads in flight in each thread
constexpr int PACK = WIDTH<WEIGHT>;   // outputs of a pack
constexpr int SHARE = THREADS / PACK; // packs that a block takes at once, at most

// What is read of one vector; the weights are column-major, vectors float32.
struct Site {
    Matrices matrices;
    Vector score;
    const WEIGHT* adapter;  // column-major, which the residual goes through; or null
    long long k;            // entries that are kept
};

struct Layer {
    Site h1, h2, h3, h4;
    Vector h1_gain, h3_gain;
    CACHE* keys;    // [key heads, length, SIZE]
    CACHE* values;
    Vector q_gain, k_gain;
    float h1_eps, h3_eps, head_eps, scale;
    int window, rotates;
    long long unused;
};
static_assert(sizeof(Layer) % 16 == 0, "layers are copied in pieces of 16 bytes");

struct Sizes {
    int hidden, inner, query_heads, key_heads, length, layers;
};

// What blocks tell each other, in global memory.
struct Exchange {
    float* hidden;        // the residual stream, in and out
    float* middle;        // the same between attention and MLP
    float* qkv;
    float* attended;
    float* inner;         // what down reads
    Partial* partials;    // of attention, where several blocks share a head
    unsigned* teams;      // how many of those have finished
    unsigned* arrived;    // at barriers, blocks
};

struct Shared {
    Block<THREADS> block;
    Layer layers[2];  // this one and the next
    float cos[SIZE], sin[SIZE];
    bool last;
    union {
        struct {
            float x[WIDEST];
            float residual[HIDDEN];
            float gain[HIDDEN];
            unsigned short chosen[WIDEST];
            union {
                Chooser<THREADS, WIDEST> chooser;
                float sums[THREADS * PACK];
            };
            float partial[THREADS];
        };
        Attention<THREADS, HEADS> attention;
    };
};

SHARED(Shared);

// The barrier between two phases.
struct Phase {
    unsigned* arrived;
    unsigned target;

    DEVICE void arrive() {
        target += gridDim.x;
        __syncthreads();
        if (threadIdx.x == 0) signal(arrived);
    }

    DEVICE void wait() const {
        if (threadIdx.x == 0) wait_for_signals(arrived, target);
        __syncthreads();
    }
};

// Leaves a vector in shared memory; returns this thread's sum of squares.
DEVICE float stage(float* to, const float* from, int width) {
    constexpr int AT_ONCE = 8;  // loads in flight
    float squares = 0.0f;
#pragma unroll 1
    for (int first = static_cast<int>(threadIdx.x); first < width; first += AT_ONCE * THREADS) {
        float own[AT_ONCE];
#pragma unroll
        for (int i = 0; i < AT_ONCE; ++i) own[i] = load_fresh(from + min(first + i * THREADS, width - 1));
#pragma unroll
        for (int i = 0; i < AT_ONCE; ++i)
            if (first + i * THREADS < width) {
                squares = fmaf(own[i], own[i], squares);
                to[first + i * THREADS] = own[i];
            }
    }
    return squares;
}

// Some of a block's packs of outputs, and where this thread stands among them.
struct Part {
    int first, here, lanes, groups, group, pack;

    DEVICE Part(int first, int here, int packs, bool gated) : first(first), here(here) {
        const int thread = static_cast<int>(threadIdx.x);
        lanes = gated ? 2 * here : here;  // a lane for the gate and one for the up
        groups = THREADS / lanes;
        group = thread / lanes;
        const int lane = thread % lanes;
        pack = lane < here ? first + lane : packs + first + lane - here;
    }
};

// One thread's part of reading columns: `count` on a list, or the first ones where it is null. `values` has an entry for
// each column.
DEVICE void add_columns(float (&sum)[PACK], const Part& part, const WEIGHT* weights, long long apart,
                        const unsigned short* list, int count, const float* values) {
    const unsigned stride = static_cast<unsigned>(apart);
    const int step = part.groups;
    const auto column = [&](int i) { return list ? static_cast<int>(list[i]) : i; };
    Pack<WEIGHT> pack[DEPTH];
    const auto load = [&](int j, int i) {
        pack[j].template load<true>(at_offset(weights, static_cast<unsigned>(column(i)) * stride), PACK);
    };
#pragma unroll
    for (int j = 0; j < DEPTH; ++j)
        if (part.group + j * step < count) load(j, part.group + j * step);
    // As soon as one load has been added, the next takes its registers: DEPTH are always under way.
#pragma unroll 1
    for (int from = part.group; from < count; from += DEPTH * step) {
#pragma unroll
        for (int j = 0; j < DEPTH; ++j) {
            const int i = from + j * step;
            if (i < count) {
                const float x = values[column(i)];
#pragma unroll
                for (int e = 0; e < PACK; ++e) sum[e] = fmaf(x, widen(pack[j].weight[e]), sum[e]);
                if (i + DEPTH * step < count) load(j, i + DEPTH * step);
            }
        }
    }
}

// The sum over all groups of the `total` outputs that stand from `at` on in each group's packs: that of output t in
// thread t.
DEVICE float gather(Shared& shared, int at, int total, int groups, int apart) {
    const int thread = static_cast<int>(threadIdx.x);
    const int parts = min(THREADS / total, groups);
    float sum = 0.0f;
    if (thread < parts * total)
        for (int group = thread / total; group < groups; group += parts)
            sum += shared.sums[group * apart + at + thread % total];
    shared.partial[thread] = sum;
    __syncthreads();
    if (thread < total)
        for (int p = 1; p < parts; ++p) sum += shared.partial[p * total + thread];
    return sum;
}

// What is done at a site, beside what its struct says.
struct Task {
    const float* x;
    int width;
    const Vector* gain;  // of the norm, null without one
    float eps;
    bool gated;
    const float* residual;
    int residual_width;
    float* result;
    int outputs;
};

// Leaves the vector in shared memory, and which of its entries are read, once `phase` says that it is there.
SEPARATE void receive(Shared& shared, const Site& site, const Task& task, const Phase& phase) {
    const int thread = static_cast<int>(threadIdx.x);
    const int k = static_cast<int>(site.k);
    const bool chooses = 0 < k && k < task.width;
    if (chooses) shared.chooser.prepare(task.width, site.score);
    if (task.gain)
        for (int at = thread; at < task.width; at += THREADS) shared.gain[at] = task.gain->plain(at, 1.0f);
    phase.wait();
    if (site.adapter) stage(shared.residual, task.residual, task.residual_width);
    const float squares = stage(shared.x, task.x, task.width);
    if (task.gain) {
        const float inverse = inverse_rms(shared.block.sum(squares), task.width, task.eps);
#pragma unroll 4
        for (int at = thread; at < task.width; at += THREADS) shared.x[at] *= inverse * shared.gain[at];
    }
    __syncthreads();
    if (chooses) shared.chooser.choose(shared.block, shared.x, task.width, k, site.score, shared.chosen);
}

// The whole of a site, once `phase` says that its vector is there.
DEVICE void run_site(Shared& shared, const Site& site, const Task& task, const Phase& phase) {
    const int thread = static_cast<int>(threadIdx.x);
    const int packs = task.outputs / PACK;
    const int begin = static_cast<int>(static_cast<long long>(packs) * blockIdx.x / gridDim.x);
    const int end = static_cast<int>(static_cast<long long>(packs) * (blockIdx.x + 1) / gridDim.x);
    if (begin == end) return phase.wait();
    receive(shared, site, task, phase);
    const int passes = (end - begin + SHARE - 1) / SHARE;
    for (int pass = 0; pass < passes; ++pass) {
        const int first = begin + (end - begin) * pass / passes;
        const Part part(first, begin + (end - begin) * (pass + 1) / passes - first, packs, task.gated);
        const Matrix& matrix = site.matrices.of(part.pack);
        const WEIGHT* weights = static_cast<const WEIGHT*>(matrix.weights) + (part.pack - matrix.tile) * PACK;
        // What is added to the sum is on its way meanwhile.
        const int total = part.here * PACK;
        const int place = first * PACK + thread;
        const Matrix& of = site.matrices.of(min(place, task.outputs - 1) / PACK);
        float before = 0.0f;
        float bias = 0.0f;
        if (thread < total && !task.gated) {
            if (task.residual && !site.adapter) before = load_fresh(task.residual + place);
            bias = of.bias.plain(place - static_cast<int>(of.first), 0.0f);
        }
        float sum[PACK] = {};
        if (part.group < part.groups) {
            if (site.adapter)
                add_columns(sum, part, site.adapter + part.pack * PACK, task.outputs, nullptr, task.residual_width,
                            shared.residual);
            add_columns(sum, part, weights, matrix.stride, site.k == task.width ? nullptr : shared.chosen,
                        static_cast<int>(site.k), shared.x);
        }
        __syncthreads();  // what stood where the sums go has been read
#pragma unroll
        for (int e = 0; e < PACK; ++e) shared.sums[thread * PACK + e] = sum[e];
        __syncthreads();
        const int apart = part.lanes * PACK;
        const float product = gather(shared, 0, total, part.groups, apart);
        if (task.gated) {
            __syncthreads();
            const float up = gather(shared, total, total, part.groups, apart);
            if (thread < total)
                task.result[place] = silu_mul(product + site.matrices.matrix[0].bias.plain(place, 0.0f),
                                              up + site.matrices.matrix[1].bias.plain(place, 0.0f));
        } else if (thread < total) {
            task.result[place] = before + (product + bias);
        }
    }
}

// Attention of HEADS query heads at a time, by one block or, where many positions are seen, by several.
SEPARATE void attend(Shared& shared, const Layer& layer, const Sizes& sizes, const Exchange& exchange, long long asked) {
    const int thread = static_cast<int>(threadIdx.x);
    // Outside the cache nothing is attended to, which gives NaN, and nothing is written.
    const bool inside = asked >= 0 && asked < sizes.length;
    const int position = inside ? static_cast<int>(asked) : 0;
    const int teams = sizes.query_heads / HEADS;
    const Stretch seen = inside ? stretch_of(position, layer.window, 0, 1) : Stretch{0, 0};
    const int useful = (seen.end - seen.begin + shared.attention.AT_ONCE - 1) / shared.attention.AT_ONCE;
    const int parts = max(min(useful, static_cast<int>(gridDim.x) / teams), 1);
    const Rotary rotary = {layer.rotates ? shared.cos : nullptr, shared.sin, layer.q_gain, layer.k_gain, layer.head_eps,
                           layer.scale};
    for (int unit = blockIdx.x; unit < teams * parts; unit += gridDim.x) {
        const int team = unit / parts;
        const int rank = unit % parts;
        const int first_head = team * HEADS;
        const int key_head = first_head / (sizes.query_heads / sizes.key_heads);
        const long long head = static_cast<long long>(key_head) * sizes.length * SIZE;
        CACHE* keys = layer.keys + head;
        CACHE* values = layer.values + head;
        // The last block, whose stretch ends at this position, adds it to the cache.
        shared.attention.prepare_heads(exchange.qkv, first_head, sizes.query_heads, key_head, sizes.key_heads, rotary, 0,
                                       rank == parts - 1 && inside, keys + position * SIZE, values + position * SIZE);
        shared.attention.over(keys, values, inside ? stretch_of(position, layer.window, rank, parts) : seen);
        __syncthreads();
        float* result = exchange.attended + first_head * SIZE;
        if (parts == 1) {
            for (int i = thread; i < HEADS * SIZE; i += THREADS) {
                const Partial& partial = shared.attention.block[i / SIZE];
                result[i] = partial.weighted[i % SIZE] / partial.sum;
            }
        } else {
            // Who comes last puts together what all have found, in the order of their ranks.
            Partial* partials = exchange.partials + team * parts * HEADS;
            constexpr int FLOATS = sizeof(Partial) / sizeof(float) * HEADS;
            float* own = reinterpret_cast<float*>(partials + rank * HEADS);
            for (int i = thread; i < FLOATS; i += THREADS)
                own[i] = reinterpret_cast<const float*>(shared.attention.block)[i];
            __syncthreads();
            if (thread == 0) {
                shared.last = signal_and_count(exchange.teams + team) == static_cast<unsigned>(parts) - 1;
                if (shared.last) exchange.teams[team] = 0;
            }
            __syncthreads();
            if (shared.last)
                for (int i = thread; i < HEADS * SIZE; i += THREADS) {
                    const Summed all = merged(parts, [&](int p) {
                        const Partial& partial = partials[p * HEADS + i / SIZE];
                        return Summed{load_fresh(&partial.maximum), load_fresh(&partial.sum),
                                      load_fresh(&partial.weighted[i % SIZE])};
                    });
                    result[i] = all.entry / all.sum;
                }
        }
        __syncthreads();
    }
}

KERNEL(THREADS, 1)
stack(const Layer* layers, Sizes sizes, Exchange exchange, const long long* positions, const float* cos,
      const float* sin) {
    Shared& shared = shared_memory<Shared>();
    const int thread = static_cast<int>(threadIdx.x);
    const int heads = sizes.query_heads * SIZE;
    Phase phase = {exchange.arrived, 0};
    const auto copy = [&](int layer) {
        constexpr int PIECES = sizeof(Layer) / 16;
        if (layer < sizes.layers && thread < PIECES)
            reinterpret_cast<uint4*>(&shared.layers[layer % 2])[thread] =
                reinterpret_cast<const uint4*>(layers + layer)[thread];
    };

    wait_for_inputs();
    const long long position = load_fresh(positions);
    if (thread < SIZE && position >= 0 && position < sizes.length) {
        shared.cos[thread] = cos[position * SIZE + thread];
        shared.sin[thread] = sin[position * SIZE + thread];
    }
    copy(0);
    __syncthreads();

    // All sites go through the same code, so that it stays in the instruction cache.
    const int phases = 4 * sizes.layers;
#pragma unroll 1
    for (int number = 0; number < phases; ++number) {
        const Layer& layer = shared.layers[number / 4 % 2];
        const int at = number % 4;
        const Site& site = at == 0 ? layer.h1 : at == 1 ? layer.h2 : at == 2 ? layer.h3 : layer.h4;
        Task task = {};
        if (at == 0) {
            const int outputs = (sizes.query_heads + 2 * sizes.key_heads) * SIZE;
            task = {exchange.hidden, sizes.hidden, &layer.h1_gain, layer.h1_eps, false, nullptr, 0, exchange.qkv, outputs};
        } else if (at == 1) {
            task = {exchange.attended, heads, nullptr, 0.0f, false, exchange.hidden, sizes.hidden, exchange.middle,
                    sizes.hidden};
        } else if (at == 2) {
            task = {exchange.middle, sizes.hidden, &layer.h3_gain, layer.h3_eps, true, nullptr, 0, exchange.inner,
                    sizes.inner};
        } else {
            task = {exchange.inner, sizes.inner, nullptr, 0.0f, false, exchange.middle, sizes.hidden, exchange.hidden,
                    sizes.hidden};
        }
        run_site(shared, site, task, phase);
        if (number + 1 < phases) phase.arrive();
        if (at == 0) {
            copy(number / 4 + 1);
            phase.wait();
            attend(shared, layer, sizes, exchange, position);
            phase.arrive();
        }
    }
    release_dependents();
    __syncthreads();
    // The last to leave makes the counter ready for the next token: nobody waits any more.
    if (thread == 0 && signal_and_count(exchange.arrived) == phase.target + gridDim.x - 1) *exchange.arrived = 0;
}
