// What the compilers for hosts and for devices spell differently.
#pragma once

#if defined(__CUDACC__) || defined(__HIPCC__)
#define LAYCA_HOST_DEVICE __host__ __device__
#else
#define LAYCA_HOST_DEVICE
#endif

// LAYCA_COLD: for what hardly ever runs, compiled to be small.
#if defined(__GNUC__) || defined(__clang__)
#define LAYCA_NOINLINE __attribute__((noinline))
#define LAYCA_COLD __attribute__((noinline, cold))
#elif defined(_MSC_VER)
#define LAYCA_NOINLINE __declspec(noinline)
#define LAYCA_COLD __declspec(noinline)
#else
#define LAYCA_NOINLINE
#define LAYCA_COLD
#endif

// The formulas must be inlined into the kernel that calls them: that is where they are vectorised, for the
// instruction set that the kernel is compiled for.
#if defined(__GNUC__) || defined(__clang__)
#define LAYCA_INLINE LAYCA_HOST_DEVICE inline __attribute__((always_inline))
#elif defined(_MSC_VER)
#define LAYCA_INLINE LAYCA_HOST_DEVICE __forceinline
#else
#define LAYCA_INLINE LAYCA_HOST_DEVICE inline
#endif

#ifdef __CUDACC__
#define LAYCA_UNROLL _Pragma("unroll")
#else
#define LAYCA_UNROLL
#endif
