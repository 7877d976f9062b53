// Products of 4-bit and 8-bit integers with inputs of 16 bits, by integer vectors of AVX2.
//
// An input becomes a whole number of steps, the largest of its block of 32 up to 2^15: of bfloat16, all that are larger
// than 1/128 of that one stay as they are, and others move by 2^-16 of it at most. Sums of a few inputs are integers,
// exact, and become float32 where they meet their scale. Lanes are added in one order, so that a token's results do not
// depend on what stands beside it. One token takes two thirds of its time in float32, and a prompt as long; with AVX-512
// float32 is as fast for a few tokens, and faster for more.

#pragma once
#include "quantized_cpu_vectors.h"

#define VECTOR_BYTES 32
#define BLOCK_INPUTS 32  // that share a step
#define INPUT_BITS 15    // of the largest
#define CHUNK_UNITS 64   // whose scales are taken at once
#define MOST_AT_ONCE 8   // tokens
#define NEAR_STEPS 32    // tokens whose inputs the first caches hold
#define ROUND_UP(a, b) (((a) + (b) - 1) / (b) * (b))

// Add products of pairs of 16-bit integers to those of 32.
static inline __m256i add_pairs(__m256i sums, __m256i a, __m256i b) {
#ifdef __AVXVNNI__
    return _mm256_dpwssd_avx_epi32(sums, a, b);
#endif
    return _mm256_add_epi32(sums, _mm256_madd_epi16(a, b));
}

static inline float sum_lanes(vec v) {
    float lanes[LANES], sum = 0;
    store(lanes, v);
    for (float lane : lanes) sum += lane;
    return sum;
}

// --- inputs ----------------------------------------------------------------------------------------------------------

static bool takes_integers(const Weight &w, const Call &c) {
    if (c.type == FLOAT32 || w.k % BLOCK_INPUTS) return false;
    return w.code == INT4 ? !w.has_table && w.group_size % BLOCK_INPUTS == 0 : w.code == INT8 && w.group_size % 16 == 0;
}

// How a row is cut: a unit's inputs share a scale, a vector's are taken at once, and have one unit or two.
struct Cut {
    int64_t unit_inputs, vector_inputs, num_vectors, num_units;
    explicit Cut(const Weight &w) {
        unit_inputs = w.group_size % BLOCK_INPUTS ? 16 : BLOCK_INPUTS, vector_inputs = w.code == INT4 ? 64 : 32;
        num_vectors = (w.k + vector_inputs - 1) / vector_inputs;
        num_units = ROUND_UP(num_vectors * vector_inputs / unit_inputs, LANES);
    }
    int64_t floats() const { return ROUND_UP(num_vectors * vector_inputs / 2 + 2 * num_units, 16); }
};

// A token's inputs in steps, in the order of codes; a unit's step, and the sum of its inputs.
struct Steps {
    int16_t *inputs;
    float *steps, *sums;
    Steps(const Cut &cut, const float *memory) {
        inputs = (int16_t *)memory, steps = (float *)(inputs + cut.num_vectors * cut.vector_inputs);
        sums = steps + cut.num_units;
    }
};

// Write a block as whole numbers. Return their step, which is not a number if one of them is none, or infinite.
static inline float take_steps(const float *x, int16_t *to, float &sum) {
    vec largest = all(0), invalid = all(0), total = all(0);
    for (int i = 0; i < BLOCK_INPUTS; i += LANES) {
        const vec v = load(x + i);
        largest = larger(largest, _mm256_andnot_ps(all(-0.0f), v)), invalid = fma(v, all(0), invalid);
    }
    float lanes[LANES], most = 0, step, inverse;
    store(lanes, largest);
    for (float lane : lanes) most = lane > most ? lane : most;
    uint32_t bits;
    memcpy(&bits, &most, 4);
    const int above = (int)(bits >> 23) - 126, exponent = above < -100 ? -100 : above;  // 2^exponent is larger than all
    const uint32_t step_bits = (uint32_t)(127 + exponent - INPUT_BITS) << 23;
    const uint32_t inverse_bits = (uint32_t)(127 + INPUT_BITS - exponent) << 23;
    memcpy(&step, &step_bits, 4), memcpy(&inverse, &inverse_bits, 4);
    for (int i = 0; i < BLOCK_INPUTS; i += LANES) {
        const vec whole = nearest(load(x + i) * all(inverse));
        const __m256i words = _mm256_cvtps_epi32(whole);
        const __m128i halves = _mm_packs_epi32(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
        _mm_storeu_si128((__m128i *)(to + i), halves);
        total = total + whole;
    }
    sum = sum_lanes(total);
    return step + sum_lanes(invalid);
}

// Write a block's whole numbers where `Codes` has their codes.
static inline void arrange(const Weight &w, const Cut &cut, const int16_t *whole, int64_t input, int16_t *to) {
    if (w.code == INT4) {
        to += input / 64 * 64 + input % 64 / 4;
        for (int i = 0; i < BLOCK_INPUTS; i++) to[i % 4 * 16 + i / 4] = whole[i];
    } else if (cut.unit_inputs == BLOCK_INPUTS) {
        memcpy(to + input, whole, 2 * BLOCK_INPUTS);
    } else {
        for (int i = 0; i < BLOCK_INPUTS; i += 8) memcpy(to + input + (i / 16 + i / 8 % 2 * 2) * 8, whole + i, 16);
    }
}

static void take_all_steps(const Weight &w, const Cut &cut, const float *x, const Steps &to) {
    int16_t whole[BLOCK_INPUTS];
    memset(to.inputs, 0, 2 * cut.num_vectors * cut.vector_inputs), memset(to.steps, 0, 8 * cut.num_units);
    for (int64_t input = 0; input < w.k; input += BLOCK_INPUTS) {
        const int64_t unit = input / cut.unit_inputs;
        float sum;
        const float step = take_steps(x + input, whole, sum);
        arrange(w, cut, whole, input, to.inputs);
        if (cut.unit_inputs < BLOCK_INPUTS) {
            float second = 0;
            for (int i = 16; i < BLOCK_INPUTS; i++) second += whole[i];
            to.steps[unit + 1] = step, to.sums[unit + 1] = second * step, sum -= second;
        }
        to.steps[unit] = step, to.sums[unit] = sum * step;
    }
}

static void prepare_steps(Job &job, int64_t item) {
    static thread_local Memory memory;
    const Weight &w = *job.w;
    const Cut cut(w);
    float *const row = (float *)memory.get(4 * w.k);
    if (!row) {
        job.has_failed = true;
        return;
    }
    prepare(w, *job.c, job.first_token + item, row, false);
    take_all_steps(w, cut, row, Steps(cut, job.x + item * cut.floats()));
}

// --- scales ----------------------------------------------------------------------------------------------------------

// Write numbers of a row's groups: whole vectors of them, of which the last begins earlier.
template <int TYPE> static inline void read_numbers(const void *from, int64_t start, int64_t count, float *to) {
    if (count < LANES) return store(to, load_few(from, start, TYPE, count));
    for (int64_t g = 0; g < count; g += LANES) {
        const int64_t at = g + LANES <= count ? g : count - LANES;
        store(to + at, load_typed(from, start + at, TYPE));
    }
}

static inline void read_typed(const void *from, int64_t start, int64_t count, int type, float *to) {
    if (type == FLOAT16) read_numbers<FLOAT16>(from, start, count, to);
    else if (type == FLOAT32) read_numbers<FLOAT32>(from, start, count, to);
    else if (type == BFLOAT16) read_numbers<BFLOAT16>(from, start, count, to);
    else read_numbers<UINT8>(from, start, count, to);
}

// Repeat numbers of groups for their units, from the last one on: they stand where the first ones' are to be.
static void repeat(float *numbers, const Weight &w, int64_t unit_inputs) {
    const int64_t of_group = w.group_size / unit_inputs, num_units = w.k / unit_inputs;
    for (int64_t g = w.num_groups - 1; of_group > 1 && g >= 0; g--) {
        const float number = numbers[g];
        const int64_t first = g * of_group, end = first + of_group < num_units ? first + of_group : num_units;
        if (of_group % 4 == 0)  // the last four may go on into what no input meets
            for (int64_t unit = first; unit < end; unit += 4) _mm_storeu_ps(numbers + unit, _mm_set1_ps(number));
        else
            for (int64_t unit = first; unit < end; unit++) numbers[unit] = number;
    }
}

// Write scales of a row's units, and what they add for each unit of their inputs' sum; `added` may be null.
static void read_units(const Weight &w, const Cut &cut, int64_t row, float *scales, float *added) {
    const int64_t count = w.num_groups, start = row * count;
    read_typed(w.scale, start, count, w.scale_type, scales);
    if (added) {
        if (w.minimum) read_typed(w.minimum, start, count, w.scale_type, added);
        else if (w.zero) read_typed(w.zero, start, count, w.zero_type, added);
        for (int64_t g = 0; g < count; g += LANES) {
            const vec factor = w.minimum ? all(-1) : all(0) - load(scales + g);
            store(added + g, factor * (w.minimum || w.zero ? load(added + g) : all(w.offset)));
        }
        repeat(added, w, cut.unit_inputs);
    }
    repeat(scales, w, cut.unit_inputs);
}

// --- products --------------------------------------------------------------------------------------------------------

// A vector of codes as integers of 16 bits, two of a unit in a lane. A word of INT4 has four, one for each turn.
template <int CODE, int UNITS> struct Codes {
    static const int INPUTS = CODE == INT4 ? 64 : 32, BYTES = 32, TURNS = INPUTS / 16;
    __m256i turns[TURNS];

    explicit Codes(const uint8_t *codes) {
        if (CODE == INT4) {
            const __m256i words = _mm256_loadu_si256((const __m256i *)codes), lowest = _mm256_set1_epi16(15);
            turns[0] = _mm256_and_si256(words, lowest);
            turns[1] = _mm256_and_si256(_mm256_srli_epi16(words, 4), lowest);
            turns[2] = _mm256_and_si256(_mm256_srli_epi16(words, 8), lowest);
            turns[3] = _mm256_srli_epi16(words, 12);
        } else {
            __m128i first = _mm_loadu_si128((const __m128i *)codes), second = _mm_loadu_si128((const __m128i *)codes + 1);
            if (UNITS == 2) {
                const __m128i halves = _mm_unpacklo_epi64(first, second);
                second = _mm_unpackhi_epi64(first, second), first = halves;
            }
            turns[0] = _mm256_cvtepi8_epi16(first), turns[1] = _mm256_cvtepi8_epi16(second);
        }
    }

    // Return the lanes' sums of codes times inputs.
    vec times(const int16_t *inputs) const {
        const __m256i *const x = (const __m256i *)inputs;
        __m256i sums = _mm256_madd_epi16(turns[0], _mm256_loadu_si256(x));
#pragma GCC unroll 4
        for (int i = 1; i < TURNS; i++) sums = add_pairs(sums, turns[i], _mm256_loadu_si256(x + i));
        return _mm256_cvtepi32_ps(sums);
    }
};

// Return the scales of a vector's units, each in its lanes.
template <int UNITS> static inline vec spread(const float *scales) {
    if (UNITS == 1) return all(scales[0]);
    double both;
    memcpy(&both, scales, 8);
    return _mm256_permutevar_ps(_mm256_castpd_ps(_mm256_set1_pd(both)), _mm256_set_epi32(1, 1, 1, 1, 0, 0, 0, 0));
}

// A tile's rows, of which the last may be there several times, and their `read_units`, [rows, units].
struct CodedRows {
    const uint8_t *codes[ROWS];
    float *scales, *added;
};

// Write sums [tokens, rows] of some of a tile's rows.
template <int CODE, int UNITS, int ROWS_AT_ONCE, int TOKENS>
static inline void multiply_steps(const Cut &cut, const CodedRows &rows, int first_row, const float *x, vec *sums) {
    typedef Codes<CODE, UNITS> Vector;
    alignas(64) float scales[TOKENS][ROWS_AT_ONCE][CHUNK_UNITS];
    const Steps of_first(cut, x);
    const int64_t x_floats = cut.floats();
    for (int i = 0; i < TOKENS * ROWS_AT_ONCE; i++) sums[i] = all(0);
    for (int64_t first = 0; first < cut.num_vectors * UNITS; first += CHUNK_UNITS) {
        const int64_t left = cut.num_vectors * UNITS - first, count = left < CHUNK_UNITS ? left : CHUNK_UNITS;
        for (int t = 0; t < TOKENS; t++)
            for (int64_t i = first; i < first + count; i += LANES) {
                const vec step = load(of_first.steps + t * x_floats + i), sum = load(of_first.sums + t * x_floats + i);
                for (int r = 0; r < ROWS_AT_ONCE; r++) {
                    const int64_t at = (first_row + r) * cut.num_units + i;
                    vec &total = sums[t * ROWS_AT_ONCE + r];
                    store(scales[t][r] + i - first, load(rows.scales + at) * step);
                    if (rows.added) total = fma(load(rows.added + at), sum, total);
                }
            }
        const int64_t end = (first + count) / UNITS;
        for (int64_t i = first / UNITS, unit = 0; i < end; i++, unit += UNITS)
#pragma GCC unroll 4
            for (int r = 0; r < ROWS_AT_ONCE; r++) {
                const Vector codes(rows.codes[first_row + r] + i * Vector::BYTES);
#pragma GCC unroll 8
                for (int t = 0; t < TOKENS; t++) {
                    vec &total = sums[t * ROWS_AT_ONCE + r];
                    const vec found = codes.times(of_first.inputs + t * 2 * x_floats + i * Vector::INPUTS);
                    total = fma(found, spread<UNITS>(scales[t][r] + unit), total);
                }
            }
    }
}

// Write a tile's sums, ROWS for each token, `stride` apart: of 8 tokens at a time, and of 4, 2 and 1 of what is left.
template <int CODE, int UNITS>
static void multiply_tokens(const Cut &cut, const CodedRows &rows, const float *x, int64_t num_tokens, float *to,
                            int64_t stride) {
    const auto next = [&](int64_t count) { x += count * cut.floats(), to += count * stride, num_tokens -= count; };
    vec sums[MOST_AT_ONCE];
    alignas(64) float found[MOST_AT_ONCE];
    for (; num_tokens >= 8; next(8))
        for (int r = 0; r < ROWS; r++) {
            multiply_steps<CODE, UNITS, 1, 8>(cut, rows, r, x, sums);
            reduce(sums, found), reduce(sums + 4, found + 4);
            for (int t = 0; t < 8; t++) to[t * stride + r] = found[t];
        }
    if (num_tokens >= 4) {
        for (int r = 0; r < ROWS; r += 2) {
            multiply_steps<CODE, UNITS, 2, 4>(cut, rows, r, x, sums);
            reduce(sums, found), reduce(sums + 4, found + 4);
            for (int t = 0; t < 4; t++) to[t * stride + r] = found[2 * t], to[t * stride + r + 1] = found[2 * t + 1];
        }
        next(4);
    }
    if (num_tokens >= 2) {
        multiply_steps<CODE, UNITS, 4, 2>(cut, rows, 0, x, sums);
        reduce(sums, to), reduce(sums + 4, to + stride);
        next(2);
    }
    if (num_tokens) {
        multiply_steps<CODE, UNITS, 4, 1>(cut, rows, 0, x, sums);
        reduce(sums, to);
    }
}

// Where codes of a row are; those that a vector would go on beyond are copied.
static const uint8_t *codes_of(const Weight &w, int64_t row, int64_t row_bytes, uint8_t *copied) {
    const uint8_t *const codes = w.codes + row * row_bytes;
    if (row + 1 == w.n && row_bytes % VECTOR_BYTES) return (const uint8_t *)memcpy(copied, codes, row_bytes);
    for (int64_t i = 0; row + ROWS < w.n && i < row_bytes; i += 64)  // the next tile's
        _mm_prefetch(codes + ROWS * row_bytes + i, _MM_HINT_T0);
    return codes;
}

static void take_integers(Job &job, int64_t start, int64_t count) {
    const Weight &w = *job.w;
    const Cut cut(w);
    const int64_t num_parts = job.c->act ? 2 : 1, pitch = 2 * MAX_ITEM, row_bytes = w.row_bytes();
    const int64_t num_floats = 2 * ROWS * cut.num_units;
    static thread_local Memory memory;
    float *const scales = (float *)memory.get(4 * num_floats + row_bytes + VECTOR_BYTES);
    if (!scales) {
        job.has_failed = true;
        return;
    }
    memset(scales, 0, 4 * num_floats);  // of units that are not there, too
    float *const added = w.zero || w.minimum || w.offset ? scales + ROWS * cut.num_units : nullptr;
    uint8_t *const copied = (uint8_t *)(scales + num_floats);
    const auto multiply = w.code == INT4                     ? multiply_tokens<INT4, 2>
                          : cut.unit_inputs == BLOCK_INPUTS ? multiply_tokens<INT8, 1>
                                                            : multiply_tokens<INT8, 2>;
    alignas(64) float sums[NEAR_STEPS * 2 * MAX_ITEM];
    for (int64_t token = 0; token < job.num_tokens; token += NEAR_STEPS) {
        const int64_t left = job.num_tokens - token, num_tokens = left < NEAR_STEPS ? left : NEAR_STEPS;
        for (int64_t part = 0; part < num_parts; part++)
            for (int64_t i = 0; i < count; i += ROWS) {
                const int64_t first = part * job.num_outputs + start, last = first + count - 1;
                CodedRows rows = {{}, scales, added};
                for (int r = 0; r < ROWS; r++) {
                    const int64_t row = first + i + r < last ? first + i + r : last;
                    rows.codes[r] = codes_of(w, row, row_bytes, copied);
                    read_units(w, cut, row, scales + r * cut.num_units, added ? added + r * cut.num_units : nullptr);
                }
                multiply(cut, rows, job.x + token * cut.floats(), num_tokens, sums + part * MAX_ITEM + i, pitch);
            }
        for (int64_t t = 0; t < num_tokens; t++)
            finish(job, job.first_token + token + t, start, count, sums + t * pitch, sums + t * pitch + MAX_ITEM);
    }
}
