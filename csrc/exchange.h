// Tensors as C sees them: torch.Tensor.__dlpack_c_exchange_api__, the table of functions that DLPack 1.3 defines
// (https://dmlc.github.io/dlpack/latest/python_spec.html). Looking at a tensor this way costs a tenth of asking it in
// Python, and needs no header of torch's. Only what is used here is named.
#pragma once
#include <cstdint>

namespace rnnkern {

struct DLTensor {
  void* data;
  int32_t device_type, device_id;
  int32_t ndim;
  uint8_t code, bits;  // of the dtype
  uint16_t lanes;
  int64_t* shape;
  int64_t* strides;  // in elements; null: contiguous
  uint64_t byte_offset;
};

constexpr int32_t kDLCpu = 1;
constexpr uint8_t kDLInt = 0, kDLFloat = 2, kDLBfloat = 4, kDLBool = 6;

struct DLExchange {
  static constexpr uint32_t kMajor = 1;
  static constexpr const char* kName = "dlpack_exchange_api";  // of the capsule

  struct {
    uint32_t major, minor;
  } version;
  DLExchange* older;
  void* allocate;
  void* from_object;
  void* to_object;
  int (*view)(void* object, DLTensor* out);  // borrowed; -1 with a Python exception set
  void* current_stream;
};

}  // namespace rnnkern
