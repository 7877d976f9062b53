// Rotation, store and gathering of heads on a CPU: the compiled half of cache_cpu.py, which says why it is there.
//
// Numbers are float32 between a load and a store. Vectors are the compiler's own kind, so that the same code runs on
// any CPU: 16 numbers at a time with AVX-512, 8 elsewhere.

#include <stdint.h>
#include <string.h>

#include "team_cpu.h"

#ifdef __AVX512F__
#define LANES 16
#else
#define LANES 8
#endif
#define MAX_SIZE 1024  // of a head

enum Type { FLOAT32, BFLOAT16, FLOAT16 };

struct Rope {
    const void *qkv, *q_norm, *k_norm, *v_norm;  // [T, H + 2 Hkv, D], [D]; norms may be null
    const int32_t *positions, *slots;            // [T]
    const float *cos_sin;                        // [positions, rotary_dim]
    void *q, *k_cache, *v_cache;                 // [T, H, D], [slots, Hkv, D] twice
    int64_t num_tokens, num_heads, num_kv_heads, head_dim, rotary_dim, qkv_stride, k_stride, v_stride;
    int32_t type, norm_type, v_norm_type, num_threads;
    float eps;
};

struct Gather {
    const char *k_cache, *v_cache;  // rows of row_bytes
    char *to;                       // [2, num_rows, row_bytes], keys and values
    const int32_t *slots;           // [num_rows]
    int64_t num_rows, row_bytes, k_stride, v_stride, num_threads;  // strides in bytes
};

// --- vectors ---------------------------------------------------------------------------------------------------------

typedef float vec __attribute__((vector_size(4 * LANES)));
typedef uint32_t words __attribute__((vector_size(4 * LANES)));
typedef uint16_t halves __attribute__((vector_size(2 * LANES)));
#ifdef __FLT16_MAX__
typedef _Float16 float16s __attribute__((vector_size(2 * LANES)));
extern "C" int has_float16() { return 1; }
#else
extern "C" int has_float16() { return 0; }
#endif

template <class To, class From> static inline To bits(From from) {
    To to;
    memcpy(&to, &from, sizeof(to));
    return to;
}

static inline vec load(const float *p) {
    vec v;
    memcpy(&v, p, sizeof(v));
    return v;
}
static inline void store(float *p, vec v) { memcpy(p, &v, sizeof(v)); }
static inline vec all(float f) { return f - vec{}; }

static inline float total(vec v) {
    float lanes[LANES];
    store(lanes, v);
    for (int width = LANES / 2; width; width /= 2)
        for (int i = 0; i < width; i++) lanes[i] += lanes[i + width];
    return lanes[0];
}

// --- numbers in memory -----------------------------------------------------------------------------------------------

struct Float32 {
    typedef float type;
    static inline vec load(const float *p) { return ::load(p); }
    static inline void store(float *p, vec v) { ::store(p, v); }
    static inline vec rounded(vec v) { return v; }
};

struct Bfloat16 {
    typedef uint16_t type;
    static inline vec load(const uint16_t *p) {
        halves h;
        memcpy(&h, p, sizeof(h));
        return bits<vec>(__builtin_convertvector(h, words) << 16);
    }
    static inline words up(vec v) {
        const words w = bits<words>(v), nan = bits<words>(v != v);
        return (nan & 0x7fc00000) | (~nan & (w + 0x7fff + ((w >> 16) & 1)));
    }
    static inline void store(uint16_t *p, vec v) {
        const halves h = __builtin_convertvector(up(v) >> 16, halves);
        memcpy(p, &h, sizeof(h));
    }
    static inline vec rounded(vec v) { return bits<vec>(up(v) & 0xffff0000); }
};

#ifdef __FLT16_MAX__
struct Float16 {
    typedef _Float16 type;
    static inline vec load(const _Float16 *p) {
        float16s h;
        memcpy(&h, p, sizeof(h));
        return __builtin_convertvector(h, vec);
    }
    static inline void store(_Float16 *p, vec v) {
        const float16s h = __builtin_convertvector(v, float16s);
        memcpy(p, &h, sizeof(h));
    }
    static inline vec rounded(vec v) { return __builtin_convertvector(__builtin_convertvector(v, float16s), vec); }
};
#else
typedef Float32 Float16;  // nobody asks for it
#endif

static inline vec load_typed(const void *p, int64_t i, int type) {
    if (type == FLOAT32) return Float32::load((const float *)p + i);
    if (type == BFLOAT16) return Bfloat16::load((const uint16_t *)p + i);
    return Float16::load((const Float16::type *)p + i);
}

// --- rotation and store ----------------------------------------------------------------------------------------------

// Write a head, normalized if `weight` is there.
template <class Number>
static void norm_head(const Rope &c, const typename Number::type *x, const void *weight, int type, float *to) {
    const int64_t size = c.head_dim;
    vec squares = all(0);
    for (int64_t i = 0; i < size; i += LANES) {
        const vec v = Number::load(x + i);
        store(to + i, v);
        squares = v * v + squares;
    }
    if (!weight) return;
    const float factor = 1 / __builtin_sqrtf(total(squares) / size + c.eps);
    const bool is_own = type == c.type;
    for (int64_t i = 0; i < size; i += LANES) {
        vec v = load(to + i) * factor;
        if (is_own) v = Number::rounded(v);
        store(to + i, Number::rounded(v * load_typed(weight, i, type)));
    }
}

template <class Number> static void rope_token(const Rope &c, int64_t token) {
    typedef typename Number::type type;
    const int64_t size = c.head_dim, half = c.rotary_dim / 2, num_rotated = c.num_heads + c.num_kv_heads;
    const type *x = (const type *)c.qkv + token * c.qkv_stride;
    const float *cos = c.cos_sin + c.positions[token] * c.rotary_dim, *sin = cos + half;
    type *const q = (type *)c.q + token * c.num_heads * size;
    type *const k = (type *)c.k_cache + c.slots[token] * c.k_stride - c.num_heads * size;
    float head[MAX_SIZE];
    for (int64_t i = 0; i < num_rotated; i++, x += size) {
        const bool is_query = i < c.num_heads;
        norm_head<Number>(c, x, is_query ? c.q_norm : c.k_norm, c.norm_type, head);
        if (half % LANES) {
            for (int64_t j = 0; j < half; j++) {
                const float a = head[j], b = head[j + half];
                head[j] = a * cos[j] - b * sin[j], head[j + half] = b * cos[j] + a * sin[j];
            }
        } else {
            for (int64_t j = 0; j < half; j += LANES) {
                const vec a = load(head + j), b = load(head + j + half), c = load(cos + j), s = load(sin + j);
                store(head + j, a * c - b * s), store(head + j + half, b * c + a * s);
            }
        }
        type *const to = (is_query ? q : k) + i * size;
        for (int64_t j = 0; j < size; j += LANES) Number::store(to + j, load(head + j));
    }
    type *const v = (type *)c.v_cache + c.slots[token] * c.v_stride;
    for (int64_t i = 0; i < c.num_kv_heads; i++, x += size) {
        norm_head<Number>(c, x, c.v_norm, c.v_norm_type, head);
        for (int64_t j = 0; j < size; j += LANES) Number::store(v + i * size + j, load(head + j));
    }
}

template <class Number> static void rope_items(Phase &phase) {
    phase.each([&](int64_t token) { rope_token<Number>(*(const Rope *)phase.job, token); });
}

// head_dim is a multiple of 16, and at most MAX_SIZE.
extern "C" void plan_rope(const void *, const void *call, Plan *plan) {
    const Rope &c = *(const Rope *)call;
    const auto work = c.type == FLOAT32    ? rope_items<Float32>
                      : c.type == BFLOAT16 ? rope_items<Bfloat16>
                                           : rope_items<Float16>;
    plan->add(work, (void *)call, c.num_tokens, c.num_tokens * (c.num_heads + 2 * c.num_kv_heads) * c.head_dim);
}

extern "C" void rope_and_store(const Rope *c) {
    run_planned(c->num_threads, [&](Plan &plan) { plan_rope(nullptr, c, &plan); });
}

// --- gathering -------------------------------------------------------------------------------------------------------

#define SOME_ROWS 64  // of an item
#define AHEAD 8       // rows that are brought nearer

static void gather_rows(const Gather &c, int64_t item) {
    const int64_t first = item * SOME_ROWS, rest = c.num_rows - first;
    const int64_t end = first + (rest < SOME_ROWS ? rest : SOME_ROWS);
    char *const k = c.to, *const v = k + c.num_rows * c.row_bytes;
    for (int64_t i = first; i < end; i++) {
        const int64_t slot = c.slots[i], next = c.slots[i + AHEAD < end ? i + AHEAD : end - 1];
        for (int64_t j = 0; j < c.row_bytes; j += 64) {
            __builtin_prefetch(c.k_cache + next * c.k_stride + j);
            __builtin_prefetch(c.v_cache + next * c.v_stride + j);
        }
        memcpy(k + i * c.row_bytes, c.k_cache + slot * c.k_stride, c.row_bytes);
        memcpy(v + i * c.row_bytes, c.v_cache + slot * c.v_stride, c.row_bytes);
    }
}

static void gather_items(Phase &phase) {
    phase.each([&](int64_t item) { gather_rows(*(const Gather *)phase.job, item); });
}

extern "C" void plan_gather(const void *, const void *call, Plan *plan) {
    const Gather &c = *(const Gather *)call;
    plan->add(gather_items, (void *)call, (c.num_rows + SOME_ROWS - 1) / SOME_ROWS, c.num_rows * c.row_bytes);
}

extern "C" void gather(const Gather *c) {
    run_planned(c->num_threads, [&](Plan &plan) { plan_gather(nullptr, c, &plan); });
}

// --- several calls at once -------------------------------------------------------------------------------------------

struct Operation {
    void (*plan)(const void *weight, const void *call, Plan *plan);  // of this library, or of that of products
    const void *weight, *call;
};

// Run operations one after the other. Return 0, or 1 if there was no memory.
extern "C" int run_chain(const Operation *operations, int count, int num_threads) {
    return run_planned(num_threads, [&](Plan &plan) {
        for (int i = 0; i < count; i++) operations[i].plan(operations[i].weight, operations[i].call, &plan);
    });
}

extern "C" void omp_set_num_threads(int) __attribute__((weak));

// Have torch use so many threads for what this thread asks of it.
extern "C" void use_threads(int num_threads) {
    if (omp_set_num_threads) omp_set_num_threads(num_threads);
}
