// Vectors of float32, of AVX-512 or of AVX2, and numbers of other types as such.

#pragma once
#include <immintrin.h>
#include <stdint.h>
#include <string.h>

enum Type { FLOAT32, BFLOAT16, FLOAT16, UINT8 };
enum Act { NONE, SILU, GELU_TANH, RELU, RELU2 };

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
