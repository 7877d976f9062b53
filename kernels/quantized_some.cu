// out = residual + act(x W^T + bias) of 2 to 32 tokens x [T, K] and a weight of few bits in tiles, on Hopper.
//
// What so few tokens cost beyond reading the codes is instructions, so as few as possible meet a code: it is decoded to the
// integer that it is, exactly, and scales meet the sums of a group's columns.
//
// A block has as many tiles of 16 rows as any other, with all of their columns, so that none waits for another's sums; with
// an activation half of the tiles are gate's and half are up's. Of a stage's columns each of WARPS_K warps has 128, and their
// sums meet in shared memory at the end, always in the same order.
//
// Two warps fill a ring of stages by the tensor memory accelerator: one with codes, scales and offsets, before the kernel
// ahead has ended, one with inputs, once they have been written.
//
// quantized_some.py puts in front, besides what quantized_few.cu has, hopper.cu and: TOKENS (8, 16 or 32), TILES of a warp,
// WARPS_N, WARPS_K, STAGES, PIECE_BYTES of a tile's codes that are a row of the copy's box, and PARAM_WORDS of its scales and
// offsets that are one of theirs (0: all of a stage).

constexpr int WARPS = WARPS_N * WARPS_K, MULTIPLIERS = 32 * WARPS, THREADS = MULTIPLIERS + 64;
constexpr int BLOCK_TILES = TILES * WARPS_N, ROWS = 16 * BLOCK_TILES, PITCH = ROWS + 4;
constexpr int TOKEN_TILES = TOKENS / 8;
constexpr int STAGE_CHUNKS = 2 * WARPS_K;
constexpr int X_BYTES = STAGE_CHUNKS * TOKENS * 128;
constexpr int CHUNK_BYTES = CODE_LOADS * 512, TILE_BYTES = STAGE_CHUNKS * CHUNK_BYTES;
constexpr int W_BYTES = BLOCK_TILES * TILE_BYTES;
constexpr int STAGE_GROUPS = GROUP == 0                            ? 0
                             : GROUPS > 1                          ? STAGE_CHUNKS * GROUPS
                             : GROUP_CHUNKS % STAGE_CHUNKS == 0    ? 1
                             : STAGE_CHUNKS % GROUP_CHUNKS == 0    ? STAGE_CHUNKS / GROUP_CHUNKS
                                                                   : STAGE_CHUNKS / GROUP_CHUNKS + 2;
constexpr int TILE_PARAM_BYTES = STAGE_GROUPS * 8 * PARAM_BYTES;
constexpr int P_BYTES = BLOCK_TILES * TILE_PARAM_BYTES;
constexpr int STAGE_BYTES = (X_BYTES + W_BYTES + P_BYTES + 1023) / 1024 * 1024;
constexpr int SUMS = WARPS_K * TOKENS * PITCH;
constexpr bool IS_RAW = IS_PLAIN && GROUP != 0 && OFFSET != NO_OFFSET;
constexpr int BASE = IS_RAW ? RAW : 0;                        // codes are more by this
constexpr bool HAS_X_SUMS = GROUP != 0 && OFFSET == MINIMUM;  // minima meet sums of inputs
constexpr int FOLD = GROUP == 0 ? 8 : GROUPS > 1 ? 4 / GROUPS : GROUP_CHUNKS % 2 == 0 ? 8 : 4;  // steps between scales

// ---- instructions ----

__device__ __forceinline__ void sync_multipliers() { asm volatile("bar.sync 1, %0;" ::"n"(MULTIPLIERS) : "memory"); }
__device__ __forceinline__ void load4(u32 to, const TensorMap* map, int c0, int c1, int c2, int c3, u32 barrier) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes"
      " [%0], [%1, {%2, %3, %4, %5}], [%6];" ::"r"(to),
      "l"(map), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "r"(barrier)
      : "memory");
}
// Four matrices of 8 tokens by 8 columns, whose rows' addresses the threads have in turn.
__device__ __forceinline__ void load_matrices(u32 address, u32& a, u32& b, u32& c, u32& d) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(a), "=r"(b), "=r"(c), "=r"(d) : "r"(address) : "memory");
}

// ---- parts of the kernel ----

__device__ __forceinline__ int group_of(int chunk) { return GROUPS > 1 ? chunk * GROUPS : chunk / GROUP_CHUNKS; }

__device__ __forceinline__ float param_of(u16 bits) { return PARAM_IS_HALF ? from_half(bits) : from_bf16(bits); }

// Read scales of rows r and r + 8, and their offsets where there are any.
__device__ __forceinline__ void read_params(const unsigned char* p, float (&scales)[2], float (&offsets)[2]) {
  if (sizeof(PARAM) == 4) {
    const float* f = (const float*)p;
    scales[0] = f[0], scales[1] = f[1];
    if (OFFSET != NO_OFFSET) offsets[0] = f[2], offsets[1] = f[3];
  } else if (OFFSET == NO_OFFSET) {
    const u32 v = *(const u32*)p;
    scales[0] = param_of((u16)v), scales[1] = param_of((u16)(v >> 16));
  } else {
    const uint2 v = *(const uint2*)p;
    scales[0] = param_of((u16)v.x), scales[1] = param_of((u16)(v.x >> 16));
    offsets[0] = param_of((u16)v.y), offsets[1] = param_of((u16)(v.y >> 16));
  }
}

// Decode a step of a tile: two columns of rows r and r + 8, and two more.
__device__ __forceinline__ void decode(const u32 (&words)[4 * CODE_LOADS], int step, const u32 (&zeros)[2], u32 (&a)[4]) {
  if (CODE == INT4) {
    decode_int4<IS_RAW>(words[step], a);
  } else {
    decode_bytes(words[step], a[0], a[2]);
    decode_bytes(words[4 * (CODE_LOADS - 1) + step], a[1], a[3]);
  }
  if (OFFSET != ZERO) return;
#pragma unroll
  for (int i = 0; i < 4; i++) a[i] = fma_pair(a[i], both(IS_HALF ? 0x3c00 : 0x3f80), zeros[i % 2]);
}

// Add a stage's products of this warp's rows, and of its 128 columns of it, to `total`. begin: the stage's first chunk.
__device__ __forceinline__ void multiply_stage(
    const unsigned char* slot, u32 slot_address, int begin, float (&total)[TILES][TOKEN_TILES][4]) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, r = lane / 4;
  const int first_tile = warp % WARPS_N * TILES, first_chunk = warp / WARPS_N * 2;
  float partial[TILES][TOKEN_TILES][4], x_sums[TOKEN_TILES][4];
  u32 zeros[TILES][2];
  float scales[TILES][2], offsets[TILES][2];
  const u32 x_row = slot_address + lane % 8 * 128 + ((lane / 8 ^ lane % 8) << 4);
#pragma unroll
  for (int c = 0; c < 2; c++) {
    const int chunk = first_chunk + c;
    u32 words[TILES][4 * CODE_LOADS], x[TOKEN_TILES][8];
#pragma unroll
    for (int m = 0; m < TILES; m++)
#pragma unroll
      for (int i = 0; i < CODE_LOADS; i++) {
        const unsigned char* codes = slot + X_BYTES + (first_tile + m) * TILE_BYTES + chunk * CHUNK_BYTES;
        const uint4 v = *(const uint4*)(codes + i * 512 + 16 * lane);
        words[m][4 * i] = v.x, words[m][4 * i + 1] = v.y, words[m][4 * i + 2] = v.z, words[m][4 * i + 3] = v.w;
      }
#pragma unroll
    for (int i = 0; i < TOKEN_TILES; i++)
#pragma unroll
      for (int h = 0; h < 2; h++)
        load_matrices((x_row ^ h << 6) + (chunk * TOKENS + 8 * i) * 128, x[i][4 * h], x[i][4 * h + 1], x[i][4 * h + 2],
                      x[i][4 * h + 3]);
#pragma unroll
    for (int j = 0; j < 4; j++) {
      if (GROUP != 0 && (4 * c + j) % FOLD == 0) {
        const int group = GROUPS > 1                         ? chunk * GROUPS + j / (4 / GROUPS)
                          : GROUP_CHUNKS % STAGE_CHUNKS == 0 ? 0
                          : STAGE_CHUNKS % GROUP_CHUNKS == 0 ? chunk / GROUP_CHUNKS
                                                             : group_of(begin + chunk) - group_of(begin);
#pragma unroll
        for (int m = 0; m < TILES; m++) {
          const unsigned char* params = slot + X_BYTES + W_BYTES + (first_tile + m) * TILE_PARAM_BYTES;
          read_params(params + (group * 8 + r) * PARAM_BYTES, scales[m], offsets[m]);
#pragma unroll
          for (int h = 0; h < 2; h++)
            if (OFFSET == ZERO)
              zeros[m][h] = pair_of_floats(-(offsets[m][h] + BASE), -(offsets[m][h] + BASE));
            else if (HAS_X_SUMS)
              offsets[m][h] += BASE * scales[m][h];
        }
#pragma unroll
        for (int i = 0; i < TOKEN_TILES; i++)
#pragma unroll
          for (int e = 0; e < 4; e++) {
            x_sums[i][e] = 0.0f;
#pragma unroll
            for (int m = 0; m < TILES; m++) partial[m][i][e] = 0.0f;
          }
      }
#pragma unroll
      for (int m = 0; m < TILES; m++) {
        u32 a[4];
        decode(words[m], j, zeros[m], a);
#pragma unroll
        for (int i = 0; i < TOKEN_TILES; i++)
          multiply(GROUP == 0 ? total[m][i] : partial[m][i], a, x[i][2 * j], x[i][2 * j + 1]);
      }
      if (HAS_X_SUMS) {
        const u32 one = both(IS_HALF ? 0x3c00 : 0x3f80), ones[4] = {one, one, one, one};
#pragma unroll
        for (int i = 0; i < TOKEN_TILES; i++) multiply(x_sums[i], ones, x[i][2 * j], x[i][2 * j + 1]);
      }
      if (GROUP == 0 || (4 * c + j) % FOLD != FOLD - 1) continue;
#pragma unroll
      for (int m = 0; m < TILES; m++)
#pragma unroll
        for (int i = 0; i < TOKEN_TILES; i++)
#pragma unroll
          for (int e = 0; e < 4; e++) {
            total[m][i][e] += partial[m][i][e] * scales[m][e / 2];
            if (HAS_X_SUMS) total[m][i][e] -= x_sums[i][e % 2] * offsets[m][e / 2];
          }
    }
  }
}

// Write the outputs of a row block from `sums` [WARPS_K][TOKENS][PITCH].
__device__ __forceinline__ void finish(const Args& args, int row_block, const float* sums) {
  const int out_n = args.is_gated ? args.n / 2 : args.n, out_rows = args.is_gated ? ROWS / 2 : ROWS, pieces = out_rows / 8;
  for (int e = threadIdx.x; e < pieces * args.num_tokens; e += MULTIPLIERS) {
    const int token = e / pieces, place = 8 * (e - token * pieces), column = row_block * out_rows + place;
    if (column >= out_n) continue;
    const float x_scale = args.x_scale == nullptr ? 1.0f : args.x_scale[token];
    float y[8], other[8];
    auto take = [&](int row, int weight_row, float(&values)[8]) {
#pragma unroll
      for (int i = 0; i < 8; i++) values[i] = 0.0f;
#pragma unroll
      for (int w = 0; w < WARPS_K; w++)
#pragma unroll
        for (int h = 0; h < 2; h++) {
          const float4 f = *(const float4*)(sums + (w * TOKENS + token) * PITCH + row + 4 * h);
          values[4 * h] += f.x, values[4 * h + 1] += f.y, values[4 * h + 2] += f.z, values[4 * h + 3] += f.w;
        }
      scale_and_add_bias(args, weight_row, x_scale, values);
    };
    take(place, column, y);
    if (args.is_gated) {
      take(place + ROWS / 2, column + out_n, other);
#pragma unroll
      for (int i = 0; i < 8; i++) y[i] = activated(y[i], args.act) * other[i];
    }
    const u64 at = (u64)token * out_n + column;
    if (args.residual != nullptr) {
      read8(args.residual, at, false, other);
#pragma unroll
      for (int i = 0; i < 8; i++) y[i] += other[i];
    }
    if (args.is_out_float) {
      *(float4*)((float*)args.out + at) = make_float4(y[0], y[1], y[2], y[3]);
      *(float4*)((float*)args.out + at + 4) = make_float4(y[4], y[5], y[6], y[7]);
    } else {
      u32 words[4];
#pragma unroll
      for (int i = 0; i < 4; i++) words[i] = to_x(y[2 * i]) | (u32)to_x(y[2 * i + 1]) << 16;
      *(uint4*)((u16*)args.out + at) = make_uint4(words[0], words[1], words[2], words[3]);
    }
  }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    quantized_some(const __grid_constant__ Args args, const __grid_constant__ TensorMap x_map,
                   const __grid_constant__ TensorMap w_map, const __grid_constant__ TensorMap p_map) {
  extern __shared__ __align__(1024) unsigned char shared[];
  float* sums = (float*)(shared + STAGES * STAGE_BYTES);  // [WARPS_K][TOKENS][PITCH]
  const u32 ring = shared_address(shared), full = shared_address(sums + SUMS), empty = full + 8 * STAGES;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int block_tiles = args.is_gated ? BLOCK_TILES / 2 : BLOCK_TILES;  // of the output
  const int num_row_blocks = (args.n / (args.is_gated ? 2 : 1) + 16 * block_tiles - 1) / (16 * block_tiles);
  const int num_stages = (args.k + 64 * STAGE_CHUNKS - 1) / (64 * STAGE_CHUNKS);

  let_next_begin();
  if (threadIdx.x == 0) {
    for (int i = 0; i < STAGES; i++) init_barrier(full + 8 * i, 2), init_barrier(empty + 8 * i, WARPS);
    barriers_are_ready();
  }
  __syncthreads();

  int place = 0;
  u32 parity = 0;
  auto next = [&] {
    if (++place == STAGES) place = 0, parity ^= 1;
  };
  if (warp >= WARPS) {
    const bool has_codes = warp == WARPS;
    if (!has_codes) wait_for_input();
    if (lane == 0)
      for (int row_block = blockIdx.x; row_block < num_row_blocks; row_block += gridDim.x)
        for (int stage = 0; stage < num_stages; stage++, next()) {
          const int begin = stage * STAGE_CHUNKS, tile = row_block * block_tiles;
          const u32 to = ring + place * STAGE_BYTES, barrier = full + 8 * place;
          wait(empty + 8 * place, parity ^ 1);  // places are empty at first
          expect(barrier, has_codes ? W_BYTES + P_BYTES : X_BYTES);
          if (!has_codes) {
            load3(to, &x_map, 0, 0, begin, barrier);
            continue;
          }
          load4(to + X_BYTES, &w_map, 0, begin * CHUNK_BYTES / PIECE_BYTES, tile, 0, barrier);
          const u32 to_params = to + X_BYTES + W_BYTES;
          const int word = group_of(begin) * 8 * PARAM_BYTES / 4;
          if (P_BYTES && !PARAM_WORDS) load3(to_params, &p_map, word, tile, 0, barrier);
          if (P_BYTES && PARAM_WORDS) load4(to_params, &p_map, 0, word / (PARAM_WORDS ? PARAM_WORDS : 1), tile, 0, barrier);
        }
    return;
  }

  wait_for_input();
  for (int row_block = blockIdx.x; row_block < num_row_blocks; row_block += gridDim.x) {
    float total[TILES][TOKEN_TILES][4] = {};
#pragma unroll 1
    for (int stage = 0; stage < num_stages; stage++, next()) {
      wait(full + 8 * place, parity);
      multiply_stage(shared + place * STAGE_BYTES, ring + place * STAGE_BYTES, stage * STAGE_CHUNKS, total);
      __syncwarp();
      if (lane == 0) arrive(empty + 8 * place);
    }
    const int first_row = warp % WARPS_N * TILES * 16 + lane / 4, first_token = lane % 4 * 2;
#pragma unroll
    for (int m = 0; m < TILES; m++)
#pragma unroll
      for (int i = 0; i < TOKEN_TILES; i++)
#pragma unroll
        for (int e = 0; e < 4; e++) {
          const int row = first_row + 16 * m + e / 2 * 8, token = 8 * i + first_token + e % 2;
          sums[(warp / WARPS_N * TOKENS + token) * PITCH + row] = total[m][i][e];
        }
    sync_multipliers();
    finish(args, row_block, sums);
    sync_multipliers();  // sums have been read
  }
}
