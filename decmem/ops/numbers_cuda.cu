// 16-bit numbers: bfloat16, or float16 with HALF.

typedef unsigned int u32;
typedef unsigned long long u64;
typedef unsigned short u16;

__device__ __forceinline__ float wide(u16 x) {
  float y;
#if HALF
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x));
#else
  asm("{.reg .b16 z; mov.b16 z, 0; mov.b32 %0, {z, %1};}" : "=f"(y) : "h"(x));
#endif
  return y;
}
__device__ __forceinline__ float wide(float x) { return x; }
__device__ __forceinline__ u32 packed(float low, float high) {
  u32 y;
#if HALF
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
#else
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
#endif
  return y;
}
// The halves of a pair.
__device__ __forceinline__ float low_of(u32 x) {
#if HALF
  return wide((u16)x);
#else
  return __int_as_float(x << 16);
#endif
}
__device__ __forceinline__ float high_of(u32 x) {
#if HALF
  return wide((u16)(x >> 16));
#else
  return __int_as_float(x & 0xffff0000);
#endif
}
