// What kernels of single tokens' attention share: their arguments, the machine, and how parts of a result are merged.
// Defines are those that `one_token.cu` and `one_token_heads.cu` list.

typedef unsigned short u16;
typedef unsigned int u32;

struct Args {
  const u16 *qkv, *q_norm, *k_norm;  // the norms' weights, or null
  u16 *k_cache, *v_cache, *out;
  const float *cos_sin;
  const int *positions, *seq_lens, *rows, *slot_table, *slot_map;
  const void* sinks;
  long long qkv_stride, k_stride, k_head_stride, v_stride, v_head_stride, table_stride;
  int num_kv_heads, window;
  float scale, softcap, eps;  // scale, softcap: of scores in units of log2
};

// ---- the machine ----

__device__ __forceinline__ float from_x(u32 bits) {
  if (!IS_HALF) return __uint_as_float(bits << 16);
  float f;
  asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"((u16)bits));
  return f;
}
__device__ __forceinline__ u16 to_x(float f) {
  u16 bits;
  if (IS_HALF) asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(f));
  else asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(f));
  return bits;
}
__device__ __forceinline__ float exp2_of(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ void let_next_begin() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }
__device__ __forceinline__ void wait_for_input() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
__device__ __forceinline__ u32 cluster_rank() {
  u32 rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}
// A barrier of the cluster in two parts: before others write into this block's shared memory, it must have begun.
__device__ __forceinline__ void arrive_in_cluster() { asm volatile("barrier.cluster.arrive.aligned;" ::: "memory"); }
__device__ __forceinline__ void wait_for_cluster() { asm volatile("barrier.cluster.wait.aligned;" ::: "memory"); }
// Writes to where `p` is in another block's shared memory.
__device__ __forceinline__ void store_to_block(float* p, u32 rank, float f) {
  asm volatile("{\n.reg .b32 there;\nmapa.shared::cluster.u32 there, %0, %1;\nst.shared::cluster.f32 [there], %2;\n}"
               :: "r"((u32)__cvta_generic_to_shared(p)), "r"(rank), "f"(f) : "memory");
}
extern __shared__ float shared[];
// ---- end of the machine ----

constexpr float NONE = -1e30f;  // the largest score of no token
constexpr float LOG2_E = 1.44269504f;

__device__ __forceinline__ float capped(float score, float cap) {  // cap * tanh(score / cap)
  return HAS_SOFTCAP ? cap - 2.0f * cap / (exp2_of(2.0f * LOG2_E * score / cap) + 1.0f) : score;
}

// The first token that is seen from a position.
__device__ __forceinline__ int first_seen_from(int position, int window) {
  return WINDOW == 2 ? position / window * window : WINDOW == 1 ? max(position + 1 - window, 0) : 0;
}

// Parts of a KV head's results in shared memory, each with its largest score and its sum of weights.
struct Parts {
  float *sums, *most, *totals;                    // by warp; heads are STRIDE apart
  float *block_sums, *block_most, *block_totals;  // of this block's share of the result, by block

  __device__ __forceinline__ Parts(int stride) {
    sums = shared;
    most = sums + WARPS * G * stride;
    totals = most + WARPS * G;
    block_sums = totals + WARPS * G;
    block_most = block_sums + G * D;
    block_totals = block_most + SPLIT * G;
  }
};

// Merges the parts of the first `num_warps` warps of each block of a cluster, which has arrived once: the result.
template <int STRIDE>
__device__ __forceinline__ void merge_parts(
    const Args& args, const Parts& parts, int request, int kv_head, int rank, int num_warps) {
  constexpr int SHARE = G * D / SPLIT;  // of the result, which a block merges
  __syncthreads();
  wait_for_cluster();
  for (int i = threadIdx.x; i < G * D; i += 32 * WARPS) {
    const int g = i / D, owner = i / SHARE;
    float m = NONE, l = 0.0f, sum = 0.0f;
#pragma unroll
    for (int w = 0; w < num_warps; w++) m = fmaxf(m, parts.most[w * G + g]);
#pragma unroll
    for (int w = 0; w < num_warps; w++) {
      const float scale = exp2_of(parts.most[w * G + g] - m);
      l += scale * parts.totals[w * G + g];
      sum += scale * parts.sums[(w * G + g) * STRIDE + i % D];
    }
    store_to_block(parts.block_sums + rank * SHARE + i % SHARE, owner, sum);
    if (i % SHARE == 0 || i % D == 0) {  // the owner's first of this head
      store_to_block(parts.block_most + rank * G + g, owner, m);
      store_to_block(parts.block_totals + rank * G + g, owner, l);
    }
  }
  arrive_in_cluster();
  wait_for_cluster();
  for (int j = threadIdx.x; j < SHARE; j += 32 * WARPS) {
    const int i = rank * SHARE + j, g = i / D;
    float m = NONE, l = 0.0f, sum = 0.0f;
#pragma unroll
    for (int r = 0; r < SPLIT; r++) m = fmaxf(m, parts.block_most[r * G + g]);
    if (SINKS) {
      const int head = kv_head * G + g;
      const float sink = SINKS == 2 ? ((const float*)args.sinks)[head] : from_x(((const u16*)args.sinks)[head]);
      m = fmaxf(m, LOG2_E * sink);
      l = exp2_of(LOG2_E * sink - m);
    }
#pragma unroll
    for (int r = 0; r < SPLIT; r++) {
      const float scale = exp2_of(parts.block_most[r * G + g] - m);
      l += scale * parts.block_totals[r * G + g];
      sum += scale * parts.block_sums[r * SHARE + j];
    }
    args.out[((long long)request * args.num_kv_heads + kv_head) * G * D + i] = to_x(sum / l);
  }
}
