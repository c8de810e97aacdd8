// Streams: copies deferred in order, and what each stream knows of the work of the others.
//
// Kernels are eager, so a stream's queue holds only deferred copies and waits. Ordering is tracked beside it: every
// operation has a position on its stream, and a vector clock says up to which position of each other stream a stream
// (or the host) has waited. Events carry clocks from one to another, exactly as they carry order on a real device.
#pragma once
#include "devices.h"

#include <c10/core/Stream.h>

#include <compare>
#include <cstdint>
#include <functional>
#include <map>

namespace sim {
struct StreamKey {
  DeviceIndex device = 0;
  c10::StreamId id = 0;  // 0 is the device's default stream
  auto operator<=>(const StreamKey&) const = default;
};

using Position = uint64_t;
constexpr Position kEverything = UINT64_MAX;
using Clock = std::map<StreamKey, Position>;

struct Event {
  StreamKey stream;
  Position position = 0;
  Clock clock;
  double milliseconds = 0;
};

// Asynchronous mode: off (the default), every operation is complete when its call returns and nothing is tracked.
bool async_mode();
void set_async_mode(bool on);  // turning it off waits for every stream

StreamKey current_stream(DeviceIndex device);  // of the calling thread
void set_current_stream(StreamKey stream);
StreamKey new_stream(DeviceIndex device);

// Positions: `advance` is called for an operation that runs now, `defer` for one that runs when it is waited for.
Position position(StreamKey stream);
Position advance(StreamKey stream);
Position defer(StreamKey stream, std::function<void()> task);

// Runs the deferred work up to a position. It moves data and gives no ordering: only waits do.
void run_until(StreamKey stream, Position position = kEverything);

Event record_event(StreamKey stream);
void wait_event(StreamKey waiting, const Event& event);

// The host waits: whatever is enqueued later, on any stream, comes after.
void host_wait(const Event& event);
void host_wait(StreamKey stream);
void host_wait_device(DeviceIndex device);

// True when complete, and then the host has in effect waited. Each refusal lets one deferred task run, as a device
// makes progress by itself: otherwise a loop that polls would never end.
bool poll(const Event& event);

// Whether the host has waited for the operation at `position`.
bool host_knows(StreamKey stream, Position position);

// Whether an operation enqueued on `later` now comes after the one at `position` of `earlier`.
bool happens_before(StreamKey earlier, Position position, StreamKey later);
}  // namespace sim
