// `encode_heads` and `decode_heads` for 16-bit numbers; what is computed and the names: `coding_kernels`.
// A program takes TOKENS tokens with all their heads through shared memory, 16 bytes at a time: heads
// lie far apart on one side and side by side on the other.
//
// Defined in front of this text: D, CAMERA, SPACE, SURFACE, TIME (a head's channels), TURNED, TOKENS,
// THREADS, HALF for float16; NORMED, TIMED, LOCAL, VALUES, HEADS_LAST and SLOTTED of the encoding; PACKED, where slots
// are more than tokens; GATED,
// PER_HEAD and ROUNDED of the decoding.

constexpr int CHUNKS = D / 8;
extern "C" __constant__ int shared_bytes = 0;  // all of it is asked for at the launch

__device__ __forceinline__ void unpack(float (&x)[8], const u16* from) {
  const uint4 chunk = *(const uint4*)from;
  const u32 pairs[4] = {chunk.x, chunk.y, chunk.z, chunk.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) x[2 * i] = wide((u16)pairs[i]), x[2 * i + 1] = wide((u16)(pairs[i] >> 16));
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

// How a token turns channel d: cosine, and sine with its sign.
__device__ __forceinline__ float2 turn_of(int d, int n, int s, int t, Tables tables) {
  const float *cos = nullptr, *sin = nullptr;
  int start = 0, pairs = 1, row = 0;
  if (d >= CAMERA && d < SURFACE_AT)
    cos = tables.space_cos, sin = tables.space_sin, start = CAMERA, pairs = SPACE / 2, row = s;
  else if (d >= SURFACE_AT && d < TIME_AT && TURNED)
    cos = tables.surface_cos, sin = tables.surface_sin, start = SURFACE_AT, pairs = SURFACE / 2, row = n;
  else if (d >= TIME_AT)
    cos = tables.time_cos, sin = tables.time_sin, start = TIME_AT, pairs = TIME / 2, row = t;
  if (cos == nullptr) return {1.f, 0.f};
  const int at = row * pairs + (d - start) % pairs;
  return {cos[at], d - start < pairs ? sin[at] : -sin[at]};
}

// What a program has of a token in shared memory beside its heads: cosines and sines of all channels.
struct alignas(16) Turns { float cos[D], sin[D]; };

// Eight channels of one head: multiplied by the matrix, or by its transpose (ACROSS), and turned, or
// turned back (BACK); the time group only with WITH_TIME.
template <bool ACROSS, bool BACK, bool WITH_TIME>
__device__ __forceinline__ void coded(float (&y)[8], const u16* head, const Turns& turns, const float* matrix, int c) {
  float x[8];
  unpack(x, head + 8 * c);
#pragma unroll
  for (int quad = 0; quad < 8; quad += 4) {
    const int d = 8 * c + quad;
    if (d < CAMERA) {
      const float4* rows = (const float4*)matrix;
      const float4 m[4] = {rows[0], rows[1], rows[2], rows[3]};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        y[quad + i] = 0;
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const float4 row = m[ACROSS ? j : i];
          const int at = ACROSS ? i : j;
          y[quad + i] += (at == 0 ? row.x : at == 1 ? row.y : at == 2 ? row.z : row.w) * x[quad + j];
        }
      }
    } else if (!WITH_TIME && d >= TIME_AT) {
#pragma unroll
      for (int i = 0; i < 4; ++i) y[quad + i] = x[quad + i];
    } else {
      const float4 cos4 = *(const float4*)(turns.cos + d), sin4 = *(const float4*)(turns.sin + d);
      const float cos[4] = {cos4.x, cos4.y, cos4.z, cos4.w}, sin[4] = {sin4.x, sin4.y, sin4.z, sin4.w};
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
        const float turned = other[i] * sin[i];
        const bool as_it_is = !QUADS && !WITH_TIME && d + i >= TIME_AT;
        y[quad + i] = as_it_is ? x[quad + i] : x[quad + i] * cos[i] + (BACK ? -turned : turned);
      }
    }
  }
}

__device__ __forceinline__ void put(u16* to, const float (&y)[8]) {
  *(uint4*)to = make_uint4(packed(y[0], y[1]), packed(y[2], y[3]), packed(y[4], y[5]), packed(y[6], y[7]));
}

// Where head h of token n lies if heads come first, with room for `latents` latents a head: its latent in
// its own place, or in that which `slots` tell.
__device__ __forceinline__ long long place_of(
    int n, int h, int T, int S, int H, int latents, const long long* __restrict__ slots = nullptr) {
  const int bt = n / S;
  const long long latent = slots == nullptr ? bt % T : slots[bt % T];
  return ((((long long)(bt / T) * H + h) * latents + latent) * S + n % S) * D;
}

// Rotations and matrices of a program's tokens, once for all heads; `place` gives the slot of one.
template <class Place>
__device__ __forceinline__ void prepare(Turns* turns, int n0, int N, int T, int S, Tables tables, Place place) {
  for (int x = threadIdx.x; x < TOKENS * D; x += THREADS) {
    const int token = x / D, d = x % D;
    if (n0 + token >= N) continue;
    const int n = place(n0 + token);
    const float2 turn = turn_of(d, n, n % S, n / S % T, tables);
    turns[token].cos[d] = turn.x, turns[token].sin[d] = turn.y;
  }
}
__device__ __forceinline__ void prepare(float* to, int n0, int N, int S, const float* matrix) {
  for (int x = threadIdx.x; x < TOKENS * 16; x += THREADS)
    if (n0 + x / 16 < N) to[x] = matrix[(n0 + x / 16) / S * 16 + x % 16];
}

// Keys and values may have room for more latents a head, `latents` in all, and places there that SLOTTED
// `slots` tell; everything else has T. Latents have S slots, N in all; PACKED: and `tokens` tokens in `qkv`, of
// which `source` says the one for each slot.
extern "C" __global__ void __launch_bounds__(THREADS) encode(
    const u16* __restrict__ qkv, const float* __restrict__ gains, const float* __restrict__ query_matrix,
    const float* __restrict__ key_matrix, const float* space_cos, const float* space_sin, const float* surface_cos,
    const float* surface_sin, const float* time_cos, const float* time_sin, u16* __restrict__ q, u16* __restrict__ k,
    u16* __restrict__ v, u16* __restrict__ local_q, u16* __restrict__ local_k,
    const long long* __restrict__ slots, const long long* __restrict__ source, int N, int T, int S, int tokens, int H,
    int latents, float eps, float query_factor) {
  extern __shared__ __align__(16) char raw[];
  const int rows = TOKENS * H;
  u16* const own = (u16*)raw;  // token, then queries, keys or values, then head
  Turns* const turns = (Turns*)(own + 3 * rows * D);
  float* const of_queries = (float*)(turns + TOKENS);
  float* const of_keys = of_queries + TOKENS * 16;
  float* const sizes = of_keys + TOKENS * 16;  // of queries and keys, in the same order
  const int n0 = blockIdx.x * TOKENS;

  const int each = 3 * H * CHUNKS, chunks = min(TOKENS, N - n0) * each;
  for (int x = threadIdx.x; x < chunks; x += THREADS) {
    const int n = n0 + x / each;
    const long long row = PACKED ? (long long)(n / S) * tokens + source[n % S] : n;
    copy(own + 8 * x, qkv + row * 3 * H * D + 8 * (x % each));
  }
  prepare(turns, n0, N, T, S, Tables{space_cos, space_sin, surface_cos, surface_sin, time_cos, time_sin}, [](int n) { return n; });
  if (CAMERA) prepare(of_queries, n0, N, S, query_matrix), prepare(of_keys, n0, N, S, key_matrix);
  copies_are_there();
  __syncthreads();
  if (NORMED) {
    for (int x = threadIdx.x; x < 2 * rows; x += THREADS) {
      const u16* head = own + (x / (2 * H) * 3 * H + x % (2 * H)) * D;
      float sum = 0;
      for (int c = 0; c < CHUNKS; ++c) {
        float y[8];
        unpack(y, head + 8 * c);
#pragma unroll
        for (int i = 0; i < 8; ++i) sum += y[i] * y[i];
      }
      sizes[x] = rsqrtf(sum / D + eps) * gains[x % (2 * H)];
    }
    __syncthreads();
  }

  for (int x = threadIdx.x; x < rows * CHUNKS; x += THREADS) {
    const int c = x % CHUNKS, row = x / CHUNKS;
    const int token = HEADS_LAST ? row / H : row % TOKENS, h = HEADS_LAST ? row % H : row / TOKENS, n = n0 + token;
    if (n >= N) continue;
    const long long to = (HEADS_LAST ? ((long long)n * H + h) * D : place_of(n, h, T, S, H, T)) + 8 * c;
    const long long roomy = HEADS_LAST ? to : place_of(n, h, T, S, H, latents, SLOTTED ? slots : nullptr) + 8 * c;
    const Turns& turn = turns[token];
#pragma unroll
    for (int part = 0; part < 3; ++part) {
      const long long at = part == 0 ? to : roomy;
      const u16* const head = own + (token * 3 * H + part * H + h) * D;
      const float size =
          (NORMED && part < 2 ? sizes[token * 2 * H + part * H + h] : 1.f) * (part == 0 ? query_factor : 1.f);
      u16* const out = part == 0 ? q : part == 1 ? k : v;
      if (part == 2 && !VALUES) {
        *(uint4*)(out + at) = *(const uint4*)(head + 8 * c);
        continue;
      }
      float y[8];
      if (part == 0) coded<true, false, TIMED>(y, head, turn, of_queries + token * 16, c);
      else if (part == 1) coded<false, false, TIMED>(y, head, turn, of_keys + token * 16, c);
      else coded<false, false, false>(y, head, turn, of_keys + token * 16, c);
#pragma unroll
      for (int i = 0; i < 8; ++i) y[i] *= size;
      put(out + at, y);
      if (LOCAL && part < 2) {
        if (part == 0) coded<true, false, true>(y, head, turn, of_queries + token * 16, c);
        else coded<false, false, true>(y, head, turn, of_keys + token * 16, c);
#pragma unroll
        for (int i = 0; i < 8; ++i) y[i] *= size;
        put((part == 0 ? local_q : local_k) + to, y);
      }
    }
  }
}

// The slot of token n, of all latents'.
__device__ __forceinline__ int slot_of(int n, int S, int tokens, const long long* __restrict__ kept) {
  return PACKED ? n / tokens * S + (int)kept[n % tokens] : n;
}

// Of N tokens; PACKED: `kept` says the slot of each of a latent's `tokens`, which are fewer than S.
extern "C" __global__ void __launch_bounds__(THREADS) decode(
    const u16* __restrict__ local, const u16* __restrict__ far, const u16* __restrict__ gate, const float* __restrict__ matrix,
    const float* space_cos, const float* space_sin, const float* surface_cos, const float* surface_sin,
    decoded_t* __restrict__ out, float* __restrict__ scale, const long long* __restrict__ kept, int N, int T, int S,
    int tokens, int H) {
  extern __shared__ __align__(16) char raw[];
  const int rows = TOKENS * H;
  u16* const own = (u16*)raw;
  u16* const other = own + rows * D;
  u16* const ready = other + (GATED ? rows * D : 0);  // what is decoded, before it is rounded
  Turns* const turns = (Turns*)(ready + (ROUNDED ? rows * D : 0));
  float* const matrices = (float*)(turns + TOKENS);
  const int n0 = blockIdx.x * TOKENS;

  for (int x = threadIdx.x; x < rows * CHUNKS; x += THREADS) {
    const int h = x / (TOKENS * CHUNKS), token = x / CHUNKS % TOKENS, c = x % CHUNKS, n = n0 + token;
    if (n >= N) continue;
    const int to = (token * H + h) * D + 8 * c;
    const long long from = place_of(slot_of(n, S, tokens, kept), h, T, S, H, T) + 8 * c;
    copy(own + to, local + from);
    if (GATED) copy(other + to, far + from);
  }
  prepare(turns, n0, N, T, S, Tables{space_cos, space_sin, surface_cos, surface_sin, nullptr, nullptr},
          [&](int n) { return slot_of(n, S, tokens, kept); });
  if (CAMERA) prepare(matrices, n0, N, tokens, matrix);
  copies_are_there();
  __syncthreads();

  for (int x = threadIdx.x; x < rows * CHUNKS; x += THREADS) {
    const int row = x / CHUNKS, c = x % CHUNKS, token = row / H, h = row % H, n = n0 + token;
    if (n >= N) continue;
    const long long nh = (long long)n * H + h, to = nh * D + 8 * c;
    float y[8];
    coded<false, true, false>(y, own + row * D, turns[token], matrices + token * 16, c);
    if (GATED) {
      float z[8], open[8];
      coded<false, true, false>(z, other + row * D, turns[token], matrices + token * 16, c);
      if (PER_HEAD) {
#pragma unroll
        for (int i = 0; i < 8; ++i) open[i] = wide(gate[nh]);
      } else {
        unpack(open, gate + to);
      }
#pragma unroll
      for (int i = 0; i < 8; ++i) y[i] += z[i] / (1.f + __expf(-open[i]));
    }
#if ROUNDED
    put(ready + row * D + 8 * c, y);
#else
    put(out + to, y);
#endif
  }
#if ROUNDED
  __syncthreads();
  // A warp for each token: its largest number, then all in 8 bits, as `fp8_rows` rounds them.
  const int token = threadIdx.x / 32, lane = threadIdx.x % 32, n = n0 + token, width = H * CHUNKS;
  if (token >= TOKENS || n >= N) return;
  float most = LEAST;
  for (int c = lane; c < width; c += 32) {
    float y[8];
    unpack(y, ready + token * H * D + 8 * c);
#pragma unroll
    for (int i = 0; i < 8; ++i) most = fmaxf(most, fabsf(y[i]));
  }
#pragma unroll
  for (int far = 16; far; far /= 2) most = fmaxf(most, __shfl_xor_sync(~0u, most, far));
  const float by = LARGEST / most;
  for (int c = lane; c < width; c += 32) {
    float y[8];
    unpack(y, ready + token * H * D + 8 * c);
    u32 quads[2];
#pragma unroll
    for (int i = 0; i < 2; ++i)
      quads[i] = eighths(y[4 * i] * by, y[4 * i + 1] * by) | eighths(y[4 * i + 2] * by, y[4 * i + 3] * by) << 16;
    *(uint2*)(out + (long long)n * H * D + 8 * c) = make_uint2(quads[0], quads[1]);
  }
  if (lane == 0) scale[n] = most * (1.f / LARGEST);
#endif
}
