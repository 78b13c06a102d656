// Token embedding in CUDA C++: x[n] = table[tokens[n]], and its backward without atomics.
#include "../../kernels.cuh"

// Block n -> row n of x; its threads take the D columns in turn.
template <class Real, class Stored>
__global__ void embedding_forward(const Index* tokens, const Stored* table, Real* x, Index D) {
    const Stored* from = table + tokens[blockIdx.x] * D;
    Real* to = x + blockIdx.x * D;
    for (Index d = threadIdx.x; d < D; d += blockDim.x) to[d] = widen(from[d]);
}

// The first place in ascending `sorted` whose number is at least v.
__device__ inline Index lower_bound(const Index* sorted, Index N, Index v) {
    Index from = 0, to = N;
    while (from < to) {
        Index middle = (from + to) / 2;
        if (sorted[middle] < v) from = middle + 1;
        else to = middle;
    }
    return from;
}

// Block v -> row v of dtable; its threads take the D columns in turn. `order` lists the tokens' places n sorted by token,
// and of equal tokens in ascending order: those of v are one segment, whose rows are added in order. An empty segment
// leaves zeros, so that every row is written once, by one block.
template <class Real>
__global__ void embedding_backward(const Real* dx, const Index* sorted, const Index* order, Real* dtable, Index N, Index D) {
    __shared__ Index segment[2];
    Index v = blockIdx.x;
    if (threadIdx.x < 2) segment[threadIdx.x] = lower_bound(sorted, N, v + threadIdx.x);
    __syncthreads();
    for (Index d = threadIdx.x; d < D; d += blockDim.x) {
        Real sum = 0;
        // forward: x[n] = table[tokens[n]]
        for (Index i = segment[0]; i < segment[1]; i++) sum += dx[order[i] * D + d];
        dtable[v * D + d] = sum;
    }
}
