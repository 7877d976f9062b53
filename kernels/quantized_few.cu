// out = residual + act(norm(x) W^T + bias) of 1 to 64 tokens x [T, K] and a weight of few bits, decoded in registers.
//
// The time is that of reading the codes: they go from memory to a ring of each thread's own in shared memory, filled
// before the kernel ahead has ended (programmatic dependent launch), and from there into the tensor cores' operand,
// 16 rows of the weight by 16 columns, whose other operand is 8 tokens. Which columns one product of that size takes is
// free as long as both operands agree: so a thread has 16 consecutive inputs of each 64, and reads them in pieces of 16
// bytes. Where codes lie row by row they are the same 16 columns; in tiles they are others, and inputs are moved there.
//
// A block has WARPS_N * TILES * 16 rows, the weight's columns are shared out to WARPS_K warps of each of `split` blocks
// (a cluster, which adds up through its shared memory, always in the same order).
//
// quantized_few.py puts in front:
//   CODE (INT4, INT8, FP8), IS_TILED (codes lie as `quantized_layout.py` says; else row by row),
//   GROUP (columns that share a scale, 0: all, scaled at the end), OFFSET (NO_OFFSET, ZERO, MINIMUM), PARAM (type of
//   scales and offsets of groups), IS_HALF (products are of f16, else of bf16), IS_X_HALF (x and out are f16, else bf16)
//   HAS_TABLE, TABLE_LOW and TABLE_HIGH (bytes of its 16 numbers), IS_ONE (one token, norm and rounding are fused),
//   ROUND (NO_ROUND, TO_FP8, TO_INT8: what inputs are rounded to), X_GROUP (inputs that are rounded with one scale, 0: all),
//   HAS_DIGITS (inputs are digits), HELD_SCALES and HELD_RESIDUALS (that a block of one token keeps in shared memory),
//   TOKENS (tiles of 8), TILES, WARPS_N, WARPS_K, STAGES.

constexpr int OWN_GROUPS = HAS_DIGITS ? 1 : GROUPS;  // of a thread and stage
constexpr int STAGE_BYTES = TILES * (CODE_LOADS * 512 + OWN_GROUPS * 32 * PARAM_BYTES);  // of a warp
constexpr int MAX_TOKENS = IS_ONE ? 1 : 8 * TOKENS;
constexpr int ROWS = WARPS_N * TILES * 16, PITCH = ROWS + 4;  // of partial sums
constexpr int SUMS = WARPS_K * MAX_TOKENS * PITCH;
constexpr bool IS_RAW = IS_PLAIN && GROUP != 0 && !IS_HALF && (OFFSET != NO_OFFSET || TOKENS <= 2);
constexpr int BASE = IS_RAW ? RAW + MIDDLE : 0;  // codes are more by this, which sums of x make good
constexpr bool HAS_X_SUMS = OFFSET != NO_OFFSET || BASE;
// A block of one token goes on to further rows, whose codes are on their way while it adds up: two fit a multiprocessor,
// the second that of the next kernel.
constexpr int MIN_BLOCKS = IS_ONE ? 1024 / THREADS : 1, COLUMNS = IS_ONE ? 1 : 2;  // of a tile of sums, that count

// ---- more instructions ----

__device__ __forceinline__ void copy(u32 to, const void* from, int bytes) {
  if (bytes == 16)
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
  else if (bytes == 8)
    asm volatile("cp.async.ca.shared.global [%0], [%1], 8;" ::"r"(to), "l"(from) : "memory");
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(to), "l"(from) : "memory");
}

// ---- the kernel ----

__device__ __forceinline__ void stage_tokens(const Args& args, int first, int num, u16* to, float* scales) {
  const int pieces = num / 8, total = pieces * args.num_tokens;
#pragma unroll 4
  for (int i = threadIdx.x; i < total; i += THREADS) {
    const int token = i / pieces, k = 8 * (i - token * pieces);
    const uint4 v = *(const uint4*)((const u16*)args.x + (u64)token * args.k + first + k);
    const u32 words[4] = {v.x, v.y, v.z, v.w};
    put(to + token * args.x_stride, k, words);
  }
  if (X_GROUP != 0)
    for (int i = threadIdx.x; i < args.num_tokens * (args.k / X_WIDTH); i += THREADS) scales[i] = args.x_scale[i];
}

extern "C" __global__ void __launch_bounds__(THREADS, MIN_BLOCKS) quantized_few(const __grid_constant__ Args args) {
  extern __shared__ __align__(128) unsigned char shared[];
  float* scratch = (float*)shared;                              // [32]
  unsigned char* rings = shared + 128;                          // [WARPS][STAGES][STAGE_BYTES]
  float* own_sums = (float*)(rings + WARPS * STAGES * STAGE_BYTES);  // [2][SUMS] of one token
  u16* x = (u16*)(own_sums + (IS_ONE ? 2 * SUMS : 0));              // [T][x_stride]
  float* x_scales = (float*)(x + args.num_tokens * args.x_stride);  // [1], [T][K / X_GROUP] or [K / PART][2] of digits
  float* held_scales = x_scales + (HAS_DIGITS ? 2 * (args.k / PART) : X_GROUP ? args.num_tokens * (args.k / X_WIDTH) : 1);
  u16* held_residuals = (u16*)(held_scales + HELD_SCALES);

  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, r = lane / 4, t = lane % 4;
  const int warp_n = warp % WARPS_N, warp_k = warp / WARPS_N;
  const int rank = cluster_rank(), first_block = blockIdx.x / args.split, block_step = gridDim.x / args.split;
  const int num_chunks = args.k / CHUNK;
  constexpr int UNIT = X_GROUP ? X_GROUP / CHUNK : 1;  // chunks that stay together
  auto first_chunk = [&](int worker) { return worker * (num_chunks / UNIT) / (args.split * WARPS_K) * UNIT; };
  const int block_chunk = first_chunk(rank * WARPS_K);
  const int begin = first_chunk(rank * WARPS_K + warp_k), end = first_chunk(rank * WARPS_K + warp_k + 1);
  const int tiles_abreast = args.is_gated ? TILES / 2 : TILES;  // of gate, if there is a gate
  const int out_n = args.is_gated ? args.n / 2 : args.n, out_rows = WARPS_N * tiles_abreast * 16;
  const int num_blocks = (out_n + out_rows - 1) / out_rows;

  let_next_begin();

  // Where this thread's codes and scales of each tile are, in pieces of 16 bytes and of PARAM_BYTES.
  u32 codes[TILES], params[TILES];
  int request_block = first_block, request_chunk = begin, request_slot = 0;
  auto find = [&] {
#pragma unroll
    for (int m = 0; m < TILES; m++) {
      const bool is_up = m >= tiles_abreast;
      int tile = (request_block * WARPS_N + warp_n) * tiles_abreast + (is_up ? m - tiles_abreast + out_n / 16 : m);
      tile = min(tile, (args.n + 15) / 16 - 1);
      codes[m] = IS_TILED ? tile * num_chunks * (CODE_LOADS * 32) + lane : min(16 * tile + r, args.n - 1) * (args.k / 16) + t;
      params[m] = tile * args.num_groups * 8 + r;
    }
  };
  const u32 load_step = IS_TILED ? 32 : args.k / 2;  // to the second load of a tile; row by row to the row 8 on
  const u32 ring = shared_address(rings) + warp * STAGES * STAGE_BYTES;
  auto request = [&] {
    if (request_block < num_blocks && begin < end) {
      const u32 slot = ring + request_slot * STAGE_BYTES;
#pragma unroll
      for (int m = 0; m < TILES; m++) {
#pragma unroll
        for (int i = 0; i < CODE_LOADS; i++) {
          const u32 piece = codes[m] + request_chunk * (IS_TILED ? CODE_LOADS * 32 : CHUNK / 16) + i * load_step;
          copy(slot + (m * CODE_LOADS + i) * 512 + 16 * lane, (const unsigned char*)args.codes + (u64)piece * 16, 16);
        }
        if (GROUP != 0) {
#pragma unroll
          for (int i = 0; i < OWN_GROUPS; i++) {
            const int place = HAS_DIGITS ? t % GROUPS : i;
            const u32 group = GROUP < CHUNK ? request_chunk * GROUPS + place : request_chunk / GROUP_CHUNKS;
            copy(slot + TILES * CODE_LOADS * 512 + (m * OWN_GROUPS + i) * 32 * PARAM_BYTES + PARAM_BYTES * lane,
                 (const unsigned char*)args.params + (u64)(params[m] + group * 8) * PARAM_BYTES, PARAM_BYTES);
          }
        }
      }
      if (++request_slot == STAGES) request_slot = 0;
      if (++request_chunk == end) {
        request_chunk = begin, request_block += block_step;
        find();
      }
    }
    asm volatile("cp.async.commit_group;" ::: "memory");
  };
  find();
#pragma unroll
  for (int i = 0; i < STAGES - 1; i++) request();

  if (HELD_SCALES) {  // in the order of sums, turn by turn
    for (int i = threadIdx.x; i < HELD_SCALES; i += THREADS) {
      const int tile = i % ROWS / 16, m = tile % TILES, block = first_block + i / ROWS * block_step;
      const int tile_abreast = (block * WARPS_N + tile / TILES) * tiles_abreast + m % tiles_abreast;
      const int row = 16 * tile_abreast + i % 16 + (m >= tiles_abreast ? out_n : 0);
      if (block < num_blocks && row < args.n) held_scales[i] = args.scale[row];
    }
  }
  const int num_columns = (first_chunk((rank + 1) * WARPS_K) - block_chunk) * CHUNK;
  const bool is_held = IS_ONE && X_GROUP == 0 && !args.is_norm_float &&
                       args.k <= (args.norm != nullptr ? NORMED : HELD) * 8 * THREADS;
  if (is_held) {
    hold_one(args, block_chunk * CHUNK, num_columns, x, x_scales, scratch, wait_for_input);
  } else {
    wait_for_input();
    if (IS_ONE)
      stage_one(args, block_chunk * CHUNK, num_columns, x, x_scales, scratch);
    else
      stage_tokens(args, block_chunk * CHUNK, num_columns, x, x_scales);
  }
  if (IS_ONE && args.residual != nullptr) {
    for (int i = threadIdx.x; i < HELD_RESIDUALS; i += THREADS) {
      const int column = (first_block + i / out_rows * block_step) * out_rows + i % out_rows;
      if (column < out_n) held_residuals[i] = ((const u16*)args.residual)[column];
    }
  }
  __syncthreads();
  float one_scale = 1.0f;
  if (IS_ONE && ROUND != NO_ROUND && X_GROUP == 0) one_scale = x_scales[0];
  if (is_held && is_normed_last(args)) {
    float squares = 0.0f;
#pragma unroll
    for (int i = 0; i < WARPS; i++) squares += scratch[WARPS + i];
    one_scale *= rsqrtf(squares / args.k + args.eps);
  }

  const u16* x_rows[TOKENS];
#pragma unroll
  for (int i = 0; i < TOKENS; i++) x_rows[i] = x + (IS_ONE ? 0 : min(8 * i + r, args.num_tokens - 1) * args.x_stride);

  int slot_index = 0, turn = 0;
  for (int block = first_block; block < num_blocks; block += block_step, turn++) {
    float total[TILES][TOKENS][4] = {}, partial[TILES][TOKENS][4] = {}, x_sums[TOKENS][4] = {};
    int by_digits[TILES][4] = {};  // of row r the high digits' sum and the low ones', then of row r + 8
    float sum_of_x = 0.0f;
    for (int chunk = begin; chunk < end; chunk++) {
      asm volatile("cp.async.wait_group %0;" ::"n"(STAGES - 2) : "memory");
      const unsigned char* slot = rings + (warp * STAGES + slot_index) * STAGE_BYTES;
      if (++slot_index == STAGES) slot_index = 0;
      u32 words[TILES][4 * CODE_LOADS];
#pragma unroll
      for (int m = 0; m < TILES; m++)
#pragma unroll
        for (int i = 0; i < CODE_LOADS; i++) {
          const uint4 v = *(const uint4*)(slot + (m * CODE_LOADS + i) * 512 + 16 * lane);
          words[m][4 * i] = v.x, words[m][4 * i + 1] = v.y, words[m][4 * i + 2] = v.z, words[m][4 * i + 3] = v.w;
        }
      request();  // into the slot before this one, whose codes have been used

      if (HAS_DIGITS) {
        u32 digits[4];
        read_digits(x, chunk - block_chunk, digits);
#pragma unroll
        for (int m = 0; m < TILES; m++) multiply_digits(by_digits[m], words[m], digits);
        const float2 of_x = ((const float2*)x_scales)[chunk * GROUPS + t % GROUPS];
        sum_of_x += of_x.x;
        if ((chunk + 1) * CHUNK % DIGIT_GROUP != 0 && chunk + 1 != end) continue;
#pragma unroll
        for (int m = 0; m < TILES; m++) {
          const PARAM* p = (const PARAM*)(slot + TILES * CODE_LOADS * 512 + m * 32 * PARAM_BYTES + PARAM_BYTES * lane);
#pragma unroll
          for (int h = 0; h < 2; h++) {
            total[m][0][2 * h] += scaled_digits(by_digits[m][2 * h], by_digits[m][2 * h + 1], p + h, sum_of_x) * of_x.y;
            by_digits[m][2 * h] = by_digits[m][2 * h + 1] = 0;
          }
        }
        sum_of_x = 0.0f;
        continue;
      }

      const int k = (chunk - block_chunk) * CHUNK + 16 * t;
      u32 x_words[TOKENS][4];
#pragma unroll
      for (int j = 0; j < 4; j++) {
        if (j % 2 == 0)
#pragma unroll
          for (int i = 0; i < TOKENS; i++) {
            const uint4 v = *(const uint4*)(x_rows[i] + k + 4 * j);
            x_words[i][0] = v.x, x_words[i][1] = v.y, x_words[i][2] = v.z, x_words[i][3] = v.w;
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
#pragma unroll
          for (int i = 0; i < TOKENS; i++) multiply(partial[m][i], a, x_words[i][j % 2 * 2], x_words[i][j % 2 * 2 + 1]);
        }
        if (HAS_X_SUMS) {
          const u32 ones[4] = {both(IS_HALF ? 0x3c00 : 0x3f80), both(IS_HALF ? 0x3c00 : 0x3f80),
                               both(IS_HALF ? 0x3c00 : 0x3f80), both(IS_HALF ? 0x3c00 : 0x3f80)};
#pragma unroll
          for (int i = 0; i < TOKENS; i++) multiply(x_sums[i], ones, x_words[i][j % 2 * 2], x_words[i][j % 2 * 2 + 1]);
        }
        constexpr int STEPS = 4 / GROUPS;  // of a group
        if (GROUP == 0 || j % STEPS != STEPS - 1) continue;
#pragma unroll
        for (int m = 0; m < TILES; m++) {
          const PARAM* p = (const PARAM*)(slot + TILES * CODE_LOADS * 512 + (m * GROUPS + j / STEPS) * 32 * PARAM_BYTES +
                                          PARAM_BYTES * lane);
#pragma unroll
          for (int h = 0; h < 2; h++) {  // row r, row r + 8
            const float scale = param(p + h), offset = OFFSET == NO_OFFSET ? 0.0f : param(p + 2 + h);
#pragma unroll
            for (int i = 0; i < TOKENS; i++)
#pragma unroll
              for (int c = 0; c < COLUMNS; c++) {
                float sum = partial[m][i][2 * h + c];
                if (OFFSET == ZERO) sum -= (offset + BASE) * x_sums[i][c];
                if (OFFSET != ZERO && BASE) sum -= BASE * x_sums[i][c];
                sum *= scale;
                if (OFFSET == MINIMUM) sum -= offset * x_sums[i][c];
                if (X_GROUP != 0) {
                  const int token = IS_ONE ? 0 : min(8 * i + 2 * t + c, args.num_tokens - 1);
                  sum *= x_scales[token * (args.k / X_WIDTH) + chunk * CHUNK / X_WIDTH];
                }
                total[m][i][2 * h + c] += sum;
              }
          }
#pragma unroll
          for (int i = 0; i < TOKENS; i++) partial[m][i][0] = partial[m][i][1] = partial[m][i][2] = partial[m][i][3] = 0.0f;
        }
        if (HAS_X_SUMS)
#pragma unroll
          for (int i = 0; i < TOKENS; i++) x_sums[i][0] = x_sums[i][1] = x_sums[i][2] = x_sums[i][3] = 0.0f;
      }
    }

    if (HAS_DIGITS)
#pragma unroll
      for (int m = 0; m < TILES; m++) total[m][0][0] = of_groups(total[m][0][0]), total[m][0][2] = of_groups(total[m][0][2]);
    float* sums = IS_ONE ? own_sums + turn % 2 * SUMS : (float*)rings;
    if (!IS_ONE) {
      asm volatile("cp.async.wait_all;" ::: "memory");
      __syncthreads();  // all have read their rings, where the sums go
    }
#pragma unroll
    for (int m = 0; m < TILES; m++)
#pragma unroll
      for (int i = 0; i < TOKENS; i++)
#pragma unroll
        for (int c = 0; c < 4; c++) {
          const int row = (warp_n * TILES + m) * 16 + r + 8 * (c / 2), token = 8 * i + 2 * t + c % 2;
          if (token < MAX_TOKENS)
            sums[(warp_k * MAX_TOKENS + token) * PITCH + row] = GROUP == 0 && !HAS_DIGITS ? partial[m][i][c] : total[m][i][c];
        }
    sync_cluster(args.split);

    const u32 sums_address = shared_address(sums);
    auto sum_of = [&](int row, int token) {
      float sum = 0.0f;
      for (int s = 0; s < args.split; s++)
#pragma unroll
        for (int w = 0; w < WARPS_K; w++)
          sum += load_of_block(sums_address + 4 * ((w * MAX_TOKENS + token) * PITCH + row), s, args.split);
      return sum;
    };
    if (IS_ONE) {
      // All warps take a share, so that none falls behind: half of one adds up a row, and the other half the next one's
      // or that of up.
      const int half = lane / 16, part = lane % 16;
      for (int pair = rank * WARPS + warp; pair < ROWS / 2; pair += args.split * WARPS) {
        const int place = args.is_gated ? pair : 2 * pair + half, column = block * out_rows + place;
        const int tile = place / 16, slot = tile / tiles_abreast * TILES + tile % tiles_abreast;
        const bool is_up = args.is_gated && half;
        const int row = 16 * (is_up ? slot + TILES / 2 : slot) + place % 16, weight_row = is_up ? column + out_n : column;
        const bool is_row = column < out_n;
        float y = 0.0f;
        if (part < WARPS_K)
          for (int s = 0; s < args.split; s++)
            y += load_of_block(sums_address + 4 * (part * PITCH + row), s, args.split);
#pragma unroll
        for (int i = 8; i; i /= 2) y += __shfl_xor_sync(~0u, y, i);
        if (GROUP == 0) {
          const int at = turn * ROWS + row;
          y *= at < HELD_SCALES ? held_scales[at] : is_row ? args.scale[weight_row] : 0.0f;
        }
        y *= one_scale;
        if (args.bias != nullptr && is_row)
          y += args.is_bias_float ? ((const float*)args.bias)[weight_row] : from_x(((const u16*)args.bias)[weight_row]);
        if (args.is_gated) y = activated(y, args.act) * __shfl_xor_sync(~0u, y, 16);
        if (part != 0 || is_up || !is_row) continue;
        if (args.residual != nullptr) {
          const int at = turn * out_rows + place;
          y += from_x(at < HELD_RESIDUALS ? held_residuals[at] : ((const u16*)args.residual)[column]);
        }
        if (args.is_out_float)
          ((float*)args.out)[column] = y;
        else
          ((u16*)args.out)[column] = to_x(y);
      }
      continue;
    }
    for (int e = rank * THREADS + threadIdx.x; e < out_rows * args.num_tokens; e += args.split * THREADS) {
      const int token = e / out_rows, place = e - token * out_rows, column = block * out_rows + place;
      if (column >= out_n) continue;
      const int tile = place / 16, slot = tile / tiles_abreast * TILES + tile % tiles_abreast;
      float scale = 1.0f;
      if (ROUND != NO_ROUND && X_GROUP == 0) scale = args.x_scale[token];
      auto finished = [&](int row, int weight_row) {
        float y = sum_of(row, token);
        if (GROUP == 0) y *= args.scale[weight_row];
        if (ROUND != NO_ROUND && X_GROUP == 0) y *= scale;
        if (args.bias != nullptr)
          y += args.is_bias_float ? ((const float*)args.bias)[weight_row] : from_x(((const u16*)args.bias)[weight_row]);
        return y;
      };
      float y = finished(slot * 16 + place % 16, column);
      if (args.is_gated) y = activated(y, args.act) * finished((slot + TILES / 2) * 16 + place % 16, column + out_n);
      const u64 at = (u64)token * out_n + column;
      if (args.residual != nullptr) y += from_x(((const u16*)args.residual)[at]);
      if (args.is_out_float)
        ((float*)args.out)[at] = y;
      else
        ((u16*)args.out)[at] = to_x(y);
    }
    break;
  }
  if (args.split > 1) sync_cluster(args.split);  // until others have read this block's sums
}
