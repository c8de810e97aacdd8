// Copies between host and devices, now or deferred, and how many bytes they moved.
#pragma once
#include "aliasing.h"

namespace sim {
struct Traffic {
  int64_t host_to_device = 0;
  int64_t device_to_host = 0;
  int64_t device_to_device = 0;  // between two devices, counted at the one that receives
};

Traffic traffic(DeviceIndex device);
void reset_traffic();

// aten::_copy_from: one of the two is a device tensor.
Tensor copy_from(const Tensor& source, const Tensor& destination, bool non_blocking);
}  // namespace sim
