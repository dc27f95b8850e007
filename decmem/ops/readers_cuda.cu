// `inverse_lists` where lists are of one world and group: a program counts the readers of every key block,
// which gives each its place, and goes through the lists in turn, so that readers come out ascending. No block
// is listed twice in one list: within a list threads never meet.

constexpr int THREADS = 128, WARPS = THREADS / 32, AHEAD = 8;
extern "C" __constant__ int shared_bytes = 4 * WARPS;

// Lists of K slots, -1 where empty; `offsets` of NK key blocks, and one more. The next place of each key block
// comes behind what is shared besides.
extern "C" __global__ void __launch_bounds__(THREADS) turn_round(
    const int* __restrict__ lists, int* __restrict__ readers, int* __restrict__ offsets, int NQ, int K, int NK) {
  extern __shared__ int totals[];
  int* const next = totals + WARPS;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, entries = NQ * K;
  lists += (long long)blockIdx.x * entries, readers += (long long)blockIdx.x * entries;
  offsets += (long long)blockIdx.x * (NK + 1);
  for (int j = threadIdx.x; j < NK; j += THREADS) next[j] = 0;
  __syncthreads();
  for (int start = threadIdx.x; start < entries; start += AHEAD * THREADS) {
    // All are asked for before the first is counted; and below.
    int block[AHEAD];
#pragma unroll
    for (int i = 0; i < AHEAD; ++i) block[i] = start + i * THREADS < entries ? lists[start + i * THREADS] : -1;
#pragma unroll
    for (int i = 0; i < AHEAD; ++i)
      if (block[i] >= 0) atomicAdd(next + block[i], 1);
  }
  __syncthreads();

  // Counts become places: each thread adds up some, then threads and warps what they found.
  const int part = (NK + THREADS - 1) / THREADS, first = min((int)threadIdx.x * part, NK), last = min(first + part, NK);
  int sum = 0;
  for (int j = first; j < last; ++j) sum += next[j];
  int place = sum;
#pragma unroll
  for (int far = 1; far < 32; far *= 2) {
    const int more = __shfl_up_sync(~0u, place, far);
    if (lane >= far) place += more;
  }
  if (lane == 31) totals[warp] = place;
  __syncthreads();
  place -= sum;
  for (int w = 0; w < warp; ++w) place += totals[w];
  for (int j = first; j < last; ++j) {
    const int count = next[j];
    offsets[j] = next[j] = place;
    place += count;
  }
  if (threadIdx.x == THREADS - 1) offsets[NK] = place;
  __syncthreads();

  const auto put = [&](int block, int reader) {
    if (block < 0) return;
    const int at = next[block];
    readers[at] = reader, next[block] = at + 1;
  };
  for (int start = 0; start < NQ; start += AHEAD) {
    int block[AHEAD];
#pragma unroll
    for (int i = 0; i < AHEAD; ++i)
      block[i] = start + i < NQ && (int)threadIdx.x < K ? lists[(start + i) * K + threadIdx.x] : -1;
#pragma unroll
    for (int i = 0; i < AHEAD; ++i) {
      put(block[i], start + i);
      if (start + i < NQ)
        for (int slot = threadIdx.x + THREADS; slot < K; slot += THREADS) put(lists[(start + i) * K + slot], start + i);
      __syncthreads();
    }
  }
}
