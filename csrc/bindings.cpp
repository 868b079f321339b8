// The only file that knows Python. Addresses come as integers (tensor.data_ptr()), sizes in elements.
//
// To add an operator: include its header, write one `void bind_NAME(py::module_&)` that converts addresses with at<T>() and
// releases the GIL (py::call_guard<py::gil_scoped_release>()), and call it at the end. Checks of shapes, dtypes and devices
// belong to the Python side: what arrives here is contiguous and in range, unless a comment says otherwise.
#include <pybind11/pybind11.h>

#include "common/dtype.h"
#include "common/isa.h"

namespace py = pybind11;
using Address = uintptr_t;

namespace {

template <typename T>
T* at(Address address) {
    return reinterpret_cast<T*>(address);
}

using Release = py::call_guard<py::gil_scoped_release>;

}  // namespace

PYBIND11_MODULE(_native, m) {
    m.doc() = "Native kernels of granvit_kernels.";
    m.def("isa", [] { return granvit::isa_name(granvit::isa()); }, "Name of the instruction set in use.");
#ifdef GRANVIT_CUDA
    m.attr("cuda") = true;
#else
    m.attr("cuda") = false;
#endif
}
