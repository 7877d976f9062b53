// How `quantized_few.cu` and `quantized_chain.cu` read the inputs of a single token.
//
// Codes of integers meet a single token as these: half the instructions decode plain ones of 4 bits, and half as many
// multiply; those of 8 bits need no decoding at all. Some tables have integers, too. Inputs are two digits of 8 bits, 256
// high + low, in units of a 32,512th of the largest of 128 neighbours (or of 64): what that loses is a 128th of what
// bfloat16 loses of the largest. The digits take two of the tensor cores' 8 columns; where a chunk has several groups, each
// has two columns of its own, with zeros for the others.

constexpr int WARPS = WARPS_N * WARPS_K, THREADS = 32 * WARPS;  // that multiply
constexpr int X_WIDTH = X_GROUP ? X_GROUP : 1;
constexpr int HELD = 4, NORMED = 2;  // pieces of 8 inputs that a thread of one token holds at most, with a norm
constexpr int DIGIT_GROUP = GROUP % 128 ? CHUNK : 128;  // inputs that share a unit, and weights scales
constexpr float DIGITS_MAX = 32512.0f;                  // 127 * 256
constexpr int PART = CHUNK / GROUPS;                    // inputs of a chunk and a group

// ---- instructions ----

// Codes, of 4 bits without a sign, by digits with one.
__device__ __forceinline__ void multiply(int (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
#if HAS_SIGNS
  asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#else
  asm("mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#endif
}

// The larger number, or NaN if one is.
__device__ __forceinline__ float larger(float a, float b) {
  float c;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(c) : "f"(a), "f"(b));
  return c;
}
// Returns the sum of both halves, which have a sign, and a number.
__device__ __forceinline__ int add_halves(u32 halves, int number) {
  int sum;
  asm("dp2a.lo.s32.s32 %0, %1, %2, %3;" : "=r"(sum) : "r"(halves), "r"(0x0101), "r"(number));
  return sum;
}
// Numbers that other multiprocessors may have written in the same kernel.
__device__ __forceinline__ uint4 load_fresh(const void* from) {
  uint4 v;
  asm volatile("ld.global.cg.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(from) : "memory");
  return v;
}
__device__ __forceinline__ u16 load_fresh_half(const void* from) {
  u16 v;
  asm volatile("ld.global.cg.u16 %0, [%1];" : "=h"(v) : "l"(from) : "memory");
  return v;
}
#if IS_DIRECT
// Two inputs as codes.
__device__ __forceinline__ u32 codes_of(float low, float high) {
  u16 pair;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(pair) : "f"(high), "f"(low));
  return pair;
}
#endif
// Of the warps that multiply.
__device__ __forceinline__ void sync_warps() {
  if (IS_CHAIN)
    asm volatile("bar.sync 1, %0;" ::"n"(THREADS) : "memory");
  else
    __syncthreads();
}

// ---- parts of the kernels ----

// Of all threads of the block; every one gets the result. What is in scratch may be read until the next barrier.
template <bool IS_MAX>
__device__ __forceinline__ float reduced(float value, float* scratch) {
#pragma unroll
  for (int i = 16; i; i /= 2) {
    const float other = __shfl_xor_sync(~0u, value, i);
    value = IS_MAX ? fmaxf(value, other) : value + other;
  }
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = value;
  sync_warps();
  value = scratch[0];
#pragma unroll
  for (int i = 1; i < WARPS; i++) value = IS_MAX ? fmaxf(value, scratch[i]) : value + scratch[i];
  return value;
}

__device__ __forceinline__ void load8(const void* from, bool is_float, int k, float (&values)[8]) {
  if (is_float) {
    const float4 a = ((const float4*)from)[k / 4], b = ((const float4*)from)[k / 4 + 1];
    values[0] = a.x, values[1] = a.y, values[2] = a.z, values[3] = a.w;
    values[4] = b.x, values[5] = b.y, values[6] = b.z, values[7] = b.w;
    return;
  }
  const uint4 v = load_fresh((const u16*)from + k);
  const u32 words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
  for (int i = 0; i < 4; i++) values[2 * i] = from_x((u16)words[i]), values[2 * i + 1] = from_x((u16)(words[i] >> 16));
}

// Eight inputs of the only token, normed.
__device__ __forceinline__ void load_normed(const Args& args, int k, float scale, float (&values)[8]) {
  load8(args.x, false, k, values);
  if (args.norm == nullptr) return;
  float weights[8];
  load8(args.norm, args.is_norm_float, k, weights);
#pragma unroll
  for (int i = 0; i < 8; i++) {
    values[i] *= scale;
    if (!args.is_norm_float) values[i] = from_x(to_x(values[i]));
    values[i] = from_x(to_x(values[i] * weights[i]));
  }
}

__device__ __forceinline__ float rounded(float value, float inverse) {
  const float limit = ROUND == TO_FP8 ? 448.0f : 127.0f;
  value = fminf(fmaxf(value * inverse, -limit), limit);
  if (ROUND == TO_INT8) return rintf(value);
#if __CUDA_ARCH__ >= 890
  u16 code;
  u32 pair;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(code) : "f"(0.0f), "f"(value));
  asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(pair) : "h"(code));
  return from_half((u16)pair);
#else
  // Steps of a number of 3 bits behind the first: 2^-3 of its power of two, 2^-9 at least.
  const float step = fmaxf(__uint_as_float((__float_as_uint(value) & 0x7f800000u)) * 0.125f, 0.001953125f);
  return rintf(value / step) * step;
#endif
}

// Put eight inputs from k on where the threads look for them: thread t has those of columns 2 t and 2 t + 1 of each 8.
__device__ __forceinline__ void put(u16* to, int k, const u32 (&words)[4]) {
  if (!IS_TILED) {
    *(uint4*)(to + k) = make_uint4(words[0], words[1], words[2], words[3]);
    return;
  }
#pragma unroll
  for (int t = 0; t < 4; t++) *(u32*)(to + k / CHUNK * CHUNK + 16 * t + k % CHUNK / 4) = words[t];
}

// What a thread's column of a product takes of a chunk: its digit of the inputs of its group.
__device__ __forceinline__ void read_digits(const u16* x, int chunk, u32 (&digits)[4]) {
  const int column = threadIdx.x % 32 / 4;
  const uint4 v = *(const uint4*)((const u32*)x + chunk * 32 + column % 2 * 16 + threadIdx.x % 4 * 4);
  const u32 all[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
  for (int j = 0; j < 4; j++) digits[j] = all[j] & (j * GROUPS / 4 == column / 2 % GROUPS ? ~0u : 0u);
}

// The integers of a step that 4-bit codes stand for, of rows r and r + 8.
__device__ __forceinline__ void look_up_integers(u32 word, u32& first, u32& second) {
  const u32 table[4] = {TABLE_INTEGERS}, shifted = word << 4, index = word & 0x77777777u;
  u32 pairs[2];
#pragma unroll
  for (int i = 0; i < 2; i++) {
    const u32 selector = i ? index >> 16 : index, mask = bytes_of(shifted, word, i ? 0xFBEAu : 0xD9C8u);
    pairs[i] = select(bytes_of(table[0], table[1], selector), bytes_of(table[2], table[3], selector), mask);
  }
  first = bytes_of(pairs[0], pairs[1], 0x5410u), second = bytes_of(pairs[0], pairs[1], 0x7632u);
}

// Multiply a tile's codes of a chunk by digits.
__device__ __forceinline__ void multiply_digits(int (&d)[4], const u32 (&words)[4 * CODE_LOADS], const u32 (&digits)[4]) {
#pragma unroll
  for (int j = 0; j < 4; j += 2) {
    u32 a[4];
#pragma unroll
    for (int i = 0; i < 2; i++) {
      if (HAS_TABLE) {
        look_up_integers(words[j + i], a[2 * i], a[2 * i + 1]);
        continue;
      }
      a[2 * i] = CODE == INT4 ? words[j + i] & 0x0f0f0f0fu : words[j + i];
      a[2 * i + 1] = CODE == INT4 ? words[j + i] >> 4 & 0x0f0f0f0fu : words[4 * (CODE_LOADS - 1) + j + i];
    }
    multiply(d, a, digits[j], digits[j + 1]);
  }
}

// Return what digits' sums, of the high ones and of the low ones, stand for with a group's scale and offset.
__device__ __forceinline__ float scaled_digits(int high, int low, const PARAM* p, float sum_of_x) {
  const float sum = (float)(256 * high + low);
  if (GROUP == 0) return sum - MIDDLE * sum_of_x;
  const float scale = param(p), offset = OFFSET == NO_OFFSET ? MIDDLE : param(p + 2);
  return OFFSET == MINIMUM ? sum * scale - offset * sum_of_x : (sum - offset * sum_of_x) * scale;
}

// Add up what the threads of a row have of a chunk's groups.
__device__ __forceinline__ float of_groups(float sum) {
#pragma unroll
  for (int i = GROUPS / 2; i; i /= 2) sum += __shfl_xor_sync(~0u, sum, i);
  return sum;
}

#if IS_DIRECT
// Put eight inputs from k on as codes, 16 of a chunk next to those of the other chunk of a pair.
__device__ __forceinline__ void put_codes(u16* to, int k, const float (&values)[8], float inverse) {
  u32 words[2] = {};
#pragma unroll
  for (int i = 0; i < 8; i += 2) {
    const float low = values[i], high = values[i + 1];
    const u32 pair = ROUND == TO_FP8 ? codes_of(low * inverse, high * inverse)
                                     : ((int)rounded(low, inverse) & 255) | ((int)rounded(high, inverse) & 255) << 8;
    words[i / 4] |= pair << 8 * (i % 4);
  }
  *(uint2*)((unsigned char*)to + k / 256 * 256 + k % 128 / 16 * 32 + k / 128 % 2 * 16 + k % 16) = make_uint2(words[0], words[1]);
}
#endif

// Put eight inputs from k on as digits: of each chunk, digit and thread t of four the words of 4 steps, whose bytes are
// columns 2 t, 2 t + 8, 2 t + 1 and 2 t + 9 of 16, as in plain codes of 4 bits, or 2 t, 2 t + 1, 2 t + 8 and 2 t + 9. parts: the
// sum of each part's inputs in units, and the unit. A warp calls this with all of its threads, 256 inputs that follow each
// other.
__device__ __forceinline__ void put_digits(u16* to, float2* parts, int k, int first, bool is_in, const float (&values)[8]) {
  float largest = 0.0f;
#pragma unroll
  for (int i = 0; i < 8; i++) largest = larger(largest, fabsf(values[i]));
#pragma unroll
  for (int i = DIGIT_GROUP / 16; i; i /= 2) largest = larger(largest, __shfl_xor_sync(~0u, largest, i));
  largest = larger(largest, 1e-30f);
  const float inverse = DIGITS_MAX / largest;
  const bool is_second = k / 8 % 2;  // half of a step's 16 columns
  u32 pairs[4];
  int sum = -8 * 128;
#pragma unroll
  for (int i = 0; i < 8; i += 2) {
    // The nearest integer and 128 are in the last 16 bits: the high digit, and the low one and 128.
    const u32 low = __float_as_uint(values[i] * inverse + 12583040.0f);
    pairs[i / 2] = bytes_of(low, __float_as_uint(values[i + 1] * inverse + 12583040.0f), 0x5410u);
    sum = add_halves(pairs[i / 2], sum);
  }
#pragma unroll
  for (int i = PART / 16; i; i /= 2) sum += __shfl_xor_sync(~0u, sum, i);
  constexpr u32 HIGH = HAS_SIGNS ? 0x7531u : 0x7351u, LOW = HAS_SIGNS ? 0x6420u : 0x6240u;
  const int at = k - first;
  u32* words = (u32*)to + at / CHUNK * 32 + is_second * 8 + at % CHUNK / 16;
#pragma unroll
  for (int i = 0; i < 2; i++) {  // two words of each digit, the other half's bytes among them
    const u32 own = is_second ? pairs[2 + i] : pairs[i];
    const u32 other = __shfl_xor_sync(~0u, is_second ? pairs[i] : pairs[2 + i], 1);
    const u32 even = is_second ? other : own, odd = is_second ? own : other;
    if (is_in) words[4 * i] = bytes_of(even, odd, HIGH), words[16 + 4 * i] = bytes_of(even, odd, LOW) ^ 0x80808080u;
  }
  if (is_in && k % PART == 0) parts[k / PART] = make_float2((float)sum, largest / DIGITS_MAX * TABLE_UNIT);
}

// Put columns [first, first + num) of the only token into `to`, and its scales of all columns into `scales`.
__device__ __forceinline__ void stage_one(const Args& args, int first, int num, u16* to, float* scales, float* scratch) {
  float values[8], scale = 1.0f;
  if (args.norm != nullptr) {
    float squares = 0.0f;
    for (int k = 8 * threadIdx.x; k < args.k; k += 8 * THREADS) {
      load8(args.x, false, k, values);
#pragma unroll
      for (int i = 0; i < 8; i++) squares += values[i] * values[i];
    }
    scale = rsqrtf(reduced<false>(squares, scratch) / args.k + args.eps);
  }
  float x_scale = 1.0f;
  if (ROUND != NO_ROUND && X_GROUP == 0) {
    if (args.x_scale != nullptr) {
      x_scale = args.x_scale[0];
    } else {
      float largest = 0.0f;
      for (int k = 8 * threadIdx.x; k < args.k; k += 8 * THREADS) {
        load_normed(args, k, scale, values);
#pragma unroll
        for (int i = 0; i < 8; i++) largest = fmaxf(largest, fabsf(values[i]));
      }
      x_scale = fmaxf(reduced<true>(largest, scratch + WARPS), 1e-10f) / (ROUND == TO_FP8 ? 448.0f : 127.0f);
    }
    if (threadIdx.x == 0) scales[0] = x_scale;
  }
  if (HAS_DIGITS) {
    const int begin = first / DIGIT_GROUP * DIGIT_GROUP;
    for (int k = begin + 8 * threadIdx.x; k < begin + (first + num - begin + 255) / 256 * 256; k += 8 * THREADS) {
      const bool is_there = k < args.k;
      load_normed(args, is_there ? k : 0, scale, values);
#pragma unroll
      for (int i = 0; i < 8; i++) values[i] = is_there ? values[i] : 0.0f;
      put_digits(to, (float2*)scales, k, first, k >= first && k < first + num, values);
    }
    return;
  }
  for (int k = 8 * threadIdx.x; k < (num + 8 * 31) / 256 * 256; k += 8 * THREADS) {  // whole warps
    const bool is_in = k < num;
    load_normed(args, first + (is_in ? k : 0), scale, values);
    if (ROUND != NO_ROUND && X_GROUP != 0) {
      float largest = 0.0f;
#pragma unroll
      for (int i = 0; i < 8; i++) largest = fmaxf(largest, fabsf(values[i]));
#pragma unroll
      for (int i = X_GROUP / 16; i; i /= 2) largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, i));
      x_scale = fmaxf(largest, 1e-10f) / (ROUND == TO_FP8 ? 448.0f : 127.0f);
      if (is_in) scales[(first + k) / X_WIDTH] = x_scale;
    }
    if (!is_in) continue;
    const float inverse = __fdiv_rn(1.0f, x_scale);
#if IS_DIRECT
    put_codes(to, k, values, inverse);
    continue;
#endif
    u32 words[4];
#pragma unroll
    for (int i = 0; i < 8; i++) {
      if (ROUND != NO_ROUND) values[i] = rounded(values[i], inverse);
      const u32 bits = IS_HALF ? to_half(values[i]) : to_bf16(values[i]);
      words[i / 2] = i % 2 ? words[i / 2] | bits << 16 : bits;
    }
    put(to, k, words);
  }
}

__device__ __forceinline__ u32 pair_of_x(float low, float high) { return to_x(low) | (u32)to_x(high) << 16; }

// Whether the norm's factor, which is the same for all inputs, is multiplied with at the end: digits have units anyway.
__device__ __forceinline__ bool is_normed_last(const Args& args) { return HAS_DIGITS && args.norm != nullptr; }

// The same where each thread can hold its inputs: they are read once, and the norm's weights before they are there.
// If the norm comes last, the sums of squares of each warp are left in scratch from WARPS on.
template <typename Wait>
__device__ __forceinline__ void hold_one(
    const Args& args, int first, int num, u16* to, float* scales, float* scratch, const Wait& wait) {
  uint4 weights[NORMED], held[HELD];
#pragma unroll
  for (int i = 0; i < NORMED; i++) {
    const int k = 8 * (threadIdx.x + i * THREADS);
    if (args.norm != nullptr && k < args.k) weights[i] = *(const uint4*)((const u16*)args.norm + k);
  }
  wait();
#pragma unroll
  for (int i = 0; i < HELD; i++) {
    const int k = 8 * (threadIdx.x + i * THREADS);
    held[i] = k < args.k ? load_fresh((const u16*)args.x + k) : make_uint4(0, 0, 0, 0);
  }
  const bool is_last = is_normed_last(args);
  if (args.norm != nullptr) {
    float squares = 0.0f;
#pragma unroll
    for (int i = 0; i < NORMED; i++) {
      const u32 words[4] = {held[i].x, held[i].y, held[i].z, held[i].w};
#pragma unroll
      for (int j = 0; j < 4; j++) {
        const float low = from_x((u16)words[j]), high = from_x((u16)(words[j] >> 16));
        squares += low * low + high * high;
      }
    }
    if (is_last) {
#pragma unroll
      for (int i = 16; i; i /= 2) squares += __shfl_xor_sync(~0u, squares, i);
      if (threadIdx.x % 32 == 0) scratch[WARPS + threadIdx.x / 32] = squares;
    } else {
      const float scale = rsqrtf(reduced<false>(squares, scratch) / args.k + args.eps);
      auto normed = [&](u32 x, u32 weight) {
        const float low = from_x(to_x(from_x((u16)x) * scale)), high = from_x(to_x(from_x((u16)(x >> 16)) * scale));
        return pair_of_x(low * from_x((u16)weight), high * from_x((u16)(weight >> 16)));
      };
#pragma unroll
      for (int i = 0; i < NORMED; i++) {
        if (8 * (threadIdx.x + i * THREADS) >= args.k) continue;
        held[i] = make_uint4(normed(held[i].x, weights[i].x), normed(held[i].y, weights[i].y),
                             normed(held[i].z, weights[i].z), normed(held[i].w, weights[i].w));
      }
    }
  }
  auto take = [&](int i, float (&values)[8]) {
    const u32 words[4] = {held[i].x, held[i].y, held[i].z, held[i].w};
#pragma unroll
    for (int j = 0; j < 8; j++) values[j] = from_x((u16)(words[j / 2] >> 16 * (j % 2)));
    if (!is_last || i >= NORMED) return;
    const uint4 v = weights[i < NORMED ? i : 0];
    const u32 factors[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int j = 0; j < 8; j++) values[j] *= from_x((u16)(factors[j / 2] >> 16 * (j % 2)));
  };
  float x_scale = 1.0f, values[8];
  if (ROUND != NO_ROUND) {
    if (args.x_scale != nullptr) {
      x_scale = args.x_scale[0];
    } else {
      float largest = 0.0f;
#pragma unroll
      for (int i = 0; i < HELD; i++) {
        if (8 * (threadIdx.x + i * THREADS) >= args.k) continue;
        take(i, values);
#pragma unroll
        for (int j = 0; j < 8; j++) largest = fmaxf(largest, fabsf(values[j]));
      }
      x_scale = fmaxf(reduced<true>(largest, scratch + WARPS), 1e-10f) / (ROUND == TO_FP8 ? 448.0f : 127.0f);
    }
    if (threadIdx.x == 0) scales[0] = x_scale;
  }
  const float inverse = __fdiv_rn(1.0f, x_scale);
#pragma unroll
  for (int i = 0; i < HELD; i++) {
    const int k = 8 * (threadIdx.x + i * THREADS);
    const bool is_in = k >= first && k < first + num;
    if (HAS_DIGITS) {
      if (k - 8 * (int)(threadIdx.x % 32) >= args.k) continue;  // of the whole warp
      take(i, values);
#pragma unroll
      for (int j = 0; j < 8; j++) values[j] = k < args.k ? values[j] : 0.0f;
      put_digits(to, (float2*)scales, k, first, is_in, values);
      continue;
    }
    if (!is_in) continue;
#if IS_DIRECT
    take(i, values);
    put_codes(to, k - first, values, inverse);
    continue;
#endif
    u32 words[4] = {held[i].x, held[i].y, held[i].z, held[i].w};
    if (ROUND != NO_ROUND || IS_HALF != IS_X_HALF) {
      take(i, values);
#pragma unroll
      for (int j = 0; j < 4; j++) {
        float low = values[2 * j], high = values[2 * j + 1];
        if (ROUND != NO_ROUND) low = rounded(low, inverse), high = rounded(high, inverse);
        words[j] = IS_HALF ? to_half(low) | (u32)to_half(high) << 16 : to_bf16(low) | (u32)to_bf16(high) << 16;
      }
    }
    put(to, k - first, words);
  }
}

