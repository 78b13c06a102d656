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
template <> struct Computed<signed char> {
    using type = float;
};

__device__ inline float widen(bfloat16 x) { return __uint_as_float(static_cast<unsigned>(x.bits) << 16); }
__device__ inline float widen(float x) { return x; }
__device__ inline double widen(double x) { return x; }
__device__ inline float widen(signed char x) { return x; } // int8: its row's scale is applied to the sum

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
template <class Stored> struct Operand {
    template <class Real> __device__ static Real from(Real x) { return x; }
};
template <> struct Operand<bfloat16> {
    template <class Real> __device__ static Real from(Real x) { return widen(narrow<bfloat16>(x)); }
};
template <class Stored, class Real> __device__ inline Real operand(Real x) { return Operand<Stored>::from(x); }

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

// ---- vectors: up to 16 bytes are one load instruction of a thread

template <class T, int n> struct alignas(n * sizeof(T) < 16 ? n * sizeof(T) : 16) Numbers {
    static constexpr int size = n;
    T at[n];
};
template <class T> using Pack = Numbers<T, 16 / sizeof(T)>;

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
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(address), "l"(from) : "memory");
}
__device__ inline void copies_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int n> __device__ inline void copies_wait() { asm volatile("cp.async.wait_group %0;" ::"n"(n) : "memory"); }

#endif

// Two numbers, rounded, in one word: the first in the lower half.
__device__ inline unsigned pack_pair(float first, float second) {
#ifdef CUDA_ON_CPU
    return static_cast<unsigned>(to_bfloat16(first).bits) | (static_cast<unsigned>(to_bfloat16(second).bits) << 16);
#else
    unsigned word; // one instruction, rounding as to_bfloat16 does
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(second), "f"(first));
    return word;
#endif
}

// ---- products with few tokens: 16 rows of a block times a handful of tokens
//
// With so few tokens the time is that of reading the weights: each is read once, for all tokens. HBM answers after about
// 0.7 µs, so a card of 132 multiprocessors and 4.8 TB/s is busy only while each of them has 25 KB under way. Left to the
// compiler, which saves registers, a thread would begin its loads one after the other; so weights are copied to shared
// memory without waiting, in a queue of its own for every thread, and no warp waits for another before the sum at the end.
//
// Two kinds of a block's work, which a kernel takes as a template argument:
// - Tiles, for bfloat16: tensor cores multiply 16 rows × 8 tokens, however few are there; scalar code would have to widen
//   each weight, and with 8 tokens or more would be slower than the memory. Warps take pieces of the columns in turn.
// - Dots, for all else: a warp has 4 rows, its lanes take pieces of the columns in turn.
// `token(n)` is where the numbers of token n lie, for n < count <= TOKENS; `first` the block's first row of O. A row beyond
// the last is read as the last; nobody may ask for its sum. After a barrier `at(matrix, token, row)` is a sum.

constexpr int BLOCK_ROWS = 16;

// Read `steps` times LOADS packs of 16 bytes a thread: `source(step, load)` says where one lies, or null; `use(step, wait)`
// works with those of a step, which `wait(packs)` fills in once they are there. Nothing is read for a null.
template <int LOADS, int THREADS, class T, class Source, class Use>
__device__ inline void stream(unsigned char* queue, Index steps, Source source, Use use) {
    constexpr int BYTES = 48 * 1024; // in flight, of a block: the size of its queue
    constexpr int DEPTH = BYTES / (16 * LOADS * THREADS); // steps in flight
    unsigned char* mine = queue + 16 * threadIdx.x;
    auto begin = [&](Index step, int slot) {
#pragma unroll
        for (int load = 0; load < LOADS; load++)
            if (const T* from = step < steps ? source(step, load) : nullptr)
                copy_16_bytes(mine + 16 * THREADS * (LOADS * slot + load), from);
        copies_commit(); // an empty group counts too
    };
    for (int slot = 0; slot < DEPTH; slot++) begin(slot, slot);
    int slot = 0;
    for (Index step = 0; step < steps; step++) {
        use(step, [&](Pack<T> (&packs)[LOADS]) {
            copies_wait<DEPTH - 1>();
#pragma unroll
            for (int load = 0; load < LOADS; load++)
                packs[load] = *reinterpret_cast<const Pack<T>*>(mine + 16 * THREADS * (LOADS * slot + load));
        });
        begin(step + DEPTH, slot);
        slot = slot + 1 == DEPTH ? 0 : slot + 1;
    }
}

template <int n, class T> __device__ inline Numbers<T, n> numbers_at(const T* from) {
    return *reinterpret_cast<const Numbers<T, n>*>(from);
}

// WIDTH numbers of a row are read at once: 16 bytes, through the queue; or one number, where rows are not aligned.
template <class Weight, int WIDTH, int MOST> struct Dots {
    using Stored = Weight;
    using Real = typename Computed<Stored>::type;
    static constexpr int THREADS = 128, TOKENS = MOST;

    template <int MATRICES> struct Sums {
        Real total[MATRICES][TOKENS][BLOCK_ROWS];
        __device__ Real at(int matrix, int token, int row) const { return total[matrix][token][row]; }
    };

    // Warp w of a block -> rows 4 w to 4 w + 3 of every matrix, four at a time.
    template <int MATRICES, class Token>
    static __device__ void multiply(Sums<MATRICES>& sums, unsigned char* queue, const Stored* const (&weights)[MATRICES],
                                    Index first, Index O, Token token, int count, Index I) {
        constexpr int ROWS = 4 / MATRICES; // of each matrix at a time
        int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
        Index steps = (I + 32 * WIDTH - 1) / (32 * WIDTH);
        for (int row = 4 * warp; row < 4 * (warp + 1); row += ROWS) {
            const Stored* w[4];
            Real total[4][TOKENS] = {};
#pragma unroll
            for (int r = 0; r < 4; r++) w[r] = weights[r / ROWS] + min(first + row + r % ROWS, O - 1) * I;
            if constexpr (WIDTH * sizeof(Stored) == 16) {
                auto source = [&](Index step, int r) {
                    Index c = WIDTH * (32 * step + lane);
                    return c < I ? w[r] + c : nullptr;
                };
                stream<4, THREADS, Stored>(queue, steps, source, [&](Index step, auto wait) {
                    Numbers<Stored, WIDTH> read[4];
                    wait(read);
                    add(total, read, token, count, WIDTH * (32 * step + lane), I);
                });
            } else {
                for (Index c = WIDTH * lane; c < I; c += 32 * WIDTH) {
                    Numbers<Stored, WIDTH> read[4];
#pragma unroll
                    for (int r = 0; r < 4; r++) read[r] = numbers_at<WIDTH>(w[r] + c);
                    add(total, read, token, count, c, I);
                }
            }
#pragma unroll
            for (int r = 0; r < 4; r++)
#pragma unroll
                for (int n = 0; n < TOKENS; n++)
                    if (n < count) {
                        Real sum = warp_sum(total[r][n]);
                        if (lane == 0) sums.total[r / ROWS][n][row + r % ROWS] = sum;
                    }
        }
    }

    template <class Token>
    static __device__ void add(Real (&total)[4][TOKENS], const Numbers<Stored, WIDTH> (&w)[4], Token token, int count,
                               Index c, Index I) {
        if (c >= I) return;
#pragma unroll
        for (int n = 0; n < TOKENS; n++)
            if (n < count) {
                auto x = numbers_at<WIDTH>(token(n) + c);
#pragma unroll
                for (int r = 0; r < 4; r++)
#pragma unroll
                    for (int j = 0; j < WIDTH; j++) total[r][n] += widen(w[r].at[j]) * operand<Stored>(widen(x.at[j]));
            }
    }
};

// 32 columns of 16 rows are two tiles of weights, read as 16 bytes = 8 columns a lane from rows `group` and `group` + 8.
// Which column is which in a tile does not matter as long as the tokens' numbers are dealt to lanes in the same way.
template <int TILES> struct Tiles {
    using Stored = bfloat16;
    using Real = float;
    static constexpr int THREADS = 256, WARPS = THREADS / 32, TOKENS = 8 * TILES;

    template <int MATRICES> struct Sums {
        float of_warp[WARPS][MATRICES][TOKENS][BLOCK_ROWS];
        __device__ float at(int matrix, int token, int row) const {
            float sum = 0;
            for (int warp = 0; warp < WARPS; warp++) sum += of_warp[warp][matrix][token][row];
            return sum;
        }
    };

    template <int MATRICES, class Token>
    static __device__ void multiply(Sums<MATRICES>& sums, unsigned char* queue, const bfloat16* const (&weights)[MATRICES],
                                    Index first, Index O, Token token, int count, Index I) {
        int lane = threadIdx.x % 32, warp = threadIdx.x / 32, group = lane / 4, pair = lane % 4;
        const bfloat16* w[2 * MATRICES];
        decltype(token(0)) x[TILES];
        float sum[MATRICES][TILES][4] = {};
#pragma unroll
        for (int m = 0; m < 2 * MATRICES; m++) w[m] = weights[m / 2] + min(first + group + 8 * (m % 2), O - 1) * I;
#pragma unroll
        for (int t = 0; t < TILES; t++) x[t] = token(min(8 * t + group, count - 1)); // beyond `count`: never asked for
        auto column = [&](Index step) { return 32 * (WARPS * step + warp) + 8 * pair; };
        auto source = [&](Index step, int load) { return column(step) < I ? w[load] + column(step) : nullptr; };
        stream<2 * MATRICES, THREADS, bfloat16>(queue, (I + 32 * WARPS - 1) / (32 * WARPS), source, [&](Index step, auto wait) {
            bool inside = column(step) < I;
            unsigned b[TILES][4] = {};
#pragma unroll
            for (int t = 0; t < TILES; t++)
                if (inside) operand_words(b[t], x[t] + column(step));
            Pack<bfloat16> read[2 * MATRICES];
            wait(read);
#pragma unroll
            for (int m = 0; m < MATRICES; m++) {
                unsigned low[4] = {}, high[4] = {};
                if (inside) memcpy(low, &read[2 * m], 16), memcpy(high, &read[2 * m + 1], 16);
#pragma unroll
                for (int t = 0; t < TILES; t++) { // the 8 columns are 2 pair, 2 pair + 1 and the same + 8 of two tiles
                    multiply_tile(sum[m][t], {low[0], high[0], low[1], high[1]}, {b[t][0], b[t][1]});
                    multiply_tile(sum[m][t], {low[2], high[2], low[3], high[3]}, {b[t][2], b[t][3]});
                }
            }
        });
#pragma unroll
        for (int m = 0; m < MATRICES; m++)
#pragma unroll
            for (int t = 0; t < TILES; t++)
#pragma unroll
                for (int j = 0; j < 4; j++) sums.of_warp[warp][m][8 * t + 2 * pair + j % 2][group + 8 * (j / 2)] = sum[m][t][j];
    }

    // Eight numbers of a token, rounded.
    static __device__ void operand_words(unsigned (&words)[4], const bfloat16* x) {
        auto eight = numbers_at<8>(x);
        memcpy(words, &eight, 16);
    }
    static __device__ void operand_words(unsigned (&words)[4], const float* x) {
        auto eight = numbers_at<8>(x);
#pragma unroll
        for (int i = 0; i < 4; i++) words[i] = pack_pair(eight.at[2 * i], eight.at[2 * i + 1]);
    }
};
