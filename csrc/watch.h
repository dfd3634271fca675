// Whether tensors are still what and where they were: layca_fast/step/watch.py, in one loop without Python objects for
// what it compares. Every function needs the GIL.
#pragma once

#include <Python.h>

#include <cstdint>
#include <vector>

#include "dlpack.h"

namespace layca {

// The exchange API in a capsule of torch.Tensor; null where it is of a version that this cannot read.
const dlpack::ExchangeApi* find_exchange_api(PyObject* capsule);

// A list of tensors, and how they lay in memory when it was made: addresses, types, devices, sizes and strides. The
// caller keeps the list, and hands it in again.
class Layouts {
 public:
  Layouts() = default;
  Layouts(const Layouts&) = delete;
  Layouts& operator=(const Layouts&) = delete;
  ~Layouts();

  // False, with a Python exception set, if one of `tensors` cannot be described. `owns`: keep a reference to each, of
  // torch's own kind. While there is one, torch describes a tensor in less than half the time; with none it counts its
  // Python object up and down, too. Such a tensor cannot be exchanged by torch.utils.swap_tensors, as parameters may
  // be.
  bool read(const dlpack::ExchangeApi* api, PyObject* tensors, bool owns);

  // Whether all still lie as they did.
  bool hold(PyObject* tensors) const;

  // Has what torch keeps of tensors [first, last) fetched into the caches.
  void fetch(PyObject* tensors, Py_ssize_t first, Py_ssize_t last) const;

  // Whether these gradients, a list with one for each tensor, are of `type` itself, not lazily negated, and lie in
  // memory of their own as the tensors do in theirs; their addresses are written to `addresses`. 1, 0, or -1 with a
  // Python exception set.
  int fit(PyObject* grads, PyObject* type, PyObject* is_neg, std::int64_t* addresses) const;

  // hold() and fit() in one loop, which touches each tensor once. Fills `grads`, a new list of as many places, with the
  // attribute `name` of every tensor; `fits` says whether they fit, and so have addresses. 1, 0 where the tensors do
  // not hold, or -1 with a Python exception set.
  int look(PyObject* tensors, PyObject* name, PyObject* type, PyObject* is_neg, PyObject* grads,
           std::int64_t* addresses, bool& fits) const;

 private:
  struct Layout {
    void* data;
    dlpack::Device device;
    dlpack::DataType dtype;
    std::int32_t ndim;
    std::size_t sizes;   // place in extents_ of `ndim` sizes and as many strides
    const void* inside;  // torch's description of the tensor, of which its sizes are a part if they are few
  };

  bool describe(PyObject* tensor, dlpack::Tensor& out) const;
  bool matches(const dlpack::Tensor& tensor, const Layout& layout) const;
  bool holds(PyObject* tensor, const Layout& layout) const;
  int fits(PyObject* grad, PyObject* type, PyObject* is_neg, const Layout& layout, std::int64_t& address) const;

  const dlpack::ExchangeApi* api_ = nullptr;
  std::vector<Layout> layouts_;
  std::vector<std::int64_t> extents_;
  std::vector<dlpack::ManagedTensor*> owned_;
};

// Whether each dict of the list `entries` still holds, under the name at the same place of the list `names`, the very
// object at the same place of `values`. 1, 0, or -1 with a Python exception set.
int entries_hold(PyObject* entries, PyObject* names, PyObject* values);

// Whether two lists hold the very same objects in the same order.
bool same_objects(PyObject* left, PyObject* right);

// Whether a dict has the very objects of a list as its values, in the same order. None of them is touched.
bool values_are(PyObject* dict, PyObject* values);

// Whether a dict has the very objects of two lists as its keys and values, in the same order.
bool same_items(PyObject* dict, PyObject* keys, PyObject* values);

// A new list of the attribute `name` of every object of a list; null with a Python exception set if one lacks it.
PyObject* attributes(PyObject* objects, PyObject* name);

}  // namespace layca
