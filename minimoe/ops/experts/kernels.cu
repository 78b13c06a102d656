// The experts in CUDA C++: out[n] = Σ_slot weights[n, slot] · w2_e · (act(w1_e · x[n]) ⊙ (w3_e · x[n])), e = ids[n, slot].
//
// Few tokens: two kernels read the rows of the chosen experts, each once, however many tokens chose the expert.
// Many: pairs are sorted by expert, cuBLAS multiplies segments, and these kernels do what stands between the products.
// A pair is n · k + slot, M = N · k of them; ids are -1 where a pair is not routed.
#include "../../kernels.cuh"

struct Silu {
    template <class Real> static __device__ Real of(Real z) { return silu(z); }
    template <class Real> static __device__ Real slope(Real z) {
        Real s = sigmoid(z);
        return s * (1 + z * (1 - s));
    }
};

// z/2 · (1 + tanh(u)) = z · sigmoid(2 u), u = sqrt(2/π) (z + 0.044715 z³)
struct GeluTanh {
    static constexpr double ROOT = 1.5957691216057308; // 2 sqrt(2/π)
    template <class Real> static __device__ Real bend(Real z) { return Real(ROOT) * (z + Real(0.044715) * z * z * z); }
    template <class Real> static __device__ Real of(Real z) { return z * sigmoid(bend(z)); }
    template <class Real> static __device__ Real slope(Real z) {
        Real s = sigmoid(bend(z));
        return s * (1 + z * (1 - s) * (Real(ROOT) * (1 + Real(3 * 0.044715) * z * z)));
    }
};

// ---- few tokens

template <class Stored> struct Hidden { // the type in which hidden states wait for w2: rounded where it is stored rounded
    using type = typename Computed<Stored>::type;
};
template <> struct Hidden<bfloat16> {
    using type = bfloat16;
};

// The lowest expert above `after` that a pair chose, E if there is none. Every warp asks for itself.
__device__ inline Index next_expert(const Index* ids, Index M, Index E, Index after) {
    Index lowest = E;
    for (Index m = threadIdx.x % 32; m < M; m += 32)
        if (ids[m] > after && ids[m] < lowest) lowest = ids[m];
    return -warp_max(-lowest);
}

// Up to TOKENS pairs that share an expert, and where their tokens' numbers begin.
template <int TOKENS> struct Sharing {
    Index pair[TOKENS], from[TOKENS];

    // The pairs of expert e in their order, from the start-th on; returns how many it has in all. `each` pairs of a token
    // read the same `width` numbers. Warp 0 writes; the others only count.
    __device__ int fill(const Index* ids, Index M, Index e, int start, Index each, Index width) {
        int lane = threadIdx.x % 32, found = 0;
        for (Index base = 0; base < M; base += 32) {
            Index m = base + lane;
            bool here = m < M && ids[m] == e;
            unsigned votes = __ballot_sync(ALL_LANES, here);
            int place = found + __popc(votes & ((1u << lane) - 1)) - start;
            if (here && threadIdx.x < 32 && place >= 0 && place < TOKENS) pair[place] = m, from[place] = m / each * width;
            found += __popc(votes);
        }
        return found;
    }
};

// Block (b, r) -> rows 16 b to 16 b + 15 of w1 and w3 of the r-th expert that is chosen; hidden (M, F) of its pairs. Batch 1
// of Mixtral-8x7B: 1,792 blocks, each reads 256 KB, 13.6 for each of 132 multiprocessors.
template <class Work, class Activation>
__global__ void __launch_bounds__(Work::THREADS)
    experts_up(const typename Work::Real* x, const typename Work::Stored* w1, const typename Work::Stored* w3,
               const float* scale1, const float* scale3, const Index* ids,
               typename Hidden<typename Work::Stored>::type* hidden, Index M, Index k, Index E, Index D, Index F) {
    DYNAMIC_SHARED(unsigned char, queue);
    __shared__ typename Work::template Sums<2> sums;
    __shared__ Sharing<Work::TOKENS> sharing;
    Index e = -1, first = BLOCK_ROWS * blockIdx.x;
    for (unsigned rank = 0; rank <= blockIdx.y; rank++) e = next_expert(ids, M, E, e);
    if (e == E) return; // fewer are chosen
    for (int start = 0, total = 1; start < total; start += Work::TOKENS) {
        total = sharing.fill(ids, M, e, start, k, D);
        __syncthreads();
        int count = min(Work::TOKENS, total - start);
        auto token = [&](int n) { return x + sharing.from[n]; };
        Work::multiply(sums, queue, {w1 + e * F * D, w3 + e * F * D}, first, F, token, count, D);
        __syncthreads();
        for (int i = threadIdx.x; i < BLOCK_ROWS * count; i += blockDim.x) {
            int row = i % BLOCK_ROWS, n = i / BLOCK_ROWS;
            Index f = first + row;
            if (f >= F) continue;
            auto gate_in = sums.at(0, n, row), up = sums.at(1, n, row);
            if (scale1) gate_in *= scale1[e * F + f], up *= scale3[e * F + f];
            hidden[sharing.pair[n] * F + f] =
                narrow<typename Hidden<typename Work::Stored>::type>(Activation::of(gate_in) * up);
        }
        __syncthreads(); // before `sharing` and `sums` are filled anew
    }
}

// Block b -> columns 16 b to 16 b + 15 of out, for all tokens: rows of w2 of one chosen expert after the other, then the
// weighted sum in the order of slots. Batch 1 of Mixtral-8x7B: 256 blocks, each reads 2 × 448 KB, two for each of 128 of
// 132 multiprocessors. Dynamic shared memory: the queue, then what the block's rows of each pair come to, (M, 16).
template <class Work>
__global__ void __launch_bounds__(Work::THREADS, 1)
    experts_down(const typename Hidden<typename Work::Stored>::type* hidden, const typename Work::Stored* w2,
                 const float* scale2, const Index* ids, const typename Work::Real* weights, typename Work::Real* out,
                 Index M, Index k, Index E, Index D, Index F, Index queue_bytes) {
    using Real = typename Work::Real;
    DYNAMIC_SHARED(unsigned char, queue);
    Real* slots = reinterpret_cast<Real*>(queue + queue_bytes);
    // One barrier for each group of pairs: a warp that is ahead fills the next of these, none of which is read any more.
    __shared__ typename Work::template Sums<1> sums[2];
    __shared__ Sharing<Work::TOKENS> sharing[3];
    Index e = next_expert(ids, M, E, -1), first = BLOCK_ROWS * blockIdx.x;
    int start = 0, total = sharing[0].fill(ids, M, e, 0, 1, F);
    __syncthreads();
    for (int group = 0; e < E; group++) {
        auto& now = sharing[group % 3];
        auto& sum = sums[group % 2];
        int count = min(Work::TOKENS, total - start);
        const float* scale = scale2 ? scale2 + e * D : nullptr;
        Work::multiply(sum, queue, {w2 + e * D * F}, first, D, [&](int n) { return hidden + now.from[n]; }, count, F);
        start += Work::TOKENS;
        if (start >= total) e = next_expert(ids, M, E, e), start = 0;
        total = sharing[(group + 1) % 3].fill(ids, M, e, start, 1, F);
        __syncthreads();
        for (int i = threadIdx.x; i < BLOCK_ROWS * count; i += blockDim.x) {
            int row = i % BLOCK_ROWS, n = i / BLOCK_ROWS;
            Real y = sum.at(0, n, row);
            slots[BLOCK_ROWS * now.pair[n] + row] = scale && first + row < D ? y * scale[first + row] : y;
        }
    }
    __syncthreads();
    for (Index i = threadIdx.x; i < BLOCK_ROWS * (M / k); i += blockDim.x) {
        Index n = i / BLOCK_ROWS, d = first + i % BLOCK_ROWS;
        Real total = 0;
        for (Index pair = n * k; pair < (n + 1) * k; pair++)
            if (ids[pair] >= 0) total += weights[pair] * slots[BLOCK_ROWS * pair + i % BLOCK_ROWS];
        if (d < D) out[n * D + d] = total;
    }
}

// ---- many tokens

// Block e -> the segment of expert e: its pairs in their order, behind those of lower experts. place (M,) is the inverse:
// the row of each pair, -1 where it is not routed. offsets (E + 1,).
__global__ void experts_sort(const Index* ids, Index* pairs, Index* offsets, Index* place, Index M, Index E) {
    __shared__ int of_warp[32];
    Index e = blockIdx.x, lower = 0;
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
    for (Index m = threadIdx.x; m < M; m += blockDim.x) {
        if (e == 0 && ids[m] < 0) place[m] = -1;
        lower += ids[m] >= 0 && ids[m] < e;
    }
    Index free = block_sum(lower); // the next row of this expert
    if (threadIdx.x == 0) offsets[e] = free;
    for (Index base = 0; base < M; base += blockDim.x) {
        Index m = base + threadIdx.x;
        bool here = m < M && ids[m] == e;
        unsigned votes = __ballot_sync(ALL_LANES, here);
        if (lane == 0) of_warp[warp] = __popc(votes);
        __syncthreads();
        Index row = free + __popc(votes & ((1u << lane) - 1));
        for (int w = 0; w < warps; w++) {
            if (w < warp) row += of_warp[w];
            free += of_warp[w];
        }
        if (here) pairs[row] = m, place[m] = row;
        __syncthreads(); // before of_warp is written anew
    }
    if (threadIdx.x == 0 && e == E - 1) offsets[E] = free;
}

// Block r -> row r of `to` (M, D): x of its pair's token, times the pair's weight where weights are given.
template <class Real, class To>
__global__ void experts_gather(const Real* x, const Real* weights, const Index* pairs, To* to, Index k, Index D) {
    Index pair = pairs[blockIdx.x];
    const Real* row = x + pair / k * D;
    Real weight = weights ? weights[pair] : Real(1);
    for (Index d = threadIdx.x; d < D; d += blockDim.x) to[blockIdx.x * D + d] = narrow<To>(weight * row[d]);
}

// Thread i -> number i of the hidden states.
template <class Real, class To, class Activation>
__global__ void experts_activate(const Real* gate_in, const Real* up, To* hidden, Index size) {
    Index i = Index(blockIdx.x) * blockDim.x + threadIdx.x;
    if (i < size) hidden[i] = narrow<To>(Activation::of(gate_in[i]) * up[i]);
}

// Block n -> row n of out = Σ_slot weights · ys[place], in the order of slots; without weights the plain sum. Where `slots`
// (N, k, D) are asked for they get the ys, zeros where a pair is not routed.
template <class Real>
__global__ void experts_combine(const Real* ys, const Index* place, const Real* weights, Real* out, Real* slots, Index k,
                                Index D) {
    Index n = blockIdx.x;
    for (Index d = threadIdx.x; d < D; d += blockDim.x) {
        Real total = 0;
        for (Index pair = n * k; pair < (n + 1) * k; pair++) {
            Real y = place[pair] < 0 ? Real(0) : ys[place[pair] * D + d];
            if (place[pair] >= 0) total += weights ? weights[pair] * y : y;
            if (slots) slots[pair * D + d] = y;
        }
        out[n * D + d] = total;
    }
}

// ---- backward

// Thread i -> number i. forward: hidden = act(gate_in) ⊙ up. dup takes the place of dhidden.
template <class Real, class Activation>
__global__ void experts_activate_backward(const Real* gate_in, const Real* up, Real* dhidden, Real* hidden, Real* dgate_in,
                                          Index size) {
    Index i = Index(blockIdx.x) * blockDim.x + threadIdx.x;
    if (i >= size) return;
    Real opened = Activation::of(gate_in[i]), slope = dhidden[i];
    hidden[i] = opened * up[i];
    dgate_in[i] = slope * up[i] * Activation::slope(gate_in[i]);
    dhidden[i] = slope * opened;
}

// Block p -> pair p. forward: out = Σ_slot weights · slots
template <class Real>
__global__ void experts_weights_backward(const Real* dout, const Real* slots, Real* dweights, Index k, Index D) {
    Index pair = blockIdx.x;
    Real dot = 0;
    for (Index d = threadIdx.x; d < D; d += blockDim.x) dot += dout[pair / k * D + d] * slots[pair * D + d];
    dot = block_sum(dot);
    if (threadIdx.x == 0) dweights[pair] = dot;
}
