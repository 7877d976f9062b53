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
    const __m512i bits = _mm512_castps_si512(v);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
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
    const __m256i bits = _mm256_castps_si256(v);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
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
static inline vec load_few(const void *p, int64_t i, int type, int count) {
#if LANES == 16
    const __mmask16 mask = (1u << count) - 1;
    if (type == FLOAT32) return _mm512_maskz_loadu_ps(mask, (const float *)p + i);
    if (type == UINT8)
        return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(mask, (const uint8_t *)p + i)));
    const __m256i bits = _mm256_maskz_loadu_epi16(mask, (const uint16_t *)p + i);
    if (type == FLOAT16) return _mm512_cvtph_ps(bits);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
#endif
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

// Write one token's inputs as float32, after the norm if there is one, and in the order in which blocks are decoded.
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
    struct Cuts *cuts;
    int width;    // tokens of a tile of the matrix units, 0: they are not used
    bool is_few;  // so few tokens that vectors do what the matrix units would
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
            finish(job, job.first_token + token + t, start, count, sums + t * 2 * MAX_ITEM,
                   sums + t * 2 * MAX_ITEM + MAX_ITEM);
    }
}

// --- matrix units ----------------------------------------------------------------------------------------------------

// AMX multiplies 16 rows of weights by up to 16 tokens, 32 inputs at a time, bfloat16 into float32. Codes are exact in
// bfloat16, and so are inputs of that type: a group's sum is as exact as above, and scaled in float32. A tile of one
// token takes the same instructions as one of 16, and has the same bits.

#if LANES == 16 && defined(__AMX_BF16__) && defined(__AVX512BF16__)
#define HAS_TILES 1
#include <sys/syscall.h>
#include <unistd.h>

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
    if (!may_use_tiles || c.type != BFLOAT16) return false;
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

// --- few tokens as the matrix units would multiply them

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

static void take_pairs(Job &job, int64_t start, int64_t count) {
    const Weight &w = *job.w;
    const int num_parts = job.c->act ? 2 : 1, num_tokens = job.num_tokens;
    const int64_t row_bytes = w.code == INT4 ? w.k / 2 : w.k, scale_floats = w.num_groups * LANES;
    static thread_local Memory memory;
    const int64_t pitch = 2 * scale_floats;
    float *const scales = memory.get(MOST_TILES * pitch), *const shifts = scales + scale_floats;
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

static void take_tiles(Job &job, int64_t start, int64_t count) {
    const Weight &w = *job.w;
    const Cuts &cuts = *job.cuts;
    const int num_parts = job.c->act ? 2 : 1, width = job.width;
    const int64_t num_tiles = (job.num_tokens + width - 1) / width, tile_floats = InputTile::floats(w, width);
    static thread_local Memory memory;
    const int64_t decoded_floats = (CHUNK_INPUTS + 64) * TILE_ROWS / 2, scale_floats = w.num_groups * LANES;
    const int64_t sums_floats = num_tiles * TILE_FLOATS, results_floats = num_tiles * width * 2 * MAX_ITEM;
    float *weights = memory.get(decoded_floats + 2 * scale_floats + 2 * AT_ONCE * TILE_FLOATS + sums_floats +
                                results_floats);
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
#else
#define HAS_TILES 0
extern "C" int enable_tiles() { return 0; }
#endif

// --- threads ---------------------------------------------------------------------------------------------------------

static int64_t between(int64_t value, int64_t least, int64_t most) {
    return value < least ? least : value > most ? most : value;
}

static void take_item(Job &job, int64_t item) {
    const int64_t start = item * job.item_size, left = job.num_outputs - start;
    const int64_t count = left < job.item_size ? left : job.item_size;
#if HAS_TILES
    if (job.is_few) {
        if (!job.prepares) return take_pairs(job, start, count);
        float *const row = job.x + item * job.w->k;
        prepare(*job.w, *job.c, job.first_token + item, row, false);
        if (has_shift(*job.w)) sum_segments(*job.cuts, row, job.x + job.num_tokens * job.w->k + item);
        return;
    }
    if (job.width) {
        if (!job.prepares) return take_tiles(job, start, count);
        static thread_local Memory memory;
        const int64_t token = item * job.width, tokens_left = between(job.num_tokens - token, 0, job.width);
        float *row = memory.get(job.w->k + job.w->k / 2 * job.width);
        if (!row) job.has_failed = true;
        else
            prepare_tile(*job.w, *job.c, *job.cuts, job.first_token + token, tokens_left, job.width,
                         job.x + item * InputTile::floats(*job.w, job.width), row);
        return;
    }
#endif
    if (job.prepares)
        prepare(*job.w, *job.c, job.first_token + item, job.x + item * job.w->k, is_paired(*job.w));
    else take_outputs(job, start, count);
}

static void take_items(Job &job) {
    for (;;) {
        const int64_t item = __atomic_fetch_add(&job.next_item, 1, __ATOMIC_RELAXED);
        if (item >= job.num_items) return;
        take_item(job, item);
    }
}

static void work(void *pointer) {
    Job &job = *(Job *)pointer;
#if HAS_TILES
    if (job.width && !job.prepares && !job.is_few) {
        const Tiles tiles(job.width, job.cuts->step_inputs);
        return take_items(job);
    }
#endif
    take_items(job);
}

static void run(Job &job, int64_t item_size, int64_t size, int64_t work_size) {
    job.item_size = item_size, job.num_items = (size + item_size - 1) / item_size, job.next_item = 0;
    int64_t num_threads = work_size < SMALL_WORK ? 1 : job.c->num_threads;
    if (num_threads > job.num_items) num_threads = job.num_items;
    if (num_threads > 1 && GOMP_parallel) GOMP_parallel(work, &job, num_threads, 0);
    else work(&job);
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

extern "C" int lanes() { return LANES; }

extern "C" int max_groups() { return MAX_GROUPS; }

// Return 0, or 1 if there was no memory. k is a multiple of BLOCK, group_size too or it is LANES.
extern "C" int product(const Weight *weight, const Call *call) {
    static thread_local Memory memory;
    const int64_t k = weight->k, num_tokens = call->num_tokens;
    int64_t chunk = between(INPUT_BYTES / (4 * k) / 48 * 48, 48, num_tokens > 48 ? num_tokens : 48);
    if (chunk > num_tokens) chunk = num_tokens;
    Job job = {};
    job.w = weight, job.c = call;
    job.num_outputs = call->act ? weight->n / 2 : weight->n;
    int64_t size = chunk * k;
#if HAS_TILES
    if (takes_tiles(*weight, *call)) {
        job.width = num_tokens < LANES ? num_tokens : LANES;
        job.is_few = num_tokens <= FEW_PAIRS;
        size = (chunk + job.width - 1) / job.width * InputTile::floats(*weight, job.width) + Cuts::floats(*weight);
        if (job.is_few) size = num_tokens * k + k / 16 * LANES + Cuts::floats(*weight);
    }
#endif
    job.x = memory.get(size);
    if (!job.x) return 1;
#if HAS_TILES
    if (job.width) {
        job.cuts = (Cuts *)job.x, job.x += Cuts::floats(*weight);
        job.cuts->set(*weight);
    }
#endif
    for (; job.first_token < num_tokens && !job.has_failed; job.first_token += chunk) {
        job.num_tokens = num_tokens - job.first_token < chunk ? num_tokens - job.first_token : chunk;
        job.prepares = true;
        const int64_t width = job.width && !job.is_few ? job.width : 1;
        run(job, 1, (job.num_tokens + width - 1) / width, job.num_tokens * k);
        job.prepares = false;
        run(job, choose_item_size(job), job.num_outputs, job.num_tokens * k * weight->n);
    }
    return job.has_failed;
}
