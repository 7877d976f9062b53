// Rows of a weight of few bits in tiles as plain numbers, for a product of many tokens.
//
// A warp decodes a tile's chunk, 16 rows by 64 columns, as tensor cores take it: a thread has pairs of columns. Through
// shared memory they become rows, of which 8 threads write 128 bytes. What it reads of CHUNKS chunks is on its way at once.
//
// quantized_rows.py puts in front what quantized_few.cu has, WARPS, and CHUNKS of a warp. args.first: the first tile;
// args.num_tokens: how many rows are written.

constexpr int PITCH = CHUNK / 2 + 4;  // words of a row in shared memory: threads of a warp have banks of their own
constexpr int STEPS = 4 / GROUPS;     // of a group

__device__ __forceinline__ float from_m(u32 bits) { return IS_HALF ? from_half((u16)bits) : from_bf16((u16)bits); }

extern "C" __global__ void __launch_bounds__(32 * WARPS) quantized_rows(const __grid_constant__ Args args) {
  extern __shared__ __align__(128) unsigned char shared[];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, r = lane / 4, t = lane % 4;
  u32* tile_rows = (u32*)shared + warp * 16 * PITCH;
  const int num_chunks = args.k / CHUNK, parts = (num_chunks + CHUNKS - 1) / CHUNKS;
  const int task = blockIdx.x * WARPS + warp, tile = task / parts, begin = (task - tile * parts) * CHUNKS;
  if (16 * tile >= args.num_tokens) return;
  const uint4* codes = (const uint4*)args.codes + (u64)(args.first + tile) * num_chunks * (CODE_LOADS * 32) + lane;
  const PARAM* params = (const PARAM*)args.params + (u64)(args.first + tile) * args.num_groups * (8 * PARAM_BYTES / (int)sizeof(PARAM));
  u32 words[CHUNKS][4 * CODE_LOADS];
#pragma unroll
  for (int c = 0; c < CHUNKS; c++)
#pragma unroll
    for (int i = 0; i < CODE_LOADS; i++) {
      const uint4 v = codes[(min(begin + c, num_chunks - 1) * CODE_LOADS + i) * 32];
      words[c][4 * i] = v.x, words[c][4 * i + 1] = v.y, words[c][4 * i + 2] = v.z, words[c][4 * i + 3] = v.w;
    }
  float scales[CHUNKS][GROUPS][2], offsets[CHUNKS][GROUPS][2];
#pragma unroll
  for (int c = 0; c < CHUNKS; c++)
#pragma unroll
    for (int g = 0; g < GROUPS; g++)
#pragma unroll
      for (int h = 0; h < 2; h++) {
        const int chunk = min(begin + c, num_chunks - 1), row = min(16 * (args.first + tile) + r + 8 * h, args.n - 1);
        const int group = GROUPS > 1 ? chunk * GROUPS + g : chunk / GROUP_CHUNKS;
        const PARAM* p = params + (group * 8 + r) * (PARAM_BYTES / (int)sizeof(PARAM)) + h;
        scales[c][g][h] = GROUP == 0 ? args.scale[row] : param(p);
        offsets[c][g][h] = GROUP == 0 || OFFSET == NO_OFFSET ? 0.0f : param(p + 2);
      }
  wait_for_input();  // the product ahead has read what is written here
#pragma unroll
  for (int c = 0; c < CHUNKS; c++) {
    const int chunk = begin + c;
    if (chunk >= num_chunks) break;
#pragma unroll
    for (int j = 0; j < 4; j++) {
      u32 a[4];
      if (CODE == INT4) {
        decode_int4<false>(words[c][j], a);
      } else {
        decode_bytes(words[c][j], a[0], a[2]);
        decode_bytes(words[c][4 * (CODE_LOADS - 1) + j], a[1], a[3]);
      }
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const float scale = scales[c][j / STEPS][i % 2], offset = offsets[c][j / STEPS][i % 2];
        float numbers[2] = {from_m(a[i]), from_m(a[i] >> 16)};
#pragma unroll
        for (int v = 0; v < 2; v++)
          numbers[v] = OFFSET == MINIMUM ? numbers[v] * scale - offset : (numbers[v] - offset) * scale;
        tile_rows[(r + i % 2 * 8) * PITCH + 8 * j + i / 2 * 4 + t] = pair_of_floats(numbers[0], numbers[1]);
      }
    }
    __syncwarp();
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const int row = lane / 8 + 4 * i, place = 16 * tile + row;
      const uint4 v = *(const uint4*)(tile_rows + row * PITCH + lane % 8 * 4);
      if (place < args.num_tokens) *(uint4*)((u16*)args.out + (u64)place * args.k + chunk * CHUNK + lane % 8 * 8) = v;
    }
    __syncwarp();
  }
}
