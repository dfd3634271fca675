// The Python module layca_fast._cuda: addresses, sizes, names and a stream's handle in, nothing out. The tests build it
// under another name, with the emulator in place of CUDA.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <memory>
#include <string>

#include "../batch.h"
#include "../bindings.h"
#include "launch.h"
#include "registry.h"
#include "runner.h"

namespace py = pybind11;

namespace layca {
namespace {

std::unique_ptr<cuda::Runner> make_view(Address tensors, Address hypers, Address step_options, Address layers,
                                        Address tiles, Address dots, Address coefficients, Address counts,
                                        Address partials, Address partial_counts, std::int64_t n_tensors,
                                        std::int64_t n_layers, std::int64_t n_tiles, std::int64_t tile,
                                        const std::string& formula, const std::string& dtype,
                                        const std::string& grad_dtype, const std::string& state_dtype) {
  Batch batch = make_batch(tensors, hypers, step_options, layers, dots, coefficients, counts, partials, partial_counts,
                           n_tensors, n_layers, tile, dtype, grad_dtype, state_dtype);
  batch.tiles = pointer<const std::int64_t>(tiles);
  batch.n_tiles = n_tiles;
  return std::make_unique<cuda::Runner>(batch, formula, dtype);
}

}  // namespace
}  // namespace layca

PYBIND11_MODULE(LAYCA_MODULE, module) {
  using layca::cuda::Runner;
  const auto without_gil = py::call_guard<py::gil_scoped_release>();

  module.doc() = "Kernels of the CUDA backend. They read and write memory at the addresses they are given.";
  module.attr("formulas") = layca::cuda::formula_names();
  module.def("device_problem", &layca::cuda::device_problem, without_gil);

  py::class_<Runner>(module, "BatchView", py::module_local())
      .def(py::init(&layca::make_view), py::kw_only(), py::arg("tensors"), py::arg("hypers"), py::arg("step_options"),
           py::arg("layers"), py::arg("tiles"), py::arg("dots"), py::arg("coefficients"), py::arg("counts"),
           py::arg("partials"), py::arg("partial_counts"), py::arg("n_tensors"), py::arg("n_layers"),
           py::arg("n_tiles"), py::arg("tile"), py::arg("formula"), py::arg("dtype"), py::arg("grad_dtype"),
           py::arg("state_dtype"))
      .def("measure", &Runner::measure, py::arg("stream"), without_gil)
      .def("coefficients", &Runner::coefficients, py::arg("stream"), without_gil)
      .def("rotate", &Runner::rotate, py::arg("stream"), without_gil)
      .def("step", &Runner::step, py::arg("stream"), without_gil);
}
