#include "devices.h"

#include <c10/util/Exception.h>

#include <algorithm>
#include <cstdlib>

namespace sim {
namespace {
thread_local DeviceIndex thread_device = 0;

DeviceIndex read_device_count() {
  const char* text = std::getenv("SIM_DEVICE_COUNT");
  return static_cast<DeviceIndex>(std::clamp(text ? std::atoi(text) : 4, 1, kMaxDevices));
}
}  // namespace

DeviceIndex device_count() {
  static const DeviceIndex count = read_device_count();
  return count;
}

void check_device(DeviceIndex device) {
  TORCH_CHECK(device >= 0 && device < device_count(), "sim: invalid device ordinal ", int(device), ": there are ",
              int(device_count()), " devices (SIM_DEVICE_COUNT)");
}

DeviceIndex current_device() { return thread_device; }

DeviceIndex resolve(DeviceIndex device) { return device < 0 ? thread_device : device; }

void set_current_device(DeviceIndex device) {
  if (device < 0) return;
  check_device(device);
  thread_device = device;
}

std::recursive_mutex& mutex() {
  static auto& instance = *new std::recursive_mutex();  // leaked: tensors may die after static destructors
  return instance;
}
}  // namespace sim
