// What of DLPack 1.3 this package uses: torch's tensors described in C, without copies, owners or torch's headers.
// https://dmlc.github.io/dlpack/latest/c_api.html. All names, types and orders of fields are DLPack's.
#pragma once

#include <cstdint>

namespace layca::dlpack {

constexpr const char* capsule_name = "dlpack_exchange_api";
constexpr std::uint32_t major_version = 1;

struct Device {
  std::int32_t type, id;
};

struct DataType {
  std::uint8_t code, bits;
  std::uint16_t lanes;
};

struct Tensor {
  void* data;
  Device device;
  std::int32_t ndim;
  DataType dtype;
  std::int64_t *shape, *strides;
  std::uint64_t byte_offset;
};

// A description that holds a reference to its tensor until its deleter is called.
struct ManagedTensor {
  struct {
    std::uint32_t major, minor;
  } version;
  void* context;
  void (*deleter)(ManagedTensor* self);
  std::uint64_t flags;
  Tensor tensor;
};

struct ExchangeApi {
  struct {
    std::uint32_t major, minor;
  } version;
  void* previous;
  void (*managed_tensor_allocator)();
  // 0, or -1 with a Python exception set.
  int (*managed_tensor_from_py_object)(void* object, ManagedTensor** out);
  void (*managed_tensor_to_py_object)();
  // 0, or -1 with a Python exception set. May be null.
  int (*tensor_from_py_object)(void* object, Tensor* out);
  void (*current_work_stream)();
};

}  // namespace layca::dlpack
