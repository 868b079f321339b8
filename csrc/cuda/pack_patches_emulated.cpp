#include <array>
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
    template <typename Body>
    void loading(int count, const Body& body) const {
        (*this)(count, body);
    }
    template <typename State>
    struct Kept {
        std::array<State, TILE_COLUMNS> states;
        State& operator()(int i) { return states[i]; }
    };
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
    constexpr int N = 3;  // crops of a launch
    for_each_weights_launch<N>(all, [&](const auto& job, int64_t blocks) {
        for (int block = 0; block < blocks; ++block) weights_block(job, block, each);
    });
    by_type(all.dtype, [&](auto type) {
        using T = decltype(type);
        const auto copying = std::make_unique<CopyShared<T>>();
        for_each_copy_launch<N>(all, [&](const auto& job, int64_t blocks) {
            for (int block = 0; block < blocks; ++block) copy_block<T>(job, block, poisoned(*copying), each);
        });
        const auto resampling = std::make_unique<ResampleShared<T>>();
        by_filter(all, [&](auto taps, auto rounded) {
            for_each_resample_launch<N>(all, [&](const auto& job, int64_t blocks) {
                for (int block = 0; block < blocks; ++block)
                    resample_block<T, taps.value, rounded.value>(job, block, poisoned(*resampling), each);
            });
        });
    });
}

}  // namespace granvit
