// What `fp4_experts.cu` and `fp4_prompts.cu` have in common; fp4_experts.py puts it in front of them, and ahead of it ACT
// (0: none, 1: silu, 2: clamped swiglu) and what they ask for.
//
// Pairs of a token and an expert are sorted by expert, and cut into tiles of one expert's. A piece of work is a tile and a
// block of rows; it looks up in `tile_ends` whose tile it is.

typedef unsigned int u32;
typedef unsigned short u16;
typedef unsigned long long u64;

struct Args {
  const unsigned char* codes;  // [E rows, K / 2]
  const u16* scales;           // [E rows, K / 32], bfloat16
  const u16* x;                // [inputs, K]
  const u16* bias;             // [E rows] or null
  const int* order;
  const int* ends;
  const int* tile_ends;
  u16* out;  // [pairs, n]
  int num_experts, n, rows, k, per_input, num_blocks;
  int x_width, out_width;  // of rows in the order of `fp4_prompts.cu`; the second is 0 if rows of out are n, in their own
};

constexpr int CHUNK = 128;  // columns that are copied together
constexpr int AHEAD = 2;  // chunks, whose scales are in registers
constexpr float SCALE = 16777216.0f;  // that `scale_pair` takes out of sums

// ---- shared instructions ----

__device__ __forceinline__ u32 shared_address(const void* pointer) { return (u32)__cvta_generic_to_shared(pointer); }
// Copy 16 bytes; those behind `wanted` become 0.
__device__ __forceinline__ void copy(u32 to, const void* from, int wanted) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(wanted) : "memory");
}
__device__ __forceinline__ u16 load(const u16* from) { return __ldg(from); }
__device__ __forceinline__ void commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int NUM>
__device__ __forceinline__ void wait_group() { asm volatile("cp.async.wait_group %0;" ::"n"(NUM) : "memory"); }
__device__ __forceinline__ u32 times(u32 a, u32 b) {
  u32 d;
  asm("mul.rn.bf16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
  return d;
}
__device__ __forceinline__ u32 bytes_of(u32 a, u32 b, u32 selector) {
  u32 d;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(selector));
  return d;
}
__device__ __forceinline__ u32 and_or(u32 a, u32 b, u32 c) {
  u32 d;
  asm("lop3.b32 %0, %1, %2, %3, 0xEA;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
}
__device__ __forceinline__ u16 to_bf16(float f) {
  u16 bits;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(f));
  return bits;
}
__device__ __forceinline__ int sum_of_warp(int value) { return __reduce_add_sync(~0u, value); }
__device__ __forceinline__ void wait_for_input() {
  asm volatile("griddepcontrol.wait;" ::: "memory");
}
__device__ __forceinline__ void let_next_begin() {
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
}

// ---- shared parts ----

__device__ __forceinline__ float from_bf16(u16 bits) { return __uint_as_float((u32)bits << 16); }

// A scale for numbers that `decode` leaves over 2^126, over 2^24, which sums make good: so both are bfloat16.
__device__ __forceinline__ u32 scale_pair(u16 scale) {
  const u32 bits = __float_as_uint(fminf(from_bf16(scale) * 5.070602400912918e30f, 1.7014118346046923e38f));
  return bytes_of(bits, bits, 0x3232u);
}

// Of inputs 0 to 7 of a word, (0, 4), (1, 5), (2, 6), (3, 7): sign, exponent and mantissa go where bfloat16 has them.
__device__ __forceinline__ void decode(u32 word, u32 scale, u32 (&pairs)[4]) {
  pairs[0] = times(and_or(word << 6, 0x01c001c0u, word << 12 & 0x80008000u), scale);
  pairs[1] = times(and_or(word << 2, 0x01c001c0u, word << 8 & 0x80008000u), scale);
  pairs[2] = times(and_or(word >> 2, 0x01c001c0u, word << 4 & 0x80008000u), scale);
  pairs[3] = times(and_or(word >> 6, 0x01c001c0u, word & 0x80008000u), scale);
}

__device__ __forceinline__ float activated(float gate, float up) {
  if (ACT == 1) return gate / (1.0f + __expf(-gate)) * up;
  gate = fminf(gate, 7.0f);
  return gate / (1.0f + __expf(-1.702f * gate)) * (fminf(fmaxf(up, -7.0f), 7.0f) + 1.0f);
}

struct Tile {
  int expert, first, num_pairs;  // the place of its first pair in `order`
};

// Of no pairs if there are fewer tiles. Called by whole warps.
__device__ __forceinline__ Tile find_tile(const Args& args, int tile, int height) {
  int num_before = 0;
  for (int e = threadIdx.x % 32; e < args.num_experts; e += 32) num_before += args.tile_ends[e] <= tile;
  const int expert = sum_of_warp(num_before);
  if (expert >= args.num_experts) return {expert, 0, 0};
  const int first_tile = expert ? args.tile_ends[expert - 1] : 0;
  const int first = (expert ? args.ends[expert - 1] : 0) + (tile - first_tile) * height;
  return {expert, first, min(args.ends[expert] - first, height)};
}

