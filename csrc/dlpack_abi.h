// The part of DLPack's C ABI that we read, declared from its specification (major version 1): how a
// tensor is described, and the table of functions that a framework offers on its tensor type as the
// capsule `__dlpack_c_exchange_api__`. Only layout matters here: functions that we don't call are
// plain pointers.
#pragma once

#include <cstdint>

namespace ema_fused::dlpack {

constexpr std::uint32_t kMajorVersion = 1;
constexpr const char* kCapsuleName = "dlpack_exchange_api";

enum DeviceType : std::int32_t { kCpu = 1, kCuda = 2, kCudaHost = 3 };

enum TypeCode : std::uint8_t {
  kInt = 0,
  kUInt = 1,
  kFloat = 2,
  kBfloat = 4,
  kComplex = 5,
  kBool = 6,
  kFloat8E4M3 = 10,  // the variant with no infinity (fn)
  kFloat8E5M2 = 12
};

struct Version {
  std::uint32_t major;
  std::uint32_t minor;
};

struct Device {
  std::int32_t type;
  std::int32_t id;
};

struct DataType {
  std::uint8_t code;
  std::uint8_t bits;
  std::uint16_t lanes;
};

struct Tensor {
  void* data;
  Device device;
  std::int32_t ndim;
  DataType dtype;
  const std::int64_t* shape;
  const std::int64_t* strides;  // in elements
  std::uint64_t byte_offset;
};

struct ExchangeHeader {
  Version version;
  ExchangeHeader* previous;  // an older table, for consumers of an older major version
};

struct ExchangeApi {
  ExchangeHeader header;
  void* managed_tensor_allocator;
  void* managed_tensor_from_py_object;
  void* managed_tensor_to_py_object;
  // Fills a description that borrows from the tensor. 0, or -1 with a Python exception set.
  int (*tensor_from_py_object)(void* py_object, Tensor* out);
  int (*current_work_stream)(std::int32_t device_type, std::int32_t device_id, void** out);
};

}  // namespace ema_fused::dlpack
