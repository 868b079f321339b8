#include <cstring>
#include <memory>

#include "cuda/pack_patches.h"

namespace granvit {
namespace {

struct HostEach {
    bool backwards;

    template <typename Body>
    void operator()(int count, const Body& body) const {
        for (int i = 0; i < count; ++i) body(backwards ? count - 1 - i : i);
    }
};

// Shared memory that a block has to write before it reads: 0xff is NaN.
template <typename Shared>
Shared& poisoned(Shared& shared) {
    std::memset(static_cast<void*>(&shared), 0xff, sizeof(shared));
    return shared;
}

}  // namespace

void pack_patches_emulated(const PackPatchesCuda& all, bool backwards) {
    const HostEach each{backwards};
    by_type(all, [&](auto type, auto vector) {
        using T = decltype(type);
        const auto copying = std::make_unique<CopyShared<T>>();
        const auto resampling = std::make_unique<PackShared>();
        for_each_launch<3>(all, [&](const PackJob<3>& job, int64_t blocks, bool copy) {
            for (int block = 0; block < blocks; ++block) {
                if (copy) copy_block<T>(job, block, poisoned(*copying), each);
                else resample_block<T, decltype(vector)::value>(job, block, poisoned(*resampling), each);
            }
        });
    });
}

}  // namespace granvit
