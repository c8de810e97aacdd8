#include "races.h"

#include <algorithm>
#include <cstring>
#include <list>
#include <sstream>

namespace sim {
namespace {
std::vector<std::string>& messages() {
  static auto& instance = *new std::vector<std::string>();
  return instance;
}

std::string describe(const Access& access) {
  std::ostringstream text;
  text << access.what << " (" << (access.use == Use::kWrite ? "write" : "read") << ", stream " << access.stream.id
       << " of sim:" << int(access.stream.device) << ")";
  return text.str();
}

void report(Access& earlier, const Access& later) {
  earlier.reported = true;
  auto nbytes = std::min(earlier.range.end, later.range.end) - std::max(earlier.range.begin, later.range.begin);
  std::ostringstream text;
  text << describe(later) << " is not ordered after " << describe(earlier) << " on the same " << nbytes << " bytes";
  messages().push_back(text.str());
}

bool conflict(const Access& earlier, const Access& later) {
  return earlier.range.overlaps(later.range) && (earlier.use == Use::kWrite || later.use == Use::kWrite) &&
      !happens_before(earlier.stream, earlier.position, later.stream);
}

// Whoever comes after `later` and is ordered after it is also ordered after `earlier`: no need to keep both.
bool replaces(const Access& later, const Access& earlier) {
  return later.range.covers(earlier.range) && (later.use == Use::kWrite || earlier.use == Use::kRead) &&
      happens_before(earlier.stream, earlier.position, later.stream);
}

struct HostRead {
  Range range;
  StreamKey stream;
  Position position;
  std::vector<char> bytes;
};

std::list<HostRead>& host_reads() {
  static auto& instance = *new std::list<HostRead>();
  return instance;
}

void compare(const HostRead& read) {
  if (std::memcmp(read.bytes.data(), reinterpret_cast<const void*>(read.range.begin), read.bytes.size()) == 0) return;
  std::ostringstream text;
  text << "the host overwrote pinned memory before a copy (read, stream " << read.stream.id << " of sim:"
       << int(read.stream.device) << ") of its " << read.bytes.size() << " bytes was known to have run";
  messages().push_back(text.str());
}

template <class Condition>
void compare_where(Condition condition) {
  Lock lock(mutex());
  host_reads().remove_if([&](const HostRead& read) {
    if (!condition(read)) return false;
    compare(read);
    return true;
  });
}
}  // namespace

void note_host_read(Range range, StreamKey stream, Position position) {
  if (range.empty()) return;
  Lock lock(mutex());
  const auto* begin = reinterpret_cast<const char*>(range.begin);
  host_reads().push_back({range, stream, position, {begin, begin + (range.end - range.begin)}});
}

void check_host_reads() {
  compare_where([](const HostRead& read) { return host_knows(read.stream, read.position); });
}

void check_host_reads(Range range) {
  compare_where([&](const HostRead& read) { return read.range.overlaps(range); });
}

void AccessLog::add(const Access& access) {
  if (!async_mode() || access.range.empty()) return;
  Lock lock(mutex());
  for (auto& earlier : accesses_) {
    if (!earlier.reported && conflict(earlier, access)) report(earlier, access);
  }
  std::erase_if(accesses_, [&](const Access& earlier) { return replaces(access, earlier); });
  accesses_.push_back(access);
}

void AccessLog::check_free(const Access& access, const std::set<StreamKey>& recorded) {
  if (!async_mode() || access.range.empty()) return;
  Lock lock(mutex());
  for (auto& earlier : accesses_) {
    if (!earlier.reported && !recorded.count(earlier.stream) && conflict(earlier, access)) report(earlier, access);
  }
}

void AccessLog::finish(Range range, bool reads_only) const {
  for (const auto& access : accesses_) {
    if (access.range.overlaps(range) && (!reads_only || access.use == Use::kRead)) {
      run_until(access.stream, access.position);
    }
  }
}

std::vector<std::string> violations() {
  Lock lock(mutex());
  return messages();
}

void clear_violations() {
  Lock lock(mutex());
  messages().clear();
}
}  // namespace sim
