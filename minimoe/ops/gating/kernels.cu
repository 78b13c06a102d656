// The router in CUDA C++: logits, the k best and their softmax in one kernel; in the backward, the gradient of the logits.
#include "../../kernels.cuh"

// Whether expert a with logit x is chosen before expert b with logit y: NaN comes last, and of equals the lower id first.
template <class Real> __device__ inline bool before(Real x, Index a, Real y, Index b) {
    if (x == y || (x != x && y != y)) return a < b;
    return x > y || y != y;
}

// sum[t] += x[t] · row over columns from ≤ d < to, for one warp and `tokens` rows of x; products of rounded x where the
// gate is stored in bfloat16. With `packs` a lane loads 16 bytes of the row at once: each row of the gate is read once
// for all tokens.
template <class Real, class Stored, int tokens>
__device__ void add_products(const Real* x, const Stored* row, Index D, Index from, Index to, Index rows, bool packs,
                             Real (&sum)[tokens]) {
    int lane = threadIdx.x % 32;
    if (packs) {
        constexpr int size = Pack<Stored>::size, width = size < Pack<Real>::size ? size : Pack<Real>::size;
        for (Index d = from + lane * size; d < to; d += 32 * size) {
            Pack<Stored> w = *reinterpret_cast<const Pack<Stored>*>(row + d);
#pragma unroll
            for (int t = 0; t < tokens; t++) {
                if (t >= rows) break;
#pragma unroll
                for (int i = 0; i < size; i += width) {
                    Pack<Real> some = *reinterpret_cast<const Pack<Real>*>(x + t * D + d + i);
#pragma unroll
                    for (int j = 0; j < width; j++) sum[t] += operand<Stored>(some.at[j]) * widen(w.at[i + j]);
                }
            }
        }
    } else {
        for (Index d = from + lane; d < to; d += 32)
            for (int t = 0; t < tokens; t++)
                if (t < rows) sum[t] += operand<Stored>(x[t * D + d]) * widen(row[d]);
    }
}

// Block b -> tokens b · tokens and following. Its warps share the pairs of an expert and a part of the D columns (`parts`,
// so that few experts keep many warps busy); the parts of a sum are added in order, and where they begin depends on D and
// E alone: a token's logits have the same bits in every batch. Then each warp chooses for one token: k times the best of
// those that come after the last one chosen. The numbers of one token need 8 k + 4 or 8 (E · parts + E) bytes of shared
// memory.
template <class Real, class Stored, int tokens>
__global__ void gating_forward(const Real* x, const Stored* gate, const bool* active, const bool* allowed,
                               const Index* forced, Real* logits, Index* ids, Real* weights, Index N, Index D, Index E,
                               Index k, Index parts, Index columns, Index renormalise) {
    DYNAMIC_SHARED(Index, chosen);
    Real* partial = reinterpret_cast<Real*>(chosen + tokens * k);
    Real* scores = partial + tokens * E * parts;
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
    Index first = blockIdx.x * Index(tokens), rows = N - first < tokens ? N - first : tokens;
    bool packs = D % Pack<Stored>::size == 0 && reinterpret_cast<unsigned long long>(x) % 16 == 0 &&
                 reinterpret_cast<unsigned long long>(gate) % 16 == 0;
    for (Index i = warp; i < E * parts; i += warps) {
        Index from = i % parts * columns, to = from + columns < D ? from + columns : D;
        Real sum[tokens] = {};
        add_products<Real, Stored, tokens>(x + first * D, gate + i / parts * D, D, from, to, rows, packs, sum);
        for (int t = 0; t < tokens; t++) {
            Real whole = warp_sum(sum[t]);
            if (lane == 0) partial[t * E * parts + i] = whole;
        }
    }
    __syncthreads();
    for (Index t = warp; t < rows; t += warps) {
        Index n = first + t, *picked = chosen + t * k;
        Real* score = scores + t * E;
        for (Index e = lane; e < E; e += 32) {
            Real sum = 0;
            for (Index part = 0; part < parts; part++) sum += partial[(t * E + e) * parts + part];
            score[e] = sum;
            logits[n * E + e] = sum;
        }
        __syncwarp();
        if (forced) {
            for (Index slot = lane; slot < k; slot += 32) picked[slot] = forced[n * k + slot];
        } else {
            Real last = 0;
            Index last_id = -1;
            for (Index slot = 0; slot < k; slot++) {
                Real best = 0;
                Index id = -1;
                for (Index e = lane; e < E; e += 32) {
                    Real value = !allowed || allowed[e] ? score[e] : Real(-INFINITE);
                    bool left = last_id < 0 || before(last, last_id, value, e);
                    if (left && (id < 0 || before(value, e, best, id))) best = value, id = e;
                }
                for (int step = 16; step > 0; step /= 2) {
                    Real value = __shfl_xor_sync(ALL_LANES, best, step);
                    Index e = __shfl_xor_sync(ALL_LANES, id, step);
                    if (e >= 0 && (id < 0 || before(value, e, best, id))) best = value, id = e;
                }
                last = best;
                last_id = id;
                if (lane == 0) picked[slot] = id;
            }
        }
        __syncwarp();
        // Softmax over the chosen, or over all where the weights are not renormalised.
        Index among = renormalise ? k : E;
        Real top = -INFINITE, total = 0;
        for (Index i = lane; i < among; i += 32) {
            Real value = score[!renormalise ? i : picked[i] < 0 ? 0 : picked[i]];
            top = value > top ? value : top;
        }
        top = warp_max(top);
        for (Index i = lane; i < among; i += 32) total += exponential(score[!renormalise ? i : picked[i] < 0 ? 0 : picked[i]] - top);
        total = warp_sum(total);
        for (Index slot = lane; slot < k; slot += 32) {
            Index id = active && !active[n] ? -1 : picked[slot];
            ids[n * k + slot] = id;
            weights[n * k + slot] = id < 0 ? Real(0) : exponential(score[id] - top) / total;
        }
    }
}

// Warp -> token n; its lanes take the E experts in turn: total = dlogits + the softmax's part. Without `logits` the
// softmax was over the chosen, whose weights are its probabilities; with them it was over all.
template <class Real>
__global__ void gating_backward_logits(const Real* dweights, const Real* dlogits, const Index* ids, const Real* weights,
                                       const Real* logits, Real* total, Index N, Index E, Index k) {
    int lane = threadIdx.x % 32;
    Index n = blockIdx.x * Index(blockDim.x / 32) + threadIdx.x / 32;
    if (n >= N) return; // a whole warp
    Real mean = 0, top = -INFINITE, sum = 0;
    for (Index slot = lane; slot < k; slot += 32) mean += weights[n * k + slot] * dweights[n * k + slot];
    mean = warp_sum(mean);
    if (logits) {
        for (Index e = lane; e < E; e += 32) top = logits[n * E + e] > top ? logits[n * E + e] : top;
        top = warp_max(top);
        for (Index e = lane; e < E; e += 32) sum += exponential(logits[n * E + e] - top);
        sum = warp_sum(sum);
    }
    bool routed = ids[n * k] >= 0;
    for (Index e = lane; e < E; e += 32) {
        Real slope = dlogits ? dlogits[n * E + e] : Real(0);
        // forward: weights = softmax(logits)[ids], and d softmax = softmax · (d - Σ softmax · d)
        if (logits && routed) slope -= exponential(logits[n * E + e] - top) / sum * mean;
        for (Index slot = 0; slot < k; slot++)
            if (ids[n * k + slot] == e)
                slope += weights[n * k + slot] * (logits ? dweights[n * k + slot] : dweights[n * k + slot] - mean);
        total[n * E + e] = slope;
    }
}
