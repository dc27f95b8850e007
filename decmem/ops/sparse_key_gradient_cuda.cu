// Block-sparse attention for Hopper GPUs, gradients of keys and values. A program is a multiprocessor's:
// it takes one key block after the other, 64 keys per warp group, and meets them with the queries, and
// the output's gradients, of all blocks that read it (`inverse_lists`). One more warp group has the copy
// engine fetch queries and gradients into a ring of STAGES, and the next key block while this one is met,
// and store what came of the one before; and writes zeros for key blocks that nobody reads. Weights are
// made again from the forward's log-sum-exp; they lie across, a column for each query.
//
// Defined in front of this text, besides what `hopper_cuda` wants: PQ and PK slots of a block (PK at most
// 64 GROUPS), SPAN queries of a step (divides PQ), GROUPS warp groups, STAGES, AHEAD (below), REGISTERS of a
// thread that computes and SPARED of one that does not, and the matrix instructions: Scores<W>::first and ::more,
// products of 64 keys with W queries, and `weighted`, of 64 keys with 16 queries.
// AHEAD: the next scores are computed while this step's gradients of scores are, and those meet their
// queries while the next weights are computed; two groups have the registers for it.

constexpr int SPANS = PQ / SPAN;
// Where things lie in shared memory, in bytes. Keys and values of two blocks; the last group may read
// beyond its rows, whatever lies there, and nobody what it makes of it.
constexpr int K_BYTES = PK * 128, K_REST_BYTES = PK * REST_PAD * 2, OWN = 2 * (K_BYTES + K_REST_BYTES);
constexpr int K_AT = 0, V_AT = K_BYTES, K_REST_AT = 2 * K_BYTES, V_REST_AT = K_REST_AT + K_REST_BYTES;
constexpr int OWN_STAGE = up(OWN, 1024);
// Queries and gradients of a stage, main and rest of each, then log-sum-exp and delta.
constexpr int Q_BYTES = SPAN * 128, Q_STAGE = Q_BYTES * (REST ? 2 : 1), STAGE = 2 * Q_STAGE;
constexpr int Q_AT = 2 * OWN_STAGE, LINES_AT = Q_AT + STAGES * STAGE, LINE_BYTES = SPAN * 4;
constexpr int OWN_FULL = LINES_AT + STAGES * 2 * LINE_BYTES, OWN_DONE = OWN_FULL + 16, OWN_FREE = OWN_DONE + 16;
constexpr int FULL = OWN_FREE + 16, FREE = FULL + 8 * STAGES;
constexpr int TASK = up(FREE + 8 * STAGES, 16);  // of both key blocks the number, the steps and the tokens
constexpr int TASK_BYTES = 16;
extern "C" __constant__ int shared_bytes = TASK + 2 * TASK_BYTES + 1024;
// Key blocks that a program takes at once; 32 at most.
constexpr int TAKEN = 4;

struct Maps { const TensorMap *keys, *keys_rest, *values, *values_rest, *queries, *grads; };
struct Targets { const TensorMap *dk, *dk_rest, *dv, *dv_rest; };
struct Sizes { int B, H, G, NQ, NK, entries, lists_world, k_world, k_head, v_world, v_head; };

// What a key block needs: `count` blocks read it, in the list of readers from `start` on.
struct Task { int count, start, tokens; };

__device__ __forceinline__ Task task_of(
    int number, const int* __restrict__ offsets, const int* __restrict__ valid, int period, Sizes n) {
  if (number >= n.B * n.H * n.NK) return {0, 0, 0};
  const int j = number % n.NK, h = number / n.NK % n.H, b = number / n.NK / n.H;
  const int lists = b * n.lists_world * n.G + (n.G > 1 ? h : 0);
  const int* offset = offsets + lists * (n.NK + 1) + j;
  return {offset[1] - offset[0], lists * n.entries + offset[0], period ? valid[j % period] : PK};
}

// One warp: takes key blocks and has all that they need copied into shared memory.
__device__ __forceinline__ void feed(
    u32 shared, Maps maps, const int* __restrict__ readers, const int* __restrict__ offsets,
    const int* __restrict__ valid, int period, const float* __restrict__ lse, const float* __restrict__ delta,
    int* __restrict__ taken, Sizes n) {
  const int lane = threadIdx.x % 32, tasks = n.B * n.H * n.NK;
  int stage = 0, phase = 1, turn = 0;
  // Each lane looks one of those taken up, for all.
  int first = __shfl_sync(~0u, lane == 0 ? atomicAdd(taken, TAKEN) : 0, 0);
  Task own = lane < TAKEN ? task_of(first + lane, offsets, valid, period, n) : Task{0, 0, 0};
#pragma unroll 1
  for (;;) {
    // Looked up while these are met.
    const int next = __shfl_sync(~0u, lane == 0 && first < tasks ? atomicAdd(taken, TAKEN) : tasks, 0);
    const Task later = lane < TAKEN ? task_of(next + lane, offsets, valid, period, n) : Task{0, 0, 0};
#pragma unroll 1
    for (u32 left = __ballot_sync(~0u, own.count > 0); left; left &= left - 1, ++turn) {
      const int who = __ffs(left) - 1, number = first + who, at = turn & 1;
      const int count = __shfl_sync(~0u, own.count, who), start = __shfl_sync(~0u, own.start, who);
      const int tokens = __shfl_sync(~0u, own.tokens, who);
      const int j = number % n.NK, h = number / n.NK % n.H, b = number / n.NK / n.H;
      // Each lane knows a reader; more than 32 are looked up as they come.
      int reader = lane < count ? readers[start + lane] : 0;
      const u32 to = shared + at * OWN_STAGE, full = shared + OWN_FULL + 8 * at;
      bar_wait(shared + OWN_FREE + 8 * at, ~(turn >> 1) & 1);
      if (lane == 0) {
        const int k_line = (b * n.k_world + h * n.k_head + j) * PK, v_line = (b * n.v_world + h * n.v_head + j) * PK;
        asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %3};"
                     ::"r"(shared + TASK + TASK_BYTES * at), "r"(number), "r"(count * SPANS), "r"(tokens) : "memory");
        bar_expect(full, OWN);
        copy_box(to + K_AT, maps.keys, 0, k_line, full);
        if (REST) copy_box(to + K_REST_AT, maps.keys_rest, MAIN, k_line, full);
        copy_box(to + V_AT, maps.values, 0, v_line, full);
        if (REST) copy_box(to + V_REST_AT, maps.values_rest, MAIN, v_line, full);
      }
      const int head = (b * n.H + h) * n.NQ * PQ;
#pragma unroll 1
      for (int r = 0; r < count; ++r) {
        if (r && r % 32 == 0) reader = r + lane < count ? readers[start + r + lane] : 0;
        const int block = head + __shfl_sync(~0u, reader, r % 32) * PQ;
#pragma unroll 1
        for (int span = 0; span < SPANS; ++span) {
          const int line = block + span * SPAN;
          const u32 bar = shared + FULL + 8 * stage, to = shared + Q_AT + stage * STAGE;
          const u32 lines = shared + LINES_AT + stage * 2 * LINE_BYTES;
          bar_wait(shared + FREE + 8 * stage, phase);
          if (lane == 0) {
            bar_expect(bar, STAGE + 2 * LINE_BYTES);
            copy_box(to, maps.queries, 0, line, bar);
            if (REST) copy_box(to + Q_BYTES, maps.queries, MAIN, line, bar);
            copy_line(lines, lse + line, LINE_BYTES, bar);
            copy_box(to + Q_STAGE, maps.grads, 0, line, bar);
            if (REST) copy_box(to + Q_STAGE + Q_BYTES, maps.grads, MAIN, line, bar);
            copy_line(lines + LINE_BYTES, delta + line, LINE_BYTES, bar);
          }
          if (++stage == STAGES) stage = 0, phase ^= 1;
        }
      }
    }
    if (first >= tasks) break;
    first = next, own = later;
  }
  // No more.
  const int at = turn & 1;
  bar_wait(shared + OWN_FREE + 8 * at, ~(turn >> 1) & 1);
  if (lane) return;
  asm volatile("st.shared.b32 [%0], %1;" ::"r"(shared + TASK + TASK_BYTES * at), "r"(-1) : "memory");
  bar_arrive(shared + OWN_FULL + 8 * at);
}

// One warp: zeros in gradient `x` of all key blocks that nobody reads.
__device__ __forceinline__ void clear(u16* __restrict__ x, const int* __restrict__ offsets, Sizes n) {
  const int lane = threadIdx.x % 32;
#pragma unroll 1
  for (int first = blockIdx.x * 32; first < n.B * n.H * n.NK; first += gridDim.x * 32) {
    const bool there = first + lane < n.B * n.H * n.NK;
    const int count = there ? task_of(first + lane, offsets, nullptr, 0, n).count : 1;
#pragma unroll 1
    for (u32 left = __ballot_sync(~0u, count == 0); left; left &= left - 1) {
      uint4* to = (uint4*)(x + (long long)(first + __ffs(left) - 1) * PK * D);
#pragma unroll 4
      for (int c = lane; c < PK * D / 8; c += 32) to[c] = make_uint4(0, 0, 0, 0);
    }
  }
}

// One thread: all that is copied out of it.
__device__ __forceinline__ void store(u32 shared, Targets to) {
#pragma unroll 1
  for (int turn = 0;; ++turn) {
    const int at = turn & 1, phase = turn >> 1 & 1;
    const u32 own = shared + at * OWN_STAGE;
    int task;
    bar_wait(shared + OWN_FULL + 8 * at, phase);
    asm volatile("ld.shared.b32 %0, [%1];" : "=r"(task) : "r"(shared + TASK + TASK_BYTES * at) : "memory");
    if (task < 0) return;
    bar_wait(shared + OWN_DONE + 8 * at, phase);
    store_box(to.dk, 0, task * PK, own + K_AT);
    if (REST) store_box(to.dk_rest, MAIN, task * PK, own + K_REST_AT);
    store_box(to.dv, 0, task * PK, own + V_AT);
    if (REST) store_box(to.dv_rest, MAIN, task * PK, own + V_REST_AT);
    stores_are_read();
    bar_arrive(shared + OWN_FREE + 8 * at);
  }
}

// What one warp group does: 64 keys of each block in turn.
struct Group {
  const u32 shared;
  const int group;
  const float scale;
  float dk[D / 2], dv[D / 2];

  __device__ __forceinline__ Group(u32 shared, int group, float scale) : shared(shared), group(group), scale(scale) {}

  // Starts products of the group's rows at `main` and `rest` with the queries or gradients at `x`.
  __device__ __forceinline__ void multiply(float (&s)[SPAN / 2], u32 main, u32 rest, u32 x) {
    Scores<SPAN>::first(s, matrix<WIDE>(main), matrix<WIDE>(x));
#pragma unroll
    for (int k = 1; k < MAIN / 16; ++k) Scores<SPAN>::more(s, matrix<WIDE>(main + 2 * k), matrix<WIDE>(x + 2 * k));
#pragma unroll
    for (int k = 0; k < REST_PAD / 16; ++k)
      Scores<SPAN>::more(s, matrix<NARROW>(rest + 2 * k), matrix<WIDE>(x + (Q_BYTES >> 4) + 2 * k));
    mma_commit();
  }

  __device__ __forceinline__ float2 line_of(u32 lines, int i) {
    float2 x;
    asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(x.x), "=f"(x.y) : "r"(lines + 32 * i) : "memory");
    return x;
  }

#if AHEAD
  __device__ __forceinline__ u32 queries_of(Stage x) { return place(shared + Q_AT, Q_BYTES) + x.at * (STAGE >> 4); }
  __device__ __forceinline__ void score(float (&s)[SPAN / 2], u32 own, Stage x) {
    bar_wait(shared + FULL + 8 * x.at, x.phase);
    mma_fence();
    multiply(s, place(own + K_AT + group * 8192, 16), place(own + K_REST_AT + group * 128 * REST_PAD, 16), queries_of(x));
  }
  __device__ __forceinline__ void free_stage(int stage) {
    if (threadIdx.x % 32 == 0) bar_arrive(shared + FREE + 8 * stage);
  }

  // Adds to the gradients of keys what the step before left in `p`, its stage being `before`.
  __device__ __forceinline__ void add(const u32 (&p)[SPAN / 16][4], int before) {
    const u32 q = queries_of({before, 0});
    mma_fence();
#pragma unroll
    for (int c = 0; c < SPAN / 16; ++c) weighted(dk, p[c], matrix<WIDE>(q + 128 * c));
    mma_commit();
  }

  // Step at `x`, whose scores are in `s`; leaves those of the next there, if there are MORE, and gradients
  // of scores in `p`.
  template <bool FIRST, bool MORE> __device__ __forceinline__ void step(
      float (&s)[SPAN / 2], u32 (&p)[SPAN / 16][4], u32 own, Stage& x, int& before) {
    const u32 g = queries_of(x) + (Q_STAGE >> 4);
    const u32 lines = shared + LINES_AT + x.at * 2 * LINE_BYTES + 8 * (threadIdx.x % 4);
    float t[SPAN / 2];
    if (!FIRST) add(p, before);
#pragma unroll
    for (int i = 0; i < SPAN / 8; ++i) {
      const float2 shift = line_of(lines, i);
#pragma unroll
      for (int r = 0; r < 4; ++r) s[4 * i + r] = exp2_of(fmaf(s[4 * i + r], scale, r & 1 ? -shift.y : -shift.x));
    }
    if (!FIRST) {
      mma_wait();
      free_stage(before);
    }
#pragma unroll
    for (int i = 0; i < SPAN / 4; ++i) p[i / 4][i % 4] = packed(s[2 * i], s[2 * i + 1]);
    mma_fence();
    multiply(t, place(own + V_AT + group * 8192, 16), place(own + V_REST_AT + group * 128 * REST_PAD, 16), g);
#pragma unroll
    for (int c = 0; c < SPAN / 16; ++c) weighted(dv, p[c], matrix<WIDE>(g + 128 * c));
    mma_commit();
    before = x.at;
    x.next();
    if (MORE) score(s, own, x);
    mma_wait<MORE ? 1 : 0>();
    held(t);
#pragma unroll
    for (int i = 0; i < SPAN / 8; ++i) {
      const float2 delta = line_of(lines + LINE_BYTES, i);
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        u32& of = p[i / 2][i % 2 * 2 + r];
        of = packed(low_of(of) * (t[4 * i + 2 * r] - delta.x), high_of(of) * (t[4 * i + 2 * r + 1] - delta.y));
      }
    }
    if (MORE) {
      mma_wait();
      held(s);
    }
  }
#else
  __device__ __forceinline__ void step(u32 own, int stage) {
    const u32 k_main = place(own + K_AT + group * 8192, 16), v_main = place(own + V_AT + group * 8192, 16);
    const u32 k_rest = place(own + K_REST_AT + group * 128 * REST_PAD, 16);
    const u32 v_rest = place(own + V_REST_AT + group * 128 * REST_PAD, 16);
    const u32 q = place(shared + Q_AT, Q_BYTES) + stage * (STAGE >> 4), g = q + (Q_STAGE >> 4);
    const u32 lines = shared + LINES_AT + stage * 2 * LINE_BYTES + 8 * (threadIdx.x % 4);
    float s[SPAN / 2];
    u32 p[SPAN / 16][4];
    mma_fence();
    multiply(s, k_main, k_rest, q);
    float2 lse[SPAN / 8];
#pragma unroll
    for (int i = 0; i < SPAN / 8; ++i) lse[i] = line_of(lines, i);
    mma_wait();
#pragma unroll
    for (int i = 0; i < SPAN / 4; ++i) {
      const float2 shift = lse[i / 2];
      p[i / 4][i % 4] = packed(exp2_of(fmaf(s[2 * i], scale, -shift.x)), exp2_of(fmaf(s[2 * i + 1], scale, -shift.y)));
    }
    mma_fence();
    multiply(s, v_main, v_rest, g);
#pragma unroll
    for (int c = 0; c < SPAN / 16; ++c) weighted(dv, p[c], matrix<WIDE>(g + 128 * c));
    mma_commit();
    mma_wait<1>();
#pragma unroll
    for (int c = 0; c < SPAN / 16; ++c) {
      u32 ds[4];
#pragma unroll
      for (int i = 0; i < 4; i += 2) {
        const int x = 8 * c + 2 * i;
        const float2 delta = line_of(lines + LINE_BYTES, 2 * c + i / 2);
#pragma unroll
        for (int r = 0; r < 2; ++r)
          ds[i + r] = packed(low_of(p[c][i + r]) * (s[x + 2 * r] - delta.x),
                             high_of(p[c][i + r]) * (s[x + 2 * r + 1] - delta.y));
      }
      // These meet their queries while the next are computed.
      mma_fence();
      weighted(dk, ds, matrix<WIDE>(q + 128 * c));
      mma_commit();
    }
    mma_wait();
  }

#endif

  // Puts a gradient of 64 keys where the keys or values themselves lay: nobody else reads them.
  __device__ __forceinline__ void put(u32 main, u32 rest, const float (&x)[D / 2], float factor, int tokens) {
    const int lane = threadIdx.x % 32, top = threadIdx.x % 128 / 32 * 16;
    // A warp's rows are there or are not; a lane tells the place of one.
    if (group * 64 + top >= PK) return;
    const int r = top + lane % 16;
    // A slot without a token was met like the others: what came of it is dropped here.
    const int low = group * 64 + top + lane / 4;
    const bool holds0 = low < tokens, holds1 = low + 8 < tokens;
#pragma unroll
    for (int i = 0; i < D / 8; ++i) {
      const u32 at = i < 8 ? main + swizzled(r, i, 64) : rest + swizzled(r, i - 8, REST_PAD);
      const u32 upper = holds0 ? packed(x[4 * i] * factor, x[4 * i + 1] * factor) : 0;
      const u32 lower = holds1 ? packed(x[4 * i + 2] * factor, x[4 * i + 3] * factor) : 0;
      asm volatile("stmatrix.sync.aligned.m8n8.x2.shared.b16 [%0], {%1, %2};" ::"r"(at), "r"(upper), "r"(lower) : "memory");
    }
  }

  __device__ __forceinline__ void finish(u32 own, int tokens, float factor) {
    group_sync(group);  // products of all four warps are done
    put(own + K_AT + group * 8192, own + K_REST_AT + group * 128 * REST_PAD, dk, factor, tokens);
    put(own + V_AT + group * 8192, own + V_REST_AT + group * 128 * REST_PAD, dv, 1, tokens);
    fence_stores();
    __syncwarp();
  }

  __device__ __forceinline__ void work(float factor) {
#if AHEAD
    Stage x = {0, 0};
#else
    int stage = 0, phase = 0;
#endif
#pragma unroll 1
    for (int turn = 0;; ++turn) {
      const int at = turn & 1;
      const u32 own = shared + at * OWN_STAGE;
      bar_wait(shared + OWN_FULL + 8 * at, turn >> 1 & 1);
      int task, steps, tokens;
      asm volatile("{.reg .b32 x; ld.shared.v4.b32 {%0, %1, %2, x}, [%3];}"
                   : "=r"(task), "=r"(steps), "=r"(tokens) : "r"(shared + TASK + TASK_BYTES * at) : "memory");
      // Told by one thread, so that the compiler knows that the warp agrees.
      task = __shfl_sync(~0u, task, 0), steps = __shfl_sync(~0u, steps, 0);
      if (task < 0) return;
#pragma unroll
      for (int i = 0; i < D / 2; ++i) dk[i] = dv[i] = 0;
      held(dk), held(dv);
#if AHEAD
      float s[SPAN / 2];
      u32 p[SPAN / 16][4];
      int before;
      score(s, own, x);
      mma_wait();
      held(s);
      if (steps == 1) {
        step<true, false>(s, p, own, x, before);
      } else {
        step<true, true>(s, p, own, x, before);
#pragma unroll 1
        for (int n = 2; n < steps; ++n) step<false, true>(s, p, own, x, before);
        step<false, false>(s, p, own, x, before);
      }
      add(p, before);
      mma_wait();
      held(dk), held(dv);
      free_stage(before);
#else
#pragma unroll 1
      for (int n = 0; n < steps; ++n) {
        bar_wait(shared + FULL + 8 * stage, phase);
        step(own, stage);
        if (threadIdx.x % 32 == 0) bar_arrive(shared + FREE + 8 * stage);
        if (++stage == STAGES) stage = 0, phase ^= 1;
      }
#endif
      finish(own, tokens, factor);
      if (threadIdx.x % 32 == 0) bar_arrive(shared + OWN_DONE + 8 * at);
    }
  }
};

// Arguments as of the Triton kernel, one world's keys for each world of queries. Tensors as maps of the
// copy engine, where needed once more in boxes of their REST_PAD last columns; `taken`, 0 at the start,
// counts key blocks that programs have taken. `period` is 0 where all slots hold tokens.
extern "C" __global__ void __launch_bounds__(128 * (GROUPS + 1), 1) key_gradient(
    const __grid_constant__ TensorMap keys, const __grid_constant__ TensorMap keys_rest,
    const __grid_constant__ TensorMap values, const __grid_constant__ TensorMap values_rest,
    const __grid_constant__ TensorMap queries, const __grid_constant__ TensorMap grads,
    const __grid_constant__ TensorMap dk, const __grid_constant__ TensorMap dk_rest,
    const __grid_constant__ TensorMap dv, const __grid_constant__ TensorMap dv_rest,
    u16* __restrict__ dk_at, u16* __restrict__ dv_at, const int* __restrict__ readers,
    const int* __restrict__ offsets, const int* __restrict__ valid, const float* __restrict__ lse,
    const float* __restrict__ delta, int* __restrict__ taken, int B, int H, int G, int NQ, int NK, int entries,
    int lists_world, int k_world, int k_head, int v_world, int v_head, int period, float factor, float scale) {
  extern __shared__ char raw[];
  const u32 shared = up((u32)__cvta_generic_to_shared(raw), 1024);
  if (threadIdx.x == 0) {
    for (int s = 0; s < STAGES; ++s) bar_init(shared + FULL + 8 * s, 1), bar_init(shared + FREE + 8 * s, 4 * GROUPS);
    for (int s = 0; s < 2; ++s) {
      bar_init(shared + OWN_FULL + 8 * s, 1), bar_init(shared + OWN_DONE + 8 * s, 4 * GROUPS);
      bar_init(shared + OWN_FREE + 8 * s, 1);
    }
    bars_are_set();
  }
  __syncthreads();
  // Told by one thread, so that the compiler knows that the warp agrees.
  const int group = __shfl_sync(~0u, threadIdx.x / 128, 0);
  if (group == GROUPS) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(SPARED));
    const Maps maps = {&keys, &keys_rest, &values, &values_rest, &queries, &grads};
    const Targets targets = {&dk, &dk_rest, &dv, &dv_rest};
    const Sizes sizes = {B, H, G, NQ, NK, entries, lists_world, k_world, k_head, v_world, v_head};
    const int warp = __shfl_sync(~0u, threadIdx.x % 128 / 32, 0);
    if (warp == 0) feed(shared, maps, readers, offsets, valid, period, lse, delta, taken, sizes);
    if (warp == 1 && threadIdx.x % 32 == 0) store(shared, targets);
    if (warp == 2) clear(dk_at, offsets, sizes);
    if (warp == 3) clear(dv_at, offsets, sizes);
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(REGISTERS));
    Group(shared, group, scale).work(factor);
  }
  end_after_last();
}
