// `decode_heads` for 16-bit numbers; what is computed and the names: `coding_kernels`. A program takes
// TOKENS tokens with all their heads through shared memory, 16 bytes at a time: heads lie far apart on
// one side and side by side on the other.
//
// Defined in front of this text: D, CAMERA, SPACE, SURFACE, TIME (a head's channels), TURNED, GATED,
// PER_HEAD, TOKENS, THREADS, and HALF for float16.

typedef unsigned int u32;
typedef unsigned short u16;
constexpr int CHUNKS = D / 8;
extern "C" __constant__ int shared_bytes = 0;  // all of it is asked for at the launch

__device__ __forceinline__ float wide(u16 x) {
  float y;
#if HALF
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x));
#else
  asm("{.reg .b16 z; mov.b16 z, 0; mov.b32 %0, {z, %1};}" : "=f"(y) : "h"(x));
#endif
  return y;
}
__device__ __forceinline__ u32 packed(float low, float high) {
  u32 y;
#if HALF
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
#else
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
#endif
  return y;
}
__device__ __forceinline__ void unpack(float (&x)[8], const u16* from) {
  const uint4 chunk = *(const uint4*)from;
  const u32 pairs[4] = {chunk.x, chunk.y, chunk.z, chunk.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) x[2 * i] = wide((u16)pairs[i]), x[2 * i + 1] = wide((u16)(pairs[i] >> 16));
}

// How a token turns channel d: cosine, sine with its sign, and the channel it is turned with.
struct Turn { float cos, sin; int partner; };
__device__ __forceinline__ Turn turn_of(
    int d, int n, int s, const float* space_cos, const float* space_sin, const float* surface_cos, const float* surface_sin) {
  constexpr int SURFACE_AT = CAMERA + SPACE, TIME_AT = SURFACE_AT + SURFACE;
  const int group = d < CAMERA ? 0 : d < SURFACE_AT ? 1 : d < TIME_AT ? 2 : 3;
  const int start = group == 1 ? CAMERA : SURFACE_AT, half = group == 1 ? SPACE / 2 : SURFACE / 2;
  if (group == 0 || group == 3 || (group == 2 && !TURNED)) return {1.f, 0.f, d};
  const bool first = d - start < half;
  const int pair = first ? d - start : d - start - half;
  const int at = group == 1 ? s * (SPACE / 2) + pair : n * (SURFACE / 2) + pair;
  const float cos = (group == 1 ? space_cos : surface_cos)[at], sin = (group == 1 ? space_sin : surface_sin)[at];
  return {cos, first ? sin : -sin, first ? d + half : d - half};
}

// Eight channels of one head, decoded.
__device__ __forceinline__ void decoded(float (&y)[8], const u16* head, const Turn* turns, const float* matrix, int c) {
  float x[8];
  unpack(x, head + 8 * c);
#pragma unroll
  for (int quad = 0; quad < 8; quad += 4) {
    if (8 * c + quad < CAMERA) {
#pragma unroll
      for (int i = 0; i < 4; ++i)
        y[quad + i] = matrix[4 * i] * x[quad] + matrix[4 * i + 1] * x[quad + 1] + matrix[4 * i + 2] * x[quad + 2] + matrix[4 * i + 3] * x[quad + 3];
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const Turn turn = turns[8 * c + quad + i];
        y[quad + i] = x[quad + i] * turn.cos - wide(head[turn.partner]) * turn.sin;
      }
    }
  }
}

extern "C" __global__ void __launch_bounds__(THREADS) decode(
    const u16* __restrict__ local, const u16* __restrict__ far, const u16* __restrict__ gate, const float* __restrict__ matrix,
    const float* __restrict__ space_cos, const float* __restrict__ space_sin, const float* __restrict__ surface_cos,
    const float* __restrict__ surface_sin, u16* __restrict__ out, int N, int T, int S, int H) {
  extern __shared__ __align__(16) char raw[];
  const int rows = TOKENS * H;
  u16* const own = (u16*)raw;
  u16* const other = own + rows * D;
  Turn* const turns = (Turn*)(other + (GATED ? rows * D : 0));
  float* const matrices = (float*)(turns + TOKENS * D);
  const int n0 = blockIdx.x * TOKENS;

  for (int x = threadIdx.x; x < rows * CHUNKS; x += THREADS) {
    const int h = x / (TOKENS * CHUNKS), token = x / CHUNKS % TOKENS, c = x % CHUNKS, n = n0 + token;
    if (n >= N) continue;
    const int bt = n / S, to = (token * H + h) * D + 8 * c;
    const long long from = (((long long)(bt / T) * H + h) * T + bt % T) * S * D + (long long)(n % S) * D + 8 * c;
    *(uint4*)(own + to) = *(const uint4*)(local + from);
    if (GATED) *(uint4*)(other + to) = *(const uint4*)(far + from);
  }
  for (int x = threadIdx.x; x < TOKENS * D; x += THREADS) {
    const int n = n0 + x / D;
    if (n < N) turns[x] = turn_of(x % D, n, n % S, space_cos, space_sin, surface_cos, surface_sin);
  }
  if (CAMERA)
    for (int x = threadIdx.x; x < TOKENS * 16; x += THREADS)
      if (n0 + x / 16 < N) matrices[x] = matrix[(n0 + x / 16) / S * 16 + x % 16];
  __syncthreads();

  for (int x = threadIdx.x; x < rows * CHUNKS; x += THREADS) {
    const int row = x / CHUNKS, c = x % CHUNKS, token = row / H, h = row % H, n = n0 + token;
    if (n >= N) continue;
    const long long nh = (long long)n * H + h, to = nh * D + 8 * c;
    float y[8];
    decoded(y, own + row * D, turns + token * D, matrices + token * 16, c);
    if (GATED) {
      float z[8], open[8];
      decoded(z, other + row * D, turns + token * D, matrices + token * 16, c);
      if (PER_HEAD) {
#pragma unroll
        for (int i = 0; i < 8; ++i) open[i] = wide(gate[nh]);
      } else {
        unpack(open, gate + to);
      }
#pragma unroll
      for (int i = 0; i < 8; ++i) y[i] += z[i] / (1.f + __expf(-open[i]));
    }
    *(uint4*)(out + to) = make_uint4(packed(y[0], y[1]), packed(y[2], y[3]), packed(y[4], y[5]), packed(y[6], y[7]));
  }
}
