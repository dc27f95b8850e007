// Block-sparse attention for Hopper GPUs, forward. `sparse_cuda_kernels` compiles this for one shape
// and launches it; names as in `sparse_forward_kernels`. A program owns up to 192 rows of one query
// block, 64 per warp group, and walks its list, SPAN keys a step. Keys and values come through the bulk
// copy engine into a ring of STAGES; all groups read a stage, each at its own pace.
//
// Defined in front of this text: D head dim, PQ and PK slots of a block, SPAN keys of a step (divides
// PK), BRIEF keys of a step whose span holds no more tokens, GROUPS warp groups, STAGES (a power of
// two), AHEAD and STEADY (below), HALF for float16, GATED as in the Triton kernels, PARTIAL for lists cut
// into parts, out_t, alm_t and gate_t, and the matrix instructions: Scores<W>::first and ::more, products
// of 64 queries with W keys, and `weighted`, of 64 rows of weights with 16 values.
//
// AHEAD: products with the next keys run while this step's weights are computed.
// STEADY: after the first two steps a row keeps its shift instead of the running maximum. A softmax is
// the same under any shift; numbers of fp32's and bfloat16's range bear scores 2^100 times those of the
// first steps. Where that is not enough the groups go over the list again with the running maximum.

static_assert(!AHEAD || STAGES >= 4, "the next keys must have been called for a step before");
// Where things lie in shared memory, in bytes.
constexpr int Q_BYTES = 64 * 128, Q_REST_BYTES = 64 * REST_PAD * 2;
constexpr int K_BYTES = SPAN * 128, K_REST_BYTES = SPAN * REST_PAD * 2;
constexpr int V_BYTES = SPAN * 128, V_REST_BYTES = REST ? SPAN * 128 : 0;
constexpr int Q_AT = 0, Q_REST_AT = Q_AT + GROUPS * Q_BYTES;
constexpr int K_AT = Q_REST_AT + GROUPS * Q_REST_BYTES, K_REST_AT = K_AT + STAGES * K_BYTES;
constexpr int V_AT = up(K_REST_AT + STAGES * K_REST_BYTES, 1024);
constexpr int K_FULL = V_AT + STAGES * (V_BYTES + V_REST_BYTES), K_FREE = K_FULL + 8 * STAGES;
constexpr int V_FULL = K_FREE + 8 * STAGES, V_FREE = V_FULL + 8 * STAGES;
constexpr int LIST = V_FREE + 8 * STAGES;  // of each listed block its number and its tokens
// Without the list; the rest of the 1024 is for the alignment.
extern "C" __constant__ int shared_bytes = LIST + 1024;

constexpr float FLOOR = -1e30f, TOO_MUCH = 0x1p100f;
#define NOTHING __int_as_float(0xff800000)
// Every thread holds columns 8 i + 2 (lane % 4) and the next of two rows of a 64-row result.
constexpr int ROWS_OF_THREAD = 2;

__device__ __forceinline__ float over_quad(float x) {  // the maximum over a row's four threads
  x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
  return fmaxf(x, __shfl_xor_sync(~0u, x, 2));
}

// Where a program's results lie: from `first` on, `step` numbers from row to row.
struct Place { long long first; int step; };

struct Maps { const TensorMap *keys, *rest, *values; };

// What one warp group does: 64 rows of queries against all spans of the list. With HALF_ROWS only the
// upper eight rows of each warp's sixteen exist.
template <bool HALF_ROWS> struct Group {
  const u32 shared, q_main, q_rest;
  const int steps, k_line, v_line;
  const bool feeds;
  const float scale;
  const Maps maps;
  int start;  // steps done before this pass over the list
  float top0, top1, sum0, sum1, o[D / 2];

  __device__ __forceinline__ Group(
      u32 shared, int group, int steps, int k_line, int v_line, float scale, Maps maps)
      : shared(shared), q_main(place(shared + Q_AT + group * Q_BYTES, 16)),
        q_rest(place(shared + Q_REST_AT + group * Q_REST_BYTES, 16)), steps(steps), k_line(k_line), v_line(v_line),
        feeds(group == GROUPS - 1 && threadIdx.x % 128 == 0), scale(scale), maps(maps), start(0) {}

  // Puts the group's rows of queries where the tensor cores read them.
  __device__ __forceinline__ void take(const u16* __restrict__ q, long long line, int row0, int group) {
    put_rows<HALF_ROWS>(
        shared + Q_AT + group * Q_BYTES, shared + Q_REST_AT + group * Q_REST_BYTES, q, line + row0, PQ - row0);
    fence_stores();
    group_sync(group);
  }

  // Starts the copies of span `m` once all groups have done with what lies there.
  __device__ __forceinline__ void feed(int m) {
    const int at = m & (STAGES - 1), span = m - start;
    const u32 used = ~(m / STAGES) & 1;
    const int key = block_of(shared + LIST, span) * PK + span % SPANS * SPAN;
    const u32 k_full = shared + K_FULL + 8 * at, v_full = shared + V_FULL + 8 * at;
    bar_wait(shared + K_FREE + 8 * at, used);
    bar_expect(k_full, K_BYTES + K_REST_BYTES);
    copy_box(shared + K_AT + at * K_BYTES, maps.keys, 0, k_line + key, k_full);
    if (REST) copy_box(shared + K_REST_AT + at * K_REST_BYTES, maps.rest, MAIN, k_line + key, k_full);
    bar_wait(shared + V_FREE + 8 * at, used);
    bar_expect(v_full, V_BYTES + V_REST_BYTES);
    const u32 to = shared + V_AT + at * (V_BYTES + V_REST_BYTES);
    copy_box(to, maps.values, 0, v_line + key, v_full);
    // 64 columns wide, zeros beyond the head dim, so that one instruction takes in all of D.
    if (REST) copy_box(to + V_BYTES, maps.values, MAIN, v_line + key, v_full);
  }

  // Tokens from the first slot of step `n` on.
  __device__ __forceinline__ int tokens_at(int n) { return tokens_of(shared + LIST, n - start); }

  // Starts the products of the queries with the first W keys of step `n`.
  template <int W> __device__ __forceinline__ void multiply(float (&s)[SPAN / 2], int n) {
    const int at = n & (STAGES - 1);
    bar_wait(shared + K_FULL + 8 * at, n / STAGES & 1);
    const u32 k_main = place(shared + K_AT, 16) + at * (K_BYTES >> 4);
    const u32 k_rest = place(shared + K_REST_AT, 16) + at * (K_REST_BYTES >> 4);
    mma_fence();
    Scores<W>::first(s, matrix<WIDE>(q_main), matrix<WIDE>(k_main));
#pragma unroll
    for (int k = 1; k < MAIN / 16; ++k) Scores<W>::more(s, matrix<WIDE>(q_main + 2 * k), matrix<WIDE>(k_main + 2 * k));
#pragma unroll
    for (int k = 0; k < REST_PAD / 16; ++k)
      Scores<W>::more(s, matrix<NARROW>(q_rest + 2 * k), matrix<NARROW>(k_rest + 2 * k));
    mma_commit();
  }

  template <int FROM, int TO> __device__ __forceinline__ void mask(float (&s)[SPAN / 2], int left) {
#pragma unroll
    for (int j = FROM / 8; j < TO / 8; ++j)
#pragma unroll
      for (int i = 0; i < (HALF_ROWS ? 2 : 4); ++i)
        if (8 * j + i % 2 >= left) s[4 * j + i] = NOTHING;
  }

  // Frees the keys of step `n`, whose products are there, and takes slots without a token out.
  template <int W> __device__ __forceinline__ void settle(float (&s)[SPAN / 2], int n) {
    const int tokens = tokens_at(n), left = tokens - 2 * (threadIdx.x % 4);
    if (threadIdx.x % 32 == 0) bar_arrive(shared + K_FREE + 8 * (n & (STAGES - 1)));
    // All threads agree; voting tells the compiler so.
    if (__any_sync(~0u, tokens < W)) {
      constexpr int LIKELY = W > 32 ? W - 32 : 0;
      if (__any_sync(~0u, tokens < LIKELY)) mask<0, LIKELY>(s, left);
      mask<LIKELY, W>(s, left);
    }
  }

  // Raises the shifts to the maximum of these scores, and fades what was summed under lower ones.
  template <int W> __device__ __forceinline__ void raise(const float (&s)[SPAN / 2]) {
    float peak0 = s[0], peak1 = s[2], more0 = s[1], more1 = s[3];
#pragma unroll
    for (int i = 1; i < W / 8; ++i) {
      peak0 = fmaxf(peak0, s[4 * i]), more0 = fmaxf(more0, s[4 * i + 1]);
      if (!HALF_ROWS) peak1 = fmaxf(peak1, s[4 * i + 2]), more1 = fmaxf(more1, s[4 * i + 3]);
    }
    peak0 = over_quad(fmaxf(peak0, more0)) * scale;
    if (!HALF_ROWS) peak1 = over_quad(fmaxf(peak1, more1)) * scale;
    if (!__any_sync(~0u, peak0 > top0 || (!HALF_ROWS && peak1 > top1))) return;
    const float new0 = fmaxf(top0, peak0), fade0 = exp2_of(top0 - new0);
    top0 = new0, sum0 *= fade0;
#pragma unroll
    for (int i = 0; i < D / 8; ++i) o[4 * i] *= fade0, o[4 * i + 1] *= fade0;
    if (HALF_ROWS) return;
    const float new1 = fmaxf(top1, peak1), fade1 = exp2_of(top1 - new1);
    top1 = new1, sum1 *= fade1;
#pragma unroll
    for (int i = 0; i < D / 8; ++i) o[4 * i + 2] *= fade1, o[4 * i + 3] *= fade1;
  }

  // Weights of step `n` from its scores, and their products with its values; waits for all products.
  template <int W, bool EXACT> __device__ __forceinline__ void weigh(const float (&s)[SPAN / 2], int n) {
    const int at = n & (STAGES - 1);
    if (EXACT) raise<W>(s);
    bar_wait(shared + V_FULL + 8 * at, n / STAGES & 1);
    const u32 values = place(shared + V_AT, V_BYTES) + at * ((V_BYTES + V_REST_BYTES) >> 4);
    float more0 = 0, more1 = 0;
#pragma unroll
    for (int c = 0; c < W / 16; ++c) {
      float x[8];
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const float score = s[8 * c + i];
        // Scores of rows that do not exist are 0, and so are their weights.
        if (i & 2) x[i] = HALF_ROWS ? score : exp2_of(fmaf(score, scale, -top1));
        else x[i] = exp2_of(fmaf(score, scale, -top0));
      }
      sum0 += x[0] + x[1], more0 += x[4] + x[5];
      if (!HALF_ROWS) sum1 += x[2] + x[3], more1 += x[6] + x[7];
      u32 p[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) p[i] = packed(x[2 * i], x[2 * i + 1]);
      // These 16 weights meet their values while the next are computed.
      mma_fence();
      weighted(o, p, matrix<WIDE>(values + 128 * c));
      mma_commit();
    }
    // The others have done with step n - 1 or soon will: this refills its stage.
    if (feeds && n - start + STAGES - 1 < steps) feed(n + STAGES - 1);
    sum0 += more0, sum1 += more1;
    mma_wait();
    if (threadIdx.x % 32 == 0) bar_arrive(shared + V_FREE + 8 * at);
  }

#if AHEAD
  // Steps n, whose scores are in `a`, and n + 1; leaves those of n + 2 in `a`.
  template <int W, bool EXACT> __device__ __forceinline__ void pair(float (&a)[SPAN / 2], float (&b)[SPAN / 2], int n) {
    multiply<W>(b, n + 1);
    weigh<SPAN, EXACT>(a, n);
    settle<W>(b, n + 1);
    multiply<SPAN>(a, n + 2);
    weigh<W, EXACT>(b, n + 1);
    settle<SPAN>(a, n + 2);
  }
  template <bool EXACT> __device__ __forceinline__ void pair_of(float (&a)[SPAN / 2], float (&b)[SPAN / 2], int n) {
    if (BRIEF < SPAN && __any_sync(~0u, tokens_at(n + 1) <= BRIEF)) pair<BRIEF, EXACT>(a, b, n);
    else pair<SPAN, EXACT>(a, b, n);
  }
#endif

  // One pass over the list.
  __device__ __forceinline__ void walk(bool exact) {
    top0 = top1 = FLOOR, sum0 = sum1 = 0;
#pragma unroll
    for (int i = 0; i < D / 2; ++i) o[i] = 0;
    if (steps == 0) return;
    if (feeds)
      for (int m = 0; m < STAGES - 1 && m < steps; ++m) feed(start + m);
    const int end = start + steps;
    float a[SPAN / 2];
#if AHEAD
    float b[SPAN / 2];
    multiply<SPAN>(a, start);
    mma_wait();
    settle<SPAN>(a, start);
    int n = start;
    for (; n + 2 < end; n += 2) {
      if (!STEADY || exact || n == start) pair_of<true>(a, b, n);
      else pair_of<false>(a, b, n);
    }
    if (SPANS % 2 && steps % 2) {
      weigh<SPAN, true>(a, n);
    } else {
      multiply<SPAN>(b, n + 1);
      weigh<SPAN, true>(a, n);
      settle<SPAN>(b, n + 1);
      weigh<SPAN, true>(b, n + 1);
    }
#else
    for (int n = start; n < end; ++n) {
      multiply<SPAN>(a, n);
      mma_wait();
      settle<SPAN>(a, n);
      if (!STEADY || exact || n < start + 2) weigh<SPAN, true>(a, n);
      else weigh<SPAN, false>(a, n);
    }
#endif
  }

  __device__ __forceinline__ void attend() {
    int exact = !STEADY;
#pragma unroll 1
    for (;;) {
      // Keeps the compiler from writing the loop out twice, once for each value, and tells it that
      // the warp agrees.
      asm volatile("" : "+r"(exact));
      exact = __shfl_sync(~0u, exact, 0);
      walk(exact);
      const bool outgrown = !(sum0 < TOO_MUCH) || (!HALF_ROWS && !(sum1 < TOO_MUCH));
      if (!STEADY || exact) return;
      if (!__shfl_sync(~0u, __syncthreads_or(outgrown), 0)) return;
      exact = 1, start = steps;
    }
  }

  // Writes what the thread has, joined with the local branch where there is one.
  __device__ __forceinline__ void finish(
      out_t* __restrict__ out, float* __restrict__ lse, const alm_t* __restrict__ alm,
      const gate_t* __restrict__ gate, long long line, long long shift, int row0, Place place) {
    const int lane = threadIdx.x % 32, low = row0 + threadIdx.x % 128 / 32 * (HALF_ROWS ? 8 : 16) + lane / 4;
#pragma unroll
    for (int half = 0; half < (HALF_ROWS ? 1 : ROWS_OF_THREAD); ++half) {
      const float top = half ? top1 : top0;
      const int row = low + 8 * half;
      float sum = half ? sum1 : sum0;
      sum += __shfl_xor_sync(~0u, sum, 1);
      sum += __shfl_xor_sync(~0u, sum, 2);
      if (row >= PQ) continue;
      const bool some = sum > 0;
      if (lane % 4 == 0) lse[line + shift + row] = some ? top + log2_of(sum) : PARTIAL ? NOTHING : 0.f;
      const float factor = some ? 1 / sum : 1;
#pragma unroll
      for (int i = 0; i < D / 8; ++i) {
        const int column = 8 * i + 2 * (lane % 4);
        const long long at = (line + row) * D + column;
        float x = o[4 * i + 2 * half] * factor, y = o[4 * i + 2 * half + 1] * factor;
#if GATED == 1
        const float g = wide(gate[line + row]);
        x = wide(alm[at]) + g * x, y = wide(alm[at + 1]) + g * y;
#elif GATED > 1
        x = wide(alm[at]) + wide(gate[at]) * x, y = wide(alm[at + 1]) + wide(gate[at + 1]) * y;
#endif
#if PARTIAL
        *(float2*)(out + shift * D + at) = make_float2(x, y);
#else
        *(u32*)(out + place.first + (long long)row * place.step + column) = packed(x, y);
#endif
      }
    }
  }
};

// Arguments as of the Triton kernel; keys and values as maps of the copy engine, keys once more in
// boxes of their REST_PAD last columns. `period` is 0 where all slots hold tokens.
extern "C" __global__ void __launch_bounds__(128 * GROUPS, GROUPS == 1 ? 3 : 1) forward(
    const u16* __restrict__ q, const __grid_constant__ TensorMap keys, const __grid_constant__ TensorMap rest,
    const __grid_constant__ TensorMap values, const int* __restrict__ lists, const int* __restrict__ valid,
    out_t* __restrict__ out, float* __restrict__ lse, const alm_t* __restrict__ alm, const gate_t* __restrict__ gate,
    int B, int H, int G, int NQ, int slots, int lists_world, int k_world, int k_head, int v_world, int v_head,
    int period, int split, int heads_last, float scale) {
  extern __shared__ char raw[];
  const u32 shared = up((u32)__cvta_generic_to_shared(raw), 1024);
  // Told by one thread, so that the compiler knows that the warp agrees.
  const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0);
  int program = blockIdx.x;
  int row0 = program % PROGRAMS * 64 * GROUPS + warp / 4 * 64;
  program /= PROGRAMS;
  const int i = program % NQ;
  program /= NQ;
  const int b = program % B;
  program /= B;
  const int h = program % H, part = program / H;

  lists += b * lists_world + ((G > 1 ? h : 0) * NQ + i) * slots;
  const int filled = filled_of(lists, slots);
  const int first = part * filled / split, last = (part + 1) * filled / split;
  put_list(shared + LIST, lists, valid, period, first, last);
  if (threadIdx.x == 0) {
    for (int s = 0; s < STAGES; ++s) {
      bar_init(shared + K_FULL + 8 * s, 1), bar_init(shared + K_FREE + 8 * s, 4 * GROUPS);
      bar_init(shared + V_FULL + 8 * s, 1), bar_init(shared + V_FREE + 8 * s, 4 * GROUPS);
    }
    bars_are_set();
  }
  __syncthreads();

  const int steps = __shfl_sync(~0u, (last - first) * SPANS, 0);
  const long long line = ((long long)(b * H + h) * NQ + i) * PQ, shift = (long long)part * B * H * NQ * PQ;
  const int k_line = (b * k_world + h * k_head) * PK, v_line = (b * v_world + h * v_head) * PK;
  // Heads first as the queries lie, or last as projections want them.
  const Place place = heads_last ? Place{(((long long)b * NQ + i) * PQ * H + h) * D, H * D} : Place{line * D, D};
  const Maps maps = {&keys, &rest, &values};
  if (HALF_LAST && warp / 4 == GROUPS - 1) {
    Group<true> group(shared, warp / 4, steps, k_line, v_line, scale, maps);
    group.take(q, line, row0, warp / 4);
    group.attend();
    group.finish(out, lse, alm, gate, line, shift, row0, place);
  } else {
    Group<false> group(shared, warp / 4, steps, k_line, v_line, scale, maps);
    group.take(q, line, row0, warp / 4);
    group.attend();
    group.finish(out, lse, alm, gate, line, shift, row0, place);
  }
}
