// `encode_heads` and `decode_heads` for 16-bit numbers; what is computed and the names: `coding_kernels`.
// A program takes TOKENS tokens with all their heads through shared memory, 16 bytes at a time: heads
// lie far apart on one side and side by side on the other.
//
// Defined in front of this text: D, CAMERA, SPACE, SURFACE, TIME (a head's channels), TURNED, TOKENS,
// THREADS, HALF for float16; NORMED, TIMED, LOCAL, VALUES and HEADS_LAST of the encoding; GATED,
// PER_HEAD and ROUNDED of the decoding.

constexpr int CHUNKS = D / 8;
extern "C" __constant__ int shared_bytes = 0;  // all of it is asked for at the launch

__device__ __forceinline__ void unpack(float (&x)[8], const u16* from) {
  const uint4 chunk = *(const uint4*)from;
  const u32 pairs[4] = {chunk.x, chunk.y, chunk.z, chunk.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) x[2 * i] = wide((u16)pairs[i]), x[2 * i + 1] = wide((u16)(pairs[i] >> 16));
}

#if ROUNDED
typedef unsigned char decoded_t;
// Two numbers of 8 bits.
__device__ __forceinline__ u32 eighths(float low, float high) {
  u16 y;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(y) : "f"(high), "f"(low));
  return y;
}
#else
typedef u16 decoded_t;
#endif

// Cosines and sines of the groups that are turned: by slot, by token and by latent.
struct Tables { const float *space_cos, *space_sin, *surface_cos, *surface_sin, *time_cos, *time_sin; };

// How a token turns channel d: cosine, sine with its sign, and the channel it is turned with.
struct Turn { float cos, sin; int partner; };
__device__ __forceinline__ Turn turn_of(int d, int n, int s, int t, Tables tables) {
  constexpr int SURFACE_AT = CAMERA + SPACE, TIME_AT = SURFACE_AT + SURFACE;
  const float *cos = nullptr, *sin = nullptr;
  int start = 0, pairs = 1, row = 0;
  if (d >= CAMERA && d < SURFACE_AT)
    cos = tables.space_cos, sin = tables.space_sin, start = CAMERA, pairs = SPACE / 2, row = s;
  else if (d >= SURFACE_AT && d < TIME_AT && TURNED)
    cos = tables.surface_cos, sin = tables.surface_sin, start = SURFACE_AT, pairs = SURFACE / 2, row = n;
  else if (d >= TIME_AT)
    cos = tables.time_cos, sin = tables.time_sin, start = TIME_AT, pairs = TIME / 2, row = t;
  if (cos == nullptr) return {1.f, 0.f, d};
  const bool first = d - start < pairs;
  const int at = row * pairs + (d - start) % pairs;
  return {cos[at], first ? sin[at] : -sin[at], first ? d + pairs : d - pairs};
}

// Eight channels of one head: multiplied by the matrix, or by its transpose (ACROSS), and turned, or
// turned back (BACK); the time group only with WITH_TIME.
template <bool ACROSS, bool BACK, bool WITH_TIME>
__device__ __forceinline__ void coded(float (&y)[8], const u16* head, const Turn* turns, const float* matrix, int c) {
  float x[8];
  unpack(x, head + 8 * c);
#pragma unroll
  for (int quad = 0; quad < 8; quad += 4) {
    if (8 * c + quad < CAMERA) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        y[quad + i] = 0;
#pragma unroll
        for (int j = 0; j < 4; ++j) y[quad + i] += matrix[ACROSS ? 4 * j + i : 4 * i + j] * x[quad + j];
      }
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int d = 8 * c + quad + i;
        const Turn turn = turns[d];
        const float turned = wide(head[turn.partner]) * turn.sin;
        y[quad + i] = !WITH_TIME && d >= D - TIME ? x[quad + i] : x[quad + i] * turn.cos + (BACK ? -turned : turned);
      }
    }
  }
}

__device__ __forceinline__ void put(u16* to, const float (&y)[8]) {
  *(uint4*)to = make_uint4(packed(y[0], y[1]), packed(y[2], y[3]), packed(y[4], y[5]), packed(y[6], y[7]));
}

// Where head h of token n lies if heads come first, with room for `latents` latents a head.
__device__ __forceinline__ long long place_of(int n, int h, int T, int S, int H, int latents) {
  const int bt = n / S;
  return ((((long long)(bt / T) * H + h) * latents + bt % T) * S + n % S) * D;
}

// Rotations and matrices of a program's tokens, once for all heads.
__device__ __forceinline__ void prepare(Turn* turns, int n0, int N, int T, int S, Tables tables) {
  for (int x = threadIdx.x; x < TOKENS * D; x += THREADS) {
    const int n = n0 + x / D;
    if (n < N) turns[x] = turn_of(x % D, n, n % S, n / S % T, tables);
  }
}
__device__ __forceinline__ void prepare(float* to, int n0, int N, int S, const float* matrix) {
  for (int x = threadIdx.x; x < TOKENS * 16; x += THREADS)
    if (n0 + x / 16 < N) to[x] = matrix[(n0 + x / 16) / S * 16 + x % 16];
}

// Keys and values may have room for more latents a head, `latents` in all; everything else has T.
extern "C" __global__ void __launch_bounds__(THREADS) encode(
    const u16* __restrict__ qkv, const float* __restrict__ gains, const float* __restrict__ query_matrix,
    const float* __restrict__ key_matrix, const float* space_cos, const float* space_sin, const float* surface_cos,
    const float* surface_sin, const float* time_cos, const float* time_sin, u16* __restrict__ q, u16* __restrict__ k,
    u16* __restrict__ v, u16* __restrict__ local_q, u16* __restrict__ local_k, int N, int T, int S, int H, int latents, float eps) {
  extern __shared__ __align__(16) char raw[];
  const int rows = TOKENS * H;
  u16* const own = (u16*)raw;  // token, then queries, keys or values, then head
  Turn* const turns = (Turn*)(own + 3 * rows * D);
  float* const of_queries = (float*)(turns + TOKENS * D);
  float* const of_keys = of_queries + TOKENS * 16;
  float* const sizes = of_keys + TOKENS * 16;  // of queries and keys, in the same order
  const int n0 = blockIdx.x * TOKENS;

  for (int x = threadIdx.x; x < 3 * rows * CHUNKS; x += THREADS)
    if (n0 + x / (3 * H * CHUNKS) < N) *(uint4*)(own + 8 * x) = *(const uint4*)(qkv + (long long)n0 * 3 * H * D + 8 * x);
  prepare(turns, n0, N, T, S, Tables{space_cos, space_sin, surface_cos, surface_sin, time_cos, time_sin});
  if (CAMERA) prepare(of_queries, n0, N, S, query_matrix), prepare(of_keys, n0, N, S, key_matrix);
  __syncthreads();
  if (NORMED) {
    for (int x = threadIdx.x; x < 2 * rows; x += THREADS) {
      const u16* head = own + (x / (2 * H) * 3 * H + x % (2 * H)) * D;
      float sum = 0;
      for (int c = 0; c < CHUNKS; ++c) {
        float y[8];
        unpack(y, head + 8 * c);
#pragma unroll
        for (int i = 0; i < 8; ++i) sum += y[i] * y[i];
      }
      sizes[x] = rsqrtf(sum / D + eps) * gains[x % (2 * H)];
    }
    __syncthreads();
  }

  for (int x = threadIdx.x; x < rows * CHUNKS; x += THREADS) {
    const int c = x % CHUNKS, row = x / CHUNKS;
    const int token = HEADS_LAST ? row / H : row % TOKENS, h = HEADS_LAST ? row % H : row / TOKENS, n = n0 + token;
    if (n >= N) continue;
    const long long to = (HEADS_LAST ? ((long long)n * H + h) * D : place_of(n, h, T, S, H, T)) + 8 * c;
    const long long roomy = HEADS_LAST ? to : place_of(n, h, T, S, H, latents) + 8 * c;
    const Turn* const turn = turns + token * D;
#pragma unroll
    for (int part = 0; part < 3; ++part) {
      const long long at = part == 0 ? to : roomy;
      const u16* const head = own + (token * 3 * H + part * H + h) * D;
      const float size = NORMED && part < 2 ? sizes[token * 2 * H + part * H + h] : 1.f;
      u16* const out = part == 0 ? q : part == 1 ? k : v;
      if (part == 2 && !VALUES) {
        *(uint4*)(out + at) = *(const uint4*)(head + 8 * c);
        continue;
      }
      float y[8];
      if (part == 0) coded<true, false, TIMED>(y, head, turn, of_queries + token * 16, c);
      else if (part == 1) coded<false, false, TIMED>(y, head, turn, of_keys + token * 16, c);
      else coded<false, false, false>(y, head, turn, of_keys + token * 16, c);
#pragma unroll
      for (int i = 0; i < 8; ++i) y[i] *= size;
      put(out + at, y);
      if (LOCAL && part < 2) {
        if (part == 0) coded<true, false, true>(y, head, turn, of_queries + token * 16, c);
        else coded<false, false, true>(y, head, turn, of_keys + token * 16, c);
#pragma unroll
        for (int i = 0; i < 8; ++i) y[i] *= size;
        put((part == 0 ? local_q : local_k) + to, y);
      }
    }
  }
}

extern "C" __global__ void __launch_bounds__(THREADS) decode(
    const u16* __restrict__ local, const u16* __restrict__ far, const u16* __restrict__ gate, const float* __restrict__ matrix,
    const float* space_cos, const float* space_sin, const float* surface_cos, const float* surface_sin,
    decoded_t* __restrict__ out, float* __restrict__ scale, int N, int T, int S, int H) {
  extern __shared__ __align__(16) char raw[];
  const int rows = TOKENS * H;
  u16* const own = (u16*)raw;
  u16* const other = own + rows * D;
  u16* const ready = other + (GATED ? rows * D : 0);  // what is decoded, before it is rounded
  Turn* const turns = (Turn*)(ready + (ROUNDED ? rows * D : 0));
  float* const matrices = (float*)(turns + TOKENS * D);
  const int n0 = blockIdx.x * TOKENS;

  for (int x = threadIdx.x; x < rows * CHUNKS; x += THREADS) {
    const int h = x / (TOKENS * CHUNKS), token = x / CHUNKS % TOKENS, c = x % CHUNKS, n = n0 + token;
    if (n >= N) continue;
    const int to = (token * H + h) * D + 8 * c;
    const long long from = place_of(n, h, T, S, H, T) + 8 * c;
    *(uint4*)(own + to) = *(const uint4*)(local + from);
    if (GATED) *(uint4*)(other + to) = *(const uint4*)(far + from);
  }
  prepare(turns, n0, N, T, S, Tables{space_cos, space_sin, surface_cos, surface_sin, nullptr, nullptr});
  if (CAMERA) prepare(matrices, n0, N, S, matrix);
  __syncthreads();

  for (int x = threadIdx.x; x < rows * CHUNKS; x += THREADS) {
    const int row = x / CHUNKS, c = x % CHUNKS, token = row / H, h = row % H, n = n0 + token;
    if (n >= N) continue;
    const long long nh = (long long)n * H + h, to = nh * D + 8 * c;
    float y[8];
    coded<false, true, false>(y, own + row * D, turns + token * D, matrices + token * 16, c);
    if (GATED) {
      float z[8], open[8];
      coded<false, true, false>(z, other + row * D, turns + token * D, matrices + token * 16, c);
      if (PER_HEAD) {
#pragma unroll
        for (int i = 0; i < 8; ++i) open[i] = wide(gate[nh]);
      } else {
        unpack(open, gate + to);
      }
#pragma unroll
      for (int i = 0; i < 8; ++i) y[i] += z[i] / (1.f + __expf(-open[i]));
    }
#if ROUNDED
    put(ready + row * D + 8 * c, y);
#else
    put(out + to, y);
#endif
  }
#if ROUNDED
  __syncthreads();
  // A warp for each token: its largest number, then all in 8 bits, as `fp8_rows` rounds them.
  const int token = threadIdx.x / 32, lane = threadIdx.x % 32, n = n0 + token, width = H * CHUNKS;
  if (token >= TOKENS || n >= N) return;
  float most = LEAST;
  for (int c = lane; c < width; c += 32) {
    float y[8];
    unpack(y, ready + token * H * D + 8 * c);
#pragma unroll
    for (int i = 0; i < 8; ++i) most = fmaxf(most, fabsf(y[i]));
  }
#pragma unroll
  for (int far = 16; far; far /= 2) most = fmaxf(most, __shfl_xor_sync(~0u, most, far));
  const float by = LARGEST / most;
  for (int c = lane; c < width; c += 32) {
    float y[8];
    unpack(y, ready + token * H * D + 8 * c);
    u32 quads[2];
#pragma unroll
    for (int i = 0; i < 2; ++i)
      quads[i] = eighths(y[4 * i] * by, y[4 * i + 1] * by) | eighths(y[4 * i + 2] * by, y[4 * i + 3] * by) << 16;
    *(uint2*)(out + (long long)n * H * D + 8 * c) = make_uint2(quads[0], quads[1]);
  }
  if (lane == 0) scale[n] = most * (1.f / LARGEST);
#endif
}
