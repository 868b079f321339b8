#include <stdexcept>
#include <string>

#include "cuda/pack_patches.h"

namespace granvit {
namespace {

// Crops of a launch: it takes 32764 bytes of parameters since CUDA 12.1, 4096 before.
#if CUDART_VERSION >= 12010
constexpr int MOST = 640, MOST_WEIGHTS = 500;
#else
constexpr int MOST = 80, MOST_WEIGHTS = 60;
#endif
using CopyJob = PackJob<CropJob, MOST>;
using ResampleJob = PackJob<ResampledCropJob, MOST>;

template <int COUNT>
struct DeviceEach {
    template <typename Body>
    __device__ void operator()(int count, const Body& body) const {
        for (int i = threadIdx.x; i < count; i += COUNT) body(i);
        __syncthreads();
    }
    // The body loads with load_shared.
    template <typename Body>
    __device__ void loading(int count, const Body& body) const {
        for (int i = threadIdx.x; i < count; i += COUNT) body(i);
        asm volatile("cp.async.wait_all;" ::: "memory");
        __syncthreads();
    }
    // What item i of every phase keeps for the next one; a thread has one item.
    template <typename State>
    struct Kept {
        State state;
        __device__ State& operator()(int) { return state; }
    };
};

__global__ void __launch_bounds__(WEIGHTS_THREADS) weights_kernel(const __grid_constant__ WeightsJob<MOST_WEIGHTS> job) {
    weights_block(job, blockIdx.x, DeviceEach<WEIGHTS_THREADS>{});
}

// Blocks on a multiprocessor: as many as leave a thread registers for all that it keeps.
template <typename T, int TAPS, bool ROUNDED>
__global__ void __launch_bounds__(TILE_COLUMNS, TAPS == 2 && !ROUNDED ? 12 : 10)
    resample_kernel(const __grid_constant__ ResampleJob job) {
    __shared__ ResampleShared<T> shared;
    resample_block<T, TAPS, ROUNDED>(job, blockIdx.x, shared, DeviceEach<TILE_COLUMNS>{});
}

template <typename T>
__global__ void __launch_bounds__(COPY_THREADS, 1280 / COPY_THREADS) copy_kernel(const __grid_constant__ CopyJob job) {
    __shared__ CopyShared<T> shared;
    copy_block<T>(job, blockIdx.x, shared, DeviceEach<COPY_THREADS>{});
}

void check(cudaError_t error, const char* doing) {
    if (error == cudaSuccess) return;
    cudaGetLastError();  // it is told here; the next call starts anew
    throw std::runtime_error(std::string("pack_patches: ") + doing + " failed: " + cudaGetErrorString(error) + " (error " +
                             std::to_string(int(error)) + "); `python -m granvit_kernels` shows what can run here");
}

// The current device, for as long as this lives.
class OnDevice {
public:
    explicit OnDevice(int device) : device(device), before(device) {
        check(cudaGetDevice(&before), "asking for the device");
        if (before != device) check(cudaSetDevice(device), "choosing the device");
    }
    ~OnDevice() {
        if (before != device) cudaSetDevice(before);
    }
    OnDevice(const OnDevice&) = delete;
    OnDevice& operator=(const OnDevice&) = delete;

private:
    int device, before;
};

}  // namespace

void pack_patches_cuda(const PackPatchesCuda& all, int device, void* to) {
    const OnDevice on(device);
    const auto stream = static_cast<cudaStream_t>(to);
    for_each_weights_launch<MOST_WEIGHTS>(all, [&](const auto& job, int64_t blocks) {
        weights_kernel<<<unsigned(blocks), WEIGHTS_THREADS, 0, stream>>>(job);
        check(cudaGetLastError(), "the launch");
    });
    by_type(all.dtype, [&](auto type) {
        using T = decltype(type);
        for_each_copy_launch<MOST>(all, [&](const CopyJob& job, int64_t blocks) {
            copy_kernel<T><<<unsigned(blocks), COPY_THREADS, 0, stream>>>(job);
            check(cudaGetLastError(), "the launch");
        });
        by_filter(all, [&](auto taps, auto rounded) {
            for_each_resample_launch<MOST>(all, [&](const ResampleJob& job, int64_t blocks) {
                resample_kernel<T, taps.value, rounded.value><<<unsigned(blocks), TILE_COLUMNS, 0, stream>>>(job);
                check(cudaGetLastError(), "the launch");
            });
        });
    });
}

}  // namespace granvit
