// Block-sparse attention for Hopper GPUs, forward. `sparse_cuda_kernels` compiles this for one shape
// and launches it; names as in `sparse_forward_kernels`. A program owns up to 192 rows of one query
// block, 64 per warp group, and walks its list, SPAN keys a step. Keys and values come through the bulk
// copy engine into a ring of STAGES; all groups read a stage, each at its own pace.
//
// Defined in front of this text: D head dim, PQ and PK slots of a block, SPAN keys of a step, UNIT keys of
// a copy, GROUPS warp groups, STAGES, HELD and STEADY (below), HALF for float16, GATED as in the Triton
// kernels, PARTIAL for lists cut into parts, out_t, alm_t and gate_t, and the matrix instructions:
// Scores<W>::first and ::more, products of 64 queries with W keys, and `weighted`, of 64 rows of weights
// with 16 values.
//
// While a group computes weights, the tensor cores multiply its last ones with their values, and then
// what the other groups have started. HELD: queries lie in registers, not in shared memory.
// ROWED: queries and results lie where tables tell.
// STEADY: after the first steps a row keeps its shift instead of the running maximum. A softmax is
// the same under any shift; numbers of fp32's and bfloat16's range bear scores 2^100 times those of the
// first steps. Where that is not enough the groups go over the list again with the running maximum.
// EXPONENTS: products of queries and keys are exponents of two as they are; then the shift is 0 and costs
// nothing, and weights may be too small as well as too large.

// Where things lie in shared memory, in bytes.
constexpr int Q_BYTES = HELD ? 0 : 64 * 128, Q_REST_BYTES = HELD ? 0 : 64 * REST_PAD * 2;
constexpr int K_BYTES = SPAN * 128, K_REST_BYTES = SPAN * REST_PAD * 2;
constexpr int V_BYTES = SPAN * 128, V_REST_BYTES = REST ? SPAN * 128 : 0;
constexpr int Q_AT = 0, Q_REST_AT = Q_AT + GROUPS * Q_BYTES;
constexpr int K_AT = up(Q_REST_AT + GROUPS * Q_REST_BYTES, 1024), K_REST_AT = K_AT + STAGES * K_BYTES;
constexpr int V_AT = up(K_REST_AT + STAGES * K_REST_BYTES, 1024);
constexpr int TOKENS_AT = V_AT + STAGES * (V_BYTES + V_REST_BYTES);  // of each unit of a stage, a byte
constexpr int K_FULL = TOKENS_AT + 16 * STAGES, K_FREE = K_FULL + 8 * STAGES;
constexpr int V_FULL = K_FREE + 8 * STAGES, V_FREE = V_FULL + 8 * STAGES, LIST = V_FREE + 8 * STAGES;
// Without the list; the rest of the 1024 is for the alignment.
extern "C" __constant__ int shared_bytes = LIST + 1024;

constexpr float FLOOR = -1e30f, TOO_MUCH = 0x1p100f, TOO_LITTLE = EXPONENTS ? 0x1p-100f : 0;
static_assert(STEADY || !EXPONENTS, "exponents are never shifted but where that turns out to be needed");
#define NOTHING __int_as_float(0xff800000)
// Every thread holds columns 8 i + 2 (lane % 4) and the next of two rows of a 64-row result.
constexpr int ROWS_OF_THREAD = 2;

__device__ __forceinline__ float over_quad(float x) {  // the maximum over a row's four threads
  x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
  return fmaxf(x, __shfl_xor_sync(~0u, x, 2));
}

// Where the rows of a program's tile lie, -1 for those that are nowhere: lines of queries, and of results in
// numbers from the start. Side by side from `line` on, or with ROWED as a table tells for each row, lines of a
// head of queries and of one of results, which lie `step` apart.
struct Rows {
  long long line, results;
  int step;
  const int2* table;

  __device__ __forceinline__ long long query(int row) const {
    if (row >= PQ) return -1;
    if (!ROWED) return line + row;
    const int own = table[row].x;
    return own < 0 ? -1 : line + own;
  }
  __device__ __forceinline__ long long result(int row) const {
    if (!ROWED) return (line + row) * D;
    const int own = table[row].y;
    return own < 0 ? -1 : results + (long long)own * step;
  }
};

// What one warp group does: 64 rows of queries against all spans of the list. With HALF_ROWS only the
// upper eight rows of each warp's sixteen exist.
template <bool HALF_ROWS> struct Group {
  const u32 shared, q_main, q_rest;
  const int group;
  const float scale;
  int steps;  // of one pass over the list
  Stage now;
#if HELD
  u32 queries[SLICES][4];
#endif
  float top0, top1, sum0, sum1, o[D / 2];

  __device__ __forceinline__ Group(u32 shared, int group, float scale)
      : shared(shared), q_main(place(shared + Q_AT + group * Q_BYTES, 16)),
        q_rest(place(shared + Q_REST_AT + group * Q_REST_BYTES, 16)), group(group), scale(scale), steps(0), now{0, 0} {}

  // Takes the group's rows of queries where the tensor cores read them.
  __device__ __forceinline__ void take(const u16* __restrict__ q, Rows rows, int row0) {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(REGISTERS));
#if HELD
    take_rows<HALF_ROWS>(queries, q, row_of_thread<HALF_ROWS>(row0), [=](int row) { return rows.query(row); });
#else
    put_rows<HALF_ROWS>(
        shared + Q_AT + group * Q_BYTES, shared + Q_REST_AT + group * Q_REST_BYTES, q,
        [=](int row) { return rows.query(row0 + row); });
    fence_stores();
    group_sync(group);
#endif
  }

  // Starts the products of the queries with the keys of a step.
  __device__ __forceinline__ void multiply(float (&s)[SPAN / 2], Stage of) {
    bar_wait(shared + K_FULL + 8 * of.at, of.phase);
    const u32 k_main = place(shared + K_AT, 16) + of.at * (K_BYTES >> 4);
    const u32 k_rest = place(shared + K_REST_AT, 16) + of.at * (K_REST_BYTES >> 4);
    mma_fence();
#pragma unroll
    for (int k = 0; k < SLICES; ++k) {
      const bool main = k < MAIN / 16;
      const u64 keys = main ? matrix<WIDE>(k_main + 2 * k) : matrix<NARROW>(k_rest + 2 * (k - MAIN / 16));
#if HELD
      if (k == 0) Scores<SPAN>::first(s, queries[k], keys);
      else Scores<SPAN>::more(s, queries[k], keys);
#else
      const u64 own = main ? matrix<WIDE>(q_main + 2 * k) : matrix<NARROW>(q_rest + 2 * (k - MAIN / 16));
      if (k == 0) Scores<SPAN>::first(s, own, keys);
      else Scores<SPAN>::more(s, own, keys);
#endif
    }
    mma_commit();
  }

  // Takes slots without a token out of the scores of a step, which are there, and frees its keys.
  __device__ __forceinline__ void settle(float (&s)[SPAN / 2], Stage of) {
    const Tokens tokens(shared + TOKENS_AT + 16 * of.at);
    if (threadIdx.x % 32 == 0) bar_arrive(shared + K_FREE + 8 * of.at);
    tokens.mask(s, NOTHING);
  }

  // Raises the shifts to the maximum of these scores; what was summed fades by the factors.
  __device__ __forceinline__ float2 raise(const float (&s)[SPAN / 2]) {
    float peak0 = s[0], peak1 = s[2], more0 = s[1], more1 = s[3];
#pragma unroll
    for (int i = 1; i < SPAN / 8; ++i) {
      peak0 = fmaxf(peak0, s[4 * i]), more0 = fmaxf(more0, s[4 * i + 1]);
      if (!HALF_ROWS) peak1 = fmaxf(peak1, s[4 * i + 2]), more1 = fmaxf(more1, s[4 * i + 3]);
    }
    const float new0 = fmaxf(top0, over_quad(fmaxf(peak0, more0)) * scale), fade0 = exp2_of(top0 - new0);
    top0 = new0, sum0 *= fade0;
    if (HALF_ROWS) return make_float2(fade0, 1);
    const float new1 = fmaxf(top1, over_quad(fmaxf(peak1, more1)) * scale), fade1 = exp2_of(top1 - new1);
    top1 = new1, sum1 *= fade1;
    return make_float2(fade0, fade1);
  }
  __device__ __forceinline__ void fade(float2 by) {
    if (!__any_sync(~0u, by.x < 1 || by.y < 1)) return;
#pragma unroll
    for (int i = 0; i < D / 2; ++i) o[i] *= i & 2 ? by.y : by.x;
  }

  // Makes scores weights.
  template <bool AS_THEY_ARE> __device__ __forceinline__ void weigh(float (&s)[SPAN / 2]) {
    float more0 = 0, more1 = 0;
#pragma unroll
    for (int c = 0; c < SPAN / 8; ++c) {
      float* x = s + 4 * c;
      // Rows that do not exist have no weights.
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (HALF_ROWS && i & 2) x[i] = 0;
        else x[i] = exp2_of(AS_THEY_ARE ? x[i] : fmaf(x[i], scale, i & 2 ? -top1 : -top0));
      }
      if (c % 2) more0 += x[0] + x[1];
      else sum0 += x[0] + x[1];
      if (HALF_ROWS) continue;
      if (c % 2) more1 += x[2] + x[3];
      else sum1 += x[2] + x[3];
    }
    sum0 += more0, sum1 += more1;
  }
  __device__ __forceinline__ void pack(const float (&s)[SPAN / 2], u32 (&p)[SPAN / 16][4]) {
#pragma unroll
    for (int i = 0; i < SPAN / 4; ++i) p[i / 4][i % 4] = packed(s[2 * i], s[2 * i + 1]);
  }

  // Starts the products of the weights of a step with its values.
  __device__ __forceinline__ void add(const u32 (&p)[SPAN / 16][4], Stage of) {
    bar_wait(shared + V_FULL + 8 * of.at, of.phase);
    const u32 values = place(shared + V_AT, V_BYTES) + of.at * ((V_BYTES + V_REST_BYTES) >> 4);
    mma_fence();
#pragma unroll
    for (int c = 0; c < SPAN / 16; ++c) weighted(o, p[c], matrix<WIDE>(values + 128 * c));
    mma_commit();
  }
  __device__ __forceinline__ void free_values(Stage of) {
    if (threadIdx.x % 32 == 0) bar_arrive(shared + V_FREE + 8 * of.at);
  }

  // A step whose weights are in `p`; leaves those of the next there. `raises`: the shifts, first.
  __device__ __forceinline__ void step(float (&s)[SPAN / 2], u32 (&p)[SPAN / 16][4], bool raises) {
    const Stage last = now;
    now.next();
    if (GROUPS > 1) turn_sync(group);
    multiply(s, now);
    add(p, last);
    if (GROUPS > 1) turn_pass<GROUPS>(group);
    mma_wait<1>();
    held(s);
    settle(s, now);
    float2 faded = {1, 1};
    if (raises) faded = raise(s);
    if (EXPONENTS && !raises) weigh<true>(s);
    else weigh<false>(s);
    mma_wait();
    held(o);
    free_values(last);
    fade(faded);
    pack(s, p);
  }

  // Whether weights of a row left the range of what is exact; threads have parts of its `sum`.
  __device__ __forceinline__ static bool outgrew(float sum) {
    sum = over_quad(sum);
    return !(sum < TOO_MUCH && sum >= TOO_LITTLE);
  }

  // One pass over the list.
  __device__ __forceinline__ void walk(bool exact) {
    const bool shifted = !EXPONENTS || exact;
    top0 = top1 = shifted ? FLOOR : 0, sum0 = sum1 = 0;
#pragma unroll
    for (int i = 0; i < D / 2; ++i) o[i] = 0;
    if (steps == 0) return;
    float s[SPAN / 2];
    u32 p[SPAN / 16][4];
    multiply(s, now);
    mma_wait();
    held(s);
    settle(s, now);
    if (shifted) raise(s);
    weigh<false>(s);
    pack(s, p);
#pragma unroll 1
    for (int n = 1; n < steps; ++n) step(s, p, !STEADY || exact || (shifted && n < 3));
    add(p, now);
    mma_wait();
    held(o);
    free_values(now);
    now.next();
  }

  __device__ __forceinline__ void attend(int entries) {
    __syncthreads();
    steps = (units_of(shared + LIST, entries) + UNITS - 1) / UNITS;
    int exact = !STEADY;
    if (GROUPS > 1 && group == GROUPS - 1) turn_pass<GROUPS>(group);
#pragma unroll 1
    for (;;) {
      // Keeps the compiler from writing the loop out twice, once for each value, and tells it that
      // the warp agrees.
      asm volatile("" : "+r"(exact));
      exact = __shfl_sync(~0u, exact, 0);
      walk(exact);
      if (!STEADY || exact) return;
      const bool outgrown = steps && (outgrew(sum0) || (!HALF_ROWS && outgrew(sum1)));
      if (!__shfl_sync(~0u, __syncthreads_or(outgrown), 0)) return;
      exact = 1;
    }
  }

  // What the others wait for, of a group without rows.
  __device__ __forceinline__ void attend_nothing(int entries) {
    __syncthreads();
    steps = (units_of(shared + LIST, entries) + UNITS - 1) / UNITS;
    if (GROUPS > 1 && group == GROUPS - 1) turn_pass<GROUPS>(group);
    bool again = false;
    do {
#pragma unroll 1
      for (int n = 0; n < steps; ++n, now.next()) {
        if (GROUPS > 1 && n > 0) turn_sync(group), turn_pass<GROUPS>(group);
        bar_wait(shared + K_FULL + 8 * now.at, now.phase);
        if (threadIdx.x % 32 == 0) bar_arrive(shared + K_FREE + 8 * now.at);
        bar_wait(shared + V_FULL + 8 * now.at, now.phase);
        free_values(now);
      }
      again = STEADY && !again && __shfl_sync(~0u, __syncthreads_or(0), 0);
    } while (again);
  }

  // Writes what the thread has, joined with the local branch where there is one.
  __device__ __forceinline__ void finish(
      out_t* __restrict__ out, float* __restrict__ lse, const alm_t* __restrict__ alm,
      const gate_t* __restrict__ gate, long long line, long long shift, int row0, Rows rows) {
    const int lane = threadIdx.x % 32, low = row_of_thread<HALF_ROWS>(row0);
#pragma unroll
    for (int half = 0; half < (HALF_ROWS ? 1 : ROWS_OF_THREAD); ++half) {
      const float top = half ? top1 : top0;
      const int row = low + 8 * half;
      float sum = half ? sum1 : sum0;
      sum += __shfl_xor_sync(~0u, sum, 1);
      sum += __shfl_xor_sync(~0u, sum, 2);
      if (row >= PQ) continue;
      const bool some = sum > 0;
      if (!ROWED && lane % 4 == 0) lse[line + shift + row] = some ? top + log2_of(sum) : PARTIAL ? NOTHING : 0.f;
      const float factor = some ? 1 / sum : 1;
      const long long to = rows.result(row);
#pragma unroll
      for (int i = 0; i < D / 8; ++i) {
        const int column = 8 * i + 2 * (lane % 4);
#if GATED || PARTIAL
        const long long at = (line + row) * D + column;
#endif
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
        if (to >= 0) *(u32*)(out + to + column) = packed(x, y);
#endif
      }
    }
  }
};

// Arguments as of the Triton kernel; keys and values as maps of the copy engine, keys once more in
// boxes of their REST_PAD last columns. `period` is 0 where all slots hold tokens. ROWED: `rows` has two lines for
// each row of the tiles, one of the `query_lines` of a head of queries, one of results, which lie so many numbers
// apart by worlds, heads and lines; nothing else is written then.
extern "C" __global__ void __launch_bounds__(THREADS, PROGRAMS_AT_ONCE) forward(
    const u16* __restrict__ q, const __grid_constant__ Maps keys, const __grid_constant__ Maps rest,
    const __grid_constant__ Maps values, const int* __restrict__ lists, const int* __restrict__ valid,
    out_t* __restrict__ out, float* __restrict__ lse, const alm_t* __restrict__ alm, const gate_t* __restrict__ gate,
    int B, int H, int G, int NQ, int slots, int lists_world, int k_world, int k_head, int v_world, int v_head,
    int period, int split, const int2* __restrict__ rows, int query_lines, int result_world,
    int result_head, int result_step, float scale) {
  extern __shared__ char raw[];
  let_next_begin();
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
  // Empty slots count as blocks without a token.
  const int filled = split > 1 ? filled_of(lists, slots) : slots;
  const int first = part * filled / split, last = (part + 1) * filled / split;
  const long long line = ((long long)(b * H + h) * NQ + i) * PQ, shift = PARTIAL ? (long long)part * B * H * NQ * PQ : 0;
  const int k_line = (b * k_world + h * k_head) * PK, v_line = (b * v_world + h * v_head) * PK;
  const Rows own = {
      ROWED ? (long long)(b * H + h) * query_lines : line, (long long)b * result_world + (long long)h * result_head,
      result_step, rows + i * PQ};
  const int group = warp / 4;
  if (group == GROUPS) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(SPARED));
    if (warp % 4 == 0) put_list(shared + LIST, lists, valid, period, first, last);
    if (threadIdx.x % 128 == 32) {
      for (int s = 0; s < STAGES; ++s) {
        bar_init(shared + K_FULL + 8 * s, 1), bar_init(shared + K_FREE + 8 * s, 4 * GROUPS);
        bar_init(shared + V_FULL + 8 * s, 1), bar_init(shared + V_FREE + 8 * s, 4 * GROUPS);
      }
      bars_are_set();
    }
    __syncthreads();
    const int all = units_of(shared + LIST, last - first), steps = (all + UNITS - 1) / UNITS;
    Stage stage = {0, 0};
    bool again = false;
    do {
      if (warp % 4 == 0)
        feed<K_BYTES + K_REST_BYTES>(
            shared + LIST, last - first, stage, steps, shared + K_FULL, shared + K_FREE,
            [&](int at, u32 full, int unit, int units, int slot, int tokens) {
              put_tokens(shared + TOKENS_AT + 16 * at, unit, units, tokens);
              copy_narrow(
                  shared + K_AT + at * K_BYTES, shared + K_REST_AT + at * K_REST_BYTES, keys, rest, k_line + slot, unit,
                  units, full);
            });
      if (warp % 4 == 1)
        feed<V_BYTES + V_REST_BYTES>(
            shared + LIST, last - first, stage, steps, shared + V_FULL, shared + V_FREE,
            [&](int at, u32 full, int unit, int units, int slot, int) {
              copy_wide(shared + V_AT + at * (V_BYTES + V_REST_BYTES), values, v_line + slot, unit, units, full);
            });
      // Where shifts were not enough, the list once more.
      again = STEADY && !again && __shfl_sync(~0u, __syncthreads_or(0), 0);
    } while (again);
  } else if (ROWED && __shfl_sync(~0u, own.query(row0), 0) < 0) {
    Group<false>(shared, group, scale).attend_nothing(last - first);
  } else if (HALF_LAST && group == GROUPS - 1) {
    Group<true> work(shared, group, scale);
    work.take(q, own, row0);
    work.attend(last - first);
    work.finish(out, lse, alm, gate, line, shift, row0, own);
  } else {
    Group<false> work(shared, group, scale);
    work.take(q, own, row0);
    work.attend(last - first);
    work.finish(out, lse, alm, gate, line, shift, row0, own);
  }
  end_after_last();
}
