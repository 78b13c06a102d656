// AdamW in CUDA C++: one pass over w, g, m and v, and the sum of squares that clipping needs.
#include "../../kernels.cuh"

// Thread -> the numbers at its place, and at a grid's width further on: w, g, m, v are read once, w, m, v written once.
template <class Real>
__global__ void adamw_step(Real* w, const Real* g, Real* m, Real* v, Index size, double beta1, double rest1, double beta2,
                           double rest2, double bias1, double bias2, double lr, double decay, double eps, double scale) {
    Real b1 = beta1, r1 = rest1, b2 = beta2, r2 = rest2, c1 = bias1, c2 = bias2, rate = lr, less = decay, e = eps, s = scale;
    for (Index i = blockIdx.x * Index(blockDim.x) + threadIdx.x; i < size; i += gridDim.x * Index(blockDim.x)) {
        Real gradient = g[i] * s;
        Real first = b1 * m[i] + r1 * gradient;
        Real second = b2 * v[i] + r2 * gradient * gradient;
        m[i] = first;
        v[i] = second;
        w[i] = w[i] - less * w[i] - rate * (first / c1) / (square_root(second / c2) + e);
    }
}

// Block b -> partial[b], the sum over the numbers of its threads; a second launch of one block adds those up.
template <class Real> __global__ void adamw_squares(const Real* g, double* partial, Index size) {
    double sum = 0;
    for (Index i = blockIdx.x * Index(blockDim.x) + threadIdx.x; i < size; i += gridDim.x * Index(blockDim.x))
        sum += static_cast<double>(g[i]) * static_cast<double>(g[i]);
    sum = block_sum(sum);
    if (threadIdx.x == 0) partial[blockIdx.x] = sum;
}

// One block -> the sum of the partial sums.
__global__ void adamw_sum(const double* partial, double* total, Index count) {
    double sum = 0;
    for (Index i = threadIdx.x; i < count; i += blockDim.x) sum += partial[i];
    sum = block_sum(sum);
    if (threadIdx.x == 0) *total = sum;
}
