// The operators that cannot be the CPU's kernel on an alias: they make, resize, copy or reinterpret device memory.
#include "copies.h"

#include <ATen/EmptyTensor.h>
#include <ATen/native/transformers/attention.h>
#include <ATen/ops/_fused_sdp_choice.h>
#include <ATen/ops/resize_native.h>
#include <ATen/ops/set_native.h>
#include <c10/core/DeviceGuard.h>
#include <torch/library.h>

namespace sim {
namespace {
using c10::IntArrayRef;
template <class T>
using Optional = std::optional<T>;

const c10::DispatchKeySet kKeys(kSimKey);

Tensor empty(IntArrayRef size, Optional<c10::ScalarType> dtype, Optional<c10::Layout>, Optional<Device> device,
             Optional<bool> pin_memory, Optional<c10::MemoryFormat> format) {
  TORCH_CHECK(!c10::pinned_memory_or_default(pin_memory), "Only dense CPU tensors can be pinned");
  c10::DeviceGuard guard(c10::device_or_default(device));
  return at::detail::empty_generic(size, &device_allocator(), kKeys, c10::dtype_or_default(dtype), format);
}

Tensor empty_strided(IntArrayRef size, IntArrayRef stride, Optional<c10::ScalarType> dtype, Optional<c10::Layout>,
                     Optional<Device> device, Optional<bool> pin_memory) {
  TORCH_CHECK(!c10::pinned_memory_or_default(pin_memory), "Only dense CPU tensors can be pinned");
  c10::DeviceGuard guard(c10::device_or_default(device));
  return at::detail::empty_strided_generic(size, stride, &device_allocator(), kKeys, c10::dtype_or_default(dtype));
}

const Tensor& resize_(const Tensor& self, IntArrayRef size, Optional<c10::MemoryFormat> format) {
  c10::DeviceGuard guard(self.device());
  return at::native::resize_(self, size, format);
}

Tensor copy_from_and_resize(const Tensor& source, const Tensor& destination) {
  destination.resize_(source.sizes());
  return copy_from(source, destination, /*non_blocking=*/false);
}

Tensor& set_tensor(Tensor& self, const Tensor& source) { return at::native::set_tensor_(self, source); }

Tensor& set_storage(Tensor& self, c10::Storage storage) { return at::native::set_(self, std::move(storage)); }

Tensor& set_storage_at(Tensor& self, c10::Storage storage, int64_t offset, IntArrayRef size, IntArrayRef stride) {
  return at::native::set_storage_cpu_(self, std::move(storage), offset, size, stride);
}

void record_stream(Tensor& self, c10::Stream stream) {
  device_allocator().recordStream(self.storage().data_ptr(), stream);
}

// What `param.data = tensor` asks before it lets a tensor change its device. With yes, Module.to keeps its Parameter
// objects, as on CUDA.
bool has_compatible_shallow_copy_type(const Tensor& self, const Tensor& other) {
  return self.layout() == c10::kStrided && other.layout() == c10::kStrided;
}

// Attention takes the path that the CPU would take; PrivateUse1's own answer is the math path, with other bits.
int64_t fused_sdp_choice(const Tensor& query, const Tensor& key, const Tensor& value, const Optional<Tensor>& mask,
                         double dropout, bool causal, Optional<double> scale, bool enable_gqa) {
  Aliases aliases;
  auto cpu_query = aliases.to_cpu(query).requires_grad_(query.requires_grad());
  // the choice depends on which of them need a gradient: the flash kernel gives none for a mask
  auto cpu_mask = mask && on_sim(*mask)
                      ? Optional<Tensor>(aliases.to_cpu(*mask).requires_grad_(mask->requires_grad()))
                      : mask;
  return at::_fused_sdp_choice(cpu_query, aliases.to_cpu(key), aliases.to_cpu(value), cpu_mask, dropout, causal, scale,
                               enable_gqa);
}
}  // namespace

TORCH_LIBRARY_IMPL(aten, PrivateUse1, library) {
  library.impl("empty.memory_format", empty);
  library.impl("empty_strided", empty_strided);
  library.impl("resize_", resize_);
  library.impl("_copy_from", copy_from);
  library.impl("_copy_from_and_resize", copy_from_and_resize);
  library.impl("set_.source_Tensor", set_tensor);
  library.impl("set_.source_Storage", set_storage);
  library.impl("set_.source_Storage_storage_offset", set_storage_at);
  library.impl("record_stream", record_stream);
  library.impl("_has_compatible_shallow_copy_type", has_compatible_shallow_copy_type);
}

// For conj() and neg() views the generic fallback resolves them with copy_, which is _copy_from again, without end.
TORCH_LIBRARY_IMPL(aten, Conjugate, library) { library.impl("_copy_from", torch::CppFunction::makeFallthrough()); }
TORCH_LIBRARY_IMPL(aten, Negative, library) { library.impl("_copy_from", torch::CppFunction::makeFallthrough()); }
}  // namespace sim

namespace at::native {
REGISTER_PRIVATEUSE1_DISPATCH(_fused_sdp_choice_stub, &sim::fused_sdp_choice)
}
