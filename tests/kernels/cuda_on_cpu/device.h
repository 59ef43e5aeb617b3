// What the CUDA sources of mamba-ssm and causal-conv1d use of CUDA and of cub, on a CPU.
//
// A block's threads are fibers, which take turns: one runs until it waits for the others (__syncthreads, a shuffle), then
// the next. Blocks run one after another. Kept from a GPU, as results depend on it: the order in which a block's scan
// and sums are taken (warps of 32, then over warps), subnormal numbers flushed to zero and exp as exp2, as
// `--use_fast_math` makes them, limits of a launch, and loads of 16 bytes that must begin at a multiple of 16. Shared
// memory begins as NaN. Not kept: time, and the last bits of exp2 and of divisions.
#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Exception.h>
#include <c10/util/Half.h>
#include <c10/util/complex.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <exception>
#include <functional>
#include <memory>
#include <mutex>
#include <type_traits>
#include <vector>
#if defined(__SSE__)
#include <xmmintrin.h>
#endif

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define CUB_WARP_THREADS(arch) 32
#define C10_CUDA_CHECK(...) __VA_ARGS__
#define C10_CUDA_KERNEL_LAUNCH_CHECK()

struct dim3 {
    unsigned x, y, z;
    dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(8) float2 { float x, y; };
struct float3 { float x, y, z; };
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct half2 { at::Half x, y; };
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline float2 __half22float2(half2 v) { return {float(v.x), float(v.y)}; }

using cudaStream_t = void*;
constexpr int cudaFuncAttributeMaxDynamicSharedMemorySize = 8;
inline dim3 gridDim, blockDim, blockIdx, threadIdx;

namespace gpu {

constexpr int WARP = 32;
constexpr size_t SHARED = 227 * 1024, STACK = 256 * 1024;

struct Barrier {
    unsigned waiting = 0, round = 0;
};

struct Thread {
    void* place[5];
    bool done;
};

struct Warp {
    Barrier barrier;
    unsigned live;
    alignas(16) char values[2][WARP * 16];
};

inline std::mutex one_launch;
inline std::vector<Thread> threads;
inline std::vector<Warp> warps;
inline std::unique_ptr<char[]> stacks;
inline Barrier all;
inline unsigned live, current, idle;  // idle: how many waited in vain one after another
inline void* launcher[5];
inline std::function<void()> body;
inline std::exception_ptr failed;

inline void open(Barrier& b) {
    b.waiting = 0;
    ++b.round;
    idle = 0;
}

// On to the next thread of the block; back to the launch where none is left, or none can go on.
[[noreturn, gnu::noipa]] inline void next() {
    const unsigned n = threads.size();
    if (!live || failed || ++idle > 2 * n) __builtin_longjmp(launcher, 1);
    do current = current + 1 < n ? current + 1 : 0;
    while (threads[current].done);
    threadIdx.x = current;
    __builtin_longjmp(threads[current].place, 1);
}

[[gnu::noipa]] inline void yield() {
    if (!__builtin_setjmp(threads[current].place)) next();
}

inline void wait(Barrier& b, unsigned of) {
    const unsigned round = b.round;
    if (++b.waiting == of) open(b);
    while (b.round == round) yield();
}

inline void leave(Barrier& b, unsigned& of) {
    if (--of && b.waiting == of) open(b);
}

[[gnu::noipa]] inline void run_thread() {
    try {
        body();
    } catch (...) {
        failed = std::current_exception();
    }
    threads[current].done = true;
    idle = 0;
    leave(all, live);
    leave(warps[current / WARP].barrier, warps[current / WARP].live);
}

[[noreturn, gnu::noipa]] inline void back() { __builtin_longjmp(launcher, 1); }

[[gnu::noipa]] inline void park() {
    if (!__builtin_setjmp(threads[current].place)) back();
}

// One thread of a block after another; a thread of the next block begins where that of the last one ended.
inline void fiber() {
    for (park();; yield()) run_thread();
}

[[gnu::noipa]] inline void make_thread(unsigned i) {
    ucontext_t start;
    getcontext(&start);
    start.uc_stack.ss_sp = stacks.get() + i * STACK;
    start.uc_stack.ss_size = STACK;
    start.uc_link = nullptr;
    makecontext(&start, fiber, 0);
    current = i;
    if (!__builtin_setjmp(launcher)) setcontext(&start);
}

[[gnu::noipa]] inline void run_block() {
    for (Thread& t : threads) t.done = false;
    for (Warp& w : warps) w.live = std::min<unsigned>(WARP, threads.size() - (&w - warps.data()) * WARP);
    live = threads.size();
    idle = 0;
    current = live - 1;
    if (!__builtin_setjmp(launcher)) next();
    asm volatile("" ::: "memory");  // other fibers have written since
    if (failed) std::rethrow_exception(std::exchange(failed, nullptr));
    TORCH_CHECK(!live, "the threads of a block wait for each other at different barriers");
}

// Subnormal numbers are zero while a kernel runs.
struct Flush {
#if defined(__SSE__)
    unsigned before = _mm_getcsr();
    Flush() { _mm_setcsr(before | 0x8040); }
    ~Flush() { _mm_setcsr(before); }
#elif defined(__aarch64__)
    uint64_t before;
    Flush() {
        asm volatile("mrs %0, fpcr" : "=r"(before));
        asm volatile("msr fpcr, %0" ::"r"(before | (1ull << 24)));
    }
    ~Flush() { asm volatile("msr fpcr, %0" ::"r"(before)); }
#endif
};

inline float exp(float x) { return exp2f(x * 1.4426950408889634f); }

}  // namespace gpu

alignas(16) inline char smem_[gpu::SHARED];

namespace gpu {

template <class Params, class Given, class Stream>
void launch(void (*kernel)(Params), dim3 grid, dim3 block, size_t shared, Stream, Given& params) {
    TORCH_CHECK(grid.x && grid.y && grid.z && grid.y < 65536 && grid.z < 65536 && block.x * block.y * block.z <= 1024
                    && shared <= SHARED, "CUDA error: invalid configuration argument");
    std::lock_guard<std::mutex> lock(one_launch);
    Flush flush;
    gridDim = grid;
    blockDim = block;
    if (threads.size() < block.x) stacks.reset(new char[block.x * STACK]);
    threads.assign(block.x, Thread());
    warps.assign((block.x + WARP - 1) / WARP, Warp());
    all = Barrier();
    body = [&] { kernel(params); };
    for (unsigned i = 0; i < block.x; ++i) make_thread(i);
    for (unsigned z = 0; z < grid.z; ++z)
        for (unsigned y = 0; y < grid.y; ++y)
            for (unsigned x = 0; x < grid.x; ++x) {
                blockIdx = dim3(x, y, z);
                std::memset(smem_, 0xff, shared);
                run_block();
            }
}

inline unsigned lane() { return threadIdx.x % WARP; }
inline unsigned warp() { return threadIdx.x / WARP; }

// The values that the lanes of this warp give, of which the last one to come makes others with `f`.
template <class T, class F>
const T* together(T value, F f) {
    static_assert(sizeof(T) <= 16);
    Warp& w = warps[warp()];
    T* values = reinterpret_cast<T*>(w.values[w.barrier.round % 2]);  // a lane that is ahead writes to the other half
    values[lane()] = value;
    if (w.barrier.waiting + 1 == w.live) f(values);
    wait(w.barrier, w.live);
    return values;
}

// The value that the lane `from` of this warp gives.
template <class T>
T shuffle(T value, int from) { return together(value, [](T*) {})[from]; }

template <class T>
void aligned(const T* p) {
    TORCH_CHECK(reinterpret_cast<uintptr_t>(p) % sizeof(T) == 0, "CUDA error: misaligned address");
}

}  // namespace gpu

#define expf(x) gpu::exp(x)
inline void __syncthreads() { gpu::wait(gpu::all, gpu::live); }
template <class T>
T __shfl_xor_sync(unsigned, T value, int offset) { return gpu::shuffle(value, gpu::lane() ^ offset); }
template <class T>
void atomicAdd(T* to, T value) { *to += value; }
template <class T>
void gpuAtomicAdd(T* to, T value) { *to += value; }
template <class K>
void cudaFuncSetAttribute(K, int, size_t shared) {
    TORCH_CHECK(shared <= gpu::SHARED, "CUDA error: invalid argument");
}

namespace cuda {
namespace std = ::std;
}

namespace cub {

enum BlockLoadAlgorithm { BLOCK_LOAD_DIRECT, BLOCK_LOAD_WARP_TRANSPOSE };
enum BlockStoreAlgorithm { BLOCK_STORE_DIRECT, BLOCK_STORE_WARP_TRANSPOSE };
enum BlockScanAlgorithm { BLOCK_SCAN_RAKING, BLOCK_SCAN_RAKING_MEMOIZE, BLOCK_SCAN_WARP_SCANS };

template <class T>
struct Uninitialized {
    alignas(T) char bytes[sizeof(T)];
    T& Alias() { return reinterpret_cast<T&>(bytes); }
};

template <int N>
struct Log2 { static constexpr int VALUE = N > 1 ? 1 + Log2<(N > 1 ? N / 2 : 1)>::VALUE : 0; };
template <>
struct Log2<1> { static constexpr int VALUE = 0; };

template <int>
unsigned WarpMask(unsigned) { return ~0u; }
inline unsigned RowMajorTid(int, int, int) { return threadIdx.x; }

template <int N, class T>
T ShuffleDown(T value, int offset, int last, unsigned) {
    static_assert(N == gpu::WARP);
    const int from = gpu::lane() + offset;
    return gpu::shuffle(value, from <= last ? from : int(gpu::lane()));
}
template <int N, class T>
T ShuffleIndex(T value, int from, unsigned) {
    static_assert(N == gpu::WARP);
    return gpu::shuffle(value, from);
}

template <class T, int N, int K, BlockLoadAlgorithm = BLOCK_LOAD_DIRECT>
struct BlockLoad {
    struct TempStorage { alignas(16) char bytes[sizeof(T) * N * K]; };
    explicit BlockLoad(TempStorage&) {}
    void Load(const T* from, T (&items)[K]) { Load(from, items, N * K); }
    void Load(const T* from, T (&items)[K], int valid) {
        gpu::aligned(from);
        for (int i = 0, at = threadIdx.x * K; i < K; ++i, ++at)
            if (at < valid) items[i] = from[at];
    }
    template <class Default>
    void Load(const T* from, T (&items)[K], int valid, Default otherwise) {
        for (T& item : items) item = T(otherwise);
        Load(from, items, valid);
    }
};

template <class T, int N, int K, BlockStoreAlgorithm = BLOCK_STORE_DIRECT>
struct BlockStore {
    struct TempStorage { alignas(16) char bytes[sizeof(T) * N * K]; };
    explicit BlockStore(TempStorage&) {}
    void Store(T* to, const T (&items)[K], int valid = N * K) {
        gpu::aligned(to);
        for (int i = 0, at = threadIdx.x * K; i < K; ++i, ++at)
            if (at < valid) to[at] = items[i];
    }
};

template <class T, int N, int K>
struct BlockExchange {
    struct TempStorage { T items[N * K]; };
    TempStorage& temp;
    explicit BlockExchange(TempStorage& temp) : temp(temp) {}
    void BlockedToStriped(const T (&in)[K], T (&out)[K]) {
        for (int i = 0; i < K; ++i) temp.items[threadIdx.x * K + i] = in[i];
        __syncthreads();
        for (int i = 0; i < K; ++i) out[i] = temp.items[i * N + threadIdx.x];
    }
};

template <class T, int N>
struct BlockReduce {
    struct TempStorage { T warps[N / gpu::WARP]; };
    TempStorage& temp;
    explicit BlockReduce(TempStorage& temp) : temp(temp) {}
    // The sum, which the first thread alone is given.
    T Sum(T value) {
        value = gpu::together(value, [](T* v) {
            for (int offset = gpu::WARP / 2; offset; offset /= 2)
                for (int lane = 0; lane + offset < gpu::WARP; ++lane) v[lane] = v[lane] + v[lane + offset];
        })[gpu::lane()];
        if (gpu::lane() == 0) temp.warps[gpu::warp()] = value;
        __syncthreads();
        if (threadIdx.x == 0)
            for (int w = 1; w < N / gpu::WARP; ++w) value = value + temp.warps[w];
        return value;
    }
};

// Every algorithm as BLOCK_SCAN_WARP_SCANS: within warps, then over warps, then the prefix that warp 0 is asked for.
template <class T, int N, BlockScanAlgorithm = BLOCK_SCAN_RAKING>
struct BlockScan {
    struct TempStorage { T warps[N / gpu::WARP], prefix; };
    TempStorage& temp;
    explicit BlockScan(TempStorage& temp) : temp(temp) {}
    template <int K, class Op, class Prefix>
    void InclusiveScan(T (&in)[K], T (&out)[K], Op op, Prefix& prefix) {
        const unsigned lane = gpu::lane(), warp = gpu::warp();
        T sum = in[0];
        for (int i = 1; i < K; ++i) sum = op(sum, in[i]);
        const T* inclusive = gpu::together(sum, [&](T* v) {
            for (int offset = 1; offset < gpu::WARP; offset *= 2)
                for (int lane = gpu::WARP - 1; lane >= offset; --lane) v[lane] = op(v[lane - offset], v[lane]);
        });
        T before = inclusive[lane ? lane - 1 : 0];
        if (lane == gpu::WARP - 1) temp.warps[warp] = inclusive[lane];
        __syncthreads();
        T total = temp.warps[0];
        for (unsigned w = 1; w < N / gpu::WARP; ++w) {
            if (w == warp) before = lane ? op(total, before) : total;
            total = op(total, temp.warps[w]);
        }
        if (warp == 0) {
            const T seed = prefix(total);
            if (lane == 0) temp.prefix = before = seed;
        }
        __syncthreads();
        if (threadIdx.x) before = op(temp.prefix, before);
        for (int i = 0; i < K; ++i) out[i] = before = op(before, in[i]);
    }
};

template <class T, int N>
struct BlockRakingLayout {
    static constexpr int RAKING_THREADS = N < gpu::WARP ? N : gpu::WARP, SEGMENT_LENGTH = N / RAKING_THREADS;
    static constexpr bool UNGUARDED = N % RAKING_THREADS == 0;
    struct TempStorage { T items[N]; };
    static T* PlacementPtr(TempStorage& temp, unsigned thread) { return temp.items + thread; }
    static T* RakingPtr(TempStorage& temp, unsigned thread) { return temp.items + thread * SEGMENT_LENGTH; }
};

}  // namespace cub
