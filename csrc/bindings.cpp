// The only file that knows Python. Addresses come as integers (tensor.data_ptr()), sizes in elements.
//
// To add an operator: include its header, write one `void bind_NAME(py::module_&)` that converts addresses with at<T>() and
// releases the GIL (py::call_guard<py::gil_scoped_release>()), call it at the end, and raise INTERFACE in
// granvit_kernels/native.py, as for every change here. Checks of shapes, dtypes and devices
// belong to the Python side: what arrives here is contiguous and in range, unless a comment says otherwise.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "common/dtype.h"
#include "common/isa.h"
#include "cpu/pack_patches.h"
#include "cpu/plan_packing.h"
#include "cpu/region_attention.h"
#include "cpu/region_pool.h"
#include "cpu/roi_gather.h"
#include "cuda/pack_patches.h"

namespace py = pybind11;
using Address = uintptr_t;

namespace {

template <typename T>
T* at(Address address) {
    return reinterpret_cast<T*>(address);
}

using Release = py::call_guard<py::gil_scoped_release>;

void bind_pack_patches(py::module_& m) {
    using granvit::PackPatches;
    using granvit::PackPatchesCuda;
    const auto job = [](Address images, Address crops, Address grids, Address frames, int64_t num_crops,
                        int64_t patch_size, int64_t merge, std::array<float, 3> scale, std::array<float, 3> bias,
                        bool channels_first, int filter, int rounding, int dtype, Address patches) {
        return PackPatches{at<const int64_t>(images), at<const double>(crops), at<const int64_t>(grids),
                           at<const int64_t>(frames), num_crops, patch_size, merge, {scale[0], scale[1], scale[2]},
                           {bias[0], bias[1], bias[2]}, channels_first, granvit::Filter(filter),
                           granvit::Rounding(rounding), granvit::Dtype(dtype), at<void>(patches)};
    };
    py::class_<PackPatches>(m, "PackPatches", py::module_local()).def(py::init(job));
    m.def("pack_patches", [](const PackPatches& all, int threads) { granvit::pack_patches(all, threads); }, Release());
    // As PackPatches, and where the layout goes: its grids and cu_seqlens. A workspace of so many bytes has to be lent.
    const auto cuda = [](const PackPatches& all, Address layout_grids, Address cu_seqlens) {
        return PackPatchesCuda{all, at<int32_t>(layout_grids), at<int32_t>(cu_seqlens), nullptr};
    };
    py::class_<PackPatchesCuda>(m, "PackPatchesCuda", py::module_local())
        .def(py::init(cuda))
        .def_property_readonly("workspace_bytes", &PackPatchesCuda::workspace_bytes)
        .def("lend", [](PackPatchesCuda& all, Address workspace) { all.workspace = at<int32_t>(workspace); });
    m.def("pack_patches_emulated", [](const PackPatchesCuda& all, bool backwards) {
        granvit::pack_patches_emulated(all, backwards);
    }, Release());
#ifdef GRANVIT_CUDA
    m.def("pack_patches_cuda", [](const PackPatchesCuda& all, int device, Address stream) {
        granvit::pack_patches_cuda(all, device, at<void>(stream));
    }, Release());
#endif
}

void bind_plan_packing(py::module_& m) {
    m.def(
        "plan_packing",
        [](Address lengths, int64_t count, int64_t capacity, Address indices, Address ends) {
            return granvit::plan_packing(at<const int64_t>(lengths), count, capacity, at<int64_t>(indices),
                                         at<int64_t>(ends));
        },
        Release());
}

void bind_region_attention(py::module_& m) {
    using granvit::RegionAttention;
    using Sizes = std::array<int64_t, 6>;
    using Strides = std::array<int64_t, 5>;
    // sizes: B, R, K, H, D, T. strides, in elements: of the query's regions (0: shared), the key's tokens and heads, the
    // value's tokens and heads.
    const auto problem = [](int dtype, Sizes sizes, Strides strides, float scale, Address query, Address key, Address value,
                            Address grids, Address cu_seqlens, Address output, Address lse) {
        RegionAttention p{};
        p.dtype = granvit::Dtype(dtype);
        p.images = sizes[0], p.regions = sizes[1], p.queries = sizes[2], p.heads = sizes[3], p.size = sizes[4];
        p.tokens = sizes[5];
        p.query_region_stride = strides[0], p.key_token_stride = strides[1], p.key_head_stride = strides[2];
        p.value_token_stride = strides[3], p.value_head_stride = strides[4];
        p.scale = scale;
        p.query = at<void>(query), p.key = at<void>(key), p.value = at<void>(value);
        p.grids = at<int32_t>(grids), p.cu_seqlens = at<int32_t>(cu_seqlens);
        p.output = at<void>(output), p.lse = at<float>(lse);
        return p;
    };
    py::class_<RegionAttention>(m, "RegionAttention", py::module_local()).def(py::init(problem));
    m.def("region_attention_forward", [](const RegionAttention& p, Address boxes, Address image, bool coverage, int threads) {
        granvit::region_attention_forward(p, at<float>(boxes), at<int64_t>(image), coverage, threads);
    }, Release());
    m.def("region_attention_backward", [](RegionAttention p, Address boxes, Address image, bool coverage, int threads,
                                          Address grad_output, Address grad_lse, Address grad_query, Address grad_key,
                                          Address grad_value) {
        p.grad_output = at<void>(grad_output), p.grad_lse = at<float>(grad_lse);
        p.grad_query = at<float>(grad_query), p.grad_key = at<void>(grad_key), p.grad_value = at<void>(grad_value);
        granvit::region_attention_backward(p, at<float>(boxes), at<int64_t>(image), coverage, threads);
    }, Release());
}

void bind_region_pool(py::module_& m) {
    using granvit::RegionPool;
    using Sizes = std::array<int64_t, 6>;
    using Strides = std::array<int64_t, 2>;
    // sizes: B, R, K, H, D, T. strides, in elements: of the value's tokens and heads.
    const auto problem = [](int dtype, Sizes sizes, Strides strides, Address logits, Address value, Address grids,
                            Address cu_seqlens, Address output, Address lse) {
        RegionPool p{};
        p.dtype = granvit::Dtype(dtype);
        p.images = sizes[0], p.regions = sizes[1], p.queries = sizes[2], p.heads = sizes[3], p.size = sizes[4];
        p.tokens = sizes[5];
        p.value_token_stride = strides[0], p.value_head_stride = strides[1];
        p.logits = at<float>(logits), p.value = at<void>(value);
        p.grids = at<int32_t>(grids), p.cu_seqlens = at<int32_t>(cu_seqlens);
        p.output = at<void>(output), p.lse = at<float>(lse);
        return p;
    };
    py::class_<RegionPool>(m, "RegionPool", py::module_local()).def(py::init(problem));
    m.def("region_pool_forward", [](const RegionPool& p, Address boxes, Address image, bool coverage, int threads) {
        granvit::region_pool_forward(p, at<float>(boxes), at<int64_t>(image), coverage, threads);
    }, Release());
    m.def("region_pool_backward", [](RegionPool p, Address boxes, Address image, bool coverage, int threads,
                                     Address grad_output, Address grad_lse, Address grad_logits, Address grad_value) {
        p.grad_output = at<void>(grad_output), p.grad_lse = at<float>(grad_lse);
        p.grad_logits = at<float>(grad_logits), p.grad_value = at<void>(grad_value);
        granvit::region_pool_backward(p, at<float>(boxes), at<int64_t>(image), coverage, threads);
    }, Release());
}

void bind_roi_gather(py::module_& m) {
    using granvit::RoiGather;
    const auto problem = [](int dtype, Address grids, Address cu_seqlens, Address boxes, Address image, int64_t images,
                            int64_t num_boxes, int64_t channels, int64_t num_tokens, int out_h, int out_w,
                            int64_t sampling_ratio, int threads) {
        return RoiGather{granvit::Dtype(dtype), at<int32_t>(grids), at<int32_t>(cu_seqlens), at<float>(boxes),
                         at<int64_t>(image), images, num_boxes, channels, num_tokens, out_h, out_w, sampling_ratio, threads};
    };
    py::class_<RoiGather>(m, "RoiGather", py::module_local()).def(py::init(problem));
    m.def("roi_gather_forward", [](const RoiGather& p, Address tokens, Address out) {
        granvit::roi_gather_forward(p, at<void>(tokens), at<void>(out));
    }, Release());
    m.def("roi_gather_backward", [](const RoiGather& p, Address grad, Address grad_tokens) {
        granvit::roi_gather_backward(p, at<void>(grad), at<void>(grad_tokens));
    }, Release());
}

}  // namespace

PYBIND11_MODULE(_native, m) {
    m.doc() = "Native kernels of granvit_kernels.";
    m.attr("interface") = GRANVIT_INTERFACE;  // granvit_kernels/native.py compares it with its own
    m.def("isa", [] { return granvit::isa_name(granvit::isa()); }, "Name of the instruction set in use.");
#ifdef GRANVIT_CUDA
    m.attr("cuda") = true;
#else
    m.attr("cuda") = false;
#endif
    bind_pack_patches(m);
    bind_plan_packing(m);
    bind_region_attention(m);
    bind_region_pool(m);
    bind_roi_gather(m);
}
