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

}  // namespace

void pack_patches_emulated(const PackPatchesCuda& all, bool backwards) {
    const auto shared = std::make_unique<PackShared>();
    by_type(all, [&](auto type, auto vector) {
        for_each_launch<3>(all, [&](const PackJob<3>& job, int64_t blocks, bool copy) {
            for (int block = 0; block < blocks; ++block) {
                if (copy) pack_block<decltype(type), decltype(vector)::value, true>(job, block, nullptr, HostEach{backwards});
                else pack_block<decltype(type), decltype(vector)::value, false>(job, block, shared.get(), HostEach{backwards});
            }
        });
    });
}

}  // namespace granvit
