// Random numbers: a device's generator wraps a CPU generator, so that a seed gives the CPU's numbers.
#pragma once
#include "devices.h"

#include <ATen/core/Generator.h>

namespace sim {
const at::Generator& default_generator(DeviceIndex device);
at::Generator new_generator(DeviceIndex device);
at::Generator cpu_generator(const at::Generator& generator);  // the one inside
}  // namespace sim
