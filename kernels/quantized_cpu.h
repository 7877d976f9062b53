// What all ways of `quantized_cpu.cpp` to multiply have in common: what they are asked for, inputs, and outputs.

#pragma once
#include "team_cpu.h"
#include "vectors_cpu.h"

enum Code { INT4, INT8, FP8, NUMBERS };  // the last: of 16 bits, without scales

struct Weight {
    const uint8_t *codes;                // [n, k / 2], [n, k] or, of 16 bits, [n, k]
    const void *scale, *zero, *minimum;  // [n, num_groups]; the last two may be null
    const float *values;                 // what the 16 codes of INT4 stand for
    int64_t n, k, group_size, num_groups;
    int32_t code, scale_type, zero_type, has_table;  // scale_type: of NUMBERS, their own
    float offset;  // subtracted from all codes

    int64_t row_bytes() const { return code == INT4 ? k / 2 : code == NUMBERS ? 2 * k : k; }
};

struct Call {
    const void *x, *norm, *bias, *residual;  // [T, k], [k], [n], [T, outputs]; all but x may be null
    void *out;
    int64_t num_tokens, x_stride, residual_stride, out_stride;
    int32_t type, norm_type, bias_type, residual_type, out_type, act, num_threads;
    float eps;
};

#define BLOCK (2 * LANES)  // inputs decoded at a time
#define MAX_GROUPS 1024
#define MAX_ITEM 64  // outputs of an item of work

// A chunk of tokens, whose prepared inputs are at x. Threads take items: first of inputs, then of outputs.
struct Job {
    const Weight *w;
    const Call *c;
    void (*prepare)(Job &, int64_t item);
    void (*multiply)(Job &, int64_t start, int64_t count);  // of the outputs
    float *x;
    int64_t first_token, num_tokens, num_outputs, item_size;
    struct Cuts *cuts;
    int width;  // tokens of a tile of the matrix units, 0: they are not used
    bool has_failed;
};

// Write one token's inputs as float32, after the norm if there is one; pairs: see `is_paired`.
static void prepare(const Weight &w, const Call &c, int64_t token, float *to, bool separates) {
    const int64_t k = w.k;
    const int type = c.type;
    vec squares = all(0);
    for (int64_t i = 0; i < k; i += LANES) {
        const vec x = load_typed(c.x, token * c.x_stride + i, type);
        store(to + i, x);
        squares = fma(x, x, squares);
    }
    if (c.norm) {
        float lanes[LANES], sum = 0;
        store(lanes, squares);
        for (int j = 0; j < LANES; j++) sum += lanes[j];
        const vec factor = all(1 / __builtin_sqrtf(sum / k + c.eps));
        for (int64_t i = 0; i < k; i += LANES) {
            vec x = load(to + i) * factor;
            if (c.norm_type == type) x = rounded(x, type);
            store(to + i, rounded(x * load_typed(c.norm, i, c.norm_type), type));
        }
    }
    if (separates)
        for (int64_t i = 0; i < k; i += BLOCK) separate(to + i);
}

// Write the outputs [start, start + count) of a token; partners: the sums of the other halves of pairs, with act.
static void finish(const Job &job, int64_t token, int64_t start, int64_t count, const float *sums,
                   const float *partners) {
    const Call &c = *job.c;
    for (int64_t i = 0; i < count; i += LANES) {
        const int64_t left = count - i, output = start + i;
        vec v = load(sums + i);
        if (c.bias) v = v + load_up_to(c.bias, output, c.bias_type, left);
        if (c.act) {
            vec up = load(partners + i);
            if (c.bias) up = up + load_up_to(c.bias, job.num_outputs + output, c.bias_type, left);
            v = activated(v, c.act) * up;
        }
        if (c.residual)
            v = v + load_up_to(c.residual, token * c.residual_stride + output, c.residual_type, left);
        if (left >= LANES) {
            store_typed(c.out, token * c.out_stride + output, c.out_type, v);
        } else {
            float some[LANES];
            store_typed(some, 0, c.out_type, v);
            const int size = size_of(c.out_type);
            memcpy((char *)c.out + (token * c.out_stride + output) * size, some, left * size);
        }
    }
}
