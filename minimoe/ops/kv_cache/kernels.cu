// The rolling key/value cache in CUDA C++: position p lives in slot p mod R; of a chunk, the last R positions stay.
#include "../../kernels.cuh"

// The lowest position of a row of T that stays in R slots, found by all threads of a block; padding (-1) is below it.
__device__ inline Index oldest_kept(const Index* positions, Index T, Index R) {
    Index newest = -1;
    for (Index t = threadIdx.x; t < T; t += blockDim.x) newest = max(newest, positions[t]);
    return max(block_max(newest) - R + 1, Index(0));
}

// Block (i, b) -> tokens i·per .. of row b, one after the other; its threads take the KC = K·C numbers of each in turn.
// No two tokens that stay share a slot. Without v it writes keys alone.
template <class New, class Stored>
__global__ void kv_cache_forward(Stored* k_cache, Stored* v_cache, const New* k, const New* v, const Index* positions,
                                 Index T, Index R, Index KC, Index per) {
    Index b = blockIdx.y, first = blockIdx.x * per, oldest = oldest_kept(positions + b * T, T, R);
    for (Index t = first; t < min(first + per, T); t++) {
        Index position = positions[b * T + t];
        if (position < oldest) continue;
        Index from = (b * T + t) * KC, to = (b * R + position % R) * KC;
        for (Index i = threadIdx.x; i < KC; i += blockDim.x) {
            k_cache[to + i] = narrow<Stored>(widen(k[from + i]));
            if (v) v_cache[to + i] = narrow<Stored>(widen(v[from + i]));
        }
    }
}

// Block b -> row b; its threads take the T tokens in turn.
__global__ void kv_cache_positions(Index* cache_positions, Index* slots, const Index* positions, Index T, Index R) {
    Index b = blockIdx.x, oldest = oldest_kept(positions + b * T, T, R);
    for (Index t = threadIdx.x; t < T; t += blockDim.x) {
        Index position = positions[b * T + t], slot = position >= oldest ? position % R : -1;
        slots[b * T + t] = slot;
        if (slot >= 0) cache_positions[b * R + slot] = position;
    }
}

// Block and thread -> as in the forward: cache[b, slot] = new[b, t]. What did not stay has no gradient.
template <class Real>
__global__ void kv_cache_backward(Real* dk_cache, Real* dv_cache, Real* dk, Real* dv, const Index* positions, Index T,
                                  Index R, Index KC, Index per) {
    Index b = blockIdx.y, first = blockIdx.x * per, oldest = oldest_kept(positions + b * T, T, R);
    for (Index t = first; t < min(first + per, T); t++) {
        Index position = positions[b * T + t], to = (b * T + t) * KC;
        bool stays = position >= oldest;
        Index from = stays ? (b * R + position % R) * KC : 0;
        for (Index i = threadIdx.x; i < KC; i += blockDim.x) {
            dk[to + i] = stays ? dk_cache[from + i] : Real(0);
            dv[to + i] = stays ? dv_cache[from + i] : Real(0);
            if (stays) dk_cache[from + i] = dv_cache[from + i] = 0;
        }
    }
}
