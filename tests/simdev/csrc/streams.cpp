#include "races.h"

#include <algorithm>
#include <chrono>
#include <deque>
#include <utility>

namespace sim {
namespace {
struct Task {
  Position position;
  std::function<void()> run;
};

struct StreamState {
  std::deque<Task> tasks;
  Position position = 0;
  Clock seen;
};

struct Streams {
  std::map<StreamKey, StreamState> states;
  std::map<DeviceIndex, c10::StreamId> last_id;
  Clock host_seen;
  bool async = false;
};

Streams& all() {
  static auto& instance = *new Streams();  // leaked: tensors may die after static destructors
  return instance;
}

thread_local std::map<DeviceIndex, c10::StreamId> thread_streams;

void join(Clock& clock, const Clock& other) {
  for (const auto& [stream, position] : other) {
    auto& known = clock[stream];
    known = std::max(known, position);
  }
}

Position known(const Clock& clock, StreamKey stream) {
  auto found = clock.find(stream);
  return found == clock.end() ? 0 : found->second;
}

void host_learns(const Clock& clock) {
  join(all().host_seen, clock);
  check_host_reads();
}

bool done(const StreamState& state, Position position) {
  return state.tasks.empty() || state.tasks.front().position > position;
}

void run_front(StreamState& state) {
  // Popped first: a wait may lead back to this stream, and then asks only for what came before it.
  Task task = std::move(state.tasks.front());
  state.tasks.pop_front();
  task.run();
}
}  // namespace

bool async_mode() { return all().async; }

void set_async_mode(bool on) {
  Lock lock(mutex());
  if (!on) {
    for (DeviceIndex device = 0; device < device_count(); device++) host_wait_device(device);
  }
  all().async = on;
}

StreamKey current_stream(DeviceIndex device) {
  auto found = thread_streams.find(device);
  return {device, found == thread_streams.end() ? 0 : found->second};
}

void set_current_stream(StreamKey stream) { thread_streams[stream.device] = stream.id; }

StreamKey new_stream(DeviceIndex device) {
  Lock lock(mutex());
  return {device, ++all().last_id[device]};
}

Position position(StreamKey stream) {
  Lock lock(mutex());
  return all().states[stream].position;
}

Position advance(StreamKey stream) {
  Lock lock(mutex());
  return ++all().states[stream].position;
}

Position defer(StreamKey stream, std::function<void()> task) {
  Lock lock(mutex());
  auto& state = all().states[stream];
  state.tasks.push_back({++state.position, std::move(task)});
  return state.position;
}

void run_until(StreamKey stream, Position position) {
  Lock lock(mutex());
  auto& state = all().states[stream];
  while (!done(state, position)) run_front(state);
}

Event record_event(StreamKey stream) {
  Lock lock(mutex());
  auto& state = all().states[stream];
  Event event{stream, state.position, state.seen, 0};
  event.clock[stream] = state.position;
  auto now = std::chrono::steady_clock::now().time_since_epoch();
  event.milliseconds = std::chrono::duration<double, std::milli>(now).count();
  return event;
}

void wait_event(StreamKey waiting, const Event& event) {
  Lock lock(mutex());
  join(all().states[waiting].seen, event.clock);
  if (done(all().states[event.stream], event.position)) return;
  // Served when the waiting stream gets there and not before, so that a host buffer overwritten in between shows.
  defer(waiting, [stream = event.stream, position = event.position] { run_until(stream, position); });
}

void host_wait(const Event& event) {
  Lock lock(mutex());
  run_until(event.stream, event.position);
  host_learns(event.clock);
}

void host_wait(StreamKey stream) { host_wait(record_event(stream)); }

void host_wait_device(DeviceIndex device) {
  Lock lock(mutex());
  for (const auto& [stream, state] : all().states) {
    if (stream.device == device) host_wait(stream);
  }
}

bool poll(const Event& event) {
  Lock lock(mutex());
  auto& state = all().states[event.stream];
  if (!done(state, event.position)) {
    run_front(state);
    return false;
  }
  host_learns(event.clock);
  return true;
}

bool host_knows(StreamKey stream, Position position) {
  Lock lock(mutex());
  return known(all().host_seen, stream) >= position;
}

bool happens_before(StreamKey earlier, Position position, StreamKey later) {
  if (earlier == later) return true;
  Lock lock(mutex());
  return known(all().states[later].seen, earlier) >= position || host_knows(earlier, position);
}
}  // namespace sim
