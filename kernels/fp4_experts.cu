// Products of pairs of a token and an expert, sorted by expert, with weights in MXFP4 as they lie, [E rows, K], decoded in
// registers into the tensor cores' operand: 16 rows by 16 columns, whose other operand is 8 pairs. Which columns one
// product of that size takes is free as long as both operands agree: a thread has 32 consecutive inputs of each 128, which
// share a scale.
//
// A block has 8 TOKENS pairs of one expert, and each of its WARPS TILES * 16 rows: of gate and up half each, if ACT.
// Codes and inputs come through a ring of STAGES pieces of 128 columns. A sum runs over the columns in order.
//
// fp4_experts.py puts in front: TOKENS, TILES, WARPS, STAGES, ACT, and fp4_parts.cu.

constexpr int PAIRS = 8 * TOKENS, THREADS = 32 * WARPS;
constexpr int CODE_BYTES = TILES * 16 * CHUNK / 2;  // of a warp and stage
constexpr int X_BYTES = PAIRS * 2 * CHUNK;
constexpr int STAGE_BYTES = WARPS * CODE_BYTES + X_BYTES;
constexpr int ABREAST = ACT ? TILES / 2 : TILES;  // tiles of a warp with rows of their own
constexpr int X_COPIES = (PAIRS * 16 + THREADS - 1) / THREADS;  // of 16 bytes, of a thread and stage

// ---- instructions ----

__device__ __forceinline__ void multiply(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// ---- parts of the kernel ----

extern "C" __global__ void __launch_bounds__(THREADS) fp4_experts(const __grid_constant__ Args args) {
  extern __shared__ __align__(128) unsigned char shared[];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, r = lane / 4, t = lane % 4;
  const int tile = blockIdx.x / args.num_blocks, block = blockIdx.x - tile * args.num_blocks;
  let_next_begin();
  wait_for_input();

  const auto [expert, first, num_pairs] = find_tile(args, tile, PAIRS);
  if (num_pairs == 0) return;

  const int num_chunks = (args.k + CHUNK - 1) / CHUNK, num_groups = args.k / 32;
  const u32 base = shared_address(shared);
  const int first_row = (block * WARPS + warp) * ABREAST * 16;
  const unsigned char* codes[TILES][2];  // of rows r and r + 8
  const u16* scales[TILES][2];
#pragma unroll
  for (int m = 0; m < TILES; m++) {
    const int start = first_row + m % ABREAST * 16, above = m >= ABREAST ? args.n : 0;
#pragma unroll
    for (int h = 0; h < 2; h++) {
      const u64 row = (u64)expert * args.rows + above + min(start + r + 8 * h, args.n - 1);
      codes[m][h] = args.codes + row * (args.k / 2) + 16 * t;
      scales[m][h] = args.scales + row * num_groups + t;
    }
  }
  const u16* x[X_COPIES];
  u32 x_places[X_COPIES];
#pragma unroll
  for (int i = 0; i < X_COPIES; i++) {
    const int c = threadIdx.x + i * THREADS, pair = c / 16, own = c / 4 % 4, piece = c % 4;
    x[i] = nullptr;
    x_places[i] = base + WARPS * CODE_BYTES + pair * 2 * CHUNK + ((own * 64 + (piece ^ own) * 16) ^ (pair % 2 * 64));
    if (pair < num_pairs) x[i] = args.x + (u64)(args.order[first + pair] / args.per_input) * args.k + c % 16 * 8;
  }

  auto request = [&](int chunk) {
    if (chunk < num_chunks) {
      const u32 slot = base + chunk % STAGES * STAGE_BYTES, own = slot + warp * CODE_BYTES;
      const int wanted = chunk * CHUNK + 32 * t < args.k ? 16 : 0;
#pragma unroll
      for (int m = 0; m < TILES; m++)
#pragma unroll
        for (int h = 0; h < 2; h++)
          copy(own + (2 * m + h) * 512 + 16 * lane, wanted ? codes[m][h] + chunk * (CHUNK / 2) : args.codes, wanted);
#pragma unroll
      for (int i = 0; i < X_COPIES; i++) {
        const bool is_in = chunk * CHUNK + (threadIdx.x + i * THREADS) % 16 * 8 < args.k;
        if (x[i] != nullptr) copy(x_places[i] + chunk % STAGES * STAGE_BYTES, is_in ? x[i] + chunk * CHUNK : args.x, is_in ? 16 : 0);
      }
    }
    commit();
  };
#pragma unroll
  for (int i = 0; i < STAGES - 1; i++) request(i);

  u16 next_scales[AHEAD][TILES][2];  // of chunks to come
#pragma unroll
  for (int i = 0; i < AHEAD; i++)
#pragma unroll
    for (int m = 0; m < TILES; m++)
#pragma unroll
      for (int h = 0; h < 2; h++) next_scales[i][m][h] = load(scales[m][h] + min(4 * i, num_groups - 1 - t));

  float sums[TILES][TOKENS][4] = {};
  for (int chunk = 0; chunk < num_chunks; chunk++) {
    wait_group<STAGES - 2>();
    __syncthreads();
    request(chunk + STAGES - 1);  // into the slot before this one, which all have used
    const unsigned char* slot = shared + chunk % STAGES * STAGE_BYTES;
    const unsigned char* own = slot + warp * CODE_BYTES;
    u32 words[TILES][2][4], factors[TILES][2];
#pragma unroll
    for (int m = 0; m < TILES; m++)
#pragma unroll
      for (int h = 0; h < 2; h++) {
        const uint4 v = *(const uint4*)(own + (2 * m + h) * 512 + 16 * lane);
        words[m][h][0] = v.x, words[m][h][1] = v.y, words[m][h][2] = v.z, words[m][h][3] = v.w;
        factors[m][h] = scale_pair(next_scales[0][m][h]);
#pragma unroll
        for (int i = 0; i < AHEAD - 1; i++) next_scales[i][m][h] = next_scales[i + 1][m][h];
        next_scales[AHEAD - 1][m][h] = load(scales[m][h] + min(4 * (chunk + AHEAD), num_groups - 1 - t));
      }
#pragma unroll
    for (int j = 0; j < 4; j++) {
      u32 b[TOKENS][4];
#pragma unroll
      for (int i = 0; i < TOKENS; i++) {
        const int pair = 8 * i + r;
        const uint4 v = *(const uint4*)(slot + WARPS * CODE_BYTES + pair * 2 * CHUNK + ((t * 64 + (j ^ t) * 16) ^ (r % 2 * 64)));
        b[i][0] = bytes_of(v.x, v.z, 0x5410u), b[i][1] = bytes_of(v.x, v.z, 0x7632u);
        b[i][2] = bytes_of(v.y, v.w, 0x5410u), b[i][3] = bytes_of(v.y, v.w, 0x7632u);
      }
#pragma unroll
      for (int m = 0; m < TILES; m++) {
        u32 low[4], high[4];
        decode(words[m][0][j], factors[m][0], low);
        decode(words[m][1][j], factors[m][1], high);
        const u32 a[4] = {low[0], high[0], low[1], high[1]}, a_next[4] = {low[2], high[2], low[3], high[3]};
#pragma unroll
        for (int i = 0; i < TOKENS; i++) multiply(sums[m][i], a, b[i][0], b[i][1]);
#pragma unroll
        for (int i = 0; i < TOKENS; i++) multiply(sums[m][i], a_next, b[i][2], b[i][3]);
      }
    }
  }

  const u64 own_rows = (u64)expert * args.rows;
#pragma unroll
  for (int i = 0; i < TOKENS; i++)
#pragma unroll
    for (int c = 0; c < 2; c++) {
      const int pair = 8 * i + 2 * t + c;
      if (pair >= num_pairs) continue;
      u16* out = args.out + (u64)args.order[first + pair] * args.n;
#pragma unroll
      for (int m = 0; m < ABREAST; m++)
#pragma unroll
        for (int h = 0; h < 2; h++) {
          const int row = first_row + m * 16 + r + 8 * h;
          if (row >= args.n) continue;
          float y = sums[m][i][2 * h + c] * SCALE;
          if (args.bias != nullptr) y += from_bf16(args.bias[own_rows + row]);
          if (ACT) {
            float up = sums[m + TILES - ABREAST][i][2 * h + c] * SCALE;
            if (args.bias != nullptr) up += from_bf16(args.bias[own_rows + args.n + row]);
            y = activated(y, up);
          }
          out[row] = to_bf16(y);
        }
    }
}
