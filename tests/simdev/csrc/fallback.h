// The boxed kernel behind nearly every operator.
#pragma once
#include <ATen/core/dispatch/Dispatcher.h>

#include <string>
#include <vector>

namespace sim {
// Runs the operator's CPU kernel on aliases of its device tensors.
void run_on_cpu(const c10::OperatorHandle& op, torch::jit::Stack* stack);

// Registers the fallback for operators that have both a CPU kernel and a decomposition; returns their names.
std::vector<std::string> prefer_cpu_kernels();
}  // namespace sim
