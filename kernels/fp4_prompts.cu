// What `fp4_experts.cu` makes, of tiles of so many pairs that arithmetic takes longest: by the products of Hopper's whole
// warpgroups, 64 rows by 16 columns, whose one operand is decoded in registers, while the product before runs. The other,
// x, lies in shared memory with its columns in the order in which threads decode: see `permuted_triton`.
//
// A block has TOKENS pairs of one expert, and each of its WARPGROUPS 128 rows, 64 of gate and 64 of up, if ACT. Codes and
// inputs come through a ring of STAGES pieces of 128 columns. A sum runs over the columns in order.
//
// fp4_experts.py puts in front: TOKENS, WARPGROUPS, STAGES, BLOCKS (of a multiprocessor), ACT, of the instruction
// WGMMA_TYPE and its operands WGMMA_D, WGMMA_A, WGMMA_X, WGMMA_ADD, WGMMA_SUMS; hopper.cu and fp4_parts.cu.

constexpr int TILES = 2, WARPS = 4 * WARPGROUPS, THREADS = 32 * WARPS;
constexpr int CODE_BYTES = TILES * 16 * CHUNK / 2;  // of a warp and stage
constexpr int SLAB_BYTES = TOKENS * 128, X_BYTES = 2 * SLAB_BYTES;
constexpr int STAGE_BYTES = X_BYTES + WARPS * CODE_BYTES;
constexpr int ABREAST = ACT ? 1 : 2;
constexpr int X_COPIES = TOKENS * 16 / THREADS;  // of 16 bytes, of a thread and stage

// ---- instructions ----

// What threads have copied is seen by the tensor cores.
__device__ __forceinline__ void show_copies() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
__device__ __forceinline__ void keep(u32& word) { asm volatile("" : "+r"(word)::"memory"); }
__device__ __forceinline__ void keep(float& value) { asm volatile("" : "+f"(value)::"memory"); }
__device__ __forceinline__ void multiply(float (&d)[TOKENS / 2], const u32 (&a)[4], u64 x, bool add) {
  asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, " WGMMA_ADD ", 0;\n"
               "wgmma.mma_async.sync.aligned." WGMMA_TYPE " {" WGMMA_D "}, {" WGMMA_A "}, " WGMMA_X ", add, 1, 1, 0;\n}"
               : WGMMA_SUMS
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(x), "r"((int)add));
}

// ---- parts of the kernel ----

// Where an input of a row lies: `permuted_triton` of triton_experts.py says what lies where.
__device__ __forceinline__ int ordered(int k) {
  return k / 128 * 128 + k / 8 % 4 * 32 + k / 2 % 2 * 16 + k % 2 * 8 + k / 32 % 4 * 2 + k / 4 % 2;
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) fp4_prompts(const __grid_constant__ Args args) {
  extern __shared__ __align__(1024) unsigned char shared[];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, r = lane / 4, t = lane % 4;
  const int tile = blockIdx.x / args.num_blocks, block = blockIdx.x - tile * args.num_blocks;
  let_next_begin();
  wait_for_input();

  const auto [expert, first, num_pairs] = find_tile(args, tile, TOKENS);
  if (num_pairs == 0) return;

  const int num_chunks = (args.k + CHUNK - 1) / CHUNK, num_groups = args.k / 32;
  const u32 base = shared_address(shared);
  const int first_row = (block * WARPGROUPS + warp / 4) * ABREAST * 64 + warp % 4 * 16;
  const unsigned char* codes[TILES][2];  // of rows r and r + 8
  const u16* scales[TILES][2];
#pragma unroll
  for (int m = 0; m < TILES; m++) {
    const int start = first_row + m % ABREAST * 64, above = m >= ABREAST ? args.n : 0;
#pragma unroll
    for (int h = 0; h < 2; h++) {
      const u64 row = (u64)expert * args.rows + above + min(start + r + 8 * h, args.n - 1);
      codes[m][h] = args.codes + row * (args.k / 2) + 16 * t;
      scales[m][h] = args.scales + row * num_groups + t;
    }
  }
  const u16* x[X_COPIES];
#pragma unroll
  for (int i = 0; i < X_COPIES; i++) {
    const int pair = (threadIdx.x + i * THREADS) / 16;
    x[i] = nullptr;
    if (pair < num_pairs) x[i] = args.x + (u64)(args.order[first + pair] / args.per_input) * args.x_width + threadIdx.x % 16 * 8;
  }
  const int piece = threadIdx.x % 16, own_pair = threadIdx.x / 16;  // the pairs of a thread are THREADS / 16 apart, a multiple of 8
  const u32 x_place = base + piece / 8 * SLAB_BYTES + own_pair * 128 + ((piece % 8 ^ own_pair % 8) * 16);

  auto request = [&](int chunk) {
    if (chunk < num_chunks) {
      const u32 slot = base + chunk % STAGES * STAGE_BYTES, own = slot + X_BYTES + warp * CODE_BYTES;
      const int wanted = chunk * CHUNK + 32 * t < args.k ? 16 : 0;
#pragma unroll
      for (int m = 0; m < TILES; m++)
#pragma unroll
        for (int h = 0; h < 2; h++)
          copy(own + (2 * m + h) * 512 + 16 * lane, wanted ? codes[m][h] + chunk * (CHUNK / 2) : args.codes, wanted);
      const int wanted_x = 4 * min(4, num_groups - 4 * chunk);
#pragma unroll
      for (int i = 0; i < X_COPIES; i++)
        if (x[i] != nullptr) copy(x_place + chunk % STAGES * STAGE_BYTES + i * (THREADS / 16 * 128), x[i] + chunk * CHUNK, wanted_x);
    }
    commit();
  };
#pragma unroll
  for (int i = 0; i < STAGES - 2; i++) request(i);
  u16 next_scales[AHEAD][TILES][2];  // of chunks to come
#pragma unroll
  for (int i = 0; i < AHEAD; i++)
#pragma unroll
    for (int m = 0; m < TILES; m++)
#pragma unroll
      for (int h = 0; h < 2; h++) next_scales[i][m][h] = load(scales[m][h] + min(4 * i, num_groups - 1 - t));

  float sums[TILES][TOKENS / 2];
  u32 a[2][4][4];
  for (int chunk = 0; chunk < num_chunks; chunk++) {
    wait_group<STAGES - 3>();
    show_copies();
    __syncthreads();
    request(chunk + STAGES - 2);  // into the slot before the last one, with which all products have ended
    const int stage = chunk % STAGES;
    const unsigned char* own = shared + stage * STAGE_BYTES + X_BYTES + warp * CODE_BYTES;
    const u64 slab = descriptor(base + stage * STAGE_BYTES);
    u32 factors[TILES][2];
#pragma unroll
    for (int m = 0; m < TILES; m++)
#pragma unroll
      for (int h = 0; h < 2; h++) {
        factors[m][h] = scale_pair(next_scales[0][m][h]);
#pragma unroll
        for (int i = 0; i < AHEAD - 1; i++) next_scales[i][m][h] = next_scales[i + 1][m][h];
        next_scales[AHEAD - 1][m][h] = load(scales[m][h] + min(4 * (chunk + AHEAD), num_groups - 1 - t));
      }
#pragma unroll
    for (int half = 0; half < 2; half++)
#pragma unroll
      for (int m = 0; m < TILES; m++) {
        u32(&now)[4][4] = a[m];
        const uint2 low_words = *(const uint2*)(own + 2 * m * 512 + 16 * lane + 8 * half);
        const uint2 high_words = *(const uint2*)(own + (2 * m + 1) * 512 + 16 * lane + 8 * half);
        wait_for_products<1>();
#pragma unroll
        for (int i = 0; i < 16; i++) keep(now[i / 4][i % 4]);
#pragma unroll
        for (int j = 0; j < 2; j++) {
          u32 low[4], high[4];
          decode(j ? low_words.y : low_words.x, factors[m][0], low);
          decode(j ? high_words.y : high_words.x, factors[m][1], high);
          now[2 * j][0] = low[0], now[2 * j][1] = high[0], now[2 * j][2] = low[1], now[2 * j][3] = high[1];
          now[2 * j + 1][0] = low[2], now[2 * j + 1][1] = high[2], now[2 * j + 1][2] = low[3], now[2 * j + 1][3] = high[3];
        }
        begin_products();
#pragma unroll
        for (int j = 0; j < 4; j++)
          multiply(sums[m], now[j], slab + half * (SLAB_BYTES / 16) + 2 * j, chunk + half + j > 0);
        commit_products();
      }
  }
  wait_for_products<0>();
#pragma unroll
  for (int m = 0; m < TILES; m++)
#pragma unroll
    for (int i = 0; i < TOKENS / 2; i++) keep(sums[m][i]);

  const u64 own_rows = (u64)expert * args.rows;
#pragma unroll
  for (int m = 0; m < ABREAST; m++)
#pragma unroll
    for (int h = 0; h < 2; h++) {
      const int row = first_row + m * 64 + r + 8 * h;
      if (row >= args.n) continue;
      const int width = args.out_width ? args.out_width : args.n, place = args.out_width ? ordered(row) : row;
      float bias = 0.0f, up_bias = 0.0f;
      if (args.bias != nullptr) {
        bias = from_bf16(args.bias[own_rows + row]);
        if (ACT) up_bias = from_bf16(args.bias[own_rows + args.n + row]);
      }
#pragma unroll
      for (int i = 0; i < TOKENS / 4; i++) {
        const int pair = i / 2 * 8 + 2 * t + i % 2;
        if (pair >= num_pairs) continue;
        float y = sums[m][i / 2 * 4 + 2 * h + i % 2] * SCALE + bias;
        if (ACT) y = activated(y, sums[m + TILES - ABREAST][i / 2 * 4 + 2 * h + i % 2] * SCALE + up_bias);
        args.out[(u64)args.order[first + pair] * width + place] = to_bf16(y);
      }
    }
}
