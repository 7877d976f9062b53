// What kernels of single tokens' attention share: their arguments, the machine, and how parts of a result are merged.
//
// D: size of a head. G: query heads of a KV head, up to 8. HALF: elements that rotate with as many others. IS_HALF:
// numbers are float16, else bfloat16. WARPS: of a block. WINDOW: 0 none, 1 sliding, 2 chunks. HAS_SOFTCAP, HAS_MAP: of
// slots. SINKS: 0 none, 1 numbers like the others, 2 float. SPLIT: blocks of a cluster. RESULTS: of warps, as many as shared
// memory has room for.

typedef unsigned short u16;
typedef unsigned int u32;

struct Args {
  const u16 *qkv, *q_norm, *k_norm;  // the norms' weights, or null
  u16 *k_cache, *v_cache, *out;
  const float *cos_sin;
  const int *positions, *seq_lens, *rows, *slot_table, *slot_map;
  const void* sinks;
  float* parts;   // results of blocks, if these meet in memory
  int* arrivals;  // how many of a KV head's have come
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

// Parts of a KV head's results in shared memory, of RESULTS warps, each with its largest score and its sum of weights.
struct Parts {
  float *sums, *most, *totals;                    // by warp; heads are STRIDE apart
  float *block_sums, *block_most, *block_totals;  // of this block's share of the result, by block

  __device__ __forceinline__ Parts(int stride) {
    sums = shared;
    most = sums + RESULTS * G * stride;
    totals = most + RESULTS * G;
    block_sums = totals + RESULTS * G;
    block_most = block_sums + G * D;
    block_totals = block_most + SPLIT * G;
  }
};

// A result's element: the largest score, the sum of weights, and the sum of values, both relative to it.
struct Element {
  float m, l, sum;

  __device__ __forceinline__ void add(float score, float weights, float values) {
    const float scale = exp2_of(score - m);
    l += scale * weights;
    sum += scale * values;
  }
};

// Returns element `i` of what the first `num_warps` warps of this block have found.
template <int STRIDE>
__device__ __forceinline__ Element merged_warps(const Parts& parts, int i, int num_warps) {
  const int g = i / D;
  Element element = {NONE, 0.0f, 0.0f};
#pragma unroll
  for (int w = 0; w < num_warps; w++) element.m = fmaxf(element.m, parts.most[w * G + g]);
#pragma unroll
  for (int w = 0; w < num_warps; w++)
    element.add(parts.most[w * G + g], parts.totals[w * G + g], parts.sums[(w * G + g) * STRIDE + i % D]);
  return element;
}

// Returns the result, of which a head's sink, if there is one, takes a share.
__device__ __forceinline__ u16 result_of(const Args& args, Element element, int head) {
  if (SINKS) {
    const float sink = LOG2_E * (SINKS == 2 ? ((const float*)args.sinks)[head] : from_x(((const u16*)args.sinks)[head]));
    const Element of_tokens = element;
    element = {fmaxf(of_tokens.m, sink), 0.0f, 0.0f};
    element.add(of_tokens.m, of_tokens.l, of_tokens.sum);
    element.add(sink, 1.0f, 0.0f);
  }
  return to_x(element.sum / element.l);
}

// Merges the parts of the first `num_warps` warps of each block of a cluster, which has arrived once: the result.
template <int STRIDE>
__device__ __forceinline__ void merge_parts(
    const Args& args, const Parts& parts, int request, int kv_head, int rank, int num_warps) {
  constexpr int SHARE = G * D / SPLIT;  // of the result, which a block merges
  __syncthreads();
  wait_for_cluster();
  for (int i = threadIdx.x; i < G * D; i += 32 * WARPS) {
    const int g = i / D, owner = i / SHARE;
    const Element element = merged_warps<STRIDE>(parts, i, num_warps);
    store_to_block(parts.block_sums + rank * SHARE + i % SHARE, owner, element.sum);
    if (i % SHARE == 0 || i % D == 0) {  // the owner's first of this head
      store_to_block(parts.block_most + rank * G + g, owner, element.m);
      store_to_block(parts.block_totals + rank * G + g, owner, element.l);
    }
  }
  arrive_in_cluster();
  wait_for_cluster();
  for (int j = threadIdx.x; j < SHARE; j += 32 * WARPS) {
    const int i = rank * SHARE + j, g = i / D;
    Element element = {NONE, 0.0f, 0.0f};
#pragma unroll
    for (int r = 0; r < SPLIT; r++) element.m = fmaxf(element.m, parts.block_most[r * G + g]);
#pragma unroll
    for (int r = 0; r < SPLIT; r++)
      element.add(parts.block_most[r * G + g], parts.block_totals[r * G + g], parts.block_sums[r * SHARE + j]);
    args.out[((long long)request * args.num_kv_heads + kv_head) * G * D + i] = result_of(args, element, kv_head * G + g);
  }
}
