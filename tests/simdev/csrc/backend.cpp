// What PyTorch asks of an accelerator: the device guard (devices, streams, events) and the hooks.
#include "generators.h"
#include "memory.h"

#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

#include <algorithm>
#include <cstring>

namespace sim {
namespace {
using c10::Stream;

Stream to_stream(StreamKey key) { return Stream(Stream::UNSAFE, Device(kSim, key.device), key.id); }

StreamKey to_key(const Stream& stream) { return {stream.device_index(), stream.id()}; }

struct Guard final : c10::impl::DeviceGuardImplInterface {
  Guard() = default;
  explicit Guard(c10::DeviceType) {}
  c10::DeviceType type() const override { return kSim; }
  DeviceIndex deviceCount() const noexcept override { return device_count(); }
  c10::DeviceCapability getDeviceCapability(Device) const override { return {}; }

  Device getDevice() const override { return Device(kSim, current_device()); }
  void setDevice(Device device) const override { set_current_device(device.index()); }
  Device exchangeDevice(Device device) const override {
    const Device before = getDevice();
    setDevice(device);
    return before;
  }
  void uncheckedSetDevice(Device device) const noexcept override {
    if (device.index() < device_count()) set_current_device(device.index());
  }

  Stream getStream(Device device) const override { return to_stream(current_stream(resolve(device.index()))); }
  Stream getDefaultStream(Device device) const override { return to_stream({resolve(device.index()), 0}); }
  Stream getNewStream(Device device, int) const override { return to_stream(new_stream(resolve(device.index()))); }
  Stream getStreamFromGlobalPool(Device device, bool) const override { return getNewStream(device, 0); }
  Stream exchangeStream(Stream stream) const override {
    const Stream before = getStream(stream.device());
    set_current_stream(to_key(stream));
    return before;
  }
  void* getStreamNativeHandle(const Stream stream) const override { return reinterpret_cast<void*>(stream.id()); }
  bool queryStream(const Stream& stream) const override { return poll(record_event(to_key(stream))); }
  void synchronizeStream(const Stream& stream) const override { host_wait(to_key(stream)); }
  void synchronizeDevice(DeviceIndex device) const override { host_wait_device(resolve(device)); }
  void recordDataPtrOnStream(const c10::DataPtr& data, const Stream& stream) const override {
    device_allocator().recordStream(data, stream);
  }

  // An event that was never recorded is null, and complete.
  void record(void** event, const Stream& stream, DeviceIndex, c10::EventFlag) const override {
    if (!*event) *event = new Event();
    *static_cast<Event*>(*event) = record_event(to_key(stream));
  }
  void block(void* event, const Stream& stream) const override {
    if (event) wait_event(to_key(stream), *static_cast<Event*>(event));
  }
  bool queryEvent(void* event) const override { return !event || poll(*static_cast<Event*>(event)); }
  void synchronizeEvent(void* event) const override {
    if (event) host_wait(*static_cast<Event*>(event));
  }
  double elapsedTime(void* start, void* end, DeviceIndex) const override {
    TORCH_CHECK(start && end, "both events must be recorded before their elapsed time is asked for");
    return static_cast<Event*>(end)->milliseconds - static_cast<Event*>(start)->milliseconds;
  }
  void destroyEvent(void* event, DeviceIndex) const noexcept override { delete static_cast<Event*>(event); }
};

C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);

struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex deviceCount() const override { return device_count(); }
  DeviceIndex getCurrentDevice() const override { return current_device(); }
  void setCurrentDevice(DeviceIndex device) const override { set_current_device(device); }
  DeviceIndex exchangeDevice(DeviceIndex device) const override {
    return Guard().exchangeDevice({kSim, device}).index();
  }
  DeviceIndex maybeExchangeDevice(DeviceIndex device) const override {
    const auto before = current_device();
    Guard().uncheckedSetDevice({kSim, device});
    return before;
  }
  at::Allocator* getPinnedMemoryAllocator() const override { return &host_allocator(); }
  bool isPinnedPtr(const void* address) const override { return pinned_block(address) != nullptr; }
  Device getDeviceFromPtr(void* address) const override { return {kSim, device_of(address)}; }
  const at::Generator& getDefaultGenerator(DeviceIndex device) const override { return default_generator(device); }
  at::Generator getNewGenerator(DeviceIndex device) const override { return new_generator(device); }
  void resizePrivateUse1Bytes(const c10::Storage& storage, size_t nbytes) const override {
    c10::DeviceGuard guard(storage.device());
    run_until(current_stream(storage.device().index()));
    auto data = device_allocator().allocate(nbytes);
    if (auto kept = std::min(nbytes, storage.nbytes())) std::memcpy(data.mutable_get(), storage.data(), kept);
    storage.unsafeGetStorageImpl()->set_data_ptr_noswap(std::move(data));
    storage.unsafeGetStorageImpl()->set_nbytes(nbytes);
  }
};

const bool hooks_registered = (at::RegisterPrivateUse1HooksInterface(new Hooks()), true);
}  // namespace
}  // namespace sim
