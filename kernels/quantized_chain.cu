// Products of one token one after another, each residual + act(norm(x) W^T + bias), of weights of few bits.
//
// A block on each multiprocessor has some rows of every product, and goes on to the next one when all blocks have written
// the outputs of the one ahead. Memory does not wait for that: one warp has a ring filled with codes by bulk copies, as
// far ahead as there is room, from one product to the next and while the kernel ahead still runs. Threads that multiplied
// and asked for codes too would stand still where memory takes no more requests, and with them all that is between two
// products. Codes meet the tensor cores as in `quantized_few.cu`, inputs as `quantized_one.cu` says.
//
// Products of a chain may be of several kinds of codes in tiles. What depends on a kind is in a namespace of its own, which
// quantized_chain.py puts in front: `quantized_parts.cu`, `quantized_one.cu` and `quantized_chain_kind.cu` with the kind's
// definitions, PIECE and IS_INTEGER (sums are integers) among them. For all of them it puts there PRODUCTS, TILES, WARPS_K,
// STAGES, SLOT_BYTES (of a place in the ring), MOST_GROUPS and MOST_HELD_SCALES (of any kind), RING_AT (where the ring is)
// and EACH_KIND(function, ...), which calls that of the namespace of `args.kind` with `args` in front.

using kind_0::Args;
constexpr int WARPS = WARPS_K, MOST_THREADS = 32 * WARPS + 128;  // so that attention finds registers beside a block
constexpr int TAKERS = kind_0::TAKERS;

struct Chain {
  Args products[PRODUCTS];
};
struct Maps {
  TensorMap of[PRODUCTS];  // of codes row by row
};

// ---- the kernel ----

extern "C" __global__ void __launch_bounds__(MOST_THREADS, 1) quantized_chain(
    const __grid_constant__ Chain chain, const __grid_constant__ Maps maps) {
  extern __shared__ __align__(1024) unsigned char shared[];
  const u32 full = kind_0::shared_address(shared) + 128, empty = full + 8 * STAGES;
  if (threadIdx.x == 0) {
    for (int i = 0; i < STAGES; i++) init_barrier(full + 8 * i, 1), init_barrier(empty + 8 * i, TAKERS);
    barriers_are_ready();
  }
  __syncthreads();
  kind_0::let_next_begin();
  int place = 0;
  if (threadIdx.x / 32 == WARPS) {
    u32 parity = 1;  // places are empty at first
#pragma unroll 1
    for (int product = 0; product < PRODUCTS; product++) {
      const Args& args = chain.products[product];
      EACH_KIND(fill_ring, maps.of[product], full, empty, kind_0::shared_address(shared) + RING_AT, place, parity);
    }
    return;
  }
  u32 parity = 0, num_stages = 0;  // so far
  u64 awaited = 0;
#pragma unroll 1
  for (int product = 0; product < PRODUCTS; product++) {
    const Args& args = chain.products[product];
    EACH_KIND(multiply_rows, product == 0, shared, chain.products[0].x_stride, awaited, place, parity, num_stages);
    if (product + 1 < PRODUCTS) {
      kind_0::sync_warps();
      if (threadIdx.x == 0) awaited = kind_0::arrive_at_product(args.arrivals);
    }
  }
}
