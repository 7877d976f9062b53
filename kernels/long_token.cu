// Attention of a single token behind a long context straight from its products, for Hopper: as in one_token_heads.cu.
//
// All multiprocessors have a part of the tokens for a KV head. Tiles of 16 tokens go round a block's warps, the next one's
// keys and values on their way to registers while one is multiplied. Parts meet in memory, where the last block to arrive
// merges them, always in the same order.

constexpr int WAVE = WARPS * TILE;      // tokens that a block takes at a time
constexpr int PART = G * D + 2 * G;     // floats of a part's result: sums, largest scores, sums of weights
// Floats of shared memory in which warps' results meet, by head or by lane.
constexpr int BY_HEAD = G * (STRIDE + 2), BY_LANE = RESULTS < WARPS ? 32 * Softmax::NUMBERS : 0;
constexpr int MEETING = RESULTS * (BY_HEAD > BY_LANE ? BY_HEAD : BY_LANE);

struct __align__(16) Scratch {  // in shared memory, behind the warps' results
  uint4 q[PIECES][32];          // the query heads as lanes have them
  float angles[2 * HALF + 4];   // of the new token
  u16 norms[2][D];              // weights of the query's and the key's
  u16 new_vectors[2][D];        // the new token's key and value
  bool is_last_part;
};

// Counts an arrival: who has the last one sees what all blocks had written before theirs. Returns the number before.
__device__ __forceinline__ int arrive(int* counter) {
  int before;
  asm volatile("atom.acq_rel.gpu.global.add.s32 %0, [%1], 1;" : "=r"(before) : "l"(counter) : "memory");
  return before;
}

extern "C" __global__ void __launch_bounds__(32 * WARPS) long_token(const __grid_constant__ Args args) {
  let_next_begin();
  Scratch& scratch = *(Scratch*)(shared + MEETING);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;

  const int len = args.seq_lens[0], first_seen = first_seen_from(len - 1, args.window);
  const int places = gridDim.x / args.num_kv_heads, part = blockIdx.x / args.num_kv_heads;
  const int length = max((len - first_seen + places - 1) / places + TILE - 1, WAVE) / TILE * TILE;  // of a part
  const int num_parts = (len - first_seen + length - 1) / length;
  if (len == 0 || part >= num_parts) {  // padding, or too short to be shared out to all
    wait_for_input();
    return;
  }
  const int kv_head = blockIdx.x % args.num_kv_heads;
  const int begin = first_seen + part * length, num_tokens = min(length, len - begin);
  const int new_token = len - 1 - begin;  // of the part's, if it is below num_tokens

  const int row = lane / 4, d = lane % 4 * 8;  // a lane's head, or token of 8; and its first element of each 32
  const int own = warp * TILE;                 // this warp's first token
  const int* slots = args.slot_table + args.rows[0] * args.table_stride + begin;
  const u16* keys = args.k_cache + kv_head * args.k_head_stride + d;
  const u16* values = args.v_cache + kv_head * args.v_head_stride + d;
  auto slot_of = [&](int token) { return HAS_MAP ? args.slot_map[slots[token]] : slots[token]; };

  int slot[2], next_slot[2];
  Vector k[2], v[2];
  auto find = [&](int (&found)[2], int first) {  // what earlier steps stored
#pragma unroll
    for (int u = 0; u < 2; u++) {
      const int token = first + 8 * u + row;
      found[u] = token < num_tokens && token != new_token ? slot_of(token) : -1;
    }
  };
  auto load = [&](Vector (&x)[2], const u16* from, long long stride) {
#pragma unroll
    for (int u = 0; u < 2; u++)
#pragma unroll
      for (int j = 0; j < PIECES; j++) {
        if (slot[u] >= 0) load_piece(x[u].words[j], from + slot[u] * stride + 32 * j);
        else x[u].words[j][0] = x[u].words[j][1] = x[u].words[j][2] = x[u].words[j][3] = 0;
      }
  };
  find(slot, own);
  load(k, keys, args.k_stride);
  load(v, values, args.v_stride);
  find(next_slot, own + WAVE);
  const float* own_angles = args.cos_sin + (long long)args.positions[0] * 2 * HALF;
  for (int i = threadIdx.x; i < 2 * HALF; i += 32 * WARPS) scratch.angles[i] = own_angles[i];
  for (int i = threadIdx.x; i < D; i += 32 * WARPS) {
    if (args.q_norm) scratch.norms[0][i] = args.q_norm[i];
    if (args.k_norm) scratch.norms[1][i] = args.k_norm[i];
  }
  __syncthreads();
  wait_for_input();

  auto made = [&](const u16* from, const u16* norm, const u16* weights) {  // a query or key of products
    Vector weight;
    if (norm) weight = load_vector(weights, d);
    const RotationInMemory rotation = {scratch.angles};
    return rotated(load_vector(from, d), from, norm ? weights : nullptr, weight, rotation, args.eps, d);
  };
  if (warp == 0) {
    const Vector q = made(args.qkv + (kv_head * G + min(row, G - 1)) * D, args.q_norm, scratch.norms[0]);
#pragma unroll
    for (int j = 0; j < PIECES; j++) scratch.q[j][lane] = *(const uint4*)q.words[j];
  } else if (warp == 1 && new_token < num_tokens) {
    const u16* new_key = args.qkv + (args.num_kv_heads * G + kv_head) * D;
    const Vector key = made(new_key, args.k_norm, scratch.norms[1]);
    if (row == 0) {
      const Vector value = load_vector(new_key + args.num_kv_heads * D, d);
      const int new_slot = slot_of(new_token);
      store_vector(args.k_cache + new_slot * args.k_stride + kv_head * args.k_head_stride, key, d);
      store_vector(args.v_cache + new_slot * args.v_stride + kv_head * args.v_head_stride, value, d);
      store_vector(scratch.new_vectors[0], key, d);
      store_vector(scratch.new_vectors[1], value, d);
    }
  }
  __syncthreads();

  Softmax softmax;
  softmax.clear();
  for (int first = own; first < num_tokens; first += WAVE) {
    const int new_row = new_token - first;  // of the tile, if it is below TILE
    auto put_new = [&](Vector (&x)[2], const u16* from) {
      if (0 <= new_row && new_row < TILE)
#pragma unroll
        for (int u = 0; u < 2; u++)
          if (row + 8 * u == new_row) x[u] = load_vector(from, d);
    };
    put_new(k, scratch.new_vectors[0]);
    float scores[2][4];
    clear(scores);
#pragma unroll
    for (int j = 0; j < PIECES; j++) {
      const uint4 q = scratch.q[j][lane];
      score({q.x, q.y, q.z, q.w}, k, j, scores);
    }
#pragma unroll
    for (int u = 0; u < 2; u++) slot[u] = next_slot[u];
    load(k, keys, args.k_stride);
    find(next_slot, first + 2 * WAVE);
#pragma unroll
    for (int u = 0; u < 2; u++)
#pragma unroll
      for (int i = 0; i < 2; i++) {
        const int token = first + 8 * u + lane % 4 * 2 + i;
        scores[u][i] = token < num_tokens ? capped(scores[u][i] * args.scale, args.softcap) : NONE;
      }
    u32 weights[2];
    softmax.weigh(scores, weights, lane);
    put_new(v, scratch.new_vectors[1]);
    softmax.add(weights, v[0], v[1]);
    load(v, values, args.v_stride);
  }

  // The second half of the warps hands what it has found to the first, if shared memory has no room for all.
  const int num_busy = min(RESULTS, (num_tokens + TILE - 1) / TILE);
  if (RESULTS < WARPS) {
    float* handed = shared + warp % RESULTS * 32 * Softmax::NUMBERS + lane;
    if (warp >= RESULTS) softmax.hand_over(handed);
    __syncthreads();
    if (warp < RESULTS) softmax.take_over(handed, lane);
    __syncthreads();
  }
  const Parts results(STRIDE);
  if (warp < num_busy) softmax.store(results, warp, lane);
  __syncthreads();
  u16* out = args.out + kv_head * G * D;
  float* own_part = args.parts + blockIdx.x * PART;
  for (int i = threadIdx.x; i < G * D; i += 32 * WARPS) {
    const int g = i / D;
    const Element element = merged_warps<STRIDE>(results, i, num_busy);
    if (num_parts == 1) {
      out[i] = result_of(args, element, kv_head * G + g);
    } else {
      own_part[i] = element.sum;
      if (i % D == 0) own_part[G * D + g] = element.m, own_part[G * D + G + g] = element.l;
    }
  }
  if (num_parts == 1) return;
  __syncthreads();
  if (threadIdx.x == 0) {
    scratch.is_last_part = arrive(args.arrivals + kv_head) == num_parts - 1;
    if (scratch.is_last_part) args.arrivals[kv_head] = 0;
  }
  __syncthreads();
  if (!scratch.is_last_part) return;
  const float* first_part = args.parts + kv_head * PART;
  for (int i = threadIdx.x; i < G * D; i += 32 * WARPS) {
    const int g = i / D, stride = args.num_kv_heads * PART;
    Element element = {NONE, 0.0f, 0.0f};
#pragma unroll 4
    for (int j = 0; j < num_parts; j++) element.m = fmaxf(element.m, __ldcg(first_part + j * stride + G * D + g));
#pragma unroll 4
    for (int j = 0; j < num_parts; j++) {
      const float* from = first_part + j * stride;
      element.add(__ldcg(from + G * D + g), __ldcg(from + G * D + G + g), __ldcg(from + i));
    }
    out[i] = result_of(args, element, kv_head * G + g);
  }
}
