#include "aliasing.h"

#include <c10/core/CPUAllocator.h>

namespace sim {
namespace {
c10::Storage make_storage(size_t nbytes, c10::DataPtr data, c10::Allocator* allocator) {
  return c10::Storage(c10::make_intrusive<c10::StorageImpl>(
      c10::StorageImpl::use_byte_size_t(), nbytes, std::move(data), allocator, /*resizable=*/allocator != nullptr));
}

// `like`'s geometry and lazy bits over another storage.
Tensor make_tensor(c10::Storage storage, const Tensor& like, c10::DispatchKey key) {
  auto made = at::detail::make_tensor<c10::TensorImpl>(std::move(storage), c10::DispatchKeySet(key), like.dtype());
  auto* impl = made.unsafeGetTensorImpl();
  impl->set_sizes_and_strides(like.sizes(), like.strides(), like.storage_offset());
  if (like.unsafeGetTensorImpl()->is_wrapped_number()) impl->set_wrapped_number(true);
  if (like.is_conj()) impl->_set_conj(true);
  if (like.is_neg()) impl->_set_neg(true);
  return made;
}

bool same_geometry(const Tensor& a, const Tensor& b) {
  return a.sizes() == b.sizes() && a.strides() == b.strides() && a.storage_offset() == b.storage_offset();
}
}  // namespace

Range bytes_of(const Tensor& tensor) {
  if (tensor.numel() == 0) return {};
  auto begin = reinterpret_cast<uintptr_t>(tensor.const_data_ptr());
  int64_t last = 0;
  for (int64_t dim = 0; dim < tensor.dim(); dim++) last += (tensor.size(dim) - 1) * tensor.stride(dim);
  return {begin, begin + (last + 1) * tensor.itemsize()};
}

Tensor borrowed_alias(const Tensor& tensor) {
  const auto& storage = tensor.storage();
  c10::DataPtr data(storage.mutable_data(), Device(c10::kCPU));
  return make_tensor(make_storage(storage.nbytes(), std::move(data), nullptr), tensor, c10::DispatchKey::CPU);
}

c10::Storage Aliases::cpu_storage(const c10::Storage& sim_storage) {
  auto& alias = cpu_storages_[sim_storage.unsafeGetStorageImpl()];
  if (!alias) {
    auto* owner = new c10::Storage(sim_storage);
    c10::DataPtr data(
        sim_storage.mutable_data(), owner, [](void* held) { delete static_cast<c10::Storage*>(held); },
        Device(c10::kCPU));
    alias = make_storage(sim_storage.nbytes(), std::move(data), c10::GetCPUAllocator());
    sim_storages_[alias.unsafeGetStorageImpl()] = sim_storage;
  }
  return alias;
}

Tensor Aliases::to_cpu(const Tensor& tensor) {
  auto known = pairs_.find(tensor.unsafeGetTensorImpl());
  if (known != pairs_.end()) return known->second.cpu;
  auto alias = make_tensor(cpu_storage(tensor.storage()), tensor, c10::DispatchKey::CPU);
  pairs_[tensor.unsafeGetTensorImpl()] = {tensor, alias};
  sim_tensors_[alias.unsafeGetTensorImpl()] = tensor;
  return alias;
}

void Aliases::keep_on_cpu(const Tensor& tensor) {
  if (tensor.has_storage()) cpu_inputs_.insert(tensor.storage().unsafeGetStorageImpl());
}

c10::Storage Aliases::sim_storage(const c10::Storage& cpu_storage, DeviceIndex device) {
  auto& known = sim_storages_[cpu_storage.unsafeGetStorageImpl()];
  if (!known) known = make_storage(cpu_storage.nbytes(), adopt(cpu_storage, device), &device_allocator());
  return known;
}

void Aliases::write_back() {
  for (auto& [impl, alias] : cpu_storages_) {
    if (alias.data() == impl->data() && alias.nbytes() == impl->nbytes()) continue;
    const auto nbytes = alias.nbytes();
    auto grown = make_storage(nbytes, alias.unsafeGetStorageImpl()->set_data_ptr(c10::DataPtr()), nullptr);
    impl->set_data_ptr_noswap(adopt(grown, impl->device().index()));
    impl->set_nbytes(nbytes);
  }
  for (auto& [impl, pair] : pairs_) {
    const auto& before = cpu_storages_.at(pair.sim.storage().unsafeGetStorageImpl());
    if (!before.is_alias_of(pair.cpu.storage())) {
      impl->set_storage_keep_dtype(sim_storage(pair.cpu.storage(), impl->device().index()));
    }
    if (!same_geometry(pair.cpu, pair.sim)) {
      impl->set_sizes_and_strides(pair.cpu.sizes(), pair.cpu.strides(), pair.cpu.storage_offset());
    }
  }
}

Tensor Aliases::to_sim(const Tensor& result, DeviceIndex device) {
  if (!result.defined() || !result.is_cpu()) return result;
  auto input = sim_tensors_.find(result.unsafeGetTensorImpl());
  if (input != sim_tensors_.end()) return input->second;
  if (!result.has_storage() || cpu_inputs_.count(result.storage().unsafeGetStorageImpl())) return result;
  return make_tensor(sim_storage(result.storage(), device), result, kSimKey);
}
}  // namespace sim
