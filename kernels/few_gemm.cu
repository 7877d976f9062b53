// out = residual + x W^T + bias, or act(x G^T) * (x U^T), of up to 32 tokens x [T, K] and a weight [N, K] of 16-bit floats
// (act: [gate; up]) on Hopper.
//
// All the time goes into reading the weight, so a block has COLUMNS of its rows and a ring of stages that the tensor memory
// accelerator fills: of each row SLABS times 64 columns, and the tokens' same columns. Weights depend on no kernel: the
// first stages are asked for before the one ahead has ended. One warpgroup multiplies; tokens are the tensor cores' 64
// rows, of which all but TOKENS are whatever lies behind in memory, and no matter.
//
// few_gemm.py puts in front, besides hopper.cu: TOKENS (8, 16 or 32), COLUMNS, SLABS, STAGES, ACT (NONE, SILU or GELU_TANH),
// IS_HALF, and for the instruction WGMMA_TYPE and its operands WGMMA_D, WGMMA_X, WGMMA_W, WGMMA_ADD, WGMMA_SUMS.

typedef unsigned short u16;

constexpr int DEPTH = 64;  // 128 bytes, the width of the swizzle
constexpr bool IS_GATED = ACT != NONE;
constexpr int HALVES = IS_GATED ? 2 : 1;
constexpr int W_BYTES = SLABS * COLUMNS * 128, X_BYTES = SLABS * TOKENS * 128, STAGE_BYTES = HALVES * W_BYTES + X_BYTES;
constexpr int SUMS = COLUMNS / 2;              // a thread's, of gate or up
constexpr bool HOLDS_RESIDUAL = COLUMNS <= 64;  // in registers, while it multiplies

struct Args {
  const u16* bias;      // [N], or null
  const u16* residual;  // [T, N], or null
  void* out;
  int num_tokens, n, k, is_out_float;
};

// d += a tile [64, 16] of x times one [COLUMNS, 16] of weights. A thread's d[4 g ...] are columns 8 g + 2 (lane % 4) and the
// next one, of its warp's row lane / 4, then of row lane / 4 + 8.
__device__ __forceinline__ void multiply(float (&d)[SUMS], u64 x, u64 w, bool add) {
  asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, " WGMMA_ADD ", 0;\n"
               "wgmma.mma_async.sync.aligned." WGMMA_TYPE " {" WGMMA_D "}, " WGMMA_X ", " WGMMA_W ", add, 1, 1, 0, 0;\n}"
               : WGMMA_SUMS
               : "l"(x), "l"(w), "r"((int)add));
}
__device__ __forceinline__ void keep(float& value) { asm volatile("" : "+f"(value)::"memory"); }
__device__ __forceinline__ void let_next_begin() { asm volatile("griddepcontrol.launch_dependents;"); }
__device__ __forceinline__ void wait_for_input() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
__device__ __forceinline__ float widened(u32 bits) {
  float value;
  if (IS_HALF) asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"((u16)bits));
  else value = __uint_as_float(bits << 16);
  return value;
}
__device__ __forceinline__ u32 pair_of(float low, float high) {
  u32 pair;
  if (IS_HALF) asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  else asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}
__device__ __forceinline__ float activation(float x) {
  float z = ACT == SILU ? x : 1.5957691216057308f * (x + 0.044715f * x * x * x);  // 0.5 (1 + tanh(z / 2)) = sigmoid(z)
  return __fdividef(x, 1.0f + __expf(-z));
}

struct Ring {
  u32 stages, barriers, parity;
  int place = 0;
  __device__ __forceinline__ Ring(u32 stages, u32 barriers, u32 parity) : stages(stages), barriers(barriers), parity(parity) {}
  __device__ __forceinline__ u32 x() const { return stages + place * STAGE_BYTES; }
  __device__ __forceinline__ u32 w() const { return x() + X_BYTES; }
  __device__ __forceinline__ u32 is_full() const { return barriers + 8 * place; }
  __device__ __forceinline__ u32 is_empty() const { return barriers + 8 * (STAGES + place); }
  __device__ __forceinline__ void next() {
    if (++place == STAGES) place = 0, parity ^= 1;
  }
};

// x_map: boxes of SLABS x TOKENS rows of x by 64, slabs of 64 columns being the third dimension; w_map: of SLABS x COLUMNS
// rows of the weight. K: a multiple of 64; the result's columns: of 8.
extern "C" __global__ void __launch_bounds__(160, 1)
    few_gemm(const __grid_constant__ TensorMap x_map, const __grid_constant__ TensorMap w_map, const __grid_constant__ Args args) {
  extern __shared__ __align__(1024) unsigned char shared[];
  const u32 stages = (u32)__cvta_generic_to_shared(shared), barriers = stages + STAGES * STAGE_BYTES;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  let_next_begin();
  if (threadIdx.x == 0) {
    for (int i = 0; i < STAGES; i++) {
      init_barrier(barriers + 8 * i, 1);
      init_barrier(barriers + 8 * (STAGES + i), 4);
    }
    barriers_are_ready();
  }
  __syncthreads();
  const int out_n = args.n / HALVES, num_tiles = (out_n + COLUMNS - 1) / COLUMNS;
  const int num_stages = (args.k / DEPTH + SLABS - 1) / SLABS;

  if (warp == 4) {
    if (lane != 0) return;
    Ring ring(stages, barriers, 1);
    const u64 policy = cache_policy(true);
    auto load_w = [&](int tile, int stage) {
      expect(ring.is_full(), STAGE_BYTES);
#pragma unroll
      for (int half = 0; half < HALVES; half++)
        load3_by_policy(ring.w() + half * W_BYTES, &w_map, 0, half * out_n + tile * COLUMNS, stage * SLABS, ring.is_full(), policy);
    };
    auto load_x = [&](int stage) { load3(ring.x(), &x_map, 0, 0, stage * SLABS, ring.is_full()); };
    const int ahead = min(STAGES, num_stages);
    for (; ring.place < ahead; ring.place++) load_w(blockIdx.x, ring.place);
    wait_for_input();
    for (ring.place = 0; ring.place < ahead; ring.place++) load_x(ring.place);
    if (ring.place == STAGES) ring.place = 0, ring.parity ^= 1;
    for (int tile = blockIdx.x, stage = ahead; tile < num_tiles; tile += gridDim.x, stage = 0)
      for (; stage < num_stages; stage++, ring.next()) {
        wait(ring.is_empty(), ring.parity);
        load_w(tile, stage);
        load_x(stage);
      }
    return;
  }

  wait_for_input();
  Ring ring(stages, barriers, 0);
  const bool has_tokens = 16 * warp < args.num_tokens;
  for (int tile = blockIdx.x; tile < num_tiles; tile += gridDim.x) {
    const int token = 16 * warp + lane / 4, column = tile * COLUMNS + lane % 4 * 2;
    u32 held[HOLDS_RESIDUAL ? SUMS / 2 : 1];
    auto load_residual = [&](int i) -> u32 {  // of d[2 i] and d[2 i + 1]
      const int t = token + i % 2 * 8, c = column + i / 2 * 8;
      return t < args.num_tokens && c < out_n ? *(const u32*)(args.residual + (u64)t * out_n + c) : 0;
    };
    if (HOLDS_RESIDUAL && has_tokens && args.residual != nullptr) {
#pragma unroll
      for (int i = 0; i < SUMS / 2; i++) held[HOLDS_RESIDUAL ? i : 0] = load_residual(i);
    }
    float d[HALVES][SUMS];
    u32 last = 0;
#pragma unroll 1
    for (int stage = 0; stage < num_stages; stage++, ring.next()) {
      wait(ring.is_full(), ring.parity);
      begin_products();
#pragma unroll
      for (int slab = 0; slab < SLABS; slab++) {
        const u64 x = descriptor(ring.x() + slab * TOKENS * 128), w = descriptor(ring.w() + slab * COLUMNS * 128);
#pragma unroll
        for (int i = 0; i < DEPTH / 16; i++) {
          multiply(d[0], x + 2 * i, w + 2 * i, stage + slab + i > 0);
          if (IS_GATED) multiply(d[HALVES - 1], x + 2 * i, w + W_BYTES / 16 + 2 * i, stage + slab + i > 0);
        }
      }
      commit_products();
      if (stage > 0) {
        wait_for_products<1>();
        if (lane == 0) arrive(last);
      }
      last = ring.is_empty();
    }
    wait_for_products<0>();
#pragma unroll
    for (int half = 0; half < HALVES; half++)
#pragma unroll
      for (int i = 0; i < SUMS; i++) keep(d[half][i]);  // not to be read any earlier
    if (lane == 0) arrive(last);

    if (!has_tokens) continue;
#pragma unroll
    for (int i = 0; i < SUMS / 2; i++) {
      const int t = token + i % 2 * 8, c = column + i / 2 * 8;
      if (t >= args.num_tokens || c >= out_n) continue;
      float y[2];
#pragma unroll
      for (int j = 0; j < 2; j++) {
        y[j] = d[0][2 * i + j] + (args.bias != nullptr ? widened(args.bias[c + j]) : 0.0f);
        if (IS_GATED) {
          const float bias = args.bias != nullptr ? widened(args.bias[out_n + c + j]) : 0.0f;
          y[j] = activation(y[j]) * (d[HALVES - 1][2 * i + j] + bias);
        }
      }
      if (args.residual != nullptr) {
        const u32 h = HOLDS_RESIDUAL ? held[HOLDS_RESIDUAL ? i : 0] : load_residual(i);
        y[0] += widened(h & 65535), y[1] += widened(h >> 16);
      }
      const u64 at = (u64)t * out_n + c;
      if (args.is_out_float) {
        ((float*)args.out)[at] = y[0], ((float*)args.out)[at + 1] = y[1];
      } else {
        *(u32*)((u16*)args.out + at) = pair_of(y[0], y[1]);
      }
    }
  }
}
