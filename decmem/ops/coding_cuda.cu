// `encode_heads` and `decode_heads` for 16-bit numbers; what is computed and the names: `coding_kernels`.
// A program takes TOKENS tokens with all their heads through shared memory, 16 bytes at a time: heads
// lie far apart on one side and side by side on the other. Threads beside each other have chunks beside each
// other, whatever their kind, and write at once: what is written in pieces of a sector costs more than working
// for both kinds.
//
// Defined in front of this text: D, CAMERA, SPACE, SURFACE, TIME (a head's channels), H heads, TURNED, TOKENS,
// THREADS (as many warps as tokens, or more), HALF for float16; NORMED, TIMED, LOCAL, VALUES, HEADS_LAST and SLOTTED of
// the encoding; PACKED, where slots are more than tokens; GATED, PER_HEAD and ROUNDED of the decoding.

constexpr int CHUNKS = D / 8, ROW = H * D;
constexpr int OF_MATRIX = CAMERA / 8;  // chunks for matrices alone, the first ones
constexpr int ITEMS = TOKENS * H * CHUNKS;  // of work: a chunk of a head of a token
extern "C" __constant__ int shared_bytes = 0;  // all of it is asked for at the launch

__device__ __forceinline__ void unpack(float (&x)[8], const u16* from) {
  const uint4 chunk = *(const uint4*)from;
  const u32 pairs[4] = {chunk.x, chunk.y, chunk.z, chunk.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) x[2 * i] = low_of(pairs[i]), x[2 * i + 1] = high_of(pairs[i]);
}
__device__ __forceinline__ void put(u16* to, const float (&y)[8]) {
  *(uint4*)to = make_uint4(packed(y[0], y[1]), packed(y[2], y[3]), packed(y[4], y[5]), packed(y[6], y[7]));
}

#if ROUNDED
typedef unsigned char decoded_t;
// Two numbers of 8 bits.
__device__ __forceinline__ u32 eighths(float low, float high) {
  u16 y;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(y) : "f"(high), "f"(low));
  return y;
}
#else
typedef u16 decoded_t;
#endif

// Eight numbers into shared memory, beside what the thread does; `copies_are_there` waits for all.
__device__ __forceinline__ void copy(u16* to, const u16* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"((u32)__cvta_generic_to_shared(to)), "l"(from) : "memory");
}
__device__ __forceinline__ void copies_are_there() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// Where a token lies: its world, its latent there, and its slot in that.
struct Spot {
  int world, latent, slot;

  // Slot n of all, of latents with S slots and worlds with T latents.
  __device__ __forceinline__ static Spot of(int n, int S, int T) {
    const int bt = n / S;
    return {bt / T, bt % T, n % S};
  }
  __device__ __forceinline__ void next(int S, int T) {
    if (++slot < S) return;
    slot = 0;
    if (++latent == T) latent = 0, ++world;
  }
};

// Cosines and sines of the groups that are turned: by slot, by token and by latent.
struct Tables { const float *space_cos, *space_sin, *surface_cos, *surface_sin, *time_cos, *time_sin; };

constexpr int SURFACE_AT = CAMERA + SPACE, TIME_AT = SURFACE_AT + SURFACE;
// Four channels side by side are turned with four side by side.
constexpr bool QUADS = CAMERA % 4 == 0 && SPACE % 8 == 0 && SURFACE % 8 == 0 && TIME % 8 == 0;

// How far from channel d lies the one that it is turned with.
__device__ __forceinline__ int partner_of(int d) {
  const int start = d < SURFACE_AT ? CAMERA : d < TIME_AT ? SURFACE_AT : TIME_AT;
  const int pairs = (d < SURFACE_AT ? SPACE : d < TIME_AT ? SURFACE : TIME) / 2;
  return d - start < pairs ? pairs : -pairs;
}

// How the token in slot n of all turns channel d: cosine, and sine with its sign.
__device__ __forceinline__ float2 turn_of(int d, int n, Spot spot, Tables tables) {
  const float *cos = nullptr, *sin = nullptr;
  int start = 0, pairs = 1, row = 0;
  if (d >= CAMERA && d < SURFACE_AT)
    cos = tables.space_cos, sin = tables.space_sin, start = CAMERA, pairs = SPACE / 2, row = spot.slot;
  else if (d >= SURFACE_AT && d < TIME_AT && TURNED)
    cos = tables.surface_cos, sin = tables.surface_sin, start = SURFACE_AT, pairs = SURFACE / 2, row = n;
  else if (d >= TIME_AT)
    cos = tables.time_cos, sin = tables.time_sin, start = TIME_AT, pairs = TIME / 2, row = spot.latent;
  if (cos == nullptr) return {1.f, 0.f};
  const int at = row * pairs + (d - start) % pairs;
  return {cos[at], d - start < pairs ? sin[at] : -sin[at]};
}

// What a program has of a token in shared memory beside its heads: cosines and sines of all channels, the
// first fours of all chunks and then the second ones, so that threads beside each other read side by side.
struct alignas(16) Turns {
  float cos[D], sin[D];
  __device__ __forceinline__ static int place(int d) { return d / 4 % 2 * (D / 2) + d / 8 * 4 + d % 4; }
};
// Those of a chunk.
struct Turn {
  float cos[8], sin[8];
  __device__ __forceinline__ Turn(const Turns& of, int c) {
#pragma unroll
    for (int quad = 0; quad < 2; ++quad) {
      const float4 x = *(const float4*)(of.cos + quad * (D / 2) + 4 * c), y = *(const float4*)(of.sin + quad * (D / 2) + 4 * c);
      cos[4 * quad] = x.x, cos[4 * quad + 1] = x.y, cos[4 * quad + 2] = x.z, cos[4 * quad + 3] = x.w;
      sin[4 * quad] = y.x, sin[4 * quad + 1] = y.y, sin[4 * quad + 2] = y.z, sin[4 * quad + 3] = y.w;
    }
  }
};

// Four channels multiplied by a matrix, or by its transpose (ACROSS).
template <bool ACROSS> __device__ __forceinline__ void through(float* y, const float* x, const float* matrix) {
  const float4* rows = (const float4*)matrix;
  const float4 m[4] = {rows[0], rows[1], rows[2], rows[3]};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    y[i] = 0;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const float4 row = m[ACROSS ? j : i];
      const int at = ACROSS ? i : j;
      y[i] += (at == 0 ? row.x : at == 1 ? row.y : at == 2 ? row.z : row.w) * x[j];
    }
  }
}

// Eight channels of one head, all of them for the matrix.
template <bool ACROSS> __device__ __forceinline__ void seen(float (&y)[8], const u16* head, const float* matrix, int c) {
  float x[8];
  unpack(x, head + 8 * c);
  through<ACROSS>(y, x, matrix), through<ACROSS>(y + 4, x + 4, matrix);
}

// Eight channels that are turned, or turned back (BACK), those of the time group only with WITH_TIME; the
// first four may be for the matrix.
template <bool ACROSS, bool BACK, bool WITH_TIME>
__device__ __forceinline__ void turned(float (&y)[8], const u16* head, const Turns& turns, const float* matrix, int c) {
  const Turn turn(turns, c);
  float x[8];
  unpack(x, head + 8 * c);
#pragma unroll
  for (int quad = 0; quad < 8; quad += 4) {
    const int d = 8 * c + quad;
    if (CAMERA % 8 && d < CAMERA) {
      through<ACROSS>(y + quad, x + quad, matrix);
      continue;
    }
    float other[4];
    if (QUADS) {
      const uint2 pair = *(const uint2*)(head + d + partner_of(d));
      other[0] = low_of(pair.x), other[1] = high_of(pair.x), other[2] = low_of(pair.y), other[3] = high_of(pair.y);
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) other[i] = wide(head[d + i + partner_of(d + i)]);
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float by = other[i] * turn.sin[quad + i], own = x[quad + i];
      y[quad + i] = !WITH_TIME && d + i >= TIME_AT ? own : own * turn.cos[quad + i] + (BACK ? -by : by);
    }
  }
}

// Item x of a program's.
struct Item {
  int token, h, c;
  bool turns;

  __device__ __forceinline__ explicit Item(int x) : c(x % CHUNKS) {
    const int row = x / CHUNKS;
    h = HEADS_LAST ? row % H : row / TOKENS, token = HEADS_LAST ? row / H : row % TOKENS;
    turns = OF_MATRIX == 0 || c >= OF_MATRIX;
  }
};

// A chunk of one head, of either kind.
template <bool ACROSS, bool BACK, bool WITH_TIME> __device__ __forceinline__ void coded(
    float (&y)[8], const u16* head, const Turns& turns, const float* matrix, Item item) {
  if (item.turns) turned<ACROSS, BACK, WITH_TIME>(y, head, turns, matrix, item.c);
  else seen<ACROSS>(y, head, matrix, item.c);
}

// Rotations and matrices of a program's tokens, once for all heads; `slot` tells that of each, of all latents'.
template <class Slot> __device__ __forceinline__ void prepare(
    Turns* turns, int there, int S, int T, Tables tables, Slot slot) {
  for (int x = threadIdx.x; x < there * D; x += THREADS) {
    const int token = x / D, d = x % D, n = slot(token);
    const float2 turn = turn_of(d, n, Spot::of(n, S, T), tables);
    turns[token].cos[Turns::place(d)] = turn.x, turns[token].sin[Turns::place(d)] = turn.y;
  }
}
__device__ __forceinline__ void prepare(float* to, int n0, int there, int each, const float* matrix) {
  for (int x = threadIdx.x; x < there * 16; x += THREADS) to[x] = matrix[(n0 + x / 16) / each * 16 + x % 16];
}

// Keys and values may have room for more latents a head, `latents` in all, and places there that SLOTTED
// `slots` tell; everything else has T. Latents have S slots, N in all; PACKED: and `tokens` tokens in `qkv`, of
// which `source` says the one for each slot.
extern "C" __global__ void __launch_bounds__(THREADS, LOCAL ? 4 : 5) encode(
    const u16* __restrict__ qkv, const float* __restrict__ gains, const float* __restrict__ query_matrix,
    const float* __restrict__ key_matrix, const float* space_cos, const float* space_sin, const float* surface_cos,
    const float* surface_sin, const float* time_cos, const float* time_sin, u16* __restrict__ q, u16* __restrict__ k,
    u16* __restrict__ v, u16* __restrict__ local_q, u16* __restrict__ local_k,
    const long long* __restrict__ slots, const long long* __restrict__ source, int N, int T, int S, int tokens,
    int latents, float eps, float query_factor) {
  extern __shared__ __align__(16) char raw[];
  u16* const own = (u16*)raw;  // token, then queries, keys or values, then head
  Turns* const turns = (Turns*)(own + 3 * TOKENS * ROW);
  float* const of_queries = (float*)(turns + TOKENS);
  float* const of_keys = of_queries + TOKENS * 16;
  float* const sizes = of_keys + TOKENS * 16;  // token, then queries or keys, then head
  const int n0 = blockIdx.x * TOKENS, there = min(TOKENS, N - n0);

  Spot spot = Spot::of(n0, S, T);
  long long from[TOKENS], to_own[TOKENS], to_room[TOKENS];
#pragma unroll
  for (int token = 0; token < TOKENS; ++token) {
    const long long bt = (long long)spot.world * T + spot.latent;
    const long long latent = SLOTTED ? slots[spot.latent] : spot.latent;
    from[token] = PACKED ? bt * tokens + source[spot.slot] : bt * S + spot.slot;
    to_own[token] = HEADS_LAST ? (bt * S + spot.slot) * ROW : (((long long)spot.world * H * T + spot.latent) * S + spot.slot) * D;
    to_room[token] = HEADS_LAST ? to_own[token] : (((long long)spot.world * H * latents + latent) * S + spot.slot) * D;
    if (token + 1 < there) spot.next(S, T);
  }
#pragma unroll
  for (int token = 0; token < TOKENS; ++token)
    for (int x = threadIdx.x; x < 3 * H * CHUNKS && token < there; x += THREADS)
      copy(own + token * 3 * ROW + 8 * x, qkv + from[token] * 3 * ROW + 8 * x);
  prepare(turns, there, S, T, Tables{space_cos, space_sin, surface_cos, surface_sin, time_cos, time_sin},
          [&](int token) { return n0 + token; });
  if (CAMERA) prepare(of_queries, n0, there, S, query_matrix), prepare(of_keys, n0, there, S, key_matrix);
  copies_are_there();
  __syncthreads();
  if (NORMED) {
    // Two threads for each head of queries and keys.
    for (int x = threadIdx.x; x < (4 * TOKENS * H + 31) / 32 * 32; x += THREADS) {
      const int row = min(x / 2, 2 * TOKENS * H - 1), half = x % 2;
      const u16* const head = own + (row / (2 * H) * 3 * H + row % (2 * H)) * D;
      float sum = 0;
#pragma unroll
      for (int c = 0; c < (CHUNKS + 1) / 2; ++c) {
        if (2 * c + half >= CHUNKS) continue;
        float y[8];
        unpack(y, head + 8 * (2 * c + half));
#pragma unroll
        for (int i = 0; i < 8; ++i) sum += y[i] * y[i];
      }
      sum += __shfl_xor_sync(~0u, sum, 1);
      if (half == 0) sizes[row] = rsqrtf(sum / D + eps) * gains[row % (2 * H)];
    }
    __syncthreads();
  }

  const long long step = HEADS_LAST ? D : (long long)T * S * D, room_step = HEADS_LAST ? D : (long long)latents * S * D;
  for (int x = threadIdx.x; x < ITEMS; x += THREADS) {
    const Item item(x);
    const int token = item.token, h = item.h, c = item.c;
    if (token >= there) continue;
    long long to = 0, roomy = 0;
#pragma unroll
    for (int i = 0; i < TOKENS; ++i)
      if (token == i) to = to_own[i], roomy = to_room[i];
    to += h * step + 8 * c, roomy += h * room_step + 8 * c;
    const u16* const head = own + (token * 3 * H + h) * D;
    const float* const size = sizes + token * 2 * H + h;
    const float of_query = (NORMED ? size[0] : 1.f) * query_factor, of_key = NORMED ? size[H] : 1.f;
    const float *const queries = of_queries + token * 16, *const keys = of_keys + token * 16;
    const auto write = [](u16* out, float (&y)[8], float by) {
#pragma unroll
      for (int i = 0; i < 8; ++i) y[i] *= by;
      put(out, y);
    };
    const Turns& turn = turns[token];
    float y[8];
    coded<true, false, TIMED>(y, head, turn, queries, item);
    write(q + to, y, of_query);
    coded<false, false, TIMED>(y, head + ROW, turn, keys, item);
    write(k + roomy, y, of_key);
    if (VALUES) {
      coded<false, false, false>(y, head + 2 * ROW, turn, keys, item);
      put(v + roomy, y);
    } else {
      *(uint4*)(v + roomy) = *(const uint4*)(head + 2 * ROW + 8 * c);
    }
    if (LOCAL) {
      coded<true, false, true>(y, head, turn, queries, item);
      write(local_q + to, y, of_query);
      coded<false, false, true>(y, head + ROW, turn, keys, item);
      write(local_k + to, y, of_key);
    }
  }
}

// Of N tokens; PACKED: `kept` says the slot of each of a latent's `tokens`, which are fewer than S.
extern "C" __global__ void __launch_bounds__(THREADS, 5) decode(
    const u16* __restrict__ local, const u16* __restrict__ far, const u16* __restrict__ gate, const float* __restrict__ matrix,
    const float* space_cos, const float* space_sin, const float* surface_cos, const float* surface_sin,
    decoded_t* __restrict__ out, float* __restrict__ scale, const long long* __restrict__ kept, int N, int T, int S,
    int tokens) {
  extern __shared__ __align__(16) char raw[];
  u16* const own = (u16*)raw;
  u16* const other = own + TOKENS * ROW;
  u16* const ready = other + (GATED ? TOKENS * ROW : 0);  // what is decoded, before it is rounded
  Turns* const turns = (Turns*)(ready + (ROUNDED ? TOKENS * ROW : 0));
  float* const matrices = (float*)(turns + TOKENS);
  const int n0 = blockIdx.x * TOKENS, there = min(TOKENS, N - n0);

  // Of the latents' tokens, not slots.
  Spot spot = Spot::of(n0, tokens, T);
  int slots[TOKENS];  // of all latents'
  long long from[TOKENS];
#pragma unroll
  for (int token = 0; token < TOKENS; ++token) {
    const int slot = PACKED ? (int)kept[spot.slot] : spot.slot;
    slots[token] = (spot.world * T + spot.latent) * S + slot;
    from[token] = (((long long)spot.world * H * T + spot.latent) * S + slot) * D;
    if (token + 1 < there) spot.next(tokens, T);
  }
#pragma unroll
  for (int token = 0; token < TOKENS; ++token)
    for (int x = threadIdx.x; x < H * CHUNKS && token < there; x += THREADS) {
      const long long at = from[token] + (long long)(x / CHUNKS) * T * S * D + 8 * (x % CHUNKS);
      copy(own + token * ROW + 8 * x, local + at);
      if (GATED) copy(other + token * ROW + 8 * x, far + at);
    }
  prepare(turns, there, S, T, Tables{space_cos, space_sin, surface_cos, surface_sin, nullptr, nullptr}, [&](int token) {
    int n = 0;
#pragma unroll
    for (int i = 0; i < TOKENS; ++i)
      if (token == i) n = slots[i];
    return n;
  });
  if (CAMERA) prepare(matrices, n0, there, tokens, matrix);
  copies_are_there();
  __syncthreads();

  for (int x = threadIdx.x; x < ITEMS; x += THREADS) {
    const Item item(x);
    const int token = item.token, h = item.h, c = item.c, at = token * ROW + h * D;
    if (token >= there) continue;
    const long long nh = (long long)(n0 + token) * H + h, to = nh * D + 8 * c;
    const float* const of_token = matrices + token * 16;
    const Turns& turn = turns[token];
    float y[8], z[8], open[8];
    coded<false, true, false>(y, own + at, turn, of_token, item);
    if (GATED) {
      coded<false, true, false>(z, other + at, turn, of_token, item);
      if (!PER_HEAD) unpack(open, gate + to);
      const float of_head = PER_HEAD ? wide(gate[nh]) : 0;
#pragma unroll
      for (int i = 0; i < 8; ++i) y[i] += __fdividef(z[i], 1.f + __expf(-(PER_HEAD ? of_head : open[i])));
    }
#if ROUNDED
    put(ready + at + 8 * c, y);
#else
    put(out + to, y);
#endif
  }
#if ROUNDED
  __syncthreads();
  // Some warps for each token: its largest number, then all in 8 bits, as `fp8_rows` rounds them.
  constexpr int EACH = THREADS / 32 / TOKENS, WIDTH = H * CHUNKS;
  float* const largest = (float*)turns;  // of each warp; nobody turns any more
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, token = warp / EACH, n = n0 + token;
  const bool rounds = token < there;
  const u16* const row = ready + token * ROW;
  float most = LEAST;
  if (rounds)
    for (int c = warp % EACH * 32 + lane; c < WIDTH; c += 32 * EACH) {
      float y[8];
      unpack(y, row + 8 * c);
#pragma unroll
      for (int i = 0; i < 8; ++i) most = fmaxf(most, fabsf(y[i]));
    }
#pragma unroll
  for (int far = 16; far; far /= 2) most = fmaxf(most, __shfl_xor_sync(~0u, most, far));
  if (lane == 0) largest[warp] = most;
  __syncthreads();
  if (!rounds) return;
  for (int i = 0; i < EACH; ++i) most = fmaxf(most, largest[token * EACH + i]);
  const float by = LARGEST / most;
  for (int c = warp % EACH * 32 + lane; c < WIDTH; c += 32 * EACH) {
    float y[8];
    unpack(y, row + 8 * c);
    u32 quads[2];
#pragma unroll
    for (int i = 0; i < 2; ++i)
      quads[i] = eighths(y[4 * i] * by, y[4 * i + 1] * by) | eighths(y[4 * i + 2] * by, y[4 * i + 3] * by) << 16;
    *(uint2*)(out + (long long)n * ROW + 8 * c) = make_uint2(quads[0], quads[1]);
  }
  if (warp % EACH == 0 && lane == 0) scale[n] = most * (1.f / LARGEST);
#endif
}
