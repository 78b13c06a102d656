// Choosing the next token in CUDA C++: greedy, or from the nucleus. All of it in float64, as the reference has it.
//
// A row of probabilities is cut into chunks, each sorted by a block of its own. A token's place in the whole order then
// needs no merge: what stands before it is a prefix of every chunk, found by bisection, and the masses of those prefixes
// add up to the mass before it. Summed in the order of the chunks such sums never fall along the order, and the mass
// after a token is to the bit the mass before the next: exactly one token holds the number that is drawn.
#include "../../kernels.cuh"

// Block b -> row b; its threads take the V logits in turn. The largest wins, of equals the lowest id; NaN, as in NumPy,
// counts as larger than all.
template <class Real> __device__ inline bool beats(Real x, Index a, Real y, Index b) {
    if (x == y || (x != x && y != y)) return a < b;
    return x > y || x != x;
}

template <class Real> __device__ inline void best_of_warp(Real& best, Index& id) {
    for (int step = 16; step > 0; step /= 2) {
        Real value = __shfl_xor_sync(ALL_LANES, best, step);
        Index v = __shfl_xor_sync(ALL_LANES, id, step);
        if (beats(value, v, best, id)) best = value, id = v;
    }
}

// Block b -> the id of row b's largest logit, of equals the lowest; its threads take the V logits in turn.
template <class Real> __global__ void sampling_greedy(const Real* logits, Index* ids, Index V) {
    __shared__ Real values[32];
    __shared__ Index places[32];
    const Real* row = logits + blockIdx.x * V;
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
    Real best = row[0];
    Index id = 0;
    for (Index v = threadIdx.x; v < V; v += blockDim.x)
        if (beats(row[v], v, best, id)) best = row[v], id = v;
    best_of_warp(best, id);
    if (lane == 0) values[warp] = best, places[warp] = id;
    __syncthreads();
    best = values[lane < warps ? lane : 0];
    id = places[lane < warps ? lane : 0];
    best_of_warp(best, id);
    if (threadIdx.x == 0) ids[blockIdx.x] = id;
}

// exp((logit - top) / temperature); of a logit of -infinity 0, whatever top is.
__device__ inline double weight(double logit, double top, double temperature) {
    return logit == -INFINITE ? 0.0 : exp((logit - top) / temperature);
}

// Block (c, b) -> the largest logit of chunk c of row b, and the sum of exponentials below it.
template <class Real>
__global__ void sampling_sums(const Real* logits, double temperature, double* tops, double* sums, Index V, Index chunk) {
    const Real* row = logits + blockIdx.y * V;
    Index from = blockIdx.x * chunk, to = from + chunk < V ? from + chunk : V;
    double top = -INFINITE, sum = 0;
    for (Index v = from + threadIdx.x; v < to; v += blockDim.x) top = row[v] > top ? row[v] : top;
    top = block_max(top);
    for (Index v = from + threadIdx.x; v < to; v += blockDim.x) sum += weight(row[v], top, temperature);
    sum = block_sum(sum);
    if (threadIdx.x == 0) {
        tops[blockIdx.y * gridDim.x + blockIdx.x] = top;
        sums[blockIdx.y * gridDim.x + blockIdx.x] = sum;
    }
}

// Block (c, b) -> chunk c of row b: its probabilities in descending order, where they came from (of equals the lowest id
// first), and prefix[i], the mass of the first i. Each of chunk / 2 threads compares and exchanges one pair in every step
// of a bitonic sort; `chunk` is a power of two, and what lies beyond V sorts last.
template <class Real>
__global__ void sampling_sort(const Real* logits, double temperature, const double* tops, const double* sums, double* sorted,
                              int* places, double* prefix, Index* ids, Index V, Index chunk) {
    DYNAMIC_SHARED(double, probs);
    int* place = reinterpret_cast<int*>(probs + chunk);
    __shared__ double offsets[32];
    Index chunks = gridDim.x, b = blockIdx.y, from = blockIdx.x * chunk, at = b * chunks + blockIdx.x;
    double top = -INFINITE, total = 0;
    for (Index c = threadIdx.x; c < chunks; c += blockDim.x) top = tops[b * chunks + c] > top ? tops[b * chunks + c] : top;
    top = block_max(top);
    for (Index c = threadIdx.x; c < chunks; c += blockDim.x)
        total += sums[b * chunks + c] * weight(tops[b * chunks + c], top, temperature);
    total = block_sum(total);
    for (Index i = threadIdx.x; i < chunk; i += blockDim.x) {
        probs[i] = from + i < V ? weight(logits[b * V + from + i], top, temperature) / total : -1.0;
        place[i] = static_cast<int>(i);
    }
    __syncthreads();
    for (Index size = 2; size <= chunk; size *= 2) {
        for (Index stride = size / 2; stride > 0; stride /= 2) {
            Index left = 2 * threadIdx.x - (threadIdx.x & (stride - 1)), right = left + stride;
            bool ahead = probs[left] != probs[right] ? probs[left] > probs[right] : place[left] < place[right];
            if (ahead != ((left & size) == 0)) {
                double p = probs[left];
                int i = place[left];
                probs[left] = probs[right], place[left] = place[right];
                probs[right] = p, place[right] = i;
            }
            __syncthreads();
        }
    }
    // Lane l of the first warp sums a segment, then the segments before it are added to every sum: they never fall.
    Index length = chunk / 32, begin = threadIdx.x * length;
    double mass = 0;
    if (threadIdx.x < 32) {
        for (Index i = begin; i < begin + length; i++) mass += probs[i] > 0 ? probs[i] : 0.0;
        offsets[threadIdx.x] = mass;
    }
    __syncthreads();
    if (threadIdx.x < 32) {
        double offset = 0;
        for (int lane = 0; lane < static_cast<int>(threadIdx.x); lane++) offset += offsets[lane];
        mass = 0;
        for (Index i = begin; i < begin + length; i++) {
            prefix[at * (chunk + 1) + i] = offset + mass;
            mass += probs[i] > 0 ? probs[i] : 0.0;
        }
        if (threadIdx.x == 31) prefix[at * (chunk + 1) + chunk] = offset + mass;
    }
    for (Index i = threadIdx.x; i < chunk; i += blockDim.x) {
        sorted[at * chunk + i] = probs[i];
        places[at * chunk + i] = place[i];
    }
    if (blockIdx.x == 0 && threadIdx.x == 0) ids[b] = 0; // stays where there is no largest: a row of NaN
}

// Thread i of block (c, b) -> the i-th of sorted chunk c of row b: the mass before it and after it in the order of the
// whole row. Each block also notes the largest mass after a token of the nucleus, which is what its last token reaches.
__global__ void sampling_masses(const double* sorted, const double* prefix, double top_p, double* before, double* after,
                                double* reached, Index chunk) {
    Index chunks = gridDim.x, row = blockIdx.y * chunks, own = blockIdx.x;
    double most = 0;
    for (Index i = threadIdx.x; i < chunk; i += blockDim.x) {
        double p = sorted[(row + own) * chunk + i], below = 0, above = 0;
        for (Index c = 0; c < chunks; c++) {
            Index from = 0, to = c == own ? 0 : chunk; // how many of chunk c stand before: those of equal mass if c < own
            while (from < to) {
                Index middle = (from + to) / 2;
                double other = sorted[(row + c) * chunk + middle];
                if (other > p || (other == p && c < own)) from = middle + 1;
                else to = middle;
            }
            if (c == own) from = i;
            below += prefix[(row + c) * (chunk + 1) + from];
            above += prefix[(row + c) * (chunk + 1) + from + (c == own)];
        }
        bool real = p >= 0; // not what fills the last chunk
        before[(row + own) * chunk + i] = real ? below : 2.0;
        after[(row + own) * chunk + i] = real ? above : 2.0;
        if (real && below < top_p && above > most) most = above;
    }
    most = block_max(most);
    if (threadIdx.x == 0) reached[row + own] = most;
}

// Thread i of block (c, b) -> the same token: it is the one if the number drawn lies in its part of the nucleus.
__global__ void sampling_draw(const int* places, const double* before, const double* after, const double* reached,
                              const double* uniform, double top_p, Index* ids, Index chunk) {
    Index chunks = gridDim.x, row = blockIdx.y * chunks, own = blockIdx.x;
    double total = 0;
    for (Index c = threadIdx.x; c < chunks; c += blockDim.x) total = reached[row + c] > total ? reached[row + c] : total;
    total = block_max(total);
    double drawn = uniform[blockIdx.y] * total;
    for (Index i = threadIdx.x; i < chunk; i += blockDim.x) {
        double from = before[(row + own) * chunk + i], to = after[(row + own) * chunk + i];
        bool last = to == total && from < to; // holds the number if it was rounded up to the total
        if (from < top_p && from <= drawn && (drawn < to || last)) ids[blockIdx.y] = own * chunk + places[(row + own) * chunk + i];
    }
}
