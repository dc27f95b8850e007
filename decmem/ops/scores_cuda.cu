// `block_scores` per head, of few query blocks, in fp32: every thread has one key, and meets it with all
// ROWS query blocks that it serves, whose channels lie in shared memory.
//
// Defined in front of this text: D, a multiple of 8; ROWS, a multiple of 4, room for the query blocks of
// all worlds that one world's keys serve.

constexpr int THREADS = 128, CHUNK = 8, CHUNKS = D / CHUNK;  // channels; two chunks of a key are read ahead
extern "C" __constant__ int shared_bytes = D * ROWS * 4;

struct Part { float4 low, high; };
__device__ __forceinline__ Part part_of(const float* __restrict__ key, int chunk) {
  const float4* x = (const float4*)(key + CHUNK * chunk);
  return {x[0], x[1]};
}

// Queries (worlds served by one, H, Nq, D) of every world of keys; `rows` of them are there. Keys lie
// apart by worlds and heads.
extern "C" __global__ void __launch_bounds__(THREADS) score(
    const float* __restrict__ q, const float* __restrict__ k, float* __restrict__ out, int H, int Nq, int rows, int Nk,
    int tiles, int k_world, int k_head) {
  extern __shared__ __align__(16) float of_channels[];  // channel, then query block
  const int tile = blockIdx.x % tiles, h = blockIdx.x / tiles % H, world = blockIdx.x / tiles / H;
  const int first = world * (rows / Nq);  // of the worlds that these keys serve
  for (int x = threadIdx.x; x < ROWS * D; x += THREADS) {
    const int row = x / D, d = x % D;
    const long long line = ((long long)(first + row / Nq) * H + h) * Nq + row % Nq;
    of_channels[d * ROWS + row] = row < rows ? q[line * D + d] : 0.f;
  }
  const int n = tile * THREADS + threadIdx.x;
  // Threads without a key take the last one, and keep what they find to themselves.
  const float* key = k + (long long)world * k_world + (long long)h * k_head + (long long)min(n, Nk - 1) * D;
  Part next = part_of(key, 0), after = part_of(key, min(1, CHUNKS - 1));
  __syncthreads();
  float sums[ROWS];
#pragma unroll
  for (int r = 0; r < ROWS; ++r) sums[r] = 0;
#pragma unroll 1
  for (int c = 0; c < CHUNKS; ++c) {
    const float own[CHUNK] = {next.low.x, next.low.y, next.low.z, next.low.w,
                              next.high.x, next.high.y, next.high.z, next.high.w};
    next = after;
    if (c + 2 < CHUNKS) after = part_of(key, c + 2);
#pragma unroll
    for (int i = 0; i < CHUNK; ++i) {
      const float4* of_rows = (const float4*)(of_channels + (CHUNK * c + i) * ROWS);
#pragma unroll
      for (int r = 0; r < ROWS / 4; ++r) {
        const float4 x = of_rows[r];
        sums[4 * r] = fmaf(own[i], x.x, sums[4 * r]), sums[4 * r + 1] = fmaf(own[i], x.y, sums[4 * r + 1]);
        sums[4 * r + 2] = fmaf(own[i], x.z, sums[4 * r + 2]), sums[4 * r + 3] = fmaf(own[i], x.w, sums[4 * r + 3]);
      }
    }
  }
  if (n >= Nk) return;
#pragma unroll
  for (int r = 0; r < ROWS; ++r)
    if (r < rows) out[(((long long)(first + r / Nq) * H + h) * Nq + r % Nq) * Nk + n] = sums[r];
}
