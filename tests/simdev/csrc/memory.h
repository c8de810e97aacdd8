// Device memory (host memory, counted against a capacity per device) and pinned host memory.
#pragma once
#include "races.h"

#include <ATen/core/CachingHostAllocator.h>
#include <c10/core/CachingDeviceAllocator.h>
#include <c10/core/Storage.h>

#include <optional>

namespace sim {
struct Block {
  DeviceIndex device;
  size_t nbytes;
  StreamKey born;  // the stream that may reuse the memory without further ado
  void* data = nullptr;
  c10::Storage adopted;  // the CPU storage, where a CPU kernel allocated the memory
  std::set<StreamKey> recorded;
  AccessLog accesses;
  Range range() const { return {reinterpret_cast<uintptr_t>(data), reinterpret_cast<uintptr_t>(data) + nbytes}; }
};

struct HostBlock {
  void* data = nullptr;
  size_t nbytes;
  std::map<StreamKey, Position> pending;  // deferred copies from or to it: it is freed after them
};

c10::DeviceAllocator& device_allocator();
at::HostAllocator& host_allocator();

// The block behind a device storage, or null (no bytes, or memory that the simulator did not allocate).
Block* block_of(const c10::Storage& storage);
// The pinned block that holds an address, or null.
HostBlock* pinned_block(const void* address);
DeviceIndex device_of(const void* address);

// Turns memory that a CPU kernel allocated into a device's: it is charged, and then freed like any other.
// Raises OutOfMemoryError.
c10::DataPtr adopt(const c10::Storage& cpu_storage, DeviceIndex device);

void set_capacity(DeviceIndex device, std::optional<size_t> nbytes);
int64_t pinned_bytes();
}  // namespace sim
