// Attention of prompts on Hopper: softmax(scale q k^T) v over the paged cache, as `triton_prefill` has it.
//
// The pipeline is that of FlashAttention-3 (Shah et al. 2024). One warpgroup loads tiles of KEYS keys and values, others
// multiply, 64 rows each. A row is a query of one head; those of the heads that share keys stand together. Scores of the
// next tile are computed while a tile's values are still summed, and one warpgroup keeps the tensor cores busy while
// another one exponentiates. Blocks stay, and claim work after work: the next one's first scores are computed while the
// last one's results are written. And nobody asks for the largest score of a tile: weights are relative to what was the
// largest one before, which costs nothing while they can be written; where a row's grow too much a warp scores it again,
// with keys from memory: a tile's room is given to the next but one as soon as its scores are there.
//
// Where the slots of 32 tokens follow each other, the tensor memory accelerator copies their rows in one piece; where not,
// a warp copies row by row, swizzled as the accelerator would. With SHARED_DIM all slots of a request follow each other.
//
// hopper_prefill.py puts in front, besides hopper.cu: KEY_DIM and VALUE_DIM of a head, SHARED_DIM (of keys' last elements
// that are the same for all heads and stand apart, or 0), WARPGROUPS (that multiply), QUERY_BUFFERS, KEYS, STAGES, IS_HALF,
// WINDOW (0: none, 1: the last tokens, 2: chunks), HAS_SOFTCAP, HAS_SINKS, IS_SINK_FLOAT, MAX_REQUESTS, and of the
// instructions QK_TYPE, QK_D, QK_OPERANDS, QK_SUMS and PV_TYPE, PV_D, PV_OPERANDS, PV_SUMS.

typedef unsigned short u16;
typedef long long i64;
struct Args {
  const u16 *q, *k, *v;
  u16* out;
  const int *seq_lens, *cu_q_lens, *rows, *slot_table, *slot_map;
  const void* sinks;
  float* partial;  // of parts of works, see `write_part`
  int* counters;   // zeros: of works that blocks have claimed, of blocks that have ended, then of parts of each cut work
  int num_requests, q_stride, q_head_stride, k_stride, k_head_stride, v_stride, v_head_stride, out_stride, table_stride;
  int group, num_kv_heads, window, most_parts;
  u32 group_inverse;  // 2 ** 32 / group, rounded up
  float scale, softcap;  // scores times scale are in units of log2; softcap is too
};

constexpr int ROWS = 64;              // of a warpgroup
constexpr int BLOCK_ROWS = WARPGROUPS * ROWS;  // queries x heads
constexpr int HEAD_DIM = VALUE_DIM;  // of keys too, where rows are copied one by one
constexpr int KEY_SLABS = KEY_DIM / 64, VALUE_SLABS = VALUE_DIM / 64;  // of 64 columns: 128 bytes, the width of the swizzle
constexpr int OWN_SLABS = (KEY_DIM - SHARED_DIM) / 64;  // of a head's own keys
constexpr int Q_BYTES = ROWS * KEY_DIM * 2, K_BYTES = KEYS * KEY_DIM * 2, V_BYTES = KEYS * VALUE_DIM * 2;
constexpr int RUNS = KEYS / 64;       // of 32 rows, which a loading warp copies of a tile
constexpr bool HAS_TURNS = VALUE_DIM == 128;  // narrower and wider heads are faster without
constexpr int PITCH = 144;  // bytes of a staged row of 64 values: 16 more, so that rows start in different banks
constexpr int STAGING_BYTES = 16 * PITCH;
constexpr int CACHE_BYTES = 40 << 20;  // of keys and values, which an L2 cache of 50 MB keeps beside what else passes
constexpr int LEAST_PART = 512 / KEYS;  // tiles of keys that are worth a block of their own
constexpr int PART_COST = 512 / KEYS;   // what a part costs besides, as so many tiles
constexpr float HIDDEN = -3e38f;  // score of a token that is not seen
constexpr float NONE_YET = -1e30f;  // largest score of a row that has seen nothing: exp2 of the difference is 0
constexpr float LOG2_E = 1.4426950408889634f;
constexpr float MAX_GROWTH = 8.0f;  // a largest score may be exceeded so far, in units of log2, until sums are scaled
constexpr bool IS_GUESSED = QUERY_BUFFERS > 1;  // see `try_weigh`, which needs the queries longer
constexpr float MOST_WEIGHT = IS_HALF ? 16384.0f : 1048576.0f;  // that a thread may have in a tile of a guess
constexpr bool FREES_EARLY = !IS_GUESSED || WARPGROUPS == 2;  // keys; three have no registers to read them from memory

// ---- instructions ----

__device__ __forceinline__ u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }
__device__ __forceinline__ void let_next_begin() { asm volatile("griddepcontrol.launch_dependents;"); }
__device__ __forceinline__ void wait_for_input() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
__device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(WARPGROUPS == 2 ? 216 : 160));
}
__device__ __forceinline__ void leave_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(WARPGROUPS == 2 ? 72 : 32));
}
// Copy 16 bytes, or zeros.
__device__ __forceinline__ void copy(u32 to, const void* from, bool is_there) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(is_there ? 16 : 0) : "memory");
}
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Wait for this thread's copies but the last NUM groups, and let the tensor cores see them.
template <int NUM>
__device__ __forceinline__ void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;\nfence.proxy.async.shared::cta;" ::"n"(NUM) : "memory");
}
__device__ __forceinline__ void sync_warpgroup(int warpgroup) {
  asm volatile("bar.sync %0, 128;" ::"r"(1 + WARPGROUPS + warpgroup) : "memory");
}
__device__ __forceinline__ void take_turn(int warpgroup) {
  if (HAS_TURNS) asm volatile("bar.sync %0, 256;" ::"r"(1 + warpgroup) : "memory");
}
__device__ __forceinline__ void give_turn(int warpgroup) {
  if (HAS_TURNS) asm volatile("bar.arrive %0, 256;" ::"r"(1 + warpgroup) : "memory");
}
// Not to be read or changed any earlier.
template <int N>
__device__ __forceinline__ void keep(float (&values)[N]) {
#pragma unroll
  for (int i = 0; i < N; i++) asm volatile("" : "+f"(values[i])::"memory");
}
template <int N>
__device__ __forceinline__ void keep(u32 (&words)[N]) {
#pragma unroll
  for (int i = 0; i < N; i++) asm volatile("" : "+r"(words[i])::"memory");
}
// Have the assembler compute a number that is not negative before what follows: it would else put off what leads there
// until products are there that follow has to wait for, and which should run meanwhile.
__device__ __forceinline__ void must_be_known(float x) {
  asm volatile("{\n.reg .pred never;\nsetp.lt.f32 never, %0, 0f00000000;\n@never nanosleep.u32 0;\n}" ::"f"(x) : "memory");
}
// s (+)= 64 queries times KEYS keys, 16 of their columns. A thread's s[4 g ...] are keys 8 g + 2 (lane % 4) and the next
// one, of its warp's row lane / 4, then of row lane / 4 + 8.
__device__ __forceinline__ void multiply_keys(float (&s)[KEYS / 2], u64 q, u64 k, bool add) {
  asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, %" QK_ADD ", 0;\n"
               "wgmma.mma_async.sync.aligned." QK_TYPE " {" QK_D "}, " QK_OPERANDS ", add, 1, 1, 0, 0;\n}"
               : QK_SUMS
               : "l"(q), "l"(k), "r"((int)add));
}
// o (+)= 64 rows of weights of 16 keys, which lie in registers as scores do, times their values.
__device__ __forceinline__ void multiply_values(float (&o)[VALUE_DIM / 2], u32 p0, u32 p1, u32 p2, u32 p3, u64 v, bool add) {
  asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, %" PV_ADD ", 0;\n"
               "wgmma.mma_async.sync.aligned." PV_TYPE " {" PV_D "}, " PV_OPERANDS ", add, 1, 1, 1;\n}"
               : PV_SUMS
               : "r"(p0), "r"(p1), "r"(p2), "r"(p3), "l"(v), "r"((int)add));
}
// Ask whether `wait` would end at once.
__device__ __forceinline__ bool is_over(u32 barrier, u32 parity) {
  u32 is_over;
  asm volatile(
      "{\n.reg .pred over;\nmbarrier.test_wait.parity.shared::cta.b64 over, [%1], %2;\nselp.u32 %0, 1, 0, over;\n}"
      : "=r"(is_over) : "r"(barrier), "r"(parity) : "memory");
  return is_over;
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
__device__ __forceinline__ float inverse(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ float log_of_2(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ u32 pack(float low, float high) {
  u32 packed;
#if IS_HALF
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
#else
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
#endif
  return packed;
}
__device__ __forceinline__ float unpack(u16 bits) {
  float value;
#if IS_HALF
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
#else
  asm("cvt.f32.bf16 %0, %1;" : "=f"(value) : "h"(bits));
#endif
  return value;
}
// Store four tiles [8, 8]: thread i's address is that of row i % 8 of tile i / 8.
__device__ __forceinline__ void store_tiles(u32 to, const u32 (&words)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(words[0]),
               "r"(words[1]), "r"(words[2]), "r"(words[3])
               : "memory");
}
// Load four tiles [8, 8]: thread i's address is that of row i % 8 of tile i / 8; it gets two numbers of row i / 4 of each.
__device__ __forceinline__ void load_tiles(u32 (&words)[4], u32 from) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3]) : "r"(from) : "memory");
}
#if IS_HALF
#define SHORT "f16"
#else
#define SHORT "bf16"
#endif
// d[4] += 16 rows [16, 16] times 8 keys, as a warp does on its own.
__device__ __forceinline__ void multiply_alone(float* d, const u32 (&a)[4], u32 b0, u32 b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." SHORT "." SHORT ".f32"
               " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
__device__ __forceinline__ uint4 load_shared(u32 address) {
  uint4 v;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(address) : "memory");
  return v;
}

// ---- parts of the kernel ----

constexpr u32 ALL = 0xffffffff;

// Return which query of a request a row is of, without a division.
__device__ __forceinline__ int query_of(const Args& args, int row) {
  return args.group == 1 ? row : __umulhi(row, args.group_inverse);
}

struct Request {
  int q_begin, q_len, seq_len, row;
  int end;  // of its tiles among all requests'
};

struct Plan;

// The rows of a tile of one KV head, and the tiles of keys that they see, or a part of these.
struct Work {
  Request request;
  int number, first_place, part, num_parts;  // number: among those that are cut
  int head, first_row, begin, end;
  int is_there;

  // Find the one whose number `claim` returns, or one of its next numbers if that is no part of anything.
  template <class Claim>
  __device__ void find(const Args& args, const Plan& plan, Claim claim) {
    do {
      is_there = find_tile(args, plan, claim());
    } while (is_there && part >= num_parts);
  }
  __device__ bool find_tile(const Args& args, const Plan& plan, int claimed);
  __device__ int position(const Args& args, int row) const {
    return request.seq_len - request.q_len + min(query_of(args, row), request.q_len - 1);
  }
  // Return the slot of a token; past the last one, that of the last.
  __device__ int slot_of(const Args& args, int token) const {
    const int* of_tokens = args.slot_table + (i64)request.row * args.table_stride;
    token = min(token, request.seq_len - 1);
    if (args.slot_map == nullptr) return of_tokens[token];
    // What stands before the first token that is seen may be another request's.
    return args.slot_map[of_tokens[max(token, first_seen(position(args, first_row), args.window))]];
  }
  __device__ static int first_seen(int position, int window) {
    return WINDOW == 0 ? 0 : WINDOW == 2 ? position / window * window : max(position - window + 1, 0);
  }
};

struct Plan {
  Work claimed[2];  // see `Claims`
  int num_tiles, heads_abreast;
  int num_works, num_whole, num_parts;  // num_whole: works that are not cut, num_parts: into which all others are
  Request requests[MAX_REQUESTS];
};

// A stage of a ring, and what its barriers wait for.
struct Ring {
  u32 tiles, full, empty;
  int tile_bytes, stage = 0;
  u32 parity;
  __device__ Ring(u32 tiles, int tile_bytes, u32 barriers, u32 parity)
      : tiles(tiles), full(barriers), empty(barriers + 8 * STAGES), tile_bytes(tile_bytes), parity(parity) {}
  __device__ u32 tile() const { return tiles + stage * (K_BYTES == V_BYTES ? K_BYTES : tile_bytes); }
  __device__ u32 is_full() const { return full + 8 * stage; }
  __device__ u32 is_empty() const { return empty + 8 * stage; }
  __device__ void next() {
    if (++stage == STAGES) stage = 0, parity ^= 1;
  }
};

// The last tiles of a prompt see the most: they come first, so that they do not end last.
__device__ __forceinline__ bool Work::find_tile(const Args& args, const Plan& plan, int claimed) {
  int num_tiles = plan.num_tiles, abreast = plan.heads_abreast;
  number = max(claimed - plan.num_whole, 0) / plan.num_parts, first_place = number * plan.num_parts;
  part = max(claimed - plan.num_whole, 0) - first_place;
  const int among_all = min(claimed, plan.num_whole) + number;
  if (among_all >= plan.num_works) return false;
  int rest = among_all % (num_tiles * abreast);
  head = among_all / (num_tiles * abreast) * abreast + rest % abreast;
  int tile = num_tiles - 1 - rest / abreast, low = 0, high = args.num_requests - 1;
  while (low < high) {
    int middle = (low + high) / 2;
    if (plan.requests[middle].end <= tile)
      low = middle + 1;
    else
      high = middle;
  }
  request = plan.requests[low];
  first_row = (tile - (low ? plan.requests[low - 1].end : 0)) * BLOCK_ROWS;
  end = (position(args, first_row + BLOCK_ROWS - 1) + KEYS) / KEYS;
  begin = first_seen(position(args, first_row), args.window) / KEYS;
  const int num = end - begin;
  num_parts = claimed < plan.num_whole ? 1 : max(min(plan.num_parts, num / LEAST_PART), 1);
  end = begin + (part + 1) * num / num_parts;
  begin += part * num / num_parts;
  return true;
}

// Works that are too few for a whole round of all blocks are cut, in whatever way lets them end first.
__device__ __forceinline__ void cut_last_round(const Args& args, Plan& plan) {
  const int places = gridDim.x, rest = plan.num_works % places;
  Work work;
  if (args.most_parts == 1 || rest == 0 || !work.find_tile(args, plan, plan.num_works - rest)) return;
  const int length = work.end - work.begin, most = min(args.most_parts, length / LEAST_PART);
  int least = length, parts = 1;
  for (int rounds = 1; rounds <= 2; rounds++) {
    const int num = min(rounds * places / rest, most);
    const int time = num > 1 ? rounds * ((length + num - 1) / num + PART_COST) : length;
    if (time < least) least = time, parts = num;
  }
  __syncwarp();
  if (parts > 1) plan.num_whole = plan.num_works - rest, plan.num_parts = parts;
}

// List the requests, whose tiles are of BLOCK_ROWS rows, one after another. One warp does.
__device__ __forceinline__ void make_plan(const Args& args, Plan& plan) {
  int lane = threadIdx.x % 32, before = 0, longest = 1;
  for (int first = 0; first < args.num_requests; first += 32) {
    int i = first + lane;
    Request request = {};
    if (i < args.num_requests) {
      request.q_begin = args.cu_q_lens[i], request.q_len = args.cu_q_lens[i + 1] - request.q_begin;
      request.seq_len = args.seq_lens[i], request.row = args.rows[i];
      if (request.seq_len < request.q_len) request.q_len = 0;  // padding
      longest = max(longest, request.seq_len);
    }
    int sum = (request.q_len * args.group + BLOCK_ROWS - 1) / BLOCK_ROWS;
    for (int step = 1; step < 32; step *= 2) {
      int other = __shfl_up_sync(ALL, sum, step);
      if (lane >= step) sum += other;
    }
    request.end = before + sum;
    before = __shfl_sync(ALL, request.end, 31);
    if (i < args.num_requests) plan.requests[i] = request;
  }
  for (int step = 16; step; step /= 2) longest = max(longest, __shfl_xor_sync(ALL, longest, step));
  // Heads whose keys and values stay in the L2 cache together while blocks go through them.
  int abreast = args.num_kv_heads;
  while (abreast > 1 && (args.num_kv_heads % abreast || longest > CACHE_BYTES / (2 * (KEY_DIM + VALUE_DIM)) / abreast)) abreast--;
  plan.num_tiles = before, plan.heads_abreast = abreast;
  plan.num_works = plan.num_whole = before * args.num_kv_heads, plan.num_parts = 1;
  __syncwarp();
  cut_last_round(args, plan);
}

// Works, of which one warp claims for its block always the next one that no block has, and all others read.
struct Claims {
  Plan& plan;
  u32 full, empty;
  int count = 0;  // of works that this warp has had
  int number;     // of the next one, that the first lane has asked for
  bool has_number = true;
  __device__ Claims(Plan& plan, u32 barriers) : plan(plan), full(barriers), empty(barriers + 16), number(blockIdx.x) {}
  // The answer takes a while. But whoever asks too early takes from blocks that are free before.
  __device__ void ask(const Args& args) {
    if (threadIdx.x == 0) number = gridDim.x + atomicAdd(args.counters, 1);
    has_number = true;
  }
  __device__ bool make(const Args& args, Work& work) {
    work.find(args, plan, [&] {
      if (!has_number) ask(args);
      has_number = false;
      return __shfl_sync(ALL, number, 0);
    });
    const int slot = count % 2;
    if (threadIdx.x == 0) {
      wait(empty + 8 * slot, (count / 2 & 1) ^ 1);
      plan.claimed[slot] = work;
      arrive(full + 8 * slot);
    }
    count++;
    return work.is_there;
  }
  __device__ bool read(Work& work) {
    const int slot = count % 2;
    wait(full + 8 * slot, count / 2 & 1);
    work = plan.claimed[slot];
    __syncwarp();
    if (threadIdx.x % 32 == 0) arrive(empty + 8 * slot);
    count++;
    return work.is_there;
  }
};
// Leave counters as they were. One thread of each block does, once it has claimed its last work.
__device__ __forceinline__ void end_claims(const Args& args) {
  __threadfence();
  if (atomicAdd(args.counters + 1, 1) == gridDim.x - 1) args.counters[0] = args.counters[1] = 0;
}

// Copy the queries of a warpgroup's rows; zeros past the last one.
__device__ __forceinline__ void copy_queries(const Args& args, const Work& work, int warpgroup, u32 to) {
  constexpr int PIECES = KEY_DIM / 8;  // of 16 bytes
  int thread = threadIdx.x % 128;
#pragma unroll 4
  for (int i = 0; i < ROWS * PIECES / 128; i++) {
    int piece = (i * 128 + thread) % PIECES, row = (i * 128 + thread) / PIECES, at = work.first_row + warpgroup * ROWS + row;
    int query = query_of(args, at), head = (work.head - query) * args.group + at;
    bool is_row = query < work.request.q_len;
    const u16* from = args.q;
    if (is_row) from += (i64)(work.request.q_begin + query) * args.q_stride + head * args.q_head_stride + 8 * piece;
    copy(to + piece / 8 * (ROWS * 128) + row * 128 + (piece % 8 ^ row % 8) * 16, from, is_row);
  }
  commit_copies();
}

// Copy the rows `slot` of each lane, from a head's first column on, to the 32 rows of a tile from `first` on. Addresses
// come as many at a time as registers hold: one by one, each would wait for what it is made of.
__device__ __forceinline__ void copy_rows(const u16* from, int stride, int slot, int first, u32 tile) {
  constexpr int PIECES = HEAD_DIM / 8, AT_ONCE = 32 / PIECES, COPIES = 32 / AT_ONCE, PERIOD = 8 / AT_ONCE;
  constexpr int MANY = WARPGROUPS == 2 ? 8 : 2;
  const int lane = threadIdx.x % 32, piece = lane % PIECES, mine = lane / PIECES;
  const char* column = (const char*)(from + 8 * piece);
  const u32 row_bytes = 2 * stride;
  u32 to[PERIOD];
#pragma unroll
  for (int i = 0; i < PERIOD; i++) {
    const int row = first + i * AT_ONCE + mine;
    to[i] = tile + piece / 8 * (KEYS * 128) + row * 128 + (piece % 8 ^ row % 8) * 16;
  }
#pragma unroll
  for (int i = 0; i < COPIES; i += MANY) {
    const char* rows[MANY];
#pragma unroll
    for (int j = 0; j < MANY; j++) {
      const u32 slot_of_row = __shfl_sync(ALL, slot, (i + j) * AT_ONCE + mine);
      rows[j] = column + (u64)slot_of_row * row_bytes;
    }
#pragma unroll
    for (int j = 0; j < MANY; j++) copy(to[(i + j) % PERIOD] + (i + j) / PERIOD * 1024, rows[j], true);
  }
}

// What a loading warp does: a half of each tile of keys, or of values. Keys and values have warps of their own since who
// waits for copied rows waits for all that are on their way.
struct Loader {
  const Args& args;
  const TensorMap *map, *shared_map;
  Ring ring;
  bool has_values;
  int lane, first;  // first: of its rows in a tile

  __device__ void find_slots(const Work& work, int tile, int (&slots)[RUNS]) const {
#pragma unroll
    for (int i = 0; i < RUNS; i++) {
      const int token = tile * KEYS + first + 32 * i + lane;
      // Past the end stand another request's shared keys, or zeros, which no row sees.
      slots[i] = SHARED_DIM ? work.request.row + token : work.slot_of(args, token);
    }
  }
  __device__ void load_half(int head, const int (&slots)[RUNS]) {
    int num_copied = 0;
    wait(ring.is_empty(), ring.parity);
#pragma unroll
    for (int i = 0; i < RUNS; i++) {
      int row = first + 32 * i, slot = __shfl_sync(ALL, slots[i], 0);
      if (SHARED_DIM || __all_sync(ALL, slots[i] == slot + lane)) {
        if (lane == 0) {
          const int num_slabs = has_values ? VALUE_SLABS : KEY_SLABS, num_own = has_values ? VALUE_SLABS : OWN_SLABS;
          expect(ring.is_full(), 32 * 128 * num_slabs);
#pragma unroll
          for (int j = 0; j < KEY_SLABS; j++) {
            if (j == num_slabs) break;
            const bool is_own = j < num_own;
            load3(ring.tile() + j * (KEYS * 128) + row * 128, is_own ? map : shared_map, 64 * (is_own ? j : j - num_own),
                  is_own ? head : 0, slot, ring.is_full());
          }
        }
      } else {
        const u16* from = has_values ? args.v : args.k;
        i64 head_stride = has_values ? args.v_head_stride : args.k_head_stride;
        copy_rows(from + head * head_stride, has_values ? args.v_stride : args.k_stride, slots[i], row, ring.tile());
        num_copied++;
      }
    }
    if (num_copied) {
      commit_copies();
      wait_for_copies<0>();
      __syncwarp();
      if (lane == 0)
        for (int i = 0; i < num_copied; i++) arrive(ring.is_full());
    }
    ring.next();
  }
};

// Cap scores: c tanh(x) = c - 2 c / (1 + exp(2 x)).
__device__ __forceinline__ void cap(float (&s)[KEYS / 2], const Args& args) {
  const float factor = 2.0f * LOG2_E * args.scale / args.softcap;
#pragma unroll
  for (int i = 0; i < KEYS / 2; i++)
    s[i] = args.softcap - 2.0f * args.softcap * inverse(1.0f + power_of_2(s[i] * factor));
}

// A row's part of the softmax so far, of the two rows that a thread has columns of.
struct Softmax {
  float m[2] = {NONE_YET, NONE_YET}, l[2] = {0.0f, 0.0f}, alpha[2];

  // Make weights of scores, and say by what (alpha) to multiply what was summed before. Return whether by anything but 1.
  __device__ __forceinline__ bool weigh(float (&s)[KEYS / 2], float scale) {
    bool grows = false;
#pragma unroll
    for (int h = 0; h < 2; h++) {
      float a = fmaxf(s[2 * h], s[2 * h + 1]), b = fmaxf(s[2 * h + 4], s[2 * h + 5]);
#pragma unroll
      for (int g = 2; g < KEYS / 8; g += 2) {
        a = fmaxf(a, fmaxf(s[4 * g + 2 * h], s[4 * g + 2 * h + 1]));
        b = fmaxf(b, fmaxf(s[4 * g + 2 * h + 4], s[4 * g + 2 * h + 5]));
      }
      a = fmaxf(a, b);
      a = fmaxf(a, __shfl_xor_sync(ALL, a, 1));
      a = fmaxf(a, __shfl_xor_sync(ALL, a, 2)) * scale;
      alpha[h] = 1.0f;
      if (a > m[h] + MAX_GROWTH) alpha[h] = power_of_2(m[h] - a), m[h] = a, grows = true;
    }
#pragma unroll
    for (int h = 0; h < 2; h++) {
      float sums[2] = {l[h] * alpha[h], 0.0f};
#pragma unroll
      for (int g = 0; g < KEYS / 8; g++) {
#pragma unroll
        for (int e = 0; e < 2; e++) {
          float& x = s[4 * g + 2 * h + e];
          x = power_of_2(fmaf(x, scale, -m[h]));
          sums[e] += x;
        }
      }
      l[h] = sums[0] + sums[1];
    }
    return __any_sync(ALL, grows);
  }
  // Make weights of scores as if these were no larger than those before, which spares looking for the largest one. Return
  // whether that is right or nearly so, as nearly always: weights beyond 1 are no less exact. Else nothing holds.
  __device__ __forceinline__ bool try_weigh(float (&s)[KEYS / 2], float scale) {
    float sums[2][2] = {};
#pragma unroll
    for (int h = 0; h < 2; h++) {
#pragma unroll
      for (int g = 0; g < KEYS / 8; g++) {
#pragma unroll
        for (int e = 0; e < 2; e++) {
          float& x = s[4 * g + 2 * h + e];
          x = power_of_2(fmaf(x, scale, -m[h]));
          sums[h][e] += x;
        }
      }
    }
    const float first = sums[0][0] + sums[0][1], second = sums[1][0] + sums[1][1];
    if (!__all_sync(ALL, first <= MOST_WEIGHT && second <= MOST_WEIGHT)) return false;
    l[0] += first, l[1] += second;
    return true;
  }
  // Return whether all rows of the warp have seen something, and so a largest score.
  __device__ __forceinline__ bool has_seen() const {
    return __all_sync(ALL, m[0] > NONE_YET && m[1] > NONE_YET);
  }
  // Sum up the weights of a row's columns, which four threads have.
  __device__ __forceinline__ void finish() {
#pragma unroll
    for (int h = 0; h < 2; h++) {
      l[h] += __shfl_xor_sync(ALL, l[h], 1);
      l[h] += __shfl_xor_sync(ALL, l[h], 2);
    }
  }
};

// Compute the scores of a warp's rows again, `queries` in their swizzled slabs; `keys` too, where these are not freed yet.
__device__ __forceinline__ void score_again(float (&s)[KEYS / 2], const Args& args, const Work& work, int tile, u32 queries,
                                            u32 keys) {
  const int lane = threadIdx.x % 32, row = threadIdx.x / 32 % 4 * 16 + lane % 16, swizzle = lane % 8;
  int slots[KEYS / 32];
#pragma unroll
  for (int i = 0; i < KEYS / 32; i++) slots[i] = FREES_EARLY ? work.slot_of(args, tile * KEYS + 32 * i + lane) : 0;
#pragma unroll
  for (int i = 0; i < KEYS / 2; i++) s[i] = 0.0f;
#pragma unroll 1
  for (int column = 0; column < KEY_DIM / 8; column += 2) {  // of pieces of 16 bytes
    const int slab = column / 8, piece = column % 8;
    u32 q[4], k[4];
    load_tiles(q, queries + slab * (ROWS * 128) + row * 128 + ((piece + lane / 16) ^ swizzle) * 16);
    const u32 at = (lane / 16 * 8 + swizzle) * 128 + ((piece + lane / 8 % 2) ^ swizzle) * 16;
    const u32* pair = (const u32*)(args.k + work.head * args.k_head_stride + 8 * column) + lane % 4;
#pragma unroll
    for (int g = 0; g < KEYS / 8; g += 2) {
      if (FREES_EARLY) {
#pragma unroll
        for (int i = 0; i < 2; i++) {
          const i64 slot = __shfl_sync(ALL, slots[(g + i) / 4], (g + i) % 4 * 8 + lane / 4);
          const u32* of_key = pair + slot * (args.k_stride / 2);
          k[2 * i] = of_key[0], k[2 * i + 1] = of_key[4];
        }
      } else {
        load_tiles(k, keys + slab * (KEYS * 128) + at + g * 1024);
      }
      multiply_alone(s + 4 * g, q, k[0], k[1]);
      multiply_alone(s + 4 * g + 4, q, k[2], k[3]);
    }
  }
}

// ---- parts of a context that several blocks have shared out ----

constexpr int PART_VALUES = VALUE_DIM / 2 + 4;  // of a thread: its sums, m and l

__device__ __forceinline__ float* place_of_part(const Args& args, const Work& work, int warpgroup, int part) {
  const i64 number = (i64)(work.first_place + part) * WARPGROUPS + warpgroup;
  return args.partial + number * (PART_VALUES * 128) + threadIdx.x % 128;
}
__device__ __forceinline__ void write_part(const Args& args, const Work& work, int warpgroup,
                                           const float (&o)[VALUE_DIM / 2], const Softmax& softmax) {
  float* to = place_of_part(args, work, warpgroup, work.part);
#pragma unroll
  for (int i = 0; i < VALUE_DIM / 2; i++) __stcg(to + 128 * i, o[i]);
#pragma unroll
  for (int h = 0; h < 2; h++) {
    __stcg(to + 128 * (VALUE_DIM / 2 + h), softmax.m[h]);
    __stcg(to + 128 * (VALUE_DIM / 2 + 2 + h), softmax.l[h]);
  }
}
// Return whether this warpgroup is the last one to have written a part of its rows.
__device__ __forceinline__ bool is_last_part(const Args& args, const Work& work, int warpgroup, volatile int* told) {
  sync_warpgroup(warpgroup);
  if (threadIdx.x % 128 == 0) {
    int* arrivals = args.counters + 2 + work.number * WARPGROUPS + warpgroup;
    const bool is_last = add_and_order(arrivals, 1) == work.num_parts - 1;
    if (is_last) *arrivals = 0;
    *told = is_last;
  }
  sync_warpgroup(warpgroup);
  const bool is_last = *told;
  sync_warpgroup(warpgroup);  // before anything else is written there
  return is_last;
}
// Add up all parts in their order, so that the result does not depend on which one came last.
__device__ __forceinline__ void merge_parts(const Args& args, const Work& work, int warpgroup, float (&o)[VALUE_DIM / 2],
                                            Softmax& softmax) {
  softmax = Softmax();
  for (int part = 0; part < work.num_parts; part++) {
    const float* from = place_of_part(args, work, warpgroup, part);
    float weight[2];
#pragma unroll
    for (int h = 0; h < 2; h++) {
      const float m = __ldcg(from + 128 * (VALUE_DIM / 2 + h)), l = __ldcg(from + 128 * (VALUE_DIM / 2 + 2 + h));
      const float most = fmaxf(m, softmax.m[h]);
      softmax.alpha[h] = part ? power_of_2(softmax.m[h] - most) : 0.0f, weight[h] = power_of_2(m - most);
      softmax.l[h] = softmax.l[h] * softmax.alpha[h] + l * weight[h], softmax.m[h] = most;
    }
#pragma unroll
    for (int i = 0; i < VALUE_DIM / 2; i++) {
      const float before = part ? o[i] * softmax.alpha[i % 4 / 2] : 0.0f;
      o[i] = before + __ldcg(from + 128 * i) * weight[i % 4 / 2];
    }
  }
}

extern "C" __global__ void __launch_bounds__(128 + 128 * WARPGROUPS, 1)
    hopper_prefill(const __grid_constant__ Args args, const __grid_constant__ TensorMap k_map,
                   const __grid_constant__ TensorMap v_map, const __grid_constant__ TensorMap shared_map) {
  extern __shared__ __align__(1024) unsigned char shared[];
  const u32 queries = shared_address(shared), keys = queries + QUERY_BUFFERS * WARPGROUPS * Q_BYTES;
  const u32 values = keys + STAGES * K_BYTES, staging = values + STAGES * V_BYTES;
  const u32 barriers = staging + 4 * WARPGROUPS * STAGING_BYTES, claim_barriers = barriers + 32 * STAGES;
  Plan& plan = *(Plan*)(shared + (claim_barriers - queries) + 32);

  let_next_begin();
  if (threadIdx.x < 32) {
    if (threadIdx.x == 0) {
      for (int i = 0; i < 4 * STAGES; i++) init_barrier(barriers + 8 * i, i / STAGES % 2 ? 4 * WARPGROUPS : KEYS / 32);
      for (int i = 0; i < 4; i++) init_barrier(claim_barriers + 8 * i, i < 2 ? 1 : 3 + 4 * WARPGROUPS);
      barriers_are_ready();
    }
    __syncwarp();
    make_plan(args, plan);
  }
  __syncthreads();
  wait_for_input();

  Work work;
  if (threadIdx.x < 128) {
    leave_registers();
    const int warp = __shfl_sync(ALL, threadIdx.x / 32, 0);
    const bool has_values = warp >= 2;
    const Ring ring = has_values ? Ring(values, V_BYTES, barriers + 16 * STAGES, 1) : Ring(keys, K_BYTES, barriers, 1);
    Loader loader = {args, has_values ? &v_map : &k_map, &shared_map, ring, has_values, (int)threadIdx.x % 32,
                     warp % 2 * (KEYS / 2)};
    Claims claims(plan, claim_barriers);
    while (warp ? claims.read(work) : claims.make(args, work)) {
      int slots[RUNS], next_slots[RUNS];
      loader.find_slots(work, work.end - 1, next_slots);
      for (int tile = work.end - 1; tile >= work.begin; tile--) {
#pragma unroll
        for (int i = 0; i < RUNS; i++) slots[i] = next_slots[i];
        if (tile > work.begin)
          loader.find_slots(work, tile - 1, next_slots);
        else if (warp == 0)
          claims.ask(args);
        loader.load_half(work.head, slots);
      }
    }
    if (threadIdx.x == 0) end_claims(args);
  } else {
    take_registers();
    // What is one number of a warp is kept where the tensor cores read addresses; of wide keys there are too many.
    const int warpgroup = (KEY_DIM > 128 ? threadIdx.x / 128 : __shfl_sync(ALL, threadIdx.x / 128, 0)) - 1;
    const int warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
    const u32 my_staging = staging + (4 * warpgroup + warp) * STAGING_BYTES;
    Ring k(keys, K_BYTES, barriers, 0), v(values, V_BYTES, barriers + 16 * STAGES, 0);
    auto free = [&](Ring& ring) {
      if (lane == 0) arrive(ring.is_empty());
      ring.next();
    };
    const float scale = HAS_SOFTCAP ? 1.0f : args.scale;
    float s[KEYS / 2], o[VALUE_DIM / 2];
    u32 p[KEYS / 4];
    int buffer = 0;  // of queries
    auto my_queries = [&] { return queries + (WARPGROUPS * buffer + warpgroup) * Q_BYTES; };
    auto start_scores = [&] {
      const u64 q = descriptor(my_queries()), tile = descriptor(k.tile());
#pragma unroll
      for (int i = 0; i < KEY_DIM / 16; i++)
        multiply_keys(s, q + (i / 4 * (ROWS * 128) + i % 4 * 32 >> 4), tile + (i / 4 * (KEYS * 128) + i % 4 * 32 >> 4),
                      i > 0);
      commit_products();
    };
    auto start_sums = [&](bool add) {
      const u64 tile = descriptor(v.tile(), KEYS * 128);
#pragma unroll
      for (int i = 0; i < KEYS / 16; i++)
        multiply_values(o, p[4 * i], p[4 * i + 1], p[4 * i + 2], p[4 * i + 3], tile + (i * 16 * 128 >> 4), add || i > 0);
      commit_products();
    };
    auto pack_weights = [&] {
#pragma unroll
      for (int i = 0; i < KEYS / 4; i++) p[i] = pack(s[2 * i], s[2 * i + 1]);
    };

    // The next work's queries are copied, and its first scores started, while this one's last tile is dealt with.
    Claims claims(plan, claim_barriers);
    Work next;
    auto fetch_next = [&] {
      claims.read(next);
      if (QUERY_BUFFERS > 1)
        buffer ^= 1;
      else
        sync_warpgroup(warpgroup);  // all have multiplied their queries
      if (next.is_there) copy_queries(args, next, warpgroup, my_queries());
    };
    // Where there is no next one, of anything: the compiler wants to see products started that are waited for.
    auto start_next = [&] {
      if (next.is_there) {
        wait_for_copies<0>();
        sync_warpgroup(warpgroup);
        wait(k.is_full(), k.parity);
        take_turn(warpgroup);
      }
      begin_products();
      start_scores();
      if (next.is_there) give_turn((warpgroup + 1) % WARPGROUPS);
    };

    if (warpgroup == WARPGROUPS - 1) give_turn(0);
    fetch_next();
    start_next();
    while (next.is_there) {
      work = next;
      const int row = work.first_row + warpgroup * ROWS + warp * 16;  // of the warp's first one
      int last[2], first[2];  // tokens that a thread's two rows see
#pragma unroll
      for (int h = 0; h < 2; h++) {
        last[h] = work.position(args, row + lane / 4 + 8 * h);
        first[h] = Work::first_seen(last[h], args.window);
      }
      const int top = work.first_row + warpgroup * ROWS;
      const int all_last = work.position(args, top);
      const int all_first = Work::first_seen(work.position(args, top + ROWS - 1), args.window);
      auto mask = [&](int tile) {
        if (HAS_SOFTCAP) cap(s, args);
        if ((tile + 1) * KEYS <= all_last + 1 && (WINDOW == 0 || tile * KEYS >= all_first)) return;
#pragma unroll
        for (int i = 0; i < KEYS / 2; i++) {
          const int h = i % 4 / 2, token = tile * KEYS + lane % 4 * 2 + i / 4 * 8 + i % 2;
          if (token > last[h] || (WINDOW && token < first[h])) s[i] = HIDDEN;
        }
      };
      Softmax softmax;

      wait_for_products<0>();
      keep(s);
      free(k);
      if (work.begin == work.end - 1) fetch_next();
      mask(work.end - 1);
      softmax.weigh(s, scale);
      pack_weights();
      bool may_guess = IS_GUESSED && softmax.has_seen();
      bool add = false, has_keys = false, has_values = false;
      for (int tile = work.end - 2; tile >= work.begin; tile--) {
        if (!has_values) wait(v.is_full(), v.parity);
        if (!has_keys) wait(k.is_full(), k.parity);
        take_turn(warpgroup);
        begin_products();
        start_scores();
        start_sums(add);
        give_turn((warpgroup + 1) % WARPGROUPS);
        add = true;
        wait_for_products<1>();
        keep(s);
        const u32 scored = my_queries();
        if (FREES_EARLY) free(k);
        if (tile == work.begin) fetch_next();
        mask(tile);
        bool grows = false;
        if (!may_guess || !softmax.try_weigh(s, scale)) {
          if (may_guess) {
            score_again(s, args, work, tile, scored, k.tile());
            mask(tile);
          }
          grows = softmax.weigh(s, scale);
          if (IS_GUESSED) may_guess = softmax.has_seen();
        }
        if (!FREES_EARLY) free(k);
        has_keys = is_over(k.is_full(), k.parity);
        keep(s);
        must_be_known(softmax.l[0] + softmax.l[1]);
        wait_for_products<0>();
        keep(o);
        keep(p);
        free(v);
        has_values = is_over(v.is_full(), v.parity);
        if (grows) {
#pragma unroll
          for (int i = 0; i < VALUE_DIM / 2; i++) o[i] *= softmax.alpha[i % 4 / 2];
        }
        pack_weights();
      }
      wait(v.is_full(), v.parity);
      begin_products();
      start_sums(add);
      softmax.finish();
      start_next();
      wait_for_products<1>();
      keep(o);
      keep(p);
      free(v);
      if (work.num_parts > 1) {
        write_part(args, work, warpgroup, o, softmax);
        volatile int* told = (volatile int*)(shared + (my_staging - warp * STAGING_BYTES - queries));
        if (!is_last_part(args, work, warpgroup, told)) continue;
        merge_parts(args, work, warpgroup, o, softmax);
      }
      float factor[2];
#pragma unroll
      for (int h = 0; h < 2; h++) {
        factor[h] = 1.0f / softmax.l[h];
        if (HAS_SINKS) {
          const int at = row + lane / 4 + 8 * h, head = (work.head - query_of(args, at)) * args.group + at;
          const float sink = IS_SINK_FLOAT ? ((const float*)args.sinks)[head] : unpack(((const u16*)args.sinks)[head]);
          factor[h] *= inverse(1.0f + power_of_2(sink * LOG2_E - softmax.m[h] - log_of_2(softmax.l[h])));
        }
      }
      u16* to[4];  // where the thread writes pieces of rows
      bool is_row[4];
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const int at = row + i * 4 + lane / 8, query = query_of(args, at), head = (work.head - query) * args.group + at;
        is_row[i] = query < work.request.q_len;
        to[i] = args.out + (i64)(work.request.q_begin + query) * args.out_stride + head * VALUE_DIM + lane % 8 * 8;
      }
#pragma unroll
      for (int slab = 0; slab < VALUE_SLABS; slab++) {
        __syncwarp();
#pragma unroll
        for (int g = 0; g < 8; g += 2) {
          u32 words[4];
#pragma unroll
          for (int i = 0; i < 4; i++) {
            const float* d = o + 32 * slab + 4 * g + 2 * i;
            words[i] = pack(d[0] * factor[i % 2], d[1] * factor[i % 2]);
          }
          store_tiles(my_staging + lane % 16 * PITCH + (g + lane / 16) * 16, words);
        }
        __syncwarp();
#pragma unroll
        for (int i = 0; i < 4; i++) {
          const uint4 piece = load_shared(my_staging + (i * 4 + lane / 8) * PITCH + lane % 8 * 16);
          if (is_row[i]) *(uint4*)(to[i] + 64 * slab) = piece;
        }
      }
    }
    wait_for_products<0>();
  }
}
