// Products by vectors alone, for any inputs.
//
// The sums of a tile of ROWS rows and a few tokens stay in registers: lane j adds the inputs at places j, j + LANES,
// j + 2 LANES, ... one after the other, and `reduce` adds the lanes. The order is the same in every tile, so that a
// token's results do not depend on what stands beside it. A few tokens meet codes as they are decoded; more meet rows
// that were decoded once.

#pragma once
#include "quantized_cpu.h"

#define ROWS 4                    // of a tile
#define STRIDE (MAX_GROUPS + 16)  // floats between scales of a tile's rows; the 16 are against conflicts in the cache
#define PANEL_BYTES (192 << 10)   // decoded rows of an item
#define NEAR_TOKENS 18            // whose inputs the first cache holds beside a tile's decoded rows, of small models

// Whether a block's first vector holds its even inputs and its second one the odd ones, as the halves of bytes come.
static bool is_paired(const Weight &w) { return w.code == INT4 && w.group_size % BLOCK == 0; }

static void prepare_row(Job &job, int64_t item) {
    prepare(*job.w, *job.c, job.first_token + item, job.x + item * job.w->k, is_paired(*job.w));
}

// --- decoding --------------------------------------------------------------------------------------------------------

// A tile's rows; the last may be there several times. Scales of row r begin at r * STRIDE, its shifts ROWS * STRIDE on.
struct Rows {
    const uint8_t *codes[ROWS];
    float scales[2 * ROWS * STRIDE];
};

static void read_rows(const Weight &w, int64_t first, int64_t last, Rows &rows) {
    const int64_t count = w.num_groups, row_bytes = w.row_bytes();
    for (int r = 0; r < ROWS; r++) {
        const int64_t row = first + r < last ? first + r : last - 1, start = row * count;
        rows.codes[r] = w.codes + row * row_bytes;
        if (row + ROWS < w.n)  // the next tile's
            for (int64_t i = 0; i < row_bytes; i += 64) _mm_prefetch(rows.codes[r] + ROWS * row_bytes + i, _MM_HINT_T0);
        float *scales = rows.scales + r * STRIDE, *shifts = scales + ROWS * STRIDE;
        for (int64_t i = 0; i < count; i += LANES) {
            const int64_t g = i + LANES <= count || count < LANES ? i : count - LANES, left = count - g;
            const vec scale = load_up_to(w.scale, start + g, w.scale_type, left);
            vec shift = all(w.offset) * scale;
            if (w.minimum) shift = shift + load_up_to(w.minimum, start + g, w.scale_type, left);
            if (w.zero) shift = fma(load_up_to(w.zero, start + g, w.zero_type, left), scale, shift);
            store(scales + g, w.code == FP8 ? scale * all(256) : scale);
            store(shifts + g, shift);
        }
    }
}

// The two vectors of a block, whose groups' scales and shifts of row 0 are at `scales`; the second one's are NEXT on.
struct Paired {
    static const int NEXT = 0;
#if LANES == 16
    static inline void decode(const uint8_t *codes, const float *scales, const float *values, vec *block) {
        const vec meaning = fms(load(values), all(scales[0]), all(scales[ROWS * STRIDE]));
        const __m512i pairs = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)codes));
        block[0] = _mm512_permutexvar_ps(pairs, meaning);  // by the lowest four bits
        block[1] = _mm512_permutexvar_ps(_mm512_srli_epi32(pairs, 4), meaning);
    }
#else
    static inline void decode(const uint8_t *codes, const float *scales, const float *values, vec *block) {
        const vec scale = all(scales[0]), shift = all(scales[ROWS * STRIDE]);
        const __m256i pairs = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)codes));
        block[0] = fms(_mm256_cvtepi32_ps(_mm256_and_si256(pairs, _mm256_set1_epi32(15))), scale, shift);
        block[1] = fms(_mm256_cvtepi32_ps(_mm256_srli_epi32(pairs, 4)), scale, shift);
    }
#endif
    static inline const uint8_t *at(const uint8_t *codes, int64_t block) { return codes + block * LANES; }
};

struct Tabled : Paired {
#if LANES == 16  // groups of 16: one vector each, in the order of the inputs
    static const int NEXT = 1;
    static inline void decode(const uint8_t *codes, const float *scales, const float *values, vec *block) {
        const vec table = load(values);
        const __m128i even = _mm_loadu_si128((const __m128i *)codes), odd = _mm_srli_epi16(even, 4);
        const __m512i first = _mm512_cvtepu8_epi32(_mm_unpacklo_epi8(even, odd));
        const __m512i second = _mm512_cvtepu8_epi32(_mm_unpackhi_epi8(even, odd));
        block[0] = fms(_mm512_permutexvar_ps(first, table), all(scales[0]), all(scales[ROWS * STRIDE]));
        block[1] = fms(_mm512_permutexvar_ps(second, table), all(scales[NEXT]), all(scales[ROWS * STRIDE + NEXT]));
    }
#else  // a table of 16 is two of 8
    static inline vec look_up(__m256i codes, const float *values) {
        const vec low = _mm256_permutevar8x32_ps(load(values), codes);
        const vec high = _mm256_permutevar8x32_ps(load(values + 8), codes);
        return _mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32(codes, 28)));
    }
    static inline void decode(const uint8_t *codes, const float *scales, const float *values, vec *block) {
        const vec scale = all(scales[0]), shift = all(scales[ROWS * STRIDE]);
        const __m256i pairs = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)codes));
        block[0] = fms(look_up(pairs, values), scale, shift);
        block[1] = fms(look_up(_mm256_srli_epi32(pairs, 4), values), scale, shift);
    }
#endif
};

template <vec (*OF)(const uint8_t *), int NEXT_GROUP> struct Bytes {
    static const int NEXT = NEXT_GROUP;
    static inline void decode(const uint8_t *codes, const float *scales, const float *, vec *block) {
        block[0] = fms(OF(codes), all(scales[0]), all(scales[ROWS * STRIDE]));
        block[1] = fms(OF(codes + LANES), all(scales[NEXT]), all(scales[ROWS * STRIDE + NEXT]));
    }
    static inline const uint8_t *at(const uint8_t *codes, int64_t block) { return codes + block * BLOCK; }
};

template <vec (*OF)(const uint16_t *)> struct Numbers {
    static const int NEXT = 0;
    static inline void decode(const uint8_t *numbers, const float *, const float *, vec *block) {
        block[0] = OF((const uint16_t *)numbers), block[1] = OF((const uint16_t *)numbers + LANES);
    }
    static inline const uint8_t *at(const uint8_t *numbers, int64_t block) { return numbers + 2 * block * BLOCK; }
};

// Call `visit(r, block, vectors)` for each block of each row.
template <class Source, class Visit> static inline void for_blocks(const Weight &w, const Rows &rows, Visit visit) {
    const int64_t num_blocks = w.k / BLOCK, blocks_per_group = Source::NEXT ? 1 : w.group_size / BLOCK;
    const float *scales = rows.scales, *values = w.values;
    const uint8_t *const a = rows.codes[0], *const b = rows.codes[1];
    const uint8_t *const c = rows.codes[2], *const d = rows.codes[3];
    for (int64_t block = 0; block < num_blocks; scales += 1 + Source::NEXT) {
        const int64_t end = block + blocks_per_group < num_blocks ? block + blocks_per_group : num_blocks;
        for (; block < end; block++) {
            vec v[2];
            Source::decode(Source::at(a, block), scales, values, v), visit(0, block, v);
            Source::decode(Source::at(b, block), scales + STRIDE, values, v), visit(1, block, v);
            Source::decode(Source::at(c, block), scales + 2 * STRIDE, values, v), visit(2, block, v);
            Source::decode(Source::at(d, block), scales + 3 * STRIDE, values, v), visit(3, block, v);
        }
    }
}

// --- tiles -----------------------------------------------------------------------------------------------------------

// Write the sums over the lanes of each row.
static inline void reduce(const vec *rows, float *to) {
    __m128 sums[ROWS];
    for (int r = 0; r < ROWS; r++) {
        const __m256 half = half_sums(rows[r]);
        sums[r] = _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
    }
    _mm_storeu_ps(to, _mm_hadd_ps(_mm_hadd_ps(sums[0], sums[1]), _mm_hadd_ps(sums[2], sums[3])));
}

// Write a tile's sums, ROWS for each token, `stride` apart.
template <class Source, int TOKENS>
static void multiply_codes(const Weight &w, const Rows &rows, const float *x, float *to, int64_t stride) {
    vec sums[TOKENS][ROWS];
    for (int t = 0; t < TOKENS; t++)
        for (int r = 0; r < ROWS; r++) sums[t][r] = all(0);
    const int64_t k = w.k;
    for_blocks<Source>(w, rows, [&](int r, int64_t block, const vec *v) __attribute__((always_inline)) {
        for (int t = 0; t < TOKENS; t++) {
            sums[t][r] = fma(v[0], load(x + t * k + block * BLOCK), sums[t][r]);
            sums[t][r] = fma(v[1], load(x + t * k + block * BLOCK + LANES), sums[t][r]);
        }
    });
    for (int t = 0; t < TOKENS; t++) reduce(sums[t], to + t * stride);
}

template <int TOKENS>
static void multiply_decoded(int64_t k, const float *rows, const float *x, float *to, int64_t stride) {
    vec sums[TOKENS][ROWS];
    for (int t = 0; t < TOKENS; t++)
        for (int r = 0; r < ROWS; r++) sums[t][r] = all(0);
    for (int64_t i = 0; i < k; i += LANES) {
        vec row[ROWS];
        for (int r = 0; r < ROWS; r++) row[r] = load(rows + r * k + i);
        for (int t = 0; t < TOKENS; t++) {
            const vec input = load(x + t * k + i);
            for (int r = 0; r < ROWS; r++) sums[t][r] = fma(row[r], input, sums[t][r]);
        }
    }
    for (int t = 0; t < TOKENS; t++) reduce(sums[t], to + t * stride);
}

typedef void (*CodesTile)(const Weight &, const Rows &, const float *, float *, int64_t);
typedef void (*DecodedTile)(int64_t, const float *, const float *, float *, int64_t);

static const DecodedTile DECODED_TILES[] = {
    multiply_decoded<1>, multiply_decoded<2>, multiply_decoded<3>,
#if TILE_TOKENS > 3
    multiply_decoded<4>, multiply_decoded<5>, multiply_decoded<6>,
#endif
};

template <class Source> static void decode_rows(const Weight &w, const Rows &rows, float *to) {
    for_blocks<Source>(w, rows, [&](int r, int64_t block, const vec *v) __attribute__((always_inline)) {
        store(to + r * w.k + block * BLOCK, v[0]);
        store(to + r * w.k + block * BLOCK + LANES, v[1]);
    });
}

// A format's functions: tiles of 1, 2, ... tokens, and the decoder.
struct Kernels {
    CodesTile tiles[FEW_TOKENS];
    void (*decode)(const Weight &, const Rows &, float *);
};

template <class Source> static const Kernels &kernels_of() {
    static const Kernels kernels = {
        {multiply_codes<Source, 1>, multiply_codes<Source, 2>, multiply_codes<Source, 3>,
#if FEW_TOKENS > 3
         multiply_codes<Source, 4>,
#endif
        },
        decode_rows<Source>};
    return kernels;
}

static const Kernels &choose_kernels(const Weight &w) {
    const bool is_split = w.group_size % BLOCK != 0;
    if (w.code == NUMBERS)
        return w.scale_type == BFLOAT16 ? kernels_of<Numbers<of_bfloat16>>() : kernels_of<Numbers<of_float16>>();
    if (w.code == INT8) return is_split ? kernels_of<Bytes<of_int8, 1>>() : kernels_of<Bytes<of_int8, 0>>();
    if (w.code == FP8) return is_split ? kernels_of<Bytes<of_fp8, 1>>() : kernels_of<Bytes<of_fp8, 0>>();
    const bool is_tabled = LANES == 16 ? is_split : w.has_table;
    return is_tabled ? kernels_of<Tabled>() : kernels_of<Paired>();
}

// Multiply up to NEAR_TOKENS tokens by rows while these are near: as their codes are decoded, or right after that.
static void take_near(Job &job, int64_t start, int64_t count, Rows &rows, float *decoded) {
    const Weight &w = *job.w;
    const Kernels &kernels = choose_kernels(w);
    const int64_t num_parts = job.c->act ? 2 : 1, pitch = 2 * MAX_ITEM, num_tokens = job.num_tokens;
    const int64_t num_tiles = (num_tokens + TILE_TOKENS - 1) / TILE_TOKENS;
    alignas(64) float sums[NEAR_TOKENS * 2 * MAX_ITEM];
    for (int64_t part = 0; part < num_parts; part++)
        for (int64_t i = 0; i < count; i += ROWS) {
            const int64_t first = part * job.num_outputs + start;
            float *const to = sums + part * MAX_ITEM + i;
            read_rows(w, first + i, first + count, rows);
            if (num_tokens <= FEW_TOKENS) {
                kernels.tiles[num_tokens - 1](w, rows, job.x, to, pitch);
                continue;
            }
            kernels.decode(w, rows, decoded);
            for (int64_t tile = 0; tile < num_tiles; tile++) {
                const int64_t token = tile * num_tokens / num_tiles, end = (tile + 1) * num_tokens / num_tiles;
                DECODED_TILES[end - token - 1](w.k, decoded, job.x + token * w.k, to + token * pitch, pitch);
            }
        }
    for (int64_t t = 0; t < num_tokens; t++)
        finish(job, job.first_token + t, start, count, sums + t * pitch, sums + t * pitch + MAX_ITEM);
}

static void take_outputs(Job &job, int64_t start, int64_t count) {
    const Weight &w = *job.w;
    const Kernels &kernels = choose_kernels(w);
    const int num_parts = job.c->act ? 2 : 1;
    const bool is_near = job.num_tokens <= NEAR_TOKENS;
    static thread_local Memory memory;
    const int64_t part_size = (count + ROWS - 1) / ROWS * ROWS * w.k;
    const int64_t rows_size = (sizeof(Rows) + 63) / 64 * 16;
    Rows *rows = (Rows *)memory.get(4 * (rows_size + (is_near ? ROWS * w.k : num_parts * part_size)));
    if (!rows) {
        job.has_failed = true;
        return;
    }
    float *panel = (float *)rows + rows_size;
    if (is_near) return take_near(job, start, count, *rows, panel);
    for (int part = 0; part < num_parts; part++) {
        const int64_t first = part * job.num_outputs + start;
        for (int64_t i = 0; i < count; i += ROWS) {
            read_rows(w, first + i, first + count, *rows);
            kernels.decode(w, *rows, panel + part * part_size + i * w.k);
        }
    }
    alignas(64) float sums[TILE_TOKENS * 2 * MAX_ITEM];
    const int64_t num_tiles = (job.num_tokens + TILE_TOKENS - 1) / TILE_TOKENS;
    for (int64_t tile = 0; tile < num_tiles; tile++) {
        const int64_t token = tile * job.num_tokens / num_tiles;
        const int64_t num_tokens = (tile + 1) * job.num_tokens / num_tiles - token;
        for (int part = 0; part < num_parts; part++)
            for (int64_t i = 0; i < count; i += ROWS)
                DECODED_TILES[num_tokens - 1](w.k, panel + part * part_size + i * w.k, job.x + token * w.k,
                                              sums + part * MAX_ITEM + i, 2 * MAX_ITEM);
        for (int64_t t = 0; t < num_tokens; t++)
            finish(job, job.first_token + token + t, start, count, sums + t * 2 * MAX_ITEM,
                   sums + t * 2 * MAX_ITEM + MAX_ITEM);
    }
}
