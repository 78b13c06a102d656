// RMSNorm in CUDA C++: y = h · r · weight with h = x + residual and r = 1 / sqrt(mean(h²) + eps), and its backward.
#include "../../kernels.cuh"

// Block n -> row n; its threads take the D columns in turn. h is not written where there is no residual.
template <class Real, class Stored>
__global__ void rmsnorm_forward(const Real* x, const Real* residual, const Stored* weight, double eps, Real* y, Real* h,
                                Real* r, Index D) {
    Index row = blockIdx.x * D;
    Real squares = 0;
    for (Index d = threadIdx.x; d < D; d += blockDim.x) {
        Real value = residual ? x[row + d] + residual[row + d] : x[row + d];
        if (residual) h[row + d] = value;
        squares += value * value;
    }
    Real scale = 1 / square_root(block_sum(squares) / D + static_cast<Real>(eps));
    if (threadIdx.x == 0) r[blockIdx.x] = scale;
    for (Index d = threadIdx.x; d < D; d += blockDim.x) { // each thread reads what it wrote itself
        Real value = residual ? h[row + d] : x[row + d];
        y[row + d] = value * scale * widen(weight[d]);
    }
}

// Block n -> row n of dx. forward: y = normed · weight, normed = h · r(h), and dr/dh = -r³ h / D
template <class Real, class Stored>
__global__ void rmsnorm_backward_rows(const Real* dy, const Real* h, const Stored* weight, const Real* r, const Real* dh,
                                      Real* dx, Index D) {
    Index row = blockIdx.x * D;
    Real scale = r[blockIdx.x], dot = 0;
    for (Index d = threadIdx.x; d < D; d += blockDim.x) dot += dy[row + d] * widen(weight[d]) * (h[row + d] * scale);
    Real mean = block_sum(dot) / D;
    for (Index d = threadIdx.x; d < D; d += blockDim.x) {
        Real normed = h[row + d] * scale;
        Real slope = scale * (dy[row + d] * widen(weight[d]) - normed * mean);
        dx[row + d] = dh ? slope + dh[row + d] : slope;
    }
}

// Thread (column, part) of block b -> column 32 b + column of dweight = Σ_n dy · h · r; the parts take the rows in turn,
// and part 0 adds their sums up in order.
template <class Real>
__global__ void rmsnorm_backward_weight(const Real* dy, const Real* h, const Real* r, Real* dweight, Index N, Index D) {
    __shared__ Real sums[32][33];
    Index d = blockIdx.x * 32 + threadIdx.x;
    Real sum = 0;
    if (d < D)
        for (Index n = threadIdx.y; n < N; n += 32) sum += dy[n * D + d] * (h[n * D + d] * r[n]);
    sums[threadIdx.y][threadIdx.x] = sum;
    __syncthreads();
    if (threadIdx.y == 0 && d < D) {
        Real total = 0;
        for (int part = 0; part < 32; part++) total += sums[part][threadIdx.x];
        dweight[d] = total;
    }
}
