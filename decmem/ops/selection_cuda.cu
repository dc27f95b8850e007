// `choose_blocks`: what is chosen, and the same in Triton: `selection` and `selection_kernels`. A program
// chooses for one query block. Scores become integers that sort as they do, and their bits are counted
// from the highest down, 11, 11 and 10 at a time, until it is known from which integer on to take.

typedef unsigned int u32;
constexpr int THREADS = 256, WARPS = THREADS / 32, BINS = 2048, BINS_OF_THREAD = BINS / THREADS, AHEAD = 8;
// The bin of the `wanted`-th largest, how many lie above that bin and how many inside.
struct Found { int bin, above, inside; };

// Shared by a program; the integers of all candidates come behind it.
struct Shared {
  u32 counts[BINS];
  Found found;
  int all, totals[WARPS], above_of[WARPS], equal_of[WARPS];
};
extern "C" __constant__ int shared_bytes = sizeof(Shared);

// Of all threads together. The counts are clear afterwards.
__device__ __forceinline__ Found find(Shared& shared, int wanted) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  // The first thread has the highest bins.
  int own[BINS_OF_THREAD], sum = 0;
#pragma unroll
  for (int i = 0; i < BINS_OF_THREAD; ++i) {
    const int bin = BINS - 1 - (threadIdx.x * BINS_OF_THREAD + i);
    sum += own[i] = shared.counts[bin];
    shared.counts[bin] = 0;
  }
  int upto = sum;
#pragma unroll
  for (int far = 1; far < 32; far *= 2) {
    const int more = __shfl_up_sync(~0u, upto, far);
    if (lane >= far) upto += more;
  }
  if (lane == 31) shared.totals[warp] = upto;
  __syncthreads();
  for (int w = 0; w < warp; ++w) upto += shared.totals[w];
  int above = upto - sum;
  if (above < wanted && wanted <= upto) {
#pragma unroll
    for (int i = 0; i < BINS_OF_THREAD; ++i) {
      if (above < wanted && wanted <= above + own[i])
        shared.found = {BINS - 1 - ((int)threadIdx.x * BINS_OF_THREAD + i), above, own[i]};
      above += own[i];
    }
  }
  __syncthreads();
  return shared.found;
}

// Arguments as of the Triton kernel.
extern "C" __global__ void __launch_bounds__(THREADS) choose(
    const float* __restrict__ scores, const unsigned char* __restrict__ candidates, int* __restrict__ out, int G,
    int Nq, int N, int count, int stride_b, int stride_q, int stride_k) {
  extern __shared__ u32 raw[];
  Shared& shared = *(Shared*)raw;
  u32* keys = raw + sizeof(Shared) / 4;
  const int row = blockIdx.x, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  scores += (long long)row * N, out += (long long)row * count;
  candidates += (long long)(row / (G * Nq)) * stride_b + (long long)(row % Nq) * stride_q;
  for (int i = threadIdx.x; i < BINS; i += THREADS) shared.counts[i] = 0;
  if (threadIdx.x == 0) shared.all = 0;
  __syncthreads();

  // From one up; both zeros are one number. No candidate: zero.
  int there = 0;
  for (int start = threadIdx.x; start < N; start += AHEAD * THREADS) {
    // All are asked for before the first is counted.
    float score[AHEAD];
    bool candidate[AHEAD];
#pragma unroll
    for (int i = 0; i < AHEAD; ++i) {
      const int n = start + i * THREADS;
      score[i] = n < N ? scores[n] : 0.f;
      candidate[i] = n < N && candidates[(long long)n * stride_k];
    }
#pragma unroll
    for (int i = 0; i < AHEAD; ++i) {
      const int n = start + i * THREADS, bits = __float_as_int(score[i]);
      u32 key = 0;
      if (candidate[i]) {
        key = (u32)(bits >= 0 ? bits : -(bits & 0x7fffffff)) ^ 0x80000000;
        atomicAdd(shared.counts + (key >> 21), 1);
        ++there;
      }
      if (n < N) keys[n] = key;
    }
  }
  // Taken is what lies above `least`, and of what equals it the first `spare`.
  u32 least = 0;
  int spare = 0;
  const int in_warp = __reduce_add_sync(~0u, there);
  if (lane == 0) atomicAdd(&shared.all, in_warp);
  __syncthreads();
  if (shared.all > count) {
    int wanted = count, shift = 21;
    u32 high = 0;  // the bits that are known
    Found found = find(shared, wanted);
    for (;;) {
      wanted -= found.above, high |= (u32)found.bin << shift;
      if (found.inside == wanted || shift == 0) break;
      const int known = shift;
      shift = known == 21 ? 10 : 0;
      const u32 bins = known == 21 ? BINS - 1 : 1023;
      for (int n = threadIdx.x; n < N; n += THREADS) {
        const u32 key = keys[n];
        if (key && key >> known == high >> known) atomicAdd(shared.counts + (key >> shift & bins), 1);
      }
      __syncthreads();
      found = find(shared, wanted);
    }
    if (found.inside == wanted) least = high ? high - 1 : 0;
    else least = high, spare = wanted;
  }

  // Each warp looks through a part of the list, twice: for how much it has, and where that goes.
  const int part = (N + THREADS - 1) / THREADS * 32, first = warp * part, last = min(first + part, N);
  int above = 0, equal = 0;
  for (int n = first + lane; n < first + part; n += 32) {
    const u32 key = n < last ? keys[n] : 0;
    above += __popc(__ballot_sync(~0u, key > least)), equal += __popc(__ballot_sync(~0u, key == least && key));
  }
  if (lane == 0) shared.above_of[warp] = above, shared.equal_of[warp] = equal;
  __syncthreads();
  int listed = 0, above_before = 0, equal_before = 0;
  for (int w = 0; w < WARPS; ++w) {
    if (w < warp) above_before += shared.above_of[w], equal_before += shared.equal_of[w];
    listed += shared.above_of[w];
  }
  listed += spare;
  const u32 before = (1u << lane) - 1;
  if (above + equal > 0)
    for (int n = first + lane; n < first + part; n += 32) {
      const u32 key = n < last ? keys[n] : 0;
      const u32 above_now = __ballot_sync(~0u, key > least), equal_now = __ballot_sync(~0u, key == least && key);
      const int above_here = above_before + __popc(above_now & before);
      const int equal_here = equal_before + __popc(equal_now & before);
      if (key > least || (key && key == least && equal_here < spare)) out[above_here + min(equal_here, spare)] = n;
      above_before += __popc(above_now), equal_before += __popc(equal_now);
    }
  for (int slot = listed + threadIdx.x; slot < count; slot += THREADS) out[slot] = -1;
}
