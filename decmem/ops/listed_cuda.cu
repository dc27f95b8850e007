// Programs that walk the list of a query block, for `sparse_cuda` and `sparse_query_gradient_cuda`: of each
// listed block its number and its tokens lie in shared memory.

constexpr int SPANS = PK / SPAN, PROGRAMS = (PQ + 64 * GROUPS - 1) / (64 * GROUPS);
// The last group may have no more than 32 rows: one in each upper half of a warp's tile of 16, so that
// no thread works for rows that do not exist.
constexpr bool HALF_LAST = PROGRAMS == 1 && PQ % 64 != 0 && PQ % 64 <= 32;
constexpr int LIST_ENTRY = 8;

// Blocks that are listed; empty slots come last. Every warp counts for itself.
__device__ __forceinline__ int filled_of(const int* __restrict__ lists, int slots) {
  const int lane = threadIdx.x % 32;
  int filled = 0;
#pragma unroll 4
  for (int x = lane; x < up(slots, 32); x += 32) filled += __popc(__ballot_sync(~0u, x < slots && lists[x] >= 0));
  return filled;
}

// All threads: entries `first` to `last` of the list, to shared memory from `at` on.
__device__ __forceinline__ void put_list(
    u32 at, const int* __restrict__ lists, const int* __restrict__ valid, int period, int first, int last) {
  for (int x = first + threadIdx.x; x < last; x += 128 * GROUPS) {
    const int block = lists[x], tokens = period ? valid[block % period] : PK;
    asm volatile("st.shared.v2.b32 [%0], {%1, %2};"
                 ::"r"(at + LIST_ENTRY * (x - first)), "r"(block), "r"(tokens) : "memory");
  }
}

// The block of span `n`, and the tokens from that span's first slot on.
__device__ __forceinline__ int block_of(u32 at, int n) {
  int block;
  asm volatile("ld.shared.b32 %0, [%1];" : "=r"(block) : "r"(at + LIST_ENTRY * (n / SPANS)) : "memory");
  return block;
}
__device__ __forceinline__ int tokens_of(u32 at, int n) {
  int tokens;
  asm volatile("ld.shared.b32 %0, [%1];" : "=r"(tokens) : "r"(at + LIST_ENTRY * (n / SPANS) + 4) : "memory");
  return tokens - n % SPANS * SPAN;
}
