// A device tensor as a CPU tensor over the same memory, and a CPU kernel's results as device tensors.
#pragma once
#include "memory.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>

#include <unordered_map>
#include <unordered_set>

namespace sim {
using at::Tensor;

inline bool on_sim(const Tensor& tensor) { return tensor.defined() && tensor.device().type() == kSim; }

// The bytes between a tensor's first and last element.
Range bytes_of(const Tensor& tensor);

// A CPU tensor over the same bytes that keeps nothing alive: for deferred copies, which a block outlives by running
// them before it is freed.
Tensor borrowed_alias(const Tensor& tensor);

// The aliases of one operator call. One storage gives one alias storage, one tensor one alias, so that the CPU kernel
// sees the same sharing as the caller; results over those storages become views of the caller's tensors.
class Aliases {
 public:
  Tensor to_cpu(const Tensor& tensor);
  // CPU inputs of the call, which stay on the CPU where the result is one of them.
  void keep_on_cpu(const Tensor& tensor);
  // Carries storages that the kernel grew, and sizes that it changed in place, back to the device tensors.
  void write_back();
  Tensor to_sim(const Tensor& result, DeviceIndex device);

 private:
  struct Pair {
    Tensor sim;
    Tensor cpu;
  };
  c10::Storage cpu_storage(const c10::Storage& sim_storage);
  c10::Storage sim_storage(const c10::Storage& cpu_storage, DeviceIndex device);

  std::unordered_map<c10::TensorImpl*, Pair> pairs_;          // by device tensor
  std::unordered_map<c10::TensorImpl*, Tensor> sim_tensors_;  // by CPU alias
  std::unordered_map<c10::StorageImpl*, c10::Storage> cpu_storages_, sim_storages_;
  std::unordered_set<c10::StorageImpl*> cpu_inputs_;
};
}  // namespace sim
