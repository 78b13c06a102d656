// Rotary position embedding in CUDA C++: the pair (i, i + C/2) of every head is turned by its position's angle.
#include "../../kernels.cuh"

// Thread -> pair i of token n, n·c + i = its number in the grid. Angles in double, rounded once, at the end.
template <class Real>
__global__ void rope_table(const Index* positions, double theta, Real* cosines, Real* sines, Index N, Index c) {
    Index item = static_cast<Index>(blockIdx.x) * blockDim.x + threadIdx.x;
    if (item >= N * c) return;
    double frequency = pow(theta, -2.0 * static_cast<double>(item % c) / static_cast<double>(2 * c));
    double angle = static_cast<double>(positions[item / c]) * frequency;
    cosines[item] = static_cast<Real>(cos(angle));
    sines[item] = static_cast<Real>(sin(angle));
}

// Block (n, y) -> token n; thread -> pair i of head h, h·c + i = y·threads + its number. direction -1 turns back.
template <class Real>
__global__ void rope(const Real* x, const Real* cosines, const Real* sines, double direction, Real* y, Index H, Index c) {
    int item = blockIdx.y * blockDim.x + threadIdx.x, width = static_cast<int>(c);
    if (item >= H * c) return;
    int h = item / width, i = item % width;
    Index n = blockIdx.x, at = (n * H + h) * 2 * c + i;
    Real first = x[at], second = x[at + c];
    Real cosine = cosines[n * c + i], sine = static_cast<Real>(direction) * sines[n * c + i];
    y[at] = first * cosine - second * sine;
    y[at + c] = second * cosine + first * sine;
}
