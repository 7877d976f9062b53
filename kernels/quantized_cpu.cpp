// Products of weights of few bits: the compiled half of quantized_cpu.py, which says why it is as it is.
//
// x W^T is summed in float32, x [T, k] and W[n, k] = value(codes[n, k]) * scale[n, g] - shift[n, g]. There are three ways:
// that of vectors alone; that of the matrix units, which few tokens take by vectors; and, where there is nothing better
// than AVX2, that of integers. Which one does not depend on a call's T.

#include "quantized_cpu.h"
#include "quantized_cpu_vectors.h"

#if LANES == 16 && defined(__AMX_BF16__) && defined(__AVX512BF16__)
#define HAS_TILES 1
#include "quantized_cpu_tiles.h"
#else
#define HAS_TILES 0
#if LANES == 8
#include "quantized_cpu_integers.h"
#endif
extern "C" int enable_tiles() { return 0; }
#endif

#define ITEMS_PER_THREAD 4       // at least, where there are enough outputs: a thread may be held up
#define INPUT_BYTES (512 << 10)  // of a chunk of tokens
#define MIN_CHUNK 48             // tokens

static int64_t between(int64_t value, int64_t least, int64_t most) {
    return value < least ? least : value > most ? most : value;
}

static void prepare_items(Phase &phase) {
    Job &job = *(Job *)phase.job;
    phase.each([&](int64_t item) { job.prepare(job, item); });
}

static void multiply_items(Phase &phase) {
    Job &job = *(Job *)phase.job;
    const auto take = [&](int64_t item) {
        const int64_t start = item * job.item_size, left = job.num_outputs - start;
        if (!job.has_failed) job.multiply(job, start, left < job.item_size ? left : job.item_size);
    };
#if HAS_TILES
    if (job.multiply == take_tiles) {
        const Tiles tiles(job.width, job.cuts->step_inputs);
        phase.each(take);
    } else
#endif
        phase.each(take);
    if (job.has_failed) phase.has_failed = true;
}

// Return the outputs of an item.
static int64_t choose_item_size(const Job &job) {
    int64_t size = job.num_outputs / (job.c->num_threads * ITEMS_PER_THREAD);
    if (job.num_tokens > FEW_TOKENS && !job.width) {
        const int64_t most = PANEL_BYTES / (4 * job.w->k * (job.c->act ? 2 : 1));
        size = size < most ? size : most;
    }
    return between(size / LANES * LANES, LANES, MAX_ITEM);
}

// Add the product of some tokens to a plan: a phase of inputs, and one of outputs.
static void plan_tokens(const Weight &w, const Call &c, int64_t first_token, int64_t num_tokens, Plan &plan) {
    Job job = {&w, &c, prepare_row, take_outputs};
    job.first_token = first_token, job.num_tokens = num_tokens;
    job.num_outputs = c.act ? w.n / 2 : w.n;
    int64_t num_floats = num_tokens * w.k, cuts_floats = 0, num_inputs = num_tokens;
#if LANES == 8
    if (takes_integers(w, c)) {
        job.prepare = prepare_steps, job.multiply = take_integers;
        num_floats = num_tokens * Cut(w).floats();
    }
#endif
#if HAS_TILES
    if (takes_tiles(w, c)) {
        cuts_floats = Cuts::floats(w);
        job.width = c.num_tokens < LANES ? c.num_tokens : LANES;
        if (c.num_tokens <= FEW_PAIRS) {
            job.prepare = prepare_few, job.multiply = take_pairs;
            num_floats += w.k / 16 * LANES;
        } else {
            job.prepare = prepare_some, job.multiply = take_tiles;
            num_inputs = (num_tokens + job.width - 1) / job.width;
            num_floats = num_inputs * InputTile::floats(w, job.width);
        }
    }
#endif
    job.item_size = choose_item_size(job);
    Job *const kept = (Job *)plan.room(sizeof(Job));
    job.cuts = (Cuts *)plan.room(4 * cuts_floats);
    job.x = (float *)plan.room(4 * num_floats);
    if (!job.x) return;
#if HAS_TILES
    if (cuts_floats) job.cuts->set(w);
#endif
    *kept = job;
    plan.add(prepare_items, kept, num_inputs, 0);
    plan.add(multiply_items, kept, (job.num_outputs + job.item_size - 1) / job.item_size, num_tokens * w.k * w.n);
}

extern "C" int lanes() { return LANES; }

extern "C" int max_groups() { return MAX_GROUPS; }

// Add a product of up to MIN_CHUNK tokens to a plan.
extern "C" void plan_product(const void *weight, const void *call, Plan *plan) {
    const Call &c = *(const Call *)call;
    plan_tokens(*(const Weight *)weight, c, 0, c.num_tokens, *plan);
}

// Return 0, or 1 if there was no memory. k is a multiple of BLOCK, group_size too or it is LANES.
extern "C" int product(const Weight *weight, const Call *call) {
    const int64_t num_tokens = call->num_tokens;
    const int64_t chunk = between(INPUT_BYTES / (4 * weight->k) / MIN_CHUNK * MIN_CHUNK, MIN_CHUNK, 1 << 30);
    for (int64_t first = 0; first < num_tokens; first += chunk) {
        const int64_t count = between(num_tokens - first, 0, chunk);
        const auto add = [&](Plan &plan) { plan_tokens(*weight, *call, first, count, plan); };
        if (run_planned(call->num_threads, add)) return 1;
    }
    return 0;
}
