// `block_scores` per head, of few query blocks, in fp32: tensor cores multiply numbers as two of TF32, which
// have all that one of fp32 has but a bit or two, and fp32 adds up what they make of 8 channels. A warp meets
// 16 keys at a time with all ROWS query blocks that they serve, whose parts lie in shared memory.
//
// Defined in front of this text: D, a multiple of 8; ROWS, a multiple of 8, room for the query blocks of
// all worlds that one world's keys serve.

typedef unsigned int u32;
constexpr int WARPS = 4, THREADS = 32 * WARPS, KEYS = 16, SLICES = D / 8, TILES = ROWS / 8;
extern "C" __constant__ int shared_bytes = SLICES * TILES * 32 * 16 + ROWS * 8;

// A number as the sum of two of TF32.
struct Parts { u32 large, small; };
__device__ __forceinline__ u32 rounded(float x) {
  u32 y;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ Parts parts_of(float x) {
  const u32 large = rounded(x);
  return {large, rounded(x - __int_as_float(large))};
}

// Adds the product of 16 keys and 8 query blocks over 8 channels. Of those a thread has two, of the keys
// lane / 4 and 8 further and of the query block lane / 4; its sums are of these keys and of the query blocks
// 2 (lane % 4) and the next.
__device__ __forceinline__ void multiply(float (&sums)[4], const u32 (&keys)[4], u32 first, u32 second) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
      : "r"(keys[0]), "r"(keys[1]), "r"(keys[2]), "r"(keys[3]), "r"(first), "r"(second));
}

// The first of the two channels of a slice that a thread has: two slices are four channels side by side.
__device__ __forceinline__ int channel_of(int slice) {
  const int quarter = threadIdx.x % 4;
  return slice / 2 * 2 + 1 < SLICES ? slice / 2 * 16 + 4 * quarter + slice % 2 * 2 : 8 * slice + 2 * quarter;
}

// What a thread has of 16 keys: of `first` and 8 further, two channels of every slice.
// Keys that are not there are the last one.
__device__ __forceinline__ void take(float (&own)[2][2 * SLICES], const float* __restrict__ keys, int first, int Nk) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const float* const key = keys + (long long)min(first + 8 * i, Nk - 1) * D;
#pragma unroll
    for (int s = 0; s + 1 < SLICES; s += 2) {
      const float4 x = *(const float4*)(key + channel_of(s));
      own[i][2 * s] = x.x, own[i][2 * s + 1] = x.y, own[i][2 * s + 2] = x.z, own[i][2 * s + 3] = x.w;
    }
    if (SLICES % 2) {
      const float2 x = *(const float2*)(key + channel_of(SLICES - 1));
      own[i][2 * SLICES - 2] = x.x, own[i][2 * SLICES - 1] = x.y;
    }
  }
}

// Queries (worlds served by one, H, Nq, D) of every world of keys; `rows` of them are there. Keys lie
// apart by worlds and heads; a program has `rounds` times 64 of them.
extern "C" __global__ void __launch_bounds__(THREADS) score(
    const float* __restrict__ q, const float* __restrict__ k, float* __restrict__ out, int H, int Nq, int rows, int Nk,
    int tiles, int rounds, int k_world, int k_head) {
  extern __shared__ __align__(16) uint4 queries[];  // slice, then tile, then lane: two large parts, two small ones
  const int tile = blockIdx.x % tiles, h = blockIdx.x / tiles % H, world = blockIdx.x / tiles / H;
  long long* const lines = (long long*)(queries + SLICES * TILES * 32);  // of queries and results; -1: nowhere
  const int lane = threadIdx.x % 32;
  const float* const keys = k + (long long)world * k_world + (long long)h * k_head;
  int first = (tile * rounds * WARPS + threadIdx.x / 32) * KEYS + lane / 4;
  if (threadIdx.x < ROWS) {
    const int row = threadIdx.x, served = world * (rows / Nq) + row / Nq;
    lines[row] = row < rows ? ((long long)served * H + h) * Nq + row % Nq : -1;
  }
  __syncthreads();
#pragma unroll 4
  for (int x = threadIdx.x; x < SLICES * TILES * 32; x += THREADS) {
    const long long line = lines[x / 32 % TILES * 8 + lane / 4];
    float2 two = {0, 0};
    if (line >= 0) two = *(const float2*)(q + line * D + channel_of(x / 32 / TILES));
    const Parts one = parts_of(two.x), other = parts_of(two.y);
    queries[x] = make_uint4(one.large, other.large, one.small, other.small);
  }
  __syncthreads();

#pragma unroll 1
  for (int round = 0; round < rounds; ++round, first += WARPS * KEYS) {
    float own[2][2 * SLICES];
    take(own, keys, first, Nk);
    float sums[TILES][4];
#pragma unroll
    for (int n = 0; n < TILES; ++n)
#pragma unroll
      for (int j = 0; j < 4; ++j) sums[n][j] = 0;
#pragma unroll
    for (int s = 0; s < SLICES; ++s) {
      u32 large[4], small[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const Parts parts = parts_of(own[j % 2][2 * s + j / 2]);
        large[j] = parts.large, small[j] = parts.small;
      }
#pragma unroll
      for (int n = 0; n < TILES; ++n) {
        const uint4 query = queries[(s * TILES + n) * 32 + lane];
        // Tensor cores cut off what they add to a larger sum.
        float more[4] = {0, 0, 0, 0};
        multiply(more, small, query.x, query.y);
        multiply(more, large, query.z, query.w);
        multiply(more, large, query.x, query.y);
#pragma unroll
        for (int j = 0; j < 4; ++j) sums[n][j] += more[j];
      }
    }
#pragma unroll
    for (int n = 0; n < TILES; ++n)
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const long long line = lines[8 * n + 2 * (lane % 4) + j];
        if (line < 0) continue;
#pragma unroll
        for (int i = 0; i < 2; ++i)
          if (first + 8 * i < Nk) out[line * Nk + first + 8 * i] = sums[n][2 * i + j];
      }
  }
}
