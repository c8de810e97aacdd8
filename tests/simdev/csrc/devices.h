// The simulated devices themselves: how many, which one is current, and the lock over all simulator state.
#pragma once
#include <c10/core/Device.h>
#include <c10/core/DispatchKey.h>

#include <mutex>

namespace sim {
using c10::Device;
using c10::DeviceIndex;

constexpr auto kSim = c10::DeviceType::PrivateUse1;
constexpr auto kSimKey = c10::DispatchKey::PrivateUse1;
constexpr int kMaxDevices = 16;

// SIM_DEVICE_COUNT as it was when the library was loaded (1 to kMaxDevices; default 4).
DeviceIndex device_count();

// The calling thread's device; -1 in `device` stands for it wherever PyTorch passes an index.
DeviceIndex current_device();
void set_current_device(DeviceIndex device);  // raises on an ordinal that does not exist
DeviceIndex resolve(DeviceIndex device);
void check_device(DeviceIndex device);

// One lock for everything: this is a test double, contention does not matter, and a recursive lock lets a deferred
// copy run inside whichever call happens to wait for it.
std::recursive_mutex& mutex();
using Lock = std::lock_guard<std::recursive_mutex>;
}  // namespace sim
