// CUDA C++ for the host's compiler: a thread of the system for each of a program's, programs one after
// the other. What kernels without Hopper's tensor cores need of the language, and no more.
#include <algorithm>
#include <barrier>
#include <cmath>
#include <cstring>
#include <memory>
#include <thread>
#include <vector>

using std::max;
using std::min;

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __restrict__
#define __constant__

struct float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct uint2 { unsigned x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

struct Index { int x; };
static thread_local Index threadIdx, blockIdx;
static Index gridDim;

// A program's shared memory, and a guard behind it.
static std::vector<char> shared_memory;
static char* shared() { return (char*)((unsigned long long)(shared_memory.data() + 63) / 64 * 64); }

static std::unique_ptr<std::barrier<>> program;
static std::vector<std::unique_ptr<std::barrier<>>> warps;
static struct { alignas(8) char bytes[32]; } told[64][32];
inline void __syncthreads() { program->arrive_and_wait(); }
inline void warp_sync() { warps[threadIdx.x / 32]->arrive_and_wait(); }

// Hands `x` to the others of the warp, and gives what `take` makes of theirs.
template <class T, class Take> auto exchanged(T x, Take take) {
  static_assert(sizeof x <= sizeof told[0][0]);
  auto* const of_warp = told[threadIdx.x / 32];
  std::memcpy(of_warp + threadIdx.x % 32, &x, sizeof x);
  warp_sync();
  auto found = take([&](int lane) {
    T y;
    std::memcpy(&y, of_warp + lane, sizeof y);
    return y;
  });
  warp_sync();
  return found;
}
template <class T> T __shfl_up_sync(unsigned, T x, int far) {
  const int lane = threadIdx.x % 32;
  return exchanged(x, [&](auto of) { return of(lane >= far ? lane - far : lane); });
}
template <class T> T __shfl_xor_sync(unsigned, T x, int far) {
  return exchanged(x, [&](auto of) { return of(threadIdx.x % 32 ^ far); });
}
inline unsigned __ballot_sync(unsigned, bool x) {
  return exchanged(x, [](auto of) {
    unsigned votes = 0;
    for (int i = 0; i < 32; ++i) votes |= (unsigned)of(i) << i;
    return votes;
  });
}
inline int __reduce_add_sync(unsigned, int x) {
  return exchanged(x, [](auto of) {
    int sum = 0;
    for (int i = 0; i < 32; ++i) sum += of(i);
    return sum;
  });
}
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline float __expf(float x) { return std::exp(x); }
inline float __fdividef(float x, float y) { return x / y; }
inline float rsqrtf(float x) { return 1 / std::sqrt(x); }
template <class T> T of_bits(auto x) {
  T y;
  std::memcpy(&y, &x, sizeof y);
  return y;
}
inline int __float_as_int(float x) { return of_bits<int>(x); }
inline float __int_as_float(int x) { return of_bits<float>(x); }
template <class T> T atomicAdd(T* at, int x) { return __atomic_fetch_add(at, (T)x, __ATOMIC_SEQ_CST); }

// `cvt.rna.tf32.f32`, and the product of 16 x 8 with 8 x 8 numbers of that kind.
inline unsigned tf32(float x) { return of_bits<unsigned>(x) + 0x1000 & ~0x1fffu; }
inline void multiplied(float (&sums)[4], const unsigned (&left)[4], unsigned first, unsigned second) {
  struct Held { unsigned left[4], right[2]; };
  const int lane = threadIdx.x % 32;
  const Held own = {{left[0], left[1], left[2], left[3]}, {first, second}};
  exchanged(own, [&](auto of) {
    for (int i = 0; i < 4; ++i)
      for (int k = 0; k < 8; ++k) {
        const unsigned x = of(lane / 4 * 4 + k % 4).left[i / 2 + k / 4 * 2];
        const unsigned y = of((lane % 4 * 2 + i % 2) * 4 + k % 4).right[k / 4];
        sums[i] += of_bits<float>(x) * of_bits<float>(y);
      }
    return 0;
  });
}

// `numbers_cuda`, of bfloat16.
typedef unsigned int u32;
typedef unsigned long long u64;
typedef unsigned short u16;
inline float wide(u16 x) { return of_bits<float>((u32)x << 16); }
inline float wide(float x) { return x; }
inline u16 narrow(float x) {
  const u32 bits = of_bits<u32>(x);
  return bits + 0x7fff + (bits >> 16 & 1) >> 16;
}
inline u32 packed(float low, float high) { return narrow(low) | (u32)narrow(high) << 16; }
inline float low_of(u32 x) { return wide((u16)x); }
inline float high_of(u32 x) { return wide((u16)(x >> 16)); }

// What `cvt.rn.satfinite.e4m3x2.f32` makes of a number.
inline u32 eighth(float x) {
  const float size = std::fabs(x);
  int code = 0x7e;
  if (size < 448) {
    int exponent = max(std::ilogb(size), -6);
    const int steps = (int)std::nearbyint(std::scalbn(size, 3 - exponent));  // of an eighth of the power of two
    code = min(steps + (exponent + 6) * 8, 0x7e);
  }
  return code | (std::signbit(x) ? 0x80 : 0);
}

// Runs `kernel` in so many programs. Returns whether no thread wrote beyond the shared memory.
template <class Kernel> bool launch(int programs, int threads, int bytes, Kernel kernel) {
  constexpr int GUARD = 256;
  shared_memory.assign(bytes + GUARD + 64, 0x55);
  gridDim.x = programs;
  program = std::make_unique<std::barrier<>>(threads);
  warps.clear();
  for (int i = 0; i < threads / 32; ++i) warps.push_back(std::make_unique<std::barrier<>>(32));
  std::vector<std::thread> all;
  for (int i = 0; i < threads; ++i)
    all.emplace_back([=] {
      threadIdx.x = i;
      for (int n = 0; n < programs; ++n) {
        blockIdx.x = n;
        kernel();
        program->arrive_and_wait();
      }
    });
  for (auto& one : all) one.join();
  return std::all_of(shared() + bytes, shared() + bytes + GUARD, [](char x) { return x == 0x55; });
}
