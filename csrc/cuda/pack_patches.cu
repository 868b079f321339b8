#include <stdexcept>
#include <string>

#include "cuda/pack_patches.h"

namespace granvit {
namespace {

// Crops of a launch: it takes 32764 bytes of parameters since CUDA 12.1, 4096 before.
#if CUDART_VERSION >= 12010
constexpr int MOST = 540;
#else
constexpr int MOST = 60;
#endif
using Job = PackJob<MOST>;

template <int COUNT>
struct DeviceEach {
    template <typename Body>
    __device__ void operator()(int count, const Body& body) const {
        for (int i = threadIdx.x; i < count; i += COUNT) body(i);
        __syncthreads();
    }
};

template <typename T, int VEC>
__global__ void __launch_bounds__(THREADS, 768 / THREADS) resample_kernel(const __grid_constant__ Job job) {
    __shared__ PackShared shared;
    resample_block<T, VEC>(job, blockIdx.x, shared, DeviceEach<THREADS>{});
}

// A kernel of its own: registers and shared memory of the other would leave too few threads to keep the memory busy.
template <typename T>
__global__ void __launch_bounds__(COPY_THREADS, 1280 / COPY_THREADS) copy_kernel(const __grid_constant__ Job job) {
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

void pack_patches_cuda(const PackPatchesCuda& all, int device, void* stream) {
    const OnDevice on(device);
    by_type(all, [&](auto type, auto vector) {
        using T = decltype(type);
        constexpr int VEC = decltype(vector)::value;
        for_each_launch<MOST>(all, [&](const Job& job, int64_t blocks, bool copy) {
            const auto kernel = copy ? copy_kernel<T> : resample_kernel<T, VEC>;
            kernel<<<unsigned(blocks), copy ? COPY_THREADS : THREADS, 0, static_cast<cudaStream_t>(stream)>>>(job);
            check(cudaGetLastError(), "the launch");
        });
    });
}

}  // namespace granvit
