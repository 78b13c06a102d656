// CUDA's words for a processor: kernels compiled with this header run one block after the other, each of its threads
// as a fiber that gives way at barriers and exchanges. For tests: what it computes is what the kernel says.
//
// It stops with a message where a kernel breaks the rules that a device would not always punish: a barrier or an
// exchange that some threads never reach, half a warp in an exchange. Shared memory starts out as NaN. The order in which threads
// run between two barriers can be changed (`order`): results that depend on it have a race.
#pragma once
#include <csetjmp>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>
#include <sys/mman.h>
#include <ucontext.h>

#define CUDA_ON_CPU 1
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __restrict__
#define __align__(n) alignas(n)
// A block's static shared memory: blocks run one at a time, so one static variable serves; it is poisoned per block.
#define __shared__ static __attribute__((section("block_shared")))

struct dim3 {
    unsigned x = 1, y = 1, z = 1;
};

namespace cuda_on_cpu {

constexpr size_t STACK = 256 * 1024;

struct Warp {
    unsigned arrived[2] = {0, 0}; // lanes that reached the current exchange, by the parity of its number
    unsigned char box[2][32][64]; // what each lane hands in
};

struct Copy {
    void* to;
    const void* from;
};

struct Fiber {
    dim3 thread;
    int index = 0;                  // in the block
    jmp_buf at;
    ucontext_t context;
    bool done = false, started = false;
    unsigned long barriers = 0;     // block-wide barriers passed
    unsigned exchanges = 0;         // exchanges within the warp
    std::vector<std::vector<Copy>> copies; // groups under way, the last one still open; they land when waited for
};

inline std::vector<Fiber> fibers;
inline std::vector<Warp> warps;
inline std::vector<char*> stacks;
inline Fiber* now = nullptr;
inline jmp_buf scheduler;
inline dim3 grid_size, block_size, block_at;
inline std::vector<unsigned char> pool; // dynamic shared memory
inline unsigned long barrier_number, at_barrier;
inline bool progress;
inline void (*body)(void*);
inline void* body_data;
inline std::string failure;

[[noreturn]] inline void fail(const char* what) {
    failure = what;
    _longjmp(scheduler, 2);
}

inline void give_way() {
    if (_setjmp(now->at) == 0) _longjmp(scheduler, 1);
}

inline void entry() {
    body(body_data);
    now->done = true;
    progress = true;
    _longjmp(scheduler, 1);
}

inline void block_barrier() {
    now->barriers++;
    at_barrier++;
    progress = true;
    if (at_barrier == fibers.size()) {
        at_barrier = 0;
        barrier_number++;
    }
    while (barrier_number < now->barriers) give_way();
}

// Hand in `size` bytes and wait for all 32 lanes; returns what they handed in. A lane can be at most one exchange
// ahead of the others, so two boxes that take turns suffice.
inline unsigned char (*exchange(const void* mine, size_t size))[64] {
    Warp& warp = warps[now->index / 32];
    int lane = now->index % 32, turn = now->exchanges++ % 2;
    if (warp.arrived[turn] == 0xffffffffu) warp.arrived[turn] = 0; // the exchange before last
    memcpy(warp.box[turn][lane], mine, size);
    warp.arrived[turn] |= 1u << lane;
    progress = true;
    while (warp.arrived[turn] != 0xffffffffu) give_way();
    return warp.box[turn];
}

// Let all closed groups of copies land but the newest `under_way`.
inline void land_copies(size_t under_way) {
    auto& groups = now->copies;
    if (groups.size() <= under_way + 1) return;
    auto first_left = groups.end() - 1 - under_way;
    for (auto group = groups.begin(); group != first_left; group++)
        for (Copy copy : *group) memcpy(copy.to, copy.from, 16);
    groups.erase(groups.begin(), first_left);
}

inline void run_block(int order) {
    extern unsigned char __start_block_shared[] __attribute__((weak));
    extern unsigned char __stop_block_shared[] __attribute__((weak));
    if (__start_block_shared) memset(__start_block_shared, 0xff, __stop_block_shared - __start_block_shared);
    memset(pool.data(), 0xff, pool.size());
    size_t n = fibers.size();
    for (size_t i = 0; i < n; i++) {
        fibers[i].done = fibers[i].started = false;
        fibers[i].barriers = fibers[i].exchanges = 0;
        fibers[i].copies.assign(1, {});
    }
    for (Warp& warp : warps) warp.arrived[0] = warp.arrived[1] = 0;
    barrier_number = at_barrier = 0;
    volatile size_t finished = 0;
    static size_t step, shift, round;
    round = 0;
    while (finished < n) {
        progress = false;
        shift = order == 2 ? (round * 7919 + 13) % n : 0;
        for (step = 0; step < n; step++) {
            size_t i = order == 1 ? n - 1 - step : (step + shift) % n;
            Fiber& fiber = fibers[i];
            if (fiber.done) continue;
            now = &fiber;
            int came_back = _setjmp(scheduler);
            if (came_back == 0) {
                if (fiber.started) _longjmp(fiber.at, 1);
                fiber.started = true;
                getcontext(&fiber.context);
                fiber.context.uc_stack.ss_sp = stacks[i];
                fiber.context.uc_stack.ss_size = STACK;
                fiber.context.uc_link = nullptr;
                makecontext(&fiber.context, entry, 0);
                setcontext(&fiber.context);
            }
            if (came_back == 2) return;
            if (now->done) finished = finished + 1;
        }
        round++;
        if (!progress) {
            failure = at_barrier ? "some threads of a block never reach a barrier that others wait at"
                                 : "some lanes of a warp never reach an exchange that others wait at";
            return;
        }
    }
}

template <class... A, size_t... I>
void call(void (*kernel)(A...), void** arguments, std::index_sequence<I...>) {
    kernel(*static_cast<std::remove_reference_t<A>*>(arguments[I])...);
}

template <class... A> struct Launch {
    void (*kernel)(A...);
    void** arguments;
    static void run(void* self) {
        auto* launch = static_cast<Launch*>(self);
        call(launch->kernel, launch->arguments, std::index_sequence_for<A...>());
    }
};

// Run a kernel; returns null, or what went wrong. `sizes`: bytes of each argument as given, checked here.
template <class... A>
const char* launch(void (*kernel)(A...), const unsigned* grid, const unsigned* block, unsigned long shared, int order,
                   void** arguments, const int* sizes, int count) {
    failure.clear();
    if (count != static_cast<int>(sizeof...(A))) return "the kernel takes another number of arguments";
    int expected[] = {static_cast<int>(sizeof(A))..., 0};
    for (int i = 0; i < count; i++)
        if (sizes[i] != expected[i]) return "an argument has another size than the kernel's parameter";
    Launch<A...> job{kernel, arguments};
    body = Launch<A...>::run;
    body_data = &job;
    grid_size = {grid[0], grid[1], grid[2]};
    block_size = {block[0], block[1], block[2]};
    size_t n = size_t(block[0]) * block[1] * block[2];
    if (n == 0 || n > 1024) return "a block has 1 to 1024 threads";
    if (n % 32) return "a block must have whole warps here: a multiple of 32 threads";
    if (shared > 227 * 1024) return "a block has at most 227 KiB of dynamic shared memory (sm_90)";
    pool.assign(shared + 1, 0xff);
    fibers.resize(n);
    warps.resize(n / 32);
    while (stacks.size() < n) {
        void* stack = mmap(nullptr, STACK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (stack == MAP_FAILED) return "no memory for stacks";
        stacks.push_back(static_cast<char*>(stack));
    }
    for (size_t i = 0; i < n; i++) {
        fibers[i].index = static_cast<int>(i);
        fibers[i].thread = {unsigned(i % block[0]), unsigned(i / block[0] % block[1]), unsigned(i / block[0] / block[1])};
    }
    for (unsigned z = 0; z < grid[2]; z++)
        for (unsigned y = 0; y < grid[1]; y++)
            for (unsigned x = 0; x < grid[0]; x++) {
                block_at = {x, y, z};
                run_block(order);
                if (!failure.empty()) return failure.c_str();
            }
    return nullptr;
}

template <class T> T from_lane(T x, int lane) {
    static_assert(sizeof(T) <= 64);
    T result;
    memcpy(&result, exchange(&x, sizeof x)[lane & 31], sizeof result);
    return result;
}

inline void check_mask(unsigned mask) {
    if (mask != 0xffffffffu) fail("exchanges are among all 32 lanes here");
}

} // namespace cuda_on_cpu

#define threadIdx (cuda_on_cpu::now->thread)
#define blockIdx (cuda_on_cpu::block_at)
#define blockDim (cuda_on_cpu::block_size)
#define gridDim (cuda_on_cpu::grid_size)
constexpr int warpSize = 32;

inline void __syncthreads() { cuda_on_cpu::block_barrier(); }
inline void __syncwarp(unsigned mask = 0xffffffffu) {
    cuda_on_cpu::check_mask(mask);
    char nothing = 0;
    cuda_on_cpu::exchange(&nothing, 1);
}
template <class T> T __shfl_sync(unsigned mask, T x, int lane) {
    cuda_on_cpu::check_mask(mask);
    return cuda_on_cpu::from_lane(x, lane);
}
template <class T> T __shfl_xor_sync(unsigned mask, T x, int bits) {
    cuda_on_cpu::check_mask(mask);
    return cuda_on_cpu::from_lane(x, (cuda_on_cpu::now->index % 32) ^ bits);
}
template <class T> T __shfl_down_sync(unsigned mask, T x, int by) {
    cuda_on_cpu::check_mask(mask);
    int lane = cuda_on_cpu::now->index % 32;
    return cuda_on_cpu::from_lane(x, lane + by < 32 ? lane + by : lane);
}
template <class T> T __shfl_up_sync(unsigned mask, T x, int by) {
    cuda_on_cpu::check_mask(mask);
    int lane = cuda_on_cpu::now->index % 32;
    return cuda_on_cpu::from_lane(x, lane - by >= 0 ? lane - by : lane);
}
inline unsigned __ballot_sync(unsigned mask, int predicate) {
    cuda_on_cpu::check_mask(mask);
    auto* box = cuda_on_cpu::exchange(&predicate, sizeof predicate);
    unsigned votes = 0;
    for (int lane = 0; lane < 32; lane++) {
        int vote;
        memcpy(&vote, box[lane], sizeof vote);
        votes |= unsigned(vote != 0) << lane;
    }
    return votes;
}
inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline int __all_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) == 0xffffffffu; }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x ? __builtin_clz(x) : 32; }

inline float __uint_as_float(unsigned x) { float y; memcpy(&y, &x, 4); return y; }
inline unsigned __float_as_uint(float x) { unsigned y; memcpy(&y, &x, 4); return y; }
inline float __int_as_float(int x) { return __uint_as_float(unsigned(x)); }
template <class T> T __ldg(const T* p) { return *p; }
template <class T> T __ldcs(const T* p) { return *p; }
using std::fma;
using std::max;
using std::min;
inline float rsqrtf(float x) { return 1 / sqrtf(x); }

// ---- in place of the parts of kernels.cuh that are written in PTX

constexpr unsigned ALL_LANES = 0xffffffffu;
#define INFINITE __int_as_float(0x7f800000)
#define DYNAMIC_SHARED(T, name) T* name = reinterpret_cast<T*>(cuda_on_cpu::pool.data())

struct bfloat16;

inline float half_of_word(unsigned word, int upper) { return __uint_as_float(upper ? word & 0xffff0000u : word << 16); }

inline void multiply_tile(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
    unsigned mine[6] = {a[0], a[1], a[2], a[3], b[0], b[1]}, all[32][6];
    auto* box = cuda_on_cpu::exchange(mine, sizeof mine);
    for (int lane = 0; lane < 32; lane++) memcpy(all[lane], box[lane], sizeof mine);
    int lane = cuda_on_cpu::now->index % 32;
    for (int i = 0; i < 4; i++) {
        int row = lane / 4 + 8 * (i / 2), column = 2 * (lane % 4) + i % 2;
        for (int k = 0; k < 16; k++) {
            int pair = k % 8 / 2, upper = k % 2, late = k / 8;
            float x = half_of_word(all[4 * (row % 8) + pair][row / 8 + 2 * late], upper);
            float y = half_of_word(all[4 * column + pair][4 + late], upper);
            d[i] += x * y;
        }
    }
}

inline void load_tiles_from(unsigned (&r)[4], const void* row, bool turned) {
    auto* box = cuda_on_cpu::exchange(&row, sizeof row);
    const unsigned short* rows[32];
    for (int lane = 0; lane < 32; lane++) memcpy(&rows[lane], box[lane], sizeof row);
    if (reinterpret_cast<uintptr_t>(row) % 16) cuda_on_cpu::fail("load_tiles reads rows aligned to 16 bytes");
    int lane = cuda_on_cpu::now->index % 32;
    for (int tile = 0; tile < 4; tile++) {
        unsigned short two[2];
        for (int i = 0; i < 2; i++) {
            int at = lane / 4, column = 2 * (lane % 4) + i;
            two[i] = turned ? rows[8 * tile + column][at] : rows[8 * tile + at][column];
        }
        r[tile] = two[0] | unsigned(two[1]) << 16;
    }
    __syncwarp();
}
inline void load_tiles(unsigned (&r)[4], const bfloat16* row) { load_tiles_from(r, row, false); }
inline void load_tiles_turned(unsigned (&r)[4], const bfloat16* row) { load_tiles_from(r, row, true); }

inline void copy_16_bytes(void* to, const void* from) {
    if (reinterpret_cast<uintptr_t>(to) % 16 || reinterpret_cast<uintptr_t>(from) % 16)
        cuda_on_cpu::fail("copy_16_bytes copies between addresses aligned to 16 bytes");
    cuda_on_cpu::now->copies.back().push_back({to, from});
}
inline void copies_commit() { cuda_on_cpu::now->copies.emplace_back(); }
template <int n> inline void copies_wait() { cuda_on_cpu::land_copies(n); }
