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

// A pair; and the same turned by an angle.
template <class Real> struct Pair {
    Real first, second;
    __device__ Pair turned(Real cosine, Real sine) const {
        return {first * cosine - second * sine, second * cosine + first * sine};
    }
};

// Block (n, y) -> token n; thread -> pair i of head h, h·c + i = y·threads + its number. direction -1 turns back.
template <class Real>
__global__ void rope(const Real* x, const Real* cosines, const Real* sines, double direction, Real* y, Index H, Index c) {
    int item = blockIdx.y * blockDim.x + threadIdx.x, width = static_cast<int>(c);
    if (item >= H * c) return;
    int h = item / width, i = item % width;
    Index n = blockIdx.x, at = (n * H + h) * 2 * c + i;
    auto turned = Pair<Real>{x[at], x[at + c]}.turned(cosines[n * c + i], static_cast<Real>(direction) * sines[n * c + i]);
    y[at] = turned.first;
    y[at + c] = turned.second;
}

// Block (n, y) -> token n = b·T + t; thread -> pair i of head h, h·c + i = y·threads + its number, of the H + 2 K heads of
// q, k and v. Those of q are turned, those of k are turned and written to the token's slot, those of v are written there.
template <class Real, class Keys, class Values>
__global__ void rope_into_cache(const Real* q, const Real* k, const Real* v, const Real* cosines, const Real* sines,
                                const Index* slots, Real* y, Keys* k_cache, Values* v_cache, Index T, Index R, Index H,
                                Index K, Index c) {
    int item = blockIdx.y * blockDim.x + threadIdx.x, width = static_cast<int>(c);
    if (item >= (H + 2 * K) * c) return;
    Index n = blockIdx.x, h = item / width, i = item % width, slot = slots[n];
    Real cosine = cosines[n * c + i], sine = sines[n * c + i];
    if (h < H) {
        Index at = (n * H + h) * 2 * c + i;
        auto turned = Pair<Real>{q[at], q[at + c]}.turned(cosine, sine);
        y[at] = turned.first;
        y[at + c] = turned.second;
        return;
    }
    if (slot < 0) return;
    Index head = (h - H) % K, from = (n * K + head) * 2 * c + i, to = ((n / T * R + slot) * K + head) * 2 * c + i;
    if (h < H + K) {
        auto turned = Pair<Real>{k[from], k[from + c]}.turned(cosine, sine);
        k_cache[to] = narrow<Keys>(turned.first);
        k_cache[to + c] = narrow<Keys>(turned.second);
    } else {
        v_cache[to] = narrow<Values>(v[from]);
        v_cache[to + c] = narrow<Values>(v[from + c]);
    }
}
