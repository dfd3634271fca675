#include "watch.h"

#include <algorithm>

namespace layca {
namespace {

// A tensor is reached through several objects, each a wait for memory where the kernels have driven it out of the
// caches. The waits of a few tensors overlap where the next ones are asked for in advance.
constexpr Py_ssize_t tensors_ahead = 6;

// A prefetched address may be anything: nothing is read.
void prefetch(const void* address) {
#if defined(__GNUC__) || defined(__clang__)
  __builtin_prefetch(address);
#else
  (void)address;
#endif
}

void prefetch_around(const void* address) {
  constexpr int line = 64;
  for (int offset = -line; offset <= line; offset += line) prefetch(static_cast<const char*>(address) + offset);
}

void prefetch_item(PyObject* list, Py_ssize_t i) {
  if (i < PyList_GET_SIZE(list)) prefetch(PyList_GET_ITEM(list, i));
}

// What `method(self)` returns. `method` is one of the type of `self`, or any Python code. A method in C is called as it
// is: Python's own way there would take as long as a tenth of the look at a gradient.
PyObject* call_method(PyObject* method, PyObject* self) {
  if (Py_TYPE(method) == &PyMethodDescr_Type) {
    const PyMethodDef* const called = reinterpret_cast<PyMethodDescrObject*>(method)->d_method;
    if (called->ml_flags == METH_NOARGS) return called->ml_meth(self, nullptr);
  }
  return PyObject_CallOneArg(method, self);
}

}  // namespace

const dlpack::ExchangeApi* find_exchange_api(PyObject* capsule) {
  const auto* api = static_cast<const dlpack::ExchangeApi*>(PyCapsule_GetPointer(capsule, dlpack::capsule_name));
  if (api == nullptr) PyErr_Clear();
  const bool known = api != nullptr && api->version.major == dlpack::major_version;
  return known && api->tensor_from_py_object != nullptr ? api : nullptr;
}

bool Layouts::describe(PyObject* tensor, dlpack::Tensor& out) const {
  return api_->tensor_from_py_object(tensor, &out) == 0;
}

Layouts::~Layouts() {
  for (dlpack::ManagedTensor* const owned : owned_) owned->deleter(owned);
}

bool Layouts::read(const dlpack::ExchangeApi* api, PyObject* tensors, bool owns) {
  api_ = api;
  for (Py_ssize_t i = 0; i < PyList_GET_SIZE(tensors); ++i) {
    dlpack::Tensor tensor;
    if (!describe(PyList_GET_ITEM(tensors, i), tensor)) return false;
    layouts_.push_back({tensor.data, tensor.device, tensor.dtype, tensor.ndim, extents_.size(), tensor.shape});
    extents_.insert(extents_.end(), tensor.shape, tensor.shape + tensor.ndim);
    extents_.insert(extents_.end(), tensor.strides, tensor.strides + tensor.ndim);
    if (!owns || api->managed_tensor_from_py_object == nullptr) continue;
    dlpack::ManagedTensor* owned = nullptr;
    if (api->managed_tensor_from_py_object(PyList_GET_ITEM(tensors, i), &owned) == 0) {
      owned_.push_back(owned);
    } else {
      // It is only slower without.
      PyErr_Clear();
    }
  }
  return true;
}

bool Layouts::matches(const dlpack::Tensor& tensor, const Layout& layout) const {
  const std::int64_t* const sizes = extents_.data() + layout.sizes;
  return tensor.ndim == layout.ndim && tensor.byte_offset == 0 && tensor.dtype.code == layout.dtype.code &&
         tensor.dtype.bits == layout.dtype.bits && tensor.dtype.lanes == layout.dtype.lanes &&
         tensor.device.type == layout.device.type && tensor.device.id == layout.device.id &&
         std::equal(tensor.shape, tensor.shape + tensor.ndim, sizes) &&
         std::equal(tensor.strides, tensor.strides + tensor.ndim, sizes + tensor.ndim);
}

bool Layouts::holds(PyObject* object, const Layout& layout) const {
  dlpack::Tensor tensor;
  if (!describe(object, tensor)) {
    PyErr_Clear();
    return false;
  }
  return tensor.data == layout.data && matches(tensor, layout);
}

bool Layouts::hold(PyObject* tensors) const {
  if (PyList_GET_SIZE(tensors) != static_cast<Py_ssize_t>(layouts_.size())) return false;
  for (Py_ssize_t i = 0; i < PyList_GET_SIZE(tensors); ++i) {
    prefetch_item(tensors, i + tensors_ahead);
    if (i + tensors_ahead < PyList_GET_SIZE(tensors)) prefetch_around(layouts_[i + tensors_ahead].inside);
    if (!holds(PyList_GET_ITEM(tensors, i), layouts_[i])) return false;
  }
  return true;
}

void Layouts::fetch(PyObject* tensors, Py_ssize_t first, Py_ssize_t last) const {
  last = std::min({last, PyList_GET_SIZE(tensors), static_cast<Py_ssize_t>(layouts_.size())});
  for (Py_ssize_t i = std::max<Py_ssize_t>(first, 0); i < last; ++i) {
    prefetch_item(tensors, i);
    prefetch_around(layouts_[i].inside);
  }
}

int Layouts::fits(PyObject* grad, PyObject* type, PyObject* is_neg, const Layout& layout, std::int64_t& address) const {
  if (reinterpret_cast<PyObject*>(Py_TYPE(grad)) != type) return 0;
  dlpack::Tensor tensor;
  if (!describe(grad, tensor)) {
    PyErr_Clear();
    return 0;
  }
  if (!matches(tensor, layout)) return 0;
  // Its memory was freed, unless it is empty.
  if (tensor.data == nullptr && std::find(tensor.shape, tensor.shape + tensor.ndim, 0) == tensor.shape + tensor.ndim) {
    return 0;
  }
  address = static_cast<std::int64_t>(reinterpret_cast<std::uintptr_t>(tensor.data));
  PyObject* const negated = call_method(is_neg, grad);
  if (negated == nullptr) return -1;
  Py_DECREF(negated);
  return negated == Py_False ? 1 : 0;
}

int Layouts::fit(PyObject* grads, PyObject* type, PyObject* is_neg, std::int64_t* addresses) const {
  if (PyList_GET_SIZE(grads) != static_cast<Py_ssize_t>(layouts_.size())) return 0;
  for (Py_ssize_t i = 0; i < PyList_GET_SIZE(grads); ++i) {
    prefetch_item(grads, i + tensors_ahead);
    const int found = fits(PyList_GET_ITEM(grads, i), type, is_neg, layouts_[i], addresses[i]);
    if (found != 1) return found;
  }
  return 1;
}

int Layouts::look(PyObject* tensors, PyObject* name, PyObject* type, PyObject* is_neg, PyObject* grads,
                  std::int64_t* addresses, bool& fit) const {
  const auto size = static_cast<Py_ssize_t>(layouts_.size());
  fit = true;
  for (Py_ssize_t i = 0; i < size; ++i) {
    // What is asked of a tensor may be Python code, which may do anything to the list.
    if (PyList_GET_SIZE(tensors) != size) return 0;
    prefetch_item(tensors, i + tensors_ahead);
    if (i + tensors_ahead < size) prefetch_around(layouts_[i + tensors_ahead].inside);
    PyObject* const tensor = PyList_GET_ITEM(tensors, i);
    if (!holds(tensor, layouts_[i])) return 0;
    Py_INCREF(tensor);
    PyObject* const grad = PyObject_GetAttr(tensor, name);
    Py_DECREF(tensor);
    if (grad == nullptr) return -1;
    PyList_SET_ITEM(grads, i, grad);
    if (!fit) continue;
    const int found = fits(grad, type, is_neg, layouts_[i], addresses[i]);
    if (found < 0) return -1;
    fit = found == 1;
  }
  return 1;
}

int entries_hold(PyObject* entries, PyObject* names, PyObject* values) {
  if (PyList_GET_SIZE(entries) != PyList_GET_SIZE(values)) return 0;
  if (PyList_GET_SIZE(entries) != PyList_GET_SIZE(names)) return 0;
  for (Py_ssize_t i = 0; i < PyList_GET_SIZE(entries); ++i) {
    prefetch_item(entries, i + tensors_ahead);
    PyObject* const found = PyDict_GetItemWithError(PyList_GET_ITEM(entries, i), PyList_GET_ITEM(names, i));
    if (found == nullptr && PyErr_Occurred() != nullptr) return -1;
    if (found != PyList_GET_ITEM(values, i)) return 0;
  }
  return 1;
}

bool same_objects(PyObject* left, PyObject* right) {
  const Py_ssize_t size = PyList_GET_SIZE(left);
  if (PyList_GET_SIZE(right) != size) return false;
  for (Py_ssize_t i = 0; i < size; ++i) {
    if (PyList_GET_ITEM(left, i) != PyList_GET_ITEM(right, i)) return false;
  }
  return true;
}

bool values_are(PyObject* dict, PyObject* values) {
  if (PyDict_Size(dict) != PyList_GET_SIZE(values)) return false;
  PyObject *key = nullptr, *value = nullptr;
  Py_ssize_t position = 0;
  for (Py_ssize_t i = 0; PyDict_Next(dict, &position, &key, &value); ++i) {
    if (value != PyList_GET_ITEM(values, i)) return false;
  }
  return true;
}

bool same_items(PyObject* dict, PyObject* keys, PyObject* values) {
  if (PyDict_Size(dict) != PyList_GET_SIZE(keys)) return false;
  PyObject *key = nullptr, *value = nullptr;
  Py_ssize_t position = 0;
  for (Py_ssize_t i = 0; PyDict_Next(dict, &position, &key, &value); ++i) {
    if (key != PyList_GET_ITEM(keys, i)) return false;
  }
  return values_are(dict, values);
}

PyObject* attributes(PyObject* objects, PyObject* name) {
  const Py_ssize_t size = PyList_GET_SIZE(objects);
  PyObject* const found = PyList_New(size);
  for (Py_ssize_t i = 0; found != nullptr && i < size; ++i) {
    // A getter may be Python code, which may do anything to the list.
    PyObject* value = nullptr;
    if (i < PyList_GET_SIZE(objects)) {
      prefetch_item(objects, i + tensors_ahead);
      PyObject* const object = PyList_GET_ITEM(objects, i);
      Py_INCREF(object);
      value = PyObject_GetAttr(object, name);
      Py_DECREF(object);
    } else {
      PyErr_SetString(PyExc_RuntimeError, "objects: the list became shorter while it was read");
    }
    if (value == nullptr) {
      Py_DECREF(found);
      return nullptr;
    }
    PyList_SET_ITEM(found, i, value);
  }
  return found;
}

}  // namespace layca
