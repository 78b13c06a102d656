// What the benchmark runs on the device besides the model: reading memory, and drawing random weights.
#include "../../kernels.cuh"

// Thread i of all -> vectors i, i + threads, i + 2 threads, …, four of them under way at a time; a block adds up what its
// threads read. A kernel that only reads is the roof of decoding, which only reads.
template <class T> __global__ void read_all(const T* x, T* sums, Index vectors) {
    auto from = reinterpret_cast<const Pack<T>*>(x);
    Index threads = static_cast<Index>(gridDim.x) * blockDim.x, i = static_cast<Index>(blockIdx.x) * blockDim.x + threadIdx.x;
    T sum = 0;
    for (; i + 3 * threads < vectors; i += 4 * threads) {
        Pack<T> four[4];
        for (int j = 0; j < 4; j++) four[j] = from[i + j * threads];
        for (int j = 0; j < 4; j++)
            for (int d = 0; d < Pack<T>::size; d++) sum += four[j].at[d];
    }
    for (; i < vectors; i += threads) {
        Pack<T> one = from[i];
        for (int d = 0; d < Pack<T>::size; d++) sum += one.at[d];
    }
    sum = block_sum(sum);
    if (threadIdx.x == 0) sums[blockIdx.x] = sum;
}

// A bijection of 64 bits that leaves no pattern: the finaliser of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014).
__device__ inline unsigned long long mixed(unsigned long long x) {
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
    return x ^ (x >> 31);
}

// Thread i of all -> pairs i, i + threads, … of numbers 2 i, 2 i + 1 of w: normal, by Box and Muller's transform of two
// uniform numbers that depend on seed, stream and i alone, so that the same weights come whatever the grid.
template <class Stored> __global__ void draw_normal(Stored* w, Index size, Index seed, Index stream, double scale) {
    Index threads = static_cast<Index>(gridDim.x) * blockDim.x;
    unsigned long long start = mixed(mixed(static_cast<unsigned long long>(seed) + 1) + static_cast<unsigned long long>(stream));
    for (Index i = static_cast<Index>(blockIdx.x) * blockDim.x + threadIdx.x; 2 * i < size; i += threads) {
        unsigned long long bits = mixed(start + 0x9e3779b97f4a7c15ull * static_cast<unsigned long long>(i));
        float first = (static_cast<float>(bits >> 40) + 1) * 0x1p-24f; // in (0, 1]
        float second = static_cast<float>((bits >> 8) & 0xffffffu) * 0x1p-24f;
        float length = static_cast<float>(scale) * square_root(-2 * logarithm(first));
        float turn = 6.2831853f * second;
        w[2 * i] = narrow<Stored>(length * cosf(turn));
        if (2 * i + 1 < size) w[2 * i + 1] = narrow<Stored>(length * sinf(turn));
    }
}
