// What `quantized_chain.cu` does for products of one kind: each kind of a chain has this in a namespace of its own.
//
// A stage of the ring has 16 * TILES rows and, of each, PIECE chunks of columns for each warp.
//
// Codes of 8 bits that lie row by row are multiplied as they are (IS_DIRECT): a stage of them is one copy of the tensor
// memory accelerator's, 2 * PIECE chunks of 128 columns, and a warpgroup's. Of its instruction's 64 rows 32 are a chunk's
// and 32 the next one's; the inputs of the one and of the other are the first two of its 8 columns.

constexpr int UNIT = IS_DIRECT ? 128 : CHUNK;          // columns of a chunk
constexpr int PARTS = IS_DIRECT ? WARPS / 2 : WARPS;   // that have sums of their own
constexpr int STAGE_CHUNKS = (IS_DIRECT ? 2 : WARPS) * PIECE;
constexpr int TAKERS = IS_DIRECT ? 4 : WARPS;          // warps that take a stage
constexpr int TILE_BYTES = STAGE_CHUNKS * (IS_DIRECT ? 16 * UNIT : CODE_LOADS * 512);
constexpr int STAGE_GROUPS = GROUP == 0  ? 0
                             : GROUPS > 1 ? STAGE_CHUNKS * GROUPS
                                          : STAGE_CHUNKS / GROUP_CHUNKS + (STAGE_CHUNKS % GROUP_CHUNKS ? 2 : 0);
constexpr int GROUP_BYTES = 8 * PARAM_BYTES, TILE_PARAM_BYTES = STAGE_GROUPS * GROUP_BYTES;
constexpr int STAGE_BYTES = TILES * (TILE_BYTES + TILE_PARAM_BYTES);
constexpr int ROWS = TILES * 16, PITCH = ROWS + 4;  // of partial sums
constexpr int SUMS = PARTS * PITCH;
constexpr int RESIDUALS = HELD_RESIDUALS < THREADS ? HELD_RESIDUALS : THREADS;
constexpr int SCALES = HELD_SCALES / THREADS;  // of a thread
constexpr int STAGE = STAGE_CHUNKS * UNIT;     // columns

// A pair of chunks has the instruction's 64 rows. A place in the ring is the same warpgroup's each time: another one might
// look for its codes before those ahead have come, as copies need not end in their order.
static_assert(!IS_DIRECT || (TILES == 2 && STAGES % (WARPS / 4) == 0), "how codes row by row are cut");
static_assert(STAGE_BYTES <= SLOT_BYTES && HELD_SCALES <= MOST_HELD_SCALES && GROUPS <= MOST_GROUPS, "room in shared memory");

#if IS_INTEGER
typedef int SUM;
#else
typedef float SUM;
#endif

// ---- more instructions ----

__device__ __forceinline__ void copy_bulk(u32 to, const void* from, int bytes, u32 barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to),
               "l"(from), "r"(bytes), "r"(barrier)
               : "memory");
}
// Returns how many blocks will have arrived when all have of this turn.
__device__ __forceinline__ u64 arrive_at_product(u64* arrivals) {
  u64 before;
  asm volatile("fence.acq_rel.gpu;\natom.add.acq_rel.gpu.global.u64 %0, [%1], 1;"
               : "=l"(before)
               : "l"(arrivals)
               : "memory");
  return (before / gridDim.x + 1) * gridDim.x;
}
__device__ __forceinline__ void wait_for_arrivals(const u64* arrivals, u64 number) {
  u64 now;
  do
    asm volatile("ld.acquire.gpu.global.u64 %0, [%1];" : "=l"(now) : "l"(arrivals) : "memory");
  while (now < number);
}
// Have the accelerator copy the rows of a block: a half of them, and the other one or those of up, from a chunk on.
__device__ __forceinline__ void load_rows(u32 to, const TensorMap* map, int row, int chunk, u32 barrier) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes"
      " [%0], [%1, {%2, %3, %2, %4}], [%5];" ::"r"(to),
      "l"(map), "r"(0), "r"(row), "r"(chunk), "r"(barrier)
      : "memory");
}
#if IS_DIRECT
// d (+)= rows times inputs, of 32 columns.
__device__ __forceinline__ void multiply(SUM (&d)[4], u64 rows, u64 inputs, bool add) {
#if IS_INTEGER
  asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, %6, 0;\n"
               "wgmma.mma_async.sync.aligned.m64n8k32.s32.s8.s8 {%0, %1, %2, %3}, %4, %5, add;\n}"
               : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3]) : "l"(rows), "l"(inputs), "r"((int)add));
#else
  asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, %6, 0;\n"
               "wgmma.mma_async.sync.aligned.m64n8k32.f32.e4m3.e4m3 {%0, %1, %2, %3}, %4, %5, add, 1, 1;\n}"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "l"(rows), "l"(inputs), "r"((int)add));
#endif
}
#endif
// What the instruction wants to know of inputs as `put_codes` has put them: where its next 16 rows of them are, 32 bytes
// on. What it reads as columns behind the first two are other inputs.
__device__ __forceinline__ u64 inputs_at(u32 address) { return (u64)(address >> 4) | (u64)(32 >> 4) << 16 | (u64)8 << 32; }
// Have what threads wrote into shared memory be seen by the instruction.
__device__ __forceinline__ void show_inputs() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
__device__ __forceinline__ void keep(float& value) { asm volatile("" : "+f"(value)::"memory"); }
__device__ __forceinline__ void keep(int& value) { asm volatile("" : "+r"(value)::"memory"); }

// ---- parts of a chain's kernel ----

// How a product's rows are cut.
struct Cut {
  int tiles_abreast, out_n, out_rows, num_blocks, first_block, num_chunks, num_stages;

  __device__ __forceinline__ Cut(const Args& args) {
    tiles_abreast = args.is_gated ? TILES / 2 : TILES;  // of gate, if there is one
    out_n = args.is_gated ? args.n / 2 : args.n;
    out_rows = tiles_abreast * 16;
    num_blocks = (out_n + out_rows - 1) / out_rows;
    const int block = (int)blockIdx.x - args.first;
    first_block = block < 0 ? block + (int)gridDim.x : block;
    num_chunks = args.k / UNIT;
    num_stages = (num_chunks + STAGE_CHUNKS - 1) / STAGE_CHUNKS;
  }
};

__device__ __forceinline__ int group_of(int chunk) { return GROUPS > 1 ? chunk * GROUPS : chunk / GROUP_CHUNKS; }  // the first

// One warp's: have a product's codes and scales copied, a stage when its place in the ring is empty.
__device__ __forceinline__ void fill_ring(
    const Args& args, const TensorMap& map, u32 full, u32 empty, u32 ring, int& slot, u32& parity) {
  const int lane = threadIdx.x % 32;
  const Cut cut(args);
#pragma unroll 1
  for (int block = cut.first_block; block < cut.num_blocks; block += gridDim.x)
#pragma unroll 1
    for (int stage = 0; stage < cut.num_stages; stage++) {
      const int begin = stage * STAGE_CHUNKS, end = min(begin + STAGE_CHUNKS, cut.num_chunks);
      const int first_group = group_of(begin);
      const int num_groups = GROUP == 0 ? 0 : group_of(end - 1) + GROUPS - first_group;
      const int code_bytes = IS_DIRECT ? TILE_BYTES : (end - begin) * (CODE_LOADS * 512);  // of a tile
      const u32 to = ring + slot * SLOT_BYTES, barrier = full + 8 * slot;
      wait(empty + 8 * slot, parity);
      if (lane == 0) expect(barrier, TILES * (code_bytes + num_groups * GROUP_BYTES));
      __syncwarp();
      auto tile_of = [&](int m) {
        const bool is_up = m >= cut.tiles_abreast;
        const int tile = block * cut.tiles_abreast + (is_up ? m - cut.tiles_abreast + cut.out_n / 16 : m);
        return min(tile, (args.n + 15) / 16 - 1);
      };
      if (IS_DIRECT) {
        if (lane == 0) load_rows(to, &map, block * cut.out_rows, begin, barrier);
      } else if (lane < TILES) {
        copy_bulk(to + lane * TILE_BYTES,
                  (const unsigned char*)args.codes + ((u64)tile_of(lane) * cut.num_chunks + begin) * (CODE_LOADS * 512),
                  code_bytes, barrier);
      }
      if (GROUP != 0 && lane >= 32 - TILES) {
        const int m = lane - (32 - TILES);
        copy_bulk(to + TILES * TILE_BYTES + m * TILE_PARAM_BYTES,
                  (const unsigned char*)args.params + ((u64)tile_of(m) * args.num_groups + first_group) * GROUP_BYTES,
                  num_groups * GROUP_BYTES, barrier);
      }
      if (++slot == STAGES) slot = 0, parity ^= 1;
    }
}

// Compute a block's rows of a product.
__device__ __forceinline__ void multiply_rows(
    const Args& args, bool is_first, unsigned char* shared, int x_stride, u64 awaited, int& place, u32& parity, u32& num_stages) {
  float* scratch = (float*)shared;                            // [32]
  unsigned char* rings = shared + RING_AT;                    // [STAGES][SLOT_BYTES]
  float* own_sums = (float*)(rings + STAGES * SLOT_BYTES);    // [2][SUMS]
  u16* x = (u16*)(own_sums + 2 * SUMS);                       // [x_stride], which the longest inputs need
  const int most_k = x_stride - 8;
  const int x_bytes = IS_DIRECT ? (most_k + STAGE - 1) / STAGE * STAGE + 128 : 2 * x_stride;
  float* x_scales = (float*)((unsigned char*)x + x_bytes);    // [1] or [K / PART][2] of digits
  float* held_scales = x_scales + (HAS_DIGITS ? 2 * MOST_GROUPS * (most_k / CHUNK) : 1);
  u16* held_residuals = (u16*)(held_scales + MOST_HELD_SCALES);
  const u32 full = shared_address(shared) + 128, empty = full + 8 * STAGES;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, r = lane / 4, t = lane % 4;
  const u32 warpgroup = __shfl_sync(~0u, (u32)threadIdx.x / 128, 0);  // a warp goes one way
  const Cut cut(args);
  const int out_n = cut.out_n, out_rows = cut.out_rows;
  float scales[SCALES + 1];  // in the order of sums, turn by turn
#pragma unroll
  for (int i = 0; i < SCALES; i++) {
    const int at = threadIdx.x + i * THREADS, m = at % ROWS / 16, block = cut.first_block + at / ROWS * gridDim.x;
    const int row = 16 * (block * cut.tiles_abreast + m % cut.tiles_abreast) + at % 16 + (m >= cut.tiles_abreast ? out_n : 0);
    scales[i] = block < cut.num_blocks && row < args.n ? args.scale[row] : 0.0f;
  }
  u16 residual = 0;
  auto wait_for_x = [&] {
    if (is_first) {
      wait_for_input();
    } else {
      if (threadIdx.x == 0) wait_for_arrivals(args.arrivals, awaited);
      sync_warps();
    }
    const int i = threadIdx.x, column = (cut.first_block + i / out_rows * (int)gridDim.x) * out_rows + i % out_rows;
    if (args.residual != nullptr && i < RESIDUALS && column < out_n)
      residual = load_fresh_half((const u16*)args.residual + column);
  };
  const bool is_held = !args.is_norm_float && args.k <= (args.norm != nullptr ? NORMED : HELD) * 8 * THREADS;
  if (is_held) {
    hold_one(args, 0, args.k, x, x_scales, scratch, wait_for_x);
  } else {
    wait_for_x();
    stage_one(args, 0, args.k, x, x_scales, scratch);
  }
#pragma unroll
  for (int i = 0; i < SCALES; i++) held_scales[threadIdx.x + i * THREADS] = scales[i];
  if (args.residual != nullptr && threadIdx.x < RESIDUALS) held_residuals[threadIdx.x] = residual;
#if IS_DIRECT
  const float zeros[8] = {};  // beside what is copied past the end of rows, zeros too
  for (int k = args.k + 8 * threadIdx.x; k < cut.num_stages * STAGE; k += 8 * THREADS) put_codes(x, k, zeros, 0.0f);
  show_inputs();
#endif
  sync_warps();
  float one_scale = ROUND != NO_ROUND ? x_scales[0] : 1.0f;
  if (is_held && is_normed_last(args)) {
    float squares = 0.0f;
#pragma unroll
    for (int i = 0; i < WARPS; i++) squares += scratch[WARPS + i];
    one_scale *= rsqrtf(squares / args.k + args.eps);
  }

  int turn = 0;
#pragma unroll 1
  for (int block = cut.first_block; block < cut.num_blocks; block += gridDim.x, turn++) {
#if IS_DIRECT
    SUM total[2] = {};  // of rows r and r + 8
#pragma unroll 1
    for (int stage = 0; stage < cut.num_stages; stage++) {
      if (num_stages++ % (WARPS / 4) == warpgroup) {
        SUM d[4];
        wait(full + 8 * place, parity);
        begin_products();
#pragma unroll
        for (int piece = 0; piece < PIECE; piece++) {
          const u64 rows = descriptor(shared_address(rings) + place * SLOT_BYTES + piece * (2 * ROWS * UNIT));
          const u64 inputs = inputs_at(shared_address(x) + (stage * PIECE + piece) * (2 * UNIT));
#pragma unroll
          for (int j = 0; j < 4; j++) multiply(d, rows + 2 * j, inputs + 4 * j, piece + j > 0);
        }
        commit_products();
        wait_for_products<0>();
#pragma unroll
        for (int i = 0; i < 4; i++) keep(d[i]);
        if (lane == 0) arrive(empty + 8 * place);
#pragma unroll
        for (int h = 0; h < 2; h++) total[h] += warp / 2 % 2 ? d[2 * h + 1] : d[2 * h];
      }
      if (++place == STAGES) place = 0, parity ^= 1;
    }
    float* sums = own_sums + turn % 2 * SUMS;
    if (t == 0)
#pragma unroll
      for (int h = 0; h < 2; h++) sums[warp / 2 * PITCH + warp % 2 * 16 + r + 8 * h] = (float)total[h];
#else
    float total[TILES][2] = {};
    int by_digits[TILES][4] = {};  // of row r the high digits' sum and the low ones', then of row r + 8
    float sum_of_x = 0.0f;
#pragma unroll 1
    for (int stage = 0; stage < cut.num_stages; stage++) {
      const unsigned char* slot = rings + place * SLOT_BYTES;
      const int begin = stage * STAGE_CHUNKS, first_group = group_of(begin);
      wait(full + 8 * place, parity);
#pragma unroll
      for (int piece = 0; piece < PIECE; piece++) {
        const int own = warp * PIECE + piece, chunk = begin + own;
        if (chunk >= cut.num_chunks) break;
        u32 digits[4];
        read_digits(x, chunk, digits);
#pragma unroll
        for (int m = 0; m < TILES; m++) {
          u32 words[4 * CODE_LOADS];
#pragma unroll
          for (int i = 0; i < CODE_LOADS; i++) {
            const uint4 v = *(const uint4*)(slot + m * TILE_BYTES + (own * CODE_LOADS + i) * 512 + 16 * lane);
            words[4 * i] = v.x, words[4 * i + 1] = v.y, words[4 * i + 2] = v.z, words[4 * i + 3] = v.w;
          }
          multiply_digits(by_digits[m], words, digits);
        }
        const float2 of_x = ((const float2*)x_scales)[chunk * GROUPS + t % GROUPS];
        sum_of_x += of_x.x;
        if ((chunk + 1) * CHUNK % DIGIT_GROUP != 0 && piece + 1 < PIECE && chunk + 1 < cut.num_chunks) continue;
#pragma unroll
        for (int m = 0; m < TILES; m++) {
          const int group = (group_of(chunk) - first_group + t % GROUPS) * 8 + r;
          const PARAM* p = (const PARAM*)(slot + TILES * TILE_BYTES + m * TILE_PARAM_BYTES + group * PARAM_BYTES);
#pragma unroll
          for (int h = 0; h < 2; h++) {  // row r, row r + 8
            total[m][h] += scaled_digits(by_digits[m][2 * h], by_digits[m][2 * h + 1], p + h, sum_of_x) * of_x.y;
            by_digits[m][2 * h] = by_digits[m][2 * h + 1] = 0;
          }
        }
        sum_of_x = 0.0f;
      }
      __syncwarp();
      if (lane == 0) arrive(empty + 8 * place);
      if (++place == STAGES) place = 0, parity ^= 1;
    }

    float* sums = own_sums + turn % 2 * SUMS;
#pragma unroll
    for (int m = 0; m < TILES; m++)
#pragma unroll
      for (int h = 0; h < 2; h++) {
        const float sum = of_groups(total[m][h]);
        if (t == 0) sums[warp * PITCH + m * 16 + r + 8 * h] = sum;
      }
#endif
    sync_warps();

    // Half of a warp adds up a row, and the other half the next one's or that of up.
    const int half = lane / 16, part = lane % 16;
    for (int pair = warp; pair < ROWS / 2; pair += WARPS) {
      const int at = args.is_gated ? pair : 2 * pair + half, column = block * out_rows + at;
      const bool is_up = args.is_gated && half, is_row = column < out_n;
      const int row = is_up ? at + ROWS / 2 : at, weight_row = is_up ? column + out_n : column;
      float y = part < PARTS ? sums[part * PITCH + row] : 0.0f;
#pragma unroll
      for (int i = 8; i; i /= 2) y += __shfl_xor_sync(~0u, y, i);
      if (GROUP == 0) {
        const int i = turn * ROWS + row;
        y *= i < SCALES * THREADS ? held_scales[i] : is_row ? args.scale[weight_row] : 0.0f;
      }
      y *= one_scale;
      if (args.bias != nullptr && is_row)
        y += args.is_bias_float ? ((const float*)args.bias)[weight_row] : from_x(((const u16*)args.bias)[weight_row]);
      if (args.is_gated) y = activated(y, args.act) * __shfl_xor_sync(~0u, y, 16);
      if (part != 0 || is_up || !is_row) continue;
      if (args.residual != nullptr) {
        const int i = turn * out_rows + at;
        y += from_x(i < RESIDUALS ? held_residuals[i] : load_fresh_half((const u16*)args.residual + column));
      }
      ((u16*)args.out)[column] = to_x(y);
    }
  }
}
