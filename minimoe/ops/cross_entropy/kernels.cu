// Cross-entropy in CUDA C++: loss[n] = lse[n] - logits[n, target[n]], their mean, and the gradient of the logits.
#include "../../kernels.cuh"

// Block n -> row n; its threads take the V logits in turn, once for the maximum and once, from the cache, for the sum.
template <class Real>
__global__ void cross_entropy_rows(const Real* logits, const Index* targets, Real* losses, Real* lse, Index V) {
    const Real* row = logits + blockIdx.x * V;
    Real top = row[0], sum = 0;
    for (Index v = threadIdx.x; v < V; v += blockDim.x) top = row[v] > top ? row[v] : top;
    top = block_max(top);
    for (Index v = threadIdx.x; v < V; v += blockDim.x) sum += exponential(row[v] - top);
    sum = block_sum(sum);
    if (threadIdx.x == 0) {
        Index target = targets[blockIdx.x];
        Real log_sum = top + logarithm(sum);
        lse[blockIdx.x] = log_sum;
        losses[blockIdx.x] = target >= 0 ? log_sum - row[target] : Real(0);
    }
}

// How many targets count, at least 1; for all threads of a block.
__device__ inline double counted(const Index* targets, Index N) {
    double count = 0;
    for (Index n = threadIdx.x; n < N; n += blockDim.x) count += targets[n] >= 0;
    count = block_sum(count);
    return count > 1 ? count : 1;
}

// One block, whose threads take the N losses in turn -> their mean.
template <class Real>
__global__ void cross_entropy_mean(const Real* losses, const Index* targets, double* mean, Index N) {
    double sum = 0;
    for (Index n = threadIdx.x; n < N; n += blockDim.x) sum += losses[n];
    sum = block_sum(sum);
    double count = counted(targets, N);
    if (threadIdx.x == 0) *mean = sum / count;
}

// One block -> dloss / counted, what every row's gradient is scaled by.
__global__ void cross_entropy_scale(const Index* targets, double dloss, double* scale, Index N) {
    double count = counted(targets, N);
    if (threadIdx.x == 0) *scale = dloss / count;
}

// Block n -> row n of dlogits; its threads take the V columns in turn.
template <class Real>
__global__ void cross_entropy_backward(const Real* logits, const Index* targets, const Real* lse, const double* scale,
                                       Real* dlogits, Index V) {
    Index row = blockIdx.x * V, target = targets[blockIdx.x];
    Real shift = lse[blockIdx.x], factor = *scale;
    for (Index v = threadIdx.x; v < V; v += blockDim.x) {
        // forward: lse = log Σ exp(logits), and - logits[n, targets[n]]
        Real slope = exponential(logits[row + v] - shift) - Real(v == target);
        dlogits[row + v] = target >= 0 ? slope * factor : Real(0);
    }
}
