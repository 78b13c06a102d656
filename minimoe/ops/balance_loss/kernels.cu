// Load-balancing losses in CUDA C++. Sums over tokens are in float64, first within blocks of tokens, then over blocks.
#include "../../kernels.cuh"

// Thread (b, layer, t) -> token n = b · threads + t: its probabilities, and how often its first `slots` choices name each
// expert. The block's sums go to row (layer, b) of probs and chosen, one expert after the other.
template <class Real>
__global__ void balance_sums(const Real* logits, const Index* ids, const bool* active, double* probs, double* chosen,
                             Index N, Index E, Index k, Index slots) {
    Index n = blockIdx.x * Index(blockDim.x) + threadIdx.x, token = blockIdx.y * N + n;
    Index row = (blockIdx.y * Index(gridDim.x) + blockIdx.x) * E;
    bool counts = n < N && (!active || active[n]);
    Real top = 0, total = 0;
    if (counts) {
        top = logits[token * E];
        for (Index e = 1; e < E; e++) top = logits[token * E + e] > top ? logits[token * E + e] : top;
        for (Index e = 0; e < E; e++) total += exponential(logits[token * E + e] - top);
    }
    for (Index e = 0; e < E; e++) {
        double prob = counts ? exponential(logits[token * E + e] - top) / total : Real(0), times = 0;
        for (Index slot = 0; counts && slot < slots; slot++) times += ids[token * k + slot] == e;
        prob = block_sum(prob);
        times = block_sum(times);
        if (threadIdx.x == 0) {
            probs[row + e] = prob;
            chosen[row + e] = times;
        }
    }
}

// One block -> the loss, and slope (L, E): the gradient of the loss with respect to one token's probabilities.
//
// Thread (group, e) -> an expert in `together` layers that are averaged first: 1, or L in the concatenated form.
__global__ void balance_finish(const double* probs, const double* chosen, const bool* active, double* slope, double* loss,
                               Index L, Index N, Index E, Index blocks, Index together) {
    double count = 0, sum = 0;
    for (Index n = threadIdx.x; n < N; n += blockDim.x) count += !active || active[n];
    count = block_sum(count);
    for (Index i = threadIdx.x; i < L / together * E; i += blockDim.x) {
        Index first = i / E * together, e = i % E;
        double share = 0, mean = 0;
        for (Index row = first * blocks; row < (first + together) * blocks; row++) {
            share += chosen[row * E + e];
            mean += probs[row * E + e];
        }
        double of = count > 0 ? count * together : 1;
        share /= of;
        sum += share * (mean / of);
        for (Index layer = first; layer < first + together; layer++)
            slope[layer * E + e] = count > 0 ? share * E / (L * count) : 0;
    }
    sum = block_sum(sum);
    if (threadIdx.x == 0) *loss = sum * E * together / L;
}

// Thread -> token `token` of L · N: dlogits = probs · (dprobs - Σ probs · dprobs), zero where it is not active.
template <class Real>
__global__ void balance_backward(const Real* logits, const bool* active, const double* slope, double dloss, Real* dlogits,
                                 Index L, Index N, Index E) {
    Index token = blockIdx.x * Index(blockDim.x) + threadIdx.x;
    if (token >= L * N) return;
    const double* dprobs = slope + token / N * E;
    const Real* row = logits + token * E;
    Real* to = dlogits + token * E;
    bool counts = !active || active[token % N];
    Real top = row[0], total = 0, along = 0;
    for (Index e = 1; e < E; e++) top = row[e] > top ? row[e] : top;
    // forward: probs = softmax(logits)
    for (Index e = 0; e < E; e++) {
        Real small = exponential(row[e] - top);
        total += small;
        along += small * static_cast<Real>(dprobs[e] * dloss);
    }
    for (Index e = 0; e < E; e++) {
        Real prob = exponential(row[e] - top) / total;
        to[e] = counts ? prob * (static_cast<Real>(dprobs[e] * dloss) - along / total) : Real(0);
    }
}
