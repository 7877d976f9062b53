// What the kernels of `quantized_*.cu` have in common; it is put in front of them.

typedef unsigned int u32;
typedef unsigned short u16;
typedef unsigned long long u64;

struct Args {
  const void* codes;
  const void* params;    // of groups: [N / 16][G][8][scale, scale of the row 8 on (, offset, offset)]
  const float* scale;    // [N], if GROUP is 0
  const void* x;         // [T, K], of the products' type if they are rounded already
  const void* norm;      // [K]
  const float* x_scale;  // [T] or [T, K / X_GROUP]; of one token the known scale, or null
  const void* bias;
  const void* residual;
  void* out;
  u64* arrivals;  // of blocks at a chain's products
  int num_tokens, n, k, num_groups, x_stride, split, act, is_gated, is_out_float, is_norm_float, is_bias_float;
  int first;  // the multiprocessor that has a product's first rows, of a chain
  int kind;   // of a chain's
  float eps;
};

constexpr int CHUNK = 64;  // columns of a stage
constexpr int CODE_LOADS = CODE == INT4 ? 1 : 2;  // of 16 bytes, of a thread, tile and stage
constexpr int GROUPS = GROUP == 0 || GROUP >= CHUNK ? 1 : CHUNK / GROUP;  // of a stage
constexpr int GROUP_CHUNKS = GROUP > CHUNK ? GROUP / CHUNK : 1;
constexpr int PARAM_BYTES = GROUP == 0 ? 0 : (OFFSET == NO_OFFSET ? 2 : 4) * sizeof(PARAM);
constexpr bool IS_PLAIN = CODE == INT4 && !HAS_TABLE;        // a code is its number, but for an offset
constexpr int RAW = IS_HALF ? 1024 : 128;                     // what plain codes have more where decoding is cheapest
constexpr int MIDDLE = IS_PLAIN && OFFSET == NO_OFFSET ? 8 : 0;  // what their numbers have less

// ---- shared instructions ----

__device__ __forceinline__ u32 shared_address(const void* pointer) { return (u32)__cvta_generic_to_shared(pointer); }
__device__ __forceinline__ u32 both(u32 half) { return half | half << 16; }
__device__ __forceinline__ u32 bytes_of(u32 a, u32 b, u32 selector) {
  u32 d;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(selector));
  return d;
}
// (a & b) | c
__device__ __forceinline__ u32 and_or(u32 a, u32 b, u32 c) {
  u32 d;
  asm("lop3.b32 %0, %1, %2, %3, 0xEA;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
}
// b where the mask is set, else a
__device__ __forceinline__ u32 select(u32 a, u32 b, u32 mask) {
  u32 d;
  asm("lop3.b32 %0, %1, %2, %3, 0xD8;" : "=r"(d) : "r"(a), "r"(b), "r"(mask));
  return d;
}
__device__ __forceinline__ u32 fma_pair(u32 a, u32 b, u32 c) {
  u32 d;
  if (IS_HALF)
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  else
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
}
__device__ __forceinline__ float from_half(u16 bits) {
  float f;
  asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(bits));
  return f;
}
__device__ __forceinline__ u16 to_half(float f) {
  u16 bits;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(f));
  return bits;
}
__device__ __forceinline__ float from_bf16(u16 bits) { return __uint_as_float((u32)bits << 16); }
__device__ __forceinline__ u16 to_bf16(float f) {
  u16 bits;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(f));
  return bits;
}
__device__ __forceinline__ float from_x(u16 bits) { return IS_X_HALF ? from_half(bits) : from_bf16(bits); }
__device__ __forceinline__ u16 to_x(float f) { return IS_X_HALF ? to_half(f) : to_bf16(f); }
__device__ __forceinline__ void wait_for_input() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
__device__ __forceinline__ void let_next_begin() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
__device__ __forceinline__ u32 cluster_rank() {
  u32 rank = 0;
#if __CUDA_ARCH__ >= 900
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
#endif
  return rank;
}
__device__ __forceinline__ void sync_cluster(int split) {
#if __CUDA_ARCH__ >= 900
  if (split > 1) {
    asm volatile("barrier.cluster.arrive.aligned;\nbarrier.cluster.wait.aligned;" ::: "memory");
    return;
  }
#endif
  __syncthreads();
}
__device__ __forceinline__ float load_of_block(u32 address, u32 rank, int split) {
  float f;
#if __CUDA_ARCH__ >= 900
  if (split > 1) {
    asm volatile("{\n.reg .b32 there;\nmapa.shared::cluster.u32 there, %1, %2;\nld.shared::cluster.f32 %0, [there];\n}"
                 : "=f"(f) : "r"(address), "r"(rank) : "memory");
    return f;
  }
#endif
  asm volatile("ld.shared.f32 %0, [%1];" : "=f"(f) : "r"(address) : "memory");
  return f;
}

// ---- decoding: of rows r and r + 8 (a[0] and a[1]) two columns each, and the next two (a[2] and a[3]) ----

// IS_RAW: plain codes are left RAW + MIDDLE too large.
template <bool IS_RAW>
__device__ __forceinline__ void decode_int4(u32 word, u32 (&a)[4]) {
  if (HAS_TABLE) {
    const u32 low[4] = {TABLE_LOW}, high[4] = {TABLE_HIGH};
    const u32 shifted = word << 4, index = word & 0x77777777u;
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const u32 selector = i ? index >> 16 : index, mask = bytes_of(shifted, word, i ? 0xFBEAu : 0xD9C8u);
      const u32 l = select(bytes_of(low[0], low[1], selector), bytes_of(low[2], low[3], selector), mask);
      const u32 h = select(bytes_of(high[0], high[1], selector), bytes_of(high[2], high[3], selector), mask);
      a[2 * i] = bytes_of(l, h, 0x5140u), a[2 * i + 1] = bytes_of(l, h, 0x7362u);
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < 4; i++) {
    a[i] = and_or(word >> 4 * i, 0x000f000fu, both(IS_HALF ? 0x6400 : 0x4300));
    if (!IS_RAW) a[i] = fma_pair(a[i], both(IS_HALF ? 0x3c00 : 0x3f80), both(IS_HALF ? 0xe400 | MIDDLE : 0xc300 | MIDDLE));
  }
}
__device__ __forceinline__ u32 pair_of_floats(float low, float high) {
  u32 d;
  if (IS_HALF)
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));
  else
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));
  return d;
}
__device__ __forceinline__ void decode_bytes(u32 word, u32& first, u32& second) {
  if (CODE == INT8 && IS_HALF) {
    const u32 shifted = word ^ 0x80808080u;
    first = fma_pair(bytes_of(shifted, 0x64646464u, 0x4140u), both(0x3c00), both(0xe480));
    second = fma_pair(bytes_of(shifted, 0x64646464u, 0x4342u), both(0x3c00), both(0xe480));
  } else if (CODE == INT8) {  // 128 and the code's last 7 bits, less 128, or 256 if it is negative
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const u32 spread = bytes_of(word, 0, i ? 0x4342u : 0x4140u);
      (i ? second : first) =
          fma_pair(and_or(spread, 0x007f007fu, 0x43004300u), both(0x3f80), and_or(spread, 0x00800080u, 0xc300c300u));
    }
  } else {
#if __CUDA_ARCH__ >= 890
    if (IS_HALF) {
      asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(first) : "h"((u16)word));
      asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(second) : "h"((u16)(word >> 16)));
      return;
    }
#endif
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const u32 spread = bytes_of(word, 0, i ? 0x3424u : 0x1404u), sign = spread & 0x80008000u;
      const u32 d = IS_HALF ? fma_pair(and_or(spread >> 1, 0x3f803f80u, sign), both(0x5c00), 0x80008000u)
                            : fma_pair(and_or(spread >> 4, 0x07f007f0u, sign), both(0x7b80), 0x80008000u);
      (i ? second : first) = d;
    }
  }
}

// d += 16 rows of the weight, 16 columns, times 8 tokens. A thread's d are tokens 2 t and 2 t + 1, of row r, then of r + 8.
__device__ __forceinline__ void multiply(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  if (IS_HALF)
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  else
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// ---- shared parts ----

__device__ __forceinline__ float param(const PARAM* p) {
  if (sizeof(PARAM) == 4) return *(const float*)p;
  return PARAM_IS_HALF ? from_half(*(const u16*)p) : from_bf16(*(const u16*)p);
}

__device__ __forceinline__ float activated(float x, int act) {
  if (act == 1) return x / (1.0f + __expf(-x));
  if (act == 2) return x / (1.0f + __expf(-1.5957691216057308f * (x + 0.044715f * x * x * x)));
  if (act == 3) return 0.5f * x * (1.0f + erff(x * 0.7071067811865476f));
  x = fmaxf(x, 0.0f);
  return act == 4 ? x : x * x;
}

__device__ __forceinline__ void read8(const void* from, u64 at, bool is_float, float (&values)[8]) {
  if (is_float) {
    const float4 a = *(const float4*)((const float*)from + at), b = *(const float4*)((const float*)from + at + 4);
    values[0] = a.x, values[1] = a.y, values[2] = a.z, values[3] = a.w;
    values[4] = b.x, values[5] = b.y, values[6] = b.z, values[7] = b.w;
    return;
  }
  const uint4 v = *(const uint4*)((const u16*)from + at);
  const u32 words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
  for (int i = 0; i < 4; i++) values[2 * i] = from_x((u16)words[i]), values[2 * i + 1] = from_x((u16)(words[i] >> 16));
}

// Finish 8 sums of a token, from `row` of the weight on: their scales, where it has one a row, and their bias.
__device__ __forceinline__ void scale_and_add_bias(const Args& args, int row, float x_scale, float (&values)[8]) {
  float numbers[8];
  if (GROUP == 0) {
    read8(args.scale, row, true, numbers);
#pragma unroll
    for (int i = 0; i < 8; i++) values[i] *= numbers[i];
  }
#pragma unroll
  for (int i = 0; i < 8; i++) values[i] *= x_scale;
  if (args.bias != nullptr) {
    read8(args.bias, row, args.is_bias_float, numbers);
#pragma unroll
    for (int i = 0; i < 8; i++) values[i] += numbers[i];
  }
}
