// out = act(x @ gate.T) * (x @ up.T) on Hopper; x [M, K], weight [gate; up] [2 N, K], out [M, N].
//
// A block has one warpgroup that loads tiles (the tensor memory accelerator copies them, one thread starts the copies)
// and two that multiply, 64 rows each; full and empty barriers pass the stages between them. A tile's weights are
// COLUMNS rows of gate and as many of up, so that a thread ends up with both sums of an output: nothing goes to memory
// in between. Blocks work in pairs: two row tiles of the same weights, of which each loads half for both (SHARE_WEIGHTS),
// or two column tiles of the same rows of x.
//
// gated_gemm.py puts in front, besides hopper.cu: COLUMNS, SHARE_WEIGHTS, STAGES, ACT (SILU or GELU_TANH), OUT_TYPE, and for the
// instruction WGMMA_TYPE and its operands WGMMA_D, WGMMA_X, WGMMA_W, WGMMA_ADD, WGMMA_SUMS.

constexpr int ROWS = 128, DEPTH = 64;  // of a tile; DEPTH along K: 128 bytes, the width of the swizzle
constexpr int X_BYTES = ROWS * DEPTH * 2, W_BYTES = COLUMNS * DEPTH * 2;
constexpr int STAGE_BYTES = X_BYTES + 2 * W_BYTES;
constexpr int PITCH = 144;           // bytes of a staged row of 64 values: 16 more, so that rows start in different banks
constexpr int ROW_TILES_ABREAST = 16;  // whose weights come from the L2 cache for all but the first

// In both blocks of the pair. Without .release.cluster, which costs a fence of all memory: only reads came before.
__device__ __forceinline__ void arrive_in_both(u32 barrier, int thread) {
  if (thread < 2)
    asm volatile(
        "{\n.reg .b32 there;\nmapa.shared::cluster.u32 there, %0, %1;\n"
        "mbarrier.arrive.shared::cluster.b64 _, [there];\n}" ::"r"(barrier),
        "r"(thread)
        : "memory");
}
__device__ __forceinline__ void sync_pair() {
  __syncwarp();
  asm volatile("barrier.cluster.arrive.aligned;\nbarrier.cluster.wait.aligned;" ::: "memory");
}
__device__ __forceinline__ void load_for_both(u32 to, const TensorMap* map, int k, int row, u32 barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster"
      " [%0], [%1, {%2, %3}], [%4], %5;" ::"r"(to),
      "l"(map), "r"(k), "r"(row), "r"(barrier), "h"((unsigned short)0b11)
      : "memory");
}
// d (+)= a tile [64, 16] of x times one [2 COLUMNS, 16] of weights. A thread's d[4 g ...] are columns 8 g + 2 (lane % 4)
// and the next one, of its warp's row lane / 4, then of row lane / 4 + 8.
__device__ __forceinline__ void multiply(float (&d)[COLUMNS], u64 x, u64 w, bool add) {
  asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, " WGMMA_ADD ", 0;\n"
               "wgmma.mma_async.sync.aligned." WGMMA_TYPE " {" WGMMA_D "}, " WGMMA_X ", " WGMMA_W ", add, 1, 1, 0, 0;\n}"
               : WGMMA_SUMS
               : "l"(x), "l"(w), "r"((int)add));
}

__device__ __forceinline__ float activation(float x) {
#if ACT == SILU
  float z = x;
#else  // 0.5 (1 + tanh(z / 2)) = sigmoid(z)
  float z = 1.5957691216057308f * (x + 0.044715f * x * x * x);
#endif
  return __fdividef(x, 1.0f + __expf(-z));
}
__device__ __forceinline__ u32 pack(float low, float high) {
  u32 packed;
  asm("cvt.rn." OUT_TYPE "x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}
// Write a warp's 16 rows, 8 groups of 8 columns at a time, through shared memory, so that 16 bytes of a row go at once.
template <int GROUPS>
__device__ __forceinline__ void write(const float* d, u32 staging, unsigned short* out, int num_rows, int stride) {
  constexpr int NOW = GROUPS < 8 ? GROUPS : 8;
  int lane = threadIdx.x % 32;
  __syncwarp();
#pragma unroll
  for (int g = 0; g < NOW; g += 2) {
    u32 packed[4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const float *gate = d + 4 * g + 2 * i, *up = gate + COLUMNS / 2;
      packed[i] = pack(activation(gate[0]) * up[0], activation(gate[1]) * up[1]);
    }
    u32 to = staging + lane % 16 * PITCH + (g + lane / 16) * 16;
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(packed[0]),
                 "r"(packed[1]), "r"(packed[2]), "r"(packed[3])
                 : "memory");
  }
  __syncwarp();
#pragma unroll
  for (int i = 0; i < NOW / 2; i++) {
    int piece = i * 32 + lane, row = piece / NOW, group = piece % NOW;
    uint4 values;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(values.x), "=r"(values.y), "=r"(values.z), "=r"(values.w)
                 : "r"(staging + row * PITCH + group * 16)
                 : "memory");
    if (row < num_rows) *(uint4*)(out + (u64)row * stride + group * 8) = values;
  }
  if constexpr (GROUPS > NOW) write<GROUPS - NOW>(d + 4 * NOW, staging, out + 8 * NOW, num_rows, stride);
}

struct Barriers {
  u32 full, empty;
  int stage = 0;
  u32 parity;
  __device__ Barriers(u32 first, u32 parity) : full(first), empty(first + 8 * STAGES), parity(parity) {}
  __device__ u32 is_full() const { return full + 8 * stage; }
  __device__ u32 is_empty() const { return empty + 8 * stage; }
  __device__ void next() {
    if (++stage == STAGES) stage = 0, parity ^= 1;
  }
};

// x_map: boxes of 128 rows of x (64 without SHARE_WEIGHTS) by 64; w_map: of COLUMNS rows of weight by 64. N: a multiple
// of COLUMNS (twice that without SHARE_WEIGHTS); K: of 64. Any even number of blocks will do.
extern "C" __global__ void __launch_bounds__(384, 1) __cluster_dims__(2, 1, 1)
    gated_gemm(const __grid_constant__ TensorMap x_map, const __grid_constant__ TensorMap w_map, unsigned short* out, int M,
               int N, int K) {
  extern __shared__ __align__(1024) unsigned char shared[];
  u32 stages = (u32)__cvta_generic_to_shared(shared), staging = stages + STAGES * STAGE_BYTES;
  u32 barriers = staging + 8 * 16 * PITCH;
  u32 rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  asm volatile("griddepcontrol.launch_dependents;");
  if (threadIdx.x == 0) {
    for (int i = 0; i < STAGES; i++) {
      init_barrier(barriers + 8 * i, 1);
      init_barrier(barriers + 8 * (STAGES + i), 4);  // two warpgroups of two blocks
    }
    barriers_are_ready();
    asm volatile("prefetch.tensormap [%0];\nprefetch.tensormap [%1];" ::"l"(&x_map), "l"(&w_map));
  }
  sync_pair();

  constexpr int PAIR_ROWS = SHARE_WEIGHTS ? 2 * ROWS : ROWS, PAIR_COLUMNS = SHARE_WEIGHTS ? COLUMNS : 2 * COLUMNS;
  int num_row_tiles = (M + PAIR_ROWS - 1) / PAIR_ROWS, num_column_tiles = N / PAIR_COLUMNS;
  int num_tiles = num_row_tiles * num_column_tiles, num_k = K / DEPTH;
  auto place = [&](int tile, int& row, int& column) {
    int abreast = ROW_TILES_ABREAST * num_column_tiles, first = tile / abreast * ROW_TILES_ABREAST;
    int num = min(ROW_TILES_ABREAST, num_row_tiles - first), rest = tile % abreast;
    row = (first + rest % num) * PAIR_ROWS + (SHARE_WEIGHTS ? rank * ROWS : 0);
    column = rest / num * PAIR_COLUMNS + (SHARE_WEIGHTS ? 0 : rank * COLUMNS);
  };
  int first_tile = blockIdx.x / 2, num_pairs = gridDim.x / 2, warpgroup = threadIdx.x / 128;

  if (warpgroup == 0) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
    if (threadIdx.x == 0) {
      Barriers at(barriers, 1);
      auto load_w = [&](int row, int column, int k) {
        u32 to = stages + at.stage * STAGE_BYTES + X_BYTES;
        int num_rows = SHARE_WEIGHTS ? row < M ? ROWS : 0 : row + ROWS / 2 < M ? ROWS : ROWS / 2;
        expect(at.is_full(), num_rows * DEPTH * 2 + 2 * W_BYTES);
        if (SHARE_WEIGHTS) {
          load_for_both(to + rank * W_BYTES, &w_map, k * DEPTH, rank ? N + column : column, at.is_full());
        } else {
          load(to, &w_map, k * DEPTH, column, at.is_full());
          load(to + W_BYTES, &w_map, k * DEPTH, N + column, at.is_full());
        }
      };
      auto load_x = [&](int row, int k) {  // not rows past the end, which no warpgroup reads
        u32 to = stages + at.stage * STAGE_BYTES;
        if (SHARE_WEIGHTS) {
          if (row < M) load(to, &x_map, k * DEPTH, row, at.is_full());
        } else {
          row += rank * (ROWS / 2);
          if (row < M) load_for_both(to + rank * (X_BYTES / 2), &x_map, k * DEPTH, row, at.is_full());
        }
      };
      // Weights depend on no kernel: the first come in while the one ahead still runs.
      int row, column, num_ahead = min(STAGES, num_k);
      place(first_tile, row, column);
      for (at.stage = 0; at.stage < num_ahead; at.stage++) load_w(row, column, at.stage);
      asm volatile("griddepcontrol.wait;" ::: "memory");
      for (at.stage = 0; at.stage < num_ahead; at.stage++) load_x(row, at.stage);
      at.stage--;
      at.next();
      for (int tile = first_tile, k = num_ahead; tile < num_tiles; tile += num_pairs, k = 0) {
        place(tile, row, column);
        for (; k < num_k; k++, at.next()) {
          wait(at.is_empty(), at.parity);
          load_w(row, column, k);
          load_x(row, k);
        }
      }
    }
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
    asm volatile("griddepcontrol.wait;" ::: "memory");
    int half = warpgroup - 1, thread = threadIdx.x % 128, warp = threadIdx.x / 32 - 4;
    Barriers at(barriers, 0);
    for (int tile = first_tile; tile < num_tiles; tile += num_pairs) {
      int row, column;
      place(tile, row, column);
      row += half * (ROWS / 2);
      if (row >= M) {  // the tile's lower half is empty: leave the tensor cores to the upper one
        for (int k = 0; k < num_k; k++, at.next()) {
          wait(at.is_full(), at.parity);
          arrive_in_both(at.is_empty(), thread);
        }
        continue;
      }
      float d[COLUMNS];
      u32 last = 0;
      for (int k = 0; k < num_k; k++, at.next()) {
        wait(at.is_full(), at.parity);
        u32 x = stages + at.stage * STAGE_BYTES;
        u64 x_tile = descriptor(x + half * (X_BYTES / 2)), w_tile = descriptor(x + X_BYTES);
        begin_products();
#pragma unroll
        for (int i = 0; i < DEPTH / 16; i++) multiply(d, x_tile + 2 * i, w_tile + 2 * i, k + i > 0);
        commit_products();
        if (k) {
          wait_for_products<1>();
          arrive_in_both(last, thread);
        }
        last = at.is_empty();
      }
      wait_for_products<0>();
#pragma unroll
      for (int i = 0; i < COLUMNS; i++) asm volatile("" : "+f"(d[i])::"memory");  // not to be read any earlier
      arrive_in_both(last, thread);
      row += warp % 4 * 16;
      write<COLUMNS / 8>(d, staging + warp * 16 * PITCH, out + (u64)row * N + column, M - row, N);
    }
  }
  sync_pair();  // a block's shared memory stays until the other one has no more to write there
}
