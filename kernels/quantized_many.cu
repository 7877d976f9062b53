// out = residual + act(x W^T + bias) of 9 or more tokens x [T, K] and a weight of few bits, on Hopper.
//
// The tensor cores' tile is 64 rows of the weight, its transpose's columns are TOKENS tokens: so codes can be decoded in
// registers, which one of the instruction's operands may be in, and are never written anywhere. Codes that inputs of 8
// bits are multiplied with as they are (IS_DIRECT) come from shared memory, as the inputs do.
//
// One thread loads: the tensor memory accelerator copies x, codes, scales and offsets of a stage, the weight's before the
// kernel ahead has ended. WARPGROUPS others multiply, 64 rows each; with an activation, every second has the rows of up
// that belong to the gate's of the one before. A weight's columns may be shared out to `split` blocks (a cluster, which
// adds up through its shared memory, always in the same order).
//
// quantized_many.py puts in front, besides what quantized_few.cu has, hopper.cu and: TOKENS, WARPGROUPS, STAGES, IS_DIRECT, IS_INTEGER
// (sums are integers), and of the instruction WGMMA_TYPE and its operands WGMMA_D, WGMMA_A, WGMMA_X, WGMMA_ADD, WGMMA_SUMS.

constexpr bool HAS_MANY_SUMS = WARPGROUPS == 2 && TOKENS >= 128;  // multipliers need more than a third of all registers
constexpr int MULTIPLIERS = 128 * WARPGROUPS, THREADS = MULTIPLIERS + (HAS_MANY_SUMS ? 128 : 32);
constexpr int DEPTH = IS_DIRECT ? 128 : CHUNK;  // columns of a stage: 128 bytes of x, the width of the swizzle
constexpr int STEPS = 4;                        // instructions of a stage
constexpr int X_BYTES = TOKENS * 128;
constexpr int W_BYTES = IS_DIRECT ? 64 * DEPTH : 4 * CODE_LOADS * 512;  // of a warpgroup
constexpr bool IS_BLOCKS = IS_DIRECT && X_GROUP != 0;  // sums of DEPTH columns are scaled, then added
constexpr int P_BYTES = IS_BLOCKS ? 64 * 4 : IS_DIRECT ? 0 : 4 * GROUPS * 8 * PARAM_BYTES;  // of scales, or with offsets
constexpr int S_BYTES = IS_BLOCKS ? TOKENS * 4 : 0;                                           // of the inputs' scales
constexpr int LOAD_BYTES = X_BYTES + WARPGROUPS * (W_BYTES + P_BYTES) + S_BYTES;
constexpr int STAGE_BYTES = (LOAD_BYTES + 1023) / 1024 * 1024;
constexpr int ROWS = 64 * WARPGROUPS, PITCH = ROWS + 4;  // of sums
constexpr int SUMS_BYTES = TOKENS * PITCH * 4;
constexpr int RING_BYTES = STAGES * STAGE_BYTES > SUMS_BYTES ? STAGES * STAGE_BYTES : SUMS_BYTES;
#if IS_INTEGER
typedef int SUM;
#else
typedef float SUM;
#endif

// ---- instructions ----

__device__ __forceinline__ void take_registers() {
  if (HAS_MANY_SUMS) asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
}
__device__ __forceinline__ void leave_registers() {
  if (HAS_MANY_SUMS) asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
}
__device__ __forceinline__ void sync_multipliers() { asm volatile("bar.sync 1, %0;" ::"n"(MULTIPLIERS) : "memory"); }
// Not to be read or changed any earlier.
__device__ __forceinline__ void keep(u32& word) { asm volatile("" : "+r"(word)::"memory"); }
__device__ __forceinline__ void keep(float& value) { asm volatile("" : "+f"(value)::"memory"); }
__device__ __forceinline__ void keep(int& value) { asm volatile("" : "+r"(value)::"memory"); }
// d (+)= rows of the weight times tokens. A thread's d[4 g ...] are tokens 8 g + 2 t and the next one, of its warp's row
// r, then of row r + 8.
#if IS_DIRECT
__device__ __forceinline__ void multiply(SUM (&d)[TOKENS / 2], u64 a, u64 x, bool add) {
  asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, " WGMMA_ADD ", 0;\n"
               "wgmma.mma_async.sync.aligned." WGMMA_TYPE " {" WGMMA_D "}, " WGMMA_A ", " WGMMA_X ", add" WGMMA_END ";\n}"
               : WGMMA_SUMS
               : "l"(a), "l"(x), "r"((int)add));
}
#else
__device__ __forceinline__ void multiply(SUM (&d)[TOKENS / 2], const u32 (&a)[4], u64 x, bool add) {
  asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, " WGMMA_ADD ", 0;\n"
               "wgmma.mma_async.sync.aligned." WGMMA_TYPE " {" WGMMA_D "}, {" WGMMA_A "}, " WGMMA_X ", add" WGMMA_END ";\n}"
               : WGMMA_SUMS
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(x), "r"((int)add));
}
#endif
__device__ __forceinline__ uint4 load_shared(u32 address) {
  uint4 v;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(address) : "memory");
  return v;
}
__device__ __forceinline__ void store_shared(u32 address, float value) {
  asm volatile("st.shared.f32 [%0], %1;" ::"r"(address), "f"(value) : "memory");
}
__device__ __forceinline__ float4 load_sums(u32 address, u32 rank, int split) {
  float4 f;
  if (split > 1)
    asm volatile("{\n.reg .b32 there;\nmapa.shared::cluster.u32 there, %4, %5;\n"
                 "ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [there];\n}"
                 : "=f"(f.x), "=f"(f.y), "=f"(f.z), "=f"(f.w) : "r"(address), "r"(rank) : "memory");
  else
    asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(f.x), "=f"(f.y), "=f"(f.z), "=f"(f.w) : "r"(address) : "memory");
  return f;
}

// ---- parts of the kernel ----

constexpr bool IS_RAW = IS_PLAIN && OFFSET != NO_OFFSET;
constexpr int BASE = IS_RAW ? RAW : 0;

// Decode a stage's codes of this warp's 16 rows to what the tensor cores take: 16 columns each step.
__device__ __forceinline__ void decode(const unsigned char* codes, const unsigned char* params, u32 (&a)[STEPS][4]) {
  const int lane = threadIdx.x % 32, r = lane / 4;
  const u32 ones = both(IS_HALF ? 0x3c00 : 0x3f80), no = 0x80008000u;
  u32 words[4 * CODE_LOADS];
#pragma unroll
  for (int i = 0; i < CODE_LOADS; i++) {
    const uint4 v = *(const uint4*)(codes + 512 * i + 16 * lane);
    words[4 * i] = v.x, words[4 * i + 1] = v.y, words[4 * i + 2] = v.z, words[4 * i + 3] = v.w;
  }
  u32 scales[2], offsets[2];
#pragma unroll
  for (int j = 0; j < STEPS; j++) {
    if (CODE == INT4) {
      decode_int4<IS_RAW>(words[j], a[j]);
    } else {
      decode_bytes(words[j], a[j][0], a[j][2]);
      decode_bytes(words[4 * (CODE_LOADS - 1) + j], a[j][1], a[j][3]);
    }
    if (GROUP == 0) continue;
    if (j % (STEPS / GROUPS) == 0) {
      const PARAM* p = (const PARAM*)(params + (j / (STEPS / GROUPS) * 8 + r) * PARAM_BYTES);
#pragma unroll
      for (int h = 0; h < 2; h++) {
        const float offset = OFFSET == NO_OFFSET ? 0.0f : param(p + 2 + h);
        scales[h] = pair_of_floats(param(p + h), param(p + h));
        offsets[h] = pair_of_floats(OFFSET == ZERO ? -(offset + BASE) : -offset, OFFSET == ZERO ? -(offset + BASE) : -offset);
      }
    }
#pragma unroll
    for (int i = 0; i < 4; i++) {
      if (OFFSET == ZERO) a[j][i] = fma_pair(a[j][i], ones, offsets[i % 2]);
      if (OFFSET == MINIMUM && BASE) a[j][i] = fma_pair(a[j][i], ones, both(IS_HALF ? 0xe400 : 0xc300));
      a[j][i] = fma_pair(a[j][i], scales[i % 2], OFFSET == MINIMUM ? offsets[i % 2] : no);
    }
  }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    quantized_many(const __grid_constant__ Args args, const __grid_constant__ TensorMap x_map,
                   const __grid_constant__ TensorMap w_map, const __grid_constant__ TensorMap p_map,
                   const __grid_constant__ TensorMap s_map) {
  extern __shared__ __align__(1024) unsigned char shared[];
  const u32 ring = shared_address(shared), full = ring + RING_BYTES, empty = full + 8 * STAGES;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, split = args.split;
  const int rank = cluster_rank(), id = blockIdx.x / split;
  const int num_token_tiles = (args.num_tokens + TOKENS - 1) / TOKENS;
  const int first_token = id % num_token_tiles * TOKENS, row_block = id / num_token_tiles;
  const int out_n = args.is_gated ? args.n / 2 : args.n, out_rows = args.is_gated ? ROWS / 2 : ROWS;
  const int num_pieces = (args.k + DEPTH - 1) / DEPTH;
  const int begin = rank * num_pieces / split, num = (rank + 1) * num_pieces / split - begin;

  let_next_begin();
  if (threadIdx.x == 0) {
    for (int i = 0; i < STAGES; i++) init_barrier(full + 8 * i, 1), init_barrier(empty + 8 * i, 4 * WARPGROUPS);
    barriers_are_ready();
  }
  __syncthreads();

  if (threadIdx.x >= MULTIPLIERS) {
    leave_registers();
    if (threadIdx.x == MULTIPLIERS) {
      const u64 policy = cache_policy(num_token_tiles == 1);
      auto load_weight = [&](int i, int stage) {
        expect(full + 8 * stage, LOAD_BYTES);
        const u32 to = ring + stage * STAGE_BYTES + X_BYTES;
#pragma unroll
        for (int w = 0; w < WARPGROUPS; w++) {
          const int tile = args.is_gated ? row_block * (2 * WARPGROUPS) + w / 2 * 4 + w % 2 * (out_n / 16)
                                         : row_block * (4 * WARPGROUPS) + 4 * w;
          const int piece = begin + i;
          if (IS_DIRECT)
            load_by_policy(to + w * W_BYTES, &w_map, piece * DEPTH, 16 * tile, full + 8 * stage, policy);
          else
            load_by_policy(to + w * W_BYTES, &w_map, piece * (CODE_LOADS * 128), tile, full + 8 * stage, policy);
          if (IS_BLOCKS)
            load(to + WARPGROUPS * W_BYTES + w * P_BYTES, &p_map, 16 * tile, piece, full + 8 * stage);
          else if (P_BYTES)
            load(to + WARPGROUPS * W_BYTES + w * P_BYTES, &p_map,
                 (GROUP < CHUNK ? piece * GROUPS : piece / GROUP_CHUNKS) * 8 * (PARAM_BYTES / (int)sizeof(PARAM)), tile,
                 full + 8 * stage);
        }
      };
      auto load_x = [&](int i, int stage) {
        const u32 to = ring + stage * STAGE_BYTES;
        load(to, &x_map, (begin + i) * DEPTH, first_token, full + 8 * stage);
        if (IS_BLOCKS)
          load(to + LOAD_BYTES - S_BYTES, &s_map, first_token, begin + i, full + 8 * stage);
      };
      const int ahead = min(STAGES, num);
      for (int i = 0; i < ahead; i++) load_weight(i, i);
      wait_for_input();
      for (int i = 0; i < ahead; i++) load_x(i, i);
      u32 parity = 0;
      for (int i = ahead, stage = 0; i < num; i++) {
        wait(empty + 8 * stage, parity);
        load_weight(i, stage);
        load_x(i, stage);
        if (++stage == STAGES) stage = 0, parity ^= 1;
      }
    }
    __syncwarp();
    if (split > 1) {
      sync_cluster(split);
      sync_cluster(split);
    }
  } else {
    take_registers();
    wait_for_input();
    SUM d[TOKENS / 2];
    const int warpgroup = warp / 4;
    int stage = 0, before = 0;
    u32 parity = 0;
    auto next = [&] {
      before = stage;
      if (++stage == STAGES) stage = 0, parity ^= 1;
    };
#if IS_DIRECT && X_GROUP
    const int place = 16 * warp + lane / 4, t2 = lane % 4 * 2;
#pragma unroll
    for (int i = 0; i < TOKENS / 2; i++) d[i] = 0;
    for (int i = 0; i < num; i++) {
      wait(full + 8 * stage, parity);
      const u32 slot = ring + stage * STAGE_BYTES;
      const u64 x = descriptor(slot), w = descriptor(slot + X_BYTES + warpgroup * W_BYTES);
      SUM sums[TOKENS / 2];
      begin_products();
#pragma unroll
      for (int j = 0; j < STEPS; j++) multiply(sums, w + 2 * j, x + 2 * j, j > 0);
      commit_products();
      const float* scales = (const float*)(shared + stage * STAGE_BYTES + X_BYTES + WARPGROUPS * W_BYTES);
      const float scale[2] = {scales[place], scales[place + 8]};
      float x_scales[TOKENS / 4];
#pragma unroll
      for (int g = 0; g < TOKENS / 8; g++) {
        const float2 pair = *(const float2*)(scales + ROWS + 8 * g + t2);
        x_scales[2 * g] = pair.x, x_scales[2 * g + 1] = pair.y;
      }
      wait_for_products<0>();
#pragma unroll
      for (int j = 0; j < TOKENS / 2; j++) keep(sums[j]);
      if (lane == 0) arrive(empty + 8 * stage);
#pragma unroll
      for (int j = 0; j < TOKENS / 2; j++) d[j] += sums[j] * x_scales[j / 4 * 2 + j % 2] * scale[j % 4 / 2];
      next();
    }
#elif IS_DIRECT
    for (int i = 0; i < num; i++) {
      wait(full + 8 * stage, parity);
      const u32 slot = ring + stage * STAGE_BYTES;
      const u64 x = descriptor(slot), w = descriptor(slot + X_BYTES + warpgroup * W_BYTES);
      begin_products();
#pragma unroll
      for (int j = 0; j < STEPS; j++) multiply(d, w + 2 * j, x + 2 * j, i + j > 0);
      commit_products();
      if (i > 0) {
        wait_for_products<1>();
        if (lane == 0) arrive(empty + 8 * before);
      }
      next();
    }
#else
    u32 a[2][STEPS][4];
    auto decode_stage = [&](u32(&to)[STEPS][4]) {
      wait(full + 8 * stage, parity);
      const unsigned char* weight = shared + stage * STAGE_BYTES + X_BYTES;
      decode(weight + warp * (CODE_LOADS * 512), weight + WARPGROUPS * W_BYTES + warp * (P_BYTES / 4), to);
    };
    auto step = [&](int i, u32(&now)[STEPS][4], u32(&then)[STEPS][4]) {
      const u64 x = descriptor(ring + stage * STAGE_BYTES);
      begin_products();
#pragma unroll
      for (int j = 0; j < STEPS; j++) multiply(d, now[j], x + 2 * j, i + j > 0);
      commit_products();
      if (i > 0) {
        wait_for_products<1>();
#pragma unroll
        for (int j = 0; j < 4 * STEPS; j++) keep(then[j / 4][j % 4]);
        if (lane == 0) arrive(empty + 8 * before);
      }
      next();
      if (i + 1 < num) decode_stage(then);
    };
    decode_stage(a[0]);
    for (int i = 0; i < num; i += 2) {
      step(i, a[0], a[1]);
      if (i + 1 < num) step(i + 1, a[1], a[0]);
    }
#endif
    wait_for_products<0>();
#pragma unroll
    for (int i = 0; i < TOKENS / 2; i++) keep(d[i]);

    sync_multipliers();  // all have read the ring, where the sums go
    const int r = lane / 4, t = lane % 4;
#pragma unroll
    for (int i = 0; i < TOKENS / 2; i++) {
      const int row = 16 * warp + r + i % 4 / 2 * 8, token = i / 4 * 8 + 2 * t + i % 2;
      store_shared(ring + 4 * (token * PITCH + row), (float)d[i]);
    }
    if (split > 1)
      sync_cluster(split);
    else
      sync_multipliers();

    const int pieces = out_rows / 8, num_tokens = min(TOKENS, args.num_tokens - first_token);
    for (int e = rank * MULTIPLIERS + threadIdx.x; e < pieces * num_tokens; e += split * MULTIPLIERS) {
      const int token = e / pieces, place = 8 * (e - token * pieces), column = row_block * out_rows + place;
      if (column >= out_n) continue;
      float x_scale = 1.0f, y[8], other[8];
      if (ROUND != NO_ROUND && !IS_BLOCKS) x_scale = args.x_scale[first_token + token];
      auto finish = [&](int row, int weight_row, float(&values)[8]) {
#pragma unroll
        for (int i = 0; i < 8; i++) values[i] = 0.0f;
        for (int s = 0; s < split; s++)
#pragma unroll
          for (int h = 0; h < 2; h++) {
            const float4 f = load_sums(ring + 4 * (token * PITCH + row + 4 * h), s, split);
            values[4 * h] += f.x, values[4 * h + 1] += f.y, values[4 * h + 2] += f.z, values[4 * h + 3] += f.w;
          }
        scale_and_add_bias(args, weight_row, x_scale, values);
      };
      if (args.is_gated) {
        const int gate = place / 64 * 128 + place % 64;
        finish(gate, column, y);
        finish(gate + 64, column + out_n, other);
#pragma unroll
        for (int i = 0; i < 8; i++) y[i] = activated(y[i], args.act) * other[i];
      } else {
        finish(place, column, y);
      }
      const u64 at = (u64)(first_token + token) * out_n + column;
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
    if (split > 1) sync_cluster(split);  // until others have read this block's sums
  }
}
