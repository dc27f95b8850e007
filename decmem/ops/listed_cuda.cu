// Programs that walk the list of a query block, for `sparse_cuda` and `sparse_query_gradient_cuda`. Their
// keys are the tokens of the listed blocks one after another, in units of UNIT slots: UNITS to a step,
// whichever blocks they are of. Units without a token are left out. MASKED: blocks may lack tokens; WHOLE: no step
// does.

constexpr int UNITS = SPAN / UNIT;
static_assert(SPAN % UNIT == 0 && PK % UNIT == 0 && UNIT % 16 == 0 && UNITS <= 16, "units of steps and blocks");
constexpr int PROGRAMS = (PQ + 64 * GROUPS - 1) / (64 * GROUPS);
// The last group may have no more than 32 rows: one in each upper half of a warp's tile of 16, so that
// no thread works for rows that do not exist.
constexpr bool HALF_LAST = PROGRAMS == 1 && PQ % 64 != 0 && PQ % 64 <= 32;
// A warp group more feeds the others. It leaves them registers: all have 128, 168 or 128 at first.
constexpr int THREADS = 128 * (GROUPS + 1);
constexpr int SPARED = GROUPS == 2 ? 40 : 32, REGISTERS = GROUPS == 3 ? 160 : GROUPS == 2 ? 232 : 224;
constexpr int PROGRAMS_AT_ONCE = GROUPS == 1 ? 2 : 1;
constexpr int LIST_ENTRY = 8, TOKEN_BITS = 12;
static_assert(PK < 1 << TOKEN_BITS, "tokens of a block");

// Of a listed block its number, its tokens, and the units of all blocks before it.
struct Entry { int block, tokens, before; };

__device__ __forceinline__ Entry entry_of(u32 list, int n) {
  int block, rest;
  asm volatile("ld.shared.v2.b32 {%0, %1}, [%2];" : "=r"(block), "=r"(rest) : "r"(list + LIST_ENTRY * n) : "memory");
  return {block, rest & (1 << TOKEN_BITS) - 1, rest >> TOKEN_BITS};
}

// The units of a list of `entries`, as all threads of a warp know.
__device__ __forceinline__ int units_of(u32 list, int entries) {
  return __shfl_sync(~0u, entry_of(list, entries).before, 0);
}

// Blocks that are listed; empty slots come last. Every warp counts for itself.
__device__ __forceinline__ int filled_of(const int* __restrict__ lists, int slots) {
  const int lane = threadIdx.x % 32;
  int filled = 0;
#pragma unroll 4
  for (int x = lane; x < up(slots, 32); x += 32) filled += __popc(__ballot_sync(~0u, x < slots && lists[x] >= 0));
  return filled;
}

// One warp: entries `first` to `last` of the list to shared memory, and one more, before which all lie.
__device__ __forceinline__ void put_list(
    u32 list, const int* __restrict__ lists, const int* __restrict__ valid, int period, int first, int last) {
  const int lane = threadIdx.x % 32;
  int before = 0;
  for (int x = first + lane; x < up(last - first + 1, 32) + first; x += 32) {
    const int block = x < last ? lists[x] : 0;
    const int tokens = x >= last || block < 0 ? 0 : period ? valid[block % period] : PK;
    const int units = (tokens + UNIT - 1) / UNIT;
    int sum = units;  // of this lane's and those before
#pragma unroll
    for (int d = 1; d < 32; d *= 2) {
      const int other = __shfl_up_sync(~0u, sum, d);
      if (lane >= d) sum += other;
    }
    if (x <= last)
      asm volatile("st.shared.v2.b32 [%0], {%1, %2};"
                   ::"r"(list + LIST_ENTRY * (x - first)), "r"(block), "r"(before + sum - units << TOKEN_BITS | tokens)
                   : "memory");
    before += __shfl_sync(~0u, sum, 31);
  }
}

// Walks the units from step to step, a warp as one: `part(unit, units, slot, tokens)` for each part of a step
// that lies in one block, from its unit `unit` on. Parts are laid out from the step's end to its beginning:
// where blocks are longer than steps, a step has one end of a block at most, and that is its own end too,
// so that slots without a token are always in its last unit. What the last step lacks is a part that lies nowhere.
constexpr int NOWHERE = 1 << 30;  // the copy engine gives zeros for lines that do not exist
struct Walk {
  const u32 list;
  const int entries;
  int entry, unit;
  Entry now;

  __device__ __forceinline__ Walk(u32 list, int entries) : list(list), entries(entries), entry(-1), unit(0), now{0, 0, 0} {}
  template <class Part> __device__ __forceinline__ void step(Part part) {
    for (int done = 0; done < UNITS;) {
      int left = (now.tokens + UNIT - 1) / UNIT - unit;
      while (left == 0 && entry < entries) {
        now = entry_of(list, ++entry), unit = 0;
        left = entry < entries ? (now.tokens + UNIT - 1) / UNIT : UNITS;
      }
      const bool there = entry < entries;
      const int units = there ? min(left, UNITS - done) : UNITS - done;
      part(UNITS - done - units, units, there ? now.block * PK + unit * UNIT : NOWHERE, there ? now.tokens - unit * UNIT : 0);
      done += units;
      if (there) unit += units;
    }
  }
};

// Maps of the copy engine for boxes of 1 to UNITS units.
struct Maps { TensorMap of[UNITS]; };

// A warp that feeds: it has copied what each of `steps` steps needs, BYTES from its first barrier in `full`
// on, as soon as all groups have done with what lies there. `stage`: of the first step of this pass.
template <int BYTES, class Copy> __device__ __forceinline__ void feed(
    u32 list, int entries, Stage& stage, int steps, u32 full, u32 free, Copy copy) {
  Walk walk(list, entries);
  for (int n = 0; n < steps; ++n, stage.next()) {
    const int at = stage.at;
    bar_wait(free + 8 * at, stage.phase ^ 1);
    walk.step([&](int unit, int units, int slot, int tokens) { copy(at, full + 8 * at, unit, units, slot, tokens); });
    __syncwarp();
    if (threadIdx.x % 32 == 0) bar_expect(full + 8 * at, BYTES);
  }
}
// Its copies: rows for products over columns, their rest narrow, or for products over rows, 64 wide.
__device__ __forceinline__ void copy_narrow(
    u32 to, u32 to_rest, const Maps& main, const Maps& rest, int line, int unit, int units, u32 full) {
  if (threadIdx.x % 32 == 0) copy_box(to + unit * UNIT * 128, &main.of[units - 1], 0, line, full);
  if (REST && threadIdx.x % 32 == 1)
    copy_box(to_rest + unit * UNIT * REST_PAD * 2, &rest.of[units - 1], MAIN, line, full);
}
__device__ __forceinline__ void copy_wide(u32 to, const Maps& maps, int line, int unit, int units, u32 full) {
  const int half = threadIdx.x % 32;
  if (half < (REST ? 2 : 1))
    copy_box(to + half * SPAN * 128 + unit * UNIT * 128, &maps.of[units - 1], half * MAIN, line, full);
}

// Tokens of a step's units, a byte each; a warp writes those of some units of a block.
__device__ __forceinline__ void put_tokens(u32 at, int unit, int units, int tokens) {
  const int own = threadIdx.x % 32 - unit;
  if (own >= 0 && own < units)
    asm volatile("st.shared.b8 [%0], %1;" ::"r"(at + unit + own), "r"(max(0, min(UNIT, tokens - own * UNIT))) : "memory");
}
struct Tokens {
  u32 words[(UNITS + 3) / 4];

  __device__ __forceinline__ Tokens(u32 at) {
    if (WHOLE) return;
#pragma unroll
    for (int i = 0; i < (UNITS + 3) / 4; ++i)
      asm volatile("ld.shared.b32 %0, [%1];" : "=r"(words[i]) : "r"(at + 4 * i) : "memory");
  }
  __device__ __forceinline__ int of(int unit) const { return words[unit / 4] >> 8 * (unit % 4) & 255; }
  // Sets what threads hold of slots of a unit that have no token: columns 8 i + 2 (lane % 4) and the next of
  // two rows.
  __device__ __forceinline__ void mask_unit(float (&x)[SPAN / 2], float to, int unit) const {
    const int left = of(unit) - 2 * (threadIdx.x % 4);
#pragma unroll
    for (int j = 0; j < UNIT / 8; ++j)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        if (8 * j + i % 2 >= left) x[unit * UNIT / 2 + 4 * j + i] = to;
  }
  __device__ __forceinline__ void mask(float (&x)[SPAN / 2], float to) const {
    if (WHOLE) return;
    // With MASKED blocks most steps have an end of one, in their last unit; the others are full but at the
    // end of a list.
    constexpr int EARLY = MASKED ? UNITS - 1 : UNITS;
    bool full = true;
#pragma unroll
    for (int i = 0; i < (UNITS + 3) / 4; ++i) {
      constexpr u32 EACH = 0x01010101u * UNIT;
      const int here = EARLY - 4 * i;
      const u32 those = here >= 4 ? ~0u : (1u << 8 * here) - 1;
      full &= (words[i] & those) == (EACH & those);
    }
    // All threads agree; voting tells the compiler so.
    if (!__all_sync(~0u, full)) {
#pragma unroll
      for (int u = 0; u < EARLY; ++u)
        if (!__all_sync(~0u, of(u) == UNIT)) mask_unit(x, to, u);
    }
    if (MASKED) mask_unit(x, to, UNITS - 1);
  }
};
