// Products of weights of few bits: the compiled half of quantized_cpu.py, which says why it is as it is.
//
// x W^T is summed in float32, x [T, k] and W[n, k] = value(codes[n, k]) * scale[n, g] - shift[n, g]. The sums of a tile
// of ROWS rows and a few tokens stay in registers: lane j adds the inputs at places j, j + LANES, j + 2 LANES, ... one
// after the other, and `reduce` adds the lanes. The order is the same in every tile, so that a token's results do not
// depend on what stands beside it. A few tokens meet codes as they are decoded; more meet rows that were decoded once.

#include <immintrin.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

enum Type { FLOAT32, BFLOAT16, FLOAT16, UINT8 };
enum Code { INT4, INT8, FP8 };
enum Act { NONE, SILU, GELU_TANH, RELU, RELU2 };

struct Weight {
    const uint8_t *codes;                // [n, k / 2] or [n, k]
    const void *scale, *zero, *minimum;  // [n, num_groups]; the last two may be null
    const float *values;                 // what the 16 codes of INT4 stand for
    int64_t n, k, group_size, num_groups;
    int32_t code, scale_type, zero_type, has_table;
    float offset;  // subtracted from all codes
};

struct Call {
    const void *x, *norm, *bias, *residual;  // [T, k], [k], [n], [T, outputs]; all but x may be null
    void *out;
    int64_t num_tokens, x_stride, residual_stride, out_stride;
    int32_t type, norm_type, bias_type, residual_type, out_type, act, num_threads;
    float eps;
};

// Of libgomp, which torch has loaded. Its threads are used, for two teams would compete for the cores.
extern "C" void GOMP_parallel(void (*)(void *), void *, unsigned, unsigned) __attribute__((weak));

// --- vectors ---------------------------------------------------------------------------------------------------------

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512DQ__)
#define LANES 16
#define FEW_TOKENS 4   // most in a tile that decodes
#define TILE_TOKENS 6  // most in one of decoded rows, whose sums take 24 of 32 registers
typedef __m512 vec;
static inline vec load(const float *p) { return _mm512_loadu_ps(p); }
static inline void store(float *p, vec v) { _mm512_storeu_ps(p, v); }
static inline vec all(float f) { return _mm512_set1_ps(f); }
static inline vec fma(vec a, vec b, vec c) { return _mm512_fmadd_ps(a, b, c); }
static inline vec fms(vec a, vec b, vec c) { return _mm512_fmsub_ps(a, b, c); }
static inline vec larger(vec a, vec b) { return _mm512_max_ps(a, b); }
static inline vec smaller(vec a, vec b) { return _mm512_min_ps(a, b); }
static inline vec power_of_2(vec integers) { return _mm512_scalef_ps(all(1), integers); }
static inline vec nearest(vec v) { return _mm512_roundscale_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
static inline __m256 half_sums(vec v) { return _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1)); }
static inline vec of_uint8(const uint8_t *p) {
    return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)p)));
}
static inline vec of_int8(const uint8_t *p) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)p)));
}
static inline vec of_float16(const uint16_t *p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p)); }
static inline vec of_bfloat16(const uint16_t *p) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p)), 16));
}
static inline void store_float16(uint16_t *p, vec v) {
    _mm256_storeu_si256((__m256i *)p, _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
}
static inline __m512i bfloat16_bits(vec v) {
    const __m512i bits = _mm512_castps_si512(v), odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i up = _mm512_add_epi32(_mm512_add_epi32(bits, odd), _mm512_set1_epi32(0x7fff));
    return _mm512_srli_epi32(_mm512_mask_mov_epi32(up, _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q), bits), 16);
}
static inline void store_bfloat16(uint16_t *p, vec v) {
    _mm256_storeu_si256((__m256i *)p, _mm512_cvtepi32_epi16(bfloat16_bits(v)));
}
static inline vec of_fp8(const uint8_t *p) {  // the bits of a float16 that is 256 times smaller, but for their places
    const __m256i bits = _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i *)p));
    const __m256i sign = _mm256_slli_epi16(_mm256_and_si256(bits, _mm256_set1_epi16(0x80)), 8);
    const __m256i rest = _mm256_slli_epi16(_mm256_and_si256(bits, _mm256_set1_epi16(0x7f)), 7);
    return _mm512_cvtph_ps(_mm256_or_si256(sign, rest));
}
static inline void separate(float *p) {  // even from odd places of two vectors
    const __m512i even = _mm512_set_epi32(30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
    const vec a = load(p), b = load(p + LANES);
    store(p, _mm512_permutex2var_ps(a, even, b));
    store(p + LANES, _mm512_permutex2var_ps(a, _mm512_add_epi32(even, _mm512_set1_epi32(1)), b));
}
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#define LANES 8
#define FEW_TOKENS 3
#define TILE_TOKENS 3  // 12 of 16 registers
typedef __m256 vec;
static inline vec load(const float *p) { return _mm256_loadu_ps(p); }
static inline void store(float *p, vec v) { _mm256_storeu_ps(p, v); }
static inline vec all(float f) { return _mm256_set1_ps(f); }
static inline vec fma(vec a, vec b, vec c) { return _mm256_fmadd_ps(a, b, c); }
static inline vec fms(vec a, vec b, vec c) { return _mm256_fmsub_ps(a, b, c); }
static inline vec larger(vec a, vec b) { return _mm256_max_ps(a, b); }
static inline vec smaller(vec a, vec b) { return _mm256_min_ps(a, b); }
static inline vec power_of_2(vec integers) {
    return _mm256_castsi256_ps(
        _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(integers), _mm256_set1_epi32(127)), 23));
}
static inline vec nearest(vec v) { return _mm256_round_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
static inline __m256 half_sums(vec v) { return v; }
static inline vec of_uint8(const uint8_t *p) {
    return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)p)));
}
static inline vec of_int8(const uint8_t *p) {
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)p)));
}
static inline vec of_float16(const uint16_t *p) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p)); }
static inline vec of_bfloat16(const uint16_t *p) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)p)), 16));
}
static inline void store_float16(uint16_t *p, vec v) {
    _mm_storeu_si128((__m128i *)p, _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
}
static inline __m256i bfloat16_bits(vec v) {
    const __m256i bits = _mm256_castps_si256(v), odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i up = _mm256_add_epi32(_mm256_add_epi32(bits, odd), _mm256_set1_epi32(0x7fff));
    const __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    return _mm256_srli_epi32(_mm256_blendv_epi8(up, bits, is_nan), 16);
}
static inline void store_bfloat16(uint16_t *p, vec v) {
    const __m256i bits = bfloat16_bits(v);
    _mm_storeu_si128((__m128i *)p, _mm_packus_epi32(_mm256_castsi256_si128(bits), _mm256_extracti128_si256(bits, 1)));
}
static inline vec of_fp8(const uint8_t *p) {
    const __m128i bits = _mm_cvtepu8_epi16(_mm_loadl_epi64((const __m128i *)p));
    const __m128i sign = _mm_slli_epi16(_mm_and_si128(bits, _mm_set1_epi16(0x80)), 8);
    const __m128i rest = _mm_slli_epi16(_mm_and_si128(bits, _mm_set1_epi16(0x7f)), 7);
    return _mm256_cvtph_ps(_mm_or_si128(sign, rest));
}
static inline void separate(float *p) {
    const vec a = load(p), b = load(p + LANES);
    const __m256d even = _mm256_castps_pd(_mm256_shuffle_ps(a, b, 0x88));
    const __m256d odd = _mm256_castps_pd(_mm256_shuffle_ps(a, b, 0xdd));
    store(p, _mm256_castpd_ps(_mm256_permute4x64_pd(even, 0xd8)));
    store(p + LANES, _mm256_castpd_ps(_mm256_permute4x64_pd(odd, 0xd8)));
}
#else
#error "needs AVX2, FMA and F16C"
#endif

#define ROWS 4             // of a tile
#define BLOCK (2 * LANES)  // inputs decoded at a time
#define MAX_GROUPS 1024
#define STRIDE (MAX_GROUPS + 16)  // floats between scales of a tile's rows; the 16 are against conflicts in the cache
#define MAX_ITEM 64               // outputs of an item of work
#define ITEMS_PER_THREAD 4        // at least, where there are enough outputs: a thread may be held up
#define PANEL_BYTES (192 << 10)   // decoded rows of an item
#define INPUT_BYTES (512 << 10)   // of a chunk of tokens
#define MIN_CHUNK 48              // tokens for which rows are decoded once, at least
#define SMALL_WORK (1 << 16)      // multiplications that one thread does sooner than two

// --- numbers ---------------------------------------------------------------------------------------------------------

static inline vec load_typed(const void *p, int64_t i, int type) {
    switch (type) {
    case FLOAT32: return load((const float *)p + i);
    case BFLOAT16: return of_bfloat16((const uint16_t *)p + i);
    case FLOAT16: return of_float16((const uint16_t *)p + i);
    }
    return of_uint8((const uint8_t *)p + i);
}

static inline void store_typed(void *p, int64_t i, int type, vec v) {
    if (type == FLOAT32) store((float *)p + i, v);
    else if (type == BFLOAT16) store_bfloat16((uint16_t *)p + i, v);
    else store_float16((uint16_t *)p + i, v);
}

static inline int size_of(int type) { return type == FLOAT32 ? 4 : type == UINT8 ? 1 : 2; }

// Load fewer numbers than a vector has; the others are zero.
static vec load_few(const void *p, int64_t i, int type, int count) {
    float full[LANES] = {0};
    memcpy(full, (const char *)p + i * size_of(type), count * size_of(type));
    return load_typed(full, 0, type);
}

static inline vec load_up_to(const void *p, int64_t i, int type, int64_t count) {
    return count >= LANES ? load_typed(p, i, type) : load_few(p, i, type, count);
}

static inline vec rounded(vec v, int type) {
    if (type == FLOAT32) return v;
    uint16_t bits[LANES];
    store_typed(bits, 0, type, v);
    return load_typed(bits, 0, type);
}

// e^x, within 2 units of the last place where that is a normal number.
static inline vec exponential(vec x) {
    x = larger(smaller(x, all(88)), all(-87));
    const vec n = nearest(x * all(1.44269504f));
    const vec r = fma(n, all(2.12194440e-4f), fma(n, all(-0.693359375f), x));  // ln 2 in two parts
    vec sum = all(1.0f / 5040);
    const float factors[] = {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f};
    for (float factor : factors) sum = fma(sum, r, all(factor));
    return sum * power_of_2(n);
}

static inline vec activated(vec x, int act) {
    if (act == SILU) return x / (all(1) + exponential(all(0) - x));
    if (act == GELU_TANH) {
        const vec inner = x * fma(x * x, all(0.044715f), all(1));
        return x / (all(1) + exponential(all(-1.5957691216f) * inner));
    }
    const vec positive = larger(all(0), x);  // NaN stays
    return act == RELU ? positive : positive * positive;
}

// --- inputs ----------------------------------------------------------------------------------------------------------

// Whether a block's first vector holds its even inputs and its second one the odd ones, as the halves of bytes come.
static bool is_paired(const Weight &w) { return w.code == INT4 && w.group_size % BLOCK == 0; }

// Write one token's inputs, after the norm if there is one, as float32 in the order in which blocks are decoded.
static void prepare(const Weight &w, const Call &c, int64_t token, float *to) {
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
    if (is_paired(w))
        for (int64_t i = 0; i < k; i += BLOCK) separate(to + i);
}

// --- decoding --------------------------------------------------------------------------------------------------------

// A tile's rows; the last may be there several times. Scales of row r begin at r * STRIDE, its shifts ROWS * STRIDE on.
struct Rows {
    const uint8_t *codes[ROWS];
    float scales[2 * ROWS * STRIDE];
};

static void read_rows(const Weight &w, int64_t first, int64_t last, Rows &rows) {
    const int64_t count = w.num_groups, row_bytes = w.code == INT4 ? w.k / 2 : w.k;
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

// Call `visit(r, block, vectors)` for each block of each row.
template <class Source, class Visit> static inline void for_blocks(const Weight &w, const Rows &rows, Visit visit) {
    const int64_t num_blocks = w.k / BLOCK, blocks_per_group = Source::NEXT ? 1 : w.group_size / BLOCK;
    const float *scales = rows.scales, *values = w.values;
    const uint8_t *const a = rows.codes[0], *const b = rows.codes[1], *const c = rows.codes[2], *const d = rows.codes[3];
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
    if (w.code == INT8) return is_split ? kernels_of<Bytes<of_int8, 1>>() : kernels_of<Bytes<of_int8, 0>>();
    if (w.code == FP8) return is_split ? kernels_of<Bytes<of_fp8, 1>>() : kernels_of<Bytes<of_fp8, 0>>();
    const bool is_tabled = LANES == 16 ? is_split : w.has_table;
    return is_tabled ? kernels_of<Tabled>() : kernels_of<Paired>();
}

// --- products --------------------------------------------------------------------------------------------------------

// A chunk of tokens, whose prepared inputs are at x. Threads take items: tokens to prepare, or outputs.
struct Job {
    const Weight *w;
    const Call *c;
    float *x;
    int64_t first_token, num_tokens, num_outputs, item_size, num_items, next_item;
    bool prepares, has_failed;
};

struct Memory {  // of a thread; it grows and stays
    float *data;
    int64_t size;
    float *get(int64_t wanted) {
        if (wanted > size) {
            free(data);
            size = (wanted + 4095) / 4096 * 4096;
            data = (float *)aligned_alloc(64, 4 * size);
            if (!data) size = 0;
        }
        return data;
    }
};

// Write the outputs [start, start + count) of a token. sums: of those rows, and MAX_ITEM on of their partners with act.
static void finish(const Job &job, int64_t token, int64_t start, int64_t count, const float *sums) {
    const Call &c = *job.c;
    for (int64_t i = 0; i < count; i += LANES) {
        const int64_t left = count - i, output = start + i;
        vec v = load(sums + i);
        if (c.bias) v = v + load_up_to(c.bias, output, c.bias_type, left);
        if (c.act) {
            vec up = load(sums + MAX_ITEM + i);
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

static void take_outputs(Job &job, int64_t start, int64_t count) {
    const Weight &w = *job.w;
    const Kernels &kernels = choose_kernels(w);
    const int num_parts = job.c->act ? 2 : 1;
    const bool decodes = job.num_tokens > FEW_TOKENS;
    static thread_local Memory memory;
    const int64_t part_size = (count + ROWS - 1) / ROWS * ROWS * w.k;
    const int64_t rows_size = (sizeof(Rows) + 63) / 64 * 16;
    Rows *rows = (Rows *)memory.get(rows_size + (decodes ? num_parts * part_size : 0));
    if (!rows) {
        job.has_failed = true;
        return;
    }
    float *panel = (float *)rows + rows_size;
    alignas(64) float sums[TILE_TOKENS * 2 * MAX_ITEM];
    for (int part = 0; part < num_parts; part++) {
        const int64_t first = part * job.num_outputs + start;
        for (int64_t i = 0; i < count; i += ROWS) {
            read_rows(w, first + i, first + count, *rows);
            if (decodes) kernels.decode(w, *rows, panel + part * part_size + i * w.k);
            else kernels.tiles[job.num_tokens - 1](w, *rows, job.x, sums + part * MAX_ITEM + i, 2 * MAX_ITEM);
        }
    }
    const int64_t num_tiles = decodes ? (job.num_tokens + TILE_TOKENS - 1) / TILE_TOKENS : 1;
    for (int64_t tile = 0; tile < num_tiles; tile++) {
        const int64_t token = tile * job.num_tokens / num_tiles;
        const int64_t num_tokens = (tile + 1) * job.num_tokens / num_tiles - token;
        if (decodes)
            for (int part = 0; part < num_parts; part++)
                for (int64_t i = 0; i < count; i += ROWS)
                    DECODED_TILES[num_tokens - 1](w.k, panel + part * part_size + i * w.k, job.x + token * w.k,
                                                  sums + part * MAX_ITEM + i, 2 * MAX_ITEM);
        for (int64_t t = 0; t < num_tokens; t++)
            finish(job, job.first_token + token + t, start, count, sums + t * 2 * MAX_ITEM);
    }
}

static void work(void *pointer) {
    Job &job = *(Job *)pointer;
    for (;;) {
        const int64_t item = __atomic_fetch_add(&job.next_item, 1, __ATOMIC_RELAXED), start = item * job.item_size;
        if (item >= job.num_items) return;
        if (job.prepares) {
            prepare(*job.w, *job.c, job.first_token + item, job.x + item * job.w->k);
        } else {
            const int64_t left = job.num_outputs - start;
            take_outputs(job, start, left < job.item_size ? left : job.item_size);
        }
    }
}

static void run(Job &job, int64_t item_size, int64_t size, int64_t work_size) {
    job.item_size = item_size, job.num_items = (size + item_size - 1) / item_size, job.next_item = 0;
    int64_t num_threads = work_size < SMALL_WORK ? 1 : job.c->num_threads;
    if (num_threads > job.num_items) num_threads = job.num_items;
    if (num_threads > 1 && GOMP_parallel) GOMP_parallel(work, &job, num_threads, 0);
    else work(&job);
}

static int64_t between(int64_t value, int64_t least, int64_t most) {
    return value < least ? least : value > most ? most : value;
}

// Return the outputs of an item.
static int64_t choose_item_size(const Job &job) {
    int64_t size = job.num_outputs / (job.c->num_threads * ITEMS_PER_THREAD);
    if (job.num_tokens > FEW_TOKENS) {
        const int64_t most = PANEL_BYTES / (4 * job.w->k * (job.c->act ? 2 : 1));
        size = size < most ? size : most;
    }
    return between(size / LANES * LANES, LANES, MAX_ITEM);
}

extern "C" int lanes() { return LANES; }

extern "C" int max_groups() { return MAX_GROUPS; }

// Return 0, or 1 if there was no memory. k is a multiple of BLOCK, group_size too or it is LANES.
extern "C" int product(const Weight *weight, const Call *call) {
    static thread_local Memory memory;
    const int64_t k = weight->k, num_tokens = call->num_tokens;
    const int64_t chunk = between(INPUT_BYTES / (4 * k) / TILE_TOKENS * TILE_TOKENS, MIN_CHUNK, num_tokens);
    Job job = {};
    job.w = weight, job.c = call, job.x = memory.get((chunk < num_tokens ? chunk : num_tokens) * k);
    job.num_outputs = call->act ? weight->n / 2 : weight->n;
    if (!job.x) return 1;
    for (; job.first_token < num_tokens && !job.has_failed; job.first_token += chunk) {
        job.num_tokens = num_tokens - job.first_token < chunk ? num_tokens - job.first_token : chunk;
        job.prepares = true;
        run(job, 1, job.num_tokens, job.num_tokens * k);
        job.prepares = false;
        run(job, choose_item_size(job), job.num_outputs, job.num_tokens * k * weight->n);
    }
    return job.has_failed;
}
