// Attention of single tokens straight from their products, for Hopper: `kernels.attention.attention_of_products`.
//
// A cluster of SPLIT blocks has a request's KV head, and shares its tokens out: LANES lanes have a token's key or value,
// 16 bytes each, so that a warp has ROWS tokens at a time, and UNROLL times as many on their way. What earlier steps
// stored is on its way before the kernel ahead, which makes the new token's products, has ended. Each group of lanes
// keeps a running softmax in registers; they are merged in the warp, in the block, and in the cluster, where each block
// has a share of the result and gets its parts from all into its shared memory, always in the same order.

constexpr int LANES = D / 8, ROWS = 32 / LANES, UNROLL = G > 4 ? 2 : 4;
constexpr int SHORT = UNROLL / 2;  // tokens of each group of lanes, of contexts that need no more
constexpr int GROUPS = SPLIT * WARPS * ROWS;  // of lanes, in the cluster

__device__ __forceinline__ void widen(uint4 x, float (&f)[8]) {
  const u32 words[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
  for (int i = 0; i < 4; i++) {
    f[2 * i] = from_x(words[i] & 0xffffu);
    f[2 * i + 1] = from_x(words[i] >> 16);
  }
}

__device__ __forceinline__ float rounded(float f) { return from_x(to_x(f)); }

__device__ __forceinline__ float sum_of_lanes(float f) {
#pragma unroll
  for (int mask = LANES / 2; mask; mask /= 2) f += __shfl_xor_sync(0xffffffffu, f, mask);
  return f;
}

// Norms and rotates a lane's part of a head; `partner`: the elements that they rotate with.
__device__ __forceinline__ void rotate(
    uint4 part, uint4 partner, bool has_norm, const float (&weight)[8], const float (&partner_weight)[8],
    const float (&cos)[8], const float (&sin)[8], float eps, float (&result)[8]) {
  float x[8], y[8];
  widen(part, x);
  widen(partner, y);
  if (has_norm) {
    float squares = 0.0f;
#pragma unroll
    for (int i = 0; i < 8; i++) squares += x[i] * x[i];
    const float scale = rsqrtf(sum_of_lanes(squares) / D + eps);
#pragma unroll
    for (int i = 0; i < 8; i++) {
      x[i] = rounded(rounded(x[i] * scale) * weight[i]);
      y[i] = rounded(rounded(y[i] * scale) * partner_weight[i]);
    }
  }
#pragma unroll
  for (int i = 0; i < 8; i++) result[i] = rounded(x[i] * cos[i] + y[i] * sin[i]);
}

struct Softmax {
  float m[G], l[G], sums[G][8];

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int g = 0; g < G; g++) {
      m[g] = NONE;
      l[g] = 0.0f;
#pragma unroll
      for (int i = 0; i < 8; i++) sums[g][i] = 0.0f;
    }
  }

  // Adds N tokens whose scores are NONE where there is no token.
  template <int N>
  __device__ __forceinline__ void add(const float (&scores)[N][G], const uint4 (&v)[N]) {
    float p[N][G];
#pragma unroll
    for (int g = 0; g < G; g++) {
      float most = m[g];
#pragma unroll
      for (int u = 0; u < N; u++) most = fmaxf(most, scores[u][g]);
      const float alpha = exp2_of(m[g] - most);
      l[g] *= alpha;
#pragma unroll
      for (int i = 0; i < 8; i++) sums[g][i] *= alpha;
#pragma unroll
      for (int u = 0; u < N; u++) {
        p[u][g] = scores[u][g] > NONE ? exp2_of(scores[u][g] - most) : 0.0f;
        l[g] += p[u][g];
      }
      m[g] = most;
    }
#pragma unroll
    for (int u = 0; u < N; u++) {
      float values[8];
      widen(v[u], values);
#pragma unroll
      for (int g = 0; g < G; g++)
#pragma unroll
        for (int i = 0; i < 8; i++) sums[g][i] += p[u][g] * values[i];
    }
  }

  // Merges with the group of lanes that is `mask` lanes away.
  __device__ __forceinline__ void merge(int mask) {
#pragma unroll
    for (int g = 0; g < G; g++) {
      const float other = __shfl_xor_sync(0xffffffffu, m[g], mask), most = fmaxf(m[g], other);
      const float scale = exp2_of(m[g] - most);
      l[g] *= scale;
      l[g] += __shfl_xor_sync(0xffffffffu, l[g], mask);
#pragma unroll
      for (int i = 0; i < 8; i++) {
        sums[g][i] *= scale;
        sums[g][i] += __shfl_xor_sync(0xffffffffu, sums[g][i], mask);
      }
      m[g] = most;
    }
  }
};

template <int N>
__device__ __forceinline__ void score(
    const float (&q)[G][8], const uint4 (&k)[N], float softcap, float (&scores)[N][G]) {
#pragma unroll
  for (int u = 0; u < N; u++) {
    float keys[8];
    widen(k[u], keys);
#pragma unroll
    for (int g = 0; g < G; g++) {
      float sum = 0.0f;
#pragma unroll
      for (int i = 0; i < 8; i++) sum += q[g][i] * keys[i];
      scores[u][g] = sum;
    }
  }
#pragma unroll
  for (int u = 0; u < N; u++)
#pragma unroll
    for (int g = 0; g < G; g++) scores[u][g] = capped(sum_of_lanes(scores[u][g]), softcap);
}

// Takes a group of lanes' tokens, the first and each GROUPS behind it, up to the last one.
template <int N>
__device__ __forceinline__ void take(
    Softmax& softmax, const float (&q)[G][8], const uint4 (&k)[N], const uint4 (&v)[N], int first, int last, float softcap) {
  float scores[N][G];
  score<N>(q, k, softcap, scores);
#pragma unroll
  for (int u = 0; u < N; u++)
#pragma unroll
    for (int g = 0; g < G; g++)
      if (first + u * GROUPS > last) scores[u][g] = NONE;
  softmax.add<N>(scores, v);
}

extern "C" __global__ void __launch_bounds__(32 * WARPS) one_token(const __grid_constant__ Args args) {
  let_next_begin();
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, rank = cluster_rank(), id = blockIdx.x / SPLIT;
  const int request = id / args.num_kv_heads, kv_head = id % args.num_kv_heads;
  const int position = args.seq_lens[request] - 1;  // of the new token
  if (position < 0) {                               // padding
    wait_for_input();
    return;
  }
  const int first_seen = first_seen_from(position, args.window);
  const int num_old = position - first_seen;
  arrive_in_cluster();
  const int d = lane % LANES * 8, group = (warp * ROWS + lane / LANES) * SPLIT + rank;
  const int* slots = args.slot_table + args.rows[request] * args.table_stride + first_seen;
  const u16* keys = args.k_cache + kv_head * args.k_head_stride + d;
  const u16* values = args.v_cache + kv_head * args.v_head_stride + d;

  int slot[UNROLL];
  uint4 k[UNROLL], v[UNROLL];
  auto slot_of = [&](int token) { return HAS_MAP ? args.slot_map[slots[token]] : slots[token]; };
  auto load_slots = [&](int first) {
#pragma unroll
    for (int u = 0; u < UNROLL; u++) {
      const int token = first + u * GROUPS + group;
      slot[u] = token < num_old ? slot_of(token) : -1;
    }
  };
  auto load = [&]() {
#pragma unroll
    for (int u = 0; u < UNROLL; u++) {
      if (slot[u] >= 0) {
        k[u] = *(const uint4*)(keys + slot[u] * args.k_stride);
        v[u] = *(const uint4*)(values + slot[u] * args.v_stride);
      } else {
        k[u] = v[u] = make_uint4(0, 0, 0, 0);
      }
    }
  };
  load_slots(0);
  load();
  load_slots(UNROLL * GROUPS);
  const int new_slot = slot_of(num_old);
  const int partner = d < HALF ? d + HALF : d < 2 * HALF ? d - HALF : d;
  float cos[8], sin[8], q_weight[8], k_weight[8], q_partner_weight[8], k_partner_weight[8];
  {
    const float* angles = args.cos_sin + (long long)args.positions[request] * 2 * HALF + (d < HALF ? d : d - HALF);
#pragma unroll
    for (int i = 0; i < 8; i++) {
      const bool is_rotated = d < 2 * HALF;
      cos[i] = is_rotated ? angles[i] : 1.0f;
      sin[i] = is_rotated ? angles[HALF + i] : 0.0f;
      if (d < HALF) sin[i] = -sin[i];
    }
  }
  if (args.q_norm) {
    widen(*(const uint4*)(args.q_norm + d), q_weight);
    widen(*(const uint4*)(args.q_norm + partner), q_partner_weight);
  }
  if (args.k_norm) {
    widen(*(const uint4*)(args.k_norm + d), k_weight);
    widen(*(const uint4*)(args.k_norm + partner), k_partner_weight);
  }
  wait_for_input();

  const u16* products = args.qkv + request * args.qkv_stride;
  const u16* new_k = products + (args.num_kv_heads * G + kv_head) * D;
  const u16* new_v = new_k + args.num_kv_heads * D;
  uint4 parts[G], partners[G];
#pragma unroll
  for (int g = 0; g < G; g++) {
    parts[g] = *(const uint4*)(products + (kv_head * G + g) * D + d);
    partners[g] = *(const uint4*)(products + (kv_head * G + g) * D + partner);
  }
  const uint4 k_part = *(const uint4*)(new_k + d), k_partner = *(const uint4*)(new_k + partner);
  const uint4 new_value = *(const uint4*)(new_v + d);

  float q[G][8];
#pragma unroll
  for (int g = 0; g < G; g++) {
    rotate(parts[g], partners[g], args.q_norm, q_weight, q_partner_weight, cos, sin, args.eps, q[g]);
#pragma unroll
    for (int i = 0; i < 8; i++) q[g][i] *= args.scale;
  }
  float key[8];
  rotate(k_part, k_partner, args.k_norm, k_weight, k_partner_weight, cos, sin, args.eps, key);
  u32 words[4];
#pragma unroll
  for (int i = 0; i < 4; i++) words[i] = to_x(key[2 * i]) | (u32)to_x(key[2 * i + 1]) << 16;
  const uint4 new_key = make_uint4(words[0], words[1], words[2], words[3]);
  if (group == num_old % GROUPS) {
    *(uint4*)(args.k_cache + new_slot * args.k_stride + kv_head * args.k_head_stride + d) = new_key;
    *(uint4*)(args.v_cache + new_slot * args.v_stride + kv_head * args.v_head_stride + d) = new_value;
  }

  Softmax softmax;
  softmax.clear();
  if (num_old < SHORT * GROUPS) {
    uint4 some_k[SHORT], some_v[SHORT];
#pragma unroll
    for (int u = 0; u < SHORT; u++) {
      const bool is_new = u * GROUPS + group == num_old;
      some_k[u] = is_new ? new_key : k[u];
      some_v[u] = is_new ? new_value : v[u];
    }
    take<SHORT>(softmax, q, some_k, some_v, group, num_old, args.softcap);
  } else {
    for (int first = 0; first <= num_old; first += UNROLL * GROUPS) {
      uint4 now_k[UNROLL], now_v[UNROLL];
#pragma unroll
      for (int u = 0; u < UNROLL; u++) {
        const bool is_new = first + u * GROUPS + group == num_old;
        now_k[u] = is_new ? new_key : k[u];
        now_v[u] = is_new ? new_value : v[u];
      }
      load();
      load_slots(first + 2 * UNROLL * GROUPS);
      take<UNROLL>(softmax, q, now_k, now_v, first + group, num_old, args.softcap);
    }
  }

#pragma unroll
  for (int mask = LANES; mask < 32; mask *= 2) softmax.merge(mask);
  const Parts results(D);
  if (lane < LANES) {
#pragma unroll
    for (int g = 0; g < G; g++) {
#pragma unroll
      for (int i = 0; i < 8; i++) results.sums[(warp * G + g) * D + d + i] = softmax.sums[g][i];
      if (lane == 0) {
        results.most[warp * G + g] = softmax.m[g];
        results.totals[warp * G + g] = softmax.l[g];
      }
    }
  }
  merge_parts<D>(args, results, request, kv_head, rank, WARPS);
}
