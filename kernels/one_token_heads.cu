// Attention of single tokens straight from their products, for Hopper: `kernels.attention.attention_of_products`.
//
// A cluster of SPLIT blocks has a request's KV head, and shares its tokens out, 16 to a warp. What earlier steps stored
// is on its way before the kernel ahead, which makes the new token's products, has ended. Each warp keeps a running
// softmax of all query heads; they are merged in the block, and in the cluster, where each block has a share of the
// result and gets its parts from all into its shared memory, always in the same order.
//
// Tensor cores multiply, and nothing is laid out anew for them. Four lanes have a vector (a query head's, or a token's
// key or value): lane c the elements 32 j + 8 c to 32 j + 8 c + 7, 16 bytes, as they are in memory. A product takes its
// inner elements in any order, if both sides have the same; so the 4 words are what a lane has of two operands of
// 16 x 8. The values, whose inner index is the token, are transposed in registers, 8 x 8 at a time.
//
// D: size of a head. G: query heads of a KV head, up to 8. HALF: elements that rotate with as many others. IS_HALF:
// numbers are float16, else bfloat16. WARPS: of a block. WINDOW: 0 none, 1 sliding, 2 chunks. HAS_SOFTCAP, HAS_MAP: of
// slots. SINKS: 0 none, 1 numbers like the others, 2 float.

// ---- the machine of tensor cores ----
// Two numbers in a word, the first in its low half.
__device__ __forceinline__ u32 packed(float low, float high) {
  u32 pair;
  if (IS_HALF) asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  else asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}
__device__ __forceinline__ float low_of(u32 pair) { return from_x(pair & 0xffffu); }
__device__ __forceinline__ float high_of(u32 pair) {
  return IS_HALF ? from_x(pair >> 16) : __uint_as_float(pair & 0xffff0000u);
}
__device__ __forceinline__ u32 product_of_pairs(u32 a, u32 b) {
  u32 pair;
  if (IS_HALF) asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(pair) : "r"(a), "r"(b));
  else asm("mul.rn.bf16x2 %0, %1, %2;" : "=r"(pair) : "r"(a), "r"(b));
  return pair;
}
// The transposed matrix of 8 x 8 numbers, of which each lane has two in a row: of row lane / 4.
__device__ __forceinline__ u32 transposed(u32 pair) {
  u32 result;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(result) : "r"(pair));
  return result;
}
// d += a [16, 16] x b [16, 8]
__device__ __forceinline__ void multiply(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
#define MULTIPLY(type) \
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." type "." type ".f32 " \
               "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};" \
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1))
  if (IS_HALF) MULTIPLY("f16");
  else MULTIPLY("bf16");
#undef MULTIPLY
}
// ---- end of the machine of tensor cores ----

constexpr int PIECES = D / 32;              // of a vector, that a lane has
constexpr int TILE = 16;                    // tokens that a warp takes at a time
constexpr int WAVE = SPLIT * WARPS * TILE;  // and the cluster
constexpr int STRIDE = D + 1;               // of a head's sums in shared memory: no two lanes meet in a bank
constexpr int STEP = HALF / 32;             // pieces between elements that rotate with each other
constexpr bool IS_ALIGNED = HALF && HALF % 32 == 0;  // if those are the same lane's

struct Vector {
  u32 words[PIECES][4];
};

__device__ __forceinline__ float sum_of_four(float f) {
  f += __shfl_xor_sync(0xffffffffu, f, 1);
  return f + __shfl_xor_sync(0xffffffffu, f, 2);
}

__device__ __forceinline__ float most_of_four(float f) {
  f = fmaxf(f, __shfl_xor_sync(0xffffffffu, f, 1));
  return fmaxf(f, __shfl_xor_sync(0xffffffffu, f, 2));
}

__device__ __forceinline__ void load_piece(u32 (&words)[4], const u16* from) {
  const uint4 piece = *(const uint4*)from;
  words[0] = piece.x, words[1] = piece.y, words[2] = piece.z, words[3] = piece.w;
}

__device__ __forceinline__ Vector load_vector(const u16* from, int d) {
  Vector x;
#pragma unroll
  for (int j = 0; j < PIECES; j++) load_piece(x.words[j], from + 32 * j + d);
  return x;
}

__device__ __forceinline__ void store_vector(u16* to, const Vector& x, int d) {
#pragma unroll
  for (int j = 0; j < PIECES; j++)
    *(uint4*)(to + 32 * j + d) = make_uint4(x.words[j][0], x.words[j][1], x.words[j][2], x.words[j][3]);
}

// How far away the elements are that those of a lane's piece `j` rotate with; 0 if they do not rotate.
__device__ __forceinline__ int to_partner(int j, int d) {
  const int i = 32 * j + d;
  return i < HALF ? HALF : i < 2 * HALF ? -HALF : 0;
}

// What a vector rotates with, from memory, if that is another lane's.
__device__ __forceinline__ Vector load_partners(const u16* from, int d) {
  Vector x;
#pragma unroll
  for (int j = 0; j < PIECES; j++)
    if (!IS_ALIGNED) load_piece(x.words[j], from + 32 * j + d + to_partner(j, d));
  return x;
}

struct Rotation {
  float cos[PIECES][8], sin[PIECES][8];

  __device__ __forceinline__ void load(const float* angles, int d) {
#pragma unroll
    for (int j = 0; j < PIECES; j++) {
      const int i = 32 * j + d;
      const float* from = angles + (IS_ALIGNED ? 32 * (j % (STEP + !STEP)) + d : i < HALF ? i : i - HALF);
#pragma unroll
      for (int e = 0; e < 8; e++) {
        cos[j][e] = i < 2 * HALF ? from[e] : 1.0f;
        sin[j][e] = i < 2 * HALF ? from[HALF + e] : 0.0f;
        if (i < HALF) sin[j][e] = -sin[j][e];
      }
    }
  }
};

__device__ __forceinline__ float norm_of(const Vector& x, float eps) {
  float squares = 0.0f;
#pragma unroll
  for (int j = 0; j < PIECES; j++)
#pragma unroll
    for (int w = 0; w < 4; w++) {
      const float low = low_of(x.words[j][w]), high = high_of(x.words[j][w]);
      squares += low * low + high * high;
    }
  return rsqrtf(sum_of_four(squares) / D + eps);
}

__device__ __forceinline__ void multiply(Vector& x, float scale, const Vector& weight) {
#pragma unroll
  for (int j = 0; j < PIECES; j++)
#pragma unroll
    for (int w = 0; w < 4; w++) {
      u32& pair = x.words[j][w];
      pair = product_of_pairs(packed(low_of(pair) * scale, high_of(pair) * scale), weight.words[j][w]);
    }
}

// Norms, if there are weights, and rotates the vector x, which is at `from`.
__device__ __forceinline__ Vector rotated(
    Vector x, const u16* from, const u16* weights, const Vector& weight, const Rotation& rotation, float eps, int d) {
  Vector partners = load_partners(from, d);
  if (weights) {
    const float scale = norm_of(x, eps);
    multiply(x, scale, weight);
    if (!IS_ALIGNED) multiply(partners, scale, load_partners(weights, d));
  }
  Vector result;
#pragma unroll
  for (int j = 0; j < PIECES; j++)
#pragma unroll
    for (int w = 0; w < 4; w++) {
      const u32 own = x.words[j][w];
      const u32 other = !IS_ALIGNED ? partners.words[j][w]
                        : j < STEP ? x.words[j + STEP][w] : j < 2 * STEP ? x.words[j - STEP][w] : 0u;
      result.words[j][w] = IS_ALIGNED && j >= 2 * STEP ? own : packed(
          low_of(own) * rotation.cos[j][2 * w] + low_of(other) * rotation.sin[j][2 * w],
          high_of(own) * rotation.cos[j][2 * w + 1] + high_of(other) * rotation.sin[j][2 * w + 1]);
    }
  return result;
}

// Running softmaxes of all heads. A lane has the maximum and a part of the sum of weights of head lane / 4; and of the
// results of heads 2 c and 2 c + 1 the elements that `element` says.
struct Softmax {
  float m, l, sums[PIECES][2][4];

  __device__ __forceinline__ void clear() {
    m = NONE;
    l = 0.0f;
#pragma unroll
    for (int j = 0; j < PIECES; j++)
#pragma unroll
      for (int h = 0; h < 2; h++)
#pragma unroll
        for (int i = 0; i < 4; i++) sums[j][h][i] = 0.0f;
  }

  // Takes a tile's scores [2][2], NONE where there is no token: returns their weights, as operands.
  __device__ __forceinline__ void weigh(const float (&scores)[2][4], u32 (&weights)[2], int lane) {
    float most = m;
#pragma unroll
    for (int u = 0; u < 2; u++) most = fmaxf(most, fmaxf(scores[u][0], scores[u][1]));
    most = most_of_four(most);
    const float alpha = exp2_of(m - most);
    m = most;
    l *= alpha;
#pragma unroll
    for (int u = 0; u < 2; u++) {
      float p[2];
#pragma unroll
      for (int i = 0; i < 2; i++) {
        p[i] = scores[u][i] > NONE ? exp2_of(scores[u][i] - most) : 0.0f;
        l += p[i];
      }
      weights[u] = packed(p[0], p[1]);
    }
    const float even = __shfl_sync(0xffffffffu, alpha, lane % 4 * 8);
    const float odd = __shfl_sync(0xffffffffu, alpha, lane % 4 * 8 + 4);
#pragma unroll
    for (int j = 0; j < PIECES; j++)
#pragma unroll
      for (int h = 0; h < 2; h++)
#pragma unroll
        for (int i = 0; i < 4; i++) sums[j][h][i] *= i % 2 ? odd : even;
  }

  // Adds the values of 16 tokens, of which the first 8 are `low`.
  __device__ __forceinline__ void add(const u32 (&weights)[2], const Vector& low, const Vector& high) {
#pragma unroll
    for (int j = 0; j < PIECES; j++) {
#pragma unroll
      for (int h = 0; h < 2; h++) {
        const u32 a[4] = {transposed(low.words[j][2 * h]), transposed(low.words[j][2 * h + 1]),
                          transposed(high.words[j][2 * h]), transposed(high.words[j][2 * h + 1])};
        multiply(sums[j][h], a, weights[0], weights[1]);
      }
    }
  }

  // Where sums[j][h][i] belongs in its head.
  static __device__ __forceinline__ int element(int j, int h, int i, int lane) {
    return 32 * j + lane / 8 * 8 + 2 * (2 * h + i / 2) + lane / 4 % 2;
  }
};

__device__ __forceinline__ void score(const Vector& q, const Vector (&k)[2], float (&scores)[2][4]) {
#pragma unroll
  for (int u = 0; u < 2; u++)
#pragma unroll
    for (int i = 0; i < 4; i++) scores[u][i] = 0.0f;
#pragma unroll
  for (int j = 0; j < PIECES; j++)
#pragma unroll
    for (int h = 0; h < 2; h++) {
      const u32 a[4] = {q.words[j][2 * h], 0, q.words[j][2 * h + 1], 0};  // heads 8 to 15 are not there
#pragma unroll
      for (int u = 0; u < 2; u++) multiply(scores[u], a, k[u].words[j][2 * h], k[u].words[j][2 * h + 1]);
    }
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
    Rotation rotation;
    Vector q_weight, k_weight;
    rotation.load(angles, d);
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
      score(q, k, scores);
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
  if (own <= num_old) {
#pragma unroll
    for (int j = 0; j < PIECES; j++)
#pragma unroll
      for (int h = 0; h < 2; h++)
#pragma unroll
        for (int i = 0; i < 4; i++) {
          const int head = lane % 4 * 2 + i % 2, at = (warp * G + head) * STRIDE + Softmax::element(j, h, i, lane);
          if (head < G) results.sums[at] = softmax.sums[j][h][i];
        }
    const float total = sum_of_four(softmax.l);
    if (lane % 4 == 0 && row < G) {
      results.most[warp * G + row] = softmax.m;
      results.totals[warp * G + row] = total;
    }
  }
  const int num_busy = min(WARPS, (num_old / TILE - rank + SPLIT) / SPLIT);  // warps that have tokens
  merge_parts<STRIDE>(args, results, request, kv_head, rank, num_busy);
}
