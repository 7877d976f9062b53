// What kernels share in which tensor cores attend for single tokens.
//
// Tensor cores multiply, and nothing is laid out anew for them. Four lanes have a vector (a query head's, or a token's
// key or value): lane c the elements 32 j + 8 c to 32 j + 8 c + 7, 16 bytes, as they are in memory. A product takes its
// inner elements in any order, if both sides have the same; so the 4 words are what a lane has of two operands of
// 16 x 8. The values, whose inner index is the token, are transposed in registers, 8 x 8 at a time.

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

// What a lane's element e of piece j is multiplied by, and its partner.
struct Angle {
  float cos, sin;
};

__device__ __forceinline__ Angle angle_at(const float* angles, int j, int e, int d) {
  const int i = 32 * j + d;
  const float* from = angles + (IS_ALIGNED ? 32 * (j % (STEP + !STEP)) + d : i < HALF ? i : i - HALF);
  if (i >= 2 * HALF) return {1.0f, 0.0f};
  return {from[e], i < HALF ? -from[HALF + e] : from[HALF + e]};
}

struct Rotation {  // all angles of a lane, in registers
  Angle angles[PIECES][8];

  __device__ __forceinline__ Rotation(const float* from, int d) {
#pragma unroll
    for (int j = 0; j < PIECES; j++)
#pragma unroll
      for (int e = 0; e < 8; e++) angles[j][e] = angle_at(from, j, e, d);
  }
  __device__ __forceinline__ Angle at(int j, int e, int) const { return angles[j][e]; }
};

struct RotationInMemory {  // looked up one by one
  const float* angles;

  __device__ __forceinline__ Angle at(int j, int e, int d) const { return angle_at(angles, j, e, d); }
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
template <typename ROTATION>
__device__ __forceinline__ Vector rotated(
    Vector x, const u16* from, const u16* weights, const Vector& weight, const ROTATION& rotation, float eps, int d) {
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
      const Angle low = rotation.at(j, 2 * w, d), high = rotation.at(j, 2 * w + 1, d);
      result.words[j][w] = IS_ALIGNED && j >= 2 * STEP ? own : packed(
          low_of(own) * low.cos + low_of(other) * low.sin, high_of(own) * high.cos + high_of(other) * high.sin);
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

  static constexpr int NUMBERS = 2 + PIECES * 8;  // of a lane

  // Writes a lane's numbers, 32 apart.
  __device__ __forceinline__ void hand_over(float* to) const {
    to[0] = m;
    to[32] = l;
#pragma unroll
    for (int j = 0; j < PIECES; j++)
#pragma unroll
      for (int h = 0; h < 2; h++)
#pragma unroll
        for (int i = 0; i < 4; i++) to[(2 + 8 * j + 4 * h + i) * 32] = sums[j][h][i];
  }

  // Adds what another warp has handed over.
  __device__ __forceinline__ void take_over(const float* from, int lane) {
    const float most = fmaxf(m, from[0]), own = exp2_of(m - most), other = exp2_of(from[0] - most);
    m = most;
    l = l * own + from[32] * other;
    float owns[2], others[2];  // of heads 2 c and 2 c + 1
#pragma unroll
    for (int i = 0; i < 2; i++) {
      owns[i] = __shfl_sync(0xffffffffu, own, lane % 4 * 8 + 4 * i);
      others[i] = __shfl_sync(0xffffffffu, other, lane % 4 * 8 + 4 * i);
    }
#pragma unroll
    for (int j = 0; j < PIECES; j++)
#pragma unroll
      for (int h = 0; h < 2; h++)
#pragma unroll
        for (int i = 0; i < 4; i++)
          sums[j][h][i] = sums[j][h][i] * owns[i % 2] + from[(2 + 8 * j + 4 * h + i) * 32] * others[i % 2];
  }

  // Where sums[j][h][i] belongs in its head.
  static __device__ __forceinline__ int element(int j, int h, int i, int lane) {
    return 32 * j + lane / 8 * 8 + 2 * (2 * h + i / 2) + lane / 4 % 2;
  }

  __device__ __forceinline__ void store(const Parts& parts, int warp, int lane) const {
#pragma unroll
    for (int j = 0; j < PIECES; j++)
#pragma unroll
      for (int h = 0; h < 2; h++)
#pragma unroll
        for (int i = 0; i < 4; i++) {
          const int head = lane % 4 * 2 + i % 2;
          if (head < G) parts.sums[(warp * G + head) * STRIDE + element(j, h, i, lane)] = sums[j][h][i];
        }
    const float total = sum_of_four(l);
    const int head = lane / 4;
    if (lane % 4 == 0 && head < G) {
      parts.most[warp * G + head] = m;
      parts.totals[warp * G + head] = total;
    }
  }
};

__device__ __forceinline__ void clear(float (&scores)[2][4]) {
#pragma unroll
  for (int u = 0; u < 2; u++)
#pragma unroll
    for (int i = 0; i < 4; i++) scores[u][i] = 0.0f;
}

// Adds what a piece of the query heads and of a tile's keys have to do with each other.
__device__ __forceinline__ void score(const u32 (&q)[4], const Vector (&k)[2], int j, float (&scores)[2][4]) {
#pragma unroll
  for (int h = 0; h < 2; h++) {
    const u32 a[4] = {q[2 * h], 0, q[2 * h + 1], 0};  // heads 8 to 15 are not there
#pragma unroll
    for (int u = 0; u < 2; u++) multiply(scores[u], a, k[u].words[j][2 * h], k[u].words[j][2 * h + 1]);
  }
}
