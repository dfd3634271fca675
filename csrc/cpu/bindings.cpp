// The Python module layca_fast._cpu: addresses, sizes, names and a thread count in, nothing out.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <string>

#include "../batch.h"
#include "../bindings.h"
#include "../watch.h"
#include "registry.h"
#include "runner.h"

namespace py = pybind11;

namespace layca {
namespace {

using Columns = std::map<std::string, std::map<std::string, int>>;

std::unique_ptr<cpu::Runner> make_view(Address tensors, Address hypers, Address step_options, Address layers,
                                       Address dots, Address coefficients, Address counts, Address partials,
                                       Address partial_counts, std::int64_t n_tensors, std::int64_t n_layers,
                                       std::int64_t tile, const std::string& formula, const std::string& dtype,
                                       const std::string& grad_dtype, const std::string& state_dtype,
                                       const std::optional<std::string>& instructions) {
  const Batch batch = make_batch(tensors, hypers, step_options, layers, dots, coefficients, counts, partials,
                                 partial_counts, n_tensors, n_layers, tile, dtype, grad_dtype, state_dtype);
  return std::make_unique<cpu::Runner>(batch, formula, dtype, instructions.value_or(cpu::instruction_sets().front()));
}

// The columns of every table under the names that layca_fast/formulas/tables.py gives them, for a test that compares
// the two.
Columns columns() {
#define LAYCA_COLUMN(table, name) \
  {                               \
    #name, table::name            \
  }
  return {
      {"Column",
       {LAYCA_COLUMN(Column, PARAM), LAYCA_COLUMN(Column, GRAD), LAYCA_COLUMN(Column, STATE),
        LAYCA_COLUMN(Column, STEP), LAYCA_COLUMN(Column, RADIUS), LAYCA_COLUMN(Column, NUMEL),
        LAYCA_COLUMN(Column, LAYERS), LAYCA_COLUMN(Column, FIRST_LAYER), LAYCA_COLUMN(Column, HYPER),
        LAYCA_COLUMN(Column, FLAGS), LAYCA_COLUMN(Column, RULE), LAYCA_COLUMN(Column, REMAINDER),
        LAYCA_COLUMN(Column, WIDTH)}},
      {"Flag",
       {LAYCA_COLUMN(Flag, ROTATES), LAYCA_COLUMN(Flag, CURRENT), LAYCA_COLUMN(Flag, PART), LAYCA_COLUMN(Flag, WAITS)}},
      {"Hyper",
       {LAYCA_COLUMN(Hyper, LR), LAYCA_COLUMN(Hyper, WEIGHT_DECAY), LAYCA_COLUMN(Hyper, GRAD_SCALE),
        LAYCA_COLUMN(Hyper, NOISE), LAYCA_COLUMN(Hyper, OPTION), LAYCA_COLUMN(Hyper, RADIUS_LR),
        LAYCA_COLUMN(Hyper, WIDTH)}},
      {"Layer",
       {LAYCA_COLUMN(Layer, TENSOR), LAYCA_COLUMN(Layer, FIRST_TILE), LAYCA_COLUMN(Layer, TILES),
        LAYCA_COLUMN(Layer, WIDTH)}},
      {"Tile",
       {LAYCA_COLUMN(Tile, TENSOR), LAYCA_COLUMN(Tile, LAYER), LAYCA_COLUMN(Tile, OFFSET), LAYCA_COLUMN(Tile, LENGTH),
        LAYCA_COLUMN(Tile, WIDTH)}},
      {"Count",
       {LAYCA_COLUMN(Count, NON_FINITE), LAYCA_COLUMN(Count, NO_DIRECTION), LAYCA_COLUMN(Count, BROKEN),
        LAYCA_COLUMN(Count, WIDTH)}},
      {"Coefficient",
       {LAYCA_COLUMN(Coefficient, A), LAYCA_COLUMN(Coefficient, B), LAYCA_COLUMN(Coefficient, C),
        LAYCA_COLUMN(Coefficient, MODE), LAYCA_COLUMN(Coefficient, WIDTH)}},
  };
#undef LAYCA_COLUMN
}

const dlpack::ExchangeApi& exchange_api(const py::capsule& capsule) {
  const dlpack::ExchangeApi* const api = find_exchange_api(capsule.ptr());
  if (api == nullptr) throw py::value_error("api: not a DLPack exchange API of version 1 that describes tensors");
  return *api;
}

std::unique_ptr<Layouts> make_layouts(const py::capsule& api, const py::list& tensors, bool owns) {
  auto layouts = std::make_unique<Layouts>();
  if (!layouts->read(&exchange_api(api), tensors.ptr(), owns)) throw py::error_already_set();
  return layouts;
}

// The addresses as bytes, or None if the gradients do not fit.
py::object fit(const Layouts& layouts, const py::list& grads, const py::type& type, const py::object& is_neg) {
  py::bytes addresses(nullptr, grads.size() * sizeof(std::int64_t));
  auto* const out = reinterpret_cast<std::int64_t*>(PyBytes_AS_STRING(addresses.ptr()));
  const int fits = layouts.fit(grads.ptr(), type.ptr(), is_neg.ptr(), out);
  if (fits < 0) throw py::error_already_set();
  return fits ? py::object(addresses) : py::none();
}

// The gradients with their addresses as bytes, or None for these if they do not fit; None if the tensors do not hold.
py::object look(const Layouts& layouts, const py::list& tensors, const py::str& name, const py::type& type,
                const py::object& is_neg) {
  const std::size_t size = tensors.size();
  py::bytes addresses(nullptr, size * sizeof(std::int64_t));
  auto* const out = reinterpret_cast<std::int64_t*>(PyBytes_AS_STRING(addresses.ptr()));
  const py::list grads(size);
  bool fits = false;
  const int holds = layouts.look(tensors.ptr(), name.ptr(), type.ptr(), is_neg.ptr(), grads.ptr(), out, fits);
  if (holds < 0) throw py::error_already_set();
  if (holds == 0) return py::none();
  return py::make_tuple(grads, fits ? py::object(addresses) : py::none());
}

py::list attributes_of(const py::list& objects, const py::str& name) {
  PyObject* const found = attributes(objects.ptr(), name.ptr());
  if (found == nullptr) throw py::error_already_set();
  return py::reinterpret_steal<py::list>(found);
}

}  // namespace
}  // namespace layca

PYBIND11_MODULE(_cpu, module) {
  using layca::cpu::Runner;
  const auto without_gil = py::call_guard<py::gil_scoped_release>();

  module.doc() = "Kernels of the native CPU backend. They read and write memory at the addresses they are given.";
  module.attr("formulas") = layca::cpu::formula_names();
  module.attr("instruction_sets") = layca::cpu::instruction_sets();
  module.attr("columns") = layca::columns();

  py::class_<Runner>(module, "BatchView", py::module_local())
      .def(py::init(&layca::make_view), py::kw_only(), py::arg("tensors"), py::arg("hypers"), py::arg("step_options"),
           py::arg("layers"), py::arg("dots"), py::arg("coefficients"), py::arg("counts"), py::arg("partials"),
           py::arg("partial_counts"), py::arg("n_tensors"), py::arg("n_layers"), py::arg("tile"), py::arg("formula"),
           py::arg("dtype"), py::arg("grad_dtype"), py::arg("state_dtype"), py::arg("instructions") = py::none())
      .def("measure", &Runner::measure, py::arg("threads"), without_gil)
      .def("coefficients", &Runner::coefficients, without_gil)
      .def("rotate", &Runner::rotate, py::arg("threads"), without_gil)
      .def("reserve", &Runner::reserve, py::arg("threads"))
      .def("step", &Runner::step, py::arg("threads"), without_gil);

  using layca::Layouts;
  py::class_<Layouts>(module, "Layouts", py::module_local())
      .def(py::init(&layca::make_layouts), py::arg("api"), py::arg("tensors"), py::arg("owns") = false)
      .def(
          "hold", [](const Layouts& layouts, const py::list& tensors) { return layouts.hold(tensors.ptr()); },
          py::arg("tensors"))
      .def(
          "fetch",
          [](const Layouts& layouts, const py::list& tensors, Py_ssize_t first, Py_ssize_t last) {
            layouts.fetch(tensors.ptr(), first, last);
          },
          py::arg("tensors"), py::arg("first"), py::arg("last"))
      .def("fit", &layca::fit, py::arg("grads"), py::arg("type"), py::arg("is_neg"))
      .def("look", &layca::look, py::arg("tensors"), py::arg("name"), py::arg("type"), py::arg("is_neg"));
  module.def(
      "entries_hold",
      [](const py::list& entries, const py::list& names, const py::list& values) {
        const int holds = layca::entries_hold(entries.ptr(), names.ptr(), values.ptr());
        if (holds < 0) throw py::error_already_set();
        return holds == 1;
      },
      py::arg("entries"), py::arg("names"), py::arg("values"));
  module.def(
      "same_objects",
      [](const py::list& left, const py::list& right) { return layca::same_objects(left.ptr(), right.ptr()); },
      py::arg("left"), py::arg("right"));
  module.def(
      "values_are",
      [](const py::dict& entries, const py::list& values) { return layca::values_are(entries.ptr(), values.ptr()); },
      py::arg("entries"), py::arg("values"));
  module.def(
      "same_items",
      [](const py::dict& entries, const py::list& keys, const py::list& values) {
        return layca::same_items(entries.ptr(), keys.ptr(), values.ptr());
      },
      py::arg("entries"), py::arg("keys"), py::arg("values"));
  module.def("attributes", &layca::attributes_of, py::arg("objects"), py::arg("name"));
}
