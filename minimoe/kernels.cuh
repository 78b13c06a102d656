// What the CUDA kernels of several rooms share: bfloat16, sums over a warp and over a block, tensor-core products.
//
// Conventions of every kernels.cu:
// - Letters as in minimoe/shapes.py. Scalars arrive as `Index` (Python's int) or `double` (Python's float); an array that
//   is not given is a null pointer. Real is the type that is computed in (float, or double for the truth), Stored that
//   of a weight (float, double or bfloat16).
// - A block has a multiple of 32 threads, all of which reach every barrier and every exchange within a warp.
// - No atomics: every sum has one fixed order, so that the same inputs give the same bits.
// - No header of CUDA is included: the runtime compiler (NVRTC) needs no toolkit on the machine.
#pragma once

typedef long long Index;

#ifndef CUDA_ON_CPU // the tests compile the kernels for the processor too, with a header that has these words already

enum : unsigned { ALL_LANES = 0xffffffffu }; // not a constant, which a room without exchanges would be warned not to use

// Memory of a block whose size the launcher gives (`shared=` bytes), aligned to 16 bytes.
#define DYNAMIC_SHARED(T, name)                                                                                        \
    extern __shared__ __align__(16) unsigned char dynamic_shared_memory[];                                             \
    T* name = reinterpret_cast<T*>(dynamic_shared_memory)

#define INFINITE __int_as_float(0x7f800000)

#endif

// ---- bfloat16: the upper half of a float

struct bfloat16 {
    unsigned short bits;
};

template <class T> struct Computed { // the type in which a stored type is computed
    using type = T;
};
template <> struct Computed<bfloat16> {
    using type = float;
};

__device__ inline float widen(bfloat16 x) { return __uint_as_float(static_cast<unsigned>(x.bits) << 16); }
__device__ inline float widen(float x) { return x; }
__device__ inline double widen(double x) { return x; }

// Round to nearest, ties to even; a NaN stays one.
__device__ inline bfloat16 to_bfloat16(float x) {
    unsigned bits = __float_as_uint(x);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return {static_cast<unsigned short>((bits >> 16) | 0x40u)};
    bits += 0x7fffu + ((bits >> 16) & 1u);
    return {static_cast<unsigned short>(bits >> 16)};
}

template <class T> struct Narrowed { // store a computed number as T
    template <class Real> __device__ static T from(Real x) { return static_cast<T>(x); }
};
template <> struct Narrowed<bfloat16> {
    template <class Real> __device__ static bfloat16 from(Real x) { return to_bfloat16(static_cast<float>(x)); }
};
template <class T, class Real> __device__ inline T narrow(Real x) { return Narrowed<T>::from(x); }

// x as an operand of a product with numbers stored as Stored: rounded to bfloat16 where they are (see minimoe.arrays).
template <class Stored, class Real> __device__ inline Real operand(Real x) { return widen(narrow<Stored>(x)); }

// ---- functions that CUDA names by type

__device__ inline float exponential(float x) { return expf(x); }
__device__ inline double exponential(double x) { return exp(x); }
__device__ inline float logarithm(float x) { return logf(x); }
__device__ inline double logarithm(double x) { return log(x); }
__device__ inline float hyperbolic_tangent(float x) { return tanhf(x); }
__device__ inline double hyperbolic_tangent(double x) { return tanh(x); }
__device__ inline float square_root(float x) { return sqrtf(x); }
__device__ inline double square_root(double x) { return sqrt(x); }

// z / (1 + exp(-z)) through exp(-|z|), which never overflows.
template <class Real> __device__ inline Real sigmoid(Real z) {
    Real small = exponential(z < 0 ? z : -z);
    return (z >= 0 ? Real(1) : small) / (1 + small);
}
template <class Real> __device__ inline Real silu(Real z) { return z * sigmoid(z); }

// ---- vectors of 16 bytes: one load instruction of a thread

template <class T> struct alignas(16) Pack {
    static constexpr int size = 16 / sizeof(T);
    T at[size];
};

// ---- sums and maxima: lanes exchange in five steps, so every lane ends with the same bits

template <class Real> __device__ inline Real warp_sum(Real x) {
    for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(ALL_LANES, x, step);
    return x;
}

template <class Real> __device__ inline Real warp_max(Real x) {
    for (int step = 16; step > 0; step /= 2) {
        Real other = __shfl_xor_sync(ALL_LANES, x, step);
        x = other > x ? other : x;
    }
    return x;
}

// The sum over all threads of a block (one-dimensional, at most 1024), handed to each of them.
template <class Real> __device__ inline Real block_sum(Real x) {
    __shared__ Real of_warp[32];
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
    x = warp_sum(x);
    __syncthreads(); // an earlier sum may still be read
    if (lane == 0) of_warp[warp] = x;
    __syncthreads();
    return warp_sum(lane < warps ? of_warp[lane] : Real(0));
}

template <class Real> __device__ inline Real block_max(Real x) {
    __shared__ Real of_warp[32];
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
    x = warp_max(x);
    __syncthreads();
    if (lane == 0) of_warp[warp] = x;
    __syncthreads();
    return warp_max(of_warp[lane < warps ? lane : 0]);
}

// ---- tensor cores: one warp multiplies tiles of bfloat16 and adds in float32
//
// d (16 × 8) += a (16 × 16) · b (16 × 8). With group = lane / 4 and pair = lane % 4 a lane holds, two numbers to a word,
//   a[0], a[2]: row group,     columns 2 pair, 2 pair + 1 and the same + 8;   a[1], a[3]: row group + 8, the same
//   b[0], b[1]: column group,  rows    2 pair, 2 pair + 1 and the same + 8
//   d[0], d[1]: row group,     columns 2 pair, 2 pair + 1;                    d[2], d[3]: row group + 8, the same
// (Parallel Thread Execution ISA, section on mma.m16n8k16.)

#ifndef CUDA_ON_CPU

__device__ inline void multiply_tile(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Load four 8 × 8 tiles of bfloat16 from shared memory: lane l names row l % 8 of tile l / 8 (16 bytes); of every tile it
// gets the two numbers at row l / 4, columns 2 (l % 4) and the next; `turned`, the tile is transposed on the way.
__device__ inline void load_tiles(unsigned (&r)[4], const bfloat16* row) {
    unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(row));
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(address));
}
__device__ inline void load_tiles_turned(unsigned (&r)[4], const bfloat16* row) {
    unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(row));
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(address));
}

// Copy 16 bytes from global to shared memory without waiting; then `copies_commit` closes a group of copies, and
// `copies_wait<n>` waits until at most the n newest groups are under way.
__device__ inline void copy_16_bytes(void* to, const void* from) {
    unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(to));
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(address), "l"(from));
}
__device__ inline void copies_commit() { asm volatile("cp.async.commit_group;"); }
template <int n> __device__ inline void copies_wait() { asm volatile("cp.async.wait_group %0;" ::"n"(n)); }

#endif

// Two numbers, rounded, in one word: the first in the lower half.
__device__ inline unsigned pack_pair(float first, float second) {
    return static_cast<unsigned>(to_bfloat16(first).bits) | (static_cast<unsigned>(to_bfloat16(second).bits) << 16);
}
