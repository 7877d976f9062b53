// out = residual + x W^T + bias, or act(x G^T) * (x U^T), of a few tokens x [T, K] and a weight [N, K] of 16-bit floats
// (act: [gate; up]) on Hopper.
//
// All the time goes into reading the weight, so a block has COLUMNS of its rows and a ring of stages that the tensor memory
// accelerator fills: of each row SLABS times 64 columns, and the tokens' same columns. Weights depend on no kernel: the
// first stages are asked for before the one ahead has ended. One warpgroup multiplies; tokens are the tensor cores' 64
// rows, of which all but TOKENS are whatever lies behind in memory, and no matter. More tokens than 64 are several tiles,
// each a block's: SHARE of them, with the same columns, are a cluster, of which each block copies some of a stage's slabs of
// the weight for all.
//
// few_gemm.py puts in front, besides hopper.cu: TOKENS (8, 16, 32, 48 or 64), COLUMNS, SLABS, STAGES, SHARE (1 or 2), ACT
// (NONE, SILU or GELU_TANH), IS_HALF, and for the instruction WGMMA_TYPE and its operands WGMMA_D, WGMMA_X, WGMMA_W,
// WGMMA_ADD, WGMMA_SUMS.

typedef unsigned short u16;

constexpr int DEPTH = 64;  // 128 bytes, the width of the swizzle
constexpr bool IS_GATED = ACT != NONE;
constexpr int HALVES = IS_GATED ? 2 : 1;
constexpr int W_BYTES = SLABS * COLUMNS * 128, X_BYTES = SLABS * TOKENS * 128, STAGE_BYTES = HALVES * W_BYTES + X_BYTES;
constexpr int OWN_SLABS = SLABS / SHARE;       // of a stage's weights, which a block copies
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

__device__ __forceinline__ u32 cluster_rank() {
  u32 rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}
__device__ __forceinline__ void sync_cluster() {
  __syncwarp();
  asm volatile("barrier.cluster.arrive.aligned;\nbarrier.cluster.wait.aligned;" ::: "memory");
}
// In all blocks of the cluster, by a lane each. Without .release.cluster: only reads came before.
__device__ __forceinline__ void arrive_in_all(u32 barrier, int lane) {
  if (SHARE == 1) {
    if (lane == 0) arrive(barrier);
  } else if (lane < SHARE) {
    asm volatile(
        "{\n.reg .b32 there;\nmapa.shared::cluster.u32 there, %0, %1;\n"
        "mbarrier.arrive.shared::cluster.b64 _, [there];\n}" ::"r"(barrier),
        "r"(lane)
        : "memory");
  }
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

// x_map: boxes of SLABS x TOKENS rows of x by 64, slabs of 64 columns being the third dimension; w_map: of OWN_SLABS x
// COLUMNS rows of the weight. K: a multiple of 64; the result's columns: of 8.
extern "C" __global__ void __launch_bounds__(160, 1)
    few_gemm(const __grid_constant__ TensorMap x_map, const __grid_constant__ TensorMap w_map, const __grid_constant__ Args args) {
  extern __shared__ __align__(1024) unsigned char shared[];
  const u32 stages = (u32)__cvta_generic_to_shared(shared), barriers = stages + STAGES * STAGE_BYTES;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  let_next_begin();
  if (threadIdx.x == 0) {
    for (int i = 0; i < STAGES; i++) {
      init_barrier(barriers + 8 * i, 1);
      init_barrier(barriers + 8 * (STAGES + i), 4 * SHARE);
    }
    barriers_are_ready();
  }
  const int rank = SHARE > 1 ? cluster_rank() : 0;
  if (SHARE > 1) sync_cluster();
  else __syncthreads();
  const int out_n = args.n / HALVES, num_column_tiles = (out_n + COLUMNS - 1) / COLUMNS;
  const int num_token_tiles = (args.num_tokens + TOKENS * SHARE - 1) / (TOKENS * SHARE);  // of a cluster
  const int num_tiles = num_column_tiles * num_token_tiles;
  const int first_tile = blockIdx.x / SHARE, num_abreast = gridDim.x / SHARE;
  const int num_stages = (args.k / DEPTH + SLABS - 1) / SLABS;
  auto first_column = [&](int tile) { return tile / num_token_tiles * COLUMNS; };
  // Where a tile's tokens begin. The last tile ends with the last token, if there are so many, and leaves those to the
  // others that are theirs: to fill what is past the end takes the accelerator longer than to read.
  auto first_own = [&](int tile) { return (tile % num_token_tiles * SHARE + rank) * TOKENS; };
  auto first_token = [&](int tile) { return min(first_own(tile), max(args.num_tokens - TOKENS, 0)); };

  if (warp == 4) {
    if (lane == 0) {
      Ring ring(stages, barriers, 1);
      const u64 policy = cache_policy(num_token_tiles == 1);
      auto load_w = [&](int tile, int stage) {
        expect(ring.is_full(), STAGE_BYTES);
#pragma unroll
        for (int half = 0; half < HALVES; half++) {
          const u32 to = ring.w() + half * W_BYTES + rank * OWN_SLABS * COLUMNS * 128;
          const int row = half * out_n + first_column(tile), slab = stage * SLABS + rank * OWN_SLABS;
          if (SHARE > 1) load3_for_all(to, &w_map, 0, row, slab, ring.is_full(), (1 << SHARE) - 1, policy);
          else load3_by_policy(to, &w_map, 0, row, slab, ring.is_full(), policy);
        }
      };
      auto load_x = [&](int tile, int stage) { load3(ring.x(), &x_map, 0, first_token(tile), stage * SLABS, ring.is_full()); };
      const int ahead = min(STAGES, num_stages);
      for (; ring.place < ahead; ring.place++) load_w(first_tile, ring.place);
      wait_for_input();
      for (ring.place = 0; ring.place < ahead; ring.place++) load_x(first_tile, ring.place);
      if (ring.place == STAGES) ring.place = 0, ring.parity ^= 1;
      for (int tile = first_tile, stage = ahead; tile < num_tiles; tile += num_abreast, stage = 0)
        for (; stage < num_stages; stage++, ring.next()) {
          wait(ring.is_empty(), ring.parity);
          load_w(tile, stage);
          load_x(tile, stage);
        }
    }
    if (SHARE > 1) sync_cluster();  // others copy to this block, too
    return;
  }

  wait_for_input();
  Ring ring(stages, barriers, 0);
  for (int tile = first_tile; tile < num_tiles; tile += num_abreast) {
    const int token = first_token(tile) + 16 * warp + lane / 4, column = first_column(tile) + lane % 4 * 2;
    const int least_token = first_own(tile);  // that is this tile's
    const bool has_tokens = first_token(tile) + 16 * warp < args.num_tokens && least_token < args.num_tokens;
    u32 held[HOLDS_RESIDUAL ? SUMS / 2 : 1];
    auto load_residual = [&](int i) -> u32 {  // of d[2 i] and d[2 i + 1]
      const int t = token + i % 2 * 8, c = column + i / 2 * 8;
      return least_token <= t && t < args.num_tokens && c < out_n ? *(const u32*)(args.residual + (u64)t * out_n + c) : 0;
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
        arrive_in_all(last, lane);
      }
      last = ring.is_empty();
    }
    wait_for_products<0>();
#pragma unroll
    for (int half = 0; half < HALVES; half++)
#pragma unroll
      for (int i = 0; i < SUMS; i++) keep(d[half][i]);  // not to be read any earlier
    arrive_in_all(last, lane);

    if (!has_tokens) continue;
#pragma unroll
    for (int i = 0; i < SUMS / 2; i++) {
      const int t = token + i % 2 * 8, c = column + i / 2 * 8;
      if (t < least_token || t >= args.num_tokens || c >= out_n) continue;
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
  if (SHARE > 1) sync_cluster();
}
