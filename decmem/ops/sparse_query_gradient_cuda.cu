// Block-sparse attention for Hopper GPUs, gradient of the queries. Programs, groups and the ring of stages
// as in `sparse_cuda`; weights are made again from the forward's log-sum-exp.
//
// Defined in front of this text, besides what `hopper_cuda` and `listed_cuda` want: PQ and PK slots of a
// block, SPAN keys of a step, UNIT keys of a copy, GROUPS warp groups, STAGES, and the matrix instructions:
// Scores<W>::first and ::more, products of 64 rows with W keys, and `weighted`, of 64 rows with 16 keys.
//
// Queries lie in registers and gradients of the output in shared memory: its bandwidth is nearly used up
// where tensor cores read both from there, and registers where they read neither.

// Where things lie in shared memory, in bytes.
constexpr int G_BYTES = 64 * 128, G_REST_BYTES = 64 * REST_PAD * 2;
constexpr int K_BYTES = SPAN * 128, K_STAGE = K_BYTES * (REST ? 2 : 1);
constexpr int V_BYTES = SPAN * 128, V_REST_BYTES = SPAN * REST_PAD * 2;
constexpr int G_AT = 0, G_REST_AT = G_AT + GROUPS * G_BYTES;
constexpr int K_AT = up(G_REST_AT + GROUPS * G_REST_BYTES, 1024), V_AT = K_AT + STAGES * K_STAGE;
constexpr int V_REST_AT = V_AT + STAGES * V_BYTES;
constexpr int TOKENS_AT = up(V_REST_AT + STAGES * V_REST_BYTES, 1024);  // of each unit of a stage, a byte
constexpr int FULL = TOKENS_AT + 16 * STAGES, FREE = FULL + 8 * STAGES, LIST = FREE + 8 * STAGES;
// Without the list; the rest of the 1024 is for the alignment.
extern "C" __constant__ int shared_bytes = LIST + 1024;

// What one warp group does: 64 rows of one query block against all spans of the list. With HALF_ROWS
// only the upper eight rows of each warp's sixteen exist.
template <bool HALF_ROWS> struct Group {
  const u32 shared, g_main, g_rest;
  const float scale;
  u32 queries[SLICES][4];
  float lse0, lse1, delta0, delta1, dq[D / 2];

  __device__ __forceinline__ Group(u32 shared, int group, float scale)
      : shared(shared), g_main(place(shared + G_AT + group * G_BYTES, 16)),
        g_rest(place(shared + G_REST_AT + group * G_REST_BYTES, 16)), scale(scale) {}

  __device__ __forceinline__ void take(
      const u16* __restrict__ q, const u16* __restrict__ grad, const float* __restrict__ lse,
      const float* __restrict__ delta, long long line, int row0, int group) {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(REGISTERS));
    const int row = row_of_thread<HALF_ROWS>(row0);
    const auto line_of = [=](int row) { return row < PQ ? line + row : -1; };
    take_rows<HALF_ROWS>(queries, q, row, line_of);
    put_rows<HALF_ROWS>(
        shared + G_AT + group * G_BYTES, shared + G_REST_AT + group * G_REST_BYTES, grad,
        [=](int row) { return line_of(row0 + row); });
    lse0 = lse1 = delta0 = delta1 = 0;
    if (row < PQ) lse0 = lse[line + row], delta0 = delta[line + row];
    if (!HALF_ROWS && row + 8 < PQ) lse1 = lse[line + row + 8], delta1 = delta[line + row + 8];
    fence_stores();
    group_sync(group);
  }

  // Starts the products of a step: of queries with keys, and of gradients with values.
  __device__ __forceinline__ void multiply(float (&p)[SPAN / 2], float (&dp)[SPAN / 2], Stage now) {
    const u32 k_main = place(shared + K_AT, 16) + now.at * (K_STAGE >> 4), k_rest = k_main + (K_BYTES >> 4);
    const u32 v_main = place(shared + V_AT, 16) + now.at * (V_BYTES >> 4);
    const u32 v_rest = place(shared + V_REST_AT, 16) + now.at * (V_REST_BYTES >> 4);
    bar_wait(shared + FULL + 8 * now.at, now.phase);
    mma_fence();
#pragma unroll
    for (int k = 0; k < SLICES; ++k) {
      const u64 keys = matrix<WIDE>(k < MAIN / 16 ? k_main + 2 * k : k_rest + 2 * (k - MAIN / 16));
      if (k == 0) Scores<SPAN>::first(p, queries[k], keys);
      else Scores<SPAN>::more(p, queries[k], keys);
    }
    mma_commit();
#pragma unroll
    for (int k = 0; k < SLICES; ++k) {
      const bool main = k < MAIN / 16;
      const u64 grads = main ? matrix<WIDE>(g_main + 2 * k) : matrix<NARROW>(g_rest + 2 * (k - MAIN / 16));
      const u64 values = main ? matrix<WIDE>(v_main + 2 * k) : matrix<NARROW>(v_rest + 2 * (k - MAIN / 16));
      if (k == 0) Scores<SPAN>::first(dp, grads, values);
      else Scores<SPAN>::more(dp, grads, values);
    }
    mma_commit();
  }

  // Weights of a step from its scores.
  __device__ __forceinline__ void weigh(float (&p)[SPAN / 2], Stage now) {
#pragma unroll
    for (int i = 0; i < SPAN / 2; ++i) {
      if (HALF_ROWS && i & 2) p[i] = 0;
      else p[i] = exp2_of(fmaf(p[i], scale, i & 2 ? -lse1 : -lse0));
    }
    Tokens(shared + TOKENS_AT + 16 * now.at).mask(p, 0);
  }

  // Gradients of 16 scores, from the `c`th on.
  __device__ __forceinline__ void slope(const float (&p)[SPAN / 2], const float (&dp)[SPAN / 2], u32 (&ds)[4], int c) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int x = 8 * c + 2 * i;
      const float delta = i & 1 ? delta1 : delta0;
      ds[i] = HALF_ROWS && i & 1 ? 0 : packed(p[x] * (dp[x] - delta), p[x + 1] * (dp[x + 1] - delta));
    }
  }
  __device__ __forceinline__ u32 keys_of(Stage now) { return place(shared + K_AT, K_BYTES) + now.at * (K_STAGE >> 4); }

  __device__ __forceinline__ void walk(int entries) {
    __syncthreads();
    const int steps = (units_of(shared + LIST, entries) + UNITS - 1) / UNITS;
#pragma unroll
    for (int i = 0; i < D / 2; ++i) dq[i] = 0;
    Stage now = {0, 0};
#pragma unroll 1
    for (int n = 0; n < steps; ++n, now.next()) {
      float p[SPAN / 2], dp[SPAN / 2];
      multiply(p, dp, now);
      mma_wait<1>();
      held(p);
      weigh(p, now);
      mma_wait();
      held(dp);
#pragma unroll
      for (int c = 0; c < SPAN / 16; ++c) {
        u32 ds[4];
        slope(p, dp, ds, c);
        // These meet their keys while the next are computed.
        mma_fence();
        weighted(dq, ds, matrix<WIDE>(keys_of(now) + 128 * c));
        mma_commit();
      }
      mma_wait();
      if (threadIdx.x % 32 == 0) bar_arrive(shared + FREE + 8 * now.at);
    }
    held(dq);
  }

  // `factor` of the scores; dq lacks it.
  __device__ __forceinline__ void finish(u16* __restrict__ out, float factor, long long line, int row0) {
#pragma unroll
    for (int half = 0; half < (HALF_ROWS ? 1 : 2); ++half) {
      const int row = row_of_thread<HALF_ROWS>(row0) + 8 * half;
      if (row >= PQ) continue;
#pragma unroll
      for (int i = 0; i < D / 8; ++i)
        *(u32*)(out + (line + row) * D + 8 * i + 2 * (threadIdx.x % 4)) =
            packed(dq[4 * i + 2 * half] * factor, dq[4 * i + 2 * half + 1] * factor);
    }
  }
};

// Arguments as of the Triton kernel; keys and values as maps of the copy engine, values once more in boxes
// of their REST_PAD last columns. `period` is 0 where all slots hold tokens.
extern "C" __global__ void __launch_bounds__(THREADS, 1) query_gradient(
    const u16* __restrict__ q, const __grid_constant__ Maps keys, const __grid_constant__ Maps values,
    const __grid_constant__ Maps rest, const int* __restrict__ lists, const int* __restrict__ valid,
    const u16* __restrict__ grad, const float* __restrict__ lse, const float* __restrict__ delta, u16* __restrict__ dq,
    int B, int H, int G, int NQ, int slots, int lists_world, int k_world, int k_head, int v_world, int v_head,
    int period, float factor, float scale) {
  extern __shared__ char raw[];
  let_next_begin();
  const u32 shared = up((u32)__cvta_generic_to_shared(raw), 1024);
  // Told by one thread, so that the compiler knows that the warp agrees.
  const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0), group = warp / 4;
  int program = blockIdx.x;
  const int row0 = program % PROGRAMS * 64 * GROUPS + group * 64;
  program /= PROGRAMS;
  const int i = program % NQ;
  program /= NQ;
  const int b = program % B, h = program / B;

  lists += b * lists_world + ((G > 1 ? h : 0) * NQ + i) * slots;
  const long long line = ((long long)(b * H + h) * NQ + i) * PQ;
  if (group == GROUPS) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(SPARED));
    if (warp % 4 == 0) put_list(shared + LIST, lists, valid, period, 0, slots);
    if (threadIdx.x % 128 == 32) {
      for (int s = 0; s < STAGES; ++s) bar_init(shared + FULL + 8 * s, 2), bar_init(shared + FREE + 8 * s, 4 * GROUPS);
      bars_are_set();
    }
    __syncthreads();
    const int steps = (units_of(shared + LIST, slots) + UNITS - 1) / UNITS;
    const int k_line = (b * k_world + h * k_head) * PK, v_line = (b * v_world + h * v_head) * PK;
    Stage stage = {0, 0};
    if (warp % 4 == 0)
      feed<K_STAGE>(
          shared + LIST, slots, stage, steps, shared + FULL, shared + FREE,
          [&](int at, u32 full, int unit, int units, int slot, int tokens) {
            put_tokens(shared + TOKENS_AT + 16 * at, unit, units, tokens);
            copy_wide(shared + K_AT + at * K_STAGE, keys, k_line + slot, unit, units, full);
          });
    if (warp % 4 == 1)
      feed<V_BYTES + V_REST_BYTES>(
          shared + LIST, slots, stage, steps, shared + FULL, shared + FREE,
          [&](int at, u32 full, int unit, int units, int slot, int) {
            copy_narrow(
                shared + V_AT + at * V_BYTES, shared + V_REST_AT + at * V_REST_BYTES, values, rest, v_line + slot, unit,
                units, full);
          });
  } else if (HALF_LAST && group == GROUPS - 1) {
    Group<true> rows(shared, group, scale);
    rows.take(q, grad, lse, delta, line, row0, group);
    rows.walk(slots);
    rows.finish(dq, factor, line, row0);
  } else {
    Group<false> rows(shared, group, scale);
    rows.take(q, grad, lse, delta, line, row0, group);
    rows.walk(slots);
    rows.finish(dq, factor, line, row0);
  }
}
