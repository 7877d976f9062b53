// Latent attention of single tokens on Hopper: softmax(scale q c^T) c over latents c in the paged cache, whose last ROPE
// elements count for scores alone.
//
// Each block takes an equal run of the tiles of all requests, 64 tokens a tile ("stream-K", Osama et al. 2023); where a run
// starts or ends inside a request, it leaves a partial result. Of each stage of a ring some warps are in charge that copy
// tiles into it, and one warpgroup multiplies: tokens are the rows of scores S^T = C q^T, elements of latents the rows of
// O^T = C^T p^T, and heads the columns of both, of which the instruction takes as few as there are.
//
// hopper_latents.py puts in front, besides hopper.cu: GROUP (heads), COLUMNS (these, rounded up to 8), LOADERS (threads of a
// stage), IS_BYTES (of the cache: e4m3, which becomes float16, else 16 bits), IS_HALF (q and the result), PARTIAL_ROWS,
// IS_MERGED_LATER, and of the instruction TYPE, D, ADD, OPERANDS and SUMS.

typedef unsigned short u16;
typedef unsigned char u8;
typedef long long i64;
struct Args {
  const u16 *q, *q_rope;
  const u8* cache;
  u16* out;
  const int *seq_lens, *rows, *slot_table, *slot_map;
  float *partial, *partial_lse;  // [2 * blocks, PARTIAL_ROWS, RANK] and [2 * blocks, PARTIAL_ROWS]
  int* arrivals;                 // zeros, of requests
  int num_requests, q_stride, q_head_stride, rope_stride, rope_head_stride, out_stride, table_stride;
  int cache_stride;  // in bytes
  int num_fresh;     // last tokens of a request that the step itself may write
  float scale;       // scores times scale are in units of log2
};

constexpr int RANK = 512, ROPE = 64, WIDTH = RANK + ROPE, TILE = 64, STAGES = 2;
constexpr int SLABS = WIDTH / 64, VALUE_SLABS = RANK / 64;  // of 64 elements: 128 bytes, the width of the swizzle
constexpr int SLAB_BYTES = TILE * 128, TILE_BYTES = SLABS * SLAB_BYTES;
constexpr int Q_SLAB_BYTES = COLUMNS * 128, Q_BYTES = SLABS * Q_SLAB_BYTES;
constexpr int MULTIPLIERS = 128, THREADS = MULTIPLIERS + STAGES * LOADERS;
constexpr int NUM = COLUMNS / 2;  // numbers of a thread of 64 rows
constexpr int HEADS = COLUMNS / 4;  // of a thread
constexpr int ROWS_APART = LOADERS / 8, LOADER_ROWS = TILE / ROWS_APART;  // rows that a loading thread takes
constexpr bool IS_PRODUCT_HALF = IS_BYTES || IS_HALF;
constexpr float HIDDEN = -3e38f;     // score of a token that is not there
constexpr float NONE_YET = -1e30f;   // largest score of nothing: exp2 of the difference is 0
constexpr float MAX_GROWTH = 8.0f;   // a largest score may be exceeded so far, in units of log2, until sums are scaled
constexpr float MAX_HALF = 65504.0f;
constexpr float OF_CODES = IS_BYTES ? 1 / 256.0f : 1;  // what numbers of the cache are multiplied with

// ---- instructions ----

__device__ __forceinline__ u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }
__device__ __forceinline__ void let_next_begin() { asm volatile("griddepcontrol.launch_dependents;"); }
__device__ __forceinline__ void wait_for_input() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
// Of the registers that a thread has at first, those that load bytes need fewer, and those that multiply more.
__device__ __forceinline__ void take_registers() {
  if (IS_BYTES) asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
}
__device__ __forceinline__ void leave_registers() {
  if (IS_BYTES) asm volatile("setmaxnreg.dec.sync.aligned.u32 136;");
}
// Copy 16 bytes, or zeros.
__device__ __forceinline__ void copy(u32 to, const void* from, bool is_there) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(is_there ? 16 : 0) : "memory");
}
__device__ __forceinline__ void wait_for_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }
// Let the tensor cores see what this thread has written into shared memory.
__device__ __forceinline__ void show_written() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
__device__ __forceinline__ uint4 load_once(const void* from) {
  uint4 x;
  asm volatile("ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
               : "l"(from));
  return x;
}
__device__ __forceinline__ void store_shared(u32 address, u32 a, u32 b, u32 c, u32 d) {
  asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(a), "r"(b), "r"(c), "r"(d) : "memory");
}
__device__ __forceinline__ void sync_multipliers() { asm volatile("bar.sync 1, 128;" ::: "memory"); }
__device__ __forceinline__ bool any_of_multipliers(bool x) {
  int result;
  asm volatile(
      "{\n.reg .pred mine, any;\nsetp.ne.b32 mine, %1, 0;\nbarrier.cta.red.or.pred any, 1, 128, mine;\n"
      "selp.b32 %0, 1, 0, any;\n}"
      : "=r"(result)
      : "r"((int)x)
      : "memory");
  return result;
}
// Not to be read or changed any earlier.
template <int N>
__device__ __forceinline__ void keep(float (&values)[N]) {
#pragma unroll
  for (int i = 0; i < N; i++) asm volatile("" : "+f"(values[i])::"memory");
}
// d (+)= 64 rows of a times the columns of b, 16 elements of their sums, which lie together in b. A thread's d[4 g ...] are
// columns 8 g + 2 (lane % 4) and the next one, of its warp's row lane / 4, then of row lane / 4 + 8.
__device__ __forceinline__ void multiply_rows(float (&d)[NUM], u64 a, u64 b, bool add) {
  asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, %" ADD ", 0;\n"
               "wgmma.mma_async.sync.aligned." TYPE " {" D "}, " OPERANDS ", add, 1, 1, 0, 0;\n}"
               : SUMS
               : "l"(a), "l"(b), "r"((int)add));
}
// Likewise, with the rows of a lying together.
__device__ __forceinline__ void multiply_transposed(float (&d)[NUM], u64 a, u64 b, bool add) {
  asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, %" ADD ", 0;\n"
               "wgmma.mma_async.sync.aligned." TYPE " {" D "}, " OPERANDS ", add, 1, 1, 1, 0;\n}"
               : SUMS
               : "l"(a), "l"(b), "r"((int)add));
}
// Store two matrices [8, 8], transposed: the address of lane i < 16 is that of column i % 8 of matrix i / 8.
__device__ __forceinline__ void store_transposed(u32 to, u32 first, u32 second) {
  asm volatile("stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [%0], {%1, %2};" ::"r"(to), "r"(first), "r"(second) : "memory");
}
// A matrix [8, 8] of which a lane has 2 numbers of row lane / 4, transposed.
__device__ __forceinline__ u32 transposed(u32 pair) {
  u32 result;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(result) : "r"(pair));
  return result;
}
// Add to a counter of all blocks: what this block has written is seen by whoever adds after it.
__device__ __forceinline__ int add_and_order(int* counter, int x) {
  int before;
  asm volatile("atom.add.acq_rel.gpu.global.s32 %0, [%1], %2;" : "=r"(before) : "l"(counter), "r"(x) : "memory");
  return before;
}
__device__ __forceinline__ float power_of_2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ float log_of_2(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ u32 half_pair(float low, float high) {
  u32 pair;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}
__device__ __forceinline__ u32 bfloat_pair(float low, float high) {
  u32 pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

// ---- parts of the kernel ----

constexpr u32 ALL = 0xffffffff;

__device__ __forceinline__ u32 product_pair(float low, float high) {
  return IS_PRODUCT_HALF ? half_pair(low, high) : bfloat_pair(low, high);
}
__device__ __forceinline__ u32 result_pair(float low, float high) {
  return IS_HALF ? half_pair(low, high) : bfloat_pair(low, high);
}
__device__ __forceinline__ float in_half(u32 bits) { return fminf(fmaxf(__uint_as_float(bits), -MAX_HALF), MAX_HALF); }

// Numbers of e4m3 as float16, times 1 / OF_CODES: the first and the last two of a word whose bytes stand in the order 0, 2,
// 1, 3. The card converts by itself, but too slowly. Moved to where float16 has its exponent, e4m3's is 8 too small, and
// numbers without one stay right.
__device__ __forceinline__ u32 first_bytes(u32 x) { return (x << 7 & 0x3f803f80u) | (x << 8 & 0x80008000u); }
__device__ __forceinline__ u32 last_bytes(u32 x) { return (x >> 1 & 0x3f803f80u) | (x & 0x80008000u); }
__device__ __forceinline__ u32 in_order(u32 x) { return __byte_perm(x, x, 0x3120); }

// Where the 16 bytes of a row lie in a slab of [rows, 128 bytes] as the tensor cores want it.
__device__ __forceinline__ int place(int row, int chunk) { return row * 128 + ((chunk ^ row & 7) << 4); }

// Some tiles of a request, of a block's run.
struct Work {
  int request, seq_len, begin, first, last;  // begin: its number of the request's first tile, among all; first, last: of this
};

// Write each request's tiles, and those of all before it, into `ends`. of_warps: room for one of each.
__device__ __forceinline__ void count_tiles(const Args& a, int* ends, int* of_warps) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int each = (a.num_requests + THREADS - 1) / THREADS, first = threadIdx.x * each;
  int sum = 0;
  for (int i = first; i < min(first + each, a.num_requests); i++) sum += (a.seq_lens[i] + TILE - 1) / TILE;
  int before = sum;
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const int other = __shfl_up_sync(ALL, before, step);
    if (lane >= step) before += other;
  }
  if (lane == 31) of_warps[warp] = before;
  __syncthreads();
  before -= sum;
  for (int w = 0; w < warp; w++) before += of_warps[w];
  for (int i = first; i < min(first + each, a.num_requests); i++) {
    before += (a.seq_lens[i] + TILE - 1) / TILE;
    ends[i] = before;
  }
  __syncthreads();
}

// Find whose tile number `tile` is, of a run that ends at `end`.
__device__ __forceinline__ Work find(const Args& a, const int* ends, int tile, int end) {
  int low = 0, high = a.num_requests - 1;
  while (low < high) {
    const int middle = (low + high) / 2;
    if (ends[middle] > tile) high = middle;
    else low = middle + 1;
  }
  Work work;
  work.request = low, work.seq_len = a.seq_lens[low];
  work.begin = low ? ends[low - 1] : 0;
  work.first = tile, work.last = min(ends[low], end);
  return work;
}

// Return the block that has a tile, where the first `rest` have share + 1 each and the others `share`.
__device__ __forceinline__ int block_of(int tile, int share, int rest) {
  const int split = rest * (share + 1);
  return tile < split ? tile / (share + 1) : rest + (tile - split) / max(share, 1);
}

// Copy the queries of a request, those of heads that are not there as zeros.
__device__ __forceinline__ void load_queries(const Args& a, int request, int thread, u32 to) {
  for (int i = thread; i < COLUMNS * SLABS * 8; i += LOADERS) {
    const int head = i / (SLABS * 8), slab = i / 8 % SLABS, chunk = i % 8;
    const bool is_there = head < GROUP;
    const u16* from = slab < VALUE_SLABS ? a.q + (i64)request * a.q_stride + (i64)(is_there ? head : 0) * a.q_head_stride + 64 * slab
                                         : a.q_rope + (i64)request * a.rope_stride + (i64)(is_there ? head : 0) * a.rope_head_stride;
    const u32 at = to + slab * Q_SLAB_BYTES + place(head, chunk);
    if (!IS_BYTES || IS_HALF) {
      copy(at, from + 8 * chunk, is_there);
    } else {
      const uint4 x = *(const uint4*)(from + 8 * chunk);
      u32 words[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
      for (int w = 0; w < 4; w++) words[w] = is_there ? half_pair(in_half(words[w] << 16), in_half(words[w] & 0xffff0000u)) : 0;
      store_shared(at, words[0], words[1], words[2], words[3]);
    }
  }
}

// The tiles of one stage, which LOADERS threads copy. Eight threads take a row, 128 bytes at a time.
struct Loader {
  const Args& a;
  int thread, row, chunk;
  const int* line;  // of the table of slots
  int slots[LOADER_ROWS];
  uint4 bytes[IS_BYTES ? LOADER_ROWS : 1][5];  // of each row, on their way
  __device__ __forceinline__ Loader(const Args& a, int thread) : a(a), thread(thread) {
    // Bytes are stored as twice as many: what eight threads store at once must be of rows of which one is even, one odd.
    row = IS_BYTES ? thread / 16 * 2 + thread / 4 % 2 : thread / 8;
    chunk = IS_BYTES ? thread / 8 % 2 * 4 + thread % 4 : thread % 8;
  }
  // Past the end they are the last token's, whose values are finite.
  __device__ __forceinline__ void load_slots(int first, int seq_len) {
#pragma unroll
    for (int r = 0; r < LOADER_ROWS; r++) slots[r] = line[min(first + row + r * ROWS_APART, seq_len - 1)];
    if (a.slot_map) {
#pragma unroll
      for (int r = 0; r < LOADER_ROWS; r++) slots[r] = a.slot_map[slots[r]];
    }
  }
  __device__ __forceinline__ const u8* begin_of(int r) const { return a.cache + (i64)slots[r] * a.cache_stride + 16 * chunk; }
  __device__ __forceinline__ void copy_tile(u32 to) const {
#pragma unroll
    for (int r = 0; r < LOADER_ROWS; r++) {
      const u8* from = begin_of(r);
      const u32 at = to + place(row + r * ROWS_APART, chunk);
#pragma unroll
      for (int slab = 0; slab < SLABS; slab++) copy(at + slab * SLAB_BYTES, from + 128 * slab, true);
    }
  }
  // Rows of 8 bits have 4.5 pieces of 128: the last half is left to the first four threads.
  __device__ __forceinline__ void load_bytes() {
#pragma unroll
    for (int r = 0; r < LOADER_ROWS; r++) {
      const u8* from = begin_of(r);
#pragma unroll
      for (int i = 0; i < 4; i++) bytes[r][i] = load_once(from + 128 * i);
      if (chunk < 4) bytes[r][4] = load_once(from + 512);
    }
  }
  __device__ __forceinline__ void store_bytes(u32 to) const {
#pragma unroll
    for (int r = 0; r < LOADER_ROWS; r++)
#pragma unroll
      for (int i = 0; i < 5; i++) {
        const uint4 x = bytes[r][i];
        const u32 slab = to + (2 * i + chunk / 4) * SLAB_BYTES;
        const int mine = row + r * ROWS_APART, pair = 2 * (chunk % 4);
        const u32 words[4] = {in_order(x.x), in_order(x.y), in_order(x.z), in_order(x.w)};
        if (i == 4 && chunk >= 4) continue;
        store_shared(slab + place(mine, pair), first_bytes(words[0]), last_bytes(words[0]), first_bytes(words[1]), last_bytes(words[1]));
        store_shared(slab + place(mine, pair + 1), first_bytes(words[2]), last_bytes(words[2]), first_bytes(words[3]), last_bytes(words[3]));
      }
  }
};

// A running softmax. A thread has the heads 8 g + 2 (lane % 4) and the next one: of each the largest score (in m[2 g ...]), its
// sums, and of 64 elements after another what `multiply_rows` says.
struct Softmax {
  float m[HEADS], l[HEADS], o[VALUE_SLABS][NUM];
  __device__ __forceinline__ Softmax() {
#pragma unroll
    for (int i = 0; i < HEADS; i++) m[i] = NONE_YET, l[i] = 0;
#pragma unroll
    for (int b = 0; b < VALUE_SLABS; b++)
#pragma unroll
      for (int i = 0; i < NUM; i++) o[b][i] = 0;
  }
  // Let the largest scores be those of s too. most: room for one of each warp and column.
  __device__ __forceinline__ void grow(const float (&s)[NUM], float* most) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
    for (int i = 0; i < HEADS; i++) {
      float x = fmaxf(s[i / 2 * 4 + i % 2], s[i / 2 * 4 + i % 2 + 2]);
#pragma unroll
      for (int mask = 4; mask < 32; mask *= 2) x = fmaxf(x, __shfl_xor_sync(ALL, x, mask));
      if (lane < 4) most[warp * COLUMNS + i / 2 * 8 + 2 * lane + i % 2] = x;
    }
    sync_multipliers();
#pragma unroll
    for (int i = 0; i < HEADS; i++) {
      float x = m[i];
#pragma unroll
      for (int w = 0; w < 4; w++) x = fmaxf(x, most[w * COLUMNS + i / 2 * 8 + 2 * (lane % 4) + i % 2]);
      const float shrink = power_of_2(m[i] - x);
      m[i] = x, l[i] *= shrink;
#pragma unroll
      for (int b = 0; b < VALUE_SLABS; b++) o[b][i / 2 * 4 + i % 2] *= shrink, o[b][i / 2 * 4 + i % 2 + 2] *= shrink;
    }
  }
  // Add up what threads have of sums. sums: room for one of each warp and column.
  __device__ __forceinline__ void add_up(float* sums) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
    for (int i = 0; i < HEADS; i++) {
#pragma unroll
      for (int mask = 4; mask < 32; mask *= 2) l[i] += __shfl_xor_sync(ALL, l[i], mask);
      if (lane < 4) sums[warp * COLUMNS + i / 2 * 8 + 2 * lane + i % 2] = l[i];
    }
    sync_multipliers();
#pragma unroll
    for (int i = 0; i < HEADS; i++) {
      const float* of_head = sums + i / 2 * 8 + 2 * (lane % 4) + i % 2;
      l[i] = of_head[0] + of_head[COLUMNS] + of_head[2 * COLUMNS] + of_head[3 * COLUMNS];
    }
  }
};

// Merge the partial results of a request, of blocks that follow each other. The first one's is at `first_piece`.
__device__ __forceinline__ void merge(const Args& a, u16* out, int first_block, int first_piece, int num_pieces) {
  float m[GROUP], l[GROUP];
  float4 sum[GROUP];
#pragma unroll
  for (int h = 0; h < GROUP; h++) m[h] = NONE_YET, l[h] = 0, sum[h] = float4{0, 0, 0, 0};
  for (int i = 0; i < num_pieces; i++) {
    const i64 piece = i ? 2 * (first_block + i) : first_piece;
#pragma unroll
    for (int h = 0; h < GROUP; h++) {
      const float lse = __ldcg(a.partial_lse + piece * PARTIAL_ROWS + h);
      const float4 part = __ldcg((const float4*)(a.partial + (piece * PARTIAL_ROWS + h) * RANK) + threadIdx.x);
      const float most = fmaxf(m[h], lse), shrink = power_of_2(m[h] - most), share = power_of_2(lse - most);
      m[h] = most;
      l[h] = l[h] * shrink + share;
      sum[h].x = sum[h].x * shrink + part.x * share;
      sum[h].y = sum[h].y * shrink + part.y * share;
      sum[h].z = sum[h].z * shrink + part.z * share;
      sum[h].w = sum[h].w * shrink + part.w * share;
    }
  }
#pragma unroll
  for (int h = 0; h < GROUP; h++) {
    const float share = 1 / l[h];
    uint2 pairs;
    pairs.x = result_pair(sum[h].x * share, sum[h].y * share);
    pairs.y = result_pair(sum[h].z * share, sum[h].w * share);
    *(uint2*)(out + h * RANK + 4 * threadIdx.x) = pairs;
  }
}

// Write the result of a whole request.
__device__ __forceinline__ void write_result(const Softmax& x, u16* out) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  float share[HEADS];
#pragma unroll
  for (int i = 0; i < HEADS; i++) share[i] = 1 / (x.l[i] * OF_CODES);
#pragma unroll
  for (int b = 0; b < VALUE_SLABS; b++)
#pragma unroll
    for (int g = 0; g < COLUMNS / 8; g++)
#pragma unroll
      for (int h = 0; h < 2; h++) {
        const u32 pair = transposed(result_pair(x.o[b][4 * g + 2 * h] * share[2 * g], x.o[b][4 * g + 2 * h + 1] * share[2 * g + 1]));
        const int head = 8 * g + lane / 4;
        if (head < GROUP) *(u32*)(out + head * RANK + 64 * b + 16 * warp + 8 * h + 2 * (lane % 4)) = pair;
      }
}

// Write what a block has found of a request.
__device__ __forceinline__ void write_part(const Args& a, const Softmax& x, i64 piece) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
  for (int i = 0; i < HEADS; i++) {
    const int head = i / 2 * 8 + 2 * (lane % 4) + i % 2;
    if (head >= GROUP) continue;
    const float share = 1 / (x.l[i] * OF_CODES);
    float* to = a.partial + (piece * PARTIAL_ROWS + head) * RANK + 16 * warp + lane / 4;
#pragma unroll
    for (int b = 0; b < VALUE_SLABS; b++)
#pragma unroll
      for (int h = 0; h < 2; h++) to[64 * b + 8 * h] = x.o[b][i / 2 * 4 + i % 2 + 2 * h] * share;
    if (warp == 0 && lane < 4) a.partial_lse[piece * PARTIAL_ROWS + head] = x.m[i] + log_of_2(x.l[i]);
  }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) hopper_latents(const __grid_constant__ Args a) {
  extern __shared__ __align__(1024) unsigned char shared[];
  const u32 tiles = shared_address(shared), queries = tiles + STAGES * TILE_BYTES, weights = queries + 2 * Q_BYTES;
  const u32 full = weights + COLUMNS * 128, empty = full + 8 * STAGES;
  float* of_columns = (float*)(shared + STAGES * TILE_BYTES + 2 * Q_BYTES + COLUMNS * 128 + 16 * STAGES);  // [4, COLUMNS]
  int* of_warps = (int*)(of_columns + 4 * COLUMNS);
  int* ends = of_warps + THREADS / 32;
  let_next_begin();
  if (threadIdx.x == 0) {
    for (int i = 0; i < STAGES; i++) {
      init_barrier(full + 8 * i, LOADERS);
      init_barrier(empty + 8 * i, 4);
    }
    barriers_are_ready();
  }
  count_tiles(a, ends, of_warps);
  const int total = ends[a.num_requests - 1], num_blocks = gridDim.x, block = blockIdx.x;
  const int share = total / num_blocks, rest = total % num_blocks;
  const int begin = block * share + min(block, rest), end = begin + share + (block < rest);
  if (threadIdx.x >= MULTIPLIERS) {
    leave_registers();
    const int stage = (threadIdx.x - MULTIPLIERS) / LOADERS, thread = (threadIdx.x - MULTIPLIERS) % LOADERS;
    const u32 tile_at = tiles + stage * TILE_BYTES;
    Loader loader(a, thread);
    u32 parity = 1;
    int buffer = 0;  // of queries
    bool has_input = false;
    auto need_input = [&] {
      if (!has_input) wait_for_input();
      has_input = true;
    };
    for (int begun = begin; begun < end; buffer ^= 1) {
      const Work work = find(a, ends, begun, end);
      int tile = begun + (begun - begin + stage) % STAGES;
      loader.line = a.slot_table + (i64)a.rows[work.request] * a.table_stride;
      if (tile < work.last) loader.load_slots((tile - work.begin) * TILE, work.seq_len);
      for (; tile < work.last; tile += STAGES) {
        // The kernel ahead, or one ahead of that, writes queries and fresh tokens' latents. All else was there before.
        if ((tile + 1 - work.begin) * TILE > work.seq_len - a.num_fresh) need_input();
        if (IS_BYTES) loader.load_bytes();
        wait(empty + 8 * stage, parity);
        parity ^= 1;
        if (!IS_BYTES) loader.copy_tile(tile_at);
        if (tile == begun) {
          need_input();
          load_queries(a, work.request, thread, queries + buffer * Q_BYTES);
        }
        if (tile + STAGES < work.last) loader.load_slots((tile + STAGES - work.begin) * TILE, work.seq_len);
        if (IS_BYTES) loader.store_bytes(tile_at);
        wait_for_copies();
        show_written();
        arrive(full + 8 * stage);
      }
      begun = work.last;
    }
    need_input();
    return;
  }

  take_registers();
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const float scale = a.scale / OF_CODES;
  wait_for_input();
  int stage = 0, buffer = 0;
  u32 parity = 0;
  for (int begun = begin; begun < end; buffer ^= 1) {
    const Work work = find(a, ends, begun, end);
    Softmax x;
    for (int tile = begun; tile < work.last; tile++) {
      const u32 at = tiles + stage * TILE_BYTES;
      wait(full + 8 * stage, parity);
      float s[NUM];
      begin_products();
      {
        const u64 rows = descriptor(at), columns = descriptor(queries + buffer * Q_BYTES);
#pragma unroll
        for (int i = 0; i < WIDTH / 16; i++)
          multiply_rows(s, rows + (i / 4 * SLAB_BYTES + i % 4 * 32 >> 4), columns + (i / 4 * Q_SLAB_BYTES + i % 4 * 32 >> 4), i > 0);
      }
      commit_products();
      wait_for_products<0>();
      keep(s);
      bool grows = false;
      const int token = (tile - work.begin) * TILE + 16 * warp + lane / 4;
#pragma unroll
      for (int i = 0; i < NUM; i++) {
        s[i] *= scale;
        if (token + i % 4 / 2 * 8 >= work.seq_len) s[i] = HIDDEN;
        grows |= s[i] > x.m[i / 4 * 2 + i % 2] + MAX_GROWTH;
      }
      if (any_of_multipliers(grows)) x.grow(s, of_columns);
#pragma unroll
      for (int i = 0; i < NUM; i++) {
        s[i] = power_of_2(s[i] - x.m[i / 4 * 2 + i % 2]);
        x.l[i / 4 * 2 + i % 2] += s[i];
      }
#pragma unroll
      for (int g = 0; g < COLUMNS / 8; g++)
        store_transposed(weights + place(8 * g + lane % 8, 2 * warp + lane / 8 % 2), product_pair(s[4 * g], s[4 * g + 1]),
                         product_pair(s[4 * g + 2], s[4 * g + 3]));
      show_written();
      sync_multipliers();
#pragma unroll
      for (int b = 0; b < VALUE_SLABS; b++) keep(x.o[b]);
      begin_products();
#pragma unroll
      for (int b = 0; b < VALUE_SLABS; b++)
#pragma unroll
        for (int i = 0; i < TILE / 16; i++)
          multiply_transposed(x.o[b], descriptor(at) + (b * SLAB_BYTES + i * 16 * 128 >> 4), descriptor(weights) + (i * 32 >> 4), true);
      commit_products();
      wait_for_products<0>();
#pragma unroll
      for (int b = 0; b < VALUE_SLABS; b++) keep(x.o[b]);
      if (lane == 0) arrive(empty + 8 * stage);
      if (++stage == STAGES) stage = 0, parity ^= 1;
    }
    x.add_up(of_columns);
    u16* out = a.out + (i64)work.request * a.out_stride;
    const int num_tiles = (work.seq_len + TILE - 1) / TILE;
    if (work.last - begun == num_tiles) {
      write_result(x, out);
    } else {
      write_part(a, x, 2 * block + (begun != begin));
      if (!IS_MERGED_LATER) {
        const int first_block = block_of(work.begin, share, rest);
        const int num_pieces = block_of(work.begin + num_tiles - 1, share, rest) - first_block + 1;
        __threadfence();
        sync_multipliers();
        int* count = of_warps;
        if (threadIdx.x == 0) *count = add_and_order(a.arrivals + work.request, 1);
        sync_multipliers();
        if (*count == num_pieces - 1) {
          __threadfence();
          if (threadIdx.x == 0) a.arrivals[work.request] = 0;
          const int first_begin = first_block * share + min(first_block, rest);
          merge(a, out, first_block, 2 * first_block + (work.begin != first_begin), num_pieces);
        }
      }
    }
    sync_multipliers();  // all have read what is in common before it is written again
    begun = work.last;
  }
}
