// What kernels for Hopper GPUs are made of: barriers, the bulk copy engine, matrix instructions of warp
// groups. After `numbers_cuda`; D, the head dim, and STAGES are defined in front of both.

struct alignas(64) TensorMap { u64 words[16]; };

__host__ __device__ constexpr int up(int x, int unit) { return (x + unit - 1) / unit * unit; }

// The head dim in two parts, 64 columns and the rest. A swizzled row of shared memory has 128 bytes; the
// rest of what products read 16 columns at a time takes narrower ones. What they read 16 rows at a time
// has rows of 128 bytes for the rest too, zeros beyond the head dim, so that one instruction takes all of D.
constexpr int MAIN = 64, REST = D > MAIN ? D - MAIN : 0;
constexpr int REST_PAD = REST == 0 ? 0 : REST <= 16 ? 16 : REST <= 32 ? 32 : 64;

// Barriers in shared memory.
__device__ __forceinline__ void bar_init(u32 bar, int count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(bar), "r"(count));
}
__device__ __forceinline__ void bar_expect(u32 bar, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(bar), "r"(bytes) : "memory");
}
__device__ __forceinline__ void bar_arrive(u32 bar) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(bar) : "memory");
}
__device__ __forceinline__ void bar_wait(u32 bar, u32 parity) {
  asm volatile(
      "{\n.reg .pred p;\nAGAIN:\nmbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n@p bra DONE;\nbra AGAIN;\nDONE:\n}\n"
      ::"r"(bar), "r"(parity) : "memory");
}
// Kernels side by side: once all programs of one have said so, the next, if launched `early`, may begin where
// there is room. It reads what was there before; no program of it ends before the other kernel has, so that what
// follows waits for both.
__device__ __forceinline__ void let_next_begin() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }
__device__ __forceinline__ void end_after_last() {
  if (threadIdx.x == 0) asm volatile("griddepcontrol.wait;" ::: "memory");
}

// Where a step's data lie in a ring of STAGES, and what its barriers show there.
struct Stage {
  int at;
  u32 phase;
  __device__ __forceinline__ void next() {
    if (++at == STAGES) at = 0, phase ^= 1;
  }
};
__device__ __forceinline__ void bars_are_set() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

// The copy engine: boxes of a mapped matrix, in either direction, and lines of numbers.
__device__ __forceinline__ void copy_box(u32 to, const TensorMap* map, int column, int line, u32 bar) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];"
      ::"r"(to), "l"(map), "r"(column), "r"(line), "r"(bar) : "memory");
}
__device__ __forceinline__ void store_box(const TensorMap* map, int column, int line, u32 from) {
  asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%1, %2}], [%3];"
               ::"l"(map), "r"(column), "r"(line), "r"(from) : "memory");
}
__device__ __forceinline__ void copy_line(u32 to, const void* from, int bytes, u32 bar) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
               ::"r"(to), "l"(from), "r"(bytes), "r"(bar) : "memory");
}
// Waits until what was to be stored has been read.
__device__ __forceinline__ void stores_are_read() {
  asm volatile("cp.async.bulk.commit_group;\ncp.async.bulk.wait_group.read 0;" ::: "memory");
}
// The copy engine and the tensor cores go past the cache of ordinary stores.
__device__ __forceinline__ void fence_stores() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
__device__ __forceinline__ void group_sync(int group) { asm volatile("bar.sync %0, 128;" ::"r"(group + 1) : "memory"); }

// Groups in turn: each waits until the one before it has passed the turn on.
__device__ __forceinline__ void turn_sync(int group) { asm volatile("bar.sync %0, 256;" ::"r"(group + 8) : "memory"); }
template <int N> __device__ __forceinline__ void turn_pass(int group) {
  asm volatile("bar.arrive %0, 256;" ::"r"(group == N - 1 ? 8 : group + 9) : "memory");
}

// Matrix instructions run by themselves from the fence before them to the wait after them.
__device__ __forceinline__ void mma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void mma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Until no more than the last LEFT that were committed run.
template <int LEFT = 0> __device__ __forceinline__ void mma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(LEFT) : "memory");
}

// Numbers that they leave behind: the compiler may not use them before this.
template <int N> __device__ __forceinline__ void held(float (&x)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) asm volatile("" : "+f"(x[i])::"memory");
}

// A matrix in shared memory as they want it told: the low word has its place and the distance of
// neighbours along the leading dimension, the high word that along the other and the swizzle.
__device__ __forceinline__ u32 place(u32 at, u32 leading) { return at >> 4 | leading >> 4 << 16; }
template <u32 HIGH> __device__ __forceinline__ u64 matrix(u32 low) {
  u64 x;
  asm("mov.b64 %0, {%1, %2};" : "=l"(x) : "r"(low), "n"(HIGH));
  return x;
}
constexpr u32 SWIZZLE_128 = 1, SWIZZLE_REST = REST_PAD == 64 ? 1 : REST_PAD == 32 ? 2 : 3;
constexpr u32 WIDE = 1024 >> 4 | SWIZZLE_128 << 30, NARROW = 16 * REST_PAD >> 4 | SWIZZLE_REST << 30;

// Where chunk `c`, of 8 columns, of row `r` lies from the start of a swizzled matrix of `width` columns.
__device__ __forceinline__ int swizzled(int r, int c, int width) {
  const int turn = width == 64 ? r & 7 : width == 32 ? r >> 1 & 3 : r >> 2 & 1;
  return r * width * 2 + ((c ^ turn) << 4);
}

__device__ __forceinline__ float exp2_of(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ float log2_of(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Puts 64 rows of `x` where the tensor cores read them, zeros where there are none: `line` tells which each is,
// -1 for none. With HALF_ROWS they go to the upper eight of each sixteen.
template <bool HALF_ROWS, class Line>
__device__ __forceinline__ void put_rows(u32 main, u32 rest, const u16* __restrict__ x, Line line) {
  constexpr int CHUNKS = (MAIN + REST_PAD) / 8;
  for (int n = threadIdx.x % 128; n < 64 * CHUNKS; n += 128) {
    const int r = n / CHUNKS, c = n % CHUNKS, row = HALF_ROWS ? r / 16 * 8 + r % 8 : r;
    uint4 value = {0, 0, 0, 0};
    const long long own = line(row);
    if (own >= 0 && (!HALF_ROWS || r % 16 < 8) && c * 8 < D) value = *(const uint4*)(x + own * D + c * 8);
    const u32 at = c < 8 ? main + swizzled(r, c, 64) : rest + swizzled(r, c - 8, REST_PAD);
    asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};"
                 ::"r"(at), "r"(value.x), "r"(value.y), "r"(value.z), "r"(value.w) : "memory");
  }
}

// Slices of the head dim that products take.
constexpr int SLICES = (D + 15) / 16;

// The first of a thread's two rows, the other being eight further, of a group's 64 from `row0` on.
template <bool HALF_ROWS> __device__ __forceinline__ int row_of_thread(int row0) {
  return row0 + threadIdx.x % 128 / 32 * (HALF_ROWS ? 8 : 16) + threadIdx.x % 32 / 4;
}
// Takes them into registers, as products want their left side there; lines as above.
template <bool HALF_ROWS, class Line> __device__ __forceinline__ void take_rows(
    u32 (&to)[SLICES][4], const u16* __restrict__ x, int row, Line line) {
  const long long lines[2] = {line(row), line(row + 8)};
#pragma unroll
  for (int k = 0; k < SLICES; ++k)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int column = 16 * k + i / 2 * 8 + 2 * (threadIdx.x % 4);
      const bool there = lines[i % 2] >= 0 && column < D && !(HALF_ROWS && i % 2);
      to[k][i] = there ? *(const u32*)(x + lines[i % 2] * D + column) : 0;
    }
}
