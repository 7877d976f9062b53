// Products by the matrix units of a CPU (AMX), and by vectors that add as these do.
//
// AMX multiplies 16 rows of weights by up to 16 tokens, 32 inputs at a time, bfloat16 into float32. Codes are exact in
// bfloat16, and so are inputs of that type: a group's sum is as exact as that of vectors, and scaled in float32. A tile
// of one token takes the same instructions as one of 16, and has the same bits.

#pragma once
#include <sys/syscall.h>
#include <unistd.h>

#include "quantized_cpu.h"

#define TILE_ROWS 16
#define TILE_FLOATS (TILE_ROWS * LANES)
#define FEW_PAIRS 3       // tokens for which the units are slower than vectors
#define MOST_TILES 2      // that vectors multiply at once
#define AT_ONCE 4         // tiles of sums, so that one multiplication need not wait for another
#define SEGMENT_STEPS 4   // at most in a tile of sums
#define CHUNK_INPUTS 320  // of decoded rows, which the first cache holds beside the inputs

static int may_use_tiles;

// Ask the system for the units' registers.
extern "C" int enable_tiles() {
    return may_use_tiles = syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* tile data */) == 0;
}

// A run of steps, a multiplication each, in one tile of sums and one group.
struct Segment {
    int32_t step, end, group;
};

// How a weight's inputs are cut into steps, and these into segments and chunks.
struct Cuts {
    int step_inputs, num_steps, num_segments;
    int segments_per_chunk;  // of a chunk, whose rows are decoded at once
    Segment segments[];

    static int64_t floats(const Weight &w) { return (sizeof(Cuts) + w.k / 16 * sizeof(Segment) + 63) / 64 * 16; }
    void set(const Weight &w) {
        step_inputs = w.group_size % 32 ? 16 : 32, num_steps = w.k / step_inputs, num_segments = 0;
        const int group_steps = w.group_size / step_inputs;
        const int most = group_steps < SEGMENT_STEPS ? group_steps : SEGMENT_STEPS;
        for (int step = 0, group = 0; step < num_steps; group++) {
            const int group_end = step + group_steps < num_steps ? step + group_steps : num_steps;
            while (step < group_end) {
                const int end = step + most < group_end ? step + most : group_end;
                segments[num_segments++] = {step, end, group};
                step = end;
            }
        }
        const int fit = CHUNK_INPUTS / (most * step_inputs), num_chunks = (num_segments + fit - 1) / fit;
        segments_per_chunk = (num_segments + num_chunks - 1) / num_chunks;
        if (step_inputs == 16) segments_per_chunk += segments_per_chunk % 2;  // blocks of 32 are decoded
    }
    int end_of_chunk(int segment) const {
        return segment + segments_per_chunk < num_segments ? segment + segments_per_chunk : num_segments;
    }
};

struct alignas(64) TileConfig {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};
};

// Tiles 0 to 3 are sums [rows, tokens], 4 and 5 weights [rows, inputs], 6 and 7 inputs [pairs of inputs, tokens].
struct Tiles {
    TileConfig before;
    Tiles(int width, int64_t step_inputs) {
        _tile_storeconfig(&before);  // of oneDNN, perhaps, which remembers what it has set
        TileConfig config;
        for (int i = 0; i < 8; i++) {
            config.rows[i] = i < 6 ? TILE_ROWS : step_inputs / 2;
            config.row_bytes[i] = i / 2 == 2 ? 2 * step_inputs : 4 * width;
        }
        _tile_loadconfig(&config);
    }
    ~Tiles() {
        if (before.palette) _tile_loadconfig(&before);
        else _tile_release();
    }
};

static void transpose(vec *v) {
    vec a[16];
    for (int i = 0; i < 16; i += 2) {
        a[i] = _mm512_unpacklo_ps(v[i], v[i + 1]), a[i + 1] = _mm512_unpackhi_ps(v[i], v[i + 1]);
    }
    for (int i = 0; i < 16; i += 4)
        for (int j = 0; j < 2; j++) {
            const __m512d low = _mm512_castps_pd(a[i + j]), high = _mm512_castps_pd(a[i + 2 + j]);
            v[i + 2 * j] = _mm512_castpd_ps(_mm512_unpacklo_pd(low, high));
            v[i + 2 * j + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(low, high));
        }
    for (int i = 0; i < 16; i += 8)
        for (int j = 0; j < 4; j++) {
            a[i + j] = _mm512_shuffle_f32x4(v[i + j], v[i + 4 + j], 0x88);
            a[i + 4 + j] = _mm512_shuffle_f32x4(v[i + j], v[i + 4 + j], 0xdd);
        }
    for (int j = 0; j < 4; j++) {
        v[j] = _mm512_shuffle_f32x4(a[j], a[8 + j], 0x88), v[8 + j] = _mm512_shuffle_f32x4(a[j], a[8 + j], 0xdd);
        v[4 + j] = _mm512_shuffle_f32x4(a[4 + j], a[12 + j], 0x88);
        v[12 + j] = _mm512_shuffle_f32x4(a[4 + j], a[12 + j], 0xdd);
    }
}

static bool has_shift(const Weight &w) { return w.zero || w.minimum; }

// Whether the products of a call go through the units: what is multiplied is exact in bfloat16.
static bool takes_tiles(const Weight &w, const Call &c) {
    if (!may_use_tiles || c.type != BFLOAT16 || w.code == NUMBERS) return false;
    for (int i = 0; w.code == INT4 && i < 16; i++) {
        uint32_t bits;
        const float value = w.values[i] - w.offset;
        memcpy(&bits, &value, 4);
        if (bits & 0xffff) return false;
    }
    return true;
}

// Inputs of up to 16 tokens: pairs [k / 2, width, 2] as bfloat16, and their sums over segments [segments, 16].
struct InputTile {
    uint32_t *pairs;
    float *sums;
    static int64_t floats(const Weight &w, int width) {
        return (w.k / 2 * width + 15) / 16 * 16 + (has_shift(w) ? w.k / 16 * LANES : 0);
    }
    InputTile(const Weight &w, float *memory, int width)
        : pairs((uint32_t *)memory), sums(memory + (w.k / 2 * width + 15) / 16 * 16) {}
};

static void sum_segments(const Cuts &cuts, const float *x, float *sums) {
    for (int i = 0; i < cuts.num_segments; i++) {
        const Segment &segment = cuts.segments[i];
        vec sum = all(0);
        const int end = segment.end * cuts.step_inputs;
        for (int j = segment.step * cuts.step_inputs; j < end; j += LANES) sum = sum + load(x + j);
        sums[i * LANES] = _mm512_reduce_add_ps(sum);
    }
}

static void prepare_tile(const Weight &w, const Call &c, const Cuts &cuts, int64_t token, int num_tokens, int width,
                         float *memory, float *row) {
    const InputTile to(w, memory, width);
    uint32_t *packed = (uint32_t *)(row + w.k);  // [width, k / 2]
    if (has_shift(w) && width < LANES) memset(to.sums, 0, 4 * LANES * cuts.num_segments);  // no denormal numbers there
    for (int t = 0; t < width; t++) {
        if (t < num_tokens) prepare(w, c, token + t, row, false);
        else memset(row, 0, 4 * w.k);
        if (has_shift(w)) sum_segments(cuts, row, to.sums + t);
        uint32_t *bits = width == 1 ? to.pairs : packed + t * w.k / 2;
        for (int64_t i = 0; i < w.k; i += 2 * LANES) {
            const __m512bh both = _mm512_cvtne2ps_pbh(load(row + i + LANES), load(row + i));
            memcpy(bits + i / 2, &both, sizeof(both));
        }
    }
    if (width == 1) return;
    const __mmask16 mask = (1u << width) - 1;
    for (int64_t i = 0; i < w.k / 2; i += LANES) {
        vec v[16];
        for (int t = 0; t < 16; t++) v[t] = t < width ? load((float *)packed + t * w.k / 2 + i) : all(0);
        transpose(v);
        for (int j = 0; j < 16; j++) _mm512_mask_storeu_ps(to.pairs + (i + j) * width, mask, v[j]);
    }
}

// Decode inputs [first, last) of 16 rows to bfloat16: [blocks of 32, rows, 32].
template <int CODE>
static void decode_tile(const Weight &w, int64_t row, int64_t last_row, int64_t first, int64_t last, uint16_t *to) {
    uint16_t values[2 * LANES];
    for (int i = 0; CODE == INT4 && i < 2 * LANES; i += LANES)
        store_bfloat16(values + i, load(w.values) - all(w.offset));
    const __m512i table = _mm512_loadu_si512(values), nibbles = _mm512_set1_epi32(0x000f000f);
    const int64_t row_bytes = CODE == INT4 ? w.k / 2 : w.k, block_bytes = CODE == INT4 ? 16 : 32;
    for (int r = 0; r < TILE_ROWS; r++, to += 32) {
        const uint8_t *codes = w.codes + (row + r < last_row ? row + r : last_row - 1) * row_bytes;
        codes += first / 32 * block_bytes;
        if (row + r + TILE_ROWS < w.n)
            for (int64_t i = 0; i < (last - first) / 32 * block_bytes; i += 64)
                _mm_prefetch(codes + TILE_ROWS * row_bytes + i, _MM_HINT_T0);
        uint16_t *block = to;
        for (int64_t i = first; i < last; i += 32, codes += block_bytes, block += 32 * TILE_ROWS) {
            __m512i decoded;
            if (CODE == INT4) {
                const __m512i pairs = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)codes));
                const __m512i apart = _mm512_ternarylogic_epi32(pairs, _mm512_slli_epi32(pairs, 12), nibbles, 0xa8);
                decoded = _mm512_permutexvar_epi16(apart, table);
            } else {
                const vec low = CODE == INT8 ? of_int8(codes) : of_fp8(codes);
                const vec high = CODE == INT8 ? of_int8(codes + 16) : of_fp8(codes + 16);
                const __m512bh both = _mm512_cvtne2ps_pbh(high, low);
                memcpy(&decoded, &both, sizeof(both));
            }
            _mm512_store_si512(block, decoded);
        }
    }
}

// Write two groups' numbers of 16 bits each, the first of which stand at places `at`: [2, rows].
static inline void gather_pair(const void *numbers, int type, __m512i at, vec factor, float *to) {
    const __m512i pairs = _mm512_i32gather_epi32(at, numbers, 2);
    for (int j = 0; j < 2; j++) {
        const __m512i bits = j ? _mm512_srli_epi32(pairs, 16) : pairs;
        const vec of_float16 = _mm512_cvtph_ps(_mm512_cvtepi32_epi16(bits));
        const vec found = type == FLOAT16 ? of_float16 : _mm512_castsi512_ps(_mm512_slli_epi32(bits, 16));
        store(to + j * LANES, found * factor);
    }
}

// Write scales, or shifts, of 16 rows: [groups, rows].
static void read_tile_scales(const Weight &w, int64_t row, int64_t last_row, float *scales, float *shifts) {
    int64_t count = w.num_groups;
    const int64_t rest = count % LANES;
    if (count > LANES && (rest == 2 || rest == 4) && !w.zero && w.scale_type != FLOAT32) {  // few for a transposition
        const __m512i nth = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
        const __m512i of_row = _mm512_min_epi32(nth, _mm512_set1_epi32(last_row - row - 1));
        const __m512i first = _mm512_mullo_epi32(of_row, _mm512_set1_epi32(count));
        for (int64_t g = count - rest; g < count; g += 2) {
            const int64_t start = row * count + g;
            const vec factor = all(w.code == FP8 ? 256 : 1);
            gather_pair((const uint16_t *)w.scale + start, w.scale_type, first, factor, scales + g * LANES);
            if (w.minimum)
                gather_pair((const uint16_t *)w.minimum + start, w.scale_type, first, all(1), shifts + g * LANES);
        }
        count -= rest;
    }
    const int64_t num_groups = w.num_groups;
    for (int64_t i = 0; i < count; i += LANES) {
        const int64_t g = i + LANES <= count || count < LANES ? i : count - LANES, left = count - g;
        vec scale[16], shift[16];
        for (int r = 0; r < TILE_ROWS; r++) {
            const int64_t start = (row + r < last_row ? row + r : last_row - 1) * num_groups + g;
            scale[r] = load_up_to(w.scale, start, w.scale_type, left);
            shift[r] = w.minimum ? load_up_to(w.minimum, start, w.scale_type, left) : all(0);
            if (w.zero) shift[r] = fma(load_up_to(w.zero, start, w.zero_type, left), scale[r], shift[r]);
        }
        transpose(scale);
        const vec factor = all(w.code == FP8 ? 256 : 1);
        for (int j = 0; j < LANES && g + j < count; j++) store(scales + (g + j) * LANES, scale[j] * factor);
        if (!has_shift(w)) continue;
        transpose(shift);
        for (int j = 0; j < LANES && g + j < count; j++) store(shifts + (g + j) * LANES, shift[j]);
    }
}

// GCC's intrinsics of tiles do not say that they read and write memory.
#define MEMORY_IS_READ asm volatile("" ::: "memory")

#define MULTIPLY(sums, weights, inputs)                                            \
    if (sums < count && now[sums].step + j < now[sums].end) {                         \
        const int64_t step = now[sums].step + j;                                   \
        _tile_loadd(weights, decoded + (step >> is_half) * 1024 + (step & is_half) * 32, 64); \
        _tile_loadd(inputs, pairs + step * pairs_pitch, pitch);                    \
        _tile_dpbf16ps(sums, weights, inputs);                                     \
    }

// Add to sums [rows, tokens] the products of segments [first, last); weights: decoded, from the first one's on.
template <bool SHIFTS>
static void multiply_tile(const Cuts &cuts, int first, int last, const uint16_t *weights, const InputTile &x, int width,
                          const float *scales, const float *shifts, float *sums, float (*parts)[AT_ONCE][TILE_FLOATS],
                          int64_t next_tile) {
    vec sum[TILE_ROWS];
    for (int r = 0; r < TILE_ROWS; r++) sum[r] = load(sums + r * LANES);
    const int64_t pitch = 4 * width, pairs_pitch = cuts.step_inputs / 2 * pitch;
    const int64_t is_half = cuts.step_inputs == 16;
    const char *const pairs = (const char *)x.pairs;
    const char *const decoded = (const char *)weights - (cuts.segments[first].step >> is_half) * 1024;
    MEMORY_IS_READ;
    for (int segment = first, odd = 0; segment < last + AT_ONCE; segment += AT_ONCE, odd = !odd) {
        if (segment < last) {
            const Segment *const now = cuts.segments + segment;
            const int count = last - segment;
            _tile_zero(0);
            _tile_zero(1);
            _tile_zero(2);
            _tile_zero(3);
            for (int64_t j = 0; j < now->end - now->step; j++) {
                MULTIPLY(0, 4, 6)
                MULTIPLY(1, 5, 7)
                MULTIPLY(2, 4, 6)
                MULTIPLY(3, 5, 7)
            }
            _tile_stored(0, parts[odd][0], 4 * LANES);
            _tile_stored(1, parts[odd][1], 4 * LANES);
            _tile_stored(2, parts[odd][2], 4 * LANES);
            _tile_stored(3, parts[odd][3], 4 * LANES);
            MEMORY_IS_READ;
        }
        if (segment == first) continue;
        for (int i = segment - AT_ONCE; i < segment && i < last; i++) {  // stored a while ago: it can be loaded at once
            const float *const part = parts[!odd][i + AT_ONCE - segment];
            const float *const scale = scales + cuts.segments[i].group * LANES;
            const float *const shift = shifts + cuts.segments[i].group * LANES;
            const char *const next = pairs + cuts.segments[i].step * pairs_pitch + next_tile;
            for (int r = 0; r < TILE_ROWS; r++) {
                _mm_prefetch(next + r * 64, _MM_HINT_T0);
                sum[r] = fma(load(part + r * LANES), all(scale[r]), sum[r]);
                if (SHIFTS) sum[r] = _mm512_fnmadd_ps(load(x.sums + i * LANES), all(shift[r]), sum[r]);
            }
        }
    }
    for (int r = 0; r < TILE_ROWS; r++) store(sums + r * LANES, sum[r]);
}

// --- few tokens, by vectors -------------------------------------------------------------------------------------------

// Return 16 bytes of every fourth row.
static inline __m512i load_rows(const uint8_t *const *rows, int64_t offset) {
    auto at = [&](int i) { return _mm_loadu_si128((const __m128i *)(rows[4 * i] + offset)); };
    const __m512i two = _mm512_inserti32x4(_mm512_castsi128_si512(at(0)), at(1), 1);
    return _mm512_inserti32x4(_mm512_inserti32x4(two, at(2), 2), at(3), 3);
}

// Write 16 rows' codes of 32 inputs by pairs: [16 pairs, 16 rows], two bytes each.
static inline void collect_pairs(const uint8_t *const *rows, int64_t offset, int64_t next_tile, uint8_t *to) {
    if (offset % 64 == 0)
        for (int r = 0; r < TILE_ROWS; r++) _mm_prefetch(rows[r] + offset + next_tile, _MM_HINT_T0);
    for (int half = 0; half < 2; half++, offset += 16, to += 256) {
        __m512i v[4];  // lane i: row 4 i + j
        for (int j = 0; j < 4; j++) v[j] = load_rows(rows + j, offset);
        __m512i low[2], high[2];
        for (int j = 0; j < 2; j++) {
            low[j] = _mm512_unpacklo_epi16(v[2 * j], v[2 * j + 1]);
            high[j] = _mm512_unpackhi_epi16(v[2 * j], v[2 * j + 1]);
        }
        const __m512i lanes[4] = {  // 4 rows of each pair together
            _mm512_unpacklo_epi32(low[0], low[1]), _mm512_unpackhi_epi32(low[0], low[1]),
            _mm512_unpacklo_epi32(high[0], high[1]), _mm512_unpackhi_epi32(high[0], high[1])};
        const __m512i order = _mm512_set_epi64(7, 5, 3, 1, 6, 4, 2, 0);
        for (int j = 0; j < 4; j++) _mm512_store_si512(to + 64 * j, _mm512_permutexvar_epi64(order, lanes[j]));
    }
}

static inline vec of_fp8_in_high_bytes(__m256i words) {
    const __m256i sign = _mm256_and_si256(words, _mm256_set1_epi16((short)0x8000));
    const __m256i rest = _mm256_and_si256(_mm256_srli_epi16(words, 1), _mm256_set1_epi16(0x3f80));
    return _mm512_cvtph_ps(_mm256_or_si256(sign, rest));
}

// Write sums [tokens, rows] of 16 rows, lane by lane in the order in which the units add: the even inputs of a step one
// after the other, the odd ones beside them, then both. x: float32 [tokens, k]; inputs_sums: [segments, 16].
template <int TOKENS>
static void multiply_fp8(const Weight &w, const Cuts &cuts, const uint8_t *const *rows, const float *x,
                         const float *inputs_sums, const float *scales, const float *shifts, int64_t, float *to) {
    alignas(64) uint8_t codes[512];
    vec sums[TOKENS];
    for (int t = 0; t < TOKENS; t++) sums[t] = all(0);
    for (int i = 0; i < cuts.num_segments; i++, inputs_sums += LANES) {
        const Segment segment = cuts.segments[i];
        vec part[TOKENS];
        for (int t = 0; t < TOKENS; t++) part[t] = all(0);
        for (int step = segment.step; step < segment.end; step++) {
            const int input = step * cuts.step_inputs;
            if (input % 32 == 0) collect_pairs(rows, input, TILE_ROWS * w.k, codes);
            const uint8_t *pair = codes + input % 32 * 16;
            const float *inputs = x + input;
            vec evens[TOKENS], odds[TOKENS];
            for (int t = 0; t < TOKENS; t++) evens[t] = odds[t] = all(0);
            for (int j = 0; j < cuts.step_inputs; j += 16)
                for (int p = 0; p < 16; p += 2, pair += 32, inputs += 2) {
                    const __m256i words = _mm256_load_si256((const __m256i *)pair);
                    const vec even = of_fp8_in_high_bytes(_mm256_slli_epi16(words, 8));
                    const vec odd = of_fp8_in_high_bytes(words);
                    for (int t = 0; t < TOKENS; t++) {
                        evens[t] = fma(even, all(inputs[t * w.k]), evens[t]);
                        odds[t] = fma(odd, all(inputs[t * w.k + 1]), odds[t]);
                    }
                }
            for (int t = 0; t < TOKENS; t++) part[t] = part[t] + (evens[t] + odds[t]);
        }
        for (int t = 0; t < TOKENS; t++) {
            sums[t] = fma(part[t], load(scales + segment.group * LANES), sums[t]);
            if (shifts) sums[t] = _mm512_fnmadd_ps(all(inputs_sums[t]), load(shifts + segment.group * LANES), sums[t]);
        }
    }
    for (int t = 0; t < TOKENS; t++) store(to + t * LANES, sums[t]);
}

// Write 16 bytes of codes of each of 16 rows: four of every row in a vector.
static inline void collect_words(const uint8_t *const *rows, int64_t offset, __m512i *to) {
    __m512i v[4];  // lane i: row 4 i + j
    for (int j = 0; j < 4; j++) v[j] = load_rows(rows + j, offset);
    const __m512i a = _mm512_unpacklo_epi32(v[0], v[1]), b = _mm512_unpackhi_epi32(v[0], v[1]);
    const __m512i c = _mm512_unpacklo_epi32(v[2], v[3]), d = _mm512_unpackhi_epi32(v[2], v[3]);
    to[0] = _mm512_unpacklo_epi64(a, c), to[1] = _mm512_unpackhi_epi64(a, c);
    to[2] = _mm512_unpacklo_epi64(b, d), to[3] = _mm512_unpackhi_epi64(b, d);
}

// Decode four bytes of each row, in the order of their inputs, and call `visit(input, numbers)`. A permutation decodes
// four bits by the lowest of a number; a byte becomes the last places of a float whose others are subtracted.
template <int CODE, class Visit> static inline void decode_words(__m512i words, vec meanings, Visit visit) {
    if (CODE == INT4) {
#pragma GCC unroll 8
        for (int i = 0; i < 8; i++) visit(i, _mm512_permutexvar_ps(_mm512_srli_epi32(words, 4 * i), meanings));
        return;
    }
    const __m512i low = _mm512_set1_epi32(0xff), high = _mm512_set1_epi32(0xff00);
    const __m512i of_low = _mm512_set1_epi32(0x4b000080), of_high = _mm512_set1_epi32(0x47008000);  // 2^23, 2^15, + 128
#pragma GCC unroll 2
    for (int i = 0; i < 4; i += 2, words = _mm512_srli_epi32(words, 16)) {
        visit(i, _mm512_castsi512_ps(_mm512_ternarylogic_epi32(of_low, words, low, 0x78)) - all(8388736));
        visit(i + 1, _mm512_castsi512_ps(_mm512_ternarylogic_epi32(of_high, words, high, 0x78)) - all(32896));
    }
}

// The same of integers, whose bytes are decoded without taking them apart, for TILES times 16 rows: the sums of one
// tile and token wait for each other longer than the units take. Scales and shifts of a tile begin `pitch` after those
// of the one before.
template <int CODE, int TOKENS, int TILES>
static void multiply_words(const Weight &w, const Cuts &cuts, const uint8_t *const *rows, const float *x,
                           const float *inputs_sums, const float *scales, const float *shifts, int64_t pitch,
                           float *to) {
    const int num_words = CODE == INT4 ? 4 : 8, word_inputs = 32 / num_words;
    const int64_t row_bytes = CODE == INT4 ? w.k / 2 : w.k, next_tile = TILES * TILE_ROWS * row_bytes;
    const int words_per_step = num_words * cuts.step_inputs / 32;
    const vec meanings = load(w.values) - all(w.offset);
    vec sums[TILES][TOKENS];
    for (int n = 0; n < TILES; n++)
        for (int t = 0; t < TOKENS; t++) sums[n][t] = all(0);
    __m512i codes[TILES][num_words];
    for (int i = 0; i < cuts.num_segments; i++, inputs_sums += LANES) {
        const Segment segment = cuts.segments[i];
        vec part[TILES][TOKENS];
        for (int n = 0; n < TILES; n++)
            for (int t = 0; t < TOKENS; t++) part[n][t] = all(0);
        for (int step = segment.step; step < segment.end; step++) {
            const int input = step * cuts.step_inputs;
            const int64_t offset = CODE == INT4 ? input / 2 : input;
            for (int n = 0; n < TILES; n++) {
                if (input % 32) {  // the second half of a block
                    for (int word = 0; word < num_words / 2; word++) codes[n][word] = codes[n][word + num_words / 2];
                    continue;
                }
                if (offset % 64 == 0)
                    for (int r = 0; r < TILE_ROWS; r++)
                        _mm_prefetch(rows[n * TILE_ROWS + r] + offset + next_tile, _MM_HINT_T0);
                for (int word = 0; word < num_words; word += 4)
                    collect_words(rows + n * TILE_ROWS, offset + 4 * word, codes[n] + word);
            }
            const float *inputs = x + input;
            vec evens[TILES][TOKENS], odds[TILES][TOKENS];
            for (int n = 0; n < TILES; n++)
                for (int t = 0; t < TOKENS; t++) evens[n][t] = odds[n][t] = all(0);
#pragma GCC unroll 8
            for (int word = 0; word < num_words; word++, inputs += word_inputs) {
                if (word == words_per_step) break;
#pragma GCC unroll 2
                for (int n = 0; n < TILES; n++)
                    decode_words<CODE>(codes[n][word], meanings, [&](int j, vec v) __attribute__((always_inline)) {
                        for (int t = 0; t < TOKENS; t++) {
                            vec &sum = j % 2 ? odds[n][t] : evens[n][t];
                            sum = fma(v, all(inputs[t * w.k + j]), sum);
                        }
                    });
            }
            for (int n = 0; n < TILES; n++)
                for (int t = 0; t < TOKENS; t++) part[n][t] = part[n][t] + (evens[n][t] + odds[n][t]);
        }
        for (int n = 0; n < TILES; n++) {
            const int64_t at = n * pitch + segment.group * LANES;
            for (int t = 0; t < TOKENS; t++) {
                sums[n][t] = fma(part[n][t], load(scales + at), sums[n][t]);
                if (shifts) sums[n][t] = _mm512_fnmadd_ps(all(inputs_sums[t]), load(shifts + at), sums[n][t]);
            }
        }
    }
    for (int n = 0; n < TILES; n++)
        for (int t = 0; t < TOKENS; t++) store(to + (n * TOKENS + t) * LANES, sums[n][t]);
}

typedef void (*FewTile)(const Weight &, const Cuts &, const uint8_t *const *, const float *, const float *,
                          const float *, const float *, int64_t, float *);

static FewTile few_tile(int code, int num_tokens, int num_tiles) {
    static const FewTile tiles[][FEW_PAIRS] = {
        {multiply_words<INT4, 1, 1>, multiply_words<INT4, 2, 1>, multiply_words<INT4, 3, 1>},
        {multiply_words<INT8, 1, 1>, multiply_words<INT8, 2, 1>, multiply_words<INT8, 3, 1>},
        {multiply_fp8<1>, multiply_fp8<2>, multiply_fp8<3>},
    };
    return num_tiles == 2 ? multiply_words<INT4, 1, 2> : tiles[code][num_tokens - 1];
}

static void prepare_few(Job &job, int64_t item) {
    float *const row = job.x + item * job.w->k;
    prepare(*job.w, *job.c, job.first_token + item, row, false);
    if (has_shift(*job.w)) sum_segments(*job.cuts, row, job.x + job.num_tokens * job.w->k + item);
}

static void take_pairs(Job &job, int64_t start, int64_t count) {
    const Weight &w = *job.w;
    const int num_parts = job.c->act ? 2 : 1, num_tokens = job.num_tokens;
    const int64_t row_bytes = w.code == INT4 ? w.k / 2 : w.k, scale_floats = w.num_groups * LANES;
    static thread_local Memory memory;
    const int64_t pitch = 2 * scale_floats;
    float *const scales = (float *)memory.get(4 * MOST_TILES * pitch), *const shifts = scales + scale_floats;
    if (!scales) {
        job.has_failed = true;
        return;
    }
    for (int64_t i = 0; i < count;) {
        const int num_tiles = w.code == INT4 && num_tokens == 1 && count - i > TILE_ROWS ? 2 : 1;
        const FewTile multiply = few_tile(w.code, num_tokens, num_tiles);
        const int64_t most = num_tiles * TILE_ROWS, left = count - i < most ? count - i : most;
        alignas(64) float sums[2][FEW_PAIRS * LANES];
        for (int part = 0; part < num_parts; part++) {
            const int64_t first = part * job.num_outputs + start + i, last = first + left;
            const uint8_t *rows[MOST_TILES * TILE_ROWS];
            for (int64_t r = 0; r < most; r++) rows[r] = w.codes + (r < left ? first + r : last - 1) * row_bytes;
            for (int n = 0; n < num_tiles; n++)
                read_tile_scales(w, first + n * TILE_ROWS, last, scales + n * pitch, shifts + n * pitch);
            multiply(w, *job.cuts, rows, job.x, job.x + num_tokens * w.k, scales, has_shift(w) ? shifts : nullptr,
                     pitch, sums[part]);
        }
        for (int n = 0; n < num_tiles; n++) {
            const int64_t rest = left - n * TILE_ROWS, of_tile = rest < TILE_ROWS ? rest : TILE_ROWS;
            for (int64_t t = 0; t < num_tokens; t++) {
                const int64_t at = (n * num_tokens + t) * LANES;
                finish(job, job.first_token + t, start + i + n * TILE_ROWS, of_tile, sums[0] + at, sums[1] + at);
            }
        }
        i += left;
    }
}

static void prepare_some(Job &job, int64_t item) {
    static thread_local Memory memory;
    const int64_t token = item * job.width, left = job.num_tokens - token;
    float *const row = (float *)memory.get(4 * (job.w->k + job.w->k / 2 * job.width));
    if (!row) {
        job.has_failed = true;
        return;
    }
    prepare_tile(*job.w, *job.c, *job.cuts, job.first_token + token, left < job.width ? left : job.width, job.width,
                 job.x + item * InputTile::floats(*job.w, job.width), row);
}

static void take_tiles(Job &job, int64_t start, int64_t count) {
    const Weight &w = *job.w;
    const Cuts &cuts = *job.cuts;
    const int num_parts = job.c->act ? 2 : 1, width = job.width;
    const int64_t num_tiles = (job.num_tokens + width - 1) / width, tile_floats = InputTile::floats(w, width);
    static thread_local Memory memory;
    const int64_t decoded_floats = (CHUNK_INPUTS + 64) * TILE_ROWS / 2, scale_floats = w.num_groups * LANES;
    const int64_t sums_floats = num_tiles * TILE_FLOATS, results_floats = num_tiles * width * 2 * MAX_ITEM;
    const int64_t num_floats = decoded_floats + 2 * scale_floats + 2 * AT_ONCE * TILE_FLOATS + sums_floats;
    float *weights = (float *)memory.get(4 * (num_floats + results_floats));
    if (!weights) {
        job.has_failed = true;
        return;
    }
    float *const scales = weights + decoded_floats, *const shifts = scales + scale_floats;
    float(*const parts)[AT_ONCE][TILE_FLOATS] = (float(*)[AT_ONCE][TILE_FLOATS])(shifts + scale_floats);
    float *const sums = shifts + scale_floats + 2 * AT_ONCE * TILE_FLOATS, *const results = sums + sums_floats;
    if (width < LANES) memset(parts, 0, 2 * sizeof(*parts));  // what is no token's; it would slow the units if denormal
    const auto decode = w.code == INT4 ? decode_tile<INT4> : w.code == INT8 ? decode_tile<INT8> : decode_tile<FP8>;
    const auto multiply = has_shift(w) ? multiply_tile<true> : multiply_tile<false>;
    for (int part = 0; part < num_parts; part++)
        for (int64_t i = 0; i < count; i += TILE_ROWS) {
            const int64_t row = part * job.num_outputs + start + i, last_row = part * job.num_outputs + start + count;
            memset(sums, 0, 4 * sums_floats);
            read_tile_scales(w, row, last_row, scales, shifts);
            for (int segment = 0; segment < cuts.num_segments; segment = cuts.end_of_chunk(segment)) {
                const int end = cuts.end_of_chunk(segment);
                const int64_t first_input = cuts.segments[segment].step * cuts.step_inputs / 32 * 32;
                const int64_t last_input = (cuts.segments[end - 1].end * cuts.step_inputs + 31) / 32 * 32;
                decode(w, row, last_row, first_input, last_input, (uint16_t *)weights);
                for (int64_t tile = 0; tile < num_tiles; tile++)
                    multiply(cuts, segment, end, (uint16_t *)weights, InputTile(w, job.x + tile * tile_floats, width),
                             width, scales, shifts, sums + tile * TILE_FLOATS, parts,
                             (tile + 1 < num_tiles ? 1 : -tile) * tile_floats * 4);
            }
            for (int64_t tile = 0; tile < num_tiles; tile++) {
                vec v[16];
                for (int r = 0; r < 16; r++) v[r] = load(sums + tile * TILE_FLOATS + r * LANES);
                transpose(v);
                float *const to = results + tile * width * 2 * MAX_ITEM + part * MAX_ITEM + i;
                for (int t = 0; t < width; t++) store(to + t * 2 * MAX_ITEM, v[t]);
            }
        }
    for (int64_t t = 0; t < job.num_tokens; t++) {
        const float *const result = results + t * 2 * MAX_ITEM;
        finish(job, job.first_token + t, start, count, result, result + MAX_ITEM);
    }
}
