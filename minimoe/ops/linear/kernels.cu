// Linear maps of few rows in CUDA C++: y_i = x · w_iᵀ for up to three weights that read the same x, in one launch.
#include "../../kernels.cuh"

// Block b -> 16 rows of one weight (`Work`: Dots or Tiles, see kernels.cuh), for all N <= Work::TOKENS rows of x. Blocks
// are counted through the weights; the y_i lie one after the other, each (N, O_i). Scales are those of int8's rows.
template <class Work>
__global__ void __launch_bounds__(Work::THREADS)
    linear_few(const typename Work::Real* x, const typename Work::Stored* w0, const typename Work::Stored* w1,
               const typename Work::Stored* w2, const float* scale0, const float* scale1, const float* scale2, Index O0,
               Index O1, Index O2, typename Work::Real* y, Index N, Index I) {
    DYNAMIC_SHARED(unsigned char, queue);
    __shared__ typename Work::template Sums<1> sums;
    Index block = blockIdx.x, O = O0;
    const typename Work::Stored* w = w0;
    const float* scale = scale0;
    Index blocks = (O0 + BLOCK_ROWS - 1) / BLOCK_ROWS;
    if (block >= blocks) {
        block -= blocks, y += N * O0, w = w1, scale = scale1, O = O1;
        blocks = (O1 + BLOCK_ROWS - 1) / BLOCK_ROWS;
        if (block >= blocks) block -= blocks, y += N * O1, w = w2, scale = scale2, O = O2;
    }
    Index first = BLOCK_ROWS * block;
    Work::multiply(sums, queue, {w}, first, O, [=](int n) { return x + n * I; }, N, I);
    __syncthreads();
    for (int i = threadIdx.x; i < BLOCK_ROWS * N; i += blockDim.x) {
        int row = i % BLOCK_ROWS, n = i / BLOCK_ROWS;
        if (Index o = first + row; o < O) y[n * O + o] = scale ? sums.at(0, n, row) * scale[o] : sums.at(0, n, row);
    }
}
