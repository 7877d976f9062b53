// Products of one token one after another, each residual + act(norm(x) W^T + bias), of weights of few bits.
//
// A block on each multiprocessor has some rows of every product, and goes on to the next one when all blocks have written
// the outputs of the one ahead. Memory does not wait for that: one warp has a ring filled with codes by bulk copies, as
// far ahead as there is room, from one product to the next and while the kernel ahead still runs. Threads that multiplied
// and asked for codes too would stand still where memory takes no more requests, and with them all that is between two
// products. Codes meet the tensor cores as in `quantized_few.cu`, inputs as `quantized_one.cu` says.
//
// A stage of the ring has 16 * TILES rows and, of each, PIECE chunks of columns for each warp.
//
// quantized_chain.py puts in front what `quantized_few.cu` has, and PRODUCTS, PIECE.

constexpr int STAGE_CHUNKS = WARPS * PIECE;
constexpr int ROW_PITCH = 64 * STAGE_CHUNKS + 64;  // bytes of codes row by row: two rows are in other banks
constexpr int TILE_BYTES = IS_TILED ? STAGE_CHUNKS * CODE_LOADS * 512 : 16 * ROW_PITCH;
constexpr int STAGE_GROUPS = GROUP == 0 ? 0 : GROUPS > 1 ? STAGE_CHUNKS * GROUPS
                             : STAGE_CHUNKS / GROUP_CHUNKS + (STAGE_CHUNKS % GROUP_CHUNKS ? 2 : 0);
constexpr int GROUP_BYTES = 8 * PARAM_BYTES, TILE_PARAM_BYTES = STAGE_GROUPS * GROUP_BYTES;
constexpr int STAGE_BYTES = TILES * (TILE_BYTES + TILE_PARAM_BYTES);
constexpr int ROWS = TILES * 16, PITCH = ROWS + 4;  // of partial sums
constexpr int SUMS = WARPS * PITCH;
constexpr bool IS_RAW = IS_PLAIN && GROUP != 0 && !IS_HALF;
constexpr int BASE = IS_RAW ? RAW + MIDDLE : 0;  // codes are more by this, which sums of x make good
constexpr bool HAS_X_SUMS = OFFSET != NO_OFFSET || BASE;
constexpr int BARRIER_BYTES = (16 * STAGES + 127) / 128 * 128;
constexpr int MOST_THREADS = THREADS + 128;  // so that attention finds registers beside a block

struct Chain {
  Args products[PRODUCTS];
};

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

// ---- the kernel ----

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
    num_chunks = args.k / CHUNK;
    num_stages = (num_chunks + STAGE_CHUNKS - 1) / STAGE_CHUNKS;
  }
};

__device__ __forceinline__ int group_of(int chunk) { return GROUPS > 1 ? chunk * GROUPS : chunk / GROUP_CHUNKS; }

// One warp's: have all codes and scales copied, a stage when its place in the ring is empty.
__device__ __forceinline__ void fill_ring(const Chain& chain, u32 full, u32 empty, u32 ring) {
  const int lane = threadIdx.x % 32;
  int slot = 0;
  u32 parity = 1;  // places are empty at first
#pragma unroll 1
  for (int product = 0; product < PRODUCTS; product++) {
    const Args& args = chain.products[product];
    const Cut cut(args);
#pragma unroll 1
    for (int block = cut.first_block; block < cut.num_blocks; block += gridDim.x)
#pragma unroll 1
      for (int stage = 0; stage < cut.num_stages; stage++) {
        const int begin = stage * STAGE_CHUNKS, end = min(begin + STAGE_CHUNKS, cut.num_chunks);
        const int first_group = group_of(begin);
        const int num_groups = GROUP == 0 ? 0 : GROUPS > 1 ? (end - begin) * GROUPS : group_of(end - 1) + 1 - first_group;
        const int code_bytes = (end - begin) * (IS_TILED ? CODE_LOADS * 512 : CHUNK);  // of a tile, or of a row
        const u32 to = ring + slot * STAGE_BYTES, barrier = full + 8 * slot;
        wait(empty + 8 * slot, parity);
        if (lane == 0)
          expect(barrier, TILES * (code_bytes * (IS_TILED ? 1 : 16) + num_groups * GROUP_BYTES));
        __syncwarp();
        auto tile_of = [&](int m) {
          const bool is_up = m >= cut.tiles_abreast;
          const int tile = block * cut.tiles_abreast + (is_up ? m - cut.tiles_abreast + cut.out_n / 16 : m);
          return min(tile, (args.n + 15) / 16 - 1);
        };
        if (IS_TILED) {
          if (lane < TILES)
            copy_bulk(to + lane * TILE_BYTES,
                      (const unsigned char*)args.codes + ((u64)tile_of(lane) * cut.num_chunks + begin) * (CODE_LOADS * 512),
                      code_bytes, barrier);
        } else {
          for (int row = lane; row < ROWS; row += 32)
            copy_bulk(to + row * ROW_PITCH,
                      (const unsigned char*)args.codes + (u64)min(16 * tile_of(row / 16) + row % 16, args.n - 1) * args.k +
                          begin * CHUNK,
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
}

extern "C" __global__ void __launch_bounds__(MOST_THREADS, 1) quantized_chain(const __grid_constant__ Chain chain) {
  extern __shared__ __align__(128) unsigned char shared[];
  float* scratch = (float*)shared;                              // [32]
  unsigned char* rings = shared + 128 + BARRIER_BYTES;          // [STAGES][STAGE_BYTES]
  float* own_sums = (float*)(rings + STAGES * STAGE_BYTES);     // [2][SUMS]
  u16* x = (u16*)(own_sums + 2 * SUMS);                         // [x_stride], which the longest inputs need
  const int x_stride = chain.products[0].x_stride, most_k = x_stride - 8;
  float* x_scales = (float*)(x + x_stride);  // [1], [K / X_GROUP] or [K / CHUNK][2] of digits
  float* held_scales = x_scales + (HAS_DIGITS ? 2 * (most_k / CHUNK) : X_GROUP ? most_k / X_WIDTH : 1);
  u16* held_residuals = (u16*)(held_scales + HELD_SCALES);
  const u32 full = shared_address(shared) + 128, empty = full + 8 * STAGES;

  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, r = lane / 4, t = lane % 4;
  if (threadIdx.x == 0) {
    for (int i = 0; i < STAGES; i++) init_barrier(full + 8 * i, 1), init_barrier(empty + 8 * i, WARPS);
    barriers_are_ready();
  }
  __syncthreads();
  let_next_begin();
  if (warp == WARPS) {
    fill_ring(chain, full, empty, shared_address(rings));
    return;
  }

  int place = 0;
  u32 parity = 0;
  u64 awaited = 0;
#pragma unroll 1
  for (int product = 0; product < PRODUCTS; product++) {
    const Args& args = chain.products[product];
    const Cut cut(args);
    const int out_n = cut.out_n, out_rows = cut.out_rows;
    if (HELD_SCALES) {  // in the order of sums, turn by turn
      for (int i = threadIdx.x; i < HELD_SCALES; i += THREADS) {
        const int m = i % ROWS / 16, block = cut.first_block + i / ROWS * gridDim.x;
        const int row = 16 * (block * cut.tiles_abreast + m % cut.tiles_abreast) + i % 16 + (m >= cut.tiles_abreast ? out_n : 0);
        if (block < cut.num_blocks && row < args.n) held_scales[i] = args.scale[row];
      }
    }
    u16 residual = 0;
    auto wait_for_x = [&] {
      if (product == 0) {
        wait_for_input();
      } else {
        if (threadIdx.x == 0) wait_for_arrivals(args.arrivals, awaited);
        sync_warps();
      }
      const int i = threadIdx.x, column = (cut.first_block + i / out_rows * (int)gridDim.x) * out_rows + i % out_rows;
      if (args.residual != nullptr && i < HELD_RESIDUALS && column < out_n)
        residual = load_fresh_half((const u16*)args.residual + column);
    };
    const bool is_held = X_GROUP == 0 && !args.is_norm_float && args.k <= (args.norm != nullptr ? NORMED : HELD) * 8 * THREADS;
    if (is_held) {
      hold_one(args, 0, args.k, x, x_scales, scratch, wait_for_x);
    } else {
      wait_for_x();
      stage_one(args, 0, args.k, x, x_scales, scratch);
    }
    if (args.residual != nullptr && threadIdx.x < HELD_RESIDUALS) held_residuals[threadIdx.x] = residual;
    sync_warps();
    float one_scale = ROUND != NO_ROUND && X_GROUP == 0 ? x_scales[0] : 1.0f;
    if (is_held && is_normed_last(args)) {
      float squares = 0.0f;
#pragma unroll
      for (int i = 0; i < WARPS; i++) squares += scratch[WARPS + i];
      one_scale *= rsqrtf(squares / args.k + args.eps);
    }

    int turn = 0;
#pragma unroll 1
    for (int block = cut.first_block; block < cut.num_blocks; block += gridDim.x, turn++) {
      float total[TILES][4] = {}, partial[TILES][4] = {}, x_sums[4] = {};
      int by_digits[TILES][4] = {};  // of row r the high digits' sum and the low ones', then of row r + 8
      float sum_of_x = 0.0f;
#pragma unroll 1
      for (int stage = 0; stage < cut.num_stages; stage++) {
        const unsigned char* slot = rings + place * STAGE_BYTES;
        const int begin = stage * STAGE_CHUNKS, first_group = group_of(begin);
        wait(full + 8 * place, parity);
#pragma unroll
        for (int piece = 0; piece < PIECE; piece++) {
          const int own = warp * PIECE + piece, chunk = begin + own;
          if (chunk >= cut.num_chunks) break;
          u32 words[TILES][4 * CODE_LOADS];
#pragma unroll
          for (int m = 0; m < TILES; m++)
#pragma unroll
            for (int i = 0; i < CODE_LOADS; i++) {
              const int at = IS_TILED ? (own * CODE_LOADS + i) * 512 + 16 * lane : (r + 8 * i) * ROW_PITCH + own * CHUNK + 16 * t;
              const uint4 v = *(const uint4*)(slot + m * TILE_BYTES + at);
              words[m][4 * i] = v.x, words[m][4 * i + 1] = v.y, words[m][4 * i + 2] = v.z, words[m][4 * i + 3] = v.w;
            }
          auto params_of = [&](int m, int i) {  // of the chunk's group i
            const int group = (GROUPS > 1 ? own * GROUPS + i : group_of(chunk) - first_group) * 8 + r;
            return (const PARAM*)(slot + TILES * TILE_BYTES + m * TILE_PARAM_BYTES + group * PARAM_BYTES);
          };

          if (HAS_DIGITS) {
            const uint4 v = *(const uint4*)((const u32*)x + chunk * 32 + r % 2 * 16 + 4 * t);
            const u32 digits[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
            for (int m = 0; m < TILES; m++)
#pragma unroll
              for (int j = 0; j < 4; j += 2) {
                const u32 a[4] = {words[m][j] & 0x0f0f0f0fu, words[m][j] >> 4 & 0x0f0f0f0fu,
                                  words[m][j + 1] & 0x0f0f0f0fu, words[m][j + 1] >> 4 & 0x0f0f0f0fu};
                multiply(by_digits[m], a, digits[j], digits[j + 1]);
              }
            const float2 of_x = ((const float2*)x_scales)[chunk];
            sum_of_x += of_x.x;
            if ((chunk + 1) * CHUNK % DIGIT_GROUP != 0 && piece + 1 < PIECE && chunk + 1 < cut.num_chunks) continue;
#pragma unroll
            for (int m = 0; m < TILES; m++) {
              const PARAM* p = params_of(m, 0);
#pragma unroll
              for (int h = 0; h < 2; h++) {
                const float scale = param(p + h), offset = OFFSET == NO_OFFSET ? MIDDLE : param(p + 2 + h);
                float sum = (float)(256 * by_digits[m][2 * h] + by_digits[m][2 * h + 1]);
                sum = OFFSET == MINIMUM ? sum * scale - offset * sum_of_x : (sum - offset * sum_of_x) * scale;
                total[m][2 * h] += sum * of_x.y;
                by_digits[m][2 * h] = by_digits[m][2 * h + 1] = 0;
              }
            }
            sum_of_x = 0.0f;
            continue;
          }

          const int k = chunk * CHUNK + 16 * t;
          u32 x_words[4];
#pragma unroll
          for (int j = 0; j < 4; j++) {
            if (j % 2 == 0) {
              const uint4 v = *(const uint4*)(x + k + 4 * j);
              x_words[0] = v.x, x_words[1] = v.y, x_words[2] = v.z, x_words[3] = v.w;
            }
#pragma unroll
            for (int m = 0; m < TILES; m++) {
              u32 a[4];
              if (CODE == INT4) {
                decode_int4<IS_RAW>(words[m][j], a);
              } else {
                decode_bytes(words[m][j], a[0], a[2]);
                decode_bytes(words[m][4 * (CODE_LOADS - 1) + j], a[1], a[3]);
              }
              multiply(partial[m], a, x_words[j % 2 * 2], x_words[j % 2 * 2 + 1]);
            }
            if (HAS_X_SUMS) {
              const u32 one = both(IS_HALF ? 0x3c00 : 0x3f80), ones[4] = {one, one, one, one};
              multiply(x_sums, ones, x_words[j % 2 * 2], x_words[j % 2 * 2 + 1]);
            }
            constexpr int STEPS = 4 / GROUPS;  // of a group
            if (GROUP == 0 || j % STEPS != STEPS - 1) continue;
#pragma unroll
            for (int m = 0; m < TILES; m++) {
              const PARAM* p = params_of(m, j / STEPS);
#pragma unroll
              for (int h = 0; h < 2; h++) {  // row r, row r + 8
                const float scale = param(p + h), offset = OFFSET == NO_OFFSET ? 0.0f : param(p + 2 + h);
                float sum = partial[m][2 * h];
                if (OFFSET == ZERO) sum -= (offset + BASE) * x_sums[0];
                if (OFFSET != ZERO && BASE) sum -= BASE * x_sums[0];
                sum *= scale;
                if (OFFSET == MINIMUM) sum -= offset * x_sums[0];
                if (X_GROUP != 0) sum *= x_scales[chunk * CHUNK / X_WIDTH];
                total[m][2 * h] += sum;
              }
              partial[m][0] = partial[m][1] = partial[m][2] = partial[m][3] = 0.0f;
            }
            if (HAS_X_SUMS) x_sums[0] = x_sums[1] = x_sums[2] = x_sums[3] = 0.0f;
          }
        }
        __syncwarp();
        if (lane == 0) arrive(empty + 8 * place);
        if (++place == STAGES) place = 0, parity ^= 1;
      }

      float* sums = own_sums + turn % 2 * SUMS;
      if (t == 0)
#pragma unroll
        for (int m = 0; m < TILES; m++)
#pragma unroll
          for (int h = 0; h < 2; h++)
            sums[warp * PITCH + m * 16 + r + 8 * h] = GROUP == 0 ? partial[m][2 * h] : total[m][2 * h];
      sync_warps();

      // Half of a warp adds up a row, and the other half the next one's or that of up.
      const int half = lane / 16, part = lane % 16;
      for (int pair = warp; pair < ROWS / 2; pair += WARPS) {
        const int at = args.is_gated ? pair : 2 * pair + half, column = block * out_rows + at;
        const bool is_up = args.is_gated && half, is_row = column < out_n;
        const int row = is_up ? at + ROWS / 2 : at, weight_row = is_up ? column + out_n : column;
        float y = part < WARPS ? sums[part * PITCH + row] : 0.0f;
#pragma unroll
        for (int i = 8; i; i /= 2) y += __shfl_xor_sync(~0u, y, i);
        if (GROUP == 0) {
          const int i = turn * ROWS + row;
          y *= i < HELD_SCALES ? held_scales[i] : is_row ? args.scale[weight_row] : 0.0f;
        }
        y *= one_scale;
        if (args.bias != nullptr && is_row)
          y += args.is_bias_float ? ((const float*)args.bias)[weight_row] : from_x(((const u16*)args.bias)[weight_row]);
        if (args.is_gated) y = activated(y, args.act) * __shfl_xor_sync(~0u, y, 16);
        if (part != 0 || is_up || !is_row) continue;
        if (args.residual != nullptr) {
          const int i = turn * out_rows + at;
          y += from_x(i < HELD_RESIDUALS ? held_residuals[i] : load_fresh_half((const u16*)args.residual + column));
        }
        ((u16*)args.out)[column] = to_x(y);
      }
    }
    if (product + 1 < PRODUCTS) {
      sync_warps();
      if (threadIdx.x == 0) awaited = arrive_at_product(args.arrivals);
    }
  }
}
