// Grouped-query attention in CUDA C++: scores are not kept, but few queries', and every sum has one order.
//
// The T·G queries of the G heads that share a key/value head kh are one list of rows, row r = head kh·G + r % G of token
// r / G, so that a key or value that has been loaded serves all of them. A block takes some rows and goes through the keys
// in tiles. Memory grows with T and S, not with T·S.
//
// float and double: keys and values in one pass. With the running maximum m of a row's scores, its sums of exp(score - m)
// and of exp(score - m) · v are multiplied by exp(old m - new m) whenever a tile raises m (Milakov and Gimelshein, arXiv
// 1805.02867; Dao et al., FlashAttention, arXiv 2205.14135), and divided at the end.
// bfloat16: the probability that is rounded before its product with v is exp(score - m) / sum, so maximum and sum must be
// known before. Keys are passed for them; then the probabilities meet the values. Of few rows the scores are kept in
// between (rows·S numbers are little beside S keys), and each key is read once; of many they are computed twice.
//
// attention_rows                       float, double
// attention_scores, attention_values   bfloat16, few rows (decoding): products by scalar code
// attention_tiles                      bfloat16, many rows: products on tensor cores
// attention_merge, attention_add       where the keys were dealt to several blocks: join their parts
// attention_backward_q, attention_backward_kv
#include "../../kernels.cuh"

constexpr int THREADS = 128; // of a block of the forward

// Four numbers side by side.
template <class T> struct alignas(sizeof(T) == 2 ? 8 : 16) Four {
    T at[4];
};

// Where row r of key/value head kh stands among the B·T·H rows of q and out.
__device__ inline Index place(Index b, Index kh, Index r, Index T, Index H, Index G) {
    return (b * T + r / G) * H + kh * G + r % G;
}

template <class Real> __device__ inline Real scaled(Real dot, Real scale, Real cap) {
    Real score = dot * scale;
    return cap > 0 ? cap * hyperbolic_tangent(score / cap) : score;
}

__device__ inline bool sees(Index q_pos, Index k_pos, Index window) {
    return k_pos >= 0 && q_pos >= k_pos && q_pos - k_pos < window;
}

// The lowest and highest position of rows first .. first + rows, padding left out (found by each warp for itself).
struct Span {
    Index early, late;
    bool padded; // or rows beyond the last

    __device__ Span(const Index* positions, Index first, Index rows, Index G, Index T) {
        Index low = Index(1) << 62, high = -1;
        int empty = first + rows > T * G;
        for (Index t = first / G + threadIdx.x % 32; t <= (first + rows - 1) / G && t < T; t += 32) {
            Index position = positions[t];
            empty |= position < 0;
            if (position >= 0) low = min(low, position);
            high = max(high, position);
        }
        early = -warp_max(-low);
        late = warp_max(high);
        padded = __any_sync(ALL_LANES, empty);
    }
};

constexpr unsigned char NOTHING = 0, SOMETHING = 1, EVERYTHING = 2;

// What queries of a span see of keys first .. first + tile: every query everything, nothing, or something (a whole warp).
__device__ inline unsigned char sight(const Span& queries, const Index* k_pos, Index first, Index tile, Index S,
                                      Index window) {
    int some = 0, all = !queries.padded;
    for (Index s = first + threadIdx.x % 32; s < first + tile; s += 32) {
        Index position = s < S ? k_pos[s] : -1;
        some |= position >= 0 && position <= queries.late && queries.early - position < window;
        all &= sees(queries.early, position, window) && queries.late - position < window;
    }
    if (!__any_sync(ALL_LANES, some)) return NOTHING;
    return __all_sync(ALL_LANES, all) ? EVERYTHING : SOMETHING;
}

// Tiles blockIdx.y, blockIdx.y + gridDim.y, .. are a block's: dealt in turn, so that a half-empty cache busies all blocks.
// Note in `sights` what its queries see of each; warps take them in turn. Returns their number.
__device__ inline int look(unsigned char* sights, const Span& queries, const Index* k_pos, Index tile, Index S,
                           Index window) {
    Index tiles = (S + tile - 1) / tile;
    int mine = static_cast<int>((tiles - blockIdx.y + gridDim.y - 1) / gridDim.y);
    for (int n = threadIdx.x / 32; n < mine; n += blockDim.x / 32) {
        unsigned char found = sight(queries, k_pos, (blockIdx.y + Index(n) * gridDim.y) * tile, tile, S, window);
        if (threadIdx.x % 32 == 0) sights[n] = found;
    }
    return mine;
}

// Begin to copy `count` rows of C numbers, `step` apart, into shared memory, `stride` bytes apart: in 16 bytes where rows
// are aligned to them (`packed`), else number by number, which is done at once.
template <class T>
__device__ inline void copy_rows(unsigned char* to, const T* from, Index step, int count, int C, int stride, bool packed) {
    if (packed) {
        int packs = C * int(sizeof(T)) / 16;
        for (int i = threadIdx.x; i < count * packs; i += blockDim.x) {
            int row = i / packs, at = i % packs;
            copy_16_bytes(to + row * stride + 16 * at, from + row * step + at * Pack<T>::size);
        }
    } else {
        for (int i = threadIdx.x; i < count * C; i += blockDim.x) {
            int row = i / C, c = i % C;
            reinterpret_cast<T*>(to + row * stride)[c] = from[row * step + c];
        }
    }
}

// Of scores of a row: their maximum, and the sum of exp(score - maximum).
template <class Real> struct Softmax {
    Real top = -INFINITE, total = 0;

    __device__ Real base() const { return top == -INFINITE ? Real(0) : top; } // nothing seen yet: exp(-inf) = 0, not NaN
    // Let the maximum be `higher`; returns what sums that were made with the old one are to be multiplied by.
    __device__ Real raise(Real higher) {
        Real old = top;
        top = higher;
        Real factor = exponential(old - base());
        total *= factor;
        return factor;
    }
    // Join with those of other lanes: LANES side by side, a power of two. All get the same bits.
    template <int LANES> __device__ void join() {
        Real most = top;
#pragma unroll
        for (int step = LANES / 2; step > 0; step /= 2) most = max(most, __shfl_xor_sync(ALL_LANES, most, step));
        raise(most);
#pragma unroll
        for (int step = LANES / 2; step > 0; step /= 2) total += __shfl_xor_sync(ALL_LANES, total, step);
    }
    // Of all scores of a row, LANES lanes sharing its parts, `step` apart from `at`.
    template <int LANES> __device__ static Softmax of_parts(const Real* tops, const Real* totals, Index at, Index step,
                                                            int parts) {
        Softmax all;
        for (int i = threadIdx.x % LANES; i < parts; i += LANES) {
            Index part = at + i * step;
            all.raise(max(all.top, tops[part]));
            all.total += totals[part] * exponential(tops[part] - all.base());
        }
        all.template join<LANES>();
        return all;
    }
    __device__ Real logarithm_of_sum() const { return top + logarithm(total); } // nothing seen: -inf + log 0
    __device__ Real divided() const { return total == 0 ? Real(0) : 1 / total; }
};

__device__ inline void clear(unsigned char* bytes, int size) { // size: a multiple of 16
    for (int i = threadIdx.x; i < size / 16; i += blockDim.x) reinterpret_cast<Pack<unsigned>*>(bytes)[i] = {};
}

// ---- float and double

// Block (x, y, b·K + kh) -> rows x·rows .. of the list, tiles y, y + gridDim.y, .. of the keys. Of a tile,
//   thread -> scores of one key with ROWS rows:       lanes take keys side by side, and read all of a key
//   warp   -> maximum, exp and sum of a row:          lanes take its keys
//   thread -> ITEMS times: 4 columns of ROWS sums of p · v
// Rows of k and v lie an odd number of 16 bytes apart, so that eight lanes that read 16 bytes of eight keys use all 32
// banks. While a tile is worked on, the next is copied: 32 KB for C = 128 in float, three blocks to a multiprocessor.
// Where gridDim.y > 1, out takes the sums, lse the maxima and totals the sums of exp, for attention_merge.
template <class Real, int ROWS, int ITEMS>
__global__ void __launch_bounds__(THREADS, 2)
attention_rows(const Real* q, const Real* k, const Real* v, const Index* q_pos, const Index* k_pos, Index window,
               double scale, double cap, Real* out, Real* lse, Real* totals, Index T, Index S, Index H, Index K, Index C,
               Index rows, Index tile, Index packed) {
    constexpr int PACK = Pack<Real>::size;
    Index G = H / K, b = blockIdx.z / K, kh = blockIdx.z % K, first_row = blockIdx.x * rows;
    int width = int(C), keys = int(tile), packs = (width + PACK - 1) / PACK, stride = 16 * (packs | 1);
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    int count = int(min(rows, T * G - first_row)), groups = (count + ROWS - 1) / ROWS, chunks = (width + 3) / 4;
    Span span(q_pos + b * T, first_row, rows, G, T);

    DYNAMIC_SHARED(unsigned char, tiles); // k, v, k, v, each keys · stride bytes
    Real* queries = reinterpret_cast<Real*>(tiles + 4 * keys * stride); // (rows, packs · PACK)
    Index* positions = reinterpret_cast<Index*>(queries + rows * packs * PACK);
    Real* scores = reinterpret_cast<Real*>(positions + rows); // (rows, keys)
    Softmax<Real>* softmax = reinterpret_cast<Softmax<Real>*>(scores + rows * keys);
    Real* factor = reinterpret_cast<Real*>(softmax + rows);
    unsigned char* sights = reinterpret_cast<unsigned char*>(factor + rows);

    int mine = look(sights, span, k_pos + b * S, tile, S, window);
    if (!packed) clear(tiles, 4 * keys * stride); // columns between C and the next whole pack
    for (int i = threadIdx.x; i < rows * packs * PACK; i += THREADS) {
        int row = i / (packs * PACK), c = i % (packs * PACK);
        bool there = row < count && c < width;
        queries[i] = there ? q[place(b, kh, first_row + row, T, H, G) * C + c] : Real(0);
    }
    for (int row = threadIdx.x; row < rows; row += THREADS) {
        positions[row] = row < count ? q_pos[b * T + (first_row + row) / G] : -1;
        softmax[row] = {};
        factor[row] = 0;
    }
    __syncthreads();

    auto begin = [&](int n, int buffer) { // to copy tile n
        Index first = (blockIdx.y + Index(n) * gridDim.y) * tile, at = ((b * S + first) * K + kh) * C;
        unsigned char* to = tiles + 2 * buffer * keys * stride;
        int there = int(min(tile, S - first));
        copy_rows(to, k + at, K * C, there, width, stride, packed);
        copy_rows(to + keys * stride, v + at, K * C, there, width, stride, packed);
        copies_commit();
    };
    auto next = [&](int n) { // tile of which anything is seen
        while (n < mine && sights[n] == NOTHING) n++;
        return n;
    };

    Real sums[ITEMS][ROWS][4] = {};
    int n = next(0), buffer = 0;
    if (n < mine) begin(n, 0);
    while (n < mine) {
        copies_wait<0>();
        __syncthreads(); // the tile is there, and nobody reads the one before
        int following = next(n + 1);
        if (following < mine) begin(following, 1 - buffer);
        Index first = (blockIdx.y + Index(n) * gridDim.y) * tile;
        const unsigned char* k_tile = tiles + 2 * buffer * keys * stride;
        const unsigned char* v_tile = k_tile + keys * stride;

        for (int item = threadIdx.x; item < groups * keys; item += THREADS) {
            int key = item % keys, row = item / keys * ROWS;
            Index position = first + key < S ? k_pos[b * S + first + key] : -1;
            Real dot[ROWS] = {};
            for (int pack = 0; pack < packs; pack++) {
                auto x = reinterpret_cast<const Pack<Real>*>(k_tile + key * stride)[pack];
#pragma unroll
                for (int m = 0; m < ROWS; m++) {
                    auto y = reinterpret_cast<const Pack<Real>*>(queries)[(row + m) * packs + pack];
#pragma unroll
                    for (int i = 0; i < PACK; i++) dot[m] += x.at[i] * y.at[i];
                }
            }
#pragma unroll
            for (int m = 0; m < ROWS; m++) {
                Real score = scaled(dot[m], Real(scale), Real(cap));
                scores[(row + m) * keys + key] = sees(positions[row + m], position, window) ? score : Real(-INFINITE);
            }
        }
        __syncthreads();

        for (int row = warp; row < count; row += THREADS / 32) {
            Real* line = scores + row * keys;
            Softmax<Real> now = softmax[row];
            Real most = now.top, sum = 0;
            for (int key = lane; key < keys; key += 32) most = max(most, line[key]);
            Real times = now.raise(warp_max(most));
            for (int key = lane; key < keys; key += 32) {
                line[key] = exponential(line[key] - now.base());
                sum += line[key];
            }
            now.total += warp_sum(sum);
            if (lane == 0) {
                softmax[row] = now;
                factor[row] = times;
            }
        }
        __syncthreads();

        int there = int(min(tile, S - first));
#pragma unroll
        for (int i = 0; i < ITEMS; i++) {
            int item = threadIdx.x + i * THREADS, chunk = item % chunks, row = item / chunks * ROWS;
            if (item >= groups * chunks) continue;
#pragma unroll
            for (int m = 0; m < ROWS; m++)
#pragma unroll
                for (int j = 0; j < 4; j++) sums[i][m][j] *= factor[row + m];
#pragma unroll 4
            for (int key = 0; key < there; key++) {
                auto x = reinterpret_cast<const Four<Real>*>(v_tile + key * stride)[chunk];
#pragma unroll
                for (int m = 0; m < ROWS; m++)
#pragma unroll
                    for (int j = 0; j < 4; j++) sums[i][m][j] += scores[(row + m) * keys + key] * x.at[j];
            }
        }
        n = following;
        buffer = 1 - buffer;
    }
    __syncthreads();

    Index part = blockIdx.y * (gridDim.z / K) * T * H;
    for (int row = threadIdx.x; row < count; row += THREADS) {
        Index at = part + place(b, kh, first_row + row, T, H, G);
        lse[at] = totals ? softmax[row].top : softmax[row].logarithm_of_sum();
        if (totals) totals[at] = softmax[row].total;
    }
#pragma unroll
    for (int i = 0; i < ITEMS; i++) {
        int item = threadIdx.x + i * THREADS, chunk = item % chunks, row = item / chunks * ROWS;
        if (item >= groups * chunks) continue;
#pragma unroll
        for (int m = 0; m < ROWS; m++) {
            if (row + m >= count) continue;
            Real sum = softmax[row + m].total, divisor = totals || sum == 0 ? Real(1) : sum;
            Real* to = out + (part + place(b, kh, first_row + row + m, T, H, G)) * C;
#pragma unroll
            for (int j = 0; j < 4; j++)
                if (4 * chunk + j < width) to[4 * chunk + j] = sums[i][m][j] / divisor;
        }
    }
}

// Block n -> row n of the B·T·H. Part i of a row has a maximum, a sum of exp and C sums: threads take the parts, then the
// columns, each adding up its parts in order.
template <class Real>
__global__ void attention_merge(const Real* sums, const Real* tops, const Real* totals, Real* out, Real* lse, Index C,
                                Index parts) {
    DYNAMIC_SHARED(Real, weights); // of each part
    Index row = blockIdx.x, rows = gridDim.x;
    Real top = -INFINITE, total = 0;
    for (Index i = threadIdx.x; i < parts; i += blockDim.x) top = max(top, tops[i * rows + row]);
    top = block_max(top);
    Real base = top == -INFINITE ? Real(0) : top;
    for (Index i = threadIdx.x; i < parts; i += blockDim.x) {
        weights[i] = exponential(tops[i * rows + row] - base);
        total += totals[i * rows + row] * weights[i];
    }
    total = block_sum(total); // a barrier: all weights are there
    if (threadIdx.x == 0) lse[row] = top + logarithm(total);
    for (Index c = threadIdx.x; c < C; c += blockDim.x) {
        Real sum = 0;
#pragma unroll 8
        for (Index i = 0; i < parts; i++) sum += sums[(i * rows + row) * C + c] * weights[i];
        out[row * C + c] = total == 0 ? Real(0) : sum / total;
    }
}

// Block n, thread -> number n·threads + its own of the B·T·H·C: the sum of its parts, in order.
__global__ void attention_add(const float* sums, float* out, Index size, Index parts) {
    Index at = static_cast<Index>(blockIdx.x) * blockDim.x + threadIdx.x;
    if (at >= size) return;
    float sum = 0;
#pragma unroll 8
    for (Index i = 0; i < parts; i++) sum += sums[i * size + at];
    out[at] = sum;
}

// ---- few rows of bfloat16
//
// Both kernels: block (x, y, b·K + kh) -> rows x·rows .. of the list, tiles y, y + gridDim.y, .. of the keys or of the
// values. One tile is worked on while the next three arrive: for C = 128 a block has 68 KB, 51 of them under way, and three
// blocks share a multiprocessor. Scores lie in (b·K + kh, row, S) in between, which the second level of cache keeps: with
// G = 4 and C = 128 they are a sixteenth of the keys' bytes. Of what no row of a block sees none is written or read.

constexpr int STAGES = 4, FEW_AT_ONCE = 2; // rows that share what a thread has read

// Go through tiles of keys or values, which arrive in a queue: `before(n, first key)` of the n-th that anything is seen of,
// and, once it is there, and all threads have done that, `work(n, first key, its bytes)`.
template <class T, class Before, class Work>
__device__ inline void pass(unsigned char* tiles, const unsigned char* sights, int mine, const T* from, Index tile, Index S,
                            Index step, int C, int stride, bool packed, Before before, Work work) {
    int size = int(tile) * stride, begun = 0;
    auto first = [&](int n) { return (blockIdx.y + Index(n) * gridDim.y) * tile; };
    auto next = [&](int n) { // tile of which anything is seen
        while (n < mine && sights[n] == NOTHING) n++;
        return n;
    };
    auto begin = [&](int slot) { // to copy the next one; an empty group counts too
        begun = next(begun);
        if (begun < mine)
            copy_rows(tiles + slot * size, from + first(begun) * step, step, int(min(tile, S - first(begun))), C, stride, packed);
        copies_commit();
        begun++;
    };
    for (int slot = 0; slot < STAGES - 1; slot++) begin(slot);
    int n = 0;
    for (int at = next(0); at < mine; at = next(at + 1)) {
        before(n, first(at));
        copies_wait<STAGES - 2>();
        __syncthreads(); // the tile is there, and nobody reads the one before
        begin((n + STAGES - 1) % STAGES);
        work(n, first(at), tiles + n % STAGES * size);
        n++;
    }
    copies_wait<0>();
    __syncthreads();
}

// Thread -> scores of one key with FEW_AT_ONCE rows: lanes take keys side by side, and read all of a key.
// Warp -> maximum and sum of a row: lanes take its keys.
// Rows of k lie an odd number of 16 bytes apart, as in attention_rows.
template <class Stored>
__global__ void __launch_bounds__(THREADS, 2)
attention_scores(const float* q, const Stored* k, const Index* q_pos, const Index* k_pos, Index window, double scale,
                 double cap, float* scores, float* tops, float* totals, Index T, Index S, Index H, Index K, Index C,
                 Index rows, Index tile, Index packed) {
    constexpr int PACK = Pack<Stored>::size, HALF = Pack<float>::size; // PACK is HALF or 2 HALF
    Index G = H / K, b = blockIdx.z / K, kh = blockIdx.z % K, first_row = blockIdx.x * rows;
    int width = int(C), keys = int(tile), packs = (width + PACK - 1) / PACK, stride = 16 * (packs | 1);
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    int count = int(min(rows, T * G - first_row)), groups = (count + FEW_AT_ONCE - 1) / FEW_AT_ONCE;
    Span span(q_pos + b * T, first_row, rows, G, T);

    DYNAMIC_SHARED(unsigned char, tiles); // STAGES, each keys · stride bytes
    float* queries = reinterpret_cast<float*>(tiles + STAGES * keys * stride); // (rows, packs · PACK)
    Index* positions = reinterpret_cast<Index*>(queries + rows * packs * PACK);
    float* lines = reinterpret_cast<float*>(positions + rows); // (rows, keys)
    Softmax<float>* softmax = reinterpret_cast<Softmax<float>*>(lines + rows * keys);
    unsigned char* sights = reinterpret_cast<unsigned char*>(softmax + rows);

    int mine = look(sights, span, k_pos + b * S, tile, S, window);
    if (!packed) clear(tiles, STAGES * keys * stride); // columns between C and the next whole pack
    for (int i = threadIdx.x; i < rows * packs * PACK; i += THREADS) {
        int row = i / (packs * PACK), c = i % (packs * PACK);
        bool there = row < count && c < width;
        queries[i] = there ? operand<Stored>(q[place(b, kh, first_row + row, T, H, G) * C + c]) : 0.0f;
    }
    for (int row = threadIdx.x; row < rows; row += THREADS) {
        positions[row] = row < count ? q_pos[b * T + (first_row + row) / G] : -1;
        softmax[row] = {};
    }
    __syncthreads();

    float* kept = scores + (blockIdx.z * T * G + first_row) * S;
    auto nothing = [](int, Index) {};
    auto multiply = [&](int, Index first, const unsigned char* k_tile) {
        for (int item = threadIdx.x; item < groups * keys; item += THREADS) {
            int key = item % keys, row = item / keys * FEW_AT_ONCE;
            Index position = first + key < S ? k_pos[b * S + first + key] : -1;
            float dot[FEW_AT_ONCE] = {};
            for (int pack = 0; pack < packs; pack++) {
                auto x = reinterpret_cast<const Pack<Stored>*>(k_tile + key * stride)[pack];
#pragma unroll
                for (int m = 0; m < FEW_AT_ONCE; m++)
#pragma unroll
                    for (int half = 0; half < PACK; half += HALF) {
                        auto y = *reinterpret_cast<const Pack<float>*>(queries + ((row + m) * packs + pack) * PACK + half);
#pragma unroll
                        for (int i = 0; i < HALF; i++) dot[m] += widen(x.at[half + i]) * y.at[i];
                    }
            }
#pragma unroll
            for (int m = 0; m < FEW_AT_ONCE; m++) {
                float score = scaled(dot[m], float(scale), float(cap));
                if (!sees(positions[row + m], position, window)) score = -INFINITE;
                lines[(row + m) * keys + key] = score;
                if (row + m < count && first + key < S) kept[(row + m) * S + first + key] = score;
            }
        }
        __syncthreads();
        for (int row = warp; row < count; row += THREADS / 32) {
            const float* line = lines + row * keys;
            Softmax<float> now = softmax[row];
            float most = now.top, sum = 0;
            for (int key = lane; key < keys; key += 32) most = max(most, line[key]);
            now.raise(warp_max(most));
            for (int key = lane; key < keys; key += 32) sum += exponential(line[key] - now.base());
            now.total += warp_sum(sum);
            if (lane == 0) softmax[row] = now;
        }
    };
    pass(tiles, sights, mine, k + (b * S * K + kh) * C, tile, S, K * C, width, stride, packed, nothing, multiply);

    for (int row = threadIdx.x; row < count; row += THREADS) {
        Index at = blockIdx.y * (gridDim.z / K) * T * H + place(b, kh, first_row + row, T, H, G);
        tops[at] = softmax[row].top;
        totals[at] = softmax[row].total;
    }
}

// Warp -> maximum and sum of a row, joined of all parts; thread -> p of a row and a key, before the tile is there;
// thread -> ITEMS times: 4 columns of FEW_AT_ONCE sums of p · v. Where there are fewer such items than threads, threads form
// slices, which take keys in turn. Where gridDim.y > 1, out takes the sums of each part, for attention_add.
template <int ITEMS>
__global__ void __launch_bounds__(THREADS, 2)
attention_values(const bfloat16* v, const Index* q_pos, const Index* k_pos, Index window, const float* scores,
                 const float* tops, const float* totals, float* out, float* lse, Index T, Index S, Index H, Index K, Index C,
                 Index rows, Index tile, Index packed) {
    constexpr int PACK = Pack<bfloat16>::size, OF_ITEM = FEW_AT_ONCE * 4;
    Index G = H / K, b = blockIdx.z / K, kh = blockIdx.z % K, first_row = blockIdx.x * rows;
    Index all_rows = gridDim.z / K * T * H;
    int width = int(C), keys = int(tile), chunks = (width + 3) / 4, stride = 16 * ((width + PACK - 1) / PACK | 1);
    int count = int(min(rows, T * G - first_row)), items = (count + FEW_AT_ONCE - 1) / FEW_AT_ONCE * chunks;
    int slices = max(1, THREADS / items);
    Span span(q_pos + b * T, first_row, rows, G, T);

    DYNAMIC_SHARED(unsigned char, tiles); // STAGES, each keys · stride bytes; at the end ITEMS · THREADS · OF_ITEM sums
    int size = max(STAGES * keys * stride, ITEMS * THREADS * OF_ITEM * int(sizeof(float)));
    float* ps = reinterpret_cast<float*>(tiles + size); // of two tiles, (rows, keys)
    Softmax<float>* softmax = reinterpret_cast<Softmax<float>*>(ps + 2 * rows * keys);
    unsigned char* sights = reinterpret_cast<unsigned char*>(softmax + rows);

    int mine = look(sights, span, k_pos + b * S, tile, S, window);
    for (int row = threadIdx.x / 32; row < count; row += THREADS / 32) {
        Index at = place(b, kh, first_row + row, T, H, G);
        auto all = Softmax<float>::of_parts<32>(tops, totals, at, all_rows, int(gridDim.y));
        if (threadIdx.x % 32 == 0) {
            softmax[row] = all;
            if (blockIdx.y == 0) lse[at] = all.logarithm_of_sum();
        }
    }
    __syncthreads();

    const float* kept = scores + (blockIdx.z * T * G + first_row) * S;
    float sums[ITEMS][FEW_AT_ONCE][4] = {};
    auto probabilities = [&](int n, Index first) {
        for (int i = threadIdx.x; i < rows * keys; i += THREADS) {
            int row = i / keys;
            Index key = first + i % keys;
            float p = row < count && key < S ? exponential(kept[row * S + key] - softmax[row].base()) : 0.0f;
            ps[n % 2 * rows * keys + i] = row < count ? operand<bfloat16>(p * softmax[row].divided()) : 0.0f;
        }
    };
    auto multiply = [&](int n, Index first, const unsigned char* v_tile) {
        const float* p = ps + n % 2 * rows * keys;
        int there = int(min(tile, S - first));
#pragma unroll
        for (int i = 0; i < ITEMS; i++) {
            int place = threadIdx.x + i * THREADS, slice = place / items, item = place % items;
            int chunk = item % chunks, row = item / chunks * FEW_AT_ONCE;
            if (slice >= slices) continue;
#pragma unroll 4
            for (int key = slice; key < there; key += slices) {
                auto x = reinterpret_cast<const Four<bfloat16>*>(v_tile + key * stride)[chunk];
#pragma unroll
                for (int m = 0; m < FEW_AT_ONCE; m++)
#pragma unroll
                    for (int j = 0; j < 4; j++) sums[i][m][j] += p[(row + m) * keys + key] * widen(x.at[j]);
            }
        }
    };
    pass(tiles, sights, mine, v + (b * S * K + kh) * C, tile, S, K * C, width, stride, packed, probabilities, multiply);

    float* of_slices = reinterpret_cast<float*>(tiles);
#pragma unroll
    for (int i = 0; i < ITEMS; i++)
#pragma unroll
        for (int m = 0; m < FEW_AT_ONCE; m++)
#pragma unroll
            for (int j = 0; j < 4; j++)
                of_slices[(threadIdx.x + i * THREADS) * OF_ITEM + 4 * m + j] = sums[i][m][j];
    __syncthreads();
    for (int i = threadIdx.x; i < count * width; i += THREADS) {
        int row = i / width, c = i % width, item = row / FEW_AT_ONCE * chunks + c / 4;
        float sum = 0;
        for (int slice = 0; slice < slices; slice++)
            sum += of_slices[(slice * items + item) * OF_ITEM + row % FEW_AT_ONCE * 4 + c % 4];
        out[(blockIdx.y * all_rows + place(b, kh, first_row + row, T, H, G)) * C + c] = sum;
    }
}

// ---- many rows of bfloat16

// Block (x, y, b·K + kh) -> 64 rows of the list, tiles y, y + gridDim.y, .. of KEYS keys; the last rows, which see the most
// keys, first. Warp w -> rows 16 w .. of the 64, all keys of a tile; lanes hold scores and sums as `multiply_tile` says:
// rows group and group + 8, columns 8 j + 2 pair and the next. A score's place in d is its place in a of the product with
// v, so probabilities never leave their lane. WIDTH: C, filled up with zeros. Rows of k and v lie 16 bytes further apart
// than they are long, so that the eight rows of an 8 × 8 tile are in eight different groups of four banks.
// Where gridDim.y = 1, one launch does all, without tops and totals. Else one without out fills these, of every part, and
// the next, with both, takes its sums, for attention_add.
template <int WIDTH, int KEYS>
__global__ void __launch_bounds__(THREADS, 2)
attention_tiles(const float* q, const bfloat16* k, const bfloat16* v, const Index* q_pos, const Index* k_pos, Index window,
                double scale, double cap, float* out, float* lse, float* tops, float* totals, Index T, Index S, Index H,
                Index K, Index C, Index packed) {
    constexpr int ROW = WIDTH + 8, TILE = KEYS * ROW; // numbers
    Index G = H / K, b = blockIdx.z / K, kh = blockIdx.z % K, first_row = (gridDim.x - 1 - blockIdx.x) * 64;
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32, group = lane / 4, pair = lane % 4, width = int(C);
    Span span(q_pos + b * T, first_row, 64, G, T);

    DYNAMIC_SHARED(unsigned char, shared); // k, v, k, v
    bfloat16* tiles = reinterpret_cast<bfloat16*>(shared);
    unsigned char* sights = shared + 4 * TILE * sizeof(bfloat16);
    int mine = look(sights, span, k_pos + b * S, KEYS, S, window);
    clear(shared, 4 * TILE * sizeof(bfloat16)); // columns beyond C, and keys beyond S: their p = 0 must not meet a NaN

    Index places[2], positions[2]; // of the lane's two rows
    unsigned a[WIDTH / 16][4];
#pragma unroll
    for (int half = 0; half < 2; half++) {
        Index row = first_row + 16 * warp + group + 8 * half;
        bool there = row < T * G;
        places[half] = there ? place(b, kh, row, T, H, G) : -1;
        positions[half] = there ? q_pos[b * T + row / G] : -1;
        const float* numbers = q + (there ? places[half] : 0) * C;
#pragma unroll
        for (int i = 0; i < WIDTH / 8; i++) {
            int c = 8 * i + 2 * pair;
            float one = there && c < width ? numbers[c] : 0, other = there && c + 1 < width ? numbers[c + 1] : 0;
            a[i / 2][half + 2 * (i % 2)] = pack_pair(one, other);
        }
    }
    __syncthreads();

    auto next = [&](int n) { // tile of which anything is seen
        while (n < mine && sights[n] == NOTHING) n++;
        return n;
    };
    auto go_through = [&](bool values, auto work) {
        auto begin = [&](int n, int buffer) { // to copy tile n
            Index first = (blockIdx.y + Index(n) * gridDim.y) * KEYS, at = ((b * S + first) * K + kh) * C;
            unsigned char* to = reinterpret_cast<unsigned char*>(tiles + 2 * buffer * TILE);
            int there = int(min(Index(KEYS), S - first));
            copy_rows(to, k + at, K * C, there, width, 2 * ROW, packed);
            if (values) copy_rows(to + 2 * TILE, v + at, K * C, there, width, 2 * ROW, packed);
            copies_commit();
        };
        int n = next(0), buffer = 0;
        if (n < mine) begin(n, 0);
        while (n < mine) {
            copies_wait<0>();
            __syncthreads(); // the tile is there, and nobody reads the one before
            int following = next(n + 1);
            if (following < mine) begin(following, 1 - buffer);
            work(n, tiles + 2 * buffer * TILE);
            n = following;
            buffer = 1 - buffer;
        }
        __syncthreads();
    };
    auto compute_scores = [&](float(&scores)[2][4], int n, int j, const bfloat16* k_tile) { // q · kᵀ of 16 keys
#pragma unroll
        for (int i = 0; i < WIDTH / 16; i++) {
            unsigned r[4];
            load_tiles(r, k_tile + (16 * j + lane / 16 * 8 + lane % 8) * ROW + 16 * i + lane / 8 % 2 * 8);
            const unsigned left[2] = {r[0], r[1]}, right[2] = {r[2], r[3]};
            multiply_tile(scores[0], a[i], left);
            multiply_tile(scores[1], a[i], right);
        }
        bool masked = sights[n] == SOMETHING;
        Index first = (blockIdx.y + Index(n) * gridDim.y) * KEYS + 16 * j + 2 * pair;
#pragma unroll
        for (int e = 0; e < 8; e++) {
            float& score = scores[e / 4][e % 4];
            score = scaled(score, float(scale), float(cap));
            if (masked) {
                Index s = first + 8 * (e / 4) + e % 2, position = s < S ? k_pos[b * S + s] : -1;
                if (!sees(positions[e % 4 / 2], position, window)) score = -INFINITE;
            }
        }
    };

    Index all_rows = gridDim.z / K * T * H, part = blockIdx.y * all_rows;
    Softmax<float> softmax[2]; // of the lane's two rows; while keys are passed, of its own columns
    if (out && tops) {
#pragma unroll
        for (int half = 0; half < 2; half++)
            softmax[half] = Softmax<float>::of_parts<4>(tops, totals, max(places[half], Index(0)), all_rows, int(gridDim.y));
    } else {
        go_through(false, [&](int n, const bfloat16* k_tile) {
            float scores[KEYS / 16][2][4] = {};
#pragma unroll
            for (int j = 0; j < KEYS / 16; j++) compute_scores(scores[j], n, j, k_tile);
#pragma unroll
            for (int half = 0; half < 2; half++) {
                float most = softmax[half].top;
#pragma unroll
                for (int j = 0; j < KEYS / 16; j++)
#pragma unroll
                    for (int e = 0; e < 4; e++) most = max(most, scores[j][e / 2][2 * half + e % 2]);
                softmax[half].raise(most);
#pragma unroll
                for (int j = 0; j < KEYS / 16; j++)
#pragma unroll
                    for (int e = 0; e < 4; e++)
                        softmax[half].total += exponential(scores[j][e / 2][2 * half + e % 2] - softmax[half].base());
            }
        });
#pragma unroll
        for (int half = 0; half < 2; half++) softmax[half].join<4>(); // that share a row
    }
#pragma unroll
    for (int half = 0; half < 2; half++) {
        if (places[half] < 0 || pair != 0) continue;
        if (!out) tops[part + places[half]] = softmax[half].top, totals[part + places[half]] = softmax[half].total;
        else if (blockIdx.y == 0) lse[places[half]] = softmax[half].logarithm_of_sum();
    }
    if (!out) return;

    float sums[WIDTH / 8][4] = {}, base[2] = {softmax[0].base(), softmax[1].base()};
    float factor[2] = {softmax[0].divided(), softmax[1].divided()};
    go_through(true, [&](int n, const bfloat16* k_tile) {
        const bfloat16* v_tile = k_tile + TILE;
#pragma unroll 1 // the scores of 16 keys at a time are all that must be held: registers are scarce beside `a` and `sums`
        for (int j = 0; j < KEYS / 16; j++) {
            float scores[2][4] = {};
            compute_scores(scores, n, j, k_tile);
            unsigned p[4];
#pragma unroll
            for (int e = 0; e < 4; e++) {
                const float* two = &scores[e / 2][2 * (e % 2)];
                p[e] = pack_pair(exponential(two[0] - base[e % 2]) * factor[e % 2],
                                 exponential(two[1] - base[e % 2]) * factor[e % 2]);
            }
            // sums += p · v
#pragma unroll
            for (int i = 0; i < WIDTH / 16; i++) {
                unsigned r[4];
                load_tiles_turned(r, v_tile + (16 * j + lane / 8 % 2 * 8 + lane % 8) * ROW + 16 * i + lane / 16 * 8);
                const unsigned left[2] = {r[0], r[1]}, right[2] = {r[2], r[3]};
                multiply_tile(sums[2 * i], p, left);
                multiply_tile(sums[2 * i + 1], p, right);
            }
        }
    });

#pragma unroll
    for (int half = 0; half < 2; half++) {
        if (places[half] < 0) continue;
        Index at = (part + places[half]) * C;
#pragma unroll
        for (int i = 0; i < WIDTH / 8; i++)
#pragma unroll
            for (int e = 0; e < 2; e++)
                if (8 * i + 2 * pair + e < width) out[at + 8 * i + 2 * pair + e] = sums[i][2 * half + e];
    }
}

// ---- backward: probabilities again, from lse; both kernels go through square tiles of `tile` rows and keys
//
// p = exp(score - lse),  dscore = p · (dout · v - delta),  delta = Σ_s p · (dout · v) = dout · out,
// and d(dot) = dscore · slope · scale, where slope = 1 - (score / cap)² if there is a cap.
// Arrays of C columns have an odd row length in shared memory: lanes that read one column of many rows use all banks.

constexpr int BACKWARD_THREADS = 256;

// Bring `count` rows into (tile, row) numbers of shared memory and fill up with zeros; `at(i)` is where row i stands.
template <class Real, class T, class At>
__device__ inline void load_rows(Real* to, const T* from, At at, int count, int tile, int C, int row) {
    for (int i = threadIdx.x; i < tile * C; i += blockDim.x)
        to[i / C * row + i % C] = i / C < count ? static_cast<Real>(widen(from[at(i / C) * C + i % C])) : Real(0);
}

// Of row i and key j: p, and the gradient of q · k.
template <class Real> struct Slopes {
    Real p, ddot;
};
template <class Real, class Stored>
__device__ inline Slopes<Real> slopes(const Real* q, const Real* dout, const Real* k, const Real* v, int C, bool seen,
                                      Real lse, Real delta, Real scale, Real cap) {
    Real dot = 0, dp = 0;
    for (int c = 0; c < C; c++) {
        dot += operand<Stored>(q[c]) * k[c];
        dp += dout[c] * v[c];
    }
    if (!seen) return {0, 0};
    Real score = scaled(dot, scale, cap), p = exponential(score - lse);
    Real slope = cap > 0 ? (1 - score / cap * (score / cap)) * scale : scale;
    return {p, p * (dp - delta) * slope};
}

// Block (x, b·K + kh) -> rows x·tile .. of dq and delta, through all keys they see.
//   thread -> d(dot) of one row and one key;   thread -> one column of one row of dq
template <class Real, class Stored>
__global__ void __launch_bounds__(BACKWARD_THREADS, 2)
attention_backward_q(const Real* dout, const Real* q, const Stored* k, const Stored* v, const Index* q_pos,
                     const Index* k_pos, Index window, double scale, double cap, const Real* out, const Real* lse, Real* dq,
                     Real* delta, Index T, Index S, Index H, Index K, Index C, Index tile) {
    Index G = H / K, b = blockIdx.y / K, kh = blockIdx.y % K, first_row = blockIdx.x * tile;
    int width = int(C), row = width | 1, side = int(tile), count = int(min(tile, T * G - first_row));
    Span span(q_pos + b * T, first_row, tile, G, T);
    DYNAMIC_SHARED(Real, queries); // each (tile, row)
    Real* douts = queries + side * row;
    Real* dqs = douts + side * row;
    Real* keys = dqs + side * row;
    Real* values = keys + side * row;
    Real* ddots = values + side * row; // (tile, tile + 1)
    Real* deltas = ddots + side * (side + 1);
    auto query = [&](int i) { return place(b, kh, first_row + i, T, H, G); };
    load_rows(queries, q, query, count, side, width, row);
    load_rows(douts, dout, query, count, side, width, row);
    for (int i = threadIdx.x; i < side * row; i += blockDim.x) dqs[i] = 0;
    for (int i = threadIdx.x / 32; i < count; i += blockDim.x / 32) {
        Real sum = 0;
        for (Index c = threadIdx.x % 32; c < C; c += 32) sum += dout[query(i) * C + c] * out[query(i) * C + c];
        sum = warp_sum(sum);
        if (threadIdx.x % 32 == 0) deltas[i] = delta[query(i)] = sum;
    }
    for (Index first = 0; first < S; first += tile) {
        if (sight(span, k_pos + b * S, first, tile, S, window) == NOTHING) continue; // all warps find the same
        int there = int(min(tile, S - first));
        auto key = [&](int j) { return (b * S + first + j) * K + kh; };
        __syncthreads();
        load_rows(keys, k, key, there, side, width, row);
        load_rows(values, v, key, there, side, width, row);
        __syncthreads();
        for (int item = threadIdx.x; item < side * side; item += blockDim.x) {
            int i = item / side, j = item % side;
            bool seen = i < count && j < there && sees(q_pos[b * T + (first_row + i) / G], k_pos[b * S + first + j], window);
            ddots[i * (side + 1) + j] =
                slopes<Real, Stored>(queries + i * row, douts + i * row, keys + j * row, values + j * row, width, seen,
                                     seen ? lse[query(i)] : Real(0), deltas[i], Real(scale), Real(cap)).ddot;
        }
        __syncthreads();
        // forward: dot[i, j] = Σ_c q[i, c] · k[j, c]
        for (int item = threadIdx.x; item < side * width; item += blockDim.x) {
            int i = item / width, c = item % width;
            Real sum = dqs[i * row + c];
            for (int j = 0; j < there; j++) sum += ddots[i * (side + 1) + j] * keys[j * row + c];
            dqs[i * row + c] = sum;
        }
    }
    __syncthreads();
    for (int i = threadIdx.x; i < count * width; i += blockDim.x) dq[query(i / width) * C + i % width] = dqs[i / width * row + i % width];
}

// Block (x, b·K + kh) -> keys x·tile .. of dk and dv, through all rows that see them, in the order of the list.
//   thread -> p and d(dot) of one row and one key;   thread -> one column of one row of dk and of dv
template <class Real, class Stored>
__global__ void __launch_bounds__(BACKWARD_THREADS, 2)
attention_backward_kv(const Real* dout, const Real* q, const Stored* k, const Stored* v, const Index* q_pos,
                      const Index* k_pos, Index window, double scale, double cap, const Real* lse, const Real* delta,
                      Real* dk, Real* dv, Index T, Index S, Index H, Index K, Index C, Index tile) {
    Index G = H / K, b = blockIdx.y / K, kh = blockIdx.y % K, first = blockIdx.x * tile;
    int width = int(C), row = width | 1, side = int(tile), there = int(min(tile, S - first));
    DYNAMIC_SHARED(Real, keys); // each (tile, row)
    Real* values = keys + side * row;
    Real* dks = values + side * row;
    Real* dvs = dks + side * row;
    Real* queries = dvs + side * row;
    Real* douts = queries + side * row;
    Real* ps = douts + side * row; // each (tile, tile + 1)
    Real* ddots = ps + side * (side + 1);
    auto key = [&](int j) { return (b * S + first + j) * K + kh; };
    load_rows(keys, k, key, there, side, width, row);
    load_rows(values, v, key, there, side, width, row);
    for (int i = threadIdx.x; i < side * row; i += blockDim.x) dks[i] = dvs[i] = 0;
    for (Index first_row = 0; first_row < T * G; first_row += tile) {
        Span span(q_pos + b * T, first_row, tile, G, T);
        if (sight(span, k_pos + b * S, first, tile, S, window) == NOTHING) continue;
        int count = int(min(tile, T * G - first_row));
        auto query = [&](int i) { return place(b, kh, first_row + i, T, H, G); };
        __syncthreads();
        load_rows(queries, q, query, count, side, width, row);
        load_rows(douts, dout, query, count, side, width, row);
        __syncthreads();
        for (int item = threadIdx.x; item < side * side; item += blockDim.x) {
            int i = item / side, j = item % side;
            bool seen = i < count && j < there && sees(q_pos[b * T + (first_row + i) / G], k_pos[b * S + first + j], window);
            auto found = slopes<Real, Stored>(queries + i * row, douts + i * row, keys + j * row, values + j * row, width,
                                              seen, seen ? lse[query(i)] : Real(0), seen ? delta[query(i)] : Real(0),
                                              Real(scale), Real(cap));
            ps[i * (side + 1) + j] = found.p;
            ddots[i * (side + 1) + j] = found.ddot;
        }
        __syncthreads();
        // forward: dot[i, j] = Σ_c q[i, c] · k[j, c],  out[i, c] = Σ_j p[i, j] · v[j, c]
        for (int item = threadIdx.x; item < side * width; item += blockDim.x) {
            int j = item / width, c = item % width;
            Real dk_sum = dks[j * row + c], dv_sum = dvs[j * row + c];
            for (int i = 0; i < count; i++) {
                dk_sum += ddots[i * (side + 1) + j] * queries[i * row + c];
                dv_sum += ps[i * (side + 1) + j] * douts[i * row + c];
            }
            dks[j * row + c] = dk_sum;
            dvs[j * row + c] = dv_sum;
        }
    }
    __syncthreads();
    for (int i = threadIdx.x; i < there * width; i += blockDim.x) {
        dk[key(i / width) * C + i % width] = dks[i / width * row + i % width];
        dv[key(i / width) * C + i % width] = dvs[i / width * row + i % width];
    }
}
