// Attention of single tokens straight from their products, for Hopper: `kernels.attention.attention_of_products`.
//
// A cluster of SPLIT blocks has a request's KV head, and shares its tokens out, 16 to a warp. What earlier steps stored
// is on its way before the kernel ahead, which makes the new token's products, has ended. Each warp keeps a running
// softmax of all query heads; they are merged in the block, and in the cluster, where each block has a share of the
// result and gets its parts from all into its shared memory, always in the same order.

constexpr int WAVE = SPLIT * WARPS * TILE;  // tokens that the cluster takes at a time

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
  const int row = lane / 4, d = lane % 4 * 8;  // a lane's head, or token of 8; and its first element of each 32
  const int own = (warp * SPLIT + rank) * TILE;  // this warp's first token
  const int* slots = args.slot_table + args.rows[request] * args.table_stride + first_seen;
  const u16* keys = args.k_cache + kv_head * args.k_head_stride + d;
  const u16* values = args.v_cache + kv_head * args.v_head_stride + d;
  auto slot_of = [&](int token) { return HAS_MAP ? args.slot_map[slots[token]] : slots[token]; };

  int slot[2];
  Vector k[2], v[2];
  auto find = [&](int first) {
#pragma unroll
    for (int u = 0; u < 2; u++) {
      const int token = first + 8 * u + row;
      slot[u] = token < num_old ? slot_of(token) : -1;
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
  Softmax softmax;
  softmax.clear();
  if (own > num_old) {  // nothing to do but to merge
    wait_for_input();
  } else {
    find(own);
    load(k, keys, args.k_stride);
    load(v, values, args.v_stride);
    const bool has_new = num_old / TILE % (SPLIT * WARPS) == warp * SPLIT + rank;
    const int new_slot = slot_of(num_old);
    const float* angles = args.cos_sin + (long long)args.positions[request] * 2 * HALF;
    const Rotation rotation(angles, d);
    Vector q_weight, k_weight;
    if (args.q_norm) q_weight = load_vector(args.q_norm, d);
    if (args.k_norm) k_weight = load_vector(args.k_norm, d);
    wait_for_input();

    const u16* products = args.qkv + request * args.qkv_stride;
    const u16* new_q = products + (kv_head * G + min(row, G - 1)) * D;
    const u16* new_k = products + (args.num_kv_heads * G + kv_head) * D;
    Vector q = load_vector(new_q, d), new_key, new_value;
    if (has_new) {
      new_key = load_vector(new_k, d);
      new_value = load_vector(new_k + args.num_kv_heads * D, d);
    }
    q = rotated(q, new_q, args.q_norm, q_weight, rotation, args.eps, d);
    if (has_new) {
      new_key = rotated(new_key, new_k, args.k_norm, k_weight, rotation, args.eps, d);
      if (row == 0) {
        store_vector(args.k_cache + new_slot * args.k_stride + kv_head * args.k_head_stride, new_key, d);
        store_vector(args.v_cache + new_slot * args.v_stride + kv_head * args.v_head_stride, new_value, d);
      }
    }

    for (int first = own; first <= num_old; first += WAVE) {
      const int new_row = num_old - first;  // of the tile, if it is below TILE
      const bool is_new[2] = {row == new_row, row + 8 == new_row};
      if (new_row < TILE) {
#pragma unroll
        for (int u = 0; u < 2; u++)
          if (is_new[u]) k[u] = new_key;
      }
      float scores[2][4];
      clear(scores);
#pragma unroll
      for (int j = 0; j < PIECES; j++) score(q.words[j], k, j, scores);
      find(first + WAVE);
      load(k, keys, args.k_stride);
#pragma unroll
      for (int u = 0; u < 2; u++)
#pragma unroll
        for (int i = 0; i < 2; i++) {
          const int token = first + 8 * u + lane % 4 * 2 + i;
          scores[u][i] = token <= num_old ? capped(scores[u][i] * args.scale, args.softcap) : NONE;
        }
      u32 weights[2];
      softmax.weigh(scores, weights, lane);
      if (new_row < TILE) {
#pragma unroll
        for (int u = 0; u < 2; u++)
          if (is_new[u]) v[u] = new_value;
      }
      softmax.add(weights, v[0], v[1]);
      load(v, values, args.v_stride);
    }
  }

  const Parts results(STRIDE);
  if (own <= num_old) softmax.store(results, warp, lane);
  const int num_busy = min(WARPS, (num_old / TILE - rank + SPLIT) / SPLIT);  // warps that have tokens
  merge_parts<STRIDE>(args, results, request, kv_head, rank, num_busy);
}
